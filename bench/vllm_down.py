# SPDX-License-Identifier: Apache-2.0
"""What the vLLM connector costs where the sidecar is away: ended, and stopped so that it answers nothing.

A real engine with the connector, whose sidecar goes after it has served a hit, takes turns with one that has none. The
connector is also taken off the running engine for some requests (`bench.vllm_arms`), which compares like with like:
two engines differ from start to start by more (`bench.vllm_cold`, whose rounds these are). Nothing is reused, since
where nothing answers nothing can be.

Where the sidecar is stopped, the request that finds that out waits, for a call's deadline, and then one each time that
the connector tries again, a second later: what the slowest and the middle one had more than the connector taken off.
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
from itertools import product
from pathlib import Path
from typing import Any, cast

from bench.asked import print_figures
from bench.env import stamp
from bench.paired import estimate
from bench.report import write_json
from bench.vllm_cold import OFF, OFF_AGAIN, OURS, PLAIN, ColdRow, Compared, Start, log_ratios
from bench.vllm_engines import VOCABULARY, Engine, Sidecar, add_flags, model_options, transfer_to
from connectors.vllm_plan import VllmSettings

HELP = "what the connector costs a vLLM engine whose sidecar is away: ended, and hanging"
ENDED, HANGS = "ended", "hangs"

_COMPARED = (
    Compared("store_down", (OURS,), (OFF, OFF_AGAIN), by_start=False),
    Compared("store_down_vs_none", (OURS,), (PLAIN,), by_start=False),
    Compared("store_down_no_difference", (OFF_AGAIN,), (OFF,), by_start=False),
)


class Away:
    """A sidecar that is not there has no CPU; a Start asks."""

    def cpu_s(self) -> float:
        return 0.0


def measure(
    engines: dict[str, Engine], sidecar: Sidecar, number: int, *, prompt: int, new: int, pairs: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Rounds with the sidecar ended, then with a new one that hangs; before each, a hit through it."""
    arms = {OURS: engines[OURS], OFF: engines[OURS], OFF_AGAIN: engines[OURS], PLAIN: engines[PLAIN]}
    start = Start(number, arms, Away(), prompt, new, rng)
    _hit(engines[OURS], prompt, rng)
    sidecar.end()
    rows = [{**row, "sidecar": ENDED} for row in start.measure(pairs)]
    engines[OURS].wake()
    sidecar.start()
    _hit(engines[OURS], prompt, rng)
    sidecar.hang()
    for pair, arm in product(range(pairs), (OURS, OFF)):  # the first one finds out: no untimed one comes before
        tokens = [rng.randrange(1, VOCABULARY) for _ in range(prompt)]
        row = engines[OURS].serve(tokens, new=new, forget=False, connected=arm == OURS)
        rows.append({"sidecar": HANGS, "arm": arm, "start": number, "pair": pair, "ttft_s": row["ttft_s"]})
    return rows


def _hit(engine: Engine, count: int, rng: random.Random) -> None:
    """Wait until a prompt comes back from the sidecar: after one went the engine looks for it every second."""
    for _ in range(60):
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(count)]
        engine.serve(prompt)
        if engine.serve(prompt, forget=True)["hit_tokens"] > count // 2:
            return
    raise RuntimeError("nothing comes back from the sidecar")


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    hanging = [row for row in rows if row["sidecar"] == HANGS]
    ended = [cast(ColdRow, row) for row in rows if row["sidecar"] == ENDED]
    for compared in _COMPARED:
        logs = [value for start in log_ratios(ended, compared, "ttft_s").values() for value in start]
        key = f"{compared.name}_overhead_pct"
        summary[key], summary[f"{key}_low"], summary[f"{key}_high"] = estimate(logs)
    computed_s = statistics.median(row["ttft_s"] for row in hanging if row["arm"] == OFF)
    added_ms = [1e3 * (row["ttft_s"] - computed_s) for row in hanging if row["arm"] == OURS]
    deadline_ms = VllmSettings().call_deadline_ms
    return {
        **summary,
        "hanging_worst_added_ms": max(added_ms),
        "hanging_median_added_ms": statistics.median(added_ms),
        "hanging_worst_vs_deadline": max(added_ms) / deadline_ms,
        "num_starts": len({row["start"] for row in rows}),
        "num_pairs": sum(row["arm"] == OURS for row in ended),
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench vllm_down", description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--starts", type=int, default=2, help="times that the engines are started (default 2)")
    add("--pairs", type=int, default=10, help="rounds of requests a start and state of the sidecar (default 10)")
    add("--prompt", type=int, default=1024, help="tokens of a prompt (default 1024)")
    add("--new", type=int, default=4, help="tokens of an answer (default 4)")
    add_flags(made)
    return made


def main(argv: list[str]) -> int:
    asked = parser().parse_args(argv)
    if not asked.python.exists():
        parser().error(f"{asked.python} is not there: `make venv-vllm` installs vLLM")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines and servers end with it
    rng, rows = random.Random(1), list[dict[str, Any]]()
    options = {**model_options(asked.model, asked.dtype), "max_tokens": 2 * asked.prompt}
    for number in range(asked.starts):
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv", dir="/tmp")))
            sidecar = stack.enter_context(Sidecar(directory, ""))
            sidecar.start()
            transfer = transfer_to("KVStoreConnector", "connectors.vllm", {"address": sidecar.address})
            kinds: dict[str, Any] = {OURS: transfer, PLAIN: None}
            engines = {
                arm: stack.enter_context(Engine(asked.python, {**options, "transfer": kinds[arm]})) for arm in kinds
            }
            for engine in engines.values():
                engine.wait()
            rows += measure(engines, sidecar, number, prompt=asked.prompt, new=asked.new, pairs=asked.pairs, rng=rng)
    summary = summarise(rows)
    print_figures("vllm-down-cpu", summary)
    if asked.json:
        settings = {"model": asked.model, "dtype": asked.dtype, "prompt_tokens": asked.prompt, "new": asked.new}
        write_json(asked.json, "vllm_down", stamp(), rows, {**summary, **settings})
    return 0
