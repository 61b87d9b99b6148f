# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves behind: percentiles, tables, a JSON file and a page to look at.

The JSON file is the record; tables, figures and the page only show it. Units are in
the names: a key that ends in ``_s`` holds seconds, one that names bytes holds bytes.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.env import stamp
from bench.record import Row as Row
from bench.record import Scalar as Scalar
from bench.record import percentiles as percentiles
from bench.record import write_json as write_json
from bench.record import write_text


class TtftRow(TypedDict):
    """One request of one arm. ``hit_tokens`` counts the prompt's tokens by serving tier."""

    arm: str
    turn: int
    user: int
    ttft_s: float
    prompt_tokens: int
    hit_tokens: dict[str, int]
    bytes_moved: int
    equal: bool  # the output is the one that the uncached run gave


# --- tables ----------------------------------------------------------------------


def shown(key: str, value: object) -> str:
    """Return value as text for people, in the unit that its key names."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case Mapping():
            return ", ".join(f"{k} {shown(str(k), v)}" for k, v in value.items()) or "-"
        case np.generic():
            return shown(key, value.item())
        case int() | float() if key.endswith("_s") and not key.endswith("_per_s"):
            return seconds(value)
        case int() | float() if "bytes" in key and not key.endswith("_per_s"):
            return _bytes(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


def seconds(value: float) -> str:
    """Return a duration with the unit that suits it, three digits long."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{_three(value / size)} {unit}"
    return f"{_three(value * 1e9)} ns" if value else "0 s"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{_three(value / size)} {unit}"
    return f"{value:.0f} B"


def _three(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


_FILE_COLUMNS = 200
"""Of a table that goes to a file or a pipe, which says no width."""


def print_table(title: str, rows: Sequence[Row], columns: Sequence[str], console: Console | None = None) -> None:
    """Print rows as a text table with the given columns; a missing cell shows a dash.

    Where the console is narrow, texts go on in the next line; nothing is cut off. In a file, lines are as long as they
    need be.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        numeric = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*(shown(column, row.get(column)) for column in columns))
    (console or Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS)).print(table)


def conclude(name: str, title: str, rows: Sequence[Row], summary: Mapping[str, float], path: Path | None) -> None:
    """Print all rows of a result and its figures, and write its file where there is to be one."""
    print_table(title, rows, list(rows[0]))
    for key, value in summary.items():
        print(f"{key}: {value:.2f}")
    if path is not None:
        write_json(path, name, stamp(), rows, dict(summary))
        print(f"result: {path}")


# --- plots -----------------------------------------------------------------------

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_TIER_COLOURS = {
    "device": "#1B4F72",
    "host": "#2E86C1",
    "redis": "#E67E22",
    "disk": "#8E6C8A",
    "remote": "#B7950B",
}
_RECOMPUTED = "#E3E6E8"
# Any, because matplotlib types the keys as its own list of names.
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9AA3AB",
    "axes.labelcolor": "#30383F",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "grid.color": "#E6E9EC",
    "grid.linewidth": 0.8,
    "xtick.color": "#56606A",
    "ytick.color": "#56606A",
    "legend.frameon": False,
    # Fixed, so that the same rows give the same bytes.
    "svg.hashsalt": "kvstore",
}
_DOTS: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "alpha": 0.35, "markeredgewidth": 0}
_LINE: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 6.5, "markeredgecolor": "white"}


def _arms(rows: Sequence[TtftRow]) -> list[str]:
    """List the arms in the order of their first rows."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def plot_ttft_by_turn(rows: Sequence[TtftRow]) -> Figure:
    """Draw TTFT over turns: a dot for each request, a line through each arm's medians."""
    arms = _arms(rows)
    turns = sorted({row["turn"] for row in rows})
    # Arms stand side by side, so that dots of one do not hide those of another.
    step = 0.5 / max(len(arms), 1)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, arm in enumerate(arms):
            colour = _ARM_COLOURS[number % len(_ARM_COLOURS)]
            shift = (number - (len(arms) - 1) / 2) * step
            mine = [row for row in rows if row["arm"] == arm]
            axes.plot([row["turn"] + shift for row in mine], [row["ttft_s"] for row in mine], color=colour, **_DOTS)
            medians = _medians(mine)
            axes.plot([turn + shift for turn in medians], list(medians.values()), color=colour, label=arm, **_LINE)
        axes.set_xticks(turns)
        axes.set_xlabel("turn of the conversation")
        axes.set_ylabel("time to first token")
        axes.grid(axis="y")
        _seconds_axis(axes)
        figure.legend(loc="outside upper left", ncols=min(len(arms), 5) or 1)
    return figure


def _medians(rows: Sequence[TtftRow]) -> dict[int, float]:
    turns = sorted({row["turn"] for row in rows})
    return {turn: percentiles(row["ttft_s"] for row in rows if row["turn"] == turn)["p50"] for turn in turns}


def _seconds_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot_hits_by_tier(rows: Sequence[TtftRow]) -> Figure:
    """Draw, arm by arm, where a prompt's tokens came from, with the median TTFT on top."""
    arms = _arms(rows)
    tiers = list(dict.fromkeys(tier for row in rows for tier in row["hit_tokens"]))
    tiers = [*(tier for tier in _TIER_COLOURS if tier in tiers), *(tier for tier in tiers if tier not in _TIER_COLOURS)]
    lines = -(-len(arms) // 4) or 1
    columns = -(-len(arms) // lines) or 1
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 0.6 + 2.9 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(arms) :]:
            axes.set_axis_off()
        for axes, arm in zip(grid.flat, arms, strict=False):
            _stack(axes, [row for row in rows if row["arm"] == arm], tiers)
            axes.set_title(arm, loc="left")
        for axes in grid[:, 0]:
            axes.set_ylabel("tokens of a prompt (mean)")
            axes.yaxis.set_major_formatter("{x:,.0f}")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels) or 1)
    return figure


def _stack(axes: Axes, rows: Sequence[TtftRow], tiers: Sequence[str]) -> None:
    """Draw one arm: a bar for each turn, tiers from the fastest up, recomputed on top."""
    medians = _medians(rows)
    turns = list(medians)
    by_turn = [[row for row in rows if row["turn"] == turn] for turn in turns]
    bottom = np.zeros(len(turns))
    spare = [colour for colour in _ARM_COLOURS if colour not in _TIER_COLOURS.values()]
    for number, tier in enumerate(tiers):
        mean = [np.mean([row["hit_tokens"].get(tier, 0) for row in of]) for of in by_turn]
        colour = _TIER_COLOURS.get(tier, spare[number % len(spare)])
        axes.bar(turns, mean, 0.72, bottom=bottom, color=colour, label=tier)
        bottom = bottom + np.array(mean)
    total = np.array([np.mean([row["prompt_tokens"] for row in of]) for of in by_turn])
    axes.bar(turns, total - bottom, 0.72, bottom=bottom, color=_RECOMPUTED, label="recomputed")
    upright = len(turns) > 4
    for turn, height in zip(turns, total, strict=True):
        axes.annotate(
            seconds(medians[turn]),
            (turn, height),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="#30383F",
            rotation=90 if upright else 0,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    axes.margins(y=0.25 if upright else 0.12)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("turn")
    axes.grid(axis="y")


# --- the page --------------------------------------------------------------------

_CSS = """
:root{--ink:#1d2429;--soft:#5b6670;--line:#e3e7ea;--good:#0b7a4b;--bad:#b3261e}
*{box-sizing:border-box}
body{margin:0;background:#f6f7f8;color:var(--ink);font:15px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:960px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:27px;line-height:1.25;margin:0 0 10px;letter-spacing:-.01em}
h2{font-size:17px;margin:36px 0 12px}
p.intro{max-width:72ch;margin:0;color:#38424a}
.card{background:#fff;border:1px solid var(--line);border-radius:10px;padding:6px 18px;
overflow-x:auto}
figure{margin:0 0 18px;padding:18px}figure img{display:block;width:100%;height:auto}
figcaption{color:var(--soft);font-size:13.5px;margin-top:10px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:8px 12px 8px 0;border-bottom:1px solid var(--line);
vertical-align:top}
tr:last-child>td{border-bottom:0}th{color:var(--soft);font-weight:600;font-size:12.5px}
.n{text-align:right;white-space:nowrap}.v{font-weight:600;white-space:nowrap}
.tag{font-weight:600;white-space:nowrap}.met{color:var(--good)}.missed{color:var(--bad)}
details{margin-top:14px}summary{cursor:pointer;padding:10px 0;font-weight:600}
.env td:first-child{color:var(--soft);white-space:nowrap;width:1%;padding-right:24px}
.env td{overflow-wrap:anywhere}
"""


def html_page(
    path: Path | str,
    title: str,
    intro: str,
    summary: Sequence[tuple[str, Scalar, str, bool | None]],
    figures: Sequence[tuple[str, Figure]],
    rows: Sequence[Row],
    columns: Sequence[str],
    env: Mapping[str, Scalar],
) -> None:
    """Write one HTML file that needs no other: findings, figures, rows and environment.

    A finding is (name, value, target, met); met is None where there is no target.
    """
    results = "".join(_finding(*finding) for finding in summary)
    drawn = "".join(_drawing(caption, figure) for caption, figure in figures)
    stamp = "".join(_cells([key, shown(key, value)]) for key, value in env.items())
    body = (
        f"<h1>{_text(title)}</h1><p class=intro>{_text(intro)}</p>"
        "<h2>Findings</h2><div class=card><table><tr><th>Figure<th>Measured<th>Target<th></tr>"
        f"{results}</table></div><h2>Figures</h2>{drawn}<h2>Record</h2>"
        f"<details class=card><summary>Rows ({len(rows)})</summary>"
        f"{_rows_table(rows, columns)}</details>"
        "<details class=card open><summary>Environment</summary>"
        f"<table class=env>{stamp}</table></details>"
    )
    write_text(
        Path(path),
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_CSS}</style></head>"
        f"<body><main>{body}</main></body></html>\n",
    )


def _finding(name: str, value: Scalar, target: str, met: bool | None) -> str:
    mark = {True: ("met", "✓ met"), False: ("missed", "✗ not met"), None: ("", "")}[met]
    return (
        f"<tr><td>{_text(name)}<td class=v>{_text(shown(name, value))}<td>{_text(target)}"
        f'<td class="tag {mark[0]}">{mark[1]}</tr>'
    )


def _drawing(caption: str, figure: Figure) -> str:
    # As an image rather than inline: two figures' ids would otherwise meet in one page.
    drawn = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    data = base64.b64encode(drawn.getvalue()).decode("ascii")
    return (
        f'<figure class=card><img alt="{_text(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _rows_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    numeric = [any(isinstance(row.get(c), int | float) for row in rows) for c in columns]
    kinds = [" class=n" if is_number else "" for is_number in numeric]
    head = "".join(f"<th{kind}>{_text(c)}" for c, kind in zip(columns, kinds, strict=True))
    body = "".join(_cells([shown(c, row.get(c)) for c in columns], kinds) for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cells(texts: Sequence[str], kinds: Sequence[str] | None = None) -> str:
    kinds = kinds if kinds is not None else [""] * len(texts)
    cells = (f"<td{kind}>{_text(text)}" for text, kind in zip(texts, kinds, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
