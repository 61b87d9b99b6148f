# SPDX-License-Identifier: Apache-2.0
"""A sidecar in a process of its own, and crowds of clients in theirs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import numpy as np

from kvstore.api import Store
from kvstore.block import Chain, ModelId, Root
from kvstore.copying import copy_bytes
from kvstore.errors import KVStoreError
from kvstore.service.admin import Admin, Target
from kvstore.service.client import SidecarStore
from kvstore.service.connect import connect as kvstore_connect

_START_S = 60.0
_spawn = multiprocessing.get_context("spawn")  # a forked child must not touch its parent's channel

SMALL = ModelId(model="tiny", revision="1", kv_dtype="bfloat16", num_layers=1, num_kv_heads=1, head_dim=8)
"""Blocks of 64 tokens and 2 KiB: a match never looks at bytes."""


@contextlib.contextmanager
def sidecar(capacity_bytes: int) -> Iterator[str]:
    """`kvstore serve` on a private Unix socket; yields its address once it says that it is ready."""
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as folder:
        address = f"unix:{folder}/s"
        command = [sys.executable, "-m", "kvstore.service.cli", "serve", "--listen", address]
        command += ["--host-capacity", str(capacity_bytes)]
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=_clean_environ())
        try:
            deadline_s = time.monotonic() + _START_S
            while "ready:" not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(f"kvstore serve did not become ready:\n{log.read_text()}")
                time.sleep(0.05)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _clean_environ() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("KVSTORE_")}


def connect(address: str) -> SidecarStore:
    """A client that waits longer than an engine would: a figure should show a slow answer, not a miss."""
    return kvstore_connect(address, call_deadline_s=10)


def small_chain(seed: int, num_blocks: int) -> Chain:
    tokens = np.random.default_rng(seed).integers(0, 128_000, num_blocks * SMALL.block_tokens)
    return Chain(Root(SMALL), tokens.astype(np.uint32))


def save_zeros(store: Store, chain: Chain) -> None:
    with store.save(chain, 0, len(chain)) as save:
        save.commit()


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds."""

    p50_ms: float
    p99_ms: float


def match_latency(address: str, *, count: int = 2000, warm_up: int = 200) -> Latency:
    """Of matches of four resident blocks, one after the other, by one client."""
    seconds: list[float] = []
    with connect(address) as store:
        store.open(SMALL)
        chain = small_chain(1, 4)
        save_zeros(store, chain)
        for number in range(warm_up + count):
            began_s = time.perf_counter()
            match = store.match(chain, "small")
            if number >= warm_up:
                seconds.append(time.perf_counter() - began_s)
            if match.num_blocks != 4:
                raise RuntimeError(f"a match of four resident blocks found {match.num_blocks}")
        store.forget("small")
    ordered = sorted(seconds)
    return Latency(statistics.median(ordered) * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3)


# -- a crowd that watches --------------------------------------------------------------------------------------


@contextlib.contextmanager
def crowd(address: str, num_clients: int, *, num_processes: int = 4, events_per_s: float = 50) -> Iterator[list[int]]:
    """`num_clients` with a session and a watch stream each, while blocks are stored at a steady rate.

    Yields a list that holds, after the block, how many events each client saw.
    """
    share = num_clients // num_processes
    barrier, stop = _spawn.Barrier(num_processes + 2), _spawn.Event()
    seen: Queue[list[int]] = _spawn.Queue()
    workers = [_spawn.Process(target=_watch, args=(address, share, barrier, stop, seen)) for _ in range(num_processes)]
    workers.append(_spawn.Process(target=_store_steadily, args=(address, events_per_s, barrier, stop)))
    for worker in workers:
        worker.start()
    counts: list[int] = []
    try:
        barrier.wait(_START_S)
        yield counts
    finally:
        stop.set()
        with contextlib.suppress(Exception):
            for _ in range(num_processes):
                counts += seen.get(timeout=20)
        for worker in workers:
            worker.join(20)
            if worker.is_alive():
                worker.kill()


def _watch(address: str, num_clients: int, barrier: Barrier, stop: Event, seen: Queue[list[int]]) -> None:
    counts = [0] * num_clients

    def follow(number: int, admin: Admin) -> None:
        with contextlib.suppress(KVStoreError):  # it ends when the server does
            for reply in admin.watch(snapshot=False, with_tokens=False):
                counts[number] += len(reply.events)

    for number in range(num_clients):
        threading.Thread(target=follow, args=(number, Admin(Target(address=address))), daemon=True).start()
    barrier.wait(_START_S)
    stop.wait()
    seen.put(counts)


def _store_steadily(address: str, events_per_s: float, barrier: Barrier, stop: Event) -> None:
    with connect(address) as store:
        store.open(SMALL)
        barrier.wait(_START_S)
        seed = 1000
        while not stop.wait(1 / events_per_s):
            save_zeros(store, small_chain(seed, 1))
            seed += 1


# -- clients that load at once ---------------------------------------------------------------------------------


def load_rates(address: str, model: ModelId, num_blocks: int, num_clients: int, seconds: float) -> list[float]:
    """Bytes a second that each of `num_clients` processes loads of one prefix, all at once."""
    barrier = _spawn.Barrier(num_clients)
    rates: Queue[float] = _spawn.Queue()
    workers = [
        _spawn.Process(target=_load_for, args=(address, model, num_blocks, seconds, barrier, rates))
        for _ in range(num_clients)
    ]
    for worker in workers:
        worker.start()
    try:
        return [rates.get(timeout=_START_S + seconds) for _ in workers]
    finally:
        for worker in workers:
            worker.join(20)
            if worker.is_alive():
                worker.kill()


def prefix(model: ModelId, num_blocks: int) -> Chain:
    """The chain that `load_rates` loads: save it first."""
    return Chain(Root(model), np.arange(num_blocks * model.block_tokens, dtype=np.uint32))


def _load_for(
    address: str, model: ModelId, num_blocks: int, seconds: float, barrier: Barrier, rates: Queue[float]
) -> None:
    with connect(address) as store:
        layout = store.open(model)
        chain = prefix(model, num_blocks)
        into = memoryview(bytearray(num_blocks * layout.block_bytes))
        _load_once(store, chain, into, layout.block_bytes)  # maps, populates
        barrier.wait(_START_S)
        began_s = time.perf_counter()
        num_bytes = 0
        while (passed_s := time.perf_counter() - began_s) < seconds:
            num_bytes += _load_once(store, chain, into, layout.block_bytes)
        rates.put(num_bytes / passed_s)


def _load_once(store: Store, chain: Chain, into: memoryview, block_bytes: int) -> int:
    store.match(chain, "bench")
    num_bytes = 0
    with store.load("bench") as load:
        for block in load:
            copy_bytes(into[block.index * block_bytes : (block.index + 1) * block_bytes], block.views[0])
            num_bytes += block_bytes
        if not load.intact() or num_bytes != len(into):
            raise RuntimeError(f"loaded {num_bytes} of {len(into)} bytes, intact: {load.intact()}")
    return num_bytes
