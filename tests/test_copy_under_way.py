# SPDX-License-Identifier: Apache-2.0
"""Saves whose last windows are put off: bytes of their time, no more than a share of the link, prompt when asked."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("torch", reason="saves copy torch tensors")

import torch

from kvstore.api import OpenRun
from kvstore.copy_under_way import CopyingOut, LinkShare
from kvstore.copy_windows import Window
from kvstore.device_copy import Way
from kvstore.layout import layout_of
from kvstore.transfer import Copying, PageCopier, PagedKV
from tests.fakes import FakeClock
from tests.lazy_streams import LazyMoment, LazyStreams
from tests.test_device_copy import fill, make_copier, windowed
from tests.test_transfer import cross_layer, model

SEEDS = pytest.mark.parametrize("seed", range(12))
BLOCK_BYTES = layout_of(model()).block_bytes


class Link(LazyStreams):
    """A device whose link takes a second a window; the clock goes on while somebody waits."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.clock = FakeClock()
        self.crossed_s: list[float] = []

    def finish(self, moment: LazyMoment) -> None:  # type: ignore[override]
        before = len(self.crossed_s)
        super().finish(moment)
        self.clock.time_s += len(self.crossed_s) - before

    def share(self, share: float) -> LinkShare:
        def wait(hurried: threading.Event, seconds: float) -> None:
            if not hurried.is_set():
                self.clock.time_s += seconds

        return LinkShare(share, now_s=self.clock.now_s, wait=wait)


class Rig:
    """Pages of six blocks, of which each is a window, and room for so many saves in one stretch of memory."""

    def __init__(self, seed: int = 0) -> None:
        self.link = Link(seed)
        self.kv: PagedKV = cross_layer(torch.bfloat16, 16).kv
        self.copier: PageCopier = windowed(make_copier(layout_of(model()), self.kv, Way.INDEX, self.link))
        device = self.copier._on_device()
        send = device._over_the_link

        def counted(held: torch.Tensor, window: Window, *, to_slots: bool) -> None:
            send(held, window, to_slots=to_slots)
            self.link.crossed_s.append(self.link.clock.time_s)

        device._over_the_link = counted  # type: ignore[method-assign]

    def save(self, pages: range, value: float, *, put_off: bool = True) -> tuple[Copying, memoryview]:
        """Begin to save what the engine computes: `value`, `value` + 10, … in the pages, which it overwrites after."""
        self.link.run_engine(lambda: fill(self.kv, pages, value))
        memory = memoryview(bytearray(len(pages) * BLOCK_BYTES))
        offsets = np.arange(len(pages), dtype=np.int64)[:, None] * BLOCK_BYTES
        run = OpenRun(np.arange(len(pages)), memory, offsets)
        copying = self.copier.start_gather(pages, run, put_off=put_off)
        copying.order()
        self.link.run_engine(lambda: fill(self.kv, pages, 500.0))
        return copying, memory


def values(memory: memoryview) -> list[set[float]]:
    return [
        set(torch.frombuffer(memory[at : at + BLOCK_BYTES], dtype=torch.bfloat16).tolist())
        for at in range(0, len(memory), BLOCK_BYTES)
    ]


def wanted(num_blocks: int, value: float) -> list[set[float]]:
    return [{value + 10 * number} for number in range(num_blocks)]


@SEEDS
@pytest.mark.parametrize("num_blocks", [1, 3, 6])
def test_what_was_put_off_has_the_bytes_of_its_time(num_blocks: int, seed: int) -> None:
    rig = Rig(seed)
    copying, memory = rig.save(range(num_blocks), 2.0)
    rig.link.drain()  # all the engine does, too
    assert values(memory)[-1] == {0.0}, "what nobody wants yet is not sent"
    assert not copying.is_done
    copying.finish_by(rig.link.share(0.5))
    assert values(memory) == wanted(num_blocks, 2.0)
    assert copying.is_done


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_windows_that_are_put_off_take_no_more_than_their_share_of_the_link(share: float) -> None:
    rig = Rig()
    given = rig.link.share(share)
    for _ in range(3):
        rig.save(range(4), 2.0)[0].finish_by(given)
    times = rig.link.crossed_s
    assert len(times) == 12
    gaps = [later - sooner for sooner, later in pairwise(times)]
    assert gaps == pytest.approx([1 / share] * 11)


@SEEDS
def test_a_save_larger_than_its_stages_puts_off_what_fits_there_alone(seed: int) -> None:
    """The engine waits for what comes before, so that crosses at the link's rate."""
    rig = Rig(seed)
    copying, _ = rig.save(range(6), 2.0)
    rig.link.drain()
    assert len(rig.link.crossed_s) == 2
    assert {float(x) for layer in rig.kv.planes for plane in layer for x in plane[0].unique()} == {500.0}
    copying.finish()
    assert len(rig.link.crossed_s) == 6


@SEEDS
def test_who_wants_the_stages_sends_what_lies_there_and_nobody_s_bytes_are_mixed_up(seed: int) -> None:
    rig = Rig(seed)
    saves = [rig.save(range(3), 2.0 + 100 * turn, put_off=turn < 2) for turn in range(3)]
    for copying, _ in saves:
        copying.finish_by(rig.link.share(0.25))
    rig.link.drain()
    for turn, (_, memory) in enumerate(saves):
        assert values(memory) == wanted(3, 2.0 + 100 * turn)


def test_small_saves_wait_side_by_side_until_the_stages_are_full() -> None:
    rig = Rig()
    made = [rig.save(range(1), 2.0) for _ in range(4)]
    rig.link.drain()
    assert rig.link.crossed_s == []
    made.append(rig.save(range(1), 2.0))
    rig.link.drain()
    assert len(rig.link.crossed_s) == 1
    for copying, _ in made:
        copying.finish()


@pytest.mark.parametrize("ends", [Copying.hurry, Copying.finish])
def test_a_save_that_somebody_waits_for_rests_no_more(ends: Callable[[Copying], None]) -> None:
    rig = Rig()
    began_s = rig.link.clock.time_s
    resting, go_on = threading.Event(), threading.Event()

    def wait(hurried: threading.Event, seconds: float) -> None:
        resting.set()
        assert hurried.wait(20)
        go_on.set()

    share = LinkShare(0.001, now_s=rig.link.clock.now_s, wait=wait)
    copying, memory = rig.save(range(4), 2.0)
    thread = threading.Thread(target=copying.finish_by, args=(share,))
    thread.start()
    assert resting.wait(20)
    assert len(rig.link.crossed_s) == 1
    if ends is Copying.finish:
        copying.finish()
    else:
        copying.hurry()
    thread.join(20)
    assert go_on.is_set()
    assert not thread.is_alive()
    assert values(memory) == wanted(4, 2.0)
    assert rig.link.clock.time_s - began_s < 10, "not the hour that a thousandth of the link takes"


@SEEDS
def test_a_window_that_cannot_be_sent_fails_its_own_save_and_not_the_one_that_wants_its_stage(seed: int) -> None:
    rig = Rig(seed)
    first, _ = rig.save(range(1), 2.0)
    submit = rig.link.submit
    fails = [True]

    def refuses(stream: object, action: Callable[[], None]) -> None:
        if getattr(stream, "name", "") == "save copies 0" and fails.pop():
            rig.link.submit = submit  # type: ignore[method-assign]
            raise RuntimeError("no such address")
        submit(stream, action)  # type: ignore[arg-type]

    rig.link.submit = refuses  # type: ignore[method-assign]
    second, memory = rig.save(range(4), 3.0)
    second.finish()
    assert values(memory) == wanted(4, 3.0)
    with pytest.raises(RuntimeError, match="no such address"):
        first.finish_by(rig.link.share(0.5))


def test_a_save_that_fails_while_it_is_submitted_sends_nothing_later() -> None:
    rig = Rig()
    device = rig.copier._on_device()
    take_out, calls = device._take_out, []

    def fails(*args: object, **named: object) -> object:
        if len(calls) == 2:
            raise RuntimeError("no memory")
        calls.append(1)
        return take_out(*args, **named)  # type: ignore[arg-type]

    device._take_out = fails  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="no memory"):
        rig.save(range(4), 2.0)
    device._take_out = take_out  # type: ignore[method-assign]
    copying, memory = rig.save(range(6), 3.0)
    copying.finish()
    assert len(rig.link.crossed_s) == 6
    assert values(memory) == wanted(6, 3.0)


def test_a_save_that_is_done_keeps_nobody_s_memory() -> None:
    class Memory(bytearray):
        pass

    rig = Rig()
    held = Memory(BLOCK_BYTES)
    gone = weakref.ref(held)
    run = OpenRun(np.arange(1), memoryview(held), np.zeros((1, 1), np.int64))
    copying = rig.copier.start_gather([3], run, put_off=True)
    copying.finish_by(rig.link.share(0.5))
    assert isinstance(copying, CopyingOut)
    rig.link.drain()
    del held, run, copying
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        LinkShare(share)
