# SPDX-License-Identifier: Apache-2.0
"""What a Redis that is slow, gone or lying costs: nothing but shorter hits.

Four measurements: a host-tier hit while Redis is healthy, slow and stopped; the first request that meets a stopped
Redis, and those after it; a primary that is lost, until its replica serves under the same address; and a soak of random
faults, in which every byte that is served is held against what was saved, every call against its deadline, and at the
end every slot and every account is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import redis
from rich.progress import Progress

from bench.asked import print_figures
from bench.env import stamp
from bench.failover import measure_failover
from bench.host_hits import LARGE, bytes_of, measure_host_hits, save_content, store_config
from bench.options import whole
from bench.redis_proxy import ERRORS, KINDS, Fault, FaultProxy
from bench.report import print_table, write_json
from kvstore.block import Chain, ModelId, PartKey, Root
from kvstore.layout import layout_of
from kvstore.store import KVStore
from kvstore.tiers.base import More
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_lanes import LaneChoice, Sizes, Turn
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions

HELP = "a slow, stopped or lying Redis: what host hits pay, what the breaker lets through, a soak of random faults"

log = logging.getLogger("bench.faults")

MODEL = ModelId(
    model="soak", revision="1", kv_dtype="bfloat16", num_layers=2, num_kv_heads=2, head_dim=32, block_tokens=16
)
"""Blocks of 8 KiB."""
SERVER_FAULTS = ("client kill", "flushall", "value lost")
_WORKERS = 4
_LANES = 3
_BREAKER_S = 0.02
"""Of half of the workers; the others' breaker lets every call try."""
_LOOKUP_S = 0.15
_READ_S = 0.2
_WRITE_S = 0.2
_FAILOVER_S = 0.25
_SLACK_S = 0.1
"""For threads that wait for a core; not for the code."""
_NUM_CHAINS = 24

# ── the breaker ─────────────────────────────────────────────────────────────────────────────────────────────────


def measure_breaker(repeats: int) -> dict[str, float]:
    """Requests that wait for Redis's answer while it is stopped: the first, and those after it, for 3 s each time."""
    deadline_s = 0.25
    # A collection of all that this process ever made takes 140 ms: the engine's, and not the breaker's.
    gc.collect()
    gc.freeze()
    first: list[float] = []
    later: list[float] = []
    back: list[float] = []
    with EmbeddedServer() as server:
        tier = RedisTier(RedisTier.Options(url=server.url, capacity_bytes=1 << 30, sweep_every_s=0))
        with KVStore(store_config(deadline_s, 5.0, 5.0), tiers=[tier]) as store:
            store.open(LARGE)
            chain = Chain(Root(LARGE), list(range(4 * LARGE.block_tokens)))
            for _ in range(repeats):
                _match_s(store, chain)
                os.kill(server.pid, signal.SIGSTOP)
                try:
                    first.append(_match_s(store, chain))
                    until = time.monotonic() + 3.0
                    while time.monotonic() < until:
                        later.append(_match_s(store, chain))
                        time.sleep(0.002)
                finally:
                    os.kill(server.pid, signal.SIGCONT)
                began = time.monotonic()
                while not store.stats().get("redis.available") and time.monotonic() - began < 10:
                    time.sleep(0.001)
                back.append(time.monotonic() - began)
    ordered = sorted(later)
    return {
        "breaker_deadline_ms": 1e3 * deadline_s,
        "breaker_first_ms": 1e3 * max(first),
        "breaker_open_ms": 1e3 * ordered[int(0.99 * len(ordered))],
        "breaker_open_p50_ms": 1e3 * statistics.median(ordered),
        "breaker_open_max_ms": 1e3 * ordered[-1],
        "breaker_back_ms": 1e3 * max(back),
        "breaker_requests": len(later),
    }


def _match_s(store: KVStore, chain: Chain) -> float:
    began = time.perf_counter()
    store.match(chain, "breaker", wait_s=10)
    seconds = time.perf_counter() - began
    store.forget("breaker")
    return seconds


# ── the soak ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Soak:
    """What came of a soak. All but the first four must be zero, and `recovered` true."""

    faults: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    blocks_served: int = 0
    loads_over_lanes: int = 0
    """By several connections each."""
    wrong_bytes: int = 0
    late_calls: int = 0
    leaked_slots: int = 0
    errors: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    recovered: bool = True
    slowest_s: float = 0.0

    def add(self, other: Soak) -> None:
        """What came of another, on another server."""
        self.faults += other.faults
        self.errors += other.errors
        self.broken += other.broken
        self.operations += other.operations
        self.blocks_served += other.blocks_served
        self.loads_over_lanes += other.loads_over_lanes
        self.wrong_bytes += other.wrong_bytes
        self.late_calls += other.late_calls
        self.leaked_slots += other.leaked_slots
        self.recovered &= other.recovered
        self.slowest_s = max(self.slowest_s, other.slowest_s)

    @property
    def passed(self) -> bool:
        return self.recovered and not (
            self.wrong_bytes or self.late_calls or self.leaked_slots or self.errors or self.broken
        )


class _ManyLanes(LaneChoice):
    """Loads take up to three connections, however small they are, and are counted."""

    def __init__(self, soak: Soak) -> None:
        super().__init__(_LANES, _LANES, Sizes(1, 1))
        self._soak = soak

    def took(self, turn: Turn, num_bytes: int, seconds: float) -> None:
        super().took(turn, num_bytes, seconds)
        self._soak.loads_over_lanes += turn.num_lanes > 1


class _SpreadTier(RedisTier):
    """Whose loads do."""

    def __init__(self, options: RedisTier.Options, soak: Soak) -> None:
        super().__init__(options)
        self.lanes = _ManyLanes(soak)

    def read_on(self, into: Mapping[PartKey, memoryview], more: More, deadline_s: float) -> Iterator[list[PartKey]]:
        """Of small blocks all are asked for early, by one: here the first alone is."""
        (first, buffer), *rest = into.items()
        return super().read_on({first: buffer}, lambda: {**dict(rest), **more()}, deadline_s)


class _Worker:
    """A store of its own, behind a proxy of its own, on the shared server.

    Every second one over TCP; the middle ones with a breaker that keeps calls away for a while; loads of the
    last two over up to three connections, however small they are.
    """

    def __init__(self, server: EmbeddedServer, soak: Soak, lock: threading.Lock, seed: int, number: int) -> None:
        self._soak = soak
        self._lock = lock
        self._rng = random.Random(seed)
        self.proxy = FaultProxy(server.unix_url.removeprefix("unix://"), tcp=bool(number % 2))
        options = RedisTier.Options(
            url=self.proxy.url,
            capacity_bytes=4 << 20,
            sweep_every_s=0,
            breaker_open_s=_BREAKER_S if number in (1, 2) else 0,
            call_timeout_s=_WRITE_S,
        )
        self.tier = RedisTier(options) if number < _WORKERS // 2 else _SpreadTier(options, soak)
        self.store = KVStore(store_config(_LOOKUP_S, _READ_S, _WRITE_S), tiers=[self.tier])
        self._num_bytes = self.store.open(MODEL).block_bytes
        self.store.wait_ready()
        self._client = redis.Redis.from_url(server.unix_url)
        # Chains that share heads, and that all workers share.
        tokens = random.Random(7)
        heads = [[tokens.randrange(1000) for _ in range(4 * MODEL.block_tokens)] for _ in range(4)]
        self.chains = [
            Chain(Root(MODEL), heads[number % 4] + [number] * (tokens.randrange(1, 12) * MODEL.block_tokens))
            for number in range(_NUM_CHAINS)
        ]
        self.content = [
            [bytes_of(chain, index, self._num_bytes) for index in range(len(chain))] for chain in self.chains
        ]

    def run(self, wanted: int, tick: Callable[[], None]) -> None:
        """Operations with a fault armed each, until `wanted` of them struck over all workers."""
        try:
            while True:
                with self._lock:
                    if sum(self._soak.faults.values()) >= wanted:
                        return
                self._one()
                tick()
        except Exception as error:  # a thread's top: whatever comes out here is what the soak looks for
            log.exception("a worker of the soak failed")
            with self._lock:
                self._soak.errors.append(f"{type(error).__name__}: {error}")

    def _one(self) -> None:
        kind = self._rng.choice([*KINDS, *ERRORS, *SERVER_FAULTS])
        at = self._rng.randrange(len(self.chains))
        if kind in KINDS:
            delay_s = self._rng.choice((0.01, 0.05, 0.3))
            self.proxy.arm(Fault(kind, self._rng.randrange(24), self._rng.getrandbits(32), delay_s))
        if self._rng.random() < 0.5:
            self.write(at)
        struck = self._load(at, kind)
        self.proxy.arm(None)
        with self._lock:
            self._soak.operations += 1
            self._soak.faults[kind] += struck

    def write(self, at: int) -> None:
        self.store.drop_host()
        save_content(self.store, self.chains[at], self.content[at])
        began = time.monotonic()
        # Two attempts, each a write and, before it, what the touches that wait take.
        if not self.store.flush(10):
            self._note_late(time.monotonic() - began, "flush")
        self._note_late(time.monotonic() - began, "flush", limit_s=4 * _WRITE_S)

    def _note_late(self, seconds: float, what: str, limit_s: float = 0.0) -> None:
        with self._lock:
            self._soak.slowest_s = max(self._soak.slowest_s, seconds)
            if seconds > 1.1 * limit_s + _SLACK_S:
                self._soak.late_calls += 1
                where = f"{self.tier.options.url.partition(':')[0]}, breaker {self.tier.options.breaker_open_s} s"
                self._soak.broken.append(f"{what} took {seconds:.3f} s, its limit is {limit_s:.3f} s ({where})")

    def _load(self, at: int, kind: str) -> bool:
        """Load what there is of a chain from Redis alone, and hold it against what was saved."""
        chain, content = self.chains[at], self.content[at]
        self.store.drop_host()
        began = time.monotonic()
        match = self.store.match(chain, "soak", wait_s=10)
        self._note_late(time.monotonic() - began, "match", limit_s=_LOOKUP_S)
        struck = kind in SERVER_FAULTS and self._meddle(kind)
        began = time.monotonic()
        with self.store.load("soak") as load:
            served = 0
            for block in load:
                if bytes(block.views[0]) != content[block.index] and load.intact():
                    with self._lock:
                        self._soak.wrong_bytes += 1
                served += 1
        self._note_late(time.monotonic() - began, "load", limit_s=_READ_S)
        with self._lock:
            self._soak.blocks_served += served
        assert served <= match.num_blocks
        return struck or self.proxy.struck

    def _meddle(self, kind: str) -> bool:
        """Harm the server between presence and read; False where nothing came of it."""
        with contextlib.suppress(redis.ConnectionError):  # another worker's kill meets our client, too
            if kind == "client kill":
                return bool(self._client.client_kill_filter(_type="normal", skipme=True))
            if kind == "flushall":
                return bool(self._client.flushall())
            for name in self._client.scan_iter("kvs2:*:v:*", count=100):  # one value of them all
                return bool(self._client.delete(name))
        return False

    def settle(self) -> None:
        """Faults are over: everything must work again, and nothing may be left over."""
        self.proxy.arm(None)
        until = time.monotonic() + 5
        while self.tier.refuses and time.monotonic() < until:
            time.sleep(_BREAKER_S)
        soak = self._soak
        for at, chain in enumerate(self.chains):
            for _ in range(3):  # touches and retries of before may still be on their way
                self.write(at)
                self.store.drop_host()
                found = self.store.match(chain, "settle", wait_s=10).num_blocks
                with self.store.load("settle") as load:
                    whole_again = [bytes(block.views[0]) for block in load] == self.content[at]
                if whole_again:
                    break
            else:
                soak.recovered = False
                soak.broken.append(f"chain {at}: {found} of {len(chain)} blocks came after the faults")
        self.store.drop_host()
        self.store.flush(5)
        self.tier.settle(5)
        soak.broken += [fault for fault in self.store.check() if not _is_for_the_sweep(fault)]
        left = self.store.stats()["host.used_bytes"]
        if left:
            soak.leaked_slots += int(left) // self._num_bytes or 1

    def close(self) -> None:
        self.store.close()
        self.proxy.close()
        self._client.close()


def _is_for_the_sweep(fault: str) -> bool:
    """What flipped replies and lost values leave behind until the next sweep, which `run_soak` makes and checks."""
    return "kvs2:" in fault or fault[:16].strip("0123456789abcdef") == ""


def run_soak(num_faults: int, seed: int, tick: Callable[[], None], options: ServerOptions | None = None) -> Soak:
    """Random faults, `num_faults` of them that struck, over several stores on one server, started with `options`."""
    soak, lock = Soak(), threading.Lock()
    with EmbeddedServer(options) as server:
        workers = [_Worker(server, soak, lock, seed + number, number) for number in range(_WORKERS)]
        try:
            threads = [threading.Thread(target=worker.run, args=(num_faults, tick)) for worker in workers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for worker in workers:
                worker.settle()
            workers[0].tier.sweep()
            soak.broken += workers[0].tier.check()
        finally:
            for worker in workers:
                worker.close()
    return soak


def soak_servers() -> dict[str, ServerOptions]:
    """The embedded Valkey and, where there is one, Debian's `redis-server`."""
    binary = shutil.which("redis-server")
    if binary is None:
        print("no redis-server here: the soak runs on Valkey alone")
        return {"valkey": ServerOptions()}
    return {"valkey": ServerOptions(), "redis": ServerOptions(binary=Path(binary))}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench faults", description=__doc__)
    parser.add_argument("--faults", type=whole(1, 10_000_000), default=10_000, help="faults to strike (default: 10000)")
    parser.add_argument("--rounds", type=whole(1, 1000), default=80, help="rounds of host hits (default: 80)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument("--json", metavar="FILE", help="write {name, env, rows, summary}")
    options = parser.parse_args(argv)
    summary: dict[str, float] = measure_host_hits(options.rounds) | measure_breaker(3)
    content = [random.Random(at).randbytes(layout_of(LARGE).block_bytes) for at in range(64)]
    summary |= measure_failover(LARGE, store_config(_FAILOVER_S, 5.0, 5.0), content, _FAILOVER_S, 3)
    servers = soak_servers()
    soak, rows = Soak(), list[dict[str, object]]()
    with Progress(transient=True, auto_refresh=False) as progress:
        task = progress.add_task("operations", total=None)
        began = time.monotonic()
        for name, server_options in servers.items():
            wanted = -(-options.faults // len(servers))
            one = run_soak(wanted, options.seed, lambda: progress.update(task, advance=1), server_options)
            soak.add(one)
            rows += [{"server": name, "fault": kind, "count": count} for kind, count in sorted(one.faults.items())]
            summary[f"fault_soak_{name}"] = float(sum(one.faults.values()))
    summary |= {
        "fault_soak": float(sum(soak.faults.values())),
        "fault_soak_s": time.monotonic() - began,
        "fault_soak_blocks_served": soak.blocks_served,
        "fault_soak_loads_over_lanes": soak.loads_over_lanes,
        "fault_soak_wrong_bytes": soak.wrong_bytes,
        "fault_soak_late_calls": soak.late_calls,
        "fault_soak_leaked_slots": soak.leaked_slots,
        "fault_soak_errors": len(soak.errors),
        "fault_soak_broken": len(soak.broken),
        "fault_soak_recovered": float(soak.recovered),
        "fault_soak_slowest_ms": 1e3 * soak.slowest_s,
        **{f"fault_soak_{kind.replace(' ', '_')}": float(count) for kind, count in sorted(soak.faults.items())},
    }
    print_table("Faults that struck", rows, ["server", "fault", "count"])
    print_figures("faults-cpu", summary)
    for line in [*soak.errors, *soak.broken][:20]:
        print(line)
    if options.json:
        write_json(options.json, "faults", stamp(), rows, summary)
        print(f"written: {options.json}")
    return 0 if soak.passed else 1
