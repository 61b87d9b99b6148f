# SPDX-License-Identifier: Apache-2.0
"""Resident blocks in slots under one policy: what the host tier and the device overlay have in common.

What changes which blocks are there, who holds them, or their order is here; what only asks is `kvstore.survey`, and
what lower tiers are believed to hold `kvstore.beliefs`.

Invariants
1. A block is matchable only after its bytes are complete (`publish`), part by part.
2. A resident block's parent is resident, under the same root: blocks are reserved under resident parents, only
   blocks without children are evicted, and removing one removes what hangs from it.
3. A pinned block is neither evicted nor reused; removed while pinned, it stops being matchable at once and its
   slots return with the last pin.
4. A block of another root than asked for looks like one that is not there.
5. The lock guards bookkeeping only: nothing here copies a block's bytes or calls out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import chain, count, repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.api import NO_HINT, Hint
from kvstore.beliefs import Beliefs
from kvstore.block import BlockId, BlockMeta, RootId, named
from kvstore.health import faults
from kvstore.index import NO_ROW, Rows
from kvstore.layout import BlockLayout
from kvstore.policies.base import Policy
from kvstore.residents import Observer, Residents, Slots, mask_of
from kvstore.residents import part_mask as part_mask
from kvstore.survey import Survey
from kvstore.victims import Victims

_MOST_SIMILAR = 64  # children of one block that are looked at for the longest beginning
_CHUNK = 4096  # rows freed, or told of, before the lock is given up for a moment


class Reservation(NamedTuple):
    """Slots of one block to be filled, then published or aborted."""

    at: int
    """Index of the block in its chain."""
    row: int
    parts: tuple[int, ...]
    slots: tuple[int, ...]


class BlockPool:
    """Reserve, publish, pin, touch and evict blocks. Thread-safe."""

    def __init__(self, slots: Slots, policy: Policy) -> None:
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._slots = slots
        self._residents = Residents(slots, policy)
        self._table = self._residents.table
        self.survey = Survey(self._residents, self.lock)
        self.beliefs = Beliefs(self._residents, self.lock)

    # -- models and tenants ------------------------------------------------------------------------------------

    def open(self, layout: BlockLayout, num_blocks: int = 0) -> None:
        """Learn a layout, of which up to `num_blocks` may come. Idempotent."""
        with self.lock:
            self._residents.open(layout, num_blocks)

    def set_group(self, root: RootId, group: str) -> None:
        """Count the bytes of `root` as those of `group` from now on; empty for none."""
        accounts = self._residents.accounts
        if not group and not accounts.has_group(root):
            return  # without tenants no save waits here for the lock
        with self.lock:
            accounts.set_group(root, group)

    def set_quota(self, group: str, max_bytes: int | None) -> None:
        """Let the blocks of a group take `max_bytes`, None for any number. What is there goes with the next save."""
        with self.lock:
            self._residents.accounts.set_limit(group, max_bytes)

    # -- finding -----------------------------------------------------------------------------------------------

    def leading(self, blocks: Sequence[BlockId], need: int, root: RootId) -> int:
        """Length of the leading run of one chain under `root` that has all parts of mask `need`."""
        with self.lock:
            return len(self._residents.leading(blocks, need, root))

    def may_be_shared(self, rows: Sequence[int]) -> None:
        """They came from a lower tier: others may have gone on from them."""
        with self.lock:
            self._table.branches[rows] = 2

    def pin_leading(self, blocks: Sequence[BlockId], need: int, root: RootId) -> Rows:
        """Pin the leading run; returns its rows, to be given to `unpin`."""
        with self.lock:
            rows = self._residents.leading(blocks, need, root)
            self._table.pins[rows] += 1
            return rows

    def pin_when_filled(self, blocks: Sequence[BlockId], need: int, root: RootId, timeout_s: float) -> Rows:
        """`pin_leading`, once nobody is filling the first block any more; after `timeout_s` at the latest."""
        with self.lock:
            self._changed.wait_for(lambda: not self.survey.is_filling(blocks[0], need), timeout=timeout_s)
            return self.pin_leading(blocks, need, root)

    def pin_similar(
        self, parent: BlockId | None, tokens: npt.NDArray[np.uint32], need: int, root: RootId
    ) -> tuple[int, int]:
        """Pin the block after `parent` that begins with most of `tokens`: (its row, how many); NO_ROW for none.

        `parent` None asks for first blocks under `root`. Tokens are compared themselves, no digests of them; blocks
        with media are passed over, since what their tokens stand for is not in them. Of very many that follow one
        block only those that came last are looked at.
        """
        with self.lock:
            table, number = self._table, self._residents.accounts.find(root)
            row = NO_ROW if parent is None else table.ids.get(parent)
            if number < 0 or not len(tokens) or (parent is not None and (row == NO_ROW or table.root[row] != number)):
                return NO_ROW, 0
            rows = np.array(table.children_of(row, number, _MOST_SIMILAR), np.int64)
            mask = np.uint64(need)
            rows = rows[((table.ready[rows] & mask) == mask) & table.ids.findable(rows)]
            if table.extra:
                rows = rows[[each not in table.extra for each in rows.tolist()]]
            if not len(rows):
                return NO_ROW, 0
            theirs = table.tokens[rows, : 4 * len(tokens)].view("<u4")
            same = np.logical_and.accumulate(theirs == tokens, axis=1).sum(axis=1)
            best = int(same.argmax())
            if not same[best]:
                return NO_ROW, 0
            table.pins[rows[best]] += 1
            return int(rows[best]), int(same[best])

    def pin_resident(self, blocks: Sequence[BlockId]) -> tuple[list[BlockId], Rows]:
        """Pin those of `blocks`, from anywhere, that have any part; returns them and their rows."""
        distinct = list(dict.fromkeys(blocks))
        with self.lock:
            rows = self._table.ids.find(distinct)
            there = (rows != NO_ROW) & (self._table.ready[rows] != 0)
            self._table.pins[rows[there]] += 1
            return [distinct[at] for at in np.flatnonzero(there).tolist()], rows[there]

    def unpin(self, rows: Rows) -> None:
        """Undo one pin of each row. Rows must be distinct."""
        if not len(rows):
            return
        with self.lock:
            table, doomed = self._table, self._residents.doomed
            table.pins[rows] -= 1
            if doomed:
                for row in doomed.intersection(rows[table.pins[rows] == 0].tolist()):
                    self._residents.bury(row)
            self._changed.notify_all()

    def slots_of(self, row: int) -> list[int]:
        """Slot of each part of a pinned row."""
        slots: list[int] = self._table.slots[row].tolist()
        return slots

    def slots_at(self, rows: Rows, parts: Sequence[int]) -> Rows:
        """Slots [rows, parts] of pinned rows."""
        slots: Rows = self._table.slots[rows[:, None], list(parts)]
        return slots

    def ready_parts(self, row: int) -> tuple[int, ...]:
        """Parts of a pinned row that hold bytes."""
        ready = int(self._table.ready[row])
        return tuple(part for part in range(ready.bit_length()) if ready >> part & 1)

    def place_of(self, row: int) -> tuple[RootId, BlockLayout]:
        """Root and layout of a pinned row."""
        return self._residents.root_of(row), self._residents.layout_of(row)

    def meta_of(self, row: int) -> BlockMeta:
        """Meta of a pinned row."""
        return self._residents.meta_of(row)

    # -- filling -----------------------------------------------------------------------------------------------

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
        with self.lock:
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
        taken = (table.ready[known] | table.filling[known]).tolist()
        asked = mask_of(parts)
        for position, (row, there) in enumerate(zip(known.tolist(), taken, strict=True)):
            if there & asked != asked:
                absent = tuple(part for part in parts if not there >> part & 1)
                got = self._take(number, layout, absent, 1, victims)
                if not got:
                    return out, len(blocks) - position
                out += self._fill(number, layout, np.array([row]), start + position, absent, got)
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
        with self.lock:
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
        with self.lock:
            self._slots.release_many(self._detach(reservations))

    def detach(self, reservations: Sequence[Reservation]) -> tuple[int, ...]:
        """Like `abort`, but the slots stay out: their writer may still be writing. End with `release_detached`."""
        with self.lock:
            slots = self._detach(reservations)
            self._residents.loose.update(slots)
            return slots

    def _detach(self, reservations: Sequence[Reservation]) -> tuple[int, ...]:
        for item in reversed(reservations):
            self._residents.detach(item.row, item.parts)
        if reservations:
            self._changed.notify_all()
        return tuple(slot for item in reservations for slot in item.slots)

    def acquire_scratch(self, sizes: Sequence[int]) -> tuple[int, ...] | None:
        """Slots that belong to no block, for loads larger than the arena; all or none."""
        with self.lock:
            found = Victims(self._residents).take(sizes, 1)
            if not found:
                return None
            self._residents.loose.update(found[0])
            return found[0]

    def release_scratch(self, slots: Sequence[int]) -> None:
        """Give back slots that belong to no block."""
        with self.lock:
            self._slots.release_many(slots)
            self._residents.loose.difference_update(slots)
            self._changed.notify_all()

    release_detached = release_scratch

    # -- order -------------------------------------------------------------------------------------------------

    def touch(self, blocks: Sequence[BlockId], num_blocks: int, hint: Hint = NO_HINT) -> None:
        """The first `num_blocks` of a chain were used. Coalesced; `blocks` may grow later, not change."""
        if num_blocks > 0:
            with self.lock:
                self._residents.touch(blocks, num_blocks, hint)

    def settle(self) -> None:
        """Apply waiting touches, giving the lock up between chains; for a background thread."""
        waiting = True
        while waiting:
            with self.lock:
                waiting = self._residents.apply_touch()

    def coldest(self, num_blocks: int) -> list[BlockId]:
        """Blocks that would be evicted next, coldest first."""
        with self.lock:
            self._residents.apply_touches()
            return [block for block, _ in zip(self._residents.policy.victims(), range(num_blocks), strict=False)]

    def return_odds(self, blocks: Sequence[BlockId]) -> list[float]:
        """How likely each block is used again, as far as the policy knows."""
        with self.lock:
            self._residents.apply_touches()
            return self._residents.policy.return_odds(blocks)

    # -- leaving -----------------------------------------------------------------------------------------------

    def remove(self, blocks: Sequence[BlockId]) -> int:
        """Remove blocks and all that hang from them. Returns how many stopped being matchable."""
        with self.lock:
            rows = np.unique(self._table.ids.find(blocks))
            doomed = self._residents.with_descendants(rows[rows != NO_ROW])
            removed = self._residents.hide(doomed)
            self._residents.bury_all(doomed)
            self._changed.notify_all()
            return removed

    def clear(self, root: RootId | None = None) -> int:
        """Remove everything under `root`, or everything. Pinned blocks stop being matchable and go when unpinned.

        They stop together; their slots return in portions, between which others have the lock.
        """
        residents, table = self._residents, self._table
        with self.lock:
            accounts = residents.accounts
            rows = table.live_rows()
            rows = rows if root is None else rows[table.root[rows] == accounts.find(root)]
            rows = rows[np.argsort(-table.depth[rows], kind="stable")]
            if residents.observer is not None and residents.observer.listening:
                for number in np.unique(table.root[rows]).tolist():
                    residents.observer.cleared(accounts.roots[number])
            removed = residents.hide(rows, told=True)
        for at in range(0, len(rows), _CHUNK):
            with self.lock:
                portion = rows[at : at + _CHUNK]
                # Freed by an unpin meanwhile, a row may be somebody else's by now.
                residents.bury_all(np.array([row for row in portion.tolist() if row in residents.doomed], np.int64))
                self._changed.notify_all()
        return removed

    # -- watching ----------------------------------------------------------------------------------------------

    def observe(self, observer: Observer) -> None:
        """Let `observer` hear what becomes and stops being matchable, from now on. There is one."""
        with self.lock:
            self._residents.observer = observer

    # -- health ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Matchable blocks, those being filled included."""
        return len(self._table)

    def check(self) -> list[str]:
        """Broken invariants; empty when healthy."""
        with self.lock:
            self._residents.apply_touches()
            return faults(self._residents)


def _masks(reservations: Sequence[Reservation]) -> npt.NDArray[np.uint64]:
    """Mask of the parts of each."""
    known = {parts: mask_of(parts) for parts in {item.parts for item in reservations}}
    return np.array([known[item.parts] for item in reservations], np.uint64)
