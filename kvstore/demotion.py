# SPDX-License-Identifier: Apache-2.0
"""Writing blocks of the host to lower tiers, batch by batch: how, not when (`kvstore.mover`, `kvstore.spill`).

A block is pinned while it is written, and stays readable. Nothing is believed to be below that the tier did not
confirm, or hand out; a tier that came back after a failure is believed to hold nothing, what a touch does not find is
believed no more (`Tier.absent`), and a tier that refuses a block for want of its parent gets the whole chain again. A
write budget is waited for between batches, with nothing pinned.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from enum import Enum

import numpy as np

from kvstore.api import NO_HINT, Hint
from kvstore.block import BlockId, BlockMeta, PartKey, RootId
from kvstore.clock import Clock
from kvstore.errors import TierError
from kvstore.mover_options import MoverOptions, WriteMode
from kvstore.pace import Pace
from kvstore.policies.standing import LRU, RETURNS, STANDINGS
from kvstore.stats import Stats
from kvstore.tiers.base import AS_USED, Later, Tier
from kvstore.tiers.host import HostTier

log = logging.getLogger("kvstore.mover")

_FIRST_BATCH_BYTES = 64 << 20
_BATCH_BYTES = 256 << 20
"""Each batch begins with a plan and ends with the server having caught up, 1.7 ms in which nothing is sent: in two
comparisons over TCP 64 MiB gave 0.79 and 0.81 of a bare socket's rate, 128 MiB 0.89 and 0.83, 256 MiB 0.90 and 0.82;
over a Unix socket, whose server is quicker, 128, 256 and 512 MiB gave 0.84, 0.86 and 0.86."""
_SHARE = 4
_SPILL_SHARE = 16
"""Of the host, that a large batch may be, and any where blocks go down as it fills: what is being written cannot be
evicted meanwhile, and saves want room just then."""


class Outcome(Enum):
    """How a write ended."""

    DONE = "all is there now"
    FAILED = "some was not taken"
    ORPHANED = "a block was not taken, perhaps for want of its parent"


class Demotion:
    """Writes to each of `tiers`, which go by their numbers. Used by one thread.

    Attributes:
        demoted: told what a tier has confirmed, parents before children; no lock is held.
    """

    def __init__(
        self,
        host: HostTier,
        tiers: Sequence[Tier],
        options: MoverOptions,
        clock: Clock,
        stats: Stats,
        closing: threading.Event,
    ) -> None:
        """`closing` ends the waiting for the budget."""
        self._host = host
        self._tiers = tiers
        self._options = options
        self._clock = clock
        self._stats = stats
        self._closing = closing
        self._failed = [False] * len(tiers)
        capacity_bytes = host.arena.capacity_bytes
        most_bytes = max(_FIRST_BATCH_BYTES, min(_BATCH_BYTES, capacity_bytes // _SHARE))
        if options.mode is WriteMode.ON_EVICT:
            most_bytes = min(_BATCH_BYTES, capacity_bytes // _SPILL_SHARE)
        self._paces = [Pace(_FIRST_BATCH_BYTES, most_bytes, options.write_deadline_s) for _ in tiers]
        self._budget_at_s = clock.now_s()
        self._budget_bytes = float(options.write_bytes_per_s)
        self.demoted: Callable[[str, Sequence[tuple[RootId, BlockId, BlockMeta]]], None] = lambda tier, blocks: None

    # -- what is worth writing, and where it stands below ------------------------------------------------------

    def likely(self, blocks: Sequence[BlockId]) -> list[bool]:
        """Whether each is as likely used again as is asked for; what a conversation left that was closed never is."""
        least = self._options.min_return_probability
        return [odds >= least and odds > 0 for odds in self._host.pool.return_odds(blocks)]

    def standing(
        self, blocks: Sequence[BlockId], number: int, indices: Sequence[int], hint: Hint, shift_s: float = 0.0
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

    def use_below(self, chain: Sequence[BlockId], number: int, hint: Hint = NO_HINT, shift_s: float = 0.0) -> None:
        """A chain in the host, from its first block, counts as used in a tier `shift_s` after now."""
        later = self.standing(chain, number, range(len(chain)), hint, shift_s)
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

    # -- writing -----------------------------------------------------------------------------------------------

    def write(self, blocks: Sequence[BlockId], number: int, hint: Hint = NO_HINT, shift_s: float = 0.0) -> Outcome:
        """Write those of `blocks`, parents first, that a tier is not believed to hold; `shift_s`: see `standing`."""
        rest = list(blocks)
        while rest:
            outcome, num_bytes, num_blocks = self._write_some(rest, number, hint, shift_s)
            if outcome is not Outcome.DONE:
                return outcome
            rest = rest[num_blocks:]
            self._spend(num_bytes)  # with nothing pinned: a slow budget must not keep saves from finding room
        return Outcome.DONE

    def write_whole(self, blocks: Sequence[BlockId], number: int, shift_s: float = 0.0) -> bool:
        """As `write`, and at once with all they hang from where that is missing; whether all of them are there now."""
        outcome = self.write(blocks, number, shift_s=shift_s)
        if outcome is Outcome.ORPHANED:
            outcome = self.write(self.with_ancestors(blocks, number), number, shift_s=shift_s)
        return outcome is Outcome.DONE

    def with_ancestors(self, blocks: Sequence[BlockId], number: int) -> list[BlockId]:
        """The tier refused a block for want of its parent: what it was believed to hold is gone; write it again."""
        pool = self._host.pool
        chain = list(dict.fromkeys(each for block in blocks for each in pool.survey.ancestry(block)))
        resident, rows = pool.pin_resident(chain)
        pool.beliefs.forget(rows, number)
        pool.unpin(rows)
        self._stats.add("mover.restored_blocks", len(resident) - len(blocks))
        return resident

    def _write_some(
        self, blocks: Sequence[BlockId], number: int, hint: Hint, shift_s: float
    ) -> tuple[Outcome, int, int]:
        """Write what is wanted of the first of `blocks`, a batch at most; outcome, bytes, and how many were seen to."""
        pool = self._host.pool
        resident, rows = pool.pin_resident(blocks[:1])
        if not resident:
            return Outcome.DONE, 0, 1
        _, layout = pool.place_of(int(rows[0]))
        pool.unpin(rows)
        num_blocks = max(1, self._paces[number].num_bytes // layout.block_bytes)
        resident, rows = pool.pin_resident(blocks[:num_blocks])
        try:
            believed = pool.beliefs.holds(rows, number)
            pairs = zip(resident, rows.tolist(), strict=True)
            wanted = [pair for pair, there in zip(pairs, believed, strict=True) if not there]
            if not wanted:
                return Outcome.DONE, 0, num_blocks
            outcome, num_bytes = self._write_batch(wanted, number, hint, shift_s)
            return outcome, num_bytes, num_blocks
        finally:
            pool.unpin(rows)

    def _write_batch(
        self, batch: list[tuple[BlockId, int]], number: int, hint: Hint, shift_s: float
    ) -> tuple[Outcome, int]:
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
        later = self.standing(list(meta), number, [what.depth for what in meta.values()], hint, shift_s)
        began_s = self._clock.now_s()
        try:
            written = tier.write(parts, meta, self._options.write_deadline_s, later)
        except TierError as error:
            self.note_failure(number, error)
            return Outcome.FAILED, num_bytes
        finally:
            self._stats.observe(f"{tier.name}.write", self._clock.now_s() - began_s)
        self._note_success(number)
        self._paces[number].took(num_bytes, self._clock.now_s() - began_s)
        partial = {key.block for key in parts if key not in written}
        done = [row for block, row in batch if block not in partial]
        pool.beliefs.add(np.array(done, np.int64), number, [cells[row] for row in done])
        self._stats.add("mover.demoted_blocks", len(done))
        if done:
            confirmed = [(roots[block], block, meta[block]) for block, _ in batch if block not in partial]
            self.demoted(tier.name, confirmed)
        if not partial:
            return Outcome.DONE, num_bytes
        wants_parent = any(meta[block].depth and meta[block].parent not in meta for block in partial)
        return (Outcome.ORPHANED if wants_parent else Outcome.FAILED), num_bytes

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
            self._closing.wait(-self._budget_bytes / rate)

    # -- failures ----------------------------------------------------------------------------------------------

    def note_failure(self, number: int, error: TierError) -> None:
        """A tier failed: counted, and said once until it works again."""
        self._stats.add(f"{self._tiers[number].name}.write_failures")
        self._paces[number].failed()
        if not self._failed[number]:
            self._failed[number] = True
            log.warning("demotion to %s fails: %s", self._tiers[number].name, error)

    def _note_success(self, number: int) -> None:
        if self._failed[number]:
            # It may have come back empty: what it was believed to hold must be asked or written again.
            self._failed[number] = False
            self._host.pool.beliefs.clear(number)
            log.warning("demotion to %s works again", self._tiers[number].name)
