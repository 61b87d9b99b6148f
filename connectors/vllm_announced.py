# SPDX-License-Identifier: Apache-2.0
"""Announcements that stay alive while the engine's thread is busy: a step may take longer than a mark lives."""

from __future__ import annotations

import threading
import time

from connectors.base import FailOpen
from kvstore.api import Announcement

_RENEW_S = 1.0
"""Between two rounds of renewals; a mark lives for 2.5 s."""
_FRESH = 0.8
"""Share of that after which a mark is renewed in the next round, 1.8 s old at most: shorter steps need no renewal."""


class KeptMark:
    """One announcement. `withdraw` is final: a renewal under way is waited for, and no other follows."""

    def __init__(self, mark: Announcement, owner: Announced) -> None:
        self._mark = mark
        self._owner = owner
        self._lock = threading.Lock()
        self._ended = False
        self.told_s = time.monotonic()

    def renew(self) -> None:
        with self._lock:
            if not self._ended:
                self.told_s = time.monotonic()
                self._owner.fail_open.call(self._mark.renew, None)

    def withdraw(self) -> None:
        self._owner.let_go(self)
        with self._lock:
            self._ended = True
            self._owner.fail_open.call(self._mark.withdraw, None)


class Announced:
    """Renews what was announced, from one thread for all, from the first of them on.

    Started anew after each pause, and waited for until it ran, it cost the request that did it 0.5 ms.
    """

    def __init__(self, fail_open: FailOpen, *, every_s: float = _RENEW_S) -> None:
        self.fail_open = fail_open
        self._every_s = every_s
        self._lock = threading.Lock()
        self._kept: dict[int, KeptMark] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self, mark: Announcement) -> KeptMark:
        kept = KeptMark(mark, self)
        with self._lock:
            self._kept[id(kept)] = kept
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._renew, name="kvstore-renew", daemon=True)
                self._thread.start()
        return kept

    def let_go(self, kept: KeptMark) -> None:
        with self._lock:
            self._kept.pop(id(kept), None)

    def _renew(self) -> None:
        while not self._closed.wait(self._every_s):
            due_s = time.monotonic() - _FRESH * self._every_s
            with self._lock:
                kept = [each for each in self._kept.values() if each.told_s <= due_s]
            for each in kept:
                each.renew()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()
