# SPDX-License-Identifier: Apache-2.0
"""The sidecar's client: a `Store` whose blocks lie with a server, on this host or another.

Calls carry block hashes, or what is new of a chain; bytes are copied in this process, to and from the server's own
memory (`kvstore.service.mapped`), or streamed (`kvstore.service.remote`).

Invariants
1. No answer is a miss: within its deadline every call returns, and while the server is away at once.
2. What a call raises means that the caller has to change something: a setting, a right, an order of calls.
3. A forked child is refused, and harms nobody.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from kvstore.api import NO_HINT, Hint, Load, Match, Register, Registration, Save
from kvstore.block import Chain, ModelId, RootId
from kvstore.errors import ConfigError, KVStoreError, LeaseError, ServiceUnavailable, UnknownLease
from kvstore.layout import BlockLayout, layout_of
from kvstore.service.announcement import SentAnnouncement
from kvstore.service.buffers import Buffers
from kvstore.service.connection import Connection, LinkOptions
from kvstore.service.handshake import MAX_SAVE_PARTS
from kvstore.service.knock import Unmapped
from kvstore.service.lending import Lending
from kvstore.service.link import Link
from kvstore.service.mapped import AdoptedLoad, MappedPlane
from kvstore.service.mapped_save import JoinedSave, MappedSave
from kvstore.service.plane import Cells, DataPlane, Down, NoLoad, NoSave
from kvstore.service.remote import RemotePlane
from kvstore.service_options import socket_path
from kvstore.stats import Stats
from kvstore.wire import kvstore_pb2 as pb

_MAX_MATCHES = 65_536
_CARE_S = 60.0
_MISS = Match(0, 0, 0, settled=True)


@dataclass(frozen=True, slots=True)
class _Matched:
    """What a match found; `connection` None where nobody answered."""

    connection: Connection | None
    chain: Chain
    cells: Cells
    match: Match
    num_partial_tokens: int | None = None
    """What `match_partial` finds, where the answer came with the match."""


class SidecarStore:
    """Implements `kvstore.api.Store` over a server. Make it with `kvstore.connect`."""

    def __init__(self, options: LinkOptions, *, wait_s: float = 5.0) -> None:
        """Connect. Raises ServiceUnavailable where nobody answers within `wait_s`, or what the server refuses."""
        self._stats = Stats()
        self._lending = Lending()
        self._link = Link(options, _plane_maker(options, self._stats, self._lending), self._stats)
        self._lock = threading.Lock()
        self._matches: OrderedDict[str, _Matched] = OrderedDict()
        self._link.start(wait_s)

    @property
    def is_up(self) -> bool:
        """Whether the server answers, as far as is known."""
        return self._link.is_up

    # -- models ------------------------------------------------------------------------------------------------

    def open(self, model: ModelId) -> BlockLayout:
        """Agree on a model; by itself again after a restart of the server. Raises ConfigError."""
        return self._link.open_model(model)

    def register_memory(self, register: Register) -> Registration:
        """See `kvstore.api.LendsMemory`. A client without a map of the server's memory never calls `register`."""
        return self._lending.begin(register)

    # -- finding -----------------------------------------------------------------------------------------------

    def match(
        self,
        chain: Chain,
        request: str,
        *,
        hint: Hint = NO_HINT,
        parts: Sequence[int] | None = None,
        wait_s: float | None = 0.0,
        soon: bool = False,
    ) -> Match:
        """See `kvstore.api.Store.match`."""
        cells = _cells(chain, parts)
        connection = None
        try:
            connection = up = self._link.up()
            reply = self._link.about(
                up,
                chain,
                lambda delta, _: self._link.call(
                    up,
                    up.stub.Match,
                    pb.MatchRequest(
                        session=up.session,
                        request=request,
                        chain=delta,
                        hint=_hint(hint),
                        parts=_packed(parts),
                        wait_ms=round((wait_s or 0.0) * 1000),
                        host_only=wait_s is None,
                        soon=soon,
                        first_tokens=chain.tokens_after(0).astype("<u4", copy=False).tobytes(),
                    ),
                    timeout_s=self._link.options.call_deadline_s + (wait_s or 0.0),
                ),
            )
        except Down:
            if connection is not None:
                self._link.ended(connection, request=request)  # it may have begun
            self._remember(request, _Matched(None, chain, cells, _MISS))
            return _MISS
        match = Match(
            reply.num_blocks,
            reply.num_host_blocks,
            reply.num_pending_blocks,
            reply.settled,
            tuple((run.tier, run.num_blocks) for run in reply.tiers),
        )
        num_partial = reply.num_partial_tokens if reply.HasField("num_partial_tokens") else None
        self._remember(request, _Matched(connection, chain, cells, match, num_partial))
        return match

    def _remember(self, request: str, matched: _Matched) -> None:
        with self._lock:
            self._matches.pop(request, None)
            self._matches[request] = matched
            if len(self._matches) > _MAX_MATCHES:
                self._matches.popitem(last=False)

    def forget(self, request: str) -> None:
        """See `kvstore.api.Store.forget`."""
        self._link.check_process()
        with self._lock:
            matched = self._matches.pop(request, None)
        if matched is not None and matched.connection is not None:
            self._link.ended(matched.connection, request=request)

    def touch(self, chain: Chain, num_blocks: int, hint: Hint = NO_HINT) -> None:
        """See `kvstore.api.Store.touch`."""
        try:
            connection = self._link.up()
            self._link.about(
                connection,
                chain,
                lambda delta, _: self._link.call(
                    connection,
                    connection.stub.Touch,
                    pb.TouchRequest(session=connection.session, chain=delta, num_blocks=num_blocks, hint=_hint(hint)),
                ),
            )
        except Down:
            pass

    # -- loading -----------------------------------------------------------------------------------------------

    def match_partial(self, request: str) -> int:
        """See `kvstore.api.Store.match_partial`."""
        with self._lock:
            matched = self._matches.get(request)
        if matched is None or matched.connection is None or matched.connection.lost.is_set():
            return 0
        if matched.num_partial_tokens is not None:
            return matched.num_partial_tokens
        found, connection = matched.match, matched.connection
        tokens = matched.chain.tokens_after(found.num_host_blocks)
        if found.num_blocks > found.num_host_blocks or not len(tokens):
            return 0
        message = pb.MatchPartialRequest(
            session=connection.session,
            request=request,
            num_host_blocks=found.num_host_blocks,
            tokens=tokens.astype("<u4", copy=False).tobytes(),
        )
        try:
            self._link.up()
            reply: pb.MatchPartialReply = self._link.call(connection, connection.stub.MatchPartial, message)
            return reply.num_tokens
        except (Down, KVStoreError):  # a server of before does not know this call
            return 0

    def load(self, request: str, num_blocks: int | None = None, *, start: int = 0, partial_tokens: int = 0) -> Load:
        """See `kvstore.api.Store.load`."""
        self._link.check_process()
        with self._lock:
            matched = self._matches.pop(request, None)
        if matched is None:
            raise UnknownLease(f"request {request!r} has no hold: call match first")
        connection = matched.connection
        if connection is None or connection.lost.is_set():
            return NoLoad()
        stop = matched.match.num_blocks if num_blocks is None else min(num_blocks, matched.match.num_blocks)
        num_host = matched.match.num_host_blocks
        message = pb.LoadRequest(
            session=connection.session,
            request=request,
            num_blocks=stop,
            start=min(start, stop),
            contents=_contents(matched.chain, num_host, stop) if stop > num_host else None,
            lease=connection.next_lease(load=True),
            partial_tokens=partial_tokens,
        )
        try:
            self._link.up()
            return connection.plane.load(self._link, connection, message, matched.cells)
        except BaseException as error:
            # Ran out, or nobody knows whether it began: then it ends with the next call.
            connection.live_loads.discard(message.lease)
            self._link.ended(connection, load=message.lease, request=request)
            if isinstance(error, (Down, LeaseError)):
                return NoLoad()
            raise

    def adopt(self, shared: bytes) -> Load:
        """A load of another process of this engine, from what its `share()` gave; nothing where servers differ.

        Copy, ask `intact()`, and report to the process that has the load: it is closed there.
        """
        message = pb.SharedLoad.FromString(shared)
        try:
            plane = self._mapped(self._link.up(), message.boot_id)
        except Down:
            return NoLoad()
        return NoLoad() if plane is None else AdoptedLoad(plane.mapping, message)

    def _mapped(self, connection: Connection, boot_id: bytes) -> MappedPlane | None:
        if not isinstance(connection.plane, MappedPlane):
            raise ConfigError("this client has no map of the server's memory: connect with unix:PATH and mapped=True")
        return connection.plane if connection.opened.boot_id == boot_id else None

    # -- saving ------------------------------------------------------------------------------------------------

    def announce(self, chain: Chain, start: int, stop: int) -> SentAnnouncement:
        """See `kvstore.api.Store.announce`."""
        mark = SentAnnouncement(self._link, chain, start, stop)
        mark.renew()
        return mark

    def save(
        self,
        chain: Chain,
        start: int,
        stop: int,
        *,
        parts: Sequence[int] | None = None,
        hint: Hint = NO_HINT,
    ) -> Save:
        """See `kvstore.api.Store.save`."""
        cells = _cells(chain, parts)
        if not 0 <= start <= stop <= len(chain):
            raise ConfigError(f"blocks {start}…{stop} are outside the chain, which has {len(chain)} full blocks")
        most = min(stop, start + MAX_SAVE_PARTS // len(cells.parts))
        try:
            connection = self._link.up()
            lease = connection.next_lease()
            try:
                reply = self._link.about(
                    connection,
                    chain,
                    lambda delta, _: self._link.call(
                        connection,
                        connection.stub.Save,
                        pb.SaveRequest(
                            session=connection.session,
                            chain=delta,
                            start=start,
                            stop=most,
                            contents=_contents(chain, start, most),
                            parts=_packed(parts),
                            hint=_hint(hint),
                            lease=lease,
                        ),
                    ),
                )
                if not reply.indices:
                    return NoSave(reply.num_refused + stop - most)
                return connection.plane.save(self._link, connection, lease, cells, reply)
            except BaseException as error:
                self._link.ended(connection, save=lease)  # nobody knows whether it began, and it would not lapse
                if isinstance(error, LeaseError):
                    raise Down from None
                raise
        except Down:
            return NoSave(stop - start)

    def adopt_save(self, shared: bytes) -> Save:
        """Write to a save of another process of this engine, from what its `share()` gave.

        Fill the views and leave the context; then tell the process that has the save, which commits it. Slots
        return to use only when this process has left too. Raises LeaseError where the save ended.
        """
        message = pb.SharedSave.FromString(shared)
        try:
            connection = self._link.up()
            plane = self._mapped(connection, message.boot_id)
            if plane is None:
                raise Down
            joined = JoinedSave(self._link, connection, message.engine_key, message.lease)
            sizes = np.frombuffer(message.part_bytes, "<u8").tolist()
            save = MappedSave(joined, plane.mapping, sizes, message.blocks)
            joined.join()
        except Down:
            return NoSave(len(message.blocks.indices) // 4)
        return save

    # -- care --------------------------------------------------------------------------------------------------

    def clear(self, root: RootId | None = None) -> int:
        """See `kvstore.api.Store.clear`."""
        try:
            connection = self._link.up()
            request = pb.ClearRequest(session=connection.session, root=root or b"")
            reply: pb.ClearReply = self._link.call(connection, connection.stub.Clear, request, timeout_s=_CARE_S)
            return reply.num_blocks
        except Down:
            raise ServiceUnavailable("nobody answers: nothing may have been cleared") from None

    def note_saved(self, seconds: float) -> None:
        """Goes to the server with the next beat."""
        self._link.note_saved(seconds)

    def stats(self) -> Mapping[str, float]:
        """The server's counters and gauges, and this client's own (`client.…`)."""
        values = {**self._stats.snapshot(), "client.up": float(self.is_up)}
        try:
            connection = self._link.up()
            reply = self._link.call(connection, connection.stub.Stats, pb.StatsRequest(session=connection.session))
            values |= reply.values
        except Down:
            pass
        return dict(sorted(values.items()))

    def check(self) -> list[str]:
        """Broken invariants of the server's store; says so where it cannot be asked."""
        try:
            connection = self._link.up()
            request = pb.CheckRequest(session=connection.session)
            return list(self._link.call(connection, connection.stub.Check, request, timeout_s=_CARE_S).faults)
        except Down:
            return [f"not checked: the server at {self._link.options.address} is away"]

    def close(self) -> None:
        """End everything this client holds, and unmap. Idempotent; in a forked child nothing happens."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plane_maker(options: LinkOptions, stats: Stats, lending: Lending) -> Callable[[float], DataPlane]:
    buffers = Buffers(options.buffer_bytes)
    if options.mapped:
        place = socket_path(options.address)
        assert place is not None, "checked by connect"

        def mapped(timeout_s: float) -> DataPlane:
            try:
                return MappedPlane(place, timeout_s, lending)
            except Unmapped as known:
                if not options.may_stream:
                    raise
                return RemotePlane(buffers, stats, known.ticket)

        return mapped
    return lambda _: RemotePlane(buffers, stats)


def _cells(chain: Chain, parts: Sequence[int] | None) -> Cells:
    layout = layout_of(chain.root.model)
    cells = layout.all_parts if parts is None else tuple(parts)
    if not cells or len(set(cells)) != len(cells) or not set(cells) <= set(layout.all_parts):
        raise ConfigError(f"parts are {list(cells)}: name distinct ones from 0 to {len(layout.parts) - 1}, or None")
    return Cells(layout, cells)


def _packed(parts: Sequence[int] | None) -> bytes:
    return b"" if parts is None else bytes(parts)


def _contents(chain: Chain, start: int, stop: int) -> pb.Contents:
    """What blocks `start` … `stop` were hashed of."""
    tokens, extras = chain.contents(start, stop)
    return pb.Contents(
        start=start, tokens=tokens, extras=[pb.Extra(index=index, extra=extra) for index, extra in extras]
    )


def _hint(hint: Hint) -> pb.Hint | None:
    if hint is NO_HINT:
        return None
    return pb.Hint(
        conversation=hint.conversation,
        turn=hint.turn,
        prompt_tokens=hint.prompt_tokens,
        new_blocks=hint.new_blocks,
        priority=hint.priority,
        ttl_s=hint.ttl_s,
        closed=hint.closed,
        retention=[
            pb.Retention(start=each.start, stop=each.stop, priority=each.priority, duration_s=each.duration_s)
            for each in hint.retention
        ],
    )
