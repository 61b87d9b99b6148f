# SPDX-License-Identifier: Apache-2.0
"""The benchmark of lanes runs, and its figures are those that are shown."""

from __future__ import annotations

import pytest

from bench import lanes
from bench.asked import figures_of
from kvstore.tiers import redis_lanes


@pytest.mark.alone
@pytest.mark.slow  # some seconds until the choice has settled
def test_four_connections_carry_more_than_one_where_each_carries_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_lanes, "_FIRST_S", 0.0)
    rows, summary = lanes.measure(num_blocks=16, num_loads=12, rounds=5, seed=1)
    assert [row["lanes"] for row in rows][:1] == [4], "32 MiB are worth so many"
    assert set(summary) == set(figures_of("lanes-cpu"))
    assert float(str(summary["lanes_flow_gain"])) > 1.5
