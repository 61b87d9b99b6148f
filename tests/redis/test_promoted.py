# SPDX-License-Identifier: Apache-2.0
"""What was read from Redis is believed to be there, so later uses ask nothing; and no longer than a touch finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis

from kvstore.api import NO_HINT
from kvstore.block import BlockId, Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import chain_of, load_all, save_all
from tests.patient import REQUEST
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import wait_until

MakeReplica = Callable[..., tuple[KVStore, RedisTier]]
NUM_BLOCKS = 48
NUM_BUCKETS = 16


@pytest.fixture
def make_replica(server: EmbeddedServer, make_tier: MakeTier, model: ModelId) -> Iterator[MakeReplica]:
    made: list[tuple[KVStore, RedisTier]] = []

    def make(**mover: object) -> tuple[KVStore, RedisTier]:
        tier = make_tier(server.url, healthy=False, sweep_every_s=0, num_buckets=NUM_BUCKETS)  # its store closes it
        values = {
            "host": {"capacity_bytes": 256 * 4096, "prefault": False},
            "mover": {"write": "on_reuse", **mover},
            "request": REQUEST,
        }
        store = KVStore(StoreConfig.load(values, environ={}), tiers=[tier])
        store.open(model)
        made.append((store, tier))
        return store, tier

    yield make
    for store, tier in made:
        assert store.flush(DEADLINE_S)
        assert tier.settle(DEADLINE_S)
    for store, tier in made:
        assert (store.check(), tier.check()) == ([], [])
        store.close()


def use(replica: tuple[KVStore, RedisTier], chain: Chain) -> list[str]:
    """Match and load a chain, and let all that follows from it happen; where each block came from."""
    store, tier = replica
    came = load_all(store, chain)
    assert store.flush(DEADLINE_S)
    assert tier.settle(DEADLINE_S)
    return came


def calls_of(client: redis.Redis, work: Callable[[], object]) -> dict[str, int]:
    """How often each command was called in `work`, those in scripts included, and not what upkeep asks in silence."""
    client.config_resetstat()
    work()
    stats = client.info("commandstats")
    counts = {name.removeprefix("cmdstat_"): int(each["calls"]) for name, each in stats.items()}
    return {
        name: count
        for name, count in counts.items()
        if not name.startswith(("config", "info", "ping", "hello", "auth", "client"))
    }


def written_by_another(make_replica: MakeReplica, chain: Chain) -> None:
    other = make_replica(write="through")
    save_all(other[0], chain)
    assert other[0].flush(DEADLINE_S)
    assert other[1].settle(DEADLINE_S)  # nothing of its own is counted afterwards


def test_later_uses_of_what_came_from_redis_cost_a_touch(
    client: redis.Redis, make_replica: MakeReplica, root: Root
) -> None:
    chain = chain_of(root, NUM_BLOCKS)
    written_by_another(make_replica, chain)
    replica = make_replica()
    assert use(replica, chain) == ["redis"] * NUM_BLOCKS
    for _ in range(3):
        counts = calls_of(client, lambda: use(replica, chain))
        assert counts.pop("zadd") <= NUM_BUCKETS
        assert sum(counts.values()) <= 3, counts  # the clock
    assert "mover.demoted_blocks" not in replica[0].stats()


def test_what_a_store_wrote_costs_a_touch_too(client: redis.Redis, make_replica: MakeReplica, root: Root) -> None:
    chain = chain_of(root, NUM_BLOCKS)
    replica = make_replica()
    save_all(replica[0], chain)
    use(replica, chain)
    use(replica, chain)  # its TTLs are looked at
    counts = calls_of(client, lambda: use(replica, chain))
    assert counts.pop("zadd") <= NUM_BUCKETS
    assert sum(counts.values()) <= 3, counts


@pytest.mark.parametrize("how", ["read", "written"])
@pytest.mark.parametrize("what", ["all", "values", "tail"])
def test_what_redis_lost_meanwhile_is_written_again_once_it_is_used(
    client: redis.Redis, make_replica: MakeReplica, root: Root, how: str, what: str
) -> None:
    chain = chain_of(root, NUM_BLOCKS)
    replica = make_replica()
    if how == "read":
        written_by_another(make_replica, chain)
    else:
        save_all(replica[0], chain)
        use(replica, chain)
    use(replica, chain)
    other = make_replica()
    if what == "all":
        client.flushall()
    elif what == "tail":  # as eviction takes it
        other[1].remove(chain.part_keys(30, NUM_BLOCKS, (0,)))
    else:  # as the server's TTL takes them: the accounts stay
        client.delete(*list(client.scan_iter("kvs2:*:v:*")))
        replica[1].sweep()
    assert use(replica, chain) == ["host"] * NUM_BLOCKS  # its touch finds what is not there
    assert use(replica, chain) == ["host"] * NUM_BLOCKS
    assert use(other, chain) == ["redis"] * NUM_BLOCKS
    written = client.info("commandstats")["cmdstat_set"]["calls"]
    use(replica, chain)
    use(replica, chain)
    assert client.info("commandstats")["cmdstat_set"]["calls"] == written, "once is enough"


def test_a_touch_of_what_stands_higher_already_asks_and_believes_on(
    client: redis.Redis, make_replica: MakeReplica, root: Root
) -> None:
    chain = chain_of(root, NUM_BLOCKS)
    written_by_another(make_replica, chain)
    replica = make_replica()
    use(replica, chain)
    keys = chain.part_keys(0, NUM_BLOCKS, (0,))
    replica[1].touch(keys, NO_HINT, dict.fromkeys(chain.ids, 1000.0))
    assert replica[1].settle(DEADLINE_S)
    counts = calls_of(client, lambda: [use(replica, chain) for _ in range(2)])
    assert counts["zmscore"] <= 2 * NUM_BUCKETS
    assert counts.keys().isdisjoint({"exists", "zscore", "set"}), counts


def test_a_turn_more_has_the_ttls_of_new_blocks_looked_at_and_in_time_those_of_its_head(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, ttl_s=8)  # looked at every second
    content = Content(root, 400)
    content.write(tier)
    lengths = iter(range(20, 401))

    def turn() -> None:
        tier.touch(content.keys[: next(lengths)], NO_HINT)
        assert tier.settle(DEADLINE_S)

    turn()
    assert calls_of(client, turn)["ttl"] == 1
    client.pexpire(content.name(0), 3900)  # less than half is left

    def renewed() -> bool:
        turn()
        return int(client.pttl(content.name(0))) > 4000

    wait_until(renewed)


def test_values_that_are_gone_while_their_accounts_are_not_are_told_with_the_next_look_at_their_ttls(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, ttl_s=8)  # looked at every second
    content = Content(root, 20)
    content.write(tier)
    told: list[BlockId] = []
    tier.absent = told.extend
    tier.touch(content.keys, NO_HINT)
    assert tier.settle(DEADLINE_S)
    client.delete(content.name(19), content.name(7))

    def is_told() -> bool:
        tier.touch(content.keys, NO_HINT)
        assert tier.settle(DEADLINE_S)
        return bool(told)

    wait_until(is_told, 5)
    assert set(told) == {content.keys[19].block, content.keys[7].block}
    tier.sweep()
