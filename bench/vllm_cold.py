# SPDX-License-Identifier: Apache-2.0
"""What the vLLM connector costs where nothing is ever reused: a real engine with it and one without take turns.

Two engines differ from start to start by more than the connector costs: where their pages and threads come to lie.
So several pairs are started, in alternating order, and within a pair requests go A B B A, one engine at a time. Each
pair of requests gives one ratio. The interval is a bootstrap over starts and, within them, over requests: with few
starts it is as wide as it should be. A third arm is a second engine without the connector: its ratio says what the
measurement itself is good for.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict

from bench.asked import print_figures
from bench.env import stamp
from bench.report import write_json
from bench.vllm_engines import PYTHON, VOCABULARY, Engine, Sidecar, model_options, native_dtype, transfer_to
from kvstore.tiers.valkey import EmbeddedServer

HELP = "what the connector costs a vLLM engine where nothing is reused: pairs of engines, started again and again"
OURS, PLAIN, AGAIN = "connector", "none", "none again"
_RESAMPLES = 2000


class ColdRow(TypedDict):
    """One request."""

    arm: str
    start: int
    pair: int
    ttft_s: float
    seconds: float


def serve(
    engines: dict[str, Engine], start: int, pairs: int, prompt_tokens: int, new: int, rng: random.Random
) -> list[ColdRow]:
    """Prompts that nobody has seen, one engine at a time; the order turns round with every pair."""
    rows: list[ColdRow] = []
    order = list(engines.items())
    for pair in range(-1, pairs):  # the first warms up
        for arm, engine in order if (pair + start) % 2 else order[::-1]:
            row = engine.serve([rng.randrange(1, VOCABULARY) for _ in range(prompt_tokens)], new=new, forget=False)
            # By chance a prompt begins as one of the last did, for a token or two, and these are reused.
            assert row["hit_tokens"] < 8
            if pair >= 0:
                rows.append(ColdRow(arm=arm, start=start, pair=pair, ttft_s=row["ttft_s"], seconds=row["seconds"]))
    return rows


def overheads(rows: Sequence[ColdRow], arm: str, what: str) -> list[list[float]]:
    """Per cent that `arm` took longer than none, of each pair of requests, by start."""
    found: dict[int, list[float]] = {}
    under = {(row["start"], row["pair"]): float(row[what]) for row in rows if row["arm"] == PLAIN}  # type: ignore[literal-required]
    for row in rows:
        if row["arm"] == arm:
            ratio = float(row[what]) / under[row["start"], row["pair"]]  # type: ignore[literal-required]
            found.setdefault(row["start"], []).append(100 * (ratio - 1))
    return list(found.values())


def interval(starts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % bootstrap interval of the median, resampling starts and then pairs within them."""
    rng = random.Random(0)
    medians = sorted(
        statistics.median(
            value for start in rng.choices(starts, k=len(starts)) for value in rng.choices(start, k=len(start))
        )
        for _ in range(_RESAMPLES)
    )
    return medians[_RESAMPLES // 40], medians[-_RESAMPLES // 40]


def summarise(rows: Sequence[ColdRow]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for arm, name in ((OURS, "zero_reuse"), (AGAIN, "no_difference")):
        for what, figure in (("ttft_s", "overhead_pct"), ("seconds", "throughput_pct")):
            starts = overheads(rows, arm, what)
            if not starts:
                continue
            low, high = interval(starts)
            summary[f"{name}_{figure}"] = statistics.median(value for start in starts for value in start)
            summary |= {f"{name}_{figure}_low": low, f"{name}_{figure}_high": high}
            summary[f"{name}_{figure}_by_start"] = ", ".join(f"{statistics.median(start):.2f}" for start in starts)
    pairs = overheads(rows, OURS, "ttft_s")
    return {**summary, "num_starts": len(pairs), "num_pairs": sum(len(start) for start in pairs)}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench vllm_cold", description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--model", choices=("random", "smollm2"), default="random", help="about 100 M parameters, or SmolLM2-135M")
    add("--starts", type=int, default=4, help="times that the engines are started (default 4)")
    add("--pairs", type=int, default=12, help="pairs of requests a start (default 12)")
    add("--prompt", type=int, default=1024, help="tokens of a prompt (default 1024)")
    add("--new", type=int, default=16, help="tokens of an answer (default 16)")
    add("--again", action="store_true", help="a second engine without the connector beside them")
    add("--dtype", default=native_dtype(), help="of weights and KV (default here %(default)s)")
    add("--python", type=Path, default=PYTHON, help="a Python that has vLLM")
    add("--json", type=Path, help="write the result here")
    return made


def main(argv: list[str]) -> int:
    asked = parser().parse_args(argv)
    if not asked.python.exists():
        parser().error(f"{asked.python} is not there: `make venv-vllm` installs vLLM")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines and servers end with it
    rng, rows = random.Random(1), []
    options = {**model_options(asked.model, asked.dtype), "max_tokens": 2 * asked.prompt}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv", dir="/tmp")))
        redis = stack.enter_context(EmbeddedServer())
        sidecar = stack.enter_context(Sidecar(directory, redis.url))
        sidecar.start()
        arms = {OURS: transfer_to("KVStoreConnector", "connectors.vllm", {"address": sidecar.address}), PLAIN: None}
        if asked.again:
            arms[AGAIN] = None
        for start in range(asked.starts):
            with ExitStack() as engines:
                order = list(arms) if start % 2 else list(arms)[::-1]
                made = {arm: Engine(asked.python, {**options, "transfer": arms[arm]}) for arm in order}
                for engine in made.values():
                    engines.enter_context(engine)
                    engine.wait()
                rows += serve({arm: made[arm] for arm in order}, start, asked.pairs, asked.prompt, asked.new, rng)
            print(f"start {start}: {summarise(rows)}", file=sys.stderr, flush=True)
    summary = summarise(rows)
    print_figures("vllm-cold-cpu", summary)
    if asked.json:
        settings = {"model": asked.model, "dtype": asked.dtype, "prompt_tokens": asked.prompt, "new": asked.new}
        write_json(asked.json, "vllm_cold", stamp(), rows, {**summary, **settings})
    return 0
