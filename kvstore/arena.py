# SPDX-License-Identifier: Apache-2.0
"""Slots of several sizes in one stretch of host memory that can be pinned, shared and never moves.

The arena is cut into *extents*, each carved into slots of one size. Slot sizes are the parts' bytes rounded up
to pages, so one model fills the arena exactly, and extents move between models as they empty.

Shared, the memory is a memfd, and the generation words are another: the first is for clients to map and write,
the second for them to read. Neither counts against the size of /dev/shm.

Invariants
1. A slot belongs to exactly one extent; extents and free ranges tile the arena.
2. A slot's generation word changes whenever any of its bytes are handed out anew, as this slot or as slots of
   another size, before the new owner knows of them: who copied from it can tell.
3. Nothing here copies, waits, or knows what a block is. The caller holds a lock.
4. No client can shrink or grow either memfd, nor write generation words: the kernel refuses it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from kvstore.errors import CapacityError, ConfigError
from kvstore.memory import HUGE_PAGE_BYTES, Stretch
from kvstore.memory import PAGE_BYTES as PAGE_BYTES
from kvstore.numa import prefer_node

log = logging.getLogger("kvstore.arena")

_EXTENT_BYTES = 64 << 20
_FEW = 8  # below this, slot by slot is quicker than numpy
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; not in the fcntl module
_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3, where a setting of the host may ask for it
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


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


class Arena:
    """Page-aligned slots in `capacity_bytes` of memory, addressed by byte offset.

    Huge pages are used where the host grants them: a load touches every byte, and 4 KiB pages cost a third of the
    copy rate on first use. `prefault` populates the memory from a thread, since first touch runs at about 1 GB/s
    and would be billed to the first saves.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        prefault: bool = True,
        shared: bool = False,
        huge_pages: bool = False,
        numa_node: int | None = None,
    ) -> None:
        """Private memory of this process; or, `shared`, memory that `memory_fd` gives to others.

        `huge_pages` takes 2 MiB pages from the pool that the host reserved for them, and rounds down to them.
        `numa_node` is where memory comes from as long as there is any; a kernel that refuses that is said once.
        Raises CapacityError where there is not that much, ConfigError where the kernel cannot seal.
        """
        page = HUGE_PAGE_BYTES if huge_pages else PAGE_BYTES
        if capacity_bytes < page:
            raise CapacityError(f"arena of {capacity_bytes} bytes: it needs at least one page of {page}")
        self.capacity_bytes = capacity_bytes // page * page
        num_pages = self.capacity_bytes // PAGE_BYTES
        self._fds: tuple[int, ...] = ()
        with _named(self.capacity_bytes, huge_pages):
            if shared:
                self._memory, self.generation = self._share(num_pages, huge_pages)
            else:
                self._memory = Stretch(self.capacity_bytes, huge_pages=huge_pages)
                self.generation = np.zeros(num_pages, np.uint32)
        if numa_node is not None:  # before anything touches it
            fault = prefer_node(self._memory.address, self.capacity_bytes, numa_node)
            if fault:
                log.warning("the arena's memory may come from any node: preferring node %d: %s", numa_node, fault)
        self._view = self._memory.view()
        self._readonly = self._view.toreadonly()
        self._extents: list[_Extent] = []
        self._ranges: list[tuple[int, int]] = [(0, self.capacity_bytes)]
        self._free: dict[int, list[int]] = {}
        """By stride: the size class's slots that are in nobody's hands."""
        self._extent_bytes = min(_EXTENT_BYTES, max(PAGE_BYTES, self.capacity_bytes // 8))
        self.num_acquired = 0
        self.acquired_bytes = 0
        self._closing = threading.Event()
        self._prefault: threading.Thread | None = None
        if prefault:
            self._prefault = threading.Thread(
                target=self._memory.populate,
                args=(self._closing,),
                kwargs={"collapse": shared and not huge_pages},
                name="kvstore-prefault",
                daemon=True,
            )
            self._prefault.start()

    def _share(self, num_pages: int, huge_pages: bool) -> tuple[Stretch, npt.NDArray[np.uint32]]:
        """Both memfds, mapped and sealed."""
        fds: list[int] = []
        try:
            fds.append(_memfd("kvstore-arena", self.capacity_bytes, huge_pages))
            memory = Stretch(self.capacity_bytes, fd=fds[0])
            _seal(fds[0], _SIZE_SEALS)
            words_bytes = slot_stride(num_pages * np.dtype(np.uint32).itemsize)
            fds.append(_memfd("kvstore-generations", words_bytes, False))
            words = Stretch(words_bytes, fd=fds[1])
            _seal(fds[1], _SIZE_SEALS | _F_SEAL_FUTURE_WRITE)  # the mapping just made keeps its right to write
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self._fds = tuple(fds)
        return memory, np.frombuffer(words.view(), np.uint32, num_pages)

    @property
    def memory_fd(self) -> int:
        """Descriptor of the slots' memory, to be mapped by clients. Closed by `close`."""
        return self._shared_fds()[0]

    @property
    def generation_fd(self) -> int:
        """Descriptor of the generation words, one uint32 a page of 4 KiB; others can map it read-only only."""
        return self._shared_fds()[1]

    def _shared_fds(self) -> tuple[int, ...]:
        if not self._fds:
            raise ConfigError("this arena has no descriptors: make it with shared=True, and ask before it is closed")
        return self._fds

    def acquire(self, num_bytes: int) -> int | None:
        """A slot of at least `num_bytes`, or None where no slot and no room for an extent of its size is left."""
        stride = slot_stride(num_bytes)
        free = self._free.setdefault(stride, [])
        if not free and not self._grow(stride, free):
            return None
        slot = free.pop()
        self._extent_of(slot).num_free -= 1
        self.generation[slot // PAGE_BYTES] += 1
        self.num_acquired += 1
        self.acquired_bytes += stride
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back. Its bytes stay until it is handed out again."""
        extent = self._extent_of(slot)
        extent.num_free += 1
        self._free[extent.stride].append(slot)
        self.num_acquired -= 1
        self.acquired_bytes -= extent.stride

    def acquire_many(self, num_bytes: int, count: int) -> list[int]:
        """Up to `count` slots, as `acquire` would give them one by one; fewer where there are no more."""
        if count < _FEW:
            one_by_one = (self.acquire(num_bytes) for _ in range(count))
            return [slot for slot in takewhile(lambda slot: slot is not None, one_by_one) if slot is not None]
        stride = slot_stride(num_bytes)
        free = self._free.setdefault(stride, [])
        found: list[int] = []
        while len(found) < count and (free or self._grow(stride, free)):
            taken = free[len(found) - count :]
            del free[len(found) - count :]
            self._count_free(taken, -1)
            found += taken[::-1]
        if found:
            self.generation[np.array(found) // PAGE_BYTES] += 1
        return found

    def release_many(self, slots: Sequence[int]) -> None:
        """Give slots back, as `release` does."""
        if len(slots) < _FEW:
            for slot in slots:
                self.release(slot)
            return
        for extent, where in self._count_free(slots, 1):
            self._free[extent.stride].extend([slots[at] for at in where])

    def _count_free(self, slots: Sequence[int], change: int) -> list[tuple[_Extent, list[int]]]:
        """Note that slots are free, or out; gives each extent with positions in `slots` of those that lie in it."""
        starts = np.array([extent.start for extent in self._extents])
        numbers = np.searchsorted(starts, np.array(slots, np.int64), side="right") - 1
        found: list[tuple[_Extent, list[int]]] = []
        for number in np.unique(numbers).tolist():
            where = np.flatnonzero(numbers == number).tolist()
            extent = self._extents[number]
            extent.num_free += change * len(where)
            self.num_acquired -= change * len(where)
            self.acquired_bytes -= change * len(where) * extent.stride
            found.append((extent, where))
        return found

    def view(self, slot: int, num_bytes: int) -> memoryview:
        """Writable bytes of a slot."""
        return self._view[slot : slot + num_bytes]

    def views(self, slots: Iterable[int], sizes: Iterable[int]) -> list[memoryview]:
        """`view` of each."""
        whole = self._view
        return [whole[slot : slot + num_bytes] for slot, num_bytes in zip(slots, sizes, strict=True)]

    def readable(self, slot: int, num_bytes: int) -> memoryview:
        """The same for who only reads."""
        return self._readonly[slot : slot + num_bytes]

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

    def _grow(self, stride: int, free: list[int]) -> bool:
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
        # Lowest offsets last: popped first, so a young store touches (and prefaults) memory front to back.
        free.extend(range(extent.stop - stride, extent.start - stride, -stride))
        return True

    def _reclaim(self, stride: int) -> bool:
        """Return empty extents of other sizes to the free ranges; True if a slot of `stride` fits now."""
        for extent in [e for e in self._extents if e.num_free == e.num_slots and e.stride != stride]:
            free = self._free[extent.stride]
            free[:] = [slot for slot in free if not extent.start <= slot < extent.stop]
            self._extents.remove(extent)
            # Slots of another size will begin elsewhere: whoever still copies from one of these must see it by the
            # word of that one.
            self.generation[extent.start // PAGE_BYTES : extent.stop // PAGE_BYTES] += 1
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

    def wait_prefaulted(self, timeout_s: float | None = None) -> bool:
        """Wait until the memory is populated; True when it is."""
        if self._prefault is None:
            return True
        self._prefault.join(timeout_s)
        return not self._prefault.is_alive()

    def pin(self) -> None:
        """Lock the memory, so that it is never swapped out; after `wait_prefaulted`, or it takes as long as that.

        Raises CapacityError where the limit on locked memory is below it.
        """
        try:
            self._memory.lock()
        except OSError as error:
            raise CapacityError(
                f"cannot lock the arena's {self.capacity_bytes} bytes in memory ({error}): raise the limit on locked "
                "memory (ulimit -l, LimitMEMLOCK in systemd), or turn service.pin_memory off"
            ) from error

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
        for stride, free in self._free.items():
            num_free = sum(extent.num_free for extent in self._extents if extent.stride == stride)
            if num_free != len(free) or len(set(free)) != len(free):
                faults.append(f"arena: size class {stride} counts {num_free} free, lists {len(free)}")
        num_slots = sum(extent.num_slots - extent.num_free for extent in self._extents)
        if num_slots != self.num_acquired:
            faults.append(f"arena: {num_slots} slots are out, {self.num_acquired} counted")
        return faults

    def close(self) -> None:
        """Stop prefaulting and close the descriptors. Memory goes when the last view of it does. Idempotent."""
        self._closing.set()
        if self._prefault is not None:
            self._prefault.join()
        fds, self._fds = self._fds, ()
        for fd in fds:
            os.close(fd)


def _memfd(name: str, num_bytes: int, huge_pages: bool) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if huge_pages else 0)
    try:
        fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)
    try:
        os.ftruncate(fd, num_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _seal(fd: int, seals: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        raise ConfigError(f"this kernel cannot seal shared memory ({error}): it takes Linux 5.1 or newer") from error


@contextmanager
def _named(num_bytes: int, huge_pages: bool) -> Iterator[None]:
    """Say what a refused mapping was for, and what helps."""
    try:
        yield
    except OSError as error:
        fix = (
            f"reserve {-(-num_bytes // HUGE_PAGE_BYTES)} pages with sysctl vm.nr_hugepages, or turn host.huge_pages off"
            if huge_pages
            else "lower host.capacity_bytes, or give the process more address space (ulimit -v)"
        )
        raise CapacityError(f"the host does not give {num_bytes} bytes for the arena ({error}): {fix}") from error
