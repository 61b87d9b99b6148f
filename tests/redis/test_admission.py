# SPDX-License-Identifier: Apache-2.0
"""What is let into a real shared tier, and what of the order in which things leave outlives a restart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvstore.api import NO_HINT, Hint, Retention
from kvstore.block import BlockId, Chain, Root
from kvstore.errors import ConfigError
from kvstore.mover_options import MoverOptions
from kvstore.policies.lru import LruPolicy
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import MakeStore, chain_of
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import wait_until

BLOCK = 16
NUM_BUCKETS = 4


class Knowing(LruPolicy):
    """LRU that knows how likely blocks are used again: those in LIKELY surely, the others never."""

    LIKELY: frozenset[BlockId] = frozenset()

    def return_odds(self, blocks: Sequence[BlockId]) -> list[float]:
        return [float(block in self.LIKELY) for block in blocks]


@pytest.fixture
def tier(server: EmbeddedServer, make_tier: MakeTier) -> RedisTier:
    """For a store, which closes it."""
    return make_tier(server.url, healthy=False)


def save(store: KVStore, chain: Chain, hint: Hint = NO_HINT) -> None:
    with store.save(chain, 0, len(chain), hint=hint) as saved:
        assert saved.commit() == len(chain)


def in_redis(tier: RedisTier, chain: Chain) -> list[bool]:
    return tier.contains(chain.part_keys(0, len(chain), (0,)), DEADLINE_S)


def test_blocks_of_too_low_a_priority_stay_in_the_host_but_not_from_under_others(
    tier: RedisTier, make_store: MakeStore, root: Root
) -> None:
    store = make_store(tiers=[tier], mover={"write": "through", "min_priority": 50})
    shared, low, late = (chain_of(root, 4, seed=seed) for seed in range(3))
    save(store, shared, Hint(priority=10, retention=(Retention(0, 2 * BLOCK, 80),)))
    save(store, low, Hint(priority=49))
    save(store, late, Hint(priority=10, retention=(Retention(2 * BLOCK, 3 * BLOCK, 50),)))
    store.flush()
    assert in_redis(tier, shared) == [True, True, False, False]
    assert in_redis(tier, low) == [False] * 4
    assert in_redis(tier, late) == [True, True, True, False]  # without its head the third could not be found
    assert store.stats()["mover.declined_blocks"] == 2 + 4 + 1


@pytest.mark.parametrize("write", ["through", "on_reuse"])
def test_what_is_unlikely_used_again_stays_in_the_host(
    tier: RedisTier, make_store: MakeStore, root: Root, write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, other = chain_of(root, 4), chain_of(root, 3, seed=1)
    monkeypatch.setattr(Knowing, "LIKELY", frozenset({chain.ids[1]}))
    policy = "tests.redis.test_admission:Knowing"
    mover = {"write": write, "min_return_probability": 0.5}
    store = make_store(host={"capacity_bytes": 64 * 4096, "policy": policy}, tiers=[tier], mover=mover)
    for each in (chain, other):
        save(store, each)
        store.match(each, "again")
        store.forget("again")
    store.flush()
    assert in_redis(tier, chain) == [True, True, False, False]
    assert in_redis(tier, other) == [False] * 3


def test_at_eviction_only_the_likely_go_down(
    tier: RedisTier, make_store: MakeStore, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    likely, unlikely = chain_of(root, 4), chain_of(root, 4, seed=1)
    monkeypatch.setattr(Knowing, "LIKELY", frozenset(likely.ids))
    policy = "tests.redis.test_admission:Knowing"
    mover = {"write": "on_evict", "min_return_probability": 0.5}
    store = make_store(host={"capacity_bytes": 20 * 4096, "policy": policy}, tiers=[tier], mover=mover)
    for each in (unlikely, likely, *(chain_of(root, 4, seed=seed) for seed in range(2, 5))):
        save(store, each)
    save(store, chain_of(root, 4, seed=6))  # the first is gone; the second is the coldest now
    wait_until(lambda: any(in_redis(tier, likely)))
    assert not any(in_redis(tier, unlikely))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"min_priority": 101}, "mover.min_priority is 101"),
        ({"min_priority": 1, "write": "on_evict"}, "nobody asks at eviction"),
        ({"min_return_probability": 1.5}, "mover.min_return_probability is 1.5"),
        ({"min_return_probability": float("nan")}, "mover.min_return_probability is nan"),
    ],
)
def test_what_cannot_be_asked_of_admission_is_named(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        MoverOptions(**options)  # type: ignore[arg-type]


def test_the_order_of_the_shared_tier_outlives_the_stores(
    server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    """Policies relearn; what Redis knows of use stays: the chain that a store now gone used last goes last."""
    contents = [Content(root, 10, seed=seed) for seed in range(2)]
    first = make_tier(server.url, healthy=False, num_buckets=NUM_BUCKETS)
    for content in contents:
        content.write(first)
    first.touch(contents[0].keys, Hint())
    assert first.settle(DEADLINE_S)
    room_bytes = first.accounted_bytes()
    first.close()
    second = make_tier(server.url, num_buckets=NUM_BUCKETS, capacity_bytes=room_bytes)
    Content(root, 5, seed=9).write(second)
    there = [second.contains(content.keys, DEADLINE_S) for content in contents]
    assert all(there[0])
    assert not all(there[1])
