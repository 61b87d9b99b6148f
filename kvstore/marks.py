# SPDX-License-Identifier: Apache-2.0
"""Announcements: who is computing which blocks, so that others wait instead of computing them again."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvstore.block import BlockId
from kvstore.clock import Clock

MARK_TTL_S = 2.5


class Mark:
    """Implements `kvstore.api.Announcement`: one range of one chain, alive until its deadline."""

    def __init__(self, marks: Marks, blocks: Sequence[BlockId]) -> None:
        self.blocks = list(blocks)
        self.deadline_s = 0.0
        self._marks = marks
        self.renew()

    def renew(self) -> None:
        self.deadline_s = self._marks.clock.now_s() + MARK_TTL_S

    def withdraw(self) -> None:
        self._marks.drop(self)


class Marks:
    """Live announcements by block. The first producer of a block keeps it until its mark ends. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._by_block: dict[BlockId, Mark] = {}

    def add(self, blocks: Sequence[BlockId]) -> Mark:
        mark = Mark(self, blocks)
        now_s = self.clock.now_s()
        with self._lock:
            for block in mark.blocks:
                other = self._by_block.get(block)
                if other is None or other.deadline_s <= now_s:
                    self._by_block[block] = mark
        return mark

    def sweep(self) -> None:
        """Forget marks whose producer went away without a word."""
        if self._by_block:
            now_s = self.clock.now_s()
            with self._lock:
                for block in [block for block, mark in self._by_block.items() if mark.deadline_s <= now_s]:
                    del self._by_block[block]

    def drop(self, mark: Mark) -> None:
        with self._lock:
            for block in mark.blocks:
                if self._by_block.get(block) is mark:
                    del self._by_block[block]

    def fulfil(self, blocks: Sequence[BlockId]) -> None:
        """These blocks are resident now: nobody needs to wait for them."""
        if self._by_block:
            with self._lock:
                for block in blocks:
                    self._by_block.pop(block, None)

    def run(self, blocks: Sequence[BlockId], start: int) -> int:
        """Number of blocks from `start` on that somebody is computing."""
        if not self._by_block:
            return 0
        now_s = self.clock.now_s()
        with self._lock:
            at = start
            while at < len(blocks):
                mark = self._by_block.get(blocks[at])
                if mark is None or mark.deadline_s <= now_s:
                    break
                at += 1
            return at - start

    def __len__(self) -> int:
        return len(self._by_block)
