# SPDX-License-Identifier: Apache-2.0
"""Stores that are killed while they write, evict, touch and sweep: what is left of their work in Redis."""

from __future__ import annotations

import multiprocessing
import random
import signal

import pytest
import redis

from kvstore.api import NO_HINT
from kvstore.block import ModelId, Root
from kvstore.layout import layout_of
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_names import bucket_of
from kvstore.tiers.valkey import EmbeddedServer
from tests.patient import REDIS
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import wait_until

MODEL = ModelId(
    model="tiny", revision="1", kv_dtype="bfloat16", num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16
)
CAPACITY_BYTES = 4_000_000
NUM_WRITERS = 3
NUM_KILLS = 30

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["pytest", "tests.redis.test_killed"])


def _work(url: str, seed: int, sweep_every_s: float) -> None:
    """Chats below system prompts that all writers share, more of them than fit, until somebody kills it."""
    tier = RedisTier(RedisTier.Options(url=url, capacity_bytes=CAPACITY_BYTES, sweep_every_s=sweep_every_s, **REDIS))
    tier.open(layout_of(MODEL))
    rng, root = random.Random(seed), Root(MODEL)
    systems = [Content(root, 4, seed=number) for number in range(4)]
    while True:
        chat = Content(root, rng.randrange(6, 40), seed=rng.randrange(200), prefix=rng.choice(systems).tokens)
        chat.write(tier, 0, rng.randrange(1, len(chat.chain) + 1))
        chat.write(tier)
        chat.read(tier)
        tier.touch(chat.keys, NO_HINT)


class Writer:
    def __init__(self, url: str, seed: int, sweep_every_s: float) -> None:
        self._process = _forks.Process(target=_work, args=(url, seed, sweep_every_s), daemon=True)
        self._process.start()

    def kill(self) -> None:
        self._process.kill()
        self._process.join(60)
        assert self._process.exitcode == -signal.SIGKILL
        self._process.close()


@pytest.mark.slow
@pytest.mark.parametrize("sweep_every_s", [0.0, 0.2], ids=["nobody sweeps", "sweeping"])
def test_stores_killed_at_work_leave_right_sums_and_next_to_nothing_out_of_reach(
    sweep_every_s: float, server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier
) -> None:
    watcher = make_tier(server.url, sweep_every_s=0.0, connections=1)
    assert watcher.settle(DEADLINE_S)  # what it asks at first ends with its connection
    assert watcher.accounted_bytes() == 0
    num_clients = len(client.client_list())
    rng, seeds = random.Random(11), iter(range(1000))

    def start() -> Writer:
        return Writer(watcher.options.url, next(seeds), sweep_every_s)

    def kill(writers: list[Writer]) -> None:
        """What they had sent is done, and the server has noticed that they are gone."""
        for writer in writers:
            writer.kill()
        wait_until(lambda: len(client.client_list()) <= num_clients)

    writers = [start() for _ in range(NUM_WRITERS)]
    worst = 0.0
    try:
        wait_until(lambda: watcher.accounted_bytes() > 0.8 * CAPACITY_BYTES)
        for number in range(NUM_KILLS):
            at_work = int(client.info("stats")["total_commands_processed"]) + rng.randrange(200, 1500)
            wait_until(lambda: int(client.info("stats")["total_commands_processed"]) > at_work)  # noqa: B023
            writers.pop(0).kill()
            if number % 10 == 9:  # a moment in which nobody writes
                kill(writers)
                worst = max(worst, out_of_reach(watcher, client))
                writers = [start() for _ in range(NUM_WRITERS - 1)]
            writers.append(start())
    finally:
        kill(writers)
    worst = max(worst, out_of_reach(watcher, client))
    assert worst <= 0.01
    watcher.sweep()
    assert watcher.check() == []
    assert out_of_reach(watcher, client) == 0.0


def out_of_reach(watcher: RedisTier, client: redis.Redis) -> float:
    """Which share of the bytes hangs from nothing; all other books must be right."""
    lost: list[str] = []
    for fault in watcher.check():
        name, _, what = fault.partition(" ")
        assert "lacks its parent" in what or what == "scores above its parent", fault
        if "lacks its parent" in what:
            lost.append(name)
    found = [at for name in lost if (at := bucket_of(name.encode())) is not None]
    lost_bytes = sum(int(client.hget(bucket.sizes, member) or 0) for bucket, member in found)
    assert len(found) == len(lost)
    sizes = [int(size) for name in client.scan_iter("kvs2:*:s") for size in client.hvals(name)]
    assert sum(sizes) == watcher.accounted_bytes() <= 1.2 * CAPACITY_BYTES
    return lost_bytes / sum(sizes)
