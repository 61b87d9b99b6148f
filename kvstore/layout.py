# SPDX-License-Identifier: Apache-2.0
"""The bytes of a block: shape, dtype, part grid.

Canonical bytes of a part: C-order `[layers][kv][tokens][heads][head_dim]`, little-endian, K after RoPE,
kv = K then V (MLA: kv = 1, heads = 1). A part is one cell of the grid `part_layers × part_heads`; the last
row of cells may hold fewer layers.

A lossy namespace names its format after the engine's dtype, `bfloat16+fp8`: a `kv_dtype`, and so an identity, of its
own. Its bytes are `[layers]` of one layer's packed values followed by its scales; see `kvstore.lossy`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from kvstore.block import ModelId
from kvstore.errors import ConfigError

DTYPES: dict[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
}
"""KV dtypes by torch's names, with bytes an element."""

NVFP4_GROUP = 16
"""Values along head_dim that share one scale."""


def _fp8_bytes(elements: int, groups: int) -> int:
    return elements + 4 * groups


def _nvfp4_bytes(elements: int, groups: int) -> int:
    return elements // 2 + elements // NVFP4_GROUP + 4 * groups


PACKED: dict[str, Callable[[int, int], int]] = {"fp8": _fp8_bytes, "nvfp4": _nvfp4_bytes}
"""Lossy formats: bytes of one layer, from its elements and its groups (keys or values of one head)."""

_LOSSY_SOURCES = ("bfloat16", "float16")

MAX_PARTS = 64


def engine_dtype(kv_dtype: str) -> str:
    """The dtype of an engine's tensors for blocks of `kv_dtype`: what stands before the `+` of a lossy one."""
    return kv_dtype.partition("+")[0]


def lossy_format(kv_dtype: str) -> str:
    """The format of a lossy `kv_dtype`, a key of PACKED; empty where blocks are exact."""
    return kv_dtype.partition("+")[2]


@dataclass(frozen=True, slots=True)
class PartLayout:
    """One cell of a block: which layers and heads, and its bytes."""

    part: int
    layers: range
    heads: range
    shape: tuple[int, int, int, int, int]
    """[layers, kv, tokens, heads, head_dim], of values"""
    num_bytes: int


@dataclass(frozen=True)
class BlockLayout:
    """The part grid of a model with sizes in bytes. Make it with `layout_of`."""

    model: ModelId

    def __post_init__(self) -> None:
        dtype, plus, packed = self.model.kv_dtype.partition("+")
        if dtype not in DTYPES or (plus and (packed not in PACKED or dtype not in _LOSSY_SOURCES)):
            accepted = ", ".join((*DTYPES, *(f"{source}+{name}" for source in _LOSSY_SOURCES for name in PACKED)))
            raise ConfigError(f"kv_dtype is {self.model.kv_dtype!r}: use one of {accepted}")
        if packed == "nvfp4" and self.model.head_dim % NVFP4_GROUP:
            raise ConfigError(f"head_dim is {self.model.head_dim}: nvfp4 takes multiples of {NVFP4_GROUP}")
        if len(self.parts) > MAX_PARTS:
            raise ConfigError(
                f"part grid has {len(self.parts)} cells: at most {MAX_PARTS}; raise part_layers or part_heads"
            )

    @property
    def item_bytes(self) -> int:
        """Bytes of one element; 1 where values are packed."""
        return 1 if self.packed else DTYPES[self.model.kv_dtype]

    @property
    def packed(self) -> str:
        """The lossy format, a key of PACKED; empty where blocks are exact."""
        return lossy_format(self.model.kv_dtype)

    def layer_bytes(self, num_heads: int) -> int:
        """Bytes that one layer of a block has, over `num_heads` heads."""
        model = self.model
        groups = model.num_kv * num_heads
        elements = groups * model.block_tokens * model.head_dim
        return PACKED[self.packed](elements, groups) if self.packed else elements * self.item_bytes

    @cached_property
    def parts(self) -> tuple[PartLayout, ...]:
        """Cells in order: all head ranges of the first layers, then of the next."""
        model = self.model
        part_layers = model.part_layers or model.num_layers
        part_heads = model.part_heads or model.num_kv_heads
        cells: list[PartLayout] = []
        for layer in range(0, model.num_layers, part_layers):
            layers = range(layer, min(layer + part_layers, model.num_layers))
            for head in range(0, model.num_kv_heads, part_heads):
                heads = range(head, head + part_heads)
                shape = (len(layers), model.num_kv, model.block_tokens, len(heads), model.head_dim)
                cells.append(PartLayout(len(cells), layers, heads, shape, len(layers) * self.layer_bytes(len(heads))))
        return tuple(cells)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a whole block, all parts."""
        return sum(part.num_bytes for part in self.parts)

    @cached_property
    def all_parts(self) -> tuple[int, ...]:
        return tuple(range(len(self.parts)))

    @cached_property
    def fingerprint(self) -> str:
        """Short digest of what decides the bytes of a part; equal means mutually readable."""
        model = self.model
        text = "|".join(
            map(
                str,
                (model.layout, model.kv_dtype, model.num_kv, model.block_tokens, model.head_dim, self._grid()),
            )
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _grid(self) -> tuple[tuple[int, ...], ...]:
        return tuple(part.shape for part in self.parts)

    def parts_covering(self, layers: range, heads: range) -> tuple[int, ...]:
        """Cells that together are exactly `layers` × `heads`: what one TP/PP rank reads and writes.

        Raises ConfigError where the grid is coarser than the request, since cells are only moved whole.
        """
        inside = [
            part
            for part in self.parts
            if part.layers.start < layers.stop
            and layers.start < part.layers.stop
            and part.heads.start < heads.stop
            and heads.start < part.heads.stop
        ]
        covered = sum(len(part.layers) * len(part.heads) for part in inside)
        if covered != len(layers) * len(heads):
            raise ConfigError(
                f"layers {layers.start}–{layers.stop} × heads {heads.start}–{heads.stop} cut through cells of the "
                f"part grid: open the model with a finer part_layers or part_heads"
            )
        return tuple(part.part for part in inside)


@lru_cache(maxsize=256)
def layout_of(model: ModelId) -> BlockLayout:
    """The layout of `model`, made once."""
    return BlockLayout(model)
