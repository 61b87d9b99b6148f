# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel between an engine's pages and canonical bytes, which lie on the device or in pinned host memory.

A *piece* is what a block has in one page: the tokens of the smaller of the two. The kernel moves pieces of many blocks
over many planes (a layer's keys, or its values) in one launch, from and to addresses in tables. It reads and writes
words, never values. On CPU tensors it runs in Triton's interpreter: the same body under the same tests.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

_BLOCK_BYTES = 16 << 10
_NUM_WARPS = 8
_MAX_WORD_BYTES = 8
_NUMBERS = ("items", "num_planes", "chunks", "plane_bytes", "piece_bytes")


@dataclass(frozen=True, slots=True)
class PieceShape:
    """One piece of one plane: three axes of the engine's, in canonical order, over contiguous bytes of a slot.

    Attributes:
        sizes, steps: of each axis; steps in bytes, the innermost size in items of `item_bytes`.
    """

    sizes: tuple[int, int, int]
    steps: tuple[int, int, int]
    item_bytes: int

    @classmethod
    def of(cls, sizes: Sequence[int], steps: Sequence[int], item_bytes: int) -> PieceShape:
        """With axes that follow each other without a gap made one."""
        merged: list[tuple[int, int]] = []
        for size, step in zip(sizes, steps, strict=True):
            if size == 1:
                continue
            if merged and merged[-1][1] == size * step:
                merged[-1] = (merged[-1][0] * size, step)
            else:
                merged.append((size, step))
        merged = [(1, 0)] * (3 - len(merged)) + merged
        if merged[-1] == (1, 0):
            merged[-1] = (1, item_bytes)
        (a, x), (b, y), (c, z) = merged
        return cls((a, b, c), (x, y, z), item_bytes)

    @property
    def num_bytes(self) -> int:
        return self.sizes[0] * self.sizes[1] * self.sizes[2] * self.item_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes that lie together in the engine."""
        return self.item_bytes * (self.sizes[2] if self.steps[2] == self.item_bytes else 1)

    def word_bytes(self, *others: int) -> int:
        """The largest word that divides rows, steps and `others` (addresses, distances), at most `_MAX_WORD_BYTES`."""
        steps = self.steps if self.steps[2] != self.item_bytes else self.steps[:2]
        return gcd(_MAX_WORD_BYTES, self.row_bytes, *steps, *others)


@dataclass(frozen=True, slots=True)
class Tables:
    """Where a launch finds its bytes: int64 tensors on the device.

    Attributes:
        planes: address of each plane's first page, `[planes]`.
        pages: bytes from there to each piece, `[blocks × pieces]`.
        slots: address of each block's bytes of the first of these planes, `[blocks]`.
        alignment: bytes that divide everything above.
    """

    planes: torch.Tensor
    pages: torch.Tensor
    slots: torch.Tensor
    alignment: int


def copy_pieces(tables: Tables, shape: PieceShape, *, plane_bytes: int, to_slots: bool) -> None:
    """Launch the copy of every piece of every plane on the current stream.

    Args:
        plane_bytes: what one plane of a block takes in a slot.
    """
    device = tables.pages.device
    num_blocks, num_planes = tables.slots.numel(), tables.planes.numel()
    if not num_blocks or not num_planes:
        return
    pieces = tables.pages.numel() // num_blocks
    word = shape.word_bytes(tables.alignment, plane_bytes, shape.num_bytes)
    inner = shape.sizes[2] * shape.item_bytes // word if shape.steps[2] == shape.item_bytes else shape.sizes[2]
    inner_step = 1 if shape.steps[2] == shape.item_bytes else shape.steps[2] // word
    if shape.steps[2] != shape.item_bytes and word < shape.item_bytes:
        raise ValueError(f"elements of {shape.item_bytes} bytes lie at multiples of {word}")
    words = shape.num_bytes // word
    block = min(triton.next_power_of_2(words), _BLOCK_BYTES // word)
    chunks = -(-words // block)
    items = num_blocks * pieces * num_planes * chunks
    # Sixteen bytes a thread where everything divides by it: the compiler cannot know what a table holds.
    wide = gcd(16, tables.alignment, plane_bytes, shape.num_bytes, *shape.steps[:2], inner * word) == 16
    grid = (min(items, most_programs(device)),)
    launcher(_copy, device.type, _NUMBERS)[grid](
        tables.planes,
        tables.pages,
        tables.slots,
        items,
        num_planes,
        chunks,
        plane_bytes,
        shape.num_bytes,
        PIECES=pieces,
        SIZE0=shape.sizes[0],
        SIZE1=shape.sizes[1],
        SIZE2=inner,
        STEP0=shape.steps[0] // word,
        STEP1=shape.steps[1] // word,
        STEP2=inner_step,
        WORDS=words,
        WORD_BYTES=word,
        ALIGN=16 if wide and inner_step == 1 else word,
        BLOCK=block,
        TO_SLOTS=to_slots,
        num_warps=_NUM_WARPS,
    )


@functools.cache
def most_programs(device: torch.device) -> int:
    """What fills `device`."""
    if device.type != "cuda":
        return 4  # the interpreter runs them one after the other: more than one, so that sharing is exercised
    return 8 * int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def launcher(kernel: Callable[..., None], device_type: str, numbers: tuple[str, ...]) -> Any:
    """`kernel` compiled, or interpreted on the CPU, whatever TRITON_INTERPRET says. `numbers`: those it takes."""
    if device_type == "cpu":
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(kernel)
    # A number that divides by sixteen, or is one, would otherwise be a kernel of its own: a second of compiling in the
    # middle of serving, for some count of blocks that had not come up before.
    return triton.JITFunction(kernel, do_not_specialize=list(numbers))


@functools.cache
def fault(device: torch.device) -> str:
    """Why the kernel cannot be used on `device`; empty where it can. Tries it on a few bytes the first time."""
    if not HAS_TRITON:
        return "triton is not installed"
    # Triton launches on the thread's device, which need not be this one.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _fault(device)


def _fault(device: torch.device) -> str:
    source = torch.arange(64, dtype=torch.uint8, device=device)
    into = torch.zeros_like(source)
    whole = PieceShape.of((1, 1, 32), (0, 0, 1), 1)
    place = [torch.tensor(at, dtype=torch.int64, device=device) for at in ([source.data_ptr()], [0, 32])]
    slots = torch.tensor([into.data_ptr()], dtype=torch.int64, device=device)
    try:
        copy_pieces(Tables(place[0], place[1], slots, 32), whole, plane_bytes=64, to_slots=True)
        same = torch.equal(into, source)
    except Exception as error:  # noqa: BLE001  # a compiler, a linker, a driver: whatever it is, there is another way
        return f"{type(error).__name__}: {error}"
    return "" if same else "it copied other bytes than it was given"


def _copy(  # type: ignore[no-untyped-def]  # Triton's own types; the capitals are its constants
    planes,
    pages,
    slots,
    items,
    num_planes,
    chunks,
    plane_bytes,
    piece_bytes,
    PIECES: tl.constexpr,  # noqa: N803
    SIZE0: tl.constexpr,  # noqa: N803
    SIZE1: tl.constexpr,  # noqa: N803
    SIZE2: tl.constexpr,  # noqa: N803
    STEP0: tl.constexpr,  # noqa: N803
    STEP1: tl.constexpr,  # noqa: N803
    STEP2: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    WORD_BYTES: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    TO_SLOTS: tl.constexpr,  # noqa: N803
):
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chunk = item % chunks
        plane = item // chunks % num_planes
        piece = item // chunks // num_planes
        engine = tl.load(planes + plane) + tl.load(pages + piece)
        slot = tl.load(slots + piece // PIECES) + (piece % PIECES) * piece_bytes + plane.to(tl.int64) * plane_bytes
        if WORD_BYTES == 8:
            engine_at = engine.to(tl.pointer_type(tl.int64))
            slot_at = slot.to(tl.pointer_type(tl.int64))
        elif WORD_BYTES == 4:
            engine_at = engine.to(tl.pointer_type(tl.int32))
            slot_at = slot.to(tl.pointer_type(tl.int32))
        elif WORD_BYTES == 2:
            engine_at = engine.to(tl.pointer_type(tl.int16))
            slot_at = slot.to(tl.pointer_type(tl.int16))
        else:
            engine_at = engine.to(tl.pointer_type(tl.int8))
            slot_at = slot.to(tl.pointer_type(tl.int8))
        engine_at = tl.multiple_of(engine_at, ALIGN)
        slot_at = tl.multiple_of(slot_at, ALIGN)
        words = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = words < WORDS
        # Axes of one are left out by hand: through a remainder by one the compiler loses sight of the alignment.
        if SIZE0 * SIZE1 == 1:
            at = words * STEP2
        elif SIZE0 == 1:
            at = words % SIZE2 * STEP2 + words // SIZE2 * STEP1
        else:
            at = words % SIZE2 * STEP2 + words // SIZE2 % SIZE1 * STEP1 + words // (SIZE1 * SIZE2) * STEP0
        if TO_SLOTS:
            tl.store(slot_at + words, tl.load(engine_at + at, mask=inside), mask=inside)
        else:
            tl.store(engine_at + at, tl.load(slot_at + words, mask=inside), mask=inside)
