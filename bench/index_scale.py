# SPDX-License-Identifier: Apache-2.0
"""A million blocks in the host's table: memory of each, time to match them, saves and evictions among them.

No block's bytes are written: the arena is address space, and what is measured is bookkeeping. Runs in a process of
its own, so that nothing freed before is mistaken for small. Matches are of chains just hashed, as a new request's
are, with collections by the garbage collector going on as a server's own objects would cause them; full ones are
timed beside them.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import resource
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.env import stamp
from bench.options import whole
from bench.report import percentiles, print_table, write_json
from kvstore.api import NO_HINT
from kvstore.arena import PAGE_BYTES, Arena
from kvstore.block import Chain, ModelId, Root
from kvstore.layout import BlockLayout, layout_of
from kvstore.policies.lru import LruPolicy
from kvstore.pool import BlockPool

HELP = "a million blocks in the table: memory of each, time to match, save and evict"

Row = dict[str, str | int | float | bool | None]

# One page a block: the arena's own bookkeeping (a generation word a page) is at its largest beside the table's.
MODEL = ModelId(
    model="index", revision="1", kv_dtype="bfloat16", num_layers=1, num_kv_heads=1, head_dim=16, block_tokens=64
)
TOKEN_BYTES = 4 * MODEL.block_tokens
CHAIN_BLOCKS = 2048
SAVE_BLOCKS = 64
CONVERSATIONS = 8  # grow turn by turn at the same time, so that no chain lies in one piece
FEW_BLOCKS = 10_000
NUM_MATCHES = 1000
NUM_SAVES = 200


@dataclass(frozen=True, slots=True)
class _Filled:
    """A pool with `num_chains` resident chains of CHAIN_BLOCKS blocks."""

    pool: BlockPool
    root: Root
    num_chains: int

    def chain(self, number: int) -> Chain:
        """A chain by number; beyond `num_chains`, one that is not there."""
        tokens = np.random.default_rng(number).integers(0, 150_000, CHAIN_BLOCKS * MODEL.block_tokens)
        return Chain(self.root, tokens)

    def save(self, chain: Chain, start: int, stop: int) -> int:
        reserved, _ = self.pool.filling.reserve(
            self.root.id, _layout(), chain.ids[start:stop], chain.metas, (0,), start
        )
        num_saved = len(self.pool.filling.publish(reserved, NO_HINT))
        self.pool.touch(chain.ids, stop)
        return num_saved


def _layout() -> BlockLayout:
    return layout_of(MODEL)


def _fill(num_blocks: int) -> _Filled:
    pool = BlockPool(Arena(num_blocks * PAGE_BYTES, prefault=False), LruPolicy())
    pool.open(_layout(), num_blocks)
    filled = _Filled(pool, Root(MODEL), num_blocks // CHAIN_BLOCKS)
    for first in range(0, filled.num_chains, CONVERSATIONS):
        chains = [filled.chain(number) for number in range(first, min(first + CONVERSATIONS, filled.num_chains))]
        for start in range(0, CHAIN_BLOCKS, SAVE_BLOCKS):
            for chain in chains:
                filled.save(chain, start, start + SAVE_BLOCKS)
    pool.settle()
    return filled


def _match_times_s(filled: _Filled, num_matches: int) -> list[float]:
    """Seconds of matches of whole chains, each to its last block."""
    rng = np.random.default_rng(1)
    times_s: list[float] = []
    kept: list[list[object]] = []
    for _ in range(num_matches):
        chain = filled.chain(int(rng.integers(filled.num_chains)))
        kept.append([[] for _ in range(500)])  # what else a server makes meanwhile, for the collector to walk
        began_s = time.perf_counter()
        rows = filled.pool.pin_leading(chain.ids, 1, filled.root.id)
        times_s.append(time.perf_counter() - began_s)
        assert len(rows) == CHAIN_BLOCKS, f"{len(rows)} blocks of a resident chain were found"
        filled.pool.unpin(rows)
        filled.pool.touch(chain.ids, len(chain))
        filled.pool.settle()
        kept = kept[-300:]
    return times_s


def _save_times_s(filled: _Filled) -> list[float]:
    """Seconds of saves of SAVE_BLOCKS blocks each, into a full pool."""
    times_s: list[float] = []
    chain, start = filled.chain(filled.num_chains), 0
    for number in range(NUM_SAVES):
        if start == CHAIN_BLOCKS:
            chain, start = filled.chain(filled.num_chains + number), 0
        began_s = time.perf_counter()
        saved = filled.save(chain, start, start + SAVE_BLOCKS)
        times_s.append(time.perf_counter() - began_s)
        assert saved == SAVE_BLOCKS, f"{saved} of {SAVE_BLOCKS} blocks found room"
        start += SAVE_BLOCKS
    return times_s


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _run(num_blocks: int, traced: bool) -> Row:
    """Figures of one size, in a fresh process."""
    _save_times_s(_fill(FEW_BLOCKS))  # so that imports and caches of numpy's are not counted as the table's
    gc.collect()
    if traced:
        tracemalloc.start()
    before, traced_before = _resident_bytes(), tracemalloc.get_traced_memory()[0] if traced else 0
    filled = _fill(num_blocks)
    gc.collect()
    count = len(filled.pool)
    after = tracemalloc.get_traced_memory()[0] - traced_before if traced else _resident_bytes() - before
    row: Row = {"blocks": count, "measured_by": "tracemalloc" if traced else "RSS"}
    row["bytes_per_block"] = after / count - TOKEN_BYTES
    if traced:
        return row
    collections = gc.get_stats()[2]["collections"]
    times_s = _match_times_s(filled, NUM_MATCHES)
    row["full_collections"] = gc.get_stats()[2]["collections"] - collections
    row |= {f"match_{name}_ms": 1e3 * value for name, value in percentiles(times_s).items() if name != "count"}
    row["match_us_per_block"] = 1e6 * float(np.median(times_s)) / CHAIN_BLOCKS
    began_s = time.perf_counter()
    gc.collect()
    row["full_collection_ms"] = 1e3 * (time.perf_counter() - began_s)
    saves = _save_times_s(filled)
    row["save_evicting_us_per_block"] = 1e6 * float(np.median(saves)) / SAVE_BLOCKS
    row["save_evicting_p99_us_per_block"] = 1e6 * float(np.percentile(saves, 99)) / SAVE_BLOCKS
    began_s = time.perf_counter()
    faults = filled.pool.check()
    row["check_s"] = time.perf_counter() - began_s
    assert faults == [], faults[:3]
    began_s = time.perf_counter()
    filled.pool.clear()
    row["clear_s"] = time.perf_counter() - began_s
    return row


def _in_a_process_of_its_own(num_blocks: int, traced: bool) -> Row:
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        return workers.apply(_run, (num_blocks, traced))


def measure(num_blocks: int = 1_000_000) -> tuple[dict[str, float], list[Row]]:
    """Summary and rows: `num_blocks` blocks beside 10,000, and memory by tracemalloc beside RSS."""
    few = _in_a_process_of_its_own(FEW_BLOCKS, False)
    many = _in_a_process_of_its_own(num_blocks, False)
    traced = _in_a_process_of_its_own(num_blocks, True)
    summary = {
        "index_bytes_per_block": max(_number(many, "bytes_per_block"), _number(traced, "bytes_per_block")),
        "index_match_us_per_block": _number(many, "match_us_per_block"),
        "index_match_growth": _number(many, "match_us_per_block") / _number(few, "match_us_per_block"),
        "index_match_p99_ms": _number(many, "match_p99_ms"),
    }
    return summary, [few, many, traced]


def _number(row: Row, key: str) -> float:
    value = row[key]
    assert isinstance(value, float), f"{key} is {value!r}"
    return value


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench index_scale", description=__doc__)
    parser.add_argument(
        "--blocks", type=whole(10_000, 100_000_000), default=1_000_000, help="blocks in the table (default: 1,000,000)"
    )
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    summary, rows = measure(options.blocks)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print_table(
        "Blocks in the table",
        [{"figure": key, **{f"run {at}": row.get(key) for at, row in enumerate(rows)}} for key in keys]
        + [{"figure": key, "run 1": value} for key, value in summary.items()],
        ["figure", *(f"run {at}" for at in range(len(rows)))],
    )
    if options.json:
        write_json(options.json, "index_scale", stamp(), rows, dict(summary))
        print(f"result: {options.json}")
    return 0
