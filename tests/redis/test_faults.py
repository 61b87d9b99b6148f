# SPDX-License-Identifier: Apache-2.0
"""A server that dies, hangs or lies costs a bounded delay and a miss; never wrong bytes, never the next call."""

from __future__ import annotations

import inspect
import logging
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import redis
import redis.exceptions

from kvstore.api import NO_HINT
from kvstore.block import PartKey, Root
from kvstore.errors import ConfigError, TierError, TierTimeout, TierUnavailable
from kvstore.stats import Stats
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_breaker import Breaker
from kvstore.tiers.redis_errors import Refused, map_redis_errors
from kvstore.tiers.redis_pool import Connections
from kvstore.tiers.redis_wire import ProtocolBroken, ReplyError, command
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions
from tests.ports import free_ports
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import timed, wait_until


class Proxy:
    """A Unix socket in front of a server; `rule` says what becomes of the server's bytes.

    It gets the number of bytes passed on so far to this connection, and the new ones; it returns what to pass on.
    Holding some back hangs up after the rest.
    """

    def __init__(self, directory: Path, server: EmbeddedServer) -> None:
        self.rule: Callable[[int, bytes], bytes] = lambda passed, data: data
        self.url = f"unix://{directory}/proxy"
        self._target = server.unix_url.removeprefix("unix://")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{directory}/proxy")
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets: list[socket.socket] = [self._listener]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            self._sockets += [near, far]
            for source, sink, rule in ((near, far, None), (far, near, self.rule)):
                thread = threading.Thread(target=self._pump, args=(source, sink, rule))
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, rule: Callable[[int, bytes], bytes] | None) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65_536):
                kept = data if rule is None else rule(passed, data)
                sink.sendall(kept)
                passed += len(kept)
                if len(kept) < len(data):
                    break
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(5)
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def proxy(own_server: EmbeddedServer, tmp_path: Path) -> Iterator[Proxy]:
    proxy = Proxy(tmp_path, own_server)
    yield proxy
    proxy.close()


def large(root: Root, num_blocks: int = 4) -> Content:
    """Blocks of 1 MiB: far more than a socket buffers."""
    return Content(Root(replace(root.model, head_dim=4096)), num_blocks)


def checked(
    reading: Iterable[Sequence[PartKey]], into: Mapping[PartKey, memoryview], content: Content
) -> Iterator[PartKey]:
    """The keys of `reading`, each held against what was written the moment it comes."""
    for key in chain.from_iterable(reading):
        assert into[key] == content.parts[key], "wrong bytes were delivered as right ones"
        yield key


# ── connections that end ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("after", [0, 1, 5, 100, 300, 5000, 1_000_000, 1_048_900, 2_500_000, 4_194_000])
def test_reply_cut_anywhere_gives_a_prefix_and_an_error_and_the_next_call_works(
    after: int, lanes: int, proxy: Proxy, own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    content = large(root, 4 * lanes)
    content.write(make_tier(own_server.url))
    handshake = 200  # what the server says while connecting is shorter
    proxy.rule = lambda passed, data: data[: max(0, after + handshake - passed)]
    tier = make_tier(proxy.url, healthy=False)
    into = content.buffers()
    delivered: list[PartKey] = []
    with pytest.raises(TierUnavailable):
        delivered.extend(checked(tier.read(into, DEADLINE_S), into, content))
    assert delivered == content.keys[: len(delivered)]
    proxy.rule = lambda passed, data: data
    assert content.read(tier) == content.keys


@pytest.mark.usefixtures("lanes")
def test_connection_killed_by_the_server_is_replaced(tier: RedisTier, client: redis.Redis, root: Root) -> None:
    content = Content(root, 6)
    content.write(tier)
    assert content.read(tier) == content.keys
    client.client_kill_filter(_type="normal", skipme=True)
    assert content.read(tier) == content.keys
    client.client_kill_filter(_type="normal", skipme=True)
    assert content.write(tier) == set(content.keys)
    assert tier.stats.get("redis.missing_blocks") == 0


def test_connection_killed_in_the_middle_of_a_read_gives_an_error_and_no_wrong_bytes(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    content = large(root, 16)
    tier = make_tier(server.url)
    tier.open(content.layout)
    content.write(tier)
    into = content.buffers()
    reading = tier.read(into, DEADLINE_S)
    (first,) = next(reading)
    assert into[first] == content.parts[first]
    client.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(TierUnavailable):
        list(checked(reading, into, content))
    assert content.read(tier) == content.keys


@pytest.mark.usefixtures("lanes")
def test_connections_killed_at_random_never_deliver_wrong_bytes(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    content = large(root, 8)
    tier = make_tier(server.url)
    tier.open(content.layout)
    content.write(tier)
    rng = random.Random(1)
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(rng.uniform(0, 0.004)):
            client.client_kill_filter(_type="normal", skipme=True)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for _ in range(60):
            with suppress(TierUnavailable):
                content.read(tier)
    finally:
        stop.set()
        killer.join()
    assert content.read(tier) == content.keys


@pytest.mark.usefixtures("lanes")
def test_server_that_answers_with_other_bytes_delivers_nothing(
    proxy: Proxy, own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    content = Content(root, 4)
    owner = make_tier(own_server.url)
    content.write(owner)
    tier = make_tier(proxy.url, healthy=False)
    proxy.rule = lambda passed, data: data.replace(b"$4", b"$5") if b"KVSF" in data else data
    with suppress(TierError):
        content.read(tier, 0.5)
    proxy.rule = lambda passed, data: b":1\r\n" + data if b"KVSF" in data else data
    with pytest.raises(TierError):
        content.read(make_tier(proxy.url, healthy=False), 0.5)
    assert tier.settle(DEADLINE_S)
    owner.clear(None)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("fault", [("STRLEN", "list"), ("SET", "list", "mine")])
def test_who_gives_up_at_an_error_leaves_no_other_reply_for_the_next(
    fault: tuple[str, ...], own_server: EmbeddedServer
) -> None:
    """Nothing more had come when it gave up, so nothing shows that something will."""
    with redis.Redis.from_url(own_server.url) as client:
        client.rpush("list", "somebody else's")
        client.config_set("maxmemory", 1)
    connections = Connections(own_server.url, 1, DEADLINE_S, Breaker(0.0))
    deadline = time.monotonic() + DEADLINE_S

    def give_up() -> None:
        with connections.lease(deadline) as wire:
            wire.send([command(*fault), command("BLPOP", "none", 0.1)], deadline)
            error = wire.reply(deadline)
            assert isinstance(error, ReplyError)
            raise error

    with pytest.raises(Refused):
        give_up()
    with connections.lease(deadline) as wire:
        wire.send([command("ECHO", "mine")], deadline)
        assert wire.reply(deadline) == b"mine"
    connections.close()


@pytest.mark.usefixtures("lanes")
def test_read_closed_early_gives_up_its_connection(tier: RedisTier, root: Root) -> None:
    content = large(root, 12)
    tier.open(content.layout)
    content.write(tier)
    for stop_after in (1, 2, 9):
        into = content.buffers()
        reading = tier.read(into, DEADLINE_S)
        num_read = 0
        while num_read < stop_after:
            num_read += len(next(reading))
        reading.close()  # type: ignore[attr-defined]
        assert content.read(tier) == content.keys


def test_server_restarted_on_its_port_is_found_again(make_tier: MakeTier, root: Root) -> None:
    (port,) = free_ports(1)
    content = Content(root, 4)
    with EmbeddedServer(ServerOptions(port=port)) as server:
        tier = make_tier(server.url, healthy=False)
        content.write(tier)
        assert content.read(tier) == content.keys
    with pytest.raises(TierUnavailable):
        content.read(tier)
    with EmbeddedServer(ServerOptions(port=port)):
        assert content.read(tier) == []
        assert content.write(tier) == set(content.keys)
        assert content.read(tier) == content.keys
        assert tier.check() == []


def test_a_server_that_never_answered_is_not_shown_as_available(make_tier: MakeTier, root: Root) -> None:
    tier = make_tier("redis://127.0.0.1:1", healthy=False)
    with pytest.raises(TierError):
        tier.contains(large(root, 1).keys, 1.0)
    stats = Stats()
    tier.bind(stats)  # as the store does, once it has made all of its tiers
    assert stats.get("redis.available") == 0


# ── servers that hang ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def stopped(own_server: EmbeddedServer, make_tier: MakeTier) -> Iterator[Callable[[], None]]:
    """Stops the server when called; it goes on when the test ends, before tiers are closed, which would wait for it."""
    yield lambda: os.kill(own_server.pid, signal.SIGSTOP)
    os.kill(own_server.pid, signal.SIGCONT)


@pytest.mark.usefixtures("lanes")
@pytest.mark.alone
@pytest.mark.parametrize("call", ["contains", "read", "write", "marked_to"])
def test_hung_server_costs_the_deadline_and_no_more(
    call: str, own_server: EmbeddedServer, stopped: Callable[[], None], make_tier: MakeTier, root: Root
) -> None:
    content = large(root, 4)
    tier = make_tier(own_server.url, healthy=False)
    content.write(tier, 0, 2)
    assert content.read(tier) == content.keys[: len(content.keys) // 2]
    into = content.buffers()
    calls: dict[str, Callable[[], object]] = {
        "contains": lambda: tier.contains(content.keys, 1.0),
        "read": lambda: list(tier.read(into, 1.0)),
        "write": lambda: tier.write(content.parts, content.meta, 1.0),
        "marked_to": lambda: tier.marked_to(root.id, content.chain.ids, 0, 1.0),
    }
    stopped()
    with timed() as took, pytest.raises(TierTimeout):
        calls[call]()
    assert took.took_s >= 0.95
    assert took.awake_s < 1.9
    assert tier.stats.get("redis.available") == 0


@pytest.mark.alone
def test_server_hung_while_connecting_costs_the_connect_timeout(
    own_server: EmbeddedServer, stopped: Callable[[], None], make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(own_server.url, healthy=False, connect_timeout_s=0.2)
    stopped()
    with timed() as took, pytest.raises(TierError):
        tier.contains(Content(root, 1).keys, 5.0)
    assert took.awake_s < 2.5


class Trickling:
    """A server that greets whoever connects a byte at a time, until it is told to finish."""

    def __init__(self) -> None:
        self.finish, self.hung_up = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self._threads.append(threading.Thread(target=self._greet, args=(self._listener.accept()[0],)))
                self._threads[-1].start()

    def _greet(self, sock: socket.socket) -> None:
        with sock:
            with suppress(OSError):
                sock.sendall(b"+")
                while not self.finish.wait(0.02):
                    sock.sendall(b"x")
                sock.sendall(b"OK\r\n+OK\r\n")
                while sock.recv(4096):
                    pass
            self.hung_up.set()

    def close(self) -> None:
        self.finish.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        self._listener.close()


@pytest.fixture
def trickling() -> Iterator[Trickling]:
    with closing(Trickling()) as trickling:
        yield trickling


def test_server_that_greets_byte_by_byte_costs_the_connect_timeout_and_its_connection_is_not_kept(
    trickling: Trickling,
) -> None:
    connections = Connections(trickling.url, 1, 0.5, Breaker(0.0))
    started = time.monotonic()
    with pytest.raises(TierTimeout, match="not connected within"), connections.lease(started + 60.0):
        pass
    assert time.monotonic() - started < 30.0
    trickling.finish.set()
    assert trickling.hung_up.wait(DEADLINE_S)
    connections.close()


def test_while_attempts_to_connect_do_not_end_no_more_are_begun(trickling: Trickling) -> None:
    connections = Connections(trickling.url, 20, 0.5, Breaker(0.0))

    def attempt(_: int = 0) -> str:
        try:
            with connections.lease(time.monotonic() + DEADLINE_S):
                return "connected"
        except TierTimeout as error:
            return str(error)

    with ThreadPoolExecutor(20) as threads:  # a thread that comes late may be told so already
        assert sum("not connected within" in error for error in threads.map(attempt, range(20))) >= 16
    assert "have not ended yet" in attempt()
    trickling.finish.set()
    wait_until(lambda: attempt() == "connected")
    connections.close()


@pytest.mark.usefixtures("lanes")
def test_nothing_is_written_to_buffers_after_a_timeout(
    own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    content = large(root, 4)
    tier = make_tier(own_server.url)
    content.write(tier)
    into = content.buffers()
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TierTimeout):
            list(tier.read(into, 0.1))
        before = [bytes(buffer) for buffer in into.values()]
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert content.read(tier) == content.keys
    assert [bytes(buffer) for buffer in into.values()] == before


@pytest.mark.alone
def test_stores_waiting_for_a_hung_write_do_not_hold_up_loads(
    own_server: EmbeddedServer, proxy: Proxy, make_tier: MakeTier, root: Root
) -> None:
    content = Content(root, 4)
    tier = make_tier(proxy.url, connections=1)
    content.write(tier)
    assert content.read(tier) == content.keys
    held = threading.Event()
    release = threading.Event()

    def hold() -> None:
        with tier._nodes.talk(time.monotonic() + 5):
            held.set()
            release.wait(5)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(5)
    try:
        assert content.read(tier) == content.keys
        started = time.monotonic()
        with pytest.raises(TierTimeout, match="no connection became free"):
            tier.write(content.parts, content.meta, 0.1)
        assert time.monotonic() - started < 2
        assert all(tier.contains(content.keys, DEADLINE_S))
    finally:
        release.set()
        holder.join()


# ── breaker ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.alone
def test_calls_while_the_breaker_is_open_cost_next_to_nothing(make_tier: MakeTier, root: Root, tmp_path: Path) -> None:
    content = Content(root, 2)
    tier = make_tier(f"unix://{tmp_path}/nobody", healthy=False, breaker_open_s=60.0)
    with pytest.raises(TierUnavailable):
        tier.contains(content.keys, DEADLINE_S)
    assert tier.refuses
    calls: list[Callable[[], object]] = [
        lambda: tier.contains(content.keys, DEADLINE_S),
        lambda: list(tier.read(content.buffers(), DEADLINE_S)),
        lambda: content.write(tier),
        lambda: tier.remove(content.keys),
    ]
    for call in calls:
        costs = []
        for _ in range(50):
            started = time.perf_counter()
            with pytest.raises(TierUnavailable):
                call()
            costs.append(time.perf_counter() - started)
        assert sorted(costs)[len(costs) // 4] < 0.001  # a busy machine may hold up some


@pytest.mark.alone
def test_touch_costs_its_caller_nothing_when_the_server_is_gone(
    make_tier: MakeTier, root: Root, tmp_path: Path
) -> None:
    keys = Content(root, 2).keys
    tier = make_tier(f"unix://{tmp_path}/nobody", healthy=False)
    costs = []
    for _ in range(50):
        started = time.perf_counter()
        tier.touch(keys, NO_HINT)
        costs.append(time.perf_counter() - started)
    assert sorted(costs)[len(costs) // 4] < 0.001


def test_of_touches_that_cannot_be_sent_so_many_wait_and_the_others_are_dropped_and_counted(
    tier: RedisTier, client: redis.Redis, root: Root
) -> None:
    first, *chats = [Content(root, 1, seed=seed) for seed in range(401)]
    assert tier.settle(DEADLINE_S)
    client.client_pause(60_000, all=False)  # whoever writes
    try:
        tier.touch(first.keys, NO_HINT)
        wait_until(lambda: tier._upkeep._busy and not tier._upkeep._waiting)
        for chat in chats:
            tier.touch(chat.keys, NO_HINT)
    finally:
        client.client_unpause()
    assert tier.settle(DEADLINE_S)
    assert tier.stats.get("redis.dropped_touches") == 400 - 256
    assert tier.stats.get("redis.touched_blocks") == 1 + 256


def test_breaker_lets_one_call_try_and_says_each_change_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvstore.tiers.redis")
    error = TierUnavailable("redis", "gone")
    breaker = Breaker(open_s=60.0)
    breaker.admit()
    for _ in range(3):
        breaker.failed(error)
    with pytest.raises(TierUnavailable, match="gone"):
        breaker.admit()
    impatient = Breaker(open_s=0.05)
    impatient.failed(error)
    deadline = time.monotonic() + 5
    admitted = 0
    while not admitted and time.monotonic() < deadline:
        with suppress(TierUnavailable):
            impatient.admit()
            admitted += 1
    with pytest.raises(TierUnavailable):
        impatient.admit()  # the probe is under way
    impatient.succeeded()
    impatient.admit()
    assert [re.split(r": | \(", record.message)[1] for record in caplog.records] == [
        "off until it answers again",
        "off until it answers again",
        "answers again",
    ]


def test_short_deadlines_passing_in_silence_open_the_breaker_only_in_a_row(
    own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    content = Content(root, 3)
    tier = make_tier(own_server.url, breaker_open_s=0.05)
    content.write(tier)
    assert all(tier.contains(content.keys, DEADLINE_S))
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            assert tier.stats.get("redis.available") == 1
            with pytest.raises(TierTimeout):
                tier.contains(content.keys, 0.01)
        assert tier.stats.get("redis.available") == 0
        with pytest.raises(TierUnavailable):
            tier.contains(content.keys, 0.01)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    answered_within(5, lambda: all(tier.contains(content.keys, 0.5)))
    assert tier.stats.get("redis.available") == 1


def test_a_process_that_is_held_up_does_not_take_a_server_that_answered_for_one_that_hangs(
    own_server: EmbeddedServer,
) -> None:
    breaker = Breaker(60.0)
    connections = Connections(own_server.url, 1, DEADLINE_S, breaker)

    def ask_and_be_held_up() -> None:
        began_s = time.monotonic()
        with connections.lease(began_s + DEADLINE_S) as wire:
            wire.send([command("PING")], began_s + DEADLINE_S)
            wait_until(lambda: wire.has_answered and time.monotonic() > began_s + 0.2)
            wire.reply(began_s + 0.2)

    with pytest.raises(TierTimeout):
        ask_and_be_held_up()
    assert breaker.num_failures == 0
    connections.close()


def test_a_short_deadline_that_passed_long_ago_is_a_doubt_like_any_other(own_server: EmbeddedServer) -> None:
    breaker = Breaker(60.0)
    connections = Connections(own_server.url, 1, DEADLINE_S, breaker)

    def hear_nothing_for_a_moment() -> None:
        began_s = time.monotonic()
        with connections.lease(began_s + 0.01) as wire:
            wait_until(lambda: time.monotonic() > began_s + 0.2)
            wire.reply(began_s + 0.01)

    for num_failures in (0, 0, 1):
        with pytest.raises(TierTimeout):
            hear_nothing_for_a_moment()
        assert breaker.num_failures == num_failures
    connections.close()


def answered_within(limit_s: float, call: Callable[[], bool]) -> None:
    """Call until it gives True, letting tier errors pass."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with suppress(TierError):
            assert call()
            return
    pytest.fail(f"no answer within {limit_s} s")


def test_tier_recovers_by_itself_once_the_server_is_back(
    own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    content = Content(root, 3)
    tier = make_tier(own_server.url, breaker_open_s=0.05)
    content.write(tier)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TierTimeout):
            tier.contains(content.keys, 0.1)
        with pytest.raises(TierUnavailable):
            tier.contains(content.keys, 0.1)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    answered_within(5, lambda: all(tier.contains(content.keys, 0.5)))


def test_slow_answer_does_not_open_the_breaker(
    own_server: EmbeddedServer, proxy: Proxy, make_tier: MakeTier, root: Root
) -> None:
    content = large(root, 8)
    content.write(make_tier(own_server.url))
    release = threading.Event()

    def slowly(passed: int, data: bytes) -> bytes:
        if passed > 1_500_000:
            release.wait(0.2)
        return data

    proxy.rule = slowly
    tier = make_tier(proxy.url, healthy=False, breaker_open_s=60.0)
    with pytest.raises(TierTimeout):
        content.read(tier, 0.5)
    release.set()
    assert content.read(tier) == content.keys


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────


NOT_OURS = {"IncorrectPolicyType"}
"""Raised while routing custom commands in a Cluster, which no connection does."""


def every_redis_error() -> list[Exception]:
    """One of each exception redis-py defines, made without its constructor's help."""
    kinds = [
        kind
        for _, kind in inspect.getmembers(redis.exceptions, inspect.isclass)
        if issubclass(kind, Exception) and kind.__module__ == "redis.exceptions" and kind.__name__ not in NOT_OURS
    ]
    return [kind.__new__(kind, "reason") for kind in kinds]


@pytest.mark.parametrize("error", every_redis_error(), ids=lambda error: type(error).__name__)
def test_every_error_of_redis_py_leaves_as_a_tier_error(error: Exception) -> None:
    expected = TierTimeout if isinstance(error, redis.exceptions.TimeoutError) else TierUnavailable
    with pytest.raises(expected), map_redis_errors():
        raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError("late"), TierTimeout),
        (ConnectionResetError(), TierUnavailable),
        (BrokenPipeError(), TierUnavailable),
        (ProtocolBroken("what"), TierUnavailable),
        (ReplyError("LOADING Redis is loading"), TierUnavailable),
    ],
)
def test_errors_below_redis_py_leave_as_tier_errors(error: Exception, expected: type[TierError]) -> None:
    with pytest.raises(expected), map_redis_errors():
        raise error


def test_errors_of_our_own_making_are_not_hidden() -> None:
    with pytest.raises(KeyError), map_redis_errors():
        raise KeyError("a fault in the code")


def test_wrong_password_is_said_to_be_one(own_server: EmbeddedServer, make_tier: MakeTier, root: Root) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("requirepass", "right")
    keys = Content(root, 1).keys
    with pytest.raises(TierUnavailable, match="(?i)auth|password"):
        make_tier(own_server.url, healthy=False).contains(keys, DEADLINE_S)
    with pytest.raises(TierUnavailable, match="password"):
        make_tier(own_server.url + "?password=wrong", healthy=False).contains(keys, DEADLINE_S)
    tier = make_tier(own_server.url + "?password=right&db=3")
    assert Content(root, 1).write(tier) == set(keys)
    assert "right" not in repr(tier.options)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "http://somewhere"},
        {"num_buckets": 0},
        {"num_buckets": 257},
        {"connections": 0},
        {"capacity_bytes": -1},
        {"call_timeout_s": 0.0},
        {"codec": "zip"},
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RedisTier(RedisTier.Options(**{"url": "unix:///nowhere", **options}))  # type: ignore[arg-type]


def test_closed_tier_refuses_calls(server: EmbeddedServer, make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(server.url, healthy=False)
    content = Content(root, 2)
    content.write(tier)
    tier.close()
    with pytest.raises(TierUnavailable, match="closed"):
        content.read(tier)
