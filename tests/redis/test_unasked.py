# SPDX-License-Identifier: Apache-2.0
"""A server that no request needs: what is known of it stays true, and costs it and requests next to nothing."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from kvstore.block import Root
from kvstore.errors import TierTimeout, TierUnavailable
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_breaker import Breaker
from kvstore.tiers.redis_nodes import many
from kvstore.tiers.redis_pool import Connections
from kvstore.tiers.redis_wire import command
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions, embedded_binary
from tests.ports import free_ports
from tests.redis.cluster import Cluster, until
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.redis.pair import Pair, Server
from tests.redis.test_cluster import own_cluster
from tests.redis.test_faults import Proxy, proxy

pytestmark = pytest.mark.slow  # seconds of silence, until a server is seen to be gone

__all__ = ["own_cluster", "proxy"]  # fixtures

PING_S = 0.05
SOON = {"ping_every_s": PING_S, "breaker_open_s": PING_S, "connect_timeout_s": 0.5, "call_timeout_s": 5.0}


def available(tier: RedisTier) -> bool:
    return bool(tier.stats.get("redis.available"))


def asked(client: Any, *commands: str) -> int:
    """How often the server was asked this."""
    stats = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in commands)


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_server_is_shown_as_gone_and_back_and_no_request_pays_for_finding_out(
    make_tier: MakeTier, root: Root
) -> None:
    (port,) = free_ports(1)
    content = Content(root, 3)
    with EmbeddedServer(ServerOptions(port=port)) as server:
        tier = make_tier(server.url, healthy=False, **SOON)
        content.write(tier)
    until(lambda: not available(tier))
    with pytest.raises(TierUnavailable, match="not tried again yet"):
        tier.contains(content.keys, DEADLINE_S)
    with EmbeddedServer(ServerOptions(port=port)):
        until(lambda: available(tier))
        assert content.read(tier) == []
        assert content.write(tier) == set(content.keys)


def test_a_hung_server_is_shown_as_gone_and_back(own_server: EmbeddedServer, make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(own_server.url, **SOON)
    Content(root, 3).write(tier)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        until(lambda: not available(tier))
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    until(lambda: available(tier))


def test_where_every_call_tries_a_server_that_came_back_is_found_as_well(make_tier: MakeTier) -> None:
    (port,) = free_ports(1)
    with EmbeddedServer(ServerOptions(port=port)) as server:
        tier = make_tier(server.url, healthy=False, **{**SOON, "breaker_open_s": 0.0})
    until(lambda: not available(tier))
    with EmbeddedServer(ServerOptions(port=port)):
        until(lambda: available(tier))


def test_a_primary_that_became_a_replica_is_shown_as_gone_until_it_is_one_again(
    pair: Pair, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(f"redis://127.0.0.1:{pair.primary.port}", healthy=False, **SOON)
    Content(root, 3).write(tier)
    pair.primary.client.replicaof("127.0.0.1", pair.replica.port)
    until(lambda: not available(tier))
    pair.primary.client.replicaof("NO", "ONE")
    until(lambda: available(tier))


def test_a_primary_of_a_cluster_is_shown_as_gone_until_its_replica_took_over(
    own_cluster: Cluster, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(own_cluster.url, healthy=False, num_buckets=64, **SOON)
    Content(root, 8).write(tier)
    own_cluster.kill_primary(0)
    until(lambda: not available(tier))
    own_cluster.wait_for_failover(0)
    until(lambda: available(tier))  # and nobody has asked


def test_a_server_that_cannot_save_to_its_disk_is_there(make_tier: MakeTier, root: Root, tmp_path: Path) -> None:
    """It refuses a PING with the same words as a write; what it has can be read all the same."""
    server = Server(embedded_binary(), tmp_path, "--save", "3600 1000000")
    try:
        content = Content(root, 2)
        tier = make_tier(f"redis://127.0.0.1:{server.port}", healthy=False, **SOON)
        content.write(tier)
        shutil.rmtree(tmp_path / str(server.port))
        server.client.bgsave()
        until(lambda: server.client.info("persistence")["rdb_last_bgsave_status"] == "err")
        with pytest.raises(redis.ResponseError, match="MISCONF|not able to persist"):
            server.client.ping()
        num_before = asked(server.client, "hello")
        until(lambda: asked(server.client, "hello") >= num_before + 5)
        assert available(tier)
        assert content.read(tier) == content.keys
    finally:
        server.close()


# ── what it costs ───────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def connections_of(url: str, breaker: Breaker) -> Iterator[Connections]:
    connections = Connections(url, 1, 1.0, breaker)
    try:
        yield connections
    finally:
        breaker.close()
        connections.close()


def test_a_server_is_asked_where_it_was_silent_for_long_enough_and_no_sooner(own_server: EmbeddedServer) -> None:
    breaker = Breaker(60.0)
    with connections_of(own_server.url, breaker) as connections, redis.Redis.from_url(own_server.url) as client:
        num_before = asked(client, "ping")
        assert connections.ping(60.0) == 60.0  # never heard
        assert asked(client, "ping") == num_before + 1
        assert 50.0 < connections.ping(60.0) <= 60.0
        assert asked(client, "ping") == num_before + 1
        deadline = time.monotonic() + DEADLINE_S
        heard_at = breaker.heard_at
        with connections.lease(deadline):
            pass  # nothing is said
        assert breaker.heard_at == heard_at
        with connections.lease(deadline) as wire:
            wire.send([command("ECHO", "x")], deadline)
            wire.reply(deadline)
        assert breaker.heard_at > heard_at
        assert connections.ping(0.0) == 0.0
        assert asked(client, "ping") == num_before + 2
        assert client.info("clients")["connected_clients"] == 2  # one of ours, used again


def test_a_server_that_is_off_gets_no_ping_beside_its_probe(own_server: EmbeddedServer) -> None:
    breaker = Breaker(60.0)
    with connections_of(own_server.url, breaker) as connections, redis.Redis.from_url(own_server.url) as client:
        breaker.probe = connections.probe
        breaker.failed(TierUnavailable("redis", "gone"))
        before = asked(client, "ping"), client.info("stats")["total_connections_received"]
        assert connections.ping(0.0) == 0.0
        assert (asked(client, "ping"), client.info("stats")["total_connections_received"]) == before


def test_a_server_that_is_away_for_long_is_tried_more_and_more_rarely() -> None:
    num_probes = 0

    def probe() -> None:
        nonlocal num_probes
        num_probes += 1
        raise TierUnavailable("redis", "gone")

    breaker = Breaker(0.01)
    breaker.probe = probe
    breaker.failed(TierUnavailable("redis", "gone"))
    time.sleep(2.0)
    breaker.close()
    assert 5 <= num_probes < 110  # at once 20, and then one in a twentieth of a second; else 200 and more


def test_loads_do_not_wait_for_a_ping_that_is_not_answered(
    own_server: EmbeddedServer, proxy: Proxy, make_tier: MakeTier, root: Root
) -> None:
    content = Content(root, 4)
    content.write(make_tier(own_server.url))
    pinged, release = threading.Event(), threading.Event()

    def hold_pong(passed: int, data: bytes) -> bytes:
        if b"PONG" in data:
            pinged.set()
            release.wait(DEADLINE_S)
        return data

    proxy.rule = hold_pong
    tier = make_tier(proxy.url, connections=1, ping_every_s=PING_S, connect_timeout_s=30.0)
    try:
        assert pinged.wait(DEADLINE_S)
        assert content.read(tier) == content.keys
        assert all(tier.contains(content.keys, DEADLINE_S))
        assert not release.is_set()
    finally:
        release.set()


def test_a_server_that_hangs_in_a_sweep_is_given_up_long_before_the_sweep_is(
    own_server: EmbeddedServer, make_tier: MakeTier
) -> None:
    tier = make_tier(own_server.url)
    deadline = time.monotonic() + 60

    def hang() -> None:
        with tier._nodes.talk(deadline, 0.2) as talk:
            many(talk, [command("PING")], deadline)
            os.kill(own_server.pid, signal.SIGSTOP)
            many(talk, [command("PING")], deadline)

    try:
        with pytest.raises(TierTimeout):
            hang()
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert time.monotonic() < deadline - 30
