# SPDX-License-Identifier: Apache-2.0
"""Making room during one call that needs some: walks the policy's order once, and again while that helps.

Evicts only blocks that nobody holds and nothing hangs from, many at a time: what a chain loses, it loses from its
tail, and a block whose only child goes in the same step can go as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from kvstore.block import BlockId
from kvstore.index import NO_ROW, Rows
from kvstore.residents import Residents

_MIN_BATCH = 4
_MAX_BATCH = 1024
_SLACK_SHARE = 32

NO_ROWS = np.empty(0, np.int64)
Worth = Callable[[int, int], int]
"""What the slots of a block are worth to who asks, by layout and mask of ready parts."""


class Victims:
    """Used under the pool's lock, for one call."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._order: Iterator[BlockId] | None = None
        self._rows = NO_ROWS
        self._progress = False
        self._stuck: set[int] = set()
        """Where extents begin of which something was held when they were to be emptied."""

    def take(self, sizes: Sequence[int], count: int) -> list[tuple[int, ...]]:
        """Slots of `sizes` for up to `count` blocks, each whole, evicting as needed."""
        release = self._residents.slots.release_many
        if len(set(sizes)) == 1:
            width = len(sizes)
            slots = self._slots_of(sizes[0], width * count)
            num_blocks = len(slots) // width
            release(slots[num_blocks * width :])
            return list(zip(*[iter(slots[: num_blocks * width])] * width, strict=True))
        # Of several sizes: block by block, or the first size would take what the others need.
        found: list[tuple[int, ...]] = []
        while len(found) < count:
            block: list[int] = []
            for size in sizes:
                slots = self._slots_of(size, 1)
                if not slots:
                    release(block)
                    return found
                block += slots
            found.append(tuple(block))
        return found

    def shrink_group(self, number: int, num_bytes: int) -> None:
        """Evict the coldest blocks of the group of root `number`, and nobody else's, until `num_bytes` fit.

        A little more than asked: finding a group's own among all others' is a walk over everything colder.
        """
        accounts = self._residents.accounts
        limit = accounts.limit_of(number)
        wanted = min(max(num_bytes, limit // _SLACK_SHARE), limit)
        group = np.array(accounts.group_of(number))
        progress = True
        while progress:  # again while that helps: a block skipped for its children may have lost them
            progress = False
            order = self._begin()
            while (missing := wanted - (accounts.room_bytes(number) or 0)) > 0:
                batch = list(islice(order, _MAX_BATCH))
                if not batch:
                    break
                rows = self._residents.table.ids.find(batch)
                rows = rows[rows != NO_ROW]
                chosen = self._choose(rows[np.isin(self._residents.table.root[rows], group)], self._bytes_of, missing)
                self._evict(chosen)
                progress |= bool(chosen)
            else:
                return

    def _bytes_of(self, layout: int, ready: int) -> int:
        parts = self._residents.layouts[layout].parts
        return sum(part.num_bytes for part in parts if ready >> part.part & 1)

    def _slots_of(self, num_bytes: int, count: int) -> list[int]:
        """Up to `count` slots of one size."""
        acquire = self._residents.slots.acquire_many
        found = acquire(num_bytes, count)
        while len(found) < count and self._make_room(num_bytes, count - len(found)):
            found += acquire(num_bytes, count - len(found))
        return found

    def _begin(self) -> Iterator[BlockId]:
        self._residents.apply_touches()
        return self._residents.policy.victims()

    def _make_room(self, num_bytes: int, num_slots: int) -> bool:
        """Evict, for up to `num_slots` slots of a size; False when nothing more can go."""
        residents = self._residents

        def worth(layout: int, ready: int) -> int:
            parts = residents.layouts[layout].parts
            serves = [residents.slots.same_class(part.num_bytes, num_bytes) for part in parts]
            return sum(serves[part.part] for part in parts if ready >> part.part & 1)

        while True:
            for rows in self._batches(num_slots):
                chosen = self._choose(rows, worth, num_slots)
                if chosen:
                    self._rows = rows[int(np.flatnonzero(rows == chosen[-1])[0]) + 1 :]
                    self._evict(chosen)
                    return True
                if residents.slots.below_share(num_bytes) and any(map(self._vacate, self._choose(rows))):
                    return True
            if not self._progress:
                return False
            # A block skipped for its children may have lost them since it was yielded.
            self._order, self._progress = None, False

    def _batches(self, num_slots: int) -> Iterator[Rows]:
        """Rows in the policy's order, from where the last batch was left."""
        batch_size = min(max(num_slots, _MIN_BATCH), _MAX_BATCH)
        if self._order is None:
            self._order, self._rows = self._begin(), NO_ROWS
        if len(self._rows):
            yield self._rows
        while batch := list(islice(self._order, batch_size)):
            rows = self._residents.table.ids.find(batch)
            yield rows[rows != NO_ROW]
            batch_size = min(2 * batch_size, _MAX_BATCH)

    def _choose(self, rows: Rows, worth: Worth = lambda layout, ready: 1, enough: int = _MAX_BATCH) -> list[int]:
        """Those of `rows` that can go one after the other and are worth something, until it is `enough`."""
        table = self._residents.table
        held = (table.pins[rows] != 0) | (table.filling[rows] != 0) | (table.ready[rows] == 0)
        columns = (rows, held, table.children[rows], table.parent[rows], table.layout[rows], table.ready[rows])
        orphaned: dict[int, int] = {}  # how many children of each row were chosen
        known: dict[tuple[int, int], int] = {}
        chosen: list[int] = []
        for row, is_held, children, parent, *kind in zip(*(each.tolist() for each in columns), strict=True):
            if is_held or children > orphaned.get(row, 0):
                continue
            value = known.get((kind[0], kind[1]))
            if value is None:
                value = known[kind[0], kind[1]] = worth(kind[0], kind[1])
            if not value:
                continue
            chosen.append(row)
            orphaned[parent] = orphaned.get(parent, 0) + 1
            enough -= value
            if enough <= 0:
                break
        return chosen

    def _evict(self, chosen: Sequence[int]) -> None:
        if not chosen:
            return
        residents, table = self._residents, self._residents.table
        rows = np.array(chosen)
        residents.report_removed(rows, residents.is_whole(rows))
        num_lost = len(rows) - int(np.count_nonzero(table.below[rows]))
        residents.policy.remove(table.ids.ids_of(rows))
        residents.release_slots(rows)
        parents = table.parent[rows]
        table.drop_all(rows)
        parents = parents[parents != NO_ROW]
        for parent in parents[table.ready[parents] == 0].tolist():
            residents.drop_empty(parent)
        residents.num_evicted += len(chosen)
        residents.num_lost += num_lost
        self._progress = True

    def _vacate(self, row: int) -> bool:
        """Empty the extent that holds a cold block of another size, so that it can change hands.

        Takes with it what hangs from the extent's blocks. Refuses where anything there is pinned or being filled.
        """
        residents, table = self._residents, self._residents.table
        extent = residents.slots.extent_of(max(table.slots[row].tolist()))
        if extent.start in self._stuck:
            return False  # each of its blocks would be a walk over all there is, with the lock held
        if any(slot in extent for slot in residents.loose):
            self._stuck.add(extent.start)
            return False
        rows = table.live_rows()
        slots = table.slots[rows]
        inside = ((slots >= extent.start) & (slots < extent.stop)).any(axis=1)
        doomed = residents.with_descendants(rows[inside])
        if table.pins[doomed].any() or table.filling[doomed].any():
            self._stuck.add(extent.start)
            return False
        residents.num_lost += len(doomed) - int(np.count_nonzero(table.below[doomed]))
        residents.num_evicted += residents.hide(doomed)
        residents.bury_all(doomed)
        self._progress = True
        return True
