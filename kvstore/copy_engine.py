# SPDX-License-Identifier: Apache-2.0
"""Many copies between addresses, done by a device's copy engines rather than by its processors.

BatchCopies   one call for any number of copies: cuMemcpyBatchAsync, in drivers for CUDA 12.8 and later
TorchCopies   one cudaMemcpyAsync each, through torch
HostCopies    the CPU's, which says what the others must do
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

log = logging.getLogger("kvstore.copies")

Addresses = npt.NDArray[np.int64]

# From cuda.h.
_ORDER_STREAM = 1


class CopyEngine(Protocol):
    """Copies in no particular order, on torch's current stream; returns before they are done.

    `to_host` says which side is the host's.
    """

    def copy(self, into: Addresses, sources: Addresses, sizes: Addresses, *, to_host: bool) -> None:
        """So many bytes from each of `sources` to its place in `into`."""


class HostCopies:
    """See the module."""

    def copy(self, into: Addresses, sources: Addresses, sizes: Addresses, *, to_host: bool) -> None:
        for to, source, size in zip(into.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(to, source, size)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("src_access_order", ctypes.c_uint),
        ("src_hint", _Location),
        ("dst_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class BatchCopies:
    """See the module. Raises OSError without a driver, AttributeError where it lacks the call.

    The driver's own call, which takes arrays: cuda-python's takes lists, and making those of 65,536 rows takes as long
    as a good part of the 40 ms in which the link moves them. Beside an H100 a driver took 1 µs of the CPU for each copy
    of a batch, and torch 10 for each of its own. The name without a suffix is the call's first version, which says
    which copy failed; CUDA 13's headers mean `_v2` by it, the library keeps both.
    """

    def __init__(self, driver: Any = None, stream: Callable[[], int] | None = None) -> None:
        library = driver or ctypes.CDLL("libcuda.so.1")
        address, size = ctypes.c_void_p, ctypes.c_size_t
        self._copies = library.cuMemcpyBatchAsync
        self._copies.argtypes = (address, address, address, size, address, address, size, address, address)
        self._copies.restype = ctypes.c_uint
        self._stream = stream or _stream
        self._attributes = _Attributes(src_access_order=_ORDER_STREAM)

    def copy(self, into: Addresses, sources: Addresses, sizes: Addresses, *, to_host: bool) -> None:
        if not len(into):
            return
        to, source, sizes = (np.ascontiguousarray(one, np.int64) for one in (into, sources, sizes))
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        error = self._copies(
            to.ctypes.data,
            source.ctypes.data,
            sizes.ctypes.data,
            len(to),
            ctypes.addressof(self._attributes),
            ctypes.addressof(first),
            1,
            ctypes.addressof(failed),
            self._stream(),
        )
        if error:
            raise RuntimeError(
                f"cuMemcpyBatchAsync of {len(to)} copies failed: CUDA error {error}, copy {failed.value}"
            )


def _stream() -> int:
    """The current one; never the legacy default stream, which the call refuses."""
    return int(torch.cuda.current_stream().cuda_stream)


class TorchCopies:
    """See the module. It takes host memory that is not pinned too, and then waits for it."""

    def copy(self, into: Addresses, sources: Addresses, sizes: Addresses, *, to_host: bool) -> None:
        make_into, make_source = (host_bytes, _device_bytes) if to_host else (_device_bytes, host_bytes)
        for to, source, size in zip(into.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            make_into(to, size).copy_(make_source(source, size), non_blocking=True)


def host_bytes(address: int, num_bytes: int) -> torch.Tensor:
    """Host memory as a uint8 tensor. The caller keeps it mapped."""
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=torch.uint8)


class _AtAddress:
    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _device_bytes(address: int, num_bytes: int) -> torch.Tensor:
    return torch.as_tensor(cast(Any, _AtAddress(address, num_bytes)), device="cuda")


@functools.cache
def engine_of(device: torch.device, make: Callable[[], CopyEngine] = BatchCopies) -> CopyEngine:
    """The quickest there is for `device`; `make` makes what is tried first where that is none of the host's."""
    if device.type == "cpu":
        return HostCopies()
    try:
        engine = make()
    except (OSError, AttributeError):
        return TorchCopies()
    if why := fault(engine, device):
        log.warning("a device's copies take one call each, which costs a thread ten times as much: %s", why)
        return TorchCopies()
    return engine


def fault(engine: CopyEngine, device: torch.device) -> str:
    """Why `engine` cannot be used with `device`; empty where it can. Tries it on a few bytes, there and back."""
    on_cuda = device.type == "cuda"
    with _on_side_stream(device) if on_cuda else nullcontext():
        host = torch.arange(64, dtype=torch.uint8, pin_memory=on_cuda)
        back = torch.zeros(64, dtype=torch.uint8, pin_memory=on_cuda)
        there = torch.zeros(64, dtype=torch.uint8, device=device)
        starts, sizes = np.array([0, 24], np.int64), np.array([24, 40], np.int64)
        try:
            engine.copy(there.data_ptr() + starts, host.data_ptr() + starts, sizes, to_host=False)
            engine.copy(back.data_ptr() + starts, there.data_ptr() + starts, sizes, to_host=True)
            if on_cuda:
                torch.cuda.current_stream().synchronize()
        except Exception as error:  # noqa: BLE001  # a driver has many: whatever it is, there is another way
            return f"{type(error).__name__}: {error}"
        return "" if torch.equal(back, host) else "it copied other bytes than it was given"


@contextmanager
def _on_side_stream(device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield
