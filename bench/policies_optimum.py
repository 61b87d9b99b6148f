# SPDX-License-Identifier: Apache-2.0
"""The most hits that any policy could have: Belady's rule on prefix trees.

Whoever knows the future evicts the block whose next use is farthest, the deepest of equals. A request that uses a
block uses all before it, so a prefix's next use is never after its suffix's and what is kept has no holes. Unlike a
real pool it may decline a block outright, so it is a bound from above.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_NEVER = 1 << 60


def optimal_hits(requests: Sequence[Sequence[int]], capacity: int) -> list[int]:
    """Leading blocks of each request that the optimum has, with room for `capacity` blocks, beginning with none.

    `requests` are block numbers, head to tail; equal where the block and all before it are.
    """
    next_use = _next_uses(requests)
    kept: dict[int, int] = {}  # block to its next use
    heap: list[tuple[int, int, int]] = []
    hits: list[int] = []
    for number, blocks in enumerate(requests):
        found = 0
        while found < len(blocks) and blocks[found] in kept:
            found += 1
        hits.append(found)
        for depth, block in enumerate(blocks):
            use = next_use[number][depth]
            if use == _NEVER:
                kept.pop(block, None)
            else:
                kept[block] = use
                heapq.heappush(heap, (-use, -depth, block))
        while len(kept) > capacity:
            use, _, block = heapq.heappop(heap)
            if kept.get(block) == -use:
                del kept[block]
    return hits


def _next_uses(requests: Sequence[Sequence[int]]) -> list[list[int]]:
    """Number of the next request that uses each block of each request."""
    later: dict[int, int] = {}
    uses: list[list[int]] = []
    for number in range(len(requests) - 1, -1, -1):
        uses.append([later.get(block, _NEVER) for block in requests[number]])
        later.update(dict.fromkeys(requests[number], number))
    return uses[::-1]
