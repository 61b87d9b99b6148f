# SPDX-License-Identifier: Apache-2.0
"""Counters and gauges, plain and cheap: a dict behind a lock, read as a whole."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping

from kvstore.errors import ConfigError

MAX_SAVED_S = 1e6
"""Of time to first token, at once: more is no time but a mistake."""


def saved_seconds(seconds: float) -> float:
    """`seconds` that a load saved. Raises ConfigError for what is no time."""
    if not 0 <= seconds <= MAX_SAVED_S:
        raise ConfigError(f"seconds saved are {seconds}: give 0 to {MAX_SAVED_S:g}")
    return seconds


class Stats:
    """Named numbers. Names are dotted: the tier or part first, then what was counted, with its unit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._values[name] += amount

    def add_all(self, amounts: Mapping[str, float]) -> None:
        """Add to several counters under one lock."""
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name] = value

    def get(self, name: str) -> float:
        with self._lock:
            return self._values.get(name, 0)

    def snapshot(self) -> dict[str, float]:
        """All values, sorted by name."""
        with self._lock:
            return dict(sorted(self._values.items()))
