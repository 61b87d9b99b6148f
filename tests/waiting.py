# SPDX-License-Identifier: Apache-2.0
"""Waiting for what happens on other threads and in other processes, long enough for a machine that does much else."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(true: Callable[[], bool], limit_s: float = 10.0) -> bool:
    """Whether it came about within the limit."""
    end_s = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


def lasts(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it is so all the time, looked at every twentieth of a second.

    Begun anew, a few times, where it was not so after this process itself had been held up: what others must do in
    time, such as renew something, they may not have been able to do either.
    """
    for _ in range(5):
        begun_s = seen_s = time.monotonic()
        while (holds := true()) and time.monotonic() < begun_s + seconds:
            seen_s = time.monotonic()
            time.sleep(0.05)
        if holds:
            return True
        if time.monotonic() - seen_s < 0.5 or not eventually(true):
            return False
    return False


def wait_until(true: Callable[[], bool], limit_s: float = 10.0) -> None:
    assert eventually(true, limit_s), f"it did not come about within {limit_s} s"
