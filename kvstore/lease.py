# SPDX-License-Identifier: Apache-2.0
"""Leases: pins with a deadline, of a hold (`kvstore.holds`) first, and then of the load that is made of it.

Pins return when it is released or expires; an expired lease stays known to its owner as dead, so that a copy that
outlived it is noticed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.index import Rows
from kvstore.pool import BlockPool


@dataclass(slots=True, eq=False)
class Lease:
    """Pinned rows with a deadline. `alive` turns False once, when the pins are returned."""

    rows: Rows
    deadline_s: float
    alive: bool = True
    more: list[int] = field(default_factory=list)
    """Rows pinned later, one by one, as a fetch brings blocks in."""

    def all_rows(self) -> Rows:
        return np.concatenate([self.rows, np.array(self.more, np.int64)]) if self.more else self.rows


class LeaseBook:
    """Every live lease of a store. Thread-safe.

    Lock order: this lock, then the pool's. Never the other way round.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._leases: set[Lease] = set()

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, rows: Rows, deadline_s: float) -> Lease:
        """Take over pins that the caller made."""
        lease = Lease(rows, deadline_s)
        with self._lock:
            self._leases.add(lease)
        return lease

    def renew(self, lease: Lease, deadline_s: float) -> bool:
        """Push the deadline out; False where the lease is dead already."""
        with self._lock:
            if lease.alive:
                lease.deadline_s = max(lease.deadline_s, deadline_s)
            return lease.alive

    def extend(self, lease: Lease, rows: Sequence[int]) -> None:
        """Hand over one more pin of each row; given straight back if the lease died meanwhile."""
        with self._lock:
            if lease.alive:
                lease.more += rows
                return
            self._pool.unpin(np.array(rows, np.int64))

    def append(self, lease: Lease, row: int) -> bool:
        """Hand over a pin of one more row, after those the lease began with; given back, and False, if it is dead."""
        with self._lock:
            if lease.alive:
                lease.rows = np.append(lease.rows, row)
                return True
            self._pool.unpin(np.array([row], np.int64))
            return False

    def shorten(self, lease: Lease, num_rows: int) -> None:
        """Return the pins of the last `num_rows` rows: a window moves on from its tail."""
        with self._lock:
            if lease.alive and num_rows:
                rows = lease.all_rows()
                lease.rows, lease.more = rows[:-num_rows], []
                self._pool.unpin(rows[-num_rows:])

    def release(self, lease: Lease) -> bool:
        """Return the pins. True if it was alive until now."""
        with self._lock:
            return self._end(lease)

    def expire(self, now_s: float) -> int:
        """End every lease past its deadline; returns how many."""
        with self._lock:
            return sum(self._end(lease) for lease in [x for x in self._leases if x.deadline_s <= now_s])

    def _end(self, lease: Lease) -> bool:
        if not lease.alive:
            return False
        lease.alive = False
        self._leases.discard(lease)
        self._pool.unpin(lease.all_rows())
        return True
