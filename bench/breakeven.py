# SPDX-License-Identifier: Apache-2.0
"""Load or compute: TTFT by prompt length and by the speed of the link to Redis, whatever the plan chooses beside both.

Every prompt lies in Redis and nowhere else. Each is served by three connectors: one that always loads, one without a
store, which never does, and one that decides by what it has learnt. Arms take turns within a repeat, in rotating order,
and are compared within it, so that the machine's drift is in all of them. Regret is the plan's TTFT over that of the
better of the other two, which is whichever has the lower median in that cell; a cell's is the median over repeats. The
connector that never loads is served twice in each repeat (not for the longest prompts): what its two servings differ by
is what noise alone gives, as `worst_null_pct`: a regret of this size shows nothing.

Cold start: before each row of the grid, which has one speed, the plan's connector is new. It is then served three
prompts that nobody has and two that are in Redis; nothing else is known to it, and it goes on learning in the cells.

The model is a seeded Llama, small on purpose: it computes a token in about the time in which the slowest link brings
its KV, so that neither choice is right everywhere.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from bench.asked import print_figures
from bench.env import stamp
from bench.models import random_llama
from bench.options import whole
from bench.report import print_table, write_json
from bench.reuse_plots import plot_breakeven
from bench.slow_link import SlowLink
from connectors.base import LoadRule
from connectors.transformers import TransformersConnector
from kvstore.config import StoreConfig
from kvstore.store import KVStore
from kvstore.tiers.valkey import EmbeddedServer

HELP = "load or compute: the plan against always and never, by prompt length and link speed"

SPEEDS_GB_PER_S = (0.05, 0.2, 1.0, 5.0)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
ALWAYS, NEVER, NEVER_AGAIN, PLAN = "always load", "never load", "never load, again", "plan"
ARMS = (ALWAYS, PLAN, NEVER, NEVER_AGAIN)
TARGET_PCT = 5.0
_VOCABULARY = 512
_REVISION = "seed 0"
_NULL_UP_TO = 2048
_FRESH_LENGTHS = (256, 1024, 4096)
_STORED_LENGTHS = (512, 2048)

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Cell:
    """One speed and one length: seconds by arm, repeat by repeat."""

    speed: float
    tokens: int
    seconds: dict[str, list[float]]

    @property
    def better(self) -> str:
        return min((ALWAYS, NEVER), key=lambda arm: statistics.median(self.seconds[arm]))

    def over_pct(self, arm: str, base: str) -> list[float]:
        """Of each repeat, how much longer `arm` took."""
        return [100 * (a / b - 1) for a, b in zip(self.seconds[arm], self.seconds[base], strict=True)]


class Grid:
    """The engine, the stores and the link, for one run."""

    def __init__(self, model: PreTrainedModel, link: SlowLink, store: KVStore, rng: np.random.Generator) -> None:
        self._model = model
        self._link = link
        self._store = store
        self._rng = rng
        self._never = self._connector(None, LoadRule.MEASURED)
        self._always = self._connector(store, LoadRule.ALWAYS)
        self._arms: dict[str, TransformersConnector] = {}
        self.rows: list[Row] = []

    def _connector(self, store: KVStore | None, rule: LoadRule) -> TransformersConnector:
        return TransformersConnector(
            self._model,
            store,
            revision=_REVISION,
            load_rule=rule,
            chunk_tokens=2 * max(LENGTHS),
        )

    def prompt(self, num_tokens: int) -> torch.Tensor:
        # One token more than whole blocks: what always has to be computed is the same at every length.
        return torch.from_numpy(self._rng.integers(1, _VOCABULARY, (1, num_tokens + 1)))

    def serve(self, arm: str, prompt: torch.Tensor) -> tuple[float, int, int]:
        """(TTFT, tokens reused, the first token); the host is empty before."""
        self._store.flush(30)
        self._store.drop_host()
        done = self._arms[arm].generate(prompt, max_new_tokens=1)
        return done.ttft_s, sum(done.hit_tokens.values()), int(done.sequences[0, -1])

    def begin_row(self, speed: float, stored: dict[int, torch.Tensor]) -> None:
        self._link.bytes_per_s = speed * 1e9
        plan = self._connector(self._store, LoadRule.MEASURED)
        self._arms = {ALWAYS: self._always, PLAN: plan, NEVER: self._never, NEVER_AGAIN: self._never}
        for tokens in _FRESH_LENGTHS:
            self.serve(PLAN, self.prompt(tokens))
        for tokens in _STORED_LENGTHS:
            self.serve(PLAN, stored[tokens])

    def cell(self, speed: float, prompt: torch.Tensor, repeats: int) -> Cell:
        tokens = prompt.shape[1] - 1
        arms = ARMS if tokens <= _NULL_UP_TO else ARMS[:-1]
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for repeat in range(repeats):
            at = repeat % len(arms)
            firsts = {}
            for arm in (*arms[at:], *arms[:at]):
                ttft_s, reused, firsts[arm] = self.serve(arm, prompt)
                seconds[arm].append(ttft_s)
                row = {"gb_per_s": speed, "tokens": tokens, "arm": arm, "repeat": repeat, "ttft_s": ttft_s}
                self.rows.append({**row, "reused": reused})
            for row in self.rows[-len(arms) :]:
                row["equal"] = firsts[str(row["arm"])] == firsts[NEVER]
        return Cell(speed, tokens, seconds)


def measure(lengths: tuple[int, ...], speeds: tuple[float, ...], repeats: int, seed: int) -> tuple[list[Cell], Grid]:
    """Short prompts get up to three times as many repeats: their noise is larger and they cost nothing."""
    model = random_llama(
        0, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=64, vocab_size=_VOCABULARY, max_tokens=2 * max(LENGTHS)
    )
    host = {"capacity_bytes": 1 << 30}
    with EmbeddedServer() as server, SlowLink(server.url.removeprefix("unix://")) as link:
        redis = {"url": link.url, "capacity_bytes": 3 << 30}
        reading = StoreConfig.load(
            {
                "host": host,
                "tiers": {"redis": redis},
                "mover": {"write": "on_evict"},
                "request": {"read_deadline_s": 60.0},
            }
        )
        with KVStore(reading) as store, Progress(auto_refresh=False) as progress:
            rng = np.random.default_rng(seed)
            grid = Grid(model, link, store, rng)
            stored = {tokens: grid.prompt(tokens) for tokens in {*lengths, *_STORED_LENGTHS}}
            _write_down(
                model,
                stored,
                StoreConfig.load({"host": host, "tiers": {"redis": redis}, "mover": {"write": "through"}}),
            )
            cells: list[Cell] = []
            task = progress.add_task("cells", total=len(speeds) * len(lengths))
            for speed in speeds:
                grid.begin_row(speed, stored)
                for tokens in lengths:
                    times = repeats if tokens > 2048 else 2 * repeats if tokens > 512 else 3 * repeats
                    cells.append(grid.cell(speed, stored[tokens], times))
                    progress.update(task, advance=1, refresh=True)
    return cells, grid


def _write_down(model: PreTrainedModel, stored: dict[int, torch.Tensor], config: StoreConfig) -> None:
    with KVStore(config) as store:
        connector = TransformersConnector(model, store, revision=_REVISION)
        for prompt in stored.values():
            connector.generate(prompt, max_new_tokens=1)
        if not store.flush(60):
            raise RuntimeError("the prompts were not written to Redis in a minute")


def interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, from order statistics: about √n ranks to each side."""
    ordered = sorted(values)
    reach, middle = 0.98 * len(ordered) ** 0.5, (len(ordered) - 1) / 2
    return ordered[max(0, int(middle - reach))], ordered[min(len(ordered) - 1, int(middle + reach + 1))]


def summarise(cells: list[Cell], grid: Grid) -> tuple[list[Row], dict[str, float | bool | str]]:
    table: list[Row] = []
    for cell in cells:
        regrets = cell.over_pct(PLAN, cell.better)
        low, high = interval(regrets)
        loads = [
            row
            for row in grid.rows
            if row["arm"] == PLAN and (row["gb_per_s"], row["tokens"]) == (cell.speed, cell.tokens)
        ]
        table.append(
            {
                "GB/s": cell.speed,
                "tokens": cell.tokens,
                "always_s": statistics.median(cell.seconds[ALWAYS]),
                "never_s": statistics.median(cell.seconds[NEVER]),
                "plan_s": statistics.median(cell.seconds[PLAN]),
                "plan loads": sum(bool(row["reused"]) for row in loads) / len(loads),
                "regret_pct": statistics.median(regrets),
                "low": low,
                "high": high,
                "null_pct": statistics.median(cell.over_pct(NEVER_AGAIN, NEVER))
                if NEVER_AGAIN in cell.seconds
                else None,
            }
        )
    worst = max(table, key=lambda row: float(str(row["regret_pct"])))
    return table, {
        "worst_regret_pct": float(str(worst["regret_pct"])),
        "worst_cell": f"{worst['GB/s']} GB/s, {worst['tokens']} tokens",
        "worst_null_pct": max(abs(float(str(row["null_pct"]))) for row in table if row["null_pct"] is not None),
        "cells_over_target": sum(float(str(row["regret_pct"])) > TARGET_PCT for row in table),
        "cells_surely_over_target": sum(float(str(row["low"])) > TARGET_PCT for row in table),
        "cells": len(table),
        "outputs_equal": all(bool(row["equal"]) for row in grid.rows),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench ttft --scenario breakeven",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=["transformers"], default="transformers")
    parser.add_argument("--repeats", type=whole(1, 100), default=5, help="of the longest prompts (default: 5)")
    parser.add_argument("--longest", type=whole(128, max(LENGTHS)), default=max(LENGTHS), help="tokens (default: 8192)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write {name, env, rows, summary}, and a plot beside it"
    )
    options = parser.parse_args(argv)
    lengths = tuple(tokens for tokens in LENGTHS if tokens <= options.longest)
    cells, grid = measure(lengths, SPEEDS_GB_PER_S, options.repeats, options.seed)
    table, summary = summarise(cells, grid)
    print_table("Load or compute", table, list(table[0]))
    print_figures("breakeven-cpu", summary)
    if options.json:
        write_json(options.json, "breakeven", stamp(), [*table, *grid.rows], {**summary, "seed": options.seed})
        plot_breakeven(table, options.json.with_suffix(".png"))
        print(f"written: {options.json}")
    return 0
