# SPDX-License-Identifier: Apache-2.0
"""Marks in lower tiers follow what their owner and the mover do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from kvstore.block import BlockId, RootId
from kvstore.clock import Clock, MonotonicClock
from kvstore.errors import TierUnavailable
from kvstore.fleet import FleetMarks
from kvstore.marks import Mark, Marks
from tests.fakes import DictTier, FakeClock
from tests.waiting import wait_until

ROOT = RootId(bytes(32))
BLOCKS = [BlockId(bytes([number]) * 32) for number in range(8)]


class MarkingTier(DictTier):
    """Remembers runs by the block that begins them; forgets nothing by itself."""

    keeps_marks = True

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[BlockId, list[BlockId]] = {}
        self.unmarked: list[BlockId] = []
        self.fails = threading.Event()

    def mark(self, root: RootId, blocks: Sequence[BlockId], ttl_s: float) -> None:
        if self.fails.is_set():
            raise TierUnavailable("marking", "said so")
        self.runs[blocks[0]] = list(blocks)

    def unmark(self, root: RootId, blocks: Sequence[BlockId]) -> None:
        self.unmarked += blocks
        for block in blocks:
            self.runs.pop(block, None)


class Scene:
    def __init__(self, clock: Clock | None = None) -> None:
        self.tier = MarkingTier()
        self.on_its_way: set[BlockId] = set()
        clock = clock or MonotonicClock()
        self.marks = Marks(clock)
        self.fleet = FleetMarks([self.tier], self.on_its_way.__contains__, clock.now_s)


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.fleet.close()
    assert scene.tier.runs == {}


def renewed_until(mark: Mark, true: Callable[[], bool]) -> None:
    """Its owner goes on with it meanwhile, however long a busy machine takes."""

    def renewed() -> bool:
        mark.renew()
        return true()

    wait_until(renewed)


def test_what_is_on_its_way_down_is_waited_for_after_its_owner_withdrew(scene: Scene) -> None:
    mark = scene.marks.add(ROOT, BLOCKS)
    scene.fleet.add(mark)
    wait_until(lambda: scene.tier.runs == {BLOCKS[0]: BLOCKS})
    scene.on_its_way.update(BLOCKS[:3])
    scene.marks.fulfil(ROOT, BLOCKS[:3])
    mark.withdraw()
    time.sleep(0.2)
    assert scene.tier.runs
    scene.on_its_way.clear()
    wait_until(lambda: not scene.tier.runs)


def test_mark_is_named_anew_by_where_its_producer_has_got_to(scene: Scene) -> None:
    mark = scene.marks.add(ROOT, BLOCKS)
    scene.fleet.add(mark)
    renewed_until(mark, lambda: BLOCKS[0] in scene.tier.runs)
    scene.on_its_way.add(BLOCKS[2])
    scene.marks.fulfil(ROOT, BLOCKS[:3])
    renewed_until(mark, lambda: scene.tier.runs.get(BLOCKS[2]) == BLOCKS[2:])
    scene.on_its_way.clear()
    renewed_until(mark, lambda: scene.tier.runs.get(BLOCKS[3]) == BLOCKS[3:])
    mark.withdraw()
    wait_until(lambda: not scene.tier.runs)  # by all of its names


def test_tier_that_fails_is_told_again_when_it_works(scene: Scene) -> None:
    scene.tier.fails.set()
    mark = scene.marks.add(ROOT, BLOCKS)
    scene.fleet.add(mark)
    time.sleep(0.1)
    scene.tier.fails.clear()
    wait_until(lambda: bool(scene.tier.runs))


def test_mark_that_lapsed_is_taken_back_and_said_again_if_its_owner_goes_on_soon(scene: Scene) -> None:
    """As where the process stood still for longer than a mark lives."""
    mark = scene.marks.add(ROOT, BLOCKS)
    scene.fleet.add(mark)
    for _ in range(2):
        renewed_until(mark, lambda: scene.tier.runs == {BLOCKS[0]: BLOCKS})
        mark.deadline_s = time.monotonic() - 1
        wait_until(lambda: scene.tier.runs == {})
    renewed_until(mark, lambda: scene.tier.runs == {BLOCKS[0]: BLOCKS})
    mark.deadline_s = time.monotonic() - 10
    wait_until(lambda: not scene.fleet._sent)
    assert scene.tier.runs == {}


@pytest.mark.parametrize("ends", [0, 1])
def test_of_two_marks_that_begin_alike_one_is_taken_back_and_the_other_is_not_missed(ends: int) -> None:
    scene = Scene(FakeClock())  # which stands still: no renewal is due
    made = [scene.marks.add(ROOT, BLOCKS[:5]), scene.marks.add(ROOT, BLOCKS)]
    for mark in made:
        scene.fleet.add(mark)
    left = made[1 - ends]
    wait_until(lambda: all(sent.named for sent in list(scene.fleet._sent.values())))
    scene.tier.unmarked.clear()
    made[ends].withdraw()
    wait_until(lambda: len(scene.fleet._sent) == 1)
    wait_until(lambda: scene.tier.runs == {BLOCKS[0]: left.blocks})
    assert scene.tier.unmarked == []
    left.withdraw()
    wait_until(lambda: not scene.tier.runs)
    scene.fleet.close()


def test_mark_of_lost_blocks_and_no_other_is_taken_back(scene: Scene) -> None:
    for blocks in (BLOCKS[:4], BLOCKS[4:]):
        scene.fleet.add(scene.marks.add(ROOT, blocks))
    wait_until(lambda: len(scene.tier.runs) == 2)
    scene.fleet.lost([BLOCKS[1]])
    wait_until(lambda: list(scene.tier.runs) == [BLOCKS[4]])
