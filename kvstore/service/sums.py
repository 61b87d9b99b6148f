# SPDX-License-Identifier: Apache-2.0
"""Checksums of parts that went through this server before, so that each is taken once.

A part that was uploaded keeps the checksum its writer took: whoever reads it later notices what happened to it in
between, in this server's memory too.
"""

from __future__ import annotations

from kvstore.arena import Arena

_MAX_SUMS = 1 << 20


class Sums:
    """xxh3 of what lies in slots. Thread-safe.

    Only for slots that are pinned, or open in a save, by whoever asks or tells: their generation stands still.
    """

    def __init__(self, arena: Arena, *, max_sums: int = _MAX_SUMS) -> None:
        self._arena = arena
        self._max_sums = max_sums
        self._known: dict[int, tuple[int, int]] = {}

    def of(self, slot: int) -> int | None:
        """The checksum of the part that lies there now; None where it was not told."""
        generation, checksum = self._known.get(slot, (-1, 0))
        return checksum if generation == self._arena.generation_of(slot) else None

    def tell(self, slot: int, checksum: int) -> None:
        if len(self._known) >= self._max_sums:
            self._known.clear()  # simpler than to find the stale ones, and a checksum is soon taken again
        self._known[slot] = (self._arena.generation_of(slot), checksum)
