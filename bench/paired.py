# SPDX-License-Identifier: Apache-2.0
"""How much two arms that took turns differ, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """By how many per cent ratios differ from 1: a centre, and its 95 % interval."""

    pct: float
    low_pct: float
    high_pct: float


def estimate(log_ratios: Sequence[float]) -> Estimate:
    """Of independent ratios, given as logarithms.

    Hodges and Lehmann, "Estimates of Location Based on Rank Tests" (1963): the median of the means of all pairs, each
    value with itself included; the interval leaves out at each end as many of these as the signed rank test would, by
    its exact distribution. Fewer than six values cannot say anything with 95 %: then it spans them all.
    """
    values, num = np.array(log_ratios), len(log_ratios)
    first, second = np.triu_indices(num)
    means = np.sort((values[first] + values[second]) / 2)
    skip = _left_out(num)
    found = np.median(means), means[skip], means[len(means) - 1 - skip]
    return Estimate(*(100 * math.expm1(value) for value in found))


def _left_out(num: int) -> int:
    """At each end: one less than the sums of ranks 1 … num, each there or not by a coin, that only 2.5 % are up to."""
    chances = np.ones(1)  # of each sum
    for rank in range(1, num + 1):
        longer = np.zeros(len(chances) + rank)
        longer[: len(chances)] += chances / 2
        longer[rank:] += chances / 2
        chances = longer
    return max(0, int(np.searchsorted(np.cumsum(chances), 0.025, side="right")) - 1)
