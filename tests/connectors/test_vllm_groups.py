# SPDX-License-Identifier: Apache-2.0
"""Layers in groups, of which some let go of pages: what of them is saved and loaded, and whose page table is whose."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the worker copies torch tensors")

import numpy as np

from connectors.vllm_groups import Groups, LayerGroups, arrays_of, chosen
from connectors.vllm_plan import Tables, kept_from
from kvstore.errors import ConfigError
from tests.connectors.test_vllm_device import BLOCK, LAYERS, PAGE, WAIT_FOR_A_SAVE, Device
from tests.connectors.test_vllm_plan import Bench, FakeRequest, tokens
from tests.waiting import eventually

# -- which engines ---------------------------------------------------------------------------------------------


def group(kind: str = "FullAttentionSpec", names: Sequence[str] = (), **spec: Any) -> Any:
    known = {"block_size": 32, "page_size_bytes": 1024, "non_causal": False, "sliding_window": None}
    return SimpleNamespace(
        layer_names=list(names),
        kv_cache_spec=type(kind, (SimpleNamespace,), {})(**{**known, "attention_chunk_size": None, **spec}),
    )


def sliding(window: int = 48, **spec: Any) -> Any:
    return group("SlidingWindowSpec", sliding_window=window, **spec)


CHUNKS = group("ChunkedLocalAttentionSpec", attention_chunk_size=64)


@pytest.mark.parametrize(
    ("groups", "keeps"),
    [
        ([group()], (True,)),
        ([group(sliding_window=8)], (True,)),  # its layers attend to less than it keeps
        ([group(attention_chunk_size=8)], (True,)),
        ([group(), sliding()], (True, False)),
        ([sliding(), sliding(), group()], (False, False, True)),
        ([sliding(), sliding(96), group()], (False, False, True)),
        ([group(), CHUNKS], (True, False)),
        ([sliding()], (False,)),
    ],
)
def test_full_attention_windows_and_chunks_are_stored(groups: list[Any], keeps: tuple[bool, ...]) -> None:
    found = Groups.of(groups)
    assert found.keeps == keeps
    assert found.keeps_all is (keeps == (True,))
    found.check_block(32)


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ([group(), group("MambaSpec")], "2 groups of KV layers"),
        ([group("MambaSpec")], "1 groups of KV layers"),
        ([group("CrossAttentionSpec")], "1 groups"),
        ([group("RSWASpec")], "1 groups"),
        ([group("SlidingWindowMLASpec", sliding_window=8)], "1 groups"),
        ([], "0 groups"),
        ([group(non_causal=True)], "attend to later tokens"),
        ([group(), sliding(non_causal=True)], "attend to later tokens"),
        ([group(), sliding(block_size=64)], "pages of different sizes"),
        ([group(), sliding(page_size_bytes=512)], "pages of different sizes"),
    ],
)
def test_groups_that_keep_other_than_a_prefixs_kv_or_other_pages_are_refused(groups: list[Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Groups.of(groups)


@pytest.mark.parametrize(
    ("groups", "block_tokens", "why"),
    [
        ([group(), sliding(48)], 64, "a window of 48 tokens, .* set a smaller block_tokens"),
        ([group(), sliding(96), sliding(48)], 64, "a window of 48 tokens"),
        ([group(), CHUNKS], 128, "chunks of 64 tokens, .* set a block_tokens that does"),
    ],
)
def test_blocks_of_which_the_beginning_would_be_gone_before_the_end_is_there_are_refused(
    groups: list[Any], block_tokens: int, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        Groups.of(groups).check_block(block_tokens)


# -- page tables -----------------------------------------------------------------------------------------------


def test_each_layer_has_the_pages_of_its_own_group() -> None:
    named = Groups.of([sliding(names=["c", "a"]), group(names=["b"])])
    groups = named.of_layers(["a", "b", "c"])
    pages, there = groups.pages(arrays_of([[0, 5], [3, 4]]), np.array([1, 0]), range(3), 9, may_lack=True)
    assert pages.tolist() == [[5, 4, 5], [0, 3, 0]]
    assert there is not None
    assert there.tolist() == [[True, True, True], [False, True, False]]
    pages, _ = groups.pages(arrays_of([[0, 5], [3, 4]]), np.array([1]), range(1, 3), 9, may_lack=False)
    assert pages.tolist() == [[4, 5]]


@pytest.mark.parametrize(
    ("tables", "may_lack", "why"),
    [
        ([[0, 5], [3, 4]], False, "not there any more"),
        ([[5], [3, 4]], False, "not there any more"),
        ([[2, 5], [3]], True, "entry 1 is outside a page table of 1"),
        ([[2, 5], [3, 9]], True, "outside the engine's 9 pages"),
        ([[3, 4]], True, "1 page tables where there are 2 groups"),
    ],
)
def test_a_page_that_is_not_there_is_not_read_and_lacks_only_where_its_group_lets_go(
    tables: list[list[int]], may_lack: bool, why: str
) -> None:
    groups = LayerGroups(np.array([0, 1]), (False, True))
    with pytest.raises(ValueError, match=why):
        groups.pages(arrays_of(tables), np.array([0, 1]), range(2), 9, may_lack=may_lack)
    pages, there = groups.pages(arrays_of([[2], [3, 4]]), np.array([0, 1]), range(2), 9, may_lack=True)
    assert chosen(pages, there).tolist() == [2, 3, 4], "a table that ends early lacks what follows"


def test_one_table_of_all_layers_is_looked_at_once() -> None:
    groups = LayerGroups.of_one(3)
    pages, there = groups.pages(arrays_of([[7, 5]]), np.array([1, 0, 1]), range(3), 9, may_lack=False)
    assert (pages.tolist(), there) == ([[5], [7], [5]], None)
    assert groups.pages(arrays_of([[]]), np.array([], np.int64), range(3), 9, may_lack=False)[0].tolist() == []


@pytest.mark.parametrize(("table", "entry", "why"), [([7, 5], 2, "entry 2 is outside"), ([7, 9], 1, "the engine's 9")])
def test_of_one_table_no_page_may_lack(table: list[int], entry: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        LayerGroups.of_one(3).pages(arrays_of([table]), np.array([0, entry]), range(3), 9, may_lack=True)


@pytest.mark.parametrize(
    ("tables", "first"),
    [
        ([[1, 2, 3, 4], [5, 6, 7, 8]], 5),
        ([[1, 2, 3, 4], [0, 6, 7, 8]], 5),  # below what is asked for
        ([[1, 2, 3, 4], [0, 0, 7, 8]], 8),
        ([[1, 2, 3, 4], [0, 6, 0, 8]], 12),
        ([[1, 2, 3, 4], [5, 6, 7]], 16),
    ],
)
def test_what_is_there_without_a_gap_begins_after_the_last_page_that_is_not(tables: Tables, first: int) -> None:
    assert kept_from(tables, 4, 5, 16) == first


# -- what is saved and loaded ----------------------------------------------------------------------------------


class Windowed(Bench):
    """An engine of two groups, the second of which lets go of pages as it is told."""

    gone = 0
    """Tokens before which the second group has no pages."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(keeps_all=False, **settings)

    def pages_for(self, request: FakeRequest) -> Tables:
        count = -(-request.num_tokens // PAGE)
        return [range(100, 100 + count), [0 if (at + 1) * PAGE <= self.gone else 200 + at for at in range(count)]]


def test_what_a_step_fills_is_saved_with_it_before_pages_of_it_can_be_let_go_of() -> None:
    bench = Windowed()
    request = FakeRequest("r", tokens(100), max_tokens=9)
    bench.side.arrived(request)
    assert [(one.start, one.stop) for one in bench.step((request, 70)).saves] == [(0, 70 // BLOCK)]
    bench.gone = 64
    assert [(one.start, one.stop) for one in bench.step((request, 30)).saves] == [(70 // BLOCK, 100 // BLOCK)]
    bench.side.ended(request, bench.pages_for(request))
    bench.close()


def test_blocks_whose_pages_are_not_all_there_are_not_saved() -> None:
    bench = Windowed()
    request = FakeRequest("r", tokens(100))
    bench.side.match(request, 64)
    bench.gone = 50  # within a block: what the engine's own cache had
    bench.side.allocated(request, bench.pages_for(request), 0)
    assert bench.store.announced == []  # nor is it said that they will be
    request.num_computed_tokens = 64
    orders = bench.step((request, 36))
    assert [(one.start, one.stop, one.known) for one in orders.saves] == [(-(-48 // BLOCK), 100 // BLOCK, 0)]
    assert bench.pages.read == []  # the store has nothing that they could hang from
    assert not bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


@pytest.mark.parametrize("end_at", [None, 3])
def test_a_load_runs_beside_the_steps_and_one_that_fails_leaves_the_request_nothing(end_at: int | None) -> None:
    bench = Windowed(sync_load_ms=1e9)
    bench.fill(tokens(100))
    bench.store.faults.end_load_at = end_at
    request = FakeRequest("r", tokens(100))
    assert bench.side.match(request, 0) == (96, True)
    bench.gone = 60
    bench.side.allocated(request, bench.pages_for(request), 96)
    assert eventually(lambda: bench.step() and bench.report() == {"r"})
    assert bench.worker.failed() == ({"r"} if end_at is not None else set())
    assert bench.worker.bad_pages() == set(), "vLLM ends where it is told of pages in an engine of several groups"
    bench.side.ended(request, bench.pages_for(request))
    bench.close()


def test_nothing_is_loaded_for_an_adapter() -> None:
    bench = Windowed()
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(100))
    request.lora_request = SimpleNamespace(lora_name="a", lora_int_id=1, lora_path="/nowhere", load_inplace=False)
    assert bench.side.match(request, 0) == (0, False)
    bench.side.ended(request, ())
    bench.close()


# -- pages that go from request to request ---------------------------------------------------------------------

NUM_PAGES, LONGEST, WINDOW = 40, 14, 3
"""Pages of the engine, of a request in a group, and those that the second group keeps."""
GROUPS = LayerGroups(np.arange(LAYERS) % 2, (True, False))


@dataclass(eq=False)
class Running:
    """A request. Its page `at` is to hold the number `100 * number + at`, in the layers of either group."""

    request: FakeRequest
    number: int
    tables: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))


class Engine:
    """As much of an engine as hands out pages of a pool to two groups, and takes back what the second leaves behind."""

    def __init__(self, seed: int, *, waits: bool = True) -> None:
        self.device = Device(seed, groups=GROUPS)
        if not waits:
            self.device.worker._saves.leave_all_pages = lambda: None  # type: ignore[method-assign]
        self.lot = random.Random(seed)
        self.free = list(range(1, NUM_PAGES))
        self.running: list[Running] = []
        self.all: list[Running] = []
        self.held: dict[str, Running] = {}

    def step(self) -> None:
        may = self.device.streams.may_finish
        (may.set if self.lot.random() < 0.2 else may.clear)()
        if len(self.running) < 2:
            number = len(self.all) + 1
            one = Running(FakeRequest(f"r{number}", [number] * LONGEST * PAGE), number)
            self.device.side.arrived(one.request)
            self.all.append(one)
            self.running.append(one)
        scheduled, wrote = [], []
        for one in self.running:
            self._let_go(one)
            first = len(one.tables[0])
            count = min(self.lot.randint(1, 5), LONGEST - first, len(self.free) // 2)
            for table in one.tables:
                table += [self.free.pop(self.lot.randrange(len(self.free))) for _ in range(count)]
            if count:
                scheduled.append((one.request, count * PAGE, (*map(tuple, one.tables),)))
                wrote.append((one, first, scheduled[-1][2]))
        orders = self.device.ordered(*scheduled)
        self.device.streams.run_engine(lambda: self._compute(wrote))
        self.device.worker.save(orders)
        self.device.streams.go_on(self.lot.randrange(12))
        self._report(idle=False)
        for one in list(self.running):
            if len(one.tables[0]) == LONGEST or self.lot.random() < 0.05:
                self._end(one)

    def _let_go(self, one: Running) -> None:
        """As vLLM does when it schedules the step after: whoever is next may have them in that step."""
        table = one.tables[1]
        for at in range(len(table) - WINDOW):
            if table[at]:
                self.free.append(table[at])
                table[at] = 0

    def _compute(self, wrote: Sequence[tuple[Running, int, Tables]]) -> None:
        for one, first, tables in wrote:
            for layer, tensor in enumerate(self.device.tensors):
                table = tables[GROUPS.number[layer]]
                for at in range(first, len(table)):
                    tensor[table[at]] = float(100 * one.number + at)

    def _give_back(self, one: Running) -> None:
        self.free += [page for table in one.tables for page in table if page]

    def _end(self, one: Running) -> None:
        self.running.remove(one)
        self._let_go(one)
        if self.device.side.ended(one.request, (*map(tuple, one.tables),)):
            self.held[one.request.request_id] = one
        else:
            self._give_back(one)

    def _report(self, *, idle: bool) -> None:
        for request_id in self.device.report(idle=idle)[0]:
            self._give_back(self.held.pop(request_id))

    def finish(self) -> None:
        self.device.streams.may_finish.set()
        for one in list(self.running):
            self._end(one)
        self.device.worker.save(self.device.orders())

        def is_done() -> bool:
            self._report(idle=True)
            return not (self.device.worker._saves.beside or self.held)

        assert eventually(is_done)
        self.device.streams.drain()

    def wrong(self) -> tuple[int, int]:
        """(blocks that are stored, blocks of those that hold another's numbers)."""
        num_blocks = num_wrong = 0
        for one in self.all:
            found = self.device.stored(LONGEST * PAGE, one.request.all_token_ids)
            for first in range(0, len(found), BLOCK // PAGE):
                ats = range(first, first + BLOCK // PAGE)
                num_wrong += [found[at] for at in ats] != [{float(100 * one.number + at)} for at in ats]
                num_blocks += 1
        return num_blocks, num_wrong


@pytest.mark.parametrize("seed", range(10))
def test_every_block_has_its_own_tokens_kv_whoever_got_the_pages_that_a_window_left_behind(seed: int) -> None:
    engine = Engine(seed)
    for _ in range(60):
        engine.step()
    engine.finish()
    num_blocks, num_wrong = engine.wrong()
    assert num_blocks > 20
    assert num_wrong == 0
    assert WAIT_FOR_A_SAVE in engine.device.streams.waits
    engine.device.close()


def test_if_steps_did_not_wait_for_saves_blocks_would_be_wrong() -> None:
    num_wrong = 0
    for seed in range(10):
        engine = Engine(seed, waits=False)
        for _ in range(60):
            engine.step()
        engine.finish()
        num_wrong += engine.wrong()[1]
        engine.device.close()
    assert num_wrong > 0
