# SPDX-License-Identifier: Apache-2.0
"""A conversation that was closed goes first: what is its own, and nothing that others go on from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import redis

from kvstore.api import NO_HINT, Hint
from kvstore.block import Chain, ModelId, PartKey, Root
from kvstore.config import StoreConfig
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_names import Names
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import content as bytes_of
from tests.patient import REDIS, REQUEST
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import wait_until

NUM_BUCKETS = 4
CLOSED = Hint(closed=True)


def score(client: redis.Redis, key: PartKey, num_buckets: int = NUM_BUCKETS) -> float:
    names = Names(num_buckets)
    found: float | None = client.zscore(names.bucket(key).order, names.member(key.block, key.part))
    assert found is not None
    return found


def scores(client: redis.Redis, content: Content) -> list[float]:
    """From head to tail, and children below parents."""
    found = [score(client, key) for key in content.keys]
    assert all(parent > child for parent, child in itertools.pairwise(found))
    return found


def use(tier: RedisTier, content: Content) -> None:
    tier.touch(content.keys, NO_HINT)
    assert tier.settle(DEADLINE_S)


def close(tier: RedisTier, content: Content, start: int = 0) -> None:
    """As the mover does."""
    tier.touch(content.keys, CLOSED)
    tier.retire(content.keys, start)
    assert tier.settle(DEADLINE_S)


def resident(tier: RedisTier, content: Content) -> list[PartKey]:
    there = tier.contains(content.keys, DEADLINE_S)
    return [key for key, present in zip(content.keys, there, strict=True) if present]


def chats(root: Root, *seeds: int) -> list[Content]:
    """Of twelve blocks, that begin with the same four."""
    system = Content(root, 4)
    return [Content(root, 12, seed=seed, prefix=system.tokens) for seed in seeds]


def test_a_closed_conversation_goes_before_those_used_longer_ago(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    old, over = Content(root, 12, seed=1), Content(root, 12, seed=2)
    old.write(tier)
    over.write(tier)
    close(tier, over)
    assert scores(client, over)[0] < scores(client, old)[-1]
    assert tier.check() == []  # nothing is below its namespace's place in the registry
    full = make_tier(server.url, num_buckets=NUM_BUCKETS, capacity_bytes=40 * tier.accounted_bytes() // 24)
    new = Content(root, 24, seed=3)
    assert new.write(full) == set(new.keys)
    assert resident(tier, old) == old.keys
    assert len(resident(tier, over)) < 6
    use(tier, old)


def test_a_conversation_that_goes_on_after_all_is_as_warm_as_any(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    other, chat = Content(root, 6, seed=1), Content(root, 6, seed=2)
    other.write(tier)
    chat.write(tier)
    close(tier, chat)
    use(tier, chat)
    assert scores(client, chat)[-1] > scores(client, other)[0]


def test_closing_makes_nothing_warmer_that_was_colder_yet(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    content = Content(root, 8)
    content.write(tier)
    for key in content.keys:  # for a day, of which closing would take half
        bucket = Names(NUM_BUCKETS).bucket(key)
        client.zincrby(bucket.order, -86_400, Names.member(key.block, key.part))
        client.zadd(bucket.registry, {bucket.root: 0.0})
    before = scores(client, content)
    tier.retire(content.keys, 0)
    assert tier.settle(DEADLINE_S)
    assert scores(client, content) == before


@pytest.mark.parametrize("how", ["read", "written"])
def test_what_another_store_goes_on_from_stays_whoever_used_it_last(
    how: str, server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    first, second = (make_tier(server.url, num_buckets=NUM_BUCKETS) for _ in range(2))
    mine, theirs = chats(root, 1, 2)
    mine.write(first)
    if how == "read":  # the other store loads the head, computes the rest, and saves that
        reading = second.read(dict(list(theirs.buffers().items())[:4]), DEADLINE_S)
        assert [key for keys in reading for key in keys] == theirs.keys[:4]
        theirs.write(second, 4)
    else:  # it had computed the head itself
        theirs.write(second)
    assert second.settle(DEADLINE_S)
    use(first, mine)
    before = scores(client, theirs)
    close(first, mine)
    assert first.stats.get("redis.retired_blocks") == 8
    after = scores(client, mine)
    assert after[:4] == scores(client, theirs)[:4]
    assert all(late > early for late, early in zip(after[:4], before[:4], strict=True))
    assert after[4] < before[-1]
    assert scores(client, theirs)[4:] == before[4:]


def test_what_this_store_knows_others_to_go_on_from_stays(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    mine, theirs = chats(root, 1, 2)
    mine.write(tier)
    theirs.write(tier, 4)
    close(tier, mine, start=4)
    assert scores(client, theirs)[4] < scores(client, mine)[3]
    assert scores(client, mine)[4] < scores(client, theirs)[-1]


def test_what_others_go_on_from_is_forgotten_with_its_blocks(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier, other = (make_tier(server.url, num_buckets=1) for _ in range(2))
    content = Content(root, 6)
    content.write(tier)
    content.read(other)
    assert other.settle(DEADLINE_S)
    forks = Names(1).bucket(content.keys[0]).forks
    assert client.scard(forks) == 1
    tier.remove(content.keys[3:])
    assert client.exists(forks) == 0
    client.rpush(forks, "somebody else's")
    close(tier, content)
    assert tier.stats.get("redis.retired_blocks") == 0  # nothing is known: nothing is cooled
    tier.remove(content.keys[2:])
    content.read(other)
    assert other.settle(DEADLINE_S)
    assert client.scard(forks) == 1


# ── as a store says it ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def store(server: EmbeddedServer, model: ModelId) -> Iterator[KVStore]:
    values = {
        "host": {"capacity_bytes": 256 * 4096, "prefault": False},
        "mover": {"write": "through"},
        "request": REQUEST,
    }
    tier = RedisTier(RedisTier.Options(url=server.url, sweep_every_s=0, **REDIS))
    store = KVStore(StoreConfig.load(values, environ={}), tiers=[tier])
    store.open(model)
    yield store
    store.flush(5)
    assert store.check() == []
    store.close()


def saved_chats(store: KVStore, root: Root) -> tuple[Chain, Chain]:
    """Two chats with one head, in the host and in Redis."""
    mine, theirs = (chat.chain for chat in chats(root, 1, 2))
    for chain in (mine, theirs):
        with store.save(chain, 0, len(chain)) as save:
            for index in save.indices:
                for part, view in enumerate(save.views(index)):
                    assert view is not None
                    view[:] = bytes_of(chain, index, part, len(view))
            save.commit()
    assert store.flush(5)
    return mine, theirs


def say_closed(store: KVStore, chain: Chain, how: str) -> None:
    if how == "touch":
        store.touch(chain, len(chain), CLOSED)
    else:
        store.match(chain, "the last request", hint=CLOSED, wait_s=5)
        store.forget("the last request")


@pytest.mark.parametrize("said", ["touch", "match"])
def test_a_hint_that_says_closed_reaches_redis_and_spares_the_head_that_chats_share(
    said: str, store: KVStore, client: redis.Redis, root: Root
) -> None:
    mine, theirs = saved_chats(store, root)

    def of(chain: Chain) -> list[float]:
        return [score(client, key, num_buckets=16) for key in chain.part_keys(0, len(chain), (0,))]

    say_closed(store, mine, said)
    wait_until(lambda: of(mine)[4] < of(theirs)[-1])
    assert of(mine)[3] > of(theirs)[4]
    for found in (of(mine), of(theirs)):
        assert all(parent > child for parent, child in itertools.pairwise(found))


@pytest.mark.parametrize("said", ["touch", "match"])
@pytest.mark.parametrize("host", ["empty", "brought up again"])
def test_what_the_host_cannot_tell_to_be_private_stays_as_warm_as_it_was(
    said: str, host: str, store: KVStore, client: redis.Redis, root: Root
) -> None:
    mine, theirs = saved_chats(store, root)
    store.drop_host()
    if host == "brought up again":
        store.match(mine, "a request", wait_s=5)
        with store.load("a request") as load:
            assert len(list(load)) == len(mine)
    say_closed(store, mine, said)
    assert store.flush(5)
    (tier,) = store._tiers
    assert isinstance(tier, RedisTier)
    assert tier.settle(5)
    for chain in (mine, theirs):
        found = [score(client, key, num_buckets=16) for key in chain.part_keys(0, len(chain), (0,))]
        assert all(parent > child for parent, child in itertools.pairwise(found))
