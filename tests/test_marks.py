# SPDX-License-Identifier: Apache-2.0
"""Announcements: whose they are, and when they end."""

from __future__ import annotations

import pytest

from kvstore.block import ModelId, Root
from kvstore.marks import MARK_TTL_S, Marks
from tests.conftest import chain_of
from tests.fakes import FakeClock


def test_a_mark_of_one_root_says_nothing_of_the_same_ids_under_another(model: ModelId, clock: FakeClock) -> None:
    marks = Marks(clock)
    mine, yours = Root(model, salt=b"a"), Root(model, salt=b"b")
    ids = chain_of(mine, 4).ids
    marks.add(mine.id, ids[:3])
    marks.add(yours.id, ids[3:])  # who claims her ids as his own
    assert [marks.run(root.id, ids, 0) for root in (mine, yours)] == [3, 0]
    assert [marks.run(root.id, ids, 3) for root in (mine, yours)] == [0, 1]
    marks.fulfil(yours.id, ids)
    assert marks.run(mine.id, ids, 0) == 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_two_announce_is_pending_until_both_have_withdrawn(
    root: Root, clock: FakeClock, order: tuple[int, int]
) -> None:
    marks, ids = Marks(clock), chain_of(root, 6).ids
    made = [marks.add(root.id, ids[:4]), marks.add(root.id, ids)]
    assert marks.run(root.id, ids, 0) == 6
    made[order[0]].withdraw()
    assert marks.run(root.id, ids, 0) == (6 if order[0] == 0 else 4)
    made[order[1]].withdraw()
    assert marks.run(root.id, ids, 0) == 0
    assert len(marks) == 0


def test_what_two_announced_and_one_committed_is_done_for_both(root: Root, clock: FakeClock) -> None:
    marks, ids = Marks(clock), chain_of(root, 4).ids
    made = [marks.add(root.id, ids) for _ in range(2)]
    marks.fulfil(root.id, ids[:3])
    assert [mark.num_left() for mark in made] == [1, 1]
    made[0].withdraw()
    assert marks.run(root.id, ids, 3) == 1


def test_of_two_marks_of_one_range_only_the_one_that_lapsed_is_swept(root: Root, clock: FakeClock) -> None:
    marks, ids = Marks(clock), chain_of(root, 4).ids
    first, second = marks.add(root.id, ids), marks.add(root.id, ids)
    clock.time_s += MARK_TTL_S / 2
    second.renew()
    clock.time_s += MARK_TTL_S / 2
    marks.sweep()
    assert marks.run(root.id, ids, 0) == 4
    second.withdraw()
    first.withdraw()
    assert len(marks) == 0


def test_a_mark_that_lapsed_is_nobodys_and_is_swept(root: Root, clock: FakeClock) -> None:
    marks, ids = Marks(clock), chain_of(root, 4).ids
    marks.add(root.id, ids)
    clock.time_s += MARK_TTL_S
    assert marks.run(root.id, ids, 0) == 0
    assert len(marks) == 4
    marks.sweep()
    assert len(marks) == 0
    clock.time_s += MARK_TTL_S
    later = marks.add(root.id, ids)
    assert marks.run(root.id, ids, 0) == 4
    later.withdraw()


def test_a_mark_counts_what_of_it_is_left_from_its_beginning(root: Root, clock: FakeClock) -> None:
    marks, ids = Marks(clock), chain_of(root, 4).ids
    mark = marks.add(root.id, ids)
    marks.fulfil(root.id, ids[:3])
    assert (mark.num_left(), marks.run(root.id, ids, 3)) == (1, 1)
    marks.fulfil(root.id, ids[3:])
    assert (mark.num_left(), len(marks)) == (0, 0)
