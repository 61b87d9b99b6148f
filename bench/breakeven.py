# SPDX-License-Identifier: Apache-2.0
"""Load or compute: TTFT by prompt length and by the speed of the link to Redis, whatever the plan chooses beside both.

Every prompt lies in Redis and nowhere else. Each is served by three connectors: one that always loads, one without a
store, which never does, and one that decides by what it has learnt. Regret is the plan's TTFT over that of the better
of the other two in the same round, whichever has the lower median in the cell. After a few rounds the one that is
clearly worse is left out, and what it took goes into more rounds of the others; a cell gets rounds until its seconds
are used up. The better one is served twice in each round, as another connector of its own: what its two servings differ
by is what the method gives for no difference at all. Arms come in an order of their own in each round, by the seed:
each disturbs the one after it, and in turns it would always be the same one.

A cell's figure is the Hodges-Lehmann estimate over its rounds' ratios (the median of all pairs' geometric means), with
the 95 % interval that belongs to it, of the signed rank test (`bench.paired`): as good as blind to a few disturbed
rounds like a median, with less noise. Since it is blind to what happens seldom, such as tries of a slow tier, the mean
is beside it.

Cold start: before each row of the grid, which has one speed, the plan's connector is new. It is then served three
prompts that nobody has and two that are in Redis; nothing else is known to it, and it goes on learning in the cells.

The model is a seeded Llama, small on purpose: it computes a token in about the time in which the slowest link brings
its KV, so that neither choice is right everywhere.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from bench.asked import print_figures
from bench.env import stamp
from bench.models import random_llama
from bench.options import listed, whole
from bench.paired import estimate
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
ALWAYS, NEVER, PLAN, AGAIN = "always load", "never load", "plan", "the better one, again"
TARGET_PCT = 5.0
_LEAST_ROUNDS = 8
_FIRST_ROUNDS = 3
_SHOWN = ["GB/s", "tokens", "always_s", "never_s", "plan_s", "rounds", "regret_pct", "low", "high", "mean_pct"]
_SHOWN += ["null_pct"]
_CLEARLY = 1.25  # times as long in all of the first rounds: no further ones are needed to see which is better
_VOCABULARY = 512
_REVISION = "seed 0"
_FRESH_LENGTHS = (256, 1024, 4096)
_STORED_LENGTHS = (512, 2048)

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Cell:
    """One speed and one length: seconds by arm and round. Arms that were left out have fewer rounds."""

    speed: float
    tokens: int
    seconds: dict[str, dict[int, float]]
    again_of: str
    """The arm that AGAIN repeats: the better one of the first rounds."""

    def median_s(self, arm: str) -> float:
        return statistics.median(self.seconds[arm].values())

    @property
    def better(self) -> str:
        """The better one of the fixed arms: of all rounds where both went on, else the one that went on."""
        if len(self.seconds[ALWAYS]) != len(self.seconds[NEVER]):
            return self.again_of
        return min((ALWAYS, NEVER), key=self.median_s)

    def log_ratios(self, arm: str, base: str) -> list[float]:
        """Of each round that has both, the logarithm of `arm` over `base`."""
        return [math.log(arm_s / base_s) for arm_s, base_s in self._rounds(arm, base)]

    def mean_pct(self, arm: str, base: str) -> float:
        """How much more time `arm` took than `base` in all the rounds that have both."""
        rounds = self._rounds(arm, base)
        return 100 * (sum(arm_s for arm_s, _ in rounds) / sum(base_s for _, base_s in rounds) - 1)

    def _rounds(self, arm: str, base: str) -> list[tuple[float, float]]:
        theirs = self.seconds[base]
        return [(arm_s, theirs[at]) for at, arm_s in self.seconds[arm].items() if at in theirs]


class Grid:
    """The engine, the stores and the link, for one run."""

    def __init__(self, model: PreTrainedModel, link: SlowLink, store: KVStore, rng: np.random.Generator) -> None:
        self._model = model
        self._link = link
        self._store = store
        self._rng = rng
        self._fixed = {
            ALWAYS: [self._connector(store, LoadRule.ALWAYS) for _ in range(2)],
            NEVER: [self._connector(None, LoadRule.MEASURED) for _ in range(2)],
        }
        self._arms: dict[str, TransformersConnector] = {}
        self.rows: list[Row] = []

    def _connector(self, store: KVStore | None, rule: LoadRule) -> TransformersConnector:
        return TransformersConnector(
            self._model,
            store,
            revision=_REVISION,
            load_rule=rule,
            chunk_tokens=2 * max(LENGTHS),
            resident_conversations=0,  # each request loads or computes
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

    def warm_up(self, longest: torch.Tensor) -> None:
        """Let the fixed arms take the memory they need: fresh from the system it is slower than a fast link."""
        self._arms = {f"{arm} {number}": each for arm, both in self._fixed.items() for number, each in enumerate(both)}
        for arm in self._arms:
            self.serve(arm, longest)

    def begin_row(self, speed: float, stored: dict[int, torch.Tensor]) -> None:
        self._link.bytes_per_s = speed * 1e9
        plan = self._connector(self._store, LoadRule.MEASURED)
        self._arms = {ALWAYS: self._fixed[ALWAYS][0], NEVER: self._fixed[NEVER][0], PLAN: plan}
        for tokens in _FRESH_LENGTHS:
            self.serve(PLAN, self.prompt(tokens))
        for tokens in _STORED_LENGTHS:
            self.serve(PLAN, stored[tokens])

    def cell(self, speed: float, prompt: torch.Tensor, cell_s: float) -> Cell:
        """Rounds for `cell_s` seconds, and a few at least."""
        self.serve(PLAN, prompt)  # it is new, and takes memory
        began_s, expected = time.monotonic(), -1
        seconds: dict[str, dict[int, float]] = {ALWAYS: {}, NEVER: {}, PLAN: {}, AGAIN: {}}
        arms, again_of = [ALWAYS, NEVER, PLAN], ""
        for at in itertools.count():
            if at == _FIRST_ROUNDS:
                again_of, arms = self._go_on_with(seconds)
            if at >= _LEAST_ROUNDS and time.monotonic() - began_s > cell_s:
                break
            firsts: dict[str, int] = {}
            for arm in self._rng.permutation(arms).tolist():
                seconds[arm][at], reused, firsts[arm] = self.serve(arm, prompt)
                row = {"gb_per_s": speed, "tokens": prompt.shape[1] - 1, "arm": arm, "round": at}
                self.rows.append({**row, "ttft_s": seconds[arm][at], "reused": reused})
            expected = firsts.get(NEVER, expected)
            for row in self.rows[-len(arms) :]:
                row["equal"] = firsts[str(row["arm"])] == expected
        return Cell(speed, prompt.shape[1] - 1, seconds, again_of)

    def _go_on_with(self, seconds: dict[str, dict[int, float]]) -> tuple[str, list[str]]:
        """The better of the fixed arms so far, and the arms of further rounds."""
        better, worse = sorted((ALWAYS, NEVER), key=lambda arm: statistics.median(seconds[arm].values()))
        self._arms[AGAIN] = self._fixed[better][1]
        if min(seconds[worse].values()) > _CLEARLY * max(seconds[better].values()):
            return better, [better, PLAN, AGAIN]
        return better, [ALWAYS, NEVER, PLAN, AGAIN]


def measure(lengths: tuple[int, ...], speeds: tuple[float, ...], cell_s: float, seed: int) -> tuple[list[Cell], Grid]:
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
            grid.warm_up(stored[max(stored)])
            cells: list[Cell] = []
            task = progress.add_task("cells", total=len(speeds) * len(lengths))
            for speed in speeds:
                grid.begin_row(speed, stored)
                for tokens in lengths:
                    cells.append(grid.cell(speed, stored[tokens], cell_s))
                    progress.update(task, advance=1, refresh=True)
    return cells, grid


def _write_down(model: PreTrainedModel, stored: dict[int, torch.Tensor], config: StoreConfig) -> None:
    with KVStore(config) as store:
        connector = TransformersConnector(model, store, revision=_REVISION)
        for prompt in stored.values():
            connector.generate(prompt, max_new_tokens=1)
        if not store.flush(60):
            raise RuntimeError("the prompts were not written to Redis in a minute")


def summarise(cells: list[Cell], grid: Grid) -> tuple[list[Row], dict[str, float | bool | str]]:
    table: list[Row] = []
    for cell in cells:
        place = (cell.speed, cell.tokens)
        loads = [row for row in grid.rows if row["arm"] == PLAN and (row["gb_per_s"], row["tokens"]) == place]
        regret_pct, low, high = estimate(cell.log_ratios(PLAN, cell.better))
        null_pct, null_low, null_high = estimate(cell.log_ratios(AGAIN, cell.again_of))
        table.append(
            {
                "GB/s": cell.speed,
                "tokens": cell.tokens,
                "always_s": cell.median_s(ALWAYS),
                "never_s": cell.median_s(NEVER),
                "plan_s": cell.median_s(PLAN),
                "better": cell.better,
                "rounds": len(cell.seconds[PLAN]),
                "plan loads": sum(bool(row["reused"]) for row in loads) / len(loads),
                "regret_pct": regret_pct,
                "low": low,
                "high": high,
                "mean_pct": cell.mean_pct(PLAN, cell.better),
                "null_pct": null_pct,
                "null_low": null_low,
                "null_high": null_high,
                "null_mean_pct": cell.mean_pct(AGAIN, cell.again_of),
            }
        )
    worst = max(table, key=lambda row: float(str(row["regret_pct"])))

    def column(key: str) -> list[float]:
        return [float(str(row[key])) for row in table]

    return table, {
        "worst_regret_pct": float(str(worst["regret_pct"])),
        "worst_cell": f"{worst['GB/s']} GB/s, {worst['tokens']} tokens",
        "worst_mean_regret_pct": max(column("mean_pct")),
        "worst_null_pct": max(map(abs, column("null_pct"))),
        "worst_null_mean_pct": max(map(abs, column("null_mean_pct"))),
        "widest_interval_pts": max(high - low for low, high in zip(column("low"), column("high"), strict=True)),
        "cells_over_target": sum(regret_pct > TARGET_PCT for regret_pct in column("regret_pct")),
        "cells_surely_over_target": sum(low > TARGET_PCT for low in column("low")),
        "cells": len(table),
        "outputs_equal": all(bool(row["equal"]) for row in grid.rows),
    }


def samples(rows: Iterable[Row]) -> list[Row]:
    """What is kept of the requests: by cell and arm the TTFT of each round, in a hundredth of a millisecond.

    An arm's rounds follow each other. A row a request took 1.4 MB, and nothing in a figure needs more than this.
    """
    kept: dict[tuple[object, ...], Row] = {}
    times: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        place = (row["gb_per_s"], row["tokens"], row["arm"])
        if place not in kept:
            times[place] = []
            kept[place] = {"gb_per_s": place[0], "tokens": place[1], "arm": place[2], "first_round": row["round"]}
            kept[place] |= {"rounds_loaded": 0, "equal": True, "ttft_ms": times[place]}
        times[place].append(round(1e3 * float(str(row["ttft_s"])), 2))
        kept[place]["rounds_loaded"] = int(str(kept[place]["rounds_loaded"])) + bool(row["reused"])
        kept[place]["equal"] = bool(kept[place]["equal"] and row["equal"])
    return list(kept.values())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench ttft --scenario breakeven",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=["transformers"], default="transformers")
    parser.add_argument("--cell-s", type=whole(1, 3600), default=15, help="seconds a cell, at least (default: 15)")
    parser.add_argument("--tokens", type=listed(int, LENGTHS), default=LENGTHS, help="prompts (default: all)")
    parser.add_argument("--speeds", type=listed(float, SPEEDS_GB_PER_S), default=SPEEDS_GB_PER_S, help="GB/s")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write {name, env, rows, summary}, and a plot beside it"
    )
    options = parser.parse_args(argv)
    cells, grid = measure(options.tokens, options.speeds, options.cell_s, options.seed)
    table, summary = summarise(cells, grid)
    print_table("Load or compute", table, _SHOWN)
    print_figures("breakeven-cpu", summary)
    if options.json:
        write_json(options.json, "breakeven", stamp(), [*table, *samples(grid.rows)], {**summary, "seed": options.seed})
        plot_breakeven(table, options.json.with_suffix(".png"))
        print(f"written: {options.json}")
    return 0
