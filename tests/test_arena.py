# SPDX-License-Identifier: Apache-2.0
"""Slots of several sizes: no overlap, no loss, memory that changes hands, and memory shared with other processes."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.arena import PAGE_BYTES, Arena
from kvstore.errors import CapacityError, ConfigError
from kvstore.mapping import ArenaMapping
from tests.descriptors import descriptors


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


def test_memory_that_changes_size_class_changes_the_generation_of_every_page_at_once() -> None:
    """Small slots may begin inside a large one: who still copies from it looks at the word of its first page."""
    arena = Arena(64 * PAGE_BYTES, prefault=False)
    large = [slot for _ in range(8) if (slot := arena.acquire(8 * PAGE_BYTES)) is not None]
    before = arena.generation.copy()
    for slot in large:
        arena.release(slot)
    assert (arena.generation == before).all()
    assert arena.acquire(PAGE_BYTES) is not None
    assert (arena.generation != before).all()


# -- shared ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[Arena]:
    arena = Arena(8 << 20, shared=True, prefault=False)
    yield arena
    assert arena.check() == []
    arena.close()


def run_client(script: str, *fds: int) -> str:
    """What another process prints that inherited `fds` and is told their numbers."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, fds)], pass_fds=fds, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return done.stdout.strip()


def test_a_private_arena_has_no_descriptors_and_a_shared_one_none_after_close() -> None:
    with pytest.raises(ConfigError, match="shared=True"):
        _ = Arena(PAGE_BYTES, prefault=False).memory_fd
    before = descriptors()
    arena = Arena(PAGE_BYTES, prefault=False, shared=True)
    assert os.fstat(arena.memory_fd).st_size == PAGE_BYTES
    assert not os.get_inheritable(arena.memory_fd)
    arena.close()
    arena.close()
    assert descriptors() <= before
    with pytest.raises(ConfigError):
        _ = arena.generation_fd


def test_another_process_sees_and_writes_the_same_bytes(shared: Arena) -> None:
    slot = shared.acquire(PAGE_BYTES)
    assert slot is not None
    shared.view(slot, 4)[:] = b"ours"
    script = (
        "import mmap, sys; fd, slot = int(sys.argv[1]), " + str(slot) + "\n"
        "memory = mmap.mmap(fd, 0, mmap.MAP_SHARED)\n"
        "print(memory[slot:slot + 4]); memory[slot:slot + 6] = b'theirs'"
    )
    assert run_client(script, shared.memory_fd) == "b'ours'"
    assert bytes(shared.view(slot, 6)) == b"theirs"


def test_a_client_that_truncates_grows_or_seals_is_refused_and_the_arena_lives_on(shared: Arena) -> None:
    script = (
        "import fcntl, os, sys\n"
        "for fd in map(int, sys.argv[1:]):\n"
        "    for attempt in (lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 30),\n"
        "                    lambda: os.ftruncate(os.open(f'/proc/self/fd/{fd}', os.O_RDWR), 0),\n"
        "                    lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)):\n"
        "        try: attempt()\n"
        "        except PermissionError: print('EPERM')\n"
        "        else: print('done')\n"
    )
    assert run_client(script, shared.memory_fd, shared.generation_fd).split() == ["EPERM"] * 8
    slot = shared.acquire(PAGE_BYTES)
    assert slot is not None
    shared.view(slot, PAGE_BYTES)[:] = bytes([7]) * PAGE_BYTES  # a shrunk memfd would end this process with SIGBUS
    assert shared.generation_of(slot) == 1


def test_a_client_can_read_generation_words_and_never_write_them(shared: Arena) -> None:
    slot = shared.acquire(PAGE_BYTES)
    assert slot is not None
    script = (
        "import ctypes, mmap, os, sys\n"
        "fd = int(sys.argv[1])\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "words = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)\n"
        "print(int.from_bytes(words[0:4], 'little'))\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "address = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)\n"
        "libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE)\n"
        "print(os.strerror(ctypes.get_errno()))\n"
        "for attempt in (lambda: mmap.mmap(fd, 0, mmap.MAP_SHARED), lambda: os.pwrite(fd, b'1', 0)):\n"
        "    try: attempt()\n"
        "    except PermissionError as error: print(error.strerror)\n"
        "    else: print('done')\n"
    )
    lines = run_client(script, shared.generation_fd).splitlines()
    assert lines == ["1", "Permission denied", "Operation not permitted", "Operation not permitted"]
    shared.release(slot)
    assert shared.acquire(PAGE_BYTES) == slot
    assert shared.generation_of(slot) == 2  # the arena itself still writes them


def test_prefault_of_a_shared_arena_keeps_what_was_written_and_leaves_nothing_to_fault() -> None:
    arena = Arena(24 << 20, shared=True)
    slot = arena.acquire(PAGE_BYTES)
    assert slot is not None
    arena.view(slot, 4)[:] = b"kept"
    assert arena.wait_prefaulted(30)
    assert bytes(arena.view(slot, 4)) == b"kept"
    assert os.fstat(arena.memory_fd).st_blocks * 512 == 24 << 20
    arena.close()


def test_the_size_of_dev_shm_does_not_matter() -> None:
    """128 MiB are written in a mount namespace whose /dev/shm has 1 MiB."""
    unshare = shutil.which("unshare")
    script = (
        "import numpy as np\n"
        "from kvstore.arena import Arena\n"
        "arena = Arena(128 << 20, shared=True, prefault=False)\n"
        "np.frombuffer(arena.view(0, 128 << 20), np.uint8)[:] = 1\n"
        "try: open('/dev/shm/full', 'wb', buffering=0).write(bytes(2 << 20)) == 2 << 20 or print('/dev/shm is full')\n"
        "except OSError as error: print('/dev/shm is full')\n"
    )
    if unshare is None or subprocess.run([unshare, "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    shell = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" -c "$1"'
    done = subprocess.run(
        [unshare, "-m", "sh", "-c", shell, sys.executable, script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "/dev/shm is full"), done.stderr


def test_reserved_huge_pages_that_are_not_there_are_refused_with_what_helps() -> None:
    free = re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())
    if free is None or int(free[1]):
        pytest.skip("this host has huge pages reserved")
    for shared in (False, True):
        before = descriptors()
        with pytest.raises(CapacityError, match=r"vm\.nr_hugepages"):
            Arena(4 << 20, huge_pages=True, shared=shared, prefault=False)
        assert descriptors() <= before


def test_reserved_huge_pages_serve_an_arena_and_its_clients_alike() -> None:
    free = re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())
    if free is None or int(free[1]) < 4:
        pytest.skip("needs huge pages: sysctl vm.nr_hugepages=8")
    private = Arena(5 << 20, huge_pages=True)
    assert private.wait_prefaulted(10)
    assert private.capacity_bytes == 4 << 20  # whole huge pages
    private.view(0, 4)[:] = b"mine"
    private.close()
    del private
    arena = Arena(5 << 20, huge_pages=True, shared=True)
    assert arena.wait_prefaulted(10)
    mapping = ArenaMapping(arena.memory_fd, arena.generation_fd, arena.capacity_bytes)
    assert mapping.wait_populated(10)
    mapping.view(0, 4)[:] = b"ours"
    assert bytes(arena.view(0, 4)) == b"ours"
    with pytest.raises(PermissionError):
        os.ftruncate(arena.memory_fd, 0)
    assert mapping.close()
    arena.close()


def test_a_pinned_arena_is_locked_and_one_above_the_limit_refused_with_what_helps() -> None:
    script = (
        "import os, re, resource\n"
        "from kvstore.arena import Arena\n"
        "from kvstore.errors import CapacityError\n"
        "locked = lambda: int(re.search(r'VmLck:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "arena = Arena(4 << 20, shared=True, prefault=False)\n"
        "arena.pin()\n"
        "print(locked())\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))\n"
        "if os.geteuid() == 0: os.setuid(4242)\n"
        "try: Arena(16 << 20, shared=True, prefault=False).pin()\n"
        "except CapacityError as error: print(error)\n"
    )
    lines = run_client(script).splitlines()
    assert lines[0] == "4096"
    assert "cannot lock the arena's 16777216 bytes" in lines[1]
    assert "LimitMEMLOCK" in lines[1]


def test_memory_goes_with_the_last_view_and_not_before() -> None:
    arena = Arena(4 << 20, prefault=False)
    address = arena._memory.address
    view = np.frombuffer(arena.view(0, 8), np.uint8)
    arena.close()
    del arena
    assert _is_mapped(address)
    assert view.sum() == 0
    del view
    assert not _is_mapped(address)


def _is_mapped(address: int) -> bool:
    spans = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.M)
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in spans)
