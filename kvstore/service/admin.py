# SPDX-License-Identifier: Apache-2.0
"""A client for people and scripts: looks in and takes care, but moves no blocks.

Plain calls under a deadline. What goes wrong leaves here as one of kvstore's errors, in a sentence that says what
to do; a server that was restarted is met again by itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.block import FORMAT_VERSION, Chain, ModelId
from kvstore.errors import AccessDenied, ConfigError, KVStoreError, ProtocolError, ServiceUnavailable
from kvstore.service.handshake import MAX_MESSAGE_BYTES, PROTOCOL_VERSIONS, hash_vector, model_message, model_of
from kvstore.service.knock import ticket_of, trust_socket
from kvstore.service.reach import unreachable
from kvstore.service.status import UnknownSession, error_of, is_transport
from kvstore.service_options import check_token_is_hidden, default_address, socket_path
from kvstore.wire import kvstore_pb2 as pb
from kvstore.wire.kvstore_pb2_grpc import KVStoreStub

Reply = TypeVar("Reply")

_CHAIN = 1
_BEAT_S = 2.0
_LEAVE_S = 0.5
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Which server, and what to show it.

    Attributes:
        address: unix:PATH or host:port.
        token: access token; empty for none.
        tls_ca: PEM file of who signs servers; tls_cert, tls_key: PEM files of this client. Empty: no TLS.
        deadline_s: of each call.
    """

    address: str
    token: str = field(default="", repr=False)
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    deadline_s: float = 5.0

    def __post_init__(self) -> None:
        check_token_is_hidden(self.address, self.token, encrypted=self.encrypted)

    @property
    def encrypted(self) -> bool:
        """Whether bytes cross a network under TLS; a Unix socket has none, and needs none."""
        return socket_path(self.address) is None and bool(self.tls_ca or self.tls_cert)

    @classmethod
    def of(cls, address: str = "", *, default: str = "", environ: Mapping[str, str] | None = None) -> Target:
        """`address`, or KVSTORE_ADDRESS, or `default`, or where a server of this user is.

        The rest comes from the environment. KVSTORE_TOKEN is not a flag, since everybody on the host can see the
        flags of a process.
        """
        env = os.environ if environ is None else environ
        return cls(
            address=address or env.get("KVSTORE_ADDRESS", "") or default or default_address(),
            token=env.get("KVSTORE_TOKEN", ""),
            tls_ca=env.get("KVSTORE_TLS_CA", ""),
            tls_cert=env.get("KVSTORE_TLS_CERT", ""),
            tls_key=env.get("KVSTORE_TLS_KEY", ""),
        )


class Admin:
    """A session with one server. A context manager."""

    def __init__(self, target: Target, *, name: str = "kvstore") -> None:
        """Open a session. Raises ServiceUnavailable, AccessDenied, or ProtocolError where the two sides do not fit."""
        self.target = target
        self._name = name
        self._channel = _channel_to(target)
        self._stub = KVStoreStub(self._channel)  # type: ignore[no-untyped-call]
        try:
            self.opened = self._open()
        except BaseException:
            self._channel.close()
            raise

    def _open(self) -> pb.OpenReply:
        request = pb.OpenRequest(
            protocol_versions=PROTOCOL_VERSIONS,
            format_version=FORMAT_VERSION,
            hash_vector=hash_vector(),
            token=self.target.token,
            client_name=self._name,
            pid=os.getpid(),
        )
        try:
            return self._opened(request)
        except AccessDenied:
            path = socket_path(self.target.address)
            if request.token or path is None:
                raise
        request.ticket = ticket_of(path, self.target.deadline_s)  # the server may tell users apart
        return self._opened(request)

    def _opened(self, request: pb.OpenRequest) -> pb.OpenReply:
        with self._errors():
            reply: pb.OpenReply = self._stub.Open(request, timeout=self.target.deadline_s)
        return reply

    def stats(self) -> pb.StatsReply:
        """Counters, gauges, settings in effect, clients."""
        reply: pb.StatsReply = self._call(self._stub.Stats, lambda session: pb.StatsRequest(session=session))
        return reply

    def models(self) -> tuple[ModelId, ...]:
        """Models that the server has open, as far as this client may know."""
        return tuple(map(model_of, self.stats().models))

    def check(self) -> list[str]:
        """Broken invariants of the store."""
        reply: pb.CheckReply = self._call(self._stub.Check, lambda session: pb.CheckRequest(session=session))
        return list(reply.faults)

    def inspect(self, ids: bytes) -> list[pb.BlockInfo]:
        """What is known of blocks, by hash (32 bytes each)."""
        blocks: list[pb.BlockInfo] = []
        while len(blocks) * 32 < len(ids):
            found = self._inspect_some(ids[len(blocks) * 32 :])
            if not found:
                break
            blocks += found
        return blocks

    def _inspect_some(self, ids: bytes) -> list[pb.BlockInfo]:
        """The first of `ids`, as many as fit into a reply."""
        reply: pb.InspectReply = self._call(
            self._stub.Inspect, lambda session: pb.InspectRequest(session=session, ids=ids)
        )
        return list(reply.blocks)

    def inspect_chain(self, chain: Chain) -> list[pb.BlockInfo]:
        """What is known of the blocks of a chain, lower tiers included."""
        reply: pb.InspectReply = self._call(
            self._stub.Inspect,
            lambda session: pb.InspectRequest(session=session, chain=self._whole(session, chain)),
        )
        blocks = list(reply.blocks)
        return blocks + self.inspect(b"".join(chain.ids[len(blocks) :]))  # what did not fit into one reply

    def clear(self, root: bytes = b"") -> int:
        """Remove what lies under a root, or everything; returns how many blocks left the host."""
        reply: pb.ClearReply = self._call(
            self._stub.Clear, lambda session: pb.ClearRequest(session=session, root=root), deadline_s=60.0
        )
        return reply.num_blocks

    def warm(self, chain: Chain, deadline_s: float) -> pb.WarmReply:
        """Bring a prefix from lower tiers into the host."""
        tokens = b"".join(chain.meta(index).tokens for index in range(len(chain)))
        reply: pb.WarmReply = self._call(
            self._stub.Warm,
            lambda session: pb.WarmRequest(
                session=session, chain=self._whole(session, chain), contents=pb.Contents(start=0, tokens=tokens)
            ),
            deadline_s=deadline_s,
        )
        return reply

    def serving(self) -> bool:
        """Whether the server takes requests: False while it drains. By the standard health service, in one call."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)  # its types do not know its calls
        with self._errors():
            reply = stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=self.target.deadline_s)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def reopen(self) -> None:
        """Open another session, where the server was lost. Raises what opening the first one does."""
        self.opened = self._open()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within it the session does not end for want of calls; where the server opens another, that one is kept."""
        done = threading.Event()

        def keep() -> None:
            while not done.is_set():
                self._beat(self.opened.session, done)
                done.wait(_BEAT_S)  # the server is away, or the next call opens another session

        beating = threading.Thread(target=keep, name="kvstore-beat", daemon=True)
        beating.start()
        try:
            yield
        finally:
            done.set()
            beating.join(1.0)

    def watch(
        self, *, snapshot: bool, with_tokens: bool, boot_id: bytes = b"", after_sequence: int = 0
    ) -> Generator[pb.WatchReply]:
        """Block events until the server stops; each reply holds some.

        With the `boot_id` and `sequence` of an earlier reply it goes on after that one, or begins with a `gap`.
        """
        session = self.opened.session
        request = pb.WatchRequest(
            session=session,
            snapshot=snapshot,
            without_tokens=not with_tokens,
            boot_id=boot_id,
            after_sequence=after_sequence,
        )
        done = threading.Event()
        beating = threading.Thread(target=self._beat, args=(session, done), name="kvstore-beat", daemon=True)
        beating.start()
        stream = self._stub.Watch(request)
        try:
            with self._errors():
                yield from stream
        finally:
            stream.cancel()
            done.set()
            beating.join(1.0)

    def _beat(self, session: bytes, done: threading.Event) -> None:
        """Keep the session alive until `done`."""

        def beats() -> Iterator[pb.Beat]:
            yield pb.Beat(session=session)
            while not done.wait(_BEAT_S):
                yield pb.Beat(session=session)

        try:
            for _ in self._stub.Session(beats()):
                pass
        except grpc.RpcError:  # the watch itself says what is wrong
            pass

    def _leave(self) -> None:
        """Tell the server that this client goes, so that status does not show it any longer."""
        try:
            for _ in self._stub.Session(iter([pb.Beat(session=self.opened.session, bye=True)]), timeout=_LEAVE_S):
                pass
        except grpc.RpcError:  # it forgets us by itself after a moment
            pass

    def _whole(self, session: bytes, chain: Chain) -> pb.ChainDelta:
        root = chain.root
        model: pb.OpenModelReply = self._call(
            self._stub.OpenModel,
            lambda _: pb.OpenModelRequest(session=session, model=model_message(root.model), digest=root.model.digest()),
        )
        message = pb.Root(model=model.model, adapter=root.adapter, salt=root.salt, id=root.id)
        return pb.ChainDelta(chain=_CHAIN, num_known=0, ids=b"".join(chain.ids), root=message)

    def _call(
        self, call: Callable[..., Reply], request_of: Callable[[bytes], object], *, deadline_s: float | None = None
    ) -> Reply:
        """One call under a deadline. A session that the server no longer knows is opened once more."""
        timeout_s = deadline_s or self.target.deadline_s
        try:
            with self._errors(timeout_s):
                return call(request_of(self.opened.session), timeout=timeout_s)
        except UnknownSession:
            self.opened = self._open()
        with self._errors(timeout_s):
            return call(request_of(self.opened.session), timeout=timeout_s)

    def _errors(self, timeout_s: float | None = None) -> _Translated:
        return _Translated(self.target, timeout_s or self.target.deadline_s)

    def close(self) -> None:
        self._leave()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Translated:
    """Turns grpc's errors inside it into kvstore's."""

    def __init__(self, target: Target, deadline_s: float) -> None:
        self._address = target.address
        self._encrypted = target.encrypted
        self._deadline_s = deadline_s

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, grpc.RpcError):
            raise self._error_of(error) from error

    def _error_of(self, failure: grpc.RpcError) -> KVStoreError:
        if failure.code() is grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolError(
                f"the server at {self._address} does not serve this call: it is older than this client"
            )
        if not is_transport(failure):
            return error_of(failure)
        if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return ServiceUnavailable(f"the server at {self._address} did not answer within {self._deadline_s:g} s")
        return unreachable(self._address, encrypted=self._encrypted)


def _channel_to(target: Target) -> grpc.Channel:
    if (place := socket_path(target.address)) is not None:
        trust_socket(place)
    if not target.encrypted:
        return grpc.insecure_channel(target.address, _CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        _read(target.tls_ca, "KVSTORE_TLS_CA"),
        _read(target.tls_key, "KVSTORE_TLS_KEY"),
        _read(target.tls_cert, "KVSTORE_TLS_CERT"),
    )
    return grpc.secure_channel(target.address, credentials, _CHANNEL_OPTIONS)


def _read(path: str, name: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} is {path}: it cannot be read: {error.strerror}") from error
