# SPDX-License-Identifier: Apache-2.0
"""Bulk copies on the CPU with streaming stores, in C where it was built, in numpy where not.

Measured on two cores of an AMD EPYC, 512 MiB in blocks of 8 MiB, as a share of one libc memmove of 512 MiB:
libc memmove a block 0.6–0.7, numpy assignment the same, here 1.0–1.1; 32 KiB rows in random order 0.9–1.0 here,
0.6 by numpy. The gain is the destination that need not be read first; see `_copy.c`. Copies that turn elements
about, [channel][token] from [token][channel], run in tiles at 0.5–0.8; by numpy at 0.15–0.3.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import native

MIN_BYTES = 256 << 10
"""Smaller copies go through the cache: they may be read again at once, and the call costs 2 µs."""

Axis = tuple[int, int, int]
"""Size, and byte steps in the destination and in the source."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What one strided copy moves: rows of `row_bytes` over `axes`, outermost first."""

    axes: tuple[Axis, ...]
    row_bytes: int

    @classmethod
    def of(cls, axes: list[Axis], item_bytes: int) -> Shape:
        """The same copy with the innermost axes that have no gaps on either side made one row."""
        while axes and (axes[-1][0] == 1 or axes[-1][1] == axes[-1][2] == item_bytes):
            item_bytes *= axes.pop()[0]
        return cls(tuple(axis for axis in axes if axis[0] != 1), item_bytes)

    def turned(self) -> Shape:
        """The copy back."""
        return Shape(tuple((size, source, into) for size, into, source in self.axes), self.row_bytes)

    @property
    def num_bytes(self) -> int:
        total = self.row_bytes
        for size, _, _ in self.axes:
            total *= size
        return total


def assign(into: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """`into[...] = source` for arrays alike in shape and dtype that do not overlap; any strides."""
    if into.shape != source.shape or into.dtype != source.dtype:
        raise ValueError(f"cannot copy {source.shape} {source.dtype} into {into.shape} {into.dtype}")
    if not into.flags.writeable:
        raise ValueError("cannot copy into a read-only array")
    if native.copy_strided is None or into.nbytes < MIN_BYTES:
        into[...] = source
        return
    shape = Shape.of(list(zip(into.shape, into.strides, source.strides, strict=True)), into.itemsize)
    if len(shape.axes) > native.MAX_AXES:
        into[...] = source
        return
    copy_places([into.ctypes.data], [source.ctypes.data], shape)


Team = ctypes.c_void_p
"""`GOMP_parallel` of an OpenMP runtime; empty for none."""


def compute_team() -> Team:
    """The threads that torch computes with when the calling thread asks it to; empty where it has loaded none.

    A runtime keeps a team for each thread that computes: only the engine's own has one that is awake.
    """
    try:
        # Torch makes its runtime's names global, and LLVM's and Intel's have this one too.
        found = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return Team()
    return ctypes.cast(found, Team)


ALONE = Team()
"""No team: the calling thread copies by itself."""

Addresses = Sequence[int] | npt.NDArray[np.uintp]


def copy_places(into: Addresses, sources: Addresses, shape: Shape, *, team: Team = ALONE) -> None:
    """The same strided copy at each pair of addresses, in one call without the GIL.

    The caller answers for the addresses: nothing here can check them. With a `team` of `compute_team`, on the
    thread that computes with it, its threads copy along.
    """
    to, source = np.ascontiguousarray(into, np.uintp), np.ascontiguousarray(sources, np.uintp)
    if to.shape != source.shape or to.ndim != 1:
        raise ValueError(f"{to.shape} places to copy into, {source.shape} to copy from")
    if native.copy_strided is None:
        for one, other in zip(to.tolist(), source.tolist(), strict=True):
            _view(one, shape, 1)[...] = _view(other, shape, 2)
        return
    sizes, to_steps, from_steps = (native.Steps(*(axis[at] for axis in shape.axes)) for at in range(3))
    native.copy_strided(
        len(to), to.ctypes.data, source.ctypes.data, len(shape.axes), sizes, to_steps, from_steps, shape.row_bytes, team
    )


def _view(address: int, shape: Shape, side: int) -> npt.NDArray[np.void]:
    """What lies at `address`, as numpy sees it."""
    reach = [(axis[0] - 1) * axis[side] for axis in shape.axes]
    low = sum(step for step in reach if step < 0)
    memory = (ctypes.c_char * (shape.row_bytes + sum(map(abs, reach)))).from_address(address + low)
    row: np.dtype[np.void] = np.dtype((np.void, shape.row_bytes))
    sizes = tuple(axis[0] for axis in shape.axes)
    return np.ndarray(sizes, row, memoryview(memory), offset=-low, strides=tuple(axis[side] for axis in shape.axes))


def copy_bytes(into: memoryview, source: memoryview) -> None:
    """`into[:] = source` for contiguous bytes of one length."""
    assign(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))
