# SPDX-License-Identifier: Apache-2.0
"""Blocks that go down because they are about to leave the host: which, and in what order.

Two ways to have tiers. *Inclusive*: what goes down is chosen when it is made or used (`WriteMode`), a use warms a block
wherever it lies, and what came up stays below. *Exclusive*: a block goes down when the host is about to evict it, uses
in the host leave what lies below alone, and what came up is the next to go there. Each block is then in one tier, but
for a while: from when it goes down until it is evicted above, and from when it comes up until it is evicted below.

What is below always hangs from what is below, in both: of a chain of which an end goes down all goes down. So a chain
is found by what the host has of it and then what lies below, and after a restart, or by another store, by what lies
below alone.

Nobody waits for this. Eviction takes what it needs; what it took before it was below is lost, and counted
(`host.lost_blocks`). What a tier confirms is believed (`kvstore.beliefs`) until the block is used in the host
again: by the time it is evicted there it may be gone below.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from kvstore.backlog import Stretch
from kvstore.block import BlockId
from kvstore.clock import Clock
from kvstore.demotion import Demotion
from kvstore.errors import TierError
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier

log = logging.getLogger("kvstore.mover")

_NEARLY_FULL_SHARE = 0.9
_AHEAD_SHARE = 0.1
_MOST_AHEAD = 4096
"""Blocks that are looked at each time: under the pool's lock, a microsecond each. What is below is seen at once."""
_STEPS = 100
_TELL_EVERY_S = 2.0


class Spill:
    """What leaves a host, under its own steam or because the store ends. Used by one thread."""

    def __init__(
        self, host: HostTier, tiers: Sequence[Tier], demotion: Demotion, clock: Clock, *, is_exclusive: bool
    ) -> None:
        self._host = host
        self._tiers = tiers
        self._written = [number for number, tier in enumerate(tiers) if not tier.read_only]
        self._demotion = demotion
        self._clock = clock
        self._is_exclusive = is_exclusive
        for tier in tiers:
            tier.is_exclusive = is_exclusive

    def ahead(self) -> bool:
        """Write the coldest blocks of a nearly full host down before eviction reaches them; False to be asked again."""
        arena, pool = self._host.arena, self._host.pool
        if arena.acquired_bytes < _NEARLY_FULL_SHARE * arena.capacity_bytes:
            return True
        ready = [number for number in self._written if not self._tiers[number].refuses]
        if ready:
            cold = self._worth(pool.coldest(min(_MOST_AHEAD, max(1, int(len(pool) * _AHEAD_SHARE)))))
            for number in ready:
                self._write(pool.beliefs.missing(cold, number), number)
        # Not for all that did not go down: a full tier that takes calls would be asked for the same again and again.
        return not any(self._tiers[number].refuses for number in self._written)

    def drain(self, until_s: float) -> int:
        """Write down what the host alone holds, the hottest chains first, until then; how many blocks are left."""
        return sum(self._drain_to(number, until_s) for number in self._written)

    def came_up(self, stretch: Stretch) -> None:
        """What is in the host now may leave lower tiers, as far as nothing else there is known to hang from it."""
        for number in self._written:
            self._give_up(stretch, number)

    def used(self, stretch: Stretch) -> None:
        """Used in the host again: what went down meanwhile may leave lower tiers, and is believed there no more."""
        pool = self._host.pool
        _, rows = pool.pin_resident(stretch.chain.ids[: stretch.num_blocks])
        try:
            there = [number for number in self._written if any(pool.beliefs.holds(rows, number))]
            for number in there:
                pool.beliefs.forget(rows, number)
        finally:
            pool.unpin(rows)
        for number in there:
            self._give_up(stretch, number)

    def _give_up(self, stretch: Stretch, number: int) -> None:
        chain, num_blocks, parts = stretch
        num_host = self._host.pool.leading(chain.ids[:num_blocks], 0, chain.root.id)
        try:
            self._tiers[number].retire(chain.part_keys(0, num_host, parts), 0)
        except TierError as error:
            self._demotion.note_failure(number, error)

    def _worth(self, blocks: Sequence[BlockId]) -> list[BlockId]:
        return [block for block, likely in zip(blocks, self._demotion.likely(blocks), strict=True) if likely]

    def _write(self, blocks: Sequence[BlockId], number: int, shift_s: float = 0.0) -> bool:
        done = not blocks or self._demotion.write_whole(blocks, number, shift_s)
        if self._is_exclusive:
            for chain in self._ends(blocks):  # some lay there already, the next to go since they came up
                self._demotion.use_below(chain, number, shift_s=shift_s)
        return done

    def _ends(self, blocks: Sequence[BlockId]) -> Iterator[list[BlockId]]:
        """The chains, from their first blocks, that some blocks, parents first, are the ends of."""
        inner: set[BlockId] = set()
        for block in reversed(blocks):
            if block not in inner:
                chain = self._host.pool.survey.ancestry(block)
                inner.update(chain)
                if chain:
                    yield chain

    def _drain_to(self, number: int, until_s: float) -> int:
        pool, name = self._host.pool, self._tiers[number].name
        blocks = pool.beliefs.missing(self._worth(pool.coldest(len(pool))[::-1]), number)
        step, at = max(1, len(blocks) // _STEPS), 0
        began_s = told_s = now_s = self._clock.now_s()
        # Twice as much earlier as time went by: what is written later is colder, and stands lower.
        while (
            at < len(blocks) and now_s < until_s and self._write(blocks[at : at + step], number, 2 * (began_s - now_s))
        ):
            at, now_s = at + step, self._clock.now_s()
            if now_s - told_s >= _TELL_EVERY_S:
                told_s = now_s
                log.info("%d of %d blocks went to %s", min(at, len(blocks)), len(blocks), name)
        num_left = max(0, len(blocks) - at)
        if num_left:
            log.warning("%d of %d blocks did not go to %s", num_left, len(blocks), name)
        elif blocks:
            log.info("all %d blocks that the host alone held went to %s", len(blocks), name)
        return num_left
