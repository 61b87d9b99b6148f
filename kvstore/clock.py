# SPDX-License-Identifier: Apache-2.0
"""Time as the store sees it, so that tests can own it."""

from __future__ import annotations

import time
from typing import Protocol

from kvstore.errors import ConfigError

MAX_S = 86_400.0
"""The longest time that a setting may name: what is done with it must not overflow, in no library below."""


def check_seconds(name: str, value: float, *, least: float | None = None) -> None:
    """Raise ConfigError where a setting is no sensible time: above 0, or at least `least` where that is given."""
    if not (value > 0 if least is None else least <= value) or not value <= MAX_S:  # NaN is neither
        span = "above 0" if least is None else f"from {least:g}"
        raise ConfigError(f"{name} is {value:g}: give seconds {span}, up to {MAX_S:g}")


class Clock(Protocol):
    """A monotonic clock in seconds."""

    def now_s(self) -> float: ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()
