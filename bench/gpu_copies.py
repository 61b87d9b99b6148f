# SPDX-License-Identifier: Apache-2.0
"""Phases of `bench gpu` about copies: the same bytes every way, in the order that events promise, and the link's rate.

Ceilings are measured in the same run, in turns with what they are compared with: one large asynchronous copy between
the device and pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu_board import Board, median
from kvstore import copy_kernel
from kvstore.arena import Arena
from kvstore.block import ModelId
from kvstore.layout import BlockLayout, layout_of
from kvstore.lossy import FORMATS, drift
from kvstore.pinning import Pinning
from kvstore.transfer import PageCopier, PagedKV, Way

Blocks = list[tuple[int, list[memoryview]]]


def model_of(board: Board) -> ModelId:
    sizes = board.sizes
    return ModelId(
        model="shape only",
        revision="0",
        kv_dtype="bfloat16",
        num_layers=sizes.layers,
        num_kv_heads=sizes.heads,
        head_dim=sizes.dim,
        block_tokens=sizes.block_tokens,
    )


@dataclass
class CopyRig:
    """An engine's pages in random order, and a slot a block."""

    layout: BlockLayout
    kv: PagedKV
    page_ids: list[int]
    blocks: Blocks

    @property
    def num_bytes(self) -> int:
        return len(self.blocks) * self.layout.block_bytes

    def copier(self, way: Way | None = None) -> PageCopier:
        """One that takes the device's path on the CPU too."""
        made = PageCopier(self.layout, self.kv, way=way)
        made._by_address = False
        return made


@contextmanager
def copy_rig(board: Board) -> Iterator[CopyRig]:
    sizes, layout = board.sizes, layout_of(model_of(board))
    pages = sizes.num_blocks * sizes.block_tokens // sizes.page_tokens
    shape = (2, pages + 1, sizes.page_tokens, sizes.heads, sizes.dim)
    tensors = [torch.randn(shape, dtype=torch.bfloat16, device=board.device) for _ in range(sizes.layers)]
    kv = PagedKV.of(tensors, "kv page token head dim")
    order = torch.randperm(pages + 1, generator=torch.Generator().manual_seed(0))[:pages].tolist()
    with _slots(board, layout, sizes.num_blocks) as blocks:
        yield CopyRig(layout, kv, order, blocks)


def ways(board: Board) -> list[Way]:
    """Those that can run here."""
    kernel = not copy_kernel.fault(board.device)
    return [way for way in Way if kernel or way is not Way.STAGED]


# -- the same bytes ----------------------------------------------------------------------------------------------


def check_bytes(board: Board) -> None:
    """Every way, layout and page size gives the CPU's bytes; forward passes and copies wait for each other."""
    board.figure("kernel_fault", copy_kernel.fault(board.device) or None)
    wrong = skipped = 0
    for axes in (
        "kv page token head dim",
        "kv page head token dim",
        "page token head kv dim",
        "page layer kv token head dim",
    ):
        for page_tokens in (16, 32, 64, 128, 256) if board.on_cuda else (4, 16, 32):
            if board.left_s <= 0:
                board.row("check", axes=axes, page_tokens=page_tokens, skipped="no time left")
                skipped += 1
                continue
            for way in ways(board):
                same = _same_bytes(board, axes, page_tokens, way)
                wrong += not same
                board.row("check", axes=axes, page_tokens=page_tokens, way=way.value, equal=same)
            board.write()
    # What was not looked at is not known to be equal.
    board.figure("bytes_equal", None if skipped and not wrong else wrong == 0)
    board.figure("order_kept", min(_order_kept(board, way) for way in ways(board)))
    for name in FORMATS:
        values = torch.randn(4, 2, 2, 64, 8, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        on_device = FORMATS[name].encode(values.to(board.device))
        board.figure(f"{name}_bytes_equal", torch.equal(on_device.cpu(), FORMATS[name].encode(values)))
        board.figure(f"{name}_relative_rms_normal", drift(values.to(board.device), name).relative_rms)


def _same_bytes(board: Board, axes: str, page_tokens: int, way: Way) -> bool:
    heads, dim, layers, block_tokens = 4, 64, 3, 64 if board.on_cuda else 16
    layout = layout_of(
        replace(model_of(board), num_layers=layers, num_kv_heads=heads, head_dim=dim, block_tokens=block_tokens)
    )
    pages = max(6, 4 * block_tokens // page_tokens)
    size = {"layer": layers, "kv": 2, "page": pages, "token": page_tokens, "head": heads, "dim": dim}
    shape = [size[name] for name in axes.split()]
    host = [torch.randn(shape).bfloat16() for _ in range(1 if "layer" in axes else layers)]
    table = torch.randperm(pages).tolist()
    num_blocks = min(3, pages * page_tokens // block_tokens)
    wanted: Blocks = [(index, [memoryview(bytearray(layout.block_bytes))]) for index in range(num_blocks)]
    there = [tensor.to(board.device) for tensor in host]
    PageCopier(layout, PagedKV.of(host, axes)).gather(table, wanted)
    copier = PageCopier(layout, PagedKV.of(there, axes), way=way)
    copier._by_address = False
    with _slots(board, layout, num_blocks) as slots:
        copier.gather(table, slots)
        same = slots == wanted
        for tensor in (*host, *there):
            tensor.zero_()
        PageCopier(layout, PagedKV.of(host, axes)).scatter(table, wanted)
        copier.scatter(table, slots)
    return same and all(torch.equal(a.cpu(), b) for a, b in zip(there, host, strict=True))


@contextmanager
def _slots(board: Board, layout: BlockLayout, num_blocks: int) -> Iterator[Blocks]:
    """Slots in an arena, pinned where there is CUDA."""
    arena = Arena(num_blocks * -(-layout.block_bytes // 4096) * 4096 + (1 << 20), prefault=False)
    found = arena.acquire_many(layout.block_bytes, num_blocks)
    pinning = Pinning(arena.view(0, arena.capacity_bytes)) if board.on_cuda else None
    if pinning is not None and not pinning.wait():
        raise RuntimeError(f"pinning failed: {pinning.failure}")
    try:
        yield [(index, [arena.view(at, layout.block_bytes)]) for index, at in enumerate(found)]
    finally:
        if pinning is not None:
            pinning.close()
        arena.close()


def _order_kept(board: Board, way: Way) -> bool:
    """A forward pass, as a CUDA graph on a device, writes pages; they are saved, overwritten, loaded and read."""
    layout = layout_of(replace(model_of(board), num_layers=2))
    sizes = board.sizes
    blocks, pages = 16, 16 * sizes.block_tokens // sizes.page_tokens
    shape = (2, 2, pages, sizes.page_tokens, sizes.heads, sizes.dim)
    whole = torch.zeros(shape, dtype=torch.bfloat16, device=board.device)
    value = torch.zeros((), dtype=torch.bfloat16, device=board.device)
    busy = torch.randn(2048, 2048, device=board.device) if board.on_cuda else torch.randn(8, 8)

    def forward() -> None:
        result = busy
        for _ in range(8):  # long enough that a copy that does not wait comes too early
            result = torch.tanh(result @ busy)
        whole.copy_((value + 0 * result.mean()).to(whole.dtype).expand_as(whole))

    run: Callable[[], object] = forward
    if board.on_cuda:
        forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        run = graph.replay
    copier = PageCopier(layout, PagedKV.of([whole], "layer kv page token head dim"), way=way)
    copier._by_address = False
    with _slots(board, layout, blocks) as slots:
        return _turns(copier, whole, value, run, slots)


def _turns(
    copier: PageCopier, whole: torch.Tensor, value: torch.Tensor, run: Callable[[], object], slots: Blocks
) -> bool:
    pages = copier.paged.num_pages
    kept = True
    for turn in range(8):
        value.fill_(2 * turn + 1)
        run()
        saving = copier.start_gather(range(pages), slots)
        saving.order()
        value.fill_(2 * turn + 2)
        run()
        saving.finish()
        held = [torch.frombuffer(views[0], dtype=torch.bfloat16) for _, views in slots]
        kept = kept and all(bool((one == 2 * turn + 1).all()) for one in held)
        loading = copier.start_scatter(range(pages), slots, step_layers=1)
        for layer in range(2):
            loading.order(layer)
            kept = kept and bool((whole[layer] == 2 * turn + 1).all())
        loading.finish()
    return kept


# -- the link ----------------------------------------------------------------------------------------------------


def link(board: Board) -> None:
    """d2h_ratio, h2d_ratio and bidi_ratio, for every way."""
    with copy_rig(board) as rig:
        large, pinned = ceiling_tensors(board)
        arms: dict[str, Callable[[], object]] = {
            "d2h ceiling": lambda: pinned.copy_(large, non_blocking=True),
            "h2d ceiling": lambda: large.copy_(pinned, non_blocking=True),
            "bidi ceiling": both_at_once(board, large, pinned),
        }
        half = len(rig.blocks) // 2
        for way in ways(board):
            copier = rig.copier(way)
            arms[f"d2h {way.value}"] = lambda copier=copier: copier.gather(rig.page_ids, rig.blocks)  # type: ignore[misc]
            arms[f"h2d {way.value}"] = lambda copier=copier: copier.scatter(rig.page_ids, rig.blocks)  # type: ignore[misc]
            arms[f"bidi {way.value}"] = lambda copier=copier: bidirectional(copier, rig, half)  # type: ignore[misc]
        seconds = board.alternate(arms)
        rates = {
            name: (large.nbytes if "ceiling" in name else rig.num_bytes) / median(s) for name, s in seconds.items()
        }
        rates["bidi ceiling"] *= 2
        for name, rate in rates.items():
            direction = name.split()[0]
            share = rate / rates[f"{direction} ceiling"]
            board.row("link", arm=name, bytes_per_s=rate, share=share, seconds=seconds[name])
            if "ceiling" not in name:
                board.figure(f"{direction}_ratio_{name.split()[1]}", share)
            else:
                board.figure(f"{direction}_ceiling_gb_per_s", rate / 1e9)
        device = rig.copier()._on_device()
        chosen = device.way.value
        board.figure("way", chosen)
        board.figure("copy_engine", type(device._engine).__name__)
        for direction in ("d2h", "h2d", "bidi"):
            board.figure(f"{direction}_ratio", rates[f"{direction} {chosen}"] / rates[f"{direction} ceiling"])


def ceiling_tensors(board: Board) -> tuple[torch.Tensor, torch.Tensor]:
    size = board.sizes.ceiling_bytes
    large = torch.zeros(size, dtype=torch.uint8, device=board.device)
    return large, torch.zeros(size, dtype=torch.uint8, pin_memory=board.on_cuda)


def both_at_once(board: Board, large: torch.Tensor, pinned: torch.Tensor) -> Callable[[], object]:
    """As much each way on two streams, to the end."""
    if not board.on_cuda:
        return lambda: (pinned.copy_(large), large.copy_(pinned))
    other, other_pinned = torch.zeros_like(large), torch.zeros_like(pinned).pin_memory()
    streams: list[Any] = [torch.cuda.Stream(), torch.cuda.Stream()]  # type: ignore[no-untyped-call]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            pinned.copy_(large, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            other.copy_(other_pinned, non_blocking=True)
        for stream in streams:
            stream.synchronize()

    return both


def bidirectional(copier: PageCopier, rig: CopyRig, half: int) -> None:
    """Save the first half of the blocks and load the second, at once."""
    saving = copier.start_gather(rig.page_ids, rig.blocks[:half])
    loading = copier.start_scatter(rig.page_ids, rig.blocks[half:])
    saving.finish()
    loading.finish()
