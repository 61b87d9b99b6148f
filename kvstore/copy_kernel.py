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
_MAX_NEAR_WORDS = 1 << 31
"""What numbers of 32 bits count."""
_NUMBERS = (
    "planes", "pages", "rows", "slots", "slot_step", "items", "num_planes", "chunks", "plane_bytes", "piece_bytes",
    "step0", "step1",
)  # fmt: skip


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
class Places:
    """Where a launch finds its bytes. Addresses on the device, as numbers: a tensor costs a cut here, and a look by the
    launcher at whose memory it is. Who launches keeps alive what they lead to.

    Attributes:
        planes: of a table, int64: address of each plane's first page, `[num_planes]`.
        pages: of a table, int64: bytes from there to each piece, `[num_blocks × pieces]`.
        slots: of the first block's bytes of the first of these planes; the others follow, `slot_step` bytes apart.
            Where that is 0, of a table, int64, of where each begins, `[num_blocks]`.
        alignment: bytes that divide all that the tables hold, and `slots` and `slot_step`.
        rows: of a table, int64: where in `pages` each plane's begin, `[num_planes]`, as a number of its entries; there
            an entry below 0 is a piece that is left out. 0 where all planes have the same, whole.
    """

    planes: int
    num_planes: int
    pages: int
    num_blocks: int
    pieces: int
    slots: int
    slot_step: int
    alignment: int
    rows: int = 0


@dataclass(frozen=True, slots=True)
class _Launch:
    """What a launch is told beside its places. `steps` in units of what everything is aligned to."""

    chunks: int
    steps: tuple[int, int]
    constants: dict[str, int | bool]


def copy_pieces(
    places: Places,
    shape: PieceShape,
    device: torch.device,
    *,
    plane_bytes: int,
    to_slots: bool,
    num_programs: int = 0,
) -> None:
    """Launch the copy of every piece of every plane on the current stream.

    Args:
        plane_bytes: what one plane of a block takes in a slot.
        num_programs: that share the work, at most; 0 for what fills the device.
    """
    if not places.num_blocks or not places.num_planes:
        return
    # Bytes beyond sixteen tell nothing, and would make each request's launch one of its own.
    made = _launch(
        shape,
        gcd(16, places.alignment),
        plane_bytes,
        places.pieces,
        tabled=not places.slot_step,
        grouped=places.rows != 0,
        to_slots=to_slots,
    )
    items = places.num_blocks * places.pieces * places.num_planes * made.chunks
    launcher(_copy, device.type, _NUMBERS)[(min(items, num_programs or most_programs(device)),)](
        places.planes,
        places.pages,
        places.rows,
        places.slots,
        places.slot_step,
        items,
        places.num_planes,
        made.chunks,
        plane_bytes,
        shape.num_bytes,
        *made.steps,
        **made.constants,
    )


@functools.lru_cache(maxsize=256)
def _launch(
    shape: PieceShape, alignment: int, plane_bytes: int, pieces: int, *, tabled: bool, grouped: bool, to_slots: bool
) -> _Launch:
    word = shape.word_bytes(alignment, plane_bytes, shape.num_bytes)
    inner = shape.sizes[2] * shape.item_bytes // word if shape.steps[2] == shape.item_bytes else shape.sizes[2]
    inner_step = 1 if shape.steps[2] == shape.item_bytes else shape.steps[2] // word
    if shape.steps[2] != shape.item_bytes and word < shape.item_bytes:
        raise ValueError(f"elements of {shape.item_bytes} bytes lie at multiples of {word}")
    words = shape.num_bytes // word
    block = min(triton.next_power_of_2(words), _BLOCK_BYTES // word)
    # Sixteen bytes a thread where everything divides by it: the compiler cannot know what a table holds.
    wide = gcd(16, alignment, plane_bytes, shape.num_bytes, *shape.steps[:2], inner * word) == 16
    unit = 16 if wide and inner_step == 1 else word
    span = (inner - 1) * inner_step + sum((shape.sizes[at] - 1) * shape.steps[at] // word for at in (0, 1))
    return _Launch(
        chunks=-(-words // block),
        steps=(shape.steps[0] // unit, shape.steps[1] // unit),
        constants={
            "PIECES": pieces,
            "SIZE0": shape.sizes[0],
            "SIZE1": shape.sizes[1],
            "SIZE2": inner,
            "STEP2": inner_step,
            "WORDS": words,
            "WORD_BYTES": word,
            "ALIGN": unit,
            "BLOCK": block,
            "FAR": span >= _MAX_NEAR_WORDS,
            "TABLED": tabled,
            "GROUPED": grouped,
            "TO_SLOTS": to_slots,
            "num_warps": _NUM_WARPS,
        },
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
    table = torch.tensor([source.data_ptr(), 0, 32], dtype=torch.int64, device=device)
    at = table.data_ptr()
    try:
        copy_pieces(Places(at, 1, at + 8, 1, 2, into.data_ptr(), 64, 32), whole, device, plane_bytes=64, to_slots=True)
        same = torch.equal(into, source)
    except Exception as error:  # noqa: BLE001  # a compiler, a linker, a driver: whatever it is, there is another way
        return f"{type(error).__name__}: {error}"
    return "" if same else "it copied other bytes than it was given"


def _copy(  # type: ignore[no-untyped-def]  # Triton's own types; the capitals are its constants
    planes,
    pages,
    rows,
    slots,
    slot_step,
    items,
    num_planes,
    chunks,
    plane_bytes,
    piece_bytes,
    step0,
    step1,
    PIECES: tl.constexpr,  # noqa: N803
    SIZE0: tl.constexpr,  # noqa: N803
    SIZE1: tl.constexpr,  # noqa: N803
    SIZE2: tl.constexpr,  # noqa: N803
    STEP2: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    WORD_BYTES: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    FAR: tl.constexpr,  # noqa: N803
    TABLED: tl.constexpr,  # noqa: N803
    GROUPED: tl.constexpr,  # noqa: N803
    TO_SLOTS: tl.constexpr,  # noqa: N803
):
    planes_at = planes.to(tl.int64).to(tl.pointer_type(tl.int64))
    pages_at = pages.to(tl.int64).to(tl.pointer_type(tl.int64))
    rows_at = rows.to(tl.int64).to(tl.pointer_type(tl.int64))
    first_slot = slots.to(tl.int64)
    # Times a constant, so that the compiler knows what divides a step. The steps themselves are none: those of a cache
    # that grows are others each time, and would be a kernel each time.
    if FAR:
        step0, step1 = step0.to(tl.int64), step1.to(tl.int64)
    far, near = step0 * (ALIGN // WORD_BYTES), step1 * (ALIGN // WORD_BYTES)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chunk = item % chunks
        plane = item // chunks % num_planes
        piece = item // chunks // num_planes
        if GROUPED:
            place = tl.load(pages_at + tl.load(rows_at + plane) + piece)
            engine = tl.load(planes_at + plane) + tl.maximum(place, 0)
        else:
            engine = tl.load(planes_at + plane) + tl.load(pages_at + piece)
        block = piece // PIECES
        if TABLED:
            slot = tl.load(first_slot.to(tl.pointer_type(tl.int64)) + block)
        else:
            slot = first_slot + block.to(tl.int64) * slot_step
        slot += (piece % PIECES) * piece_bytes + plane.to(tl.int64) * plane_bytes
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
        if GROUPED:
            inside = words < tl.where(place < 0, 0, WORDS)
        else:
            inside = words < WORDS
        if FAR:
            words = words.to(tl.int64)
        # Axes of one are left out by hand: through a remainder by one the compiler loses sight of the alignment.
        if SIZE0 * SIZE1 == 1:
            at = words * STEP2
        elif SIZE0 == 1:
            at = words % SIZE2 * STEP2 + words // SIZE2 * near
        else:
            at = words % SIZE2 * STEP2 + words // SIZE2 % SIZE1 * near + words // (SIZE1 * SIZE2) * far
        if TO_SLOTS:
            tl.store(slot_at + words, tl.load(engine_at + at, mask=inside), mask=inside)
        else:
            tl.store(engine_at + at, tl.load(slot_at + words, mask=inside), mask=inside)
