# SPDX-License-Identifier: Apache-2.0
"""A Cluster of three primaries and three replicas: spread, redirected, resharded, killed; never a wrong byte."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace

import pytest
from redis.crc import key_slot

from kvstore.api import NO_HINT
from kvstore.block import PartKey, Root
from kvstore.errors import ConfigError, TierError, TierUnavailable
from kvstore.service.doctor_redis import TierSettings, examine_redis
from kvstore.service.findings import Verdict
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_names import Names
from kvstore.tiers.redis_nodes import Nodes, Options, stripe_of
from kvstore.tiers.redis_read import Reader
from kvstore.tiers.redis_wire import command
from tests.redis.cluster import Cluster, caught_up, until
from tests.redis.conftest import SERVERS, MakeTier, binary_of
from tests.redis.content import DEADLINE_S, Content
from tests.redis.rights import USER
from tests.waiting import timed

pytestmark = pytest.mark.slow  # six servers that agree on who they are

NUM_STRIPES = 64


@pytest.fixture(scope="module", params=SERVERS)
def shared_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster(binary_of(request.param)) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """One that no test breaks for good, empty."""
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture(params=SERVERS)
def own_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster(binary_of(request.param)) as cluster:
        yield cluster


@pytest.fixture
def tier(cluster: Cluster, make_tier: MakeTier) -> RedisTier:
    return make_tier(cluster.url, num_buckets=NUM_STRIPES)


def slot_of(key: PartKey) -> int:
    return int(key_slot(Names(NUM_STRIPES).value(key).encode()))


def chain_on(cluster: Cluster, root: Root, num_blocks: int, node: int) -> tuple[Content, int]:
    """A chain, and the slot of one of its blocks beyond the first that node `node` holds."""
    content = Content(root, num_blocks)
    third = 16_384 // 3
    for key in content.keys[2:]:
        if slot_of(key) // third == node:
            return content, slot_of(key)
    raise AssertionError("no block of the chain lies there")


# ── spread ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_read_that_brought_everything_keeps_its_connections(cluster: Cluster, tier: RedisTier, root: Root) -> None:
    """Many were cut, where a node's thread had brought its last key and not yet said that it was done."""
    content = Content(root, 40)
    assert content.write(tier) == set(content.keys)
    assert content.read(tier) == content.keys
    assert tier.settle(DEADLINE_S)

    def num_connections() -> int:
        return sum(int(node.client.info("stats")["total_connections_received"]) for node in cluster.nodes)

    before = num_connections()
    for _ in range(100):
        assert content.read(tier) == content.keys
    assert num_connections() == before


def test_a_chain_is_spread_over_all_nodes_and_comes_back_in_order(
    cluster: Cluster, tier: RedisTier, root: Root
) -> None:
    content = Content(root, 60)
    assert content.write(tier) == set(content.keys)
    assert all(node.client.dbsize() > 10 for node in cluster.nodes[:3])
    assert tier.contains(content.keys, DEADLINE_S) == [True] * len(content.keys)
    assert content.read(tier) == content.keys
    tier.touch(content.keys, NO_HINT)
    assert tier.settle(DEADLINE_S)
    assert tier.stats.get("redis.touched_blocks") == len(content.keys)
    tier.remove(content.keys[40:])
    assert content.read(tier) == content.keys[:40]
    tier.clear(root.id)
    assert tier.accounted_bytes() == 0
    assert content.read(tier) == []


def test_presence_in_a_cluster_is_right_for_every_key_wherever_holes_lie(
    cluster: Cluster, tier: RedisTier, root: Root
) -> None:
    content = Content(root, 900)
    content.write(tier, stop=700)
    written = {key for key in content.keys if key.block in set(content.chain.ids[:700])}
    gone = {key for key in written if random.Random(key.block).random() < 0.05}
    tier.remove(list(gone))
    written -= gone
    assert tier.contains(content.keys, DEADLINE_S) == [key in written for key in content.keys]
    tier.clear(None)  # chains with holes are what `check` would find


def test_what_another_program_put_under_the_books_of_a_node_is_mended_there(
    cluster: Cluster, tier: RedisTier, root: Root
) -> None:
    first, second = Content(root, 60), Content(root, 200, seed=1)
    first.write(tier)
    one, two, three, four = (Names(NUM_STRIPES).bucket(key) for key in first.keys[:40:10])

    def spoil(*names: str) -> None:
        for name in names:
            node = cluster.nodes[int(key_slot(name.encode())) // (16_384 // 3 + 1)]
            node.client.delete(name)
            node.client.rpush(name, "somebody else's")

    spoil(one.registry, two.order, three.sizes, four.used)
    assert second.write(tier) == set(second.keys)
    third = Content(root, 200, seed=2)
    spoil(three.sizes)  # which is met by values alone: the node takes all else
    assert third.write(tier) == set(third.keys)
    assert tier.settle(DEADLINE_S)
    assert tier.check() == []
    assert first.read(tier) == first.keys


def test_a_store_with_more_buckets_on_the_same_cluster_holds_nothing_up(
    cluster: Cluster, make_tier: MakeTier, root: Root
) -> None:
    """It was set up wrongly, and shares nothing; but for that nobody else is to stop sweeping."""
    few, many = make_tier(cluster.url, num_buckets=4), make_tier(cluster.url, num_buckets=NUM_STRIPES)
    content, names = Content(root, 60), Names(NUM_STRIPES)
    for tier in (few, many):
        assert content.write(tier) == set(content.keys)
    apart = [key for key in content.keys if names.stripe(key) >= 4]
    stray, order = names.value(apart[0]), names.bucket(apart[0]).order
    cluster.nodes[slot_of(apart[0]) // (16_384 // 3 + 1)].client.zrem(order, names.member(apart[0].block, 0))
    few.sweep()
    assert few.check() == []
    assert f"{stray} has no account" in many.check()
    few.clear(None)
    assert few.check() == []
    assert all(many.contains(apart, DEADLINE_S))
    many.sweep()


def test_large_blocks_of_several_nodes_arrive_in_order(cluster: Cluster, tier: RedisTier, root: Root) -> None:
    content = Content(Root(replace(root.model, head_dim=4096)), 12)
    tier.open(content.layout)
    assert content.write(tier) == set(content.keys)
    for _ in range(5):
        assert content.read(tier) == content.keys


def test_what_a_nodes_thread_fails_of_the_caller_hears(
    tier: RedisTier, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is: values that were not read do not look like missing ones."""
    content = Content(root, 12)
    assert content.write(tier) == set(content.keys)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Reader, "read", fail)
    with pytest.raises(MemoryError):
        content.read(tier)
    monkeypatch.undo()
    assert content.read(tier) == content.keys


def test_read_closed_early_stops_all_nodes_and_the_breaker_stays_closed(
    cluster: Cluster, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(cluster.url, num_buckets=NUM_STRIPES, breaker_open_s=60.0)
    content = Content(Root(replace(root.model, head_dim=4096)), 12)
    tier.open(content.layout)
    content.write(tier)
    for stop_after in (1, 3, 11):
        into = content.buffers()
        reading = tier.read(into, DEADLINE_S)
        for _ in range(stop_after):
            next(reading)
        reading.close()  # type: ignore[attr-defined]
        before = [bytes(buffer) for buffer in into.values()]
        assert content.read(tier) == content.keys
        assert [bytes(buffer) for buffer in into.values()] == before


@pytest.mark.alone
def test_read_closed_early_does_not_wait_for_a_node_that_hangs(
    cluster: Cluster, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(cluster.url, num_buckets=NUM_STRIPES, healthy=False)
    contents = (Content(root, 40, seed=seed) for seed in range(100))
    content = next(each for each in contents if slot_of(each.keys[0]) < 16_384 // 3 - 1)
    content.write(tier)
    assert content.read(tier) == content.keys  # connections are there: what hangs is a read
    os.kill(cluster.nodes[2].process.pid, signal.SIGSTOP)
    try:
        reading = tier.read(content.buffers(), 2 * DEADLINE_S)
        assert next(reading)[0] == content.keys[0]
        began = time.monotonic()
        reading.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < DEADLINE_S / 2
    finally:
        os.kill(cluster.nodes[2].process.pid, signal.SIGCONT)
    until(lambda: b"cluster_state:ok" in cluster.nodes[2].do("CLUSTER INFO"))


def test_read_closed_early_does_not_wait_for_a_node_whose_connections_others_have(
    cluster: Cluster, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(cluster.url, num_buckets=NUM_STRIPES, connections=1)
    content = Content(root, 40)
    content.write(tier)
    assert content.read(tier) == content.keys
    shares = tier._nodes.split([Names(NUM_STRIPES).stripe(key) for key in content.keys], time.monotonic() + DEADLINE_S)
    first = next(node for node, positions in shares.items() if 0 in positions)
    other = next(node for node in shares if node is not first)
    with other.loads.lease(time.monotonic() + DEADLINE_S):
        reading = tier.read(content.buffers(), 2 * DEADLINE_S)
        assert next(reading)[0] == content.keys[0]
        began = time.monotonic()
        reading.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < DEADLINE_S / 2
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "kvstore-redis-read"])
    assert content.read(tier) == content.keys


def test_watermark_holds_over_all_nodes_and_tails_go_before_heads(
    cluster: Cluster, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(cluster.url, num_buckets=NUM_STRIPES, capacity_bytes=500_000)
    old, new = Content(root, 60), Content(root, 60, seed=1)
    old.write(tier)
    tier.touch(old.keys[:4], NO_HINT)
    assert tier.settle(DEADLINE_S)
    new.write(tier)
    assert tier.accounted_bytes() <= 500_000
    there = tier.contains(old.keys, DEADLINE_S)
    assert there == sorted(there, reverse=True)
    assert sum(there) < 60
    assert tier.sweep()["strays"] == 0


def test_a_tenant_keeps_to_its_capacity_over_all_nodes(cluster: Cluster, make_tier: MakeTier, root: Root) -> None:
    first, second = (make_tier(cluster.url, num_buckets=NUM_STRIPES, tenant_capacity_bytes=300_000) for _ in range(2))
    for adapter in range(6):
        content = Content(Root(root.model, adapter=bytes([adapter]), salt=b"tenant"), 20)
        tier = (first, second)[adapter % 2]
        tier.meet(content.chain.root)
        assert content.write(tier) == set(content.keys)
        assert tier.accounted_bytes() <= 300_000
    assert first.accounted_bytes() > 200_000


def test_several_tiers_writing_at_once_keep_one_set_of_books(cluster: Cluster, make_tier: MakeTier, root: Root) -> None:
    tiers = [make_tier(cluster.url, num_buckets=NUM_STRIPES, capacity_bytes=400_000) for _ in range(3)]

    def work(tier: RedisTier, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(15):
            content = Content(root, rng.randrange(5, 40), seed=rng.randrange(6))
            content.write(tier)
            content.read(tier)

    threads = [threading.Thread(target=work, args=(tier, number)) for number, tier in enumerate(tiers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tiers[0].sweep()
    assert tiers[0].check() == []


def test_a_command_goes_where_its_hash_tag_says() -> None:
    names = Names(NUM_STRIPES)
    assert stripe_of(command("EVAL", "script", 1, "kvs2:{017}:ab:z")) == 17
    assert stripe_of(command("TIME")) == 0
    assert names.stripes == range(NUM_STRIPES)


@pytest.mark.parametrize("url", ["redis+cluster://nowhere", "redis+cluster://:7000", "redis+cluster://a:1,b"])
def test_cluster_urls_without_host_and_port_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        RedisTier(RedisTier.Options(url=url))


# ── slots that move ─────────────────────────────────────────────────────────────────────────────────────────────


def test_slots_that_move_are_followed_before_during_and_after(
    own_cluster: Cluster, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(own_cluster.url, num_buckets=NUM_STRIPES)
    content, slot = chain_on(own_cluster, root, 40, node=0)
    content.write(tier)
    own_cluster.begin_moving(slot, 0, 1)
    assert content.read(tier) == content.keys
    assert own_cluster.move_keys(slot, 0, 1, limit=2) == 2
    assert all(tier.contains(content.keys, DEADLINE_S))
    assert content.read(tier) == content.keys
    own_cluster.move_keys(slot, 0, 1)
    assert all(tier.contains(content.keys, DEADLINE_S))
    assert content.read(tier) == content.keys
    own_cluster.end_moving(slot, 0, 1)

    def num_sent_on() -> int:
        errors = [node.client.info("errorstats").get("errorstat_MOVED", {}) for node in own_cluster.nodes[:3]]
        return sum(int(each.get("count", 0)) for each in errors)

    assert content.read(tier) == content.keys
    learned = num_sent_on()
    assert content.read(tier) == content.keys
    assert num_sent_on() == learned, "told once is enough"
    assert all(tier.contains(content.keys, DEADLINE_S))
    tail = Content(root, 50)
    assert len(tail.write(tier) | tail.write(tier)) == 50
    assert tail.read(tier) == tail.keys


def test_writes_while_slots_move_keep_the_books(own_cluster: Cluster, make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(own_cluster.url, num_buckets=NUM_STRIPES, capacity_bytes=600_000)
    stop = threading.Event()
    wrong: list[BaseException] = []
    num_there: list[tuple[int, int, int]] = []

    def work() -> None:
        rng = random.Random(3)
        try:
            while not stop.is_set():
                content = Content(root, rng.randrange(5, 40), seed=rng.randrange(5))
                with suppress(TierError):
                    written = len(content.write(tier))
                    found = sum(tier.contains(content.keys, DEADLINE_S))
                    num_there.append((written, found, len(content.read(tier))))
                tier.touch(content.keys, NO_HINT)
        except BaseException as error:
            wrong.append(error)
            raise

    thread = threading.Thread(target=work)
    thread.start()
    slots = sorted({key_slot(b"{%03d}" % stripe) for stripe in range(NUM_STRIPES)})
    third = 16_384 // 3
    try:
        until(lambda: len(num_there) > 3)
        before = len(num_there)
        for slot in [slot for slot in slots if slot < third][:8]:
            own_cluster.begin_moving(slot, 0, 1)
            own_cluster.move_keys(slot, 0, 1, limit=3)
            half_moved = len(num_there)
            until(lambda: len(num_there) > half_moved + 1)  # noqa: B023 (all of one round, after the end of another)
            while own_cluster.move_keys(slot, 0, 1, limit=3):
                pass
            own_cluster.end_moving(slot, 0, 1)
        moving = num_there[before:]
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert all(sum(each[kind] for each in moving) > 0 for kind in range(3)), "nothing came through meanwhile"
    assert tier.settle(DEADLINE_S)
    tier.sweep()
    assert tier.check() == []


# ── nodes that die ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_primary_costs_its_keys_until_its_replica_took_over(
    own_cluster: Cluster, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(own_cluster.url, num_buckets=NUM_STRIPES, breaker_open_s=0.1)
    content = Content(root, 60)
    assert content.write(tier) == set(content.keys)
    for primary, replica in zip(own_cluster.nodes[:3], own_cluster.nodes[3:], strict=True):
        until(lambda: caught_up(primary.client, replica.client))  # noqa: B023
    own_cluster.kill_primary(0)
    began = time.monotonic()
    there = tier.contains(content.keys, DEADLINE_S)
    assert time.monotonic() - began < DEADLINE_S
    assert 0 < sum(there) < len(there)
    with suppress(TierUnavailable):
        content.read(tier)  # holds each block against what was written
    own_cluster.wait_for_failover(0)

    def works_again() -> bool:
        with suppress(TierError):
            return content.read(tier) == content.keys
        return False

    until(works_again)
    longer = Content(root, 80)

    def writes_again() -> bool:
        with suppress(TierError):
            return longer.write(tier) == set(longer.keys)
        return False

    until(writes_again)
    until(lambda: tier.stats.get("redis.available") == 1)  # the one that died is in nobody's way


def test_nodes_killed_one_after_the_other_under_load_never_give_a_wrong_byte(
    own_cluster: Cluster, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(own_cluster.url, num_buckets=NUM_STRIPES, breaker_open_s=0.1, capacity_bytes=1_000_000)
    stop = threading.Event()
    wrong: list[BaseException] = []
    slowest: list[float] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                content = Content(root, rng.randrange(5, 40), seed=rng.randrange(5))
                for call in (lambda: content.write(tier), lambda: content.read(tier, 0.5)):  # noqa: B023
                    began = time.monotonic()
                    with suppress(TierError):
                        call()
                    slowest.append(time.monotonic() - began)
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in (0, 1):
            own_cluster.kill_primary(number)
            own_cluster.wait_for_failover(number)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert max(slowest) < DEADLINE_S + 1
    content = Content(root, 40)

    def whole() -> bool:
        with suppress(TierError):
            tier.sweep()
            content.write(tier)
            return content.read(tier) == content.keys
        return False

    until(whole)
    assert tier.check() == []


@pytest.mark.alone
def test_a_hung_node_costs_the_deadline_and_then_nothing(cluster: Cluster, make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(cluster.url, num_buckets=NUM_STRIPES, breaker_open_s=30.0, healthy=False)
    content = Content(root, 40)
    content.write(tier)
    os.kill(cluster.nodes[2].process.pid, signal.SIGSTOP)
    try:
        with timed() as took:
            there = tier.contains(content.keys, 1.0)
        assert took.awake_s < 1.9
        assert 0 < sum(there) < len(there)
        costs = []
        for _ in range(5):  # a busy machine may hold up some
            began = time.monotonic()
            tier.contains(content.keys, 0.3)
            costs.append(time.monotonic() - began)
        assert min(costs) < 0.15
    finally:
        os.kill(cluster.nodes[2].process.pid, signal.SIGCONT)
    until(lambda: b"cluster_state:ok" in cluster.nodes[2].do("CLUSTER INFO"))


@pytest.mark.alone
def test_a_node_that_hangs_takes_no_more_than_its_share_of_the_time_to_learn_who_has_what(cluster: Cluster) -> None:
    with closing(Nodes(cluster.url, NUM_STRIPES, Options(1, 1, 0.2, 30.0), lambda works: None)) as nodes:
        learned = time.monotonic()
        first = nodes.of_stripe(0, learned + DEADLINE_S)
        with first.stores.lease(learned + DEADLINE_S):
            pass  # a wire, so that it is not connecting that ends the wait
        (hung,) = [node for node in cluster.nodes if first.address == ("127.0.0.1", node.port)]
        nodes.suspect()
        until(lambda: time.monotonic() > learned + 0.2)  # it asks again so soon, and no sooner
        os.kill(hung.process.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            nodes.of_stripe(0, began + 4.0)
            assert 0.15 < time.monotonic() - began < 2.0
        finally:
            os.kill(hung.process.pid, signal.SIGCONT)
    until(lambda: b"cluster_state:ok" in hung.do("CLUSTER INFO"))


@pytest.mark.alone
def test_a_cluster_of_which_no_node_answers_any_more_is_an_error_and_not_a_miss(
    cluster: Cluster, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(cluster.url, num_buckets=NUM_STRIPES)
    content = Content(root, 40)
    content.write(tier)
    assert all(tier.contains(content.keys, DEADLINE_S))
    assert tier.settle(DEADLINE_S)
    for node in cluster.nodes:
        os.kill(node.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TierError):
            tier.contains(content.keys, 0.3)
    finally:
        for node in cluster.nodes:
            os.kill(node.process.pid, signal.SIGCONT)
    for node in cluster.nodes[:3]:
        until(lambda: b"cluster_state:ok" in node.do("CLUSTER INFO"))  # noqa: B023

    def whole() -> bool:
        with suppress(TierError):
            return content.read(tier) == content.keys
        return False

    until(whole)


@pytest.mark.alone
def test_a_cluster_that_is_not_there_is_an_error_and_not_a_hang(make_tier: MakeTier, root: Root) -> None:
    tier = make_tier("redis+cluster://127.0.0.1:1", healthy=False, breaker_open_s=30.0)
    keys = Content(root, 3).keys
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(TierUnavailable):
            tier.contains(keys, 1.0)
        with pytest.raises(TierUnavailable):
            Content(root, 3).write(tier)
        assert time.monotonic() - began < 1.9


def test_doctor_notes_that_few_buckets_spread_unevenly_over_a_cluster(cluster: Cluster) -> None:
    def noted(num_buckets: int) -> list[Verdict]:
        settings = TierSettings(capacity_bytes=100 << 20, num_buckets=num_buckets)
        return [each.verdict for each in examine_redis("redis", cluster.url, settings) if each.name == "redis buckets"]

    assert (noted(16), noted(63), noted(64)) == ([Verdict.NOTE], [Verdict.NOTE], [])


def test_doctor_says_where_a_cluster_is_named_as_one_server(cluster: Cluster) -> None:
    for node in cluster.nodes:  # replicas, too
        (found,) = examine_redis("redis", f"redis://127.0.0.1:{node.port}/0")
        assert (found.name, found.verdict) == ("redis url", Verdict.PROBLEM)
        assert "redis+cluster://" in found.fix


def test_doctor_tells_of_one_primary_of_a_cluster_that_takes_no_writes(cluster: Cluster) -> None:
    settings = TierSettings(capacity_bytes=100 << 20, num_buckets=NUM_STRIPES)
    cluster.nodes[2].client.config_set("min-replicas-to-write", 5)
    try:
        told = {each.name: each.verdict for each in examine_redis("redis", cluster.url, settings)}
    finally:
        cluster.nodes[2].client.config_set("min-replicas-to-write", 0)
    assert told.pop("redis writes") is Verdict.PROBLEM
    assert set(told.values()) == {Verdict.OK}


def test_doctor_looks_at_every_primary_of_a_cluster(cluster: Cluster) -> None:
    settings = TierSettings(capacity_bytes=100 << 20, num_buckets=NUM_STRIPES)

    def problems() -> set[str]:
        return {each.name for each in examine_redis("redis", cluster.url, settings) if each.verdict is Verdict.PROBLEM}

    assert problems() == set()
    cluster.nodes[1].do("CONFIG SET", "maxmemory", "20mb")
    cluster.nodes[2].do("CONFIG SET", "maxmemory-policy", "allkeys-lru")
    lists = [f"kvs2:{{{stripe:03d}}}:u" for stripe in range(3)]  # on some node or other
    for name in lists:
        cluster.nodes[int(key_slot(name.encode())) // (16_384 // 3 + 1)].client.rpush(name, "somebody else's")
    try:
        assert problems() == {"redis maxmemory", "redis maxmemory-policy", "redis accounts"}
        cluster.nodes[2].do("ACL SETUSER", USER, "-zrem")
        assert problems() == {"redis user"}
        for node in cluster.nodes:
            node.do("ACL SETUSER", USER, "-cluster|slots")
        user = next(each for each in examine_redis("redis", cluster.url, settings) if each.name == "redis user")
        assert user.verdict is Verdict.PROBLEM
        assert user.detail.endswith(": cluster|slots")
        assert "+cluster|slots" in user.fix
    finally:
        for node in cluster.nodes:
            node.do("ACL SETUSER", USER, "+cluster|slots")
        cluster.nodes[1].do("CONFIG SET", "maxmemory", "64mb")
        cluster.nodes[2].do("CONFIG SET", "maxmemory-policy", "noeviction")
        cluster.nodes[2].do("ACL SETUSER", USER, "+zrem")
