# SPDX-License-Identifier: Apache-2.0
"""What is said of vLLM's features counts rows that died and controls that are not there."""

from __future__ import annotations

from typing import Any

import pytest

from bench.vllm_equal import _row, summarise


def row(name: str, equal: bool | None, control: bool | None) -> dict[str, object]:
    return {
        "scenario": name,
        "equal": equal,
        "control_differs": control,
        "error": None,
        "added_s": None,
        "added_ms": {},
    }


def test_rows_that_died_and_controls_that_are_missing_are_counted() -> None:
    found = summarise([row("a", True, True), row("b", None, None), row("c", True, None), row("d", False, False)])
    assert (found["num_rows"], found["num_equal"], found["num_different"], found["num_not_run"]) == (4, 2, 1, 1)
    assert found["not_run"] == "b"
    assert found["controls_missing"] == "b, c"
    assert found["controls_that_did_not_differ"] == "d"
    assert (found["num_controls_missing"], found["added_ms_part_deleted"]) == (2, None)


class Saw:
    """A runner whose scenarios saw what they are told."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._facts = facts

    def run(self, scenario: str) -> dict[str, Any]:
        return self._facts


def test_one_comparison_that_failed_in_any_engine_of_a_scenario_makes_its_row_differ() -> None:
    sound = {"one": {"equal": [True], "hits": 3}, "save": {"there": True}, "both": {"two": {"equal": {"a": True}}}}
    assert _row(Saw(sound), "x")["equal"] is True
    for other in ({"equal": [True, False]}, {"same": False}, {"both": {"two": {"equal": {"a": True, "b": False}}}}):
        assert _row(Saw({**sound, "other": other}), "x")["equal"] is False
    with pytest.raises(ValueError, match="nothing was compared"):
        _row(Saw({"hits": [3]}), "x")


def test_delays_are_those_of_every_engine_and_the_worst_is_over_its_deadline() -> None:
    slow = {"equal": True, "added_s": 1.5, "deadline_s": 1.0, "added": {"part deleted": 1.5, "part damaged": 0.1}}
    quick = {"equal": True, "added_s": 0.1, "deadline_s": 1.0, "added": {"part deleted": 0.1}}
    found = summarise([_row(Saw({"many": one, "few": {"equal": True}}), "x") for one in (slow, quick)])
    assert found["worst_added_delay_vs_deadline"] == 1.5
    assert (found["added_ms_part_deleted"], found["added_ms_part_damaged"]) == (1500, 100)
