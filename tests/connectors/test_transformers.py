# SPDX-License-Identifier: Apache-2.0
"""Reuse under transformers gives the tokens that no reuse gives, whatever the store does."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest

pytest.importorskip("torch", reason="the connector copies torch tensors")
pytest.importorskip("transformers", reason="the connector serves transformers models")

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from bench.models import random_llama
from connectors.base import LoadRule
from connectors.transformers import BlockCache, Generation, TransformersConnector
from connectors.transformers_identity import model_id_of
from kvstore.api import Match
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError
from kvstore.store import KVStore
from tests.connectors.fakes import FakeStore

BLOCK, CHUNK, NEW = 16, 48, 12


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return random_llama(11)


def connect(model: PreTrainedModel, store: FakeStore | KVStore | None, **settings: int) -> TransformersConnector:
    return TransformersConnector(
        model,
        store,
        revision="seed-11",
        block_tokens=settings.get("block_tokens", BLOCK),
        chunk_tokens=settings.get("chunk_tokens", CHUNK),
        part_layers=settings.get("part_layers", 0),
        part_heads=settings.get("part_heads", 0),
        device_budget_bytes=settings.get("device_budget_bytes", 0),
        resident_conversations=settings.get("resident_conversations", 0),  # what tiers serve is what is tested here
        load_rule=LoadRule.ALWAYS,
    )


def prompt(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def plain(model: PreTrainedModel, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """What the model says by itself."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)  # type: ignore[operator]
    assert isinstance(out, torch.Tensor)
    return out


def hits(done: Generation) -> int:
    return sum(done.hit_tokens.values())


@pytest.mark.parametrize("length", [1, 15, 16, 17, 48, 49, 96, 97, 160, 203])
def test_reuse_gives_the_tokens_of_the_model_alone(llama: LlamaForCausalLM, length: int) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    ids = prompt(length)
    want = plain(llama, ids)
    first = connector.generate(ids, max_new_tokens=NEW)
    second = connector.generate(ids, max_new_tokens=NEW)
    assert torch.equal(first.sequences, want)
    assert torch.equal(second.sequences, want)
    assert hits(first) == 0
    assert hits(second) == (length - 1) // BLOCK * BLOCK
    assert first.saved_blocks == (length + NEW - 1) // BLOCK
    assert second.saved_blocks == 0
    assert second.loaded_bytes == hits(second) // BLOCK * connector.layout.block_bytes
    assert (first.prompt_tokens, first.new_tokens) == (length, NEW)
    assert 0 < second.ttft_s <= second.total_s
    assert store.check() == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reuse_gives_the_same_tokens_in_every_dtype_and_attention(attention: str, dtype: torch.dtype) -> None:
    model = random_llama(5, dtype=dtype)
    model.set_attn_implementation(attention)
    store = FakeStore()
    connector = connect(model, store)
    ids = prompt(150, seed=2)
    cold = connector.generate(ids, max_new_tokens=NEW)
    warm = connector.generate(ids, max_new_tokens=NEW)
    assert hits(warm) == 144
    assert torch.equal(cold.sequences, warm.sequences)
    if dtype == torch.float32:
        assert torch.equal(cold.sequences, plain(model, ids))


def test_what_is_saved_is_the_kv_of_an_uncached_forward_pass(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    done = connector.generate(prompt(100), max_new_tokens=40)
    with torch.no_grad():
        out = llama(done.sequences[:, :-1], use_cache=True)
    want = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in out.past_key_values.layers])
    logits, cache = connector.prefill(done.sequences)
    assert cache.get_seq_length() == 140
    for index in range(139 // BLOCK):
        exact = want[:, :, :, index * BLOCK : (index + 1) * BLOCK].transpose(2, 3)
        torch.testing.assert_close(cache.block(index), exact, rtol=1e-4, atol=1e-4)
    assert len(store.blocks) == 140 // BLOCK
    with torch.no_grad():
        torch.testing.assert_close(logits, llama(done.sequences).logits[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_a_fully_cached_prompt_still_runs_its_last_token(llama: LlamaForCausalLM, blocks: int) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    ids = prompt(blocks * BLOCK, seed=4)
    longer = torch.cat([ids, prompt(40, seed=5)], dim=1)
    connector.generate(longer, max_new_tokens=1)
    done = connector.generate(ids, max_new_tokens=NEW)
    assert hits(done) == (blocks - 1) * BLOCK
    assert torch.equal(done.sequences, plain(llama, ids))


def test_decoded_tokens_are_reused_by_the_next_turn(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    first = connector.generate(prompt(40), max_new_tokens=45, conversation="chat")
    # The last token never ran through the model: 84 tokens have KV, 5 blocks are full.
    assert len(store.blocks) == 5
    ids = torch.cat([first.sequences, prompt(30, seed=9)], dim=1)
    second = connector.generate(ids, max_new_tokens=NEW, conversation="chat")
    assert hits(second) == 80
    assert torch.equal(second.sequences, plain(llama, ids))
    assert store.check() == []


def test_turns_of_a_conversation_find_what_fresh_requests_find(llama: LlamaForCausalLM) -> None:
    chatty, fresh = FakeStore(), FakeStore()
    talking, asking = connect(llama, chatty), connect(llama, fresh)
    ids = prompt(30)
    for turn in range(4):
        one = talking.generate(ids, max_new_tokens=20, conversation="chat")
        other = asking.generate(ids, max_new_tokens=20)
        assert one.hit_tokens == other.hit_tokens
        assert torch.equal(one.sequences, other.sequences)
        ids = torch.cat([one.sequences[:, : -(turn % 2) or None], prompt(13, seed=turn)], dim=1)
    assert chatty.blocks.keys() == fresh.blocks.keys()


def test_a_grid_of_parts_serves_as_well(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store, part_layers=1, part_heads=1)
    assert len(connector.layout.parts) == 4
    ids = prompt(100)
    connector.generate(ids, max_new_tokens=NEW)
    done = connector.generate(ids, max_new_tokens=NEW)
    assert hits(done) == 96
    assert torch.equal(done.sequences, plain(llama, ids))


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_load_that_ends_early_is_a_shorter_hit(llama: LlamaForCausalLM, number: int) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    ids = prompt(120)
    connector.generate(ids, max_new_tokens=NEW)
    store.faults.end_load_at = number
    done = connector.generate(ids, max_new_tokens=NEW)
    assert hits(done) == number * BLOCK
    assert torch.equal(done.sequences, plain(llama, ids))
    assert store.check() == []


def test_a_load_with_a_hole_counts_up_to_the_hole(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    ids = prompt(120)
    connector.generate(ids, max_new_tokens=NEW)
    store.faults.skip_load_at = 2
    done = connector.generate(ids, max_new_tokens=NEW)
    assert hits(done) == 2 * BLOCK
    assert torch.equal(done.sequences, plain(llama, ids))


def test_a_load_that_breaks_counts_for_nothing(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    ids = prompt(120)
    connector.generate(ids, max_new_tokens=NEW)
    store.faults.break_load_at = 3
    done = connector.generate(ids, max_new_tokens=NEW)
    assert hits(done) == 0
    assert torch.equal(done.sequences, plain(llama, ids))
    assert store.open_loads == set()


def test_blocks_overwritten_while_they_were_copied_are_computed_again(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    ids = prompt(120)
    connector.generate(ids, max_new_tokens=NEW)
    store.faults.overwritten = True
    done = connector.generate(ids, max_new_tokens=NEW)
    assert hits(done) == 0
    assert torch.equal(done.sequences, plain(llama, ids))


def test_blocks_that_were_gone_from_the_store_when_their_copies_were_done_are_saved_anew(
    llama: LlamaForCausalLM,
) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    ids = prompt(120)
    connector.generate(ids, max_new_tokens=NEW)
    before = set(store.blocks)
    store.faults.overwritten = True
    store.when_asked = store.blocks.clear
    connector.generate(ids, max_new_tokens=NEW)
    assert set(store.blocks) == before


@pytest.mark.parametrize("method", ["load", "touch", "save"])
def test_a_store_that_is_left_alone_keeps_nothing_for_a_request(llama: LlamaForCausalLM, method: str) -> None:
    store = FakeStore()
    connector = connect(llama, store, device_budget_bytes=1 << 20)
    connector.fail_open.backoff_s = 1e9
    connector.generate(prompt(120), max_new_tokens=NEW)
    connector.overlay.clear()
    store.faults.failing = {method}
    connector.generate(prompt(160), max_new_tokens=NEW)
    assert connector.fail_open.resting == (method != "touch")
    assert store.check() == []


@pytest.mark.parametrize("method", ["match", "load", "save", "announce", "forget", "touch", "all"])
def test_a_store_that_fails_costs_no_token(llama: LlamaForCausalLM, method: str) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    ids = prompt(120)
    store.faults.failing = {method}
    for _ in range(2):
        assert torch.equal(connector.generate(ids, max_new_tokens=NEW).sequences, plain(llama, ids))


def test_a_dead_store_is_called_once_and_then_left_alone(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    connector.fail_open.backoff_s = 1e9
    store.faults.failing = {"all"}
    for seed in range(3):
        connector.generate(prompt(120, seed), max_new_tokens=NEW)
    assert store.calls == ["match"]


def test_a_full_store_is_asked_once_a_request(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    store.faults.full = True
    done = connector.generate(prompt(120), max_new_tokens=40)
    assert done.saved_blocks == 0
    assert store.calls.count("save") == 1
    assert store.check() == []


def test_the_range_that_is_computed_is_announced(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    connector.generate(prompt(100), max_new_tokens=2)
    connector.generate(torch.cat([prompt(100), prompt(60, seed=3)], dim=1), max_new_tokens=2)
    assert store.announced == [(0, 6), (6, 10)]
    assert store.check() == []


class Elsewhere(FakeStore):
    """A store in which somebody else's blocks appear, two with every look."""

    def __init__(self, theirs: FakeStore) -> None:
        super().__init__()
        self.theirs = dict(theirs.blocks)
        self.stuck = False

    def match(self, *args: Any, **kwargs: Any) -> Match:
        for block in list(self.theirs)[:2] if not self.stuck else ():
            self.blocks[block] = self.theirs.pop(block)
        self.num_pending = len(self.theirs)
        return super().match(*args, **kwargs)


def test_blocks_that_somebody_computes_are_waited_for_one_after_the_other(llama: LlamaForCausalLM) -> None:
    other, ids = FakeStore(), prompt(161)
    connect(llama, other).generate(ids, max_new_tokens=1)
    store = Elsewhere(other)
    connector = connect(llama, store)
    connector.cost.seen_prefill(160, 0, 5.0)
    done = connector.generate(ids, max_new_tokens=NEW)
    assert hits(done) == 160
    assert torch.equal(done.sequences, plain(llama, ids))
    assert done.saved_blocks == 0
    assert store.check() == []


def test_who_waits_in_vain_computes_after_what_computing_would_have_taken(llama: LlamaForCausalLM) -> None:
    other, ids = FakeStore(), prompt(161)
    connect(llama, other).generate(ids, max_new_tokens=1)
    store = Elsewhere(other)
    store.stuck = True
    connector = connect(llama, store)
    connector.cost.seen_prefill(160, 0, 0.2)
    done = connector.generate(ids, max_new_tokens=NEW)
    assert hits(done) == 0
    assert torch.equal(done.sequences, plain(llama, ids))
    assert 0.2 <= done.ttft_s < 5


def test_blocks_are_saved_as_each_chunk_fills_them(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    connector.generate(prompt(160), max_new_tokens=1)
    assert store.calls.count("save") == 4


@pytest.mark.parametrize(
    ("shared", "length", "hit"), [(40, 90, 40), (33, 70, 33), (7, 40, 7), (60, 60, 59), (48, 90, 48)]
)
def test_beginning_of_anothers_block_is_reused_to_the_token(
    llama: LlamaForCausalLM, shared: int, length: int, hit: int
) -> None:
    with KVStore(StoreConfig.load({"host": {"capacity_bytes": 16 << 20, "prefault": False}}, environ={})) as store:
        connector = connect(llama, store)
        connector.generate(prompt(100), max_new_tokens=2)
        ids = torch.cat([prompt(100)[:, :shared], prompt(length - shared, seed=9)], dim=1)
        done = connector.generate(ids, max_new_tokens=NEW)
        assert hits(done) == hit
        assert torch.equal(done.sequences, plain(llama, ids))
        again = connector.generate(ids, max_new_tokens=NEW)  # its own blocks were saved under their own ids
        assert torch.equal(again.sequences, done.sequences)
        assert hits(again) >= (length - 1) // BLOCK * BLOCK
        assert store.check() == []


def test_an_error_of_the_model_lets_go_of_everything(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    with pytest.raises(IndexError):
        connector.generate(torch.full((1, 70), 9999), max_new_tokens=NEW)
    assert store.check() == []
    assert torch.equal(connector.generate(prompt(70), max_new_tokens=NEW).sequences, plain(llama, prompt(70)))


def test_tenants_and_adapters_do_not_read_each_other(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    ids = prompt(70)
    settings = [(b"", b""), (b"tenant", b""), (b"", b"adapter"), (b"tenant", b"adapter")]
    for salt, adapter in settings:
        connector = TransformersConnector(
            llama, store, revision="x", block_tokens=BLOCK, salt=salt, adapter=adapter, load_rule=LoadRule.ALWAYS
        )
        assert hits(connector.generate(ids, max_new_tokens=1)) == 0
    other = TransformersConnector(llama, store, revision="y", block_tokens=BLOCK, load_rule=LoadRule.ALWAYS)
    assert hits(other.generate(ids, max_new_tokens=1)) == 0


# -- device ----------------------------------------------------------------------------------------------------


def test_the_device_serves_first_and_keeps_the_store_warm(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store, device_budget_bytes=1 << 20)
    ids = prompt(100)
    connector.generate(ids, max_new_tokens=NEW)
    done = connector.generate(ids, max_new_tokens=NEW)
    assert done.hit_tokens == {"device": 96}
    assert store.touched == [6]
    assert torch.equal(done.sequences, plain(llama, ids))
    assert connector.overlay is not None
    assert connector.overlay.check() == []
    assert store.check() == []


def test_what_follows_the_device_comes_from_the_store_and_is_promoted(llama: LlamaForCausalLM) -> None:
    store = FakeStore(tier="redis")
    ids = prompt(100)
    connect(llama, store).generate(ids, max_new_tokens=1)
    connector = connect(llama, store, device_budget_bytes=1 << 20)
    connector.generate(ids[:, :40], max_new_tokens=1)
    done = connector.generate(ids, max_new_tokens=NEW)
    assert done.hit_tokens == {"device": 32, "redis": 64}
    again = connector.generate(ids, max_new_tokens=NEW)
    assert again.hit_tokens == {"device": 96}
    assert torch.equal(done.sequences, plain(llama, ids))
    assert torch.equal(again.sequences, plain(llama, ids))


def test_a_small_device_budget_holds_and_the_store_serves_the_rest(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    block_bytes = connect(llama, store).layout.block_bytes
    connector = connect(llama, store, device_budget_bytes=3 * block_bytes)
    ids = prompt(100)
    for _ in range(3):
        done = connector.generate(ids, max_new_tokens=NEW)
        assert torch.equal(done.sequences, plain(llama, ids))
    assert done.hit_tokens == {"device": 48, "host": 48}
    assert connector.overlay is not None
    assert connector.overlay.stats()["device.blocks"] == 3
    assert connector.overlay.check() == []


def test_a_device_alone_is_a_cache_of_its_own(llama: LlamaForCausalLM) -> None:
    connector = connect(llama, None, device_budget_bytes=1 << 20)
    ids = prompt(100)
    for want in ({}, {"device": 96}):
        done = connector.generate(ids, max_new_tokens=NEW)
        assert done.hit_tokens == want
        assert torch.equal(done.sequences, plain(llama, ids))


def test_a_store_that_lost_what_the_device_has_gets_it_back(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = connect(llama, store, device_budget_bytes=1 << 20)
    ids = prompt(100)
    connector.generate(ids, max_new_tokens=1)
    store.clear()
    done = connector.generate(torch.cat([ids, prompt(50, seed=8)], dim=1), max_new_tokens=1)
    assert done.hit_tokens == {"device": 96}
    assert len(store.blocks) == 9


# -- the real store --------------------------------------------------------------------------------------------


def test_the_real_store_serves_and_stays_healthy(llama: LlamaForCausalLM) -> None:
    config = StoreConfig.load({"host": {"capacity_bytes": "4MiB", "prefault": False}}, environ={})
    with KVStore(config) as store:
        connector = connect(llama, store)
        ids = prompt(130)
        want = plain(llama, ids)
        assert torch.equal(connector.generate(ids, max_new_tokens=NEW).sequences, want)
        done = connector.generate(ids, max_new_tokens=NEW)
        assert done.hit_tokens == {"host": 128}
        assert torch.equal(done.sequences, want)
        store.drop_host()
        assert torch.equal(connector.generate(ids, max_new_tokens=NEW).sequences, want)
        assert store.check() == []


# -- what it serves, and what it refuses -----------------------------------------------------------------------


TINY: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}


def test_a_model_without_rope_and_grouped_heads_is_served() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    model = GPT2LMHeadModel(config)
    model.train(False)
    model.generation_config.eos_token_id = None
    connector = connect(model, FakeStore())
    ids = prompt(100)
    connector.generate(ids, max_new_tokens=NEW)
    done = connector.generate(ids, max_new_tokens=NEW)
    assert hits(done) == 96
    assert torch.equal(done.sequences, plain(model, ids))


def llama_like(**settings: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "num_attention_heads": 4, **settings}))


def test_sliding_windows_are_refused() -> None:
    model = MistralForCausalLM(MistralConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, sliding_window=8))
    with pytest.raises(ConfigError, match="sliding_attention layers: sliding windows drop"):
        model_id_of(model, revision="x")


def test_a_mix_of_full_and_sliding_layers_is_refused() -> None:
    config = Qwen3Config(
        **TINY,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
    )
    with pytest.raises(ConfigError, match="sliding_attention layers"):
        model_id_of(Qwen3ForCausalLM(config), revision="x")


def test_an_encoder_decoder_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        model_id_of(model, revision="x")


def test_a_state_space_model_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ConfigError, match="layers: linear attention and state-space|per-layer KV cache"):
        model_id_of(model, revision="x")


def test_latent_attention_is_refused() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **TINY, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, first_k_dense_replace=2
    )
    with pytest.raises(ConfigError, match="latent attention"):
        model_id_of(DeepseekV3ForCausalLM(config), revision="x")


@pytest.mark.parametrize("kind", ["quantized", "static"])
def test_another_kind_of_cache_is_refused(kind: str) -> None:
    model = llama_like()
    assert model.generation_config is not None
    model.generation_config.cache_implementation = kind
    with pytest.raises(ConfigError, match=f"'{kind}' cache"):
        model_id_of(model, revision="x")


def test_positions_that_depend_on_the_length_are_refused() -> None:
    model = llama_like(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ConfigError, match="rope_type 'dynamic'"):
        model_id_of(model, revision="x")


def test_a_revision_that_names_no_weights_is_refused() -> None:
    for revision in ("", "main"):
        with pytest.raises(ConfigError, match="revision is"):
            model_id_of(llama_like(), revision=revision)


def test_batches_are_refused(llama: LlamaForCausalLM) -> None:
    connector = connect(llama, FakeStore())
    for ids in (torch.zeros(2, 5, dtype=torch.long), torch.zeros(5, dtype=torch.long), torch.zeros(1, 0)):
        with pytest.raises(ConfigError, match="one sequence"):
            connector.generate(ids, max_new_tokens=1)


def test_the_id_of_a_model_changes_with_what_changes_its_kv() -> None:
    base = model_id_of(llama_like(), revision="x")
    assert base == model_id_of(llama_like(pad_token_id=3, use_cache=False), revision="x")
    assert base.kv_dtype == "float32"
    others = [
        model_id_of(llama_like(), revision="y"),
        model_id_of(llama_like().bfloat16(), revision="x"),
        model_id_of(llama_like(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), revision="x"),
        model_id_of(llama_like(rms_norm_eps=1e-3), revision="x"),
        model_id_of(llama_like(), revision="x", block_tokens=32),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == 6


def test_a_cache_grows_without_losing_what_it_holds(llama: LlamaForCausalLM) -> None:
    connector = connect(llama, None)
    cache = BlockCache(connector.layout, llama.device, 1)
    ids = prompt(700)
    with torch.no_grad():
        llama(ids[:, :200], past_key_values=cache, use_cache=True)
        logits = llama(ids[:, 200:], past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(logits, llama(ids).logits[:, -1], rtol=1e-3, atol=1e-3)
    assert cache.capacity >= 700


def test_a_dropped_cache_gives_its_memory_back_at_once(llama: LlamaForCausalLM) -> None:
    cache = BlockCache(connect(llama, None).layout, llama.device, 1)
    with torch.no_grad():
        llama(prompt(40), past_key_values=cache, use_cache=True)
    gone, storage = weakref.ref(cache), weakref.ref(cache._storage)
    gc.disable()
    try:
        del cache
        assert gone() is None
        assert storage() is None
    finally:
        gc.enable()


def test_a_copied_cache_goes_its_own_way(llama: LlamaForCausalLM) -> None:
    cache = BlockCache(connect(llama, None).layout, llama.device, 1)
    ids = prompt(700)
    with torch.no_grad():
        llama(ids[:, :200], past_key_values=cache, use_cache=True)
        held = cache._storage.clone()
        other = copy.deepcopy(cache)
        logits = llama(ids[:, 200:], past_key_values=other, use_cache=True).logits[:, -1]
        torch.testing.assert_close(logits, llama(ids).logits[:, -1], rtol=1e-3, atol=1e-3)
    assert (cache.get_seq_length(), other.get_seq_length()) == (200, 700)
    assert other.capacity >= 700 > cache.capacity
    assert torch.equal(cache._storage[:, :, :, :200], held[:, :, :, :200])


# -- real weights ----------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_weights_say_the_same_with_and_without_reuse(dtype: torch.dtype) -> None:
    from bench.models import smollm2

    chat = smollm2(dtype)
    connector = TransformersConnector(
        chat.model,
        FakeStore(),
        revision=chat.revision,
        chunk_tokens=256,
        resident_conversations=0,
        load_rule=LoadRule.ALWAYS,
    )
    text = "".join(f"Note {n}: the {n * 7 % 13}th box holds {n * n % 97} marbles.\n" for n in range(40))
    ids = torch.tensor([chat.encode(text + "How many marbles does the last box hold?")])
    cold = connector.generate(ids, max_new_tokens=24)
    warm = connector.generate(ids, max_new_tokens=24)
    assert hits(warm) == (ids.shape[1] - 1) // 64 * 64
    assert torch.equal(cold.sequences, warm.sequences)
    if dtype == torch.float32:
        assert torch.equal(warm.sequences, plain(chat.model, ids, 24))


def test_what_a_load_saved_is_reported_to_the_store(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore()
    connector = connect(llama, store)
    for _ in range(3):
        connector.generate(prompt(160), max_new_tokens=1)
    # Computing is dear: what the next load takes is nothing beside it, also on a busy machine.
    monkeypatch.setattr(connector.cost, "prefill_s", lambda new, past: 1.0 * new)
    before = store.saved_s
    assert hits(connector.generate(prompt(160), max_new_tokens=1)) > 0
    assert store.saved_s > before
