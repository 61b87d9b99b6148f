# SPDX-License-Identifier: Apache-2.0
"""Eviction policies on a trace of requests: hit rate beside LRU's and beside the most that was possible.

The trace goes through the real policies in a real pool (`bench/policies_replay.py`), cold at its beginning; what is
counted is the last half of time. Parameters of policies are to be chosen on the first. A capacity is a share of all
blocks that the trace names. Of several traces each has its rows, and `worst_vs_lru_pts` is over all.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.env import stamp
from bench.policies_generated import PREFIX, generated, names_of
from bench.policies_optimum import optimal_hits
from bench.policies_replay import Replay, replay
from bench.policies_trace import Trace, read_trace
from bench.report import print_table, write_json
from kvstore.errors import ConfigError
from kvstore.policies import POLICIES

HELP = "hit rate of each eviction policy on a trace, beside the offline optimum"

LEARNED = "returns"
BASELINE = "lru"
BELOW = (0.35, 0.5, 0.7, 0.85)  # of each capacity, where a policy may be as good as LRU is there

Row = dict[str, str | int | float | bool | None]


def capacities(text: str) -> list[float]:
    """For `type=`: percentages, such as 1,2,5."""
    try:
        found = sorted({float(each) for each in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < each <= 100 for each in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of percentages: give such as 1,2,5,10,20")
    return found


def policy_names(text: str) -> list[str]:
    """For `type=`: names in POLICIES."""
    names = text.split(",")
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"no policy is called {name!r}; known: {', '.join(POLICIES)}")
    return names


class Curves:
    """Replays of one trace, each done once."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._done: dict[tuple[str, int], Replay] = {}

    def blocks(self, capacity_pct: float) -> int:
        return max(1, round(self.trace.num_unique * capacity_pct / 100))

    def at(self, name: str, capacity_pct: float) -> Replay:
        key = name, self.blocks(capacity_pct)
        if key not in self._done:
            made = POLICIES.load(name)(POLICIES.options(name, {}))
            self._done[key] = replay(self.trace, made, key[1])
        return self._done[key]

    def optimum_pct(self, capacity_pct: float) -> float:
        """Hit rate of the optimum over the whole trace, of the part that is counted."""
        hits = optimal_hits([request.blocks for request in self.trace.requests], self.blocks(capacity_pct))
        counted = sum(found for found, each in zip(hits, self.trace.requests, strict=True) if self.trace.counted(each))
        return 100 * counted / self.trace.num_counted_blocks

    def memory_saved_pct(self, name: str, capacity_pct: float) -> float:
        """How much less memory gives a policy LRU's hit rate at a capacity, between capacities tried; below 0: none."""
        wanted = self.at(BASELINE, capacity_pct).hit_pct
        shares = [*BELOW, 1.0]
        rates = np.maximum.accumulate([self.at(name, capacity_pct * share).hit_pct for share in shares])
        if rates[-1] < wanted:
            return 0.0
        return 100 * (1 - float(np.interp(wanted, rates, shares)))


def measure(
    trace: Trace, names: Sequence[str], capacities_pct: Sequence[float], *, memory: bool = True
) -> tuple[list[Row], dict[str, float]]:
    """A row for each capacity and policy, and the figures of the learned one; `memory`: with the memory it saves."""
    curves, rows = Curves(trace), []
    summary: dict[str, float] = {}
    for capacity_pct in capacities_pct:
        best_pct, base = curves.optimum_pct(capacity_pct), curves.at(BASELINE, capacity_pct)
        rows.append(_row(capacity_pct, curves.blocks(capacity_pct), "optimum", best_pct))
        for name in dict.fromkeys((BASELINE, *names)):
            run = curves.at(name, capacity_pct)
            row = _row(capacity_pct, curves.blocks(capacity_pct), name, run.hit_pct)
            gap = best_pct - base.hit_pct
            row["gap_closed_pct"] = 100 * (run.hit_pct - base.hit_pct) / gap if gap > 0 else 0.0
            row["vs_lru_pts"] = run.hit_pct - base.hit_pct
            if memory and name in (BASELINE, LEARNED):  # four replays more
                row["memory_saved_pct"] = 0.0 if name == BASELINE else curves.memory_saved_pct(name, capacity_pct)
            row["us_per_block"] = run.us_per_block
            rows.append(row)
            if name == LEARNED:
                summary[f"gap_closed_pct_{capacity_pct:g}"] = _number(row, "gap_closed_pct")
                if memory:
                    summary[f"memory_saved_pct_{capacity_pct:g}"] = _number(row, "memory_saved_pct")
    own = [row for row in rows if row["policy"] == LEARNED]
    if own:
        summary["worst_vs_lru_pts"] = min(_number(row, "vs_lru_pts") for row in own)
        summary["us_per_block"] = max(_number(row, "us_per_block") for row in own)
    return rows, summary


def _row(capacity_pct: float, num_blocks: int, name: str, hit_pct: float) -> Row:
    return {"capacity_pct": capacity_pct, "capacity_blocks": num_blocks, "policy": name, "hit_pct": hit_pct}


def _number(row: Mapping[str, object], key: str) -> float:
    value = row[key]
    assert isinstance(value, int | float), f"{key} is {value!r}"
    return float(value)


def measure_all(
    traces: Sequence[Trace], names: Sequence[str], capacities_pct: Sequence[float], *, memory: bool = True
) -> tuple[dict[str, list[Row]], dict[str, float]]:
    """Rows by trace, and figures: of one trace its own; of several, the worst over all and of each."""
    rows: dict[str, list[Row]] = {}
    summaries: dict[str, dict[str, float]] = {}
    for trace in traces:
        made, summaries[trace.name] = measure(trace, names, capacities_pct, memory=memory)
        rows[trace.name] = [{"trace": trace.name, **row} for row in made]
    found = [each for each in summaries.values() if each]
    if len(traces) == 1 or not found:
        return rows, found[0] if found else {}
    summary = {"worst_vs_lru_pts": min(each["worst_vs_lru_pts"] for each in found)}
    summary["us_per_block"] = max(each["us_per_block"] for each in found)
    summary |= {f"worst_vs_lru_pts_{name}": each["worst_vs_lru_pts"] for name, each in summaries.items()}
    return rows, summary


def draw(rows: Mapping[str, Sequence[Row]]) -> Figure:
    """Hit rate over capacity by trace: the room between LRU and the optimum, and what each policy makes of it."""
    across = min(3, len(rows))
    down = -(-len(rows) // across)
    figure = Figure(figsize=(8 if across == 1 else 5 * across, 5 if down == 1 else 4 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for axes, (name, own) in zip(grid, rows.items(), strict=False):
        _draw_one(axes, name, own)
    for axes in grid[len(rows) :]:
        axes.set_axis_off()
    return figure


def _draw_one(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    title = f"{name}: last half of time"
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(str(row["policy"]), []).append((_number(row, "capacity_pct"), _number(row, "hit_pct")))
    same = [policy for policy, points in curves.items() if points == curves[BASELINE]]
    for policy, points in curves.items():
        if policy in same and policy != BASELINE:
            continue  # it would hide the baseline: `priority` is LRU where nobody states one
        style = {"optimum": ("#30383F", "--", 1.5), BASELINE: ("#30383F", "-", 1.5), LEARNED: ("#0B7A4B", "-", 2.5)}
        color, line, width = style.get(policy, (None, "-", 1.2))
        label = ", ".join(same) if policy == BASELINE else policy
        axes.plot(*zip(*points, strict=True), line, color=color, linewidth=width, marker="o", markersize=4, label=label)
    base, best = dict(curves[BASELINE]), dict(curves["optimum"])
    axes.fill_between(list(base), list(base.values()), [best[each] for each in base], color="#30383F", alpha=0.06)
    axes.set_xscale("log")
    ticks = sorted(base)
    axes.set_xticks(ticks, [f"{each:g}" for each in ticks])
    axes.minorticks_off()
    axes.set_xlabel("capacity, % of the trace's unique blocks")
    axes.set_ylabel("hit rate, % of asked blocks")
    axes.set_title(title, loc="left")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)


def traces_of(names: Sequence[str]) -> list[Trace]:
    """Traces by file or made-up name. Raises OSError and ConfigError."""
    wanted = [each for name in names for each in names_of(name)]
    return [generated(name) if name.startswith(PREFIX) else read_trace(Path(name)) for name in wanted]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench policies", description=__doc__)
    trace_help = "requests, one JSON object a line; or generated:KIND, such as generated:agents or generated:all"
    parser.add_argument("--trace", metavar="FILE", action="append", required=True, help=f"{trace_help}; repeatable")
    parser.add_argument(
        "--capacity", metavar="PCT,…", type=capacities, default=[1.0, 2.0, 5.0, 10.0, 20.0], help="default: 1,2,5,10,20"
    )
    parser.add_argument("--policies", metavar="NAME,…", type=policy_names, default=list(POLICIES), help="default: all")
    parser.add_argument("--hits-only", action="store_true", help="leave the memory saved out: a fifth of the time")
    parser.add_argument("--json", metavar="FILE", type=Path, help="the result; its plot lies beside it as .png")
    options = parser.parse_args(argv)
    try:
        traces = traces_of(options.trace)
    except (OSError, ConfigError) as error:
        parser.error(str(error))
    rows, summary = measure_all(traces, options.policies, options.capacity, memory=not options.hits_only)
    columns = ["capacity_pct", "policy", "hit_pct", "gap_closed_pct", "vs_lru_pts", "memory_saved_pct", "us_per_block"]
    for name, own in rows.items():
        print_table(f"Policies on {name}, last half of time", own, columns)
    for key, value in summary.items():
        print(f"{key}: {value:.2f}")
    if options.json:
        write_json(options.json, "policies", stamp(), [row for own in rows.values() for row in own], dict(summary))
        picture = options.json.with_suffix(".png")
        draw(rows).savefig(picture, dpi=120)
        print(f"result: {options.json}, plot: {picture}")
    return 0
