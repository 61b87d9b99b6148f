# SPDX-License-Identifier: Apache-2.0
"""A request's life as the server does it: match, announce, load, save, commit, touch.

Invariants
1. Nothing becomes resident whose contents were not hashed again.
2. What a call took is given back where its session ended meanwhile.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from kvstore.api import HOST_TIER, NO_HINT, Hint, Retention
from kvstore.block import BlockId, RootId
from kvstore.clock import Clock
from kvstore.errors import AccessDenied, CapacityError, ConfigError, LeaseExpired, UnknownLease
from kvstore.layout import BlockLayout, layout_of
from kvstore.loan import Loan
from kvstore.save import BlockSave
from kvstore.service.budget import PinBudget
from kvstore.service.chains import ServedChain
from kvstore.service.handshake import ABSENT, MAX_SAVE_PARTS, REPLY_SLOTS
from kvstore.service.namespaces import Namespaces
from kvstore.service.saves import ServedSave
from kvstore.service.session import MAX_LEASES, MAX_MARKS, Held, ServedLoad, Session
from kvstore.service.sessions import SessionBook
from kvstore.service.status import UnknownSession
from kvstore.store import KVStore
from kvstore.wire import kvstore_pb2 as pb

_MAX_REQUEST_BYTES = 256
_MAX_TEXT_BYTES = 1_024
_MAX_RANGES = 64
_MAX_WAITING = 16
"""Matches that wait at once: each holds a thread that other calls may need."""


class Requests:
    """Serves the calls of requests over one store. Thread-safe."""

    def __init__(self, store: KVStore, sessions: SessionBook, namespaces: Namespaces, clock: Clock) -> None:
        self._store = store
        options = store.config
        limit_bytes = int(options.host.capacity_bytes * options.service.max_session_share)
        self._budget = PinBudget(limit_bytes, sessions.note_over_share, clock.now_s)
        self._clock = clock
        self._sessions = sessions
        self._namespaces = namespaces
        self._waiting = threading.BoundedSemaphore(_MAX_WAITING)

    # -- finding -----------------------------------------------------------------------------------------------

    def match(self, session: Session, request: pb.MatchRequest, remaining_s: float | None) -> pb.MatchReply:
        name = _name(request.request)
        chain = session.chains.resolve(request.chain)
        parts = _parts(request.parts)
        wait_s = request.wait_ms / 1000
        if remaining_s is not None:
            wait_s = min(wait_s, remaining_s)
        until_s = self._clock.now_s() + wait_s + self._store.config.request.hold_s
        waits = wait_s > 0 and self._waiting.acquire(blocking=False)
        try:
            match = self._store.match(
                chain,
                session.key(name),
                hint=_hint(request),
                parts=parts,
                wait_s=None if request.host_only else wait_s if waits else 0.0,
                soon=request.soon or wait_s > 0,
            )
        finally:
            if waits:
                self._waiting.release()
        cells = None if parts is None else tuple(parts)
        held = Held(chain, match.num_host_blocks, _block_bytes(layout_of(chain.root.model), parts), cells, until_s)
        try:
            crowded_out = session.add_hold(name, held)
        except BaseException:
            self._store.forget(session.key(name))
            raise
        if crowded_out is not None:
            self._store.forget(session.key(crowded_out))
        if not self._budget.allows(session, name):
            self._store.forget(session.key(name))
            return pb.MatchReply(settled=True)
        num_similar = None
        if request.first_tokens and match.settled and not (match.num_blocks or match.num_pending_blocks):
            num_similar = self._hold_similar(session, name, held, 0, request.first_tokens)
        return pb.MatchReply(
            num_blocks=match.num_blocks,
            num_host_blocks=match.num_host_blocks,
            num_pending_blocks=match.num_pending_blocks,
            settled=match.settled,
            tiers=[pb.TierRun(tier=tier, num_blocks=count) for tier, count in match.tiers],
            num_partial_tokens=num_similar,
        )

    def match_partial(self, session: Session, request: pb.MatchPartialRequest) -> pb.MatchPartialReply:
        name = _name(request.request)
        with session.lock:
            held = session.holds.get(name)
        if held is None or held.num_blocks != request.num_host_blocks:
            return pb.MatchPartialReply()
        num_tokens = self._hold_similar(session, name, held, request.num_host_blocks, request.tokens)
        return pb.MatchPartialReply(num_tokens=num_tokens)

    def _hold_similar(self, session: Session, name: str, held: Held, index: int, packed: bytes) -> int:
        """Hold a block after the first `index` that begins with these tokens; how many it shares with them."""
        # The tokens are a claim, and only compared with those of blocks under the client's own root and parent.
        tokens = np.frombuffer(packed, "<u4") if len(packed) % 4 == 0 else np.empty(0, np.uint32)
        most = held.chain.root.model.block_tokens
        num_tokens = self._store.hold_similar(session.key(name), index, tokens[:most])
        if num_tokens:
            with session.lock:
                if session.holds.get(name) is held:
                    session.holds[name] = held._replace(num_similar=1)
            if not self._budget.allows(session, name):
                self._store.forget(session.key(name))
                return 0
        return num_tokens

    def announce(self, session: Session, request: pb.AnnounceRequest) -> None:
        key = (request.chain.chain, request.start, request.stop, request.number)
        with session.lock:
            mark = session.marks.pop(key, None)
        if request.withdraw:
            if mark is not None:
                mark.withdraw()
            return
        chain = session.chains.resolve(request.chain)
        _check_range(request.start, request.stop, chain)
        if mark is None:
            mark = self._store.announce(chain, request.start, request.stop)
        else:
            mark.renew()
        dropped = None
        with session.lock:
            if session.ended:
                dropped = mark
            else:
                session.marks[key] = mark
                if len(session.marks) > MAX_MARKS:
                    dropped = session.marks.popitem(last=False)[1]
        if dropped is not None:
            dropped.withdraw()

    def touch(self, session: Session, request: pb.TouchRequest) -> None:
        chain = session.chains.resolve(request.chain)
        _check_range(0, request.num_blocks, chain)
        self._store.touch(chain, request.num_blocks, _hint(request))

    # -- loading -----------------------------------------------------------------------------------------------

    def begin_load(self, session: Session, request: pb.LoadRequest) -> ServedLoad:
        """Make a lease of a request's hold. Raises UnknownLease where it has none."""
        name = _name(request.request)
        with session.lock:
            held = session.holds.pop(name, None)
        if held is None:
            raise UnknownLease(f"request {name!r} has no hold: call match first")
        chain, num_host = held.chain, held.num_blocks
        contents = None
        stop = num_host
        if request.contents.tokens:
            self._namespaces.use(session, chain.root)  # what lies below becomes resident, and is charged to somebody
            contents = chain.verify(request.contents)
            if contents.start <= num_host:
                stop = max(num_host, contents.stop)  # its contents must be known
            chain.describe(contents)
        if request.HasField("num_blocks"):
            stop = min(stop, request.num_blocks)
        load = None
        try:
            load = self._store.load(session.key(name), stop, start=request.start, partial_tokens=request.partial_tokens)
            if not load.intact():
                raise LeaseExpired(f"the hold of request {name!r} ran out: match again")
            served = ServedLoad(load, held._replace(num_blocks=stop, until_s=math.inf), contents)
            session.add_load(request.lease, served)
        except BaseException:
            if load is not None:
                load.close()
            if contents is not None:
                chain.undescribe(contents)
            raise
        return served

    def load_host(self, session: Session, request: pb.LoadRequest) -> pb.LoadReply:
        if request.HasField("contents"):
            raise ConfigError("contents is set: a load from lower tiers goes by Load")
        with session.loading:
            with session.lock:
                there = session.loads.get(request.lease)  # the reply to an earlier call was lost, or is on its way
            load = (there or self.begin_load(session, request)).load
        return next(_host_replies(load.num_blocks, load.start, *load.host_slots()))

    def load(self, session: Session, request: pb.LoadRequest) -> Iterator[pb.LoadReply]:
        load = self.begin_load(session, request).load
        slots, generations = load.host_slots()
        at = load.start + len(slots)
        yield from _host_replies(load.num_blocks, load.start, slots, generations)
        told = False
        for index in range(at, load.start + load.num_blocks):
            if not told and load.comes_in_windows(index):
                told = True
                yield pb.LoadReply(windowed=True, first=index)
            block = load.wait_for(index)
            if block is None:
                return
            where = np.array(block.slots, np.int64)
            yield pb.LoadReply(
                first=index,
                offsets=where.astype("<u8").tobytes(),
                generations=load.generations(where).astype("<u4").tobytes(),
                tiers=[pb.TierRun(tier=block.tier, num_blocks=1)],
            )

    def passed(self, session: Session, number: int, passed: int) -> None:
        with session.lock:
            served = session.loads.get(number)
        if served is None:
            raise UnknownLease(f"no load has number {number} in this session: it ended, or lapsed")
        served.load.passed(passed)

    @contextmanager
    def lend(self, session: Session, root: RootId, blocks: Sequence[BlockId], parts: Sequence[int]) -> Iterator[Loan]:
        """Blocks of the host for whoever knows their ids, within what the session may pin. Rights were checked."""
        loan = self._budget.lend(session, lambda room: self._store.lend(root, blocks, parts, limit_bytes=room))
        try:
            yield loan
        finally:
            self._budget.returned(session, loan)

    # -- saving ------------------------------------------------------------------------------------------------

    def save(self, session: Session, request: pb.SaveRequest) -> pb.SaveReply:
        chain = session.chains.resolve(request.chain)
        _check_range(request.start, request.stop, chain)
        layout = self._store.open(chain.root.model)
        cells = _parts(request.parts)
        num_cells = len(layout.parts) if cells is None else len(cells)
        if (request.stop - request.start) * num_cells > MAX_SAVE_PARTS:
            raise ConfigError(
                f"save of {request.stop - request.start} blocks of {num_cells} parts: at most {MAX_SAVE_PARTS} parts "
                "a call"
            )
        contents = chain.verify(request.contents)
        if not contents.start <= request.start <= request.stop <= contents.stop:
            raise ConfigError(
                f"contents cover blocks {contents.start}…{contents.stop}: a save of {request.start}…{request.stop} "
                "needs all of its own"
            )
        self._namespaces.use(session, chain.root)  # it may be long since this chain was sent
        chain.describe(contents)
        try:
            with session.account.saving:
                there = session.repeated_save(request.lease)
                if there is not None:  # the reply to the first call was lost, or is on its way
                    return there.reply
                return self._save(session, request, chain, layout)
        finally:
            chain.undescribe(contents)

    def _save(self, session: Session, request: pb.SaveRequest, chain: ServedChain, layout: BlockLayout) -> pb.SaveReply:
        save, num_refused, block_bytes = self._save_within(session, request, chain, layout)
        slots = [slot for index in save.indices for slot in save.slots(index)]
        offsets = np.array([ABSENT if slot is None else slot for slot in slots], "<u8")
        if not session.mapped:
            offsets[offsets != ABSENT] = 0
        indices = np.array(save.indices, "<u4")
        reply = pb.SaveReply(indices=indices.tobytes(), offsets=offsets.tobytes(), num_refused=num_refused)
        if not save.indices:
            return reply
        served = ServedSave(save, session, reply, block_bytes)
        try:
            there = session.add_save(request.lease, served)
        except BaseException:
            save.abort()
            raise
        if there is not served:  # both calls of it ran at once
            save.abort()
        return there.reply

    def _save_within(
        self, session: Session, request: pb.SaveRequest, chain: ServedChain, layout: BlockLayout
    ) -> tuple[BlockSave, int, int]:
        """A save of what the session, or its tenant, may pin, how many blocks were refused, and the bytes of each."""
        start, stop, cells, hint = request.start, request.stop, _parts(request.parts), _hint(request)
        save = self._store.save(chain, start, stop, parts=cells, hint=hint)
        block_bytes = _block_bytes(layout, cells)
        num_wanted = len(save.indices)
        num_allowed = self._budget.room_to_save(session.account, num_wanted * block_bytes) // block_bytes
        if num_allowed == num_wanted:
            return save, save.num_refused, block_bytes
        end = save.indices[num_allowed]
        save.abort()
        save = self._store.save(chain, start, end, parts=cells, hint=hint)
        return save, stop - end, block_bytes

    def commit(self, session: Session, request: pb.CommitRequest) -> pb.CommitReply:
        served = session.save_of(request.lease)
        indices = numbers(request.indices, "indices", "<u4")
        # Without a mapping only Write can have filled a slot, and has published it then. Anything else there are the
        # bytes of whoever had the slot before.
        published = served.commit(indices) if session.mapped else served.published(indices)
        if served.is_done:
            session.finish(request.lease)
        return pb.CommitReply(published=np.array(published, "<u4").tobytes())

    def join(self, session: Session, request: pb.JoinRequest) -> None:
        key = (request.engine_key, request.lease)
        if request.leave:
            with session.lock:
                save = session.joined.pop(key, None)
            if save is not None:
                save.leave(session)
                self._sessions.quarantine.left(session, save)
            return
        owner = self._sessions.by_engine_key(request.engine_key)
        if not session.mapped or owner.rights != session.rights:
            raise AccessDenied("a save is joined by processes of one engine, with the same rights, that map the arena")
        save = owner.save_of(request.lease)
        save.join(session)
        with session.lock:
            ended = session.ended
            if not ended and len(session.joined) < MAX_LEASES:
                session.joined[key] = save
                return
        save.leave(session)
        self._sessions.quarantine.left(session, save)
        raise (
            UnknownSession("the session has ended")
            if ended
            else CapacityError(f"the session has joined {MAX_LEASES} saves, which is the limit: leave some")
        )


def _host_replies(
    num_blocks: int, start: int, slots: npt.NDArray[np.int64], generations: npt.NDArray[np.uint32]
) -> Iterator[pb.LoadReply]:
    """At least one, since the first says how many blocks to expect."""
    step = max(1, REPLY_SLOTS // max(1, slots.shape[1]))
    for at in range(0, max(1, len(slots)), step):
        part = slots[at : at + step]
        yield pb.LoadReply(
            num_blocks=num_blocks,
            first=start + at,
            offsets=part.astype("<u8").tobytes(),
            generations=generations[at : at + step].astype("<u4").tobytes(),
            tiers=[pb.TierRun(tier=HOST_TIER, num_blocks=len(part))] if len(part) else (),
        )


def numbers(packed: bytes, name: str, kind: str) -> list[int]:
    """Packed integers. Raises ConfigError."""
    size = np.dtype(kind).itemsize
    if len(packed) % size:
        raise ConfigError(f"{name} has {len(packed)} bytes: give a multiple of {size}")
    found: list[int] = np.frombuffer(packed, kind).tolist()
    return found


def _block_bytes(layout: BlockLayout, parts: list[int] | None) -> int:
    return layout.block_bytes if parts is None else sum(layout.parts[part].num_bytes for part in parts)


def _name(request: str) -> str:
    if not 0 < len(request.encode()) <= _MAX_REQUEST_BYTES:
        raise ConfigError(f"request has {len(request.encode())} bytes: give 1 to {_MAX_REQUEST_BYTES}")
    return request


def _check_range(start: int, stop: int, chain: ServedChain) -> None:
    if not start <= stop <= len(chain):
        raise ConfigError(f"blocks {start}…{stop} are outside the chain, which has {len(chain)}")


def _parts(packed: bytes) -> list[int] | None:
    """Parts asked for; None for all. The store checks that they are distinct and exist."""
    return list(packed) if packed else None


def _hint(request: pb.MatchRequest | pb.SaveRequest | pb.TouchRequest) -> Hint:
    if not request.HasField("hint"):
        return NO_HINT
    message = request.hint
    if len(message.conversation) > _MAX_TEXT_BYTES:
        raise ConfigError(f"hint.conversation has {len(message.conversation)} characters: at most {_MAX_TEXT_BYTES}")
    if len(message.retention) > _MAX_RANGES:
        raise ConfigError(f"hint.retention has {len(message.retention)} ranges: at most {_MAX_RANGES}")
    return Hint(
        conversation=message.conversation,
        turn=message.turn,
        prompt_tokens=message.prompt_tokens,
        new_blocks=message.new_blocks,
        priority=message.priority if message.HasField("priority") else NO_HINT.priority,
        ttl_s=message.ttl_s if message.HasField("ttl_s") else None,
        closed=message.closed,
        retention=tuple(
            Retention(
                each.start,
                each.stop if each.HasField("stop") else None,
                each.priority,
                each.duration_s if each.HasField("duration_s") else None,
            )
            for each in message.retention
        ),
    )
