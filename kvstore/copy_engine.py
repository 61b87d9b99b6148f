# SPDX-License-Identifier: Apache-2.0
"""Many copies of one size between addresses, done by a device's copy engines rather than by its processors.

BatchCopies   one call for thousands of rows: cudaMemcpyBatchAsync, where cuda-python is installed
RowCopies     one cudaMemcpyAsync a row, through torch
HostCopies    the CPU's, which says what the others must do
"""

from __future__ import annotations

import ctypes
import importlib.util
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

Addresses = npt.NDArray[np.int64]

_MOST_ROWS = 4096
"""In one batch: the call takes lists, which are made while the batch before is being copied."""


class CopyEngine(Protocol):
    """Copies rows in no particular order, on torch's current stream; returns before they are done."""

    def copy(self, into: Addresses, sources: Addresses, row_bytes: int, *, to_host: bool) -> None:
        """`row_bytes` from each of `sources` to its place in `into`. `to_host` says which side is the host's."""


class HostCopies:
    """Rows of host memory."""

    def copy(self, into: Addresses, sources: Addresses, row_bytes: int, *, to_host: bool) -> None:
        for to, source in zip(into.tolist(), sources.tolist(), strict=True):
            ctypes.memmove(to, source, row_bytes)


class BatchCopies:
    """See the module. Raises ImportError where cuda-python lacks the call."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._call = runtime.cudaMemcpyBatchAsync
        attributes = runtime.cudaMemcpyAttributes()
        attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        self._attributes = attributes

    def copy(self, into: Addresses, sources: Addresses, row_bytes: int, *, to_host: bool) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for first in range(0, len(into), _MOST_ROWS):
            part = slice(first, first + _MOST_ROWS)
            to, source = into[part].tolist(), sources[part].tolist()
            # CUDA 12 also returns which copy failed; the error comes first in both.
            error = self._call(to, source, [row_bytes] * len(to), len(to), [self._attributes], [0], 1, stream)[0]
            if int(error):
                raise RuntimeError(f"cudaMemcpyBatchAsync of {len(to)} rows of {row_bytes} bytes failed: {error}")


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
    # Not find_spec("cuda.bindings"): it imports the parent, which may be missing.
    if importlib.util.find_spec("cuda") is not None:
        try:
            return BatchCopies()
        except (ImportError, AttributeError):
            pass
    return RowCopies()
