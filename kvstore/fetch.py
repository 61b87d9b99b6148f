# SPDX-License-Identifier: Apache-2.0
"""What a load brings in from lower tiers: batch by batch, in order, on a thread of the store's.

Blocks become resident as they come (`kvstore.promotion`), as long as the host has room for them. A load larger than the
arena goes on in windows: what the consumer has passed gives way, from the tail, to slots that belong to no block.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress

import numpy as np

from kvstore.arena import PAGE_BYTES
from kvstore.block import PartKey
from kvstore.delivery import Delivery, ReadyBlock
from kvstore.errors import TierError
from kvstore.pace import Pace
from kvstore.promotion import Promotion
from kvstore.stats import Stats
from kvstore.tiers.base import More, Tier

_FIRST_BATCH_BYTES = 128 << 20
_BATCH_BYTES = 512 << 20
"""Asked of a tier at once. Between two batches its connection stands idle: 512 MiB over a local socket took 6 % less in
two batches than in four. The first is smaller, since nobody knows yet how quick the tier is. Blocks are handed out as
they arrive."""
_EARLY_BYTES = 8 << 20
"""The first of a batch, which a tier may ask for before the others have their slots: what that takes, 2 us a block,
it has something to send meanwhile."""
_SHARE = 3
"""Of the host, that a batch may be: reserved before a byte has come, it is lost to saves and to other loads."""


class Fetch:
    """Brings in what a plan says lies in lower tiers. For one thread."""

    def __init__(self, delivery: Delivery, stats: Stats) -> None:
        self._delivery = delivery
        self._plan = delivery.plan
        self._host = delivery.host
        self._stats = stats
        self._scratch: list[tuple[int, ...]] = []
        """Slots that belong to no block: those of one, once the load goes on in windows."""
        most_bytes = min(_BATCH_BYTES, self._host.arena.capacity_bytes // _SHARE)
        self._pace = Pace(_FIRST_BATCH_BYTES, most_bytes, self._plan.read_deadline_s)

    def run(self) -> None:
        """Bring it in, in order; ends at the first block that does not come."""
        try:
            at = self._plan.num_host_blocks
            block_bytes = sum(cell.num_bytes for cell in self._plan.cells())
            for tier, num_blocks in self._plan.sources:
                until = at + num_blocks
                while at < until:
                    stop = min(until, at + max(1, self._pace.num_bytes // block_bytes))
                    if self._delivery.stopped or not self._bring(tier, at, stop):
                        return
                    at = stop
        finally:
            self._delivery.fetch_ended()

    def release(self) -> None:
        """Give back what belongs to no block. Nobody reads there, or writes there, any more."""
        with suppress(IndexError):  # none, or somebody else closes it just now
            self._host.pool.filling.release_loose(self._scratch.pop())

    def _bring(self, tier: Tier, start: int, stop: int) -> bool:
        """True where all of `start` … `stop` was handed out."""
        while start < stop and not self._scratch:
            until = self._promote(tier, start, stop)
            if until is None:
                return False
            if until == start:
                break
            start = until
        while start < stop:
            if not self._bring_in_window(tier, start):
                return False
            start += 1
        return True

    def _promote(self, tier: Tier, start: int, stop: int) -> int | None:
        """Make blocks resident; index of the next, `start` for want of room, None where one did not come."""
        few = min(stop, start + max(1, _EARLY_BYTES // sum(cell.num_bytes for cell in self._plan.cells())))
        with Promotion(self._delivery, tier.name, start) as promotion:

            def rest() -> dict[PartKey, memoryview]:
                return promotion.reserve(stop, alone=bool(first)) if promotion.stop == few else {}

            first = promotion.reserve(few)
            if promotion.stop == start:
                return start
            reading = self._reading(tier, first, rest) if first else self._reading(tier, rest(), dict)
            return promotion.stop if promotion.run(reading) else None

    def _bring_in_window(self, tier: Tier, index: int) -> bool:
        """One block of a load larger than the arena, in slots that belong to no block."""
        plan, arena = self._plan, self._host.arena
        if not self._delivery.begin_window(index):
            return False
        if self._scratch:
            slots = self._scratch[0]
            # Another block's from here on: who copies late, from elsewhere, must be able to tell.
            arena.generation[np.array(slots) // PAGE_BYTES] += 1
        else:
            found = self._acquire_window()
            if found is None:
                return False
            slots = found
            self._scratch.append(slots)
        into = {
            PartKey(plan.chain.root.id, plan.chain.ids[index], cell.part): arena.view(slot, cell.num_bytes)
            for cell, slot in zip(plan.cells(), slots, strict=True)
        }
        if sum(map(len, self._reading(tier, into, dict))) != len(into):
            return False
        self._delivery.hand_out([ReadyBlock(index, tier.name, slots, self._delivery.cells)])
        return True

    def _acquire_window(self) -> tuple[int, ...] | None:
        """Take slots, giving up pins of consumed blocks from the tail until there is room; None where there is none."""
        sizes = [cell.num_bytes for cell in self._plan.cells()]
        while (slots := self._host.pool.filling.acquire_scratch(sizes)) is None:
            if not self._delivery.shorten():
                return None
        return slots

    def _reading(
        self, tier: Tier, into: dict[PartKey, memoryview], more: More
    ) -> Generator[Sequence[PartKey], None, None]:
        """Keys as the tier fills buffers; a failure of the tier ends it, counted."""
        if not into:
            return
        num_bytes = sum(map(len, into.values()))

        def counted() -> Mapping[PartKey, memoryview]:
            nonlocal num_bytes
            buffers = more()
            num_bytes += sum(map(len, buffers.values()))
            return buffers

        began_s = self._plan.now_s()
        try:
            yield from tier.read_on(into, counted, self._plan.read_deadline_s)
            self._pace.took(num_bytes, self._plan.now_s() - began_s)
        except TierError:
            self._stats.add(f"{tier.name}.read_failures")
        finally:
            seconds = self._plan.now_s() - began_s
            self._stats.add(f"{tier.name}.read_s", seconds)  # what was read, the tier counts itself
            self._stats.observe(f"{tier.name}.read", seconds)
