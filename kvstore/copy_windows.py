# SPDX-License-Identifier: Apache-2.0
"""What a device's copy of many blocks is cut into: parts, and windows of blocks × layers that fit a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import numpy.typing as npt
import torch

from kvstore.copy_engine import MAX_STEP_BYTES
from kvstore.copy_kernel import PieceShape
from kvstore.layout import BlockLayout, PartLayout

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PartWork:
    """Blocks of one part: pages, and which of a page's pieces, `[blocks, pieces of a block]`; their slots.

    With `tokens` it is one block, of which only these are written; where none of a piece is, its page is not looked at.
    """

    pages: Ints
    pieces: Ints
    views: Sequence[memoryview]
    tokens: slice | None = None
    addresses: Ints = field(init=False)
    """Where the slots begin."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "addresses", np.array([address_of(view) for view in self.views], np.int64))

    def only(self, chosen: npt.NDArray[np.bool_]) -> PartWork:
        """These blocks of it."""
        views = [view for view, one in zip(self.views, chosen.tolist(), strict=True) if one]
        return PartWork(self.pages[chosen], self.pieces[chosen], views, self.tokens)


@dataclass(frozen=True, slots=True)
class Run:
    """Planes at equal distances on either side.

    Attributes:
        address: of the first plane's first page. slot_offset: where the first plane lies in the slots' layers.
        step, slot_step: bytes from one plane to the next.
    """

    address: int
    num_planes: int
    step: int
    slot_offset: int
    slot_step: int


def _evenly(addresses: Ints) -> list[tuple[int, int, int]]:
    """(first, number, step) of stretches of ascending addresses that keep one distance, each as long as can be."""
    found: list[tuple[int, int, int]] = []
    steps = np.diff(addresses).tolist()
    at = 0
    while at < len(addresses):
        stop = at + 1
        if at < len(steps) and 0 < steps[at] <= MAX_STEP_BYTES:
            stop += 1
            while stop <= len(steps) and steps[stop - 1] == steps[at]:
                stop += 1
        found.append((at, stop - at, steps[at] if stop - at > 1 else 0))
        at = stop
    return found


class Part:
    """One part: its planes, and the geometry of a piece."""

    def __init__(
        self, layout: BlockLayout, cell: PartLayout, planes: list[list[torch.Tensor]], piece_tokens: int
    ) -> None:
        self.cell = cell
        plane = planes[0][0]
        if plane.element_size() == 1:
            # Bytes are bytes, and devices do not index by fp8.
            planes = [[one.view(torch.uint8) for one in layer] for layer in planes]
        self.planes = planes
        item = plane.element_size()
        self.page_step, self.token_step, head_step, dim_step = (step * item for step in plane.stride())
        _, self.num_kv, tokens, heads, dim = cell.shape
        self.piece_tokens = piece_tokens
        self.piece = PieceShape.of((piece_tokens, heads, dim), (self.token_step, head_step, dim_step), item)
        self.plane_bytes = tokens * heads * dim * item
        self.layer_bytes = self.num_kv * self.plane_bytes
        self.slot_layer_bytes = layout.layer_bytes(heads)
        self.addresses = np.array([one.data_ptr() for layer in planes for one in layer], np.int64)
        self.divisor = gcd(*self.addresses.tolist(), self.page_step, piece_tokens * self.token_step)
        """Divides every place of a piece in the engine."""
        self.table = torch.from_numpy(self.addresses).to(plane.device)

    def offsets(self, work: PartWork) -> Ints:
        """Bytes from a plane's first page to each piece, `[blocks × pieces]`."""
        return (work.pages * self.page_step + work.pieces * (self.piece_tokens * self.token_step)).reshape(-1)

    def runs(self, low: int, high: int) -> list[Run]:
        """Planes of these layers whose addresses keep one distance: all of them where the allocator was kind.

        Keys and values one after the other, or, where they do not alternate at one distance, apart.
        """
        kv = self.num_kv
        table = self.addresses[low * kv : high * kv]
        whole = _evenly(table)
        if len(whole) == 1 or kv == 1:
            return [
                Run(int(table[at]), number, step, at * self.plane_bytes, self.plane_bytes) for at, number, step in whole
            ]
        return [
            Run(int(table[at * kv + one]), number, step, (at * kv + one) * self.plane_bytes, self.layer_bytes)
            for one in range(kv)
            for at, number, step in _evenly(table[one::kv])
        ]

    def shape_of(self, num_blocks: int, num_layers: int) -> tuple[int, int, int, int, int, int]:
        _, kv, tokens, heads, dim = self.cell.shape
        return num_blocks, num_layers, kv, tokens, heads, dim


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Blocks `first` … `stop` of `work`, layers `low` … `high` of `part`."""

    part: Part
    work: PartWork
    offsets: list[torch.Tensor]
    """One: of all the work's pieces, on the device, once the kernels' stream has put it there."""
    low: int
    high: int
    first: int
    stop: int

    @property
    def num_blocks(self) -> int:
        return self.stop - self.first

    @property
    def slots(self) -> Ints:
        """Where the blocks' bytes of the window's first layer begin."""
        return self.work.addresses[self.first : self.stop] + self.low * self.part.slot_layer_bytes

    @property
    def exact_bytes(self) -> int:
        """Of one block, as the engine has them."""
        return (self.high - self.low) * self.part.layer_bytes

    @property
    def slot_bytes(self) -> int:
        """Of one block, in its slot."""
        return (self.high - self.low) * self.part.slot_layer_bytes


def address_of(view: memoryview) -> int:
    """Where a slot begins."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
