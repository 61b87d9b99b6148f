# SPDX-License-Identifier: Apache-2.0
"""Two small caches of ids, run beside a policy to see whether it or LRU would have more hits.

A block is in the sample by its id, so every block of a chain has the same chance whoever uses it, and a cache of a
share of the blocks behaves like the whole one of which it is the share (Waldspurger et al., "Efficient MRC
Construction with SHARDS", FAST 2015). A suffix is never fresher than its prefix, so a block's own presence stands for
its prefix's. Both caches see every sampled use, whichever order the real one follows, so they are compared with each
other.

LRU is what is believed. The other has to show that it wins, by more standard errors than chance gives, over a memory
of some hundred requests: a loss of one point of hit rate is under a tenth of a standard error a request, and no
shorter memory can tell it from luck. What it won counts up to a credit, so that a change of traffic takes it back
soon. Once it is believed, the real cache follows it, and its hits count where they are fewer than the small cache's:
two caches that keep different halves of one loop have their hits at different times. Belief that was lost is harder to
win each time, as long as that is remembered. On made-up loops beside chats (seed 2, 10 % of the blocks) 2.6 points
were lost to LRU without these two rules, 0.5 with them, and 1.0 at 7 %. The worst that is known is 1.6, at 7 to 20 %:
chats, and then only short prompts that come back at random, the recent ones more often.

Tried and left, in points over LRU (real chat trace, 10 % of its blocks, first half and last half; now 0.6 and 2.7).
Samples of 8192, which is all of it there: 3.5 and 1.5. Those, a credit of 0.75 and a proof of 0.4: 3.5 and 1.7, and
0.8 instead of 0.9 lost on the loops. A budget, 0.3 % of what was asked lately, that the real cache may lose to LRU
before it goes by LRU for as long again: 0.3 lost on the loops at 7 %, 1.0 instead of 0.6 on phases of loops and chats
at 3 %, and nothing won on the chats. What these differ by on the chats is mostly when chance lets it believe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvstore.block import BlockId

_SAMPLED_BLOCKS = 2048  # in each cache, about: with 1024, 0.2 points less where the room is large
_WHOLE = 1 << 16
_HALF_LIFE = 512  # requests, after which a hit counts half
_KEEP = 0.5 ** (1 / _HALF_LIFE)
_SHOWN = 0.5  # standard errors of the lead at which it is believed: with 1.0, up to 0.7 points less
_CREDIT = 1.5  # to which it can rise,
_DOUBTED = 0.0  # and at which it is believed no longer
_DEBT = -1.0  # and to which it can fall,
_MOST_DEBT = -8.0  # or so low where it was believed wrongly again and again


class Shadow:
    """LRU beside queues of levels, of which `worth` says which gives next. Both hold ids of a sample."""

    def __init__(self, num_levels: int) -> None:
        self._lru: OrderedDict[BlockId, float] = OrderedDict()
        self._queues: list[OrderedDict[BlockId, float]] = [OrderedDict() for _ in range(num_levels)]
        self._level_of: dict[BlockId, int] = {}
        self._num_blocks = 0
        self._capacity = 0
        self._limit = 0
        self._lead = 0.0
        """Hits of the levels more than of LRU, what is long ago counting less."""
        self._square = 0.0
        """Of the lead's steps, a request each: its blocks hit or miss together."""
        self._debt = _DEBT
        self.wins = False
        """Whether the levels have shown that they have more hits than LRU, and nothing says otherwise since."""

    def resize(self, num_blocks: int) -> None:
        """The real cache holds so many blocks."""
        if abs(num_blocks - self._num_blocks) <= self._num_blocks // 4:
            return
        self._num_blocks = num_blocks
        limit = min(_WHOLE, max(1, _WHOLE * _SAMPLED_BLOCKS // max(1, num_blocks)))
        if limit != self._limit:
            self._level_of.clear()
            for queue in (self._lru, *self._queues):
                queue.clear()
        self._limit = limit
        self._capacity = max(1, num_blocks * limit // _WHOLE)

    def use(
        self,
        blocks: Sequence[BlockId],
        asked_from: int,
        absent_from: int,
        levels: Sequence[tuple[int, int]],
        now_s: float,
        worth: Callable[[int, float], float],
    ) -> None:
        """A chain was used, head to tail; hits of those from `asked_from` on count. The real cache had the first ones
        up to `absent_from`.

        `levels` are those of its pieces, each with the place in `blocks` where it begins, the last piece first.
        """
        if not self._capacity:
            return
        lru, level_of, queues = self._lru, self._level_of, self._queues
        limit, stop = self._limit, len(blocks)
        more = real = used = 0
        whole, move_to_end = limit == _WHOLE, lru.move_to_end
        for start, level in levels:
            queue = queues[level]
            for at in range(stop - 1, start - 1, -1):
                block = blocks[at]
                if not whole and (block[30] << 8 | block[31]) >= limit:
                    continue
                before = level_of.get(block, -1)
                if at >= asked_from:
                    missed = block not in lru
                    more += (before >= 0) + missed - 1
                    real += (at < absent_from) + missed - 1
                    used += 1
                lru[block] = now_s
                move_to_end(block)
                queue[block] = now_s
                if before == level:
                    queue.move_to_end(block)
                    continue
                if before >= 0:
                    del queues[before][block]
                level_of[block] = level
            stop = start
        if used:
            self._judge(min(more, real) if self.wins else more)
        while len(lru) > self._capacity:
            lru.popitem(last=False)
        while len(level_of) > self._capacity:
            ages = (
                (worth(each, now_s - next(iter(queue.values()))), each) for each, queue in enumerate(queues) if queue
            )
            queue = queues[min(ages)[1]]
            since_s = next(iter(queue.values()))
            while len(level_of) > self._capacity and queue and next(iter(queue.values())) == since_s:
                block, _ = queue.popitem(last=False)  # used at one time, so worth the same
                del level_of[block]

    def _judge(self, more: int) -> None:
        """A request had so many hits more with the levels than with LRU."""
        self._square = self._square * _KEEP + more * more
        error = self._square**0.5
        self._debt = _DEBT + (self._debt - _DEBT) * _KEEP
        # What it won long ago must not pay for what it loses now.
        self._lead = min(max(self._lead * _KEEP + more, self._debt * error), _CREDIT * error)
        if self.wins and self._lead <= _DOUBTED * error:
            self._debt = max(2 * self._debt, _MOST_DEBT)
            self._lead = self._debt * error  # it promised more than it kept: it has to show it anew
            self.wins = False
        else:
            self.wins |= self._lead > _SHOWN * error
