# SPDX-License-Identifier: Apache-2.0
"""A tenant with many adapters keeps to one capacity, whoever writes for it, and whatever becomes of the writers."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from kvstore.api import NO_HINT
from kvstore.block import Root
from kvstore.config import StoreConfig
from kvstore.layout import layout_of
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_names import Bucket
from kvstore.tiers.redis_tenants import list_of, tenant_tag
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import chain_of, save_all
from tests.patient import REDIS
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.redis.test_killed import MODEL
from tests.waiting import eventually, wait_until

pytestmark = pytest.mark.slow  # namespaces by the hundred

NUM_BUCKETS = 4
_seeds = itertools.count(1000)
LIMIT = 40
"""Parts that a tenant may keep."""


@pytest.fixture
def part_bytes(server: EmbeddedServer, make_tier: MakeTier, root: Root) -> int:
    """What one part of one page is accounted with."""
    tier = make_tier(server.url, healthy=False, num_buckets=NUM_BUCKETS)  # a test may have more buckets, or fewer
    Content(root, 1).write(tier)
    num_bytes = tier.accounted_bytes()
    tier.clear(None)
    return num_bytes


@pytest.fixture
def url(server: EmbeddedServer) -> str:
    return server.url


def root_of(root: Root, adapter: int, salt: bytes = b"one") -> Root:
    return Root(root.model, adapter=b"%d" % adapter if adapter else b"", salt=salt)


def kept(client: redis.Redis, roots: Iterator[Root] | list[Root]) -> int:
    """Bytes accounted under these roots."""
    totals = [Bucket(stripe, each.id[:8].hex()).total for each in roots for stripe in range(NUM_BUCKETS)]
    return sum(int(each or 0) for each in client.mget(totals))


def write(tier: RedisTier, content: Content) -> int:
    """As a store does; how many parts are there then."""
    tier.meet(content.chain.root)
    content.write(tier)
    return sum(tier.contains(content.keys, DEADLINE_S))


@pytest.mark.parametrize("num_buckets", [1, NUM_BUCKETS])  # in one, an eviction sees some of the roots at a time
def test_a_tenant_with_many_adapters_keeps_to_its_capacity_and_evicts_its_own_coldest(
    url: str, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int, num_buckets: int
) -> None:
    tier = make_tier(url, num_buckets=num_buckets, tenant_capacity_bytes=LIMIT * part_bytes)
    other = Content(root_of(root, 1, salt=b"another"), 20)  # the coldest of all
    assert write(tier, other) == 20
    roots = [root_of(root, adapter) for adapter in range(9)]
    contents = [Content(each, 10) for each in roots]
    for content in contents:
        assert write(tier, content) == 10
        assert kept(client, roots) <= LIMIT * part_bytes
    there = [sum(tier.contains(each.keys, DEADLINE_S)) for each in contents]
    assert there == sorted(there)
    assert (there[0], there[-1], sum(there)) == (0, 10, LIMIT - 1)  # the share that is left free
    assert all(tier.contains(other.keys, DEADLINE_S))
    for salt in (b"one", b"new"):  # one that has something already, and one that has nothing
        assert write(tier, Content(root_of(root, 0, salt), LIMIT + 20, seed=1)) == LIMIT, "its head"
        assert all(tier.contains(other.keys, DEADLINE_S))
    for seed in range(3):
        Content(root_of(root, 10), 20, seed=seed).write(tier)
    assert kept(client, [root_of(root, 10)]) == 60 * part_bytes, "whose it is nobody said"


def test_what_another_store_wrote_for_the_tenant_counts_and_goes_first(
    url: str, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    first, second = (
        make_tier(url, num_buckets=NUM_BUCKETS, tenant_capacity_bytes=LIMIT * part_bytes) for _ in range(2)
    )
    for adapter in range(4):
        assert write(first, Content(root_of(root, adapter), 9)) == 9
    assert write(second, Content(root_of(root, 4), 10)) == 10
    assert kept(client, [root_of(root, 0)]) < 9 * part_bytes
    assert kept(client, [root_of(root, adapter) for adapter in range(5)]) <= LIMIT * part_bytes


def test_the_coldest_of_a_tenant_goes_first_whichever_root_was_written_under_last(
    url: str, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tier, other = (make_tier(url, num_buckets=1, tenant_capacity_bytes=LIMIT * part_bytes) for _ in range(2))
    old, later = (Content(root_of(root, 0), 2, seed=seed) for seed in range(2))
    write(tier, old)
    for adapter in range(1, 5):  # as many as an eviction looks at first
        write(tier, Content(root_of(root, adapter), 8))
    write(tier, Content(root_of(root, 5), 2))
    write(other, later)  # by whom the root is noted again
    write(tier, Content(root_of(root, 6), 4))
    assert not any(tier.contains(old.keys, DEADLINE_S))
    assert all(tier.contains(later.keys, DEADLINE_S))
    assert tier.accounted_bytes() == (LIMIT - 1) * part_bytes, "and nothing beside it"


def test_writes_that_come_oftener_than_the_sum_is_asked_for_count(
    url: str, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tier = make_tier(url, num_buckets=NUM_BUCKETS, tenant_capacity_bytes=LIMIT * part_bytes)
    tier.meet(root_of(root, 1))
    for seed in range(20):
        assert len(Content(root_of(root, 1), 5, seed=seed).write(tier)) == 5
        assert tier.accounted_bytes() <= LIMIT * part_bytes


def test_what_a_store_remembers_of_a_tenants_sum_is_not_believed_for_long(
    url: str, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    first, second = (
        make_tier(url, num_buckets=NUM_BUCKETS, tenant_capacity_bytes=LIMIT * part_bytes) for _ in range(2)
    )
    roots = [root_of(root, adapter) for adapter in range(2)]
    write(first, Content(roots[0], 5))
    write(second, Content(roots[1], LIMIT - 6))
    ended_s = time.monotonic() + 0.3
    wait_until(lambda: time.monotonic() > ended_s)
    write(first, Content(roots[0], 5, seed=1))
    assert kept(client, roots) <= LIMIT * part_bytes


def test_stores_that_write_for_one_tenant_at_once_keep_it_to_its_capacity(
    url: str, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    limits = {"tenant_capacity_bytes": LIMIT * part_bytes, "namespace_capacity_bytes": LIMIT * part_bytes // 2}
    tiers = [make_tier(url, num_buckets=NUM_BUCKETS, capacity_bytes=100 * part_bytes, **limits) for _ in range(4)]
    roots = [root_of(root, adapter, salt) for salt in (b"one", b"two") for adapter in range(8)]

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(60):
            # Each store has adapters of its own: of those of the others it hears from Redis alone.
            chosen = roots[4 * number + rng.randrange(4)]
            write(tiers[number], Content(chosen, rng.randrange(4, 12), seed=rng.randrange(10)))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    in_flight = 2 * 12 * part_bytes  # what the two of a tenant may have added at once
    for tier, theirs in ((tiers[0], roots[:8]), (tiers[2], roots[8:])):
        assert kept(client, theirs) <= LIMIT * part_bytes + in_flight
        assert brought_down(tier, client, theirs, LIMIT * part_bytes)


def brought_down(tier: RedisTier, client: redis.Redis, roots: list[Root], limit_bytes: int) -> bool:
    """Whether a writer that is alone keeps a tenant to its limit: once what it remembers of the sum is of now."""

    def is_within() -> bool:
        return write(tier, Content(roots[0], 2, seed=next(_seeds))) == 2 and kept(client, roots) <= limit_bytes

    return eventually(is_within) and is_within()


@pytest.mark.parametrize("num_adapters", [1, 200])
def test_what_a_write_asks_does_not_grow_with_adapters_nor_with_blocks(
    url: str, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int, num_adapters: int
) -> None:
    silent = {"num_buckets": NUM_BUCKETS, "ping_every_s": 0}  # but for what it is asked
    limited = make_tier(url, tenant_capacity_bytes=1000 * part_bytes, **silent)
    free = make_tier(url, **silent)
    roots = [root_of(root, adapter) for adapter in range(num_adapters)]
    for each in roots:
        write(limited, Content(each, 1))
    assert limited.settle(10)
    assert free.settle(10)  # the first looks of both at the server are over

    def calls(tier: RedisTier, seed: int) -> int:
        tier.meet(roots[-1])
        client.config_resetstat()
        Content(roots[-1], 20, seed=seed).write(tier)
        stats = client.info("commandstats")
        inside = {"cmdstat_config|resetstat", "cmdstat_info", "cmdstat_zscore", "cmdstat_exists"}
        return sum(int(each["calls"]) for name, each in stats.items() if name not in inside)

    calls(free, 0), calls(limited, 1)
    plain = calls(free, 2)
    assert calls(limited, 3) - plain <= 1 + 3 + NUM_BUCKETS  # a script and its three, and a sum a stripe
    assert min(calls(limited, seed) for seed in range(4, 9)) <= plain, "nothing, for a while"


def test_the_list_of_a_tenants_roots_heals_and_loses_what_has_nothing(
    url: str, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    limits = {"num_buckets": NUM_BUCKETS, "tenant_capacity_bytes": LIMIT * part_bytes}
    tier = make_tier(url, **limits)
    roots = [root_of(root, adapter) for adapter in range(4)]
    name, tags = list_of(tenant_tag(roots[0])), [each.id[:8].hex() for each in roots]
    for each in roots[:3]:
        write(tier, Content(each, 10))
    assert sorted(client.zrange(name, 0, -1)) == sorted(tag.encode() for tag in tags[:3])
    client.delete(name)
    client.rpush(name, "somebody else's")
    newcomer = make_tier(url, **limits)
    for each in roots[:3]:
        write(newcomer, Content(each, 11))
    assert sorted(client.zrange(name, 0, -1)) == sorted(tag.encode() for tag in tags[:3])
    tier.clear(roots[0].id)
    for tag in tags[:2]:
        client.zincrby(name, -3601, tag)
    write(make_tier(url, **limits), Content(roots[3], 10))
    left = {tag.encode() for tag in (tags[1], tags[2], tags[3])}
    assert set(client.zrange(name, 0, -1)) == left, "one without a byte, and not for an hour"


def test_a_tenant_with_more_namespaces_than_are_looked_at_loses_those_it_wrote_under_longest_ago(
    url: str, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    num_roots = 520
    tier = make_tier(url, num_buckets=1, tenant_capacity_bytes=num_roots * part_bytes)
    contents = [Content(root_of(root, adapter), 1) for adapter in range(num_roots)]
    for content in contents:
        tier.meet(content.chain.root)
        content.write(tier)
    for content in contents[:7]:
        tier.touch(content.keys, NO_HINT)
    assert tier.settle(DEADLINE_S)
    assert write(tier, Content(root_of(root, num_roots), 1)) == 1
    there = [tier.contains(content.keys, DEADLINE_S)[0] for content in contents]
    assert not any(there[: num_roots - 512]), "though they are the warmest"
    assert sum(there) >= 500


def test_the_name_of_a_tenant_depends_on_salt_and_secret_alone_and_does_not_give_them_away(root: Root) -> None:
    named = {tenant_tag(Root(root.model, adapter=adapter, salt=b"acme")) for adapter in (b"", b"one")}
    assert len(named) == 1
    others = {
        tenant_tag(Root(root.model, salt=salt, secret=secret)) for salt in (b"acme", b"") for secret in (b"s", b"t")
    }
    assert len(others) == 4
    assert named.isdisjoint(others)


def test_a_store_says_whose_what_it_writes_is(
    url: str, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    limit_bytes = LIMIT * part_bytes
    tier = make_tier(url, healthy=False, num_buckets=NUM_BUCKETS, tenant_capacity_bytes=limit_bytes)
    values = {"host": {"capacity_bytes": 256 * 4096, "prefault": False}, "mover": {"write": "through"}}
    store = KVStore(StoreConfig.load(values, environ={}), tiers=[tier])
    store.open(root.model)
    try:
        roots = [root_of(root, adapter) for adapter in range(6)]
        for each in roots:
            save_all(store, chain_of(each, 10))
            assert store.flush(DEADLINE_S)
        assert 0.9 * limit_bytes < kept(client, roots) <= limit_bytes
        assert tier.check() == []
    finally:
        store.close()


def _work(url: str, seed: int, limit_bytes: int) -> None:
    """Chats of one tenant under many adapters, until somebody kills it."""
    tier = RedisTier(RedisTier.Options(url=url, num_buckets=NUM_BUCKETS, tenant_capacity_bytes=limit_bytes, **REDIS))
    tier.open(layout_of(MODEL))
    rng = random.Random(seed)
    while True:
        adapter = rng.randrange(12)
        write(tier, Content(root_of(Root(MODEL), adapter), rng.randrange(4, 30), seed=rng.randrange(20)))


@pytest.mark.slow
def test_writers_killed_at_work_leave_accounts_that_are_the_sum_and_a_tenant_that_keeps_to_its_capacity(
    url: str, client: redis.Redis, make_tier: MakeTier
) -> None:
    forks = multiprocessing.get_context("forkserver")
    limit_bytes, rng, seeds = 2_000_000, random.Random(3), itertools.count()
    roots = [root_of(Root(MODEL), adapter) for adapter in range(12)]
    watcher = make_tier(url, num_buckets=NUM_BUCKETS, tenant_capacity_bytes=limit_bytes, connections=1)
    assert watcher.settle(DEADLINE_S)  # what it asks at first ends with its connection
    assert watcher.accounted_bytes() == 0
    num_clients = len(client.client_list())

    def start() -> multiprocessing.process.BaseProcess:
        process = forks.Process(target=_work, args=(watcher.options.url, next(seeds), limit_bytes), daemon=True)
        process.start()
        return process

    writers = [start() for _ in range(3)]
    try:
        wait_until(lambda: watcher.accounted_bytes() > 0.8 * limit_bytes, 30)
        for _ in range(12):
            at_work = int(client.info("stats")["total_commands_processed"]) + rng.randrange(200, 1500)
            wait_until(lambda: int(client.info("stats")["total_commands_processed"]) > at_work)  # noqa: B023
            writers.append(start())
            victim = writers.pop(0)
            victim.kill()
            victim.join(60)
    finally:
        for each in writers:
            each.kill()
            each.join(60)
    wait_until(lambda: len(client.client_list()) <= num_clients)  # what they had sent is done
    most_bytes = limit_bytes + 3 * 30 * 5120
    sizes = sum(int(size) for name in client.scan_iter("kvs2:*:s") for size in client.hvals(name))
    assert sizes == watcher.accounted_bytes() == kept(client, roots) <= most_bytes
    watcher.sweep()
    assert watcher.check() == []
    write(watcher, Content(roots[0], 3, seed=99))
    assert kept(client, roots) <= limit_bytes
