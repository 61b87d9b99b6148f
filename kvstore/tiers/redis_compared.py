# SPDX-License-Identifier: Apache-2.0
"""Whether calls are quicker with a codec than without, by what they took: for sure, or not.

By ranks (Kendall's tau between the share of a call that was encoded and what a byte of it took, with the correction for
ties in shares): a call that stalled counts as one slow call, however long it stalled, and nothing is assumed of how
times scatter. Where calls are wholly encoded or not at all this is the test of Mann and Whitney.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from itertools import combinations

NUM_CALLS = 24
"""Of which one should be able to tell."""
LEAST_CALLS = 10
_KEPT = 4 * NUM_CALLS
"""Once a codec is in use few go without it."""
SURE = 2.5
"""Standard deviations: five calls of which each was quicker than each of five others reach it."""


class Compared:
    """The last few calls. Not thread-safe."""

    def __init__(self) -> None:
        self._calls: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, share: float, byte_s: float) -> None:
        """A call of which this share was encoded took so long for each byte of the parts."""
        self._calls.append((share, byte_s))

    def clear(self) -> None:
        self._calls.clear()

    @property
    def slower(self) -> float:
        """By how many standard deviations encoded calls are slower than by chance; negative where they are quicker.

        0 while there are too few calls, or all alike.
        """
        calls = list(self._calls)
        count = len(calls)
        ties = sum(_spread(same) for same in Counter(share for share, _ in calls).values())
        variance = (_spread(count) - ties) / 18
        if count < LEAST_CALLS or variance <= 0:
            return 0.0
        score = sum(_sign(b[0] - a[0]) * _sign(b[1] - a[1]) for a, b in combinations(calls, 2))
        return float(score / variance**0.5)

    @property
    def extra_s(self) -> float:
        """How much longer a byte of mostly encoded calls takes than one of the others, by medians; 0 without both."""
        encoded = [byte_s for share, byte_s in self._calls if share > 0.5]
        others = [byte_s for share, byte_s in self._calls if share <= 0.5]
        return statistics.median(encoded) - statistics.median(others) if encoded and others else 0.0


def _spread(count: int) -> int:
    return count * (count - 1) * (2 * count + 5)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
