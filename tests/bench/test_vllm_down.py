# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of a sidecar that is away makes of the times it took."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

pytest.importorskip("torch", reason="the benchmark makes a model")

from bench.asked import figures_of
from bench.vllm_cold import OFF, OFF_AGAIN, OURS, PLAIN
from bench.vllm_down import ENDED, HANGS, summarise


def rows(**ttft_s: float) -> list[dict[str, Any]]:
    """Requests of half a second, but where an arm's are told."""
    names = {OURS: "ours", OFF: "off", OFF_AGAIN: "off", PLAIN: "plain"}
    return [
        {
            "arm": arm,
            "start": start,
            "pair": pair,
            "ttft_s": ttft_s.get(f"{names[arm]}_{how}", 0.5) + (0.4 if (how, arm, pair) == (HANGS, OURS, 3) else 0),
            "seconds": 1.0,
            "sidecar_s": 0.0,
            "faults": 0,
            "sidecar": how,
        }
        for start, how, pair, arm in product(range(2), (ENDED, HANGS), range(10), names)
        if how == ENDED or arm in (OURS, OFF)
    ]


def test_a_sidecar_that_ended_is_compared_with_the_connector_taken_off_and_with_an_engine_without() -> None:
    summary = summarise(rows(ours_ended=0.51, plain_ended=0.5, off_ended=0.5))
    assert summary["store_down_overhead_pct"] == pytest.approx(2.0)
    assert summary["store_down_vs_none_overhead_pct_high"] == pytest.approx(2.0)
    assert summary["store_down_no_difference_overhead_pct"] == pytest.approx(0.0, abs=1e-9)
    assert (summary["num_starts"], summary["num_pairs"]) == (2, 20)
    assert set(figures_of("vllm-down-cpu")) <= set(summary)


def test_one_that_hangs_is_told_by_the_request_that_waited_for_it() -> None:
    summary = summarise(rows(ours_hangs=0.505))
    assert summary["store_down_overhead_pct"] == pytest.approx(0.0, abs=1e-9)
    assert summary["hanging_worst_added_ms"] == pytest.approx(405)
    assert summary["hanging_median_added_ms"] == pytest.approx(5)
    assert summary["hanging_worst_vs_deadline"] == pytest.approx(0.81)
