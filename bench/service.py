# SPDX-License-Identifier: Apache-2.0
"""The sidecar beside its ceilings: bulk copies beside memcpy, streams beside bare gRPC, calls alone and in a crowd.

`kvstore serve` runs in a process of its own; every figure includes the calls that it takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from rich.progress import Progress

from bench import index_scale
from bench.asked import print_figures
from bench.env import stamp
from bench.options import whole
from bench.remote import measure_remote
from bench.remote_ceiling import bare_server
from bench.report import print_table, write_json
from bench.sidecar import connect, crowd, load_rates, match_latency, prefix, save_zeros, sidecar
from bench.tiers import LLAMA_8B, bandwidth_rows, host_bench, measure_host, measure_match

HELP = "the sidecar: bulk copies, calls, crowds, the index at a million blocks"

CROWD = 64
LOADERS = 8
PAGED_MIB = 128

Rows = list[dict[str, object]]


def measure_bulk(total_mib: int, repeats: int, seed: int) -> tuple[dict[str, float], Rows]:
    """Saves and loads through the sidecar as shares of memcpy of the same size in the same run."""
    summary: dict[str, float] = {}
    rows: Rows = []
    for mib, chosen in ((total_mib, "host"), (PAGED_MIB, "paged")):
        with sidecar((mib << 20) + (64 << 20)) as address, connect(address) as store:
            bench = host_bench(store, mib << 20, seed)
            found = measure_host(bench, repeats, lambda: None)
            for key, value in found.items():
                if key.startswith(chosen):
                    summary["sidecar_" + key.removeprefix("host_")] = value
            rows += [
                {**row, "arm": f"{row['arm']}, {mib} MiB"}
                for row in bandwidth_rows(bench.timings, mib << 20)
                if str(row["arm"]).startswith((chosen, "memcpy"))
            ]
    return summary, rows


def measure_calls(repeats: int, seed: int) -> tuple[dict[str, float], Rows]:
    """A long match, the next turn's, and small ones: by one client, then with a crowd connected."""
    with sidecar(256 << 20) as address:
        with connect(address) as store:
            found, rows = measure_match(store, repeats, seed)
        summary = {f"sidecar_{key}": value for key, value in found.items()}
        with bare_server(1) as bare:
            bare_ms = sorted(bare.call_s() for _ in range(2000))[1000] * 1e3
        alone = match_latency(address)
        with crowd(address, CROWD) as seen:
            together = match_latency(address)
    if len(seen) != CROWD or min(seen) == 0:
        raise RuntimeError(f"the crowd of {CROWD} did not see events: {seen}")
    summary |= {
        "rpc_p50_ms": alone.p50_ms,
        "bare_rpc_p50_ms": bare_ms,
        "rpc_p50_64_ratio": together.p50_ms / alone.p50_ms,
        "rpc_p99_64_ms": together.p99_ms,
    }
    rows += [
        {"arm": "bare gRPC echo", "ms p50": bare_ms, "count": 2000},
        {"arm": "small match, one client", "ms p50": alone.p50_ms, "ms p99": alone.p99_ms, "count": 2000},
        {"arm": f"small match, {CROWD} watch", "ms p50": together.p50_ms, "ms p99": together.p99_ms, "count": 2000},
    ]
    return summary, rows


def measure_loaders(seconds: float) -> tuple[dict[str, float], Rows]:
    """One client that loads a prefix over and over, then eight at once."""
    num_blocks = 16
    with sidecar(256 << 20) as address:
        with connect(address) as store:
            store.open(LLAMA_8B)
            save_zeros(store, prefix(LLAMA_8B, num_blocks))
        alone = max(load_rates(address, LLAMA_8B, num_blocks, 1, seconds)[0] for _ in range(2))
        rates = load_rates(address, LLAMA_8B, num_blocks, LOADERS, seconds)
    summary = {"clients8_total_ratio": sum(rates) / alone, "clients8_fairness": max(rates) / min(rates)}
    rows: Rows = [
        {"arm": "load 128 MiB, one client", "GB/s p50": alone / 1e9},
        {
            "arm": f"load 128 MiB, {LOADERS} clients together",
            "GB/s p50": sum(rates) / 1e9,
            "of ceiling": sum(rates) / alone,
        },
    ]
    return summary, rows


def measure_index(num_blocks: int) -> tuple[dict[str, float], Rows]:
    """Memory and match time of an index that holds that many blocks."""
    summary, rows = index_scale.measure(num_blocks)
    return summary, [dict(row) for row in rows]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench service", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=whole(8, 65_536), default=512, help="KV in the bulk arms (default: 512)")
    parser.add_argument("--repeats", type=whole(1, 10_000), default=9, help="rounds, arms alternating (default: 9)")
    parser.add_argument(
        "--blocks", type=whole(10_000, 100_000_000), default=1_000_000, help="blocks in the index (default: 1000000)"
    )
    parser.add_argument("--seconds", type=float, default=4, help="for each crowd of loaders (default: 4)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument("--json", metavar="FILE", help="write {name, env, rows, summary}")
    options = parser.parse_args(argv)
    steps: tuple[tuple[str, Callable[[], tuple[dict[str, float], Rows]]], ...] = (
        ("bulk copies", lambda: measure_bulk(options.mib, options.repeats, options.seed)),
        ("calls", lambda: measure_calls(max(20, options.repeats), options.seed)),
        ("loaders", lambda: measure_loaders(options.seconds)),
        ("remote stream", lambda: measure_remote(options.seed)),
        ("index", lambda: measure_index(options.blocks)),
    )
    summary: dict[str, float] = {}
    rows: Rows = []
    # Drawn between measurements only: a refreshing thread takes the GIL and a core from what is timed.
    with Progress(transient=True, auto_refresh=False) as progress:
        task = progress.add_task("service", total=len(steps))
        for title, step in steps:
            progress.update(task, description=title, refresh=True)
            found, more = step()
            summary |= found
            rows += more
            progress.update(task, advance=1, refresh=True)
    print_table("Service", rows, ["arm", "GB/s p50", "of ceiling", "ms p50", "ms p99", "ms max", "count"])
    print_figures("service-cpu", summary)
    if options.json:
        write_json(options.json, "service", stamp(), rows, summary)
        print(f"written: {options.json}")
    return 0
