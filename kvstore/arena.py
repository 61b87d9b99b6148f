# SPDX-License-Identifier: Apache-2.0
"""Slots of several sizes in one stretch of host memory that can be pinned, shared and never moves.

The arena is cut into *extents*, each carved into slots of one size. Slot sizes are the parts' bytes rounded up
to pages, so one model fills the arena exactly, and extents move between models as they empty.

Invariants
1. A slot belongs to exactly one extent; extents and free ranges tile the arena.
2. A slot's generation word changes whenever the slot is handed out: who copied from it can tell.
3. Nothing here copies, waits, or knows what a block is. The caller holds a lock.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from bisect import bisect_right, insort
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from kvstore.errors import CapacityError

PAGE_BYTES = 4096
_EXTENT_BYTES = 64 << 20
_PREFAULT_BYTES = 8 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in the mmap module


def slot_stride(num_bytes: int) -> int:
    """Bytes a slot takes: whole pages, so that slots can be pinned and registered on their own."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(slots=True)
class _Extent:
    start: int
    stop: int
    stride: int
    num_free: int = 0

    @property
    def num_slots(self) -> int:
        return (self.stop - self.start) // self.stride


@dataclass(slots=True)
class _SizeClass:
    free: list[int] = field(default_factory=list)
    num_extents: int = 0


class Arena:
    """Page-aligned slots in `capacity_bytes` of memory, addressed by byte offset.

    Memory is anonymous with huge pages where the host grants them: a load touches every byte, and 4 KiB pages
    cost a third of the copy rate on first use. `prefault` populates it from a thread, since first touch runs
    at about 1 GB/s and would be billed to the first saves.
    """

    def __init__(self, capacity_bytes: int, *, prefault: bool = True) -> None:
        if capacity_bytes < PAGE_BYTES:
            raise CapacityError(f"arena of {capacity_bytes} bytes: it needs at least one page of {PAGE_BYTES}")
        self.capacity_bytes = capacity_bytes // PAGE_BYTES * PAGE_BYTES
        self._map = mmap.mmap(-1, self.capacity_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without transparent huge pages
                pass
        self._view = memoryview(self._map)
        self.generation: npt.NDArray[np.uint32] = np.zeros(self.capacity_bytes // PAGE_BYTES, np.uint32)
        self._extents: list[_Extent] = []
        self._ranges: list[tuple[int, int]] = [(0, self.capacity_bytes)]
        self._classes: dict[int, _SizeClass] = {}
        self._extent_bytes = min(_EXTENT_BYTES, max(PAGE_BYTES, self.capacity_bytes // 8))
        self.num_acquired = 0
        self.acquired_bytes = 0
        self._closing = threading.Event()
        self._prefault: threading.Thread | None = None
        if prefault:
            self._prefault = threading.Thread(target=self._populate, name="kvstore-prefault", daemon=True)
            self._prefault.start()

    def acquire(self, num_bytes: int) -> int | None:
        """A slot of at least `num_bytes`, or None where no slot and no room for an extent of its size is left."""
        stride = slot_stride(num_bytes)
        size_class = self._classes.setdefault(stride, _SizeClass())
        if not size_class.free and not self._grow(stride, size_class):
            return None
        slot = size_class.free.pop()
        self._extent_of(slot).num_free -= 1
        self.generation[slot // PAGE_BYTES] += 1
        self.num_acquired += 1
        self.acquired_bytes += stride
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back. Its bytes stay until it is handed out again."""
        extent = self._extent_of(slot)
        extent.num_free += 1
        self._classes[extent.stride].free.append(slot)
        self.num_acquired -= 1
        self.acquired_bytes -= extent.stride

    def view(self, slot: int, num_bytes: int) -> memoryview:
        """Writable bytes of a slot."""
        return self._view[slot : slot + num_bytes]

    def generation_of(self, slot: int) -> int:
        """Changes each time the slot is handed out."""
        return int(self.generation[slot // PAGE_BYTES])

    def same_class(self, one_bytes: int, other_bytes: int) -> bool:
        """Whether freeing a slot of one size serves a request of the other."""
        return slot_stride(one_bytes) == slot_stride(other_bytes)

    def extent_of(self, slot: int) -> range:
        """Offsets of the extent that holds `slot`: what must empty for its memory to change size class."""
        extent = self._extent_of(slot)
        return range(extent.start, extent.stop)

    def below_share(self, num_bytes: int) -> bool:
        """Whether the size class of `num_bytes` holds less of the arena than an even split would give it."""
        stride = slot_stride(num_bytes)
        held = {
            size: sum(extent.stop - extent.start for extent in self._extents if extent.stride == size)
            for size in {extent.stride for extent in self._extents} | {stride}
        }
        return held[stride] + stride <= self.capacity_bytes // len(held)

    def _extent_of(self, slot: int) -> _Extent:
        return self._extents[bisect_right(self._extents, slot, key=attrgetter("start")) - 1]

    def _grow(self, stride: int, size_class: _SizeClass) -> bool:
        """Carve an extent of `stride` slots from a free range, taking back empty extents of others if need be."""
        if not any(stop - start >= stride for start, stop in self._ranges) and not self._reclaim(stride):
            return False
        want = max(stride, self._extent_bytes // stride * stride)
        fitting = [pair for pair in self._ranges if pair[1] - pair[0] >= want]
        start, stop = fitting[0] if fitting else max(self._ranges, key=lambda pair: pair[1] - pair[0])
        size = min(want, (stop - start) // stride * stride)
        self._ranges.remove((start, stop))
        if start + size < stop:
            insort(self._ranges, (start + size, stop))
        extent = _Extent(start, start + size, stride)
        extent.num_free = extent.num_slots
        insort(self._extents, extent, key=attrgetter("start"))
        size_class.num_extents += 1
        # Lowest offsets last: popped first, so a young store touches (and prefaults) memory front to back.
        size_class.free.extend(range(extent.stop - stride, extent.start - stride, -stride))
        return True

    def _reclaim(self, stride: int) -> bool:
        """Return empty extents of other sizes to the free ranges; True if a slot of `stride` fits now."""
        for extent in [e for e in self._extents if e.num_free == e.num_slots and e.stride != stride]:
            owner = self._classes[extent.stride]
            owner.free = [slot for slot in owner.free if not extent.start <= slot < extent.stop]
            owner.num_extents -= 1
            self._extents.remove(extent)
            self._add_range(extent.start, extent.stop)
        return any(stop - start >= stride for start, stop in self._ranges)

    def _add_range(self, start: int, stop: int) -> None:
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self._ranges, (start, stop)]):
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self._ranges = merged

    def _populate(self) -> None:
        """Fault pages in from a thread. MADV_POPULATE_WRITE keeps contents, so it may race with writers.

        Through ctypes, which drops the GIL; mmap.madvise would hold it for the length of the call.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for offset in range(0, self.capacity_bytes, _PREFAULT_BYTES):
            size = min(_PREFAULT_BYTES, self.capacity_bytes - offset)
            if self._closing.is_set():
                return
            if libc.madvise(ctypes.c_void_p(base + offset), ctypes.c_size_t(size), _MADV_POPULATE_WRITE):
                return  # an older kernel: first touch pays instead

    def wait_prefaulted(self, timeout_s: float | None = None) -> bool:
        """Wait until the memory is populated; True when it is."""
        if self._prefault is None:
            return True
        self._prefault.join(timeout_s)
        return not self._prefault.is_alive()

    def check(self) -> list[str]:
        """Broken invariants; empty when healthy."""
        faults: list[str] = []
        spans = sorted([(e.start, e.stop) for e in self._extents] + self._ranges)
        at = 0
        for start, stop in spans:
            if start != at:
                faults.append(f"arena: gap or overlap at {at}–{start}")
            at = stop
        if at != self.capacity_bytes:
            faults.append(f"arena: tiles end at {at}, not {self.capacity_bytes}")
        for stride, size_class in self._classes.items():
            num_free = sum(extent.num_free for extent in self._extents if extent.stride == stride)
            if num_free != len(size_class.free) or len(set(size_class.free)) != len(size_class.free):
                faults.append(f"arena: size class {stride} counts {num_free} free, lists {len(size_class.free)}")
        num_slots = sum(extent.num_slots - extent.num_free for extent in self._extents)
        if num_slots != self.num_acquired:
            faults.append(f"arena: {num_slots} slots are out, {self.num_acquired} counted")
        return faults

    def close(self) -> None:
        """Stop prefaulting. Memory goes when the last view of it does."""
        self._closing.set()
        if self._prefault is not None:
            self._prefault.join()
