# SPDX-License-Identifier: Apache-2.0
"""Bandwidth of each tier beside its ceiling, and the cost of a match, in one run.

Every figure is a ratio to what the same machine did moments before or after: memcpy for the host tier, a bare
socket loop for Redis. Arms alternate; medians are reported.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from rich.progress import Progress

from bench.asked import print_figures
from bench.env import stamp
from bench.options import whole
from bench.redis_speed import NUM_TRANSPORTS, measure_redis, measure_small, shares
from bench.report import print_table, write_json
from kvstore.api import Store
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.copying import copy_bytes
from kvstore.layout import BlockLayout
from kvstore.native import is_built
from kvstore.store import KVStore
from kvstore.transfer import PageCopier, PagedKV

HELP = "bandwidth of each tier beside its ceiling, and the cost of a match"

LLAMA_8B = ModelId(
    model="llama-3-8b-shape",
    revision="random",
    kv_dtype="bfloat16",
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
    block_tokens=64,
)
PAGE_TOKENS = 16


@dataclass
class Timings:
    """Seconds by arm, in the order measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def arm(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def best(self, name: str) -> float:
        return min(self.seconds[name])


@dataclass
class HostBench:
    """One prefix of Llama-3-8B shape, its engine memory, and a store large enough for it."""

    num_blocks: int
    store: Store
    layout: BlockLayout
    chain: Chain
    whole: torch.Tensor
    """[blocks, bytes]: canonical blocks in the caller's memory."""
    paged: list[torch.Tensor]
    """One tensor a layer: [kv, page, token, head, dim]."""
    page_ids: list[int]
    copier: PageCopier
    timings: Timings

    def memcpy(self) -> None:
        """The ceiling: libc's memmove over everything at once, and in pieces of one block."""
        source, into = self.whole, self._scratch
        with self.timings.arm("memcpy"):
            ctypes.memmove(into.data_ptr(), source.data_ptr(), source.nbytes)
        step = self.layout.block_bytes
        with self.timings.arm("memcpy, 8 MiB pieces"):
            for at in range(0, source.nbytes, step):
                ctypes.memmove(into.data_ptr() + at, source.data_ptr() + at, step)

    def prepare(self) -> None:
        """Touch everything once, outside of any timing."""
        self._scratch = page_aligned(self.whole.nbytes).view(self.whole.shape)

    def save(self) -> None:
        self.store.clear()
        with self.timings.arm("host save"), self.store.save(self.chain, 0, self.num_blocks) as save:
            for index in save.indices:
                view = save.views(index)[0]
                assert view is not None
                copy_bytes(view, _bytes(self.whole[index]))
            save.commit()

    def load(self) -> None:
        into = self._scratch
        with self.timings.arm("host load"):
            self.store.match(self.chain, "bench")
            with self.store.load("bench") as load:
                for block in load:
                    copy_bytes(_bytes(into[block.index]), block.views[0])
                assert load.intact()
        assert torch.equal(into, self.whole), "loaded bytes differ"
        into.zero_()

    def paged_save(self) -> None:
        self.store.clear()
        with self.timings.arm("paged save"), self.store.save(self.chain, 0, self.num_blocks) as save:
            self.copier.gather(self.page_ids, [(index, save.views(index)) for index in save.indices])
            save.commit()

    def paged_load(self) -> None:
        expected = [layer[:, self.page_ids[7]].view(torch.int16).clone() for layer in self.paged]
        for layer in self.paged:
            layer.zero_()
        with self.timings.arm("paged load"):
            self.store.match(self.chain, "bench")
            with self.store.load("bench") as load:
                for block in load:
                    self.copier.scatter(self.page_ids, [(block.index, block.views)])
                assert load.intact()
        for layer, before in zip(self.paged, expected, strict=True):
            assert torch.equal(layer[:, self.page_ids[7]].view(torch.int16), before), "loaded pages differ"


def page_aligned(num_bytes: int) -> torch.Tensor:
    """Touched bytes that begin on a page.

    Where source and destination differ by a few cache lines modulo a page, libc's large memmove falls to a
    quarter of its rate here (4 KiB aliasing): no ceiling to be measured against.
    """
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8).fill_(1)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.numpy()))


def host_config(total_bytes: int) -> StoreConfig:
    """A host tier with room for `total_bytes`, and no other tier."""
    return StoreConfig.load({"host": {"capacity_bytes": total_bytes + (64 << 20)}}, environ={})


def host_bench(store: Store, total_bytes: int, seed: int) -> HostBench:
    """Memory for `total_bytes` of KV, to be saved to `store` and loaded from it."""
    layout = store.open(LLAMA_8B)
    num_blocks = total_bytes // layout.block_bytes
    rng = np.random.default_rng(seed)
    whole = page_aligned(num_blocks * layout.block_bytes).view(num_blocks, layout.block_bytes)
    whole.numpy()[...] = rng.integers(0, 256, tuple(whole.shape), np.uint8)
    pages_per_block = LLAMA_8B.block_tokens // PAGE_TOKENS
    num_pages = num_blocks * pages_per_block
    page = (LLAMA_8B.num_kv, num_pages, PAGE_TOKENS, LLAMA_8B.num_kv_heads, LLAMA_8B.head_dim)
    paged = [torch.zeros(page, dtype=torch.bfloat16) for _ in range(LLAMA_8B.num_layers)]
    for number, layer in enumerate(paged):
        layer.view(torch.uint8).copy_(
            whole.view(-1)[number : number + layer.nbytes].view(layer.view(torch.uint8).shape)
        )
    page_ids = list(range(num_pages))
    random.Random(seed).shuffle(page_ids)
    copier = PageCopier(layout, PagedKV.of(paged, "kv page token head dim"))
    chain = Chain(Root(LLAMA_8B), rng.integers(0, 128_000, num_blocks * LLAMA_8B.block_tokens))
    return HostBench(num_blocks, store, layout, chain, whole, paged, page_ids, copier, Timings())


def measure_match(store: Store, repeats: int, seed: int) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Hash and match a 131,072-token prompt, all resident; then one more turn of the same conversation.

    Blocks are tiny here: a match never looks at bytes.
    """
    model = ModelId(
        model="tiny", revision="1", kv_dtype="bfloat16", num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=64
    )
    rng = np.random.default_rng(seed)
    timings = Timings()
    store.open(model)
    tokens = rng.integers(0, 128_000, 131_072).astype(np.uint32)
    turn = rng.integers(0, 128_000, 128).astype(np.uint32)
    full = Chain(Root(model), np.concatenate([tokens, turn]))
    with store.save(full, 0, len(full)) as save:
        save.commit()
    as_list = tokens.tolist()
    for number in range(repeats):
        with timings.arm("first"):
            chain = Chain(Root(model), tokens)
            match = store.match(chain, f"first {number}")
        assert match.num_blocks == 2048
        with timings.arm("next"):
            chain.extend(turn)
            match = store.match(chain, f"next {number}")
        assert match.num_blocks == 2050
        with timings.arm("list"):
            Chain(Root(model), as_list)
        store.forget(f"first {number}")
        store.forget(f"next {number}")
    summary = {
        "match_128k_ms": timings.median("first") * 1e3,
        "match_next_turn_ms": timings.median("next") * 1e3,
    }
    rows: list[dict[str, object]] = [
        {"arm": "hash and match 131,072 tokens (array)", **_ms(timings.seconds["first"])},
        {"arm": "extend by 128 tokens and match", **_ms(timings.seconds["next"])},
        {"arm": "hash 131,072 tokens from a Python list", **_ms(timings.seconds["list"])},
    ]
    return summary, rows


def _ms(seconds: list[float]) -> dict[str, object]:
    ordered = sorted(seconds)
    return {
        "ms p50": statistics.median(ordered) * 1e3,
        "ms p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3,
        "ms max": ordered[-1] * 1e3,
        "count": len(ordered),
    }


def measure_host(bench: HostBench, repeats: int, tick: Callable[[], None]) -> dict[str, float]:
    """Host saves and loads as shares of memcpy."""
    bench.prepare()
    steps = (bench.memcpy, bench.save, bench.load, bench.memcpy, bench.paged_save, bench.paged_load)
    for step in steps:  # warm-up
        step()
    bench.timings.seconds.clear()
    for _ in range(repeats):
        for step in steps:
            step()
            tick()
    ceiling = bench.timings.median("memcpy")
    names = {
        "host_save_ratio": "host save",
        "host_load_ratio": "host load",
        "paged_save_ratio": "paged save",
        "paged_load_ratio": "paged load",
    }
    return {key: ceiling / bench.timings.median(arm) for key, arm in names.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tiers", description=__doc__)
    parser.add_argument("--mib", type=whole(8, 65_536), default=512, help="KV to move in each arm (default: 512)")
    parser.add_argument("--repeats", type=whole(1, 10_000), default=15, help="rounds, arms alternating (default: 15)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument(
        "--only", choices=("redis", "small"), help="leave the host tier out, or all but the 128 KiB parts in Redis"
    )
    parser.add_argument("--json", metavar="FILE", help="write {name, env, rows, summary}")
    options = parser.parse_args(argv)
    # Drawn between timings only: a refreshing thread takes the GIL and a core from what is timed.
    with Progress(transient=True, auto_refresh=False) as progress:
        num_transports = 1 if options.only == "small" else NUM_TRANSPORTS
        num_rounds = options.repeats + len(shares(options.repeats))
        total = 1 + options.repeats * 6 * (not options.only) + num_rounds * num_transports
        task = progress.add_task("tiers", total=total)

        def tick() -> None:
            progress.update(task, advance=1, refresh=True)

        summary: dict[str, float] = {}
        rows: list[dict[str, object]] = []
        if not options.only:
            summary, rows = host_figures(options, tick)
        tick()
        total_bytes, repeats, seed = options.mib << 20, options.repeats, options.seed
        if options.only == "small":
            redis_summary, redis_rows = measure_small(total_bytes, repeats, seed, tick)
        else:
            redis_summary, redis_rows = measure_redis(LLAMA_8B, total_bytes, repeats, seed, tick)
    summary |= redis_summary
    rows += redis_rows
    summary["native_loops"] = float(is_built())
    print_table("Tiers", rows, ["arm", "GB/s p50", "GB/s best", "of ceiling", "ms p50", "ms p99", "ms max", "count"])
    print_figures("tiers-cpu", summary)
    if options.json:
        write_json(options.json, "tiers", stamp(), rows, summary)
        print(f"written: {options.json}")
    return 0


def host_figures(
    options: argparse.Namespace, tick: Callable[[], None]
) -> tuple[dict[str, float], list[dict[str, object]]]:
    with KVStore(host_config(0)) as store:
        summary, rows = measure_match(store, max(20, options.repeats), options.seed)
    with KVStore(host_config(options.mib << 20)) as store:
        store.wait_ready()
        bench = host_bench(store, options.mib << 20, options.seed)
        summary |= measure_host(bench, options.repeats, tick)
    total = bench.num_blocks * bench.layout.block_bytes
    return summary, bandwidth_rows(bench.timings, total) + rows


def bandwidth_rows(timings: Timings, total: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for arm, seconds in timings.seconds.items():
        ceiling = arm if arm.startswith("memcpy") else "memcpy"
        rows.append(
            {
                "arm": arm,
                "GB/s p50": total / statistics.median(seconds) / 1e9,
                "GB/s best": total / min(seconds) / 1e9,
                "of ceiling": timings.median(ceiling) / statistics.median(seconds),
                **_ms(seconds),
            }
        )
    return rows
