# SPDX-License-Identifier: Apache-2.0
"""Counters, gauges and durations, plain and cheap: a dict behind a lock, read as a whole."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore.errors import ConfigError

MAX_SAVED_S = 1e6
"""Of time to first token, at once: more is no time but a mistake."""

BOUNDS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of buckets of durations: a match takes half a millisecond, a load from Redis seconds."""


@dataclass(slots=True)
class Durations:
    """How long something took, each time, in buckets. Not thread-safe.

    Attributes:
        counts: by bucket; the last is for what is longer than every bound.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def copy(self) -> Durations:
        return Durations(list(self.counts), self.total_s)


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
        self._durations: defaultdict[str, Durations] = defaultdict(Durations)

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

    def observe(self, name: str, seconds: float) -> None:
        """Note how long a tier's operation took, failed ones too: `host.lookup`, `redis.read`."""
        with self._lock:
            self._durations[name].add(seconds)

    def durations(self) -> dict[str, Durations]:
        """All that was observed, sorted by name."""
        with self._lock:
            return {name: found.copy() for name, found in sorted(self._durations.items())}

    def get(self, name: str) -> float:
        with self._lock:
            return self._values.get(name, 0)

    def snapshot(self) -> dict[str, float]:
        """All values, sorted by name."""
        with self._lock:
            return dict(sorted(self._values.items()))
