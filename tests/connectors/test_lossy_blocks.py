# SPDX-License-Identifier: Apache-2.0
"""Lossy namespaces under transformers: half the bytes, blocks of their own, and answers that stay close."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch", reason="the connector copies torch tensors")
pytest.importorskip("transformers", reason="the connector serves transformers models")

import numpy as np
import torch
from transformers import LlamaForCausalLM

from bench.models import random_llama
from connectors.base import LoadRule
from connectors.transformers import BlockCache, TransformersConnector
from kvstore.api import ABSENT, OpenRun
from kvstore.config import StoreConfig
from kvstore.store import KVStore

BLOCK = 16


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return random_llama(11, dtype=torch.bfloat16)


@pytest.fixture
def store() -> Iterator[KVStore]:
    with KVStore(StoreConfig.load({"host": {"capacity_bytes": "8MiB", "prefault": False}}, environ={})) as made:
        yield made
        assert made.check() == []


def connect(
    model: LlamaForCausalLM, store: KVStore, lossy: str = "", device_budget_bytes: int = 0
) -> TransformersConnector:
    return TransformersConnector(
        model,
        store,
        revision="seed-11",
        block_tokens=BLOCK,
        lossy=lossy,
        device_budget_bytes=device_budget_bytes,
        resident_conversations=0,
        load_rule=LoadRule.ALWAYS,
    )


def prompt(length: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("name", "share", "close"), [("fp8", 0.52, 0.03), ("nvfp4", 0.32, 0.11)])
def test_lossy_blocks_take_their_share_of_the_bytes_and_drift_little(
    llama: LlamaForCausalLM, store: KVStore, name: str, share: float, close: float
) -> None:
    exact, lossy = connect(llama, store), connect(llama, store, name)
    assert lossy.layout.block_bytes < share * exact.layout.block_bytes
    ids = prompt(150)
    want, _ = exact.prefill(ids)
    logits, cold = lossy.prefill(ids)
    assert torch.equal(logits, want)  # nothing was loaded: nothing is lossy yet
    _, warm = lossy.prefill(ids)
    for index in range(149 // BLOCK):
        kv = cold.block(index).float()
        error = (warm.block(index).float() - kv).norm() / kv.norm()
        assert 0 < error < close


def test_exact_and_lossy_requests_never_find_each_others_blocks(llama: LlamaForCausalLM, store: KVStore) -> None:
    ids = prompt(100)
    served = []
    for name in ("fp8", "", "nvfp4"):
        connector = connect(llama, store, name)
        served.append(sum(connector.generate(ids, max_new_tokens=1).hit_tokens.values()))
    assert served == [0, 0, 0]
    again = connect(llama, store, "fp8").generate(ids, max_new_tokens=1)
    assert again.hit_tokens == {"host": 96}


def test_the_device_overlay_of_a_lossy_namespace_keeps_the_engines_dtype(
    llama: LlamaForCausalLM, store: KVStore
) -> None:
    connector = connect(llama, store, "fp8", device_budget_bytes=1 << 20)
    ids = prompt(100)
    cold = connector.generate(ids, max_new_tokens=4)
    warm = connector.generate(ids, max_new_tokens=4)
    assert warm.hit_tokens == {"device": 96}
    assert torch.equal(cold.sequences, warm.sequences)


def test_a_cache_copied_as_pages_holds_what_one_copied_by_address_holds(
    llama: LlamaForCausalLM, store: KVStore
) -> None:
    connector = connect(llama, store)
    layout = connector.layout
    blocks = [memoryview(bytearray(torch.randint(0, 256, (layout.block_bytes,)).byte().numpy())) for _ in range(3)]
    caches = [BlockCache(layout, torch.device("cpu"), 16) for _ in range(2)]
    caches[1]._in_pages = True
    for cache in caches:
        for index, view in enumerate(blocks):
            cache.write_block(index, [view])
        cache.reserve(2000)  # while copies are under way
        cache.finish()
    out = [[memoryview(bytearray(layout.block_bytes)) for _ in blocks] for _ in caches]
    for cache, slots in zip(caches, out, strict=True):
        cache.read_blocks((index, [slot]) for index, slot in enumerate(slots))
        cache.finish()
    assert out[0] == out[1] == blocks
    size = layout.block_bytes
    for cache in caches:
        memory = memoryview(bytearray(3 * size))
        cache.read_blocks(OpenRun(np.array([0, 1, 2]), memory, np.array([[2 * size], [ABSENT], [0]])))
        cache.finish()
        assert [memory[:size], memory[size : 2 * size], memory[2 * size :]] == [blocks[2], bytes(size), blocks[0]]
