# SPDX-License-Identifier: Apache-2.0
"""What the local client does beyond being a store: it shares leases, comes back, and keeps out of forks."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import NoReturn, cast

import grpc
import pytest

import kvstore
from kvstore.api import GivesRun, Store
from kvstore.block import Chain, Root
from kvstore.errors import AccessDenied, ConfigError, LeaseError, ProtocolError, ServiceUnavailable
from kvstore.service import handshake
from kvstore.service.admin import Admin, Target
from kvstore.service.client import SidecarStore
from kvstore.service.lane import LaneError
from kvstore.service.mapped import MappedLoad, MappedPlane
from kvstore.service.mapped_save import MappedSave
from kvstore.service.plane import DataPlane
from kvstore.service.server import Server
from tests.conftest import chain_of, content, load_all, save_all
from tests.fakes import DictTier
from tests.patient import connect
from tests.service.conftest import ServerProcess, StartServer
from tests.test_conformance import tier_with
from tests.waiting import wait_until

SPAWN = multiprocessing.get_context("spawn")


def connected(server: Server, root: Root, **options: float) -> SidecarStore:
    store = connect(server.address, **options)
    store.open(root.model)
    return store


# -- connecting ------------------------------------------------------------------------------------------------


def test_kvstore_connect_is_the_client() -> None:
    assert kvstore.connect is kvstore.service.connect.connect


@pytest.mark.alone
def test_nobody_at_the_address_is_a_clear_error_and_takes_no_longer_than_asked(directory: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ServiceUnavailable, match=r"no server answers at unix:.*kvstore serve"):
        connect(f"unix:{directory}/nobody.sock", wait_s=0.3)
    assert time.monotonic() - began < 3


def test_a_server_that_starts_late_is_waited_for(start_server: StartServer, directory: Path) -> None:
    starting = threading.Timer(0.3, start_server)
    starting.start()
    with connect(f"unix:{directory}/kvstore.sock", wait_s=20) as store:
        assert store.is_up
    starting.join()


def test_memory_of_a_server_elsewhere_cannot_be_mapped() -> None:
    with pytest.raises(ConfigError, match="only a server on a Unix socket of this host can be mapped"):
        connect("127.0.0.1:1", mapped=True)


def test_a_client_that_hashes_otherwise_is_refused_naming_both(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    from kvstore.service import connection

    monkeypatch.setattr(connection, "hash_vector", lambda: b"x" * 32)
    with pytest.raises(ProtocolError, match="hashes blocks to other ids .* run the same version"):
        connect(server.address)
    monkeypatch.undo()
    monkeypatch.setattr(connection, "PROTOCOL_VERSIONS", (99,))
    with pytest.raises(ProtocolError, match=r"speaks protocol versions \[1\], the client \[99\]"):
        connect(server.address)
    assert handshake.PROTOCOL_VERSIONS == (1,)


def test_a_wrong_cluster_secret_is_a_clear_error(start_server: StartServer, directory: Path, root: Root) -> None:
    secret = directory / "secret"
    secret.write_bytes(b"s" * 32)
    secret.chmod(0o600)
    server = start_server(service={"secret_file": str(secret)})
    with connected(server, root) as store:
        with pytest.raises(ProtocolError, match="both sides need the same cluster secret"):
            store.match(chain_of(root, 2), "r")
        keyed = Root(root.model, secret=b"s" * 32)
        save_all(store, chain_of(keyed, 2))
        assert load_all(store, chain_of(keyed, 2)) == ["host"] * 2


# -- what travels ----------------------------------------------------------------------------------------------


def test_a_chain_that_the_server_dropped_is_sent_whole_again(start_server: StartServer, root: Root) -> None:
    server = start_server()
    with connected(server, root) as store:
        chain = chain_of(root, 6)
        save_all(store, chain)
        assert store.match(chain, "r").num_blocks == 6
        for session in server.sessions.all():
            session.chains.drop_all()
        assert store.match(chain, "r").num_blocks == 6
        store.forget("r")


def test_the_next_turn_sends_new_hashes_only(start_server: StartServer, root: Root) -> None:
    with connected(start_server(), root) as store:
        chain = chain_of(root, 40)
        save_all(store, chain)
        connection = store._link.up()
        delta, num_blocks = connection.delta(chain, whole=False)
        assert (delta.num_known, len(delta.ids), num_blocks) == (40, 0, 40)
        chain.extend(range(32))
        delta, num_blocks = connection.delta(chain, whole=False)
        assert (delta.num_known, len(delta.ids), num_blocks) == (40, 64, 42)


# -- several processes of one engine ---------------------------------------------------------------------------


def copy_shared(address: str, shared: bytes, pipe: Pipe) -> None:
    """A worker: copies under its scheduler's lease."""
    with connect(address) as store, store.adopt(shared) as load:
        held = [bytes(view) for block in load for view in block.views]
        assert isinstance(load, GivesRun)
        run = load.run()
        assert run is not None
        assert held == [bytes(run.memory[at : at + 4096]) for (at,) in run.offsets.tolist()]
        assert (run.start, run.tier, run.memory.readonly) == (0, "host", True)
        pipe.send(held)
        pipe.send(load.intact())
        pipe.recv()
        pipe.send(load.intact())


def test_a_worker_copies_under_the_schedulers_lease_and_sees_when_it_ends(
    start_server: StartServer, root: Root
) -> None:
    server = start_server(8)
    with connected(server, root) as store:
        chain = chain_of(root, 4)
        save_all(store, chain)
        store.match(chain, "r")
        load = store.load("r", 3)
        assert isinstance(load, MappedLoad)
        here, there = SPAWN.Pipe()
        worker = SPAWN.Process(target=copy_shared, args=(server.address, load.share(), there))
        worker.start()
        assert here.recv() == [content(chain, index, 0, 4096) for index in range(3)]
        assert here.recv() is True
        load.close()
        for seed in range(1, 4):
            save_all(store, chain_of(root, 4, seed=seed))  # takes the slots for other blocks
        here.send("look again")
        assert here.recv() is False
        worker.join(20)
        assert worker.exitcode == 0


def fill_shared(address: str, shared: bytes, payload: list[bytes], pipe: Pipe) -> None:
    """A worker: writes to its scheduler's save."""
    store = connect(address)
    with store.adopt_save(shared) as save:
        for index, data in zip(save.indices, payload, strict=True):
            view = save.views(index)[0]
            assert view is not None
            view[:] = data
        pipe.send("filled")
        pipe.recv()
    del view
    pipe.send("left")
    pipe.recv()
    store.close()


@pytest.fixture
def sharing(start_server: StartServer, root: Root) -> tuple[Server, SidecarStore]:
    server = start_server(4)
    return server, connected(server, root)


def test_a_worker_fills_what_the_scheduler_commits(sharing: tuple[Server, SidecarStore], root: Root) -> None:
    server, store = sharing
    chain = chain_of(root, 2)
    save = store.save(chain, 0, 2)
    assert isinstance(save, MappedSave)
    here, there = SPAWN.Pipe()
    payload = [content(chain, index, 0, 4096) for index in range(2)]
    worker = SPAWN.Process(target=fill_shared, args=(server.address, save.share(), payload, there))
    worker.start()
    assert here.recv() == "filled"
    assert save.commit() == 2
    assert load_all(store, chain) == ["host"] * 2
    for _ in range(2):
        here.send("go on")
    worker.join(20)
    store.close()


@pytest.mark.parametrize("how", ["leaves", "dies"])
def test_slots_of_an_aborted_save_wait_for_the_worker_that_still_writes(
    sharing: tuple[Server, SidecarStore], root: Root, how: str
) -> None:
    server, store = sharing
    chain = chain_of(root, 3)
    save = store.save(chain, 0, 3)
    assert isinstance(save, MappedSave)
    here, there = SPAWN.Pipe()
    payload = [content(chain, index, 0, 4096) for index in range(3)]
    worker = SPAWN.Process(target=fill_shared, args=(server.address, save.share(), payload, there))
    worker.start()
    assert here.recv() == "filled"
    save.abort()
    assert store.match(chain, "r").num_blocks == 0
    wait_until(lambda: server.stats()["save.quarantined_slots"] == 3)
    with store.save(chain, 0, 3) as again:
        assert (len(again.indices), again.num_refused) == (1, 2), "one slot of four is left"
    if how == "leaves":
        here.send("go on")
        assert here.recv() == "left"
    else:
        worker.kill()
    wait_until(lambda: server.stats()["save.quarantined_slots"] == 0)
    wait_until(lambda: server.stats()["host.used_bytes"] == 0)  # it has heard of the end of the second save as well
    store.forget("r")
    assert save_all(store, chain) == 3
    worker.kill()
    worker.join(20)
    store.close()


def test_a_save_that_ended_cannot_be_joined(sharing: tuple[Server, SidecarStore], root: Root) -> None:
    server, store = sharing
    save = store.save(chain_of(root, 1), 0, 1)
    assert isinstance(save, MappedSave)
    shared = save.share()
    save.abort()
    wait_until(lambda: server.stats()["host.used_bytes"] == 0)  # it has heard of the abort
    with pytest.raises(LeaseError, match="it ended"):
        store.adopt_save(shared)
    store.close()


# -- what goes wrong after the server has answered -------------------------------------------------------------


class Unfit:
    """A plane that can make nothing of what the server gives."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    def __getattr__(self, name: str) -> object:
        return getattr(self._plane, name)

    def load(self, *_: object) -> NoReturn:
        raise ProtocolError("no load is like that")

    def save(self, *_: object) -> NoReturn:
        raise ProtocolError("no save is like that")


def test_slots_of_a_save_whose_grant_is_no_good_come_back_and_so_does_the_hold_of_a_load(
    start_server: StartServer, root: Root
) -> None:
    """Those of a save would be out as long as the client lives: nobody else knows whether it writes to them."""
    server = start_server(request={"hold_s": 60.0})
    with connected(server, root) as store:
        chain = chain_of(root, 4)
        save_all(store, chain)
        used_bytes = server.stats()["host.used_bytes"]
        connection = store._link.up()
        connection.plane, plane = cast(DataPlane, Unfit(connection.plane)), connection.plane
        with pytest.raises(ProtocolError, match="no save"):
            store.save(chain_of(root, 4, seed=1), 0, 4)
        store.match(chain, "r")
        assert server.stats()["host.pinned_blocks"] == 4
        with pytest.raises(ProtocolError, match="no load"):
            store.load("r")
        connection.plane = plane
        wait_until(lambda: server.stats()["host.used_bytes"] == used_bytes)
        wait_until(lambda: server.stats()["host.pinned_blocks"] == 0)


def test_a_save_whose_commit_was_not_answered_ends_all_the_same(start_server: StartServer, root: Root) -> None:
    """The server may not have heard it, and would keep its blocks from everybody as long as the client lives."""
    server = start_server()
    with connected(server, root) as store:
        stub, chain = store._link.up().stub, chain_of(root, 3)
        commit = stub.Commit

        def unanswered(request: object, timeout: float) -> NoReturn:
            stub.Commit = commit
            raise LaneError(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time")

        stub.Commit = unanswered
        with store.save(chain, 0, 3) as save:
            assert save.commit(0) == 0
            wait_until(lambda: store.is_up)
            assert save.commit() == 0, "they lack their parent"
        wait_until(lambda: server.stats()["host.used_bytes"] == 0)
        assert save_all(store, chain) == 3


# -- forks -----------------------------------------------------------------------------------------------------


def in_a_fork(what: Callable[[], object]) -> str:
    """What a forked child made of it: an error's text, or what was returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = repr(what())
        except BaseException as error:  # noqa: BLE001 a process's top
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_is_refused_and_the_parent_goes_on(client: SidecarStore, root: Root) -> None:
    client.open(root.model)
    chain = chain_of(root, 3)
    save_all(client, chain)
    client.match(chain, "r")
    save = client.save(chain_of(root, 2, seed=5), 0, 2)
    calls: dict[str, Callable[[], object]] = {
        "match": lambda: client.match(chain, "r"),
        "load": lambda: client.load("r"),
        "save": lambda: client.save(chain, 0, 3),
        "forget": lambda: client.forget("r"),
        "stats": lambda: client.stats(),
        "check": lambda: client.check(),
        "open": lambda: client.open(root.model),
        "commit": lambda: save.commit(),
    }
    for name, call in calls.items():
        assert "inherited by its forked child" in in_a_fork(call), name
    assert in_a_fork(client.close) == "None"
    save.abort()
    with client.load("r") as load:
        assert [block.index for block in load] == [0, 1, 2]
        assert load.intact()


# -- the server goes away and comes back -----------------------------------------------------------------------


@pytest.mark.alone
def test_while_the_server_is_away_everything_is_a_miss_at_once(
    start_process: Callable[..., ServerProcess], root: Root
) -> None:
    process = start_process()
    with connect(process.address) as store:
        store.open(root.model)
        chain = chain_of(root, 4)
        save_all(store, chain)
        process.kill()
        wait_until(lambda: not store.is_up)
        began = time.monotonic()
        for _ in range(200):
            assert_everything_is_a_miss(store, chain)
        assert time.monotonic() - began < 5
        assert store.stats()["client.failures.down"] >= 200
        assert "is away" in store.check()[0]
        with pytest.raises(ServiceUnavailable, match="nothing may have been cleared"):
            store.clear(root.id)


def assert_everything_is_a_miss(store: Store, chain: Chain) -> None:
    match = store.match(chain, "r")
    assert (match.num_blocks, match.num_pending_blocks, match.settled) == (0, 0, True)
    with store.load("r") as load:
        assert list(load) == []
        assert not load.intact()
    with store.save(chain, 0, len(chain)) as save:
        assert (tuple(save.indices), save.num_refused) == ((), len(chain))
        assert save.commit() == 0
    store.announce(chain, 0, len(chain)).withdraw()
    store.touch(chain, 2)
    store.forget("r")


def test_a_client_comes_back_by_itself_with_its_models(start_process: Callable[..., ServerProcess], root: Root) -> None:
    process = start_process()
    with connect(process.address) as store:
        store.open(root.model)
        chain = chain_of(root, 4)
        for _ in range(2):
            assert save_all(store, chain) == 4
            assert load_all(store, chain) == ["host"] * 4
            process.kill()
            process.start()
            wait_until(lambda: store.is_up and store.match(chain, "gone").settled)
            assert store.match(chain, "gone").num_blocks == 0, "another start of the server has nothing"
            store.forget("gone")


def test_what_was_begun_with_the_server_before_ends_as_a_miss(
    start_process: Callable[..., ServerProcess], root: Root
) -> None:
    process = start_process()
    with connect(process.address) as store:
        store.open(root.model)
        chain = chain_of(root, 4)
        save_all(store, chain)
        store.match(chain, "held")
        store.match(chain, "loading")
        load = store.load("loading")
        save = store.save(chain_of(root, 2, seed=1), 0, 2)
        process.kill()
        wait_until(lambda: not store.is_up)
        process.start()
        wait_until(lambda: store.is_up)
        with load:
            assert list(load) == []
            assert not load.intact()
        assert list(store.load("held")) == []
        with save, pytest.raises(LeaseError, match="the server that this save was for is gone"):
            save.views(0)
        assert save_all(store, chain) == 4
        assert load_all(store, chain) == ["host"] * 4


def test_views_that_are_still_out_stay_good_when_the_server_is_gone(
    start_process: Callable[..., ServerProcess], root: Root
) -> None:
    process = start_process()
    with connect(process.address) as store:
        store.open(root.model)
        chain = chain_of(root, 1)
        save_all(store, chain)
        store.match(chain, "r")
        load = store.load("r")
        (block,) = load
        process.kill()
        wait_until(lambda: not store.is_up)
        assert bytes(block.views[0]) == content(chain, 0, 0, 4096)
        load.close()


def test_slots_that_a_client_may_still_be_writing_to_are_nobodys_though_it_has_a_new_session(
    start_server: StartServer, root: Root
) -> None:
    """It has views of them for longer than its link waits. Another client's blocks would lie under its pen."""
    server = start_server(8)
    with connected(server, root) as store:
        save = store.save(chain_of(root, 3), 0, 3)
        views = [save.views(index)[0] for index in save.indices]
        (before,) = server.sessions.all()
        store._link._unmap_from_s = time.monotonic() - 60
        store._link._lose(store._link.up(), "a test")
        wait_until(lambda: store.is_up)
        assert [session.ended for session in (before, *server.sessions.all())] == [False] * 3
        with store.save(chain_of(root, 8, seed=1), 0, 8) as other:
            assert len(other.indices) == 5
        for view in views:
            assert view is not None
            view[:] = bytes(len(view))
        server.sessions.leave(before)


def test_a_draining_server_finishes_what_was_begun_and_takes_nothing_new(start_server: StartServer, root: Root) -> None:
    server = start_server()
    store = connected(server, root)
    chain = chain_of(root, 3)
    save = store.save(chain, 0, 3)
    drained: list[bool] = []
    draining = threading.Thread(target=lambda: drained.append(server.drain(20)))
    draining.start()
    wait_until(lambda: server.draining)
    for index in save.indices:
        view = save.views(index)[0]
        assert view is not None
        view[:] = content(chain, index, 0, 4096)
        del view
    assert save.commit() == 3
    draining.join(20)
    assert drained == [True]
    assert store.match(chain, "r").num_blocks == 0
    with pytest.raises(ServiceUnavailable, match="draining"):
        connect(server.address, wait_s=0.1)
    store.close()


def test_a_tier_that_never_answers_does_not_hold_a_load_for_ever(start_server: StartServer, root: Root) -> None:
    gate = threading.Event()
    tier = DictTier()
    server = start_server(tiers=[tier], mover={"write": "through"})
    with connected(server, root, progress_s=0.5) as store:
        chain = chain_of(root, 4)
        save_all(store, chain)
        assert server.flush(5)
        server.drop_host()
        store.match(chain, "r", wait_s=5)
        tier.before_read = lambda key: gate.wait(20) and None
        began = time.monotonic()
        with store.load("r") as load:
            assert list(load) == []
        assert time.monotonic() - began < 15
        assert store.is_up, "one slow tier says nothing of the server"
        gate.set()


def test_access_denied_is_an_error_and_no_miss(start_server: StartServer, directory: Path, root: Root) -> None:
    tokens = directory / "tokens.toml"
    tokens.write_text('[[client]]\ntoken = "sixteen-letters-or-more"\nsalts = ["mine"]\n')
    tokens.chmod(0o600)
    server = start_server(service={"tokens_file": str(tokens)})
    with pytest.raises(AccessDenied, match="access token is not known"):
        connect(server.address, token="wrong")
    with connect(server.address, token="sixteen-letters-or-more") as store:
        store.open(root.model)
        assert save_all(store, chain_of(Root(root.model, salt=b"mine"), 2)) == 2
        with pytest.raises(AccessDenied, match="no right to the namespace of model 'tiny' and salt b'yours'"):
            store.match(chain_of(Root(root.model, salt=b"yours"), 2), "r")
    with connect(server.address, token="sixteen-letters-or-more") as store:
        store.open(root.model)
        mine = Root(root.model, salt=b"mine")
        assert store.clear(mine.id) == 0, "who names an id need not own it"
        store.touch(Chain(mine), 0)
        assert store.clear(mine.id) == 2


# -- memory ----------------------------------------------------------------------------------------------------


def test_a_client_populates_its_map_only_once_the_server_has(start_server: StartServer) -> None:
    late, beats = threading.Event(), list[None]()
    server = start_server(request={"lease_s": 4.0})
    server._servicer._store.wait_ready = lambda _: (beats.append(None), late.is_set())[1]  # type: ignore[method-assign]
    with connect(server.address) as store:
        plane = store._link.up().plane
        assert isinstance(plane, MappedPlane)
        wait_until(lambda: len(beats) >= 3)  # it has had the answers to two
        assert not plane.mapping.wait_populated(0)
        late.set()
        wait_until(lambda: plane.mapping.wait_populated(0))


def test_an_arena_is_locked_in_memory_where_that_is_asked_for(start_server: StartServer) -> None:
    def locked_kib() -> int:
        return int(Path("/proc/self/status").read_text().partition("VmLck:")[2].split()[0])

    before = locked_kib()
    start_server(1024, service={"pin_memory": True})
    wait_until(lambda: locked_kib() >= before + 4096)


def test_a_block_that_was_overwritten_before_a_window_moved_over_it_is_noticed(
    start_server: StartServer, root: Root
) -> None:
    chain = chain_of(root, 24)
    server = start_server(8, tiers=[tier_with(chain, model=root.model)])
    with connected(server, root) as store:
        store.match(chain, "r", wait_s=5)
        with store.load("r") as load:
            assert isinstance(load, MappedLoad)
            blocks = iter(load)
            next(blocks)
            slot = int(load._blocks.offsets[0][0])
            server._store._host.arena.generation[slot // 4096] += 1  # as if it had become another block's
            assert sum(1 for _ in blocks) == 23
            assert load._windowed
            assert not load.intact()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a socket to another user")
def test_no_client_tells_a_strangers_socket_its_token(start_server: StartServer) -> None:
    server = start_server()
    path = server.address.removeprefix("unix:")
    os.chown(path, 4242, -1)
    for mapped in (False, True):
        with pytest.raises(AccessDenied, match="runs as user 4242, whom this user does not trust"):
            connect(server.address, mapped=mapped, token="sixteen-letters-or-more", wait_s=0)
    with pytest.raises(AccessDenied, match="runs as user 4242"), Admin(Target.of(server.address)) as admin:
        admin.stats()
    os.chown(path, os.geteuid(), -1)
    connect(server.address, mapped=False).close()
