# SPDX-License-Identifier: Apache-2.0
"""Resident blocks in slots under one policy: what the host tier and the device overlay have in common.

Who holds blocks, in which order they go, and how they leave is here; how they come is `kvstore.filling`, what only asks
`kvstore.survey`, and what lower tiers are believed to hold `kvstore.beliefs`.

Invariants
1. A resident block's parent is resident, under the same root: blocks are filled under resident parents, only blocks
   without children are evicted, and removing one removes what hangs from it.
2. A pinned block is neither evicted nor reused; removed while pinned, it stops being matchable at once and its
   slots return with the last pin.
3. A block of another root than asked for looks like one that is not there.
4. The lock guards bookkeeping only: nothing here copies a block's bytes or calls out.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.api import NO_HINT, Hint
from kvstore.beliefs import Beliefs
from kvstore.block import BlockId, BlockMeta, RootId
from kvstore.filling import Filling
from kvstore.health import faults
from kvstore.index import NO_ROW, Rows
from kvstore.layout import BlockLayout
from kvstore.policies.base import Policy
from kvstore.residents import Observer, Residents, Slots
from kvstore.residents import part_mask as part_mask
from kvstore.survey import Survey

_MOST_SIMILAR = 64  # children of one block that are looked at for the longest beginning
_CHUNK = 4096  # rows freed, or told of, before the lock is given up for a moment


class BlockPool:
    """Find, pin, touch and remove blocks; fill them by `filling`. Thread-safe."""

    def __init__(self, slots: Slots, policy: Policy) -> None:
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._residents = Residents(slots, policy)
        self._table = self._residents.table
        self.filling = Filling(self._residents, self._changed)
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
