# SPDX-License-Identifier: Apache-2.0
"""The vLLM connector without vLLM: the save boundary, plans, orders and reports, over a store in a dict."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from connectors import vllm_loads
from connectors.vllm_identity import directory_digest, media_of
from connectors.vllm_plan import (
    LoadReport,
    Orders,
    Report,
    Scheduled,
    Tables,
    VllmSettings,
    pages_of,
    storable_finished,
    storable_running,
)
from connectors.vllm_scheduler import SchedulerSide
from connectors.vllm_worker import WorkerSide
from kvstore.api import NO_HINT, Hint, Load, Match
from kvstore.block import Chain, ModelId, Root
from kvstore.errors import ConfigError
from tests.connectors.fakes import FakeLoad, FakeStore
from tests.fakes import FakeClock
from tests.waiting import eventually

BLOCK, PAGE = 16, 8
MODEL = ModelId(
    part_layers=1,  # two parts, of which a worker here holds the second
    model="tiny",
    revision="1",
    kv_dtype="bfloat16",
    num_layers=2,
    num_kv_heads=2,
    head_dim=16,
    block_tokens=BLOCK,
)


@dataclass
class FakeRequest:
    """What the connector looks at of an engine's request."""

    request_id: str
    all_token_ids: list[int]
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    max_tokens: int = 1
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: Sequence[Any] = ()
    prompt_embeds: Any = None
    prompt_is_token_ids: list[bool] | None = None
    kv_transfer_params: dict[str, object] | None = None
    skip_reading_prefix_cache: bool = False

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


@dataclass
class FakePages:
    """Pages that only note which blocks were copied."""

    parts: tuple[int, ...] = (1,)
    page_tokens: int = PAGE
    written: list[tuple[int, int]] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    together: list[bool] = field(default_factory=list)

    def gather(self, tables: Tables, blocks: Sequence[tuple[int, Any]]) -> None:
        for index, _ in blocks:
            assert len(tables[0]) * self.page_tokens >= (index + 1) * BLOCK
            self.read.append(index)

    def scatter(self, tables: Tables, blocks: Sequence[tuple[int, Any]], tokens: range, *, together: bool) -> None:
        self.together.append(together)
        for index, views in blocks:
            assert len(views) == len(self.parts)
            self.written.append((index, tokens.start))


class Bench:
    """Both sides over one store, driven as an engine drives them."""

    def __init__(
        self,
        store: FakeStore | None = None,
        *,
        model: ModelId = MODEL,
        num_ranks: int = 1,
        may_be_alone: bool = True,
        may_trail: bool = False,
        keeps_all: bool = True,
        **settings: Any,
    ) -> None:
        self.store = store or FakeStore()
        self.clock = FakeClock()
        made = VllmSettings.of({"block_tokens": model.block_tokens, "load_rule": "always", **settings})
        self.side = SchedulerSide(
            made,
            model,
            self.store,
            lambda load: load,
            page_tokens=PAGE,
            num_ranks=num_ranks,
            may_be_alone=may_be_alone,
            may_trail=may_trail,
            keeps_all=keeps_all,
            now_s=self.clock.now_s,
        )
        self.pages = FakePages()
        self.worker = WorkerSide(
            made,
            model,
            self.store,
            lambda load: cast(Load, load),
            self.pages,
            keeps_all=keeps_all,
            now_s=self.clock.now_s,
        )
        self.waits_for_sharing = True
        """Whether a step comes after loads begun before it are shared, which another thread does."""

    def pages_for(self, request: FakeRequest) -> Tables:
        return (range(100, 100 - -request.num_tokens // PAGE),)

    def step(self, *scheduled: tuple[FakeRequest, int]) -> Orders:
        """Schedule and run one step of (request, tokens)."""
        step = Scheduled(
            {request.request_id: count for request, count in scheduled},
            {request.request_id: request.num_computed_tokens for request, _ in scheduled},
            {request.request_id: self.pages_for(request) for request, _ in scheduled}.__getitem__,
        )
        if self.waits_for_sharing:
            for item in self.side._leases._sharing:
                item.lease.result(10)
        orders = self.side.orders(step)
        self.worker.load(orders)
        self.worker.save(orders)
        for request, count in scheduled:
            request.num_computed_tokens += count
        return orders

    def report(self) -> set[str]:
        """Let the worker report; returns the requests whose load ended beside the steps."""
        _, received = self.worker.finished(idle=True)
        news = self.worker.report()
        self.side.stepped()
        if news is not None:
            self.side.reported(news)
        return received

    def fill(self, tokens: list[int]) -> None:
        """Have the blocks of `tokens` stored."""
        request = FakeRequest("fill", tokens)
        self.side.arrived(request)
        self.step((request, len(tokens)))
        if self.side.ended(request, self.pages_for(request)):
            self.step()
        self.report()

    def use(self, salt: str | None, count: int = 40) -> None:
        """Have a request of `count` tokens come and go."""
        request = FakeRequest(f"r{salt}", tokens(count), cache_salt=salt)
        self.side.match(request, 0)
        self.side.allocated(request, self.pages_for(request), 0)
        self.step((request, count))
        if self.side.ended(request, self.pages_for(request)):
            self.step()
        self.report()

    def close(self) -> None:
        self.worker.close()
        assert self.side.check() == []
        assert self.store.check() == []


def tokens(count: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + at * 31) % 1000 for at in range(count)]


# -- the save boundary -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("computed", "scheduled", "known", "blocks"),
    [
        (0, 64, 100, 4),  # a chunk of a prompt
        (64, 36, 100, 6),
        (47, 1, 48, 3),  # the step that computes the last known token fills its block
        (44, 5, 45, 2),  # 44 computed, one token and four drafts: only one of the five is certain
        (44, 5, 47, 2),
        (44, 5, 60, 3),
    ],
)
def test_a_running_request_stores_no_drafts(computed: int, scheduled: int, known: int, blocks: int) -> None:
    assert storable_running(computed, scheduled, known, BLOCK) == blocks


@pytest.mark.parametrize(
    ("computed", "prompt", "known", "blocks"),
    [
        (47, 20, 48, 2),  # the last sampled token has no KV, whatever it completes
        (48, 20, 48, 2),  # a draft model computed its place
        (50, 20, 48, 2),  # and n-grams two more
        (49, 20, 49, 3),
        (30, 64, 64, 1),  # aborted in the middle of its prompt
        (64, 64, 64, 4),  # a prompt that was computed and not answered
        (64, 64, 65, 4),
    ],
)
def test_a_finished_request_stores_what_cannot_be_taken_back(
    computed: int, prompt: int, known: int, blocks: int
) -> None:
    assert storable_finished(computed, prompt, known, BLOCK) == blocks


def test_drafts_never_reach_a_worker() -> None:
    bench = Bench()
    request = FakeRequest("r", tokens(20), num_prompt_tokens=20)
    bench.side.arrived(request)
    bench.step((request, 20))
    request.all_token_ids += tokens(1, 1)
    orders = bench.step((request, 16))  # one token and fifteen drafts: all of block 1, were they certain
    assert orders.saves == ()
    request.num_computed_tokens = 36  # all drafts accepted, one more sampled
    request.all_token_ids += tokens(16, 2)
    assert bench.side.ended(request, bench.pages_for(request))
    held = bench.step()
    assert [(order.start, order.stop, order.holds) for order in held.saves] == [(1, 2, True)]
    assert bench.worker.finished(idle=True)[0] == {"r"}
    bench.report()
    bench.close()


# -- pages of a failed load ------------------------------------------------------------------------------------


def test_failed_pages_begin_with_the_page_of_the_first_missing_token() -> None:
    pages = (range(50, 60),)
    assert pages_of(pages, 32, 100, 256) == (53, 54, 55, 56, 57)
    assert pages_of(pages, 32, 96, 256) == (53, 54, 55, 56, 57)
    assert pages_of(pages, 128, 100, 256) == (50, 51)
    assert pages_of(pages, 32, 0, 1) == (50,)


# -- matching and loading --------------------------------------------------------------------------------------


def test_a_miss_allocates_nothing_and_leaves_nothing() -> None:
    bench = Bench()
    request = FakeRequest("r", tokens(100))
    assert bench.side.match(request, 0) == (0, False)
    bench.side.allocated(request, bench.pages_for(request), 0)
    assert bench.step((request, 100)).loads == ()
    # Asked once, let go of, and said to others; then what the step computed is saved.
    assert bench.store.calls == ["match", "match_partial", "forget", "announce", "save"]
    assert bench.report() == set()
    assert bench.worker.bad_pages() == set()
    assert bench.pages.written == []
    assert "loads" not in bench.side.figures.counts
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


@pytest.mark.parametrize("skips", [False, True])
def test_who_computes_without_having_asked_announces_it_all_the_same(skips: bool) -> None:
    bench = Bench(load=skips)  # a producer; or one that wants the logits of all its prompt
    request = FakeRequest("r", tokens(100), skip_reading_prefix_cache=skips)
    assert bench.side.match(request, 0) == (0, False)
    bench.side.allocated(request, bench.pages_for(request), 0)
    assert bench.store.announced == [(0, 6)]
    bench.step((request, 100))
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_who_does_not_save_announces_and_hashes_nothing_it_does_not_look_for() -> None:
    bench = Bench(save=False)
    request = FakeRequest("r", tokens(100), skip_reading_prefix_cache=True)
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 0)
    assert bench.side._tracked["r"].chain is None
    assert bench.store.calls == []
    bench.step((request, 100))
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_a_hit_in_the_host_is_copied_before_the_step() -> None:
    bench = Bench()
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120))
    assert bench.side.match(request, 0) == (96, False)
    bench.side.allocated(request, bench.pages_for(request), 96)
    request.num_computed_tokens = 96
    bench.step((request, 24))
    assert bench.pages.written == [(at, 0) for at in range(6)]
    assert bench.report() == set()
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_what_a_match_has_found_is_not_offered_again_and_what_follows_it_is_saved() -> None:
    bench = Bench()
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(130))
    assert bench.side.match(request, 0) == (96, False)
    bench.side.allocated(request, bench.pages_for(request), 96)
    request.num_computed_tokens = 96
    assert bench.step((request, 14)).saves == ()
    bench.report()
    (order,) = bench.step((request, 20)).saves
    assert (order.start, order.stop, order.known) == (6, 8, 0), "workers hear of the whole chain all the same"
    assert len(bench.store.blocks) == 8
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_what_a_failed_load_did_not_bring_is_saved_again() -> None:
    bench = Bench()
    bench.fill(tokens(100))
    bench.store.faults.end_load_at = 2
    request = FakeRequest("r", tokens(130))
    assert bench.side.match(request, 0) == (96, False)
    bench.side.allocated(request, bench.pages_for(request), 96)
    request.num_computed_tokens = 96
    assert bench.step((request, 14)).saves == ()
    bench.report()
    request.num_computed_tokens = 2 * BLOCK  # the engine goes back to the first page that is missing
    (order,) = bench.step((request, 98)).saves
    assert (order.start, order.stop) == (2, 8)
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_a_load_too_large_for_a_step_runs_beside_it_and_is_reported_once() -> None:
    bench = Bench(sync_load_ms=0)
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120))
    assert bench.side.match(request, 0) == (96, True)
    bench.side.allocated(request, bench.pages_for(request), 96)
    bench.step()
    assert eventually(lambda: bench.report() == {"r"})
    assert bench.report() == set()
    bench.side.allocated(request, bench.pages_for(request), 0)  # vLLM says it twice for a load beside the steps
    bench.side.ended(request, bench.pages_for(request))
    bench.step()
    assert bench.report() == set()
    assert bench.worker.bad_pages() == set()
    bench.close()


def test_nothing_below_the_engines_own_hit_is_written() -> None:
    bench = Bench()
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120))
    assert bench.side.match(request, 2 * BLOCK + PAGE) == (96 - 2 * BLOCK - PAGE, False)
    bench.side.allocated(request, bench.pages_for(request), 96 - 2 * BLOCK - PAGE)
    request.num_computed_tokens = 96
    bench.step((request, 24))
    assert bench.pages.written == [(at, 2 * BLOCK + PAGE) for at in range(2, 6)]
    bench.report()
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_an_unsettled_match_is_asked_again_until_the_deadline() -> None:
    class Slow(FakeStore):
        def match(self, *args: Any, **kwargs: Any) -> Match:
            found = super().match(*args, **kwargs)
            return Match(found.num_blocks, found.num_host_blocks, 0, False, found.tiers)

    bench = Bench(Slow(), match_deadline_ms=100)
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120))
    assert bench.side.match(request, 0) == (None, False)
    bench.clock.time_s += 0.05
    assert bench.side.match(request, 0) == (None, False)
    bench.clock.time_s += 0.06
    assert bench.side.match(request, 0) == (96, False)
    bench.side.ended(request, ())
    bench.close()


def test_a_match_waits_for_lower_tiers_only_while_its_request_is_the_only_one() -> None:
    bench = Bench(match_deadline_ms=100)
    first, second = FakeRequest("a", tokens(40)), FakeRequest("b", tokens(40, 1))
    bench.side.match(first, 0)
    bench.side.arrived(second)
    bench.side.match(second, 0)
    bench.side.ended(first, ())
    bench.side.match(second, 0)
    bench.side.ended(second, ())
    (alone, beside, alone_again) = bench.store.waits
    assert alone == alone_again
    assert 0 < (alone or 0) <= 0.01
    assert beside == 0
    assert all(bench.store.soon), "it comes back for the answer"
    bench.close()


def test_a_few_tokens_that_another_prompt_begins_with_by_chance_are_computed() -> None:
    bench = Bench(load_rule="measured", model=replace(MODEL, block_tokens=64))
    for number, (found, local, brings) in enumerate(((1, 0, 0), (15, 0, 0), (16, 0, 16), (40, 32, 0), (40, 16, 24))):
        bench.store.similar = found
        request = FakeRequest(f"r{number}", tokens(100, number))
        assert bench.side.match(request, local) == (brings, False)
        bench.side.ended(request, ())
    assert bench.store.calls.count("match_partial") == 5
    bench.store.calls.clear()
    for request, local in ((FakeRequest("short", tokens(16)), 0), (FakeRequest("most of it", tokens(100)), 48)):
        assert bench.side.match(request, local) == (0, False)
        assert "match_partial" not in bench.store.calls, "where not enough could be found, nobody is asked"
        bench.side.ended(request, ())
    bench.close()


def test_of_opaque_pages_the_beginning_of_anothers_block_is_not_asked_for() -> None:
    for layout, brings in (("canonical", 12), ("opaque:12ab", 0)):
        bench = Bench(model=replace(MODEL, layout=layout))
        bench.store.similar = 12
        request = FakeRequest("r", tokens(100))
        assert bench.side.match(request, 0) == (brings, False)
        assert ("match_partial" in bench.store.calls) is (layout == "canonical")
        bench.side.ended(request, ())
        bench.close()


def test_orders_that_are_refused_fail_their_loads_and_let_go_of_what_they_hold() -> None:
    bench = Bench()
    bench.fill(tokens(100))
    bench.pages.read.clear()
    one, other = FakeRequest("one", tokens(100)), FakeRequest("other", tokens(100, 1))
    bench.side.arrived(other)
    bench.step((other, 4))
    brings, _ = bench.side.match(one, 0)
    bench.side.allocated(one, bench.pages_for(one), brings)
    other.num_computed_tokens = 100
    assert bench.side.ended(other, (range(200, 213),))
    orders = bench.side.orders(Scheduled({}, {}, {}.__getitem__))
    assert len(orders.loads) == len(orders.saves) == 1
    bench.worker.load(orders.refused())
    bench.worker.save(orders.refused())
    assert bench.worker.bad_pages() == set(bench.pages_for(one)[0][: brings // PAGE])
    sent, _ = bench.worker.finished(idle=True)
    assert sent == {"other"}
    assert bench.pages.written == bench.pages.read == []
    bench.side.reported(cast(Report, bench.worker.report()))
    bench.side.ended(one, ())
    bench.close()


def saved_blocks(orders: Orders) -> list[tuple[str, int, int]]:
    return [(order.request, order.start, order.stop) for order in orders.saves]


def test_the_first_token_does_not_wait_for_the_save_of_its_prompt() -> None:
    bench = Bench()
    request = FakeRequest("r", tokens(100), max_tokens=16)
    bench.side.arrived(request)
    assert saved_blocks(bench.step((request, 64))) == []
    assert saved_blocks(bench.step((request, 36))) == [("r", 0, 4)], "what the step before has filled"
    request.all_token_ids.append(1)
    assert saved_blocks(bench.step((request, 1))) == [("r", 4, 6)]
    request.all_token_ids += [1] * 14
    request.num_computed_tokens += 10
    assert saved_blocks(bench.step((request, 1))) == [("r", 6, 7)], "no step is certain to follow: at once"
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_pages_that_a_request_has_lost_are_not_saved_though_it_had_filled_them() -> None:
    bench = Bench()
    request, other = (FakeRequest(name, tokens(64, seed), max_tokens=16) for seed, name in enumerate("ab"))
    for one in (request, other):
        bench.side.arrived(one)
    bench.step((request, 64))
    request.num_computed_tokens = 0  # preempted: its pages are the other's in this step
    assert saved_blocks(bench.step((other, 64))) == []
    assert saved_blocks(bench.step((other, 0), (request, 32))) == [("b", 0, 4)]
    assert saved_blocks(bench.step((request, 32))) == [("a", 0, 2)]
    for one in (request, other):
        one.all_token_ids.append(1)
        bench.side.ended(one, bench.pages_for(one))
    assert saved_blocks(bench.step()) == [("a", 2, 4)], "a request that ended keeps its pages for that"
    bench.report()
    bench.close()


def test_where_steps_trail_each_saves_what_it_fills() -> None:
    bench = Bench(may_trail=True)
    request = FakeRequest("r", tokens(64), max_tokens=16)
    bench.side.arrived(request)
    assert saved_blocks(bench.step((request, 64))) == [("r", 0, 4)]
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_after_a_worker_said_that_orders_are_not_for_its_pages_nothing_is_loaded_saved_or_announced(
    num_ranks: int,
) -> None:
    bench = Bench(num_ranks=num_ranks)
    bench.fill(tokens(100))
    running = FakeRequest("running", tokens(100, 1))
    bench.side.match(running, 0)
    bench.side.allocated(running, bench.pages_for(running), 0)
    assert bench.store.live_announcements == 1
    bench.worker.is_foreign()
    news = cast(Report, bench.worker.report())
    for _ in range(1, num_ranks):
        news = Report().joined(news).joined(Report())
    bench.side.reported(news)
    assert bench.worker.report() is None, "it is said once"
    assert bench.store.live_announcements == 0, "nobody waits for what does not come"
    bench.store.calls.clear()
    assert bench.step((running, 100)).saves == ()
    again = FakeRequest("again", tokens(100))
    assert bench.side.match(again, 0) == (0, False)
    bench.side.allocated(again, bench.pages_for(again), 0)
    assert bench.step((again, 100)) == Orders()
    for request in (running, again):
        assert not bench.side.ended(request, bench.pages_for(request))
    assert set(bench.store.calls) <= {"forget"}
    bench.close()


def test_who_steps_together_with_other_engines_never_waits_as_if_alone() -> None:
    bench = Bench(may_be_alone=False)
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    assert bench.store.waits == [0]
    bench.side.ended(request, ())
    bench.close()


def test_of_several_saves_that_failed_before_a_report_all_are_made_again() -> None:
    bench = Bench()
    request = FakeRequest("r", tokens(120), max_tokens=20)
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 0)
    bench.store.faults.failing = {"save"}
    for count in (40, 40, 20):
        bench.step((request, count))  # a device reports later than the next step
    bench.store.faults.failing = set()
    bench.clock.time_s += 10
    bench.report()
    (order,) = bench.step((request, 20)).saves
    assert order.start == 0
    bench.report()
    bench.side.ended(request, bench.pages_for(request))
    bench.step()
    assert len(bench.store.blocks) == 7
    bench.report()
    bench.close()


def test_blocks_below_a_load_that_brought_nothing_are_saved_again() -> None:
    bench = Bench()
    prompt = tokens(120)
    bench.fill(prompt)
    request = FakeRequest("r", prompt)
    local = 3 * BLOCK
    assert bench.side.match(request, local) == (4 * BLOCK, False)
    bench.store.faults.failing.add("load")
    bench.side.allocated(request, bench.pages_for(request), 4 * BLOCK)
    bench.step()
    bench.report()
    bench.store.faults.failing.clear()
    bench.clock.time_s += 60  # the store is asked again
    request.num_computed_tokens = local
    orders = bench.step((request, 120 - local))
    assert [(order.start, order.stop) for order in orders.saves] == [(0, 7)]
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_lower_tiers_are_neither_asked_nor_waited_for_where_computing_it_all_is_quicker() -> None:
    waits: list[object] = []

    class Slow(FakeStore):
        def match(self, *args: Any, **kwargs: Any) -> Match:
            waits.append(kwargs["wait_s"])
            found = super().match(*args, **kwargs)
            return Match(found.num_blocks, found.num_host_blocks, 0, kwargs["wait_s"] is None, found.tiers)

    bench = Bench(Slow(), load_rule="measured", match_deadline_ms=100)
    first, second, third = (FakeRequest(name, tokens(120)) for name in "abc")
    assert bench.side.match(first, 0) == (None, False)  # nothing is known of costs
    bench.side.cost.seen_prefill(120, 0, 0.05)
    bench.side.cost.seen_load("redis", 1000, 1.0)
    assert bench.side.match(second, 0) == (0, False)
    bench.side.cost.seen_load("redis", 1000, 1e-6)
    assert bench.side.match(third, 0) == (None, False)
    bench.clock.time_s += 0.06  # longer than computing would take
    assert bench.side.match(third, 0) == (0, False)
    assert [wait is None for wait in waits] == [False, True, False, False]
    for request in (first, second, third):
        bench.side.ended(request, ())
    bench.close()


def test_blocks_that_somebody_computes_are_waited_for_as_long_as_that_can_pay() -> None:
    bench = Bench()
    bench.fill(tokens(32))
    bench.store.num_pending = 4
    request = FakeRequest("r", tokens(120))
    bench.side.cost.seen_prefill(64, 32, 0.5)
    assert bench.side.match(request, 0) == (None, False)
    bench.clock.time_s += 0.4
    assert bench.side.match(request, 0) == (None, False)
    bench.clock.time_s += 0.3  # 0.5 s is what computing takes, and a quarter more is patience
    assert bench.side.match(request, 0) == (32, False)
    bench.side.ended(request, ())
    bench.close()


@pytest.mark.parametrize(("deadline_ms", "waits_s"), [(0, 0.0), (3000, 2.9)])
def test_pending_blocks_are_waited_for_no_longer_than_the_deadline(deadline_ms: int, waits_s: float) -> None:
    bench = Bench(pending_deadline_ms=deadline_ms)
    bench.store.num_pending = 4
    request = FakeRequest("r", tokens(120))
    bench.side.cost.seen_prefill(64, 32, 50.0)  # computing them takes longer than anybody should wait
    if waits_s:
        assert bench.side.match(request, 0) == (None, False)
        bench.clock.time_s += waits_s
        assert bench.side.match(request, 0) == (None, False)
        bench.clock.time_s += 0.2
    assert bench.side.match(request, 0) == (0, False)
    bench.side.ended(request, ())
    bench.close()


def test_who_sees_pending_blocks_arrive_waits_for_the_rest_anew() -> None:
    bench = Bench()
    bench.fill(tokens(32))
    bench.store.num_pending = 4
    request = FakeRequest("r", tokens(120))
    bench.side.cost.seen_prefill(64, 32, 0.5)
    assert bench.side.match(request, 0) == (None, False)
    bench.clock.time_s += 0.5
    bench.fill(tokens(64))
    bench.store.num_pending = 2
    assert bench.side.match(request, 0) == (None, False)
    bench.clock.time_s += 0.25
    assert bench.side.match(request, 0) == (None, False)  # 0.75 s in all, of the rest's 0.31 only 0.25
    bench.clock.time_s += 0.1
    assert bench.side.match(request, 0) == (64, False)
    bench.side.ended(request, ())
    bench.close()


def test_a_producer_that_gave_up_ends_the_wait() -> None:
    bench = Bench()
    bench.store.num_pending = 4
    request = FakeRequest("r", tokens(120))
    bench.side.cost.seen_prefill(64, 32, 0.5)
    assert bench.side.match(request, 0) == (None, False)
    bench.store.num_pending = 0
    bench.clock.time_s += 0.01
    assert bench.side.match(request, 0) == (0, False)
    bench.side.ended(request, ())
    bench.close()


def test_waiting_requests_ask_the_store_now_and_then_only() -> None:
    bench = Bench()
    bench.store.num_pending = 4
    request = FakeRequest("r", tokens(120))
    bench.side.cost.seen_prefill(64, 32, 0.5)
    for _ in range(5):
        assert bench.side.match(request, 0) == (None, False)
    assert bench.store.calls.count("match") == 1
    bench.clock.time_s += 0.01
    assert bench.side.match(request, 0) == (None, False)
    assert bench.store.calls.count("match") == 2
    bench.side.ended(request, ())
    bench.close()


def test_a_dead_store_is_a_miss_and_no_wait() -> None:
    bench = Bench()
    bench.store.faults.failing = {"all"}
    request = FakeRequest("r", tokens(100))
    assert bench.side.match(request, 0) == (0, False)
    bench.side.allocated(request, bench.pages_for(request), 0)
    bench.step((request, 100))
    assert not bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("fault", ["ends", "breaks", "lies", "no lease"])
def test_a_load_that_fails_is_reported_from_its_first_missing_token(fault: str, in_step: bool) -> None:
    bench = Bench(sync_load_ms=20 if in_step else 0)
    bench.fill(tokens(100))
    faults = bench.store.faults
    if fault == "ends":
        faults.end_load_at = 3
    elif fault == "breaks":
        faults.break_load_at = 3
    elif fault == "lies":
        faults.overwritten = True
    else:
        faults.failing = {"load"}
    request = FakeRequest("r", tokens(120))
    assert bench.side.match(request, 0) == (96, not in_step)
    bench.side.allocated(request, bench.pages_for(request), 96)
    bench.step(*([(request, 24)] if in_step else []))
    assert eventually(lambda: bench.report() == (set() if in_step else {"r"}))
    first = 3 * BLOCK if fault == "ends" else 0
    assert bench.worker.bad_pages() == set(range(100 + first // PAGE, 112))
    # What was not saved because of it will be, once it is computed; nothing is asked for a second time.
    request.num_computed_tokens = first
    faults.failing = set()
    bench.side.fail_open.backoff_s = bench.worker.fail_open.backoff_s = 0
    bench.clock.time_s += 10
    assert bench.side.match(request, 0) == (0, False)
    orders = bench.step((request, 120 - first))
    assert [(order.stop, order.known + len(order.tokens) // 4) for order in orders.saves] == [(7, 112)]
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    assert len(bench.store.blocks) == 7
    bench.close()


@pytest.mark.parametrize("chunks", [(160,), (64, 96)])
def test_nothing_is_saved_on_top_of_pages_that_did_not_load(chunks: tuple[int, ...]) -> None:
    bench = Bench()
    bench.fill(tokens(100))
    bench.store.faults.end_load_at = 0
    request = FakeRequest("r", tokens(160))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 96)
    request.num_computed_tokens = 96
    bench.step((request, 64))
    assert len(bench.store.blocks) == 6
    assert bench.report() == set()
    bench.side.ended(FakeRequest("other", []), ())
    request.num_computed_tokens = 0
    for count in chunks:
        bench.step((request, count))
    assert len(bench.store.blocks) == 10
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


class StuckLoad(FakeLoad):
    """A load whose first block comes when it is told to."""

    def __init__(self, inner: FakeLoad, go: threading.Event) -> None:
        self.__dict__.update(inner.__dict__)
        self._go = go

    def __iter__(self) -> Any:
        self._go.wait(10)
        yield from super().__iter__()


def test_a_load_past_its_deadline_is_given_up_and_writes_nothing_afterwards() -> None:
    go = threading.Event()

    class Stuck(FakeStore):
        def load(self, *args: Any, **kwargs: Any) -> FakeLoad:
            return StuckLoad(super().load(*args, **kwargs), go)

    bench = Bench(Stuck(), sync_load_ms=0, load_deadline_ms=500)
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 96)
    bench.step()
    assert bench.report() == set()
    bench.clock.time_s += 1
    assert bench.report() == {"r"}
    assert bench.worker.bad_pages() == set(range(100, 112))
    go.set()
    bench.side.ended(request, bench.pages_for(request))
    bench.close()  # waits for the copying thread
    assert bench.pages.written == []


def test_a_load_given_up_before_a_thread_was_free_for_it_is_not_begun() -> None:
    go = threading.Event()

    class Stuck(FakeStore):
        def load(self, *args: Any, **kwargs: Any) -> FakeLoad:
            return StuckLoad(super().load(*args, **kwargs), go)

    bench = Bench(Stuck(), sync_load_ms=0, load_deadline_ms=500, load_threads=1)
    bench.fill(tokens(100))
    adopted: list[object] = []
    adopt = bench.worker._loads._adopt
    bench.worker._loads._adopt = lambda shared: (adopted.append(shared), adopt(shared))[1]
    requests = [FakeRequest(name, tokens(120)) for name in ("first", "second")]
    for request in requests:
        bench.side.match(request, 0)
        bench.side.allocated(request, bench.pages_for(request), 96)
    bench.step()
    assert len(bench.worker._loads.beside) == 2
    assert eventually(lambda: len(adopted) == 1)  # the first has the thread
    bench.clock.time_s += 1
    assert bench.report() == {"first", "second"}
    go.set()
    bench.worker._loads._pool.submit(lambda: None).result(10)  # the thread is done with both
    assert len(adopted) == 1
    for request in requests:
        bench.side.ended(request, bench.pages_for(request))
    bench.close()


class WholeLoad(FakeLoad):
    """Blocks that are all there, and stay as they are."""

    is_whole = True

    def __iter__(self) -> Any:
        for block in super().__iter__():
            yield replace(block, views=[bytes(view) for view in block.views])


class WholeStore(FakeStore):
    def load(self, *args: Any, **kwargs: Any) -> FakeLoad:
        load = super().load(*args, **kwargs)
        return WholeLoad(self, load._chain, load._start, load._stop)


@pytest.fixture
def four_copiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_loads, "_COPIERS", 4)
    monkeypatch.setattr(vllm_loads, "_AT_ONCE", 1)


def loading(bench: Bench, num_tokens: int = 120) -> FakeRequest:
    bench.fill(tokens(num_tokens - 20))
    request = FakeRequest("r", tokens(num_tokens))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), (num_tokens - 20) // BLOCK * BLOCK)
    return request


@pytest.mark.parametrize("sync_load_ms", [0, 1000])
@pytest.mark.parametrize("end_at", [None, 4, 0])
@pytest.mark.usefixtures("four_copiers")
def test_blocks_that_are_all_there_are_copied_by_several_threads(sync_load_ms: float, end_at: int | None) -> None:
    bench = Bench(WholeStore(), sync_load_ms=sync_load_ms)
    bench.store.faults.end_load_at = end_at
    request = loading(bench)
    bench.step()
    assert eventually(lambda: bench.report() == (set() if sync_load_ms else {"r"}))
    num_blocks = 6 if end_at is None else end_at
    assert sorted(bench.pages.written) == [(index, 0) for index in range(num_blocks)]
    first_bad = 100 + num_blocks * BLOCK // PAGE
    assert bench.worker.bad_pages() == set(range(first_bad, 112))
    bench.side.ended(request, bench.pages_for(request))
    bench.close()


@pytest.mark.usefixtures("four_copiers")
def test_a_copy_that_fails_in_one_thread_makes_the_load_fail(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(WholeStore(), sync_load_ms=1000)
    request = loading(bench)

    def scatter(tables: Tables, blocks: Sequence[tuple[int, Any]], tokens: range, *, together: bool) -> None:
        if 5 in dict(blocks):
            raise RuntimeError("no such page")

    bench.pages.scatter = scatter  # type: ignore[method-assign]
    bench.step()
    bench.report()
    assert bench.worker.bad_pages() == set(range(100, 112)), "none of it counts"
    assert "no such page" in caplog.text
    bench.side.ended(request, bench.pages_for(request))
    bench.close()


@pytest.mark.usefixtures("four_copiers")
def test_what_counts_ends_where_the_first_thread_stopped() -> None:
    bench = Bench(WholeStore(), sync_load_ms=0, load_deadline_ms=500)
    request = loading(bench)

    def scatter(tables: Tables, blocks: Sequence[tuple[int, Any]], tokens: range, *, together: bool) -> None:
        ((index, _),) = blocks
        if index == 0:
            assert eventually(lambda: len(bench.pages.written) == 4)  # those of the other threads
            bench.clock.time_s += 1
        bench.pages.written.append((index, tokens.start))

    bench.pages.scatter = scatter  # type: ignore[method-assign]
    bench.step()
    job = bench.worker._loads.beside["r"]
    assert eventually(lambda: job.ended)
    assert bench.report() == {"r"}
    assert sorted(bench.pages.written) == [(index, 0) for index in (0, 2, 3, 4, 5)]
    assert bench.worker.bad_pages() == set(range(100 + BLOCK // PAGE, 112))
    bench.side.ended(request, bench.pages_for(request))
    bench.close()


def test_a_load_in_a_step_is_copied_by_the_engines_own_threads_and_one_beside_it_is_not() -> None:
    for sync_load_ms, together in ((1000.0, True), (0.0, False)):
        bench = Bench(WholeStore(), sync_load_ms=sync_load_ms)
        request = loading(bench)
        bench.step()
        assert eventually(lambda: bench.report() == (set() if together else {"r"}))  # noqa: B023
        assert sorted(bench.pages.written) == [(index, 0) for index in range(6)]
        assert set(bench.pages.together) == {together}
        bench.report()
        bench.side.ended(request, bench.pages_for(request))
        bench.close()


def test_a_load_in_a_step_that_is_late_ends_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_loads, "_AT_ONCE_IN_STEP", 4)
    bench = Bench(WholeStore(), sync_load_ms=1000, load_deadline_ms=500)
    request = loading(bench)

    def scatter(tables: Tables, blocks: Sequence[tuple[int, Any]], tokens: range, *, together: bool) -> None:
        bench.pages.written += [(index, tokens.start) for index, _ in blocks]
        bench.clock.time_s += 1

    bench.pages.scatter = scatter  # type: ignore[method-assign]
    bench.step()
    bench.report()
    assert bench.pages.written == [(index, 0) for index in range(4)]
    assert bench.worker.bad_pages() == set(range(100 + 4 * BLOCK // PAGE, 112))
    bench.side.ended(request, bench.pages_for(request))
    bench.close()


@pytest.mark.usefixtures("four_copiers")
def test_after_a_load_is_given_up_none_of_its_threads_writes() -> None:
    bench = Bench(WholeStore(), sync_load_ms=0, load_deadline_ms=500)
    request = loading(bench, 420)
    begun: list[int] = []
    go = threading.Event()

    def scatter(tables: Tables, blocks: Sequence[tuple[int, Any]], tokens: range, *, together: bool) -> None:
        ((index, _),) = blocks
        begun.append(index)
        go.wait(10)
        time.sleep(0.2 if index else 0)  # the first thread is done before the others
        bench.pages.written.append((index, tokens.start))

    bench.pages.scatter = scatter  # type: ignore[method-assign]
    bench.step()
    assert eventually(lambda: len(begun) == 4)
    bench.clock.time_s += 1
    threading.Timer(0.1, go.set).start()
    assert bench.report() == {"r"}
    assert len(bench.pages.written) == 4, "those under way were waited for"
    bench.side.ended(request, bench.pages_for(request))
    bench.close()
    assert len(bench.pages.written) == 4


# -- resets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, 10])
def test_a_reset_leaves_nothing_of_before_to_be_saved(count: int) -> None:
    bench = Bench()
    request = FakeRequest("r", tokens(count))
    bench.side.arrived(request)
    bench.step((request, count))
    assert len(bench.store.blocks) == count // BLOCK
    request.all_token_ids += tokens(20, 2)  # so that its end has something to save of its own
    request.num_computed_tokens = count + 19
    assert bench.side.ended(request, bench.pages_for(request))
    assert bench.side.clear()
    bench.step()
    assert len(bench.store.blocks) == 0
    assert bench.worker.finished(idle=True)[0] == {"r"}
    bench.report()
    bench.close()


def test_a_reset_empties_every_namespace_that_was_used_and_that_without_a_salt() -> None:
    bench = Bench()
    assert bench.side.clear()
    assert bench.store.cleared == [Root(MODEL).id], "what another engine with this model has stored, before any request"
    salts = ("a", "b")
    for salt in salts:
        bench.use(salt)
    bench.store.cleared.clear()
    assert bench.side.clear()
    assert set(bench.store.cleared) == {Root(MODEL, salt=salt).id for salt in (b"", b"a", b"b")}
    bench.close()


@pytest.mark.parametrize("salt", ["a", None])
def test_a_namespace_that_is_first_used_after_a_reset_is_emptied_before_and_once(salt: str | None) -> None:
    before = Bench()
    before.use(salt, 100)
    assert len(before.store.blocks) == 6
    bench = Bench(before.store)
    bench.use("other")
    assert bench.side.clear()
    request = FakeRequest("r", tokens(120), cache_salt=salt)
    assert bench.side.match(request, 0) == (0, False), "it may be of the weights before"
    assert eventually(lambda: (bench.step(), not bench.store.blocks)[1])
    bench.step((request, 120))
    assert eventually(lambda: (bench.step((request, 0)), len(bench.store.blocks) == 7)[1])
    assert bench.store.cleared.count(Root(MODEL, salt=(salt or "").encode()).id) == 1
    again = FakeRequest("again", tokens(120), cache_salt=salt)
    assert bench.side.match(again, 0)[0] == 112
    for each in (request, again):
        bench.side.ended(each, bench.pages_for(each))
    bench.close()


def test_a_reset_that_the_store_did_not_carry_out_is_owed_and_nothing_is_used_until_it_is() -> None:
    bench = Bench()
    bench.use("a", 100)
    bench.use("b", 100)
    bench.store.faults.failing = {"clear"}
    assert bench.side.clear() is False
    assert len(bench.store.blocks) == 12
    for salt in ("a", "b"):
        request = FakeRequest("r", tokens(120), cache_salt=salt)
        assert bench.side.match(request, 0) == (0, False)
        bench.side.allocated(request, bench.pages_for(request), 0)
        assert bench.store.live_announcements == 0, "nobody waits for what is not saved"
        bench.step((request, 120))
        assert not bench.side.ended(request, bench.pages_for(request))
        bench.step()
        assert len(bench.store.blocks) == 12
    for _ in range(2):  # beside the steps, and again
        bench.store.calls.clear()
        bench.clock.time_s += 2
        assert eventually(lambda: (bench.step(), "clear" in bench.store.calls)[1])
        assert eventually(lambda: (bench.step(), bench.side._resets._under_way is None)[1])
    bench.store.faults.failing = set()
    bench.clock.time_s += 2
    assert eventually(lambda: (bench.step(), not bench.store.blocks)[1])
    assert eventually(lambda: (bench.step(), not bench.side._resets._owed)[1])
    for salt in ("a", "b"):
        bench.use(salt, 100)
    assert len(bench.store.blocks) == 12
    request = FakeRequest("r", tokens(120), cache_salt="a")
    assert bench.side.match(request, 0) == (96, False)
    bench.side.ended(request, ())
    bench.close()


def test_two_resets_that_workers_hear_of_with_one_step_are_waited_for_once() -> None:
    bench = Bench(may_trail=True, num_ranks=1)
    assert bench.side.clear()
    assert bench.side.clear()
    bench.step()
    bench.report()
    assert eventually(lambda: (bench.step(), not bench.side._resets._owed)[1])
    bench.use(None, 100)
    assert len(bench.store.blocks) == 6
    bench.close()


def test_a_clear_that_began_before_a_reset_does_not_count_for_it() -> None:
    bench = Bench()
    bench.side.clear()
    began, go = threading.Event(), threading.Event()
    touch = bench.store.touch

    def slow(chain: Chain, num_blocks: int, hint: Hint = NO_HINT) -> None:
        began.set()
        assert go.wait(10)
        touch(chain, num_blocks, hint)

    bench.store.touch = slow  # type: ignore[method-assign]
    request = FakeRequest("r", tokens(100), cache_salt="late")
    bench.side.match(request, 0)
    assert began.wait(10)
    bench.store.touch = touch  # type: ignore[method-assign]
    bench.store.faults.failing = {"clear"}
    assert bench.side.clear() is False
    bench.store.faults.failing = set()
    go.set()
    root = Root(MODEL, salt=b"late")
    assert eventually(lambda: root.id in bench.store.cleared)
    assert not bench.side._resets.allows(root)
    bench.side.ended(request, ())
    bench.close()


def test_a_rank_that_another_one_saves_for_saves_nothing_and_keeps_no_pages() -> None:
    bench = Bench()
    bench.worker = WorkerSide(
        VllmSettings.of({"block_tokens": BLOCK}),
        MODEL,
        bench.store,
        lambda load: cast(Load, load),
        bench.pages,
        saves=False,
        now_s=bench.clock.now_s,
    )
    request = FakeRequest("r", tokens(100))
    bench.side.arrived(request)
    bench.step((request, 90))
    request.num_computed_tokens = 100
    assert bench.side.ended(request, bench.pages_for(request))
    bench.step()
    assert bench.worker.finished(idle=True)[0] == {"r"}
    assert len(bench.store.blocks) == 0
    assert bench.pages.read == []
    bench.report()
    bench.close()


def test_a_request_that_goes_on_after_a_reset_saves_nothing_until_it_is_computed_anew() -> None:
    bench = Bench()
    request = FakeRequest("r", tokens(100))
    assert bench.side.match(request, 0) == (0, False)
    bench.side.allocated(request, bench.pages_for(request), 0)
    bench.step((request, 40))
    assert len(bench.store.blocks) == 2
    assert bench.store.live_announcements == 1
    assert bench.side.clear()
    assert bench.store.live_announcements == 0, "nobody waits for what does not come"
    bench.step((request, 60))
    bench.report()
    assert len(bench.store.blocks) == 0
    request.num_computed_tokens = 0  # preempted
    assert bench.side.match(request, 0) == (0, False)
    bench.side.allocated(request, bench.pages_for(request), 0)
    bench.step((request, 20))
    bench.step((request, 80))
    bench.report()
    assert len(bench.store.blocks) == 6
    other = FakeRequest("other", tokens(120))
    assert bench.side.match(other, 0) == (96, False)
    for each in (request, other):
        bench.side.ended(each, bench.pages_for(each))
    bench.step()
    bench.close()


def test_the_end_of_a_request_that_began_before_a_reset_saves_nothing() -> None:
    bench = Bench()
    request = FakeRequest("r", tokens(60))
    bench.side.match(request, 0)
    bench.side.clear()
    assert bench.side.match(request, 0) == (0, False), "it had no KV yet: it is one of after"
    bench.step((request, 30))
    bench.side.clear()
    request.num_computed_tokens = 59
    assert not bench.side.ended(request, bench.pages_for(request))
    bench.step()
    bench.report()
    assert len(bench.store.blocks) == 0
    bench.close()


@pytest.mark.parametrize("ended", [False, True])
def test_a_load_under_way_at_a_reset_fails_though_it_had_all(ended: bool) -> None:
    go = threading.Event()
    bench = Bench(sync_load_ms=0)
    bench.fill(tokens(100))
    bench.store.when_asked = lambda: None if ended else go.wait(10)
    request = FakeRequest("r", tokens(120))
    assert bench.side.match(request, 0) == (96, True)
    bench.side.allocated(request, bench.pages_for(request), 96)
    assert bench.step().loads
    assert eventually(lambda: len(bench.pages.written) == 6)
    job = bench.worker._loads.beside["r"]
    assert not ended or eventually(lambda: job.ended)
    bench.side.clear()
    assert bench.step().reset
    go.set()
    assert eventually(lambda: bench.report() == {"r"})
    assert bench.worker.bad_pages() == set(range(100, 112))
    assert bench.side.match(request, 0) == (0, False)
    bench.side.ended(request, bench.pages_for(request))
    bench.step()
    bench.close()


def held_sharing(bench: Bench) -> threading.Event:
    """Loads are shared from when it is set on; no step waits for that."""
    bench.waits_for_sharing = False
    go, share = threading.Event(), bench.side._leases._share
    bench.side._leases._share = lambda load: share(load) if go.wait(10) else None
    return go


def test_a_load_that_was_not_shared_yet_at_a_reset_fails() -> None:
    bench = Bench(sync_load_ms=0)
    bench.fill(tokens(100))
    go = held_sharing(bench)
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 96)
    assert bench.step().loads == ()
    bench.side.clear()
    assert [order.lease for order in bench.step().loads] == [None]
    go.set()
    assert eventually(lambda: bench.report() == {"r"})
    assert bench.worker.bad_pages() == set(range(100, 112))
    bench.side.ended(request, bench.pages_for(request))
    bench.step()
    bench.close()


def test_what_a_step_saves_that_was_scheduled_before_a_reset_is_removed_when_it_has_run() -> None:
    bench = Bench(may_trail=True, num_ranks=2)
    request, later = FakeRequest("r", tokens(100)), FakeRequest("later", tokens(80, 1))
    bench.side.match(request, 0)
    before = bench.side.orders(Scheduled({"r": 100}, {"r": 0}, {"r": bench.pages_for(request)}.__getitem__))
    assert bench.side.clear()
    bench.worker.save(before)
    assert len(bench.store.blocks) == 6
    request.num_computed_tokens = 0
    for each in (request, later):
        assert bench.side.match(each, 0) == (0, False), "nothing is believed before the step has run"
    orders = bench.step((later, 40))
    assert orders.reset
    assert orders.saves == ()
    bench.report()
    assert len(bench.store.blocks) == 6, "one of two ranks has run it"
    bench.side.reported(Report(resets=1))
    assert eventually(lambda: (bench.step(), not bench.side._resets._owed)[1])
    assert len(bench.store.blocks) == 0
    bench.step((later, 40), (request, 100))
    bench.report()
    assert len(bench.store.blocks) == 11
    for each in (request, later):
        bench.side.ended(each, bench.pages_for(each))
    bench.step()
    bench.close()


def test_the_load_of_an_aborted_request_is_reported_by_its_deadline() -> None:
    go = threading.Event()

    class Stuck(FakeStore):
        def load(self, *args: Any, **kwargs: Any) -> FakeLoad:
            return StuckLoad(super().load(*args, **kwargs), go)

    bench = Bench(Stuck(), sync_load_ms=0, load_deadline_ms=500)
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 96)
    bench.step()
    bench.side.ended(request, bench.pages_for(request))
    bench.step()
    assert bench.report() == set()
    bench.clock.time_s += 0.5
    assert bench.report() == {"r"}
    assert bench.side.check() == []
    go.set()
    bench.close()
    assert bench.pages.written == []


def test_a_load_that_cannot_be_shared_in_time_is_reported_as_failed_without_waiting_for_it() -> None:
    bench = Bench(sync_load_ms=0, load_deadline_ms=500)
    bench.fill(tokens(100))
    go = held_sharing(bench)
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    began_s = time.monotonic()
    bench.side.allocated(request, bench.pages_for(request), 96)  # the scheduler's thread
    assert bench.step().loads == ()
    assert time.monotonic() - began_s < 5
    bench.clock.time_s += 0.5
    assert [order.lease for order in bench.step().loads] == [None]
    assert eventually(lambda: bench.report() == {"r"})
    assert bench.worker.bad_pages() == set(range(100, 112))
    go.set()
    bench.side.ended(request, bench.pages_for(request))
    bench.side.close()
    bench.close()


def test_a_load_that_took_most_of_its_time_to_be_shared_has_only_the_rest_of_it() -> None:
    bench = Bench(sync_load_ms=0, load_deadline_ms=1000)
    bench.fill(tokens(100))
    go = held_sharing(bench)
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 96)
    (item,) = bench.side._leases._sharing
    bench.clock.time_s += 0.8 * item.order.timeout_s
    go.set()
    assert item.lease.result(10) is not None
    (order,) = bench.step().loads
    assert order.timeout_s == pytest.approx(0.2 * item.order.timeout_s)
    assert eventually(lambda: bench.report() == {"r"})
    bench.side.ended(request, bench.pages_for(request))
    bench.side.close()
    bench.close()


def test_only_what_lies_in_the_host_is_loaded_before_the_step() -> None:
    class HalfBelow(FakeStore):
        def match(self, *args: Any, **kwargs: Any) -> Match:
            found = super().match(*args, **kwargs)
            half = found.num_blocks // 2
            return Match(found.num_blocks, half, 0, True, (("host", half), ("redis", found.num_blocks - half)))

    bench = Bench(HalfBelow(), sync_load_ms=1000)
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120))
    assert bench.side.match(request, 0) == (96, True)
    bench.side.ended(request, ())
    bench.close()


def test_an_aborted_request_keeps_its_pages_until_its_load_is_reported() -> None:
    go = threading.Event()

    class Stuck(FakeStore):
        def load(self, *args: Any, **kwargs: Any) -> FakeLoad:
            return StuckLoad(super().load(*args, **kwargs), go)

    bench = Bench(Stuck(), sync_load_ms=0)
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 96)
    bench.step()
    assert not bench.side.ended(request, bench.pages_for(request))  # vLLM itself keeps pages of a pending load
    assert bench.side.check() == ["the load of r was not reported"]
    go.set()
    assert eventually(lambda: bench.report() == {"r"})
    bench.close()


def test_a_lease_is_released_when_the_last_rank_has_reported() -> None:
    bench = Bench(num_ranks=2)
    bench.fill(tokens(100))
    bench.report()
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 96)
    bench.side.reported(Report({"r": LoadReport(6)}))
    assert "the load of r was not reported" in bench.side.check()
    bench.side.reported(Report({"r": LoadReport(4)}))
    bench.side.ended(request, bench.pages_for(request))
    assert bench.side.figures.counts["failed_loads"] == 1
    bench.close()


def test_the_store_is_told_what_a_load_saved() -> None:
    bench = Bench()
    bench.fill(tokens(100))
    bench.report()
    bench.side.cost.seen_prefill(64, 0, 2.0)
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 96)
    bench.side.reported(Report({"r": LoadReport(6, 1, {"host": 0.25}, {"host": 10})}))
    predicted = bench.side.cost.prefill_s(6 * BLOCK, 0)
    assert predicted is not None
    assert bench.store.saved_s == pytest.approx(predicted - 0.25)
    assert bench.store.saved_s > 1
    bench.side.ended(request, bench.pages_for(request))
    bench.close()


def test_reports_of_ranks_join_to_what_all_of_them_have() -> None:
    one = Report({"r": LoadReport(6, 1, {"host": 1.0}, {"host": 10})}, {"s": 4}, {"saved_blocks": 2})
    two = Report({"r": LoadReport(5, 1, {"host": 2.0}, {"host": 10})}, {"s": 3, "t": 1}, {"saved_blocks": 1})
    done = one.joined(two)
    assert done.loads["r"] == LoadReport(5, 2, {"host": 2.0}, {"host": 20})
    assert done.unsaved == {"s": 3, "t": 1}
    assert done.counts == {"saved_blocks": 3}


def test_a_preempted_request_matches_its_own_answer_too() -> None:
    bench = Bench()
    request = FakeRequest("r", tokens(60))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 0)
    bench.step((request, 60))
    request.all_token_ids += tokens(40, 1)
    request.num_computed_tokens = 60
    bench.step((request, 40))
    request.num_computed_tokens = 0
    assert bench.side.match(request, 0) == (96, False)
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


# -- identity of a request -------------------------------------------------------------------------------------


def test_a_salt_is_a_namespace_of_its_own() -> None:
    bench = Bench()
    bench.fill(tokens(100))
    for salt, hit in ((None, 96), ("a", 0), ("", 96)):
        request = FakeRequest(f"r{salt}", tokens(120), cache_salt=salt)
        assert bench.side.match(request, 0) == (hit, False)
        bench.side.ended(request, ())
    bench.close()


def test_a_secret_keys_the_blocks_of_both_sides_alike() -> None:
    store = FakeStore()
    for secret, hit in (("one", 0), ("one", 96), ("two", 0), ("", 0), ("one", 96)):
        bench = Bench(store, secret=secret)
        request = FakeRequest("r", tokens(120))
        assert bench.side.match(request, 0) == (hit, False)
        bench.side.ended(request, ())
        bench.fill(tokens(100))
        bench.close()


def test_weights_are_known_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    first = directory_digest(tmp_path)
    assert directory_digest(tmp_path) == first
    file.write_bytes(b"two")
    assert directory_digest(tmp_path) != first
    with pytest.raises(ConfigError, match="no weight files"):
        directory_digest(tmp_path / "cache")


def test_an_image_is_part_of_what_a_block_is() -> None:
    bench = Bench()

    def ask(name: str, image: str, offset: int) -> int | None:
        feature = SimpleNamespace(identifier=image, mm_position=SimpleNamespace(offset=offset, length=4))
        request = FakeRequest(name, tokens(100), mm_features=[feature])
        bench.side.match(request, 0)
        found, _ = bench.side.match(request, 0)
        request.num_computed_tokens = 0
        bench.step((request, 100))
        bench.side.ended(request, bench.pages_for(request))
        bench.report()
        return found

    assert [ask("a", "cat", 40), ask("b", "cat", 40), ask("c", "dog", 40), ask("d", "cat", 41)] == [0, 96, 32, 32]
    bench.close()


def test_embeddings_stand_for_tokens_they_have_none_of() -> None:
    torch = pytest.importorskip("torch")
    requests = [
        FakeRequest(name, [0] * 40, prompt_embeds=torch.full((40, 4), value))
        for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0))
    ]
    digests = [media_of(request) for request in requests]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0][0][0] == 0
    assert len(digests[0][0][1]) == hashlib.sha256().digest_size


def test_prompts_of_embeddings_share_blocks_only_where_they_are_equal() -> None:
    torch = pytest.importorskip("torch")
    bench = Bench()

    def ask(name: str, value: float, is_token: list[bool] | None = None) -> int | None:
        embeds = torch.full((100, 4), value)
        request = FakeRequest(name, [0] * 100, prompt_embeds=embeds, prompt_is_token_ids=is_token)
        found, _ = bench.side.match(request, 0)
        bench.step((request, 100))
        bench.side.ended(request, bench.pages_for(request))
        bench.report()
        return found

    assert [ask("a", 1.0), ask("b", 1.0), ask("c", 2.0), ask("d", 2.0)] == [0, 96, 0, 96]
    # Which places are tokens is not in the ids: those of embeddings are 0, as a token may be.
    first, other = [True, *[False] * 99], [False, True, *[False] * 98]
    assert [ask("e", 2.0, first), ask("f", 2.0, first), ask("g", 2.0, other)] == [0, 96, 0]
    bench.close()


def test_a_request_that_must_not_read_gets_nothing() -> None:
    bench = Bench()
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120), skip_reading_prefix_cache=True)
    assert bench.side.match(request, 0) == (0, False)
    bench.side.ended(request, ())
    bench.close()


# -- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"adress": "x"}, "has 'adress': known are address"),
        ({"block_tokens": "64"}, "block_tokens is '64': give a int"),
        ({"save": 1}, "save is 1"),
        ({"load_rule": "never"}, "use one of measured, always"),
        ({"layout": "packed"}, "use one of auto, canonical, opaque"),
        ({"load_threads": 0}, "load_threads is 0"),
        ({"save_share": 0.0}, "save_share is 0.0"),
        ({"save_share": 1.5}, "save_share is 1.5"),
        ({"address": "unix:/x", "store": {"host": {}}}, "both given"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(extra: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VllmSettings.of(extra)


def test_what_a_request_says_to_eviction_goes_with_its_match_and_its_save() -> None:
    bench = Bench()
    said = {"kvstore": {"conversation": "chat-17", "priority": 90, "closed": True}}
    request = FakeRequest("a", [7] * 40, kv_transfer_params=said)
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 0)
    orders = bench.step((request, 40))
    assert [order.hint for order in orders.saves] == [
        Hint(conversation="chat-17", priority=90, closed=True, prompt_tokens=40)
    ]
    assert bench.store.hints == [orders.saves[0].hint] * 2


def test_media_that_a_streaming_session_gets_later_are_part_of_its_blocks_names() -> None:
    bench = Bench()

    def session(name: str, image: str) -> int | None:
        request = FakeRequest(name, tokens(40))
        bench.side.match(request, 0)
        bench.side.allocated(request, bench.pages_for(request), 0)
        bench.step((request, 40))
        feature = SimpleNamespace(mm_position=SimpleNamespace(offset=40), identifier=image)
        request.all_token_ids += tokens(60, 1)  # the placeholders of any image are the same
        request.mm_features = (feature,)
        request.num_prompt_tokens = 100
        bench.step((request, 60))
        bench.side.ended(request, bench.pages_for(request))
        bench.report()
        again = FakeRequest(f"{name} at once", request.all_token_ids, mm_features=(feature,))
        found, _ = bench.side.match(again, 0)
        bench.side.ended(again, ())
        return found

    assert session("a", "red") == 96
    num_blocks = len(bench.store.blocks)
    assert session("b", "blue") == 96
    assert len(bench.store.blocks) == num_blocks + 4, "what comes before the image is shared, and nothing else"
    bench.close()


# -- loads under way -------------------------------------------------------------------------------------------


def hit_in_the_step(bench: Bench, num_tokens: int) -> FakeRequest:
    """A request whose first six blocks are to be loaded in its first step, which is scheduled next."""
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(num_tokens))
    assert bench.side.match(request, 0) == (96, False)
    bench.side.allocated(request, bench.pages_for(request), 96)
    request.num_computed_tokens = 96
    return request


def test_nothing_is_saved_on_top_of_a_load_that_is_not_reported_yet() -> None:
    """Another rank's may have failed, or this one's in a step that was still running when the next was scheduled."""
    bench = Bench(may_trail=True)
    request = hit_in_the_step(bench, 120)
    bench.store.faults.overwritten = True
    assert bench.step((request, 15)).saves == ()
    assert bench.step((request, 1)).saves == ()  # scheduled before the first has reported; it fills a block
    bench.store.faults.overwritten = False
    assert len(bench.store.blocks) == 6
    bench.report()
    request.num_computed_tokens = 0  # the engine computes all of it
    bench.step((request, 120))
    assert len(bench.store.blocks) == 7
    bench.report()
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_what_follows_a_load_is_saved_once_every_rank_has_reported_it() -> None:
    bench = Bench(may_trail=True, num_ranks=2)
    request = hit_in_the_step(bench, 130)
    assert bench.step((request, 20)).saves == ()
    bench.report()
    assert bench.step((request, 1)).saves == ()
    bench.side.reported(Report(loads={"r": LoadReport(6)}))
    (order,) = bench.step((request, 1)).saves
    assert (order.start, order.stop) == (6, 7)
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_nothing_is_saved_on_top_of_anothers_load_whose_pages_it_shares() -> None:
    """The engine's own prefix cache has them as soon as they are to be loaded."""
    bench = Bench(may_trail=True)
    request = hit_in_the_step(bench, 120)
    shares, other = (FakeRequest(name, tokens(120, seed)) for name, seed in (("shares", 0), ("other", 1)))
    tables = {"r": range(100, 115), "shares": range(100, 115), "other": range(200, 215)}
    bench.pages_for = lambda request: (tables[request.request_id],)  # type: ignore[method-assign]
    assert bench.side.match(shares, 96) == (0, False)
    bench.side.match(other, 0)
    for each in (shares, other):
        bench.side.allocated(each, bench.pages_for(each), 0)
    shares.num_computed_tokens = 96
    orders = bench.step((request, 24), (shares, 24), (other, 120))
    assert [order.request for order in orders.saves] == ["other"]
    assert bench.side.ended(shares, bench.pages_for(shares)), "in the same step: its pages stay until that is known"
    bench.report()
    orders = bench.step((request, 1))
    assert [(order.request, order.holds) for order in orders.saves] == [("shares", True), ("r", False)]
    for each in (request, other):
        bench.side.ended(each, bench.pages_for(each))
    bench.step()
    bench.report()
    bench.close()


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_request_that_ends_with_its_first_step_computed_is_saved_if_its_load_was_sound(fails: bool) -> None:
    bench = Bench()
    request = hit_in_the_step(bench, 120)
    bench.store.faults.overwritten = fails
    assert bench.step((request, 24)).saves == ()
    assert bench.side.ended(request, bench.pages_for(request)), "the engine says so before it hands on the report"
    assert bench.side.check() != []
    bench.report()
    (order,) = bench.step().saves
    assert order.holds
    assert len(bench.store.blocks) == 6 + (not fails)
    assert bench.worker.finished(idle=True)[0] == {"r"}
    bench.report()
    bench.close()


def test_a_reset_leaves_nothing_to_save_of_a_request_that_ended_before_its_load_was_reported() -> None:
    bench = Bench()
    request = hit_in_the_step(bench, 120)
    bench.step((request, 24))
    assert bench.side.ended(request, bench.pages_for(request))
    bench.side.clear()
    bench.report()
    bench.step()
    assert bench.store.blocks == {}
    assert bench.worker.finished(idle=True)[0] == {"r"}
    bench.report()
    bench.close()


@pytest.mark.parametrize("beside", [False, True])
def test_pages_of_a_load_that_the_store_did_not_give_are_not_saved_where_the_request_is_aborted(beside: bool) -> None:
    bench = Bench(FakeStore(tier="redis") if beside else None)
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    bench.store.faults.failing = {"load"}
    bench.side.allocated(request, bench.pages_for(request), 96)
    bench.store.faults.failing = set()
    bench.clock.time_s += 10
    request.num_computed_tokens = 96
    bench.step(*() if beside else ((request, 24),))
    request.num_computed_tokens = 96 if beside else 120  # as the engine takes it to be, until it hears
    assert bench.side.ended(request, bench.pages_for(request)) is not beside
    bench.step()
    assert eventually(lambda: (bench.report(), not bench.side.check())[1])
    bench.step()
    assert len(bench.store.blocks) == 6
    bench.close()


@pytest.mark.parametrize("has_run", [False, True])
def test_what_another_connector_may_still_be_loading_is_not_saved_where_the_request_is_aborted(has_run: bool) -> None:
    bench = Bench()
    request = FakeRequest("r", tokens(120))
    assert bench.side.match(request, 0) == (0, False)
    bench.side.allocated(request, bench.pages_for(request), 0)
    request.num_computed_tokens = 96  # counted from the moment that the other's load is begun
    if has_run:
        bench.step((request, 8))
    assert bench.side.ended(request, bench.pages_for(request)) is False
    bench.step()
    assert len(bench.store.blocks) == (6 if has_run else 0)
    bench.close()


class Closing(FakeStore):
    """Its loads note that they were closed, and may take their time over it."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = threading.Event()
        self.may_close = threading.Event()
        self.may_close.set()

    def load(self, *args: Any, **kwargs: Any) -> FakeLoad:
        load = super().load(*args, **kwargs)
        let_go = load.close

        def close() -> None:
            assert self.may_close.wait(10)
            let_go()
            self.closed.set()

        load.close = close  # type: ignore[method-assign]
        return load


def test_a_lease_is_let_go_of_though_the_store_rests() -> None:
    store = Closing()
    bench = Bench(store)
    request = hit_in_the_step(bench, 120)
    bench.step((request, 24))
    store.closed.clear()  # the worker, which shares it here, has left it
    bench.side.fail_open.call(lambda: 1 // 0, None)
    assert bench.side.fail_open.resting
    bench.report()
    assert store.closed.is_set()
    bench.clock.time_s += 10
    bench.side.ended(request, bench.pages_for(request))
    bench.report()
    bench.close()


def test_the_scheduler_does_not_wait_for_a_tier_that_still_reads_for_a_load_given_up() -> None:
    store = Closing()
    bench = Bench(store, sync_load_ms=0)
    bench.fill(tokens(100))
    request = FakeRequest("r", tokens(120))
    bench.side.match(request, 0)
    bench.side.allocated(request, bench.pages_for(request), 96)
    store.may_close.clear()
    bench.side.reported(Report(loads={"r": LoadReport(2)}))
    assert not store.closed.is_set()
    assert bench.side.check() == ["request r is tracked"]
    store.may_close.set()
    assert store.closed.wait(10)
    bench.side.ended(request, bench.pages_for(request))
    bench.step()
    bench.report()
    bench.close()
