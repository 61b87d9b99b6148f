# SPDX-License-Identifier: Apache-2.0
"""A hostile client: every call of the service with bytes that are wrong in every way, from one seed.

A request begins as one that the server would accept. Then fields are replaced by what hurts (nothing, huge numbers,
other lengths, what belongs to others), or its bytes are flipped, cut, doubled; or there was never a message in them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from kvstore.block import FORMAT_VERSION, Chain, ModelId, Root
from kvstore.service.bulk import checksum
from kvstore.service.handshake import hash_vector, model_message
from kvstore.service.knock import knock
from kvstore.wire import kvstore_pb2 as pb
from tests.conftest import chain_of

SERVICE = pb.DESCRIPTOR.services_by_name["KVStore"]
METHODS = {method.name: method for method in SERVICE.methods}
_ENDLESS = ("Watch",)
_TOO_LARGE = bytes(9 << 20)
_NUMBERS = (0, 1, 2, 7, 31, 255, 65_535, 65_536, 131_073, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
_FLOATS = (0.0, -1.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
_LENGTHS = (0, 1, 3, 4, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 256, 257, 1_000, 40_000)
_TEXTS = ("", "r", "0/r", "1/r", "\x00", "a" * 300, "ä" * 200, "../../etc", "1" * 2_000)


@dataclass
class Hostile:
    """One attacker's sessions and what it knows of others. For one thread."""

    address: str
    rng: random.Random
    model: ModelId
    token: str
    salt: bytes
    foreign: Chain
    """Of a tenant that this one has no right to."""
    secrets: list[bytes] = field(default_factory=list)
    """Sessions and engine keys that it has heard of: its own, ended ones, and those of its fellows."""

    def __post_init__(self) -> None:
        self._channel = grpc.insecure_channel(
            self.address, options=(("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))
        )
        self._roots = [Root(self.model, salt=self.salt), Root(self.model), Root(self.model, b"adapter", self.salt)]
        self._last_lease = 0
        self._sessions: dict[bool, pb.OpenReply] = {}
        for mapped in (False, True):
            self._open(mapped)

    # -- sending -----------------------------------------------------------------------------------------------

    def attack(self) -> tuple[str, grpc.StatusCode, str]:
        """Send one request; returns its call, the status it ended with and the details of that."""
        method = METHODS[self.rng.choice(list(METHODS))]
        session = self._sessions[self.rng.random() < 0.5].session
        if self.rng.random() < 0.5:
            self._prepare(method.name, session)
        if method.client_streaming:
            requests = [self._spoiled(message) for message in self._several(method.name, session)]
        else:
            requests = [self._spoiled(self._request(method.name, session))]
        code, details = self._send(method, requests)
        if code is grpc.StatusCode.UNAUTHENTICATED or self.rng.random() < 0.01:
            self._open(self.rng.random() < 0.5)
        return method.name, code, details

    def _send(self, method: MethodDescriptor, requests: list[bytes]) -> tuple[grpc.StatusCode, str]:
        path = f"/{SERVICE.full_name}/{method.name}"
        endless = method.name in _ENDLESS
        timeout_s = 0.2 if endless else 10.0
        try:
            if not method.server_streaming:
                if method.client_streaming:
                    self._channel.stream_unary(path)(iter(requests), timeout=timeout_s)
                else:
                    self._channel.unary_unary(path)(requests[0], timeout=timeout_s)
                return grpc.StatusCode.OK, ""
            given: Any = iter(requests) if method.client_streaming else requests[0]
            open_call = self._channel.stream_stream if method.client_streaming else self._channel.unary_stream
            call: Any = open_call(path)(given, timeout=timeout_s)
            most = self.rng.choice((1, 1, 2, 1_000)) if not endless else self.rng.choice((1, 1, 1, 2))
            for number, _ in enumerate(call, start=1):
                if number == most:
                    call.cancel()
                    break
            return grpc.StatusCode.OK, ""
        except grpc.RpcError as failure:
            code: grpc.StatusCode = failure.code()
            if endless and code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return grpc.StatusCode.OK, ""
            return code, str(failure.details())

    def _open(self, mapped: bool) -> None:
        """Have a session again, ending the one before."""
        ticket = b""
        if mapped:
            with knock(self.address.removeprefix("unix:"), 5.0) as passed:
                ticket = passed.ticket
        before = self._sessions[mapped].session if mapped in self._sessions else b""
        request = self._hello(ticket=ticket, previous_session=before)
        opened = pb.OpenReply.FromString(
            self._channel.unary_unary(f"/{SERVICE.full_name}/Open")(request.SerializeToString(), timeout=10)
        )
        self._sessions[mapped] = opened
        self.secrets += [opened.session, opened.engine_key]
        del self.secrets[:-16]
        message = pb.OpenModelRequest(
            session=opened.session, model=model_message(self.model), digest=self.model.digest()
        )
        self._channel.unary_unary(f"/{SERVICE.full_name}/OpenModel")(message.SerializeToString(), timeout=10)

    def close(self) -> None:
        """Say bye with each session, as a client that means no harm would."""
        for opened in self._sessions.values():
            beat = pb.Beat(session=opened.session, bye=True).SerializeToString()
            try:
                list(self._channel.stream_stream(f"/{SERVICE.full_name}/Session")(iter([beat]), timeout=10))
            except grpc.RpcError:  # it has ended already
                pass
        self._channel.close()

    def _prepare(self, name: str, session: bytes) -> None:
        """What a client does before this call, so that it has something to be about. As it goes."""
        before = {"Commit": "Save", "Write": "Save", "Join": "Save"}
        before |= dict.fromkeys(("MatchPartial", "Load", "LoadHost", "Read"), "Match")
        before |= dict.fromkeys(("Match", "Fetch"), "Commit")
        if name in before:
            if before[name] == "Commit":
                self._send(METHODS["Save"], [self._request("Save", session).SerializeToString()])
            self._send(METHODS[before[name]], [self._request(before[name], session).SerializeToString()])

    # -- requests that would do ---------------------------------------------------------------------------------

    def _hello(self, **fields: Any) -> pb.OpenRequest:
        values = {"protocol_versions": [1], "format_version": FORMAT_VERSION, "hash_vector": hash_vector()}
        return pb.OpenRequest(**values, client_name="hostile", token=self.token, **fields)

    def _chain(self) -> Chain:
        """A few blocks, of few conversations, so that requests meet."""
        if self.rng.random() < 0.1:
            return self.foreign
        return chain_of(self.rng.choice(self._roots), self.rng.randrange(1, 9), seed=self.rng.randrange(60))

    def _delta(self, chain: Chain) -> pb.ChainDelta:
        number, root = self.rng.randrange(1, 5), chain.root
        if self.rng.random() < 0.2:
            known = self.rng.randrange(len(chain) + 1)
            tail = chain.ids[known - 1] if known else b""
            return pb.ChainDelta(chain=number, num_known=known, ids=b"".join(chain.ids[known:]), known_tail=tail)
        message = pb.Root(model=1, adapter=root.adapter, salt=root.salt, id=root.id)
        return pb.ChainDelta(chain=number, ids=b"".join(chain.ids), root=message)

    def _lease(self, *, new: bool = False) -> int:
        """A lease's number: a new one, the last, or any."""
        if new and self.rng.random() < 0.8:
            self._last_lease += 1
            return self._last_lease
        return self._last_lease if self.rng.random() < 0.5 else self.rng.randrange(self._last_lease + 12)

    def _packed(self, kind: str) -> bytes:
        most = 9 if kind == "<u4" else self._last_lease + 2
        some = [self.rng.randrange(most) for _ in range(self.rng.randrange(4))]
        return np.array(some, kind).tobytes()

    def _request(self, name: str, session: bytes) -> Message:
        """A request of that call that might be an honest one."""
        chain = self._chain()
        start = self.rng.randrange(len(chain))
        stop = self.rng.randrange(start, len(chain) + 1)
        about = {"session": session, "chain": self._delta(chain)}
        contents = pb.Contents(start=0, tokens=chain.contents(0, len(chain))[0])
        request = self.rng.choice(("r", "s", "t"))
        ended = pb.Ended(loads=self._packed("<u8"), saves=self._packed("<u8"), requests=[request])
        ended.announced.add(chain=about["chain"].chain, start=start, stop=stop)
        load = {"session": session, "request": request, "lease": self._lease(new=True)}
        load["partial_tokens"] = self.rng.choice((0, 0, 0, 3))
        peek = {"session": session, "root": chain.root.id, "ids": b"".join(chain.ids), "parts": b"\x00"}
        make: dict[str, Callable[[], Message]] = {
            "Open": lambda: self._hello(pid=self.rng.randrange(1 << 16)),
            "OpenModel": lambda: pb.OpenModelRequest(
                session=session, model=model_message(self.model), digest=self.model.digest()
            ),
            "Match": lambda: pb.MatchRequest(**about, request=request, wait_ms=self.rng.choice((0, 0, 5))),
            "MatchPartial": lambda: pb.MatchPartialRequest(
                session=session,
                request=request,
                num_host_blocks=self.rng.choice((0, 0, start)),
                tokens=contents.tokens[: self.rng.choice((3, 8, 12, 1 << 10))],
            ),
            "Announce": lambda: pb.AnnounceRequest(
                **about, start=start, stop=stop, number=self.rng.randrange(3), withdraw=self.rng.random() < 0.3
            ),
            "Load": lambda: pb.LoadRequest(**load, contents=self.rng.choice((contents, None))),
            "LoadHost": lambda: pb.LoadRequest(**load),
            "Read": lambda: pb.LoadRequest(**load, contents=self.rng.choice((contents, None))),
            "Release": lambda: pb.ReleaseRequest(
                session=session, ended=ended, window_of=self.rng.choice((0, self._lease())), passed=start
            ),
            "Save": lambda: pb.SaveRequest(
                **about, start=self.rng.choice((0, 0, start)), stop=stop, contents=contents, lease=self._lease(new=True)
            ),
            "Commit": lambda: pb.CommitRequest(session=session, lease=self._lease(), indices=self._packed("<u4")),
            "Join": lambda: pb.JoinRequest(
                session=session,
                engine_key=self.rng.choice(self.secrets),
                lease=self._lease(),
                leave=self.rng.random() < 0.3,
            ),
            "Touch": lambda: pb.TouchRequest(**about, num_blocks=stop),
            "Peek": lambda: pb.PeekRequest(**peek, used=self.rng.random() < 0.5),
            "Fetch": lambda: pb.PeekRequest(**peek),
            "Watch": lambda: pb.WatchRequest(session=session, snapshot=self.rng.random() < 0.5),
            "Stats": lambda: pb.StatsRequest(session=session),
            "Inspect": lambda: (
                pb.InspectRequest(**about)
                if self.rng.random() < 0.5
                else pb.InspectRequest(session=session, ids=b"".join(chain.ids))
            ),
            "Clear": lambda: pb.ClearRequest(session=session, root=chain.root.id),
            "Warm": lambda: pb.WarmRequest(**about, contents=contents),
            "Check": lambda: pb.CheckRequest(session=session),
        }
        return make[name]()

    def _several(self, name: str, session: bytes) -> Iterator[Message]:
        """Messages of a call that takes many."""
        if name == "Session":
            for _ in range(self.rng.randrange(4)):
                yield pb.Beat(
                    session=session,
                    live_leases=self._packed("<u8"),
                    highest_lease=self._lease(),
                    ticket=self.rng.randbytes(self.rng.choice((0, 0, 1, 16))),
                )
            return
        yield pb.WriteRequest(session=session, lease=self._lease())
        index = self.rng.choice((0, 0, 0, 1, 2))
        for _ in range(self.rng.randrange(4)):
            data = self.rng.randbytes(self.rng.choice((0, 1, 100, 4096, 4096, 4096, 4096, 4096, 5000)))
            right = checksum(data).to_bytes(8, "little")
            yield pb.WriteRequest(
                index=index, data=data, checksums=self.rng.choice((right, right, right, b"", data[:8]))
            )
            index += 1

    # -- spoiling them ------------------------------------------------------------------------------------------

    def _spoiled(self, message: Message) -> bytes:
        """The message's bytes, wrong in some way, or as they are."""
        dice = self.rng.random()
        if dice < 0.10:
            return self.rng.randbytes(self.rng.choice(_LENGTHS))
        if dice < 0.101:
            return _TOO_LARGE
        if dice < 0.60:
            for _ in range(self.rng.randrange(1, 4)):
                self._twist(message)
        packed = message.SerializeToString()
        return self._damaged(packed) if 0.55 < dice < 0.75 else packed

    def _twist(self, message: Message) -> None:
        """Replace one field, somewhere within, by what hurts."""
        one = self.rng.choice(message.DESCRIPTOR.fields)
        if one.message_type is not None and not one.is_repeated:
            inner = getattr(message, one.name)
            if self.rng.random() < 0.2:
                message.ClearField(one.name)
            else:
                inner.SetInParent()
                self._twist(inner)
            return
        if one.message_type is not None:
            if not one.message_type.GetOptions().map_entry:
                self._twist(getattr(message, one.name).add())
            return
        value = self._hurtful(one)
        if one.is_repeated:
            getattr(message, one.name).extend([value] * self.rng.choice((1, 2, 200)))
        else:
            setattr(message, one.name, value)

    def _hurtful(self, one: FieldDescriptor) -> Any:
        kind = FieldDescriptor
        if one.type == kind.TYPE_BYTES:
            known = [*self.secrets, self.foreign.root.id, b"".join(self.foreign.ids), self.foreign.root.salt]
            if self.rng.random() < 0.4:
                return self.rng.choice(known)
            return self.rng.randbytes(self.rng.choice(_LENGTHS))
        if one.type == kind.TYPE_STRING:
            return self.rng.choice(_TEXTS)
        if one.type == kind.TYPE_BOOL:
            return self.rng.random() < 0.5
        if one.type in (kind.TYPE_DOUBLE, kind.TYPE_FLOAT):
            return self.rng.choice(_FLOATS)
        bits = 32 if one.type == kind.TYPE_UINT32 else 64
        return self.rng.choice([number for number in _NUMBERS if number < 1 << bits])

    def _damaged(self, packed: bytes) -> bytes:
        data = bytearray(packed)
        for _ in range(self.rng.randrange(1, 5)):
            if not data:
                break
            at = self.rng.randrange(len(data))
            match self.rng.randrange(4):
                case 0:
                    data[at] ^= 1 << self.rng.randrange(8)
                case 1:
                    del data[at:]
                case 2:
                    data[at:at] = self.rng.randbytes(self.rng.randrange(1, 9))
                case _:
                    data += data[at : at + 64]
        return bytes(data)
