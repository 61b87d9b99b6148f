# SPDX-License-Identifier: Apache-2.0
"""The replay of the shared tier's policies: its order, and what it says of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.policies_trace import Trace, make_trace
from bench.shared import exact_lru
from bench.standing import Order, compare, replay, summarise
from kvstore.policies.standing import STANDINGS


def chats(num_requests: int, seed: int) -> Trace:
    """Of conversations that share a first block and come back with falling likelihood."""
    rng, live, fresh = random.Random(seed), [[0, 1]], iter(range(2, 10**6))
    lines = []
    for number in range(num_requests):
        at = min(int(rng.expovariate(0.3)), len(live) - 1)
        chat = live.pop(at) if rng.random() < 0.6 and live else [0, next(fresh)]
        chat = chat + [next(fresh) for _ in range(rng.randint(1, 5))]
        live.insert(0, chat)
        lines.append((10.0 * number, 512 * len(chat), chat))
    return make_trace("chats", lines, 0.5)


def test_by_last_use_it_is_exact_lru() -> None:
    trace, hits = chats(400, seed=1), 0
    order = Order(150)
    for request in trace.requests:
        ids = request.chain.ids
        found = order.run(ids, 0)
        order.touch(ids[:found], [0.0] * found, request.time_s)
        order.write(ids, [0.0] * len(ids), request.time_s)
        hits += found
    assert hits == exact_lru([request.blocks for request in trace.requests], 150)


def test_no_block_stays_without_its_parent_whatever_a_policy_says() -> None:
    rng, order = random.Random(2), Order(60)
    requests = chats(300, seed=2).requests
    for request in requests:
        ids = request.chain.ids
        found = order.run(ids, 0)
        later = [rng.uniform(-500, 500) for _ in ids]
        order.touch(ids[:found], later[:found], request.time_s)
        order.write(ids, later, request.time_s)
        for each in rng.sample(requests, 5):
            there = [order.run([block], 0) for block in each.chain.ids]
            assert there == sorted(there, reverse=True)


def test_who_is_favoured_has_more_hits_and_others_fewer() -> None:
    trace = chats(600, seed=3)
    plain, favouring = replay(trace, "lru", 4.0), replay(trace, "priority", 4.0)
    assert favouring["favoured_pct"] > plain["favoured_pct"]
    assert favouring["others_pct"] < plain["others_pct"]


def test_the_summary_is_over_all_rows() -> None:
    rows = compare(chats(120, seed=4), (10.0, 30.0))
    assert [row["policy"] for row in rows] == 2 * list(STANDINGS)
    assert all(row["vs_lru_pts"] == 0 for row in rows if row["policy"] == "lru")
    summary = summarise(rows)
    assert summary["worst_pts_returns"] <= summary["mean_pts_returns"] <= summary["best_pts_returns"]


def test_a_trace_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from bench.standing import main

    with pytest.raises(SystemExit):
        main(["--trace", str(tmp_path / "none.jsonl")])
    assert "there is no trace" in capsys.readouterr().err
