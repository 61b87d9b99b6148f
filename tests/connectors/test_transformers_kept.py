# SPDX-License-Identifier: Apache-2.0
"""A conversation's next turn goes on in the cache that its last one ended with: no copy, and no other's KV."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

import pytest

pytest.importorskip("torch", reason="the connector copies torch tensors")
pytest.importorskip("transformers", reason="the connector serves transformers models")

import torch
from transformers import LlamaForCausalLM, StoppingCriteria

from bench.models import random_llama
from connectors.base import CostModel, LoadRule
from connectors.transformers import Generation, TransformersConnector
from connectors.transformers_cache import BlockCache
from connectors.transformers_kept import KeptCaches
from kvstore.block import Chain, Root
from tests.connectors.fakes import FakeStore
from tests.connectors.test_transformers import connect, hits, plain, prompt
from tests.connectors.test_transformers_device import device, whole
from tests.lazy_streams import BesideEngine

BLOCK, NEW = 16, 12


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return random_llama(11)


def resident(model: LlamaForCausalLM, store: FakeStore | None = None, **settings: int) -> TransformersConnector:
    return connect(model, store, **{"resident_conversations": 2, **settings})


def spoil(connector: TransformersConnector, store: FakeStore | None = None) -> None:
    """Whoever reads the overlay or the store from now on computes nonsense: what is right was in place."""
    if connector.overlay is not None:
        connector.overlay._memory.fill_(float("nan"))
    for parts in store.blocks.values() if store is not None else ():
        for part in parts:
            part[:] = b"\xff" * len(part)


def goes_on(done: Generation, length: int, seed: int = 9) -> torch.Tensor:
    """The next turn's prompt: all so far, and `length` tokens."""
    return torch.cat([done.sequences, prompt(length, seed)], dim=1)


def whole_blocks(num_tokens: int) -> int:
    """Tokens of the whole blocks of so many."""
    return num_tokens // BLOCK * BLOCK


# -- the next turn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.parametrize("below", [True, False])
def test_turns_in_place_say_what_the_model_alone_says(llama: LlamaForCausalLM, budget: int, below: bool) -> None:
    store = FakeStore() if below else None
    connector = resident(llama, store, device_budget_bytes=budget)
    ids = prompt(40)
    for turn in range(6):
        done = connector.generate(ids, max_new_tokens=21, conversation="chat")
        assert torch.equal(done.sequences, plain(llama, ids, 21))
        # Of the last turn's tokens all but the last ran through the model.
        before = whole_blocks(ids.shape[1] - 13 - 1) if turn else 0
        assert done.in_place_tokens == before
        assert done.hit_tokens == ({"device": before} if before else {})
        assert done.loaded_bytes == 0
        spoil(connector, store)
        ids = goes_on(done, 13, turn)
    assert connector.kept.num_hit_blocks * BLOCK > 5 * 32
    assert len(connector.kept._kept) == 1, "one conversation, one cache"
    if store is not None:
        assert store.check() == []


@pytest.mark.parametrize("length", [1, 15, 16, 17, 90])
def test_logits_in_place_are_those_over_copied_rows_bit_for_bit(llama: LlamaForCausalLM, length: int) -> None:
    logits = []
    for residents in (0, 2):
        connector = connect(llama, FakeStore(), device_budget_bytes=1 << 20, resident_conversations=residents)
        done = connector.generate(prompt(100), max_new_tokens=30, conversation="chat")
        rows, cache = connector.prefill(goes_on(done, length), conversation="chat")
        assert connector.kept.num_hit_blocks == (8 if residents else 0)
        logits.append((rows, cache._storage[..., : 130 + length, :].clone()))
    assert torch.equal(logits[0][0], logits[1][0])
    assert torch.equal(logits[0][1], logits[1][1])


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_copied_before_the_next_turns_pass_and_after_it_only_what_is_new(
    llama: LlamaForCausalLM, seed: int
) -> None:
    store, streams = whole(), BesideEngine(seed)
    connector = device(llama, store, streams, budget_blocks=40, residents=2)
    done = connector.generate(prompt(100), max_new_tokens=30, conversation="chat")
    ids = goes_on(done, 20)
    streams.log.clear()
    begun: list[list[str]] = []
    first = llama.register_forward_pre_hook(
        lambda *_: begun.append([*streams.log, *(name for name, one in streams._streams.items() if one.queue)])
    )
    saved, known = len(store.blocks), connector.overlay.stats()["device.blocks"] if connector.overlay else 0
    again = connector.generate(ids, max_new_tokens=1, conversation="chat")
    first.remove()
    assert again.in_place_tokens == 128
    assert again.loaded_bytes == 0
    assert begun[0] == [], "neither done nor begun"
    assert "load kernels" not in streams.log
    assert len(store.blocks) - saved == again.saved_blocks == 150 // BLOCK - 8
    assert connector.overlay is not None
    assert connector.overlay.stats()["device.blocks"] - known == 150 // BLOCK - 8
    assert torch.equal(again.sequences, plain(llama, ids, 1))


def test_what_the_tiers_have_beyond_the_cache_is_copied_in_after_it(llama: LlamaForCausalLM) -> None:
    store, streams = whole(), BesideEngine(0)
    connector = device(llama, store, streams, budget_blocks=5, residents=2)
    ids = prompt(129)
    connector.generate(ids, max_new_tokens=1)
    chain = Chain(Root(connector.model_id), ids[0].numpy())
    cache, _ = connector.kept.take(chain, 140, 8)
    connector.kept.give_back(cache, chain, 3 * BLOCK - 1)
    done = connector.generate(ids, max_new_tokens=NEW)
    assert done.in_place_tokens == 2 * BLOCK
    assert done.hit_tokens == {"device": 5 * BLOCK, "host": 3 * BLOCK}
    assert done.loaded_bytes == 6 * connector.layout.block_bytes
    assert torch.equal(done.sequences, plain(llama, ids))


def test_tiers_below_take_a_turn_in_place_for_a_use(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = resident(llama, store, device_budget_bytes=20 * connect(llama, None).layout.block_bytes)
    first = connector.generate(prompt(65), max_new_tokens=1, conversation="first")
    connector.generate(prompt(65, seed=2), max_new_tokens=1, conversation="second")
    assert store.touched == []
    connector.generate(goes_on(first, 1), max_new_tokens=1, conversation="first")
    assert store.touched == [4]
    assert connector.overlay is not None
    ids = Chain(Root(connector.model_id), prompt(65)[0].numpy()).ids
    assert set(connector.overlay._pool.coldest(4)).isdisjoint(ids), "the other's go first"
    assert connector.overlay.check() == []


def test_what_passes_cost_is_learnt_from_turns_in_place_and_what_loads_cost_is_not(llama: LlamaForCausalLM) -> None:
    seen: list[tuple[object, ...]] = []

    class Heard(CostModel):
        def seen_prefill(self, new_tokens: int, past_tokens: int, seconds: float) -> None:
            seen.append((new_tokens, past_tokens))

        def seen_load(self, tier: str, num_bytes: int, seconds: float) -> None:
            seen.append((tier, num_bytes))

    connector = resident(llama, FakeStore(), chunk_tokens=4096)
    connector.cost = Heard(BLOCK, connector.layout.block_bytes)
    done = connector.generate(prompt(100), max_new_tokens=1, conversation="chat")
    connector.generate(goes_on(done, 40), max_new_tokens=1, conversation="chat")
    assert seen == [(100, 0), (45, 96)]


@pytest.mark.parametrize(("length", "asks"), [(3, False), (40, True)])
def test_lower_tiers_are_asked_only_for_what_is_not_in_place(llama: LlamaForCausalLM, length: int, asks: bool) -> None:
    store = FakeStore()
    connector = resident(llama, store)
    done = connector.generate(prompt(100), max_new_tokens=1, conversation="chat")
    store.waits.clear()
    store.num_pending = 6
    connector.cost.seen_prefill(160, 0, 100.0)  # somebody computes what is in place: no reason to wait
    store.blocks.clear()
    connector.generate(goes_on(done, length), max_new_tokens=1, conversation="chat")
    assert store.waits == [0.25 if asks else None]


def test_a_turn_in_place_tells_the_store_what_it_was_good_for(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = resident(llama, store)
    done = connector.generate(prompt(160), max_new_tokens=1)
    connector.cost = CostModel(BLOCK, connector.layout.block_bytes)  # what it has seen was as short as a stalled load
    connector.cost.seen_prefill(160, 0, 100.0)
    connector.generate(goes_on(done, 1), max_new_tokens=1)
    assert store.saved_s > 0


# -- whose cache it is --------------------------------------------------------------------------------------------


def test_another_salt_adapter_secret_or_text_finds_nothing_of_it(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    kept, tokens = connector.kept, list(range(70))
    model = connector.model_id
    chain = Chain(Root(model), tokens)
    for root in (Root(model, salt=b"s"), Root(model, adapter=b"a"), Root(model, secret=b"k")):
        kept.give_back(connector._new_cache(80), chain, 70, "chat")
        assert kept.take(Chain(root, tokens), 80, 4, "chat")[1] == 0
        kept.clear()
    for others in ([255, *tokens[1:]], tokens[1:], [*tokens[:15], 255, *tokens[16:]]):
        kept.give_back(connector._new_cache(80), chain, 70, "chat")
        assert kept.take(Chain(Root(model), others), 80, 4, "chat")[1] == 0
        kept.clear()
    assert kept.num_hit_blocks == 0
    kept.give_back(connector._new_cache(80), chain, 70, "chat")
    assert kept.take(Chain(Root(model), tokens), 80, 4, "chat")[1] == 4


@pytest.mark.parametrize("edited_at", [5, 16, 40, 79, 100])
def test_an_edited_history_is_reused_up_to_the_edit(llama: LlamaForCausalLM, edited_at: int) -> None:
    connector = resident(llama)
    done = connector.generate(prompt(90), max_new_tokens=NEW, conversation="chat")
    ids = torch.cat([done.sequences[:, :edited_at], prompt(60, seed=7)], dim=1)
    again = connector.generate(ids, max_new_tokens=NEW, conversation="chat")
    assert again.in_place_tokens == whole_blocks(edited_at)
    assert torch.equal(again.sequences, plain(llama, ids))
    back = goes_on(done, 3)  # to what it was before: what the edited turn wrote over is computed again
    third = connector.generate(back, max_new_tokens=NEW, conversation="chat")
    # An edit of the first block had nothing to go on in, and left the cache alone.
    assert third.in_place_tokens == (whole_blocks(edited_at) or whole_blocks(101))
    assert torch.equal(third.sequences, plain(llama, back))


@pytest.mark.parametrize("blocks", [1, 4])
def test_the_last_token_of_a_prompt_always_runs(llama: LlamaForCausalLM, blocks: int) -> None:
    connector = resident(llama)
    connector.generate(prompt(200), max_new_tokens=1, conversation="chat")
    ids = prompt(200)[:, : blocks * BLOCK]
    done = connector.generate(ids, max_new_tokens=NEW, conversation="chat")
    assert done.in_place_tokens == (blocks - 1) * BLOCK
    assert torch.equal(done.sequences, plain(llama, ids))


def test_a_sibling_that_shares_the_system_prompt_leaves_the_conversation_its_cache(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    system = prompt(33)
    one = connector.generate(torch.cat([system, prompt(90, 2)], 1), max_new_tokens=NEW, conversation="one")
    ids = torch.cat([system, prompt(50, 3)], 1)
    other = connector.generate(ids, max_new_tokens=NEW, conversation="other")
    assert other.in_place_tokens == 0
    assert torch.equal(other.sequences, plain(llama, ids))
    spoil(connector)
    for first, name in ((one, "one"), (other, "other")):
        ids = goes_on(first, 20)
        done = connector.generate(ids, max_new_tokens=NEW, conversation=name)
        assert done.in_place_tokens == whole_blocks(first.sequences.shape[1] - 1)
        assert torch.equal(done.sequences, plain(llama, ids))


def test_questions_about_one_document_go_on_in_one_cache(llama: LlamaForCausalLM) -> None:
    """Without any conversation's name."""
    connector = resident(llama)
    document = prompt(96)
    for question in range(4):
        ids = torch.cat([document, prompt(20, 20 + question)], 1)
        done = connector.generate(ids, max_new_tokens=NEW)
        assert done.in_place_tokens == (96 if question else 0)
        assert torch.equal(done.sequences, plain(llama, ids))
    assert len(connector.kept._kept) == 1


def test_the_longest_unused_gives_its_cache_to_who_matches_none(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    chats = {name: connector.generate(prompt(60, seed), max_new_tokens=NEW, conversation=name)
             for seed, name in enumerate("abc")}  # fmt: skip
    assert [kept.conversation for kept in connector.kept._kept] == ["b", "c"]
    found = {}
    for name in "cba":
        ids = goes_on(chats[name], 9)
        done = connector.generate(ids, max_new_tokens=NEW, conversation=name)
        assert torch.equal(done.sequences, plain(llama, ids))
        found[name] = done.in_place_tokens
    assert found == {"c": 64, "b": 64, "a": 0}
    assert [kept.conversation for kept in connector.kept._kept] == ["b", "a"]


def test_of_requests_that_overlapped_no_more_remember_than_were_asked_for(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    kept = KeptCaches(1, connector._new_cache)
    chains = [Chain(Root(connector.model_id), range(first, first + 70)) for first in range(3)]
    caches = [kept.take(chain, 80, 4)[0] for chain in chains]
    for cache, chain in zip(caches, chains, strict=True):
        kept.give_back(cache, chain, 70)
    assert [one.num_blocks for one in kept._kept] == [0, 4], "two for their memory, one of them for what is in it"
    assert kept.take(chains[1], 80, 4)[1] == 0
    assert kept.take(chains[2], 80, 4) == (caches[2], 4)


def test_without_residents_memory_is_kept_and_nothing_that_is_in_it(llama: LlamaForCausalLM) -> None:
    connector = resident(llama, resident_conversations=0)
    done = connector.generate(prompt(60), max_new_tokens=NEW, conversation="chat")
    (kept,) = connector.kept._kept
    ids = goes_on(done, 5)
    again = connector.generate(ids[:, :70], max_new_tokens=2, conversation="chat")
    assert connector.kept._kept[0].cache is kept.cache
    assert again.in_place_tokens == 0
    assert again.hit_tokens == {}


def test_a_prefill_takes_the_conversations_cache_for_good_and_no_other(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    done = connector.generate(prompt(60), max_new_tokens=NEW, conversation="chat")
    (kept,) = connector.kept._kept
    ids = goes_on(done, 5)
    for others, name in ((prompt(30, seed=4), "other"), (ids, "other"), (ids, "")):
        assert connector.prefill(others, conversation=name)[1] is not kept.cache
    logits, cache = connector.prefill(ids, conversation="chat")
    assert cache is kept.cache
    assert connector.kept._kept == []
    with torch.no_grad():
        torch.testing.assert_close(logits, llama(ids).logits[:, -1], rtol=1e-3, atol=1e-3)
    cache._storage.fill_(float("nan"))
    again = connector.generate(ids, max_new_tokens=NEW, conversation="chat")
    assert torch.equal(again.sequences, plain(llama, ids))


# -- what a cache may not be believed to hold ---------------------------------------------------------------------


class Aborts(StoppingCriteria):
    """The client is gone after so many tokens."""

    def __init__(self, after: int) -> None:
        self._left = after

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self._left -= 1
        if self._left < 0:
            raise ConnectionAbortedError("gone")
        return torch.zeros(1, dtype=torch.bool)


class Breaks:
    """A model that fails in its `number`th pass, in the middle, and leaves nonsense where it was to write."""

    def __init__(self, model: LlamaForCausalLM, number: int, streams: BesideEngine) -> None:
        self._left = number
        self._streams = streams
        self._hook = model.model.layers[1].self_attn.register_forward_pre_hook(self._run, with_kwargs=True)

    def _run(self, _module: object, _args: object, given: dict[str, BlockCache]) -> None:
        self._left -= 1
        if self._left < 0:
            cache = given["past_key_values"]
            done = cache.layers[1].get_seq_length()  # of the first layer's there are more by now
            cache._storage[:, :, :, done:].fill_(float("nan"))
            self._streams.submit(self._streams.engine(), lambda: None)  # the device is not done with it yet
            raise RuntimeError("broken")

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def test_of_an_aborted_request_what_was_computed_is_kept(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    ids = prompt(60)
    with pytest.raises(ConnectionAbortedError):
        connector.generate(ids, max_new_tokens=40, stopping_criteria=[Aborts(30)], conversation="chat")
    again = connector.generate(goes_on_from(llama, ids, 25), max_new_tokens=NEW, conversation="chat")
    assert again.in_place_tokens == whole_blocks(60 + 25)
    assert torch.equal(again.sequences, plain(llama, goes_on_from(llama, ids, 25)))


def goes_on_from(model: LlamaForCausalLM, ids: torch.Tensor, new: int) -> torch.Tensor:
    return torch.cat([plain(model, ids, new), prompt(5, seed=8)], dim=1)


@pytest.mark.parametrize(("number", "sound"), [(0, 0), (1, 48), (2, 96), (3, 144), (4, 160), (20, 176)])
def test_of_a_request_that_failed_what_was_computed_before_is_kept_and_no_more(
    llama: LlamaForCausalLM, number: int, sound: int
) -> None:
    """Of passes that end after 48, 96, 144 and 160 tokens, and then a token each."""
    streams = BesideEngine(number)
    connector = device(llama, None, streams, residents=2)
    ids = prompt(160)
    with Breaks(llama, number, streams), pytest.raises(RuntimeError, match="broken"):
        connector.generate(ids, max_new_tokens=40, conversation="chat")
    assert not any(stream.queue for stream in streams._streams.values())
    longer = goes_on_from(llama, ids, 30)
    done = connector.generate(longer, max_new_tokens=NEW, conversation="chat")
    assert done.in_place_tokens == sound
    assert torch.equal(done.sequences, plain(llama, longer))


@pytest.mark.parametrize(("length", "seed"), [(40, 0), (97, 1), (160, 2)])
def test_what_was_computed_again_after_an_unsound_load_is_what_is_kept(
    llama: LlamaForCausalLM, length: int, seed: int
) -> None:
    store = whole()
    connector = device(llama, store, BesideEngine(seed), budget_blocks=40, residents=2)
    ids = prompt(length)
    connector.generate(ids, max_new_tokens=1)
    connector.kept.clear()
    assert connector.overlay is not None
    connector.overlay.clear()
    store.faults.overwritten = True
    done = connector.generate(ids, max_new_tokens=NEW, conversation="chat")
    assert done.hit_tokens == {}
    assert torch.equal(done.sequences, plain(llama, ids))
    spoil(connector, store)
    longer = goes_on(done, 20)
    again = connector.generate(longer, max_new_tokens=NEW, conversation="chat")
    assert again.in_place_tokens == whole_blocks(length + NEW - 1)
    assert torch.equal(again.sequences, plain(llama, longer))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sound", [True, False])
def test_a_load_that_nobody_found_sound_is_not_kept(llama: LlamaForCausalLM, seed: int, sound: bool) -> None:
    """The request fails after it was asked, or before."""
    store, streams = whole(), BesideEngine(seed)
    connector = device(llama, store, streams, residents=2)
    ids = prompt(100)
    connector.generate(ids[:, :50], max_new_tokens=1, conversation="chat")
    device(llama, store, streams).generate(ids, max_new_tokens=1)
    store.faults.overwritten = not sound
    with Breaks(llama, 0, streams), pytest.raises(RuntimeError, match="broken"):  # in the pass that waits for the load
        connector.generate(ids, max_new_tokens=NEW, conversation="chat")
    store.faults.overwritten = False
    spoil(connector, store)
    store.blocks.clear()
    again = connector.generate(ids, max_new_tokens=NEW, conversation="chat")
    assert again.in_place_tokens == 48
    assert torch.equal(again.sequences, plain(llama, ids))
    assert not any(stream.queue for stream in streams._streams.values())


def test_a_load_that_was_found_sound_is_kept_whatever_came_after_it(llama: LlamaForCausalLM) -> None:
    store = FakeStore()
    connector = resident(llama, store)
    ids = prompt(100)
    connect(llama, store).generate(ids, max_new_tokens=1)
    with Breaks(llama, 0, BesideEngine()), pytest.raises(RuntimeError, match="broken"):
        connector.generate(ids, max_new_tokens=NEW)
    store.blocks.clear()
    done = connector.generate(ids, max_new_tokens=NEW)
    assert done.in_place_tokens == 96
    assert torch.equal(done.sequences, plain(llama, ids))


@pytest.mark.parametrize("after", ["the turn", "another's turn"])
def test_a_cache_that_somebody_wrote_to_meanwhile_holds_nothing(llama: LlamaForCausalLM, after: str) -> None:
    connector = resident(llama)
    held: list[BlockCache] = []
    hook = llama.register_forward_pre_hook(
        lambda _model, _args, given: held.append(given["past_key_values"]), with_kwargs=True
    )
    done = connector.generate(prompt(60), max_new_tokens=NEW, conversation="chat")
    hook.remove()
    if after == "another's turn":
        connector.generate(prompt(60, seed=3), max_new_tokens=NEW, conversation="other")
    cache = held[0]
    cache.set_length(20)
    with torch.no_grad():
        llama(prompt(7, seed=4), past_key_values=cache, use_cache=True)
    ids = goes_on(done, 5)
    again = connector.generate(ids, max_new_tokens=NEW, conversation="chat")
    assert again.in_place_tokens == 0
    assert torch.equal(again.sequences, plain(llama, ids))


def test_a_cache_that_was_only_looked_at_is_as_good_as_before(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    done = connector.generate(prompt(60), max_new_tokens=NEW, conversation="chat")
    cache = connector.kept._kept[0].cache
    assert cache.layers[0].keys.abs().sum() > 0
    cache.crop(30)
    again = connector.generate(goes_on(done, 5), max_new_tokens=NEW, conversation="chat")
    assert again.in_place_tokens == 64


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_in_whichever_order_tokens_are_those_of_the_model_alone(
    llama: LlamaForCausalLM, seed: int
) -> None:
    """Turns, edits, branches, aborts, broken passes, unsound loads, prefills; over little of everything."""
    draw = random.Random(seed)
    store, streams = whole(), BesideEngine(seed)
    connector = device(llama, store, streams, budget_blocks=draw.choice([0, 6, 30]), residents=draw.choice([1, 2, 3]))
    chats = {name: prompt(draw.randrange(20, 90), seed=number) for number, name in enumerate("abc")}
    chats["b"] = torch.cat([chats["a"][:, :40], chats["b"]], 1)
    for step in range(30):
        name = draw.choice("abc")
        ids = torch.cat([chats[name], prompt(draw.randrange(1, 40), seed=100 * seed + step)], 1)
        if draw.random() < 0.3:
            ids = torch.cat([ids[:, : draw.randrange(1, ids.shape[1])], prompt(3, seed=step)], 1)
        ids = ids[:, :300]
        asked_by = draw.choice([name, name, ""])
        store.faults.overwritten = draw.random() < 0.2
        match draw.randrange(6):
            case 0:
                aborts = Aborts(draw.randrange(6))
                with pytest.raises(ConnectionAbortedError):
                    connector.generate(ids, max_new_tokens=9, stopping_criteria=[aborts], conversation=asked_by)
            case 1:
                with Breaks(llama, draw.randrange(3), streams), suppress(RuntimeError):
                    connector.generate(ids, max_new_tokens=9, conversation=asked_by)
            case 2:
                logits, cache = connector.prefill(ids, conversation=asked_by)
                assert int(logits.argmax()) == int(plain(llama, ids, 1)[0, -1])
                cache._storage.fill_(float("nan"))  # it is the caller's
            case _:
                done = connector.generate(ids, max_new_tokens=9, conversation=asked_by)
                assert torch.equal(done.sequences, plain(llama, ids, 9))
                chats[name] = done.sequences
    assert connector.kept.num_hit_blocks > 0
    assert connector.overlay is None or connector.overlay.check() == []
    assert store.check() == []


# -- memory -------------------------------------------------------------------------------------------------------


def test_a_conversation_that_outgrows_its_cache_keeps_what_is_in_it(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    ids, capacities = prompt(200), set()
    for turn in range(5):
        done = connector.generate(ids, max_new_tokens=NEW, conversation="chat")
        assert done.in_place_tokens == (whole_blocks(ids.shape[1] - 120 - 1) if turn else 0)
        assert torch.equal(done.sequences, plain(llama, ids))
        capacities.add(connector.kept._kept[0].cache.capacity)
        ids = goes_on(done, 120, turn)
    assert len(capacities) < 5, "there is room for turns to come"
    assert max(capacities) <= 1.25 * ids.shape[1] + 256


def test_a_next_turn_fits_into_the_cache_as_it_is(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    done = connector.generate(prompt(500), max_new_tokens=NEW, conversation="chat")
    (kept,) = connector.kept._kept
    storage = kept.cache._storage
    connector.generate(goes_on(done, 90), max_new_tokens=NEW, conversation="chat")
    assert connector.kept._kept[0].cache._storage is storage


def test_a_cache_too_small_for_who_matches_none_is_let_go_of_before_another_is_made(llama: LlamaForCausalLM) -> None:
    connector = resident(llama, resident_conversations=1)
    connector.generate(prompt(60), max_new_tokens=1, conversation="short")
    gone = weakref.ref(connector.kept._kept[0].cache._storage)
    made: list[bool] = []
    new = connector.kept._new
    connector.kept._new = lambda num_tokens: (made.append(gone() is None), new(num_tokens))[1]
    connector.generate(prompt(600, seed=2), max_new_tokens=1, conversation="long")
    assert made == [True]
    assert len(connector.kept._kept) == 1


def out_of_memory(times: int, new: Callable[[int], BlockCache]) -> Callable[[int], BlockCache]:
    left = [times]

    def make(num_tokens: int) -> BlockCache:
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("no room")
        return new(num_tokens)

    return make


def test_a_device_without_room_for_another_cache_keeps_fewer(
    llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    connector = resident(llama)
    connector.generate(prompt(60), max_new_tokens=1, conversation="a")
    gone = weakref.ref(connector.kept._kept[0].cache._storage)
    connector.kept._new = out_of_memory(1, connector._new_cache)
    done = connector.generate(prompt(60, seed=2), max_new_tokens=NEW, conversation="b")
    assert torch.equal(done.sequences, plain(llama, prompt(60, seed=2)))
    assert gone() is None
    assert connector.kept.num_resident == 1
    assert "from now on 1 conversations are resident" in caplog.text
    connector.kept._new = out_of_memory(2, connector._new_cache)
    connector.generate(prompt(60, seed=3), max_new_tokens=1, conversation="c")
    assert [kept.conversation for kept in connector.kept._kept] == ["c"], "in the memory that b had"


@pytest.mark.parametrize("others", [0, 1])
def test_a_pass_that_found_no_memory_lets_go_of_what_others_left(llama: LlamaForCausalLM, others: int) -> None:
    connector = resident(llama)
    for seed in range(others):
        connector.generate(prompt(60, seed), max_new_tokens=1, conversation="a")

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    hook = llama.register_forward_pre_hook(fails)
    try:
        for call in (connector.prefill, lambda ids, **k: connector.generate(ids, max_new_tokens=1, **k)):
            with pytest.raises(torch.OutOfMemoryError):
                call(prompt(60, 9), conversation="b")
            assert not any(kept.conversation == "a" for kept in connector.kept._kept)
    finally:
        hook.remove()
    assert connector.kept.num_resident == (1 if others else 2), "one alone was too large by itself"


def test_requests_beside_one_another_have_a_cache_each(llama: LlamaForCausalLM) -> None:
    connector = resident(llama, FakeStore(), resident_conversations=3)
    wrong: list[str] = []
    meet = threading.Barrier(4)

    def chat(user: int) -> None:
        ids = prompt(40 + user, seed=user)
        meet.wait(30)
        for turn in range(5):
            done = connector.generate(ids, max_new_tokens=6, conversation=str(user))
            if not torch.equal(done.sequences, plain(llama, ids, 6)):
                wrong.append(f"user {user}, turn {turn}")
            ids = goes_on(done, 11, seed=10 * user + turn)

    threads = [threading.Thread(target=chat, args=(user,)) for user in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    assert connector.kept.num_hit_blocks > 0
    assert len(connector.kept._kept) == 3


def test_a_turn_in_inference_mode_and_one_outside_it_share_a_cache(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    with torch.inference_mode():
        done = connector.generate(prompt(60), max_new_tokens=NEW, conversation="chat")
    ids = goes_on(done, 5)
    again = connector.generate(ids, max_new_tokens=NEW, conversation="chat")
    assert again.in_place_tokens == 64
    assert torch.equal(again.sequences, plain(llama, ids))


def test_caches_are_handed_out_to_one_at_a_time(llama: LlamaForCausalLM) -> None:
    connector = resident(llama)
    chain = Chain(Root(connector.model_id), range(70))
    kept = KeptCaches(2, connector._new_cache)
    kept.give_back(connector._new_cache(80), chain, 70, "chat")
    one, found = kept.take(chain, 80, 4, "chat")
    other, nothing = kept.take(chain, 80, 4, "chat")
    assert (found, nothing) == (4, 0)
    assert one is not other


# -- real weights -------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_real_model_says_the_same_turn_by_turn_in_place() -> None:
    from bench.models import smollm2

    chat = smollm2(torch.float32)
    made = [
        TransformersConnector(
            chat.model,
            None,
            revision=chat.revision,
            chunk_tokens=256,
            device_budget_bytes=256 << 20,
            resident_conversations=residents,
            load_rule=LoadRule.ALWAYS,
        )
        for residents in (2, 0)
    ]
    text = "".join(f"Note {n}: the {n * 7 % 13}th box holds {n * n % 97} marbles.\n" for n in range(25))
    ids = torch.tensor([chat.encode(text + "How many marbles does the last box hold?")])
    for turn in range(3):
        place, rows = (one.generate(ids, max_new_tokens=24, conversation="chat") for one in made)
        assert torch.equal(place.sequences, plain(chat.model, ids, 24))
        assert torch.equal(place.sequences, rows.sequences)
        assert place.hit_tokens == rows.hit_tokens
        assert hits(place) == place.in_place_tokens
        assert (hits(place) > 0) == (turn > 0)
        assert place.loaded_bytes == 0
        more = torch.tensor([chat.encode(f" And box {turn}? Explain at length what is in it, and why.")])
        ids = torch.cat([place.sequences, more], dim=1)
