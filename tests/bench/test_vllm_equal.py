# SPDX-License-Identifier: Apache-2.0
"""What is said of vLLM's features counts rows that died and controls that are not there."""

from __future__ import annotations

from bench.vllm_equal import summarise


def row(name: str, equal: bool | None, control: bool | None) -> dict[str, object]:
    return {"scenario": name, "equal": equal, "control_differs": control, "error": None, "added_s": None}


def test_rows_that_died_and_controls_that_are_missing_are_counted() -> None:
    found = summarise([row("a", True, True), row("b", None, None), row("c", True, None), row("d", False, False)])
    assert (found["num_rows"], found["num_equal"], found["num_different"], found["num_not_run"]) == (4, 2, 1, 1)
    assert found["not_run"] == "b"
    assert found["controls_missing"] == "b, c"
    assert found["controls_that_did_not_differ"] == "d"
