# SPDX-License-Identifier: Apache-2.0
"""Announcements: who is computing which blocks, so that others wait instead of computing them again."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

from kvstore.block import BlockId, RootId
from kvstore.clock import Clock

MARK_TTL_S = 2.5
_MOST_PRODUCERS = 8
"""Of a block, that are remembered: what a client says a thousand times must not make each end of it a long search."""


class Mark:
    """Implements `kvstore.api.Announcement`: one range of one chain, alive until its deadline."""

    def __init__(self, marks: Marks, root: RootId, blocks: Sequence[BlockId]) -> None:
        self.root = root
        self.blocks = list(blocks)
        self.num_done = 0
        self.deadline_s = 0.0
        self.withdrawn = False
        self._marks = marks
        self.renew()

    def renew(self) -> None:
        self.deadline_s = self._marks.clock.now_s() + MARK_TTL_S

    def withdraw(self) -> None:
        self.withdrawn = True
        self._marks.drop(self)

    def num_left(self) -> int:
        """How many of its last blocks are not resident yet, whoever computes them."""
        return len(self.blocks) - self.num_done

    def done(self, blocks: Collection[BlockId]) -> None:
        """These are resident: they come in order."""
        while self.num_done < len(self.blocks) and self.blocks[self.num_done] in blocks:
            self.num_done += 1


class Marks:
    """Live announcements by root and block, several of one too: it is pending until the last ends. Thread-safe.

    By root, because ids are claims here: nobody sees, or stands in the way of, what another namespace computes.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._by_root: dict[RootId, dict[BlockId, list[Mark]]] = {}

    def add(self, root: RootId, blocks: Sequence[BlockId]) -> Mark:
        mark = Mark(self, root, blocks)
        with self._lock:
            by_block = self._by_root.setdefault(root, {})
            for block in mark.blocks:
                marks = by_block.setdefault(block, [])
                if len(marks) < _MOST_PRODUCERS:
                    marks.append(mark)
        return mark

    def sweep(self) -> None:
        """Forget marks whose producer went away without a word."""
        if self._by_root:
            now_s = self.clock.now_s()
            with self._lock:
                known = {mark for by_block in self._by_root.values() for marks in by_block.values() for mark in marks}
                for mark in known:
                    if mark.deadline_s <= now_s:
                        self._drop(mark)
                for root in [root for root, by_block in self._by_root.items() if not by_block]:
                    del self._by_root[root]

    def drop(self, mark: Mark) -> None:
        with self._lock:
            self._drop(mark)

    def _drop(self, mark: Mark) -> None:
        by_block = self._by_root.get(mark.root, {})
        for block in mark.blocks:
            marks = by_block.get(block, [])
            if mark in marks:
                marks.remove(mark)
                if not marks:
                    del by_block[block]

    def fulfil(self, root: RootId, blocks: Sequence[BlockId]) -> None:
        """These blocks are resident now: nobody needs to wait for them."""
        if root in self._by_root:
            with self._lock:
                by_block = self._by_root.get(root, {})
                marks = {mark for block in blocks for mark in by_block.pop(block, ())}
                for mark in marks:
                    mark.done(set(blocks))

    def run(self, root: RootId, blocks: Sequence[BlockId], start: int) -> int:
        """Number of blocks from `start` on that somebody is computing."""
        if root not in self._by_root:
            return 0
        now_s = self.clock.now_s()
        with self._lock:
            by_block = self._by_root.get(root, {})
            at = start
            while at < len(blocks):
                if not any(mark.deadline_s > now_s for mark in by_block.get(blocks[at], ())):
                    break
                at += 1
            return at - start

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._by_root.values()))
