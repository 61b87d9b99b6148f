# SPDX-License-Identifier: Apache-2.0
"""What lower tiers are believed to hold of a pool's blocks: all parts of each.

Set where a tier confirmed a write, or a block was read from it; given up where the tier says that it has not got it, or
failed. It is a belief, since a tier evicts by itself and tells nobody: it spares a write and a question, no more.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from kvstore.block import BlockId
from kvstore.index import NO_ROW, Rows
from kvstore.residents import Residents, mask_of


class Beliefs:
    """By the tiers' numbers, under the pool's own lock. Thread-safe."""

    def __init__(self, residents: Residents, lock: threading.RLock) -> None:
        self._table = residents.table
        self._lock = lock

    def add(self, rows: Rows, tier: int, parts: Sequence[Sequence[int]]) -> None:
        """Each row's `parts` are in the tier now; believed of a row unless it has gained parts meanwhile."""
        masks = np.array([mask_of(cells) for cells in parts], np.uint64)
        with self._lock:
            whole = rows[self._table.ready[rows] == masks]
            self._table.below[whole] |= np.uint8(1 << tier)

    def forget(self, rows: Rows, tier: int) -> None:
        """Undo `add`."""
        with self._lock:
            self._table.below[rows] &= np.uint8(~(1 << tier) & 0xFF)

    def deny(self, blocks: Sequence[BlockId], tier: int) -> None:
        """The tier said that it does not hold these, of which some may be here."""
        with self._lock:
            rows = self._table.ids.find(blocks)
            self.forget(rows[rows != NO_ROW], tier)

    def clear(self, tier: int) -> None:
        """Believe nothing of the tier any more, after it failed or came back."""
        with self._lock:
            self._table.below &= np.uint8(~(1 << tier) & 0xFF)

    def holds(self, rows: Rows, tier: int) -> list[bool]:
        """Whether the tier is believed to hold each pinned row."""
        with self._lock:
            return [bool(bits >> tier & 1) for bits in self._table.below[rows].tolist()]

    def all_hold(self, rows: Rows, tiers: Sequence[int]) -> bool:
        """Whether each of the tiers is believed to hold all of the pinned rows."""
        wanted = np.uint8(mask_of(tiers))
        with self._lock:
            return bool(np.bitwise_and.reduce(self._table.below[rows]) & wanted == wanted)

    def missing(self, blocks: Sequence[BlockId], tier: int) -> list[BlockId]:
        """What the tier is not believed to hold of `blocks` and all they hang from, parents first."""
        with self._lock:
            parent, below = self._table.parent, self._table.below
            rows = self._table.ids.find(blocks)
            found: dict[int, None] = {}
            for row in rows[rows != NO_ROW].tolist():
                path: list[int] = []
                while row != NO_ROW and row not in found and not below[row] >> tier & 1:
                    path.append(row)
                    row = int(parent[row])
                found.update(dict.fromkeys(reversed(path)))
            return self._table.ids.ids_of(np.array(list(found), np.int64))
