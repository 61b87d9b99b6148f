# SPDX-License-Identifier: Apache-2.0
"""What a device's copy of many blocks is cut into: parts, and windows of blocks × layers that fit a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import numpy.typing as npt
import torch

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
