# SPDX-License-Identifier: Apache-2.0
"""What callers wish for, under whatever order a policy has of its own: priorities, durations, conversations that ended.

Blocks lie in bands by priority, and the lowest band that has an end of a chain gives next; inside of a band the policy
decides. A block never goes before what hangs from it, whatever its priority. The semantics are those of TensorRT-LLM's
`KvCacheRetentionConfig`, with two more rules: what ended (a closed conversation, a `ttl_s` that passed) goes before
all, until a use makes it ordinary again; and what several requests went on from never falls below the ordinary, since
one of them cannot speak for the others.

Where nobody wishes for anything there is one band, and it costs a look at the hint for each use.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.api import NO_HINT, Hint

ORDINARY = NO_HINT.priority
_OVER = -1  # lower than any priority that can be wished for
_EXPIRED_AT_ONCE = 2048


def wishes(hint: Hint) -> bool:
    """Whether a hint says anything that moves blocks between bands."""
    return hint.priority != ORDINARY or hint.closed or hint.ttl_s is not None or bool(hint.retention)


@dataclass(frozen=True, slots=True)
class Wish:
    """Blocks `start` to `stop` of a chain belong to `bank`, where it is None to the one they are in.

    After `until_s` they belong to `after`. `private`: leave those alone that other chains go on from.
    """

    start: int
    stop: int
    bank: int | None
    private: bool
    until_s: float = math.inf
    after: int = 0


class Bands:
    """Priorities as *banks*: the numbers at which the queues of each begin. Bank 0 is that of ordinary blocks."""

    def __init__(self, num_queues: int, ordinary: int = ORDINARY) -> None:
        self.num_queues = num_queues
        self._ordinary = ordinary
        self._banks: dict[int, int] = {ordinary: 0}  # by priority
        self._priorities = [ordinary]  # by bank
        self.plain = True
        """Whether nobody ever wished for anything."""
        self._order = [(ordinary, 0)]
        self.now_s = 0.0
        self._wish_of: dict[int, Wish] = {}
        """Of holders (rows, or runs) that a time will move: what was wished for last."""
        self._ends: dict[int, dict[int, None]] = {}
        """Holders by the second in which their time ends."""
        self._seconds: list[int] = []

    def bank(self, priority: int) -> int:
        """The bank of a priority; a new one lies behind all others."""
        found = self._banks.get(priority)
        if found is None:
            found = self._banks[priority] = len(self._order) * self.num_queues
            self._priorities.append(priority)
            insort(self._order, (priority, found))
            self.plain = False
        return found

    @property
    def num_heaps(self) -> int:
        return len(self._order) * self.num_queues

    def is_over(self, bank: int) -> bool:
        return self.priority_of(bank) == _OVER

    def priority_of(self, bank: int) -> int:
        return self._priorities[bank // self.num_queues]

    @property
    def lowest(self) -> int:
        """The bank of the lowest priority."""
        return self._order[0][1]

    def next_higher(self, bank: int, heaps: Sequence[Sequence[object]]) -> int:
        """The bank of the next higher priority than one's that has anything in its queues' heaps; -1 where none has."""
        at = bisect_right(self._order, (self.priority_of(bank), bank))
        for _, other in self._order[at:]:
            if any(heaps[other : other + self.num_queues]):
                return other
        return -1

    def wished(self, hint: Hint, num_blocks: int) -> list[Wish]:
        """What a hint says of a chain of so many blocks; of two that overlap the later counts."""
        if hint.closed:
            return [Wish(0, num_blocks, self.bank(_OVER), private=True)]
        found: list[Wish] = []
        if hint.priority != ORDINARY or hint.ttl_s is not None:
            priority = None if hint.priority == ORDINARY else hint.priority
            after = 0 if hint.ttl_s is None else self.bank(_OVER)
            found.append(self._wish(0, num_blocks, priority, hint.ttl_s, after))
        for each in hint.retention if hint.block_tokens else ():
            stop = num_blocks if each.stop is None else min(num_blocks, -(-each.stop // hint.block_tokens))
            start = each.start // hint.block_tokens
            if start < stop:
                found.append(self._wish(start, stop, each.priority, each.duration_s, 0))
        return found

    def _wish(self, start: int, stop: int, priority: int | None, duration_s: float | None, after: int) -> Wish:
        bank = None if priority is None else self.bank(priority)
        until_s = math.inf if duration_s is None else self.now_s + duration_s
        return Wish(start, stop, bank, priority is not None and priority < self._ordinary, until_s, after)

    # -- time --------------------------------------------------------------------------------------------------

    def hold(self, holder: int, wish: Wish | None) -> None:
        """Remember what will become of a holder, in place of what was; None for one that nothing moves."""
        self.forget(holder)
        if wish is not None and wish.until_s != math.inf:
            self._wish_of[holder] = wish
            second = math.ceil(wish.until_s)
            if second not in self._ends:
                self._ends[second] = {}
                heapq.heappush(self._seconds, second)
            self._ends[second][holder] = None

    def held(self, holder: int) -> Wish | None:
        return self._wish_of.get(holder)

    def forget(self, holder: int) -> None:
        wish = self._wish_of.pop(holder, None) if self._wish_of else None
        if wish is not None:
            self._ends[math.ceil(wish.until_s)].pop(holder)

    def expired(self) -> list[tuple[int, int]]:
        """Holders whose time has ended, up to a second ago, and their banks from now on; the rest next time."""
        found: list[tuple[int, int]] = []
        while self._seconds and self._seconds[0] <= self.now_s and len(found) < _EXPIRED_AT_ONCE:
            holders = self._ends[self._seconds[0]]
            while holders and len(found) < _EXPIRED_AT_ONCE:
                holder, _ = holders.popitem()
                found.append((holder, self._wish_of.pop(holder).after))
            if not holders:
                del self._ends[heapq.heappop(self._seconds)]
        return found
