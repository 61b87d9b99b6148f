# SPDX-License-Identifier: Apache-2.0
"""Many copies between addresses, done by a device's copy engines rather than by its processors.

BatchCopies   one call for any number of copies: cuMemcpyBatchAsync and cuMemcpy3DBatchAsync, in drivers for CUDA 12.8
              and later
TorchCopies   one cudaMemcpyAsync each, through torch
HostCopies    the CPU's, which says what the others must do
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

Addresses = npt.NDArray[np.int64]

# From cuda.h.
_ORDER_STREAM = 1
_OPERAND_POINTER = 1
MAX_STEP_BYTES = (1 << 31) - 1
"""Between two rows of a box: CU_DEVICE_ATTRIBUTE_MAX_PITCH."""


@dataclass(frozen=True, slots=True)
class Box:
    """Rows at equal distances on either side. Steps are bytes from one row to the next."""

    num_rows: int
    row_bytes: int
    into_step: int
    source_step: int


class CopyEngine(Protocol):
    """Copies in no particular order, on torch's current stream; returns before they are done.

    `to_host` says which side is the host's.
    """

    def copy(self, into: Addresses, sources: Addresses, sizes: Addresses, *, to_host: bool) -> None:
        """So many bytes from each of `sources` to its place in `into`."""

    def copy_boxes(self, into: Addresses, sources: Addresses, box: Box, *, to_host: bool) -> None:
        """A box from each of `sources` to its place in `into`."""


def _rows_of(into: Addresses, sources: Addresses, box: Box) -> tuple[Addresses, Addresses, Addresses]:
    """The rows of all boxes, as `copy` takes them."""
    rows = np.arange(box.num_rows, dtype=np.int64)
    to = (into[:, None] + rows * box.into_step).reshape(-1)
    source = (sources[:, None] + rows * box.source_step).reshape(-1)
    return to, source, np.full(len(to), box.row_bytes, np.int64)


class HostCopies:
    """See the module."""

    def copy(self, into: Addresses, sources: Addresses, sizes: Addresses, *, to_host: bool) -> None:
        for to, source, size in zip(into.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(to, source, size)

    def copy_boxes(self, into: Addresses, sources: Addresses, box: Box, *, to_host: bool) -> None:
        self.copy(*_rows_of(into, sources, box), to_host=to_host)


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


_OPERAND = np.dtype(
    {
        "names": ["type", "pointer", "row_length"],
        "formats": [np.uint32, np.uint64, np.uint64],
        "offsets": [0, 8, 16],
        "itemsize": 40,
    }
)
_BOX = np.dtype(
    {
        "names": ["source", "into", "width", "height", "depth", "order"],
        "formats": [_OPERAND, _OPERAND, np.uint64, np.uint64, np.uint64, np.uint32],
        "offsets": [0, 40, 80, 88, 96, 104],
        "itemsize": 112,
    }
)
"""CUDA_MEMCPY3D_BATCH_OP with CUmemcpy3DOperand of pointers: what is not named stays 0."""


class BatchCopies:
    """See the module. Raises OSError without a driver, AttributeError where it lacks the calls.

    The driver's own calls, which take arrays: cuda-python's take lists, and making those of 65,536 rows takes as long
    as a good part of the 40 ms in which the link moves them. A driver takes 1 µs of the CPU for each copy of a batch,
    on an H100 measured beside 6 µs through torch. The names without a suffix are the calls' first versions, which
    say which copy failed; CUDA 13's headers mean `_v2` by them, the library keeps both.
    """

    def __init__(self, driver: Any = None, stream: Callable[[], int] | None = None) -> None:
        library = driver or ctypes.CDLL("libcuda.so.1")
        address, size = ctypes.c_void_p, ctypes.c_size_t
        self._copies, self._boxes = library.cuMemcpyBatchAsync, library.cuMemcpy3DBatchAsync
        self._copies.argtypes = (address, address, address, size, address, address, size, address, address)
        self._boxes.argtypes = (size, address, address, ctypes.c_ulonglong, address)
        self._copies.restype = self._boxes.restype = ctypes.c_uint
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
        _check(error, f"cuMemcpyBatchAsync of {len(to)} copies", failed.value)

    def copy_boxes(self, into: Addresses, sources: Addresses, box: Box, *, to_host: bool) -> None:
        if not len(into):
            return
        boxes = np.zeros(len(into), _BOX)
        for side, addresses, step in (("into", into, box.into_step), ("source", sources, box.source_step)):
            boxes[side]["type"], boxes[side]["pointer"], boxes[side]["row_length"] = _OPERAND_POINTER, addresses, step
        boxes["width"], boxes["height"], boxes["depth"] = box.row_bytes, box.num_rows, 1
        boxes["order"] = _ORDER_STREAM
        failed = ctypes.c_size_t(0)
        error = self._boxes(len(boxes), boxes.ctypes.data, ctypes.addressof(failed), 0, self._stream())
        _check(error, f"cuMemcpy3DBatchAsync of {len(boxes)} × {box}", failed.value)


def _check(error: int, call: str, failed: int) -> None:
    if error:
        raise RuntimeError(f"{call} failed: CUDA error {error}, copy {failed}")


def _stream() -> int:
    """The current one; never the legacy default stream, which the calls refuse."""
    return int(torch.cuda.current_stream().cuda_stream)


class TorchCopies:
    """See the module. It takes host memory that is not pinned too, and then waits for it."""

    def copy(self, into: Addresses, sources: Addresses, sizes: Addresses, *, to_host: bool) -> None:
        make_into, make_source = (host_bytes, _device_bytes) if to_host else (_device_bytes, host_bytes)
        for to, source, size in zip(into.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            make_into(to, size).copy_(make_source(source, size), non_blocking=True)

    def copy_boxes(self, into: Addresses, sources: Addresses, box: Box, *, to_host: bool) -> None:
        self.copy(*_rows_of(into, sources, box), to_host=to_host)


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
        return TorchCopies()
