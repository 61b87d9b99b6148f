# SPDX-License-Identifier: Apache-2.0
"""Copies of pages in the CPU's own memory: by address, on the caller's thread and without the GIL.

A block is one strided copy per page over all layers at once, where their tensors lie at equal distances. Measured
with 32 layers of 32 KiB rows (16-token pages in random order, 512 MiB, one thread), as a share of one memmove of
512 MiB (memmove in pieces of 8 MiB: 0.66–0.74):

    streaming stores, all layers at once   gather 0.77, scatter 0.77   chosen; see kvstore.copying
    numpy, all layers at once              gather 0.60, scatter 0.60   what it falls back to where no C was built
    the same on two threads                gather 0.55, scatter 0.55   one thread fills the memory bus
    np.take(out=, mode="clip")             gather 0.60                 no scatter; copies a source with gaps
    torch copy_ / _foreach_copy_           gather 0.55 / 0.57          0.1–0.5 on two threads of a busy box
    numpy, layer by layer                  gather 0.50, scatter 0.47
    ctypes.memmove per row                 gather 0.44
    numpy, in the destination's order      gather 0.43

Short rows cost more: 4-token pages (8 KiB rows) reach 0.4, pages with heads before tokens (256-byte rows) 0.65.

Nothing here checks an address: who asks has checked pages and slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.copy_under_way import Copying
from kvstore.copy_windows import PartWork
from kvstore.copying import Shape, copy_places
from kvstore.layout import PartLayout
from kvstore.paged import Planes, extent_of
from kvstore.streams import InOrder


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive layers of one part whose addresses form an arithmetic progression: one strided copy a piece."""

    address: int
    """Of the run's first layer and first of keys and values, page 0, in the engine."""
    page_step: int
    piece_step: int
    """Bytes between pages, and between pieces of a page, in the engine."""
    slot_offset: int
    slot_piece_step: int
    """Where the run begins in the slot, and bytes between pieces there."""
    into_slot: Shape
    into_engine: Shape


class CpuCopier:
    """Copies blocks between pages and slots of some parts, planned once for all calls. Thread-safe."""

    def __init__(self, cells: Sequence[PartLayout], planes: Sequence[Planes], piece_tokens: int) -> None:
        """`planes`: those of each part, cut to its layers and heads."""
        self._piece_tokens = piece_tokens
        self._sizes = [cell.num_bytes for cell in cells]
        self._runs = [self._plan(cell, of_cell) for cell, of_cell in zip(cells, planes, strict=True)]

    @property
    def num_views(self) -> int:
        """Strided copies that a piece of a page costs, over all parts."""
        return sum(map(len, self._runs))

    def start(self, work: Sequence[tuple[int, PartWork]], *, to_slots: bool) -> Copying:
        """Copy (part, blocks) pairs; done when it returns."""
        num_bytes = 0
        for at, blocks in work:
            self._copy(self._runs[at], blocks, to_slots)
            num_bytes += len(blocks.addresses) * self._sizes[at]
        return Copying(num_bytes, InOrder())

    def _copy(self, runs: Sequence[_Run], blocks: PartWork, to_slots: bool) -> None:
        slots, pieces_a_slot = blocks.addresses.tolist(), range(blocks.pieces.shape[1])
        places = list(zip(blocks.pages.ravel().tolist(), blocks.pieces.ravel().tolist(), strict=True))
        for run in runs:
            engine = [run.address + page * run.page_step + piece * run.piece_step for page, piece in places]
            first = run.slot_offset
            held = [slot + first + piece * run.slot_piece_step for slot in slots for piece in pieces_a_slot]
            if to_slots:
                copy_places(held, engine, run.into_slot)
            else:
                copy_places(engine, held, run.into_engine)

    def _plan(self, cell: PartLayout, planes: Planes) -> list[_Run]:
        """Strided copies between engine and slot for one part: as few runs, and as long rows, as can be."""
        plane = planes.first
        item = plane.element_size()
        page_step, token_step, head_step, dim_step = (step * item for step in plane.stride())
        _, num_kv, tokens, heads, dim = cell.shape
        slot_token = heads * dim * item
        slot_kv = tokens * slot_token
        addresses = planes.addresses.reshape(-1, num_kv)
        runs: list[_Run] = []
        for layers, kv in _progressions(addresses, extent_of(plane)):
            starts = addresses[layers, kv]
            layer_step = int(starts[1, 0] - starts[0, 0]) if starts.shape[0] > 1 else 0
            axes = [
                (starts.shape[0], num_kv * slot_kv, layer_step),
                (starts.shape[1], slot_kv, int(starts[0, -1] - starts[0, 0])),
                (self._piece_tokens, slot_token, token_step),
                (heads, dim * item, head_step),
                (dim, item, dim_step),
            ]
            shape = Shape.of(axes, item)
            runs.append(
                _Run(
                    address=int(starts[0, 0]),
                    page_step=page_step,
                    piece_step=token_step * self._piece_tokens,
                    slot_offset=(layers.start * num_kv + kv.start) * slot_kv,
                    slot_piece_step=slot_token * self._piece_tokens,
                    into_slot=shape,
                    into_engine=shape.turned(),
                )
            )
        return runs


def _progressions(addresses: npt.NDArray[np.int64], extent: int) -> list[tuple[slice, slice]]:
    """Split [layer, kv] addresses into blocks of (layers, kv) in which each axis has one constant step.

    Allocators hand out equal tensors at equal distances, mostly; then a block is all the layers. Keys and
    values stay together unless they lie far apart: numpy copies twice where source and destination seem to
    overlap, as they do when the slots lie between the two.
    """
    gaps = addresses[:, -1] - addresses[:, 0]
    if np.abs(gaps).max() > 2 * extent:
        kv_slices = [slice(at, at + 1) for at in range(addresses.shape[1])]
        gaps = np.zeros_like(gaps)
    else:
        kv_slices = [slice(0, addresses.shape[1])]
    blocks: list[tuple[slice, slice]] = []
    for kv in kv_slices:
        steps = np.diff(addresses[:, kv.start])
        first = 0
        for at in range(1, len(addresses) + 1):
            if at < len(addresses) and gaps[at] == gaps[first] and steps[at - 1] == steps[first]:
                continue
            blocks.append((slice(first, at), kv))
            first = at
    return blocks
