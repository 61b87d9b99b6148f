# SPDX-License-Identifier: Apache-2.0
"""The demo says what a handful of requests allow to say, in 80 columns."""

from __future__ import annotations

import pytest

from bench import demo
from bench.report import TtftRow
from bench.ttft import ZERO_ARMS

STEADY = {
    "recompute": [(2.0, 2.1), (10.0, 10.4), (12.0, 12.4)],
    "store down": [(2.0, 2.1), (10.2, 10.3), (12.1, 12.9)],
    "redis": [(2.0, 0.3), (2.0, 2.1), (2.4, 2.5)],
    "host": [(2.0, 0.3), (1.0, 11.0), (1.2, 1.3)],
    "device": [(2.0, 0.3), (1.0, 1.1), (1.2, 1.3)],
    "device+host": [(2.0, 0.3), (1.0, 1.1), (1.2, 1.3)],
    "device, unlimited": [(2.0, 0.3), (0.5, 3.9), (0.6, 0.7)],
}


def rows_of(times_s: dict[str, list[tuple[float, float]]]) -> list[TtftRow]:
    return [
        TtftRow(arm=arm, turn=turn, user=user, ttft_s=ttft_s, prompt_tokens=1, hit_tokens={}, bytes_moved=0, equal=True)
        for arm, turns in times_s.items()
        for turn, users in enumerate(turns, start=1)
        for user, ttft_s in enumerate(users)
    ]


def test_one_request_that_the_machine_held_up_changes_no_verdict() -> None:
    assert demo.verdict(rows_of(STEADY)) == (
        "On this machine: from host memory it paid from turn 2 on,\nfrom Redis it paid from turn 2 on."
    )


@pytest.mark.parametrize(
    ("redis", "says"),
    [
        ([(2.0, 2.0), (9.9, 9.9), (2.0, 2.0)], "it paid from turn 3 on"),
        ([(2.0, 2.0), (2.0, 2.0), (11.9, 11.9)], "there was no difference beyond noise"),
        ([(2.0, 2.0), (2.0, 2.0), (19.0, 19.0)], "it did not pay"),
    ],
)
def test_it_pays_from_the_turn_on_after_which_it_always_did(redis: list[tuple[float, float]], says: str) -> None:
    assert demo.verdict(rows_of({**STEADY, "redis": redis})).endswith(f"from Redis {says}.")


def test_what_two_arms_that_do_the_same_differ_by_is_noise() -> None:
    unsteady = {**STEADY, "store down": [(2.0, 2.0), (70.0, 71.0), (12.0, 12.0)]}
    assert demo.noise_of(rows_of(STEADY)) == 1.1
    assert demo.noise_of(rows_of(unsteady)) == pytest.approx(7)
    assert "from Redis there was no difference beyond noise" in demo.verdict(rows_of(unsteady))


def test_all_that_is_said_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    long = {arm: [(10 * low, 10 * high) for low, high in turns] for arm, turns in STEADY.items()}
    demo.show(rows_of(long))
    zero = rows_of({f"zero reuse: {arm}": [(5.0, 5.1)] for arm in ZERO_ARMS})
    for line in demo.in_words([*rows_of(long), *zero]):
        print(line)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert any("20.0 times sooner" in line for line in lines)
    assert max(map(len, lines)) <= 80, max(lines, key=len)
