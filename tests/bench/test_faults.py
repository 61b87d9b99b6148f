# SPDX-License-Identifier: Apache-2.0
"""What `bench faults` makes of its times."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.host_hits import greatest_change_pct


@pytest.mark.parametrize(("ratios", "percent"), [((0.9, 1.04), 10), ((0.98, 0.99), 2), ((1.0, 1.07), 7), ((1, 1), 0)])
def test_the_greatest_change_counts_either_way(ratios: Sequence[float], percent: float) -> None:
    assert greatest_change_pct(ratios) == pytest.approx(percent)
