# SPDX-License-Identifier: Apache-2.0
"""What a lower tier that keeps nothing of what the host holds would bring: hits, writes, and what a restart leaves.

A trace through a host and a private tier below it, without bytes. What the host evicts goes down, what is found below
comes up. Four ways, of which kvstore has the first two (`mover.tiering`; with `mover.write = "on_evict"`):

inclusive   what came up stays below, which evicts chains from their ends; a use warms a block wherever it lies
cooled      uses in the host leave what lies below alone, and what came up is the next to go there, as far as nothing
            else hangs from it: kvstore's exclusive tiers
ends        what came up leaves the lower tier where nothing hangs from it there, deepest first: each block below keeps
            its parent there, so that it is found after a restart, and the tier's own checks hold
exclusive   what came up leaves the lower tier: a block is in one place. Of a chain whose head is used often, only the
            end is below, which nobody finds once the host is empty

`found_alone_pct` is the share of the lower tier's blocks at the end of the trace that a store with an empty host finds.
The last half of time counts, as in `bench policies`.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.policies import traces_of
from bench.policies_replay import Seats
from bench.policies_trace import MODEL, Request, Trace
from bench.report import conclude
from kvstore.api import Hint
from kvstore.block import BlockId, Chain, RootId
from kvstore.errors import ConfigError
from kvstore.index import Rows
from kvstore.layout import layout_of
from kvstore.policies import POLICIES
from kvstore.policies.lru import LruPolicy
from kvstore.pool import BlockPool
from kvstore.tiers.redis_names import STEP_S

HELP = "two tiers that share nothing: hits, writes and what a restart finds, beside inclusive ones"

INCLUSIVE, COOLED, ENDS, EXCLUSIVE = "inclusive", "cooled", "ends", "exclusive"
MODES = (INCLUSIVE, COOLED, ENDS, EXCLUSIVE)
_COOLED_S = 43_200.0  # as `kvstore.tiers.redis_upkeep` does
SIZES = ((1.0, 10.0), (5.0, 10.0), (5.0, 5.0))
"""Of the host and of the tier below, in per cent of the trace's blocks."""

Row = dict[str, str | int | float | bool | None]


class Gone:
    """Hears what leaves a pool: `kvstore.residents.Observer`."""

    listening = True

    def __init__(self) -> None:
        self.blocks: list[BlockId] = []

    def stored(self, root: RootId, ids: bytes, parent: bytes, depth: int, tokens: bytes) -> int:
        return 1

    def removed(self, root: RootId, ids: bytes, rows: Rows, born: npt.NDArray[np.int64]) -> None:
        self.blocks += [BlockId(ids[at : at + 32]) for at in range(0, len(ids), 32)]

    def cleared(self, root: RootId) -> None:
        raise AssertionError("nobody clears")

    def take(self) -> list[BlockId]:
        """What left since the last time, heads first."""
        taken, self.blocks = self.blocks[::-1], []
        return taken


class Below:
    """The lower tier: ids by last use. `children` counts what hangs from each there."""

    def __init__(self, capacity: int, mode: str) -> None:
        self._capacity = capacity
        self._mode = mode
        self._order = LruPolicy()
        self._children: dict[BlockId, int] = {}

    def __contains__(self, block: BlockId) -> bool:
        return block in self._order

    def run(self, chain: Chain, start: int) -> int:
        at = start
        while at < len(chain) and chain.ids[at] in self._order:
            at += 1
        return at - start

    def write(self, chain: Chain, index: int, hint: Hint) -> int:
        """A block left the host: returns how many were written for it."""
        first = index if self._mode == EXCLUSIVE else 0
        fresh = [at for at in range(first, index + 1) if chain.ids[at] not in self._order]
        for at in fresh:
            self._order.admit([chain.ids[at]], hint)
            if at:
                self._children[chain.ids[at - 1]] = self._children.get(chain.ids[at - 1], 0) + 1
        self._order.touch(chain.ids[first : index + 1], hint)
        return len(fresh)

    def touch(self, chain: Chain, num_blocks: int, hint: Hint) -> None:
        self._order.touch(chain.ids[:num_blocks], hint)

    def came_up(self, chain: Chain, num_blocks: int, hint: Hint) -> None:
        """The chain's first blocks are in the host now."""
        for at in range(num_blocks - 1, -1, -1) if self._mode != INCLUSIVE else ():
            if chain.ids[at] not in self._order:
                continue
            if self._mode == ENDS and self._children.get(chain.ids[at], 0):
                return
            self._drop(chain, at)

    def shrink(self, where: dict[BlockId, tuple[Chain, int]]) -> None:
        for block in self._order.victims() if len(self._order) > self._capacity else ():
            self._drop(*where[block])
            if len(self._order) <= self._capacity:
                return

    def _drop(self, chain: Chain, at: int) -> None:
        self._order.remove([chain.ids[at]])
        if at:
            self._children[chain.ids[at - 1]] -= 1

    def found_alone_pct(self, where: dict[BlockId, tuple[Chain, int]]) -> float:
        blocks = list(self._order.victims())
        found = sum(self.run(where[block][0], 0) > where[block][1] for block in blocks)
        return 100 * found / max(1, len(blocks))


class Cooled(Below):
    """The lower tier by scores, as Redis has it: by last use below, and what came up before all."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, COOLED)
        self._scores: dict[BlockId, float] = {}
        self._heap: list[tuple[float, BlockId]] = []

    def run(self, chain: Chain, start: int) -> int:
        at = start
        while at < len(chain) and chain.ids[at] in self._scores:
            at += 1
        return at - start

    def write(self, chain: Chain, index: int, hint: Hint) -> int:
        fresh = [at for at in range(index + 1) if chain.ids[at] not in self._scores]
        for at in fresh:
            if at:
                self._children[chain.ids[at - 1]] = self._children.get(chain.ids[at - 1], 0) + 1
        for at in range(index + 1):
            self._put(chain.ids[at], hint.time_s - at * STEP_S)
        return len(fresh)

    def touch(self, chain: Chain, num_blocks: int, hint: Hint) -> None:
        """A use above says nothing here."""

    def came_up(self, chain: Chain, num_blocks: int, hint: Hint) -> None:
        there = min(self.run(chain, 0), num_blocks)
        for at in range(there - 1, -1, -1):
            below = at + 1 < len(chain) and chain.ids[at + 1] in self._scores
            if self._children.get(chain.ids[at], 0) > below:
                return
            score = hint.time_s - _COOLED_S - at * STEP_S
            if score < self._scores[chain.ids[at]]:
                self._put(chain.ids[at], score)

    def shrink(self, where: dict[BlockId, tuple[Chain, int]]) -> None:
        while len(self._scores) > self._capacity:
            score, block = heapq.heappop(self._heap)
            if self._scores.get(block) == score:
                del self._scores[block]
                chain, at = where[block]
                if at:
                    self._children[chain.ids[at - 1]] -= 1

    def found_alone_pct(self, where: dict[BlockId, tuple[Chain, int]]) -> float:
        found = sum(self.run(where[block][0], 0) > where[block][1] for block in self._scores)
        return 100 * found / max(1, len(self._scores))

    def _put(self, block: BlockId, score: float) -> None:
        self._scores[block] = score
        heapq.heappush(self._heap, (score, block))


def replay(trace: Trace, policy: str, sizes_pct: tuple[float, float], mode: str) -> Row:
    """The whole trace through a host under `policy` and a tier below it."""
    host_blocks, lower_blocks = (max(1, round(trace.num_unique * pct / 100)) for pct in sizes_pct)
    host = BlockPool(Seats(host_blocks), POLICIES.load(policy)(POLICIES.options(policy, {})))
    layout, gone = layout_of(MODEL), Gone()
    below = Cooled(lower_blocks) if mode == COOLED else Below(lower_blocks, mode)
    host.open(layout, host_blocks)
    host.observe(gone)
    where: dict[BlockId, tuple[Chain, int]] = {}
    hits = asked = written = 0
    for request in trace.requests:
        chain, hint = request.chain, Hint(time_s=request.time_s, prompt_tokens=request.prompt_tokens)
        where.update((block, (chain, at)) for at, block in enumerate(chain.ids))
        in_host, stop = _serve(host, request, hint)
        found = in_host + below.run(chain, in_host)
        below.touch(chain, found, hint)
        fresh = sum(below.write(*where[block], hint) for block in gone.take())
        below.came_up(chain, stop, hint)
        below.shrink(where)
        if trace.counted(request):
            hits, asked, written = hits + found, asked + len(chain), written + fresh
    faults = host.check()
    assert not faults, faults[:3]
    return {
        "trace": trace.name,
        "host_policy": policy,
        "host_pct": sizes_pct[0],
        "lower_pct": sizes_pct[1],
        "mode": mode,
        "hit_pct": 100 * hits / asked,
        "written_per_asked": written / asked,
        "found_alone_pct": below.found_alone_pct(where),
    }


def _serve(host: BlockPool, request: Request, hint: Hint) -> tuple[int, int]:
    """Blocks the host had, and how many of the chain it has now."""
    chain, root = request.chain, request.chain.root.id
    found = host.leading(chain.ids, 1, root)
    host.touch(chain.ids, found, Hint(time_s=hint.time_s, prompt_tokens=hint.prompt_tokens, asked=True))
    reserved, _ = host.filling.reserve(root, layout_of(MODEL), chain.ids, chain.metas, (0,))
    stop = found + len(host.filling.publish(reserved, hint))
    host.touch(chain.ids, stop, hint)
    return found, stop


def compare(trace: Trace, policies: Iterable[str], sizes: Iterable[tuple[float, float]]) -> list[Row]:
    """Rows of all modes for each policy and sizes, those of inclusive tiers first."""
    return [replay(trace, policy, each, mode) for policy in policies for each in sizes for mode in MODES]


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Of each mode but inclusive: hits gained at best, writes added at worst, and what is found alone at worst."""
    base = {_place(row): row for row in rows if row["mode"] == INCLUSIVE}
    summary: dict[str, float] = {}
    for mode in (COOLED, ENDS, EXCLUSIVE):
        pairs = [(row, base[_place(row)]) for row in rows if row["mode"] == mode]
        summary[f"gained_pts_{mode}"] = max(_of(row, "hit_pct") - _of(other, "hit_pct") for row, other in pairs)
        summary[f"more_written_pct_{mode}"] = max(
            100 * (_of(row, "written_per_asked") / _of(other, "written_per_asked") - 1) for row, other in pairs
        )
        summary[f"found_alone_pct_{mode}"] = min(_of(row, "found_alone_pct") for row, _ in pairs)
    return summary


def _place(row: Row) -> tuple[object, ...]:
    return row["trace"], row["host_policy"], row["host_pct"], row["lower_pct"]


def _of(row: Row, key: str) -> float:
    return float(str(row[key]))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench exclusive", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", metavar="FILE", action="append", required=True, help="as in bench policies")
    parser.add_argument("--policy", choices=list(POLICIES), action="append", help="of the host; default: lru, returns")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args(argv)
    try:
        traces = traces_of(options.trace)
    except (OSError, ConfigError) as error:
        parser.error(str(error))
    rows = [row for trace in traces for row in compare(trace, options.policy or ("lru", "returns"), SIZES)]
    conclude("exclusive", "Two tiers, last half of time", rows, summarise(rows), options.json)
    return 0
