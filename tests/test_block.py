# SPDX-License-Identifier: Apache-2.0
"""Identity: golden vectors, chaining, and what must and must not change an id."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import native
from kvstore.block import Chain, ModelId, Root, hash_chain
from kvstore.errors import ConfigError

GOLDEN_MODEL = ModelId(
    model="golden", revision="r1", kv_dtype="bfloat16", num_layers=4, num_kv_heads=2, head_dim=8, block_tokens=4
)
GOLDEN_ROOT = "fc04ee86ff431382634b91363ee537c78d214435d32c8d52c5ea625711171a82"
GOLDEN_IDS = [
    "cd8fd8ef0e2ce5fb0a7cdbb06343d16f2b3f6369f3cf05b3fbb3afcdc610f0db",
    "f57d11f700c1a49477a10b7a9492eb104dae37e1065e9e7b4009daff04c5110b",
    "0fe4de5f82291b5b634c48c2ff0c15d6adc165876732dcbb338ef2b36f95da57",
]
GOLDEN_MEDIA_ID = "146d7fbbf275b364dca4aecfdbd579a0aec9ab63ac68d7d1dbb49650d059246f"

PRINT_IDS = """
from tests.test_block import GOLDEN_MODEL
from kvstore.block import Chain, Root
print(Root(GOLDEN_MODEL).id.hex(), *(i.hex() for i in Chain(Root(GOLDEN_MODEL), range(1, 13)).ids))
"""


def reference_id(parent: bytes, tokens: list[int], extra: bytes = b"") -> bytes:
    """The definition, written out again."""
    body = parent + b"kvblock1" + struct.pack("<II", len(tokens), len(extra))
    return hashlib.sha256(body + struct.pack(f"<{len(tokens)}I", *tokens) + extra).digest()


def test_ids_equal_the_golden_vectors() -> None:
    chain = Chain(Root(GOLDEN_MODEL), range(1, 13))
    assert chain.root.id.hex() == GOLDEN_ROOT
    assert [block.hex() for block in chain.ids] == GOLDEN_IDS


def test_an_image_gives_the_golden_id() -> None:
    chain = Chain(Root(GOLDEN_MODEL), range(1, 5), media=[(2, b"digest of an image")])
    assert chain.ids[0].hex() == GOLDEN_MEDIA_ID


def test_another_process_with_another_hash_seed_gives_the_same_ids() -> None:
    out = subprocess.run(
        [sys.executable, "-c", PRINT_IDS],
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert out.stdout.split() == [GOLDEN_ROOT, *GOLDEN_IDS], out.stderr


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.sampled_from([2, 4, 8]))
def test_ids_follow_the_definition(tokens: list[int], block_tokens: int) -> None:
    root = Root(dataclasses.replace(GOLDEN_MODEL, block_tokens=block_tokens))
    chain = Chain(root, tokens)
    parent: bytes = root.id
    for index in range(len(tokens) // block_tokens):
        span = tokens[index * block_tokens : (index + 1) * block_tokens]
        parent = reference_id(parent, span)
        assert chain.ids[index] == parent
        assert chain.meta(index).block_id() == parent
    assert list(chain.metas(0, len(chain))) == [chain.meta(index) for index in range(len(chain))]
    assert list(chain.metas(1, len(chain))) == [chain.meta(index) for index in range(1, len(chain))]
    assert len(chain) == len(tokens) // block_tokens
    assert chain.num_tokens == len(tokens)


@given(st.integers(0, 5), st.sampled_from([2, 4, 16, 64, 256]), st.randoms(use_true_random=False))
def test_the_chain_in_c_equals_the_chain_in_python(num_blocks: int, block_tokens: int, rng: random.Random) -> None:
    parent, head, tokens = rng.randbytes(32), rng.randbytes(16), rng.randbytes(4 * block_tokens * num_blocks)
    in_c = native.hash_chain(parent, head, tokens, 4 * block_tokens)
    assert in_c is None or in_c == hash_chain(parent, head, tokens, 4 * block_tokens)


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=8))
def test_extending_by_any_pieces_equals_hashing_at_once(pieces: list[list[int]]) -> None:
    grown = Chain(Root(GOLDEN_MODEL))
    for piece in pieces:
        grown.extend(piece)
    assert grown.ids == Chain(Root(GOLDEN_MODEL), [token for piece in pieces for token in piece]).ids


@pytest.mark.parametrize("field", [item.name for item in dataclasses.fields(ModelId)])
def test_every_field_of_the_model_changes_the_root(field: str) -> None:
    value = getattr(GOLDEN_MODEL, field)
    other: object = "opaque:x" if field == "layout" else value + "x" if isinstance(value, str) else value * 2 or 1
    if field == "num_kv":
        other = 1
    changed = dataclasses.replace(GOLDEN_MODEL, **{field: other})
    assert Root(changed).id != Root(GOLDEN_MODEL).id


def test_adapter_salt_and_secret_change_the_root_and_do_not_run_together() -> None:
    roots = [
        Root(GOLDEN_MODEL),
        Root(GOLDEN_MODEL, adapter=b"ab"),
        Root(GOLDEN_MODEL, salt=b"ab"),
        Root(GOLDEN_MODEL, adapter=b"a", salt=b"b"),
        Root(GOLDEN_MODEL, secret=b"ab"),
    ]
    assert len({root.id for root in roots}) == len(roots)


def test_media_changes_its_block_and_all_after_it_only() -> None:
    plain = Chain(Root(GOLDEN_MODEL), range(12))
    image = Chain(Root(GOLDEN_MODEL), range(12), media=[(5, b"cat")])
    moved = Chain(Root(GOLDEN_MODEL), range(12), media=[(6, b"cat")])
    assert image.ids[0] == plain.ids[0]
    assert len({plain.ids[1], image.ids[1], moved.ids[1]}) == 3
    assert len({plain.ids[2], image.ids[2], moved.ids[2]}) == 3
    assert image.meta(1).block_id() == image.ids[1]
    assert list(image.metas(0, 3)) == [image.meta(index) for index in range(3)]


def test_media_outside_the_appended_tokens_is_refused() -> None:
    chain = Chain(Root(GOLDEN_MODEL), range(8))
    with pytest.raises(ValueError, match="media offset 3 is outside the appended tokens 8…10"):
        chain.extend([1, 2], media=[(3, b"late")])


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_array_and_list_tokens_give_the_same_ids(dtype: type) -> None:
    assert Chain(Root(GOLDEN_MODEL), np.arange(12, dtype=dtype)).ids == Chain(Root(GOLDEN_MODEL), list(range(12))).ids


@pytest.mark.parametrize("tokens", [[-1], [2**32], np.array([-5])])
def test_tokens_outside_u32_are_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids must lie"):
        Chain(Root(GOLDEN_MODEL), tokens)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("block_tokens", 48, "power of two from 2 to 256"),
        ("block_tokens", 512, "power of two"),
        ("num_layers", 0, "at least 1"),
        ("num_kv", 3, "keys and values"),
        ("part_heads", 3, "divisor of num_kv_heads=2"),
        ("part_layers", 9, "num_layers=4"),
        ("layout", "weird", "canonical"),
    ],
)
def test_a_wrong_model_is_refused_in_a_sentence(field: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(GOLDEN_MODEL, **{field: value})


def test_media_that_is_refused_leaves_the_chain_as_it_was(root: Root) -> None:
    chain = Chain(root, range(8))
    for media in ([(50, b"d" * 32)], [(9, b"")], [(9, b"d" * 129)]):
        with pytest.raises(ValueError, match="media"):
            chain.extend(range(16), media=media)
        assert (chain.num_tokens, len(chain)) == (8, 0), "tokens without their digest are other content"


def test_tokens_that_are_no_whole_numbers_are_refused(root: Root) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        Chain(root, [1.5] * 16)  # type: ignore[list-item]
