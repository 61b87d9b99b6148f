# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of cold prompts makes of the times it took."""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("torch", reason="the benchmark makes a model")

from bench.vllm_cold import AGAIN, OFF, OFF_AGAIN, OURS, PLAIN, ColdRow, summarise

COSTS = {OURS: 1.01, OFF: 1.0, OFF_AGAIN: 1.0, PLAIN: 1.0, AGAIN: 1.0}


def rows(*, starts: int = 6, slow_engine: float = 1.0, stall: float = 1.0) -> list[ColdRow]:
    """Requests of half a second in one engine of each start, 1 % more with the connector.

    `slow_engine`: what that engine's times are multiplied by in the first start; `stall`: its first request's.
    """
    made = []
    for start, pair, arm in product(range(starts), range(5), COSTS):
        seconds = 0.5 * COSTS[arm]
        if start == 0 and arm not in (PLAIN, AGAIN):
            seconds *= slow_engine
        if start == pair == 0 and arm == OURS:
            seconds *= stall
        made.append(ColdRow(arm=arm, start=start, pair=pair, ttft_s=seconds, seconds=2 * seconds, sidecar_s=0.001))
    return made


def test_what_all_rounds_have_is_what_is_said_and_arms_that_do_not_differ_are_equal() -> None:
    summary = summarise(rows())
    for name in ("zero_reuse", "same_engine"):
        for figure in ("overhead_pct", "overhead_pct_low", "throughput_pct", "throughput_pct_high"):
            assert summary[f"{name}_{figure}"] == pytest.approx(1.0)
    for name in ("no_difference", "same_engine_no_difference", "configured"):
        assert summary[f"{name}_throughput_pct"] == pytest.approx(0.0, abs=1e-9)
    assert (summary["num_starts"], summary["num_pairs"]) == (6, 30)


def test_an_engine_that_is_slow_by_chance_widens_the_interval_between_engines_and_nothing_within_it() -> None:
    summary = summarise(rows(slow_engine=1.05))
    assert summary["zero_reuse_overhead_pct"] == pytest.approx(1.0)
    assert summary["zero_reuse_overhead_pct_high"] == pytest.approx(6.05)
    assert summary["same_engine_overhead_pct_high"] == pytest.approx(1.0)


def test_a_single_stall_moves_nothing() -> None:
    summary = summarise(rows(stall=3.0))
    assert summary["zero_reuse_overhead_pct_high"] == pytest.approx(1.0)
    assert summary["same_engine_overhead_pct_high"] == pytest.approx(1.0)


def test_what_the_sidecar_does_for_a_request_is_told_from_what_it_does_anyway() -> None:
    made = [ColdRow(**{**row, "sidecar_s": 0.004 if row["arm"] == OURS else 0.001}) for row in rows()]  # type: ignore[typeddict-item]
    summary = summarise(made)
    assert summary["sidecar_cpu_ms_a_request"] == pytest.approx(4.0)
    assert summary["sidecar_cpu_ms_idle"] == pytest.approx(1.0)


def test_one_engine_is_compared_with_itself_alone() -> None:
    summary = summarise([row for row in rows() if row["arm"] not in (PLAIN, AGAIN)])
    assert "zero_reuse_overhead_pct" not in summary
    assert summary["same_engine_overhead_pct"] == pytest.approx(1.0)
