# SPDX-License-Identifier: Apache-2.0
"""What a device's copy of many blocks is cut into: parts, and windows of blocks × layers that fit a stage."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt
import torch

from kvstore.api import ABSENT
from kvstore.copy_kernel import PieceShape
from kvstore.layout import BlockLayout, PartLayout
from kvstore.paged import Planes

Ints = npt.NDArray[np.int64]

WORD_BYTES = 8
"""Of a table."""


@dataclass(frozen=True, slots=True, eq=False)
class PartWork:
    """Blocks of one part: pages, and which of a page's pieces, `[blocks, pieces of a block]`; their slots.

    Pages are `[tables, blocks, pieces of a block]` where the part's layers have page tables of their own, and ABSENT
    where there is none.

    With `tokens` it is one block, of which only these are written; where none of a piece is, its page is not looked at.
    """

    pages: Ints
    pieces: Ints
    addresses: Ints
    """Where the slots begin; empty where the call has other places for the blocks."""
    held: object = None
    """What keeps the slots' memory."""
    tokens: slice | None = None


class Part:
    """One part: its planes, and the geometry of a piece. `groups`: of each layer, the number of its page table."""

    def __init__(
        self,
        layout: BlockLayout,
        cell: PartLayout,
        planes: Planes,
        piece_tokens: int,
        groups: Ints | None = None,
    ) -> None:
        self.cell = cell
        self.groups = groups
        self._planes = planes
        plane = planes.first
        self.device = plane.device
        item = plane.element_size()
        # Bytes are bytes, and devices do not index by fp8.
        self.dtype = torch.uint8 if item == 1 else plane.dtype
        self.item_bytes = item
        self.steps: tuple[int, ...] = plane.stride()
        """Between pages, tokens, heads and values, in these."""
        self.page_step, self.token_step, head_step, dim_step = (step * item for step in self.steps)
        _, self.num_kv, tokens, heads, dim = cell.shape
        self.piece_tokens = piece_tokens
        self.piece = PieceShape.of((piece_tokens, heads, dim), (self.token_step, head_step, dim_step), item)
        self.plane_bytes = tokens * heads * dim * item
        self.layer_bytes = self.num_kv * self.plane_bytes
        self.slot_layer_bytes = layout.layer_bytes(heads)
        self.addresses = planes.addresses
        self.num_layers = len(self.addresses) // self.num_kv
        self.divisor = gcd(int(np.gcd.reduce(self.addresses)), self.page_step, piece_tokens * self.token_step)
        """Divides every place of a piece in the engine."""

    @functools.cached_property
    def planes(self) -> list[list[torch.Tensor]]:
        """By layer, for who indexes them; a kernel needs their addresses alone."""
        return [[one.view(self.dtype) for one in layer] for layer in self._planes.tensors()]

    def table(self, work: PartWork) -> Ints:
        """What a launch is told, for the device: where each plane begins, `[planes]`, then bytes from there to each
        piece, `[blocks × pieces]`. Sent with each call: a table that stays there was a copy that the caller waits for.

        Where layers have page tables of their own, pieces are `[tables × blocks × pieces]`, ABSENT for none; and which
        number among them each plane's first is, stands between the two, `[planes]`.
        """
        pieces = work.pages * self.page_step + work.pieces * (self.piece_tokens * self.token_step)
        if self.groups is None:
            return np.concatenate((self.addresses, pieces.reshape(-1)))
        pieces[work.pages == ABSENT] = ABSENT
        rows = np.repeat(self.groups * pieces[0].size, self.num_kv)
        return np.concatenate((self.addresses, rows, pieces.reshape(-1)))

    def shape_of(self, num_blocks: int, num_layers: int) -> tuple[int, int, int, int, int, int]:
        _, kv, tokens, heads, dim = self.cell.shape
        return num_blocks, num_layers, kv, tokens, heads, dim


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Blocks `first` … `stop` of `work`, layers `low` … `high` of `part`."""

    part: Part
    work: PartWork
    table: list[torch.Tensor]
    """One: the work's, on the device, once the kernels' stream has put it there."""
    low: int
    high: int
    first: int
    stop: int
    registered: bool = False
    """Whether each of the work's slots lies in one registration."""

    @property
    def num_blocks(self) -> int:
        return self.stop - self.first

    @property
    def planes(self) -> int:
        """Where the table of the window's planes lies."""
        return int(self.table[0].data_ptr()) + self.low * self.part.num_kv * WORD_BYTES

    @property
    def pages(self) -> int:
        """And that of its pieces."""
        tables = 1 if self.part.groups is None else 2
        before: int = tables * len(self.part.addresses) + self.first * self.work.pages.shape[-1]
        return int(self.table[0].data_ptr()) + before * WORD_BYTES

    @property
    def rows(self) -> int:
        """And that of where in it each plane's begin; 0 where all planes' are the same."""
        return 0 if self.part.groups is None else self.planes + len(self.part.addresses) * WORD_BYTES

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
