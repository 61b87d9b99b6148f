# SPDX-License-Identifier: Apache-2.0
"""Exclusive tiers over a real server: down at eviction, up and out, and nothing found by half."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from kvstore.api import Hint
from kvstore.block import Chain, ModelId, PartKey, Root
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError
from kvstore.mover_options import MoverOptions
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_names import Names
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import chain_of, load_all, save_all
from tests.patient import REDIS, REQUEST
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import wait_until

HOST_BLOCKS = 40
MakeReplica = Callable[..., KVStore]


def replica(url: str, model: ModelId, *, num_blocks: int = HOST_BLOCKS, **mover: object) -> KVStore:
    values = {
        "host": {"capacity_bytes": num_blocks * 4096, "prefault": False, "policy": "lru"},
        "mover": {"tiering": "exclusive", **mover},
        "request": REQUEST,
    }
    tier = RedisTier(RedisTier.Options(url=url, sweep_every_s=0, breaker_open_s=0.0, **REDIS))
    store = KVStore(StoreConfig.load(values, environ={}), tiers=[tier])
    store.open(model)
    return store


@pytest.fixture
def make_replica(server: EmbeddedServer, model: ModelId) -> Iterator[MakeReplica]:
    made: list[KVStore] = []

    def make(url: str = "", **options: object) -> KVStore:
        made.append(replica(url or server.url, model, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    rest = [store for store in made if not store._closing.is_set()]
    for store in rest:
        settled(store)
    for store in rest:  # each looks at what all have in Redis: a touch of another is in several steps
        assert store.check() == []
        store.close()


def tier_of(store: KVStore) -> RedisTier:
    (tier,) = store._tiers
    assert isinstance(tier, RedisTier)
    return tier


def settled(store: KVStore) -> None:
    """What the mover and the tier were given is done."""
    assert store.flush(5)
    assert tier_of(store).settle(5)


def below(store: KVStore, chain: Chain) -> int:
    """How many leading blocks lie in Redis; none behind them does."""
    there = tier_of(store).contains(chain.part_keys(0, len(chain), (0,)), DEADLINE_S)
    count = sum(there)
    assert there == [True] * count + [False] * (len(chain) - count)
    return count


def above(store: KVStore, chain: Chain) -> int:
    return store._host.pool.leading(chain.ids, 1, chain.root.id)


def fill(store: KVStore, root: Root, *seeds: int, num_blocks: int = 4) -> None:
    for seed in seeds:
        save_all(store, chain_of(root, num_blocks, seed=seed))
        wait_until(lambda: not store._mover._dirty and store.flush(0))  # a trace has pauses too


def scores(client: redis.Redis, chain: Chain) -> list[float]:
    """Of what is in Redis, head to tail; no child above its parent."""
    names = Names(16)
    found = [
        client.zscore(names.bucket(k).order, names.member(k.block, 0)) for k in chain.part_keys(0, len(chain), (0,))
    ]
    there = [score for score in found if score is not None]
    assert found[: len(there)] == there
    assert all(parent > child for parent, child in itertools.pairwise(there))
    return there


def test_a_block_goes_down_when_it_is_about_to_leave_the_host_and_not_before(
    make_replica: MakeReplica, root: Root
) -> None:
    store = make_replica()
    first = chain_of(root, 4, seed=100)
    save_all(store, first)
    assert load_all(store, first) == ["host"] * 4  # a use sends nothing down
    fill(store, root, *range(7))
    assert below(store, first) == 0
    fill(store, root, *range(7, 16))
    wait_until(lambda: above(store, first) == 0)
    assert below(store, first) == 4
    assert load_all(store, first) == ["redis"] * 4
    assert store.stats()["host.lost_blocks"] == 0


def test_a_chain_is_found_by_its_head_above_and_its_end_below(make_replica: MakeReplica, root: Root) -> None:
    store = make_replica()
    chain = chain_of(root, 16)
    save_all(store, chain)
    fill(store, root, *range(1, 8))
    wait_until(lambda: 0 < above(store, chain) < 16)
    num_above = above(store, chain)
    assert below(store, chain) == 16  # heads too: without them nobody else could find the end
    assert load_all(store, chain) == ["host"] * num_above + ["redis"] * (16 - num_above)


def test_what_came_up_is_the_next_to_go_below_until_it_goes_down_again(
    make_replica: MakeReplica, client: redis.Redis, root: Root
) -> None:
    store = make_replica()
    chat, other = chain_of(root, 8, seed=1), chain_of(root, 8, seed=2)
    save_all(store, chat)
    save_all(store, other)
    fill(store, root, *range(10, 22))
    wait_until(lambda: above(store, chat) == above(store, other) == 0)
    settled(store)
    assert load_all(store, chat) == ["redis"] * 8
    settled(store)
    assert scores(client, chat)[0] < scores(client, other)[-1] - 3600
    fill(store, root, *range(30, 42))
    wait_until(lambda: above(store, chat) == 0)
    settled(store)
    assert scores(client, chat)[-1] > scores(client, other)[0]


def test_a_use_in_the_host_does_not_warm_what_lies_below(
    make_replica: MakeReplica, client: redis.Redis, root: Root
) -> None:
    store = make_replica()
    chain = chain_of(root, 16)
    save_all(store, chain)
    fill(store, root, *range(1, 7))
    wait_until(lambda: below(store, chain) == 16 and above(store, chain) > 2)
    settled(store)
    before = scores(client, chain)
    store.match(chain, "a request")
    store.forget("a request")
    settled(store)
    assert all(late <= early for late, early in zip(scores(client, chain), before, strict=True))


def test_a_head_that_another_chain_hangs_from_stays_when_a_conversation_comes_up(
    make_replica: MakeReplica, client: redis.Redis, root: Root
) -> None:
    first, second = make_replica(), make_replica()
    tokens = Content(root, 4).tokens
    mine, theirs = (Content(root, 10, seed=seed, prefix=tokens).chain for seed in (1, 2))
    for store, chain in ((first, mine), (second, theirs)):
        save_all(store, chain)
        fill(store, root, *range(10, 22))
        wait_until(lambda store=store, chain=chain: above(store, chain) == 0)
        settled(store)
    before = scores(client, theirs)
    assert load_all(first, mine) == ["redis"] * 10
    settled(first)
    after = scores(client, mine)
    assert after[:4] == before[:4]
    assert after[4] < before[-1] - 3600
    assert scores(client, theirs) == before


def test_turns_of_one_conversation_are_no_fork_however_often_they_go_down_and_come_up(
    make_replica: MakeReplica, client: redis.Redis, root: Root
) -> None:
    first, second = make_replica(), make_replica()
    seeds = itertools.count(10)
    tokens = Content(root, 20, seed=1).tokens
    for turn in range(1, 5):
        store = (first, second)[turn % 2]
        chat = Chain(root, tokens[: 16 * 4 * turn])
        assert load_all(store, chat) == ["redis"] * 4 * (turn - 1)
        settled(store)
        if turn > 1:
            old = scores(client, Chain(root, tokens[: 16 * 4 * (turn - 1)]))
            (newest,) = client.zrange(Names(16).bucket(chat.part_keys(0, 1, (0,))[0]).order, -1, -1, withscores=True)
            assert old[0] < newest[1] - 3600, "its head stays as warm as a shared one"
        save_all(store, chat)
        fill(store, root, *itertools.islice(seeds, 14))
        wait_until(lambda store=store, chat=chat: above(store, chat) == 0)
        settled(store)
        assert below(store, chat) == len(chat)


@pytest.mark.alone
def test_eviction_waits_for_no_redis_that_hangs_and_what_it_took_is_counted(
    own_server: EmbeddedServer, make_replica: MakeReplica, root: Root
) -> None:
    store = make_replica(own_server.url, write_deadline_s=2.0)
    save_all(store, chain_of(root, 4))
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        took_s = []
        for seed in range(1, 40):
            began_s = time.monotonic()
            assert save_all(store, chain_of(root, 4, seed=seed)) == 4
            took_s.append(time.monotonic() - began_s)
        assert sorted(took_s)[-4] < 1.0  # half of what the write may wait; a busy machine may hold up some
        assert store.stats()["host.lost_blocks"] >= 4 * 40 - HOST_BLOCKS - 8
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    fill(store, root, *range(50, 64))
    wait_until(lambda: below(store, chain_of(root, 4, seed=50)) == 4)  # and it goes on


def test_what_a_store_holds_when_it_is_closed_goes_below_and_another_finds_it(
    make_replica: MakeReplica, root: Root
) -> None:
    store = make_replica()
    chains = [chain_of(root, 6, seed=seed) for seed in range(5)]
    for chain in chains:
        save_all(store, chain)
    assert [below(store, chain) for chain in chains] == [0] * 5
    store.close()
    after = make_replica()
    for chain in chains:
        assert load_all(after, chain) == ["redis"] * 6


@pytest.mark.alone
def test_a_drain_that_is_cut_short_says_so_and_leaves_whole_heads(
    make_replica: MakeReplica, root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_replica(write_bytes_per_s=8 * 4096, flush_s=0)
    chains = [chain_of(root, 10, seed=seed) for seed in range(3)]
    for chain in chains:
        save_all(store, chain)
    assert not store.drain(1.5)
    counts = [below(store, chain) for chain in chains]
    assert 8 <= sum(counts) < 30
    assert counts[2] == max(counts)  # what was used last goes first
    wait_until(lambda: "blocks did not go to redis" in caplog.text)


def test_what_a_drain_writes_first_is_the_last_to_go_below(
    make_replica: MakeReplica, client: redis.Redis, root: Root
) -> None:
    def is_so(first_seed: int) -> bool:
        store = make_replica(write_bytes_per_s=20 * 4096, flush_s=0)
        chains = [chain_of(root, 5, seed=first_seed + at) for at in range(7)]
        for chain in chains:
            save_all(store, chain)
        assert store.drain(10)  # the last of it 0.75 s after the first
        settled(store)
        return scores(client, chains[-1])[-1] > scores(client, chains[0])[0] + 0.3

    # A machine that stands still within a write makes that later than was thought; else it is so each time.
    assert any(is_so(10 * number) for number in range(4))


def test_a_store_that_is_killed_leaves_what_went_down_to_be_found(make_replica: MakeReplica, root: Root) -> None:
    store = make_replica()
    chain = chain_of(root, 12)
    save_all(store, chain)
    fill(store, root, *range(1, 12))
    wait_until(lambda: below(store, chain) == 12)
    other = make_replica()  # as after a kill: the first says nothing more
    assert load_all(other, chain) == ["redis"] * 12


def test_a_server_that_lost_all_gets_whole_chains_again(
    make_replica: MakeReplica, client: redis.Redis, root: Root
) -> None:
    store = make_replica()
    chain = chain_of(root, 16)
    save_all(store, chain)
    fill(store, root, *range(1, 7))
    wait_until(lambda: below(store, chain) == 16 and above(store, chain) > 0)
    client.flushall()
    longer = Chain(root, [*Content(root, 0).tokens, *_tokens(chain), *range(16 * 2)])
    save_all(store, longer)
    fill(store, root, *range(10, 22))
    wait_until(lambda: above(store, longer) == 0)
    settled(store)
    assert below(store, longer) in (0, len(longer))  # all of it, or it was lost above: no end without a head
    assert tier_of(store).check() == []


def _tokens(chain: Chain) -> list[int]:
    return [
        int.from_bytes(chain.meta(index).tokens[at : at + 4], "little")
        for index in range(len(chain))
        for at in range(0, 64, 4)
    ]


def test_what_a_closed_conversation_left_does_not_go_down_where_the_policy_knows_it(
    server: EmbeddedServer, model: ModelId, root: Root
) -> None:
    values = {
        "host": {"capacity_bytes": HOST_BLOCKS * 4096, "prefault": False, "policy": "returns"},
        "mover": {"tiering": "exclusive"},
        "request": REQUEST,
    }
    tier = RedisTier(RedisTier.Options(url=server.url, sweep_every_s=0, **REDIS))
    with KVStore(StoreConfig.load(values, environ={}), tiers=[tier]) as store:
        store.open(model)
        over, live = chain_of(root, 6, seed=1), chain_of(root, 6, seed=2)
        save_all(store, over)
        save_all(store, live)
        store.touch(over, 6, Hint(closed=True))
        for number in range(40):  # until the policy has something to go by
            chain = chain_of(root, 3, seed=100 + number % 4)
            store.match(chain, "again")
            store.forget("again")
            save_all(store, chain)
        assert store.drain(5)
        assert below(store, live) == 6
        odds = store._host.pool.return_odds(over.ids)
        assert below(store, over) == (0 if not any(odds) else 6)


def test_stores_that_go_up_and_down_at_random_keep_one_order_and_one_set_of_books(
    make_replica: MakeReplica, client: redis.Redis, root: Root
) -> None:
    stores = [make_replica(), make_replica()]
    system = Content(root, 3).tokens
    chats = [Content(root, 12, seed=seed, prefix=system) for seed in range(12)]
    rng = random.Random(11)
    for step in range(120):
        store, chat = rng.choice(stores), rng.choice(chats)
        chain = Chain(root, chat.tokens[: 16 * rng.randrange(4, 13)])
        load_all(store, chain)
        save_all(store, chain)
        settled(store)
        if step % 30 == 15:
            client.client_kill_filter(_type="normal", skipme=True)
    for store in stores:
        settled(store)
    for chat in chats:
        scores(client, chat.chain)
    assert tier_of(stores[0]).check() == []


def test_a_key_of_another_program_where_forks_are_noted_keeps_nothing_else_from_being_done(
    exclusive: RedisTier, client: redis.Redis, root: Root
) -> None:
    chat, other = Content(root, 8, seed=1), Content(Root(root.model, salt=b"other"), 8, seed=2)
    write(exclusive, chat)
    write(exclusive, other)
    before = scores(client, other.chain)
    bucket = Names(16).bucket(chat.keys[-1])
    client.delete(bucket.only, bucket.forks)
    client.set(bucket.only, "another's")
    client.set(bucket.forks, "another's")
    exclusive.retire(chat.keys, 0)
    exclusive.retire(other.keys, 0)
    assert exclusive.settle(DEADLINE_S)
    assert "redis.upkeep_failures" not in exclusive.stats.snapshot()
    assert scores(client, other.chain)[0] < before[-1] - 3600
    client.delete(bucket.only, bucket.forks)


def test_a_tiering_that_there_is_not_and_a_priority_that_nobody_asks_for_are_named() -> None:
    with pytest.raises(ConfigError, match="mover.tiering is 'both': use one of inclusive, exclusive"):
        MoverOptions(tiering="both")
    with pytest.raises(ConfigError, match="nobody asks at eviction"):
        MoverOptions(tiering="exclusive", min_priority=1)


# ── which members have several children ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def exclusive(server: EmbeddedServer, make_tier: MakeTier) -> RedisTier:
    tier = make_tier(server.url)
    tier.is_exclusive = True
    return tier


def forks(client: redis.Redis, content: Content) -> list[int]:
    names = Names(16)

    def is_fork(key: PartKey) -> bool:
        return bool(client.sismember(names.bucket(key).forks, names.member(key.block, key.part)))

    return [index for index, key in enumerate(content.keys) if is_fork(key)]


def write(tier: RedisTier, content: Content, start: int = 0, stop: int | None = None) -> None:
    content.write(tier, start, stop)
    assert tier.settle(DEADLINE_S)


def test_an_end_that_goes_on_is_no_fork_and_a_second_way_to_go_on_makes_it_one(
    exclusive: RedisTier, client: redis.Redis, root: Root
) -> None:
    chat = Content(root, 9, seed=1)
    other = Content(root, 9, seed=2, prefix=chat.tokens[: 6 * 16])
    for start, stop in ((0, 3), (3, 6), (0, 6), (6, 9), (0, 9)):
        write(exclusive, chat, start, stop)
    assert forks(client, chat) == []
    write(exclusive, other, 6, 9)
    assert forks(client, chat) == [5]


def test_two_ways_to_go_on_that_come_in_one_write_are_a_fork(
    exclusive: RedisTier, client: redis.Redis, root: Root
) -> None:
    chat = Content(root, 6, seed=1)
    other = Content(root, 6, seed=2, prefix=chat.tokens[: 3 * 16])
    for part in (exclusive.write(chat.parts | other.parts, chat.meta | other.meta, DEADLINE_S), set()):
        assert part in (set(chat.keys) | set(other.keys), set())
    assert exclusive.settle(DEADLINE_S)
    assert forks(client, chat) == [2]


def test_a_member_of_which_nothing_is_noted_counts_as_a_fork(
    exclusive: RedisTier, client: redis.Redis, make_tier: MakeTier, server: EmbeddedServer, root: Root
) -> None:
    inclusive = make_tier(server.url)
    chat = Content(root, 6, seed=1)
    write(inclusive, chat, 0, 3)
    write(exclusive, chat, 3, 6)
    assert forks(client, chat) == [2]


def test_an_end_that_was_evicted_and_comes_again_is_the_same_child(
    exclusive: RedisTier, client: redis.Redis, root: Root
) -> None:
    chat = Content(root, 8, seed=1)
    other = Content(root, 8, seed=2, prefix=chat.tokens[: 4 * 16])
    write(exclusive, chat)
    exclusive.retire(chat.keys, 0)  # it came up: all of it is its own
    assert exclusive.settle(DEADLINE_S)
    exclusive.remove(chat.keys[4:])
    write(exclusive, chat, 4, 8)
    assert forks(client, chat) == []
    write(exclusive, other, 4, 8)
    assert forks(client, chat) == [3]
