# SPDX-License-Identifier: Apache-2.0
"""A load over several connections: how many it takes is measured, and whoever comes beside it still finds one.

That its values are the right ones, and that nothing is written once it ended, the tests of values and of faults show,
which run over one lane and over three.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import pytest
import redis

from kvstore.block import BlockId, PartKey, Root
from kvstore.errors import ConfigError, TierTimeout, TierUnavailable
from kvstore.tiers import redis_lanes
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_beside import BesideRead, end_all
from kvstore.tiers.redis_breaker import Breaker
from kvstore.tiers.redis_lanes import LaneChoice, Turn
from kvstore.tiers.redis_names import Names
from kvstore.tiers.redis_pool import Connections
from kvstore.tiers.redis_read import Counts, Reader
from kvstore.tiers.redis_wire import Wire
from kvstore.tiers.valkey import EmbeddedServer
from tests.redis.conftest import MakeTier, take_lanes
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import wait_until

pytestmark = pytest.mark.slow  # loads by the hundred, which choices are made from

LOAD_BYTES = 256 << 20


class Loads:
    """Loads of 256 MiB, one after the other, whose time scatters by 30 %, by how many lanes they take."""

    num_ready = 4
    stalls = 0.0
    """Of loads: how many take ten times as long."""
    num_bytes: Callable[[random.Random], float] = staticmethod(lambda lot: LOAD_BYTES)

    def __init__(self, most: int, seconds: Callable[[int], float], seed: int = 0) -> None:
        self.choice = LaneChoice(most)
        self.seconds = seconds
        self._random = random.Random(seed)
        self.lanes: list[int] = []

    def run(self, count: int) -> list[int]:
        """How many lanes each took."""
        for _ in range(count):
            num_bytes = int(self.num_bytes(self._random))
            turn = self.choice.begin(num_bytes, self.num_ready)
            took_s = self.seconds(turn.num_lanes) * num_bytes / LOAD_BYTES * max(0.1, self._random.gauss(1, 0.3))
            self.lanes.append(turn.num_lanes)
            self.choice.took(turn, num_bytes, took_s * (10 if self._random.random() < self.stalls else 1))
            self.choice.leave(turn)
        return self.lanes[-count:]


def flow_by_flow(lanes: int) -> float:
    """A network that gives each connection so much."""
    return 0.8 / lanes


def two_cores(lanes: int) -> float:
    """Client and server have them together: another connection is another thread that wants one."""
    return 0.1 * (1 + 0.2 * (lanes - 1))


def of_many_sizes(lot: random.Random) -> float:
    """16 MiB to 16 GiB."""
    return (16 << 20) * 1000 ** lot.random()


@pytest.mark.parametrize("seed", range(5))
def test_where_flows_are_limited_loads_take_as_many_lanes_as_they_may(seed: int) -> None:
    loads = Loads(4, flow_by_flow, seed)
    loads.run(80)
    assert loads.choice.best == 4
    assert set(Loads(3, flow_by_flow, seed).run(200)) == {1, 2}, "lanes double, up to the most there may be"


@pytest.mark.parametrize("seed", range(5))
def test_lanes_are_found_among_loads_of_many_sizes_and_some_that_stall(seed: int) -> None:
    loads = Loads(4, flow_by_flow, seed)
    loads.num_bytes, loads.stalls = of_many_sizes, 0.05
    loads.run(120)
    assert loads.choice.best == 4


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stalls", [0.0, 0.05])
def test_where_more_lanes_are_slower_loads_keep_to_one_and_trying_costs_little(seed: int, stalls: float) -> None:
    loads = Loads(4, two_cores, seed)
    loads.stalls = stalls
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
    loads.run(6_000)
    assert loads.choice.best == 1


def test_loads_for_which_fewer_lanes_are_ready_or_worth_it_say_nothing_and_try_none() -> None:
    loads = Loads(4, flow_by_flow)
    loads.num_ready = 1
    assert set(loads.run(300)) == {1}
    loads.num_ready, loads.num_bytes = 4, lambda lot: 15 << 20
    assert set(loads.run(300)) == {1}
    assert loads.choice.best == 1


def test_large_loads_at_once_say_nothing_of_what_one_takes_from_the_other() -> None:
    choice = LaneChoice(4)
    turns = [choice.begin(LOAD_BYTES, 4) for _ in range(2)]
    for _ in range(300):  # whoever has more connections has more of the link
        turn = turns.pop(0)
        choice.took(turn, LOAD_BYTES, 0.2 / turn.num_lanes)
        choice.leave(turn)
        turns.append(choice.begin(LOAD_BYTES, 4))
        assert turns[-1].num_lanes == 1
    assert choice.best == 1


@pytest.fixture
def content(root: Root) -> Content:
    """24 MiB: three lanes' worth."""
    return Content(Root(replace(root.model, head_dim=4096)), 24)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    take_lanes(monkeypatch, 4)


@pytest.fixture
def tier(server: EmbeddedServer, make_tier: MakeTier, content: Content, many: None) -> RedisTier:
    tier = make_tier(server.url, lanes=4)
    tier.open(content.layout)
    assert content.write(tier) == set(content.keys)
    assert tier.settle(DEADLINE_S)  # upkeep has its connections
    return tier


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


def test_a_large_load_takes_a_lane_for_each_8_mib(tier: RedisTier, content: Content, client: redis.Redis) -> None:
    before = num_clients(client)
    assert content.read(tier) == content.keys
    assert num_clients(client) == before + 3


def test_lanes_are_asked_for_the_first_values_before_what_follows_has_its_buffers(
    tier: RedisTier, content: Content, client: redis.Redis
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


def test_beside_a_large_load_others_find_a_connection(tier: RedisTier, content: Content, client: redis.Redis) -> None:
    """It holds one of those for loads, and leaves the other; of those beside, it has as many as it uses."""
    before = num_clients(client)
    reading = iter(tier.read(content.buffers(), DEADLINE_S))
    first = next(reading)
    assert tier.contains(content.keys, DEADLINE_S) == [True] * len(content.keys)
    assert content.read(tier) == content.keys, "with the lane that is left"
    assert [*first, *chain.from_iterable(reading)] == content.keys
    assert num_clients(client) <= before + 5


def test_loads_at_once_bring_what_each_asked_for(tier: RedisTier, content: Content) -> None:
    brought: list[list[PartKey]] = []
    threads = [threading.Thread(target=lambda: brought.append(content.read(tier, 30.0))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert brought == [content.keys] * 6


def test_a_choice_is_made_and_shown(tier: RedisTier, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock under which each lane takes as long as it has bytes."""
    took = LaneChoice.took
    monkeypatch.setattr(LaneChoice, "took", lambda self, turn, *_: took(self, turn, 24 << 20, 1.0 / turn.num_lanes))
    monkeypatch.setattr(redis_lanes, "_FIRST_S", 5.0)
    tier.lanes = LaneChoice(4)
    for _ in range(36):
        assert content.read(tier) == content.keys
    assert tier.stats.snapshot()["redis.lanes"] == 2, "24 MiB are worth three, and lanes double"


@pytest.mark.parametrize("is_trial", [True, False])
def test_how_quick_a_trial_was_is_not_for_the_codecs_choice(is_trial: bool, tier: RedisTier, content: Content) -> None:
    """Loads from now on are not like it; of others it learns, by however many lanes they went."""

    class Tried(LaneChoice):
        def begin(self, num_bytes: int, num_ready: int) -> Turn:
            turn = super().begin(num_bytes, num_ready)
            turn.is_trial = is_trial
            return turn

    tier.lanes = Tried(4, 4)
    for _ in range(5):
        assert content.read(tier) == content.keys
    assert len(tier._codec.link._receives) == (0 if is_trial else 5)


def test_no_lane_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="lanes is 0"):
        RedisTier.Options(lanes=0)


class _Late:
    """A reader that writes to its buffer when it may, and a wire whose end it does not notice at once."""

    def __init__(self) -> None:
        self.reads, self.may_write, self.aborted = threading.Event(), threading.Event(), threading.Event()

    heard = True

    @contextmanager
    def lease(self) -> Iterator[_Late]:
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
    read = BesideRead(cast(AbstractContextManager[Wire], late.lease()), {key: buffer})
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


# ── what goes wrong in one of several ───────────────────────────────────────────────────────────────────────────


def begun(tier: RedisTier, into: Mapping[PartKey, memoryview]) -> tuple[list[PartKey], Iterator[Sequence[PartKey]]]:
    """What a load has brought first, and how it goes on."""
    reading = tier.read(into, DEADLINE_S)
    return list(next(reading)), reading


def test_what_a_lane_fails_of_its_caller_hears(
    tier: RedisTier, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that ends by an error that nobody expects leaves no hole that looks like missing values."""
    read = Reader.read

    def fail(self: Reader, wire: Wire, into: Mapping[PartKey, memoryview], *args: object, **more: object) -> object:
        if threading.current_thread().name == "kvstore-redis-read":
            raise MemoryError
        return read(self, wire, into, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Reader, "read", fail)
    with pytest.raises(MemoryError):
        content.read(tier)
    monkeypatch.undo()
    assert content.read(tier) == content.keys


def test_where_no_thread_is_to_be_had_the_load_reads_all_lanes_itself(
    tier: RedisTier, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert content.read(tier) == content.keys
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "kvstore-redis-read":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert content.read(tier) == content.keys


def test_a_server_that_lets_nobody_in_any_more_costs_lanes_and_nothing_else(
    own_server: EmbeddedServer, make_tier: MakeTier, content: Content, many: None
) -> None:
    tier = make_tier(own_server.url)
    tier.open(content.layout)
    content.write(tier)
    assert tier.settle(DEADLINE_S)
    assert tier.contains(content.keys[:1], DEADLINE_S) == [True]  # the connection of loads
    with redis.Redis.from_url(own_server.unix_url) as client:
        client.config_set("maxclients", num_clients(client))
        for _ in range(3):
            assert content.read(tier) == content.keys
        assert num_clients(client) <= 4
        client.config_set("maxclients", 1000)
    assert not tier.refuses
    assert tier._nodes._of_stripe[0].breaker.num_failures == 0


def test_lanes_that_others_take_meanwhile_are_done_without(tier: RedisTier, content: Content) -> None:
    assert content.read(tier) == content.keys
    buffers, taken = content.buffers(), ExitStack()

    def more() -> dict[PartKey, memoryview]:
        while (lane := tier._nodes._of_stripe[0].lanes.spare()) is not None:
            taken.enter_context(lane)
        return {key: buffers[key] for key in content.keys[1:]}

    with taken:
        reading = tier.read_on({content.keys[0]: buffers[content.keys[0]]}, more, DEADLINE_S)
        assert list(chain.from_iterable(reading)) == content.keys
        closed_early = tier.read_on({content.keys[0]: buffers[content.keys[0]]}, more, DEADLINE_S)
        next(iter(closed_early))
        began_s = time.monotonic()
        closed_early.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began_s < DEADLINE_S / 2
    assert buffers == content.parts


def test_a_short_silence_on_many_lanes_is_one_doubt(
    own_server: EmbeddedServer, make_tier: MakeTier, content: Content, many: None
) -> None:
    tier = make_tier(own_server.url)
    tier.open(content.layout)
    content.write(tier)
    assert content.read(tier) == content.keys
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TierTimeout):
            content.read(tier, 0.05)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert tier._nodes._of_stripe[0].breaker.num_failures == 0
    assert content.read(tier) == content.keys


def test_a_lane_that_is_cut_off_ends_the_load_and_tells_the_breaker_once(
    own_server: EmbeddedServer, make_tier: MakeTier, content: Content, many: None
) -> None:
    tier = make_tier(own_server.url)
    tier.open(content.layout)
    content.write(tier)
    assert content.read(tier) == content.keys
    lanes = tier._nodes._of_stripe[0].lanes
    for _, wire in lanes._idle[-2:]:
        wire.heard, wire.abort = False, lambda: None  # type: ignore[method-assign]
        wire.send = lambda *_: (_ for _ in ()).throw(BrokenPipeError())  # type: ignore[method-assign]
    with pytest.raises(TierUnavailable, match="BrokenPipe"):
        content.read(tier)
    assert tier._nodes._of_stripe[0].breaker.num_failures == 1
    assert content.read(tier) == content.keys


@pytest.mark.parametrize("end", ["all", "closed early", "cut off", "damaged"])
def test_buffers_are_nobodys_once_a_load_ended(
    end: str,
    own_server: EmbeddedServer,
    make_tier: MakeTier,
    content: Content,
    lanes: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not only once a collection found them: an arena must not be unmapped before."""
    caplog.set_level("CRITICAL", "kvstore.tiers.redis")  # what is captured of a log keeps the errors in it
    tier = make_tier(own_server.url)
    tier.open(content.layout)
    content.write(tier)
    assert content.read(tier) == content.keys
    with redis.Redis.from_url(own_server.unix_url) as client:
        if end == "damaged":
            client.setrange(content.name(7), 3000, b"damaged")
        gc.collect()
        gc.disable()
        try:
            into = content.buffers()
            _, reading = begun(tier, into)
            kept = [weakref.ref(buffer) for buffer in into.values()]
            if end == "cut off":
                client.client_kill_filter(_type="normal", skipme=True)
            if end != "closed early":
                with suppress(TierUnavailable):
                    assert len(list(chain.from_iterable(reading))) < 24 or end == "all"
            reading.close()  # type: ignore[attr-defined]
            del into, reading
            assert [each for each in kept if each() is not None] == []
        finally:
            gc.enable()
    assert tier.settle(DEADLINE_S)
    tier.clear(None)


def test_an_error_that_was_heard_keeps_no_buffers(root: Root) -> None:
    def fail(wire: object, into: Mapping[PartKey, memoryview], *_: object) -> Iterator[list[PartKey]]:
        raise BrokenPipeError
        yield

    late = _Late()
    late.read = fail  # type: ignore[assignment]
    buffer = memoryview(bytearray(8))
    kept = weakref.ref(buffer)
    gc.disable()
    try:
        read = BesideRead(
            cast(AbstractContextManager[Wire], late.lease()), {PartKey(root.id, BlockId(b"b" * 32), 0): buffer}
        )
        read.start(cast(Reader, late), DEADLINE_S)
        with suppress(BrokenPipeError):
            read.listen()
        end_all([read], [], Counts())
        del read, buffer
        assert kept() is None
    finally:
        gc.enable()


def test_a_forked_child_that_gives_up_a_load_leaves_it_to_its_parent(tier: RedisTier, content: Content) -> None:
    assert content.read(tier) == content.keys
    into = content.buffers()
    first, reading = begun(tier, into)
    child = os.fork()
    if not child:
        try:
            reading.close()  # type: ignore[attr-defined]
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert [*first, *chain.from_iterable(reading)] == content.keys
    assert into == content.parts


# ── whatever comes ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_damaged_missing_or_given_up_no_byte_is_wrong_and_nothing_is_left(
    seed: int, server: EmbeddedServer, make_tier: MakeTier, client: redis.Redis, root: Root, lanes: int
) -> None:
    """Values of several sizes, some of them encoded; what comes, comes in order, and nothing writes afterwards."""
    lot = random.Random(seed)
    tier = make_tier(server.url, codec=lot.choice(["raw", "lz4"]), connections=lot.choice([1, 2]))
    contents = [Content(Root(replace(root.model, head_dim=size)), 12, seed=size) for size in (1, 32, 1024, 8192)]
    parts: dict[PartKey, memoryview] = {}
    for content in contents:
        tier.open(content.layout)
        for number, key in enumerate(content.parts):
            if number % 3 == 0:
                content.parts[key] = memoryview(bytes(len(content.parts[key])))
        assert content.write(tier) == set(content.keys)
        parts |= content.parts
    for _ in range(12):
        keys = lot.sample(list(parts), len(parts)) if lot.random() < 0.5 else list(parts)
        names = [Names(16).value(key) for key in lot.sample(keys, 3)]
        client.delete(names[0])
        client.setrange(names[1], lot.randrange(200), b"\0damaged")
        client.append(names[2], b"more")
        into = {key: memoryview(bytearray(len(parts[key]))) for key in keys}
        first = lot.randrange(1, len(keys))
        early, later = dict(list(into.items())[:first]), dict(list(into.items())[first:])
        reading = tier.read_on(early, lambda: later, DEADLINE_S) if lot.random() < 0.5 else tier.read(into, DEADLINE_S)  # noqa: B023
        most, come = lot.choice([1, 10, len(keys), len(keys)]), list[PartKey]()
        for some in reading:
            for key in some:
                assert into[key] == parts[key], "wrong bytes were delivered as right ones"
            come += some
            if len(come) >= most:
                break
        reading.close()  # type: ignore[attr-defined]
        assert come == [key for key in keys if key in set(come)]
        assert len(come) >= min(most, len(keys) - 3 * 12)
        assert not [thread for thread in threading.enumerate() if thread.name == "kvstore-redis-read"]
    node = tier._nodes._of_stripe[0]
    assert node.loads.num_idle <= tier.options.connections
    assert node.lanes.num_idle <= 3
    assert (node.loads._free, node.lanes._free) == (tier.options.connections, 3)
    assert tier.settle(DEADLINE_S)
    tier.clear(None)


@pytest.mark.parametrize("connections", [1, 2])
def test_many_loads_at_once_all_end_and_presence_is_told_meanwhile(
    connections: int, server: EmbeddedServer, make_tier: MakeTier, content: Content, many: None
) -> None:
    tier = make_tier(server.url, connections=connections)
    tier.open(content.layout)
    content.write(tier)
    ended: list[bool] = []

    def load() -> None:
        for _ in range(4):
            ended.append(content.read(tier, 60.0) == content.keys)
            ended.append(tier.contains(content.keys, 60.0) == [True] * len(content.keys))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [True] * 64
    assert tier.lanes._under_way == set()


def test_a_tier_closed_while_loads_run_ends_them_or_lets_them_end(
    own_server: EmbeddedServer, make_tier: MakeTier, content: Content, many: None
) -> None:
    tier = make_tier(own_server.url, healthy=False)
    tier.open(content.layout)
    content.write(tier)
    assert content.read(tier) == content.keys
    _, reading = begun(tier, content.buffers())
    tier.close()
    with suppress(TierUnavailable):
        list(reading)
    with redis.Redis.from_url(own_server.unix_url) as client:
        wait_until(lambda: num_clients(client) == 1)
    wait_until(lambda: not [each for each in threading.enumerate() if each.name.startswith("kvstore-redis")])


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[list[PartKey]]:
    """What lanes beside the first are to bring."""
    seen: list[list[PartKey]] = []

    class Seen(BesideRead):
        def start(self, reader: Reader, deadline: float) -> None:
            seen.append(list(self.into))
            super().start(reader, deadline)

    monkeypatch.setattr(redis_lanes, "BesideRead", Seen)
    return seen


@pytest.mark.parametrize("repeats", [0, 1, 5])
def test_more_that_gives_nothing_or_keys_again_or_fails(
    repeats: int, tier: RedisTier, content: Content, shares: list[list[PartKey]]
) -> None:
    assert content.read(tier) == content.keys
    into = content.buffers()
    early = {key: into[key] for key in content.keys[:9]}
    assert list(chain.from_iterable(tier.read_on(dict(into), dict, DEADLINE_S))) == content.keys
    again = lambda: {key: into[key] for key in content.keys[9 - repeats :]}
    shares.clear()
    come = list(chain.from_iterable(tier.read_on(early, again, DEADLINE_S)))
    assert bool(shares) is not bool(repeats), "two lanes never write to one buffer"
    assert come == content.keys[:9] + content.keys[9 - repeats :]
    assert into == content.parts

    def fail() -> dict[PartKey, memoryview]:
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        list(tier.read_on(early, fail, DEADLINE_S))
    assert content.read(tier) == content.keys


def test_first_values_count_when_the_others_are_dealt(
    tier: RedisTier, content: Content, shares: list[list[PartKey]]
) -> None:
    """All lanes bring as much: the first began with eight values, and gets none before the others have as many."""
    assert content.read(tier) == content.keys
    into = content.buffers()
    early, rest = ({key: into[key] for key in keys} for keys in (content.keys[:8], content.keys[8:]))
    shares.clear()
    assert list(chain.from_iterable(tier.read_on(early, lambda: rest, DEADLINE_S))) == content.keys
    assert [len(share) for share in shares] == [8, 8]


def test_the_first_lane_goes_on_while_its_caller_waits_for_others(
    tier: RedisTier, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert content.read(tier) == content.keys
    read, has_all = Reader.read, threading.Event()

    def read_last(self: Reader, wire: Wire, *args: Any, **more: Any) -> Iterator[list[PartKey]]:
        if threading.current_thread().name == "kvstore-redis-read":
            assert has_all.wait(DEADLINE_S), "the first stands still"
            yield from read(self, wire, *args, **more)
        else:
            yield from read(self, wire, *args, **more)
            has_all.set()

    monkeypatch.setattr(Reader, "read", read_last)
    assert content.read(tier, 2 * DEADLINE_S) == content.keys


def test_where_nobody_is_let_in_connecting_ahead_is_not_tried_with_each_load(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Semaphore(0)

    def refused(self: Connections, limit_s: float) -> None:
        tried.release()
        raise ConnectionRefusedError

    monkeypatch.setattr(Connections, "_connected", refused)
    breaker = Breaker(DEADLINE_S)
    connections = Connections("redis://nowhere", 3, DEADLINE_S, breaker)
    for _ in range(20):
        connections.prepare(3)
        wait_until(lambda: not connections._prepares)
    assert tried.acquire(blocking=False)
    assert not tried.acquire(blocking=False)
    assert breaker.num_failures == 0
    assert connections.num_idle == 0
    assert connections.spare() is None
    connections.close()
