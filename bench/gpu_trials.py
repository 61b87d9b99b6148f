# SPDX-License-Identifier: Apache-2.0
"""Phase of `bench gpu` that is run when something is to be chosen: windows of the link, and copies beside computing.

    windows   shares of large pinned copies by the size of a window, how many stages it takes turns with, and over how
              many streams a direction's windows cross the link: what lies between two windows that follow each other
    rows      a promotion from the device tier by how many programs share it, by itself and beside matrix products:
              whether it can hide behind a forward pass, and what the 8 GiB that 4 GiB cost cannot

Nothing here has a target, and nothing of it is published: a choice that is made by it is measured again by `link`,
`decode` and `ttft`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bench.gpu_board import Board, median
from bench.gpu_copies import CopyRig, bidirectional, both_at_once, ceiling_tensors, copy_rig, model_of
from kvstore import copy_kernel
from kvstore.device_copy import DeviceCopier
from kvstore.layout import layout_of
from kvstore.row_copy import RowCopier, Rows
from kvstore.transfer import PageCopier, PagedKV

_MIB = 1 << 20
_REPEATS = 3
_LEAST_S = 15.0
"""For the rows, which come last."""


@dataclass(frozen=True, slots=True)
class Choice:
    stage_bytes: int
    num_stages: int
    num_lanes: int

    @property
    def name(self) -> str:
        return f"{self.stage_bytes // _MIB} MiB, {self.num_stages} stages, {self.num_lanes} lanes"


def choices(board: Board) -> Iterator[Choice]:
    """The size, and a load's stages and lanes, that the code has now come first: the clock cuts off what comes last."""
    sizes = (64, 128, 256, 32) if board.on_cuda else (1, 2)
    for lanes in (1, 2):
        for stages in (2, 3, 1):
            for size in sizes:
                yield Choice(size * _MIB, stages, lanes)


def trials(board: Board) -> None:
    """window_… and rows_… figures."""
    _windows(board)
    _rows(board)


def _windows(board: Board) -> None:
    with copy_rig(board) as rig:
        large, pinned = ceiling_tensors(board)
        half = len(rig.blocks) // 2
        ceilings: dict[str, Callable[[], object]] = {
            "d2h": lambda: pinned.copy_(large, non_blocking=True),
            "h2d": lambda: large.copy_(pinned, non_blocking=True),
            "bidi": both_at_once(board, large, pinned),
        }
        best: dict[str, tuple[float, str]] = {}
        for choice in choices(board):
            if board.left_s < _LEAST_S and board.on_cuda:
                board.row("trials", arm=choice.name, skipped="no time left")
                continue
            copier = copier_of(rig, choice)
            # Ceilings anew for each, in turns with it: clocks and neighbours change in a minute.
            arms = {f"{name} ceiling": action for name, action in ceilings.items()} | {
                "d2h": lambda copier=copier: copier.gather(rig.page_ids, rig.blocks),
                "h2d": lambda copier=copier: copier.scatter(rig.page_ids, rig.blocks),
                "bidi": lambda copier=copier: bidirectional(copier, rig, half),
            }
            seconds = board.alternate(arms, _REPEATS)
            shares = {}
            for name in ceilings:
                ceiling_bytes = (2 if name == "bidi" else 1) * large.nbytes
                ceiling = ceiling_bytes / median(seconds[f"{name} ceiling"])
                shares[name] = rig.num_bytes / median(seconds[name]) / ceiling
                best[name] = max(best.get(name, (0.0, "")), (shares[name], choice.name))
            board.row("trials", arm=choice.name, seconds=seconds, **shares)
        for name, (share, chosen) in best.items():
            board.figure(f"window_{name}_best", share)
            board.figure(f"window_{name}_choice", chosen)


def copier_of(rig: CopyRig, choice: Choice) -> PageCopier:
    """One whose windows are cut and queued by `choice`."""
    copier = rig.copier()
    copier._device = DeviceCopier(
        rig.layout,
        copier._cells,
        [copier._planes_of(cell) for cell in copier._cells],
        copier._piece_tokens,
        stage_bytes=choice.stage_bytes,
        num_stages=(choice.num_stages, choice.num_stages),
        num_lanes=choice.num_lanes,
    )
    return copier


def _rows(board: Board) -> None:
    """Promotions of a prefix of `num_blocks`, into a cache as the transformers connector has it."""
    if copy_kernel.fault(board.device):
        board.row("trials", arm="rows", skipped="there is no kernel here")
        return
    sizes, layout = board.sizes, layout_of(model_of(board))
    tokens = sizes.num_blocks * sizes.block_tokens
    shape = (sizes.layers, 2, sizes.heads, tokens, sizes.dim)
    cache = torch.zeros(shape, dtype=torch.bfloat16, device=board.device)
    paged = PagedKV.of([cache], "layer kv head slot dim", page_tokens=sizes.block_tokens)
    memory = torch.zeros((sizes.num_blocks, *layout.parts[0].shape), dtype=torch.bfloat16, device=board.device)
    order = np.random.default_rng(0).permutation(sizes.num_blocks)
    rows = Rows(memory, np.arange(sizes.num_blocks), order)
    compute = _products(board)
    filling = copy_kernel.most_programs(board.device)
    for part in (1, 2, 4, 8) if board.on_cuda else (1, 2):
        if board.left_s <= 0:
            board.row("trials", arm=f"rows, {filling // part} programs", skipped="no time left")
            continue
        copier = RowCopier(layout, paged, num_programs=max(1, filling // part))
        promote = lambda copier=copier: copier.start(rows, into_rows=False, step_layers=sizes.step_layers)

        def both(promote: Callable[[], object] = promote) -> None:
            promote()
            compute()

        seconds = board.alternate({"rows": promote, "compute": compute, "both": both}, _REPEATS)
        took = {name: median(values) for name, values in seconds.items()}
        # Of the shorter of the two, what was hidden behind the other.
        hidden = (took["rows"] + took["compute"] - took["both"]) / min(took["rows"], took["compute"])
        moved = 2 * cache.nbytes  # each byte is read and written
        board.row("trials", arm=f"rows, {filling // part} programs", seconds=seconds, hidden=hidden, moved_bytes=moved)
        board.figure(f"rows_gb_per_s_of_{part}", moved / took["rows"] / 1e9)
        board.figure(f"rows_hidden_share_of_{part}", hidden)


def _products(board: Board) -> Callable[[], object]:
    """Matrix products of a suffix of `suffix_tokens` through as many layers: computing that leaves memory some room."""
    width, rounds = (4096, 64) if board.on_cuda else (64, 2)
    weight = torch.randn(width, width, dtype=torch.bfloat16, device=board.device) / width**0.5
    hidden = torch.randn(16 * board.sizes.suffix_tokens, width, dtype=torch.bfloat16, device=board.device)

    def products() -> None:
        out = hidden
        for _ in range(rounds):
            out = out @ weight

    return products
