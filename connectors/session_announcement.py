# SPDX-License-Identifier: Apache-2.0
"""A session's announcement, renewed from beside the thread that computes, and withdrawn whatever the store is like."""

from __future__ import annotations

import threading

from connectors.base import FailOpen
from kvstore.api import Announcement

_RENEW_S = 1.0
"""Between renewals of an announcement; a mark lives for 2.5 s."""


class KeptAnnouncement:
    """An announcement that stays alive while a forward pass keeps the engine's thread busy."""

    def __init__(
        self, mark: Announcement, fail_open: FailOpen, predicted_s: float | None, *, every_s: float = _RENEW_S
    ) -> None:
        """`predicted_s`: what the pass will take; None where nobody knows."""
        self._every_s = every_s
        self._mark = mark
        self._fail_open = fail_open
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if predicted_s is None or predicted_s > every_s:
            self._thread = threading.Thread(target=self._renew, name="kvstore-announce", daemon=True)
            self._thread.start()

    def _renew(self) -> None:
        while not self._done.wait(self._every_s):
            self._fail_open.call(self._mark.renew, None)

    def withdraw(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()  # a renewal after this would announce again
        self._fail_open.let_go(self._mark.withdraw)
