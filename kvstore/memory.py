# SPDX-License-Identifier: Apache-2.0
"""Mapped memory with what Python's `mmap` lacks: huge pages, populated without the GIL, kept out of forks, no
descriptor held.

Invariants
1. Memory is unmapped when the last view of it is gone and never earlier: closing cannot make a view fault.
2. Memory kept `out_of_forks` is not shared with a forked child: the child finds private zeros there. A view it
   inherited neither faults nor reaches the parent's bytes, and when it goes, nothing else of the child's is unmapped.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref

from kvstore.errors import MappingClosed

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20

# Linux, not in the mmap module of every supported Python.
_PROT_NONE = 0
_MAP_NORESERVE = 0x4000
_MAP_HUGETLB = 0x40000
_MAP_HUGE_2MB = 21 << 26
_MAP_FIXED = 0x10
_MAP_FIXED_NOREPLACE = 0x100000
_ZEROS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_MADV_POPULATE_READ = 22  # Linux 5.14
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25  # Linux 6.1

_POPULATE_BYTES = 8 << 20
"""Small enough that populating can be stopped within some ten milliseconds."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FAILED = ctypes.c_void_p(-1).value

_out_of_forks: dict[int, int] = {}
"""Address to length of what a forked child must find filled."""
_forking = threading.Lock()
"""Held over a fork, and while memory is mapped but not yet kept out of one."""


def populate(address: int, num_bytes: int, *, writable: bool, stop: threading.Event) -> bool:
    """Fault in pages that somebody else mapped, keeping what is written there; False where stopped or unknown to the
    kernel. The caller keeps them mapped."""
    advice = _MADV_POPULATE_WRITE if writable else _MADV_POPULATE_READ
    return all(
        not stop.is_set() and _libc.madvise(address + at, min(_POPULATE_BYTES, num_bytes - at), advice) == 0
        for at in range(0, num_bytes, _POPULATE_BYTES)
    )


class Stretch:
    """Mapped memory. Unmapped once it was closed, or dropped, and no view of it is left.

    Attributes:
        address: where it begins, for registration with a device.
        num_bytes: its length.
    """

    def __init__(
        self,
        num_bytes: int,
        *,
        fd: int | None = None,
        writable: bool = True,
        huge_pages: bool = False,
        out_of_forks: bool = False,
    ) -> None:
        """Map the first `num_bytes` of `fd`, shared; or private memory without one. `fd` is not kept.

        Transparent huge pages are asked for in any case; `huge_pages` takes private memory from the host's
        reserved pool. Raises OSError.
        """
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = mmap.MAP_SHARED if fd is not None else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if huge_pages and fd is None:
            flags |= _MAP_HUGETLB | _MAP_HUGE_2MB
        self.num_bytes = num_bytes
        self._advice = _MADV_POPULATE_WRITE if writable else _MADV_POPULATE_READ
        with _forking:
            self.address = _map_aligned(num_bytes, protection, flags, -1 if fd is None else fd)
            if out_of_forks:
                _out_of_forks[self.address] = num_bytes
                self.advise(mmap.MADV_DONTFORK)
        memory = (ctypes.c_ubyte * num_bytes).from_address(self.address)
        self._mapped = weakref.finalize(memory, _unmap, self.address, num_bytes, out_of_forks)
        self._mapped.atexit = False
        view = memoryview(memory).cast("B")
        self._view: memoryview | None = view if writable else view.toreadonly()
        self.advise(mmap.MADV_HUGEPAGE)

    @property
    def mapped(self) -> bool:
        """False once the memory is gone."""
        return self._mapped.alive

    def view(self) -> memoryview:
        """All of it, read-only where mapped so. Raises MappingClosed after `close`."""
        view = self._view
        if view is None:
            raise MappingClosed("this memory was closed: map it anew")
        return view

    def advise(self, advice: int) -> bool:
        """Whether the kernel took the advice for all of the memory."""
        return self._advise(0, self.num_bytes, advice)

    def populate(self, stop: threading.Event, *, collapse: bool = False) -> bool:
        """Fault all pages in, keeping what is written there. False where stopped or unknown to the kernel.

        `collapse` makes huge pages of shared memory even where the host gives none of themselves: one page of each
        is touched and the kernel fills it up, in less time than it takes for small pages. Every process that maps
        the memory has them then. The GIL is not held meanwhile, as it would be in `mmap.madvise`.
        """
        held = self._view  # nothing is unmapped under the kernel's feet
        if held is None:
            return False
        for offset in range(0, self.num_bytes, _POPULATE_BYTES):
            size = min(_POPULATE_BYTES, self.num_bytes - offset)
            if stop.is_set():
                return False
            if collapse:
                for start in range(offset, offset + size, HUGE_PAGE_BYTES):
                    self._advise(start, PAGE_BYTES, self._advice)
                self._advise(offset, size, _MADV_COLLAPSE)  # refused by older kernels, and where memory is in pieces
            if not self._advise(offset, size, self._advice):
                return False
        return True

    def _advise(self, offset: int, num_bytes: int, advice: int) -> bool:
        return int(_libc.madvise(self.address + offset, num_bytes, advice)) == 0

    def lock(self) -> None:
        """Keep all of it in memory, never swapped out, for as long as it is mapped. Raises OSError.

        Faults in what is missing, so better after `populate`. The GIL is not held meanwhile.
        """
        held = self.view()
        if _libc.mlock(self.address, self.num_bytes):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        del held

    def close(self) -> bool:
        """Give up this hold on the memory. False while views of it are alive; it goes with the last. Idempotent."""
        self._view = None
        return not self._mapped.alive

    def abandon(self) -> None:
        """Close, and put private zeros in place of what views still hold: the memory itself is let go now.

        For memory that must go though somebody keeps a view: who reads it finds zeros, and must have a way to know.
        """
        self._view = None
        held = self._mapped.peek()  # alive until this returns, so that the address is still ours
        if held is not None:
            _map(self.address, self.num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, _ZEROS | _MAP_FIXED, -1)


def _map(address: int | None, num_bytes: int, protection: int, flags: int, fd: int) -> int:
    found: int = _libc.mmap(address, num_bytes, protection, flags, fd, 0)
    if found == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return found


def _map_aligned(num_bytes: int, protection: int, flags: int, fd: int) -> int:
    """Map at a multiple of the huge page, as not every kernel does by itself."""
    if num_bytes < HUGE_PAGE_BYTES or flags & _MAP_HUGETLB:
        return _map(None, num_bytes, protection, flags, fd)
    reserved = _map(None, num_bytes + HUGE_PAGE_BYTES, _PROT_NONE, _ZEROS, -1)
    address = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = address + -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    try:
        _map(address, num_bytes, protection, flags | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(reserved, num_bytes + HUGE_PAGE_BYTES)
        raise
    if address > reserved:
        _libc.munmap(reserved, address - reserved)
    if reserved + num_bytes + HUGE_PAGE_BYTES > end:
        _libc.munmap(end, reserved + num_bytes + HUGE_PAGE_BYTES - end)
    return address


def _unmap(address: int, num_bytes: int, out_of_forks: bool) -> None:
    if out_of_forks and _out_of_forks.pop(address, None) is None:
        return  # a forked child where something else lies there
    _libc.munmap(address, num_bytes)


def _fill_gaps() -> None:
    """In a forked child: put zeros where memory was kept out, before anything else is mapped there."""
    for address, num_bytes in list(_out_of_forks.items()):
        try:
            found = _map(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, _ZEROS | _MAP_FIXED_NOREPLACE, -1)
        except OSError:
            found = -1
        if found != address:
            del _out_of_forks[address]
    _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_fill_gaps)
