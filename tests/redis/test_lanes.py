# SPDX-License-Identifier: Apache-2.0
"""A load over several connections: how many it takes is measured, and whoever comes beside it still finds one.

That its values are the right ones, and that nothing is written once it ended, the tests of values and of faults show,
which run over one lane and over three.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import cast

import pytest
import redis

from kvstore.block import BlockId, PartKey, Root
from kvstore.errors import ConfigError
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_beside import BesideRead, end_all
from kvstore.tiers.redis_lanes import LaneChoice
from kvstore.tiers.redis_pool import Connections
from kvstore.tiers.redis_read import Counts, Reader
from kvstore.tiers.valkey import EmbeddedServer
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import wait_until

LOAD_BYTES = 256 << 20


class Loads:
    """Loads of 256 MiB whose time scatters by a tenth, by how many lanes they take."""

    def __init__(self, most: int, seconds: Callable[[int], float], seed: int = 0) -> None:
        self.choice = LaneChoice(most)
        self.seconds = seconds
        self._random = random.Random(seed)
        self.lanes: list[int] = []

    def run(self, count: int) -> list[int]:
        """How many lanes each took."""
        for _ in range(count):
            lanes = self.choice.draw()
            self.lanes.append(lanes)
            self.choice.took(lanes, LOAD_BYTES, self.seconds(lanes) * self._random.gauss(1, 0.1))
        return self.lanes[-count:]


def flow_by_flow(lanes: int) -> float:
    """A network that gives each connection so much."""
    return 0.8 / lanes


def two_cores(lanes: int) -> float:
    """Client and server have them together: another connection is another thread that wants one."""
    return 0.1 * (1 + 0.2 * (lanes - 1))


@pytest.mark.parametrize("seed", range(5))
def test_where_flows_are_limited_loads_take_as_many_lanes_as_they_may(seed: int) -> None:
    loads = Loads(4, flow_by_flow, seed)
    loads.run(80)
    assert loads.choice.best == 4
    assert set(Loads(3, flow_by_flow, seed).run(200)) == {1, 2}, "lanes double, up to the most there may be"


@pytest.mark.parametrize("seed", range(5))
def test_where_more_lanes_are_slower_loads_keep_to_one_and_trying_costs_little(seed: int) -> None:
    loads = Loads(4, two_cores, seed)
    loads.run(2_000)
    assert loads.choice.best == 1
    cost = sum(map(two_cores, loads.lanes)) / (len(loads.lanes) * two_cores(1)) - 1
    assert 0 < cost < 0.01


def test_where_it_makes_no_difference_comparisons_end() -> None:
    loads = Loads(2, lambda lanes: 0.1)
    assert set(loads.run(45)) == {1}, "not tried before loads have taken some seconds"
    assert set(loads.run(75)) == {1, 2}
    assert not loads.choice.is_comparing


@pytest.mark.parametrize("seed", range(5))
def test_lanes_that_became_slower_are_given_up(seed: int) -> None:
    loads = Loads(4, flow_by_flow, seed)
    loads.run(80)
    loads.seconds = two_cores
    loads.run(3_000)
    assert loads.choice.best == 1


def test_loads_with_fewer_lanes_than_they_were_to_take_say_nothing() -> None:
    choice = LaneChoice(8)
    for _ in range(100):
        choice.draw()
        assert not choice.took(3, LOAD_BYTES, 1.0)
    assert choice.best == 1


@pytest.fixture
def content(root: Root) -> Content:
    """24 MiB: three lanes' worth."""
    return Content(Root(replace(root.model, head_dim=4096)), 24)


@pytest.fixture
def tier(server: EmbeddedServer, make_tier: MakeTier, content: Content) -> RedisTier:
    tier = make_tier(server.url, lanes=4)
    tier.open(content.layout)
    assert content.write(tier) == set(content.keys)
    assert tier.settle(DEADLINE_S)  # upkeep has its connections
    return tier


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaneChoice, "draw", lambda self: 4)


def num_clients(client: redis.Redis) -> int:
    return len(client.client_list())


def test_a_small_load_takes_one(
    server: EmbeddedServer, make_tier: MakeTier, root: Root, client: redis.Redis, many: None
) -> None:
    content = Content(root, 16)
    tier = make_tier(server.url)
    tier.open(content.layout)
    content.write(tier)
    assert tier.settle(DEADLINE_S)
    before = num_clients(client)
    assert content.read(tier) == content.keys
    assert num_clients(client) == before + 1


def test_a_large_load_takes_a_lane_for_each_8_mib(
    tier: RedisTier, content: Content, client: redis.Redis, many: None
) -> None:
    before = num_clients(client)
    assert content.read(tier) == content.keys
    assert num_clients(client) == before + 3


def test_lanes_are_asked_for_the_first_values_before_what_follows_has_its_buffers(
    tier: RedisTier, content: Content, client: redis.Redis, many: None
) -> None:
    buffers = content.buffers()
    assert tier.settle(DEADLINE_S)

    def num_gets() -> int:
        return int(client.info("commandstats").get("cmdstat_get", {}).get("calls", 0))

    before = num_gets()

    def more() -> dict[PartKey, memoryview]:
        wait_until(lambda: num_gets() > before)
        return {key: buffers[key] for key in content.keys[1:]}

    first = {content.keys[0]: buffers[content.keys[0]]}
    assert list(chain.from_iterable(tier.read_on(first, more, DEADLINE_S))) == content.keys
    assert buffers == content.parts


def test_beside_a_large_load_others_find_a_connection(
    tier: RedisTier, content: Content, client: redis.Redis, many: None
) -> None:
    """It holds one of those for loads, and leaves the other; of those beside, it has as many as it uses."""
    before = num_clients(client)
    reading = iter(tier.read(content.buffers(), DEADLINE_S))
    first = next(reading)
    assert tier.contains(content.keys, DEADLINE_S) == [True] * len(content.keys)
    assert content.read(tier) == content.keys, "with the lane that is left"
    assert [*first, *chain.from_iterable(reading)] == content.keys
    assert num_clients(client) <= before + 5


def test_loads_at_once_bring_what_each_asked_for(tier: RedisTier, content: Content, many: None) -> None:
    brought: list[list[PartKey]] = []
    threads = [threading.Thread(target=lambda: brought.append(content.read(tier, 30.0))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert brought == [content.keys] * 6


def test_a_choice_is_made_and_shown(tier: RedisTier, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads are timed by a clock under which each lane takes as long as it has bytes."""
    took = LaneChoice.took
    monkeypatch.setattr(LaneChoice, "took", lambda self, lanes, size, _: took(self, lanes, size, flow_by_flow(lanes)))
    for _ in range(36):
        assert content.read(tier) == content.keys
    assert tier.stats.snapshot()["redis.lanes"] == 2, "24 MiB are worth three, and lanes double"


def test_no_lane_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="lanes is 0"):
        RedisTier.Options(lanes=0)


class _Late:
    """A reader that writes to its buffer when it may, and a wire whose end it does not notice at once."""

    def __init__(self) -> None:
        self.reads, self.may_write, self.aborted = threading.Event(), threading.Event(), threading.Event()

    @contextmanager
    def lease(self, deadline: float) -> Iterator[_Late]:
        yield self

    def abort(self) -> None:
        self.aborted.set()

    def read(self, wire: object, into: Mapping[PartKey, memoryview], *_: object) -> Iterator[list[PartKey]]:
        self.reads.set()
        self.may_write.wait(DEADLINE_S)
        for key, buffer in into.items():
            buffer[:1] = b"!"
            yield [key]


def test_who_ends_a_read_waits_until_it_writes_no_more(root: Root) -> None:
    late, key = _Late(), PartKey(root.id, BlockId(b"b" * 32), 0)
    buffer = memoryview(bytearray(8))
    read = BesideRead(cast(Connections, late), {key: buffer})
    read.start(cast(Reader, late), DEADLINE_S)
    assert late.reads.wait(DEADLINE_S)
    ending = threading.Thread(target=end_all, args=([read], [], Counts()))
    ending.start()
    assert late.aborted.wait(DEADLINE_S)
    ending.join(0.1)
    assert ending.is_alive(), "it may write yet"
    late.may_write.set()
    ending.join(DEADLINE_S)
    assert not ending.is_alive()
