# SPDX-License-Identifier: Apache-2.0
"""Of `bench faults`: a hit that the host serves alone, while Redis is healthy, slow, stopped, or not there at all."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from bench.redis_proxy import SlowProxy
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.copying import copy_bytes
from kvstore.layout import layout_of
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer

LARGE = ModelId(
    model="hits", revision="1", kv_dtype="bfloat16", num_layers=4, num_kv_heads=2, head_dim=64, block_tokens=64
)
"""Blocks of 128 KiB."""
_HEAD_BLOCKS = 64
_HITS = 40
"""Of a block. A hit is mostly a copy, and memory's pace wanders by a tenth to a quarter within some 100 ms: so each hit
counts in times of one bare copy of as many bytes just after it, which needs the interpreter but once, and a block is
held against its neighbours. Fifteen rounds of all states in one order, in seconds, with waits between them, had states
in which nothing was changed differ by 6 to 19 %."""
_UNTIMED_S = 0.02
"""Of hits before a block, which take the place of waits: after a wait the same hits took a tenth longer."""
_NOTICES_S = 0.12
_PROBES_S = 0.1
"""A lookup's deadline, and how often the breaker tries: half and a tenth of what is set by default, so that states can
change more often. A store that noticed has more to do for it, not less."""


def store_config(lookup_s: float, read_s: float, write_s: float) -> StoreConfig:
    return StoreConfig.load(
        {
            "host": {"capacity_bytes": 64 << 20, "prefault": True},
            "mover": {"write": "through", "write_deadline_s": write_s, "flush_s": 1.0},
            "request": {"lookup_deadline_s": lookup_s, "read_deadline_s": read_s},
        },
        environ={},
    )


def bytes_of(chain: Chain, index: int, num_bytes: int) -> memoryview:
    """Bytes that follow from the block's id, as KV follows from its tokens."""
    return memoryview(random.Random(chain.ids[index]).randbytes(num_bytes))


def save_content(store: KVStore, chain: Chain, content: Sequence[memoryview]) -> None:
    with store.save(chain, 0, len(content)) as save:
        for index in save.indices:
            view = save.views(index)[0]
            assert view is not None
            copy_bytes(view, content[index])
        save.commit()


class _Hits:
    """A store on a server behind a proxy, which has the first blocks of all chains in its host, and one without Redis.

    Every hit is of another chain, as of another prompt under one system prompt: what follows the host's blocks was
    never asked for before.
    """

    def __init__(self, server: EmbeddedServer, proxy: SlowProxy) -> None:
        self._server = server
        self._proxy = proxy
        self._rng = np.random.default_rng(0)
        self._head = self._rng.integers(0, 1000, _HEAD_BLOCKS * LARGE.block_tokens)
        self._tier = RedisTier(
            RedisTier.Options(url=proxy.url, capacity_bytes=1 << 30, sweep_every_s=0, breaker_open_s=_PROBES_S)
        )
        self._store = KVStore(store_config(_NOTICES_S, 5.0, 5.0), tiers=[self._tier])
        self._alone = KVStore(store_config(0.25, 5.0, 5.0), tiers=[])
        num_bytes = layout_of(LARGE).block_bytes
        chain = self._chain()
        self._content = [bytes_of(chain, index, num_bytes) for index in range(_HEAD_BLOCKS)]
        self._all = np.ones(_HEAD_BLOCKS * num_bytes, np.uint8)
        self._into = [self._all[at : at + num_bytes].data for at in range(0, self._all.nbytes, num_bytes)]
        self.healthy_s: list[float] = []
        """Seconds of a hit, the median of each block with a healthy Redis."""
        for store in (self._store, self._alone):
            store.open(LARGE)
            store.wait_ready()
            save_content(store, chain, self._content)
            store.flush(10)

    def _chain(self) -> Chain:
        rest = self._rng.integers(0, 1000, 8 * LARGE.block_tokens)
        return Chain(Root(LARGE), np.concatenate([self._head, rest]))

    def alone(self) -> tuple[float]:
        """A hit without Redis, in times of a bare copy, the median of a block."""
        self._untimed(self._alone, lambda: True)
        return (self._block(self._alone)[0],)

    def healthy(self) -> float:
        """The same with a Redis that works, and was noticed to."""
        self._untimed(self._store, lambda: not self._tier.refuses)
        copies, seconds = self._block(self._store)
        self.healthy_s.append(seconds)
        return copies

    def unchanged(self) -> tuple[float, float]:
        """What `slow` and `stopped` say where nothing changes."""
        before, _ = self._block(self._store)
        self._untimed(self._store, lambda: True, _NOTICES_S)
        return before, self._block(self._store)[0]

    def slow(self) -> tuple[float, float]:
        """The same just after every reply began to take 200 ms, and when that was noticed."""
        self._proxy.delay(0.2)
        try:
            return self._before_and_after()
        finally:
            self._proxy.delay(0)

    def stopped(self) -> tuple[float, float]:
        """The same of a server that stands still."""
        os.kill(self._server.pid, signal.SIGSTOP)
        try:
            return self._before_and_after()
        finally:
            os.kill(self._server.pid, signal.SIGCONT)

    def _before_and_after(self) -> tuple[float, float]:
        before, _ = self._block(self._store)
        chain = self._chain()
        for _ in range(2):  # asked about when it is matched again: the breaker opens
            self._store.match(chain, "notices")
        self._store.forget("notices")
        self._untimed(self._store, lambda: self._tier.refuses)
        return before, self._block(self._store)[0]

    def _untimed(self, store: KVStore, is_so: Callable[[], bool], seconds: float = _UNTIMED_S) -> None:
        """Hits until something is so, and for some time."""
        began = time.monotonic()
        since: float | None = None
        while since is None or time.monotonic() - since < seconds:
            _host_hit_s(store, self._chain(), self._into)
            if since is None and is_so():
                since = time.monotonic()
            if time.monotonic() - began > 10:
                raise RuntimeError("Redis did not come back, or was not noticed to be gone")

    def _block(self, store: KVStore) -> tuple[float, float]:
        """Medians of some hits: in times of a bare copy, and in seconds."""
        chains = [self._chain() for _ in range(_HITS)]
        source = np.frombuffer(store.arena.view(0, self._all.nbytes), np.uint8)
        hits_s, copies_s = [], []
        for chain in chains:
            hits_s.append(_host_hit_s(store, chain, self._into))
            began = time.perf_counter()
            np.copyto(self._all, source)
            copies_s.append(time.perf_counter() - began)
        copies = statistics.median(hit_s / copy_s for hit_s, copy_s in zip(hits_s, copies_s, strict=True))
        return copies, statistics.median(hits_s)

    def close(self) -> None:
        for store in (self._store, self._alone):
            self._all[:] = 0
            _host_hit_s(store, self._chain(), self._into)
            if self._into != self._content:
                raise RuntimeError("other bytes were served than were saved")
            store.close()


def measure_host_hits(rounds: int, seed: int = 0) -> dict[str, float]:
    """Match and copy of 64 host blocks, with 8 more that only Redis could have, by the state Redis is in.

    Each state, in an order drawn anew each round, against a healthy Redis just before and just after it.
    """
    order = random.Random(seed)
    with EmbeddedServer() as server, SlowProxy(server.unix_url.removeprefix("unix://")) as proxy:
        hits = _Hits(server, proxy)
        states: dict[str, Callable[[], tuple[float, ...]]] = {
            "slow": hits.slow,
            "stopped": hits.stopped,
            "null": hits.unchanged,
            "alone": hits.alone,
        }
        ratios: dict[str, list[float]] = {}
        try:
            for number in range(rounds + 1):
                healthy = hits.healthy()
                for state in order.sample(list(states), len(states)):
                    took, before = states[state](), healthy
                    healthy = hits.healthy()
                    for name, copies in zip((state, f"{state}_noticed"), took, strict=False):
                        if number:  # after the first time of everything
                            ratios.setdefault(name, []).append(2 * copies / (before + healthy))
        finally:
            hits.close()
    cost = {state: statistics.median(ratio) for state, ratio in ratios.items()}
    changed = [cost[state] for state in ("slow", "slow_noticed", "stopped", "stopped_noticed")]
    return {
        "host_hit_ms": 1e3 * statistics.median(hits.healthy_s),
        **{f"host_hit_{state}_pct": 100 * (ratio - 1) for state, ratio in cost.items() if state != "alone"},
        "host_hit_unaffected_pct": greatest_change_pct(changed),
        "host_hit_over_no_redis_pct": 100 * (1 / cost["alone"] - 1),
    }


def greatest_change_pct(ratios: Iterable[float]) -> float:
    """By how much the ratio that is furthest from 1 is off, either way: a quicker arm says what a healthy one costs."""
    return 100 * max(abs(ratio - 1) for ratio in ratios)


def _host_hit_s(store: KVStore, chain: Chain, into: Sequence[memoryview]) -> float:
    began = time.perf_counter()
    store.match(chain, "hit")
    with store.load("hit", len(into)) as load:
        for block in load:
            copy_bytes(into[block.index], block.views[0])
        if not load.intact():
            raise RuntimeError("a lease ran out")
    return time.perf_counter() - began
