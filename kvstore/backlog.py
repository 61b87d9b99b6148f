# SPDX-License-Identifier: Apache-2.0
"""What waits for the mover's thread: blocks to be written down, chains that were used, chains that came up.

All of it is bounded, blocks in bytes and chains in number; what finds no room is dropped, and counted. A chain that is
used again while it waits, waits once.

No lock here: the mover has one and holds it around every call. `in` needs none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.api import Hint
from kvstore.block import BlockId, Chain
from kvstore.stats import Stats

_MAX_CHAINS = 1024
_ATTEMPTS = 2


class Stretch(NamedTuple):
    """The first blocks of a chain, and these parts of each."""

    chain: Chain
    num_blocks: int
    parts: tuple[int, ...]

    @property
    def key(self) -> tuple[BlockId, tuple[int, ...]]:
        """Of equal stretches the same: a block commits to all that come before it."""
        return self.chain.ids[self.num_blocks - 1], self.parts


@dataclass(frozen=True, slots=True)
class Job:
    """Blocks, parents first, that are to be written to some tiers."""

    blocks: Sequence[BlockId]
    num_bytes: int
    hint: Hint
    tiers: Sequence[int]
    attempt: int = 1


class Round(NamedTuple):
    """What the thread sees to next."""

    job: Job | None
    uses: Sequence[tuple[Stretch, Hint]]
    risen: Sequence[Stretch]


class Backlog:
    """What waits, and what of it is being written."""

    def __init__(self, most_bytes: int, stats: Stats) -> None:
        self._most_bytes = most_bytes
        self._stats = stats
        self._jobs: deque[Job] = deque()
        self._queued: set[BlockId] = set()
        self._writing: frozenset[BlockId] = frozenset()
        self._taken_bytes = 0  # of the job being written: its place is free when that is done
        self._num_bytes = 0
        self._uses: dict[tuple[BlockId, tuple[int, ...]], tuple[Stretch, Hint]] = {}
        self._risen: dict[tuple[BlockId, tuple[int, ...]], Stretch] = {}

    @property
    def num_bytes(self) -> int:
        """Of blocks that wait or are being written."""
        return self._num_bytes

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not (self._jobs or self._uses or self._risen)

    @property
    def has_uses_alone(self) -> bool:
        """Whether nothing waits but uses, which may wait longer."""
        return bool(self._uses) and not (self._jobs or self._risen)

    @property
    def is_crowded(self) -> bool:
        """Whether uses would soon find no room."""
        return len(self._uses) >= _MAX_CHAINS // 2

    def __contains__(self, block: object) -> bool:
        """Whether it waits to be written down, or is being written."""
        return block in self._queued or block in self._writing

    # -- what comes --------------------------------------------------------------------------------------------

    def add(self, blocks: Sequence[BlockId], block_bytes: int, hint: Hint, tiers: Sequence[int]) -> Sequence[BlockId]:
        """Blocks, parents first, are to be written to `tiers`. Returns those that find no room."""
        fresh = [block for block in blocks if block not in self._queued]
        room = max(0, self._most_bytes - self._num_bytes) // block_bytes
        # The head is kept: a tail without it could not be found.
        fresh, dropped = fresh[:room], fresh[room:]
        if dropped:
            self._stats.add("mover.dropped_blocks", len(dropped))
        if fresh:
            self._num_bytes += len(fresh) * block_bytes
            self._push(Job(fresh, len(fresh) * block_bytes, hint, tiers))
        return dropped

    def _push(self, job: Job) -> None:
        self._jobs.append(job)
        self._queued.update(job.blocks)

    def add_use(self, stretch: Stretch, hint: Hint) -> None:
        """It was used. Of two uses that wait the later counts, unless the first asked for more."""
        before = self._uses.pop(stretch.key, None)
        if before is None and len(self._uses) >= _MAX_CHAINS:
            self._stats.add("mover.dropped_touches")
            return
        if before is not None:
            hint = _of_both(before[1], hint, stretch.num_blocks - 1)
        self._uses[stretch.key] = stretch, hint

    def add_risen(self, stretch: Stretch) -> None:
        """Some of it was brought from lower tiers into the host."""
        if stretch.key not in self._risen and len(self._risen) >= _MAX_CHAINS:
            self._stats.add("mover.dropped_risen")
            return
        self._risen[stretch.key] = stretch

    # -- what the thread takes ---------------------------------------------------------------------------------

    def take(self) -> Round:
        """The oldest job, if any, and all that is said of chains. `done` ends it."""
        job = self._jobs.popleft() if self._jobs else None
        if job is not None:
            self._writing = frozenset(job.blocks)  # first: who asks without a lock finds a block in one or the other
            self._queued.difference_update(job.blocks)  # from here on, a part committed to one of them is news again
            self._taken_bytes = job.num_bytes
        uses, self._uses = self._uses, {}
        risen, self._risen = self._risen, {}
        return Round(job, list(uses.values()), list(risen.values()))

    def again(self, job: Job, blocks: Sequence[BlockId], tiers: Sequence[int]) -> bool:
        """Write these, in place of the job that was taken, to tiers that failed; False where it had its last try."""
        if job.attempt >= _ATTEMPTS:
            return False
        self._taken_bytes = 0  # it keeps its place
        self._push(Job(blocks, job.num_bytes, job.hint, tiers, job.attempt + 1))
        return True

    def done(self) -> None:
        """What was taken was seen to, or given up."""
        self._num_bytes -= self._taken_bytes
        self._taken_bytes = 0
        self._writing = frozenset()

    def clear(self) -> None:
        """Let nothing wait any more."""
        self._num_bytes = self._taken_bytes
        self._jobs.clear()
        self._queued.clear()
        self._uses.clear()
        self._risen.clear()


def _of_both(before: Hint, hint: Hint, index: int) -> Hint:
    """What two uses of one chain say together, by its last block."""
    is_more = before.priority_of(index) > hint.priority_of(index)
    return before if is_more and not before.closed and not hint.closed else hint
