# SPDX-License-Identifier: Apache-2.0
"""The shared tier's order under several policies: who goes first, and that no child ever stands above its parent."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
import redis

from kvstore.api import NO_HINT, Hint, Retention
from kvstore.block import Chain, Root
from kvstore.errors import ConfigError
from kvstore.policies.standing import STANDINGS, priority
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_names import Names
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import MakeStore, chain_of, save_all
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content

NUM_BUCKETS = 4
BLOCK = 16


def scores(client: redis.Redis, content: Content, num_buckets: int = NUM_BUCKETS) -> list[float]:
    """From head to tail, of what is there; no child above its parent."""
    names = Names(num_buckets)
    found = [
        client.zscore(names.bucket(key).order, names.member(key.block, key.part))
        for key in content.keys
        if key.part == 0
    ]
    there = [score for score in found if score is not None]
    assert found[: len(there)] == there, "a block is there without its parent"
    assert all(parent > child for parent, child in itertools.pairwise(there))
    return there


def use(tier: RedisTier, content: Content, later: Iterable[float] = ()) -> None:
    tier.touch(content.keys, NO_HINT, dict(zip(content.chain.ids, later, strict=False)))
    assert tier.settle(DEADLINE_S)


def write(tier: RedisTier, content: Content, later: Iterable[float]) -> None:
    places = dict(zip(content.chain.ids, later, strict=False))
    assert tier.write(content.parts, content.meta, DEADLINE_S, places) == set(content.keys)


# ── what the functions say ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("hint", "later_s"),
    [
        (NO_HINT, [0.0, 0.0, 0.0]),
        (Hint(priority=100), [600.0] * 3),
        (Hint(priority=0), [-600.0] * 3),
        (Hint(priority=75), [300.0] * 3),
        (Hint(ttl_s=200), [-400.0] * 3),  # then it is the next to go
        (Hint(ttl_s=2000), [0.0] * 3),
        (Hint(priority=100, ttl_s=900), [300.0] * 3),
        (Hint(retention=(Retention(0, BLOCK, 100),), block_tokens=BLOCK), [600.0, 0.0, 0.0]),
        (Hint(retention=(Retention(BLOCK, None, 100, 60),), block_tokens=BLOCK), [0.0, 60.0, 60.0]),
        (Hint(retention=(Retention(0, None, 0, 60),), block_tokens=BLOCK), [-60.0] * 3),
        (Hint(priority=0, retention=(Retention(0, 1, 60),), block_tokens=BLOCK), [120.0, -600.0, -600.0]),
    ],
)
def test_a_priority_makes_a_use_count_later_or_earlier(hint: Hint, later_s: list[float]) -> None:
    assert priority(hint, range(3), [1.0] * 3, 600.0) == later_s


@pytest.mark.parametrize("name", STANDINGS)
def test_a_hint_that_says_nothing_leaves_a_use_where_it_was(name: str) -> None:
    assert STANDINGS[name](NO_HINT, range(4), [1.0] * 4, 600.0) == [0.0] * 4


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="policy of tier redis is 'mru': use one of lru, priority"):
        RedisTier.Options(policy="mru")


# ── what becomes of it in the server ────────────────────────────────────────────────────────────────────────────


def test_what_counts_as_used_earlier_goes_before_what_was_used_longer_ago(
    server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    old, low, high = (Content(root, 8, seed=seed) for seed in range(3))
    write(tier, high, [1000.0] * 8)
    write(tier, old, [])
    write(tier, low, [-1000.0] * 8)
    full = make_tier(server.url, num_buckets=NUM_BUCKETS, capacity_bytes=tier.accounted_bytes())
    assert Content(root, 6, seed=3).write(full)
    there = [sum(tier.contains(each.keys, DEADLINE_S)) for each in (old, low, high)]
    assert there[0] == 8
    assert there[1] <= 2
    assert there[2] == 8


@pytest.mark.parametrize("how", ["written", "used"])
def test_a_head_counts_as_used_no_earlier_than_what_hangs_from_it(
    how: str, server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    content, plain = Content(root, 6), Content(root, 1, seed=1)
    later = [-50.0, 0.0, 20.0, -50.0, 90.0, -50.0]
    if how == "written":
        plain.write(tier)
        write(tier, content, later)
    else:
        content.write(tier)
        plain.write(tier)
        use(tier, content, later)
    (now,) = scores(client, plain)
    shifts = [score - now for score in scores(client, content)]
    expected = [90.0] * 5 + [-50.0 if how == "written" else 0.0]  # a use makes nothing colder
    assert shifts == pytest.approx(expected, abs=5.0)


def test_a_tail_of_a_cold_head_is_written_below_it_however_high_it_is_to_stand(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    content = Content(root, 6)
    content.write(tier, 0, 3)
    before = scores(client, content)
    tier.write(dict(list(content.parts.items())[3:]), content.meta, DEADLINE_S, dict.fromkeys(content.chain.ids, 500.0))
    assert scores(client, content)[:3] == before
    use(tier, content, [500.0] * 6)
    assert scores(client, content)[5] > before[0] + 400


def test_chains_that_share_a_head_and_are_used_at_once_lift_it_to_the_higher_of_both(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    system = Content(root, 3)
    chats = [Content(root, 6, seed=seed, prefix=system.tokens) for seed in (1, 2, 3)]
    for chat in chats:
        chat.write(tier)
    for chat, shift in zip(chats, (10.0, 300.0, -40.0), strict=True):  # sent in one go, or one by one
        tier.touch(chat.keys, NO_HINT, {chat.chain.ids[-1]: shift})
    assert tier.settle(DEADLINE_S)
    tails = [scores(client, chat)[-1] for chat in chats]
    assert tails[1] - tails[0] == pytest.approx(290, abs=5)


def test_of_two_uses_that_are_sent_as_one_the_later_place_counts(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    plain, used = Content(root, 4, seed=1), Content(root, 4, seed=2)
    plain.write(tier)
    used.write(tier)
    ids = used.chain.ids
    with tier._upkeep._changed:  # neither is sent before the other is there
        tier.touch(used.keys, NO_HINT, dict.fromkeys(ids, 300.0))
        tier.touch(used.keys, NO_HINT, {ids[0]: 500.0, ids[3]: -100.0})
    assert tier.settle(DEADLINE_S)
    (now, *_) = scores(client, plain)
    assert [score - now for score in scores(client, used)] == pytest.approx([500.0, 300.0, 300.0, 300.0], abs=5.0)


def test_no_place_is_farther_from_its_use_than_a_quarter_of_the_ttl(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    """Ageing by score would take what was used just now, or leave to the TTL what it should have taken."""
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS, ttl_s=4000)
    plain, high, low, used = (Content(root, 1, seed=seed) for seed in range(4))
    plain.write(tier)
    used.write(tier)
    write(tier, high, [1e9])
    write(tier, low, [-1e9])
    use(tier, used, [1e9])
    (now,), *others = (scores(client, each) for each in (plain, high, low, used))
    assert [each[0] - now for each in others] == pytest.approx([1000.0, -1000.0, 1000.0], abs=5.0)


def test_how_long_a_tier_keeps_what_nobody_uses_is_known_to_all_who_share_it(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS, capacity_bytes=20 * part_bytes)
    assert tier.span_s == 600.0  # nothing ever had to go
    content = Content(root, 8)
    content.write(tier)
    for key in content.keys:  # half an hour ago
        bucket = Names(NUM_BUCKETS).bucket(key)
        client.zincrby(bucket.order, -1800, Names.member(key.block, key.part))
        client.zadd(bucket.registry, {bucket.root: 0.0})
    Content(root, 16, seed=1).write(tier)
    assert tier.span_s == pytest.approx(1800, abs=5)
    other = make_tier(server.url, num_buckets=NUM_BUCKETS, capacity_bytes=20 * part_bytes)
    Content(root, 1, seed=2).write(other)
    assert other.span_s == pytest.approx(1800, abs=5)


def test_stores_of_different_policies_and_a_killed_one_keep_one_order_and_one_set_of_books(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tiers = [
        make_tier(server.url, num_buckets=NUM_BUCKETS, capacity_bytes=60 * part_bytes, policy=policy)
        for policy in ("lru", "priority", "priority")
    ]
    system = Content(root, 3)
    chats = [Content(root, 9, seed=seed, prefix=system.tokens) for seed in range(14)]
    rng = random.Random(5)
    for step in range(160):
        tier, chat = rng.choice(tiers), rng.choice(chats)
        later = [rng.choice((0.0, 0.0, -300.0, 40.0, 700.0)) for _ in chat.chain.ids] if tier is not tiers[0] else []
        chat.write(tier, 0, 3)
        tier.write(chat.parts, chat.meta, DEADLINE_S, dict(zip(chat.chain.ids, later, strict=False)))
        tier.touch(chat.keys, NO_HINT, dict(zip(chat.chain.ids, later, strict=False)))
        if step % 5 == 0:
            tier.retire(chat.keys, 3)
        if step % 40 == 20:
            client.client_kill_filter(_type="normal", skipme=True)
    assert all(tier.settle(DEADLINE_S) for tier in tiers)
    for chat in chats:
        scores(client, chat)
    assert tiers[0].check() == []


@pytest.fixture
def part_bytes(server: EmbeddedServer, make_tier: MakeTier, root: Root) -> int:
    """What one part is accounted with."""
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    Content(root, 1, seed=99).write(tier)
    num_bytes = tier.accounted_bytes()
    tier.clear(None)
    return num_bytes


# ── as stores say it ────────────────────────────────────────────────────────────────────────────────────────────


def of(client: redis.Redis, chain: Chain) -> list[float]:
    names = Names(16)
    found = [
        client.zscore(names.bucket(key).order, names.member(key.block, 0))
        for key in chain.part_keys(0, len(chain), (0,))
    ]
    there = [score for score in found if score is not None]
    assert all(parent > child for parent, child in itertools.pairwise(there))
    return there


def saved(store: KVStore, tier: RedisTier, chain: Chain, hint: Hint) -> None:
    """As it stands once all is done: what was written by a policy is also touched, from another thread, and whose
    scores are read one by one meanwhile has a head of before the touch and a tail of after it."""
    with store.save(chain, 0, len(chain), hint=hint) as save:
        assert save.commit() == len(chain)
    assert store.flush(5)
    assert tier.settle(5)


@pytest.mark.parametrize("policy", ["lru", "priority"])
def test_a_priority_given_with_a_save_places_it_in_the_shared_tier_where_that_goes_by_priorities(
    policy: str, server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, make_store: MakeStore, root: Root
) -> None:
    tier = make_tier(server.url, healthy=False, policy=policy)
    store = make_store(tiers=[tier], mover={"write": "through"})
    plain, high, low = (chain_of(root, 4, seed=seed) for seed in range(3))
    saved(store, tier, plain, NO_HINT)
    saved(store, tier, high, Hint(priority=100))
    saved(store, tier, low, Hint(priority=0))
    by_policy = {"lru": [0.0, 0.0], "priority": [600.0, -600.0]}
    assert [of(client, each)[0] - of(client, plain)[0] for each in (high, low)] == pytest.approx(
        by_policy[policy], abs=5
    )


def test_a_last_turn_of_high_priority_lifts_the_conversation_it_hangs_from(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, make_store: MakeStore, root: Root
) -> None:
    tier = make_tier(server.url, healthy=False, policy="priority")
    store = make_store(tiers=[tier], mover={"write": "through"})
    chain = chain_of(root, 6)
    save_all(store, chain, 0, 4)
    assert store.flush(5)
    assert tier.settle(5)
    before = of(client, chain)
    with store.save(chain, 4, 6, hint=Hint(retention=(Retention(4 * BLOCK, None, 100),))) as save:
        save.commit()
    assert store.flush(5)
    assert tier.settle(5)
    assert of(client, chain)[-1] > before[0] + 500
