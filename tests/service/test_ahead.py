# SPDX-License-Identifier: Apache-2.0
"""Items made ahead of whoever takes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvstore.service.ahead import ahead
from tests.waiting import wait_until


def test_items_come_in_order_and_to_the_end() -> None:
    assert list(ahead(iter(range(1000)), 3)) == list(range(1000))


def test_no_more_are_made_than_asked_for() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    taken = ahead(items(), 3)
    assert next(taken) == 0
    wait_until(lambda: len(made) == 4)
    assert next(taken) == 1
    wait_until(lambda: len(made) == 5)
    assert made == [0, 1, 2, 3, 4], "one taken makes room for one"


def test_an_error_comes_after_what_was_made_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("three")

    taken = ahead(items(), 3)
    assert [next(taken), next(taken)] == [1, 2]
    with pytest.raises(KeyError, match="three"):
        next(taken)


def test_who_stops_early_finds_the_source_closed_and_no_thread_left() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    taken = ahead(items(), 2)
    next(taken)
    taken.close()  # type: ignore[attr-defined]
    assert closed.is_set()
    assert "kvstore-ahead" not in [thread.name for thread in threading.enumerate()]
