# SPDX-License-Identifier: Apache-2.0
"""The committed results beside what was asked of them, as pages of Markdown.

``bench/results/*.json`` is the record and `bench.asked` what each figure means. ``bench/results/README.md`` and the
table in the project's README are drawn from the two, so no page can say what no run gave: a test draws them again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

from bench.asked import RESULTS_ASKED, Result, number
from bench.record import write_text

HELP = "the committed results beside what was asked of them: draws bench/results/README.md and the README's table"

RESULTS = Path(__file__).parent / "results"
README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- drawn by `python -m bench figures --write` -->\n", "<!-- end of what is drawn -->\n"


class Record(TypedDict):
    """What `write_json` wrote, as far as it is used here."""

    env: dict[str, str]
    summary: dict[str, object]


def lines(result: Result, summary: Mapping[str, object], *, headlines: bool = False) -> Iterator[str]:
    """The rows of a table. Raises KeyError where the result lacks a figure of which something was asked.

    Another may be newer than the run, and then was not measured.
    """
    for figure in result.figures:
        if headlines and not figure.headline:
            continue
        value = summary[figure.key] if figure.asked else summary.get(figure.key)
        unit = f" {figure.unit}" if figure.unit else ""
        met = figure.met(value)
        verdict = {None: "", True: "met", False: _NOT_MET}[met]
        measured = number(value) + (unit if value is not None else "")
        text = figure.headline if headlines else figure.text
        yield f"| {text} | `{figure.key}` | {measured} | {figure.bound or '–'} | {verdict} |"


_NOT_MET = "**not met**"
HEAD = "| | figure | measured | asked | |\n|---|---|---|---|---|\n"


def page(results: Path = RESULTS) -> str:
    """All committed results as one page."""
    text = "# Results\n\n" + BEGIN + "\n"
    for result in RESULTS_ASKED:
        record = _record(results, result.stem)
        if record is None:
            continue
        env = record["env"]
        text += f"## {result.title}\n\n`{env['command']}`, {env['utc'][:10]}, at {env['commit'][:9]}"
        text += " with changes not committed" if env["dirty"] else ""
        text += f"; {env['cpu']}, {env['usable_cores']} cores. [{result.stem}.json]({result.stem}.json)\n\n"
        text += f"{result.remark}\n\n" if result.remark else ""
        if (results / f"{result.stem}.png").exists():
            text += f"![plot]({result.stem}.png)\n\n"
        text += HEAD + "\n".join(lines(result, record["summary"])) + "\n\n"
    return text.rstrip("\n") + "\n"


def headlines(results: Path = RESULTS) -> str:
    """The tables of the project's README: the headlines, how many figures in all were met, and each that was not."""
    rows: list[str] = []
    failures: list[str] = []
    verdicts: list[bool | None] = []
    for result in RESULTS_ASKED:
        record = _record(results, result.stem)
        if record is None:
            continue
        rows += lines(result, record["summary"], headlines=True)
        whole = lines(result, record["summary"])
        failures += [f"| {result.title}: {row[2:]}" for row in whole if row.endswith(f"{_NOT_MET} |")]
        verdicts += [figure.met(record["summary"][figure.key]) for figure in result.figures if figure.asked]
    met, missed, unknown = (verdicts.count(verdict) for verdict in (True, False, None))
    closing = f"Of {len(verdicts)} figures asked, {met} are met, {missed} are not, {unknown} are not measured"
    text = f"{HEAD}{chr(10).join(rows)}\n\n{closing}: [bench/results](bench/results/README.md) has all of them.\n"
    return f"{text}\n{HEAD}{chr(10).join(failures)}\n" if failures else text


def with_table(readme: str, results: Path = RESULTS) -> str:
    """The README with its table drawn anew. Raises ValueError where it has no place for one."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the README has no place for the table")
    return f"{before}{BEGIN}\n{headlines(results)}\n{END}{after}"


def _record(results: Path, stem: str) -> Record | None:
    path = results / f"{stem}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the pages instead of printing the table")
    asked = parser.parse_args(argv)
    if asked.write:
        write_text(RESULTS / "README.md", page())
        write_text(README, with_table(README.read_text(encoding="utf-8")))
    else:
        print(headlines(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
