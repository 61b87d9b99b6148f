# SPDX-License-Identifier: Apache-2.0
"""A session's load on its way into the engine's memory: copies are begun block by block, or all at once, and timed.

A load is let go of when its copies are done, not before: until then they read from it.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field

from connectors.engine_memory import EngineMemory
from kvstore.api import GivesRun, KnowsWindows, Load, SaysWhole

_BATCH_BYTES = 64 << 20
"""Copies of blocks that arrive one by one are begun when there are so many: a window's worth of a device's copies."""


@dataclass(eq=False)
class Loading:
    """A load whose copies may still be under way.

    Attributes:
        start, stop: whole blocks that it brings; partial_tokens: what the block after them begins with.
        seconds, num_blocks: by tier.
        begun_s: when the last of its copies was begun.
        held: lets go of the load, when its copies are done.
    """

    load: Load
    start: int
    stop: int = 0
    partial_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    num_blocks: dict[str, int] = field(default_factory=dict)
    begun_s: float = 0.0
    held: ExitStack = field(default_factory=ExitStack)

    def bring(self, memory: EngineMemory, stop: int, partial_tokens: int, block_bytes: int) -> None:
        """Begin to copy in the blocks up to `stop`, and `partial_tokens` of one more, as far as they come."""
        if isinstance(self.load, SaysWhole) and self.load.is_whole:
            at = self._bring_whole(memory)
        else:
            at = self._bring_as_they_come(memory, stop + bool(partial_tokens), block_bytes)
        memory.begin()
        self.begun_s = time.monotonic()
        self.stop, self.partial_tokens = min(at, stop), partial_tokens if at > stop else 0

    def _bring_as_they_come(self, memory: EngineMemory, last: int, block_bytes: int) -> int:
        """Returns where they end, `last` at most."""
        load, at, begun, then_s = self.load, self.start, self.start, time.monotonic()
        for block in load:
            if block.index != at:
                break
            memory.write_block(at, block.views)
            at += 1
            stays = isinstance(load, KnowsWindows) and (at >= last or not load.comes_in_windows(at))
            if not stays:
                memory.finish()  # the block may be gone as soon as the next one is asked for
            elif (at - begun) * block_bytes >= _BATCH_BYTES:
                memory.begin()
                begun = at
            now_s = time.monotonic()
            self.num_blocks[block.tier] = self.num_blocks.get(block.tier, 0) + 1
            self.seconds[block.tier] = self.seconds.get(block.tier, 0.0) + now_s - then_s
            then_s = now_s
        return at

    def _bring_whole(self, memory: EngineMemory) -> int:
        """Where all are there: in one call for all of them, since their first layers then come first."""
        load, at, began_s = self.load, self.start, time.monotonic()
        run = load.run() if isinstance(load, GivesRun) else None
        if run is not None and run.start == at and len(run.offsets):
            memory.write_run(run)
            at += len(run.offsets)
            self.num_blocks[run.tier] = len(run.offsets)
        elif run is None:
            tiers: list[str] = []
            for block in load:
                if block.index != at:
                    break
                memory.write_block(at, block.views)
                tiers.append(block.tier)
                at += 1
            self.num_blocks.update(Counter(tiers))
        took_s, in_all = time.monotonic() - began_s, at - self.start
        self.seconds.update((tier, took_s * count / in_all) for tier, count in self.num_blocks.items())
        return at
