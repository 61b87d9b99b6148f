# SPDX-License-Identifier: Apache-2.0
"""What lower tiers hold of a chain: asked on other threads, under a deadline, and once more while others compute.

Invariants
1. Whoever asks never waits: a `Lookup` says what has been answered so far.
2. A tier that fails or refuses holds nothing; the next one is asked all the same.
3. An answer stands until a newer one is there.

Whether to ask at all is the store's to say. To ask each time, and to let the answer fall where a load came first, made
a host hit of 1.3 ms one of 2.8 on two cores. To put the question off for 2 ms, and drop it then, still cost a hit of
0.7 ms a tenth: every second one waited for the interpreter, for the thread that looked what was still wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.api import Hint
from kvstore.block import Chain
from kvstore.clock import Clock
from kvstore.config import RequestOptions
from kvstore.errors import TierError
from kvstore.mover import Mover
from kvstore.stats import Stats
from kvstore.tiers.base import Tier

Sources = tuple[tuple[Tier, int], ...]
"""(tier, number of blocks), in the order of the chain."""

_ASK_AGAIN_S = 0.1
"""How often lower tiers are asked about blocks that another store is computing, while a request waits for them."""


class Answer(NamedTuple):
    """What lower tiers said of a chain."""

    sources: Sources
    """From where they were asked."""
    pending_to: int
    """Chain index up to which other stores are computing what follows."""
    time_s: float


@dataclass(slots=True)
class Lookup:
    """One chain, asked about between the indices `start` and `stop`."""

    chain: Chain
    parts: tuple[int, ...]
    start: int
    stop: int
    hint: Hint
    answer: Future[Answer]
    again: Future[Answer] | None = None
    """The same asked once more, while the answer still counts."""

    @property
    def settled(self) -> bool:
        """Whether all tiers have answered, or failed to."""
        return self.answer.done()

    @property
    def said(self) -> Answer | None:
        """The answer, as far as there is one."""
        return self.answer.result() if self.answer.done() else None

    @property
    def pending_to(self) -> int:
        """Chain index up to which other stores are computing, as far as is known; 0 for nothing."""
        said = self.said
        return said.pending_to if said is not None else 0

    def serves(self, chain: Chain, parts: tuple[int, ...], start: int) -> bool:
        """Whether what was asked tells as much of this chain from `start` on, as it is now."""
        return self.chain is chain and self.parts == parts and self.stop == len(chain) and self.start <= start

    def sources(self, num_host_blocks: int) -> Sources:
        """What lower tiers hold after the host's run, as far as they have answered."""
        said = self.said
        if said is None:
            return ()
        skip = num_host_blocks - self.start
        out: list[tuple[Tier, int]] = []
        for tier, num_blocks in said.sources:
            used = min(skip, num_blocks)
            skip -= used
            if num_blocks > used:
                out.append((tier, num_blocks - used))
        return tuple(out)

    def wait(self, timeout_s: float) -> None:
        """Wait until it is settled, or for as long."""
        with suppress(FutureTimeout):
            self.answer.result(timeout=timeout_s)


class Lookups:
    """Asks the lower tiers of a store, `tiers`, in their order."""

    def __init__(
        self, tiers: Sequence[Tier], mover: Mover, settings: RequestOptions, clock: Clock, stats: Stats
    ) -> None:
        self._tiers = tiers
        self._mover = mover
        self._deadline_s = settings.lookup_deadline_s
        self._clock = clock
        self._stats = stats
        # Threads of its own: a load whose consumer is slow holds its thread, and matches must not wait for that.
        self._threads = ThreadPoolExecutor(settings.io_threads, thread_name_prefix="kvstore-ask")

    @property
    def refuse(self) -> bool:
        """Whether no tier would answer: then nothing is to be had by asking."""
        return all(tier.refuses for tier in self._tiers)

    def begin(self, chain: Chain, start: int, parts: tuple[int, ...], hint: Hint) -> Lookup:
        """Ask what the tiers hold of `chain` from `start` on; what they hold is touched there, with the hint."""
        if not self.refuse:
            asked = self._threads.submit(self._ask, chain, start, parts, hint)
            return Lookup(chain, parts, start, len(chain), hint, asked)
        # Said at once: two hand-overs between threads would cost a busy machine milliseconds, for nothing.
        self._stats.add_all({f"{tier.name}.lookup_failures": 1 for tier in self._tiers})
        refused: Future[Answer] = Future()
        refused.set_result(Answer((), start, self._clock.now_s()))
        return Lookup(chain, parts, start, len(chain), hint, refused)

    def look_again(self, lookup: Lookup, now_s: float) -> None:
        """What another store computes arrives in a lower tier: look again now and then."""
        again = lookup.again  # looked at once: a call that is made twice may be looking at the same time
        if again is not None and again.done():
            lookup.answer, lookup.again = again, None
        said = lookup.said
        if lookup.again is None and said is not None:
            stop = lookup.start + sum(count for _, count in said.sources)
            if said.pending_to > stop and now_s - said.time_s >= _ASK_AGAIN_S:
                lookup.again = self._threads.submit(self._ask, lookup.chain, lookup.start, lookup.parts, lookup.hint)

    def locate(self, chain: Chain, parts: tuple[int, ...]) -> dict[str, list[bool]]:
        """Which blocks of `chain` each tier holds whole, as it says now; none for one that does not answer.

        For people: nothing is counted, and nothing kept warm by it.
        """
        keys = chain.part_keys(0, len(chain), parts)
        found: dict[str, list[bool]] = {}
        for tier in self._tiers:
            try:
                there = tier.contains(keys, self._deadline_s)
            except TierError:
                there = [False] * len(keys)
            found[tier.name] = [all(there[at : at + len(parts)]) for at in range(0, len(keys), len(parts))]
        return found

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    def _ask(self, chain: Chain, start: int, parts: tuple[int, ...], hint: Hint) -> Answer:
        """Ask the tiers one after the other, each about what those before it lack."""
        found: list[tuple[Tier, int]] = []
        at, began_s = start, self._clock.now_s()
        for tier in self._tiers:
            keys = chain.part_keys(at, len(chain), parts)
            if not keys:
                break
            tier_began_s = self._clock.now_s()
            try:
                there = tier.contains(keys, self._deadline_s)
            except TierError:
                self._stats.add(f"{tier.name}.lookup_failures")
                continue
            finally:
                self._stats.observe(f"{tier.name}.lookup", self._clock.now_s() - tier_began_s)
            num_keys = next((number for number, present in enumerate(there) if not present), len(there))
            num_blocks = num_keys // len(parts)
            if num_blocks:
                found.append((tier, num_blocks))
                at += num_blocks
                self._mover.touched(chain, at, parts, hint, soon=True)
            self._stats.add_all({f"{tier.name}.hit_blocks": num_blocks, f"{tier.name}.missed_blocks": len(chain) - at})
        deadline_s = self._deadline_s - (self._clock.now_s() - began_s)
        return Answer(tuple(found), self._pending_to(chain, at, deadline_s), self._clock.now_s())

    def _pending_to(self, chain: Chain, at: int, deadline_s: float) -> int:
        """Chain index up to which other stores compute what follows `at`; those announce who write through."""
        stop = at
        for tier in self._tiers if at < len(chain) and self._mover.writes_through else ():
            if tier.keeps_marks and deadline_s > 0:  # what presence left of it
                try:
                    stop = max(stop, tier.marked_to(chain.root.id, chain.ids, at, deadline_s))
                except TierError:
                    self._stats.add(f"{tier.name}.lookup_failures")
        return stop


def first_of(sources: Sources, num_blocks: int) -> Sources:
    """The sources' first `num_blocks`."""
    out: list[tuple[Tier, int]] = []
    for tier, count in sources:
        if num_blocks > 0:
            out.append((tier, min(count, num_blocks)))
            num_blocks -= count
    return tuple(out)
