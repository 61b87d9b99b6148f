# SPDX-License-Identifier: Apache-2.0
"""What is made of ratios, and how sure it is said to be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.paired import estimate


def test_the_estimate_passes_over_a_few_disturbed_rounds_and_sees_what_is_in_all_of_them() -> None:
    quiet = [math.log(1.04)] * 37
    centre, low, high = estimate([*quiet, math.log(3.0), math.log(2.0), math.log(0.5)])
    assert (centre, low, high) == pytest.approx((4.0, 4.0, 4.0), abs=0.5)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        noise = rng.normal(math.log(1.02), 0.1, 25) + (rng.random(25) < 0.05) * rng.normal(0, 1, 25)
        _, low, high = estimate(noise.tolist())
        held += low <= 2.0 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_six_values_give_all_of_themselves_and_seven_leave_out_less_than_the_worst() -> None:
    """By the tables of the signed rank test: of 6 the interval of 97 % spans all, of 9 it leaves out 5 at each end."""
    assert estimate([math.log(1 + each / 100) for each in range(6)])[1:] == pytest.approx((0.0, 5.0))
    nine = np.log1p(np.array([0, 10, 20, 30, 40, 50, 60, 70, 80]) / 100)
    means = np.sort([(a + b) / 2 for at, a in enumerate(nine) for b in nine[at:]])
    assert estimate(nine.tolist())[1:] == pytest.approx((100 * math.expm1(means[5]), 100 * math.expm1(means[-6])))


def test_a_single_value_is_all_that_is_known() -> None:
    assert estimate([0.0]) == (0.0, 0.0, 0.0)
