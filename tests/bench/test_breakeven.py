# SPDX-License-Identifier: Apache-2.0
"""What the break-even benchmark makes of the times it took, and that it runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="connectors copy torch tensors")

from bench.breakeven import AGAIN, ALWAYS, NEVER, PLAN, Cell, measure, samples, summarise
from bench.paired import estimate


def test_rounds_are_compared_with_themselves_and_the_better_arm_is_the_one_that_went_on() -> None:
    seconds = {
        ALWAYS: {0: 3.0, 1: 3.0, 2: 3.0},
        NEVER: {0: 1.0, 1: 2.0, 2: 1.0, 3: 4.0},
        PLAN: {0: 1.1, 1: 2.2, 2: 1.1, 3: 4.4},
        AGAIN: {3: 4.0},
    }
    cell = Cell(1.0, 128, seconds, NEVER)
    assert cell.better == NEVER
    assert cell.log_ratios(PLAN, NEVER) == pytest.approx([math.log(1.1)] * 4)
    assert cell.log_ratios(AGAIN, NEVER) == [0.0]
    assert cell.mean_pct(PLAN, NEVER) == pytest.approx(10.0)
    close = Cell(1.0, 128, {**seconds, ALWAYS: dict.fromkeys(range(4), 0.5)}, NEVER)
    assert close.better == ALWAYS


def test_what_is_kept_of_the_requests_gives_the_same_estimate() -> None:
    rng = np.random.default_rng(1)
    seconds: dict[str, dict[int, float]] = {NEVER: {}, PLAN: {}, AGAIN: {}}
    rows: list[dict[str, object]] = []
    for at in range(40):
        for arm in (NEVER, PLAN, *([AGAIN] if at >= 3 else [])):
            seconds[arm][at] = float(rng.normal(0.05, 0.005))
            row = {
                "gb_per_s": 1.0,
                "tokens": 128,
                "arm": arm,
                "round": at,
                "reused": 0,
                "equal": (arm, at) != (AGAIN, 9),
            }
            rows.append({**row, "ttft_s": seconds[arm][at]})
    kept = {row["arm"]: row for row in samples(rows)}
    again: dict[str, dict[int, float]] = {}
    for arm, row in kept.items():
        times, first = row["ttft_ms"], row["first_round"]
        assert isinstance(times, list)
        assert isinstance(first, int)
        again[str(arm)] = {at: ms / 1e3 for at, ms in enumerate(times, first)}
    before, after = (Cell(1.0, 128, {**each, ALWAYS: {}}, NEVER) for each in (seconds, again))
    assert estimate(after.log_ratios(PLAN, NEVER)) == pytest.approx(estimate(before.log_ratios(PLAN, NEVER)), abs=0.02)
    assert len(after.log_ratios(AGAIN, NEVER)) == 37
    assert [row["equal"] for row in kept.values()] == [True, True, False]


@pytest.mark.alone
@pytest.mark.slow
def test_a_cell_is_measured_with_a_real_model_and_a_real_server() -> None:
    cells, grid = measure((128,), (5.0,), 0, seed=1)
    table, summary = summarise(cells, grid)
    assert summary["outputs_equal"] is True
    assert [row["better"] for row in table] == [ALWAYS]
    assert all(row["reused"] == 128 for row in grid.rows if row["arm"] in (ALWAYS, AGAIN))
    assert all(row["reused"] == 0 for row in grid.rows if row["arm"] == NEVER)
