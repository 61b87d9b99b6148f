# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves behind: its figures, its JSON, its page, and the stamp of where it ran."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from rich.console import Console

from bench import __main__ as dispatch
from bench import env, report
from bench.report import TtftRow


def row(arm: str, turn: int, ttft_s: float, hits: dict[str, int] | None = None, user: int = 0) -> TtftRow:
    return TtftRow(
        arm=arm,
        turn=turn,
        user=user,
        ttft_s=ttft_s,
        prompt_tokens=1000,
        hit_tokens=hits or {},
        bytes_moved=0,
        equal=True,
    )


ROWS = [
    row("none", 1, 4.0),
    row("none", 2, 5.0),
    row("store", 1, 4.0, {"host": 0}),
    row("store", 2, 0.5, {"redis": 200, "host": 600}),
    row("store", 2, 0.7, {"device": 800}, user=1),
]


# ---- percentiles ----


def test_percentiles_are_values_that_were_measured() -> None:
    figures = report.percentiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert figures == {"p50": 3.0, "p90": 5.0, "p99": 5.0, "max": 5.0, "count": 5}


@pytest.mark.parametrize("share", [50, 90, 99])
def test_a_percentile_is_the_smallest_value_that_covers_its_share(share: int) -> None:
    for count in range(1, 250):
        values = list(range(1, count + 1))
        covering = min(value for value in values if 100 * value >= share * count)
        assert report.percentiles(values)[f"p{share}"] == covering


def test_percentiles_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        report.percentiles([])


# ---- the record ----


def test_the_json_has_name_env_rows_and_summary_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results" / "ttft.json"
    measured = {"count": np.int64(3), "each": np.array([1, 2])}
    report.write_json(path, "ttft", {"cores": 2}, [*ROWS, measured], {"p50_s": np.float64(0.5), "equal": True})
    record = json.loads(path.read_text())
    assert list(record) == ["name", "env", "rows", "summary"]
    assert record["rows"] == [*ROWS, {"count": 3, "each": [1, 2]}]
    assert record["summary"] == {"p50_s": 0.5, "equal": True}


def test_a_summary_that_is_not_flat_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="summary\\['p'\\] is a dict"):
        report.write_json(tmp_path / "r.json", "r", {}, [], {"p": {"p50": 1}})  # type: ignore[dict-item]


def test_a_result_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    report.write_json(path, "old", {}, [], {})
    with pytest.raises(ValueError, match="JSON compliant"):
        report.write_json(path, "new", {}, [{"ttft_s": float("nan")}], {})
    assert json.loads(path.read_text())["name"] == "old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_values_without_a_place_in_json_are_refused_rather_than_turned_into_text(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object has no place"):
        report.write_json(tmp_path / "r.json", "r", {}, [{"x": object()}], {})


# ---- tables ----


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("ttft_s", 1.234, "1.23 s"),
        ("ttft_s", 0.0456, "45.6 ms"),
        ("ttft_s", 0.25, "250 ms"),
        ("ttft_s", 3.2e-6, "3.2 µs"),
        ("ttft_s", 5e-9, "5 ns"),
        ("ttft_s", 0, "0 s"),
        ("bytes_moved", 3 * 2**20, "3 MiB"),
        ("bytes_moved", 12, "12 B"),
        ("gib_per_s", 1.5, "1.5"),
        ("bytes_per_s", 2048, "2,048"),
        ("prompt_tokens", 12345, "12,345"),
        ("share", 0.123456, "0.1235"),
        ("equal", False, "no"),
        ("hit_tokens", {"host": 64, "redis": 1024}, "host 64, redis 1,024"),
        ("hit_tokens", {}, "-"),
        ("torch_threads", None, "-"),
        ("arm", "none", "none"),
    ],
)
def test_a_value_is_shown_in_the_unit_that_its_name_says(key: str, value: object, text: str) -> None:
    assert report.shown(key, value) == text


def test_a_table_shows_the_columns_asked_for_and_a_dash_for_a_missing_cell() -> None:
    console = Console(file=io.StringIO(), width=100)
    report.print_table("Tiers", [{"tier": "host", "p50_s": 0.5}, {"tier": "redis"}], ["tier", "p50_s"], console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert "Tiers" in lines[0]
    assert any(re.search(r"host\s.*500 ms", line) for line in lines)
    assert any(re.search(r"redis\s.* -\s", line) for line in lines)


# ---- plots ----


def test_ttft_is_drawn_on_a_log_axis_with_each_arms_medians() -> None:
    [axes] = report.plot_ttft_by_turn(ROWS).axes
    assert axes.get_yscale() == "log"
    medians = {str(line.get_label()): list(np.asarray(line.get_ydata())) for line in axes.get_lines()}
    assert medians["none"] == [4.0, 5.0]
    assert medians["store"] == [4.0, 0.5]


def test_bars_stack_the_mean_hits_of_each_tier_up_to_the_prompt() -> None:
    none, store = report.plot_hits_by_tier(ROWS).axes
    assert _heights(none)["recomputed"] == [1000, 1000]
    assert _heights(store) == {
        "device": [0, 400],
        "host": [0, 300],
        "redis": [0, 100],
        "recomputed": [1000, 200],
    }
    # In the second turn device holds the first 400, host the next 300, and so on up.
    assert [bars[1].get_y() for bars in store.containers] == [0, 400, 700, 800]
    assert [text.get_text() for text in store.texts] == ["4 s", "500 ms"]


def test_tiers_nobody_foresaw_get_colours_of_their_own() -> None:
    rows = [row("store", 1, 1.0, {"host": 100, "tape": 100, "clay": 100})]
    [axes] = report.plot_hits_by_tier(rows).axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len({to_hex(bar.get_facecolor()) for bar in bars}) == 4


@pytest.mark.parametrize("arms", [1, 4, 5, 9])
def test_every_arm_gets_its_panel(arms: int) -> None:
    figure = report.plot_hits_by_tier([row(f"arm {number}", 1, 1.0) for number in range(arms)])
    titled = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titled == [f"arm {number}" for number in range(arms)]


def _heights(axes: object) -> dict[str, list[float]]:
    containers = axes.containers  # type: ignore[attr-defined]
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in containers}


# ---- the page ----


class _Page(HTMLParser):
    """What a reader of a page sees, and what a browser would fetch for it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(path: Path) -> _Page:
    report.html_page(
        path,
        title="Time to <first> token",
        intro="What it is & what it shows.",
        summary=[
            ("ttft_p50_s", 0.5, "< 1 s", True),
            ("overhead", 0.2, "< 0.1", False),
            ("requests", 5, "", None),
        ],
        figures=[("By turn", report.plot_ttft_by_turn(ROWS)), ("By tier", report.plot_hits_by_tier(ROWS))],
        rows=ROWS,
        columns=["arm", "ttft_s", "hit_tokens"],
        env={"cpu": "<script>alert(1)</script>"},
    )
    parsed = _Page()
    parsed.feed(path.read_text(encoding="utf-8"))
    return parsed


def test_a_page_needs_no_other_file(tmp_path: Path) -> None:
    sources = page(tmp_path / "page.html").sources
    assert len(sources) == 2
    for source in sources:
        head, data = source.split(",", 1)
        assert head == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)


def test_a_page_says_what_was_met_and_what_was_not(tmp_path: Path) -> None:
    words = page(tmp_path / "page.html").words
    after = {name: words[words.index(name) + 1 : words.index(name) + 4] for name in ("ttft_p50_s", "overhead")}
    assert after["ttft_p50_s"] == ["500 ms", "< 1 s", "✓ met"]
    assert after["overhead"] == ["0.2", "< 0.1", "✗ not met"]
    assert words[words.index("requests") + 1] == "5"
    assert words.count("✓ met") == words.count("✗ not met") == 1


def test_a_page_shows_all_rows_in_the_columns_asked_for(tmp_path: Path) -> None:
    words = page(tmp_path / "page.html").words
    assert words.count("store") == 3
    assert "redis 200, host 600" in words
    assert "prompt_tokens" not in words


def test_text_in_a_page_is_text_and_not_markup(tmp_path: Path) -> None:
    seen = page(tmp_path / "page.html")
    assert "script" not in seen.tags
    assert "<script>alert(1)</script>" in seen.words
    assert "Time to <first> token" in seen.words


def test_the_same_rows_give_the_same_page(tmp_path: Path) -> None:
    page(tmp_path / "one.html")
    page(tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


# ---- the stamp ----


def test_a_stamp_is_flat_and_names_what_it_ran_on() -> None:
    stamped = env.stamp(["python", "-m", "bench", "ttft"])
    assert all(isinstance(value, str | int | float | None) for value in stamped.values())
    assert stamped["command"] == "python -m bench ttft"
    assert stamped["python"] == ".".join(map(str, sys.version_info[:3]))
    assert stamped["numpy"] == np.__version__
    assert stamped["cores"] == os.cpu_count()
    assert str(stamped["utc"]).endswith("+00:00")


def test_a_stamp_names_no_host_and_no_home() -> None:
    text = json.dumps(env.stamp())
    assert str(Path.home()) + "/" not in text
    assert str(Path.cwd()) not in text
    assert os.uname().nodename not in text.replace("localhost", "")


def test_a_stamp_imports_nothing_heavy() -> None:
    code = "import sys; from bench import env; s = env.stamp(); print(s['torch_threads'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "False"]


def test_the_commit_is_the_one_checked_out_and_dirty_where_a_tracked_file_differs(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    assert env.commit_of(tmp_path) == (None, None)
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    (tmp_path / "untracked").write_text("")
    assert env.commit_of(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("two")
    assert env.commit_of(tmp_path) == (git("rev-parse", "HEAD"), True)


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/someone/venv/results.json", ".../results.json"),
        ("--json=/home/someone/results.json", "--json=.../results.json"),
        ("~/results.json", ".../results.json"),
        ("../elsewhere/results.json", ".../results.json"),
        ("bench/results/ttft.json", "bench/results/ttft.json"),
        ("redis://user:secret@cache.internal:6379/0?password=secret", "redis://HOST:6379"),
        ("--url=redis://localhost:6379", "--url=redis://localhost:6379"),
        ("redis://127.0.0.1:70000000", "URL"),
        ("unix:///run/user/0/redis.sock", "unix://.../redis.sock"),
        ("--users=8", "--users=8"),
        ("8", "8"),
    ],
)
def test_a_command_line_keeps_no_places_and_no_secrets(word: str, shown: str) -> None:
    assert env.command_line(["/opt/venv/bin/python", "-m", "bench", word]) == f"python -m bench {shown}"


def test_a_path_below_the_working_directory_becomes_relative() -> None:
    inside = str(Path.cwd() / "bench" / "results" / "ttft.json")
    assert env.command_line(["python", inside]) == "python bench/results/ttft.json"


# ---- python -m bench ----


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('HELP = "does this"', "does this"),
        ('import nowhere\nHELP: str = "does that"', "does that"),
        ("HELP = 3", None),
        ("def main() -> None:\n    HELP = 'hidden'", None),
    ],
)
def test_a_benchmarks_help_is_read_without_importing_it(tmp_path: Path, source: str, line: str | None) -> None:
    (tmp_path / "sample.py").write_text(source)
    assert dispatch.help_line(tmp_path / "sample.py") == line


def test_every_benchmark_is_listed_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.main([]) == 0
    printed = capsys.readouterr().out
    for name, line in dispatch.benchmarks().items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", printed, re.MULTILINE)


def test_modules_that_only_serve_benchmarks_are_not_listed() -> None:
    assert not {"models", "workload", "report", "env"} & set(dispatch.benchmarks())


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        dispatch.main(["nonesuch"])
    assert exit_.value.code == 2
    assert "no benchmark is called 'nonesuch'" in capsys.readouterr().err


def test_a_table_of_the_demo_loses_nothing_in_eighty_columns() -> None:
    row = {
        "arm": "store, redis cold",
        "turn": 3,
        "requests": 12,
        "prompt": 12345,
        "from": "host 1008, redis 12288, computed elsewhere 16",
        "TTFT p50": "12.345 s",
        "max": "112.345 s",
        "equal": True,
    }
    console = Console(width=80, file=io.StringIO())
    report.print_table("Time to first token", [row], list(row), console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "…" not in printed
    for word in (*row, "12,345", "12288", "elsewhere", "12.345 s", "112.345 s", "yes"):
        assert word in printed
