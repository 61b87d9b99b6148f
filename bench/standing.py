# SPDX-License-Identifier: Apache-2.0
"""Policies of the shared tier on a trace: hits beside those of last use alone, and what priorities buy and cost.

Two stores serve requests in turn over one shared tier, each with its host; no bytes, no server: the tier's order is
replayed as `kvstore.tiers.redis` keeps it (`bench shared` holds its `lru` against the real one). What a host knows
of a request is what its own policy `returns` has learned from the requests that came to it. The last half of time
counts, of all blocks that were asked, those found in the host or in the shared tier.

No trace says who is worth more, so for `priority` each fifth conversation is given 100: `favoured_pct` is its hit
rate, `others_pct` that of the rest, both beside what last use gives the same.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.policies import traces_of
from bench.policies_replay import Seats
from bench.policies_trace import MODEL, Request, Trace
from bench.report import conclude
from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.errors import ConfigError
from kvstore.layout import layout_of
from kvstore.policies import POLICIES
from kvstore.policies.standing import LRU, STANDINGS
from kvstore.pool import BlockPool
from kvstore.tiers.redis_names import STEP_S

HELP = "policies of the shared tier on a trace: hits beside last use, and what priorities buy"

CAPACITIES_PCT = (2.0, 5.0, 10.0, 20.0)
_NUM_HOSTS = 2
_HOST_PCT = 1.0
_FAVOURED_EVERY = 5

Row = dict[str, str | int | float | bool | None]


class Order:
    """The shared tier: scores by block, the lowest first to go."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._scores: dict[BlockId, float] = {}
        self._heap: list[tuple[float, BlockId]] = []
        self._cold = 0.0

    def run(self, blocks: Sequence[BlockId], start: int) -> int:
        at = start
        while at < len(blocks) and blocks[at] in self._scores:
            at += 1
        return at - start

    def span_s(self, now_s: float) -> float:
        """As `RedisTier.span_s`."""
        return max(0.0, now_s - self._cold) if self._cold else 600.0

    def touch(self, blocks: Sequence[BlockId], later: Sequence[float], now_s: float) -> None:
        for depth, (block, shift) in enumerate(zip(blocks, _above_children(later), strict=True)):
            score = now_s + shift - depth * STEP_S
            if score > self._scores.get(block, score):
                self._put(block, score)

    def write(self, blocks: Sequence[BlockId], later: Sequence[float], now_s: float) -> None:
        above = float("inf")
        for depth, (block, shift) in enumerate(zip(blocks, _above_children(later), strict=True)):
            score = self._scores.get(block)
            if score is None:
                score = min(now_s + shift - depth * STEP_S, above - STEP_S)
                self._put(block, score)
            above = score
        while len(self._scores) > self._capacity:
            score, block = heapq.heappop(self._heap)
            if self._scores.get(block) == score:
                del self._scores[block]
                self._cold = max(self._cold, score)

    def _put(self, block: BlockId, score: float) -> None:
        self._scores[block] = score
        heapq.heappush(self._heap, (score, block))


def _above_children(later: Sequence[float]) -> list[float]:
    shifts = list(later)
    for at in range(len(shifts) - 2, -1, -1):
        shifts[at] = max(shifts[at], shifts[at + 1])
    return shifts


class Host:
    """A host tier without bytes, which knows what comes to it."""

    def __init__(self, num_blocks: int) -> None:
        self._pool = BlockPool(Seats(num_blocks), POLICIES.load("returns")(POLICIES.options("returns", {})))
        self._pool.open(layout_of(MODEL), num_blocks)

    def match(self, request: Request, hint: Hint) -> int:
        chain = request.chain
        found = self._pool.leading(chain.ids, 1, chain.root.id)
        self._pool.touch(chain.ids, found, replace(hint, asked=True))
        return found

    def save(self, request: Request, hint: Hint, found: int) -> None:
        chain = request.chain
        reserved, _ = self._pool.filling.reserve(chain.root.id, layout_of(MODEL), chain.ids, chain.metas, (0,))
        self._pool.touch(chain.ids, found + len(self._pool.filling.publish(reserved, hint)), hint)

    def odds(self, blocks: Sequence[BlockId]) -> list[float]:
        return self._pool.return_odds(blocks)


def replay(trace: Trace, policy: str, capacity_pct: float) -> Mapping[str, float]:
    """Hit rates of the counted part: of all requests, of those that `priority` favours, and of the others."""
    blocks_of = {pct: max(1, round(trace.num_unique * pct / 100)) for pct in (capacity_pct, _HOST_PCT)}
    room = max(blocks_of[_HOST_PCT], *(len(request.chain) for request in trace.requests))
    hosts = [Host(room) for _ in range(_NUM_HOSTS)]
    order, standing = Order(blocks_of[capacity_pct]), STANDINGS[policy]
    hits, asked = [0, 0], [0, 0]
    for number, request in enumerate(trace.requests):
        host, ids, now_s = hosts[number % _NUM_HOSTS], request.chain.ids, request.time_s + 1.0
        favoured = _is_favoured(request)
        hint = Hint(time_s=now_s, prompt_tokens=request.prompt_tokens, priority=100 if favoured else 50)
        in_host = host.match(request, hint)
        found = in_host + order.run(ids, in_host)
        later = standing(hint, range(found), host.odds(ids[:found]), order.span_s(now_s))
        order.touch(ids[:found], later, now_s)
        host.save(request, hint, in_host)
        order.write(ids, standing(hint, range(len(ids)), host.odds(ids), order.span_s(now_s)), now_s)
        if trace.counted(request):
            hits[favoured] += found
            asked[favoured] += len(ids)
    return {
        "hit_pct": 100 * sum(hits) / max(1, sum(asked)),
        "favoured_pct": 100 * hits[True] / max(1, asked[True]),
        "others_pct": 100 * hits[False] / max(1, asked[False]),
    }


def _is_favoured(request: Request) -> bool:
    """By the conversation: its first blocks may be everyone's, its third is most often its own."""
    return request.blocks[min(2, len(request.blocks) - 1)] % _FAVOURED_EVERY == 0


def compare(trace: Trace, capacities_pct: Sequence[float]) -> list[Row]:
    """A row for each capacity and policy, last use first."""
    rows: list[Row] = []
    for capacity_pct in capacities_pct:
        base = replay(trace, LRU, capacity_pct)
        for policy in STANDINGS:
            run = base if policy == LRU else replay(trace, policy, capacity_pct)
            row: Row = {"trace": trace.name, "capacity_pct": capacity_pct, "policy": policy, **run}
            row["vs_lru_pts"] = run["hit_pct"] - base["hit_pct"]
            row["favoured_vs_lru_pts"] = run["favoured_pct"] - base["favoured_pct"]
            rows.append(row)
    return rows


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Of each policy but last use: hits gained: mean, best and worst; and those of whom `priority` favours."""
    summary: dict[str, float] = {}
    for policy in STANDINGS:
        of_it = [row for row in rows if row["policy"] == policy]
        gained = [float(str(row["vs_lru_pts"])) for row in of_it]
        if policy != LRU and gained:
            summary[f"mean_pts_{policy}"] = sum(gained) / len(gained)
            summary[f"best_pts_{policy}"] = max(gained)
            summary[f"worst_pts_{policy}"] = min(gained)
    favoured = [float(str(row["favoured_vs_lru_pts"])) for row in rows if row["policy"] == "priority"]
    summary["favoured_mean_pts_priority"] = sum(favoured) / max(1, len(favoured))
    return summary


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench standing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", metavar="FILE", action="append", required=True, help="as in bench policies")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args(argv)
    try:
        traces = traces_of(options.trace)
    except (OSError, ConfigError) as error:
        parser.error(str(error))
    rows = [row for trace in traces for row in compare(trace, CAPACITIES_PCT)]
    conclude("standing", "Shared tier, last half of time", rows, summarise(rows), options.json)
    return 0
