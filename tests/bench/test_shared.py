# SPDX-License-Identifier: Apache-2.0
"""Two stores on one Redis: a head kept hot by a host does not go cold below, and nothing is left out of reach."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from rich.progress import Progress

from bench.shared import VALUE_BYTES, main, replay

pytestmark = pytest.mark.redis


def chats(num_requests: int, seed: int) -> list[list[int]]:
    """Requests of chats that share a system prompt, grow by turn, and come back with falling likelihood."""
    rng = random.Random(seed)
    live: list[list[int]] = []
    fresh = iter(range(10, 10**6))
    requests = []
    for _ in range(num_requests):
        if live and rng.random() < 0.6:
            chat = live[min(int(rng.expovariate(0.2)), len(live) - 1)]
            live.remove(chat)
        else:
            chat = [0, 1]
        chat = chat + [next(fresh) for _ in range(rng.randint(1, 6))]
        live.insert(0, chat)
        requests.append(chat)
    return requests


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "returns"])
def test_no_resident_block_lacks_its_parent_after_a_replay_at_five_percent(policy: str) -> None:
    requests = chats(1500, seed=1)
    distinct = len({each for request in requests for each in request})
    with Progress(disable=True) as progress:
        outcome = replay(requests, distinct * VALUE_BYTES // 20, max(map(len, requests)), progress, policy)
    assert outcome.faults == []
    assert outcome.out_of_reach_after_sweep == 0
    assert outcome.out_of_reach <= 0.01 * outcome.resident_blocks
    # A store takes the sum for good for a quarter of a second, in which the other may write a request's blocks.
    assert 0.5 * distinct / 20 < outcome.resident_blocks <= distinct / 20 + max(map(len, requests))
    assert outcome.hit_blocks["redis"] > 0
    assert outcome.hit_blocks["host"] > 0


def test_the_command_writes_its_result(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"hash_ids": request}) + "\n" for request in chats(60, seed=2)))
    assert main(["--trace", str(trace), "--capacity", "30", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["summary"]["out_of_reach_after_sweep"] == 0
