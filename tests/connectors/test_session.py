# SPDX-License-Identifier: Apache-2.0
"""Announcements of an engine whose thread is busy computing what it announced."""

from __future__ import annotations

import threading
import time

import pytest

from connectors.base import FailOpen
from connectors.session_announcement import KeptAnnouncement
from connectors.vllm_announced import Announced
from kvstore.errors import ServiceUnavailable
from tests.waiting import wait_until


class Mark:
    """Counts what it is told; raises on renewal where `failing`."""

    def __init__(self, *, failing: bool = False) -> None:
        self.told: list[str] = []
        self.failing = failing

    def renew(self) -> None:
        self.told.append("renew")
        if self.failing:
            raise ServiceUnavailable("away")

    def withdraw(self) -> None:
        self.told.append("withdraw")


def test_an_announcement_is_renewed_until_it_is_withdrawn_and_never_after() -> None:
    mark = Mark()
    kept = KeptAnnouncement(mark, FailOpen(), 60.0, every_s=0.001)
    wait_until(lambda: mark.told.count("renew") >= 3)
    kept.withdraw()
    assert mark.told[-1] == "withdraw"
    assert mark.told.count("withdraw") == 1
    assert "kvstore-announce" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(("predicted_s", "threads"), [(0.1, 0), (0.3, 1), (None, 1)])
def test_a_short_pass_costs_no_thread(predicted_s: float | None, threads: int) -> None:
    kept = KeptAnnouncement(Mark(), FailOpen(), predicted_s, every_s=0.2)
    assert [thread.name for thread in threading.enumerate()].count("kvstore-announce") == threads
    kept.withdraw()


def test_a_renewal_that_fails_is_a_failure_of_the_store_and_of_nothing_else() -> None:
    mark, fail_open = Mark(failing=True), FailOpen(backoff_s=0.0)
    kept = KeptAnnouncement(mark, fail_open, None, every_s=0.001)
    wait_until(lambda: fail_open.num_failures >= 2)
    kept.withdraw()
    assert mark.told[-1] == "withdraw"


def test_an_announcement_is_withdrawn_while_the_store_is_left_alone_too() -> None:
    """Others would wait for what nobody computes any more until the mark lapses."""
    mark, fail_open = Mark(failing=True), FailOpen(backoff_s=60.0)
    fail_open.call(mark.renew, None)
    assert fail_open.resting
    KeptAnnouncement(mark, fail_open, 0.0).withdraw()
    assert mark.told[-1] == "withdraw"


def test_announcements_of_a_scheduler_are_renewed_by_one_thread_until_each_is_withdrawn() -> None:
    marks = [Mark(), Mark()]
    announced = Announced(FailOpen(), every_s=0.001)
    kept = [announced.keep(mark) for mark in marks]
    wait_until(lambda: all(mark.told.count("renew") >= 2 for mark in marks))
    kept[0].withdraw()
    before = marks[1].told.count("renew")
    wait_until(lambda: marks[1].told.count("renew") > before + 2)
    assert marks[0].told[-1] == "withdraw"
    kept[1].withdraw()
    announced.close()
    assert len(marks[1].told) == 1 + marks[1].told.count("renew")


def test_an_announcement_is_not_renewed_while_it_is_fresh_and_never_grows_old() -> None:
    every_s = 0.05
    announced = Announced(FailOpen(), every_s=every_s)
    first = announced.keep(Mark())  # from now on there are rounds
    ages = []
    for at in range(8):
        threading.Event().wait(every_s * at / 8)  # begin at another moment of a round
        began_s = time.monotonic()
        kept = announced.keep(mark := Mark())
        wait_until(lambda mark=mark: "renew" in mark.told)  # type: ignore[misc]
        ages.append(kept.told_s - began_s)
        kept.withdraw()
    first.withdraw()
    announced.close()
    assert min(ages) >= 0.8 * every_s - 0.001
    assert sorted(ages)[len(ages) // 2] < 3 * every_s, "in the next round, or in one more where the machine is busy"
