# SPDX-License-Identifier: Apache-2.0
"""A primary that is lost, and an address that leads to its replica from then on: how long until that one serves.

No Sentinels, no Cluster: as with a cloud's endpoint or a virtual address. Used by `bench faults`.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence

import redis

from bench.redis_proxy import FaultProxy
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions

WAYS = ("killed", "hung")
_AWAY_S = 1.0
_LIMIT_S = 30.0


def measure_failover(
    model: ModelId, config: StoreConfig, content: Sequence[bytes], deadline_s: float, repeats: int
) -> dict[str, float]:
    """Requests every few milliseconds while a primary is lost, its replica promoted a second later, and for as long as
    it takes to serve all blocks again.

    Args:
        model: of the blocks, one part each.
        config: of the store that asks; it writes through.
        content: bytes of each block.
        deadline_s: for asking lower tiers, by that configuration.
        repeats: of each way to be lost.
    """
    back: dict[str, list[float]] = {way: [] for way in WAYS}
    asked: list[float] = []
    wrong = 0
    for _ in range(repeats):
        for way in WAYS:
            back_s, times, num_wrong = _once(model, config, content, way)
            back[way].append(back_s)
            asked += times
            wrong += num_wrong
    return {
        **{f"failover_{way}_back_ms": 1e3 * max(times) for way, times in back.items()},
        "failover_requests": len(asked),
        "failover_slowest_ms": 1e3 * max(asked),
        "failover_late_requests": sum(took_s > 1.1 * deadline_s for took_s in asked),
        "failover_wrong_blocks": wrong,
    }


def _once(model: ModelId, config: StoreConfig, content: Sequence[bytes], way: str) -> tuple[float, list[float], int]:
    port = _free_port()
    with EmbeddedServer(ServerOptions(port=port)) as primary, EmbeddedServer() as replica:
        _replicate(replica, port)
        with FaultProxy(_path(primary)) as proxy:
            tier = RedisTier(RedisTier.Options(url=proxy.url, capacity_bytes=1 << 30, sweep_every_s=0))
            with KVStore(config, tiers=[tier]) as store:
                chain = _saved(store, model, content)
                with redis.Redis.from_url(primary.unix_url) as client:
                    client.set("last", "1")  # WAIT sees to what its own connection wrote
                    client.wait(1, 5000)
                os.kill(primary.pid, signal.SIGKILL if way == "killed" else signal.SIGSTOP)
                times = _ask_for(store, chain, _AWAY_S)
                with redis.Redis.from_url(replica.unix_url) as client:
                    client.replicaof("NO", "ONE")
                proxy.target = _path(replica)
                began_s, wrong, whole = time.monotonic(), 0, False
                while not whole and time.monotonic() - began_s < _LIMIT_S:
                    times += _ask_for(store, chain, 0.0)
                    served = _served(store, chain)
                    wrong += sum(bytes_ != content[at] for at, bytes_ in enumerate(served))
                    whole = len(served) == len(content)
                return time.monotonic() - began_s, times, wrong


def _path(server: EmbeddedServer) -> str:
    return server.unix_url.removeprefix("unix://")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _replicate(replica: EmbeddedServer, port: int) -> None:
    until_s = time.monotonic() + _LIMIT_S
    with redis.Redis.from_url(replica.unix_url) as client:
        client.config_set("repl-diskless-sync-delay", 0)
        client.replicaof("127.0.0.1", str(port))
        while client.info("replication").get("master_link_status") != "up":
            if time.monotonic() > until_s:
                raise RuntimeError("the replica did not come up")
            time.sleep(0.01)


def _saved(store: KVStore, model: ModelId, content: Sequence[bytes]) -> Chain:
    store.open(model)
    store.wait_ready()
    chain = Chain(Root(model), range(len(content) * model.block_tokens))
    with store.save(chain, 0, len(content)) as save:
        for index in save.indices:
            view = save.views(index)[0]
            assert view is not None
            view[:] = content[index]
        save.commit()
    if not store.flush(_LIMIT_S):
        raise RuntimeError("demotion did not end in time")
    store.drop_host()
    return chain


def _ask_for(store: KVStore, chain: Chain, seconds: float) -> list[float]:
    """Requests that wait for Redis's answer, for so long and once at least; what each took."""
    times: list[float] = []
    until_s = time.monotonic() + seconds
    while not times or time.monotonic() < until_s:
        began_s = time.perf_counter()
        store.match(chain, "asks", wait_s=10)
        times.append(time.perf_counter() - began_s)
        store.forget("asks")
        time.sleep(0.002)
    return times


def _served(store: KVStore, chain: Chain) -> list[bytes]:
    store.drop_host()
    store.match(chain, "loads", wait_s=10)
    with store.load("loads") as load:
        return [bytes(block.views[0]) for block in load]
