# SPDX-License-Identifier: Apache-2.0
"""Two small caches of ids, run beside a policy to see whether it or LRU would have more hits.

A block is in the sample by its id, so every block of a chain has the same chance whoever uses it, and a cache of a
share of the blocks behaves like the whole one of which it is the share (Waldspurger et al., "Efficient MRC
Construction with SHARDS", FAST 2015). A suffix is never fresher than its prefix, so a block's own presence stands for
its prefix's. Both caches see every sampled use, whichever order the real one follows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvstore.block import BlockId

_SAMPLED_BLOCKS = 1024  # in each cache, about: fewer say too little, more cost time
_MEMORY = 2  # so many times the sampled blocks are remembered of past uses
_WHOLE = 1 << 16
_CREDIT = 0.3  # standard errors
_CERTAIN = 0.5  # squared standard errors


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
        self._keep = 1.0

    @property
    def loses(self) -> bool:
        """Whether LRU had more hits, by more than chance explains."""
        return self._lead < 0 and self._lead * self._lead > _CERTAIN * self._square

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
        self._keep = 1 - 1 / (_MEMORY * self._capacity)

    def use(
        self,
        blocks: Sequence[BlockId],
        asked_from: int,
        level: int,
        last_level: int,
        now_s: float,
        worth: Callable[[int, float], float],
    ) -> None:
        """A chain was used, head to tail; hits of those from `asked_from` on count."""
        if not self._capacity:
            return
        lru, level_of, queues = self._lru, self._level_of, self._queues
        limit, last = self._limit, len(blocks) - 1
        more = used = 0
        for at in range(len(blocks) - 1, -1, -1):
            block = blocks[at]
            if (block[30] << 8 | block[31]) >= limit:
                continue
            before = level_of.get(block, -1)
            if at >= asked_from:
                more += (before >= 0) - (block in lru)
                used += 1
            lru[block] = now_s
            lru.move_to_end(block)
            if before >= 0:
                del queues[before][block]
            own = level if at < last else last_level
            queues[own][block] = now_s
            level_of[block] = own
        if used:
            keep = self._keep**used
            self._square = self._square * keep + more * more
            # What it won long ago must not pay for what it loses now.
            self._lead = min(self._lead * keep + more, _CREDIT * self._square**0.5)
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
