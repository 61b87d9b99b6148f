# SPDX-License-Identifier: Apache-2.0
"""The short form of `python -m bench faults`: stores under random faults serve right bytes, on time, and recover."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from bench.failover import WAYS, measure_failover
from bench.faults import MODEL, Soak, run_soak, soak_servers
from bench.host_hits import store_config
from bench.redis_proxy import ERRORS, KINDS, Fault, FaultProxy, reply_length, spoiled
from kvstore.block import PartKey, Root
from kvstore.errors import TierTimeout, TierUnavailable
from kvstore.tiers.valkey import EmbeddedServer
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import wait_until


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("server", ["valkey", "redis"])
def test_stores_under_random_faults_serve_right_bytes_on_time_and_recover(server: str) -> None:
    servers = soak_servers()
    if server not in servers:
        pytest.skip("NOT TESTED AGAINST REDIS: no redis-server here; apt-get install redis-server")
    # A machine that stands still for a moment makes calls late; a store that waits too long does so each time.
    for _ in range(3):
        soak = run_soak(200, random.SystemRandom().getrandbits(31), lambda: None, servers[server])
        assert soak.errors == []
        assert (soak.wrong_bytes, soak.leaked_slots, soak.recovered) == (0, 0, True), soak.broken
        if not soak.late_calls:
            break
    assert soak.broken == []
    assert soak.passed
    assert sum(soak.faults.values()) >= 200
    assert soak.blocks_served > 0
    assert soak.loads_over_lanes > 0


@pytest.mark.alone
@pytest.mark.slow
def test_a_failover_is_measured_from_the_new_primary_to_the_last_block() -> None:
    content = [random.Random(at).randbytes(8192) for at in range(12)]
    found = measure_failover(MODEL, store_config(0.25, 5.0, 5.0), content, 0.25, 1)
    assert found["failover_wrong_blocks"] == 0
    assert found["failover_requests"] > 100
    for way in WAYS:
        assert 0 < found[f"failover_{way}_back_ms"] < 5000


@pytest.mark.parametrize(
    "soak",
    [Soak(wrong_bytes=1), Soak(late_calls=1), Soak(leaked_slots=1), Soak(errors=["x"]), Soak(recovered=False)],
)
def test_soak_passes_only_where_nothing_went_wrong(soak: Soak) -> None:
    assert not soak.passed
    assert Soak().passed


@pytest.mark.parametrize(
    "reply", [b"+OK\r\n", b"$-1\r\n", b"$3\r\nabc\r\n", b"*2\r\n:1\r\n*1\r\n$1\r\nx\r\n", b"*-1\r\n"]
)
def test_proxy_knows_where_a_reply_ends(reply: bytes) -> None:
    assert reply_length(reply + b"+next\r\n", 0) == len(reply)
    assert all(reply_length(reply[:at], 0) is None for at in range(len(reply)))


@pytest.mark.parametrize("kind", [*ERRORS, "nil", "flip", "truncate", "short"])
def test_proxy_spoils_the_reply_it_was_told_to(kind: str) -> None:
    assert spoiled(b"$64\r\n" + b"x" * 64 + b"\r\n", Fault(kind, 0, 3)) != b"$64\r\n" + b"x" * 64 + b"\r\n"


@pytest.mark.parametrize("kind", KINDS)
def test_fault_strikes_once_and_no_byte_of_it_is_believed(
    kind: str, own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    content = Content(root, 6)
    content.write(make_tier(own_server.url, healthy=False))
    with FaultProxy(own_server.unix_url.removeprefix("unix://")) as proxy:
        tier = make_tier(proxy.url, healthy=False)
        assert content.read(tier) == content.keys
        assert tier.settle(DEADLINE_S)  # its first look at the server must not be what the fault strikes
        proxy.arm(Fault(kind, 2, 5, 0.05))
        delivered: list[PartKey] = []

        def struck() -> bool:
            delivered.clear()
            with suppress(TierTimeout, TierUnavailable):
                delivered.extend(content.read(tier, 0.3))  # holds each block against what was written
            return proxy.struck

        wait_until(struck)  # by the first read, unless its time was over before
        assert kind == "delay" or len(delivered) < len(content.keys)
        content.write(tier)  # what was damaged on the way was taken for damaged, and removed
        assert tier.settle(DEADLINE_S)
        content.write(tier)
        assert content.read(tier) == content.keys
