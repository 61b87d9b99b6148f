# SPDX-License-Identifier: Apache-2.0
"""Least recently used, tail first: exact LRU over chains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.idmap import NO_ROW, IdMap, Rows, longer
from kvstore.policies.base import Policy

_BATCH = 64


class LruPolicy(Policy):
    """Exact LRU in which a chain's tail is older than its head, so that eviction shortens prefixes.

    On real chat traces it is the baseline that frequency policies lose to. Do not use it for one-pass scans larger
    than the tier; nothing resists them. It knows no hints: `priority` is the same order with them.

    Each block has the number of its last use; victims come in the order of these. They are found by sorting the
    coldest part now and then: whatever was not in that part is hotter than all of it, and uses only make hotter, so
    the part stays an exact beginning of the order until it is used up. A use costs 50 ns a block, and no memory but
    the number: a linked list of a million objects would be walked by every full garbage collection.

    Reference: Mattson, Gecsei, Slutz and Traiger, "Evaluation techniques for storage hierarchies", IBM Systems
    Journal 1970; tail first, as in the prefix caches of vLLM and SGLang.
    """

    name = "lru"
    step: ClassVar[int] = 4096
    """At least so many blocks are sorted at a time."""

    def __init__(self, options: object = None) -> None:
        super().__init__(options)
        self._ids = IdMap()
        self._used_at: npt.NDArray[np.int64] = np.zeros(self._ids.capacity, np.int64)
        """Number of the last use; 0 for rows that are not in use."""
        self._now = 0
        self._cold: Rows = np.empty(0, np.int64)
        self._cold_at: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._horizon = 0
        """Every known block whose last use is not after this one is among the cold."""

    def expect(self, num_blocks: int) -> None:
        self._ids.expect(num_blocks)
        self._grow()

    def admit(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        if blocks:
            rows = self._ids.add(blocks)
            self._grow()
            self._use(rows)

    def touch(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        rows = self._ids.find(blocks)
        self._use(rows[rows != NO_ROW])

    def _use(self, rows: Rows) -> None:
        """Head to tail; the tail counts as used first."""
        if len(rows) == 1:
            self._used_at[rows[0]] = self._now + 1
        else:
            self._used_at[rows] = np.arange(self._now + len(rows), self._now, -1)
        self._now += len(rows)

    def _grow(self) -> None:
        if len(self._used_at) < self._ids.capacity:
            self._used_at = longer(self._used_at, self._ids.capacity)

    def remove(self, blocks: Sequence[BlockId]) -> None:
        rows = self._ids.find(blocks)
        rows = rows[rows != NO_ROW]
        self._used_at[rows] = 0
        self._ids.free(rows)

    def victims(self) -> Iterator[BlockId]:
        self._forget_used_up()
        after = 0
        while True:
            at = int(np.searchsorted(self._cold_at, after, side="right"))
            rows, used_at = self._cold[at : at + _BATCH], self._cold_at[at : at + _BATCH]
            if not len(rows):
                if not self._find_colder():
                    return
                continue
            after = int(used_at[-1])
            known = self._used_at[rows] == used_at
            for row, use in zip(rows[known].tolist(), used_at[known].tolist(), strict=True):
                if self._used_at[row] == use:  # not removed since the batch was taken
                    yield self._ids.id_of(row)

    def _forget_used_up(self) -> None:
        """Cut off what was removed or used again from the beginning of the cold."""
        while len(self._cold):
            known = self._used_at[self._cold[: self.step]] == self._cold_at[: self.step]
            num_gone = int(known.argmax()) if known.any() else len(known)
            if num_gone == 0:
                return
            self._cold, self._cold_at = self._cold[num_gone:], self._cold_at[num_gone:]

    def _find_colder(self) -> bool:
        """Sort the next part of the order; False where there is none."""
        rows = np.flatnonzero(self._used_at > self._horizon)
        if not len(rows):
            return False
        used_at = self._used_at[rows]
        num_cold = max(self.step, len(rows) // 8)
        if num_cold < len(rows):
            chosen = np.argpartition(used_at, num_cold)[:num_cold]
            rows, used_at = rows[chosen], used_at[chosen]
        order = np.argsort(used_at)
        known = self._used_at[self._cold] == self._cold_at
        self._cold = np.concatenate([self._cold[known], rows[order]])
        self._cold_at = np.concatenate([self._cold_at[known], used_at[order]])
        self._horizon = int(self._cold_at[-1])
        return True

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, block: BlockId) -> bool:
        return self._ids.get(block) != NO_ROW
