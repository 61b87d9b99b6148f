# SPDX-License-Identifier: Apache-2.0
"""Two stores share one Redis while a trace replays: what is hit, and whether anything left behind is out of reach.

A block whose parent is gone can never be matched again: memory for nothing. Eviction that does not know chains
leaves up to a fifth of a full cache so (Redis' own `allkeys-lru`, 5 samples). Requests alternate between the
stores; the host tiers serve heads, which must not look cold in Redis for it.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from bench.asked import print_figures
from bench.env import stamp
from bench.report import write_json
from kvstore.api import NO_HINT
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.layout import layout_of
from kvstore.policies.standing import LRU, STANDINGS
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer
from kvstore.wire import frame

_DEADLINE_S = 30.0
HELP = "two stores on one Redis replay a trace: hits by tier, and blocks left out of reach"

# The smallest block there is: a trace names blocks, not tokens, and bytes are of no interest here.
MODEL = ModelId(
    model="trace", revision="1", kv_dtype="float32", num_layers=1, num_kv_heads=1, head_dim=16, block_tokens=2
)
VALUE_BYTES = frame.header_bytes(MODEL.block_tokens, 0) + layout_of(MODEL).block_bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay did. `out_of_reach` counts residents with a hole before them when the last request ended.

    All blocks are of one size, so that a share of them is that share of the bytes.
    """

    asked_blocks: int
    hit_blocks: dict[str, int]
    resident_blocks: int
    out_of_reach: int
    out_of_reach_after_sweep: int
    accounted_bytes: int
    faults: list[str]


def read_trace(path: Path, limit: int = 0) -> list[list[int]]:
    """Block ids of each request of a Mooncake trace (JSON lines with `hash_ids`)."""
    with path.open() as lines:
        requests = [json.loads(line)["hash_ids"] for line in lines]
    return requests[:limit] if limit else requests


def chain_of(root: Root, hash_ids: Sequence[int]) -> Chain:
    """A chain in which equal ids after equal prefixes are equal blocks."""
    ids = np.asarray(hash_ids, np.uint32)
    return Chain(root, np.stack([ids, ids ^ np.uint32(0x5A5A5A5A)], axis=1).reshape(-1))


def replay(
    requests: Iterable[Sequence[int]], capacity_bytes: int, host_blocks: int, progress: Progress, policy: str = LRU
) -> Outcome:
    """Serve requests in turn from two stores over one server, then look at what is left."""
    requests = list(requests)
    task = progress.add_task("replay", total=len(requests))
    values = {
        "host": {"capacity_bytes": host_blocks * 4096, "prefault": False},
        "mover": {"write": "through"},
        "request": {"lookup_deadline_s": 5},
    }
    with EmbeddedServer() as server:
        options = RedisTier.Options(url=server.url, capacity_bytes=capacity_bytes, sweep_every_s=0, policy=policy)
        tiers = [RedisTier(options), RedisTier(options)]
        stores = [KVStore(StoreConfig.load(values, environ={}), tiers=[tier]) for tier in tiers]
        try:
            for store in stores:
                store.open(MODEL)
            asked, hits = 0, {"host": 0, "redis": 0}
            root = Root(MODEL)
            for number, hash_ids in enumerate(requests):
                chain = chain_of(root, hash_ids)
                asked += len(chain)
                for tier, count in _serve(stores[number % 2], chain).items():
                    hits[tier] += count
                progress.advance(task)
            return _look(stores, tiers, asked, hits)
        finally:
            for store in stores:
                store.close()


def _serve(store: KVStore, chain: Chain) -> dict[str, int]:
    """One request: match, load what is there, save the rest."""
    store.match(chain, "replay", wait_s=5)
    hits: dict[str, int] = {}
    with store.load("replay") as load:
        for block in load:
            hits[block.tier] = hits.get(block.tier, 0) + 1
    with store.save(chain, 0, len(chain)) as save:
        save.commit()
    return hits


def exact_lru(requests: Iterable[Sequence[int]], capacity_blocks: int) -> int:
    """Hits of a cache that evicts block by block, the least recently used first and of one use the deepest."""
    used: dict[int, tuple[int, int]] = {}
    order: list[tuple[int, int, int]] = []
    hits = 0
    for time, hash_ids in enumerate(requests):
        hits += next((at for at, block in enumerate(hash_ids) if block not in used), len(hash_ids))
        for depth, block in enumerate(hash_ids):
            used[block] = (time, -depth)
            heapq.heappush(order, (time, -depth, block))
        while len(used) > capacity_blocks:
            at, depth, block = heapq.heappop(order)
            if used.get(block) == (at, depth):  # not used again since
                del used[block]
    return hits


def replay_tiers(requests: Iterable[Sequence[int]], capacity_bytes: int, progress: Progress) -> tuple[int, list[str]]:
    """Hits of two tiers on one server that serve requests in turn, no host tier above them; and what is broken."""
    requests = list(requests)
    task = progress.add_task("Redis alone", total=len(requests))
    layout, root, hits = layout_of(MODEL), Root(MODEL), 0
    nothing = memoryview(bytes(layout.block_bytes))
    with EmbeddedServer() as server:
        options = RedisTier.Options(url=server.url, capacity_bytes=capacity_bytes, sweep_every_s=0)
        tiers = [RedisTier(options), RedisTier(options)]
        try:
            for tier in tiers:
                tier.open(layout)
            for number, hash_ids in enumerate(requests):
                tier = tiers[number % 2]
                chain = chain_of(root, hash_ids)
                keys = chain.part_keys(0, len(chain), layout.all_parts)
                there = tier.contains(keys, _DEADLINE_S)
                hits += next((at for at, present in enumerate(there) if not present), len(there))
                tier.touch(keys, NO_HINT)
                tier.settle(_DEADLINE_S)  # a trace has no pauses between requests, in which it would come about
                meta = {block: chain.meta(index) for index, block in enumerate(chain.ids)}
                tier.write(dict.fromkeys(keys, nothing), meta, _DEADLINE_S)
                progress.advance(task)
            return hits, tiers[0].check()
        finally:
            for tier in tiers:
                tier.close()


def _look(stores: Sequence[KVStore], tiers: Sequence[RedisTier], asked: int, hits: dict[str, int]) -> Outcome:
    for store, tier in zip(stores, tiers, strict=True):
        if not store.flush(120) or not tier.settle(60):
            raise RuntimeError("demotions did not finish in time")
    before, resident_blocks = tiers[0].check(), tiers[0].accounted_bytes() // VALUE_BYTES
    tiers[0].sweep()
    after = tiers[0].check()
    return Outcome(
        asked_blocks=asked,
        hit_blocks=hits,
        resident_blocks=resident_blocks,
        out_of_reach=sum("lacks its parent" in fault for fault in before),
        out_of_reach_after_sweep=sum("lacks its parent" in fault for fault in after),
        accounted_bytes=tiers[0].accounted_bytes(),
        faults=[fault for fault in before if "lacks its parent" not in fault] + after,
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench shared", description=__doc__)
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines with hash_ids (Mooncake's format)")
    parser.add_argument("--capacity", type=float, default=5, help="Redis capacity, %% of distinct blocks (default: 5)")
    parser.add_argument("--host", type=float, default=1, help="each host tier, %% of distinct blocks (default: 1)")
    parser.add_argument("--policy", choices=list(STANDINGS), default=LRU, help="of the stores (default: lru)")
    parser.add_argument("--limit", type=int, default=0, help="requests to replay (default: all)")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    if not options.trace.is_file():
        parser.error(f"there is no trace {options.trace}: give a file as Mooncake publishes them")
    requests = read_trace(options.trace, options.limit)
    distinct = len({each for request in requests for each in request})
    host_blocks = max(int(distinct * options.host / 100), max(map(len, requests)))
    with Progress(transient=True) as progress:
        capacity_bytes = int(distinct * options.capacity / 100) * VALUE_BYTES
        outcome = replay(requests, capacity_bytes, host_blocks, progress, options.policy)
        capacity_blocks = int(distinct * options.capacity / 100)
        alone, broken = replay_tiers(requests, capacity_blocks * VALUE_BYTES, progress)
    exact = exact_lru(requests, capacity_blocks)
    asked = sum(map(len, requests))
    summary: dict[str, str | int | float | bool | None] = {
        "exact_lru_hit_rate_pct": 100 * exact / asked,
        "shared_hit_rate_pct": 100 * alone / asked,
        "shared_lru_gap_pts": 100 * (exact - alone) / asked,
        "unreachable_pct": 100 * outcome.out_of_reach / max(1, outcome.resident_blocks),
        "unreachable_alone": sum("lacks its parent" in fault for fault in broken),
        "hit_rate_host_pct": 100 * outcome.hit_blocks["host"] / outcome.asked_blocks,
        "hit_rate_redis_pct": 100 * outcome.hit_blocks["redis"] / outcome.asked_blocks,
        "resident_blocks": outcome.resident_blocks,
        "out_of_reach_blocks": outcome.out_of_reach,
        "out_of_reach_after_sweep": outcome.out_of_reach_after_sweep,
        "accounted_bytes": outcome.accounted_bytes,
        "other_faults": len(outcome.faults),
    }
    rows = [{"requests": len(requests), "distinct_blocks": distinct, **summary}]
    print_figures("shared-synthetic", rows[0])
    if options.json:
        write_json(options.json, "shared", stamp(), rows, summary)
        print(f"result: {options.json}")
    return 0
