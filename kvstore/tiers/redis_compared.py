# SPDX-License-Identifier: Apache-2.0
"""Whether calls are quicker with a codec than without, or with more lanes, by what they took: for sure, or not.

What is said of encoded calls here holds of calls with the number of lanes that is on trial.

By ranks (Kendall's tau between the share of a call that was encoded and what a byte of it took, with the correction for
ties in shares): a call that stalled counts as one slow call, however long it stalled, and nothing is assumed of how
times scatter. Where calls are wholly encoded or not at all this is the test of Mann and Whitney.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque

NUM_CALLS = 256
"""Of which one should be able to tell: 13 % of calls that scatter by 30 %."""
_LEAST_CALLS = 10
_LEAST_OF_EACH = 4
"""Encoded ones, and others: from a single one, the quickest of 24 by luck, would follow 1.7 standard deviations."""
LEAST_WRITES = 24
"""Before a comparison ends because it leads nowhere."""
_FORGIVEN, _EXPECTED = 1.0, 1.5
"""Standard deviations by which encoded calls may look slower after few writes, and must look quicker after all."""
SURE = 2.5
"""Standard deviations: five calls of which each was quicker than each of five others reach it."""


class Compared:
    """The last `NUM_CALLS` calls. Not thread-safe."""

    def __init__(self) -> None:
        self._calls: deque[tuple[float, float]] = deque()
        self._score = 0

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, share: float, byte_s: float) -> None:
        """A call of which this share was encoded took so long for each byte of the parts."""
        if len(self._calls) == NUM_CALLS:
            self._score -= self._against(*self._calls.popleft())
        self._score += self._against(share, byte_s)
        self._calls.append((share, byte_s))

    def clear(self) -> None:
        self._calls.clear()
        self._score = 0

    @property
    def slower(self) -> float:
        """By how many standard deviations encoded calls are slower than by chance; negative where they are quicker.

        0 while there are too few calls of either kind, or all take as long.
        """
        count = len(self._calls)
        shares = Counter(share for share, _ in self._calls)
        num_encoded = sum(same for share, same in shares.items() if share >= 0.5)
        if count < _LEAST_CALLS or min(num_encoded, count - num_encoded) < _LEAST_OF_EACH:
            return 0.0
        variance = (_spread(count) - sum(map(_spread, shares.values()))) / 18
        return float(self._score / variance**0.5)

    @property
    def extra_s(self) -> float:
        """How much longer a byte of mostly encoded calls takes than one of the others, by medians; 0 without both."""
        encoded = [byte_s for share, byte_s in self._calls if share >= 0.5]
        others = [byte_s for share, byte_s in self._calls if share < 0.5]
        return statistics.median(encoded) - statistics.median(others) if encoded and others else 0.0

    def _against(self, share: float, byte_s: float) -> int:
        """What a call adds to the score beside those that are kept."""
        score = 0
        for other_share, other_s in self._calls:
            if share != other_share and byte_s != other_s:
                score += 1 if (share > other_share) is (byte_s > other_s) else -1
        return score


def leads_nowhere(num_writes: int, slower: float) -> bool:
    """Whether so many writes would have shown by now that encoded calls are quicker, were they so by much."""
    allowed = _FORGIVEN - (_FORGIVEN + _EXPECTED) * num_writes / NUM_CALLS
    return num_writes >= NUM_CALLS or (num_writes >= LEAST_WRITES and slower > allowed)


def _spread(count: int) -> int:
    return count * (count - 1) * (2 * count + 5)
