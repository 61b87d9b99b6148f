# SPDX-License-Identifier: Apache-2.0
"""A trace through a real policy in a real pool, without bytes: each request matches, makes room, and saves the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.policies_trace import MODEL, Trace
from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.layout import layout_of
from kvstore.policies import Policy
from kvstore.pool import BlockPool


@dataclass(frozen=True, slots=True)
class Replay:
    """What one policy did at one capacity, of the counted part of a trace."""

    hit_blocks: int
    asked_blocks: int
    policy_s: float
    """Processor time within the policy, over the whole trace, of `num_blocks` asked blocks."""
    num_blocks: int

    @property
    def hit_pct(self) -> float:
        return 100 * self.hit_blocks / self.asked_blocks

    @property
    def us_per_block(self) -> float:
        return 1e6 * self.policy_s / self.num_blocks


class Seats:
    """Slots of one size with no memory behind them: `kvstore.residents.Slots`."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    def acquire_many(self, num_bytes: int, count: int) -> list[int]:
        taken = self._free[max(0, len(self._free) - count) :]
        del self._free[len(self._free) - len(taken) :]
        return taken

    def release_many(self, slots: Sequence[int]) -> None:
        self._free.extend(slots)

    def same_class(self, one_bytes: int, other_bytes: int) -> bool:
        return True

    def below_share(self, num_bytes: int) -> bool:
        return False

    def extent_of(self, slot: int) -> range:
        return range(self._num_slots)

    def check(self) -> list[str]:
        return []


class TimedPolicy(Policy):
    """Another policy, and the processor time it takes: another process on the same core does not count.

    The clock is read twice for each victim too, which counts: half a microsecond.
    """

    name = "timed"

    def __init__(self, inner: Policy) -> None:
        super().__init__(None)
        self._inner = inner
        self.spent_ns = 0

    def expect(self, num_blocks: int) -> None:
        self._inner.expect(num_blocks)

    def admit(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        began_ns = time.thread_time_ns()
        self._inner.admit(blocks, hint)
        self.spent_ns += time.thread_time_ns() - began_ns

    def touch(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        began_ns = time.thread_time_ns()
        self._inner.touch(blocks, hint)
        self.spent_ns += time.thread_time_ns() - began_ns

    def remove(self, blocks: Sequence[BlockId]) -> None:
        began_ns = time.thread_time_ns()
        self._inner.remove(blocks)
        self.spent_ns += time.thread_time_ns() - began_ns

    def victims(self) -> Iterator[BlockId]:
        began_ns = time.thread_time_ns()
        for block in self._inner.victims():
            self.spent_ns += time.thread_time_ns() - began_ns
            yield block
            began_ns = time.thread_time_ns()
        self.spent_ns += time.thread_time_ns() - began_ns

    def __len__(self) -> int:
        return len(self._inner)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._inner


def replay(trace: Trace, policy: Policy, capacity: int) -> Replay:
    """Send every request through `policy` in a pool of `capacity` blocks, and count the hits of those that count.

    A block is a hit only where all before it are. A hint says what any connector knows: when, and how long a prompt.
    """
    timed = TimedPolicy(policy)
    pool = BlockPool(Seats(capacity), timed)
    layout = layout_of(MODEL)
    pool.open(layout, capacity)
    hit_blocks = asked_blocks = num_blocks = 0
    for request in trace.requests:
        chain, root = request.chain, request.chain.root.id
        hint = Hint(time_s=request.time_s, prompt_tokens=request.prompt_tokens)
        found = pool.leading(chain.ids, 1, root)
        pool.touch(chain.ids, found, Hint(time_s=hint.time_s, prompt_tokens=hint.prompt_tokens, asked=True))
        reserved, _ = pool.filling.reserve(root, layout, chain.ids, chain.metas, (0,))
        stop = found + len(pool.filling.publish(reserved, hint))
        pool.touch(chain.ids, stop, hint)
        num_blocks += len(chain)
        if trace.counted(request):
            hit_blocks += found
            asked_blocks += len(chain)
    faults = pool.check()
    assert not faults, faults[:3]
    return Replay(hit_blocks, asked_blocks, timed.spent_ns / 1e9, num_blocks)
