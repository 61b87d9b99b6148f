# SPDX-License-Identifier: Apache-2.0
"""Pictures of the benchmarks of early reuse, of load or compute, and of block sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

_BLUE, _ORANGE, _GREEN, _PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_COLOURS = (_ORANGE, _BLUE, _GREEN, _PINK)

Rows = Sequence[Mapping[str, object]]


def _number(value: object) -> float:
    return float(str(value))


def _of(rows: Rows, key: str) -> list[float]:
    return [_number(row[key]) for row in rows]


def plot_breakeven(table: Rows, path: Path) -> None:
    """A panel for each speed: medians of the arms by prompt length, and the plan's regret below."""
    speeds = list(dict.fromkeys(_of(table, "GB/s")))
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(3.1 * len(speeds), 5.6), layout="constrained")
        axes = figure.subplots(2, len(speeds), sharex=True, sharey="row", height_ratios=(2, 1), squeeze=False)
        for column, speed in enumerate(speeds):
            rows = [row for row in table if row["GB/s"] == speed]
            lengths = _of(rows, "tokens")
            above, below = axes[0][column], axes[1][column]
            for key, name, colour, style in (
                ("always_s", "always load", _ORANGE, "--"),
                ("never_s", "never load", _BLUE, "--"),
                ("plan_s", "plan", _GREEN, "-"),
            ):
                above.loglog(lengths, _of(rows, key), style, color=colour, label=name, linewidth=1.8)
            above.set_title(f"{speed:g} GB/s", loc="left", fontweight="bold")
            above.grid(color="#E6E9EC")
            regrets, lows, highs = (_of(rows, key) for key in ("regret_pct", "low", "high"))
            reach = [
                [r - low for r, low in zip(regrets, lows, strict=True)],
                [h - r for r, h in zip(regrets, highs, strict=True)],
            ]
            below.errorbar(lengths, regrets, yerr=reach, fmt="o", color=_GREEN, ecolor="#9AA3AB", markersize=4)
            below.axhline(5, color=_ORANGE, linewidth=1, linestyle=":")
            below.axhline(0, color="#9AA3AB", linewidth=0.8)
            below.set_xlabel("prompt tokens")
            below.xaxis.set_major_locator(FixedLocator(lengths))
            below.xaxis.set_minor_locator(NullLocator())
            below.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        axes[0][0].set_ylabel("TTFT, seconds (median)")
        axes[1][0].set_ylabel("plan over the\nbetter arm, %")
        axes[0][0].legend(frameon=False)
        figure.savefig(path, dpi=130)


def plot_burst(rows: Rows, path: Path) -> None:
    """Each user's TTFT in order of arrival, by arm; a dot is a request."""
    arms = list(dict.fromkeys(str(row["arm"]) for row in rows))
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for number, arm in enumerate(arms):
            mine = [row for row in rows if row["arm"] == arm]
            users = [_number(row["user"]) + 1 + 0.12 * (number - 1) for row in mine]
            seconds = _of(mine, "ttft_s")
            mean = sum(seconds) / len(seconds)
            axes.plot(users, seconds, "o", color=_COLOURS[number], markersize=4, label=f"{arm}: mean {mean:.1f} s")
            axes.axhline(mean, color=_COLOURS[number], linewidth=0.8, linestyle=":")
        axes.set_xlabel("user, by arrival")
        axes.set_ylabel("seconds from arrival to first token")
        axes.set_ylim(0)
        axes.grid(axis="y", color="#E6E9EC")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=130)


def plot_blocks(table: Rows, path: Path) -> None:
    """Share of reusable tokens that were reused, bytes stored and TTFT, by block size and way."""
    ways = list(dict.fromkeys(str(row["way"]) for row in table))
    panels = (
        ("hit_pct", 1.0, "reused, % of what could be"),
        ("saved_bytes", 2.0**-20, "stored, MiB"),
        ("ttft_s", 1e3, "TTFT where something is reusable, ms (median)"),
    )
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        for axes, (key, scale, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for number, way in enumerate(ways):
                mine = [row for row in table if row["way"] == way]
                sizes = _of(mine, "block")
                values = [value * scale for value in _of(mine, key)]
                axes.plot(sizes, values, "o-", color=_COLOURS[number], markersize=4, label=way)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_xlabel("tokens a block")
            axes.set_title(title, loc="left", fontsize=9)
            axes.grid(color="#E6E9EC")
        figure.axes[0].legend(frameon=False)
        figure.savefig(path, dpi=130)
