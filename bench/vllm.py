# SPDX-License-Identifier: Apache-2.0
"""TTFT in a real vLLM engine on the CPU: recompute, the engine's own prefix cache, and ours.

Arms of ours: a store in the engine's process, and the sidecar. Each starts an engine of its own, in which the
same requests are also served from the engine's prefix cache: ratios are taken within one engine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.env import stamp
from bench.models import cache_directory
from bench.report import percentiles, print_table, write_json

HELP = "time to first token in a real vLLM engine on the CPU, through the sidecar and without"
ROOT = Path(__file__).parent.parent


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench vllm", description=__doc__.split("\n")[0])
    parser.add_argument("--reused", type=int, default=4096, help="tokens of the prefix (default 4096)")
    parser.add_argument("--new", type=int, nargs="+", default=[16, 232], help="tokens after it (default 16 232)")
    parser.add_argument("--repeats", type=int, default=20, help="requests an arm (default 20)")
    parser.add_argument("--cold", type=int, default=5, help="of them, also recomputed (default 5)")
    parser.add_argument(
        "--dtype", default="bfloat16", help="of weights and KV; float32 where the CPU has no AVX-512 (default bfloat16)"
    )
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="a Python that has vLLM")
    parser.add_argument("--json", type=Path, help="write the result here")
    asked = parser.parse_args(argv)
    if not asked.python.exists():
        parser.error(f"{asked.python} is not there: `make venv-vllm` installs vLLM")
    rows: list[dict[str, Any]] = []
    for place in ("in process", "sidecar"):
        with _extra(place) as extra:
            for row in _arms(asked, extra):
                rows.append({"place": place, **row})
    summary = _summary(rows, asked.new)
    shown = [
        {"place": place, "arm": arm, "new_tokens": new, **percentiles(times)}
        for (place, arm, new), times in _grouped(rows).items()
    ]
    print_table("TTFT, seconds", shown, ["place", "arm", "new_tokens", "p50", "p90", "max", "count"])
    for name, value in summary.items():
        print(f"{name:<28} {value:.3f}")
    if asked.json:
        write_json(asked.json, "vllm", stamp(), rows, summary)
    return 0


@contextmanager
def _extra(place: str) -> Iterator[dict[str, object]]:
    """The connector's settings for a place; the sidecar runs as long."""
    common: dict[str, object] = {"load_rule": "always", "sync_load_ms": 200}
    if place == "in process":
        yield {**common, "store": {"host": {"capacity_bytes": "1GiB"}}}
        return
    directory = tempfile.mkdtemp(prefix="kv", dir="/tmp")
    address = f"unix:{directory}/s"
    command = [sys.executable, "-m", "kvstore.service.cli", "serve", "--listen", address, "--host-capacity", "1GiB"]
    with subprocess.Popen(command, cwd=ROOT, env=_environ(), stdout=subprocess.DEVNULL) as server:
        try:
            yield {**common, "address": address}
        finally:
            server.terminate()
            server.wait(30)
            shutil.rmtree(directory, ignore_errors=True)


def _environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _arms(asked: argparse.Namespace, extra: dict[str, object]) -> list[dict[str, Any]]:
    options = {
        "model": str(cache_directory() / "llama-100m-seed0"),
        "reused": asked.reused,
        "new": asked.new,
        "repeats": asked.repeats,
        "cold": asked.cold,
        "dtype": asked.dtype,
        "extra": extra,
    }
    done = subprocess.run(
        [str(asked.python), "-m", "bench.vllm_arms", json.dumps(options)],
        cwd=ROOT,
        env=_environ(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ROWS ")]
    if not lines:
        sys.exit(f"the engine ended with {done.returncode} and no result")
    rows: list[dict[str, Any]] = json.loads(lines[-1].removeprefix("ROWS "))
    return rows


def _grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], list[float]]:
    groups: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row["place"], row["arm"], row["new_tokens"]), []).append(row["ttft_s"])
    return groups


def _summary(rows: Sequence[dict[str, Any]], new_tokens: Sequence[int]) -> dict[str, float]:
    """Medians against the engine's own hit, in the same engine."""
    medians = {key: percentiles(times)["p50"] for key, times in _grouped(rows).items()}
    summary: dict[str, float] = {}
    for place in ("in process", "sidecar"):
        name = place.replace(" ", "_")
        for new in new_tokens:
            ours, hit = medians[(place, "store", new)], medians[(place, "engine hit", new)]
            summary[f"{name}_vs_engine_hit_{new}"] = ours / hit
            summary[f"{name}_added_ms_{new}"] = (ours - hit) * 1e3
        cold = medians.get((place, "recompute", new_tokens[-1]))
        if cold is not None:
            summary[f"{name}_vs_recompute"] = medians[(place, "store", new_tokens[-1])] / cold
    return summary
