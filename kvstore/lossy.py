# SPDX-License-Identifier: Apache-2.0
"""Lossy formats of KV: fewer bytes over the link and in every tier, at an error that `drift` measures.

    fp8     e4m3, one float32 scale for keys and one for values of each layer, head and block
    nvfp4   e2m1, an e4m3 scale for 16 values along head_dim, over a float32 scale as in fp8

Off unless a namespace asks: `kv_dtype="bfloat16+fp8"` is another ModelId, so neither its blocks nor its ids can be
taken for exact ones. Bytes of one layer: fp8 `[kv][tokens][heads][dim]` then float32 `[kv][heads]`; nvfp4
`[kv][tokens][heads][dim / 2]` with the even value in the low half, e4m3 `[kv][tokens][heads][dim / 16]`, float32
`[kv][heads]`. Layers follow one another, so that a range of layers is one range of bytes.

The same torch operations run on every device: the CPU is the reference. NaN becomes 0, infinities the largest finite
value of their group: one such value must not take a head's scale with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvstore.layout import NVFP4_GROUP

_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

Shape = tuple[int, int, int, int, int]
"""[layers, kv, tokens, heads, head_dim]"""


@dataclass(frozen=True, slots=True)
class Format:
    """How values become bytes and come back.

    Attributes:
        encode: values `[blocks, layers, kv, tokens, heads, head_dim]` → uint8 `[blocks, layers, layer bytes]`.
        decode: such bytes, the shape of a block's values, and their dtype → the values.
    """

    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor, Shape, torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Drift:
    """What a format does to values. `relative_rms`: RMS of the error over RMS of the values."""

    relative_rms: float
    max_over_amax: float
    """Largest error as a share of the largest value."""


def drift(values: torch.Tensor, name: str) -> Drift:
    """The error that format `name` makes on `values`, shaped as for `encode`."""
    made = FORMATS[name]
    layers, kv, tokens, heads, dim = values.shape[1:]
    back = made.decode(made.encode(values), (layers, kv, tokens, heads, dim), values.dtype)
    exact = values.float()
    error = back.float() - exact
    rms, largest = exact.square().mean().sqrt().item(), exact.abs().max().item()
    worst = error.abs().max().item()
    return Drift(error.square().mean().sqrt().item() / rms if rms else 0.0, worst / largest if largest else 0.0)


def _finite(values: torch.Tensor) -> torch.Tensor:
    """As float32, with NaN as 0 and infinities as the largest finite value of their group."""
    wide = values.float()
    finite = torch.where(wide.isfinite(), wide, 0.0)
    limit = _largest(finite)
    return torch.where(wide.isinf(), torch.copysign(limit, wide), finite)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block, layer, kv and head, `[blocks, layers, kv, 1, heads, 1]`."""
    return values.abs().amax(dim=(3, 5), keepdim=True)


def _scale(values: torch.Tensor, top: float) -> torch.Tensor:
    """What brings each group's largest value to `top`; 1 for zeros, and where it would vanish."""
    scale = _over(_largest(values), top)
    return torch.where(scale > 0, scale, 1.0)


def _over(values: torch.Tensor, divisor: float) -> torch.Tensor:
    # By a tensor: on CUDA torch multiplies by the reciprocal of a number, which can be one ulp beside the quotient.
    return values / torch.full_like(values, divisor)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """`[blocks, layers, …]` as uint8 `[blocks, layers, bytes]`."""
    return values.contiguous().flatten(2).view(torch.uint8)


def _floats(raw: torch.Tensor, kv: int, heads: int) -> torch.Tensor:
    """Scales of a layer's end, `[blocks, layers, kv, 1, heads, 1]`."""
    # Cloned: its offset in a layer need not be a multiple of four.
    scales = raw.clone(memory_format=torch.contiguous_format).view(torch.float32)
    return scales.view(*raw.shape[:2], kv, 1, heads, 1)


# -- fp8 ---------------------------------------------------------------------------------------------------------


def _encode_fp8(values: torch.Tensor) -> torch.Tensor:
    wide = _finite(values)
    scale = _scale(wide, _E4M3_MAX)
    # Clamped: a quotient can round to just above the top, which e4m3 would make a NaN.
    packed = (wide / scale).clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return torch.cat((_bytes(packed), _bytes(scale)), dim=-1)


def _decode_fp8(raw: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    _, kv, tokens, heads, dim = shape
    cut = kv * tokens * heads * dim
    packed = raw[..., :cut].contiguous().view(torch.float8_e4m3fn).view(raw.shape[0], *shape)
    return (packed.float() * _floats(raw[..., cut:], kv, heads)).to(dtype)


# -- nvfp4 -------------------------------------------------------------------------------------------------------


def _to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Codes 0 … 15 of the nearest e2m1 values; ties go to the even code."""
    middles = torch.tensor(_E2M1_MIDDLES, device=values.device)
    size = values.abs()
    low = torch.bucketize(size, middles)  # a tie falls to the lower of the two
    tie = size == torch.cat((middles, middles.new_tensor([torch.inf])))[low]
    code = low + (tie & (low % 2 == 1))
    return (code + 8 * torch.signbit(values)).to(torch.uint8)


def _from_e2m1(codes: torch.Tensor) -> torch.Tensor:
    table = torch.tensor((*_E2M1, *(-value for value in _E2M1)), device=codes.device)
    return table[codes.int()]


def _in_groups(values: torch.Tensor, size: int) -> torch.Tensor:
    return values.view(*values.shape[:-1], -1, size)


def _encode_nvfp4(values: torch.Tensor) -> torch.Tensor:
    wide = _finite(values)
    scale = _scale(wide, _E2M1_MAX * _E4M3_MAX)
    groups = _in_groups(wide / scale, NVFP4_GROUP)
    fine = _over(groups.abs().amax(-1, keepdim=True), _E2M1_MAX).clamp_(max=_E4M3_MAX).to(torch.float8_e4m3fn)
    step = fine.float()
    codes = _to_e2m1(torch.where(step > 0, groups / step, 0.0))
    pairs = _in_groups(codes.flatten(-2), 2)
    packed = pairs[..., 0] | pairs[..., 1] << 4
    return torch.cat((_bytes(packed), _bytes(fine), _bytes(scale)), dim=-1)


def _decode_nvfp4(raw: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    _, kv, tokens, heads, dim = shape
    rows = kv * tokens * heads
    first, second = rows * dim // 2, rows * dim // NVFP4_GROUP
    packed = raw[..., :first].reshape(raw.shape[0], *shape[:4], dim // 2, 1)
    codes = torch.cat((packed & 15, packed >> 4), dim=-1).flatten(-2)
    fine = raw[..., first : first + second].contiguous().view(torch.float8_e4m3fn)
    step = fine.view(raw.shape[0], *shape[:4], dim // NVFP4_GROUP, 1).float()
    values = _in_groups(_from_e2m1(codes), NVFP4_GROUP) * step
    return (values.flatten(-2) * _floats(raw[..., first + second :], kv, heads)).to(dtype)


FORMATS: dict[str, Format] = {
    "fp8": Format(_encode_fp8, _decode_fp8),
    "nvfp4": Format(_encode_nvfp4, _decode_nvfp4),
}
"""By the names in `kvstore.layout.PACKED`."""
