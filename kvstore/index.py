# SPDX-License-Identifier: Apache-2.0
"""A table of resident blocks: one map from id to row, and columns in arrays.

Array-backed because an object a block costs twice the memory, and a full garbage collection over a million of
them stops the world for 0.2 s. A row is stable from `add` to `drop`; columns are public to the pool that owns
the table and to nobody else. No lock: the owner has one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockId, BlockMeta, RootId
from kvstore.idmap import NO_ROW as NO_ROW
from kvstore.idmap import IdMap, longer
from kvstore.idmap import Rows as Rows

NO_SLOT = -1
_COLUMNS = (
    *(
        "ready",
        "filling",
        "slots",
        "parent",
        "children",
        "branches",
        "pins",
        "depth",
        "root",
        "layout",
        "below",
        "born",
    ),
    *("newest", "younger", "older"),
)


class BlockTable:
    """Columns, by row. Rows not in use are zero in ready, filling, children, pins, below and born.

    ready, filling     bit p set: part p holds verified bytes / is being written (uint64)
    slots              slot of each part, NO_SLOT where absent (int64 [rows, parts])
    parent, children   row of the parent or NO_ROW; number of rows whose parent this is
    newest             row of the child that came last; NO_ROW where there is none (`heads` for the first of a chain)
    younger, older     the parent's child that came next, and the one that came before; NO_ROW at the ends
    branches           number of children it ever had, 2 for more; 2 as well where others may have more (uint8)
    pins               holds, leases, and copies in flight
    depth              0 for the first block of a chain
    root, layout       small integers given by the owner
    below              bit t set: believed to be in lower tier t (uint8)
    born               number of the event that told of the block; 0 where nobody listened (int64)
    tokens             token ids as u32 little-endian, in the row's first `token_bytes` (uint8 [rows, bytes])
    """

    def __init__(self, num_parts: int = 1) -> None:
        self.ids = IdMap()
        self.extra: dict[int, bytes] = {}
        """Canonical media bytes, of the rows that have some."""
        self.ready: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self.filling: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self.slots: npt.NDArray[np.int64] = np.zeros((0, num_parts), np.int64)
        self.parent: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.children: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.branches: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.pins: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.depth: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.root: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.layout: npt.NDArray[np.int16] = np.zeros(0, np.int16)
        self.below: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.newest: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.younger: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.older: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.heads: dict[int, int] = {}
        """Row of the first block that came last, by root."""
        self.born: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.tokens: npt.NDArray[np.uint8] = np.zeros((0, 0), np.uint8)
        self._grow()

    def __len__(self) -> int:
        """Number of blocks that can be found."""
        return len(self.ids)

    def widen(self, num_parts: int, token_bytes: int, num_rows: int = 0) -> None:
        """Make room for blocks of `num_parts` parts and `token_bytes` of tokens, `num_rows` of them in all."""
        self.ids.expect(num_rows)
        if num_parts > self.slots.shape[1]:
            slots = np.zeros((len(self.slots), num_parts), np.int64)
            slots[:, : self.slots.shape[1]] = self.slots
            slots[:, self.slots.shape[1] :] = NO_SLOT
            self.slots = slots
        if token_bytes > self.tokens.shape[1]:
            tokens = np.zeros((len(self.tokens), token_bytes), np.uint8)
            tokens[:, : self.tokens.shape[1]] = self.tokens
            self.tokens = tokens
        self._grow()

    def add_run(
        self, blocks: Sequence[BlockId], metas: Sequence[BlockMeta], parent: int, root: int, layout: int
    ) -> Rows:
        """New rows with nothing in them for consecutive blocks of a chain, the first one's parent being `parent`.

        Each counts as a child of the one before from now on.
        """
        rows = self.ids.add(blocks)
        self._grow()
        self.slots[rows] = NO_SLOT
        self.parent[rows[0]] = parent
        self.branches[rows[:-1]], self.branches[rows[-1]] = 1, 0
        if len(rows) > 1:
            self.parent[rows[1:]] = rows[:-1]
            self.children[rows[:-1]] = 1
        if parent != NO_ROW:
            self.children[parent] += 1
            self.branches[parent] = min(2, int(self.branches[parent]) + 1)
        self._adopt(rows, parent, root)
        self.depth[rows] = np.arange(metas[0].depth, metas[0].depth + len(rows))
        self.root[rows] = root
        self.layout[rows] = layout
        tokens = b"".join([meta.tokens for meta in metas])
        token_bytes = len(metas[0].tokens)
        self.tokens[rows, :token_bytes] = np.frombuffer(tokens, np.uint8).reshape(len(rows), token_bytes)
        if any(meta.extra for meta in metas):
            self.extra.update((row, meta.extra) for row, meta in zip(rows.tolist(), metas, strict=True) if meta.extra)
        return rows

    def drop(self, row: int) -> int:
        """Forget a row without children; returns its parent's row."""
        assert self.children[row] == 0, f"row {row} dropped with {self.children[row]} children"
        parent = int(self.parent[row])
        self.drop_all(np.array([row]))
        return parent

    def drop_all(self, rows: Rows) -> None:
        """Forget rows, all that hang from them being among them."""
        parents = self.parent[rows]
        self._part(rows)
        if len(rows) == 1:
            if parents[0] != NO_ROW:
                self.children[parents[0]] -= 1
        else:
            np.subtract.at(self.children, parents[parents != NO_ROW], 1)
        self.ready[rows] = self.filling[rows] = 0
        self.below[rows] = 0
        self.born[rows] = 0
        if self.extra:
            for row in rows.tolist():
                self.extra.pop(row, None)
        self.ids.free(rows)

    def _adopt(self, rows: Rows, parent: int, root: int) -> None:
        """Make a run's rows children: of each other, the first one of `parent`."""
        self.newest[rows[:-1]] = rows[1:]
        self.newest[rows[-1]] = NO_ROW
        self.younger[rows] = self.older[rows] = NO_ROW
        first = int(rows[0])
        before = int(self.newest[parent]) if parent != NO_ROW else self.heads.get(root, NO_ROW)
        self.older[first] = before
        if before != NO_ROW:
            self.younger[before] = first
        if parent != NO_ROW:
            self.newest[parent] = first
        else:
            self.heads[root] = first

    def _part(self, rows: Rows) -> None:
        """Take rows from among their siblings. Those whose parents go with them need nothing."""
        tops = rows if len(rows) == 1 else rows[~np.isin(self.parent[rows], rows)]
        for row in tops.tolist():
            younger, older = int(self.younger[row]), int(self.older[row])
            if older != NO_ROW:
                self.younger[older] = younger
            if younger != NO_ROW:
                self.older[younger] = older
            elif (parent := int(self.parent[row])) != NO_ROW:
                self.newest[parent] = older
            elif older != NO_ROW:
                self.heads[int(self.root[row])] = older
            else:
                del self.heads[int(self.root[row])]

    def children_of(self, parent: int, root: int, most: int) -> list[int]:
        """Rows of up to `most` children of `parent`, those that came last first; of first blocks for NO_ROW."""
        row = int(self.newest[parent]) if parent != NO_ROW else self.heads.get(root, NO_ROW)
        found: list[int] = []
        while row != NO_ROW and len(found) < most:
            found.append(row)
            row = int(self.older[row])
        return found

    def leading(self, blocks: Sequence[BlockId], need: int, root: int) -> Rows:
        """Rows of the longest run of one chain under `root` in which every block has all parts of mask `need`.

        A block of another root, or that does not hang from the one before it, ends the run as an unknown one does:
        knowing a hash opens nothing, and one of another root takes no longer than an unknown one.
        """
        rows = self.ids.find_leading(blocks, self.root, root)
        if not len(rows):
            return rows
        mask = np.uint64(need)
        whole = (self.ready[rows] & mask) == mask
        whole[1:] &= self.parent[rows[1:]] == rows[:-1]
        return rows if whole.all() else rows[: int(whole.argmin())]

    def meta(self, row: int, root: RootId, token_bytes: int) -> BlockMeta:
        """What travels with the bytes of a row in use."""
        parent = int(self.parent[row])
        parent_id = BlockId(root) if parent == NO_ROW else self.ids.id_of(parent)
        return BlockMeta(
            parent_id, int(self.depth[row]), self.tokens[row, :token_bytes].tobytes(), self.extra.get(row, b"")
        )

    def live_rows(self) -> Rows:
        """Every row in use, ascending, rows that are no longer matchable included."""
        return self.ids.live_rows()

    def _grow(self) -> None:
        if len(self.ready) < self.ids.capacity:
            for name in (*_COLUMNS, "tokens"):
                setattr(self, name, longer(getattr(self, name), self.ids.capacity))
