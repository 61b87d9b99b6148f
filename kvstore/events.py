# SPDX-License-Identifier: Apache-2.0
"""Block events: what became matchable in a tier and what stopped, in order, for whoever subscribes.

A ring bounded in bytes holds what happened lately. A subscription begins with a snapshot, goes on with what changed
since, and is told of a gap where it fell behind the ring.

Invariants
1. Snapshot and stream together tell of each block exactly once: what left before the snapshot reached it is in
   neither, what came meanwhile is in the stream. Parents come before children, but for a parent that left before
   the snapshot reached it: its children are told of, and that they left as well. This holds for the host tier.
   Of a lower one, which others write and evict too, it tells what this store wrote, as the tier confirmed it, and what
   this store cleared: not what was there before, what other stores do, nor what the tier evicts. There a stored event
   is a place to look, and may come twice.
2. A subscription's numbers rise by one for each event it may see, whatever else happens: `sequence` counts the
   events of its roots, and is the same for every subscription to the same roots.
3. The ring's lock is a leaf: it is taken under the pool's, and nothing is called while it is held.
4. While nobody subscribes, nothing is recorded.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kvstore.api import HOST_TIER
from kvstore.block import DIGEST_BYTES, BlockId, BlockMeta, RootId
from kvstore.idmap import NO_ROW, Rows
from kvstore.pool import BlockPool
from kvstore.survey import Survey

_RING_BYTES = 64 << 20
_MAX_RUN = 1024
"""Blocks of one event of a snapshot: with 64 tokens each, 290 KB."""
_EVENT_BYTES = 512  # what an event takes beside its ids and tokens
_MAX_ROOTS = 65_536
"""Whose events are counted: at one more, all begin anew, with a gap for everybody."""


class EventKind(Enum):
    """stored: blocks became matchable. removed: they stopped. cleared: every block of a root did."""

    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """Something that happened to blocks of one root in one tier.

    Attributes:
        ids: 32 bytes each, end to end; those of a stored event are consecutive blocks of one chain.
        parent, depth: of a stored event's first block.
        tokens: of all blocks of a stored event, u32 little-endian.
    """

    kind: EventKind
    tier: str
    root: RootId
    ids: bytes = b""
    parent: bytes = b""
    depth: int = 0
    tokens: bytes = b""

    @property
    def num_blocks(self) -> int:
        return len(self.ids) // DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Batch:
    """What a poll brought; empty after a time-out.

    Attributes:
        events: in order.
        sequence: number of the last event so far; the events of a snapshot count as none.
        snapshot_done: the snapshot ends with this batch.
        gap: events before this batch were lost, and the rest of the snapshot with them: subscribe anew.
    """

    events: tuple[BlockEvent, ...]
    sequence: int
    snapshot_done: bool = False
    gap: bool = False


class _Entry(NamedTuple):
    event: BlockEvent
    rows: Rows | None
    """Of a removed event's blocks, with the numbers of the entries that told of them."""
    born: npt.NDArray[np.int64] | None


class EventLog:
    """What happened to a pool's blocks lately. Thread-safe. Implements `kvstore.residents.Observer`."""

    def __init__(self, pool: BlockPool, *, ring_bytes: int = _RING_BYTES, max_roots: int = _MAX_ROOTS) -> None:
        self._pool = pool
        self._ring_bytes = ring_bytes
        self._max_roots = max_roots
        self._moved = threading.Condition(threading.Lock())
        self._entries: deque[_Entry] = deque()
        self._held_bytes = 0
        self._first = 1  # number of the oldest entry
        self._counts: dict[RootId, int] = {}  # entries ever, by root
        self._dropped: dict[RootId, int] = {}  # number of the last entry that left the ring, by root
        self._silences = 0  # how often recording began: what happened before is unknown
        self._folds = 0  # how often counts were given up
        self._num_waiting = 0
        self._subscriptions: set[Subscription] = set()
        pool.observe(self)

    # -- what the pool says ------------------------------------------------------------------------------------

    @property
    def listening(self) -> bool:
        return bool(self._subscriptions)

    def stored(self, root: RootId, ids: bytes, parent: bytes, depth: int, tokens: bytes) -> int:
        event = BlockEvent(EventKind.STORED, HOST_TIER, root, ids, parent, depth, tokens)
        return self._append(_Entry(event, None, None))

    def removed(self, root: RootId, ids: bytes, rows: Rows, born: npt.NDArray[np.int64]) -> None:
        self._append(_Entry(BlockEvent(EventKind.REMOVED, HOST_TIER, root, ids), rows, born))

    def cleared(self, root: RootId) -> None:
        self._append(_Entry(BlockEvent(EventKind.CLEARED, HOST_TIER, root), None, None))

    # -- what the store says of lower tiers ----------------------------------------------------------------------

    def demoted(self, tier: str, blocks: Sequence[tuple[RootId, BlockId, BlockMeta]]) -> None:
        """A lower tier has confirmed these blocks, parents before children."""
        if not self.listening:
            return
        run: list[tuple[RootId, BlockId, BlockMeta]] = []
        for each in blocks:
            root, _, meta = each
            if run and (root != run[-1][0] or meta.parent != run[-1][1]):
                self._append(_Entry(_stored(tier, run), None, None))
                run = []
            run.append(each)
        if run:
            self._append(_Entry(_stored(tier, run), None, None))

    def cleared_below(self, tier: str, root: RootId | None) -> None:
        """A lower tier has removed all there was under a root; None: under all of them."""
        if not self.listening:
            return
        with self._moved:
            roots = list(self._counts) if root is None else [root]  # of no other was anything ever told
        for each in roots:
            self._append(_Entry(BlockEvent(EventKind.CLEARED, tier, each), None, None))

    def _append(self, entry: _Entry) -> int:
        root = entry.event.root
        with self._moved:
            if root not in self._counts and len(self._counts) >= self._max_roots:
                self._fold()
            self._entries.append(entry)
            self._counts[root] = self._counts.get(root, 0) + 1
            self._held_bytes += _size(entry)
            number = self._first + len(self._entries) - 1
            while self._held_bytes > self._ring_bytes:
                self._drop_oldest()
            if self._num_waiting:
                self._moved.notify_all()
        return number

    def _fold(self) -> None:
        """Forget which root had how many events: roots come and go. No number from before is ever reached again."""
        self._silences += sum(self._counts.values()) + 1
        self._folds += 1
        while self._entries:
            self._drop_oldest()
        self._counts.clear()
        self._dropped.clear()

    def _drop_oldest(self) -> None:
        oldest = self._entries.popleft()
        self._held_bytes -= _size(oldest)
        self._dropped[oldest.event.root] = self._first
        self._first += 1

    # -- subscribers -------------------------------------------------------------------------------------------

    def subscribe(
        self,
        snapshot: bool = True,
        may_see: Callable[[RootId], bool] = lambda root: True,
        *,
        after: int | None = None,
    ) -> Subscription:
        """Follow the blocks of the roots that `may_see` allows, which must not change its mind.

        With a `snapshot`, each resident block comes first. With `after`, the `sequence` of a batch that a
        subscription to the same roots had before, it goes on from there, with a gap if that is too long ago.
        """
        with self._pool.lock:  # nothing happens between the snapshot's beginning and the stream's
            census = self._pool.survey.whole_rows(may_see) if snapshot and after is None else None
            with self._moved:
                if not self._subscriptions:
                    self._silences += 1
                subscription = Subscription(self, self._pool.survey, may_see, census, self._last(), self._seen(may_see))
                if after is not None:
                    subscription._rewind(after)
                self._subscriptions.add(subscription)
        return subscription

    def _last(self) -> int:
        return self._first + len(self._entries) - 1

    def _seen(self, may_see: Callable[[RootId], bool]) -> int:
        return self._silences + sum(count for root, count in self._counts.items() if may_see(root))

    def _unsubscribe(self, subscription: Subscription) -> None:
        with self._moved:
            self._subscriptions.discard(subscription)
            while not self._subscriptions and self._entries:
                self._drop_oldest()
            self._moved.notify_all()


class Subscription:
    """One subscriber's way through the log; for one thread at a time. A context manager; leaving it closes it."""

    def __init__(
        self,
        log: EventLog,
        survey: Survey,
        may_see: Callable[[RootId], bool],
        census: tuple[Rows, Rows, Rows] | None,
        last: int,
        sequence: int,
    ) -> None:
        self._log = log
        self._survey = survey
        self._may_see = may_see
        self._runs = None if census is None else _runs(*census)
        self._since = last
        self._at = last + 1  # number of the next entry to look at
        self._sequence = sequence
        self._folds = log._folds
        self._omitted: set[int] = set()  # rows that left before the snapshot reached them
        self._gap = False
        self._closed = False

    @property
    def sequence(self) -> int:
        """Number of the last event that was told, or before which it began."""
        return self._sequence

    def poll(self, timeout_s: float = 0.0, *, max_blocks: int = 8192) -> Batch:
        """The next events, about `max_blocks` of them at most; waits up to `timeout_s` for the first.

        First what is left of the snapshot, at once.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            if self._fell_behind():
                self._runs, self._gap = None, False
                return Batch((), self._sequence, gap=True)
            if self._runs is not None:
                return self._poll_snapshot(max_blocks)
            events = self._poll_stream(max_blocks)
            if events or self._closed or not self._wait(deadline_s - time.monotonic()):
                return Batch(events, self._sequence)

    def _fell_behind(self) -> bool:
        """Whether entries left the ring that this subscriber may see and has not seen."""
        log = self._log
        with log._moved:
            if self._folds != log._folds:
                self._folds = log._folds
                self._gap, self._at, self._sequence = True, log._last() + 1, log._seen(self._may_see)
            if self._at < log._first:
                self._gap |= any(number >= self._at and self._may_see(root) for root, number in log._dropped.items())
                self._at = log._first
                if self._gap:
                    # From here on, and numbered as everybody's.
                    self._at = log._last() + 1
                    self._sequence = log._seen(self._may_see)
            return self._gap

    def _poll_snapshot(self, max_blocks: int) -> Batch:
        assert self._runs is not None
        events: list[BlockEvent] = []
        while max_blocks > 0:
            rows = next(self._runs, None)
            if rows is None:
                self._runs = None
                break
            count, run = self._survey.describe_run(rows, self._since)
            self._omitted.update(rows[count:].tolist())
            if run is not None:
                events.append(BlockEvent(EventKind.STORED, HOST_TIER, *run))
            max_blocks -= len(rows)
        return Batch(tuple(events), self._sequence, snapshot_done=self._runs is None)

    def _poll_stream(self, max_blocks: int) -> tuple[BlockEvent, ...]:
        log = self._log
        events: list[BlockEvent] = []
        with log._moved:
            if self._at < log._first:
                return ()  # that there was a gap is told next
            for entry in islice(log._entries, self._at - log._first, None):
                if max_blocks <= 0:
                    break
                self._at += 1
                if self._may_see(entry.event.root):
                    self._sequence += 1
                    event = self._without_omitted(entry) if self._omitted else entry.event
                    max_blocks -= max(1, event.num_blocks)
                    if event.ids or event.kind is EventKind.CLEARED:
                        events.append(event)
        return tuple(events)

    def _without_omitted(self, entry: _Entry) -> BlockEvent:
        """A removed event without the blocks whose coming was not told, because the snapshot found them gone."""
        event = entry.event
        if entry.rows is None or entry.born is None:
            return event
        untold = [
            born <= self._since and row in self._omitted
            for row, born in zip(entry.rows.tolist(), entry.born.tolist(), strict=True)
        ]
        if not any(untold):
            return event
        self._omitted.difference_update(entry.rows[untold].tolist())
        ids = np.frombuffer(event.ids, np.uint8).reshape(-1, DIGEST_BYTES)[~np.array(untold)].tobytes()
        return BlockEvent(event.kind, event.tier, event.root, ids)

    def _wait(self, timeout_s: float) -> bool:
        """Wait for an entry; False where none came."""
        log = self._log
        if timeout_s <= 0:
            return False
        with log._moved:
            log._num_waiting += 1
            try:
                return log._moved.wait_for(lambda: self._closed or log._last() >= self._at, timeout_s)
            finally:
                log._num_waiting -= 1

    def _rewind(self, after: int) -> None:
        """Go back to the entry after number `after`. Under the log's lock."""
        log = self._log
        missed = self._sequence - after
        visible = [log._first + at for at, entry in enumerate(log._entries) if self._may_see(entry.event.root)]
        if not 0 <= missed <= len(visible):
            self._gap = True
        elif missed:
            self._at = visible[-missed]
            self._sequence = after

    def close(self) -> None:
        """Stop following, and let a poll that waits return."""
        self._closed = True
        self._log._unsubscribe(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _stored(tier: str, run: Sequence[tuple[RootId, BlockId, BlockMeta]]) -> BlockEvent:
    root, _, first = run[0]
    ids = b"".join(block for _, block, _ in run)
    tokens = b"".join(meta.tokens for _, _, meta in run)
    return BlockEvent(EventKind.STORED, tier, root, ids, first.parent, first.depth, tokens)


def _size(entry: _Entry) -> int:
    return _EVENT_BYTES + len(entry.event.ids) * 2 + len(entry.event.tokens)


def _runs(rows: Rows, parents: Rows, depths: Rows) -> Iterator[Rows]:
    """All rows, in stretches of chains, parents before children.

    Each row is followed by one of its children; the others begin stretches of their own. Sorted by the depth at
    which they begin, a stretch comes after the one that it hangs from.
    """
    if not len(rows):
        return
    heir = np.full(int(rows.max()) + 1, NO_ROW, np.int64)
    has_parent = parents != NO_ROW
    heir[parents[has_parent]] = rows[has_parent]
    is_heir = has_parent & (heir[parents] == rows)
    heads = rows[~is_heir]
    heads = heads[np.argsort(depths[~is_heir], kind="stable")]
    for head in heads.tolist():
        run: list[int] = []
        row = head
        while row != NO_ROW:
            run.append(row)
            row = int(heir[row])
            if len(run) == _MAX_RUN or row == NO_ROW:
                yield np.array(run)
                run = []
