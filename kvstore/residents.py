# SPDX-License-Identifier: Apache-2.0
"""What a pool keeps in step: the table of blocks, the slots their bytes lie in, the policy, the accounts.

No lock here: the pool has one and holds it around every call. Nothing here copies a block's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.api import Hint
from kvstore.block import BlockId, BlockMeta, RootId
from kvstore.index import NO_ROW, NO_SLOT, BlockTable, Rows
from kvstore.layout import BlockLayout
from kvstore.policies.base import Policy
from kvstore.quota import Accounts

_MAX_TOUCHES = 256
_FEW = 12  # below this, row by row is quicker than numpy


class Slots(Protocol):
    """Where a pool's bytes lie. The pool's lock is held around every call."""

    def acquire_many(self, num_bytes: int, count: int) -> list[int]: ...
    def release_many(self, slots: Sequence[int]) -> None: ...
    def same_class(self, one_bytes: int, other_bytes: int) -> bool: ...
    def below_share(self, num_bytes: int) -> bool: ...
    def extent_of(self, slot: int) -> range: ...
    def check(self) -> list[str]: ...


class Observer(Protocol):
    """Hears of blocks that become matchable in all of their parts, and of those that stop being so.

    Called under the pool's lock: it appends and returns. `listening` is False while nobody wants to know, and then
    nothing is called.
    """

    @property
    def listening(self) -> bool: ...

    def stored(self, root: RootId, ids: bytes, parent: bytes, depth: int, tokens: bytes) -> int:
        """Consecutive blocks of one chain, ids end to end. Returns the event's number, which only rises."""

    def removed(self, root: RootId, ids: bytes, rows: Rows, born: npt.NDArray[np.int64]) -> None:
        """Blocks of one root, with their rows and the numbers of the events that told of them (0 for none)."""

    def cleared(self, root: RootId) -> None:
        """Every block of a root."""


class Residents:
    """Blocks in slots. See `BlockPool` for the invariants."""

    def __init__(self, slots: Slots, policy: Policy) -> None:
        self.table = BlockTable()
        self.slots = slots
        self.policy = policy
        self.accounts = Accounts(self.table.heads)
        self.layouts: list[BlockLayout] = []
        self.observer: Observer | None = None
        self.doomed: set[int] = set()  # rows removed while something still held them
        self.loose: set[int] = set()  # slots that are out and belong to no row
        self.num_evicted = 0
        self.num_lost = 0  # evicted while no lower tier was believed to hold them
        self._whole_masks = np.zeros(0, np.uint64)
        self._part_bytes = np.zeros((0, 1), np.int64)  # of each layout's parts
        # Touches wait here until order matters: a match must not pay for moving a thousand blocks in the policy.
        # By list: a conversation's next turn, whose list is the same and has grown, takes the place of the last.
        self._touches: dict[int, tuple[Sequence[BlockId], int, Hint]] = {}

    def open(self, layout: BlockLayout, num_blocks: int) -> None:
        if layout not in self.layouts:
            self.layouts.append(layout)
            self._whole_masks = np.array([part_mask(each, None) for each in self.layouts], np.uint64)
            self.table.widen(len(layout.parts), 4 * layout.model.block_tokens, num_blocks)
            self._part_bytes = np.zeros((len(self.layouts), self.table.slots.shape[1]), np.int64)
            for number, each in enumerate(self.layouts):
                self._part_bytes[number, : len(each.parts)] = [part.num_bytes for part in each.parts]
            self.policy.expect(num_blocks)

    def layout_of(self, row: int) -> BlockLayout:
        return self.layouts[int(self.table.layout[row])]

    def root_of(self, row: int) -> RootId:
        return self.accounts.roots[int(self.table.root[row])]

    def meta_of(self, row: int) -> BlockMeta:
        return self.table.meta(row, self.root_of(row), 4 * self.layout_of(row).model.block_tokens)

    def leading(self, blocks: Sequence[BlockId], need: int, root: RootId) -> Rows:
        """Rows of the leading run of one chain under `root` that has all parts of mask `need`."""
        number = self.accounts.find(root)
        return self.table.leading(blocks, need, number) if number >= 0 else np.empty(0, np.int64)

    # -- order -------------------------------------------------------------------------------------------------

    def touch(self, blocks: Sequence[BlockId], num_blocks: int, hint: Hint) -> None:
        before = self._touches.pop(id(blocks), None)
        if before is not None and before[1] > num_blocks:
            self._pass_on(*before)  # its tail was not used again
        elif before is not None and before[2].asked and not hint.asked:
            hint = replace(hint, asked=True)  # a request's match and its save, in one
        self._touches[id(blocks)] = (blocks, num_blocks, hint)
        if len(self._touches) > _MAX_TOUCHES:
            self.apply_touch()

    def apply_touch(self) -> bool:
        """Pass the oldest waiting touch to the policy; False where none waits."""
        if not self._touches:
            return False
        self._pass_on(*self._touches.pop(next(iter(self._touches))))
        return True

    def _pass_on(self, blocks: Sequence[BlockId], num_blocks: int, hint: Hint) -> None:
        """Tell the policy of those that are a chain from its first block on.

        Ids come from clients, in any order and as often as they like; policies rely on that of chains.
        """
        rows, table = self.table.ids.find_leading(blocks[:num_blocks]), self.table
        if len(rows) and not table.depth[rows[0]]:
            follows = table.parent[rows[1:]] == rows[:-1]
            self.policy.touch(blocks[: len(rows) if follows.all() else 1 + int(follows.argmin())], hint)

    def apply_touches(self) -> None:
        while self.apply_touch():
            pass

    # -- what observers hear -----------------------------------------------------------------------------------

    def is_whole(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Whether each row has every part of its layout."""
        whole: npt.NDArray[np.bool_] = self.table.ready[rows] == self._whole_masks[self.table.layout[rows]]
        return whole

    def report_stored(self, rows: Rows) -> None:
        """Tell of blocks of one chain that are whole since just now, head to tail, run by run."""
        observer, table = self.observer, self.table
        if observer is None or not observer.listening or not len(rows):
            return
        breaks = np.flatnonzero(table.parent[rows[1:]] != rows[:-1]) + 1
        for run in np.split(rows, breaks):
            first = int(run[0])
            root, token_bytes = self.root_of(first), 4 * self.layout_of(first).model.block_tokens
            parent = table.meta(first, root, 0).parent
            tokens = table.tokens[run, :token_bytes].tobytes()
            depth = int(table.depth[first])
            table.born[run] = observer.stored(root, table.ids.packed(run), parent, depth, tokens)

    def report_removed(self, rows: Rows, whole: npt.NDArray[np.bool_]) -> None:
        """Tell of blocks that stopped being matchable, where they were `whole`."""
        if self.observer is None or not self.observer.listening:
            return
        rows = rows[whole]
        for number in np.unique(self.table.root[rows]).tolist():
            gone = rows[self.table.root[rows] == number]
            ids = self.table.ids.packed(gone)
            self.observer.removed(self.accounts.roots[number], ids, gone, self.table.born[gone])

    # -- leaving -----------------------------------------------------------------------------------------------

    def with_descendants(self, rows: Rows) -> Rows:
        """Rows, and all that hang from them."""
        table = self.table
        if not table.children[rows].any():
            return rows
        live = table.live_rows()
        below = live[table.depth[live] > table.depth[rows].min()]
        below = below[np.argsort(table.depth[below], kind="stable")]
        taken = np.zeros(table.ids.capacity, bool)
        taken[rows] = True
        for level in np.split(below, np.flatnonzero(np.diff(table.depth[below])) + 1):
            taken[level] |= taken[table.parent[level]]
        return np.flatnonzero(taken)

    def hide(self, rows: Rows, *, told: bool = False) -> int:
        """Let nobody find these rows, and all that hang from them being among them, any more.

        `told`: observers were told already. Returns how many could be found until now.
        """
        shown = rows[self.table.ids.findable(rows)]
        if not told:
            self.report_removed(shown, self.is_whole(shown))
        self.policy.remove(self.table.ids.ids_of(shown))
        self.table.ids.hide(rows)
        self.doomed.update(rows.tolist())
        return len(shown)

    def bury_all(self, rows: Rows) -> None:
        """Free hidden rows, children before parents, as far as nothing holds them and no other row hangs from them."""
        for row in self._drop_all(rows, (self.table.pins[rows] != 0) | (self.table.filling[rows] != 0)):
            if row not in self.doomed:  # hidden ones have their own turn, or are held
                self.drop_empty(row)

    def _drop_all(self, rows: Rows, held: npt.NDArray[np.bool_]) -> list[int]:
        """Free rows, but those that are `held`, or that something hangs from which stays; returns who lost a child."""
        table = self.table
        parents = np.sort(table.parent[rows])
        among = np.searchsorted(parents, rows, "right") - np.searchsorted(parents, rows)
        kept: set[int] = set()
        for row in rows[held | (table.children[rows] > among)].tolist():
            while row != NO_ROW and row not in kept:
                kept.add(row)
                row = int(table.parent[row])
        gone = rows if not kept else rows[~np.isin(rows, list(kept))]
        if not len(gone):
            return []
        self.release_slots(gone)
        self.doomed.difference_update(gone.tolist())
        parents = np.unique(table.parent[gone])
        table.drop_all(gone)
        return [row for row in parents[~np.isin(parents, gone)].tolist() if row != NO_ROW]

    def bury(self, row: int) -> None:
        """Free a hidden row once nothing holds it, then its hidden ancestors that only it held."""
        table = self.table
        while row in self.doomed:
            if table.pins[row] or table.filling[row] or table.children[row]:
                return
            self.doomed.discard(row)
            self.release_slots(np.array([row]))
            row = table.drop(row)

    def drop_empty(self, row: int) -> None:
        """Drop a row that has neither bytes nor writers nor children, then its empty ancestors.

        Nothing happens to a row that is not in use any more, as one that went with another's ancestors.
        """
        table = self.table
        while table.ids.is_used(row) and not (table.ready[row] or table.filling[row] or table.children[row]):
            self.doomed.discard(row)
            row = table.drop(row)
            if row == NO_ROW:
                return
        self.bury(row)

    def release_slots(self, rows: Rows) -> None:
        """Give back every slot of these rows, and take them off their roots' accounts."""
        table = self.table
        held = table.slots[rows] != NO_SLOT
        self.slots.release_many(table.slots[rows][held].tolist())
        table.slots[rows] = NO_SLOT
        self._discharge(rows, (held * self._part_bytes[table.layout[rows]]).sum(axis=1))

    def detach(self, rows: Rows, parts: Sequence[int]) -> None:
        """Take slots that were being filled out of rows; the caller has them now."""
        table, cells = self.table, list(parts)
        table.filling[rows] &= ~np.uint64(mask_of(parts))
        table.slots[rows[:, None], cells] = NO_SLOT
        self._discharge(rows, self._part_bytes[table.layout[rows]][:, cells].sum(axis=1))

    def drop_all_empty(self, rows: Rows) -> None:
        """`drop_empty` of each, of one chain tail first."""
        if len(rows) < _FEW:
            for row in rows.tolist():
                self.drop_empty(row)
            return
        is_empty = (self.table.ready[rows] | self.table.filling[rows]) == 0
        for row in self._drop_all(rows[is_empty], np.zeros(int(is_empty.sum()), bool)):
            self.drop_empty(row)
        for row in self.doomed.intersection(rows[~is_empty].tolist()):
            self.bury(row)

    def _discharge(self, rows: Rows, num_bytes: npt.NDArray[np.int64]) -> None:
        """Take bytes of each row off its root's account."""
        roots = self.table.root[rows]
        for number in np.unique(roots).tolist():
            self.accounts.charge(number, -int(num_bytes[roots == number].sum()))


def mask_of(parts: Sequence[int]) -> int:
    mask = 0
    for part in parts:
        mask |= 1 << part
    return mask


def part_mask(layout: BlockLayout, parts: Sequence[int] | None) -> int:
    """Bit mask of `parts`, all of the grid for None."""
    return mask_of(layout.all_parts if parts is None else parts)
