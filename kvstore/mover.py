# SPDX-License-Identifier: Apache-2.0
"""Background demotion: copies committed blocks from the host to lower tiers, and passes touches down.

Never in a request's way: one thread, a queue bounded in bytes, a write budget per second. Back-pressure drops
writes (counted), a failed write is tried once more (then counted), and nothing is believed to be below that the
tier did not confirm. A block being demoted is pinned, and stays readable.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from kvstore.api import NO_HINT, Hint
from kvstore.block import BlockId, BlockMeta, Chain, PartKey, RootId
from kvstore.clock import Clock
from kvstore.errors import TierError
from kvstore.mover_options import MoverOptions, WriteMode
from kvstore.policies.standing import LRU, RETURNS, STANDINGS
from kvstore.spill import Risen, Spill
from kvstore.stats import Stats
from kvstore.tiers.base import AS_USED, Later, Tier
from kvstore.tiers.host import HostTier

log = logging.getLogger("kvstore.mover")

_BATCH_BYTES = 128 << 20
"""Each batch ends with the server having caught up: over TCP 64 MiB gave 0.79 of a bare socket's rate, 128 and 256
MiB 0.89 and 0.90 of it in the same run."""
_SHARE = 4
_SPILL_SHARE = 16
"""Of the host, that a batch may be, and where blocks go down as it fills: what is being written cannot be evicted
meanwhile, and saves want room just then."""
_IDLE_S = 0.05
_MAX_TOUCHES = 1024
_ATTEMPTS = 2


def _after_last(wanted: Sequence[bool]) -> int:
    """How many leading blocks there are up to the last that is wanted: a tail without its head cannot be found."""
    return next((at for at in range(len(wanted), 0, -1) if wanted[at - 1]), 0)


def _of_both(before: Hint, hint: Hint, index: int) -> Hint:
    """What two uses of one chain say together, by its last block: the later, unless the first asked for more."""
    is_more = before.priority_of(index) > hint.priority_of(index)
    return before if is_more and not before.closed and not hint.closed else hint


class _Outcome(Enum):
    DONE = "all is there now"
    FAILED = "some was not taken"
    ORPHANED = "a block was not taken, perhaps for want of its parent"


_Touches = dict[tuple[BlockId, tuple[int, ...]], tuple[Chain, int, tuple[int, ...], Hint]]
"""By its last block and parts, a chain of which so many blocks, these parts of each, were used, and by what hint."""


@dataclass(slots=True)
class _Job:
    blocks: list[BlockId]
    num_bytes: int
    hint: Hint
    tiers: list[int]
    attempt: int = 1


class Mover:
    """Owns the demotion thread. Methods are called by the store after a commit and after a match."""

    def __init__(
        self, host: HostTier, tiers: Sequence[Tier], options: MoverOptions, clock: Clock, stats: Stats
    ) -> None:
        self._host = host
        self._tiers = list(tiers)
        self._written = [number for number, tier in enumerate(tiers) if not tier.read_only]
        self._options = options
        self._mode = options.mode
        self._spill = Spill(host, tiers, self, clock, is_exclusive=options.is_exclusive)
        self._drain_until_s: float | None = None
        self._num_left = 0
        self._clock = clock
        self._stats = stats
        self._wake = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._queued: set[BlockId] = set()
        self._writing: frozenset[BlockId] = frozenset()
        self._queued_bytes = 0
        self.lost: Callable[[Sequence[BlockId]], None] = lambda blocks: None
        """Told of blocks that were to go down and will not."""
        self.demoted: Callable[[str, Sequence[tuple[RootId, BlockId, BlockMeta]]], None] = lambda tier, blocks: None
        """Told what a tier has confirmed, parents before children. On the demotion thread, no lock held."""
        self._touches: _Touches = {}
        self._risen: Risen = {}
        self._busy = False
        self._dirty = False
        self._closing = False
        self._failed = [False] * len(self._tiers)
        self._budget_at_s = clock.now_s()
        self._budget_bytes = float(options.write_bytes_per_s)
        self._thread: threading.Thread | None = None
        if self._tiers:
            self._thread = threading.Thread(target=self._run, name="kvstore-mover", daemon=True)
            self._thread.start()

    # -- what the store says -----------------------------------------------------------------------------------

    def committed(self, chain: Chain, indices: Sequence[int], block_bytes: int, hint: Hint) -> None:
        """Blocks became resident, head to tail."""
        self._dirty = True
        if self._written and self._mode is WriteMode.THROUGH:
            self._enqueue_wanted(chain, indices, block_bytes, hint)

    def reused(self, chain: Chain, num_blocks: int, block_bytes: int, hint: Hint) -> None:
        """A request matched the chain's first `num_blocks` in the host."""
        if self._written and self._mode is not WriteMode.ON_EVICT and num_blocks:
            self._enqueue_wanted(chain, range(num_blocks), block_bytes, hint)

    def _enqueue_wanted(self, chain: Chain, indices: Sequence[int], block_bytes: int, hint: Hint) -> None:
        least = self._options.min_priority
        blocks = [chain.ids[index] for index in indices]
        stop = _after_last([hint.priority_of(index) >= least for index in indices]) if least else len(blocks)
        self._enqueue(blocks[:stop], block_bytes, hint)
        self._leave(blocks[stop:])

    def _leave(self, blocks: Sequence[BlockId]) -> None:
        """These stay in the host alone."""
        if blocks:
            self._stats.add("mover.declined_blocks", len(blocks))
            self.lost(blocks)

    def touched(self, chain: Chain, num_blocks: int, parts: tuple[int, ...], hint: Hint) -> None:
        """The chain's first `num_blocks` were used, wherever they lie: keep them warm below, head to tail.

        A head served by the host must not look cold in the shared tier.
        """
        if not self._tiers or not num_blocks:
            return
        with self._wake:
            key = (chain.ids[num_blocks - 1], parts)
            if key not in self._touches and len(self._touches) >= _MAX_TOUCHES:
                self._stats.add("mover.dropped_touches")
                return
            before = self._touches.pop(key, None)
            if before is not None:
                hint = _of_both(before[-1], hint, num_blocks - 1)
            self._touches[key] = (chain, num_blocks, parts, hint)
            self._wake.notify()

    def came_up(self, chain: Chain, num_blocks: int, parts: tuple[int, ...]) -> None:
        """Of the chain's first `num_blocks` some were brought from lower tiers into the host."""
        self._dirty = True
        if self._options.is_exclusive and num_blocks:
            with self._wake:
                key = (chain.ids[num_blocks - 1], parts)
                if key not in self._risen and len(self._risen) >= _MAX_TOUCHES:
                    self._stats.add("mover.dropped_risen")
                    return
                self._risen[key] = (chain, num_blocks, parts)
                self._wake.notify()

    @property
    def writes_through(self) -> bool:
        """What is committed goes down, unless it is dropped."""
        return bool(self._written) and self._mode is WriteMode.THROUGH

    def on_its_way(self, block: BlockId) -> bool:
        """It waits to be written down, or is being written."""
        return block in self._queued or block in self._writing

    def _enqueue(self, blocks: Sequence[BlockId], block_bytes: int, hint: Hint) -> None:
        dropped: Sequence[BlockId] = ()
        with self._wake:
            if not self._closing:
                fresh = [block for block in blocks if block not in self._queued]
                room = max(0, self._options.queue_bytes - self._queued_bytes) // block_bytes
                if len(fresh) > room:
                    self._stats.add("mover.dropped_blocks", len(fresh) - room)
                    # The head is kept: a tail without it could not be found.
                    fresh, dropped = fresh[:room], fresh[room:]
                if fresh:
                    self._push(_Job(fresh, len(fresh) * block_bytes, hint, self._written))
        if dropped:
            self.lost(dropped)

    def _push(self, job: _Job) -> None:
        self._jobs.append(job)
        self._queued.update(job.blocks)
        self._queued_bytes += job.num_bytes
        self._wake.notify()

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                self._busy = False
                self._writing = frozenset()
                self._wake.notify_all()
                if not self._jobs and not self._touches and not self._risen and self._drain_until_s is None:
                    if self._closing:
                        return
                    self._wake.wait(_IDLE_S if self._mode is WriteMode.ON_EVICT else None)
                self._busy = True
                job = self._jobs.popleft() if self._jobs else None
                self._writing = frozenset(job.blocks if job is not None else ())
                if job is not None:  # from here on, a part committed to one of its blocks is news again
                    self._queued.difference_update(job.blocks)
                touches, self._touches = self._touches, {}
                risen, self._risen = self._risen, {}
                drain_until_s = self._drain_until_s
            try:
                self._pass_touches(touches)
                self._spill.came_up(risen)
                if job is not None:
                    self._demote(job)
                elif drain_until_s is not None:
                    self._drain(drain_until_s)
                elif self._mode is WriteMode.ON_EVICT and self._dirty:
                    self._go_ahead()
            except Exception:  # a thread's top: a bug here must not end demotion for good
                log.exception("demotion failed")
                self._stats.add("mover.errors")

    def _go_ahead(self) -> None:
        """Spill, and again if it did not end well, or something came meanwhile: also then it is dirty."""
        self._dirty, done = False, False
        try:
            done = self._spill.ahead()
        finally:
            if not done:
                self._dirty = True

    def _pass_touches(self, touches: _Touches) -> None:
        for chain, num_blocks, parts, hint in touches.values():
            if self._options.is_exclusive:
                self._spill.used(chain, num_blocks, parts)
            keys = chain.part_keys(0, num_blocks, parts)
            for number, tier in enumerate(self._tiers):
                try:
                    if not self._options.is_exclusive or tier.read_only:
                        tier.touch(keys, hint, self._standing(number, chain.ids[:num_blocks], range(num_blocks), hint))
                    if hint.closed:
                        private_from = self._host.pool.survey.shared_to(chain.ids[:num_blocks], chain.root.id)
                        tier.retire(keys, private_from * len(parts))
                except TierError as error:
                    self.note_failure(number, error)

    def _standing(
        self, number: int, blocks: Sequence[BlockId], indices: Sequence[int], hint: Hint, shift_s: float = 0.0
    ) -> Later:
        """How much later than now a use of blocks, at `indices` of their chain, counts in tier `number`.

        By `shift_s` more than the tier's ranking says.
        """
        tier = self._tiers[number]
        if tier.ranking == LRU and not shift_s:
            return AS_USED
        odds = self._host.pool.return_odds(blocks) if tier.ranking == RETURNS else [1.0] * len(blocks)
        later = STANDINGS[tier.ranking](hint, indices, odds, tier.span_s)
        shifted = [seconds + shift_s for seconds in later]
        return {block: seconds for block, seconds in zip(blocks, shifted, strict=True) if seconds}

    def likely(self, blocks: Sequence[BlockId]) -> list[bool]:
        """Whether each is as likely used again as is asked for; what a conversation left that was closed never is."""
        least = self._options.min_return_probability
        return [odds >= least and odds > 0 for odds in self._host.pool.return_odds(blocks)]

    def _demote(self, job: _Job) -> None:
        again: list[int] = []
        try:
            if self._options.min_return_probability:
                stop = _after_last(self.likely(job.blocks))
                job.blocks, unlikely = job.blocks[:stop], job.blocks[stop:]
                self._leave(unlikely)
            blocks = job.blocks
            for number in job.tiers:
                outcome = self._write_blocks(job.blocks, number, job.hint)
                if outcome is not _Outcome.DONE:
                    again.append(number)
                elif job.blocks and self._tiers[number].ranking != LRU:
                    # It stands below what it hangs from: where it is to stand higher, both are lifted.
                    self.use_below(self._host.pool.survey.ancestry(job.blocks[-1]), number, job.hint)
                if outcome is _Outcome.ORPHANED:
                    blocks = self._with_ancestors(job.blocks, number)
        finally:
            with self._wake:
                self._queued_bytes -= job.num_bytes
        with self._wake:
            if again and job.attempt < _ATTEMPTS and not self._closing:
                self._push(_Job(blocks, job.num_bytes, job.hint, again, job.attempt + 1))
            elif again:
                self._stats.add("mover.failed_blocks", len(job.blocks))
                self.lost(job.blocks)

    def _write_blocks(
        self, blocks: Sequence[BlockId], number: int, hint: Hint = NO_HINT, shift_s: float = 0.0
    ) -> _Outcome:
        """Write those of `blocks` that tier `number` is not believed to hold; `shift_s`: see `_standing`."""
        rest = list(blocks)
        while rest:
            outcome, num_bytes, num_blocks = self._write_some(rest, number, hint, shift_s)
            if outcome is not _Outcome.DONE:
                return outcome
            rest = rest[num_blocks:]
            self._spend(num_bytes)  # with nothing pinned: a slow budget must not keep saves from finding room
        return _Outcome.DONE

    def _write_some(
        self, blocks: Sequence[BlockId], number: int, hint: Hint, shift_s: float
    ) -> tuple[_Outcome, int, int]:
        """Write what is wanted of the first of `blocks`, a batch at most; outcome, bytes, and how many were seen to."""
        pool = self._host.pool
        resident, rows = pool.pin_resident(blocks[:1])
        if not resident:
            return _Outcome.DONE, 0, 1
        _, layout = pool.place_of(int(rows[0]))
        pool.unpin(rows)
        share = _SPILL_SHARE if self._mode is WriteMode.ON_EVICT else _SHARE
        most_bytes = min(_BATCH_BYTES, self._host.arena.capacity_bytes // share)
        num_blocks = max(1, most_bytes // layout.block_bytes)
        resident, rows = pool.pin_resident(blocks[:num_blocks])
        try:
            believed = pool.survey.below(rows, number)
            pairs = zip(resident, rows.tolist(), strict=True)
            wanted = [pair for pair, there in zip(pairs, believed, strict=True) if not there]
            if not wanted:
                return _Outcome.DONE, 0, num_blocks
            outcome, num_bytes = self._write_batch(wanted, number, hint, shift_s)
            return outcome, num_bytes, num_blocks
        finally:
            pool.unpin(rows)

    def _with_ancestors(self, blocks: Sequence[BlockId], number: int) -> list[BlockId]:
        """The tier refused a block for want of its parent: what it was believed to hold is gone; write it again."""
        pool = self._host.pool
        chain = list(dict.fromkeys(each for block in blocks for each in pool.survey.ancestry(block)))
        resident, rows = pool.pin_resident(chain)
        pool.forget_below(rows, number)
        pool.unpin(rows)
        self._stats.add("mover.restored_blocks", len(resident) - len(blocks))
        return resident

    def _write_batch(
        self, batch: list[tuple[BlockId, int]], number: int, hint: Hint, shift_s: float
    ) -> tuple[_Outcome, int]:
        """Write pinned blocks; outcome and bytes."""
        pool, tier = self._host.pool, self._tiers[number]
        parts: dict[PartKey, memoryview] = {}
        meta: dict[BlockId, BlockMeta] = {}
        roots: dict[BlockId, RootId] = {}
        cells: dict[int, tuple[int, ...]] = {}
        for block, row in batch:
            root, layout = pool.place_of(row)
            meta[block] = pool.meta_of(row)
            roots[block] = root
            cells[row] = pool.ready_parts(row)
            views = self._host.views(row, layout, cells[row])
            parts |= {PartKey(root, block, cell): view for cell, view in zip(cells[row], views, strict=True)}
        num_bytes = sum(map(len, parts.values()))
        later = self._standing(number, list(meta), [what.depth for what in meta.values()], hint, shift_s)
        began_s = self._clock.now_s()
        try:
            written = tier.write(parts, meta, self._options.write_deadline_s, later)
        except TierError as error:
            self.note_failure(number, error)
            return _Outcome.FAILED, num_bytes
        finally:
            self._stats.observe(f"{tier.name}.write", self._clock.now_s() - began_s)
        self._note_success(number)
        partial = {key.block for key in parts if key not in written}
        done = [row for block, row in batch if block not in partial]
        pool.set_below(np.array(done, np.int64), number, [cells[row] for row in done])
        self._stats.add("mover.demoted_blocks", len(done))
        if done:
            confirmed = [(roots[block], block, meta[block]) for block, _ in batch if block not in partial]
            self.demoted(tier.name, confirmed)
        if not partial:
            return _Outcome.DONE, num_bytes
        wants_parent = any(meta[block].depth and meta[block].parent not in meta for block in partial)
        return (_Outcome.ORPHANED if wants_parent else _Outcome.FAILED), num_bytes

    def write_down(self, blocks: Sequence[BlockId], number: int, shift_s: float = 0.0) -> bool:
        """See `kvstore.spill.Writes`."""
        outcome = self._write_blocks(blocks, number, shift_s=shift_s)
        if outcome is _Outcome.ORPHANED:
            outcome = self._write_blocks(self._with_ancestors(blocks, number), number, shift_s=shift_s)
        return outcome is _Outcome.DONE

    def use_below(self, chain: Sequence[BlockId], number: int, hint: Hint = NO_HINT, shift_s: float = 0.0) -> None:
        """See `kvstore.spill.Writes`."""
        later = self._standing(number, chain, range(len(chain)), hint, shift_s)
        resident, rows = self._host.pool.pin_resident(chain[:1])
        if not resident:
            return
        root, layout = self._host.pool.place_of(int(rows[0]))
        self._host.pool.unpin(rows)
        try:
            keys = [PartKey(root, block, part) for block in chain for part in layout.all_parts]
            self._tiers[number].touch(keys, hint, later)
        except TierError as error:
            self.note_failure(number, error)

    def _drain(self, until_s: float) -> None:
        num_left = 1
        try:
            num_left = self._spill.drain(until_s)
        finally:
            with self._wake:
                self._num_left, self._drain_until_s = num_left, None
                self._wake.notify_all()

    def _spend(self, num_bytes: int) -> None:
        """Wait until the write budget allows `num_bytes`."""
        rate = self._options.write_bytes_per_s
        if not rate:
            return
        now_s = self._clock.now_s()
        self._budget_bytes = min(float(rate), self._budget_bytes + (now_s - self._budget_at_s) * rate)
        self._budget_at_s = now_s
        self._budget_bytes -= num_bytes
        if self._budget_bytes < 0:
            with self._wake:
                self._wake.wait_for(lambda: self._closing, timeout=-self._budget_bytes / rate)

    def note_failure(self, number: int, error: TierError) -> None:
        """See `kvstore.spill.Writes`."""
        self._stats.add(f"{self._tiers[number].name}.write_failures")
        if not self._failed[number]:
            self._failed[number] = True
            log.warning("demotion to %s fails: %s", self._tiers[number].name, error)

    def _note_success(self, number: int) -> None:
        if self._failed[number]:
            # It may have come back empty: what it was believed to hold must be asked or written again.
            self._failed[number] = False
            self._host.pool.clear_below(number)
            log.warning("demotion to %s works again", self._tiers[number].name)

    # -- end ---------------------------------------------------------------------------------------------------

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued has gone down, or failed; False on time-out."""
        with self._wake:
            return self._wake.wait_for(
                lambda: not (self._jobs or self._touches or self._risen or self._busy), timeout=timeout_s
            )

    def drain(self, timeout_s: float) -> bool:
        """As `flush`; where tiers are exclusive, with all that the host alone holds. False where some of it is left."""
        until_s = self._clock.now_s() + timeout_s
        done = self.flush(timeout_s)
        if not self._options.is_exclusive or self._thread is None:
            return done
        with self._wake:
            self._drain_until_s = until_s
            self._wake.notify_all()
            ended = self._wake.wait_for(lambda: self._drain_until_s is None, max(0.0, until_s - self._clock.now_s()))
            return ended and not self._num_left

    def gauges(self) -> dict[str, float]:
        with self._wake:
            return {"mover.queued_bytes": self._queued_bytes}

    def close(self) -> None:
        """Flush within the limit, then stop."""
        if self._thread is None:
            return
        self.drain(self._options.flush_s)
        with self._wake:
            self._closing = True
            self._jobs.clear()
            self._touches.clear()
            self._risen.clear()
            self._wake.notify_all()
        self._thread.join(timeout=self._options.write_deadline_s + 1)
