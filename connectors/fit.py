# SPDX-License-Identifier: Apache-2.0
"""What a time consists of, learnt from measured ones: a sum of known terms with unknown costs, none negative."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

_TOO_ALIKE = 1e-5
"""Least eigenvalue of the terms' correlations at which their costs can still be told apart."""
_GAIN = 1e-6


class Fit:
    """Least squares on relative errors, newest first. Terms named first explain what several could.

    Few terms: every subset of them is solved, which is exact where clipping negative costs is not.
    """

    def __init__(self, num_terms: int, *, decay: float) -> None:
        """`decay`: weight of all that was seen before, each time that something is."""
        self._decay = decay
        self._square: npt.NDArray[np.float64] = np.zeros((num_terms, num_terms))
        self._sum: npt.NDArray[np.float64] = np.zeros(num_terms)
        self._subsets = [
            list(chosen) for size in range(1, num_terms + 1) for chosen in combinations(range(num_terms), size)
        ]
        self._costs: list[float] | None = None
        self._seen = False

    def see(self, terms: Sequence[float], seconds: float) -> None:
        """Something with these terms, not all of them 0, took `seconds` > 0."""
        relative = np.array(terms) / seconds
        self._square = self._square * self._decay + np.outer(relative, relative)
        self._sum = self._sum * self._decay + relative
        self._costs, self._seen = None, True

    def predict(self, terms: Sequence[float]) -> float | None:
        """Seconds; None before anything was seen."""
        if self._costs is None:
            if not self._seen:
                return None
            self._costs = self._solve()
        return sum(cost * term for cost, term in zip(self._costs, terms, strict=True))

    def _solve(self) -> list[float]:
        best: npt.NDArray[np.float64] = np.zeros(len(self._sum))
        best_gain = 0.0
        for chosen in self._subsets:
            square, total = self._square[np.ix_(chosen, chosen)], self._sum[chosen]
            scale = np.sqrt(np.diag(square))
            if not scale.all():
                continue
            alike = square / np.outer(scale, scale)
            if np.linalg.eigvalsh(alike)[0] < _TOO_ALIKE:
                continue
            costs = np.linalg.solve(alike, total / scale) / scale
            gain = float(costs @ total)
            if (costs >= 0).all() and gain > best_gain * (1 + _GAIN):
                best, best_gain = np.zeros(len(self._sum)), gain
                best[chosen] = costs
        return [float(cost) for cost in best]
