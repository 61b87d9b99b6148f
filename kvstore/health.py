# SPDX-License-Identifier: Apache-2.0
"""What may be wrong with a pool: one sentence for each broken invariant. Under the pool's lock."""

from __future__ import annotations

from itertools import islice

import numpy as np

from kvstore.index import NO_ROW, NO_SLOT, Rows
from kvstore.residents import Residents

_MANY = 1 << 16


def faults(residents: Residents) -> list[str]:
    """Broken invariants; empty when healthy. Touches must have been applied."""
    rows = residents.table.live_rows()
    return [
        *residents.slots.check(),
        *_row_faults(residents, rows),
        *_family_faults(residents, rows),
        *_slot_faults(residents, rows),
        *_account_faults(residents, rows),
        *_policy_faults(residents),
    ]


def _held(residents: Residents, rows: Rows) -> Rows:
    """Mask of the parts that have slots."""
    held = np.zeros(len(rows), np.uint64)
    for part in range(residents.table.slots.shape[1]):
        held |= (residents.table.slots[rows, part] != NO_SLOT).astype(np.uint64) << np.uint64(part)
    return held.view(np.int64)


def _row_faults(residents: Residents, rows: Rows) -> list[str]:
    table = residents.table
    ready, filling, held = table.ready[rows], table.filling[rows], _held(residents, rows).view(np.uint64)
    found = [
        f"pool: row {row} has ready {table.ready[row]:b}, filling {table.filling[row]:b}, and other slots"
        for row in rows[((ready & filling) != 0) | ((ready | filling) != held)].tolist()
    ]
    found += [f"pool: row {row} has {table.pins[row]} pins" for row in rows[table.pins[rows] < 0].tolist()]
    empty = rows[((ready | filling) == 0) & (table.children[rows] == 0)]
    found += [f"pool: row {row} is empty" for row in empty.tolist()]
    unused = np.ones(table.ids.capacity, bool)
    unused[rows] = False
    marked = table.pins[unused].any() or table.ready[unused].any() or table.filling[unused].any()
    return [*found, *(["pool: a row that is not in use has pins or parts"] if marked else [])]


def _family_faults(residents: Residents, rows: Rows) -> list[str]:
    table = residents.table
    parents = table.parent[rows].astype(np.int64)
    children, parents = rows[parents != NO_ROW], parents[parents != NO_ROW]
    found = [
        f"pool: row {row} is resident, its parent is not"
        for row in children[(table.ready[children] & ~table.ready[parents]) != 0].tolist()
    ]
    lost = table.ids.findable(children) & ~table.ids.findable(parents)
    found += [f"pool: row {row} can be found, its parent cannot" for row in children[lost].tolist()]
    foreign = (table.root[children] != table.root[parents]) | (table.depth[children] != table.depth[parents] + 1)
    found += [f"pool: row {row} hangs from a block that it cannot follow" for row in children[foreign].tolist()]
    counted = np.bincount(parents, minlength=table.ids.capacity)[rows]
    wrong = rows[counted != table.children[rows]]
    found += _sibling_faults(residents, rows)
    return found + [f"pool: row {row} counts {table.children[row]} children, and has others" for row in wrong.tolist()]


def _sibling_faults(residents: Residents, rows: Rows) -> list[str]:
    """Walks every family: each row must be met once, under its parent and its root."""
    table = residents.table
    met: set[int] = set()
    for parent, first in [
        *((NO_ROW, row) for row in table.heads.values()),
        *zip(rows.tolist(), table.newest[rows].tolist(), strict=True),
    ]:
        row = first
        while row != NO_ROW and row not in met:
            if table.parent[row] != parent:
                return [f"pool: row {row} is among the children of {parent}, and is none"]
            met.add(row)
            row = int(table.older[row])
    return [] if met == set(rows.tolist()) else ["pool: a row is not among its parent's children"]


def _slot_faults(residents: Residents, rows: Rows) -> list[str]:
    found: list[str] = []
    slots = residents.table.slots[rows]
    held = slots[slots != NO_SLOT]
    if len(np.unique(held)) != len(held) or not residents.loose.isdisjoint(held.tolist()):
        found.append("pool: a slot belongs to two parts")
    num_out = getattr(residents.slots, "num_acquired", None)
    if num_out is not None and num_out != len(held) + len(residents.loose):
        found.append(f"pool: {num_out} slots are out, {len(held)} in rows, {len(residents.loose)} in no row")
    return found


def _account_faults(residents: Residents, rows: Rows) -> list[str]:
    table, accounts = residents.table, residents.accounts
    numbers, place = np.unique(table.root[rows], return_inverse=True)
    sums = np.zeros(len(numbers), np.int64)
    for number, layout in enumerate(residents.layouts):
        for part in layout.parts:
            has = (table.layout[rows] == number) & (table.slots[rows, part.part] != NO_SLOT)
            sums += np.bincount(place[has], minlength=len(sums)) * part.num_bytes
    takes = dict(zip(numbers.tolist(), sums.tolist(), strict=True))
    charged = [
        f"pool: root number {number} is charged {held} bytes and takes {takes.get(number, 0)}"
        for number, held in accounts.held_bytes.items()
        if held != takes.get(number, 0)
    ]
    forgotten = [f"pool: root number {number} has blocks and is not known" for number in takes.keys() - accounts.roots]
    return charged + forgotten + accounts.faults()


def _policy_faults(residents: Residents) -> list[str]:
    """Compares every block; of very many, their number and the coldest, because the lock is held meanwhile."""
    table = residents.table
    rows = table.ids.found_rows()
    num_matchable = int(np.count_nonzero(table.ready[rows]))
    if num_matchable != len(residents.policy):
        return [f"pool: policy knows {len(residents.policy)} blocks, {num_matchable} are matchable"]
    if num_matchable > _MANY:
        coldest = table.ids.find(list(islice(residents.policy.victims(), _MANY)))
        strange = (coldest == NO_ROW) | (table.ready[coldest] == 0)
        return [f"pool: policy knows {np.count_nonzero(strange)} strangers"] if strange.any() else []
    matchable = set(table.ids.ids_of(rows[table.ready[rows] != 0]))
    known = set(residents.policy.victims())
    if matchable != known:
        return [f"pool: policy knows {len(known - matchable)} strangers, misses {len(matchable - known)} blocks"]
    return []
