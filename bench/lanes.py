# SPDX-License-Identifier: Apache-2.0
"""Loads over several connections: where each carries so much, and where there is nothing to gain by more of them.

Three links to the same server: one that gives each connection 0.25 GB/s, as networks that limit single flows do (a
proxy in a process of its own); the server's Unix socket, and loopback, on cores that client and server share. On each a
tier that may take four lanes and one that may take one load the same values over and over, in turns, and bytes are
compared. Of the first link the gain is the rate once the choice has settled over that of one lane. Of the others the
overhead is what all loads together took longer with a choice to make, trying included; its 95 % interval is over
stretches of them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
from rich.progress import Progress

from bench.asked import print_figures
from bench.env import stamp
from bench.options import whole
from bench.paired import estimate
from bench.record import Scalar
from bench.redis_speed import free_port
from bench.report import print_table, write_json
from bench.slow_link import SlowLink
from kvstore.block import Chain, ModelId, PartKey, Root
from kvstore.layout import layout_of
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions

HELP = "one load over several connections: where flows are limited, and where that is of no use"

MODEL = ModelId(
    model="8b-shape", revision="1", kv_dtype="bfloat16", num_layers=8, num_kv_heads=8, head_dim=128, block_tokens=64
)
"""Parts of 2 MiB."""
LANES = 4
_FLOW_BYTES_PER_S = 0.25e9
_SPANS = 12
_DEADLINE_S = 60.0


class Values:
    """What is written, and where loads of it go: one memory for all, since where it lies moves rates by a tenth."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        layout = layout_of(MODEL)
        chain = Chain(Root(MODEL), rng.integers(0, 1 << 17, 64 * num_blocks))
        keys = chain.part_keys(0, num_blocks, layout.all_parts)
        self.meta = {block: chain.meta(at) for at, block in enumerate(chain.ids)}
        self.content = rng.integers(0, 256, (num_blocks, layout.block_bytes), np.uint8)
        self.memory = np.zeros_like(self.content)
        self.parts = {key: memoryview(row) for key, row in zip(keys, self.content, strict=True)}
        self.into: dict[PartKey, memoryview] = {
            key: memoryview(row) for key, row in zip(keys, self.memory, strict=True)
        }


class Loader:
    """A tier that loads values over and over; what comes is held against what was written."""

    def __init__(self, url: str, lanes: int, values: Values) -> None:
        self.tier = RedisTier(
            RedisTier.Options(url=url, lanes=lanes, codec="raw", capacity_bytes=4 << 30, sweep_every_s=0)
        )
        self.tier.open(layout_of(MODEL))
        self._values = values

    def write(self) -> None:
        values = self._values
        if len(self.tier.write(values.parts, values.meta, _DEADLINE_S)) != len(values.parts):
            raise RuntimeError("the server did not take all values")

    def load(self) -> float:
        """Seconds."""
        values, began_s = self._values, time.perf_counter()
        num_come = sum(map(len, self.tier.read(values.into, _DEADLINE_S)))
        took_s = time.perf_counter() - began_s
        if num_come != len(values.into) or not np.array_equal(values.memory, values.content):
            raise RuntimeError("not all bytes came back as they were")
        values.memory.fill(0)
        return took_s

    @property
    def lanes(self) -> int:
        return int(self.tier.stats.get("redis.lanes"))


def measure_flows(server: EmbeddedServer, values: Values, rounds: int, tick: Callable[[], None]) -> dict[str, object]:
    """The link that limits each connection: loads until there were so many with as many lanes as there may be."""
    with (
        SlowLink(server.unix_url.removeprefix("unix://"), each=True) as link,
        closing((chosen := Loader(link.url, LANES, values)).tier),
        closing((single := Loader(link.url, 1, values)).tier),
    ):
        chosen.write()
        link.bytes_per_s = _FLOW_BYTES_PER_S
        num_learning, learning_s = 0, time.monotonic()
        while chosen.lanes < LANES and time.monotonic() - learning_s < 120:
            chosen.load()
            num_learning += 1
            tick()
        seconds: dict[str, list[float]] = {"four": [], "one": []}
        for _ in range(rounds):
            seconds["four"].append(chosen.load())
            seconds["one"].append(single.load())
            tick()
        rates = {name: values.content.nbytes / statistics.median(took) / 1e9 for name, took in seconds.items()}
        return {
            "link": f"{_FLOW_BYTES_PER_S / 1e9:g} GB/s a connection",
            "lanes": chosen.lanes,
            "GB/s": rates["four"],
            "one lane": rates["one"],
            "gain": rates["four"] / rates["one"],
            "loads_to_learn": num_learning,
            "seconds": seconds,
        }


def measure_free(name: str, url: str, values: Values, num_loads: int, tick: Callable[[], None]) -> dict[str, object]:
    """A link on which client and server share the cores: all loads, those that try included."""
    with (
        closing((chosen := Loader(url, LANES, values)).tier),
        closing((single := Loader(url, 1, values)).tier),
    ):
        chosen.write()
        for loader in (chosen, single) * 5:
            loader.load()
        spans: list[tuple[float, float]] = []
        for _ in range(_SPANS):
            four_s = one_s = 0.0
            for number in range(num_loads // _SPANS):
                for loader in (chosen, single) if number % 2 else (single, chosen):
                    took_s = loader.load()
                    four_s, one_s = (four_s + took_s, one_s) if loader is chosen else (four_s, one_s + took_s)
                tick()
            spans.append((four_s, one_s))
        found = estimate([math.log(four_s / one_s) for four_s, one_s in spans])
        in_all = [sum(each) for each in zip(*spans, strict=True)]
        num_bytes = values.content.nbytes * (num_loads // _SPANS) * _SPANS
        return {
            "link": name,
            "lanes": chosen.lanes,
            "GB/s": num_bytes / in_all[0] / 1e9,
            "one lane": num_bytes / in_all[1] / 1e9,
            "overhead_pct": 100 * (in_all[0] / in_all[1] - 1),
            "low": found.low_pct,
            "high": found.high_pct,
            "spans_s": spans,
        }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench lanes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=whole(8, 4096), default=32, help="of 2 MiB, a load (default: 32)")
    parser.add_argument(
        "--loads", type=whole(_SPANS, 100_000), default=600, help="where it is of no use (default: 600)"
    )
    parser.add_argument("--rounds", type=whole(3, 1_000), default=12, help="where flows are limited (default: 12)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument("--json", metavar="FILE", help="write {name, env, rows, summary}")
    options = parser.parse_args(argv)
    rows, summary = measure(options.blocks, options.loads, options.rounds, options.seed)
    print_table(
        "One load over several connections", rows, ["link", "lanes", "GB/s", "one lane", "gain", "overhead_pct"]
    )
    print_figures("lanes-cpu", summary)
    if options.json:
        write_json(options.json, "lanes", stamp(), rows, summary)
        print(f"written: {options.json}")
    return 0


def measure(
    num_blocks: int, num_loads: int, rounds: int, seed: int
) -> tuple[list[dict[str, object]], dict[str, Scalar]]:
    with (
        EmbeddedServer(ServerOptions(port=free_port())) as server,
        Progress(transient=True, auto_refresh=False) as progress,
    ):
        task = progress.add_task("loads", total=None)
        tick = lambda: progress.update(task, advance=1)
        values = Values(num_blocks, seed)
        flows = measure_flows(server, values, rounds, tick)
        unix = measure_free("Unix socket", server.unix_url, values, num_loads, tick)
        tcp = measure_free("loopback", server.url, values, num_loads, tick)
    summary: dict[str, Scalar] = {
        "lanes_flow_gain": float(str(flows["gain"])),
        "lanes_flow_loads_to_learn": int(str(flows["loads_to_learn"])),
    }
    for name, row in (("unix", unix), ("tcp", tcp)):
        summary[f"lanes_{name}_overhead_pct"] = float(str(row["overhead_pct"]))
        summary[f"lanes_{name}_overhead_pct_low"] = float(str(row["low"]))
        summary[f"lanes_{name}_overhead_pct_high"] = float(str(row["high"]))
    return [flows, unix, tcp], summary
