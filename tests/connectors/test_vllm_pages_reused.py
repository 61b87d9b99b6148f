# SPDX-License-Identifier: Apache-2.0
"""Saves of vLLM's worker while pages go from request to request: whatever the order of things, no byte is another's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

pytest.importorskip("torch", reason="the worker copies torch tensors")

from tests.connectors.test_vllm_device import BLOCK, PAGE, WAIT_FOR_A_SAVE, Device
from tests.connectors.test_vllm_plan import FakeRequest
from tests.waiting import eventually

NUM_PAGES = 18
LONGEST = 12
"""Pages of a request."""


@dataclass(eq=False)
class Running:
    """A request in the engine. Its page `at` is to hold the number `100 * number + at`."""

    request: FakeRequest
    number: int
    pages: list[int] = field(default_factory=list)


class Engine:
    """As much of an engine as hands out pages: chunks, decoded pages, preemptions and ends, by lot."""

    def __init__(self, seed: int) -> None:
        self.device = Device(seed)
        self.lot = random.Random(seed)
        self.free = list(range(NUM_PAGES))
        self.running: list[Running] = []
        self.waiting: list[Running] = []
        self.held: dict[str, list[int]] = {}
        self.all: list[Running] = []
        self.num_preempted = 0

    def step(self) -> None:
        self._may_finish(self.lot.random() < 0.2)
        if self.lot.random() < 0.5:
            self._arrive()
        preempted: list[str] = []
        scheduled = [one for one in list(self.running) if self._schedule(one, preempted)]
        while self.waiting and not preempted and self.free:
            one = self.waiting.pop(0)
            self.running.append(one)
            if self._schedule(one, preempted):
                scheduled.append(one)
        scheduled = [one for one in scheduled if one in self.running]
        chunks = {one: len(one.pages) * PAGE - one.request.num_computed_tokens for one in scheduled}
        wrote = [(one, one.request.num_computed_tokens // PAGE, list(one.pages)) for one in scheduled]
        orders = self.device.orders(*((one.request, chunks[one], one.pages) for one in scheduled), preempted=preempted)
        self.device.streams.run_engine(lambda: self._compute(wrote))
        self.device.worker.load(orders)
        self.device.worker.save(orders)
        self.device.streams.go_on(self.lot.randrange(12))
        self._report(idle=False)
        for one in list(self.running):
            if len(one.pages) == LONGEST or self.lot.random() < 0.1:
                self._end(one)

    def _may_finish(self, may: bool) -> None:
        (self.device.streams.may_finish.set if may else self.device.streams.may_finish.clear)()

    def _arrive(self) -> None:
        number = len(self.all) + 1
        one = Running(FakeRequest(f"r{number}", [number] * LONGEST * PAGE), number)
        self.device.side.arrived(one.request)
        self.waiting.append(one)
        self.all.append(one)

    def _schedule(self, one: Running, preempted: list[str]) -> bool:
        """Give it pages for a chunk, of others where there are none."""
        if one not in self.running:  # another got its pages
            return False
        want = min(self.lot.randint(1, 5), LONGEST - len(one.pages))
        while len(self.free) < want:
            last = self.running[-1]
            self._preempt(last, preempted)
            if last is one:
                return False
        for _ in range(want):
            one.pages.append(self.free.pop(self.lot.randrange(len(self.free))))
        return want > 0

    def _preempt(self, one: Running, preempted: list[str]) -> None:
        self.running.remove(one)
        self.waiting.insert(0, one)
        self.free += one.pages
        one.pages, one.request.num_computed_tokens = [], 0
        preempted.append(one.request.request_id)
        self.num_preempted += 1

    def _compute(self, wrote: Sequence[tuple[Running, int, list[int]]]) -> None:
        for one, first, pages in wrote:
            for at in range(first, len(pages)):
                for tensor in self.device.tensors:
                    tensor[pages[at]] = float(100 * one.number + at)

    def _end(self, one: Running) -> None:
        self.running.remove(one)
        if self.device.side.ended(one.request, (list(one.pages),)):
            self.held[one.request.request_id] = one.pages
        else:
            self.free += one.pages

    def _report(self, *, idle: bool) -> None:
        for request_id in self.device.report(idle=idle)[0]:
            self.free += self.held.pop(request_id)

    def finish(self) -> None:
        self._may_finish(True)
        for one in list(self.running):
            self._end(one)
        for one in self.waiting:
            self.device.side.ended(one.request, ())
        self.device.worker.save(self.device.orders())

        def is_done() -> bool:
            self._report(idle=True)
            return not (self.device.worker._saves.beside or self.held)

        assert eventually(is_done)
        self.device.streams.drain()


@pytest.mark.parametrize("seed", range(10))
def test_every_block_has_its_own_tokens_kv_whoever_got_its_pages_next(seed: int) -> None:
    engine = Engine(seed)
    for _ in range(60):
        engine.step()
    engine.finish()
    device, num_blocks = engine.device, 0
    for one in engine.all:
        found = device.stored(LONGEST * PAGE, one.request.all_token_ids)
        assert found == [{float(100 * one.number + at)} for at in range(len(found))]
        num_blocks += len(found) * PAGE // BLOCK
    assert num_blocks > 10
    assert engine.num_preempted > 0
    assert WAIT_FOR_A_SAVE in device.streams.waits
    device.close()
