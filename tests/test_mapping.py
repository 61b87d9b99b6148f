# SPDX-License-Identifier: Apache-2.0
"""A client's side of the arena: what is mapped, refused, populated, kept out of forks, and let go."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.arena import PAGE_BYTES, Arena
from kvstore.block import ModelId, Root
from kvstore.config import StoreConfig
from kvstore.errors import MappingClosed, ProtocolError
from kvstore.mapping import ArenaMapping
from kvstore.store import KVStore
from tests.conftest import chain_of, content, load_all, save_all
from tests.descriptors import descriptors
from tests.waiting import eventually

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(4 << 20, shared=True, prefault=False)
    yield arena
    assert arena.check() == []
    arena.close()


@pytest.fixture
def mapping(arena: Arena) -> Iterator[ArenaMapping]:
    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes)
    yield mapping
    gc.collect()
    assert mapping.close()


def slot_of(arena: Arena, num_bytes: int = PAGE_BYTES) -> int:
    slot = arena.acquire(num_bytes)
    assert slot is not None
    return slot


def mapped_bytes(name: str) -> int:
    """Address space of this process that shows the memfd `name`."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"memfd:{name}" in line]
    spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in lines]
    return sum(stop - start for start, stop in spans)


# -- bytes and words -------------------------------------------------------------------------------------------


def test_both_sides_see_the_same_bytes(arena: Arena, mapping: ArenaMapping) -> None:
    slot_of(arena)
    slot = slot_of(arena)
    mapping.view(slot, 5)[:] = b"saved"
    assert bytes(arena.view(slot, 5)) == b"saved"
    arena.view(slot, 5)[:] = b"again"
    assert bytes(mapping.view(slot, 5)) == b"again"


def test_a_client_works_in_a_process_of_its_own(arena: Arena) -> None:
    slot = slot_of(arena)
    script = (
        "import sys; import numpy as np; from kvstore.mapping import ArenaMapping\n"
        "memory, words, capacity, slot = map(int, sys.argv[1:])\n"
        "mapping = ArenaMapping(memory, words, capacity)\n"
        "assert mapping.wait_populated(30)\n"
        "mapping.view(slot, 4)[:] = b'sent'\n"
        "print(*mapping.generations(np.array([slot])))\n"
        "assert mapping.close()\n"
    )
    fds = (arena.memory_fd, arena.generation_fd)
    arguments = [str(number) for number in (*fds, arena.capacity_bytes, slot)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], pass_fds=fds, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
    assert bytes(arena.view(slot, 4)) == b"sent"


def test_a_slot_handed_out_again_is_noticed_by_its_generation(arena: Arena, mapping: ArenaMapping) -> None:
    slots = np.array([slot_of(arena) for _ in range(100)], np.uint64)
    before = mapping.generations(slots)
    assert np.array_equal(mapping.generations(slots), before)
    arena.release(int(slots[42]))
    assert np.array_equal(mapping.generations(slots), before)  # still the old bytes
    assert arena.acquire(PAGE_BYTES) == slots[42]
    assert np.flatnonzero(mapping.generations(slots) != before).tolist() == [42]
    assert len(mapping.generations(np.array([], np.uint64))) == 0


@pytest.mark.parametrize("offset", [-1, 4 << 20, (4 << 20) - 8, 1 << 62])
def test_slots_outside_the_arena_are_refused(mapping: ArenaMapping, offset: int) -> None:
    with pytest.raises(ProtocolError, match="outside the arena"):
        mapping.view(offset, 9)
    if offset >= mapping.num_bytes:
        with pytest.raises(ProtocolError, match="outside the arena"):
            mapping.generations(np.array([0, offset]))


def test_a_mapping_that_only_loads_gives_views_nobody_can_write(arena: Arena) -> None:
    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes, writable=False)
    assert mapping.view(0, 8).readonly
    assert mapping.wait_populated(30)
    assert mapping.close()


def test_descriptors_are_not_kept(arena: Arena) -> None:
    fds = [os.dup(arena.memory_fd), os.dup(arena.generation_fd)]
    before = descriptors()
    mapping = ArenaMapping(*fds, arena.capacity_bytes)
    for fd in fds:
        os.close(fd)
    assert descriptors() <= before
    assert bytes(mapping.view(0, 1)) == b"\0"
    assert mapping.close()


def test_what_a_store_in_shared_memory_saved_is_read_through_a_mapping(model: ModelId, root: Root) -> None:
    config = StoreConfig.load({"host": {"capacity_bytes": 64 * PAGE_BYTES, "prefault": False}}, environ={})
    with KVStore(config, tiers=(), shared_memory=True) as store:
        store.open(model)
        chain = chain_of(root, 8)
        assert save_all(store, chain) == 8
        mapping = ArenaMapping(store.arena.memory_fd, store.arena.generation_fd, store.arena.capacity_bytes)
        memory = bytes(mapping.view(0, mapping.num_bytes))
        assert all(content(chain, index, 0, PAGE_BYTES) in memory for index in range(8))
        assert load_all(store, chain) == ["host"] * 8
        assert mapping.close()
        assert store.check() == []


# -- what is refused -------------------------------------------------------------------------------------------


def memfd(num_bytes: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def test_descriptors_that_the_service_could_shrink_or_others_write_are_refused(arena: Arena) -> None:
    before = mapped_bytes("kvstore-generations")  # the arena's own, and what earlier tests left to the collector
    loose_memory, loose_words = memfd(arena.capacity_bytes, fcntl.F_SEAL_GROW), memfd(PAGE_BYTES, SIZE_SEALS)
    with tempfile.TemporaryFile() as file:
        file.truncate(arena.capacity_bytes)
        for fds, words in (
            ((loose_memory, arena.generation_fd), "memory descriptor has seals 0x4, and needs 0x6"),
            ((arena.memory_fd, loose_words), "generation descriptor has seals 0x6, and needs 0x16"),
            ((file.fileno(), arena.generation_fd), "memory descriptor is no sealed shared memory"),
            ((arena.generation_fd, arena.memory_fd), "memory descriptor has 4096 bytes, the service announced"),
        ):
            with pytest.raises(ProtocolError, match=words):
                ArenaMapping(*fds, arena.capacity_bytes)
    with pytest.raises(ProtocolError, match="has 4194304 bytes, the service announced 8388608"):
        ArenaMapping(arena.memory_fd, arena.generation_fd, 2 * arena.capacity_bytes)
    os.close(loose_memory)
    os.close(loose_words)
    assert mapped_bytes("kvstore-generations") <= before


# -- populating ------------------------------------------------------------------------------------------------


def test_a_populated_mapping_has_nothing_left_to_fault(arena: Arena) -> None:
    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes, populate=False)
    assert os.fstat(arena.memory_fd).st_blocks == 0
    assert not mapping.wait_populated(0)
    mapping.populate()
    mapping.populate()
    assert mapping.wait_populated(30)
    assert os.fstat(arena.memory_fd).st_blocks * 512 == arena.capacity_bytes
    assert mapping.close()


def test_closing_stops_populating_at_once() -> None:
    for _ in range(5):  # on a busy machine, all may be populated before this thread comes to close it
        arena = Arena(2 << 30, shared=True, prefault=False)
        mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes)
        while not os.fstat(arena.memory_fd).st_blocks:
            time.sleep(0.001)
        assert mapping.close()
        populated_bytes = os.fstat(arena.memory_fd).st_blocks * 512
        arena.close()
        if populated_bytes < 2 << 30:
            return
    pytest.fail("it was populated to its end each time")


# -- closing ---------------------------------------------------------------------------------------------------


def test_close_is_refused_while_views_are_alive_and_the_memory_goes_with_the_last(arena: Arena) -> None:
    before = mapped_bytes("kvstore-arena")
    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes)
    slot = slot_of(arena)
    view = mapping.view(slot, 4)
    array = np.frombuffer(mapping.view(slot, 4), np.uint8)
    arena.view(slot, 4)[:] = b"here"
    assert not mapping.close()
    with pytest.raises(MappingClosed, match="closed"):
        mapping.view(slot, 4)
    with pytest.raises(MappingClosed):
        mapping.generations(np.array([slot]))
    with pytest.raises(MappingClosed):
        _ = mapping.address
    view.release()
    assert not mapping.close()
    assert bytes(array) == b"here"
    assert mapped_bytes("kvstore-arena") == before + arena.capacity_bytes
    del array
    assert mapped_bytes("kvstore-arena") == before
    assert mapping.close()
    assert mapping.close()


def test_a_view_outlives_a_mapping_that_was_only_dropped(arena: Arena) -> None:
    view = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes).view(0, 4)
    gc.collect()
    arena.view(0, 4)[:] = b"kept"
    assert bytes(view) == b"kept"


def test_closing_from_one_thread_while_others_look_harms_nobody(arena: Arena) -> None:
    odd: list[BaseException] = []
    for _ in range(20):
        mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes)
        started = threading.Barrier(3)

        def look(mapping: ArenaMapping = mapping, started: threading.Barrier = started) -> None:
            started.wait()
            try:
                while True:
                    np.frombuffer(mapping.view(0, PAGE_BYTES), np.uint8).sum()
                    mapping.generations(np.array([0, PAGE_BYTES]))
            except MappingClosed:
                pass
            except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
                odd.append(error)

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        started.wait()
        mapping.close()
        for thread in threads:
            thread.join()
        assert odd == []
        assert mapping.close()


def test_abandoning_lets_the_memory_go_under_a_view_that_is_kept(arena: Arena) -> None:
    before = mapped_bytes("kvstore-arena")
    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes)
    arena.view(0, 4)[:] = b"gone"
    view = mapping.view(0, arena.capacity_bytes)
    mapping.abandon()
    assert mapped_bytes("kvstore-arena") == before
    assert bytes(view[:4]) == bytes(4)
    view[:4] = b"late"
    assert bytes(arena.view(0, 4)) == b"gone"
    with pytest.raises(MappingClosed):
        mapping.generations(np.array([0]))
    assert not mapping.close()
    view.release()
    assert mapping.close()
    mapping.abandon()


# -- forks -----------------------------------------------------------------------------------------------------

FORKED = """
import gc, mmap, os, sys
import numpy as np
from kvstore.arena import Arena
from kvstore.errors import MappingClosed
from kvstore.mapping import ArenaMapping

arena = Arena(64 << 20, shared=True, prefault=False)
mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes)
other = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes, populate=False)
view = mapping.view(0, 16 << 20)
view[:6] = b"parent"
kept = other.view(4096, 4096)

child = os.fork()
if child == 0:
    refused = 0
    for call in (
        lambda: mapping.view(0, 1), lambda: mapping.generations(np.array([0])), lambda: mapping.address,
        lambda: mapping.wait_populated(0), lambda: mapping.populate(),
    ):
        try:
            call()
        except MappingClosed as error:
            refused += "forked child" in str(error)
    assert refused == 5, refused
    assert mapping.closed and mapping.close()
    mapping.abandon()
    assert bytes(view[:6]) == bytes(6)       # neither the parent's bytes nor a fault
    view[:6] = b"child!"
    # What the child maps now must survive the end of everything it inherited.
    filled = [mmap.mmap(-1, 16 << 20) for _ in range(16)]
    for one in filled:
        one[:] = b"x" * len(one)
    del view, kept, mapping, other
    gc.collect()
    assert all(one[0] == one[-1] == ord("x") for one in filled)
    print("child ok", flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert bytes(arena.view(0, 6)) == b"parent", bytes(arena.view(0, 6))
assert bytes(view[:6]) == b"parent"
assert mapping.generations(np.array([0])).tolist() == [0]
print("parent ok")
"""


def test_a_forked_child_is_refused_and_neither_faults_nor_reaches_the_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["child ok", "parent ok"]), done.stderr


def test_a_grandchild_and_a_fork_amid_mapping_are_harmless() -> None:
    """Forks from one thread while another maps and closes: no child may find the parent's memory, or fault."""
    script = """
import os, threading
from kvstore.arena import Arena
from kvstore.mapping import ArenaMapping

arena = Arena(4 << 20, shared=True, prefault=False)
stop = threading.Event()
live = {}

def churn():
    while not stop.is_set():
        mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes, populate=False)
        live["view"] = mapping.view(0, 8)
        live.clear()
        mapping.close()

thread = threading.Thread(target=churn, daemon=True)
thread.start()
for _ in range(150):
    child = os.fork()
    if child == 0:
        with open("/proc/self/maps") as maps:
            assert maps.read().count("memfd:kvstore-arena") == 1, "not the arena's own alone"
        view = live.get("view")
        if view is not None:
            view[:] = b"children"
        grandchild = os.fork()
        if grandchild == 0:
            if view is not None:
                view[:] = b"children"
            os._exit(0)
        os._exit(os.waitpid(grandchild, 0)[1])
    status = os.waitpid(child, 0)[1]
    assert status == 0, status
stop.set()
thread.join()
assert bytes(arena.view(0, 8)) == bytes(8), bytes(arena.view(0, 8))
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


def test_who_asks_whether_it_is_populated_as_that_begins_is_answered(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginning, go_on, said = threading.Event(), threading.Event(), list[bool]()

    class Late(threading.Thread):
        def start(self) -> None:
            beginning.set()
            go_on.wait(10)
            super().start()

    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes, populate=False)
    asking = threading.Thread(target=lambda: said.append(mapping.wait_populated(10)))
    populating = threading.Thread(target=mapping.populate)
    monkeypatch.setattr(threading, "Thread", Late)
    populating.start()
    assert beginning.wait(10)
    asking.start()
    asking.join(0.1)
    go_on.set()
    asking.join(10)
    populating.join(10)
    assert said == [True]
    assert mapping.close()


# -- devices ---------------------------------------------------------------------------------------------------


class Driver:
    """What a device's driver knows of memory, on paper."""

    def __init__(self) -> None:
        self.known: list[Registered] = []
        self.told: list[str] = []

    def register(self, memory: memoryview) -> Registered:
        self.told.append(f"registered {memory.nbytes}")
        return Registered(self, memory)


class Registered:
    def __init__(self, driver: Driver, memory: memoryview) -> None:
        self.memory: memoryview | None = memory
        self._driver = driver
        driver.known.append(self)

    def close(self) -> None:
        assert self.memory is not None
        bytes(self.memory[:1])  # a segmentation fault, where it was unmapped before this
        self.memory = None
        self._driver.known.remove(self)
        self._driver.told.append("unregistered")


def test_registered_memory_is_unregistered_and_then_unmapped_when_no_view_is_left(arena: Arena) -> None:
    before = mapped_bytes("kvstore-arena")
    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes, populate=False)
    driver = Driver()
    assert mapping.register(driver.register)
    assert mapping.register(driver.register)
    assert driver.told == [f"registered {arena.capacity_bytes}"]
    view = mapping.view(0, 4096)
    assert not mapping.close()
    assert len(driver.known) == 1, "a copy may be under way: it has a view"
    view.release()
    assert mapping.close()
    assert driver.told[1:] == ["unregistered"]
    assert mapped_bytes("kvstore-arena") == before
    assert not mapping.register(driver.register)


def test_memory_of_a_mapping_that_nobody_asks_any_more_is_unregistered_with_its_last_view(arena: Arena) -> None:
    before = mapped_bytes("kvstore-arena")
    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes, populate=False)
    driver = Driver()
    mapping.register(driver.register)
    view = mapping.view(0, 4096)
    assert not mapping.close()
    del mapping
    assert len(driver.known) == 1
    del view
    assert eventually(lambda: not driver.known and mapped_bytes("kvstore-arena") == before)


def test_memory_is_unregistered_once_it_was_closed_or_abandoned_whoever_began_it(arena: Arena) -> None:
    """The last view goes on one thread, which begins it, while another closes or abandons what it takes for let go."""

    class Slow(Registered):
        def close(self) -> None:
            begun.set()
            go_on.wait(10)
            super().close()

    for end in (ArenaMapping.close, ArenaMapping.abandon):
        begun, go_on = threading.Event(), threading.Event()
        mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes, populate=False)
        driver = Driver()
        mapping.register(lambda memory, driver=driver: Slow(driver, memory))  # type: ignore[misc]
        view = mapping.view(0, 4096)
        assert not mapping.close()
        del view
        assert begun.wait(10)
        ending = threading.Thread(target=end, args=(mapping,))
        ending.start()
        ending.join(0.1)
        assert ending.is_alive()
        go_on.set()
        ending.join(10)
        assert driver.known == []


def test_a_mapping_for_reading_only_is_registered_with_no_device(arena: Arena) -> None:
    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes, writable=False, populate=False)
    driver = Driver()
    assert not mapping.register(driver.register)
    assert driver.told == []
    assert mapping.close()


def test_abandoned_memory_is_unregistered_first(arena: Arena) -> None:
    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes, populate=False)
    driver = Driver()
    mapping.register(driver.register)
    mapping.abandon()
    assert driver.known == []
    assert mapping.close()
