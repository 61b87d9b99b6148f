# SPDX-License-Identifier: Apache-2.0
"""Announcements that stay alive while the engine's thread is busy: a step may take longer than a mark lives."""

from __future__ import annotations

import threading

from connectors.base import FailOpen
from kvstore.api import Announcement

_RENEW_S = 1.0
"""Between renewals; a mark lives for 2.5 s."""


class KeptMark:
    """One announcement. `withdraw` is final: a renewal under way is waited for, and no other follows."""

    def __init__(self, mark: Announcement, owner: Announced) -> None:
        self._mark = mark
        self._owner = owner
        self._lock = threading.Lock()
        self._ended = False

    def renew(self) -> None:
        with self._lock:
            if not self._ended:
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
            with self._lock:
                kept = list(self._kept.values())
            for each in kept:
                each.renew()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()
