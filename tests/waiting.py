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


def wait_until(true: Callable[[], bool], limit_s: float = 10.0) -> None:
    assert eventually(true, limit_s), f"it did not come about within {limit_s} s"
