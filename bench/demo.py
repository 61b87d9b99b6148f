# SPDX-License-Identifier: Apache-2.0
"""A short form of `ttft`: what the store does, on a real model, in a few minutes."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.report import TtftRow, print_table
from bench.ttft import BASE, Settings, alone, asked, compared, reused, run, write

HELP = "a short form of ttft: the store at work on a real model in a few minutes"

SHORT = Settings(
    users=2,
    turns=3,
    documents=1,
    doc_tokens=1000,
    zero_requests=4,
    max_new_tokens=6,
    min_reused=900,
    device_bytes=64 << 20,
)
_ARMS = {
    BASE: "computed anew",
    "store down": "computed, Redis dead",
    "redis": "from Redis",
    "host": "from host memory",
    "device": "small device cache",
    "device+host": "the same, over the host",
    "device, unlimited": "all kept on the device",
}
"""In the order in which they are shown: what is furthest away first."""
_NOISE = 1.1
"""Two runs of the same thing differ by a tenth or so on a machine that does nothing else."""
_COMPUTING = (BASE, "store down")
"""They do the same: by as much as they differ, others may by chance."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench demo", description=HELP)
    parser.add_argument("--html", default="build/demo.html", metavar="FILE", help="the report (default: %(default)s)")
    parser.add_argument("--json", default="build/demo.json", metavar="FILE", help="the result (default: %(default)s)")
    parser.add_argument(
        "--log", default="build/demo.log", metavar="FILE", help="the store's log (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    Path(options.log).parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("kvstore").addHandler(logging.FileHandler(options.log, mode="w"))
    print("This takes about 5 minutes on two cores.")
    print(f"{SHORT.users} users, {SHORT.turns} turns each, SmolLM2-135M in fp32; every arm serves every request.")
    print("The second user's first turn finds what the first one's had in common with it:")
    print("system prompt and document.")
    print(f"One arm has a dead Redis, and says so in {options.log}.")
    rows, summary = run(SHORT)
    show(reused(rows))
    for line in in_words(rows):
        print(line)
    # It has shorter prefixes than the full run and a handful of requests: nothing to judge by.
    findings: list[tuple[str, object, str, bool | None]] = [
        (key, summary[key], f"the full run asks {figure.bound}", None) for key, figure in asked().items()
    ]
    write("demo", rows, summary, findings, options.json, options.html)
    return 0


def show(rows: Sequence[TtftRow]) -> None:
    """A row an arm, a column a turn, in 80 columns."""
    last = max(row["turn"] for row in rows)
    table: list[dict[str, object]] = []
    for arm, what in _ARMS.items():
        line: dict[str, object] = {"prefix": what}
        for turn in range(1, last + 1):
            low, high = _best_s(rows, arm, turn), max(_times_s(rows, arm, turn))
            line[f"turn {turn}"] = f"{_shown(low)}–{_shown(high)}"
        line[f"turn {last}, at best"] = _against(_best_s(rows, BASE, last) / _best_s(rows, arm, last))
        table.append(line)
    table[0][f"turn {last}, at best"] = "–"
    num = len(_times_s(rows, BASE, last))
    print_table(f"Seconds to the first token, best and worst of {num} requests", table, list(table[0]))


def _shown(seconds: float) -> str:
    return f"{seconds:.{0 if seconds >= 100 else 1 if seconds >= 10 else 2}f}"


def in_words(rows: Sequence[TtftRow]) -> Iterator[str]:
    """What so few requests allow to say."""
    chats, zero = reused(rows), alone(rows)
    found = compared(zero, "store")
    num_alone = len({(row["user"], row["turn"]) for row in zero})
    yield f"Where {num_alone} prompts shared nothing, the store changed the time to the first token by"
    yield f"{found.low_pct:+.0f} to {found.high_pct:+.0f} %."
    yield f"Two arms that compute all the same differ by up to {noise_of(chats):.1f} times: less than"
    yield "that is noise in any of these. `python -m bench ttft` serves more."
    same = all(row["equal"] for row in rows)
    yield f"Outputs {'all equal' if same else 'DIFFER from'} those computed without a store."
    yield verdict(chats)


def noise_of(rows: Sequence[TtftRow]) -> float:
    """By how many times requests differ here that do the same work, at their best; a tenth at least."""
    last = max(row["turn"] for row in rows)
    pairs = [sorted(_best_s(rows, arm, turn) for arm in _COMPUTING) for turn in range(2, last + 1)]
    return max(_NOISE, *(slow / fast for fast, slow in pairs))


def verdict(rows: Sequence[TtftRow]) -> str:
    """Whether it paid here, by the best request of each turn: one that the machine held up says nothing."""
    said = [f"from {where} {_paid(rows, arm)}" for arm, where in (("host", "host memory"), ("redis", "Redis"))]
    return "On this machine: " + ",\n".join(said) + "."


def _paid(rows: Sequence[TtftRow], arm: str) -> str:
    """From which turn on all came sooner than computed, by more than noise. In the first most find nothing."""
    noise, last = noise_of(rows), max(row["turn"] for row in rows)
    ratios = {turn: _best_s(rows, BASE, turn) / _best_s(rows, arm, turn) for turn in range(2, last + 1)}
    for turn in ratios:
        if all(ratios[later] > noise for later in range(turn, last + 1)):
            return f"it paid from turn {turn} on"
    return "it did not pay" if ratios[last] < 1 / noise else "there was no difference beyond noise"


def _against(ratio: float) -> str:
    if 1 / _NOISE <= ratio <= _NOISE:
        return "as long"
    return f"{ratio:.1f} times sooner" if ratio > 1 else f"{1 / ratio:.1f} times later"


def _times_s(rows: Sequence[TtftRow], arm: str, turn: int) -> list[float]:
    return [row["ttft_s"] for row in rows if (row["arm"], row["turn"]) == (arm, turn)]


def _best_s(rows: Sequence[TtftRow], arm: str, turn: int) -> float:
    return min(_times_s(rows, arm, turn))
