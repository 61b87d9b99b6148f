# SPDX-License-Identifier: Apache-2.0
"""Priorities that the caller gives: the lowest goes first, the least recently used of equals."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.api import NO_HINT, Hint
from kvstore.block import BlockId
from kvstore.errors import ConfigError
from kvstore.idmap import NO_ROW, Rows, longer
from kvstore.policies.leaves import LeafPolicy

_FOR_EVER = float("inf")


class PriorityPolicy(LeafPolicy):
    """Priorities from 0 (first to go) to 100 with a duration, as in TensorRT-LLM's retention configuration.

    `Hint.retention` gives ranges of tokens theirs, `Hint.priority` the rest where it is not the ordinary one; a block
    that a range touches anywhere has the range's. After the range's duration, or `Hint.ttl_s`, a block has the
    ordinary priority again, or goes first where it lasted by `ttl_s`. A use that states no priority for a block
    leaves its own. A block never goes before what hangs from it, whatever its priority: so a system prompt of 100
    keeps no more than itself, and a last turn of 100 keeps all of its conversation.

    Reference: NVIDIA TensorRT-LLM, "KV cache reuse", `KvCacheRetentionConfig`.
    """

    name = "priority"
    num_queues = 101

    @dataclass(frozen=True, slots=True)
    class Options:
        """Settings.

        Attributes:
            ordinary: priority of blocks that nobody gave one, 0 to 100.
        """

        ordinary: int = 50

        def __post_init__(self) -> None:
            if not 0 <= self.ordinary <= 100:
                raise ConfigError(f"ordinary is {self.ordinary}: give a priority from 0 to 100, such as 50")

    def __init__(self, options: object = None) -> None:
        self._settings = options if isinstance(options, PriorityPolicy.Options) else PriorityPolicy.Options()
        self._until_s: npt.NDArray[np.float64] = np.zeros(0)
        super().__init__(options)
        self._now_s = 0.0
        self._deadlines: list[tuple[float, int, Rows, int]] = []
        self._num_deadlines = 0

    def _enter(self, rows: Rows, blocks: Sequence[BlockId], hint: Hint) -> None:
        self._now_s = max(self._now_s, hint.time_s)
        self._queue[rows] = self._settings.ordinary
        self._until_s[rows] = _FOR_EVER
        self._key[rows] = self._latest_keys(len(rows))

    def _use(self, rows: Rows, fresh: npt.NDArray[np.bool_], blocks: Sequence[BlockId], hint: Hint) -> None:
        self._now_s = max(self._now_s, hint.time_s)
        known = rows[rows != NO_ROW]
        self._key[known] = self._latest_keys(len(known))
        if hint.closed:
            self._state(self._private(rows), 0, None, 0)
            return
        if hint.priority != NO_HINT.priority or hint.ttl_s is not None:
            after = self._settings.ordinary if hint.ttl_s is None else 0
            self._state(known, hint.priority, hint.ttl_s, after)
        for each in hint.retention if hint.block_tokens else ():
            stop = len(rows) if each.stop is None else -(-each.stop // hint.block_tokens)
            part = rows[each.start // hint.block_tokens : stop]
            self._state(part[part != NO_ROW], each.priority, each.duration_s, self._settings.ordinary)

    def _state(self, rows: Rows, priority: int, duration_s: float | None, after: int) -> None:
        """Give rows a priority for `duration_s`, then `after`."""
        self._queue[rows] = min(max(priority, 0), 100)
        until_s = _FOR_EVER if duration_s is None else self._now_s + duration_s
        self._until_s[rows] = until_s
        if duration_s is not None and len(rows):
            self._num_deadlines += 1
            heapq.heappush(self._deadlines, (until_s, self._num_deadlines, rows, after))

    def _walk_begins(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._now_s:
            until_s, _, rows, after = heapq.heappop(self._deadlines)
            rows = rows[(self._until_s[rows] == until_s) & (self._key[rows] != 0)]
            self._queue[rows] = after
            self._until_s[rows] = _FOR_EVER
            for row in rows.tolist():
                if self._is_end(row):
                    self._push(row)

    def _next_queue(self) -> int:
        for queue, heap in enumerate(self._heaps):
            if heap and self._head(queue) is not None:
                return queue
        return -1

    def _grow(self) -> None:
        super()._grow()
        self._until_s = longer(self._until_s, len(self._key))
