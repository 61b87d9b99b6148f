# SPDX-License-Identifier: Apache-2.0
"""What the pages say of the results is what the results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import figures
from bench.asked import RESULTS_ASKED, Asked, Result


def test_the_pages_are_those_that_the_committed_results_give() -> None:
    assert (figures.RESULTS / "README.md").read_text(encoding="utf-8") == figures.page()
    readme = figures.README.read_text(encoding="utf-8")
    assert readme == figures.with_table(readme)


def test_every_committed_result_is_on_the_page() -> None:
    stems = {path.stem for path in figures.RESULTS.glob("*.json")}
    assert stems <= {result.stem for result in RESULTS_ASKED}


def test_every_command_in_the_readme_names_a_benchmark() -> None:
    from bench.__main__ import benchmarks

    named = re.findall(r"python -m bench (\w+)", figures.README.read_text(encoding="utf-8"))
    assert named
    assert set(named) <= set(benchmarks())


@pytest.mark.parametrize(
    ("asked", "value", "met"),
    [
        (">= 0.85", 0.85, True),
        (">= 0.85", 0.8499, False),
        ("<= 5", 5.01, False),
        ("> 1", 1.0, False),
        ("== 0", 0, True),
        ("== 0", 1, False),
        ("yes", True, True),
        ("yes", False, False),
        ("", 3.0, None),
        (">= 0.85", None, None),
    ],
)
def test_a_figure_is_met_where_it_keeps_its_bound(asked: str, value: object, met: bool | None) -> None:
    assert Asked("figure", "text", asked).met(value) is met


def test_a_bound_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="asks '~ 3'"):
        Asked("figure", "text", "~ 3").met(2.0)


def test_what_misses_its_bound_is_called_so_whatever_it_rounds_to(tmp_path: Path) -> None:
    result = Result("x", "X", (Asked("ratio", "a ratio", ">= 0.85", "", "a ratio"),))
    (line,) = figures.lines(result, {"ratio": 0.8499})
    assert "0.85 |" in line
    assert "**not met**" in line


def test_a_result_that_lost_a_figure_is_an_error() -> None:
    with pytest.raises(KeyError):
        list(figures.lines(RESULTS_ASKED[0], {}))


def test_a_figure_of_which_nothing_was_asked_may_be_newer_than_the_run() -> None:
    result = Result("x", "X", (Asked("old", "an old one", "<= 5", "%"), Asked("new", "a new one", "", "%")))
    assert [line.split(" | ")[2] for line in figures.lines(result, {"old": 8.8})] == ["8.80 %", "not measured"]


def test_a_readme_without_a_place_for_the_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no place"):
        figures.with_table("# kvstore\n")


def test_a_result_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    record = {
        "name": "faults",
        "env": {
            "command": "python -m bench faults",
            "utc": "2026-01-02",
            "commit": "0" * 40,
            "dirty": True,
            "cpu": "X",
        },
        "rows": [],
        "summary": {
            figure.key: 0 for result in RESULTS_ASKED if result.stem == "faults-cpu" for figure in result.figures
        },
    }
    record["env"]["usable_cores"] = 2  # type: ignore[index]
    (tmp_path / "faults-cpu.json").write_text(json.dumps(record))
    page = figures.page(tmp_path)
    assert page.count("\n## ") == 1
    assert "with changes not committed" in page
    drawn = figures.headlines(tmp_path)
    assert "Of 10 figures asked, 9 are met, 1 are not" in drawn
    assert drawn.count("**not met**") == 1, "what fell short stands there too"
