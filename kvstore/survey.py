# SPDX-License-Identifier: Apache-2.0
"""Questions to a pool: which blocks are there, what is known of them, what hangs from what.

Nothing here changes anything: no pin, no touch. So an answer is true of its moment; what it speaks of may be
gone by the time somebody acts on it. Whoever has to be sure pins (`kvstore.pool`), and asks then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockId, BlockMeta, RootId
from kvstore.index import NO_ROW, Rows
from kvstore.residents import Residents

_DESCRIBED = 256  # blocks, before the lock is given up for a moment


class Resident(NamedTuple):
    """What is known of a resident block."""

    root: RootId
    meta: BlockMeta
    ready_parts: int
    """Mask of the parts that hold bytes."""
    num_pins: int
    num_children: int
    below: int
    """Bit t set: believed to be in lower tier number t."""


class Run(NamedTuple):
    """Consecutive whole blocks of one chain; ids and tokens end to end."""

    root: RootId
    ids: bytes
    parent: bytes
    depth: int
    tokens: bytes


class Survey:
    """Asks what a pool knows of its blocks, under the pool's own lock. Thread-safe."""

    def __init__(self, residents: Residents, lock: threading.RLock) -> None:
        self._residents = residents
        self._table = residents.table
        self._lock = lock

    # -- single blocks -----------------------------------------------------------------------------------------

    def describe(
        self, blocks: Sequence[BlockId], may_see: Callable[[RootId], bool] = lambda root: True
    ) -> list[Resident | None]:
        """What is known of each block, None where it has no part here, or `may_see` denies its root.

        A block that is denied takes no longer than one that is not there: its root was judged before it was found.
        The lock is given up between portions: others' matches wait for one of them at most.
        """
        with self._lock:
            known = list(self._residents.accounts.roots.items())
        seen = [number for number, root in known if may_see(root)]
        portions = [blocks[at : at + _DESCRIBED] for at in range(0, len(blocks), _DESCRIBED)]
        return [one for portion in portions for one in self._describe(portion, seen)]

    def _describe(self, blocks: Sequence[BlockId], seen: Sequence[int]) -> list[Resident | None]:
        """Of each block, None where it is not there or not of a root that is `seen`."""
        found: list[Resident | None] = []
        with self._lock:
            table, residents = self._table, self._residents
            rows = table.ids.find_evenly(blocks)
            shown = (rows != NO_ROW) & (table.ready[rows] != 0) & np.isin(table.root[rows], seen)
            for row, is_shown in zip(rows.tolist(), shown.tolist(), strict=True):
                if not is_shown:
                    found.append(None)
                    continue
                counts = (table.ready[row], table.pins[row], table.children[row], table.below[row])
                found.append(Resident(residents.root_of(row), residents.meta_of(row), *map(int, counts)))
        return found

    def ready_masks(self, root: RootId, blocks: Sequence[BlockId]) -> npt.NDArray[np.uint64]:
        """Mask of the parts that are there of each block; 0 where there is none, or it is another root's."""
        with self._lock:
            number = self._residents.accounts.find(root)
            rows = self._table.ids.find(blocks)
            there = (rows != NO_ROW) & (self._table.root[rows] == number)
            return np.where(there, self._table.ready[rows], np.uint64(0))

    def is_filling(self, block: BlockId, need: int) -> bool:
        """Whether somebody is writing parts of `block` right now."""
        with self._lock:
            row = self._table.ids.get(block)
            return row != NO_ROW and bool(int(self._table.filling[row]) & need)

    # -- chains ------------------------------------------------------------------------------------------------

    def shared_to(self, blocks: Sequence[BlockId], root: RootId) -> int:
        """How many leading blocks of a chain others may go on from: the last of them had several children here.

        All of them where one is not here: of what goes on from it nothing is known.
        """
        with self._lock:
            rows = self._residents.leading(blocks, 0, root)
            forks = np.flatnonzero(self._table.branches[rows] > 1)
            if len(rows) < len(blocks):
                return len(blocks)
            return int(forks[-1]) + 1 if len(forks) else 0

    def ancestry(self, block: BlockId) -> list[BlockId]:
        """The chain from its first block to `block`, head to tail; empty where `block` is not resident."""
        with self._lock:
            row = self._table.ids.get(block)
            rows: list[int] = []
            while row != NO_ROW:
                rows.append(row)
                row = int(self._table.parent[row])
            return self._table.ids.ids_of(np.array(rows[::-1], np.int64))

    # -- everything there is, for a snapshot -------------------------------------------------------------------

    def whole_rows(self, may_see: Callable[[RootId], bool]) -> tuple[Rows, Rows, Rows]:
        """Rows of whole blocks of the roots that `may_see` allows; their parents, and their depths."""
        with self._lock:
            table, accounts = self._table, self._residents.accounts
            rows = table.ids.found_rows()
            rows = rows[self._residents.is_whole(rows)]
            hidden = [number for number, root in accounts.roots.items() if not may_see(root)]
            if hidden:
                rows = rows[~np.isin(table.root[rows], hidden)]
            return rows, table.parent[rows].astype(np.int64), table.depth[rows].astype(np.int64)

    def describe_run(self, rows: Rows, before: int) -> tuple[int, Run | None]:
        """The leading ones of `rows`, consecutive blocks of one chain, that are whole since event `before` or longer.

        Returns how many these are, and what they hold.
        """
        with self._lock:
            table, residents = self._table, self._residents
            same = table.ids.findable(rows) & residents.is_whole(rows) & (table.born[rows] <= before)
            rows = rows if same.all() else rows[: int(same.argmin())]
            if not len(rows):
                return 0, None
            first = int(rows[0])
            root, meta = residents.root_of(first), residents.meta_of(first)
            tokens = table.tokens[rows, : len(meta.tokens)].tobytes()
            return len(rows), Run(root, table.ids.packed(rows), meta.parent, meta.depth, tokens)

    # -- numbers -----------------------------------------------------------------------------------------------

    def held_bytes(self, root: RootId) -> int:
        """Bytes that the blocks of a root take, those being filled included."""
        with self._lock:
            accounts = self._residents.accounts
            number = accounts.find(root)
            return accounts.held_bytes[number] if number >= 0 else 0

    def pinned_rows(self) -> int:
        """Rows with pins: 0 when nobody holds anything."""
        return int(np.count_nonzero(self._table.pins))

    @property
    def num_evicted(self) -> int:
        """Blocks that were evicted so far."""
        return self._residents.num_evicted

    @property
    def num_lost(self) -> int:
        """Those of them that no lower tier was believed to hold."""
        return self._residents.num_lost

    @property
    def num_quota_refused(self) -> int:
        """Blocks that were refused because their group had its quota."""
        return self._residents.accounts.num_refused
