# SPDX-License-Identifier: Apache-2.0
"""How blocks come into a pool: slots are reserved for them, evicting where need be, written to, and published.

What is between `reserve` and `publish` or `abort` is *filling*: it is in the table, so that nobody else fills it, and
nobody finds it. Several writers may fill parts of one block, or blocks that hang from each other, at once.

Invariants
1. A block is matchable only after its bytes are complete, part by part; a part of it only after its parent's.
2. Blocks are reserved under resident parents of the same root, or under such that are being filled.
3. A slot that is out belongs to a row of the table, or is `loose`: a writer's that lost its block, or a window's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import chain, count, repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.api import Hint
from kvstore.block import BlockId, BlockMeta, RootId, named
from kvstore.index import NO_ROW, Rows
from kvstore.layout import BlockLayout
from kvstore.residents import Residents, mask_of
from kvstore.victims import Victims


class Reservation(NamedTuple):
    """Slots of one block to be filled, then published or aborted."""

    at: int
    """Index of the block in its chain."""
    row: int
    parts: tuple[int, ...]
    slots: tuple[int, ...]


class Filling:
    """Reserves, publishes and aborts, under the pool's own lock. Thread-safe."""

    def __init__(self, residents: Residents, changed: threading.Condition) -> None:
        """`changed`: over the pool's lock; told whenever somebody stops filling a block."""
        self._residents = residents
        self._table = residents.table
        self._changed = changed

    def reserve(
        self,
        root: RootId,
        layout: BlockLayout,
        blocks: Sequence[BlockId],
        metas: Callable[[int, int], Sequence[BlockMeta]],
        parts: Sequence[int],
        start: int = 0,
    ) -> tuple[list[Reservation], int]:
        """Slots for the absent parts of `blocks` (one chain, head to tail), evicting now where need be.

        The first block's index in its chain is `start`; `metas` is asked, from one index to another, for what is new.

        Returns reservations and how many blocks were refused: from the first block that finds no room, that its
        group's quota does not allow, or whose parent is not resident under `root`, on. Blocks that are there, or
        that another writer is filling, are passed over.
        """
        if not blocks:
            return [], 0
        with self._changed:
            number = self._residents.accounts.number_of(root)
            known = self._table.leading(blocks, 0, number)
            held = known
            fresh: Sequence[BlockMeta] = ()
            if len(known) < len(blocks):
                new = metas(start + len(known), start + len(blocks))
                parent = self._table.ids.get(new[0].parent) if new[0].depth else NO_ROW
                if self._may_follow(parent, new[0], number, blocks[len(known)]):
                    fresh = new
                    held = known if parent == NO_ROW or len(known) else np.array([parent])
            # What the new blocks hang from must not make room for them.
            self._table.pins[held] += 1
            try:
                victims = Victims(self._residents)
                return self._reserve(number, layout, blocks, start, known, fresh, tuple(parts), victims)
            finally:
                self._table.pins[held] -= 1

    def _may_follow(self, parent: int, first: BlockMeta, number: int, block: BlockId) -> bool:
        """Whether the first absent block has its place: at a chain's beginning, or under a resident of its root."""
        table = self._table
        if table.ids.get(block) != NO_ROW:  # there, but of another root, or not hanging from the one before it
            return False
        if first.depth == 0:
            return True
        return parent != NO_ROW and int(table.root[parent]) == number and int(table.depth[parent]) == first.depth - 1

    def _reserve(
        self,
        number: int,
        layout: BlockLayout,
        blocks: Sequence[BlockId],
        start: int,
        known: Rows,
        fresh: Sequence[BlockMeta],
        parts: tuple[int, ...],
        victims: Victims,
    ) -> tuple[list[Reservation], int]:
        table = self._table
        out: list[Reservation] = []
        asked = np.uint64(mask_of(parts))
        lacking = asked & ~(table.ready[known] | table.filling[known])
        for positions in _alike(lacking):
            mask = int(lacking[positions[0]])
            absent = tuple(part for part in parts if mask >> part & 1)
            got = self._take(number, layout, absent, len(positions), victims)
            if got:
                first = int(positions[0])
                out += self._fill(number, layout, known[positions[: len(got)]], start + first, absent, got)
            if len(got) < len(positions):
                return out, len(blocks) - int(positions[len(got)])
        if fresh:
            got = self._take(number, layout, parts, len(fresh), victims)
            if got:
                new = blocks[len(known) : len(known) + len(got)]
                above = table.ids.get(fresh[0].parent) if fresh[0].depth else NO_ROW
                parent = int(known[-1]) if len(known) else above
                place = self._residents.layouts.index(layout)
                rows = table.add_run(new, fresh[: len(got)], parent, number, place)
                out += self._fill(number, layout, rows, start + len(known), parts, got)
            return out, len(fresh) - len(got)
        return out, len(blocks) - len(known)

    def _take(
        self, number: int, layout: BlockLayout, parts: tuple[int, ...], count: int, victims: Victims
    ) -> list[tuple[int, ...]]:
        """Slots for these parts of up to `count` blocks of root `number`, as its group's quota allows."""
        sizes = [layout.parts[part].num_bytes for part in parts]
        accounts = self._residents.accounts
        room = accounts.room_bytes(number)
        if room is not None:
            if room < count * sum(sizes):
                victims.shrink_group(number, count * sum(sizes))
                room = accounts.room_bytes(number) or 0
            allowed = max(0, room) // sum(sizes)
            accounts.num_refused += max(0, count - allowed)
            count = min(count, allowed)
        return victims.take(sizes, count)

    def _fill(
        self,
        number: int,
        layout: BlockLayout,
        rows: Rows,
        first: int,
        parts: tuple[int, ...],
        slots: list[tuple[int, ...]],
    ) -> list[Reservation]:
        """Note that consecutive blocks, `first` being the index of the first, are being written to these slots."""
        self._table.filling[rows] |= np.uint64(mask_of(parts))
        places = np.fromiter(chain.from_iterable(slots), np.int64, len(parts) * len(slots))
        self._table.slots[rows[:, None], list(parts)] = places.reshape(len(slots), len(parts))
        num_bytes = sum(layout.parts[part].num_bytes for part in parts)
        self._residents.accounts.charge(number, num_bytes * len(slots))
        return list(named(Reservation, count(first), rows.tolist(), repeat(parts), slots))

    def publish(
        self, reservations: Sequence[Reservation], hint: Hint, *, pins: int = 0, below: int | None = None
    ) -> Sequence[Reservation]:
        """Make filled blocks matchable, head to tail, each with `pins` pins; returns those that were.

        `below`: number of the lower tier that they were read from, and stay in; None for new ones.
        One whose parent lacks the part by now (it was aborted or removed) is aborted instead. Rows are distinct.
        """
        if not reservations:
            return []
        with self._changed:
            table, residents = self._table, self._residents
            rows, masks = np.array([item.row for item in reservations]), _masks(reservations)
            done: Sequence[Reservation] = reservations
            lost: Sequence[Reservation] = ()
            if residents.doomed or not self._follow(rows, masks):
                done, lost = self._split_lost(reservations)
                rows, masks = np.array([item.row for item in done]), _masks(done)
            if done:
                fresh, whole = self._make_ready(rows, masks, pins, 0 if below is None else 1 << below)
                if len(fresh):
                    residents.policy.admit(table.ids.ids_of(fresh), hint)
                residents.report_stored(whole)
            self.abort(lost)
            self._changed.notify_all()
        return done

    def _make_ready(self, rows: Rows, masks: npt.NDArray[np.uint64], pins: int, below: int) -> tuple[Rows, Rows]:
        """Returns the rows that had no part until now, and those that are whole since now.

        `below`: mask of the tiers that hold these parts.
        """
        table = self._table
        before = table.ready[rows]
        after = before | masks
        table.ready[rows] = after
        table.filling[rows] &= ~masks
        # A tier holds a row if it holds all parts of it.
        table.below[rows] = np.where(before == 0, np.uint8(below), table.below[rows] & np.uint8(below))
        if pins:
            table.pins[rows] += pins
        return rows[before == 0], rows[(before != after) & self._residents.is_whole(rows)]

    def _split_lost(self, reservations: Sequence[Reservation]) -> tuple[list[Reservation], list[Reservation]]:
        """Those that can be published, and those that were removed or whose parent lacks the part."""
        table, doomed = self._table, self._residents.doomed
        parents = table.parent[[item.row for item in reservations]]
        above = dict(zip(parents.tolist(), table.ready[parents].tolist(), strict=True))
        done: list[Reservation] = []
        lost: list[Reservation] = []
        for item, parent in zip(reservations, parents.tolist(), strict=True):
            mask = mask_of(item.parts)
            if item.row in doomed or (parent != NO_ROW and above[parent] & mask != mask):
                lost.append(item)
                continue
            if item.row in above:
                above[item.row] |= mask
            done.append(item)
        return done, lost

    def _follow(self, rows: Rows, masks: npt.NDArray[np.uint64]) -> bool:
        """Whether the first of these has its place, and each other one hangs from the one before, part by part."""
        table, mask = self._table, masks[0]
        parents = table.parent[rows]
        begins = parents[0] == NO_ROW or table.ready[parents[0]] & mask == mask
        return bool(begins and (parents[1:] == rows[:-1]).all() and (masks == mask).all())

    def abort(self, reservations: Sequence[Reservation]) -> None:
        """Give back slots that were not published; leaves no trace."""
        if not reservations:
            return
        with self._changed:
            self._residents.slots.release_many(self._detach(reservations))

    def detach(self, reservations: Sequence[Reservation]) -> tuple[int, ...]:
        """Like `abort`, but the slots stay out: their writer may still be writing. End with `release_loose`."""
        with self._changed:
            slots = self._detach(reservations)
            self._residents.loose.update(slots)
            return slots

    def _detach(self, reservations: Sequence[Reservation]) -> tuple[int, ...]:
        if not reservations:
            return ()
        rows = np.array([item.row for item in reservations])
        for parts in dict.fromkeys(item.parts for item in reservations):
            self._residents.detach(rows[[item.parts == parts for item in reservations]], parts)
        # Tails first: so their rows are taken up again in ascending order.
        self._residents.drop_all_empty(np.array(list(dict.fromkeys(rows[::-1].tolist()))))
        self._changed.notify_all()
        return tuple(slot for item in reservations for slot in item.slots)

    def acquire_scratch(self, sizes: Sequence[int]) -> tuple[int, ...] | None:
        """Slots that belong to no block, for loads larger than the arena; all or none. End with `release_loose`."""
        with self._changed:
            found = Victims(self._residents).take(sizes, 1)
            if not found:
                return None
            self._residents.loose.update(found[0])
            return found[0]

    def release_loose(self, slots: Sequence[int]) -> None:
        """Give back slots that belong to no block."""
        with self._changed:
            self._residents.slots.release_many(slots)
            self._residents.loose.difference_update(slots)
            self._changed.notify_all()


def _masks(reservations: Sequence[Reservation]) -> npt.NDArray[np.uint64]:
    """Mask of the parts of each."""
    known = {parts: mask_of(parts) for parts in {item.parts for item in reservations}}
    return np.array([known[item.parts] for item in reservations], np.uint64)


def _alike(lacking: npt.NDArray[np.uint64]) -> list[Rows]:
    """Positions of the masks that are not 0, in stretches of consecutive ones that are equal."""
    at = np.flatnonzero(lacking)
    if not len(at):
        return []
    return np.split(at, np.flatnonzero((np.diff(at) != 1) | (lacking[at][1:] != lacking[at][:-1])) + 1)
