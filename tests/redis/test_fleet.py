# SPDX-License-Identifier: Apache-2.0
"""Two stores on one server: what one computes the other waits for, and no longer than there is reason to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from kvstore.api import Announcement
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.marks import MARK_TTL_S
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import chain_of, content
from tests.patient import REDIS, REQUEST
from tests.waiting import lasts, wait_until

MakeReplica = Callable[..., KVStore]
Keep = Callable[[Announcement], Announcement]
NUM_BLOCKS = 24
_ENOUGH_S = 2.0
"""For a mark to be seen to go, beyond its TTL; less than a second TTL."""


def replica(url: str, model: ModelId, **mover: object) -> KVStore:
    values = {
        "host": {"capacity_bytes": 256 * 4096, "prefault": False},
        "mover": {"write": "through", **mover},
        "request": REQUEST,
    }
    tier = RedisTier(RedisTier.Options(url=url, sweep_every_s=0, **REDIS))
    store = KVStore(StoreConfig.load(values, environ={}), tiers=[tier])
    store.open(model)
    return store


@pytest.fixture
def make_replica(server: EmbeddedServer, model: ModelId) -> Iterator[MakeReplica]:
    made: list[KVStore] = []

    def make(**mover: object) -> KVStore:
        made.append(replica(server.url, model, **mover))
        return made[-1]

    yield make
    for store in made:
        store.flush(5)
        assert store.check() == []
        store.close()
    with redis.Redis.from_url(server.url) as client:
        assert list(client.scan_iter("kvs2:*:m:*")) == []


@pytest.fixture
def keep() -> Iterator[Keep]:
    """Renews a mark until the test ends: its owner goes on with it, however long a busy machine takes to look at it."""
    kept: list[Announcement] = []
    over = threading.Event()

    def renew() -> None:
        while not over.wait(0.1):
            for mark in list(kept):
                mark.renew()

    def keep(mark: Announcement) -> Announcement:
        kept.append(mark)
        return mark

    thread = threading.Thread(target=renew)
    thread.start()
    yield keep
    over.set()
    thread.join()


def compute(store: KVStore, chain: Chain, start: int, stop: int) -> None:
    with store.save(chain, start, stop) as save:
        for index in save.indices:
            for part, view in enumerate(save.views(index)):
                assert view is not None
                view[:] = content(chain, index, part, len(view))
        save.commit()


def pending(store: KVStore, chain: Chain) -> tuple[int, int]:
    """What a request that comes now finds: blocks there, and blocks that another store computes."""
    request = f"{time.monotonic_ns()}"
    match = store.match(chain, request, wait_s=5)
    store.forget(request)
    return match.num_blocks, match.num_pending_blocks


@contextlib.contextmanager
def taken_back(client: redis.Redis) -> Iterator[None]:
    """Holds marks that go meanwhile to have been taken back, and not left to lapse."""
    before = client.info("stats")["expired_keys"]
    yield
    assert client.info("stats")["expired_keys"] == before


def test_second_replica_waits_for_the_first_and_loads_what_it_computed(
    make_replica: MakeReplica, keep: Keep, root: Root
) -> None:
    first, second = make_replica(), make_replica()
    chain = chain_of(root, NUM_BLOCKS)
    mark = keep(first.announce(chain, 0, NUM_BLOCKS))
    wait_until(lambda: pending(second, chain) == (0, NUM_BLOCKS))
    assert pending(first, chain) == (0, NUM_BLOCKS)  # by its own book: it does not wait for itself in Redis
    assert second.match(chain, "waits", wait_s=5).num_pending_blocks == NUM_BLOCKS
    compute(first, chain, 0, 10)
    # The request that waits is told as it goes on, without asking anew.
    wait_until(lambda: second.match(chain, "waits").num_blocks == 10)
    assert second.match(chain, "waits").num_pending_blocks == NUM_BLOCKS - 10
    compute(first, chain, 10, NUM_BLOCKS)
    mark.withdraw()  # at once: what is still on its way down is waited for all the same
    seen = []
    wait_until(lambda: seen.append(second.match(chain, "waits")) or seen[-1].num_blocks == NUM_BLOCKS)
    assert all(match.num_blocks + match.num_pending_blocks == NUM_BLOCKS for match in seen)
    with second.load("waits") as load:
        loaded = [(block.index, bytes(block.views[0])) for block in load]
    assert loaded == [(index, content(chain, index, 0, 4096)) for index in range(NUM_BLOCKS)]


def test_only_the_common_prefix_is_waited_for(
    make_replica: MakeReplica, keep: Keep, client: redis.Redis, root: Root
) -> None:
    first, second = make_replica(), make_replica()
    tokens = np.random.default_rng(0).integers(0, 50_000, NUM_BLOCKS * root.model.block_tokens)
    shared = 9 * root.model.block_tokens
    other = Chain(root, np.concatenate([tokens[:shared], tokens[shared:] ^ 1]))
    mark = keep(first.announce(Chain(root, tokens), 0, NUM_BLOCKS))
    wait_until(lambda: pending(second, other) == (0, 9))
    stranger = chain_of(root, NUM_BLOCKS, seed=1)
    assert pending(second, stranger) == (0, 0)
    assert pending(second, Chain(Root(root.model, salt=b"other"), tokens)) == (0, 0)
    with taken_back(client):
        mark.withdraw()
        wait_until(lambda: pending(second, other) == (0, 0))


def test_first_producer_keeps_the_mark(make_replica: MakeReplica, keep: Keep, client: redis.Redis, root: Root) -> None:
    first, second, third = (make_replica() for _ in range(3))
    chain = chain_of(root, NUM_BLOCKS)
    mark = keep(first.announce(chain, 0, NUM_BLOCKS))
    wait_until(lambda: pending(third, chain) == (0, NUM_BLOCKS))
    second.announce(chain, 0, NUM_BLOCKS).withdraw()
    later = second.announce(chain, 0, 3)
    time.sleep(0.2)
    assert pending(third, chain) == (0, NUM_BLOCKS)
    with taken_back(client):
        later.withdraw()
        mark.withdraw()
        wait_until(lambda: pending(third, chain) == (0, 0))


def test_a_store_does_not_wait_for_what_it_says_itself(server: EmbeddedServer, root: Root) -> None:
    tiers = [RedisTier(RedisTier.Options(url=server.url, sweep_every_s=0, **REDIS)) for _ in range(2)]
    blocks = chain_of(root, NUM_BLOCKS).ids
    tiers[0].mark(root.id, blocks[2:9], MARK_TTL_S)
    assert [tier.marked_to(root.id, blocks, 2, 5.0) for tier in tiers] == [2, 9]
    tiers[0].unmark(root.id, blocks[2:3])
    assert [tier.marked_to(root.id, blocks, 2, 5.0) for tier in tiers] == [2, 2]
    for tier in tiers:
        tier.close()


@pytest.mark.slow
def test_mark_outlives_its_ttl_only_while_it_is_renewed(make_replica: MakeReplica, root: Root) -> None:
    first, second = make_replica(), make_replica()
    chain = chain_of(root, NUM_BLOCKS)
    mark = first.announce(chain, 0, NUM_BLOCKS)
    wait_until(lambda: pending(second, chain) == (0, NUM_BLOCKS))

    def is_renewed() -> bool:
        mark.renew()
        return pending(second, chain) == (0, NUM_BLOCKS)

    assert lasts(is_renewed, 1.3 * MARK_TTL_S)
    # Nobody renews it any more: its owner hangs, but its store does not.
    wait_until(lambda: pending(second, chain) == (0, 0), 1.9 * MARK_TTL_S)


def test_dropped_write_takes_the_mark_back(
    make_replica: MakeReplica, keep: Keep, client: redis.Redis, root: Root
) -> None:
    first, second = make_replica(queue_bytes=4096), make_replica()
    chain = chain_of(root, NUM_BLOCKS)
    mark = keep(first.announce(chain, 0, NUM_BLOCKS))
    wait_until(lambda: pending(second, chain) == (0, NUM_BLOCKS))
    with taken_back(client):
        compute(first, chain, 0, 10)  # one block fits into the queue
        wait_until(lambda: pending(second, chain)[1] == 0)
    assert first.stats()["mover.dropped_blocks"] == 9
    mark.withdraw()


def test_store_that_does_not_write_through_announces_nothing_to_others(
    make_replica: MakeReplica, keep: Keep, root: Root
) -> None:
    first, second = make_replica(write="on_reuse"), make_replica()
    chain = chain_of(root, NUM_BLOCKS)
    mark = keep(first.announce(chain, 0, NUM_BLOCKS))
    time.sleep(0.2)
    assert pending(second, chain) == (0, 0)
    assert pending(first, chain) == (0, NUM_BLOCKS)
    mark.withdraw()


_PRODUCER = """
import sys, time
from kvstore.block import ModelId, Root
from tests.conftest import chain_of
from tests.redis.test_fleet import NUM_BLOCKS, replica
model = ModelId(
    model="tiny", revision="1", kv_dtype="bfloat16", num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16
)
store = replica(sys.argv[1], model)
mark = store.announce(chain_of(Root(model), NUM_BLOCKS), 0, NUM_BLOCKS)
print("announced", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.mark.alone
@pytest.mark.slow
def test_death_of_the_producer_is_seen_within_the_ttl(
    make_replica: MakeReplica, server: EmbeddedServer, root: Root
) -> None:
    survivor = make_replica()
    chain = chain_of(root, NUM_BLOCKS)
    here = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", _PRODUCER, server.url],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(here)},
        stdout=subprocess.PIPE,
    ) as producer:
        try:
            assert producer.stdout is not None
            assert producer.stdout.readline() == b"announced\n"
            wait_until(lambda: pending(survivor, chain) == (0, NUM_BLOCKS))
            assert survivor.match(chain, "waits", wait_s=5).num_pending_blocks == NUM_BLOCKS
            time.sleep(1.1 * MARK_TTL_S)  # renewed meanwhile
            assert survivor.match(chain, "waits").num_pending_blocks == NUM_BLOCKS
            os.kill(producer.pid, signal.SIGKILL)
            died_s = time.monotonic()
            wait_until(lambda: survivor.match(chain, "waits").num_pending_blocks == 0, 10 * MARK_TTL_S)
            assert time.monotonic() - died_s < MARK_TTL_S + _ENOUGH_S
        finally:
            producer.kill()
    survivor.forget("waits")
    # It computes the prompt itself, and is waited for in its turn.
    mark = survivor.announce(chain, 0, NUM_BLOCKS)
    other = make_replica()
    wait_until(lambda: pending(other, chain) == (0, NUM_BLOCKS))
    compute(survivor, chain, 0, NUM_BLOCKS)
    mark.withdraw()
    wait_until(lambda: pending(other, chain) == (NUM_BLOCKS, 0))


def test_one_command_asks_for_all_marks_that_may_tell_of_a_chain(server: EmbeddedServer, root: Root) -> None:
    tier = RedisTier(RedisTier.Options(url=server.url, sweep_every_s=0, **REDIS))
    chain = chain_of(root, NUM_BLOCKS)
    with contextlib.closing(tier), redis.Redis.from_url(server.url) as client:
        assert tier.settle(10)  # its first look at the server is over
        before = client.info("commandstats")
        assert tier.marked_to(root.id, chain.ids, NUM_BLOCKS, 5.0) == NUM_BLOCKS
        after = client.info("commandstats")
    asked = {
        verb: after.get(f"cmdstat_{verb}", {"calls": 0})["calls"] - before.get(f"cmdstat_{verb}", {"calls": 0})["calls"]
        for verb in ("get", "mget")
    }
    assert asked == {"get": 0, "mget": 1}
