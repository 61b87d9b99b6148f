# SPDX-License-Identifier: Apache-2.0
"""How much to ask of a tier at once."""

from __future__ import annotations

_MARGIN = 4


class Pace:
    """Batches that end well within their deadline: as many bytes as took a quarter of it, by the batch before.

    Large ones are for tiers that are quick, since between two batches a connection stands idle. Used by one thread.
    """

    def __init__(self, least_bytes: int, most_bytes: int, deadline_s: float) -> None:
        self._least_bytes = least_bytes
        self._most_bytes = most_bytes
        self._deadline_s = deadline_s
        self.num_bytes = min(least_bytes, most_bytes)
        """To ask for next."""

    def took(self, num_bytes: int, seconds: float) -> None:
        """A batch of so many bytes, moved by the tier alone, ended."""
        if num_bytes:  # else others had brought it, and it says nothing of the tier
            in_time = num_bytes * self._deadline_s / _MARGIN / max(seconds, 1e-9)
            self.num_bytes = min(self._most_bytes, max(self._least_bytes, int(min(in_time, self._most_bytes))))

    def failed(self) -> None:
        """A batch did not end well: begin small again."""
        self.num_bytes = min(self._least_bytes, self._most_bytes)
