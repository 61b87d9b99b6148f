# SPDX-License-Identifier: Apache-2.0
"""How many calls run at once that take long: one client's must not take the server from the others."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.errors import CapacityError
from kvstore.service.session import Account


class Turns:
    """Calls of one kind: `most` at once in all, half as many of one tenant. Thread-safe.

    One too many is refused and does not wait: what waits holds a thread that short calls need.
    """

    def __init__(self, kind: str, most: int) -> None:
        self._kind = kind
        self._most = most
        self._lock = threading.Lock()
        self._running: Counter[str | Account] = Counter()

    @contextmanager
    def taken(self, party: str | Account) -> Iterator[None]:
        """While one of the calls of a tenant, or of a session without one, runs. Raises CapacityError."""
        share = max(1, self._most // 2)
        with self._lock:
            if self._running[party] >= share:
                raise CapacityError(f"{share} calls of {self._kind} run already for this client or its tenant: wait")
            if self._running.total() >= self._most:
                raise CapacityError(f"{self._most} calls of {self._kind} run already: try again in a moment")
            self._running[party] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[party] -= 1
                if not self._running[party]:
                    del self._running[party]
