# SPDX-License-Identifier: Apache-2.0
"""Resident blocks in slots under one policy: what the host tier and the device overlay have in common.

Invariants
1. A block is matchable only after its bytes are complete (`publish`), part by part.
2. A resident block's parent is resident: blocks are reserved under resident parents, only blocks without
   children are evicted, and removing one removes what hangs from it.
3. A pinned block is neither evicted nor reused; removed while pinned, it stops being matchable at once and its
   slots return with the last pin.
4. The lock guards bookkeeping only: nothing here copies bytes or calls out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvstore.api import NO_HINT, Hint
from kvstore.block import BlockId, BlockMeta, RootId
from kvstore.index import NO_ROW, NO_SLOT, BlockTable, Rows
from kvstore.layout import BlockLayout
from kvstore.policies.base import Policy

_MAX_TOUCHES = 256


class Slots(Protocol):
    """Where a pool's bytes lie. The pool's lock is held around every call."""

    def acquire(self, num_bytes: int) -> int | None: ...
    def release(self, slot: int) -> None: ...
    def same_class(self, one_bytes: int, other_bytes: int) -> bool: ...
    def below_share(self, num_bytes: int) -> bool: ...
    def extent_of(self, slot: int) -> range: ...
    def check(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots of one block to be filled, then published or aborted."""

    position: int
    """Index within the blocks that were asked for."""
    row: int
    parts: tuple[int, ...]
    slots: tuple[int, ...]


class BlockPool:
    """Reserve, publish, pin, touch and evict blocks. Thread-safe."""

    def __init__(self, slots: Slots, policy: Policy) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.num_evicted = 0
        self._slots = slots
        self._policy = policy
        self._table = BlockTable()
        self._layouts: list[BlockLayout] = []
        self._roots: list[RootId] = []
        self._root_index: dict[RootId, int] = {}
        self._num_scratch = 0
        self._doomed: set[int] = set()  # rows removed while something still held them
        # Touches wait here until order matters: a match must not pay for moving a thousand blocks in the policy.
        self._touches: dict[BlockId, tuple[Sequence[BlockId], int, Hint]] = {}

    # -- models ------------------------------------------------------------------------------------------------

    def open(self, layout: BlockLayout) -> None:
        """Learn a layout. Idempotent."""
        with self.lock:
            if layout not in self._layouts:
                self._layouts.append(layout)
                self._table.widen(len(layout.parts))

    # -- finding -----------------------------------------------------------------------------------------------

    def leading(self, blocks: Sequence[BlockId], need: int) -> int:
        """Length of the leading run that has all parts of mask `need`."""
        with self.lock:
            return len(self._table.leading(blocks, need))

    def pin_leading(self, blocks: Sequence[BlockId], need: int) -> Rows:
        """Pin the leading run; returns its rows, to be given to `unpin`."""
        with self.lock:
            rows = self._table.leading(blocks, need)
            self._table.pins[rows] += 1
            return rows

    def pin_resident(self, blocks: Sequence[BlockId]) -> tuple[list[BlockId], Rows]:
        """Pin those of `blocks`, from anywhere, that have any part; returns them and their rows."""
        with self.lock:
            found = [(block, self._table.rows.get(block, NO_ROW)) for block in dict.fromkeys(blocks)]
            found = [(block, row) for block, row in found if row != NO_ROW and self._table.ready[row]]
            rows = np.array([row for _, row in found], np.int64)
            self._table.pins[rows] += 1
            return [block for block, _ in found], rows

    def unpin(self, rows: Rows) -> None:
        """Undo one pin of each row. Rows must be distinct."""
        if not len(rows):
            return
        with self.lock:
            table = self._table
            table.pins[rows] -= 1
            if self._doomed:
                for row in self._doomed.intersection(rows[table.pins[rows] == 0].tolist()):
                    self._bury(row)
            self.changed.notify_all()

    def slots_of(self, row: int) -> list[int]:
        """Slot of each part of a pinned row."""
        slots: list[int] = self._table.slots[row].tolist()
        return slots

    def ready_parts(self, row: int) -> tuple[int, ...]:
        """Parts of a pinned row that hold bytes."""
        ready = int(self._table.ready[row])
        return tuple(part for part in range(ready.bit_length()) if ready >> part & 1)

    def place_of(self, row: int) -> tuple[RootId, BlockLayout]:
        """Root and layout of a pinned row."""
        return self._roots[self._table.root[row]], self._layouts[self._table.layout[row]]

    def meta_of(self, row: int) -> BlockMeta:
        """Meta of a pinned row."""
        meta = self._table.meta[row]
        assert meta is not None, f"row {row} is not in use"
        return meta

    def is_filling(self, block: BlockId, need: int) -> bool:
        """Whether somebody is writing parts of `block` right now."""
        with self.lock:
            row = self._table.rows.get(block, NO_ROW)
            return row != NO_ROW and bool(int(self._table.filling[row]) & need)

    # -- filling -----------------------------------------------------------------------------------------------

    def reserve(
        self,
        root: RootId,
        layout: BlockLayout,
        blocks: Sequence[BlockId],
        meta_of: Callable[[int], BlockMeta],
        parts: Sequence[int],
    ) -> tuple[list[Reservation], int]:
        """Slots for the absent parts of `blocks` (one chain, head to tail), evicting now where need be.

        Returns reservations and how many blocks were refused: from the first block that finds no room, or whose
        parent is not resident, on. Blocks that are there, or that another writer is filling, are passed over.
        """
        out: list[Reservation] = []
        with self.lock:
            victims = _Victims(self)
            place = self._place(root, layout)
            for position, block in enumerate(blocks):
                row = self._table.rows.get(block, NO_ROW)
                if row == NO_ROW:
                    row = self._add(place, block, meta_of(position))
                    if row == NO_ROW:
                        return out, len(blocks) - position
                taken = int(self._table.ready[row]) | int(self._table.filling[row])
                absent = tuple(part for part in parts if not taken >> part & 1)
                if not absent:
                    continue
                slots = self._acquire_all([layout.parts[part].num_bytes for part in absent], victims)
                if slots is None:
                    self._drop_empty(row)
                    return out, len(blocks) - position
                self._table.filling[row] |= np.uint64(_mask(absent))
                self._table.slots[row, list(absent)] = slots
                out.append(Reservation(position, row, absent, slots))
        return out, 0

    def publish(self, reservations: Sequence[Reservation], hint: Hint, *, pins: int = 0) -> list[Reservation]:
        """Make filled blocks matchable, head to tail, each with `pins` pins; returns those that were.

        One whose parent lacks the part by now (it was aborted or removed) is aborted instead.
        """
        done: list[Reservation] = []
        lost: list[Reservation] = []
        fresh: list[BlockId] = []
        with self.lock:
            table = self._table
            for item in reservations:
                mask = np.uint64(_mask(item.parts))
                parent = int(table.parent[item.row])
                block = table.ids[item.row]
                assert block is not None, f"row {item.row} was dropped while it was being filled"
                orphan = parent != NO_ROW and (table.ready[parent] & mask) != mask
                if orphan or item.row in self._doomed:
                    lost.append(item)
                    continue
                if not table.ready[item.row]:
                    fresh.append(block)
                table.ready[item.row] |= mask
                table.below[item.row] = 0  # no tier has this part yet
                table.filling[item.row] &= ~mask
                table.pins[item.row] += pins
                done.append(item)
            if fresh:
                self._apply_touches()
                self._policy.admit(fresh, hint)
            self.abort(lost)
            self.changed.notify_all()
        return done

    def abort(self, reservations: Sequence[Reservation]) -> None:
        """Give back slots that were not published; leaves no trace."""
        if not reservations:
            return
        with self.lock:
            for item in reversed(reservations):
                self._table.filling[item.row] &= ~np.uint64(_mask(item.parts))
                for part, slot in zip(item.parts, item.slots, strict=True):
                    self._table.slots[item.row, part] = NO_SLOT
                    self._slots.release(slot)
                self._drop_empty(item.row)
            self.changed.notify_all()

    def acquire_scratch(self, sizes: Sequence[int]) -> tuple[int, ...] | None:
        """Slots that belong to no block, for loads larger than the arena; all or none."""
        with self.lock:
            slots = self._acquire_all(sizes, _Victims(self))
            if slots is not None:
                self._num_scratch += len(slots)
            return slots

    def release_scratch(self, slots: Sequence[int]) -> None:
        with self.lock:
            for slot in slots:
                self._slots.release(slot)
            self._num_scratch -= len(slots)
            self.changed.notify_all()

    # -- order -------------------------------------------------------------------------------------------------

    def touch(self, blocks: Sequence[BlockId], num_blocks: int, hint: Hint = NO_HINT) -> None:
        """The first `num_blocks` of a chain were used. Coalesced; `blocks` may grow later, not change."""
        if num_blocks <= 0:
            return
        with self.lock:
            tail = blocks[num_blocks - 1]
            self._touches.pop(tail, None)
            self._touches[tail] = (blocks, num_blocks, hint)
            if len(self._touches) > _MAX_TOUCHES:
                self._apply_touch(next(iter(self._touches)))

    def settle(self) -> None:
        """Apply waiting touches, giving the lock up between chains; for a background thread."""
        while self._touches:
            with self.lock:
                if self._touches:
                    self._apply_touch(next(iter(self._touches)))

    def _apply_touch(self, tail: BlockId) -> None:
        blocks, num_blocks, hint = self._touches.pop(tail)
        self._policy.touch(blocks[:num_blocks], hint)

    def _apply_touches(self) -> None:
        while self._touches:
            self._apply_touch(next(iter(self._touches)))

    # -- what lower tiers are believed to hold -----------------------------------------------------------------

    def below(self, rows: Rows, tier: int) -> list[bool]:
        """Whether each row is believed to be in lower tier number `tier`."""
        with self.lock:
            return [bool(bits >> tier & 1) for bits in self._table.below[rows].tolist()]

    def set_below(self, rows: Rows, tier: int, parts: Sequence[Sequence[int]]) -> None:
        """Each row's `parts` are in the tier now; believed of a row unless it has gained parts meanwhile."""
        masks = np.array([_mask(cells) for cells in parts], np.uint64)
        with self.lock:
            whole = rows[self._table.ready[rows] == masks]
            self._table.below[whole] |= np.uint8(1 << tier)

    def forget_below(self, rows: Rows, tier: int) -> None:
        """Undo `set_below`."""
        with self.lock:
            self._table.below[rows] &= np.uint8(~(1 << tier) & 0xFF)

    def clear_below(self, tier: int) -> None:
        """Believe nothing of lower tier number `tier` any more, after it failed or came back."""
        with self.lock:
            self._table.below &= np.uint8(~(1 << tier) & 0xFF)

    def ancestry(self, block: BlockId) -> list[BlockId]:
        """The chain from its first block to `block`, head to tail; empty where `block` is not resident."""
        with self.lock:
            table = self._table
            row = table.rows.get(block, NO_ROW)
            chain: list[BlockId] = []
            while row != NO_ROW:
                chain.append(table.ids[row] or block)
                row = int(table.parent[row])
            return chain[::-1]

    def coldest(self, num_blocks: int) -> list[BlockId]:
        """Blocks that would be evicted next, coldest first."""
        with self.lock:
            self._apply_touches()
            return [block for block, _ in zip(self._policy.victims(), range(num_blocks), strict=False)]

    # -- leaving -----------------------------------------------------------------------------------------------

    def remove(self, blocks: Sequence[BlockId]) -> int:
        """Remove blocks and all that hang from them. Returns how many stopped being matchable."""
        with self.lock:
            doomed = {row for row in map(self._table.rows.get, blocks) if row is not None}
            return self._remove_rows(self._with_descendants(doomed))

    def clear(self, root: RootId | None = None) -> int:
        """Remove everything under `root`, or everything. Pinned blocks stop being matchable and go when unpinned."""
        with self.lock:
            rows = self._table.live_rows()
            if root is not None:
                rows = rows[self._table.root[rows] == self._root_index.get(root, -1)]
            return self._remove_rows(set(rows.tolist()))

    def _with_descendants(self, doomed: set[int]) -> set[int]:
        rows = self._table.live_rows()
        frontier = doomed
        while frontier:
            frontier = set(rows[np.isin(self._table.parent[rows], list(frontier))].tolist()) - doomed
            doomed = doomed | frontier
        return doomed

    def _remove_rows(self, doomed: set[int]) -> int:
        table = self._table
        removed: list[BlockId] = []
        for row in doomed:
            block = table.ids[row]
            if block is not None and table.rows.get(block) == row:
                del table.rows[block]
                removed.append(block)
        self._policy.remove(removed)
        self._doomed |= doomed
        for row in doomed:
            self._bury(row)
        self.changed.notify_all()
        return len(removed)

    def _bury(self, row: int) -> None:
        """Free a removed row once nothing holds it, then its removed ancestors that only it held."""
        table = self._table
        while row in self._doomed:
            if table.pins[row] or table.filling[row] or table.children[row]:
                return
            self._doomed.discard(row)
            row = self._free_row(row)

    def _free_row(self, row: int) -> int:
        for slot in self._table.slots[row].tolist():
            if slot != NO_SLOT:
                self._slots.release(slot)
        self._table.ready[row] = 0
        self._table.slots[row] = NO_SLOT
        return self._table.drop(row)

    def _drop_empty(self, row: int) -> None:
        """Drop a row that has neither bytes nor writers nor children, then its empty ancestors."""
        table = self._table
        while row != NO_ROW and not (table.ready[row] or table.filling[row] or table.children[row]):
            self._doomed.discard(row)
            row = table.drop(row)
        self._bury(row)

    # -- room --------------------------------------------------------------------------------------------------

    def _place(self, root: RootId, layout: BlockLayout) -> tuple[int, int]:
        """Small integers that stand for a root and a layout in the table."""
        index = self._root_index.get(root)
        if index is None:
            index = self._root_index[root] = len(self._roots)
            self._roots.append(root)
        return index, self._layouts.index(layout)

    def _add(self, place: tuple[int, int], block: BlockId, meta: BlockMeta) -> int:
        """A row for a new block, or NO_ROW where its parent is not resident."""
        parent = self._table.rows.get(meta.parent, NO_ROW) if meta.depth else NO_ROW
        if meta.depth and parent == NO_ROW:
            return NO_ROW
        return self._table.add(block, meta, parent, *place)

    def _acquire_all(self, sizes: Sequence[int], victims: _Victims) -> tuple[int, ...] | None:
        slots: list[int] = []
        for size in sizes:
            slot = self._slots.acquire(size)
            while slot is None and victims.evict_for(size):
                slot = self._slots.acquire(size)
            if slot is None:
                for taken in slots:
                    self._slots.release(taken)
                return None
            slots.append(slot)
        return tuple(slots)

    # -- health ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Matchable blocks, those being filled included."""
        return len(self._table)

    def check(self) -> list[str]:
        """Broken invariants; empty when healthy."""
        with self.lock:
            self._apply_touches()
            return [*self._slots.check(), *self._check_rows(), *self._check_policy()]

    def _check_rows(self) -> list[str]:
        table = self._table
        faults: list[str] = []
        rows = table.live_rows().tolist()
        children: dict[int, int] = {}
        slots = [slot for row in rows for slot in table.slots[row].tolist() if slot != NO_SLOT]
        for row in rows:
            parent = int(table.parent[row])
            children[parent] = children.get(parent, 0) + 1
            ready, filling = int(table.ready[row]), int(table.filling[row])
            held = _mask([part for part, slot in enumerate(table.slots[row].tolist()) if slot != NO_SLOT])
            if ready & filling or (ready | filling) != held:
                faults.append(f"pool: row {row} has ready {ready:b}, filling {filling:b}, slots {held:b}")
            if parent != NO_ROW and ready & ~int(table.ready[parent]):
                faults.append(f"pool: row {row} is resident, its parent {parent} is not")
            if table.pins[row] < 0:
                faults.append(f"pool: row {row} has {table.pins[row]} pins")
            if not (ready or filling or table.children[row]):
                faults.append(f"pool: row {row} is empty")
        for row in rows:
            if children.get(row, 0) != table.children[row]:
                faults.append(f"pool: row {row} counts {table.children[row]} children, has {children.get(row, 0)}")
        if len(set(slots)) != len(slots):
            faults.append("pool: a slot belongs to two parts")
        num_out = getattr(self._slots, "num_acquired", None)
        if num_out is not None and num_out != len(slots) + self._num_scratch:
            faults.append(f"pool: {num_out} slots are out, {len(slots)} in rows, {self._num_scratch} scratch")
        return faults

    def _check_policy(self) -> list[str]:
        table = self._table
        matchable = {block for block, row in table.rows.items() if table.ready[row]}
        known = set(self._policy.victims())
        if matchable != known:
            return [f"pool: policy knows {len(known - matchable)} strangers, misses {len(matchable - known)} blocks"]
        return []

    def pinned_rows(self) -> int:
        """Rows with pins: 0 when nobody holds anything."""
        with self.lock:
            return int(np.count_nonzero(self._table.pins[self._table.live_rows()]))


class _Victims:
    """Eviction during one call that needs room: walks the policy's order once, and again while that helps."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._order: Iterator[BlockId] | None = None
        self._progress = False

    def evict_for(self, num_bytes: int) -> bool:
        """Evict until a slot of that size may be free; False when nothing more can go."""
        pool = self._pool
        if self._order is None:
            pool._apply_touches()
            self._restart()
        while True:
            for block in self._order or ():
                row = pool._table.rows.get(block, NO_ROW)
                if row == NO_ROW or not self._evictable(row):
                    continue
                if self._serves(row, num_bytes):
                    self._evict(row, block)
                    return True
                if pool._slots.below_share(num_bytes) and self._vacate(row):
                    return True
            if not self._progress:
                return False
            self._restart()

    def _restart(self) -> None:
        # A block skipped for its children may have lost them since it was yielded.
        self._order = self._pool._policy.victims()
        self._progress = False

    def _evictable(self, row: int) -> bool:
        table = self._pool._table
        return not (table.pins[row] or table.children[row] or table.filling[row])

    def _serves(self, row: int, num_bytes: int) -> bool:
        pool = self._pool
        layout = pool._layouts[int(pool._table.layout[row])]
        ready = int(pool._table.ready[row])
        return any(
            ready >> part.part & 1 and pool._slots.same_class(part.num_bytes, num_bytes) for part in layout.parts
        )

    def _evict(self, row: int, block: BlockId) -> None:
        pool = self._pool
        pool._policy.remove([block])
        parent = pool._free_row(row)
        pool.num_evicted += 1
        self._progress = True
        if parent != NO_ROW:
            pool._drop_empty(parent)

    def _vacate(self, row: int) -> bool:
        """Empty the extent that holds a cold block of another size, so that it can change hands.

        Takes with it what hangs from the extent's blocks. Refuses where anything there is pinned or being filled.
        """
        pool, table = self._pool, self._pool._table
        extent = pool._slots.extent_of(max(pool._table.slots[row].tolist()))
        rows = table.live_rows()
        slots = table.slots[rows]
        inside = ((slots >= extent.start) & (slots < extent.stop)).any(axis=1)
        doomed = pool._with_descendants(set(rows[inside].tolist()))
        if any(table.pins[each] or table.filling[each] for each in doomed):
            return False
        pool.num_evicted += pool._remove_rows(doomed)
        self._progress = True
        return True


def _mask(parts: Sequence[int]) -> int:
    mask = 0
    for part in parts:
        mask |= 1 << part
    return mask


def part_mask(layout: BlockLayout, parts: Sequence[int] | None) -> int:
    """Bit mask of `parts`, all of the grid for None."""
    return _mask(layout.all_parts if parts is None else parts)
