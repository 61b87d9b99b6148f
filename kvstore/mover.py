# SPDX-License-Identifier: Apache-2.0
"""Background demotion: copies committed blocks from the host to lower tiers, and passes touches down.

Never in a request's way: one thread, for which what is to be done waits within bounds (`kvstore.backlog`), and which
writes batch by batch (`kvstore.demotion`). Back-pressure drops writes (counted), a failed write is tried once more
(then counted). With `on_evict`, what goes down is chosen by the thread itself (`kvstore.spill`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial

from kvstore.api import Hint
from kvstore.backlog import Backlog, Job, Stretch
from kvstore.block import BlockId, Chain
from kvstore.clock import Clock
from kvstore.demotion import Demotion, Outcome
from kvstore.errors import TierError
from kvstore.index import Rows
from kvstore.mover_options import MoverOptions, WriteMode
from kvstore.policies.standing import LRU
from kvstore.spill import Spill
from kvstore.stats import Stats
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier

log = logging.getLogger("kvstore.mover")

_IDLE_S = 0.05
_USES_WAIT_S = 0.5
"""How long uses in the host may wait before lower tiers hear of them, so that those of one head become one. Passed on
one by one, each cost a hit of 8 MiB half as much again: two threads were woken to name and send 64 keys."""


def _after_last(wanted: Sequence[bool]) -> int:
    """How many leading blocks there are up to the last that is wanted: a tail without its head cannot be found."""
    return next((at for at in range(len(wanted), 0, -1) if wanted[at - 1]), 0)


class Mover:
    """Owns the demotion thread. Methods are called by the store after a commit and after a match.

    Attributes:
        lost: told of blocks that were to go down and will not.
        demotion: what the thread writes with.
        stays: numbers of the tiers, by name, that keep what is read from them: it need not be written there again.
    """

    def __init__(
        self, host: HostTier, tiers: Sequence[Tier], options: MoverOptions, clock: Clock, stats: Stats
    ) -> None:
        self._host = host
        self._tiers = list(tiers)
        self._written = [number for number, tier in enumerate(tiers) if not tier.read_only]
        self.stays = {} if options.is_exclusive else {self._tiers[number].name: number for number in self._written}
        for number in self._written:
            self._tiers[number].absent = partial(host.pool.beliefs.deny, tier=number)
        self._options = options
        self._mode = options.mode
        self._clock = clock
        self._stats = stats
        self._closing = threading.Event()
        self.demotion = Demotion(host, self._tiers, options, clock, stats, self._closing)
        self._spill = Spill(host, self._tiers, self.demotion, clock, is_exclusive=options.is_exclusive)
        self._wake = threading.Condition()
        self._backlog = Backlog(options.queue_bytes, stats)
        self.lost: Callable[[Sequence[BlockId]], None] = lambda blocks: None
        self._drain_until_s: float | None = None
        self._num_left = 0
        self._busy = False
        self._hurry = False
        self._num_rounds = 0
        self._dirty = False
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

    def reused(self, chain: Chain, rows: Rows, block_bytes: int, hint: Hint) -> None:
        """A request matched the chain's first blocks in the host, where they have these pinned rows."""
        if not self._written or self._mode is WriteMode.ON_EVICT or not len(rows):
            return
        if not self._host.pool.beliefs.all_hold(rows, self._written):  # else each use would wake the thread for nothing
            self._enqueue_wanted(chain, range(len(rows)), block_bytes, hint)

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

    def touched(self, chain: Chain, num_blocks: int, parts: tuple[int, ...], hint: Hint, *, soon: bool = False) -> None:
        """The chain's first `num_blocks` were used, wherever they lie: keep them warm below, head to tail.

        A head served by the host must not look cold in the shared tier. Tiers are told within half a second, of all
        uses of a stretch once; `soon`: at once, since what is about to be read there should not be evicted before.
        """
        if not self._tiers or not num_blocks:
            return
        with self._wake:
            was_empty = self._backlog.is_empty
            self._backlog.add_use(Stretch(chain, num_blocks, parts), hint)
            self._hurry |= soon or self._backlog.is_crowded
            if was_empty or self._hurry:  # else the thread waits already, for others that may come
                self._wake.notify_all()

    def came_up(self, chain: Chain, num_blocks: int, parts: tuple[int, ...]) -> None:
        """Of the chain's first `num_blocks` some were brought from lower tiers into the host."""
        self._dirty = True
        if self._options.is_exclusive and num_blocks:
            with self._wake:
                self._backlog.add_risen(Stretch(chain, num_blocks, parts))
                self._wake.notify()

    @property
    def writes_through(self) -> bool:
        """What is committed goes down, unless it is dropped."""
        return bool(self._written) and self._mode is WriteMode.THROUGH

    def on_its_way(self, block: BlockId) -> bool:
        """It waits to be written down, or is being written."""
        return block in self._backlog

    def _enqueue(self, blocks: Sequence[BlockId], block_bytes: int, hint: Hint) -> None:
        dropped: Sequence[BlockId] = ()
        with self._wake:
            if not self._closing.is_set():
                dropped = self._backlog.add(blocks, block_bytes, hint, self._written)
                self._wake.notify()
        if dropped:
            self.lost(dropped)

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                self._backlog.done()
                self._busy = False
                self._num_rounds += 1
                self._wake.notify_all()
                if self._backlog.is_empty and self._drain_until_s is None:
                    if self._closing.is_set():
                        return
                    self._wake.wait(_IDLE_S if self._mode is WriteMode.ON_EVICT else None)
                if self._backlog.has_uses_alone:
                    self._wake.wait_for(self._is_urgent, _IDLE_S if self._mode is WriteMode.ON_EVICT else _USES_WAIT_S)
                self._hurry = False
                self._busy = True
                job, uses, risen = self._backlog.take()
                drain_until_s = self._drain_until_s
            for stretch, hint in uses:
                self._guard(lambda stretch=stretch, hint=hint: self._pass_use(stretch, hint))  # type: ignore[misc]
            for stretch in risen:
                self._guard(lambda stretch=stretch: self._spill.came_up(stretch))  # type: ignore[misc]
            if job is not None:
                if not self._guard(lambda job=job: self._demote(job)):  # type: ignore[misc]
                    self._fail(job.blocks)
            elif drain_until_s is not None:
                self._guard(lambda until_s=drain_until_s: self._drain(until_s))  # type: ignore[misc]
            elif self._mode is WriteMode.ON_EVICT and self._dirty:
                self._guard(self._go_ahead)

    def _is_urgent(self) -> bool:
        """Whether uses have waited long enough: something else is to be done, or somebody wants them passed on."""
        asked = self._hurry or self._drain_until_s is not None or self._closing.is_set()
        return asked or not self._backlog.has_uses_alone

    def _guard(self, step: Callable[[], None]) -> bool:
        """A thread's top: a bug in one step must not end demotion for good, nor take the round's other steps along."""
        try:
            step()
        except Exception:
            log.exception("demotion failed")
            self._stats.add("mover.errors")
            return False
        return True

    def _fail(self, blocks: Sequence[BlockId]) -> None:
        """These do not go down."""
        self._stats.add("mover.failed_blocks", len(blocks))
        self.lost(blocks)

    def _go_ahead(self) -> None:
        """Spill, and again if it did not end well, or something came meanwhile: also then it is dirty."""
        self._dirty, done = False, False
        try:
            done = self._spill.ahead()
        finally:
            if not done:
                self._dirty = True

    def _pass_use(self, stretch: Stretch, hint: Hint) -> None:
        chain, num_blocks, parts = stretch
        if self._options.is_exclusive:
            self._spill.used(stretch)
        keys, ids = chain.part_keys(0, num_blocks, parts), chain.ids[:num_blocks]
        for number, tier in enumerate(self._tiers):
            try:
                if not self._options.is_exclusive or tier.read_only:
                    tier.touch(keys, hint, self.demotion.standing(ids, number, range(num_blocks), hint))
                if hint.closed:
                    tier.retire(keys, self._host.pool.survey.shared_to(ids, chain.root.id) * len(parts))
            except TierError as error:
                self.demotion.note_failure(number, error)

    def _demote(self, job: Job) -> None:
        wanted: Sequence[BlockId] = job.blocks
        again: list[int] = []
        if self._options.min_return_probability:
            stop = _after_last(self.demotion.likely(job.blocks))
            wanted = job.blocks[:stop]
            self._leave(job.blocks[stop:])
        blocks = wanted
        for number in job.tiers:
            outcome = self.demotion.write(wanted, number, job.hint)
            if outcome is not Outcome.DONE:
                again.append(number)
            elif wanted and self._tiers[number].ranking != LRU:
                # It stands below what it hangs from: where it is to stand higher, both are lifted.
                self.demotion.use_below(self._host.pool.survey.ancestry(wanted[-1]), number, job.hint)
            if outcome is Outcome.ORPHANED:
                blocks = self.demotion.with_ancestors(wanted, number)
        if not again:
            return
        with self._wake:
            will_be_tried = not self._closing.is_set() and self._backlog.again(job, blocks, again)
        if not will_be_tried:
            self._fail(wanted)

    def _drain(self, until_s: float) -> None:
        num_left = 1
        try:
            num_left = self._spill.drain(until_s)
        finally:
            with self._wake:
                self._num_left, self._drain_until_s = num_left, None
                self._wake.notify_all()

    # -- end ---------------------------------------------------------------------------------------------------

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued has gone down, or failed; False on time-out."""
        with self._wake:
            self._hurry = not self._backlog.is_empty
            self._wake.notify_all()
            return self._wake.wait_for(lambda: self._backlog.is_empty and not self._busy, timeout=timeout_s)

    def end_round(self, timeout_s: float) -> bool:
        """Wait until what is being written now has gone down, or failed; False on time-out."""
        with self._wake:
            number = self._num_rounds
            return self._wake.wait_for(lambda: not self._busy or self._num_rounds != number, timeout=timeout_s)

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
            return {"mover.queued_bytes": self._backlog.num_bytes}

    def close(self) -> None:
        """Flush within the limit, then stop."""
        if self._thread is None:
            return
        self.drain(self._options.flush_s)
        with self._wake:
            self._closing.set()
            self._backlog.clear()
            self._wake.notify_all()
        self._thread.join(timeout=self._options.write_deadline_s + 1)
