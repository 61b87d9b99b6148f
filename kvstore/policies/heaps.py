# SPDX-License-Identifier: Apache-2.0
"""Queues of what may go, lowest key first, in heaps whose entries are put right late.

A use raises a key and leaves the entry where it is: one that turns out too low when it comes up is put back, and one
that stands for nothing any more is dropped then. So a use costs no heap anything, and a heap holds more than counts:
what is out of date goes some at a time as well, since a heap of a million entries took 60 ms.

Invariants
1. Of what has an entry, one stands for it (`entry_heap`, `entry_key`), with its key or one that it had before.
2. Other entries stand for nothing, and nothing is left out for them.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

_SPARE_ENTRIES = 1024

NOWHERE = -1
"""The heap of an entry that there is none of."""

Entry = tuple[int, int]
"""Key and number."""


class Queued(Protocol):
    """What lies in queues, by its number: where it belongs is `bank` + `queue`, as long as it is an end."""

    number: int
    key: int
    bank: int
    queue: int
    entry_heap: int
    entry_key: int

    @property
    def is_end(self) -> bool:
        """Whether it may be taken from; who becomes an end is given to `place`."""


T = TypeVar("T", bound=Queued)


class Heaps(Generic[T]):
    """As many as there are queues. `known` has all that there is by its number, and is the caller's."""

    def __init__(self, num_heaps: int, known: Mapping[int, T]) -> None:
        self.lists: list[list[Entry]] = [[] for _ in range(num_heaps)]
        self.num_entries = 0
        self._known = known
        self._compacted = 0
        """The heap whose entries are looked at."""
        self._old: list[Entry] = []
        """Those of that heap as they were; those before `_old_at` that count, and new ones, are kept."""
        self._old_at = 0
        self._kept: dict[Entry, None] = {}

    def grow(self, num_heaps: int) -> None:
        """Have so many, if there were fewer."""
        self.lists += [[] for _ in range(num_heaps - len(self.lists))]

    def place(self, item: T) -> None:
        """See to it that it has an entry where it belongs. One that is too low will do: uses only raise keys."""
        if item.entry_heap != item.bank + item.queue:
            self._put(item.bank + item.queue, item)

    def lowest(self, at: int) -> T | None:
        """What comes first in a heap, whose first entry stands for it then."""
        heap = self.lists[at]
        while heap:
            item = self._stands_for(at, heap[0])
            if item is None or item.bank + item.queue != at or not item.is_end:
                self.pop(at, item)
            elif item.key != heap[0][0]:
                self.pop(at, item)
                self._put(at, item)
            else:
                return item
        return None

    def pop(self, at: int, item: T | None) -> None:
        """Drop the first entry of a heap, which stands for `item`."""
        heapq.heappop(self.lists[at])
        self.num_entries -= 1
        if item is not None:
            item.entry_heap = NOWHERE

    def _stands_for(self, at: int, entry: Entry) -> T | None:
        """None where another entry does, or it is gone."""
        key, number = entry
        item = self._known.get(number)
        return item if item is not None and item.entry_heap == at and item.entry_key == key else None

    def _put(self, at: int, item: T) -> None:
        entry = item.key, item.number
        heapq.heappush(self.lists[at], entry)
        item.entry_heap, item.entry_key = at, item.key
        self.num_entries += 1
        if self._old and at == self._compacted:
            self._kept[entry] = None

    @property
    def is_crowded(self) -> bool:
        """Whether there is something for `compact_some` to do."""
        return bool(self._old) or self.num_entries > 2 * len(self._known) + _SPARE_ENTRIES

    def compact_some(self, num_entries: int) -> int:
        """Look at so many entries of one heap after the other, and drop what is out of date, or there twice.

        Returns the heap that it is done with, NOWHERE before. All heaps at once took 60 ms with a million blocks, and
        one no less, where it had most of them.
        """
        if not self._old:
            self._compacted = (self._compacted + 1) % len(self.lists)
            self._old, self._kept, self._old_at = list(self.lists[self._compacted]), {}, 0
        at = self._compacted
        some = self._old[self._old_at : self._old_at + num_entries]
        self._old_at += len(some)
        self._kept.update(dict.fromkeys(entry for entry in some if self._stands_for(at, entry) is not None))
        if self._old_at < len(self._old):
            return NOWHERE
        kept, self._kept, self._old = list(self._kept), {}, []
        heapq.heapify(kept)
        self.num_entries -= len(self.lists[at]) - len(kept)
        self.lists[at] = kept
        return at
