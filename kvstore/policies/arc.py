# SPDX-License-Identifier: Apache-2.0
"""ARC: recency and frequency in a balance that what was evicted too early moves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.idmap import NO_ROW, Rows
from kvstore.policies.leaves import LeafPolicy

_ONCE, _AGAIN = 0, 1


class ArcPolicy(LeafPolicy):
    """Adaptive replacement cache (Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003).

    Two LRU queues: blocks that one request used (T1), and blocks that several did (T2). Ids of evicted blocks stay
    in two lists beside them (B1, B2), as many as there are blocks. One that comes back by B1 says that T1 should have
    been larger, by B2 the same of T2; the wanted size of T1 moves by the ratio of the lists' lengths. T1 gives while
    it is larger than wanted. Of either queue only ends of chains go, tails first.

    That a request adds blocks to its own chain is no second use of what it added before.
    """

    name = "arc"
    num_queues = 2

    def __init__(self, options: object = None) -> None:
        super().__init__(options)
        self._wanted = 0.0
        self._sizes = [0, 0]
        self._walk_sizes = [0, 0]
        self._ghosts: tuple[OrderedDict[BlockId, None], OrderedDict[BlockId, None]] = (OrderedDict(), OrderedDict())
        self._most = 0
        """Most blocks that were known at a time: what ARC calls c."""

    def _enter(self, rows: Rows, blocks: Sequence[BlockId], hint: Hint) -> None:
        self._most = max(self._most, len(self))
        again = np.array([self._came_back(block) for block in blocks])
        self._queue[rows] = again
        num_again = int(np.count_nonzero(again))
        self._sizes[_ONCE] += len(rows) - num_again
        self._sizes[_AGAIN] += num_again
        self._key[rows] = self._latest_keys(len(rows))

    def _came_back(self, block: BlockId) -> bool:
        """Whether it was evicted a short while ago; if so, move the balance."""
        once, again = self._ghosts
        if block in once:
            self._wanted = min(float(self._most), self._wanted + max(1.0, len(again) / len(once)))
            del once[block]
            return True
        if block in again:
            self._wanted = max(0.0, self._wanted - max(1.0, len(once) / len(again)))
            del again[block]
            return True
        return False

    def _use(self, rows: Rows, fresh: npt.NDArray[np.bool_], blocks: Sequence[BlockId], hint: Hint) -> None:
        known = rows[rows != NO_ROW]
        if not fresh.any():
            num_moved = int(np.count_nonzero(self._queue[known] == _ONCE))
            self._sizes[_ONCE] -= num_moved
            self._sizes[_AGAIN] += num_moved
            self._queue[known] = _AGAIN
        self._key[known] = self._latest_keys(len(known))

    def _left(self, rows: Rows) -> None:
        for block, queue, row in zip(self._ids.ids_of(rows), self._queue[rows].tolist(), rows.tolist(), strict=True):
            self._sizes[queue] -= 1
            if row in self._out:  # evicted; what was removed for another reason says nothing
                self._ghosts[queue][block] = None
        once, again = self._ghosts
        while len(once) + self._sizes[_ONCE] > self._most and once:
            once.popitem(last=False)
        while len(once) + len(again) > self._most and again:
            again.popitem(last=False)

    def _walk_begins(self) -> None:
        self._walk_sizes = list(self._sizes)

    def _yielded(self, row: int) -> None:
        self._walk_sizes[self._queue_at[row]] -= 1

    def _next_queue(self) -> int:
        once, again = self._head(_ONCE), self._head(_AGAIN)
        if once is None or again is None:
            return _ONCE if once is not None else _AGAIN if again is not None else -1
        return _ONCE if self._walk_sizes[_ONCE] > self._wanted else _AGAIN
