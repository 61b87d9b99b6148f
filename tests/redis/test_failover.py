# SPDX-License-Identifier: Apache-2.0
"""A single primary that dies, hangs or is demoted, and an address that leads to its replica from then on.

As clouds and virtual addresses do it: no Sentinel says who is the primary, and open connections stay where they are.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import redis

from kvstore.api import NO_HINT
from kvstore.block import Chain, Root
from kvstore.config import StoreConfig
from kvstore.errors import TierError, TierUnavailable
from kvstore.service.doctor_redis import examine_redis
from kvstore.service.findings import Verdict
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_breaker import Breaker
from kvstore.tiers.redis_pool import Connections
from kvstore.tiers.valkey import EmbeddedServer
from tests.patient import REDIS, REQUEST
from tests.redis.cluster import until
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.redis.pair import BACK_WITHIN_S, Pair, Pointer, works
from tests.waiting import wait_until

T = TypeVar("T")

CALL_S = 1.0
CONNECT_S = 0.2
PROBED_EVERY_S = 0.1
FOLLOWED_WITHIN_S = PROBED_EVERY_S + CONNECT_S + 1.0
"""From when the address leads to a primary: a probe that hung until then, the next, and time for a busy machine."""
SLACK_S = 0.3
"""For threads that wait for a core."""


class Load:
    """Stores at work through a failover: what they deliver is held against what was written, each call is timed."""

    def __init__(self, tiers: Sequence[RedisTier], chats: Sequence[Content]) -> None:
        self.wrong: list[BaseException] = []
        self.slowest: dict[str, float] = {}
        self.served_at_s = 0.0
        self.written_at_s = 0.0
        self.num_calls = 0
        self.held_up_s = 0.0
        """By how much a thread that does nothing else came late, at most: what calls waited for a core."""
        self._stop = threading.Event()
        work = [(tier, chats, seed) for seed, tier in enumerate(tiers)]
        self._threads = [threading.Thread(target=self._work, args=each) for each in work]
        self._threads.append(threading.Thread(target=self._idle))
        for thread in self._threads:
            thread.start()

    def _work(self, tier: RedisTier, chats: Sequence[Content], seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not self._stop.is_set():
                chat = rng.choice(chats)
                self._timed("contains", lambda: tier.contains(chat.keys, CALL_S))  # noqa: B023
                if self._timed("read", lambda: chat.read(tier, CALL_S)):  # noqa: B023
                    self.served_at_s = time.monotonic()
                if self._timed("write", lambda: tier.write(chat.parts, chat.meta, CALL_S)):  # noqa: B023
                    self.written_at_s = time.monotonic()
                tier.touch(chat.keys, NO_HINT)
                time.sleep(0.005)  # the address is threads of this process, too
        except BaseException as error:
            self.wrong.append(error)
            raise

    def _idle(self) -> None:
        due_s = time.monotonic() + 0.01
        while not self._stop.wait(0.01):
            self.held_up_s = max(self.held_up_s, time.monotonic() - due_s)
            due_s = time.monotonic() + 0.01

    def _timed(self, what: str, call: Any) -> bool:
        began_s, found = time.monotonic(), False
        with suppress(TierError):
            found = bool(call())
        self.slowest[what] = max(self.slowest.get(what, 0.0), time.monotonic() - began_s)
        self.num_calls += 1
        return found

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def load(tiers: Sequence[RedisTier], chats: Sequence[Content]) -> Iterator[Load]:
    working = Load(tiers, chats)
    try:
        yield working
    finally:
        working.stop()


def follow(pair: Pair, pointer: Pointer) -> float:
    """Make the replica the primary, and let the address lead there; when that was."""
    pair.replica.client.replicaof("NO", "ONE")
    pointer.target = pair.replica.port
    return time.monotonic()


def kill_at_rest(pair: Pair, pointer: Pointer, tier: RedisTier) -> None:
    """Kill the primary while the tier asks it nothing, and wait until its connections have ended here, too.

    A call that was under way, or found its connection open still, would fail late: after others have found the new
    primary, of which they would then be told that it is off. The tier must be one that sends no PING.
    """
    assert tier.settle(DEADLINE_S)
    pair.primary.kill()
    wait_until(lambda: pointer.is_unused)


def once_it_answers(call: Callable[[], T]) -> T:
    """What a call gives: limits as short as those here turn a tier off where the machine stands still for a moment."""
    found: list[T] = []

    def has_answered() -> bool:
        with suppress(TierError):
            found.append(call())
        return bool(found)

    wait_until(has_answered)
    return found[0]


def highest_score(client: Any) -> float:
    return max(client.zrevrange(name, 0, 0, withscores=True)[0][1] for name in client.scan_iter("kvs2:*:z"))


def only_for_the_sweep(faults: Sequence[str]) -> bool:
    """An eviction that was half copied leaves ends of chains without their parents, and no account that is wrong."""
    return all("lacks its parent" in fault or "scores above its parent" in fault for fault in faults)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hung", "demoted"])
def test_a_lost_primary_is_left_for_the_one_that_its_address_leads_to(
    how: str, pair: Pair, pointer: Pointer, make_tier: MakeTier, root: Root
) -> None:
    options = {"breaker_open_s": PROBED_EVERY_S, "connect_timeout_s": CONNECT_S, "capacity_bytes": 700_000}
    options |= {"call_timeout_s": 2.0}
    tiers = [make_tier(pointer.url, **options) for _ in range(2)]
    system = Content(root, 4)
    chats = [Content(root, 12 + 9 * seed, seed=seed, prefix=system.tokens) for seed in range(1, 6)]  # more than fits
    with load(tiers, chats) as working:
        wait_until(lambda: working.num_calls > 60)
        before = highest_score(pair.primary.client)
        if how == "killed":
            pair.primary.kill()
        elif how == "hung":
            os.kill(pair.primary.process.pid, signal.SIGSTOP)
        led_s = follow(pair, pointer)
        if how == "demoted":
            pair.primary.client.replicaof("127.0.0.1", pair.replica.port)
        wait_until(lambda: min(working.served_at_s, working.written_at_s) > led_s + 0.5)
        wait_until(lambda: all(tier.stats.get("redis.available") == 1 for tier in tiers))
        num_calls = working.num_calls
        wait_until(lambda: working.num_calls > num_calls + 60)
    assert working.wrong == []
    assert max(working.slowest.values()) <= 1.1 * CALL_S + SLACK_S + 2 * working.held_up_s, working.slowest
    for tier in tiers:
        wait_until(lambda: not tier.refuses)  # noqa: B023
        assert tier.settle(DEADLINE_S)
    assert only_for_the_sweep(once_it_answers(tiers[0].check))
    once_it_answers(tiers[0].sweep)
    assert once_it_answers(tiers[0].check) == []
    works(tiers[0], Content(root, 5, seed=99))
    assert highest_score(pair.replica.client) > before
    if how == "hung":
        os.kill(pair.primary.process.pid, signal.SIGCONT)  # a primary of its own opinion, to which nothing leads
        until(lambda: bool(pair.primary.client.ping()))
    if how != "killed":  # no connection is left on which anybody would go on reading there
        until(lambda: all(each["cmd"].startswith("client") for each in pair.primary.client.client_list(_type="normal")))


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hung"])
def test_a_new_primary_is_found_as_soon_as_the_next_probe(
    how: str, pair: Pair, pointer: Pointer, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(pointer.url, breaker_open_s=PROBED_EVERY_S, connect_timeout_s=CONNECT_S, call_timeout_s=2.0)
    content = Content(root, 10)
    assert content.write(tier) == set(content.keys)
    pair.replicated()
    if how == "killed":
        pair.primary.kill()
    else:
        os.kill(pair.primary.process.pid, signal.SIGSTOP)
    for _ in range(4):  # a silent one is doubted a few times first
        with suppress(TierError):
            tier.contains(content.keys, CALL_S)
    assert tier.refuses
    pointer.target = pair.replica.port  # and it is a replica yet: nothing is to be had
    time.sleep(5 * PROBED_EVERY_S)
    assert tier.refuses
    led_s = follow(pair, pointer)
    wait_until(lambda: not tier.refuses)
    assert content.read(tier) == content.keys
    assert time.monotonic() - led_s < FOLLOWED_WITHIN_S


def large(root: Root, num_blocks: int, seed: int = 0) -> Content:
    """Blocks of 256 KiB: a few hundred are more than sockets buffer."""
    return Content(Root(replace(root.model, head_dim=1024)), num_blocks, seed=seed)


@pytest.mark.slow
def test_a_replica_that_lags_has_whole_accounts_of_what_it_has_and_gets_the_rest_again(
    pair: Pair, pointer: Pointer, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(pointer.url, breaker_open_s=PROBED_EVERY_S, ping_every_s=0)
    content = large(root, 240)
    tier.open(content.layout)
    content.write(tier, 0, 20)
    pair.replicated()
    before = highest_score(pair.primary.client)
    os.kill(pair.replica.process.pid, signal.SIGSTOP)
    assert content.write(tier) == set(content.keys)  # so it said; and then it died, having told nobody
    kill_at_rest(pair, pointer, tier)
    os.kill(pair.replica.process.pid, signal.SIGCONT)
    # What lay in sockets arrives, and ends within a value.
    until(lambda: pair.replica.client.info("replication")["master_link_status"] == "down", BACK_WITHIN_S)
    follow(pair, pointer)
    until(lambda: any(there(tier, content)), BACK_WITHIN_S)
    found = there(tier, content)
    assert found == sorted(found, reverse=True)  # a head, without a hole
    assert 20 <= sum(found) < len(found)
    assert content.read(tier) == content.keys[: sum(found)]
    assert tier.check() == []
    sizes = [pair.replica.client.hvals(name) for name in pair.replica.client.scan_iter("kvs2:*:s")]
    assert tier.accounted_bytes() == sum(int(size) for each in sizes for size in each)
    assert tier.sweep() == dict.fromkeys(tier.sweep(), 0)
    works(tier, content)
    works(tier, large(root, 3, seed=1))
    assert tier.check() == []
    assert highest_score(pair.replica.client) > before


def there(tier: RedisTier, content: Content) -> list[bool]:
    with suppress(TierError):
        return tier.contains(content.keys, DEADLINE_S)
    return []


@pytest.mark.slow
def test_what_a_failover_left_lopsided_the_sweep_puts_right(
    pair: Pair, pointer: Pointer, make_tier: MakeTier, root: Root
) -> None:
    """Members without values and values without members, of which a replica knows that was filled by other means."""
    tier = make_tier(pointer.url, breaker_open_s=PROBED_EVERY_S, ping_every_s=0)
    first, second = Content(root, 20), Content(root, 20, seed=1)
    for content in (first, second):
        content.write(tier)
    pair.replicated()
    kill_at_rest(pair, pointer, tier)
    pair.replica.client.replicaof("NO", "ONE")
    pair.replica.client.delete(first.name(19), first.name(18))  # members without values
    stripe_of = tier._names.bucket(second.keys[19])
    member = tier._names.member(second.keys[19].block, 0)
    pair.replica.client.zrem(stripe_of.order, member)  # a value without a member
    pointer.target = pair.replica.port
    until(lambda: any(there(tier, first)), BACK_WITHIN_S)
    assert first.read(tier) == first.keys[:18]
    found = tier.sweep()
    assert (found["empty"], found["strays"]) == (2, 1)
    assert tier.check() == []
    works(tier, first)
    works(tier, second)


@pytest.mark.slow
def test_a_conversation_goes_on_over_a_failover_and_is_whole_on_the_new_primary(
    pair: Pair, pointer: Pointer, root: Root
) -> None:
    wide = Root(replace(root.model, head_dim=1024))
    tokens = [random.Random(3).randrange(1000) for _ in range(110 * wide.model.block_tokens)]

    def store() -> KVStore:
        tier = {"url": pointer.url, "breaker_open_s": PROBED_EVERY_S, "ping_every_s": 0, "capacity_bytes": "1GiB"}
        values = {
            "host": {"capacity_bytes": "64MiB", "prefault": False},
            "mover": {"write": "through"},
            "request": REQUEST,
            "tiers": {"redis": {**tier, **REDIS}},
        }
        made = KVStore(StoreConfig.load(values, environ={}))
        made.open(wide.model)
        return made

    with store() as ours:
        os.kill(pair.replica.process.pid, signal.SIGSTOP)
        chain = Chain(wide, tokens[: 100 * wide.model.block_tokens])
        said(ours, chain)
        (tier,) = ours._tiers
        assert isinstance(tier, RedisTier)
        kill_at_rest(pair, pointer, tier)
        os.kill(pair.replica.process.pid, signal.SIGCONT)
        until(lambda: pair.replica.client.info("replication")["master_link_status"] == "down", BACK_WITHIN_S)
        follow(pair, pointer)
        ours.match(chain, "asks", wait_s=1)  # notices, if nobody else has
        ours.forget("asks")
        wait_until(lambda: ours.stats().get("redis.available") == 1)
        chain.extend(tokens[100 * wide.model.block_tokens :])
        said(ours, chain)  # what hangs from blocks that were lost with the primary takes them along
        with store() as cold:
            assert cold.match(chain, "all", wait_s=5).num_blocks == 110
            with cold.load("all") as loading:
                assert [bytes(block.views[0]) == bytes_of(chain, block.index) for block in loading] == [True] * 110
        assert ours.check() == []


def bytes_of(chain: Chain, index: int) -> bytes:
    return random.Random(chain.ids[index]).randbytes(64) * 4096


def said(store: KVStore, chain: Chain) -> None:
    with store.save(chain, 0, len(chain)) as save:
        for index in save.indices:
            view = save.views(index)[0]
            assert view is not None
            view[:] = bytes_of(chain, index)
        save.commit()
    assert store.flush(20)


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
    # No connection is left that would go on reading there.
    until(lambda: all(each["cmd"] == "client|list" for each in pair.primary.client.client_list(_type="normal")))
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
    (told,) = (each for each in examine_redis("redis", tier.options.url) if each.name == "redis writes")
    assert told.verdict is Verdict.PROBLEM
    assert "redis+sentinel://" in told.fix
    pair.replica.client.replicaof("NO", "ONE")
    works(tier, content)


def test_a_call_that_outlasts_a_failure_leaves_no_connection_behind(own_server: EmbeddedServer) -> None:
    breaker = Breaker(0)
    connections = Connections(own_server.url, 2, CONNECT_S, breaker)
    with redis.Redis.from_url(own_server.url) as client:

        def num_open() -> int:
            return len(client.client_list(_type="normal")) - 1

        with connections.lease(time.monotonic() + CALL_S):
            assert num_open() == 1
        assert num_open() == 1  # kept, to be lent again
        with connections.lease(time.monotonic() + CALL_S):
            breaker.failed(TierUnavailable("redis", "said another call"))
        until(lambda: num_open() == 0)
    connections.close()
