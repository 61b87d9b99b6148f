# SPDX-License-Identifier: Apache-2.0
"""The screen of `kvstore top` shows what the counters say, fits a plain terminal, and obeys its keys."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, ConsoleDimensions

from kvstore.service.top import Sample, Server, draw, duration, fitted, size, tier_names
from kvstore.wire import kvstore_pb2 as pb

SERVER = Server("unix:/run/kvstore/kvstore.sock", "0.1.0", "3f2a9c00" * 4)
BEFORE = {
    "host.hit_blocks": 1000.0,
    "host.missed_blocks": 1000.0,
    "host.blocks": 34_112.0,
    "host.used_bytes": 3.0 * 2**30,
    "host.capacity_bytes": 4.0 * 2**30,
    "host.evicted_blocks": 0.0,
    "save.bytes": 0.0,
    "redis.hit_blocks": 0.0,
    "redis.missed_blocks": 0.0,
    "redis.read_bytes": 0.0,
    "redis.used_bytes": 120.0 * 2**30,
    "redis.available": 1.0,
    "match.requests": 0.0,
    "lease.live": 12.0,
}
NOW = {**BEFORE, "host.hit_blocks": 1900.0, "host.missed_blocks": 1100.0, "save.bytes": 2.4e9, "match.requests": 240.0}


def screen(now: Sample, before: Sample | None = None, fault: str = "", width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(draw(SERVER, now, before, fault))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def row(lines: list[str], name: str) -> str:
    return next(line for line in lines if line.startswith(name))


def test_rates_come_from_the_difference_of_two_looks() -> None:
    lines = screen(Sample(12.0, NOW), Sample(10.0, BEFORE))
    host = row(lines, "host").split()
    assert host == ["host", "██████░░", "3.0/4.0", "GiB", "75%", "34,112", "63.3%", "90.0%", "1.20", "–", "ok"]
    assert row(lines, "matches").split()[:2] == ["matches", "120/s"]
    assert row(lines, "leases").split()[:2] == ["leases", "12"]


def test_one_look_shows_no_rates() -> None:
    text = "\n".join(screen(Sample(12.0, NOW)))
    assert "GB/s" not in text
    assert "63.3%" in text


def test_a_tier_that_is_not_asked_says_so() -> None:
    lines = screen(Sample(12.0, {**NOW, "redis.available": 0.0}), Sample(10.0, BEFORE))
    assert row(lines, "redis").split()[-1] == "DOWN"
    assert row(lines, "host").split()[-1] == "ok"


def test_what_a_tier_that_is_away_held_is_said_to_be_what_was_seen_last() -> None:
    full = {**NOW, "redis.capacity_bytes": 200.0 * 2**30, "redis.available": 0.0}
    assert "last saw 120/200 GiB " in row(screen(Sample(12.0, full)), "redis")
    assert "last saw" not in row(screen(Sample(12.0, {**full, "redis.available": 1.0})), "redis")


def test_a_server_that_began_again_shows_no_negative_rates() -> None:
    lines = screen(Sample(12.0, BEFORE), Sample(10.0, NOW))
    assert row(lines, "matches").split()[1] == "0/s"
    assert "-" not in row(lines, "host").replace("–", "")


def test_the_fault_says_why_figures_are_old() -> None:
    assert any("nobody answers" in line for line in screen(Sample(12.0, NOW), fault="nobody answers"))


def test_nothing_is_cut_in_80_columns() -> None:
    clients = tuple(pb.Client(name=f"vllm-worker-{n}", pid=4000 + n, mapped=n % 2 == 0) for n in range(30))
    full = {"host.used_bytes": 1023.0 * 2**30, "host.capacity_bytes": 1023.0 * 2**30, "host.blocks": 9_999_999.0}
    full |= {"host.missed_blocks": 1000.0, "redis.available": 0.0}
    lines = screen(Sample(12.0, {**NOW, **full}, clients), Sample(10.0, {**BEFORE, "save.bytes": -99e9}))
    assert "100.0%" in row(lines, "host")
    assert "1023/1023 GiB 100%" in row(lines, "host")
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines if "more" not in line)
    assert any("and 10 more" in line for line in lines)


def test_a_clients_name_cannot_write_to_the_terminal() -> None:
    client = pb.Client(name="\x1b[31m[bold]evil\n", pid=1)
    lines = screen(Sample(12.0, NOW, (client,)))
    assert not any("\x1b" in line for line in lines)
    assert any("?[31m[bold]evil?" in line for line in lines)


def test_the_host_comes_first_and_parts_that_are_no_tier_not_at_all() -> None:
    assert tier_names({"redis.available": 1, "mover.queued_bytes": 0, "match.requests": 3}) == ["host", "redis"]


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (4 << 30, "4.0 GiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_for_people(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (150, "2 min"), (7300, "2 h"), (400_000, "5 d")])
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def shown(width: int, height: int, now: Sample, fault: str = "") -> list[str]:
    """What a screen of this size has to show."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(fitted(ConsoleDimensions(width, height), SERVER, now, Sample(10.0, BEFORE), fault))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("fault", ["", "figures are 3 s old: " + "it does not answer, " * 4])
@pytest.mark.parametrize("available", [0.0, 1.0])
@pytest.mark.parametrize("height", range(5, 45))
def test_a_screen_is_never_higher_than_its_terminal(height: int, available: float, fault: str) -> None:
    values = {**NOW, "redis.available": available, "ttft.saved_s": 3.0}
    clients = tuple(pb.Client(name=f"engine {number}", pid=number) for number in range(40))
    lines = shown(80, height, Sample(12.0, values, clients), fault)
    assert len(lines) <= height
    if height < 10:
        assert lines[0].startswith(f"This terminal is 80 x {height}: enlarge it to 80 x")
    if height >= 24:
        assert "… and" in lines[-1]
        assert any(line.startswith("redis does not answer") for line in lines) is (not available)


def test_a_terminal_that_is_too_narrow_is_told_what_is_needed_and_what_else_there_is() -> None:
    text = " ".join(line.strip() for line in shown(60, 24, Sample(12.0, NOW)))
    assert "This terminal is 60 x 24: enlarge it to 80 x 10, or press q and use kvstore status" in text
