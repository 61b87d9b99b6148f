# SPDX-License-Identifier: Apache-2.0
"""`codec = "auto"` beside always raw and always lz4: writes and reads of a Redis tier by link speed and kind of bytes.

Real KV is SmolLM2's over a document, in bf16; random bytes are what no codec makes smaller. In each cell, one speed
and one kind, every arm has a tier and a namespace of its own, moves the same bytes over the same link to the same
server, and starts cold; it is then given rounds to learn from, which are not counted. In each round that counts the
arms come in an order of their own, by the seed. The better one of raw and lz4 is the one with the lower median in the
cell; it is there twice, and what the two differ by is what the method gives for no difference at all.

A cell's figure is the Hodges-Lehmann estimate of what `auto` took over what the better one took in the same round, with
its 95 % interval (`bench.paired.estimate`): of a write and a read together, and of a read alone, since requests wait
for reads. The link is a proxy in a process of its own, as fast both ways; at speeds beyond its own it is what the row
says that raw reads reached. `direct` is the server's Unix socket.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import redis
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from transformers import DynamicCache

from bench.asked import print_figures
from bench.env import stamp
from bench.models import smollm2
from bench.options import listed, whole
from bench.paired import estimate
from bench.record import Scalar
from bench.redis_speed import settle
from bench.report import print_table, write_json
from bench.slow_link import SlowLink
from bench.workload import documents
from kvstore.block import BlockId, BlockMeta, Chain, ModelId, PartKey, Root
from kvstore.layout import layout_of
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer

HELP = "codec = auto beside raw and lz4, by link speed, on a real model's KV and on random bytes"

SPEEDS_GB_PER_S = (0.2, 1.0, 5.0)
DIRECT = 0.0
RAW, LZ4, AUTO, AGAIN = "raw", "lz4", "auto", "the better one, again"
REAL, RANDOM = "real", "random"
MODEL = ModelId(
    model="smollm2-shape",
    revision="1",
    kv_dtype="bfloat16",
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    block_tokens=64,
)
"""Blocks of 1.4 MiB."""
TARGET_PCT = 3.0
_DEADLINE_S = 60.0
_LEARN_S = 12.0
"""`auto` tries its codec once a second, takes medians of nine calls, and then compares ten to 24 writes."""
_CELL_S = 5.0
_SHOWN = ["GB/s", "bytes", "raw_ms", "lz4_ms", "auto_ms", "better", "auto_encodes", "raw_gb_per_s", "auto_pct"]
_SHOWN += ["low", "high", "read_pct", "null_pct"]

Bytes = NDArray[np.uint8]


def real_kv(num_blocks: int) -> Bytes:
    """[blocks, bytes]: KV of SmolLM2 over the beginning of a document, as blocks of `MODEL`."""
    chat = smollm2()
    tokens = torch.tensor([documents(chat.encode, num_blocks * MODEL.block_tokens)[0].token_ids])
    cache = DynamicCache()
    with torch.no_grad():
        chat.model.base_model(tokens, past_key_values=cache, use_cache=True)
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # type: ignore[index,union-attr]
    kv = torch.stack(layers).to(torch.bfloat16)  # [layers, kv, heads, tokens, dim]
    cut = kv.view(*kv.shape[:3], num_blocks, MODEL.block_tokens, MODEL.head_dim)
    blocks = cut.permute(3, 0, 1, 4, 2, 5).contiguous()
    found: Bytes = blocks.view(torch.uint8).reshape(num_blocks, -1).numpy()
    return found


def random_bytes(num_blocks: int, seed: int) -> Bytes:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_blocks, layout_of(MODEL).block_bytes), np.uint8)


class Arm:
    """One tier with a codec, and its own namespace with the bytes of the cell."""

    def __init__(self, name: str, codec: str, url: str, content: Bytes) -> None:
        self.name = name
        self.tier = RedisTier(RedisTier.Options(url=url, codec=codec, capacity_bytes=4 << 30, sweep_every_s=0))
        layout = layout_of(MODEL)
        self.tier.open(layout)
        root = Root(MODEL, salt=name.encode())
        chain = Chain(root, range(len(content) * MODEL.block_tokens))
        keys = chain.part_keys(0, len(chain), layout.all_parts)
        self._parts: dict[PartKey, memoryview] = {
            key: memoryview(block.tobytes()) for key, block in zip(keys, content, strict=True)
        }
        self._into = {key: memoryview(bytearray(len(part))) for key, part in self._parts.items()}
        self._meta: dict[BlockId, BlockMeta] = {block: chain.meta(at) for at, block in enumerate(chain.ids)}
        self._root = root

    def round(self) -> tuple[float, float]:
        """Seconds of a write and of a read of everything; what was read is held against what was written."""
        began = time.perf_counter()
        written = self.tier.write(self._parts, self._meta, _DEADLINE_S)
        wrote = time.perf_counter()
        read = [key for keys in self.tier.read(self._into, _DEADLINE_S) for key in keys]
        ended = time.perf_counter()
        if len(written) != len(self._parts) or len(read) != len(self._parts) or self._into != self._parts:
            raise RuntimeError(f"{self.name}: not all bytes came back as they were")
        self.tier.clear(self._root.id)
        return wrote - began, ended - wrote

    @property
    def encodes(self) -> bool:
        return bool(self.tier.stats.get("redis.encoded_namespaces"))

    def close(self) -> None:
        self.tier.close()


@dataclass
class Cell:
    """Seconds of writes and of reads by arm, an entry a round.

    Attributes:
        again_of: the arm that AGAIN repeats: the better one while `auto` learned.
        encodes: whether `auto` encoded when the last round ended.
    """

    again_of: str = RAW
    encodes: bool = False
    writes: dict[str, list[float]] = field(default_factory=dict)
    reads: dict[str, list[float]] = field(default_factory=dict)

    def add(self, arm: str, write_s: float, read_s: float) -> None:
        self.writes.setdefault(arm, []).append(write_s)
        self.reads.setdefault(arm, []).append(read_s)

    def both(self, arm: str) -> list[float]:
        return [write_s + read_s for write_s, read_s in zip(self.writes[arm], self.reads[arm], strict=True)]

    def compare(self, arm: str, base: str) -> tuple[float, float, float]:
        return _ratio(self.both(arm), self.both(base))

    def compare_reads(self, arm: str, base: str) -> tuple[float, float, float]:
        return _ratio(self.reads[arm], self.reads[base])


def _ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    return estimate([math.log(a / b) for a, b in zip(ours, theirs, strict=True)])


def measure_cell(
    url: str,
    content: Bytes,
    rounds: int,
    rng: np.random.Generator,
    rest: Callable[[], None],
    tick: Callable[[], None],
) -> Cell:
    """Rounds of all arms over one link, after those in which `auto` learns; for `_CELL_S` at least."""
    arms = [Arm(RAW, RAW, url, content), Arm(LZ4, LZ4, url, content), Arm(AUTO, AUTO, url, content)]
    try:
        first = Cell()
        for _ in range(2):
            for arm in arms:
                first.add(arm.name, *arm.round())
        better = min((RAW, LZ4), key=lambda name: min(first.both(name)))
        arms.append(Arm(AGAIN, better, url, content))
        arms[-1].round()
        until_s = time.monotonic() + _LEARN_S
        while time.monotonic() < until_s:
            arms[2].round()
        cell = Cell(again_of=better)
        began_s, number = time.monotonic(), 0
        while number < rounds or time.monotonic() - began_s < _CELL_S:
            for at in rng.permutation(len(arms)).tolist():
                cell.add(arms[at].name, *arms[at].round())
                rest()
            number += 1
            tick()
        cell.encodes = arms[2].encodes
        return cell
    finally:
        for arm in arms:
            arm.close()


def row_of(speed: float, kind: str, cell: Cell, num_bytes: int) -> dict[str, object]:
    better = min((RAW, LZ4), key=lambda name: statistics.median(cell.both(name)))
    auto_pct, low, high = cell.compare(AUTO, better)
    better_read = min((RAW, LZ4), key=lambda name: statistics.median(cell.reads[name]))
    read_pct, read_low, read_high = cell.compare_reads(AUTO, better_read)
    null_pct, null_low, null_high = cell.compare(AGAIN, cell.again_of)
    return {
        "GB/s": speed or "direct",
        "bytes": kind,
        **{f"{arm}_ms": 1e3 * statistics.median(cell.both(arm)) for arm in (RAW, LZ4, AUTO)},
        **{f"{arm}_read_ms": 1e3 * statistics.median(cell.reads[arm]) for arm in (RAW, LZ4, AUTO)},
        "raw_gb_per_s": num_bytes / statistics.median(cell.reads[RAW]) / 1e9,
        "better": better,
        "better_read": better_read,
        "auto_encodes": cell.encodes,
        "rounds": len(cell.reads[AUTO]),
        "auto_pct": auto_pct,
        "low": low,
        "high": high,
        "read_pct": read_pct,
        "read_low": read_low,
        "read_high": read_high,
        "null_pct": null_pct,
        "null_low": null_low,
        "null_high": null_high,
    }


def summarise(rows: list[dict[str, object]]) -> dict[str, Scalar]:
    def column(key: str) -> list[float]:
        return [float(str(row[key])) for row in rows]

    worst = max(rows, key=lambda row: float(str(row["auto_pct"])))
    gains = [1 - float(str(row["auto_ms"])) / float(str(row["raw_ms"])) for row in rows]
    return {
        "codec_auto_worst_pct": float(str(worst["auto_pct"])),
        "codec_auto_worst_cell": f"{worst['GB/s']} GB/s, {worst['bytes']}",
        "codec_auto_worst_read_pct": max(column("read_pct")),
        "codec_null_worst_pct": max(map(abs, column("null_pct"))),
        "codec_cells": len(rows),
        "codec_cells_over": sum(pct > TARGET_PCT for pct in column("auto_pct")),
        "codec_cells_surely_over": sum(low > TARGET_PCT for low in column("low")),
        "codec_auto_best_gain_pct": 100 * max(gains),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench codec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=whole(1, 4096), default=24, help="of 1.4 MiB, in each arm (default: 24)")
    parser.add_argument("--rounds", type=whole(3, 10_000), default=12, help="a cell, at least (default: 12)")
    parser.add_argument("--speeds", type=listed(float, SPEEDS_GB_PER_S), default=SPEEDS_GB_PER_S, help="GB/s")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument("--json", metavar="FILE", help="write {name, env, rows, summary}")
    options = parser.parse_args(argv)
    kinds = {REAL: real_kv(options.blocks), RANDOM: random_bytes(options.blocks, options.seed)}
    rows = measure(kinds, options.speeds, options.rounds, options.seed)
    summary = summarise(rows) | {"seed": options.seed}
    print_table("auto beside raw and lz4", rows, _SHOWN)
    print_figures("codec-cpu", summary)
    if options.json:
        write_json(options.json, "codec", stamp(), rows, summary)
        print(f"written: {options.json}")
    return 0


def measure(kinds: dict[str, Bytes], speeds: tuple[float, ...], rounds: int, seed: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    with (
        EmbeddedServer() as server,
        SlowLink(server.unix_url.removeprefix("unix://"), both_ways=True) as link,
        redis.Redis.from_url(server.unix_url) as client,
        Progress(transient=True, auto_refresh=False) as progress,
    ):
        task = progress.add_task("rounds", total=None)
        for speed in (*speeds, DIRECT):
            link.bytes_per_s = speed * 1e9
            url = link.url if speed else server.unix_url
            for kind, content in kinds.items():
                cell = measure_cell(
                    url, content, rounds, rng, lambda: settle(client), lambda: progress.update(task, advance=1)
                )
                rows.append(row_of(speed, kind, cell, content.nbytes))
    return rows
