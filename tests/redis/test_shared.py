# SPDX-License-Identifier: Apache-2.0
"""`python -m bench shared`: what it holds the shared tier against is exact, and the tier comes close to it."""

from __future__ import annotations

import random

import pytest
from rich.progress import Progress

from bench.shared import VALUE_BYTES, exact_lru, replay_tiers


def trace(seed: int, num_requests: int) -> list[list[int]]:
    """Chats that grow: equal ids after equal prefixes only."""
    rng = random.Random(seed)
    chats: list[list[int]] = []
    requests, fresh = [], 0
    for _ in range(num_requests):
        if chats and rng.random() < 0.6:
            chat = rng.choice(chats[-12:])
        else:
            chats.append(chat := [])
        added = rng.randrange(1, 8)
        chat.extend(range(fresh, fresh + added))
        fresh += added
        requests.append(list(chat))
    return requests


def naive_lru(requests: list[list[int]], capacity_blocks: int) -> int:
    used: dict[int, tuple[int, int]] = {}
    hits = 0
    for time, blocks in enumerate(requests):
        for block in blocks:
            if block not in used:
                break
            hits += 1
        used |= {block: (time, -depth) for depth, block in enumerate(blocks)}
        while len(used) > capacity_blocks:
            del used[min(used, key=used.__getitem__)]
    return hits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity_blocks", [1, 10, 60, 100_000])
def test_exact_lru_is_what_it_says(seed: int, capacity_blocks: int) -> None:
    requests = trace(seed, 150)
    assert exact_lru(requests, capacity_blocks) == naive_lru(requests, capacity_blocks)


def test_two_tiers_on_one_server_come_within_three_tenths_of_a_point_of_exact_lru() -> None:
    requests = trace(5, 250)
    capacity_blocks = len({block for request in requests for block in request}) // 5
    with Progress(disable=True) as progress:
        hits, broken = replay_tiers(requests, capacity_blocks * VALUE_BYTES, progress)
    asked = sum(map(len, requests))
    exact = exact_lru(requests, capacity_blocks)
    assert exact > 0.1 * asked
    assert abs(exact - hits) <= 0.003 * asked
    assert broken == []
