# SPDX-License-Identifier: Apache-2.0
"""Reuse under transformers on a device: copies run beside the model, and its tokens are those of the model alone.

The device is one that runs every copy as late as the waits allow (`BesideEngine`): a wait that is missing shows as a
wrong token.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the connector copies torch tensors")
pytest.importorskip("transformers", reason="the connector serves transformers models")

import numpy as np
import torch
from transformers import LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.models import random_llama
from connectors.base import CostModel, FailOpen, LoadRule
from connectors.session import Connection, Session
from connectors.transformers import TransformersConnector
from connectors.transformers_cache import BlockCache
from kvstore.api import LoadedRun
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.layout import layout_of
from kvstore.store import KVStore
from tests.connectors.fakes import FakeStore
from tests.connectors.test_transformers import hits, plain, prompt
from tests.lazy_streams import BesideEngine, LazyStreams

BLOCK, CHUNK, NEW = 16, 48, 12


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return random_llama(11)


def device(
    model: LlamaForCausalLM,
    store: FakeStore | KVStore | None,
    streams: BesideEngine,
    *,
    budget_blocks: int = 0,
    residents: int = 0,
) -> TransformersConnector:
    probe = TransformersConnector(model, None, revision="seed-11", block_tokens=BLOCK)
    return TransformersConnector(
        model,
        store,
        revision="seed-11",
        block_tokens=BLOCK,
        chunk_tokens=CHUNK,
        device_budget_bytes=budget_blocks * probe.layout.block_bytes,
        resident_conversations=residents,
        step_layers=1,
        step_bytes=0,
        load_rule=LoadRule.ALWAYS,
        streams=streams,
    )


def whole() -> FakeStore:
    """A store whose loads stay in place until they are closed, as most do."""
    store = FakeStore()
    store.faults.whole = True
    return store


def garbage(connector: TransformersConnector) -> None:
    """What idle caches hold is never what a request left there: a load that does not come is seen."""
    for kept in connector.kept._kept:
        kept.cache._storage.fill_(float("nan"))


class Heard(BaseStreamer):
    """What a client was sent."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.num_ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.num_ends += 1


@pytest.mark.parametrize(("length", "seed"), [(33, 0), (49, 1), (97, 2), (160, 3), (160, 4)])
def test_a_load_beside_the_model_gives_the_tokens_of_the_model_alone(
    llama: LlamaForCausalLM, length: int, seed: int
) -> None:
    store, streams = whole(), BesideEngine(seed)
    connector = device(llama, store, streams)
    ids = prompt(length)
    want = plain(llama, ids)
    first = connector.generate(ids, max_new_tokens=NEW)
    garbage(connector)
    second = connector.generate(ids, max_new_tokens=NEW)
    assert torch.equal(first.sequences, want)
    assert torch.equal(second.sequences, want)
    assert hits(second) == (length - 1) // BLOCK * BLOCK
    assert first.saved_blocks == (length + NEW - 1) // BLOCK
    assert store.check() == []


def test_the_model_begins_before_the_last_layers_are_there(llama: LlamaForCausalLM) -> None:
    store, streams = whole(), BesideEngine(3)
    connector = device(llama, store, streams)
    connector.generate(prompt(100), max_new_tokens=1)
    pending: list[bool] = []
    first = llama.model.layers[0].self_attn.register_forward_hook(
        lambda *_: pending.append(any(stream.queue for stream in streams._streams.values()))
    )
    connector.generate(prompt(100), max_new_tokens=1)
    first.remove()
    assert pending[0]


def test_the_store_is_asked_and_let_go_of_only_when_the_copies_are_done(llama: LlamaForCausalLM) -> None:
    store, streams = whole(), BesideEngine(4)
    connector = device(llama, store, streams)
    connector.generate(prompt(100), max_new_tokens=1)
    passes: list[int] = []
    asked: list[tuple[int, bool]] = []
    count = llama.register_forward_pre_hook(lambda *_: passes.append(1))
    store.when_asked = lambda: asked.append(
        (len(passes), any(stream.queue for name, stream in streams._streams.items() if name.startswith("load")))
    )
    connector.generate(prompt(100), max_new_tokens=1)
    count.remove()
    assert asked == [(1, False)], "after the pass was ordered, before anything else was, with no copy left"


@pytest.mark.parametrize(("length", "seed"), [(40, 0), (97, 1), (160, 2)])
def test_what_was_computed_over_an_overwritten_load_is_computed_again(
    llama: LlamaForCausalLM, length: int, seed: int
) -> None:
    store, streams = whole(), BesideEngine(seed)
    connector = device(llama, store, streams, budget_blocks=40)
    ids = prompt(length)
    want = plain(llama, ids)
    connector.generate(prompt(length)[:, : length // 2], max_new_tokens=1)
    sound = {block: [bytes(part) for part in parts] for block, parts in store.blocks.items()}
    assert connector.overlay is not None
    connector.overlay.clear()
    store.faults.overwritten = True
    heard = Heard()
    done = connector.generate(ids, max_new_tokens=NEW, streamer=heard)
    assert torch.equal(done.sequences, want)
    assert heard.tokens == want[0].tolist(), "nobody was sent a token of the pass that did not count"
    assert heard.num_ends == 1
    assert hits(done) == 0
    store.faults.overwritten = False
    assert {block: [bytes(part) for part in store.blocks[block]] for block in sound} == sound
    garbage(connector)
    for clear in (False, True):  # neither the device nor the store has anything of it
        if clear:
            connector.overlay.clear()
        again = connector.generate(ids, max_new_tokens=NEW)
        assert torch.equal(again.sequences, want)
        assert hits(again) == (length - 1) // BLOCK * BLOCK
    assert store.check() == []


@pytest.mark.parametrize("length", [40, 160])
def test_logits_over_an_overwritten_load_are_computed_again(llama: LlamaForCausalLM, length: int) -> None:
    store = whole()
    connector = device(llama, store, BesideEngine(5))
    ids = prompt(length)
    cold, _ = connector.prefill(ids)
    store.faults.overwritten = True
    seen: list[torch.Tensor] = []
    warm, cache = connector.prefill(ids, on_logits=seen.append)
    assert torch.equal(cold, warm)
    assert torch.equal(seen[0], cold)
    assert len(seen) == 1
    assert cache.get_seq_length() == length
    assert store.check() == []


class Late(BesideEngine):
    """Copies that are not done before somebody waits for them."""

    def is_reached(self, moment: object) -> bool:
        return False


@pytest.mark.parametrize("how", ["in time", "late", "overwritten"])
def test_a_pass_over_a_load_tells_what_computing_takes_unless_it_waited_or_was_in_vain(
    llama: LlamaForCausalLM, how: str
) -> None:
    """Who finds something for each request computes no other passes than these."""
    store, ids = whole(), prompt(CHUNK)
    device(llama, store, BesideEngine(5)).prefill(ids)
    for once in (lambda other: other.prefill(ids), lambda other: other.generate(ids, max_new_tokens=2)):
        other = device(llama, store, (Late if how == "late" else BesideEngine)(5))
        store.faults.overwritten = how == "overwritten"
        once(other)
        assert (other.cost.prefill_s(CHUNK, 0) is not None) == (how == "in time")
        assert (other.cost.load_s("host", 2) > 0) == (how != "overwritten")


def test_what_the_device_had_stays_when_what_the_store_had_does_not(llama: LlamaForCausalLM) -> None:
    store = whole()
    connector = device(llama, store, BesideEngine(6), budget_blocks=2)
    ids = prompt(97)
    want = plain(llama, ids)
    connector.generate(ids, max_new_tokens=1)
    store.faults.overwritten = True
    done = connector.generate(ids, max_new_tokens=NEW)
    assert torch.equal(done.sequences, want)
    assert done.hit_tokens == {"device": 32}


@pytest.mark.parametrize("seed", range(2))
def test_users_who_overflow_the_device_get_the_tokens_of_the_model_alone(llama: LlamaForCausalLM, seed: int) -> None:
    values = {"host": {"capacity_bytes": 4 << 20, "prefault": False}}
    with KVStore(StoreConfig.load(values, environ={})) as store:
        connector = device(llama, store, BesideEngine(seed), budget_blocks=9)
        chats = [prompt(60, seed=user) for user in range(3)]
        found: dict[str, int] = {}
        for turn in range(3):
            for user, chat in enumerate(chats):
                garbage(connector)
                done = connector.generate(chat, max_new_tokens=8, conversation=str(user))
                assert torch.equal(done.sequences, plain(llama, chat, 8))
                for tier, count in done.hit_tokens.items():
                    found[tier] = found.get(tier, 0) + count
                chats[user] = torch.cat([done.sequences, prompt(9, seed=10 * turn + user)], dim=1)
        assert found["device"] > 0
        assert found["host"] > 0
        assert connector.overlay is not None
        assert connector.overlay.check() == []
        assert store.check() == []


def test_a_chunk_is_published_while_the_next_is_computed(llama: LlamaForCausalLM) -> None:
    store = whole()
    connector = device(llama, store, BesideEngine(7))
    published: list[int] = []
    each = llama.model.register_forward_hook(lambda *_: published.append(len(store.blocks)))
    connector.generate(prompt(160), max_new_tokens=1)
    each.remove()
    # Passes over 48, 96, 144 and 160 tokens: at the end of each, what the pass before the last had filled is there.
    assert published == [0, 0, 3, 6]


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_load_that_breaks_in_the_middle_is_a_miss_and_leaves_nothing_running(
    llama: LlamaForCausalLM, number: int
) -> None:
    store, streams = whole(), BesideEngine(8)
    connector = device(llama, store, streams)
    ids = prompt(120)
    want = plain(llama, ids)
    connector.generate(ids, max_new_tokens=NEW)
    garbage(connector)
    store.faults.break_load_at = number
    done = connector.generate(ids, max_new_tokens=NEW)
    assert torch.equal(done.sequences, want)
    assert hits(done) == 0
    assert store.check() == []
    assert not any(stream.queue for stream in streams._streams.values())


# -- the session, over a device that has done nothing by itself when it is asked ---------------------------------


def session_over(store: FakeStore, streams: LazyStreams) -> tuple[Session, BlockCache]:
    """A request of 100 tokens, all of whose blocks but the last the store has."""
    model = ModelId(
        model="m", revision="r", kv_dtype="float32", num_layers=3, num_kv_heads=2, head_dim=4, block_tokens=BLOCK
    )
    layout = store.open(model)
    cost = CostModel(BLOCK, layout.block_bytes, rule=LoadRule.ALWAYS)
    connection = Connection(store=store, overlay=None, cost=cost, fail_open=FailOpen(), max_wait_s=0.0)
    chain = Chain(Root(model), range(100))
    for number, block in enumerate(chain.ids):
        value = torch.full((layout.block_bytes // 4,), float(number + 1))
        store.blocks[block] = [bytearray(value.numpy().tobytes())]
    cache = BlockCache(layout, torch.device("cpu"), 128, step_layers=1, streams=streams)
    return Session(connection, cache, chain, "r", prompt_tokens=100), cache


def copies_left(streams: LazyStreams) -> bool:
    return any(stream.queue for name, stream in streams._streams.items() if not name.startswith("engine"))


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_load_counts_only_if_it_was_intact_after_its_last_copy(seed: int, sound: bool) -> None:
    store, streams = whole(), LazyStreams(seed)
    session, cache = session_over(store, streams)
    asked: list[bool] = []
    store.when_asked = lambda: asked.append(copies_left(streams))
    assert session.load() == 96
    assert copies_left(streams), "nobody waited"
    assert asked == []
    store.faults.overwritten = not sound
    assert session.settle() == sound
    assert asked == [False]
    assert session.num_tokens == (96 if sound else 0)
    assert session.hit_tokens == ({"host": 96} if sound else {})
    if sound:  # the store has let go: copies that were still to come would have found other bytes
        assert [float(cache.block(index).mean()) for index in range(6)] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    session.close()
    assert store.check() == []


@pytest.mark.parametrize("seed", range(4))
def test_a_request_that_ends_before_its_pass_waits_for_the_copies(seed: int) -> None:
    store, streams = whole(), LazyStreams(seed)
    session, _ = session_over(store, streams)
    session.load()
    session.close()
    assert not copies_left(streams)
    assert session.hit_tokens == {}
    assert store.check() == []


@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_published_when_they_were_copied_out_and_not_before(seed: int) -> None:
    store, streams = whole(), LazyStreams(seed)
    session, cache = session_over(store, streams)
    store.blocks.clear()
    assert session.load() == 0
    streams.run_engine(lambda: cache._storage.fill_(5.0))
    session.computed(96)
    streams.run_engine(lambda: cache._storage.fill_(6.0))  # a speculative token, or the next owner
    assert store.blocks == {}
    session.close()
    assert len(store.blocks) == session.saved_blocks == 6
    assert {bytes(part) for parts in store.blocks.values() for part in parts} == {
        torch.full((cache._block_layout.block_bytes // 4,), 5.0).numpy().tobytes()
    }
    assert store.check() == []


@pytest.mark.parametrize("seed", range(4))
def test_warming_up_goes_every_way_that_a_request_will_and_leaves_nothing_under_way(
    llama: LlamaForCausalLM, seed: int
) -> None:
    streams = BesideEngine(seed)
    connector = device(llama, whole(), streams, budget_blocks=4)
    cache = connector._new_cache(BLOCK)
    cache.warm_up(rows=False, slots=True)
    assert {name.rstrip(" 0") for name in streams.log} == {"save kernels", "save copies", "load kernels", "load copies"}
    streams.log.clear()
    cache.warm_up(rows=True, slots=False)
    assert set(streams.log) == {"rows"}
    assert cache.is_done
    assert not any(stream.queue for name, stream in streams._streams.items() if not name.startswith("engine"))


def test_a_connector_whose_first_copy_fails_says_so_and_goes_on(
    llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(BesideEngine):
        def record(self, stream: object) -> object:
            raise RuntimeError("no such device")

    connector = device(llama, None, Broken(0), budget_blocks=4)
    connector._warm_up()
    assert "no such device" in caplog.text
    assert "a first copy between the cache and the store's memory failed" in caplog.text


@pytest.mark.parametrize(
    ("step_bytes", "steps"), [(0, 8), (4, 8), (7, 8), (8, 4), (11, 4), (12, 3), (32, 1), (1000, 1)]
)
def test_a_step_of_a_load_has_as_many_layers_as_fit_and_goes_as_one_window(step_bytes: int, steps: int) -> None:
    """`step_bytes` in quarters of a layer of eight blocks, and windows of so many bytes, or of one such layer."""
    model = ModelId(
        model="m", revision="r", kv_dtype="bfloat16", num_layers=8, num_kv_heads=2, head_dim=4, block_tokens=BLOCK
    )
    layout = layout_of(model)
    layer_bytes, streams = layout.block_bytes, LazyStreams()  # of eight blocks
    cache = BlockCache(
        layout,
        torch.device("cpu"),
        8 * BLOCK,
        step_layers=1,
        step_bytes=step_bytes * layer_bytes // 4,
        streams=streams,
    )
    copier, windows = cache._pages()._on_device(), []
    copier._window_bytes = lambda *, by_layers: max(4, step_bytes) * layer_bytes // 4  # type: ignore[method-assign]
    send = copier._over_the_link
    copier._over_the_link = lambda *args, **named: windows.append(send(*args, **named))  # type: ignore[method-assign]
    memory = memoryview(bytes(8 * layout.block_bytes))
    offsets = np.arange(8, dtype=np.int64)[:, None] * layout.block_bytes
    cache.write_run(LoadedRun(0, "host", memory, offsets))
    cache.begin()
    assert len(cache._writing[0]._steps) == steps
    cache.finish()
    assert len(windows) == steps
