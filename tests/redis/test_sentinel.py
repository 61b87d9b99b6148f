# SPDX-License-Identifier: Apache-2.0
"""A primary that dies or is demoted: the tier follows, by Sentinels or by an address that leads elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from kvstore.api import NO_HINT
from kvstore.block import Root
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, TierError, TierUnavailable
from kvstore.service.doctor import Verdict, _redis
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_sentinel import Sentinels
from kvstore.tiers.valkey import embedded_binary
from tests.redis.cluster import free_ports, until
from tests.redis.conftest import SERVERS, MakeTier, binary_of
from tests.redis.content import DEADLINE_S, Content

BACK_WITHIN_S = 15.0
"""Of a failover: Sentinels notice after half a second, vote, promote, and we look every tenth of one."""


class Server:
    """A server, or a Sentinel, on a loopback port."""

    def __init__(self, binary: Path, directory: Path, *words: str, sentinel: str = "") -> None:
        (self.port,) = free_ports(1)
        home = directory / str(self.port)
        home.mkdir()
        config = home / "conf"
        config.write_text(sentinel)
        self.process = subprocess.Popen(
            [
                *(str(binary), str(config), *(["--sentinel"] if sentinel else [])),
                *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(home), "--logfile", str(home / "log")),
                *words,
            ],
            stdout=subprocess.DEVNULL,
        )
        self.client: Any = redis.Redis(port=self.port, socket_timeout=5)
        until(lambda: bool(self.client.ping()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.kill()
        self.client.close()


class Pair:
    """A primary and its replica."""

    def __init__(self, binary: Path, directory: Path) -> None:
        words = ("--save", "", "--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")
        self.binary, self.directory = binary, directory
        self.primary = Server(binary, directory, *words)
        self.replica = Server(binary, directory, *words, "--replicaof", f"127.0.0.1 {self.primary.port}")
        self.sentinels: list[Server] = []
        until(lambda: self.replica.client.info("replication").get("master_link_status") == "up")

    def watch(self, count: int = 3) -> str:
        """Start Sentinels; their URL."""
        text = (
            f"sentinel monitor cache 127.0.0.1 {self.primary.port} {count // 2 + 1}\n"
            "sentinel down-after-milliseconds cache 500\nsentinel failover-timeout cache 3000\n"
        )
        self.sentinels = [Server(self.binary, self.directory, sentinel=text) for _ in range(count)]

        def complete() -> bool:
            states = [each.client.sentinel_master("cache") for each in self.sentinels]
            return all(state["num-other-sentinels"] == count - 1 and state["num-slaves"] == 1 for state in states)

        until(complete)
        return "redis+sentinel://" + ",".join(f"127.0.0.1:{each.port}" for each in self.sentinels) + "/cache"

    def replicated(self) -> None:
        assert self.primary.client.wait(1, 5000) == 1

    def close(self) -> None:
        for server in (*self.sentinels, self.replica, self.primary):
            server.close()


@pytest.fixture(params=SERVERS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(binary_of(request.param) or embedded_binary(), tmp_path)
    yield pair
    pair.close()


def works(tier: RedisTier, content: Content) -> None:
    """Until blocks are written and read again, with no call of anybody else."""

    def whole() -> bool:
        with suppress(TierError):
            return content.write(tier) == set(content.keys) and content.read(tier) == content.keys
        return False

    until(whole, BACK_WITHIN_S)


# ── by Sentinels ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_hits_come_back_by_themselves_after_the_primary_was_killed(pair: Pair, make_tier: MakeTier, root: Root) -> None:
    url = pair.watch()
    tier = make_tier(url, breaker_open_s=0.1)
    content = Content(root, 20)
    assert content.write(tier) == set(content.keys)
    pair.replicated()
    pair.primary.kill()
    with pytest.raises(TierError):
        content.read(tier)
    until(lambda: pair.replica.client.role()[0] == b"master", BACK_WITHIN_S)

    def hits() -> bool:  # of what was written before the kill
        with suppress(TierError):
            return content.read(tier) == content.keys
        return False

    until(hits, BACK_WITHIN_S)
    assert tier.stats.get("redis.available") == 1
    works(tier, Content(root, 30))
    (pair.sentinels[0]).kill()  # one Sentinel less is none too few, and the first of the URL at that
    works(make_tier(url, breaker_open_s=0.1), Content(root, 5, seed=1))


@pytest.mark.slow
def test_a_switch_on_request_costs_a_refusal_and_no_wrong_byte(pair: Pair, make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(pair.watch(), breaker_open_s=0.05)
    content = Content(root, 20)
    content.write(tier)
    pair.replicated()
    stop = threading.Event()
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                for call in (content.write, content.read):
                    with suppress(TierError):
                        call(tier)  # reading holds each block against what was written
        except BaseException as error:
            wrong.append(error)
            raise

    thread = threading.Thread(target=work)
    thread.start()
    try:
        pair.sentinels[0].client.execute_command("SENTINEL", "FAILOVER", "cache")
        until(lambda: pair.primary.client.role()[0] == b"slave", BACK_WITHIN_S)
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    works(tier, content)
    assert pair.replica.client.dbsize() > 20
    assert tier.sweep()["damaged"] == 0


@pytest.mark.slow
def test_hung_sentinels_cost_the_deadline_and_no_more(pair: Pair, make_tier: MakeTier, root: Root) -> None:
    url = pair.watch()
    for sentinel in pair.sentinels:
        os.kill(sentinel.process.pid, signal.SIGSTOP)
    tier = make_tier(url, healthy=False, breaker_open_s=30.0)
    began = time.monotonic()
    with pytest.raises(TierError):
        tier.contains(Content(root, 2).keys, 0.3)
    assert time.monotonic() - began < 0.6
    for sentinel in pair.sentinels[1:]:
        os.kill(sentinel.process.pid, signal.SIGCONT)
    assert not any(make_tier(url).contains(Content(root, 2).keys, 2.0))  # the first still hangs
    assert next(_redis("redis", url, 1 << 20)).verdict is Verdict.OK


# ── without ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Pointer:
    """An address that leads to one server or the other, as a name or a virtual address does. Known connections stay."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self._sockets += [near, far]
            for pair in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=pair)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in (self._listener, *self._sockets):
            sock.close()


@pytest.fixture
def pointer(pair: Pair) -> Iterator[Pointer]:
    pointer = Pointer(pair.primary.port)
    yield pointer
    pointer.close()


def test_a_primary_demoted_under_open_connections_is_left_for_the_new_one(
    pair: Pair, pointer: Pointer, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(pointer.url, breaker_open_s=0.05)
    content = Content(root, 20)
    content.write(tier)
    assert content.read(tier) == content.keys
    pair.replicated()
    pair.replica.client.replicaof("NO", "ONE")
    pointer.target = pair.replica.port
    # The old one lives on, and our connections to it stay open: only its refusals tell.
    pair.primary.client.replicaof("127.0.0.1", pair.replica.port)
    longer = Content(root, 30)
    with suppress(TierUnavailable):
        longer.write(tier)
    works(tier, longer)
    ours = [client for client in pair.primary.client.client_list(_type="normal") if client["cmd"] != "client|list"]
    assert ours == []  # no connection is left that would go on reading there
    tier.touch(longer.keys, NO_HINT)
    assert tier.settle(DEADLINE_S)
    assert tier.stats.get("redis.touched_blocks") == 30


def test_a_replica_is_off_until_it_is_promoted(pair: Pair, make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(f"redis://127.0.0.1:{pair.replica.port}", breaker_open_s=0.05)
    content = Content(root, 5)
    with pytest.raises(TierUnavailable, match="READONLY"):
        content.write(tier)
    began = time.monotonic()
    refusals = 0
    while time.monotonic() - began < 0.5:  # many probes
        with pytest.raises(TierUnavailable):
            tier.contains(content.keys, DEADLINE_S)
        refusals += 1
    assert tier.stats.get("redis.available") == 0
    pair.replica.client.replicaof("NO", "ONE")
    works(tier, content)


# ── URLs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_url_names_sentinels_service_database_and_both_passwords() -> None:
    found = Sentinels.of(
        "rediss+sentinel://me:pw@a:26379,b:26380/cache/2?ssl_ca_certs=/ca.pem&sentinel_username=s&sentinel_password=p@q"
    )
    assert found is not None
    assert found.service == "cache"
    assert found.server_url == "rediss://me:pw@a:26379/2?ssl_ca_certs=%2Fca.pem"
    assert found._urls == [f"rediss://s:p%40q@{at}?ssl_ca_certs=%2Fca.pem" for at in ("a:26379", "b:26380")]
    assert Sentinels.of("redis://a:1/0") is None


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://a:26379",
        "redis+sentinel://a:26379/",
        "redis+sentinel://a/cache",
        "redis+sentinel://:1/cache",
        "redis+sentinel://a:1/cache/x",
    ],
)
def test_a_url_without_service_or_ports_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        RedisTier(RedisTier.Options(url=url))


def test_passwords_of_sentinels_are_not_shown() -> None:
    url = "redis+sentinel://me:s3cret@a:1/cache?sentinel_password=s3cret&db=1"
    config = StoreConfig.load({"tiers": {"redis": {"url": url}}}, environ={})
    assert "a:1/cache" in str(config.explain())
    assert "s3cret" not in str(config.explain())
