# SPDX-License-Identifier: Apache-2.0
"""The offline optimum against exhaustive search, and a replay against counting by hand."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from pathlib import Path

import pytest

from bench.policies import main, measure
from bench.policies_generated import KINDS, generated, names_of
from bench.policies_optimum import optimal_hits
from bench.policies_replay import replay
from bench.policies_trace import make_trace, read_trace
from kvstore.errors import ConfigError
from kvstore.policies import POLICIES


def random_requests(rng: random.Random, count: int) -> list[tuple[int, ...]]:
    """Paths from the root of a small tree; a block's number names its place."""
    numbers: dict[tuple[int, ...], int] = {}
    requests = []
    for _ in range(count):
        path = [rng.randrange(2) for _ in range(rng.randint(1, 3))]
        prefixes = [tuple(path[: at + 1]) for at in range(len(path))]
        requests.append(tuple(numbers.setdefault(prefix, len(numbers)) for prefix in prefixes))
    return requests


def most_hits(requests: list[tuple[int, ...]], capacity: int) -> int:
    """By trying everything: after each request, any blocks of those there and those asked may stay, holes included."""

    @cache
    def best(number: int, kept: frozenset[int]) -> int:
        if number == len(requests):
            return 0
        blocks = requests[number]
        hits = sum(1 for _ in itertools.takewhile(kept.__contains__, blocks))
        there = sorted(kept | set(blocks))
        choices = itertools.combinations(there, min(capacity, len(there)))
        return hits + max(best(number + 1, frozenset(choice)) for choice in choices)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(60))
def test_optimum_equals_exhaustive_search_on_small_trees(seed: int) -> None:
    rng = random.Random(seed)
    requests, capacity = random_requests(rng, 7), rng.randint(1, 5)
    assert sum(optimal_hits(requests, capacity)) == most_hits(requests, capacity)


@pytest.mark.parametrize("name", list(POLICIES))
def test_no_policy_beats_the_optimum_and_all_equal_it_with_room_for_everything(name: str) -> None:
    rng = random.Random(1)
    lines = [(float(at), 512 * len(blocks), blocks) for at, blocks in enumerate(random_requests(rng, 200))]
    trace = make_trace("small", lines, counted_share=1.0)
    blocks = [request.blocks for request in trace.requests]
    for capacity in (1, 3, 6, trace.num_unique):
        policy = POLICIES.load(name)(POLICIES.options(name, {}))
        hits, most = replay(trace, policy, capacity).hit_blocks, sum(optimal_hits(blocks, capacity))
        assert hits <= most
        assert hits == most or capacity < trace.num_unique


def test_a_block_counts_only_where_all_before_it_hit() -> None:
    """Two chats of three blocks in a room of four: what the second leaves of the first is its head, one block."""
    chats = [(0.0, 1, [1, 2, 3]), (1.0, 1, [4, 5, 6]), (2.0, 1, [1, 2, 3])]
    trace = make_trace("two", chats, counted_share=1.0)
    run = replay(trace, POLICIES.load("lru")(None), 4)
    assert (run.hit_blocks, run.asked_blocks) == (1, 9)


def test_only_the_last_half_of_time_counts() -> None:
    trace = make_trace("halves", [(0.0, 1, [1]), (1.0, 1, [1]), (9.0, 1, [1]), (10.0, 1, [1, 2])])
    run = replay(trace, POLICIES.load("lru")(None), 2)
    assert (run.hit_blocks, run.asked_blocks) == (2, 3)


AGAINST = [
    # Kind, capacity in % of its blocks, and the most points below LRU. Without its guard `returns` loses:
    ("loops", 7.0, 0.5),  # 7.2
    ("drift", 2.0, 0.5),  # 1.3
    ("phases", 10.0, 0.5),  # 0.7
    ("lull", 10.0, 0.8),  # 2.9; evicted before it noticed
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "capacity_pct", "most_pts"), AGAINST)
def test_returns_loses_little_to_lru_on_traffic_that_is_against_what_it_learned(
    kind: str, capacity_pct: float, most_pts: float
) -> None:
    _, summary = measure(generated(f"generated:{kind}:11"), ["returns"], [capacity_pct], memory=False)
    assert summary["worst_vs_lru_pts"] >= -most_pts


@pytest.mark.slow
def test_returns_is_above_lru_on_chats() -> None:
    _, summary = measure(generated("generated:chats:11"), ["returns"], [2.0], memory=False)
    assert summary["worst_vs_lru_pts"] > 4


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 3, "hash_ids": [1]}\n{"timestamp": 1}\n')
    with pytest.raises(ConfigError, match=r"bad.jsonl:2: .*each line needs timestamp, input_length and hash_ids"):
        read_trace(path)
    with pytest.raises(ConfigError, match=r"there is no trace .*none.jsonl"):
        read_trace(tmp_path / "none.jsonl")


def test_gap_closed_and_memory_saved_are_none_for_the_baseline_itself() -> None:
    rng = random.Random(2)
    lines = [(float(at), 512, blocks) for at, blocks in enumerate(random_requests(rng, 200))]
    rows, _ = measure(make_trace("small", lines), ["lru"], [50.0])
    assert [row["policy"] for row in rows] == ["optimum", "lru"]
    assert rows[1]["gap_closed_pct"] == rows[1]["memory_saved_pct"] == rows[1]["vs_lru_pts"] == 0


def test_the_command_leaves_figures_and_a_picture(tmp_path: Path) -> None:
    rng = random.Random(3)
    lines = [
        json.dumps({"timestamp": 1000 * at, "input_length": 512, "hash_ids": blocks})
        for at, blocks in enumerate(random_requests(rng, 100))
    ]
    trace, result = tmp_path / "small.jsonl", tmp_path / "result.json"
    trace.write_text("\n".join(lines))
    assert main(["--trace", str(trace), "--capacity", "20,50", "--json", str(result)]) == 0
    summary = json.loads(result.read_text())["summary"]
    assert {"gap_closed_pct_20", "gap_closed_pct_50", "worst_vs_lru_pts", "us_per_block"} <= set(summary)
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_several_traces_have_rows_each_and_one_summary_of_the_worst(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    small = tmp_path / "small.jsonl"
    lines = [{"timestamp": 1000 * at, "input_length": 512, "hash_ids": [at % 7, 100 + at]} for at in range(50)]
    small.write_text("\n".join(map(json.dumps, lines)))
    command = ["--trace", str(small), "--trace", "generated:lull", "--capacity", "10", "--hits-only"]
    assert main([*command, "--policies", "returns", "--json", str(result)]) == 0
    made = json.loads(result.read_text())
    assert {row["trace"] for row in made["rows"]} == {"small", "generated:lull"}
    of_each = [made["summary"][f"worst_vs_lru_pts_{name}"] for name in ("small", "generated:lull")]
    assert made["summary"]["worst_vs_lru_pts"] == min(of_each)


def test_made_up_traffic_is_the_same_for_a_seed_and_another_for_another() -> None:
    first, same, other = (generated(f"generated:flips:{seed}") for seed in (7, 7, 8))
    assert [each.blocks for each in first.requests] == [each.blocks for each in same.requests]
    assert [each.time_s for each in first.requests] == [each.time_s for each in same.requests]
    assert [each.blocks for each in first.requests] != [each.blocks for each in other.requests]
    with pytest.raises(ConfigError, match=r"no traffic is called 'generated:rain': .*agents"):
        generated("generated:rain")
    assert [name.split(":")[1] for name in names_of("generated:all:3")] == list(KINDS)
