# SPDX-License-Identifier: Apache-2.0
"""Many copies of one size between addresses, done by a device's copy engines rather than by its processors.

BatchCopies   one call for any number of rows: cuMemcpyBatchAsync, in drivers for CUDA 12.8 and later
RowCopies     one cudaMemcpyAsync a row, through torch
HostCopies    the CPU's, which says what the others must do
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

Addresses = npt.NDArray[np.int64]

# From cuda.h.
_ORDER_STREAM = 1
_CAN_USE_HOST_POINTER = 91


class CopyEngine(Protocol):
    """Copies rows in no particular order, on torch's current stream; returns before they are done."""

    def copy(self, into: Addresses, sources: Addresses, row_bytes: int, *, to_host: bool) -> None:
        """`row_bytes` from each of `sources` to its place in `into`. `to_host` says which side is the host's."""


class HostCopies:
    """Rows of host memory."""

    def copy(self, into: Addresses, sources: Addresses, row_bytes: int, *, to_host: bool) -> None:
        for to, source in zip(into.tolist(), sources.tolist(), strict=True):
            ctypes.memmove(to, source, row_bytes)


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

    The driver's own call, which takes arrays: cuda-python's takes lists, and making those of 65,536 rows of 32 KiB
    takes as long as a good part of the 40 ms in which the link moves them. The name without a suffix is the call's
    first version, which says which copy failed; CUDA 13's headers mean `_v2` by it, the library keeps both.
    """

    def __init__(self, driver: Any = None, stream: Callable[[], int] | None = None) -> None:
        self._call = (driver or ctypes.CDLL("libcuda.so.1")).cuMemcpyBatchAsync
        address, size = ctypes.c_void_p, ctypes.c_size_t
        self._call.argtypes = (address, address, address, size, address, address, size, address, address)
        self._call.restype = ctypes.c_uint
        self._stream = stream or _stream
        self._attributes = _Attributes(src_access_order=_ORDER_STREAM)

    def copy(self, into: Addresses, sources: Addresses, row_bytes: int, *, to_host: bool) -> None:
        into, sources = np.ascontiguousarray(into, np.int64), np.ascontiguousarray(sources, np.int64)
        sizes = np.full(len(into), row_bytes, np.uint64)
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        error = self._call(
            into.ctypes.data,
            sources.ctypes.data,
            sizes.ctypes.data,
            len(into),
            ctypes.addressof(self._attributes),
            ctypes.addressof(first),
            1,
            ctypes.addressof(failed),
            self._stream(),
        )
        if error:
            raise RuntimeError(
                f"cuMemcpyBatchAsync of {len(into)} rows of {row_bytes} bytes failed: CUDA error {error}, row "
                f"{failed.value}"
            )


def _stream() -> int:
    """The current one; never the legacy default stream, which the call refuses."""
    return int(torch.cuda.current_stream().cuda_stream)


class RowCopies:
    """See the module."""

    def copy(self, into: Addresses, sources: Addresses, row_bytes: int, *, to_host: bool) -> None:
        make_into, make_source = (host_bytes, _device_bytes) if to_host else (_device_bytes, host_bytes)
        for to, source in zip(into.tolist(), sources.tolist(), strict=True):
            make_into(to, row_bytes).copy_(make_source(source, row_bytes), non_blocking=True)


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


def engine_of(device: torch.device) -> CopyEngine:
    """The quickest there is for `device`."""
    if device.type != "cuda":
        return HostCopies()
    try:
        return BatchCopies()
    except (OSError, AttributeError):
        return RowCopies()


def reads_host_memory(device: torch.device) -> bool:
    """Whether kernels on `device` may use the host's own addresses of registered memory.

    By cudaHostGetDevicePointer's documentation that is so where CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM is set.
    """
    if device.type != "cuda":
        return True
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    number, found = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(number), device.index or 0):
        return False
    failed = driver.cuDeviceGetAttribute(ctypes.byref(found), _CAN_USE_HOST_POINTER, number)
    return not failed and bool(found.value)
