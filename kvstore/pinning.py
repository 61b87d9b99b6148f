# SPDX-License-Identifier: Apache-2.0
"""Host memory registered with CUDA, so that a device copies from and to it by itself and at the link's rate.

    pin       registers memory once, however many ask; for `register_memory` of a store
    Pinning   registers a stretch of memory in chunks, on a thread of its own
    PINNED    what is registered in this process, by address

Registering takes time for every page, so an engine starts at once and its copies become quick chunk by chunk. Where it
fails (a limit on locked memory, a kernel without it), that is said once, what is registered stays so, and copies of the
rest go through CUDA's own staging.

Invariants
1. Memory stays mapped while it is registered: a `Pinning` holds a view of it.
2. A range is in PINNED only while it is registered.
3. One copy never spans two registrations: `PINNED.cuts` says where to part it; CUDA refuses such copies.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore import memory

if TYPE_CHECKING:
    import torch

log = logging.getLogger("kvstore.pinning")

Ints = npt.NDArray[np.int64]

CHUNK_BYTES = 256 << 20
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process
_PAGE_BYTES = 4096
_CAPTURE_MODE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class PinRuntime(Protocol):
    """What pinning asks of CUDA; both return what went wrong, empty for nothing."""

    def register(self, address: int, num_bytes: int) -> str: ...

    def unregister(self, address: int) -> str: ...


class CudaPins:
    """CUDA's, through torch.

    Args:
        device: where copies go. Without one, a thread that never chose a device makes itself a context on the first:
            half a gigabyte there, in every worker of a machine with several.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device

    def register(self, address: int, num_bytes: int) -> str:
        # The GIL is not held meanwhile. CUDA keeps a failure as the calling thread's last error, and the next kernel
        # launched there would report it as its own: one more reason for a thread that launches nothing.
        return self._call(lambda runtime: runtime.cudaHostRegister(address, num_bytes, _PORTABLE))

    def unregister(self, address: int) -> str:
        return self._call(lambda runtime: runtime.cudaHostUnregister(address))

    def _call(self, call: Callable[[Any], object]) -> str:
        import torch

        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            with _beside_captures():
                code = call(runtime)
        number = int(code)  # type: ignore[call-overload]
        return "" if number == 0 else f"CUDA error {number} ({code})"


@contextmanager
def _beside_captures() -> Iterator[None]:
    """Let this thread call CUDA while another captures a graph.

    An engine captures its graphs right after it has told us of its pages, while memory is being registered. A capture
    in CUDA's default mode forbids such calls to all threads, and fails if one comes; a thread may except itself.
    """
    try:
        exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        yield
        return
    mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))  # it was given the mode from before


class PinnedRanges:
    """Which addresses are registered. Thread-safe."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._table = np.zeros((2, 0), np.int64)
        """The same, replaced as a whole, for many addresses at once."""
        self._lock = threading.Lock()

    def add(self, address: int, num_bytes: int) -> None:
        """Note a registration; it must not overlap another."""
        with self._lock:
            at = bisect_right(self._starts, address)
            self._starts.insert(at, address)
            self._stops.insert(at, address + num_bytes)
            self._table = np.array((self._starts, self._stops), np.int64)

    def drop(self, address: int) -> None:
        """Forget the registration that begins at `address`."""
        with self._lock:
            at = self._starts.index(address)
            del self._starts[at], self._stops[at]
            self._table = np.array((self._starts, self._stops), np.int64).reshape(2, -1)

    def cuts(self, address: int, num_bytes: int) -> list[tuple[int, int, bool]]:
        """(offset, bytes, registered) of the pieces that one copy of this range may be cut into, in order."""
        pieces: list[tuple[int, int, bool]] = []
        at, stop = address, address + num_bytes
        with self._lock:
            index = max(0, bisect_right(self._starts, at) - 1)
            while at < stop:
                while index < len(self._starts) and self._stops[index] <= at:
                    index += 1
                inside = index < len(self._starts) and self._starts[index] <= at
                if inside:
                    end = min(stop, self._stops[index])
                else:
                    end = min(stop, self._starts[index]) if index < len(self._starts) else stop
                pieces.append((at - address, end - at, inside))
                at = end
        return pieces

    def holds_whole(self, addresses: Ints, sizes: Ints | int) -> npt.NDArray[np.bool_]:
        """Which of these ranges lie in one registration each: one copy may take them."""
        starts, stops = self._table
        if not len(starts):
            return np.zeros(len(addresses), np.bool_)
        at = np.searchsorted(starts, addresses, "right") - 1
        return (at >= 0) & (addresses + sizes <= stops[at])

    def covers(self, address: int, num_bytes: int) -> bool:
        """Whether all of it is registered, in however many pieces."""
        return all(inside for _, _, inside in self.cuts(address, num_bytes))


PINNED = PinnedRanges()
"""Registrations belong to the process, and so does this table."""


class Pinning:
    """Registers the memory of `view` in the background. `close` it before the memory is given up.

    Args:
        view: contiguous, starting at a page; it is held until `close`.
        runtime: CUDA, unless a test brings its own.
        chunk_bytes: registered at a time: pages × 4 KiB. Between two chunks other work of the process gets at the
            kernel's memory lock, and `close` is heard.

    Attributes:
        address: where the memory begins; num_bytes: registered so far.
        failure: why it ended early; empty if it did not.
    """

    def __init__(
        self,
        view: memoryview,
        *,
        runtime: PinRuntime | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        ranges: PinnedRanges = PINNED,
    ) -> None:
        if chunk_bytes < _PAGE_BYTES or chunk_bytes % _PAGE_BYTES:
            raise ValueError(f"chunk_bytes is {chunk_bytes}: use a multiple of {_PAGE_BYTES}")
        self.num_bytes = 0
        self.failure = ""
        self._view: memoryview | None = view
        self._total_bytes = view.nbytes
        self._writable = not view.readonly
        self.address = int(np.frombuffer(view, np.uint8).ctypes.data)
        self._runtime = runtime or CudaPins()
        self._chunk_bytes = chunk_bytes
        self._ranges = ranges
        self._registered: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-pin", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for offset in range(0, self._total_bytes, self._chunk_bytes):
            if self._stop.is_set():
                return
            address, size = self.address + offset, min(self._chunk_bytes, self._total_bytes - offset)
            # CUDA would fault the pages in itself, under a lock that an engine's launches and allocations need too:
            # measured with an H100, requests waited up to 160 ms beside 256 MiB, and 9 ms where the pages were there.
            memory.populate(address, size, writable=self._writable, stop=self._stop)
            fault = self._runtime.register(address, size)
            if fault:
                self.failure = fault
                log.warning(
                    "pinned %d of %d bytes of host memory, then: %s; copies of the rest are slower. Raise the limit on "
                    "locked memory (ulimit -l) or make the arena smaller",
                    self.num_bytes,
                    self._total_bytes,
                    fault,
                )
                return
            self._ranges.add(address, size)
            self._registered.append(address)
            self.num_bytes += size

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended; True where all of the memory is registered."""
        self._thread.join(timeout_s)
        return self.num_bytes == self._total_bytes

    def close(self) -> None:
        """Unregister everything and let go of the memory. No copy may be under way. Idempotent."""
        self._stop.set()
        self._thread.join()
        while self._registered:
            address = self._registered.pop()
            # Out of the table first: nobody takes for registered what is about not to be.
            self._ranges.drop(address)
            fault = self._runtime.unregister(address)
            if fault:
                log.warning("could not unpin host memory: %s", fault)
        self.num_bytes = 0
        self._view = None

    def __del__(self) -> None:
        if hasattr(self, "_thread"):  # its thread has ended: it holds this object for as long as it runs
            self.close()


class Pinned:
    """A share in the pinning of some memory: it ends with the last. Implements `kvstore.api.Registration`."""

    def __init__(self, pinning: Pinning) -> None:
        self._pinning = pinning
        self._closed = False

    @property
    def num_bytes(self) -> int:
        return self._pinning.num_bytes

    @property
    def failure(self) -> str:
        return self._pinning.failure

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until pinning has ended; True where all of the memory is registered."""
        return self._pinning.wait(timeout_s)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with _shares_lock:
            pinning, number = _shares[self._pinning.address]
            if number > 1:
                _shares[pinning.address] = pinning, number - 1
                return
            # Not waited for in here: whoever maps memory at this address next finds no trace of it.
            del _shares[pinning.address]
        pinning.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()


_shares: dict[int, tuple[Pinning, int]] = {}
"""By address: a pinning and how many share it."""
_shares_lock = threading.RLock()  # a share may be collected on a thread that is in here


def pin(view: memoryview, *, runtime: PinRuntime | None = None) -> Pinned:
    """A share in the pinning of the memory of `view`, begun now unless somebody has it already."""
    address = int(np.frombuffer(view, np.uint8).ctypes.data)
    with _shares_lock:
        pinning, number = _shares.get(address) or (Pinning(view, runtime=runtime), 0)
        _shares[address] = pinning, number + 1
        return Pinned(pinning)
