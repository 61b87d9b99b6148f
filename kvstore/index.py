# SPDX-License-Identifier: Apache-2.0
"""A table of resident blocks: one dict from id to row, and columns in arrays.

Array-backed because an object a block costs twice the memory, and a full garbage collection over a million of
them stops the world for 0.2 s. A row is stable from `add` to `drop`; columns are public to the pool that owns
the table and to nobody else. No lock: the owner has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockId, BlockMeta

NO_ROW = -1
NO_SLOT = -1
_FIRST_ROWS = 1024

Rows = npt.NDArray[np.int64]


class BlockTable:
    """Columns, by row:

    ready, filling     bit p set: part p holds verified bytes / is being written (uint64)
    slots              slot of each part, NO_SLOT where absent (int64 [rows, parts])
    parent, children   row of the parent or NO_ROW; number of rows whose parent this is
    pins               holds, leases, and copies in flight
    root, layout       small integers given by the owner
    below              bit t set: believed to be in lower tier t (uint8)
    ids, meta          the block's id; parent id, tokens and extra as handed in
    """

    def __init__(self, num_parts: int = 1) -> None:
        self.rows: dict[BlockId, int] = {}
        self.ids: list[BlockId | None] = []
        self.meta: list[BlockMeta | None] = []
        self._free: list[int] = []
        self._capacity = 0
        self.ready: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self.filling: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self.slots: npt.NDArray[np.int64] = np.empty((0, num_parts), np.int64)
        self.parent: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self.children: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self.pins: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self.root: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self.layout: npt.NDArray[np.int16] = np.empty(0, np.int16)
        self.below: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    def widen(self, num_parts: int) -> None:
        """Make room for blocks of `num_parts` parts."""
        have = self.slots.shape[1]
        if num_parts > have:
            wider = np.full((self._capacity, num_parts), NO_SLOT, np.int64)
            wider[:, :have] = self.slots
            self.slots = wider

    def add(self, block: BlockId, meta: BlockMeta, parent: int, root: int, layout: int) -> int:
        """A new row with nothing in it; counts as a child of its parent from now on."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self.rows[block] = row
        self.ids[row] = block
        self.meta[row] = meta
        self.ready[row] = self.filling[row] = 0
        self.slots[row] = NO_SLOT
        self.parent[row] = parent
        self.children[row] = self.pins[row] = 0
        self.root[row] = root
        self.layout[row] = layout
        self.below[row] = 0
        if parent != NO_ROW:
            self.children[parent] += 1
        return row

    def drop(self, row: int) -> int:
        """Forget a row without children; returns its parent's row."""
        assert self.children[row] == 0, f"row {row} dropped with {self.children[row]} children"
        block = self.ids[row]
        if block is not None and self.rows.get(block) == row:
            del self.rows[block]
        self.ids[row] = self.meta[row] = None
        parent = int(self.parent[row])
        if parent != NO_ROW:
            self.children[parent] -= 1
        self._free.append(row)
        return parent

    def leading(self, blocks: Sequence[BlockId], need: int) -> Rows:
        """Rows of the longest run from the first block in which every block has all parts of mask `need`."""
        if not blocks or blocks[0] not in self.rows:
            return np.empty(0, np.int64)
        rows = np.fromiter(map(self.rows.get, blocks, repeat(NO_ROW)), np.int64, len(blocks))
        if rows.min() == NO_ROW:
            rows = rows[: int((rows == NO_ROW).argmax())]
        mask = np.uint64(need)
        whole = (self.ready[rows] & mask) == mask
        return rows if whole.all() else rows[: int(whole.argmin())]

    def live_rows(self) -> Rows:
        """Every row in use, in no order, rows that are no longer matchable included."""
        in_use = np.ones(self._capacity, bool)
        in_use[self._free] = False
        return np.flatnonzero(in_use)

    def _grow(self) -> None:
        old = self._capacity
        new = max(_FIRST_ROWS, old * 3 // 2)
        for name in ("ready", "filling", "parent", "children", "pins", "root", "layout", "below"):
            column = getattr(self, name)
            wider = np.zeros(new, column.dtype)
            wider[:old] = column
            setattr(self, name, wider)
        slots = np.full((new, self.slots.shape[1]), NO_SLOT, np.int64)
        slots[:old] = self.slots
        self.slots = slots
        self.ids += [None] * (new - old)
        self.meta += [None] * (new - old)
        self._free = list(range(new - 1, old - 1, -1))
        self._capacity = new
