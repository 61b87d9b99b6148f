# SPDX-License-Identifier: Apache-2.0
"""Shapes, bytes and the part grid."""

from __future__ import annotations

import dataclasses

import pytest

from kvstore.block import ModelId
from kvstore.errors import ConfigError
from kvstore.layout import DTYPES, layout_of

LLAMA_8B = ModelId(
    model="llama", revision="1", kv_dtype="bfloat16", num_layers=32, num_kv_heads=8, head_dim=128, block_tokens=64
)


def test_a_llama_8b_block_of_64_tokens_is_8_mib() -> None:
    layout = layout_of(LLAMA_8B)
    assert layout.block_bytes == 8 << 20
    assert layout.parts[0].shape == (32, 2, 64, 8, 128)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_follow_the_dtype(dtype: str) -> None:
    layout = layout_of(dataclasses.replace(LLAMA_8B, kv_dtype=dtype))
    assert layout.block_bytes == 32 * 2 * 64 * 8 * 128 * DTYPES[dtype]


def test_an_mla_block_holds_one_latent_a_token() -> None:
    layout = layout_of(dataclasses.replace(LLAMA_8B, num_kv=1, num_kv_heads=1, head_dim=576))
    assert layout.parts[0].shape == (32, 1, 64, 1, 576)


def test_cells_tile_layers_and_heads_and_the_last_row_may_be_shorter() -> None:
    layout = layout_of(dataclasses.replace(LLAMA_8B, num_layers=5, part_layers=2, part_heads=4))
    cells = [(part.layers, part.heads) for part in layout.parts]
    assert cells == [
        (range(0, 2), range(0, 4)),
        (range(0, 2), range(4, 8)),
        (range(2, 4), range(0, 4)),
        (range(2, 4), range(4, 8)),
        (range(4, 5), range(0, 4)),
        (range(4, 5), range(4, 8)),
    ]
    assert layout.parts[4].num_bytes * 2 == layout.parts[0].num_bytes


def test_a_rank_names_the_cells_it_covers() -> None:
    layout = layout_of(dataclasses.replace(LLAMA_8B, part_layers=16, part_heads=4))
    assert layout.parts_covering(range(32), range(8)) == (0, 1, 2, 3)
    assert layout.parts_covering(range(32), range(4, 8)) == (1, 3)
    assert layout.parts_covering(range(16, 32), range(8)) == (2, 3)


def test_a_rank_finer_than_the_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match="finer part_layers or part_heads"):
        layout_of(LLAMA_8B).parts_covering(range(32), range(4))


def test_an_unknown_dtype_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="kv_dtype is 'int3': use one of float32"):
        layout_of(dataclasses.replace(LLAMA_8B, kv_dtype="int3"))


def test_a_grid_of_more_than_64_cells_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 64"):
        layout_of(dataclasses.replace(LLAMA_8B, part_layers=1, part_heads=1))


def test_fingerprints_differ_where_bytes_do_and_only_there() -> None:
    base = layout_of(LLAMA_8B).fingerprint
    assert layout_of(dataclasses.replace(LLAMA_8B, model="other")).fingerprint == base
    assert layout_of(dataclasses.replace(LLAMA_8B, kv_dtype="float16")).fingerprint != base
    assert layout_of(dataclasses.replace(LLAMA_8B, block_tokens=32)).fingerprint != base
    assert layout_of(dataclasses.replace(LLAMA_8B, part_heads=4)).fingerprint != base
