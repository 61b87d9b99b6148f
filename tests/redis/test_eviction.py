# SPDX-License-Identifier: Apache-2.0
"""What leaves Redis, in which order, and that the books are right at the end, however many stores wrote them."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
import redis

from kvstore.api import NO_HINT
from kvstore.block import PartKey, Root
from kvstore.errors import TierError, TierUnavailable
from kvstore.stats import Stats
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_facts import size_class
from kvstore.tiers.redis_names import CLOCK, MAX_BUCKETS, STEP_S, Bucket, Names, registry
from kvstore.tiers.redis_write import Item, SendItems
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions
from kvstore.wire.frame import header_bytes
from tests.redis.cluster import until
from tests.redis.conftest import SERVERS, MakeTier, binary_of
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import wait_until

NUM_BUCKETS = 4


@pytest.fixture
def part_bytes(client: redis.Redis) -> int:
    """What one part of one page is accounted with: jemalloc rounds up, libc does not."""
    stored_bytes = 4096 + header_bytes(16, 0)
    return size_class(stored_bytes) if "jemalloc" in client.info("memory")["mem_allocator"] else stored_bytes


def resident(tier: RedisTier, content: Content) -> list[PartKey]:
    there = tier.contains(content.keys, DEADLINE_S)
    return [key for key, present in zip(content.keys, there, strict=True) if present]


def is_prefix(part: Sequence[PartKey], whole: Sequence[PartKey]) -> bool:
    return list(part) == list(whole[: len(part)])


def use(tier: RedisTier, content: Content) -> None:
    """Touch the chain, and wait until Redis knows."""
    tier.touch(content.keys, NO_HINT)
    assert tier.settle(DEADLINE_S)


def buckets(client: redis.Redis) -> list[Bucket]:
    """Every bucket that its stripe's list names."""
    return [
        Bucket(stripe, root.decode())
        for stripe in range(MAX_BUCKETS)
        for root in client.zrange(registry(stripe), 0, -1)
    ]


def used_bytes(client: redis.Redis) -> tuple[int, int]:
    """Bytes the counters say, and the sum of the sizes they should say."""
    counted = summed = 0
    for bucket in buckets(client):
        counted += int(client.get(bucket.total) or 0)
        summed += sum(int(size) for size in client.hvals(bucket.sizes))
    return counted, summed


def score(client: redis.Redis, key: PartKey) -> float:
    names = Names(NUM_BUCKETS)
    found: float | None = client.zscore(names.bucket(key).order, names.member(key.block, key.part))
    assert found is not None
    return found


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_capacity_is_kept_and_tails_go_before_heads(
    server: EmbeddedServer, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tier = make_tier(server.url, capacity_bytes=40 * part_bytes, num_buckets=NUM_BUCKETS)
    contents = [Content(root, 10, seed=seed) for seed in range(8)]
    for content in contents:
        assert content.write(tier) == set(content.keys)
        assert tier.accounted_bytes() <= 40 * part_bytes
    for content in contents:
        assert is_prefix(resident(tier, content), content.keys)
    assert resident(tier, contents[0]) == []
    assert resident(tier, contents[-1]) == contents[-1].keys
    assert tier.stats.get("redis.evicted_blocks") >= 40


def test_least_recently_used_chain_goes_first(
    server: EmbeddedServer, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tier = make_tier(server.url, capacity_bytes=32 * part_bytes, num_buckets=NUM_BUCKETS)
    old, kept, new = (Content(root, 10, seed=seed) for seed in range(3))
    kept.write(tier)
    old.write(tier)
    use(tier, kept)
    new.write(tier)
    newest = Content(root, 5, seed=9)
    newest.write(tier)
    assert resident(tier, kept) == kept.keys
    assert len(resident(tier, old)) < 10
    assert is_prefix(resident(tier, old), old.keys)


def test_head_kept_hot_by_touches_never_goes_before_its_tail(
    server: EmbeddedServer, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tier = make_tier(server.url, capacity_bytes=60 * part_bytes, num_buckets=NUM_BUCKETS)
    system = Content(root, 4, seed=0)
    prompt = system.tokens
    rng = random.Random(1)
    chats = [Content(root, 12, seed=seed, prefix=prompt) for seed in range(1, 12)]
    for chat in chats:
        assert chat.write(tier) == set(chat.keys)
        use(tier, rng.choice(chats[max(0, chats.index(chat) - 2) : chats.index(chat) + 1]))
        assert resident(tier, system) == system.keys
        assert all(is_prefix(resident(tier, other), other.keys) for other in chats)


def test_parents_score_above_children_whatever_order_writes_and_touches_take(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tiers = [make_tier(server.url, num_buckets=NUM_BUCKETS) for _ in range(2)]
    system = Content(root, 4, seed=0)
    chats = [Content(root, 10, seed=seed, prefix=system.tokens) for seed in range(1, 5)]
    rng = random.Random(2)
    for _ in range(60):
        tier, chat = rng.choice(tiers), rng.choice(chats)
        stop = rng.randrange(1, 11)
        if rng.random() < 0.5:
            chat.write(tier, 0, stop)
        else:
            tier.touch(chat.keys[:stop], NO_HINT)
    assert all(tier.settle(DEADLINE_S) for tier in tiers)
    for chat in chats:
        scores = [score(client, key) for key in resident(tiers[0], chat)]
        assert all(parent > child for parent, child in itertools.pairwise(scores))


def test_a_write_planned_before_others_used_the_chain_never_makes_it_colder(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    """Two stores write one chain at once; the one whose values come last made its plan before the chain was used."""
    slow, quick = (make_tier(server.url, num_buckets=NUM_BUCKETS) for _ in range(2))
    content = Content(root, 4)

    def overtaken(items: Sequence[Item], send: SendItems) -> set[PartKey]:
        Content(root, 6).write(quick)
        use(quick, Content(root, 6))
        used.update({key: score(client, key) for key in Content(root, 6).keys})
        return send(talk.wire, items)

    used: dict[PartKey, float] = {}
    deadline = time.monotonic() + DEADLINE_S
    with slow._nodes.talk(deadline) as talk:
        written = slow._writer.write(talk, content.parts, content.meta, deadline, {}, overtaken, {})
    assert written == set(content.keys)
    assert {key: score(client, key) for key in used} == used


def test_a_value_that_did_not_arrive_takes_along_what_hangs_from_it(
    server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    """As where one node of a Cluster does not answer: of its blocks the children lie on others, and arrived."""
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    content, other, counts = Content(root, 8), Content(root, 5, seed=1), dict[str, float]()

    def lossy(items: Sequence[Item], send: SendItems) -> set[PartKey]:
        return send(talk.wire, [item for item in items if item[0] != content.keys[3]])

    deadline = time.monotonic() + DEADLINE_S
    parts, meta = content.parts | other.parts, content.meta | other.meta
    with tier._nodes.talk(deadline) as talk:
        written = tier._writer.write(talk, parts, meta, deadline, counts, lossy, {})
    assert written == {*content.keys[:3], *other.keys}
    assert resident(tier, content) == content.keys[:3]
    assert resident(tier, other) == other.keys
    assert (counts["written_blocks"], counts["write_failures"]) == (8, 5)


def test_tail_written_late_below_a_cold_head_stays_below_it(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    content = Content(root, 6)
    content.write(tier, 0, 3)
    before = score(client, content.keys[2])
    content.write(tier, 3, 6)
    assert score(client, content.keys[3]) == pytest.approx(before - STEP_S, abs=1e-8)
    use(tier, content)
    assert score(client, content.keys[3]) > before


def test_touch_of_what_is_gone_brings_no_member_back(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url)
    content = Content(root, 4)
    use(tier, content)
    assert client.keys() == [CLOCK.encode()]


def test_parts_of_a_block_leave_as_its_chain_does(server: EmbeddedServer, make_tier: MakeTier, root: Root) -> None:
    fine = Root(replace(root.model, part_layers=1, part_heads=1))
    tier = make_tier(server.url, capacity_bytes=64 * size_class(1024 + header_bytes(16, 0)), num_buckets=NUM_BUCKETS)
    contents = [Content(fine, 6, seed=seed) for seed in range(6)]
    for content in contents:
        assert content.write(tier) == set(content.keys)
    for content in contents:
        for part in range(4):
            of_part = [key for key in content.keys if key.part == part]
            assert is_prefix([key for key in resident(tier, content) if key.part == part], of_part)


def test_batch_larger_than_the_capacity_keeps_its_head(
    server: EmbeddedServer, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tier = make_tier(server.url, capacity_bytes=16 * part_bytes, num_buckets=NUM_BUCKETS)
    content = Content(root, 50)
    written = content.write(tier)
    assert 8 <= len(written) <= 16
    assert is_prefix(resident(tier, content), content.keys)
    assert set(resident(tier, content)) == written
    assert tier.accounted_bytes() <= 16 * part_bytes


# ── books ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_stores_that_write_and_evict_at_once_keep_one_set_of_books(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    capacity_bytes = 60 * part_bytes
    tiers = [
        make_tier(server.url, capacity_bytes=capacity_bytes, num_buckets=NUM_BUCKETS, codec=codec)
        for codec in ("raw", "lz4")
    ]
    system = Content(root, 3, seed=0)

    def work(tier: RedisTier, seed: int) -> None:
        rng = random.Random(seed)
        for step in range(80):
            chat = Content(root, rng.randrange(4, 14), seed=rng.randrange(12), prefix=system.tokens)
            chat.write(tier)
            if step % 3 == 0:
                tier.touch(chat.keys, NO_HINT)
            if step % 7 == 0:
                tier.remove(chat.keys[-2:])
            chat.read(tier)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, tiers[seed % 2], seed) for seed in range(4)]:
            done.result()
    assert all(tier.settle(DEADLINE_S) for tier in tiers)
    counted, summed = used_bytes(client)
    assert counted == summed <= capacity_bytes + 2 * 14 * part_bytes
    tiers[0].sweep()
    assert tiers[1].check() == []
    assert used_bytes(client)[0] == tiers[0].accounted_bytes() == tiers[1].accounted_bytes()


def test_writers_killed_at_any_moment_leave_the_books_right(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tier = make_tier(server.url, capacity_bytes=40 * part_bytes, num_buckets=NUM_BUCKETS)
    rng = random.Random(3)
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(rng.uniform(0, 0.003)):
            client.client_kill_filter(_type="normal", skipme=True)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for step in range(150):
            with suppress(TierError):
                Content(root, 8, seed=step % 20).write(tier)
    finally:
        stop.set()
        killer.join()
    counted, summed = used_bytes(client)
    assert counted == summed
    tier.sweep()
    assert tier.check() == []


@pytest.mark.parametrize("codec", ["raw", "lz4"])
def test_a_writer_killed_at_any_byte_of_a_write_leaves_values_and_accounts_together(
    codec: str, server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, tmp_path: Path
) -> None:
    content = Content(root, 2)
    watcher = make_tier(server.url, num_buckets=NUM_BUCKETS, connections=1)  # or its upkeep might need one more, later
    assert watcher.settle(DEADLINE_S)  # what it asks at first ends with its connection
    assert resident(watcher, content) == watcher.check() == []
    num_clients = len(client.client_list())
    # One connection, or what each carries is a matter of when it is given back.
    options = {"num_buckets": NUM_BUCKETS, "codec": codec, "sweep_every_s": 0.0, "connections": 1}
    with CutAfter(server.unix_url.removeprefix("unix://"), tmp_path / "cut") as cut:
        tier = make_tier(cut.url, healthy=False, **options)
        content.write(tier)
        assert tier.settle(5)
        tier.close()
        whole_bytes = cut.largest_bytes
        assert whole_bytes > 8192
        outcomes = set()
        # Every step near the end, where SETs are over and accounts and EXEC follow; the values in large ones.
        for limit in [*range(0, whole_bytes, 700), *range(whole_bytes - 1500, whole_bytes + 60, 30)]:
            client.flushall()
            cut.limit_bytes = limit
            tier = make_tier(cut.url, healthy=False, **options)
            with suppress(TierError):
                tier.write(content.parts, content.meta, DEADLINE_S)
            tier.close()
            # What was sent before the cut is done; only then is the connection gone.
            until(lambda: len(client.client_list()) <= num_clients)
            assert watcher.check() == [], f"killed after {limit} bytes"
            outcomes.add(len(resident(watcher, content)))
        assert outcomes == {0, 2}


class CutAfter:
    """A socket before a server's, whose connections end once a client has sent so many bytes."""

    def __init__(self, target: str, path: Path) -> None:
        self.limit_bytes = 1 << 40
        self.largest_bytes = 0
        """What the connection that sent most has sent."""
        self.url = f"unix://{path}"
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._target)
                self._sockets += [near, far]
                for source, sink, limit in ((near, far, self.limit_bytes), (far, near, None)):
                    self._threads.append(threading.Thread(target=self._pump, args=(source, sink, limit)))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        with suppress(OSError):
            while limit is None or passed < limit:
                data = source.recv(65_536 if limit is None else min(65_536, limit - passed))
                if not data:
                    break
                passed += len(data)
                if limit is not None:  # before it is passed on: the answer may come before this thread goes on
                    self.largest_bytes = max(self.largest_bytes, passed)
                sink.sendall(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(5)
        for sock in self._sockets:
            sock.close()


def test_an_eviction_looks_beyond_the_coldest_of_a_stripe_before_it_takes_warmer_ones(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    """One stripe holds more of the coldest than is looked at in one go; other stripes hold warmer ones."""
    tier = make_tier(server.url, capacity_bytes=1000 * part_bytes, num_buckets=2)
    chains = [Content(root, 1, seed=seed) for seed in range(1600)]
    by_stripe = [[each for each in chains if each.keys[0].block[0] % 2 == stripe] for stripe in range(2)]
    cold, warm = by_stripe[0][:500], by_stripe[1][:400]
    for chain in (*cold, *warm):
        chain.write(tier)
    large = Content(root, 450, seed=-1)  # makes room for 450 at once
    assert large.write(tier) == set(large.keys)
    assert all(resident(tier, chain) for chain in warm)
    gone = [not resident(tier, chain) for chain in cold]
    assert gone == sorted(gone, reverse=True)
    assert 350 <= sum(gone) < 500


def test_a_full_server_lets_an_eviction_go_on_that_has_only_places_to_set(
    make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    with EmbeddedServer(ServerOptions(maxmemory_bytes=16 << 20)) as server:
        tier = make_tier(server.url, healthy=False, capacity_bytes=1 << 30, num_buckets=NUM_BUCKETS)
        contents = [Content(Root(root.model, salt=bytes([salt])), 20) for salt in range(40)]
        for content in contents:
            content.write(tier)
            use(tier, content)  # warmer than the registry says: its places are set as it is looked at
        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory", "1mb")
        deadline = time.monotonic() + DEADLINE_S
        with tier._nodes.talk(deadline) as talk:
            before = tier._accounting.total_bytes(talk, deadline)
            assert tier._accounting.evict(talk, before // 2, deadline)[0] > 0
            assert tier._accounting.total_bytes(talk, deadline) <= before // 2
        assert tier.sweep()["damaged"] == 0
        assert tier.check() == []
        tier.close()


def test_sweep_removes_orphans_strays_and_empty_accounts_and_mends_counts(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    content, sound = Content(root, 8), Content(root, 4, seed=1)
    content.write(tier)
    sound.write(tier)
    names = Names(NUM_BUCKETS)
    client.delete(names.value(content.keys[3]))  # as its TTL would: an empty account, and four orphans
    stray = names.value(Content(root, 1, seed=7).keys[0])
    client.set(stray, "nobody speaks of me")
    client.incrby(names.bucket(sound.keys[0]).total, 12_345)
    client.setrange(names.value(sound.keys[3]), 60, b"\xff\xff\xff")
    kinds = {"is accounted and not there", "lacks its parent", "has no account", "is damaged", "sizes sum"}
    assert all(any(kind in fault for fault in tier.check()) for kind in kinds)
    found = tier.sweep()
    assert tier.check() == []
    assert resident(tier, content) == content.keys[:3]
    assert resident(tier, sound) == sound.keys[:3]
    assert (found["empty"], found["orphans"], found["strays"], found["damaged"]) == (1, 4, 1, 1)
    assert client.exists(stray) == 0


def test_check_names_all_that_hangs_from_an_orphan_over_pages(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    content = Content(root, 700)  # more than a page of 512
    content.write(tier)
    names = Names(NUM_BUCKETS)
    lost = {names.value(key) for key in content.keys[4:]}
    client.delete(names.value(content.keys[3]))
    faults = tier.check()
    assert {fault.split()[0] for fault in faults if "lacks its parent" in fault} == lost
    assert sum(fault.endswith(" lacks its parent") and "hangs" not in fault for fault in faults) == 1
    assert len(faults) == len(lost) + 1  # and the account of the one that is not there
    assert tier.sweep()["orphans"] == len(lost)


def test_sweep_leaves_a_block_alone_in_which_many_images_end(
    server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    long = replace(root.model, block_tokens=256)
    content = Content(Root(long), 3, media=[(at, bytes([at]) * 32) for at in range(200)])
    assert len(content.meta[content.chain.ids[0]].extra) > 4096
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    tier.open(content.layout)
    content.write(tier)
    assert tier.sweep()["damaged"] == 0
    assert content.read(tier) == content.keys


def test_sweep_finds_every_part_where_many_share_a_score(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=1)
    chains = [Content(root, 1, seed=seed) for seed in range(1200)]
    for chain in chains:
        chain.write(tier)
    order = Names(1).bucket(chains[0].keys[0]).order
    client.zadd(order, {Names.member(chain.keys[0].block, 0): 1000.0 for chain in chains})
    client.delete(*(Names(1).value(chain.keys[0]) for chain in chains))
    assert tier.sweep()["empty"] == len(chains)


def test_sweep_puts_a_child_that_scores_above_its_parent_back_below(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=NUM_BUCKETS)
    content = Content(root, 6)
    content.write(tier)
    names = Names(NUM_BUCKETS)
    for key in content.keys[3:]:
        client.zincrby(names.bucket(key).order, 500.0, names.member(key.block, key.part))
    assert any("scores above" in fault for fault in tier.check())
    assert tier.sweep()["lowered"] >= 3
    scores = [score(client, key) for key in content.keys]
    assert scores == sorted(scores, reverse=True)


def test_accounts_of_removed_and_rewritten_blocks_balance(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url)
    content = Content(root, 6)
    rng = random.Random(4)
    for _ in range(30):
        if rng.random() < 0.5:
            content.write(tier)
        else:
            tier.remove(content.keys[rng.randrange(6) :])
        assert used_bytes(client) == (tier.accounted_bytes(), tier.accounted_bytes())
    tier.clear(None)
    assert tier.accounted_bytes() == 0


def test_buckets_of_cleared_namespaces_are_named_no_longer_after_a_sweep(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url)
    content = Content(root, 40)
    content.write(tier)
    assert len(buckets(client)) > 5
    tier.clear(root.id)
    tier.sweep()
    assert client.keys() == [CLOCK.encode()]
    assert content.write(tier) == set(content.keys)


def test_namespaces_of_other_stores_count_and_can_be_evicted(
    server: EmbeddedServer, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    capacity_bytes = 20 * part_bytes
    mine, theirs = (make_tier(server.url, capacity_bytes=capacity_bytes, num_buckets=NUM_BUCKETS) for _ in range(2))
    old = Content(Root(root.model, salt=b"another tenant"), 15)
    old.write(theirs)
    new = Content(root, 15)
    assert new.write(mine) == set(new.keys)
    assert len(resident(theirs, old)) < 15
    assert mine.accounted_bytes() <= capacity_bytes


def test_each_namespace_keeps_to_its_own_capacity_and_evicts_its_own_coldest(
    server: EmbeddedServer, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tier = make_tier(
        server.url,
        capacity_bytes=100 * part_bytes,
        namespace_capacity_bytes=30 * part_bytes,
        num_buckets=NUM_BUCKETS,
    )
    quiet = Content(Root(root.model, salt=b"quiet"), 20)  # the coldest of all, and within its share
    quiet.write(tier)
    noisy = Root(root.model, salt=b"noisy")
    contents = [Content(noisy, 10, seed=seed) for seed in range(8)]
    for content in contents:
        assert content.write(tier) == set(content.keys)
        assert sum(len(resident(tier, each)) for each in contents) <= 30
    assert resident(tier, quiet) == quiet.keys
    assert resident(tier, contents[-1]) == contents[-1].keys
    assert resident(tier, contents[0]) == []
    assert all(is_prefix(resident(tier, each), each.keys) for each in contents)
    oversized = Content(noisy, 50, seed=99)
    assert len(oversized.write(tier)) <= 30
    assert is_prefix(resident(tier, oversized), oversized.keys)


def test_writers_of_several_namespaces_at_once_keep_each_to_its_capacity(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tiers = [
        make_tier(
            server.url,
            capacity_bytes=90 * part_bytes,
            namespace_capacity_bytes=40 * part_bytes,
            num_buckets=NUM_BUCKETS,
        )
        for _ in range(3)
    ]
    roots = [Root(root.model, salt=bytes([salt])) for salt in range(3)]

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(40):
            chat = Content(roots[rng.randrange(3)], rng.randrange(4, 12), seed=rng.randrange(30))
            chat.write(tiers[number % 3])
            chat.read(tiers[number % 3])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    in_flight = 4 * 12 * part_bytes  # what writers may have added at once
    by_root: dict[str, int] = {}
    for bucket in buckets(client):
        by_root[bucket.root] = by_root.get(bucket.root, 0) + int(client.get(bucket.total) or 0)
    assert len(by_root) == 3
    assert max(by_root.values()) <= 40 * part_bytes + in_flight
    assert sum(by_root.values()) == tiers[0].accounted_bytes() <= 90 * part_bytes + in_flight
    for each in roots:  # alone, a writer brings it down to the limit itself
        Content(each, 2, seed=1000).write(tiers[0])
        used = sum(int(client.get(b.total) or 0) for b in buckets(client) if b.root == each.id[:8].hex())
        assert used <= 40 * part_bytes


@pytest.mark.slow
def test_thousands_of_namespaces_cost_a_write_no_more_than_one(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, part_bytes: int
) -> None:
    tier = make_tier(server.url, capacity_bytes=1500 * part_bytes, num_buckets=NUM_BUCKETS)
    contents = [Content(Root(root.model, salt=salt.to_bytes(4, "big")), 1) for salt in range(2000)]
    client.config_resetstat()
    for content in contents:
        assert content.write(tier) == set(content.keys)
    stats = client.info("commandstats")
    # Were each namespace asked for its bytes, or its coldest, this would be hundreds of thousands.
    assert stats["cmdstat_get"]["calls"] < 20 * len(contents)
    assert tier.accounted_bytes() <= 1500 * part_bytes
    there = [bool(resident(tier, content)) for content in contents]
    assert there == sorted(there)
    assert len(buckets(client)) <= 1500
    for content in contents[600:700]:
        use(tier, content)  # warmer than the registry says
    for content in contents[:400]:
        content.write(tier)
    assert all(resident(tier, content) for content in contents[600:700])
    assert tier.accounted_bytes() <= 1500 * part_bytes


# ── memory and time ─────────────────────────────────────────────────────────────────────────────────────────────


def test_full_server_refuses_the_write_and_makes_room_for_the_next(make_tier: MakeTier, root: Root) -> None:
    with EmbeddedServer(ServerOptions(maxmemory_bytes=12 << 20)) as server:
        tier = make_tier(server.url, healthy=False, capacity_bytes=1 << 30, num_buckets=NUM_BUCKETS)
        refused = 0
        for seed in range(300):
            content = Content(root, 20, seed=seed)
            written = content.write(tier)
            assert is_prefix([key for key in content.keys if key in written], content.keys)
            assert set(resident(tier, content)) == written
            refused += len(written) < 20
        assert refused
        assert tier.stats.get("redis.out_of_memory") >= 1
        assert tier.stats.get("redis.evicted_blocks") >= 20
        tier.sweep()
        assert tier.settle(DEADLINE_S)
        assert tier.check() == []
        tier.close()


@pytest.mark.parametrize("kind", SERVERS)
def test_a_server_that_takes_no_writes_is_read_on(kind: str, make_tier: MakeTier, root: Root) -> None:
    """That others filled it, or that its replicas are away, says nothing of what it holds."""
    content = Content(root, 6)
    with EmbeddedServer(ServerOptions(binary=binary_of(kind))) as server, redis.Redis.from_url(server.url) as client:
        tier = make_tier(server.url, healthy=False, capacity_bytes=1 << 30, breaker_open_s=60.0)
        assert content.write(tier) == set(content.keys)
        for setting, value in (("maxmemory", "1mb"), ("min-replicas-to-write", "1")):
            client.config_set(setting, value)
            for _ in range(2):
                assert content.read(tier) == content.keys  # and notes that it went on from there
                tier.touch(content.keys, NO_HINT)
                assert tier.settle(DEADLINE_S)
                with pytest.raises(TierUnavailable, match="OOM|NOREPLICAS"):
                    tier.mark(root.id, content.chain.ids, 2.5)
                assert not tier.refuses
            with suppress(TierUnavailable):
                assert Content(root, 2, seed=1).write(tier) == set()
            assert tier.contains(content.keys, DEADLINE_S) == [True] * len(content.keys)
            client.config_set(setting, "0")
        assert tier.stats.get("redis.available") == 1
        assert content.read(tier) == content.keys
        assert tier.settle(DEADLINE_S)
        assert tier.check() == []
        tier.close()


def test_capacity_follows_the_servers_maxmemory_where_none_is_given(make_tier: MakeTier, root: Root) -> None:
    with EmbeddedServer(ServerOptions(maxmemory_bytes=20 << 20)) as server:
        tier = make_tier(server.url, healthy=False, num_buckets=NUM_BUCKETS)
        for seed in range(300):
            content = Content(root, 20, seed=seed)
            assert content.write(tier) == set(content.keys)
        assert tier.accounted_bytes() <= 16 << 20
        assert tier.check() == []
        tier.close()


def test_server_that_evicts_by_itself_is_warned_about_once_and_before_anything_is_written(
    own_server: EmbeddedServer, make_tier: MakeTier, root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    tier = make_tier(own_server.url, capacity_bytes=1 << 30)
    assert tier.settle(DEADLINE_S)
    warned = [
        "redis: maxmemory-policy is allkeys-lru, which drops heads of chains before their tails: "
        "`kvstore doctor` has the fix, under redis maxmemory"
    ]
    assert warnings_in(caplog) == warned
    for _ in range(2):
        Content(root, 1).write(tier)
    assert warnings_in(caplog) == warned


def test_server_without_a_limit_is_warned_about_unless_there_is_one_here(
    own_server: EmbeddedServer, make_tier: MakeTier, caplog: pytest.LogCaptureFixture
) -> None:
    assert make_tier(own_server.url, capacity_bytes=1 << 30).settle(DEADLINE_S)
    assert warnings_in(caplog) == []
    assert make_tier(own_server.url).settle(DEADLINE_S)
    (warning,) = warnings_in(caplog)
    assert warning.startswith("redis: maxmemory is not set, nor capacity_bytes here")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_a_new_store_knows_how_full_the_server_is_before_it_writes(
    own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    writer = make_tier(own_server.url)
    Content(root, 20).write(writer)
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("maxmemory", 20 << 20)
    newcomer = make_tier(own_server.url)
    assert newcomer.settle(DEADLINE_S)
    newcomer.bind(counts := Stats())
    assert counts.get("redis.used_bytes") == writer.accounted_bytes() > 0
    assert counts.get("redis.capacity_bytes") == 16 << 20


def test_values_carry_a_ttl_that_touches_renew_once_half_is_used(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, ttl_s=1000)
    content = Content(root, 5)
    content.write(tier)
    names = [content.name(index) for index in range(5)]
    assert all(900 < client.ttl(name) <= 1000 for name in names)
    for name in names[:3]:
        client.expire(name, 400)
    client.expire(names[3], 600)
    use(tier, content)
    assert [client.ttl(name) > 900 for name in names] == [True, True, True, False, True]
    endless = make_tier(server.url, ttl_s=0)
    other = Content(root, 1, seed=5)
    other.write(endless)
    assert client.ttl(other.name(0)) == -1


def test_what_nobody_used_ages_out_tails_first(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, ttl_s=1000, num_buckets=NUM_BUCKETS)
    old, fresh = Content(root, 6), Content(root, 4, seed=1)
    old.write(tier)
    fresh.write(tier)
    names = Names(NUM_BUCKETS)
    for depth, key in enumerate(old.keys):
        age = 480 if depth < 2 else 520
        client.zincrby(names.bucket(key).order, -age, names.member(key.block, key.part))
        client.zincrby(names.bucket(key).registry, -2 * age, names.bucket(key).root)
    deadline = time.monotonic() + DEADLINE_S
    with tier._nodes.talk(deadline) as talk:
        tier._upkeep._age(talk, deadline)
    assert resident(tier, old) == old.keys[:2]
    assert resident(tier, fresh) == fresh.keys


@pytest.mark.slow
def test_ageing_comes_by_itself_and_before_the_ttl(server: EmbeddedServer, make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(server.url, ttl_s=8, num_buckets=NUM_BUCKETS)
    content = Content(root, 6)
    content.write(tier)
    wait_until(lambda: tier.stats.get("redis.aged_blocks") == 6)  # what a TTL took is not counted so


def test_background_sweep_runs_once_for_all_stores(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    seed_tier = make_tier(server.url)
    content = Content(root, 4)
    content.write(seed_tier)
    client.delete(content.name(1))
    for _ in range(2):
        make_tier(server.url, sweep_every_s=0.3)
    wait_until(lambda: seed_tier.check() == [], DEADLINE_S)
    assert resident(seed_tier, content) == content.keys[:1]


def test_size_classes_are_those_of_the_allocator() -> None:
    for asked, got in ((1, 64), (64, 64), (65, 80), (4096, 4096), (4097, 5120), (8 << 20, 8 << 20)):
        assert size_class(asked) == got
    assert size_class((8 << 20) + 408) == 10 << 20
