# SPDX-License-Identifier: Apache-2.0
"""Waiting for what happens on other threads and in other processes, long enough for a machine that does much else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


class Timed:
    """How long something took."""

    def __init__(self) -> None:
        self.took_s = 0.0
        self.held_up_s = 0.0
        """Of that, by how much a thread that does nothing but wait came late: this process was held up for so long."""

    @property
    def awake_s(self) -> float:
        return self.took_s - self.held_up_s


@contextmanager
def timed() -> Iterator[Timed]:
    timed, over = Timed(), threading.Event()

    def watch() -> None:
        ended = False
        while not ended:
            due_s = time.monotonic() + 0.02
            ended = over.wait(0.02)
            timed.held_up_s += max(0.0, time.monotonic() - due_s)

    thread = threading.Thread(target=watch)
    thread.start()
    began_s = time.monotonic()
    try:
        yield timed
    finally:
        timed.took_s = time.monotonic() - began_s
        over.set()
        thread.join()


def wait_until(true: Callable[[], bool], limit_s: float = 10.0) -> None:
    assert eventually(true, limit_s), f"it did not come about within {limit_s} s"
