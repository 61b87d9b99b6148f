# SPDX-License-Identifier: Apache-2.0
"""Pinning in the background: nobody waits for it, a failure is said once, and what is pinned is known by address."""

from __future__ import annotations

import logging
import mmap
import threading

import pytest

pytest.importorskip("torch", reason="pinning goes through torch")

import numpy as np
import torch

from kvstore.arena import Arena
from kvstore.pinning import PINNED, PinnedRanges, Pinning, pin

PAGE = 4096


class FakeCuda:
    """Registers on paper; refuses after `limit_bytes`, waits for `gate` before each chunk."""

    def __init__(self, limit_bytes: int = 1 << 40) -> None:
        self.limit_bytes = limit_bytes
        self.held: dict[int, int] = {}
        self.gate = threading.Event()
        self.gate.set()

    def register(self, address: int, num_bytes: int) -> str:
        self.gate.wait()
        if sum(self.held.values()) + num_bytes > self.limit_bytes:
            return "CUDA error 2 (out of memory)"
        assert address not in self.held
        self.held[address] = num_bytes
        return ""

    def unregister(self, address: int) -> str:
        return "" if self.held.pop(address, None) else "CUDA error 713 (not registered)"


def memory(pages: int) -> memoryview:
    return memoryview(mmap.mmap(-1, pages * PAGE))


def start_of(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def begin(view: memoryview, cuda: FakeCuda, ranges: PinnedRanges, *, pages: int = 2) -> Pinning:
    return Pinning(view, runtime=cuda, chunk_bytes=pages * PAGE, ranges=ranges)


def test_memory_is_registered_whole_in_chunks_and_let_go_at_the_end() -> None:
    view, cuda, ranges = memory(7), FakeCuda(), PinnedRanges()
    pinning = begin(view, cuda, ranges)
    assert pinning.wait(10)
    assert sorted(cuda.held.values()) == [PAGE, 2 * PAGE, 2 * PAGE, 2 * PAGE]
    assert pinning.num_bytes == 7 * PAGE
    assert ranges.covers(start_of(view), 7 * PAGE)
    pinning.close()
    pinning.close()
    assert cuda.held == {}
    assert not ranges.covers(start_of(view), 1)


def test_whoever_pins_does_not_wait_and_sees_it_grow_chunk_by_chunk() -> None:
    view, cuda, ranges = memory(4), FakeCuda(), PinnedRanges()
    cuda.gate.clear()
    pinning = begin(view, cuda, ranges)
    assert pinning.num_bytes == 0
    assert not pinning.wait(0.01)
    assert not ranges.covers(start_of(view), PAGE)
    cuda.gate.set()
    assert pinning.wait(10)
    pinning.close()


def test_a_refusal_is_said_once_and_keeps_what_was_pinned(caplog: pytest.LogCaptureFixture) -> None:
    view, cuda, ranges = memory(10), FakeCuda(limit_bytes=5 * PAGE), PinnedRanges()
    with caplog.at_level(logging.WARNING, "kvstore.pinning"):
        pinning = begin(view, cuda, ranges)
        assert not pinning.wait(10)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pinned 16384 of 40960 bytes" in caplog.text
    assert "out of memory" in pinning.failure
    assert ranges.covers(start_of(view), 4 * PAGE)
    assert not ranges.covers(start_of(view), 5 * PAGE)
    pinning.close()
    assert cuda.held == {}


def test_closing_stops_a_pinning_under_way_and_unregisters_what_it_has() -> None:
    view, cuda, ranges = memory(64), FakeCuda(), PinnedRanges()
    cuda.gate.clear()
    pinning = begin(view, cuda, ranges)
    closer = threading.Thread(target=pinning.close)
    closer.start()
    pinning._stop.wait(10)
    cuda.gate.set()
    closer.join(10)
    assert cuda.held == {}
    assert not ranges.covers(start_of(view), 1)


def test_memory_stays_mapped_for_as_long_as_it_is_registered() -> None:
    arena = Arena(16 * PAGE, prefault=False)
    cuda, ranges = FakeCuda(), PinnedRanges()
    pinning = begin(arena.view(0, 16 * PAGE), cuda, ranges)
    assert pinning.wait(10)
    memory_of_arena = arena._memory
    arena.close()
    del arena
    memory_of_arena.close()
    assert memory_of_arena.mapped
    pinning.close()
    assert not memory_of_arena.mapped


def test_a_copy_is_cut_where_registrations_meet_and_where_they_end() -> None:
    ranges = PinnedRanges()
    ranges.add(300, 100)
    ranges.add(100, 100)
    ranges.add(200, 100)
    assert ranges.cuts(50, 400) == [
        (0, 50, False),
        (50, 100, True),
        (150, 100, True),
        (250, 100, True),
        (350, 50, False),
    ]
    assert ranges.cuts(120, 30) == [(0, 30, True)]
    assert ranges.cuts(400, 10) == [(0, 10, False)]
    assert ranges.covers(150, 200)
    assert not ranges.covers(150, 251)
    ranges.drop(200)
    assert ranges.cuts(150, 200) == [(0, 50, True), (50, 100, False), (150, 50, True)]


def test_chunks_must_be_whole_pages() -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        Pinning(memory(1), runtime=FakeCuda(), chunk_bytes=5000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED HERE: no CUDA device")
def test_cuda_takes_an_arena_and_copies_across_its_chunks() -> None:
    arena = Arena(8 << 20, prefault=False)
    view = arena.view(0, 8 << 20)
    pinning = Pinning(view, chunk_bytes=1 << 20)
    assert pinning.wait(30)
    assert PINNED.covers(start_of(view), view.nbytes)
    assert torch.frombuffer(view, dtype=torch.uint8).is_pinned()
    pinning.close()
    arena.close()


def test_memory_is_registered_once_for_all_who_ask_and_until_the_last_lets_go() -> None:
    view, cuda = memory(4), FakeCuda()
    one, other = pin(view, runtime=cuda), pin(view, runtime=cuda)
    assert one.wait(10)
    assert other.wait(10)
    assert sum(cuda.held.values()) == 4 * PAGE
    one.close()
    one.close()
    assert sum(cuda.held.values()) == 4 * PAGE
    del other
    assert cuda.held == {}
    again = pin(view, runtime=cuda)
    assert again.wait(10)
    again.close()
    assert cuda.held == {}
