# SPDX-License-Identifier: Apache-2.0
"""What a time consists of, learnt from measured ones: a sum of known terms with unknown costs, none negative."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import acos, cos, pi, sqrt

_TOO_ALIKE = 1e-5
"""Least eigenvalue of the terms' correlations at which their costs can still be told apart."""
_GAIN = 1e-6
_MOST_TERMS = 3


class Fit:
    """Least squares on relative errors, newest first. Terms named first explain what several could.

    Few terms: every subset of them is solved, which is exact where clipping negative costs is not. In plain numbers: a
    plan asks between a request's arrival and its first step, where numpy took four times as long.
    """

    def __init__(self, num_terms: int, *, decay: float) -> None:
        """At most three terms. `decay`: weight of all that was seen before, each time that something is."""
        if num_terms > _MOST_TERMS:
            raise ValueError(f"{num_terms} terms: at most {_MOST_TERMS} are solved for")
        self._decay = decay
        self._num_terms = num_terms
        self._square = [[0.0] * num_terms for _ in range(num_terms)]
        self._sum = [0.0] * num_terms
        self._subsets = [chosen for size in range(1, num_terms + 1) for chosen in combinations(range(num_terms), size)]
        self._costs: list[float] | None = None
        self._seen = False

    def see(self, terms: Sequence[float], seconds: float) -> None:
        """Something with these terms, not all of them 0, took `seconds` > 0."""
        relative = [float(term) / seconds for term in terms]
        for row, one in zip(self._square, relative, strict=True):
            row[:] = [was * self._decay + one * other for was, other in zip(row, relative, strict=True)]
        self._sum = [was * self._decay + one for was, one in zip(self._sum, relative, strict=True)]
        self._costs, self._seen = None, True

    def predict(self, terms: Sequence[float]) -> float | None:
        """Seconds; None before anything was seen."""
        if self._costs is None:
            if not self._seen:
                return None
            self._costs = self._solve()
        return sum(cost * term for cost, term in zip(self._costs, terms, strict=True))

    def _solve(self) -> list[float]:
        best, best_gain = [0.0] * self._num_terms, 0.0
        for chosen in self._subsets:
            scale = [sqrt(self._square[at][at]) for at in chosen]
            if not all(scale):
                continue
            sides = list(zip(chosen, scale, strict=True))
            alike = [[self._square[at][other] / one / two for other, two in sides] for at, one in sides]
            if least_eigenvalue(alike) < _TOO_ALIKE:
                continue
            wanted = [self._sum[at] / one for at, one in sides]
            costs = [cost / one for cost, one in zip(_solved(alike, wanted), scale, strict=True)]
            gain = sum(cost * self._sum[at] for at, cost in zip(chosen, costs, strict=True))
            if min(costs) >= 0 and gain > best_gain * (1 + _GAIN):
                best, best_gain = [0.0] * self._num_terms, gain
                for at, cost in zip(chosen, costs, strict=True):
                    best[at] = cost
        return best


def least_eigenvalue(matrix: Sequence[Sequence[float]]) -> float:
    """Of a symmetric matrix of up to three rows with a diagonal of ones."""
    if len(matrix) == 1:
        return 1.0
    if len(matrix) == 2:
        return 1.0 - abs(matrix[0][1])
    a, b, c = matrix[0][1], matrix[0][2], matrix[1][2]
    spread = sqrt((a * a + b * b + c * c) / 3)
    if not spread:
        return 1.0
    turn = acos(min(1.0, max(-1.0, a * b * c / spread**3))) / 3
    return 1.0 + 2 * spread * cos(turn + 2 * pi / 3)


def _solved(matrix: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """x of matrix · x = wanted, by Gauss: these matrices are positive definite, and need no other order."""
    rows = [[*row, one] for row, one in zip(matrix, wanted, strict=True)]
    for at, row in enumerate(rows):
        for lower in rows[at + 1 :]:
            share = lower[at] / row[at]
            lower[:] = [value - share * other for value, other in zip(lower, row, strict=True)]
    found = [0.0] * len(rows)
    for at in reversed(range(len(rows))):
        row = rows[at]
        found[at] = (row[-1] - sum(row[k] * found[k] for k in range(at + 1, len(rows)))) / row[at]
    return found
