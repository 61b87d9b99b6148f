# SPDX-License-Identifier: Apache-2.0
"""What `bench faults` makes of its times."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.host_hits import greatest_change_pct, measure_host_hits


@pytest.mark.parametrize(("ratios", "percent"), [((0.9, 1.04), 10), ((0.98, 0.99), 2), ((1.0, 1.07), 7), ((1, 1), 0)])
def test_the_greatest_change_counts_either_way(ratios: Sequence[float], percent: float) -> None:
    assert greatest_change_pct(ratios) == pytest.approx(percent)


@pytest.mark.slow
def test_host_hits_are_measured_in_every_state_and_where_nothing_changes() -> None:
    figures = measure_host_hits(1)
    states = ("slow", "slow_noticed", "stopped", "stopped_noticed")
    changes = [1 + figures[f"host_hit_{state}_pct"] / 100 for state in states]
    assert figures["host_hit_unaffected_pct"] == pytest.approx(greatest_change_pct(changes))
    assert {"host_hit_null_pct", "host_hit_null_noticed_pct", "host_hit_over_no_redis_pct"} < figures.keys()
    assert figures["host_hit_ms"] > 0
