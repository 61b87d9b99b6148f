# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of a load of fp8 blocks: packed bytes on the device → an engine's pages, in one launch a window.

The same blocks through `lossy` and `copy_kernel` are nine launches a window, and what launches them is one thread of
the CPU: on an H100 a load of fp8 was bound by that thread (8 … 30 µs a launch), neither by the link nor by the device.

Bit for bit what `lossy` decodes, by integer arithmetic wherever a processor or the interpreter might do something
else: an e4m3 code becomes a float16 of the same sign, exponent and mantissa (subnormals too), 2⁻⁸ of its value.

A *row* is what of head_dim one head has at one token; *lanes* are the longest power of two, at most 128, that divides
it. Lanes share a scale and lie together in the slot, in the engine wherever its head_dim does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import gcd

import torch

from kvstore.copy_kernel import HAS_TRITON, launcher, most_programs
from kvstore.copy_windows import Part, Window

if HAS_TRITON:
    import triton
    import triton.language as tl

_MAX_LANES = 128
_TILE = 8 << 10
"""Values a program has at a time: 32 a thread."""
_NUM_WARPS = 8
_NUMBERS = ("planes", "pages", "slots", "items", "num_planes", "token_step", "head_step")
_SCALE_BYTES = 4
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, slots=True)
class _Constants:
    """The kernel's constants: one set is one kernel. Steps in elements of the engine, the rest in values or bytes."""

    PIECES: int
    """Of a block."""
    TOKENS: int
    """Of a piece."""
    HEADS: int
    DIM: int
    LANES: int
    KV: int
    DIM_STEP: int
    UNIT: int
    """Of the steps between tokens and between heads, which are given in it: see `copy_kernel` for why they are."""
    LAYER_BYTES: int
    """Of a block's layer in its slot: codes of `KV` planes, then their scales."""
    ROWS: int
    """Lanes' worth of values that a program has at a time."""
    CHUNKS: int
    """Of ROWS, that make a piece."""
    SLOT_ALIGN: int
    """Divides the address of every row of lanes in a slot."""
    PAGE_ALIGN: int
    """Divides the address of every piece in the engine."""
    DTYPE: str


class Unpacking:
    """Loads of one part, made by `unpackings`."""

    def __init__(self, part: Part) -> None:
        _, token_step, head_step, dim_step = part.steps
        _, kv, block_tokens, heads, dim = part.cell.shape
        lanes = gcd(dim, _MAX_LANES)
        rows = part.piece_tokens * heads * (dim // lanes)
        at_once = triton.next_power_of_2(min(rows, max(1, _TILE // lanes)))
        self._device = part.device
        self._constants = _Constants(
            PIECES=block_tokens // part.piece_tokens,
            TOKENS=part.piece_tokens,
            HEADS=heads,
            DIM=dim,
            LANES=lanes,
            KV=kv,
            DIM_STEP=dim_step,
            UNIT=gcd(16 // part.item_bytes, token_step, head_step),
            LAYER_BYTES=part.slot_layer_bytes,
            ROWS=at_once,
            CHUNKS=-(-rows // at_once),
            SLOT_ALIGN=gcd(16, lanes, part.slot_layer_bytes),
            PAGE_ALIGN=gcd(16, part.divisor),
            DTYPE=_DTYPES[part.dtype],
        )
        self._steps = token_step // self._constants.UNIT, head_step // self._constants.UNIT
        self._keywords = {**asdict(self._constants), "num_warps": _NUM_WARPS}
        self._launcher = launcher(_unpack, self._device.type, _NUMBERS)

    def launch(self, window: Window, slots: int) -> None:
        """On the current stream.

        Args:
            slots: address on the device of the window's packed blocks, one after the other; a multiple of 16.
        """
        made = self._constants
        num_planes = (window.high - window.low) * made.KV
        items = window.num_blocks * made.PIECES * num_planes * made.CHUNKS
        # Addresses as numbers: a tensor costs a cut here and a look by the launcher at whose memory it is.
        self._launcher[(min(items, most_programs(self._device)),)](
            window.planes,
            window.pages,
            slots,
            items,
            num_planes,
            *self._steps,
            **self._keywords,
        )


def unpackings(parts: Sequence[Part]) -> dict[Part, Unpacking]:
    """Of fp8 parts, those that the kernel can load: for odd sizes scales do not lie at multiples of their own."""
    return {
        part: Unpacking(part)
        for part in parts
        if part.slot_layer_bytes % _SCALE_BYTES == 0 and not fault(part.device, part.dtype)
    }


@functools.cache
def fault(device: torch.device, dtype: torch.dtype) -> str:
    """Why fp8 cannot be unpacked into `dtype` on `device` by the kernel; empty where it can. Tries every code once."""
    if not HAS_TRITON:
        return "triton is not installed"
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _fault(device, dtype)


def _fault(device: torch.device, dtype: torch.dtype) -> str:
    """One block of one token, two heads of 128, keys alone: half of the codes a head."""
    codes = torch.arange(256, dtype=torch.uint8)
    scales = torch.tensor([0.01, 3.0])
    exact = codes.view(torch.float8_e4m3fn).float().view(2, 128) * scales[:, None]
    packed = torch.cat((codes, scales.view(torch.uint8))).to(device)
    into = torch.zeros(2, 128, dtype=dtype, device=device)
    place = torch.tensor([into.data_ptr(), 0], dtype=torch.int64, device=device)
    constants = _Constants(
        PIECES=1, TOKENS=1, HEADS=2, DIM=128, LANES=128, KV=1, DIM_STEP=1, UNIT=8,
        LAYER_BYTES=264, ROWS=2, CHUNKS=1, SLOT_ALIGN=8, PAGE_ALIGN=16, DTYPE=_DTYPES[dtype],
    )  # fmt: skip
    try:
        launcher(_unpack, device.type, _NUMBERS)[(1,)](
            place.data_ptr(), place.data_ptr() + 8, packed.data_ptr(), 1, 1, 32, 16, **asdict(constants), num_warps=1
        )
        same = torch.allclose(into.cpu(), exact.to(dtype), rtol=0, atol=0, equal_nan=True)
    except Exception as error:  # noqa: BLE001  # a compiler, a linker, a driver: whatever it is, there is another way
        return f"{type(error).__name__}: {error}"
    return "" if same else "it made other values than torch"


def _unpack(  # type: ignore[no-untyped-def]  # Triton's own types; the capitals are its constants
    planes,
    pages,
    slots,
    items,
    num_planes,
    token_step,
    head_step,
    PIECES: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
    KV: tl.constexpr,  # noqa: N803
    DIM_STEP: tl.constexpr,  # noqa: N803
    UNIT: tl.constexpr,  # noqa: N803
    LAYER_BYTES: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    CHUNKS: tl.constexpr,  # noqa: N803
    SLOT_ALIGN: tl.constexpr,  # noqa: N803
    PAGE_ALIGN: tl.constexpr,  # noqa: N803
    DTYPE: tl.constexpr,  # noqa: N803
):
    planes_at = planes.to(tl.int64).to(tl.pointer_type(tl.int64))
    pages_at = pages.to(tl.int64).to(tl.pointer_type(tl.int64))
    first_slot = slots.to(tl.int64)
    token_far, head_far = token_step.to(tl.int64) * UNIT, head_step.to(tl.int64) * UNIT
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        plane = item // CHUNKS % num_planes
        piece = item // CHUNKS // num_planes
        engine = tl.load(planes_at + plane) + tl.load(pages_at + piece)
        layer = (piece // PIECES).to(tl.int64) * (num_planes // KV) + plane // KV
        start = first_slot + layer * LAYER_BYTES
        codes = start + (plane % KV * PIECES + piece % PIECES).to(tl.int64) * (TOKENS * HEADS * DIM)
        scales = start + KV * PIECES * TOKENS * HEADS * DIM + plane % KV * HEADS * 4
        rows = item % CHUNKS * ROWS + tl.arange(0, ROWS)
        inside = (rows < TOKENS * HEADS * (DIM // LANES))[:, None]
        head = rows // (DIM // LANES) % HEADS
        scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + head)[:, None]
        lanes = tl.arange(0, LANES)[None, :]
        codes_at = tl.multiple_of(codes.to(tl.pointer_type(tl.uint8)), SLOT_ALIGN)
        bits = tl.load(codes_at + (rows * LANES)[:, None] + lanes, mask=inside, other=0).to(tl.int32)
        half = ((bits & 127) << 7 | (bits & 128) << 8).to(tl.uint16).to(tl.float16, bitcast=True)
        value = tl.where((bits & 127) == 127, float("nan"), half.to(tl.float32) * 256.0) * scale
        # 64 bits: heads may lie as far apart as all the pages of one of them.
        row = (rows // (DIM // LANES * HEADS)).to(tl.int64) * token_far + head.to(tl.int64) * head_far
        row += (rows % (DIM // LANES)).to(tl.int64) * (LANES * DIM_STEP)
        if DTYPE == "bfloat16":
            # To the nearest, ties to even.
            word = value.to(tl.uint32, bitcast=True)
            word = (word + 32767 + ((word >> 16) & 1)) >> 16
            # CUDA's NaN has all bits of its mantissa set, and would be rounded up to a zero.
            word = tl.where(value == value, word, 32704)
            engine_at = tl.multiple_of(engine.to(tl.pointer_type(tl.uint16)), PAGE_ALIGN)
            tl.store(engine_at + row[:, None] + lanes * DIM_STEP, word.to(tl.uint16), mask=inside)
        else:
            engine_at = tl.multiple_of(engine.to(tl.pointer_type(tl.float16)), PAGE_ALIGN)
            tl.store(engine_at + row[:, None] + lanes * DIM_STEP, value.to(tl.float16), mask=inside)
