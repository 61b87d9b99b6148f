# SPDX-License-Identifier: Apache-2.0
"""Clients and sidecars elsewhere: bytes over streams, from servers in processes of their own that get killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

import grpc
import numpy as np
import pytest

from kvstore.api import Load, Match, Save
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, LeaseError, TierError
from kvstore.layout import layout_of
from kvstore.service.buffers import Buffers
from kvstore.service.bulk import Packer, encode
from kvstore.service.client import SidecarStore
from kvstore.service.connection import Connection
from kvstore.service.link import Link
from kvstore.service.plane import Cells, DataPlane, Down
from kvstore.service.remote import RemoteLoad
from kvstore.service.uploads import RemoteSave, SaveTicket, upload
from kvstore.store import KVStore
from kvstore.tiers.remote import RemoteTier
from kvstore.wire import kvstore_pb2 as pb
from tests.conftest import chain_of, content, load_all, save_all
from tests.patient import CALL_DEADLINE_S, connect
from tests.redis.content import Content
from tests.service.peers import PeerWithContent
from tests.waiting import wait_until

BIG = ModelId(
    model="big", revision="1", kv_dtype="float32", num_layers=4, num_kv_heads=4, head_dim=64, block_tokens=256
)
"""2 MiB a block, in one part: two messages each."""
GRID = ModelId(
    model="grid",
    revision="1",
    kv_dtype="bfloat16",
    num_layers=2,
    num_kv_heads=2,
    head_dim=16,
    block_tokens=16,
    part_layers=1,
    part_heads=1,
)
BIG_BYTES = layout_of(BIG).block_bytes
_START_S = 30.0


@dataclass
class Served:
    """A `kvstore serve` in a process of its own."""

    address: str
    process: subprocess.Popen[bytes]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


PATIENT = f"request.lookup_deadline_s={CALL_DEADLINE_S}"
LASTING = f"tiers.remote.call_timeout_s={CALL_DEADLINE_S}"


@contextlib.contextmanager
def serving(folder: Path, name: str, *settings: str) -> Iterator[Served]:
    """Serve on a Unix socket in `folder`; ready when this returns."""
    address = f"unix:{folder}/{name}"
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "kvstore.service.cli", "serve", "--listen", address]
    for setting in ("host.capacity_bytes=64MiB", "host.prefault=false", PATIENT, *settings):
        command += ["--set", setting]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("KVSTORE_")}
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environ)
    try:
        deadline = time.monotonic() + _START_S
        while "ready:" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield Served(address, process)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("sidecar"), "s") as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[SidecarStore]:
    """A client without a mapping; what it leaves behind must be nothing."""
    with connect(served.address, mapped=False) as store:
        store.clear()
        yield store
        assert store.check() == []
        wait_until(lambda: store.stats()["host.pinned_blocks"] == 0)


def save_big(store: SidecarStore, chain: Chain) -> int:
    return save_all(store, chain)  # type: ignore[arg-type]


# ---- what a client says it has ----


def test_a_beat_that_was_made_as_a_load_began_does_not_end_it(served: Served) -> None:
    """The beat may overtake the load's own call, or come after it."""
    for mapped in (False, True):
        with connect(served.address, mapped=mapped) as client:
            client.clear()
            client.open(BIG)
            chain = chain_of(Root(BIG), 20)
            save_big(client, chain)
            connection: Connection = client._link.up()
            connection.plane = BeatOvertaken(connection.plane)
            client.match(chain, "r")
            with client.load("r") as load:
                assert [block.index for block in load] == list(range(20)), f"mapped: {mapped}"
                assert load.intact()
                if mapped:
                    assert client.stats()["lease.live"] == 1


class BeatOvertaken:
    """A plane whose loads have begun, and partly come, when a beat arrives that was made before."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self.ticket, self.boot_id, self.lane = plane.ticket, plane.boot_id, plane.lane

    def load(self, link: Link, connection: Connection, request: pb.LoadRequest, cells: Cells) -> Load:
        beat = connection.beat(0.0)
        load = self._plane.load(link, connection, request, cells)
        next(connection.stub.Session(iter([beat])))
        return load

    def save(self, link: Link, connection: Connection, lease: int, cells: Cells, reply: pb.SaveReply) -> Save:
        return self._plane.save(link, connection, lease, cells, reply)

    def prefaulted(self) -> None:
        self._plane.prefaulted()

    def close(self) -> bool:
        return self._plane.close()


def test_a_beat_names_every_load_up_to_its_highest_lease(client: SidecarStore) -> None:
    connection: Connection = client._link.up()
    before = connection.highest_lease
    begun = threading.Event()

    def begin() -> None:
        for _ in range(5_000):
            connection.next_lease(load=True)
            begun.set()

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=begin) for _ in range(2)]
        for thread in threads:
            thread.start()
        begun.wait()
        while any(thread.is_alive() for thread in threads):
            beat = connection.beat(0.0)
            named = set(np.frombuffer(beat.live_leases, "<u8").tolist())
            assert named == set(range(before + 1, beat.highest_lease + 1))
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
        connection.live_loads.clear()


# ---- a client without a mapping ----


@pytest.mark.parametrize("model", [BIG, GRID], ids=["large parts", "small parts"])
def test_what_an_unmapped_client_saves_it_loads(client: SidecarStore, model: ModelId) -> None:
    client.open(model)
    chain = chain_of(Root(model), 8)
    assert save_big(client, chain) == 8
    assert load_all(client, chain) == ["host"] * 8  # type: ignore[arg-type]


def test_mapped_and_unmapped_clients_read_each_others_blocks(client: SidecarStore, served: Served) -> None:
    with connect(served.address) as mapped:
        for store in (client, mapped):
            store.open(BIG)
        there, back = chain_of(Root(BIG), 4, seed=1), chain_of(Root(BIG), 4, seed=2)
        assert save_big(client, there) == save_big(mapped, back) == 4
        assert load_all(mapped, there) == load_all(client, back) == ["host"] * 4  # type: ignore[arg-type]


def test_blocks_can_be_committed_one_by_one_and_in_parts(client: SidecarStore) -> None:
    client.open(GRID)
    chain = chain_of(Root(GRID), 5)
    num_bytes = layout_of(GRID).parts[0].num_bytes
    for parts in ([0, 3], [1, 2]):
        with client.save(chain, 0, 5, parts=parts) as save:
            for index in save.indices:
                for part, view in zip(parts, save.views(index), strict=True):
                    assert view is not None
                    view[:] = content(chain, index, part, num_bytes)
                assert save.commit(index) == 1
    assert load_all(client, chain) == ["host"] * 5  # type: ignore[arg-type]


def test_what_is_not_committed_is_given_back(client: SidecarStore) -> None:
    client.open(BIG)
    chain = chain_of(Root(BIG), 4)
    with client.save(chain, 0, 4) as save:
        for index in save.indices:
            for view in save.views(index):
                assert view is not None
                view[:] = content(chain, index, 0, len(view))
        assert save.commit(0, 1) == 2
        with pytest.raises(LeaseError, match="not open"):
            save.commit(0)
    wait_until(lambda: list(client.save(chain, 0, 4).indices) == [2, 3])
    assert matched(client, chain) == 2


def matched(store: SidecarStore, chain: Chain) -> int:
    num_blocks = store.match(chain, "matched").num_blocks
    store.forget("matched")
    return num_blocks


def test_an_unmapped_client_cannot_publish_what_it_has_not_sent(client: SidecarStore) -> None:
    """Its slot has somebody else's bytes: to publish it would be to read them."""
    client.open(BIG)
    chain = chain_of(Root(BIG), 1)
    with client.save(chain, 0, 1):
        connection: Connection = client._link.up()
        request = pb.CommitRequest(session=connection.session, lease=connection.highest_lease, indices=bytes(4))
        try:
            assert connection.stub.Commit(request).published == b""
        except grpc.RpcError:
            pass
        assert matched(client, chain) == 0


def test_load_larger_than_the_clients_memory_goes_in_a_window(served: Served) -> None:
    with connect(served.address, mapped=False, buffer_bytes=16 << 20) as client:
        client.clear()
        client.open(BIG)
        chain = chain_of(Root(BIG), 24)
        for start in range(0, 24, 4):
            assert save_blocks(client, chain, start, start + 4) == 4
        assert load_all(client, chain) == ["host"] * 24  # type: ignore[arg-type]


def save_blocks(store: SidecarStore, chain: Chain, start: int, stop: int) -> int:
    return save_all(store, chain, start, stop)  # type: ignore[arg-type]


def test_save_larger_than_the_clients_memory_is_refused_from_where_it_ends(served: Served) -> None:
    with connect(served.address, mapped=False, buffer_bytes=16 << 20) as client:
        client.clear()
        client.open(BIG)
        chain = chain_of(Root(BIG), 12)
        with client.save(chain, 0, 12) as save:
            assert list(save.indices) == list(range(8))
            assert save.num_refused == 4
        wait_until(lambda: len(client.save(chain, 0, 2).indices) == 2)


def test_load_that_is_closed_early_returns_its_lease(client: SidecarStore) -> None:
    client.open(BIG)
    chain = chain_of(Root(BIG), 20)
    save_big(client, chain)
    client.match(chain, "r")
    with client.load("r") as load:
        assert next(iter(load)).index == 0
    wait_until(lambda: client.stats()["host.pinned_blocks"] == 0)


def test_reader_that_takes_nothing_makes_the_server_hold_little(client: SidecarStore, served: Served) -> None:
    client.open(BIG)
    chain = chain_of(Root(BIG), 30)
    save_big(client, chain)
    connection = client._link.up()
    before = resident_bytes(served.process.pid)
    client.match(chain, "r")
    from kvstore.service.handlers import BulkStub

    call = BulkStub(connection.channel).Read(
        pb.LoadRequest(session=connection.session, request="r", lease=connection.next_lease())
    )
    next(call)
    time.sleep(0.5)  # long enough to send all of it, were it not for flow control
    assert resident_bytes(served.process.pid) - before < 16 << 20
    call.cancel()


def resident_bytes(pid: int) -> int:
    """Private memory of a process: the arena is shared, and not counted."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_server_that_dies_mid_stream_is_a_shorter_hit(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, "s") as server, connect(server.address, mapped=False) as client:
        client.open(BIG)
        chain = chain_of(Root(BIG), 30)
        save_big(client, chain)
        client._link.options = _impatient(client)
        client.match(chain, "r")
        began = time.monotonic()
        with client.load("r") as load:
            seen = []
            for block in load:
                assert bytes(block.views[0]) == content(chain, block.index, 0, BIG_BYTES)
                seen.append(block.index)
                if block.index == 2:
                    server.send(number)
        assert time.monotonic() - began < 15
        assert seen == list(range(len(seen)))
        assert len(seen) >= 3
        began = time.monotonic()
        assert client.match(chain, "r") == Match(0, 0, 0, settled=True)
        assert not list(client.save(chain, 0, 1).indices)
        assert time.monotonic() - began < 4, "one call's deadline, and no second one"


def _impatient(client: SidecarStore) -> object:
    from dataclasses import replace

    return replace(client._link.options, progress_s=1.0, call_deadline_s=2.0)


def test_save_to_a_server_that_was_killed_publishes_nothing_and_does_not_wait(tmp_path: Path) -> None:
    with serving(tmp_path, "s") as server, connect(server.address, mapped=False) as client:
        client.open(BIG)
        chain = chain_of(Root(BIG), 8)
        with client.save(chain, 0, 8) as save:
            server.send(signal.SIGKILL)
            server.process.wait()
            began = time.monotonic()
            assert save.commit() == 0
            assert time.monotonic() - began < 10


@pytest.mark.slow
def test_client_killed_mid_upload_leaves_nothing_half_written(served: Served) -> None:
    """Its session ends a moment after its stream; what it had reserved and not sent whole is free again."""
    script = (
        "import sys, os, threading\n"
        "from kvstore.block import Root\n"
        "from tests.conftest import chain_of\n"
        "from tests.patient import CALL_DEADLINE_S, connect\n"
        "from tests.service.test_remote import BIG\n"
        "store = connect(sys.argv[1], mapped=False)\n"
        "store.open(BIG)\n"
        "save = store.save(chain_of(Root(BIG), 8, seed=77), 0, 8)\n"
        "messages = save._messages\n"
        "def cut(blocks):\n"
        "    for number, message in enumerate(messages(blocks)):\n"
        "        if number == 6:\n"
        "            threading.Event().wait(0.3)\n"  # what was sent has arrived
        "            print('half', flush=True)\n"
        "            threading.Event().wait()\n"
        "        yield message\n"
        "save._messages = cut\n"
        "save.commit()\n"
    )
    with connect(served.address) as watcher:
        watcher.clear()
        watcher.open(BIG)
        chain = chain_of(Root(BIG), 8, seed=77)
        process = subprocess.Popen([sys.executable, "-c", script, served.address], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"half\n"
            assert watcher.match(chain, "w").num_blocks <= 2
            watcher.forget("w")
            assert list(watcher.save(chain, 0, 8).indices) == []
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

        def free() -> bool:
            with watcher.save(chain, 0, 8) as save:
                return len(save.indices) >= 6

        wait_until(free, 20)
        assert watcher.check() == []


# ---- loads and saves over a scripted stream ----


class Script:
    """A stream that says what it is told to, and then that it ends, or that the server is away."""

    def __init__(self, messages: list[bytes], then: str) -> None:
        self._messages = messages
        self._then = then
        self.cancelled = False

    def next(self) -> bytes | None:
        if self._messages:
            return self._messages.pop(0)
        if self._then == "end":
            return None
        raise Down

    def cancel(self) -> None:
        self.cancelled = True


def scripted(num_blocks: int, sent: int, then: str, *, flip: int = -1) -> tuple[RemoteLoad, list[Exception], Script]:
    packer = Packer(pb.ReadReply)
    messages = [encode(pb.ReadReply(num_blocks=num_blocks), ())]
    for index in range(sent):
        messages += packer.add(index, 0, memoryview(bytes([index]) * 5000), tier="host")
        messages += packer.end_block(index + 1, carry=False)
    if flip >= 0:
        damaged = bytearray(messages[1 + flip])
        damaged[-1] ^= 1
        messages[1 + flip] = bytes(damaged)
    failures: list[Exception] = []

    def unfit(error: Exception) -> Exception:
        failures.append(error)
        return error

    script = Script(messages, then)
    load = RemoteLoad(script, [5000], Buffers(1 << 24), start=0, unfit=unfit)
    return load, failures, script


@pytest.mark.parametrize(
    ("sent", "then", "flip", "expected"),
    [(5, "end", -1, 5), (3, "end", -1, 3), (3, "fail", -1, 3), (5, "end", 2, 2)],
    ids=["all", "server ended early", "connection lost", "a flipped byte"],
)
def test_load_ends_where_good_blocks_end(sent: int, then: str, flip: int, expected: int) -> None:
    load, failures, script = scripted(5, sent, then, flip=flip)
    with load:
        assert load.num_blocks == 5
        assert [(block.index, bytes(block.views[0])) for block in load] == [
            (index, bytes([index]) * 5000) for index in range(expected)
        ]
        assert load.intact()
    assert len(failures) == (flip >= 0)
    assert not load.intact()
    assert script.cancelled == (expected == 5 or flip >= 0), "what follows the last block is not waited for"


def test_load_that_is_left_early_is_cancelled() -> None:
    load, _, script = scripted(5, 5, "end")
    with load:
        assert next(iter(load)).index == 0
    assert script.cancelled


def test_load_that_is_never_answered_is_refused() -> None:
    load = RemoteLoad(Script([], "away"), [5000], Buffers(1 << 24), start=0, unfit=lambda error: error)
    assert isinstance(load.refusal, Down)
    load.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_load_that_is_interrupted_before_it_has_begun_leaves_nothing_behind(error: type[BaseException]) -> None:
    class Interrupted(Script):
        def next(self) -> bytes | None:
            raise error

    script, closed = Interrupted([], "end"), []
    with pytest.raises(error):
        RemoteLoad(
            script, [5000], Buffers(1 << 24), start=0, unfit=lambda error: error, closed=lambda: closed.append(True)
        )
    assert script.cancelled
    assert closed == [True]


@dataclass
class Writing:
    """A call of Write under way, whose caller is interrupted; the channel that it is on."""

    cancelled: bool = False

    def stream_unary(self, *_: object) -> Writing:
        return self

    unary_stream = stream_unary

    def future(self, messages: Iterator[bytes]) -> Writing:
        return self

    def result(self, timeout: float) -> NoReturn:
        raise KeyboardInterrupt

    def cancel(self) -> None:
        self.cancelled = True


def test_save_that_is_interrupted_sends_nothing_of_what_its_memory_holds_later() -> None:
    writing = Writing()
    with pytest.raises(KeyboardInterrupt):
        upload(cast(grpc.Channel, writing), iter([b"x"]), 1.0)
    assert writing.cancelled


def test_memory_that_the_host_does_not_give_counts_for_nothing() -> None:
    buffers = Buffers(1 << 62)
    assert buffers.rent(1, 1 << 55).num_blocks == 0
    assert buffers.total_bytes == 0
    rented = buffers.rent(1, 5000)
    assert rented.num_blocks == 1
    rented.give_back()


def test_windowed_load_reuses_memory_only_after_the_iterator_moved_on() -> None:
    packer = Packer(pb.ReadReply)
    size = 8 << 20
    messages = [encode(pb.ReadReply(num_blocks=6), ())]
    for index in range(6):
        messages += packer.add(index, 0, memoryview(bytes([index]) * size), tier="host")
    load = RemoteLoad(
        Script(messages, "end"),
        [size],
        Buffers(2 * size),
        start=0,
        unfit=lambda error: error,
    )
    with load:
        for block in load:
            assert block.views[0][0] == block.views[0][-1] == block.index
        assert block.index == 5


def test_window_too_small_for_a_message_ends_the_load_rather_than_overwrite_a_block() -> None:
    packer = Packer(pb.ReadReply)
    messages = [encode(pb.ReadReply(num_blocks=4000), ())]
    for index in range(4000):
        messages += packer.add(index, 0, memoryview(bytes([index % 251]) * 100), tier="host")
        messages += packer.end_block(index + 1, carry=True)
    messages += packer.rest()
    buffers = Buffers(8 << 20)  # 2,048 places
    with RemoteLoad(Script(messages, "end"), [100], buffers, start=0, unfit=lambda error: error) as load:
        assert all(bytes(block.views[0]) == bytes([block.index % 251]) * 100 for block in load)
    assert buffers.total_bytes <= 8 << 20


def test_buffers_are_used_again_and_never_exceed_their_budget() -> None:
    buffers = Buffers(32 << 20)
    first = buffers.rent(3, 8 << 20)
    assert first.num_blocks == 3
    second = buffers.rent(3, 8 << 20)
    assert second.num_blocks == 1
    assert buffers.total_bytes == 32 << 20
    first.give_back()
    second.give_back()
    large = buffers.rent(1, 32 << 20)
    assert (large.num_blocks, buffers.total_bytes) == (1, 32 << 20)
    large.give_back()
    small = buffers.rent(10_000, 5000)
    assert small.num_blocks == 4 * ((8 << 20) // 8192)
    assert buffers.total_bytes == 32 << 20


@pytest.mark.parametrize("committed", [(3,), (3, 5), ()], ids=["one", "both", "all"])
def test_save_whose_upload_fails_publishes_nothing_and_is_ended(committed: tuple[int, ...]) -> None:
    """Otherwise nobody else could save its blocks as long as this client lives."""
    ended: list[bool] = []
    ticket = SaveTicket(b"s", 1, (3, 5), ((True,), (True,)), (4096,), 0)
    with RemoteSave(ticket, Buffers(1 << 24), lambda messages: [], lambda: ended.append(True)) as save:
        assert save.commit(*committed) == 0
    assert ended == [True]


def test_save_that_was_published_whole_is_not_ended_again() -> None:
    ended: list[bool] = []
    ticket = SaveTicket(b"s", 1, (3, 5), ((True,), (True,)), (4096,), 0)
    with RemoteSave(ticket, Buffers(1 << 24), lambda messages: [3, 5], lambda: ended.append(True)) as save:
        assert save.commit() == 2
    assert ended == []


# ---- a sidecar that reads from another ----


@contextlib.contextmanager
def reading_from(address: str, *, lookup_deadline_s: float = CALL_DEADLINE_S, **options: object) -> Iterator[KVStore]:
    """A store whose only lower tier is the sidecar at `address`."""
    values = {
        "host": {"capacity_bytes": 64 << 20, "prefault": False},
        "tiers": {"remote": {"address": address, "call_timeout_s": CALL_DEADLINE_S, **options}},
        "request": {"lookup_deadline_s": lookup_deadline_s},
    }
    store = KVStore(StoreConfig.load(values, environ={}))
    try:
        for model in (BIG, GRID):
            store.open(model)
        yield store
        assert store.check() == []
    finally:
        store.close()


def found(store: KVStore | SidecarStore, chain: Chain) -> int:
    """Blocks that match in all tiers, asked anew."""
    num_blocks = store.match(chain, "found", wait_s=5).num_blocks
    store.forget("found")
    return num_blocks


@pytest.mark.parametrize("model", [BIG, GRID], ids=["large parts", "small parts"])
def test_cold_sidecar_serves_what_its_peer_has(client: SidecarStore, served: Served, model: ModelId) -> None:
    client.open(model)
    chain = chain_of(Root(model), 6)
    save_big(client, chain)
    with reading_from(served.address) as cold:
        assert load_all(cold, chain) == ["remote"] * 6
        assert load_all(cold, chain) == ["host"] * 6


@pytest.mark.slow
def test_two_sidecars_read_from_each_other(tmp_path: Path) -> None:
    one, other = f"unix:{tmp_path}/one", f"unix:{tmp_path}/other"
    with (
        serving(tmp_path, "one", f"tiers.remote.address={other}", LASTING) as first,
        serving(tmp_path, "other", f"tiers.remote.address={one}", LASTING) as second,
        connect(first.address) as here,
        connect(second.address) as there,
    ):
        for store in (here, there):
            store.open(BIG)
        mine, yours = chain_of(Root(BIG), 4, seed=1), chain_of(Root(BIG), 4, seed=2)
        save_big(here, mine)
        save_big(there, yours)

        def tiers(store: SidecarStore, chain: Chain) -> list[str]:
            return load_all(store, chain)  # type: ignore[arg-type]

        # The first sidecar came up before its peer: it connects by itself.
        wait_until(lambda: found(here, yours) == 4)
        assert tiers(there, mine) == ["remote"] * 4
        assert tiers(here, yours) == ["remote"] * 4
        # A block that neither has is asked for once, not in circles.
        nobody = chain_of(Root(BIG), 4, seed=3)
        assert found(here, nobody) == 0
        assert here.check() == there.check() == []


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_peer_that_dies_mid_stream_is_a_shorter_hit(tmp_path: Path, number: signal.Signals) -> None:
    with (
        serving(tmp_path, "s") as server,
        reading_from(server.address, lookup_deadline_s=0.25, call_timeout_s=0.5) as cold,
    ):
        chain = chain_of(Root(BIG), 28)
        with connect(server.address) as warm:  # and gone: it would wait for the peer as it leaves
            warm.open(BIG)
            save_big(warm, chain)
        wait_until(lambda: found(cold, chain) == 28)
        assert cold.match(chain, "r", wait_s=5).num_blocks == 28
        began = time.monotonic()
        with cold.load("r") as load:
            seen = []
            for block in load:
                assert bytes(block.views[0]) == content(chain, block.index, 0, BIG_BYTES)
                seen.append(block.index)
                if len(seen) == 1:
                    server.send(number)
        assert seen == list(range(len(seen)))
        assert 1 <= len(seen) < 28
        assert time.monotonic() - began < 8  # request.read_deadline_s, and some
        began = time.monotonic()
        cold.drop_host()
        assert cold.match(chain, "r", wait_s=2).num_blocks == 0
        cold.forget("r")
        assert time.monotonic() - began < 2


@pytest.mark.slow
def test_store_starts_without_its_peer_and_finds_it_later(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/late"
    with reading_from(address) as cold:
        chain = chain_of(Root(BIG), 3)
        assert cold.match(chain, "r", wait_s=2).num_blocks == 0
        with serving(tmp_path, "late") as server, connect(server.address) as warm:
            warm.open(BIG)
            save_big(warm, chain)
            wait_until(lambda: found(cold, chain) == 3)
            assert load_all(cold, chain) == ["remote"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_goes_away_is_shown_as_gone_and_back_though_nobody_asks_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    def available(store: KVStore) -> bool:
        return bool(store.stats()["remote.available"])

    with serving(tmp_path, "s") as server, reading_from(server.address, call_timeout_s=0.5) as cold:
        wait_until(lambda: available(cold))
        server.send(number)
        wait_until(lambda: not available(cold), 30)
        if number is signal.SIGSTOP:
            server.send(signal.SIGCONT)
        else:
            server.process.wait()
            (tmp_path / "s.log").unlink()
        with serving(tmp_path, "s") if number is signal.SIGKILL else contextlib.nullcontext():
            wait_until(lambda: available(cold), 30)


@pytest.mark.slow
def test_restarted_peer_is_read_again(tmp_path: Path) -> None:
    chain = chain_of(Root(BIG), 3)
    with contextlib.ExitStack() as stack:
        with serving(tmp_path, "s") as server:
            cold = stack.enter_context(reading_from(server.address))
            with connect(server.address) as warm:
                warm.open(BIG)
                save_big(warm, chain)
                assert load_all(cold, chain) == ["remote"] * 3
            server.send(signal.SIGKILL)
            server.process.wait()
        (tmp_path / "s.log").unlink()
        cold.drop_host()
        with serving(tmp_path, "s") as again, connect(again.address) as warm:
            warm.open(BIG)
            save_big(warm, chain)
            wait_until(lambda: found(cold, chain) == 3)
            assert load_all(cold, chain) == ["remote"] * 3


def test_peer_with_a_token_for_one_tenant_learns_nothing_of_another(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        '[[client]]\ntoken = "a-token-for-everything"\nadmin = true\n'
        '[[client]]\ntoken = "a-token-for-one-tenant"\ntenant = "acme"\nsalts = ["acme"]\n'
    )
    tokens.chmod(0o600)
    mine = tmp_path / "token"
    mine.write_text("a-token-for-one-tenant\n")
    mine.chmod(0o600)
    with (
        serving(tmp_path, "s", f"service.tokens_file={tokens}") as server,
        connect(server.address, token="a-token-for-everything") as warm,
    ):
        warm.open(GRID)
        theirs, ours = chain_of(Root(GRID, salt=b"other"), 4), chain_of(Root(GRID, salt=b"acme"), 4)
        save_big(warm, theirs)
        save_big(warm, ours)
        with reading_from(server.address, token_file=str(mine)) as cold:
            assert cold.match(theirs, "r", wait_s=5).num_blocks == 0
            cold.forget("r")
            assert load_all(cold, ours) == ["remote"] * 4


def test_block_whose_contents_do_not_hash_to_its_id_is_left_out() -> None:
    tier = PeerWithContent()
    tier.open(layout_of(GRID))
    blocks = Content(Root(GRID), 4)
    blocks.write(tier)
    pool = tier._store._host.pool
    pool._table.tokens[pool._table.ids.get(blocks.chain.ids[2]), 0] ^= 1
    assert blocks.read(tier) == [key for key in blocks.keys if key.block != blocks.chain.ids[2]]
    assert tier.stats.snapshot()["remote.foreign_blocks"] == 4
    tier.close()


def test_nothing_is_demoted_to_a_peer(client: SidecarStore, served: Served) -> None:
    values = {
        "host": {"capacity_bytes": 8 << 20, "prefault": False},
        "mover": {"write": "through"},
        "tiers": {"remote": {"address": served.address}},
    }
    store = KVStore(StoreConfig.load(values, environ={}))
    store.open(GRID)
    chain = chain_of(Root(GRID), 4)
    save_all(store, chain)
    assert store.flush(5)
    assert store.clear() == 4
    stats = store.stats()
    store.close()
    assert not [name for name in stats if name.startswith("mover.") and stats[name]], stats
    client.open(GRID)
    assert matched(client, chain) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "address is empty"),
        ({"address": "a:1", "call_timeout_s": 0}, "above 0"),
        ({"address": "a:1", "tls_cert": "x"}, "go together"),
        ({"address": "unix:/nowhere", "token_file": "/nowhere/token"}, "cannot be read"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RemoteTier(RemoteTier.Options(**options))  # type: ignore[arg-type]


def test_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("secret")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        RemoteTier(RemoteTier.Options(address="unix:/nowhere", token_file=str(path)))


@pytest.mark.alone
def test_tier_without_its_peer_fails_at_once(tmp_path: Path) -> None:
    tier = RemoteTier(RemoteTier.Options(address=f"unix:{tmp_path}/nobody"))
    chain = chain_of(Root(GRID), 2)
    keys = chain.part_keys(0, 2, (0,))
    costs_s = []
    for _ in range(20):
        began = time.monotonic()
        with pytest.raises(TierError):
            tier.contains(keys, 5.0)
        with pytest.raises(TierError):
            list(tier.read({keys[0]: memoryview(bytearray(512))}, 5.0))
        costs_s.append(time.monotonic() - began)
    assert sorted(costs_s)[15] < 0.2, "a busy machine may hold up some"
    tier.close()
