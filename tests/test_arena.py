# SPDX-License-Identifier: Apache-2.0
"""Slots of several sizes: no overlap, no loss, memory that changes hands."""

from __future__ import annotations

import itertools
import random

import pytest

from kvstore.arena import PAGE_BYTES, Arena
from kvstore.errors import CapacityError


def test_one_size_fills_the_arena_to_the_last_slot() -> None:
    arena = Arena(103 * PAGE_BYTES, prefault=False)
    slots = []
    while (slot := arena.acquire(2 * PAGE_BYTES)) is not None:
        slots.append(slot)
    assert len(slots) == 51
    assert arena.check() == []


def test_slots_of_mixed_sizes_never_overlap() -> None:
    arena = Arena(4 << 20, prefault=False)
    rng = random.Random(1)
    held: dict[int, int] = {}
    for _ in range(3000):
        if held and rng.random() < 0.45:
            slot = rng.choice(list(held))
            arena.release(slot)
            del held[slot]
        else:
            size = rng.choice([100, 4096, 5000, 65536])
            slot = arena.acquire(size)
            if slot is not None:
                held[slot] = size
    spans = sorted((slot, slot + size) for slot, size in held.items())
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))
    assert arena.check() == []


def test_an_emptied_extent_serves_another_size() -> None:
    arena = Arena(64 * PAGE_BYTES, prefault=False)
    small = [arena.acquire(PAGE_BYTES) for _ in range(64)]
    assert arena.acquire(8 * PAGE_BYTES) is None
    for slot in small:
        assert slot is not None
        arena.release(slot)
    assert arena.acquire(8 * PAGE_BYTES) is not None
    assert arena.check() == []


def test_a_slot_handed_out_again_has_another_generation() -> None:
    arena = Arena(PAGE_BYTES, prefault=False)
    slot = arena.acquire(10)
    assert slot is not None
    before = arena.generation_of(slot)
    arena.release(slot)
    assert arena.generation_of(slot) == before
    assert arena.acquire(10) == slot
    assert arena.generation_of(slot) != before


def test_views_are_the_same_memory() -> None:
    arena = Arena(4 * PAGE_BYTES, prefault=False)
    slot = arena.acquire(16)
    assert slot is not None
    arena.view(slot, 16)[:] = b"0123456789abcdef"
    assert bytes(arena.view(slot, 16)) == b"0123456789abcdef"


def test_prefault_keeps_what_was_written() -> None:
    arena = Arena(32 << 20)
    slot = arena.acquire(PAGE_BYTES)
    assert slot is not None
    arena.view(slot, 4)[:] = b"kept"
    assert arena.wait_prefaulted(30)
    assert bytes(arena.view(slot, 4)) == b"kept"
    arena.close()


def test_an_arena_below_a_page_is_refused() -> None:
    with pytest.raises(CapacityError, match="at least one page"):
        Arena(100)
