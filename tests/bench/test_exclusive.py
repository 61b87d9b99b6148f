# SPDX-License-Identifier: Apache-2.0
"""Two tiers in a replay, counted by hand."""

from __future__ import annotations

import pytest

from bench.exclusive import COOLED, ENDS, EXCLUSIVE, INCLUSIVE, MODES, compare, replay, summarise
from bench.policies_trace import Trace, make_trace


def trace_of(*prompts: list[int]) -> Trace:
    return make_trace("hand", [(float(at), 512 * len(blocks), blocks) for at, blocks in enumerate(prompts)], 1.0)


A, B = [1, 2, 3], [11, 12, 13]


@pytest.mark.parametrize(("mode", "hits"), [(INCLUSIVE, 3), (COOLED, 3), (ENDS, 3), (EXCLUSIVE, 3)])
def test_what_left_the_host_is_found_below_once_it_is_asked_again(mode: str, hits: int) -> None:
    row = replay(trace_of(A, B, A), "lru", (50.0, 50.0), mode)  # three blocks each
    assert row["hit_pct"] == pytest.approx(100 * hits / 9)


def test_two_tiers_that_share_nothing_hold_as_much_as_both() -> None:
    by_mode = {mode: replay(trace_of(A, B, A, B, A, B), "lru", (50.0, 50.0), mode) for mode in MODES}
    assert len({row["hit_pct"] for row in by_mode.values()}) == 1
    assert by_mode[EXCLUSIVE]["found_alone_pct"] == 100.0


def test_an_end_below_of_a_head_above_is_not_found_alone_where_tiers_share_nothing() -> None:
    branches = trace_of([1, 2], [1, 3], [1, 4], [1, 5])  # two blocks above, of which 1 is always one
    assert replay(branches, "lru", (40.0, 80.0), EXCLUSIVE)["found_alone_pct"] == 0.0
    for mode in (INCLUSIVE, COOLED, ENDS):
        assert replay(branches, "lru", (40.0, 80.0), mode)["found_alone_pct"] == 100.0


def test_the_summary_compares_with_inclusive_tiers_of_the_same_sizes() -> None:
    rows = compare(trace_of(A, B, A, B, A, B), ("lru",), ((50.0, 50.0), (50.0, 100.0)))
    summary = summarise(rows)
    assert summary["gained_pts_exclusive"] == summary["gained_pts_ends"] == 0.0
    assert summary["found_alone_pct_ends"] == 100.0
    assert summary["more_written_pct_exclusive"] > 0.0


def test_what_came_up_goes_first_below_but_nothing_that_another_chain_hangs_from() -> None:
    shared = trace_of([1, 2, 3], [1, 5, 6], [7, 8, 9], [1, 2, 3], [7, 8, 9], [1, 5, 6])
    row = replay(shared, "lru", (35.0, 75.0), COOLED)  # three blocks above, six below
    assert row["found_alone_pct"] == 100.0
