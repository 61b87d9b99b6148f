# SPDX-License-Identifier: Apache-2.0
"""Private memory of a client that maps no arena: where bytes from a server land, and wait to be sent to one.

Kept and reused: the first touch of fresh memory runs at about 1 GB/s, slower than the network. Bounded: whoever gets
less than asked for works in a window, or leaves the rest.
"""

from __future__ import annotations

import threading

from kvstore.memory import PAGE_BYTES, Stretch

_SLAB_BYTES = 8 << 20
"""Blocks up to this size share slabs of it, so that memory passes from one model's loads to another's."""


class Buffers:
    """Up to `budget_bytes` of page-aligned memory. Thread-safe."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._idle: list[Stretch] = []
        self._total_bytes = 0

    @property
    def total_bytes(self) -> int:
        """What is mapped, idle memory included."""
        return self._total_bytes

    def rent(self, num_blocks: int, block_bytes: int) -> Rented:
        """Memory for up to `num_blocks` blocks, for as many as there is room: maybe for none."""
        stride = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
        per_slab = max(1, _SLAB_BYTES // stride)
        slab_bytes = max(_SLAB_BYTES, stride)
        slabs: list[Stretch] = []
        with self._lock:
            while len(slabs) * per_slab < num_blocks and (slab := self._take(slab_bytes)) is not None:
                slabs.append(slab)
        return Rented(self, slabs, min(num_blocks, len(slabs) * per_slab), per_slab, stride)

    def _take(self, num_bytes: int) -> Stretch | None:
        # The one given back last is the likeliest to be in the processor's cache, and is surely populated.
        for at in range(len(self._idle) - 1, -1, -1):
            if self._idle[at].num_bytes == num_bytes:
                return self._idle.pop(at)
        while self._idle and self._total_bytes + num_bytes > self._budget_bytes:
            dropped = self._idle.pop(0)
            self._total_bytes -= dropped.num_bytes
            dropped.close()
        if self._total_bytes + num_bytes > self._budget_bytes:
            return None
        try:
            slab = Stretch(num_bytes)
        except OSError:  # the host has none: as if the budget had
            return None
        self._total_bytes += num_bytes
        return slab

    def give_back(self, slabs: list[Stretch]) -> None:
        with self._lock:
            self._idle += slabs

    def close(self) -> None:
        """Drop what is idle. Memory goes with the last view of it."""
        with self._lock:
            for slab in self._idle:
                slab.close()
                self._total_bytes -= slab.num_bytes
            self._idle.clear()


class Rented:
    """Places for `num_blocks` blocks, each page-aligned, until `give_back`."""

    def __init__(self, owner: Buffers, slabs: list[Stretch], num_blocks: int, per_slab: int, stride: int) -> None:
        self.num_blocks = num_blocks
        self._owner = owner
        self._slabs = slabs
        self._per_slab = per_slab
        self._stride = stride

    def view(self, place: int, num_bytes: int) -> memoryview:
        """The first bytes of a place."""
        slab, at = divmod(place, self._per_slab)
        return self._slabs[slab].view()[at * self._stride : at * self._stride + num_bytes]

    def give_back(self) -> None:
        """For others from now on. Idempotent."""
        slabs, self._slabs = self._slabs, []
        if slabs:
            self._owner.give_back(slabs)


def cut(view: memoryview, sizes: list[int]) -> tuple[memoryview, ...]:
    """Consecutive pieces of `view`."""
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return tuple(view[end - size : end] for end, size in zip(ends, sizes, strict=True))
