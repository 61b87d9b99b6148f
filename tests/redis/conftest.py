# SPDX-License-Identifier: Apache-2.0
"""Real servers, tiers on them that must be healthy when a test ends, and a client that meddles."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from kvstore.block import ModelId
from kvstore.layout import layout_of
from kvstore.tiers import redis as redis_tier
from kvstore.tiers import redis_lanes
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_lanes import LaneChoice, Sizes
from kvstore.tiers.redis_pool import Connections
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions, embedded_binary
from tests.patient import REDIS
from tests.redis.pair import Pair, Pointer
from tests.redis.rights import add_user, as_user

MakeTier = Callable[..., RedisTier]
SERVERS = ("valkey", "redis")
_restricted: set[str] = set()
"""URLs of servers on which tiers are made as a user who may do what doctor names, and no more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("redis")


def binary_of(kind: str) -> Path | None:
    """None for the embedded Valkey. Skips, saying so, where Redis is not installed."""
    if kind == "valkey":
        return None
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("NOT TESTED AGAINST REDIS: no redis-server here; apt-get install redis-server")
    return Path(found)


@pytest.fixture(scope="session", params=SERVERS)
def shared_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(ServerOptions(binary=binary_of(request.param))) as server:
        with redis.Redis.from_url(server.url) as client:
            add_user(client)
        _restricted.add(server.url)
        yield server


@pytest.fixture
def server(shared_server: EmbeddedServer) -> EmbeddedServer:
    """A server of each kind, empty."""
    with redis.Redis.from_url(shared_server.url) as client:
        client.flushall()
    return shared_server


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """A Valkey that the test may stop, fill or kill."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture(params=[1, 3], ids=["one-lane", "three-lanes"])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As many connections are taken by any load at all, a value of each in turns; the first load finds them there."""
    take_lanes(monkeypatch, request.param, Sizes(1, 1))
    return int(request.param)


def take_lanes(monkeypatch: pytest.MonkeyPatch, count: int, sizes: Sizes | None = None) -> None:
    """Tiers made from now on take so many for each load that is large enough, and try no others."""
    monkeypatch.setattr(redis_tier, "LaneChoice", lambda most: LaneChoice(most, min(most, count), sizes or Sizes()))
    monkeypatch.setattr(redis_lanes, "_FIRST_S", 1e9)
    monkeypatch.setattr(Connections, "prepare", Connections._prepare)


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def make_tier(model: ModelId) -> Iterator[MakeTier]:
    """Makes tiers on a URL; each must end healthy, unless the test says that its server is gone."""
    made: list[tuple[RedisTier, bool]] = []

    def make(url: str, *, healthy: bool = True, **options: object) -> RedisTier:
        url = as_user(url) if url in _restricted else url
        tier = RedisTier(RedisTier.Options(url=url, **{"breaker_open_s": 0.0, **REDIS, **options}))  # type: ignore[arg-type]
        tier.open(layout_of(model))
        made.append((tier, healthy))
        return tier

    yield make
    try:
        for tier, healthy in made:
            if healthy:
                assert tier.settle(5)
                assert tier.check() == []
    finally:
        for tier, _ in made:
            tier.close()


@pytest.fixture
def tier(server: EmbeddedServer, make_tier: MakeTier) -> RedisTier:
    return make_tier(server.url)


@pytest.fixture(params=SERVERS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(binary_of(request.param) or embedded_binary(), tmp_path)
    yield pair
    pair.close()


@pytest.fixture
def pointer(pair: Pair) -> Iterator[Pointer]:
    pointer = Pointer(pair.primary.port)
    yield pointer
    pointer.close()
