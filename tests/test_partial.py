# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401, F811  # fixtures over every store are imported
"""The beginning of a block that another chain made: found to the token, by whoever may, with its own bytes."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest

from kvstore.api import Store
from kvstore.block import Chain, ModelId, Root
from kvstore.errors import ConfigError
from kvstore.store import KVStore
from tests.conftest import MakeStore, chain_of, content, load_all, save_all
from tests.test_conformance import MakeAnyStore, make_any, store, tier_with


def tokens_of(root: Root, num_tokens: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, num_tokens)


def parting(root: Root, num_blocks: int, num_tokens: int, *, seed: int = 99) -> Chain:
    """A chain that shares `num_blocks` blocks and `num_tokens` more tokens with chain_of(root, …)."""
    shared = tokens_of(root, 32 * root.model.block_tokens)[: num_blocks * root.model.block_tokens + num_tokens]
    own = np.random.default_rng(seed).integers(50_000, 60_000, 2 * root.model.block_tokens)
    return Chain(root, np.concatenate([shared, own]))


def full(root: Root, num_blocks: int) -> Chain:
    return Chain(root, tokens_of(root, 32 * root.model.block_tokens)[: num_blocks * root.model.block_tokens])


@pytest.mark.parametrize(("num_blocks", "num_tokens"), [(0, 5), (2, 1), (2, 15), (3, 8)])
def test_beginning_of_anothers_block_is_found_to_the_token_and_loads_its_bytes(
    store: Store,
    root: Root,
    num_blocks: int,
    num_tokens: int,
) -> None:
    made = full(root, 6)
    save_all(store, made)
    asked = parting(root, num_blocks, num_tokens)
    match = store.match(asked, "r")
    assert match.num_blocks == num_blocks
    assert store.match_partial("r") == num_tokens
    with store.load("r", num_blocks, partial_tokens=num_tokens) as load:
        indices = []
        for block in load:
            indices.append(block.index)
            for part, view in enumerate(block.views):
                assert bytes(view) == content(made, block.index, part, len(view))
        assert load.intact()
    assert indices == list(range(num_blocks + 1))


@pytest.mark.parametrize("block_tokens", [2, 4, 8, 16, 32, 64, 128, 256])
def test_blocks_of_every_size_are_saved_loaded_and_found_to_the_token(
    make_any: MakeAnyStore, model: ModelId, block_tokens: int
) -> None:
    sized = replace(model, block_tokens=block_tokens)
    store, root = make_any(num_blocks=256), Root(sized)
    store.open(sized)
    made = full(root, 4)
    save_all(store, made)
    assert load_all(store, made) == ["host"] * 4
    num_tokens = block_tokens - 1
    match = store.match(parting(root, 2, num_tokens), "r")
    assert match.num_blocks == 2
    assert store.match_partial("r") == num_tokens
    with store.load("r", 2, partial_tokens=num_tokens) as load:
        for block in load:
            for part, view in enumerate(block.views):
                assert bytes(view) == content(made, block.index, part, len(view))
        assert load.intact()


@pytest.mark.parametrize("block_tokens", [0, 1, 3, 48, 512])
def test_other_sizes_are_refused(model: ModelId, block_tokens: int) -> None:
    with pytest.raises(ConfigError, match="block_tokens"):
        replace(model, block_tokens=block_tokens)


def test_end_of_a_prompt_shorter_than_a_block_finds_its_block(store: Store, root: Root) -> None:
    save_all(store, full(root, 3))
    asked = Chain(root, tokens_of(root, 32 * 16)[:40])
    assert store.match(asked, "r").num_blocks == 2
    assert store.match_partial("r") == 8
    store.forget("r")


def test_longest_of_several_beginnings_is_taken(store: Store, root: Root) -> None:
    save_all(store, full(root, 4))
    for number, num_tokens in enumerate((3, 9, 6)):
        save_all(store, parting(root, 2, num_tokens, seed=number))
    asked = parting(root, 2, 9, seed=77)
    store.match(asked, "r")
    assert store.match_partial("r") == 9
    store.forget("r")


@pytest.mark.parametrize("other", [{"salt": b"b"}, {"adapter": b"lora"}])
def test_nothing_is_found_under_another_root(
    store: Store,
    model: ModelId,
    root: Root,
    other: dict[str, bytes],
) -> None:
    stranger = Root(model, **other)
    save_all(store, full(root, 4))
    for num_blocks, num_tokens in ((0, 9), (2, 9)):
        asked = parting(stranger, num_blocks, num_tokens)
        assert store.match(asked, "r").num_blocks == 0
        assert store.match_partial("r") == 0
    store.forget("r")


def test_equal_tokens_after_another_prefix_are_not_found(store: Store, root: Root) -> None:
    tokens = tokens_of(root, 64)
    save_all(store, Chain(root, tokens))
    other = tokens.copy()
    other[0] += 1
    asked = Chain(root, np.concatenate([other[:16], tokens[16:40]]))
    store.match(asked, "r")
    assert store.match_partial("r") == 0
    store.forget("r")


def test_blocks_with_media_begin_like_no_other(store: Store, root: Root) -> None:
    tokens = tokens_of(root, 48)
    save_all(store, Chain(root, tokens, media=[(20, b"a cat")]))
    asked = Chain(root, tokens[:30])
    store.match(asked, "r")
    assert store.match_partial("r") == 0  # the first block has the media in it nowhere, the second has
    save_all(store, Chain(root, tokens))
    asked = Chain(root, tokens[:30], media=[(20, b"a dog")])
    assert store.match(asked, "r").num_blocks == 1
    assert store.match_partial("r") == 0
    store.forget("r")


def test_held_beginning_outlives_its_chains_removal(store: Store, root: Root) -> None:
    made = full(root, 4)
    save_all(store, made)
    asked = parting(root, 2, 7)
    store.match(asked, "r")
    assert store.match_partial("r") == 7
    store.clear(root.id)
    save_all(store, chain_of(root, 60, seed=5))  # would take the slots, were they free
    with store.load("r", 2, partial_tokens=7) as load:
        blocks = list(load)
        assert bytes(blocks[2].views[0]) == content(made, 2, 0, blocks[2].views[0].nbytes)
        assert load.intact()
    store.match(asked, "r")
    assert store.match_partial("r") == 0
    store.forget("r")


def test_more_than_was_said_and_less_than_the_match_bring_whole_blocks_only(store: Store, root: Root) -> None:
    save_all(store, full(root, 4))
    asked = parting(root, 2, 7)
    for num_blocks, partial_tokens in ((2, 8), (1, 7), (2, 0)):
        store.match(asked, "r")
        assert store.match_partial("r") == 7
        with store.load("r", num_blocks, partial_tokens=partial_tokens) as load:
            assert [block.index for block in load] == list(range(num_blocks))
    store.match(asked, "r")
    with store.load("r", 2, partial_tokens=7) as load:  # nobody asked
        assert len(list(load)) == 2


def test_without_a_match_and_after_a_new_one_there_is_nothing(store: Store, root: Root) -> None:
    save_all(store, full(root, 4))
    assert store.match_partial("nobody") == 0
    store.match(parting(root, 2, 7), "r")
    assert store.match_partial("r") == 7
    store.match(full(root, 4), "r")
    assert store.match_partial("r") == 0
    store.forget("r")
    assert store.match_partial("r") == 0


def test_lower_tiers_whole_block_comes_before_a_beginning(
    make_any: MakeAnyStore,
    model: ModelId,
    root: Root,
) -> None:
    asked = parting(root, 2, 7)
    store = make_any(tiers=[tier_with(asked, model=model)])
    save_all(store, full(root, 4))
    match = store.match(asked, "r", wait_s=5)
    assert match.num_blocks == len(asked)
    assert store.match_partial("r") == 0
    store.forget("r")


def test_shared_blocks_still_load_whole(store: Store, root: Root) -> None:
    save_all(store, full(root, 4))
    asked = parting(root, 2, 7)
    save_all(store, asked)
    assert load_all(store, asked) == ["host"] * 4


def test_what_is_found_is_what_comparing_everything_finds(make_store: object, root: Root) -> None:
    """Against brute force, over chains of few different tokens that come and are evicted."""
    store: KVStore = make_store(24)  # type: ignore[operator]
    rng = np.random.default_rng(3)
    size = root.model.block_tokens
    saved: list[Chain] = []
    for number in range(150):
        tokens = np.repeat(rng.integers(0, 2, 4), rng.integers(5, 14, 4))
        chain = Chain(root, tokens)
        match = store.match(chain, "r")
        found = store.match_partial("r")
        start = match.num_blocks * size
        here = [c for c in saved for i in range(len(c)) if i == match.num_blocks and c.ids[:i] == chain.ids[:i]]
        there = [c for c in here if store.match(c, "o").num_blocks > match.num_blocks]
        store.forget("o")
        rest = tokens[start : start + size]
        best = 0
        for c in there:
            theirs = c.tokens_after(match.num_blocks)[: len(rest)]
            equal = np.append(rest[: len(theirs)] == theirs, False)
            best = max(best, int(equal.argmin()))
        assert found == best, number
        store.forget("r")
        save_all(store, chain)
        saved.append(chain)
        assert store.check() == []


def test_two_questions_at_once_about_one_request_hold_one_beginning(make_store: MakeStore, root: Root) -> None:
    store = make_store()
    asked = parting(root, 0, 12)
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(300):
            request = f"r{number}"
            save_all(store, parting(root, 0, 4, seed=7))
            store.match(asked, request)
            together = Barrier(3)

            def ask(request: str = request, together: Barrier = together) -> int:
                together.wait()
                return store.match_partial(request)

            with ThreadPoolExecutor(2) as threads:
                answers = [threads.submit(ask), threads.submit(ask)]
                together.wait()
                save_all(store, parting(root, 0, 12, seed=8))  # begins alike for longer
                said = {answer.result() for answer in answers}
            assert len(said) == 1
            store.forget(request)
            assert store.stats()["host.pinned_blocks"] == 0
            store.drop_host()
    finally:
        sys.setswitchinterval(switch_s)
