# SPDX-License-Identifier: Apache-2.0
"""The server's side of the calls that carry bytes: Read, Write, and Peek and Fetch of other sidecars.

Generators and loops over plain values: gRPC pulls a message when it has room to send one, so a slow reader makes the
server hold one message besides what gRPC's own flow control lets through, and a writer is read no faster than its
bytes are put into slots.

Invariants
1. A message is sent only if its block's lease was alive after the bytes were copied into it.
2. A block is published by Write only after all of its wanted parts came, in order, each with its checksum; whatever
   else came is INVALID_ARGUMENT, and leaves the block as it was: reserved and invisible.
3. Bytes go into a slot only while its save is held open, by one Write at a time.
4. What a session has no right to looks like what is not there, before anything is looked up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from kvstore.api import HOST_TIER
from kvstore.block import DIGEST_BYTES, BlockId, RootId
from kvstore.errors import CapacityError, ConfigError, LeaseError
from kvstore.layout import MAX_PARTS
from kvstore.load import BlockLoad
from kvstore.loan import Loan
from kvstore.save import BlockSave
from kvstore.service.bulk import Misfit, Packer, Unpacker, decode, encode
from kvstore.service.rights import Rights
from kvstore.service.roots import RootBook
from kvstore.service.sums import Sums
from kvstore.store import KVStore
from kvstore.wire import kvstore_pb2 as pb

MAX_PEEK_IDS = 65_536
_FIRST_S = 5.0
_MOST_STRANGERS = 128

Message = TypeVar("Message")


# ---- Read ----


def read(load: BlockLoad, sums: Sums) -> Iterator[bytes]:
    """ReadReply messages of a load, at most 1 MiB each. The caller ends the load's lease.

    Ends early where a block turns out to be missing, or the lease ran out: a shorter hit.
    """
    yield encode(pb.ReadReply(num_blocks=load.num_blocks), ())
    packer = Packer(pb.ReadReply)
    for block in load:
        if not load.renew():
            return
        in_host = block.tier == HOST_TIER  # others may lie in a window, whose slots are used again
        for part, (view, slot) in enumerate(zip(block.views, block.slots, strict=True)):
            known = sums.of(slot) if in_host else None
            taken = partial(_tell, sums, slot, load) if in_host else None
            for message in packer.add(block.index, part, view, tier=block.tier, known=known, taken=taken):
                if not load.intact():
                    return
                yield message
        # What comes from a lower tier may be long in coming: then nobody waits for it with bytes in hand.
        for message in packer.end_block(block.index + 1, carry=block.tier == HOST_TIER):
            if not load.intact():
                return
            yield message
        if not load.intact():
            return
    yield from packer.rest()


def _tell(sums: Sums, slot: int, pinned: BlockLoad | Loan, checksum: int) -> None:
    if pinned.intact():  # otherwise it may be that of half a block, or of another
        sums.tell(slot, checksum)


# ---- Write ----


class OpenSave(Protocol):
    """What Write needs of a save of a client (`kvstore.service.saves.ServedSave`)."""

    @property
    def uploading(self) -> threading.Lock:
        """Held by the one Write that is under way."""

    def filling(self) -> AbstractContextManager[BlockSave]:
        """Keeps its slots from being given up. Raises UnknownLease where it has ended."""

    def commit(self, indices: Sequence[int]) -> list[int]:
        """Publish; those that became matchable."""


def begin_write(messages: Iterator[bytes]) -> tuple[bytes, int]:
    """Session and lease of the first message of a Write. Raises ConfigError."""
    try:
        head, _ = decode(pb.WriteRequest, next(messages, b""))
    except Misfit as error:
        raise ConfigError(f"the first message of Write is malformed: {error}") from error
    return head.session, head.lease


def write(save: OpenSave, messages: Iterator[bytes], sums: Sums) -> list[int]:
    """Put the data of WriteRequest messages into slots; returns the blocks that were published, each once whole.

    Raises ConfigError for data that is not what comes next, UnknownLease where the save ended meanwhile. Blocks that
    were whole before that stay published.
    """
    if not save.uploading.acquire(blocking=False):
        raise ConfigError("another Write of this lease is under way: send one after the other")
    try:
        return list(_filled(save, messages, sums))
    except Misfit as error:
        raise ConfigError(str(error)) from error
    finally:
        save.uploading.release()


def _filled(save: OpenSave, messages: Iterator[bytes], sums: Sums) -> Iterator[int]:
    """Blocks as they are published."""
    wanted = _Wanted()
    unpacker = Unpacker(wanted.views_of, wanted.following)
    for message in messages:
        head, data = decode(pb.WriteRequest, message)
        with save.filling() as filling:
            wanted.save = filling
            for arrived in unpacker.take(head, data):
                if not arrived.good:
                    raise Misfit(f"part {arrived.part} of block {arrived.index} does not have its checksum")
                sums.tell(wanted.slot_of(arrived.index, arrived.part), arrived.checksum)
                if arrived.ends_block:
                    yield from save.commit([arrived.index])
    if unpacker.in_block:
        raise Misfit("the last block ends short: send each wanted part whole")


@dataclass(slots=True)
class _Wanted:
    """Memory of the blocks of a save that are still open."""

    save: BlockSave | None = None

    def views_of(self, index: int) -> list[memoryview]:
        assert self.save is not None
        try:
            views = self.save.views(index)
        except LeaseError as error:
            raise Misfit(str(error)) from error
        return [view.cast("B") for view in views if view is not None]

    def slot_of(self, index: int, part: int) -> int:
        """Where the view that is number `part` of those of an open block begins."""
        assert self.save is not None
        return [slot for slot in self.save.slots(index) if slot is not None][part]

    def following(self, index: int) -> int:
        assert self.save is not None
        following = next((other for other in self.save.indices if other > index), None)
        if following is None:
            raise Misfit(f"data runs on past block {index}, the last of this lease")
        return following


# ---- Peek and Fetch ----


@dataclass(frozen=True, slots=True)
class _Asked:
    """A PeekRequest, checked."""

    root: RootId
    blocks: list[BlockId]
    parts: list[int]

    @classmethod
    def of(cls, request: pb.PeekRequest) -> _Asked:
        if len(request.root) != DIGEST_BYTES or len(request.ids) % DIGEST_BYTES:
            raise ConfigError(
                f"root has {len(request.root)} bytes, ids {len(request.ids)}: give {DIGEST_BYTES}, and a multiple of it"
            )
        num_ids = len(request.ids) // DIGEST_BYTES
        if num_ids > MAX_PEEK_IDS:
            raise ConfigError(f"ids has {num_ids} hashes: give at most {MAX_PEEK_IDS}")
        parts = list(request.parts)
        if not parts or len(set(parts)) != len(parts) or max(parts) >= MAX_PARTS:
            raise ConfigError(f"parts is {parts}: give distinct numbers below {MAX_PARTS}, one at least")
        blocks: list[BlockId] = np.frombuffer(request.ids, f"V{DIGEST_BYTES}").tolist()
        return cls(RootId(request.root), blocks, parts)


def peek(store: KVStore, roots: RootBook, rights: Rights, request: pb.PeekRequest) -> pb.PeekReply:
    """Which parts of which blocks lie in the host. Raises ConfigError for a malformed request."""
    asked = _Asked.of(request)
    if not roots.allows(rights, asked.root):
        return pb.PeekReply(present=bytes(len(asked.blocks) * len(asked.parts)))
    masks = store.peek(asked.root, asked.blocks, used=request.used)
    there = masks[:, None] >> np.array(asked.parts, np.uint64) & np.uint64(1)
    return pb.PeekReply(present=there.astype(np.uint8).tobytes())


Lend = Callable[[RootId, Sequence[BlockId], Sequence[int]], AbstractContextManager[Loan]]
"""Lends blocks of a root with these parts."""


def fetch(lend: Lend, roots: RootBook, rights: Rights, request: pb.PeekRequest, sums: Sums) -> Iterator[bytes]:
    """ReadReply messages of those blocks that lie in the host with all asked parts. Raises ConfigError."""
    asked = _Asked.of(request)
    if not roots.allows(rights, asked.root):
        return iter((encode(pb.ReadReply(), ()),))
    return _lent(lend(asked.root, asked.blocks, asked.parts), sums)


def _lent(lent: AbstractContextManager[Loan], sums: Sums) -> Iterator[bytes]:
    with lent as loan:
        yield encode(pb.ReadReply(num_blocks=loan.num_blocks), ())
        packer = Packer(pb.ReadReply)
        for block in loan:
            what = block.meta
            meta: pb.Meta | None = pb.Meta(parent=what.parent, depth=what.depth, tokens=what.tokens, extra=what.extra)
            for part, (view, slot) in enumerate(zip(block.views, block.slots, strict=True)):
                known, taken = sums.of(slot), partial(_tell, sums, slot, loan)
                for message in packer.add(
                    block.number, part, view, tier=HOST_TIER, meta=meta, known=known, taken=taken
                ):
                    if not loan.intact():
                        return
                    yield message
                meta = None
            for message in packer.end_block(block.number + 1, carry=True):
                if not loan.intact():
                    return
                yield message
            if not loan.intact():
                return
        yield from packer.rest()


# ---- streams that stand still ----


class StallWatch:
    """Cancels streams whose other end has stopped taking, or sending, for `limit_s`. One thread for all of them.

    A stream whose first message did not come is a stranger's: it has `first_s`, and there are `most_strangers` of them,
    so that nobody who shows no session keeps others from theirs.
    """

    def __init__(self, limit_s: float, *, first_s: float = _FIRST_S, most_strangers: int = _MOST_STRANGERS) -> None:
        self._limit_s = limit_s
        self._first_s = first_s
        self._most_strangers = most_strangers
        self._strangers = threading.BoundedSemaphore(most_strangers)
        self._lock = threading.Lock()
        self._due: dict[int, tuple[float, Callable[[], object]]] = {}
        self._number = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-stalls", daemon=True)
        self._thread.start()

    def sending(self, messages: Iterable[Message], cancel: Callable[[], object]) -> Iterator[Message]:
        """`messages`, timed while the other end has one and did not ask for the next; `cancel` ends the call."""
        with self._timer(cancel, self._limit_s) as (start, stop):
            for message in messages:
                start()
                yield message
                stop()

    def receiving(self, messages: Iterator[bytes], cancel: Callable[[], object]) -> Iterator[bytes]:
        """`messages`, timed while the other end has to send the next. Raises CapacityError."""
        first = self.first(messages, cancel)
        if first is None:
            return
        yield first
        with self._timer(cancel, self._limit_s) as (start, stop):
            while True:
                start()
                message = next(messages, None)
                stop()
                if message is None:
                    return
                yield message

    def first(self, messages: Iterator[Message], cancel: Callable[[], object]) -> Message | None:
        """The first message, which says whose the stream is; None where there is none.

        Raises CapacityError where too many streams have not sent theirs.
        """
        if not self._strangers.acquire(blocking=False):
            raise CapacityError(f"{self._most_strangers} streams have not said whose they are, which is the limit")
        try:
            return self.soon(messages, cancel)
        finally:
            self._strangers.release()

    def soon(self, messages: Iterator[Message], cancel: Callable[[], object]) -> Message | None:
        """The next message, which has to come within `first_s`; None at the end."""
        with self._timer(cancel, self._first_s) as (start, _):
            start()
            return next(messages, None)

    @contextmanager
    def _timer(
        self, cancel: Callable[[], object], limit_s: float
    ) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
        with self._lock:
            self._number += 1
            number = self._number

        def start() -> None:
            self._due[number] = (time.monotonic() + limit_s, cancel)

        def stop() -> None:
            self._due.pop(number, None)

        try:
            yield start, stop
        finally:
            stop()

    def _run(self) -> None:
        while not self._closing.wait(min(self._limit_s, self._first_s) / 4):
            now_s = time.monotonic()
            for number, (due_s, cancel) in list(self._due.items()):
                if due_s < now_s and self._due.pop(number, None) is not None:
                    cancel()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
