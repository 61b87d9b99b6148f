# SPDX-License-Identifier: Apache-2.0
"""What resets of a vLLM engine's caches leave to do: vLLM empties them when weights have changed under the same name.

Invariants
1. Under a root that was not cleared since the last reset nothing is matched, announced or saved: what lies there may be
   of the weights before, whoever saved it. One that comes into use later is cleared first.
2. A clear that began before the last reset, or before workers have carried that out, does not count.
3. A clear that failed is owed, and tried again until it has not.

An epoch in the identity instead would need no clears. Counted per engine, it names other weights in one that was reset
less often, or was restarted; drawn by chance, no two engines share anything after their first reset, though all of a
fleet got the same weights, or only wanted caches empty.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from connectors.base import FailOpen
from kvstore.api import Store
from kvstore.block import Chain, Root, RootId
from kvstore.errors import AccessDenied


class Resets:
    """See the module. For the scheduler's thread; clears run on one of their own, for they may take seconds.

    `num_reports`: reports of workers that a reset waits for; 0 where nothing of theirs can outlast a step.
    """

    def __init__(self, store: Store, *, num_reports: int = 0, now_s: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._num_reports = num_reports
        self._num_awaited = 0
        self._cleared: set[RootId] | None = None
        """Since the last reset; None: there was none."""
        self._owed: dict[RootId, Root] = {}
        self._wanted: RootId | None = None
        self._under_way: tuple[Root, Future[bool]] | None = None
        # Not the scheduler's: that a lower tier cannot be cleared is no reason to leave all of the store alone.
        self._fail_open = FailOpen(now_s=now_s)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvstore-clear")

    def begin(self, roots: Iterable[Root], *, is_new: bool) -> bool:
        """Clear `roots`, which were used; True where the store did. `is_new`: no order is to tell of an earlier one."""
        self._cleared, self._under_way = set(), None
        self._owed |= {root.id: root for root in roots}
        if is_new:
            self._num_awaited += self._num_reports
        for root in list(self._owed.values()):
            if not self._clear(root):
                return False  # a store that is away is waited for once
            if not self._num_awaited:
                self._count(root)
        return True

    def carried_out(self, num_reports: int) -> None:
        """So many workers have: nothing of before is saved by them any more."""
        if self._num_awaited and num_reports:
            self._num_awaited = max(0, self._num_awaited - num_reports)
            self.go_on()

    def allows(self, root: Root) -> bool:
        """Whether what lies under `root` can only be of the weights as they are; if not, it will be."""
        if self._cleared is None or (not self._num_awaited and root.id in self._cleared):
            return True
        self._owed.setdefault(root.id, root)
        self._wanted = root.id
        self.go_on()
        return not self._num_awaited and root.id in self._cleared

    def go_on(self) -> None:
        """Take in a clear that has ended, and begin one that is owed."""
        if self._under_way is not None:
            root, done = self._under_way
            if not done.done():
                return
            self._under_way = None
            del self._owed[root.id]
            if done.result():
                self._count(root)
            else:
                self._owed[root.id] = root  # after others
        if self._owed and not self._num_awaited and not self._fail_open.resting:
            wanted = self._owed.get(self._wanted) if self._wanted is not None else None
            root = wanted or next(iter(self._owed.values()))
            self._wanted = None
            self._under_way = root, self._pool.submit(self._clear, root)

    def _count(self, root: Root) -> None:
        if self._cleared is not None:
            self._cleared.add(root.id)
            self._owed.pop(root.id, None)

    def _clear(self, root: Root) -> bool:
        def clear() -> bool:
            try:
                self._store.touch(Chain(root), 0)  # a server clears for its clients what they have shown, not named
                self._store.clear(root.id)
            except AccessDenied:
                pass  # what it may not use, this engine cannot find either
            return True

        return self._fail_open.call(clear, False)

    def close(self) -> None:
        """Begin no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
