# SPDX-License-Identifier: Apache-2.0
"""Processes that die, stop and come back: who else notices, and what is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.block import Chain, Root
from kvstore.errors import LeaseExpired
from kvstore.marks import MARK_TTL_S
from kvstore.service.client import SidecarStore
from kvstore.service.server import Server
from tests.conftest import chain_of, content, load_all, save_all
from tests.patient import connect
from tests.service.conftest import ROOT, ServerProcess, StartServer
from tests.service.victims import MODEL, Victim
from tests.waiting import wait_until

pytestmark = pytest.mark.slow  # processes that are killed and started again

SHARED = chain_of(Root(MODEL), 8, seed=0)


@pytest.fixture
def server(start_server: StartServer) -> Server:
    return start_server(2048)  # room for all that victims save: nothing here is to be evicted


@pytest.fixture
def store(server: Server) -> Iterator[SidecarStore]:
    with connect(server.address) as client:
        client.open(MODEL)
        save_all(client, SHARED)
        yield client


def nothing_is_held(server: Server) -> bool:
    """Whether nobody but this test's own client is there, and nobody holds anything."""
    stats = server.stats()
    gauges = ("lease.live", "save.quarantined_slots", "host.pinned_blocks", "marks.live")
    return len(server.sessions) == 1 and all(stats[name] == 0 for name in gauges)


@pytest.mark.alone
def test_what_a_killed_producer_was_computing_is_a_miss_before_its_mark_would_lapse(
    server: Server, store: SidecarStore
) -> None:
    victim = Victim(server.address, "announce", 7)
    assert victim.said() == "under way"
    chain = chain_of(Root(MODEL), 8, seed=7)
    wait_until(lambda: store.match(chain, "waits").num_pending_blocks == 8)
    began_s = time.monotonic()
    victim.kill()
    wait_until(lambda: store.match(chain, "waits").num_pending_blocks == 0)
    assert time.monotonic() - began_s < 0.8 * MARK_TTL_S
    store.forget("waits")


@pytest.mark.parametrize("what", ["save", "load", "match"])
def test_a_client_killed_in_mid_work_leaves_nothing_behind(server: Server, store: SidecarStore, what: str) -> None:
    used = server.stats()["host.used_bytes"]
    victim = Victim(server.address, what, 7)
    assert victim.said() == "under way"
    assert not nothing_is_held(server)
    chain = chain_of(Root(MODEL), 8, seed=7)
    assert store.match(chain, "r").num_blocks == 0, "half written is not there"
    store.forget("r")
    victim.kill()
    # A session is out of the book before what it was writing is given back.
    wait_until(lambda: nothing_is_held(server) and server.stats()["host.used_bytes"] == used)
    assert server.check() == []
    assert save_all(store, chain) == 8
    assert load_all(store, chain) == ["host"] * 8


def test_two_hundred_clients_killed_at_any_moment_leave_nothing_behind(server: Server, store: SidecarStore) -> None:
    rng = random.Random(5)
    waiting = [Victim(server.address, "commit", 1000 + number) for number in range(3)]
    for number in range(200):
        victim = waiting.pop(0)
        waiting.append(Victim(server.address, rng.choice(["commit", "commit", "save", "load"]), 2000 + number))
        for _ in range(rng.randrange(1, 4)):
            if victim.said() == "under way":
                break
        time.sleep(rng.random() * 0.002)
        victim.kill()
        if number % 20 == 0:
            assert server.check() == []
            assert load_all(store, SHARED, request=str(number)) == ["host"] * 8
    for victim in waiting:
        victim.kill()
    wait_until(lambda: nothing_is_held(server))
    assert server.check() == []
    for number in range(200):  # whatever is matchable is whole
        load_all(store, chain_of(Root(MODEL), 8, seed=2000 + number), request=f"whole/{number}")
    assert store.clear() > 0
    wait_until(lambda: server.stats()["host.used_bytes"] == 0)


def test_a_block_that_a_dead_client_was_writing_can_be_saved_by_another(server: Server, store: SidecarStore) -> None:
    used = server.stats()["host.used_bytes"]
    victim = Victim(server.address, "save", 9)
    assert victim.said() == "under way"
    chain = chain_of(Root(MODEL), 8, seed=9)
    with store.save(chain, 0, 8) as save:
        assert save.indices == (), "somebody is at it"
    victim.kill()
    wait_until(lambda: server.stats()["host.used_bytes"] == used)
    assert save_all(store, chain) == 8


def test_slots_of_a_stopped_client_are_fenced_and_a_late_write_harms_nobody(
    start_server: StartServer,
) -> None:
    server = start_server(12, request={"lease_s": 1.0})
    with connect(server.address) as store:
        store.open(MODEL)
        victim = Victim(server.address, "save", 9)
        assert victim.said() == "under way"
        victim.signal(signal.SIGSTOP)
        wait_until(lambda: server.stats()["save.quarantined_slots"] == 8)
        chain = chain_of(Root(MODEL), 8, seed=9)
        assert save_what_fits(store, chain) == 4, "its slots are nobody's, though its blocks may be saved"
        assert load_all(store, chain) == ["host"] * 4
        victim.signal(signal.SIGCONT)
        victim.kill()
        wait_until(lambda: server.stats()["save.quarantined_slots"] == 0)
        assert server.check() == []
        assert save_all(store, chain, 4) == 4


def test_a_client_that_goes_on_writing_long_after_its_save_ended_harms_nobody(start_server: StartServer) -> None:
    server = start_server(24, request={"lease_s": 1.0})
    with connect(server.address) as store:
        store.open(MODEL)
        victim = Victim(server.address, "scribble", 9)
        assert victim.said() == "under way"
        victim.signal(signal.SIGSTOP)
        wait_until(lambda: server.stats()["save.quarantined_slots"] == 8)
        victim.signal(signal.SIGCONT)  # it writes again, to slots that are nobody's by now
        chain = chain_of(Root(MODEL), 16, seed=9)
        assert save_what_fits(store, chain) == 16
        for turn in range(50):
            assert load_all(store, chain, request=str(turn)) == ["host"] * 16
        assert server.stats()["save.quarantined_slots"] == 8, "it lives"
        victim.kill()
        wait_until(lambda: server.stats()["save.quarantined_slots"] == 0)
        assert server.check() == []


def save_what_fits(store: SidecarStore, chain: Chain) -> int:
    with store.save(chain, 0, len(chain)) as save:
        for index in save.indices:
            view = save.views(index)[0]
            assert view is not None
            view[:] = content(chain, index, 0, len(view))
        return save.commit()


# -- the server ------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_callers_of_a_stopped_server_give_up_at_the_deadline_and_then_at_once(
    start_process: Callable[..., ServerProcess],
) -> None:
    process = start_process()
    with connect(process.address, call_deadline_s=0.5) as store:
        store.open(MODEL)
        save_all(store, SHARED)
        process.signal(signal.SIGSTOP)
        began = time.monotonic()
        assert store.match(SHARED, "r").num_blocks == 0
        assert 0.4 < time.monotonic() - began < 5
        costs_s = []
        for _ in range(100):
            began = time.monotonic()
            assert store.match(SHARED, "r").num_blocks == 0
            costs_s.append(time.monotonic() - began)
        assert sorted(costs_s)[95] < 0.1, "only the first one waits"
        process.signal(signal.SIGCONT)
        wait_until(lambda: store.is_up)
        assert load_all(store, SHARED, request="back") == ["host"] * 8, "the same session, and nothing is lost"


@pytest.mark.alone
def test_a_load_from_a_stopped_server_ends_in_time(start_process: Callable[..., ServerProcess]) -> None:
    process = start_process()
    with connect(process.address, call_deadline_s=0.5) as store:
        store.open(MODEL)
        save_all(store, SHARED)
        store.match(SHARED, "r")
        process.signal(signal.SIGSTOP)
        began = time.monotonic()
        with store.load("r") as load:
            assert list(load) == []
        assert time.monotonic() - began < 5
        process.signal(signal.SIGCONT)
        wait_until(lambda: store.is_up)
        wait_until(lambda: store.stats()["lease.live"] == 0)


def test_a_server_killed_under_load_is_a_miss_for_all_and_they_recover(
    start_process: Callable[..., ServerProcess],
) -> None:
    process = start_process(256)
    stop = threading.Event()
    longest: list[float] = []
    failures: list[BaseException] = []
    loaded_since: dict[int, int] = {}

    def work(number: int) -> None:
        try:
            with connect(process.address, call_deadline_s=1.0) as store:
                store.open(MODEL)
                chain = chain_of(Root(MODEL), 8, seed=number)
                turn = 0
                while not stop.is_set():
                    turn += 1
                    began = time.monotonic()
                    save_unless_gone(store, chain)
                    num_loaded = len(load_unless_gone(store, chain, f"{turn}"))
                    longest.append(time.monotonic() - began)
                    loaded_since[number] = loaded_since.get(number, 0) + num_loaded
        except BaseException as error:  # noqa: BLE001 a thread's top
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        loaded_since.clear()
        wait_until(lambda: len(loaded_since) == 4 and all(loaded_since.values()), 60)
        process.kill()
        time.sleep(0.2)
        process.start()
    loaded_since.clear()
    wait_until(lambda: len(loaded_since) == 4 and all(loaded_since.values()), 60)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert max(longest) < 20.0, "four calls, each within its deadline"


def save_unless_gone(store: SidecarStore, chain: Chain) -> None:
    try:
        save_what_fits(store, chain)
    except LeaseExpired:
        pass  # the server it was for is gone


def load_unless_gone(store: SidecarStore, chain: Chain, request: str) -> list[str]:
    """Compares bytes of what is there; a load cut short is a shorter hit."""
    store.match(chain, request)
    tiers: list[str] = []
    with store.load(request) as load:
        for block in load:
            data = bytes(block.views[0])
            if load.intact():
                assert data == content(chain, block.index, 0, len(data))
            tiers.append(block.tier)
    return tiers


def test_the_socket_of_a_killed_server_is_taken_over_and_that_of_a_living_one_is_not(
    start_process: Callable[..., ServerProcess], directory: Path
) -> None:
    process = start_process()
    assert os.stat(directory / "kvstore.sock").st_mode & 0o777 == 0o600
    second = subprocess.run(
        [sys.executable, "-m", "tests.service.serving", str(directory), "8", "{}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert "another service runs at" in second.stderr
    with connect(process.address) as store:
        assert store.check() == [], "the first one serves on"
    process.kill()
    assert (directory / "kvstore.sock").exists(), "it had no time to remove it"
    process.start()
    with connect(process.address) as store:
        assert store.check() == []
