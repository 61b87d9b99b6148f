# SPDX-License-Identifier: Apache-2.0
"""What policies share that choose among the ends of chains: queues of blocks without known children.

A subclass puts each block into one of a few queues, by a number that says where in it; whichever queue it names next
gives up its lowest end. Only ends lie in the heaps, so a use of a chain costs one push however long the chain is, and
suffixes go before prefixes whatever the subclass thinks of either.

Invariants
1. A block's parent is learned from the first touch that names it, and never changes: ids are hashes over chains.
2. Heaps hold every end, and entries that are out of date; an entry counts where its number is its block's own and
   nothing hangs from the block.
3. Blocks that were yielded count as gone until the next walk begins, then as there again where nobody removed them.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.idmap import NO_ROW, IdMap, Rows, longer
from kvstore.policies.bands import Bands, Wish, wishes
from kvstore.policies.base import Policy

_SPARE_ENTRIES = 1024


class LeafPolicy(Policy):
    """Yields the lowest end of whichever queue `_next_queue` names, then what that uncovers, and so on.

    There are `num_queues` for each priority that callers wished for (`kvstore.policies.bands`), and those of the
    lowest give first: what a subclass sees as its queues are those of the band whose turn it is.
    """

    num_queues = 1

    def __init__(self, options: object = None) -> None:
        super().__init__(options)
        self._bands = Bands(self.num_queues)
        self._bank = 0
        """Where the queues of the band begin whose turn it is."""
        self._ids = IdMap()
        self._key: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """Place in the queue, lowest first; 0 for rows that are not in use."""
        self._queue: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._banks: npt.NDArray[np.int16] = np.zeros(0, np.int16)
        """Where the queues of each row's priority begin."""
        self._parent: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self._children: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self._linked: npt.NDArray[np.bool_] = np.zeros(0, bool)
        """Whether the parent, or that there is none, is known."""
        self._fresh: npt.NDArray[np.bool_] = np.zeros(0, bool)
        """Admitted, and in no touch since."""
        self._had_child: npt.NDArray[np.bool_] = np.zeros(0, bool)
        self._shared: npt.NDArray[np.bool_] = np.zeros(0, bool)
        """Whether several blocks ever hung from it."""
        self._heaps: list[list[tuple[int, int]]] = [[] for _ in range(self.num_queues)]
        self._num_entries = 0
        self._num_uses = 0
        self._out: dict[int, None] = {}
        """Rows that the last walk yielded and nobody removed."""
        self._out_children: dict[int, int] = {}
        self._walks = 0
        self._untouched: list[Rows] = []
        self._grow()

    # -- what a subclass says ----------------------------------------------------------------------------------

    @abstractmethod
    def _enter(self, rows: Rows, blocks: Sequence[BlockId], hint: Hint) -> None:
        """Give blocks that became resident their queue and key: `_queue[rows]`, `_key[rows]`."""

    @abstractmethod
    def _use(self, rows: Rows, fresh: npt.NDArray[np.bool_], blocks: Sequence[BlockId], hint: Hint) -> None:
        """Give blocks of a chain that were used their queue and key: `_queue[rows]`, `_key[rows]`.

        `rows` are those of `blocks`, NO_ROW where one is not known; `fresh` tells which are used first by this.
        """

    @abstractmethod
    def _next_queue(self) -> int:
        """Number of the queue whose lowest end goes next, which `_head` has found; -1 where none has an end."""

    def _left(self, rows: Rows) -> None:
        """These rows are about to be forgotten."""

    def _walk_begins(self) -> None:
        """A walk over the victims begins; all that was yielded before and not removed is there again."""

    def _yielded(self, row: int) -> None:
        """A block counts as gone until the next walk begins."""

    # -- the policy --------------------------------------------------------------------------------------------

    def expect(self, num_blocks: int) -> None:
        self._ids.expect(num_blocks)
        self._grow()

    def admit(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        if not blocks:
            return
        self._put_back()
        rows = self._ids.add(blocks)
        self._grow()
        self._parent[rows] = NO_ROW
        self._children[rows] = self._banks[rows] = 0
        self._linked[rows] = self._had_child[rows] = self._shared[rows] = False
        self._fresh[rows] = True
        self._enter(rows, blocks, hint)
        self._untouched.append(rows)  # which of them are ends, their touch will tell

    def touch(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        self._put_back()
        self._bands.now_s = max(self._bands.now_s, hint.time_s)
        rows = self._ids.find(blocks)
        known = rows if len(rows) and rows.min() != NO_ROW else rows[rows != NO_ROW]
        if not len(known):
            return
        if not self._linked[known].all():
            self._link(rows)
        if not self._bands.plain or wishes(hint):
            self._heed(rows, hint)
        fresh = self._fresh[rows] & (rows != NO_ROW)
        self._use(rows, fresh, blocks, hint)
        self._fresh[known] = False
        for row in known[self._children[known] == 0].tolist():
            self._push(row)

    def remove(self, blocks: Sequence[BlockId]) -> None:
        rows = self._ids.find(blocks)
        rows = rows[rows != NO_ROW]
        if not len(rows):
            return
        self._left(rows)
        self._key[rows] = 0
        uncovered: list[int] = []
        for row, parent in zip(rows.tolist(), self._parent[rows].tolist(), strict=True):
            self._bands.forget(row)
            was_out = row in self._out
            if was_out:
                del self._out[row]
            if parent != NO_ROW:
                self._children[parent] -= 1
                if was_out:
                    self._out_children[parent] -= 1  # it was uncovered then
                else:
                    uncovered.append(parent)
        orphaned = rows[self._children[rows] > 0]
        if len(orphaned):
            self._parent[np.isin(self._parent, orphaned)] = NO_ROW
        self._ids.free(rows)
        for row in uncovered:
            if self._key[row] and self._is_end(row):
                self._push(row)

    def victims(self) -> Iterator[BlockId]:
        self._put_back()
        number = self._walks
        self._expire()
        self._bank = self._bands.lowest
        self._walk_begins()
        while number == self._walks and (heap := self._next_heap()) >= 0:
            _, row = heapq.heappop(self._heaps[heap])
            self._num_entries -= 1
            self._out[row] = None
            self._yielded(row)
            parent = self._parent_at[row]
            if parent != NO_ROW:
                self._out_children[parent] = self._out_children.get(parent, 0) + 1
                if self._is_end(parent):
                    self._push(parent)
            yield self._ids.id_of(row)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, block: BlockId) -> bool:
        return self._ids.get(block) != NO_ROW

    # -- what callers wish for ---------------------------------------------------------------------------------

    def _heed(self, rows: Rows, hint: Hint) -> None:
        """Move rows of a chain that was used to the bands that the hint wishes for."""
        if not self._bands.plain:
            self._expire()  # or a use after the end of its time would go unnoticed
            for row in rows[rows != NO_ROW].tolist():
                if self._bands.is_over(self._banks_at[row]):
                    self._move(row, Wish(0, len(rows), 0, private=False))
        for wish in self._bands.wished(hint, len(rows)):
            self._heaps += [[] for _ in range(self._bands.num_heaps - len(self._heaps))]
            meant = rows[wish.start : wish.stop]
            meant = meant[np.isin(meant, self._private(rows))] if wish.private else meant[meant != NO_ROW]
            for row in meant.tolist():
                self._move(row, wish)

    def _move(self, row: int, wish: Wish) -> None:
        self._bands.hold(row, wish)
        if wish.bank is not None:
            self._banks_at[row] = wish.bank

    def _expire(self) -> None:
        for row, bank in self._bands.expired():
            self._banks_at[row] = 0 if self._shared[row] and self._bands.is_over(bank) else bank
            if self._is_end(row):
                self._push(row)

    def _next_heap(self) -> int:
        """The heap whose lowest end goes next, from the lowest band on that has one; -1 where none has."""
        while (queue := self._next_queue()) < 0:
            bank = self._bands.next_higher(self._bank, self._heaps)
            if bank < 0:
                return -1
            self._bank = bank
        return self._bank + queue

    # -- places ------------------------------------------------------------------------------------------------

    def _latest_keys(self, num_blocks: int) -> npt.NDArray[np.int64]:
        """Keys above all that were given, for blocks head to tail; the tail's is the lowest."""
        self._num_uses += num_blocks
        return np.arange(self._num_uses, self._num_uses - num_blocks, -1)

    def _head(self, queue: int) -> tuple[int, int] | None:
        """Key and row of the lowest end of a queue."""
        heap = self._heaps[self._bank + queue]
        while heap:
            key, row = heap[0]
            if (
                self._key_at[row] == key
                and self._queue_at[row] == queue
                and self._banks_at[row] == self._bank
                and row not in self._out
                and self._is_end(row)
            ):
                return heap[0]
            heapq.heappop(heap)
            self._num_entries -= 1
        return None

    def _is_end(self, row: int) -> bool:
        """Whether nothing known hangs from a row, but what this walk yielded."""
        children = self._children_at[row]
        return children == 0 or children == self._out_children.get(row, 0)

    def _push(self, row: int) -> None:
        bank = self._banks_at[row]
        heapq.heappush(self._heaps[bank + self._queue_at[row]], (self._key_at[row], row))
        self._num_entries += 1
        if bank != self._bank and self._bands.priority_of(bank) < self._bands.priority_of(self._bank):
            self._bank = bank  # the walk uncovered it

    def _private(self, rows: Rows) -> Rows:
        """Those of a chain's rows, from its tail on, that no other known chain uses."""
        known = rows[rows != NO_ROW]
        shared = np.flatnonzero(self._shared[known])
        private: Rows = known[int(shared[-1]) + 1 :] if len(shared) else known
        return private

    def _put_back(self) -> None:
        """End the walk: what it yielded and nobody removed is there again."""
        self._walks += 1
        out = self._out
        self._out, self._out_children = {}, {}
        for row in out:
            if self._is_end(row):
                self._push(row)
        for rows in self._untouched:
            for row in rows[self._fresh[rows] & (self._key[rows] != 0)].tolist():
                self._push(row)
        self._untouched.clear()
        if self._num_entries > 2 * len(self._ids) + _SPARE_ENTRIES:
            self._rebuild()

    def _rebuild(self) -> None:
        """Drop entries that are out of date; there would be one a use."""
        rows = np.flatnonzero((self._key != 0) & (self._children == 0))
        rows = rows[np.argsort(self._key[rows])]
        heaps = self._banks[rows] + self._queue[rows]
        for heap in range(len(self._heaps)):
            own = rows[heaps == heap]
            self._heaps[heap] = list(zip(self._key[own].tolist(), own.tolist(), strict=True))
        self._num_entries = len(rows)

    def _link(self, rows: Rows) -> None:
        """Learn the parents of a chain's blocks, from its root on."""
        before = np.empty_like(rows)
        before[0], before[1:] = NO_ROW, rows[:-1]
        new = (rows != NO_ROW) & ~self._linked[rows]
        children, parents = rows[new], before[new]
        self._linked[children] = True
        self._parent[children] = parents
        parents = parents[parents != NO_ROW]
        self._shared[parents] |= self._had_child[parents]
        self._had_child[parents] = True
        self._children[parents] += 1

    def _grow(self) -> None:
        num_rows = self._ids.capacity
        if len(self._key) < num_rows:
            self._key, self._queue = longer(self._key, num_rows), longer(self._queue, num_rows)
            self._banks = longer(self._banks, num_rows)
            self._parent, self._children = longer(self._parent, num_rows), longer(self._children, num_rows)
            self._linked, self._fresh = longer(self._linked, num_rows), longer(self._fresh, num_rows)
            self._had_child, self._shared = longer(self._had_child, num_rows), longer(self._shared, num_rows)
            # Of one element, a view answers three times as quickly as its array.
            self._key_at, self._queue_at, self._banks_at = self._key.data, self._queue.data, self._banks.data
            self._parent_at, self._children_at = self._parent.data, self._children.data
