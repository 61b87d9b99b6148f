# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker on a device made of queues: everything runs as late, and in as odd an order, as the waits allow."""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("torch", reason="the worker copies torch tensors")

import torch

from connectors.vllm_device import goes_by_layers
from connectors.vllm_groups import LayerGroups
from connectors.vllm_pages import StridedPages
from connectors.vllm_plan import NO_ORDERS, Orders, Scheduled, Tables, VllmSettings
from connectors.vllm_scheduler import SchedulerSide
from connectors.vllm_worker import WorkerSide
from kvstore.api import Load, LoadedRun, Register
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.copy_windows import address_of
from kvstore.layout import layout_of
from kvstore.pinning import PINNED, pin
from kvstore.store import KVStore
from kvstore.transfer import LinkShare, to_tensor
from tests.connectors.test_vllm_plan import FakeRequest, tokens
from tests.fakes import FakeClock
from tests.lazy_streams import LazyStreams
from tests.test_pinning import FakeCuda
from tests.waiting import eventually

BLOCK, PAGE, LAYERS, HEADS, DIM = 16, 8, 4, 2, 8
MODEL = ModelId(
    model="tiny",
    revision="1",
    kv_dtype="float32",
    num_layers=LAYERS,
    num_kv_heads=HEADS,
    head_dim=DIM,
    block_tokens=BLOCK,
    part_layers=2,
)
SEEDS = pytest.mark.parametrize("seed", range(10))
Pages = Sequence[int]


class Watched:
    """A load that asks, when it is asked whether it is intact and when it is let go of, whether copies still run."""

    def __init__(self, load: Load, streams: LazyStreams, intact: bool) -> None:
        self._load, self._streams, self._intact = load, streams, intact
        self.is_left = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load, name)

    @property
    def is_whole(self) -> bool:
        return cast(Any, self._load).is_whole  # type: ignore[no-any-return]

    def run(self) -> LoadedRun | None:
        return cast(Any, self._load).run()  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._load)

    def _all_is_copied(self) -> bool:
        return not any(self._streams.side(f"load {what}").queue for what in ("copies", "kernels"))

    def intact(self) -> bool:
        assert self._all_is_copied()
        return self._load.intact() and self._intact

    def __enter__(self) -> Watched:
        self._load.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._all_is_copied()
        self._load.__exit__(*error)
        self.is_left = True


class Device:
    """Both sides, driven as vLLM drives them, over a real store."""

    def __init__(
        self,
        seed: int,
        *,
        intact: bool = True,
        register: Register | None = None,
        kind: type[StridedPages] = StridedPages,
        groups: LayerGroups | None = None,
        **settings: Any,
    ) -> None:
        self.streams = LazyStreams(seed)
        self.clock = FakeClock()
        self.store = KVStore(StoreConfig.load({"host": {"capacity_bytes": 64 << 20}}, environ={}))
        self.tensors = [torch.zeros(64, HEADS, PAGE, 2 * DIM) for _ in range(LAYERS)]
        made = VllmSettings.of({"block_tokens": BLOCK, "load_rule": "always", "step_layers": 1, **settings})
        self.side = SchedulerSide(
            made,
            MODEL,
            self.store,
            lambda load: load,
            page_tokens=PAGE,
            may_trail=True,
            keeps_all=groups is None,
            now_s=self.clock.now_s,
        )
        pages = kind(layout_of(MODEL), self.tensors, range(LAYERS), range(HEADS), groups=groups, streams=self.streams)
        self.adopted: list[Watched] = []

        def adopt(shared: object) -> Load:
            self.adopted.append(Watched(cast(Load, shared), self.streams, intact))
            return cast(Load, self.adopted[-1])

        self.worker = WorkerSide(
            made,
            MODEL,
            self.store,
            adopt,
            pages,
            layers=range(LAYERS),
            keeps_all=groups is None,
            register=register,
            now_s=self.clock.now_s,
        )
        self.read: dict[int, list[set[float]]] = {}

    def fill(self, pages: Pages, value: float) -> None:
        for tensor in self.tensors:
            for number, page in enumerate(pages):
                tensor[page] = value + 10 * number

    def look(self, layer: int, pages: Pages) -> None:
        self.read[layer] = [set(self.tensors[layer][page].unique().tolist()) for page in pages]

    def orders(self, *scheduled: tuple[FakeRequest, int, Pages], preempted: Sequence[str] = ()) -> Orders:
        """Of the step that begins: what it may write to is left to it."""
        return self.ordered(*((one, count, (list(pages),)) for one, count, pages in scheduled), preempted=preempted)

    def ordered(self, *scheduled: tuple[FakeRequest, int, Tables], preempted: Sequence[str] = ()) -> Orders:
        """`orders`, of several groups."""
        made = self.side.orders(
            Scheduled(
                {one.request_id: count for one, count, _ in scheduled},
                {one.request_id: one.num_computed_tokens for one, _, _ in scheduled},
                {one.request_id: tables for one, _, tables in scheduled}.__getitem__,
                preempted,
            )
        )
        self.worker.leave_pages(made)
        for one, count, _ in scheduled:
            one.num_computed_tokens += count
        return made

    def report(self, *, idle: bool = False) -> tuple[set[str], set[str]]:
        done = self.worker.finished(idle=idle)
        news = self.worker.report()
        self.side.stepped()
        if news is not None:
            self.side.reported(news)
        return done

    def store_blocks(self, num_tokens: int, value: float) -> None:
        """Have a request compute `value`, `value` + 10, … in its pages, and save them."""
        request, pages = FakeRequest("fill", tokens(num_tokens)), range(num_tokens // PAGE)
        self.side.arrived(request)
        orders = self.orders((request, num_tokens, pages))
        self.streams.run_engine(lambda: self.fill(pages, value))
        self.worker.save(orders)
        self.side.ended(request, (pages,))
        assert eventually(lambda: not (self.report(), self.worker._saves.beside)[1])

    def matched(self, num_tokens: int, pages: Pages) -> tuple[FakeRequest, Orders]:
        """The step of a request for which all but the last block are there."""
        request = FakeRequest("r", tokens(num_tokens))
        found, beside = self.side.match(request, 0)
        assert found
        self.side.allocated(request, (pages,), found)
        if beside:
            made: list[Orders] = []

            def loads() -> bool:
                made.append(self.orders())
                return bool(made[-1].loads)

            assert eventually(loads)  # shared on another thread: a step that comes too soon for it orders nothing
            return request, made[-1]
        request.num_computed_tokens = found
        return request, self.orders((request, num_tokens - found, pages))

    def stored(self, num_tokens: int, ids: Sequence[int] | None = None) -> list[set[float]]:
        """Values of each page's worth of tokens, as the store has them."""
        request = FakeRequest("look", [*(tokens(num_tokens) if ids is None else ids), 1])
        found, _ = self.side.match(request, 0)
        values: list[set[float]] = []
        if found:
            layout = layout_of(MODEL)
            with self.store.load(self.side._tracked["look"].key) as load:
                for block in load:
                    parts = [to_tensor(v, p, torch.float32) for p, v in zip(layout.parts, block.views, strict=True)]
                    for at in range(0, BLOCK, PAGE):
                        values.append({x for part in parts for x in part[:, :, at : at + PAGE].unique().tolist()})
        self.side.ended(request, ())
        return values

    def close(self) -> None:
        self.streams.may_finish.set()
        self.worker.close()
        self.report()
        assert self.side.check() == []
        self.side.close()
        assert self.store.check() == []
        self.store.close()


WAIT_FOR_A_SAVE = ("engine", "save kernels")


def under_way(seed: int, num_tokens: int = 64) -> tuple[Device, FakeRequest]:
    """A device with a save under way of what the first step of request r has computed: 2, 12, … in pages 0 to 7."""
    device = Device(seed)
    request, pages = FakeRequest("r", tokens(num_tokens)), range(num_tokens // PAGE)
    device.side.arrived(request)
    orders = device.orders((request, 64, pages))
    device.fill(pages, 1.0)
    device.streams.run_engine(lambda: device.fill(pages[:8], 2.0))
    device.streams.may_finish.clear()
    device.worker.save(orders)
    assert device.report() == (set(), set())
    assert device.stored(64) == [], "nothing is published that was not copied"
    return device, request


def assert_saved(device: Device, num_tokens: int = 64) -> None:
    """What was under way is published, with the bytes of its time."""
    device.streams.may_finish.set()
    assert eventually(lambda: not (device.report(), device.worker._saves.beside)[1])
    device.streams.drain()
    assert device.stored(num_tokens) == [{2.0 + 10 * number} for number in range(num_tokens // PAGE)]


@SEEDS
def test_no_step_waits_for_a_save_whose_pages_nobody_may_write(seed: int) -> None:
    device, request = under_way(seed, 128)
    other = FakeRequest("other", [5] * 64)
    device.side.arrived(other)
    for at in range(2):  # a chunk, a decoded token
        count = (64, 1)[at]
        orders = device.orders((request, count, range(17)), (other, 32, range(20, 28)))
        device.streams.run_engine(lambda: device.fill(range(8, 17), 82.0))
        device.worker.save(orders)
    request.num_computed_tokens = 128
    assert device.side.ended(request, (range(17),)) is False
    assert WAIT_FOR_A_SAVE not in device.streams.waits
    device.orders()
    assert WAIT_FOR_A_SAVE in device.streams.waits, "its pages are another's from now on"
    device.streams.run_engine(lambda: device.fill(range(17), 500.0))
    assert_saved(device, 128)
    device.side.ended(other, ())
    device.close()


@SEEDS
@pytest.mark.parametrize("why", ["ended", "preempted", "preempted and back", "computes again"])
def test_who_may_write_to_pages_that_a_save_reads_waits(why: str, seed: int) -> None:
    device, request = under_way(seed)
    pages = range(8)
    other = FakeRequest("other", [5] * 64)
    device.side.arrived(other)
    if why == "ended":
        assert device.side.ended(request, (pages,)) is False, "nothing of it is left to be saved"
        device.orders((other, 64, pages))
    elif why == "preempted":
        request.num_computed_tokens = 0
        device.orders((other, 64, pages), preempted=["r"])
    elif why == "preempted and back":
        request.num_computed_tokens = 0
        device.orders((request, 32, pages[4:]), (other, 32, pages[:4]), preempted=["r"])
        again = device.orders((request, 32, pages), (other, 1, pages[:5]))
        assert again.rewritten == (), "it is named once"
    else:
        request.num_computed_tokens = 32
        device.orders((request, 32, pages))
    device.streams.run_engine(lambda: device.fill(pages, 3.0))
    assert_saved(device)
    for each in (request, other):
        device.side.ended(each, ())
    device.close()


@SEEDS
def test_a_load_into_pages_that_a_save_reads_waits(seed: int) -> None:
    device = Device(seed)
    device.store_blocks(32, 2.0)
    request, pages = FakeRequest("r", tokens(64)), range(8)
    device.side.arrived(request)
    orders = device.orders((request, 64, pages))
    device.streams.run_engine(lambda: device.fill(pages, 2.0))
    device.streams.may_finish.clear()
    device.worker.save(orders)
    device.side.ended(request, (pages,))
    other, orders = device.matched(48, (4, 5, 6, 7, 30, 31))
    device.worker.load(orders)
    device.streams.may_finish.set()
    device.worker.save(orders)
    assert_saved(device)
    device.side.ended(other, ())
    device.close()


@SEEDS
def test_pages_that_a_last_save_would_have_held_are_not_written_while_those_before_it_read_them(seed: int) -> None:
    device, request = under_way(seed, 80)
    request.num_computed_tokens = 80
    assert device.side.ended(request, (range(10),)) is True
    device.worker._saves.carry_out(device.orders(), {9}, lambda files: True)  # it stood on a load that failed
    assert device.report() == ({"r"}, set())
    device.streams.run_engine(lambda: device.fill(range(10), 3.0))
    assert_saved(device)
    device.close()


def test_pages_of_a_request_that_ended_are_held_until_its_save_is_published() -> None:
    device = Device(1)
    request, pages = FakeRequest("r", tokens(64)), range(8)
    device.side.arrived(request)
    device.ordered((request, 1, (pages,)))
    request.num_computed_tokens = 63  # the block is final only now that the request is over
    request.all_token_ids.append(1)
    assert device.side.ended(request, (pages,)) is True
    device.streams.may_finish.clear()
    device.worker.save(device.orders())
    assert device.report() == (set(), set())
    device.streams.may_finish.set()
    assert device.report(idle=True) == ({"r"}, set()), "with nothing to compute it is waited for"
    device.close()


@pytest.mark.parametrize("why", ["idle", "a save that holds pages", "reset", "close"])
def test_a_save_that_is_put_off_is_not_waited_for_longer_than_it_takes(why: str) -> None:
    device = Device(1)
    request, pages = FakeRequest("r", tokens(64)), range(8)
    device.side.arrived(request)
    resting, hurried = threading.Event(), []

    def wait(until: threading.Event, seconds: float) -> None:
        resting.set()
        hurried.append(until.wait(30))

    share = device.worker._saves._share = LinkShare(0.5, now_s=device.clock.now_s, wait=wait)
    share._next_s = device.clock.time_s + 3600  # of the window before it
    request.num_computed_tokens, orders = 0, device.orders((request, 32, pages))
    device.streams.run_engine(lambda: device.fill(pages, 2.0))
    device.worker.save(orders)
    assert resting.wait(20)
    device.streams.drain()
    assert device.report() == (set(), set())
    assert device.worker._saves.beside
    if why == "a save that holds pages":
        request.num_computed_tokens = 64
        assert device.side.ended(request, (pages,)) is True
        device.worker.save(device.orders())
    elif why == "reset":
        assert device.side.clear()
        device.worker.load(device.orders())
    elif why == "close":
        device.worker.close()
    assert eventually(lambda: not (device.report(idle=why == "idle"), device.worker._saves.beside)[1])
    assert hurried == [True]
    if why != "reset":
        assert device.stored(64 if why == "a save that holds pages" else 32)[:4] == [{2.0 + 10 * at} for at in range(4)]
    device.side.ended(request, (pages,))
    device.close()


def test_with_all_of_the_link_to_take_no_save_is_put_off() -> None:
    device = Device(1, save_share=1.0)
    request, pages = FakeRequest("r", tokens(64)), range(8)
    device.side.arrived(request)
    orders = device.orders((request, 64, pages))
    device.streams.run_engine(lambda: device.fill(pages, 2.0))
    device.streams.may_finish.clear()
    device.worker.save(orders)
    (saving,) = device.worker._saves.beside
    assert saving.begun.copying is not None
    device.streams.drain()
    assert saving.begun.copying.is_done
    device.side.ended(request, (pages,))
    device.close()


@SEEDS
def test_chunks_of_a_prompt_are_saved_though_the_one_before_is_still_being_copied(seed: int) -> None:
    device = Device(seed)
    request, pages = FakeRequest("r", tokens(64)), range(8)
    device.side.arrived(request)
    device.streams.may_finish.clear()
    for chunk in range(2):
        orders = device.orders((request, 32, pages))
        half = pages[4 * chunk : 4 * chunk + 4]
        device.streams.run_engine(lambda half=half, chunk=chunk: device.fill(half, 2.0 + 40 * chunk))
        device.worker.save(orders)
        device.report()
    device.streams.may_finish.set()
    assert eventually(lambda: not (device.report(), device.worker._saves.beside)[1])
    assert device.stored(64) == [{2.0 + 10 * number} for number in range(8)]
    device.side.ended(request, (pages,))
    device.close()


def test_a_save_that_a_reset_overtakes_is_not_published_and_the_reset_not_reported_before_it_is_let_go_of() -> None:
    device = Device(1)
    request, pages = FakeRequest("r", tokens(64)), range(8)
    device.side.match(request, 0)
    orders = device.orders((request, 64, pages))
    device.streams.run_engine(lambda: device.fill(pages, 2.0))
    device.streams.may_finish.clear()
    device.worker.save(orders)
    assert device.side.clear()
    orders = device.orders()
    assert orders.reset
    device.worker.load(orders)
    device.report()
    assert device.side._resets._num_awaited == 1, "a save of before is under way"
    other = FakeRequest("other", tokens(80))
    assert device.side.match(other, 0) == (0, False)
    device.streams.may_finish.set()
    assert eventually(lambda: not (device.report(), device.worker._saves.beside)[1])
    assert "saved_blocks" not in device.side.figures.counts
    assert eventually(lambda: (device.orders(), not device.side._resets._owed)[1])
    assert device.store.stats()["host.blocks"] == 0
    device.store_blocks(64, 3.0)
    assert device.side.match(other, 0)[0] == 64
    for each in (request, other):
        device.side.ended(each, ())
    device.close()


@SEEDS
@pytest.mark.parametrize("layered", [True, False])
def test_a_load_of_the_step_waits_for_the_last_reader_and_the_forward_for_the_load(layered: bool, seed: int) -> None:
    device = Device(seed)
    device.store_blocks(64, 2.0)
    pages = range(20, 30)
    device.fill(pages, 1.0)
    before: dict[int, list[set[float]]] = {}

    def last_reader() -> None:
        for layer in range(LAYERS):
            device.look(layer, pages[:8])
        before.update(device.read)

    device.streams.run_engine(last_reader)
    request, orders = device.matched(80, pages)
    device.worker.load(orders, layered=layered)
    for layer in range(LAYERS):
        if layered:
            device.worker.wait_for_layer(layer)
        device.streams.run_engine(lambda layer=layer: device.look(layer, pages[:8]))
    device.worker.save(orders)
    device.report()
    device.streams.drain()
    assert before == {layer: [{1.0 + 10 * number} for number in range(8)] for layer in range(LAYERS)}
    assert device.read == {layer: [{2.0 + 10 * number} for number in range(8)] for layer in range(LAYERS)}
    assert device.worker.bad_pages() == set()
    device.side.ended(request, (pages,))
    device.close()


def test_a_forward_begins_before_the_last_layers_are_there() -> None:
    early = 0
    for seed in range(20):
        device = Device(seed)
        device.store_blocks(64, 2.0)
        request, orders = device.matched(80, range(20, 30))
        device.worker.load(orders, layered=True)
        device.worker.wait_for_layer(0)
        seen: list[bool] = []
        copies = device.worker._loads.in_step[0].copies
        assert copies is not None
        device.streams.run_engine(lambda copies=copies, seen=seen: seen.append(copies.is_done))
        for layer in range(1, LAYERS):
            device.worker.wait_for_layer(layer)
        device.streams.drain()
        device.report()
        early += not seen[0]
        device.side.ended(request, (range(20, 30),))
        device.close()
    assert early > 0


def test_layers_are_asked_about_only_in_a_step_whose_load_goes_by_them() -> None:
    device = Device(1)
    device.store_blocks(64, 2.0)
    assert not device.worker.goes_by_layers
    request, orders = device.matched(80, range(20, 30))
    device.worker.load(orders, layered=True)
    assert device.worker.goes_by_layers
    for layer in range(LAYERS):
        device.worker.wait_for_layer(layer)
    device.report()
    assert not device.worker.goes_by_layers
    assert len(device.orders((request, 1, range(20, 30))).saves) == 1, "what was computed on the load"
    assert device.orders((request, 1, range(20, 30))) is NO_ORDERS, "a decoded token ends no block"
    device.side.ended(request, (range(20, 30),))
    device.close()


@pytest.mark.parametrize("fault", ["overwritten", "layers not waited for"])
def test_a_load_of_the_step_that_may_be_wrong_is_computed_again(fault: str) -> None:
    device = Device(1, intact=fault != "overwritten")
    device.store_blocks(64, 2.0)
    pages = range(20, 30)
    request, orders = device.matched(80, pages)
    device.worker.load(orders, layered=True)
    for layer in range(LAYERS - (fault != "overwritten")):
        device.worker.wait_for_layer(layer)
    device.worker.save(orders)
    assert device.worker.bad_pages() == set(range(20, 28))
    assert device.stored(80) == [{2.0 + 10 * number} for number in range(8)], "nothing is saved on top of it"
    assert (device.worker._loads._step_layers == 1) == (fault == "overwritten"), "an engine is trusted once"
    device.report()
    device.side.ended(request, (pages,))
    device.close()


def test_a_load_of_the_step_counts_and_is_let_go_of_though_the_store_failed_meanwhile() -> None:
    device = Device(1)
    device.store_blocks(64, 2.0)
    pages = range(20, 30)
    request, orders = device.matched(80, pages)
    device.worker.load(orders, layered=True)
    for layer in range(LAYERS):
        device.worker.wait_for_layer(layer)
    device.worker.fail_open.call(lambda: 1 // 0, None)  # another's call, on another thread
    assert device.worker.fail_open.resting
    assert device.worker.bad_pages() == set()
    assert [load.is_left for load in device.adopted] == [True]
    device.report()
    device.side.ended(request, (pages,))
    device.close()


@SEEDS
def test_a_load_beside_the_steps_counts_only_when_it_is_done_on_the_device(seed: int) -> None:
    device = Device(seed, sync_load_ms=0)
    device.store_blocks(64, 2.0)
    pages = range(20, 30)
    device.fill(pages, 1.0)
    for _ in range(100):  # a forward so long that a load which does not wait for it overtakes its end
        device.streams.run_engine(lambda: None)
    device.streams.run_engine(lambda: device.look(0, pages[:8]))
    device.streams.may_finish.clear()
    request, orders = device.matched(80, pages)
    device.worker.load(orders)
    assert device.report() == (set(), set())
    device.streams.may_finish.set()
    assert eventually(lambda: device.report() == (set(), {"r"}))
    assert device.read[0] == [{1.0 + 10 * number} for number in range(8)], "the pages' last reader comes first"
    for layer in range(LAYERS):
        device.look(layer, pages[:8])
    assert device.read == {layer: [{2.0 + 10 * number} for number in range(8)] for layer in range(LAYERS)}
    assert device.worker.bad_pages() == set()
    device.side.ended(request, (pages,))
    device.close()


@SEEDS
def test_after_a_load_is_given_up_its_copies_come_before_whatever_the_engine_does_next(seed: int) -> None:
    device = Device(seed, sync_load_ms=0, load_deadline_ms=500)
    device.store_blocks(64, 2.0)
    pages = range(20, 30)
    device.streams.may_finish.clear()
    request, orders = device.matched(80, pages)
    device.worker.load(orders)
    job = device.worker._loads.beside["r"]
    assert eventually(lambda: job.stop == 4)  # begun, and not done
    device.clock.time_s += 1
    assert device.report() == (set(), {"r"})
    assert device.worker.bad_pages() == set(range(20, 28))
    device.streams.run_engine(lambda: device.fill(pages, 5.0))
    device.streams.drain()
    device.streams.may_finish.set()
    device.look(0, pages)
    assert device.read[0] == [{5.0 + 10 * number} for number in range(10)]
    device.side.ended(request, (pages,))
    device.close()


def test_what_the_first_copies_need_is_made_before_there_are_requests_and_pages_stay_as_they_are() -> None:
    tensors = [torch.randn(64, HEADS, PAGE, 2 * DIM) for _ in range(LAYERS)]
    before = [tensor.clone() for tensor in tensors]
    pages = StridedPages(layout_of(MODEL), tensors, range(LAYERS), range(HEADS), streams=LazyStreams())
    pages.warm_up()
    assert all(map(torch.equal, tensors, before))
    device = Device(1)
    stages = cast(Any, device.worker)._loads._pages._copier._on_device()
    assert [made.stages[0].num_bytes > 0 for made in (stages._save, stages._load)] == [True, True]
    device.close()


def test_an_engine_starts_though_its_device_s_first_copy_fails(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(StridedPages):
        def warm_up(self) -> None:
            raise RuntimeError("no kernel image is available")

    device = Device(1, kind=Broken)
    assert "no kernel image is available" in caplog.text
    device.store_blocks(64, 2.0)
    assert len(device.stored(64)) == 8
    device.close()


def test_the_device_learns_of_the_slots_beside_the_engines_start_and_forgets_them_with_the_worker() -> None:
    cuda = FakeCuda()
    cuda.gate.clear()
    device = Device(1, register=lambda memory: pin(memory, runtime=cuda))
    device.store_blocks(64, 2.0)  # it serves meanwhile
    assert cuda.held == {}
    cuda.gate.set()
    assert eventually(lambda: sum(cuda.held.values()) == 64 << 20)
    chain = Chain(Root(MODEL), tokens(64))
    device.store.match(chain, "look")
    with device.store.load("look") as load:
        views = [view for block in load for view in block.views]
        assert len(views) == 8
        assert all(PINNED.covers(address_of(view), view.nbytes) for view in views)
    del views, load
    device.close()
    assert cuda.held == {}


class Mode(enum.Enum):
    """vLLM's `CUDAGraphMode`, as far as a step has one."""

    NONE = 0
    PIECEWISE = 1
    FULL = 2


@pytest.mark.parametrize(
    ("metadata", "mode", "halves", "by_layers"),
    [
        ({}, Mode.PIECEWISE, None, True),
        ({}, Mode.NONE, None, True),
        ({}, Mode.FULL, None, False),
        (None, Mode.NONE, None, False),
        ({}, Mode.NONE, [1, 2], False),
        ({}, None, None, False),
    ],
)
def test_a_forward_pass_that_may_call_no_hooks_waits_for_whole_loads(
    metadata: object, mode: Mode | None, halves: object, by_layers: bool
) -> None:
    context = SimpleNamespace(attn_metadata=metadata, cudagraph_runtime_mode=mode, ubatch_slices=halves)
    assert goes_by_layers(context) == by_layers
