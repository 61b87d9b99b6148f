# SPDX-License-Identifier: Apache-2.0
"""Between an engine's pages and canonical bytes on its device: what runs on a stream, by the kernel or by indexing."""

from __future__ import annotations

from math import gcd

import numpy as np
import torch

from kvstore.api import ABSENT
from kvstore.copy_kernel import Places, copy_pieces
from kvstore.copy_windows import Ints, Window


def by_kernel(
    window: Window,
    slots: int,
    slot_step: int,
    alignments: tuple[int, ...],
    *,
    to_slots: bool,
    num_programs: int = 0,
) -> None:
    """One launch of the kernel.

    Args:
        slots, slot_step: as in `copy_kernel.Places`, of the window's first layer.
        alignments: numbers whose common divisor divides where each block's bytes begin.
        num_programs: as in `copy_kernel.copy_pieces`.
    """
    part = window.part
    num_planes = (window.high - window.low) * part.num_kv
    pieces = window.work.pages.shape[-1]
    alignment = gcd(part.divisor, *alignments)
    places = Places(
        window.planes, num_planes, window.pages, window.num_blocks, pieces, slots, slot_step, alignment, window.rows
    )
    copy_pieces(
        places, part.piece, part.device, plane_bytes=part.plane_bytes, to_slots=to_slots, num_programs=num_programs
    )


def by_index(window: Window, values: torch.Tensor, *, to_slots: bool) -> None:
    """`values`: canonical bytes of the window's blocks, one after the other, uint8."""
    part = window.part
    shape = part.shape_of(window.num_blocks, window.high - window.low)
    shaped = values.view(part.dtype).view(shape)
    cut = window.work.tokens or slice(None)
    tables: dict[int, _Where] = {}
    for layer in range(window.low, window.high):
        number = 0 if part.groups is None else int(part.groups[layer])
        if number not in tables:
            tables[number] = _where(window, number, cut, values.device)
        where, there = tables[number]
        for kv, plane in enumerate(part.planes[layer]):
            held = shaped[:, layer - window.low, kv]
            if to_slots:
                held.copy_(plane[where].view(held.shape))
            else:
                whole = held.reshape(-1, *held.shape[2:])[cut]
                plane[where] = whole if there is None else whole[there]


_Where = tuple[tuple[torch.Tensor, ...], torch.Tensor | None]


def _where(window: Window, number: int, cut: slice, device: torch.device) -> _Where:
    """Pages and tokens of the window by its table `number`; which of those there are, where that is not all."""
    part, work, chosen = window.part, window.work, slice(window.first, window.stop)
    table = work.pages if part.groups is None else work.pages[number]
    pages = np.repeat(table[chosen].reshape(-1), part.piece_tokens)[cut]
    tokens = (work.pieces[chosen].reshape(-1, 1) * part.piece_tokens + np.arange(part.piece_tokens)).reshape(-1)[cut]
    there = None
    if (pages == ABSENT).any():
        kept = np.flatnonzero(pages != ABSENT)
        pages, tokens, there = pages[kept], tokens[kept], on_device(kept, device)
    return tuple(on_device(np.ascontiguousarray(at), device) for at in (pages, tokens)), there


def on_device(numbers: Ints, device: torch.device) -> torch.Tensor:
    """On the current stream. Through pinned memory of torch's, which it keeps until the copy is done.

    A copy from pageable memory would hold up the caller until all that the stream has before it is done.
    """
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
