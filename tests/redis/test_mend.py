# SPDX-License-Identifier: Apache-2.0
"""Keys of the accounting that another program writes over: found, said once, taken away, and rebuilt."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import redis

from kvstore.api import NO_HINT
from kvstore.block import PartKey, Root
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_names import Bucket, Names, registry, used
from kvstore.tiers.redis_upkeep import SWEEP_MARK
from kvstore.tiers.valkey import EmbeddedServer
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content

NUM_BUCKETS = 4
STRIPE = 1


def put_list(client: redis.Redis, name: str) -> None:
    client.delete(name)
    client.rpush(name, "somebody", "else's")


def put_text(client: redis.Redis, name: str) -> None:
    client.set(name, "hello")


def put_set(client: redis.Redis, name: str) -> None:
    client.delete(name)
    client.sadd(name, "somebody else's")


SPOILT: dict[str, Callable[[Bucket], str]] = {
    "order": lambda bucket: bucket.order,
    "sizes": lambda bucket: bucket.sizes,
    "total": lambda bucket: bucket.total,
    "registry": lambda bucket: bucket.registry,
    "used": lambda bucket: bucket.used,
}


@pytest.fixture
def chats(root: Root) -> list[Content]:
    system = Content(root, 4)
    return [Content(root, 12, seed=seed, prefix=system.tokens) for seed in range(1, 5)]


def resident(tier: RedisTier, content: Content) -> list[PartKey]:
    there = tier.contains(content.keys, DEADLINE_S)
    return [key for key, present in zip(content.keys, there, strict=True) if present]


def scores(client: redis.Redis, content: Content) -> list[float]:
    names = Names(NUM_BUCKETS)
    found = [client.zscore(names.bucket(key).order, names.member(key.block, key.part)) for key in content.keys]
    assert None not in found
    return found


@pytest.mark.parametrize("put", [put_list, put_text, put_set])
@pytest.mark.parametrize("which", SPOILT)
def test_a_foreign_key_in_the_books_costs_no_block_and_the_next_write_puts_it_right(
    which: str,
    put: Callable[[redis.Redis, str], None],
    server: EmbeddedServer,
    client: redis.Redis,
    make_tier: MakeTier,
    root: Root,
    chats: list[Content],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # With a breaker that would stay open: that a key holds something else says nothing of the server.
    tier, other = (
        make_tier(server.url, num_buckets=NUM_BUCKETS, capacity_bytes=1 << 30, breaker_open_s=60.0) for _ in range(2)
    )
    for chat in chats:
        chat.write(tier)
    accounted = tier.accounted_bytes()
    name = SPOILT[which](Bucket(STRIPE, root.id[:8].hex()))
    put(client, name)
    assert any(name in fault for fault in other.check())
    fresh = Content(root, 10, seed=99)
    with caplog.at_level(logging.WARNING, "kvstore.tiers.redis"):
        assert fresh.write(tier) == set(fresh.keys)  # some of it lies in that stripe
        assert Content(root, 8, seed=98).write(other) == set(Content(root, 8, seed=98).keys)
    assert tier.settle(DEADLINE_S)
    assert other.settle(DEADLINE_S)
    assert len([record for record in caplog.records if name in record.getMessage()]) == 1
    assert tier.stats.get("redis.foreign_books") == 1
    assert tier.stats.get("redis.available") == 1
    assert tier.check() == []
    for chat in (*chats, fresh):
        assert resident(tier, chat) == chat.keys
        assert all(parent > child for parent, child in itertools.pairwise(scores(client, chat)))
    assert tier.accounted_bytes() == accounted * 54 // 36


@pytest.mark.parametrize("which", SPOILT)
def test_every_call_gets_over_a_foreign_key(
    which: str, server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, chats: list[Content]
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS, capacity_bytes=1 << 30)
    name = SPOILT[which](Bucket(STRIPE, root.id[:8].hex()))

    def touch() -> None:
        tier.touch(chats[0].keys, NO_HINT)
        assert tier.settle(DEADLINE_S)

    seeds = itertools.count(100)
    calls: list[Callable[[], object]] = [
        lambda: chats[0].write(tier),
        touch,
        tier.sweep,
        lambda: tier.remove(chats[1].keys[-3:]),
        lambda: tier.clear(root.id),
    ]
    for call in calls:
        for chat in chats:
            chat.write(tier)
        put_list(client, name)
        call()
        Content(root, 20, seed=next(seeds)).write(tier)  # what the call itself did not come upon
        assert tier.settle(DEADLINE_S)
        assert tier.check() == []
    tier.clear(None)
    assert tier.accounted_bytes() == 0


def test_a_write_that_cannot_be_accounted_leaves_no_value_behind(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    """As a store sees it that dies before it could mend: the transaction itself."""
    tier = make_tier(server.url, num_buckets=1)
    content = Content(root, 3)
    put_list(client, Bucket(0, root.id[:8].hex()).order)
    with client.pipeline(transaction=True) as pipeline:
        names = [tier._names.value(key) for key in content.keys]
        for name in names:
            pipeline.set(name, "value")
        account = tier._accounting.account([(key, 1.0, 5120) for key in content.keys])
        pipeline.execute_command("EVAL", *_words(account))
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            pipeline.execute()
    assert client.exists(*names) == 0
    tier.clear(None)
    content.write(tier)
    assert tier.settle(DEADLINE_S)


def _words(resp: bytes) -> list[bytes]:
    """Arguments of one command, without its name."""
    words, at = [], resp.index(b"\r\n") + 2
    while at < len(resp):
        end = resp.index(b"\r\n", at)
        length = int(resp[at + 1 : end])
        words.append(resp[end + 2 : end + 2 + length])
        at = end + 4 + length
    return words[1:]


def test_a_foreign_key_in_the_place_of_the_sweeps_mark_stops_no_sweep_for_good(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    put_list(client, SWEEP_MARK)
    watcher = make_tier(server.url)
    content = Content(root, 4)
    content.write(watcher)
    client.delete(content.name(1))
    sweeping = make_tier(server.url, sweep_every_s=0.2)
    for _ in range(100):
        if not watcher.check():
            break
        sweeping.settle(0.1)
        watcher.settle(0.1)
        client.blpop("nothing", 0.1)
    assert resident(watcher, content) == content.keys[:1]


@pytest.mark.parametrize(
    "name", ["{²}:0:v:1", "{7}:0:v:1", "{999}:x:v:1", "{000}:x:v:1", "{000}::v:", "{000}:x:z", "{²²²}:0:s", "{001}::b"]
)
def test_names_that_no_store_gives_are_left_alone_and_hold_nothing_up(
    name: str, server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    content = Content(root, 4)
    content.write(tier)
    client.set(f"kvs2:{name}", "somebody else's")
    client.delete(content.name(1, NUM_BUCKETS))
    assert tier.sweep()["strays"] == 0
    assert tier.check() == []
    put_list(client, registry(STRIPE))  # all books are looked through then
    assert content.write(tier) == set(content.keys)
    assert tier.settle(DEADLINE_S)
    tier.clear(None)
    assert tier.check() == []
    assert client.get(f"kvs2:{name}") == b"somebody else's"


def test_a_foreign_key_in_the_place_of_a_mark_is_no_mark(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    producer, waiter = (make_tier(server.url) for _ in range(2))
    content = Content(root, 6)
    blocks = content.chain.ids
    name = f"{producer._names.bucket(content.keys[2]).prefix}:m:{blocks[2].hex()}"
    put_list(client, name)
    assert waiter.marked_to(root.id, blocks, 2, DEADLINE_S) == 2
    producer.mark(root.id, blocks[2:], 5.0)
    assert waiter.marked_to(root.id, blocks, 2, DEADLINE_S) == 6
    put_list(client, name)
    producer.unmark(root.id, [blocks[2]])
    client.delete(name)


def test_all_books_of_a_namespace_spoilt_at_once_are_rebuilt_or_given_up_together(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, chats: list[Content]
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    other = Content(replace(root, salt=b"other"), 8)
    other.write(tier)
    for chat in chats:
        chat.write(tier)
    for stripe in range(NUM_BUCKETS):
        bucket = Bucket(stripe, root.id[:8].hex())
        for name in (bucket.order, bucket.sizes, bucket.total, registry(stripe), used(stripe)):
            put_list(client, name)
    chats[0].write(tier)
    assert tier.settle(DEADLINE_S)
    tier.sweep()
    assert tier.check() == []
    assert resident(tier, other) == other.keys
    # Whether what was written meanwhile stays hangs on whether that or the mending came first.
    assert resident(tier, chats[0]) in ([], chats[0].keys)
    chats[0].write(tier)
    assert resident(tier, chats[0]) == chats[0].keys
    assert tier.check() == []
