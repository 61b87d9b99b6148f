# SPDX-License-Identifier: Apache-2.0
"""Making room during one call that needs some: walks the policy's order once, and again while that helps.

Evicts only blocks that nobody holds and nothing hangs from. What is evicted leaves table and policy together, in
`close`: until then its row is empty and childless, and nobody else looks, for the pool's lock is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Self

import numpy as np

from kvstore.index import NO_ROW, Rows
from kvstore.residents import Residents

_BATCH = 64
_SLACK_SHARE = 32


class Victims:
    """A context manager, used under the pool's lock. No block may be added while it is open."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._walk: Iterator[int] | None = None
        self._progress = False
        self._evicted: list[int] = []
        self._ready: list[int] = []
        self._serving: dict[tuple[int, int, int], bool] = {}

    def take(self, sizes: Sequence[int], count: int) -> list[tuple[int, ...]]:
        """Slots of `sizes` for up to `count` blocks, each whole, evicting as needed."""
        found: list[tuple[int, ...]] = []
        acquire = self._residents.slots.acquire
        while len(found) < count:
            slots: list[int] = []
            for size in sizes:
                slot = acquire(size)
                while slot is None and self._evict_for(size):
                    slot = acquire(size)
                if slot is None:
                    for taken in slots:
                        self._residents.slots.release(taken)
                    return found
                slots.append(slot)
            found.append(tuple(slots))
        return found

    def shrink_group(self, number: int, num_bytes: int) -> None:
        """Evict the coldest blocks of the group of root `number`, and nobody else's, until `num_bytes` fit.

        A little more than asked: finding a group's own among all others' is a walk over everything colder.
        """
        residents = self._residents
        accounts = residents.accounts
        wanted = min(max(num_bytes, accounts.limit_of(number) // _SLACK_SHARE), accounts.limit_of(number))
        group = np.array(accounts.group_of(number))
        room = accounts.room_bytes(number) or 0
        while room < wanted:
            before = room
            for row in self._rows(group):
                if self._evictable(row):
                    self._evict(row)
                    room = accounts.room_bytes(number) or 0
                    if room >= wanted:
                        return
            if room == before:
                return
            self._flush()

    def _evict_for(self, num_bytes: int) -> bool:
        """Evict until a slot of that size may be free; False when nothing more can go."""
        if self._walk is None:
            self._walk = self._rows()
        while True:
            for row in self._walk:
                if not self._evictable(row):
                    continue
                if self._serves(row, num_bytes):
                    self._evict(row)
                    return True
                if self._residents.slots.below_share(num_bytes) and self._vacate(row):
                    return True
            if not self._progress:
                return False
            # A block skipped for its children may have lost them since it was yielded.
            self._flush()
            self._progress = False
            self._walk = self._rows()

    def _rows(self, group: Rows | None = None) -> Iterator[int]:
        """Rows in the policy's order; of roots in `group` only where one is given."""
        residents = self._residents
        residents.apply_touches()
        order = residents.policy.victims()
        while batch := list(islice(order, _BATCH if group is None else 16 * _BATCH)):
            rows = residents.table.ids.find(batch)
            rows = rows[rows != NO_ROW]
            if group is not None:
                rows = rows[np.isin(residents.table.root[rows], group)]
            yield from rows.tolist()

    def _evictable(self, row: int) -> bool:
        table = self._residents.table
        return bool(table.ready[row]) and not (table.pins[row] or table.children[row] or table.filling[row])

    def _serves(self, row: int, num_bytes: int) -> bool:
        residents = self._residents
        key = (int(residents.table.layout[row]), int(residents.table.ready[row]), num_bytes)
        serves = self._serving.get(key)
        if serves is None:
            serves = self._serving[key] = any(
                key[1] >> part.part & 1 and residents.slots.same_class(part.num_bytes, num_bytes)
                for part in residents.layouts[key[0]].parts
            )
        return serves

    def _evict(self, row: int) -> None:
        residents, table = self._residents, self._residents.table
        self._evicted.append(row)
        self._ready.append(int(table.ready[row]))
        residents.release_slots(row)
        table.ready[row] = 0
        parent = int(table.parent[row])
        residents.num_evicted += 1
        self._progress = True
        if parent != NO_ROW:
            table.parent[row] = NO_ROW
            table.children[parent] -= 1
            residents.drop_empty(parent)

    def _vacate(self, row: int) -> bool:
        """Empty the extent that holds a cold block of another size, so that it can change hands.

        Takes with it what hangs from the extent's blocks. Refuses where anything there is pinned or being filled.
        """
        residents, table = self._residents, self._residents.table
        self._flush()
        extent = residents.slots.extent_of(max(table.slots[row].tolist()))
        if any(slot in extent for slot in residents.loose):
            return False
        rows = table.live_rows()
        slots = table.slots[rows]
        inside = ((slots >= extent.start) & (slots < extent.stop)).any(axis=1)
        doomed = residents.with_descendants(rows[inside])
        if table.pins[doomed].any() or table.filling[doomed].any():
            return False
        residents.num_evicted += residents.hide(doomed)
        residents.bury_all(doomed)
        self._progress = True
        return True

    def _flush(self) -> None:
        """Let evicted blocks leave the table and the policy, and tell of them."""
        if not self._evicted:
            return
        residents, table = self._residents, self._residents.table
        rows = np.array(self._evicted)
        table.ready[rows] = np.array(self._ready, np.uint64)
        residents.report_removed(rows, residents.is_whole(rows))
        residents.policy.remove(residents.ids_of(rows))
        table.drop_all(rows)
        self._evicted, self._ready = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
