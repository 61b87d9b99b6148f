# SPDX-License-Identifier: Apache-2.0
"""The Redis tier beside bare sockets and redis-py: whole values, presence, touches; used by `bench tiers`.

In a round every arm moves the same bytes over the same transport to the same server, one after the other, with as
many connections; a ratio is taken within its round, and the median of rounds is reported. So what else the machine
does hits both sides, and a noisy minute does not become a figure. Rounds are taken from several servers, one after the
other, each with a store of its own: where the memory of both came to lie moves a ratio by a tenth for as long as they
live.
"""

from __future__ import annotations

import math
import mmap
import random
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import redis
from redis._parsers import _HiredisParser
from redis.connection import DefaultParser

from bench.redis_ceiling import connect, raw_get_s, raw_remove, raw_set_s
from kvstore.api import NO_HINT
from kvstore.block import Chain, ModelId, PartKey, Root
from kvstore.config import StoreConfig
from kvstore.copying import copy_bytes
from kvstore.layout import BlockLayout, layout_of
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions

SMALL = ModelId(
    model="small-shape",
    revision="random",
    kv_dtype="bfloat16",
    num_layers=4,
    num_kv_heads=2,
    head_dim=64,
    block_tokens=64,
)
"""Blocks of 128 KiB."""
TINY = ModelId(
    model="tiny", revision="1", kv_dtype="bfloat16", num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=64
)
_DEADLINE_S = 60.0
_CONNECTIONS = 1
"""What a load or a save uses, and so what a ceiling is given."""
_SERVERS = 5
_HOST_TIMES = 4
"""How much more the host holds than is moved: the default holds 4 GiB. In one that a load fills the store asks for less
at once."""

Row = dict[str, object]
Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Place:
    """A server and a way to it."""

    name: str
    url: str


@dataclass
class Rounds:
    """Seconds by arm, a list entry a round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, arm: str, seconds: float) -> None:
        self.seconds.setdefault(arm, []).append(seconds)

    @contextmanager
    def arm(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)

    def ratio(self, ceiling: str, arm: str) -> float:
        """How much of its ceiling's rate an arm reached; NaN where one was not run."""
        if not (ceiling in self.seconds and arm in self.seconds):
            return math.nan
        pairs = zip(self.seconds[ceiling], self.seconds[arm], strict=True)
        return statistics.median(above / below for above, below in pairs)

    def forget(self) -> None:
        self.seconds.clear()

    def extend(self, other: Rounds) -> None:
        for arm, seconds in other.seconds.items():
            self.seconds.setdefault(arm, []).extend(seconds)


class Parts:
    """A chain of blocks of one part each, with bytes to write and memory to read into, all touched."""

    def __init__(self, model: ModelId, total_bytes: int, seed: int) -> None:
        self.model = model
        self.layout: BlockLayout = layout_of(model)
        self.num_blocks = max(1, total_bytes // self.layout.block_bytes)
        self.num_bytes = self.num_blocks * self.layout.block_bytes
        rng = np.random.default_rng(seed)
        self._source = np.frombuffer(mmap.mmap(-1, self.num_bytes), np.uint8)
        self._into = np.frombuffer(mmap.mmap(-1, self.num_bytes), np.uint8)
        self._source[:] = rng.integers(0, 256, self.num_bytes, np.uint8)
        self._into[:] = 1
        self.chain = Chain(Root(model), rng.integers(0, 128_000, self.num_blocks * model.block_tokens))
        self.keys = self.chain.part_keys(0, self.num_blocks, self.layout.all_parts)
        self.meta = {block: self.chain.meta(index) for index, block in enumerate(self.chain.ids)}
        self.values = self._views(self._source)
        self.buffers = self._views(self._into)

    def _views(self, memory: np.ndarray[Any, np.dtype[np.uint8]]) -> list[memoryview]:
        step = self.layout.block_bytes
        return [memoryview(cast(Any, memory[at : at + step])) for at in range(0, self.num_bytes, step)]

    def by_key(self, views: Sequence[memoryview]) -> dict[PartKey, memoryview]:
        return dict(zip(self.keys, views, strict=True))

    def arrived(self) -> None:
        """Raises where what was read is not what was written; forgets it then."""
        if not np.array_equal(self._into, self._source):
            raise RuntimeError("other bytes came back than were written")
        self._into[:] = 1


def _store_config(total_bytes: int) -> StoreConfig:
    return StoreConfig.load(
        {
            "host": {"capacity_bytes": _HOST_TIMES * total_bytes},
            "mover": {"write": "through", "queue_bytes": 8 << 30},
            "request": {"read_deadline_s": _DEADLINE_S, "lookup_deadline_s": 5},
        },
        environ={},
    )


def settle(client: redis.Redis) -> None:
    """Wait until the server has given back what was removed: it does that on another thread."""
    until = time.monotonic() + _DEADLINE_S
    while client.info("memory").get("lazyfree_pending_objects", 0):
        if time.monotonic() > until:
            raise RuntimeError("the server does not get done with removing")
        time.sleep(0.005)


def measure_transport(place: Place, parts: Parts, repeats: int, *, redis_py: bool, tick: Tick) -> Rounds:
    """Raw sockets, the tier by itself, and the tier below a store, over one transport."""
    rounds = Rounds()
    tier = RedisTier(RedisTier.Options(url=place.url, lanes=_CONNECTIONS, capacity_bytes=16 << 30, sweep_every_s=0))
    with redis.Redis.from_url(place.url) as client, KVStore(_store_config(parts.num_bytes), tiers=[tier]) as store:
        store.open(parts.model)
        store.wait_ready()
        for number in range(repeats + 1):
            if number == 1:
                rounds.forget()  # the first warms up
            _raw_round(place, parts, rounds)
            settle(client)
            _tier_round(tier, parts, rounds)
            settle(client)
            _store_round(store, parts, rounds)
            settle(client)
            if redis_py:
                _redis_py_round(client, parts, rounds)
                settle(client)
            tick()
    return rounds


def _raw_round(place: Place, parts: Parts, rounds: Rounds) -> None:
    rounds.add("raw save", raw_set_s(place.url, parts.values, _CONNECTIONS))
    rounds.add("raw load", raw_get_s(place.url, parts.buffers, _CONNECTIONS))
    parts.arrived()
    raw_remove(place.url, parts.num_blocks)


def _tier_round(tier: RedisTier, parts: Parts, rounds: Rounds) -> None:
    with rounds.arm("tier save"):
        written = tier.write(parts.by_key(parts.values), parts.meta, _DEADLINE_S)
    with rounds.arm("tier load"):
        read = list(chain.from_iterable(tier.read(parts.by_key(parts.buffers), _DEADLINE_S)))
    if len(written) != parts.num_blocks or len(read) != parts.num_blocks:
        raise RuntimeError(f"of {parts.num_blocks} blocks {len(written)} were written and {len(read)} read")
    parts.arrived()
    tier.clear(None)


def _store_round(store: KVStore, parts: Parts, rounds: Rounds) -> None:
    """Commit to flushed, and match to the last block promoted: all that lies between an engine's copy and the wire."""
    with store.save(parts.chain, 0, parts.num_blocks) as save:
        for index in save.indices:
            view = save.views(index)[0]
            assert view is not None
            copy_bytes(view, parts.values[index])
        with rounds.arm("store save"):
            save.commit()
            if not store.flush(_DEADLINE_S):
                raise RuntimeError("demotion did not end in time")
    store.drop_host()
    with rounds.arm("store load"):
        store.match(parts.chain, "bench", wait_s=10)
        with store.load("bench") as load:
            tiers = [block.tier for block in load]
    if tiers != ["redis"] * parts.num_blocks:
        raise RuntimeError(f"{len(tiers)} of {parts.num_blocks} blocks came from Redis")
    store.clear()


def _redis_py_round(client: redis.Redis, parts: Parts, rounds: Rounds) -> None:
    """What most projects do: a pipeline of SETs, and MGET, by the parser in C. Raises where that is not there."""
    if DefaultParser is not _HiredisParser:
        raise RuntimeError("redis-py does not parse by hiredis: a ratio to its own parser would flatter us")
    names = [f"py:{number}" for number in range(parts.num_blocks)]
    with rounds.arm("redis-py save"), client.pipeline(transaction=False) as pipe:
        for name, value in zip(names, parts.values, strict=True):
            pipe.set(name, cast(Any, value))
        pipe.execute()
    with rounds.arm("redis-py load"):
        got = cast(list[bytes], client.mget(names))
    if got[-1] != parts.values[-1]:
        raise RuntimeError("redis-py gave other bytes")
    del got
    client.unlink(*names)


def rows_of(rounds: Rounds, where: str, total_bytes: int) -> list[Row]:
    rows: list[Row] = []
    for arm, seconds in rounds.seconds.items():
        verb = arm.rpartition(" ")[2]
        ordered = sorted(seconds)
        rows.append(
            {
                "arm": f"{where}: {arm}",
                "GB/s p50": total_bytes / statistics.median(ordered) / 1e9,
                "GB/s best": total_bytes / ordered[0] / 1e9,
                "of ceiling": rounds.ratio(f"raw {verb}", arm),
                "ms p50": 1e3 * statistics.median(ordered),
                "ms max": 1e3 * ordered[-1],
                "count": len(ordered),
            }
        )
    return rows


# ── small calls ─────────────────────────────────────────────────────────────────────────────────────────────────


def measure_calls(place: Place, repeats: int, seed: int) -> tuple[dict[str, float], list[Row]]:
    """Presence of 2,048 keys, where all are there and where the prefix ends inside, beside the bare protocol; touches
    of 2,048 members among a million, also where their TTLs are looked at; and what a touch costs the caller."""
    num_keys = 2048
    parts = Parts(TINY, num_keys * layout_of(TINY).block_bytes, seed)
    rounds = Rounds()
    options = RedisTier.Options(url=place.url, capacity_bytes=1 << 30, sweep_every_s=0, ttl_s=0)
    tier = RedisTier(options)
    try:
        tier.open(parts.layout)
        if len(tier.write(parts.by_key(parts.values), parts.meta, _DEADLINE_S)) != num_keys:
            raise RuntimeError("not all blocks were written")
        _crowd(place, parts, options.num_buckets, seed)
        absent = Parts(TINY, 900 * parts.layout.block_bytes, seed + 1).keys
        ends_inside = [*parts.keys[: num_keys - len(absent)], *absent]
        for _ in range(max(30, repeats)):
            with rounds.arm("presence"):
                present = tier.contains(parts.keys, _DEADLINE_S)
            if not all(present):
                raise RuntimeError("a block that was written is said to be absent")
            with rounds.arm("presence, 1,148 are there"):
                present = tier.contains(ends_inside, _DEADLINE_S)
            if present != [True] * (num_keys - len(absent)) + [False] * len(absent):
                raise RuntimeError("presence is wrong where the prefix ends inside")
            rounds.add("raw presence", _raw_presence_s(place.url, num_keys, 256))
            rounds.add("raw presence, a command a key", _raw_presence_s(place.url, num_keys, 1))
            began = time.perf_counter()
            tier.touch(parts.keys, NO_HINT)
            rounds.add("touch, caller", time.perf_counter() - began)
            if not tier.settle(_DEADLINE_S):
                raise RuntimeError("a touch did not end")
            rounds.add("touch", time.perf_counter() - began)
        for _ in range(10):
            rounds.add("touch, TTLs looked at", _first_touch_s(place, parts))
    finally:
        tier.close()
    summary = {
        "presence_2048_ms": 1e3 * statistics.median(rounds.seconds["presence"]),
        "presence_2048_inside_ms": 1e3 * statistics.median(rounds.seconds["presence, 1,148 are there"]),
        "presence_2048_raw_ms": 1e3 * statistics.median(rounds.seconds["raw presence"]),
        "touch_2048_ms": 1e3 * statistics.median(rounds.seconds["touch"]),
        "touch_2048_ttl_ms": 1e3 * statistics.median(rounds.seconds["touch, TTLs looked at"]),
        "touch_2048_caller_ms": 1e3 * statistics.median(rounds.seconds["touch, caller"]),
    }
    rows: list[Row] = [
        {
            "arm": f"{place.name}: {arm}, {num_keys} keys",
            "ms p50": 1e3 * statistics.median(seconds),
            "ms p99": 1e3 * sorted(seconds)[int(len(seconds) * 0.99)],
            "ms max": 1e3 * max(seconds),
            "count": len(seconds),
        }
        for arm, seconds in rounds.seconds.items()
    ]
    return summary, rows


def _first_touch_s(place: Place, parts: Parts) -> float:
    """A touch by a store with the default TTL: its first of a chain asks for the TTLs, others for hours do not."""
    tier = RedisTier(RedisTier.Options(url=place.url, capacity_bytes=1 << 30, sweep_every_s=0))
    try:
        tier.touch(parts.keys[:1], NO_HINT)  # connects
        if not tier.settle(_DEADLINE_S):
            raise RuntimeError("a touch did not end")
        began = time.perf_counter()
        tier.touch(parts.keys, NO_HINT)
        if not tier.settle(_DEADLINE_S):
            raise RuntimeError("a touch did not end")
        return time.perf_counter() - began
    finally:
        tier.close()


def _crowd(place: Place, parts: Parts, num_buckets: int, seed: int) -> None:
    """A million other members in the sorted sets that are touched."""
    from kvstore.tiers.redis_names import Names

    orders = sorted({Names(num_buckets).bucket(key).order for key in parts.keys})
    rng = random.Random(seed)
    with redis.Redis.from_url(place.url) as client:
        for order in orders:
            for _ in range(8):
                members = {
                    f"{rng.getrandbits(256):064x}:000": rng.random() for _ in range(1_000_000 // len(orders) // 8)
                }
                client.zadd(order, members)


def _raw_presence_s(url: str, num_keys: int, per_command: int) -> float:
    """EXISTS of keys with names as long as ours, one connection, replies counted and no more."""
    names = [b"$98\r\nraw:%094d\r\n" % number for number in range(num_keys)]
    head = b"*%d\r\n$6\r\nEXISTS\r\n" % (1 + per_command)
    starts = range(0, num_keys, per_command)
    request = b"".join(head + b"".join(names[at : at + per_command]) for at in starts)
    with connect(url) as connection:
        began = time.perf_counter()
        connection.sendall(request)
        left = len(b":0\r\n") * len(starts)  # none of them is there
        while left:
            left -= len(connection.recv(left))
        return time.perf_counter() - began


# ── all of it ───────────────────────────────────────────────────────────────────────────────────────────────────


def free_port() -> int:
    """On loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure_redis(
    big: ModelId, total_bytes: int, repeats: int, seed: int, tick: Tick
) -> tuple[dict[str, float], list[Row]]:
    """Every figure of the Redis tier, against the embedded Valkey and, where there is one, `redis-server`."""
    summary: dict[str, float] = {}
    rows: list[Row] = []
    parts, small = Parts(big, total_bytes, seed), Parts(SMALL, min(total_bytes, 128 << 20), seed)
    tcp, unix, tcp_small = Rounds(), Rounds(), Rounds()
    for num_rounds in shares(repeats):
        with EmbeddedServer(ServerOptions(port=free_port())) as server:
            over_tcp, over_unix = Place("valkey tcp", server.url), Place("valkey unix", server.unix_url)
            tcp.extend(measure_transport(over_tcp, parts, num_rounds, redis_py=True, tick=tick))
            unix.extend(measure_transport(over_unix, parts, num_rounds, redis_py=False, tick=tick))
            tcp_small.extend(measure_transport(over_tcp, small, num_rounds, redis_py=False, tick=tick))
    rows += rows_of(tcp, "valkey tcp", parts.num_bytes) + rows_of(unix, "valkey unix", parts.num_bytes)
    rows += rows_of(tcp_small, "valkey tcp, 128 KiB", small.num_bytes)
    summary |= _ratios(tcp, "redis_{verb}_ratio") | _ratios(tcp, "redis_tier_{verb}_ratio", arm="tier")
    for verb in ("load", "save"):
        summary[f"redis_{verb}_vs_redispy"] = tcp.ratio(f"redis-py {verb}", f"store {verb}")
    summary |= _ratios(unix, "redis_unix_{verb}_ratio") | _ratios(tcp_small, "redis_small_{verb}_ratio")
    with EmbeddedServer(ServerOptions(port=free_port())) as server:
        calls, more = measure_calls(Place("valkey tcp", server.url), repeats, seed)
    summary |= calls
    rows += more
    binary = shutil.which("redis-server")
    if binary:
        rounds = Rounds()
        for num_rounds in shares(repeats):
            with EmbeddedServer(ServerOptions(binary=Path(binary), port=free_port())) as server:
                place = Place("redis tcp", server.url)
                rounds.extend(measure_transport(place, parts, num_rounds, redis_py=False, tick=tick))
        rows += rows_of(rounds, "redis tcp", parts.num_bytes)
        summary |= _ratios(rounds, "redis7_{verb}_ratio")
    return summary, rows


def measure_small(total_bytes: int, repeats: int, seed: int, tick: Tick) -> tuple[dict[str, float], list[Row]]:
    """Those of `measure_redis` that are about parts of 128 KiB."""
    parts, rounds = Parts(SMALL, min(total_bytes, 128 << 20), seed), Rounds()
    for num_rounds in shares(repeats):
        with EmbeddedServer(ServerOptions(port=free_port())) as server:
            place = Place("valkey tcp", server.url)
            rounds.extend(measure_transport(place, parts, num_rounds, redis_py=False, tick=tick))
    return _ratios(rounds, "redis_small_{verb}_ratio"), rows_of(rounds, "valkey tcp, 128 KiB", parts.num_bytes)


def shares(repeats: int) -> list[int]:
    """Of so many rounds those of each server; one more comes before each, to warm up."""
    num_servers = min(_SERVERS, repeats)
    return [len(range(number, repeats, num_servers)) for number in range(num_servers)]


def _ratios(rounds: Rounds, name: str, arm: str = "store") -> dict[str, float]:
    return {name.format(verb=verb): rounds.ratio(f"raw {verb}", f"{arm} {verb}") for verb in ("load", "save")}


NUM_TRANSPORTS = 4
