# SPDX-License-Identifier: Apache-2.0
"""S3-FIFO: a small queue that most blocks never leave but by the door, and a main one with second chances."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.errors import ConfigError
from kvstore.idmap import NO_ROW, Rows, longer
from kvstore.policies.leaves import LeafPolicy

_SMALL, _MAIN = 0, 1
_MOST_USES = 3
_PASS_BITS = 44  # of a key of the main queue: below them lies the order within a pass


class S3FifoPolicy(LeafPolicy):
    """S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

    New blocks enter the small queue, first in first out, which gives while it holds more than its share. One that was
    used twice there moves to the main queue; one that was not leaves its id behind for a while, and if it comes back
    it enters the main queue at once. The main queue is first in first out too, but a block used since its last turn,
    up to three times, has that many turns more. Only ends of chains go, tails first.

    The main queue's turns are counted rather than walked: a block goes in the pass after the one it came in, and a
    pass later for each use. That is the same order, and looking at it changes nothing.

    On chats it loses to LRU from a few per cent of capacity on: a conversation's newest blocks were used once.
    """

    name = "s3fifo"
    num_queues = 2

    @dataclass(frozen=True, slots=True)
    class Options:
        """Settings.

        Attributes:
            small_share: of the blocks, for the small queue.
            ghost_share: ids of evicted blocks remembered, for each block there is.
        """

        small_share: float = 0.1
        ghost_share: float = 0.9

        def __post_init__(self) -> None:
            if not 0 < self.small_share < 1:
                raise ConfigError(f"small_share is {self.small_share}: give a share between 0 and 1, such as 0.1")
            if not 0 <= self.ghost_share <= 100:
                raise ConfigError(f"ghost_share is {self.ghost_share}: give 0 to 100, such as 0.9")

    def __init__(self, options: object = None) -> None:
        self._settings = options if isinstance(options, S3FifoPolicy.Options) else S3FifoPolicy.Options()
        self._uses: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        super().__init__(options)
        self._pass = 1
        self._sizes = [0, 0]
        self._walk_sizes = [0, 0]
        self._ghosts: OrderedDict[BlockId, None] = OrderedDict()

    def _enter(self, rows: Rows, blocks: Sequence[BlockId], hint: Hint) -> None:
        back = np.array([block in self._ghosts for block in blocks])
        keys = self._latest_keys(len(rows))
        self._uses[rows] = 0
        self._queue[rows] = back
        self._key[rows] = np.where(back, (self._pass << _PASS_BITS) + keys, keys)
        if back.any():
            for block in blocks:
                self._ghosts.pop(block, None)
        num_back = int(np.count_nonzero(back))
        self._sizes[_SMALL] += len(rows) - num_back
        self._sizes[_MAIN] += num_back

    def _use(self, rows: Rows, fresh: npt.NDArray[np.bool_], blocks: Sequence[BlockId], hint: Hint) -> None:
        if fresh.any():
            return  # a request that adds to its own chain
        used = rows[rows != NO_ROW]
        self._uses[used] += 1
        in_main = self._queue[used] == _MAIN
        main = used[in_main]
        passes = self._key[main] >> _PASS_BITS
        later = np.minimum(np.maximum(passes, self._pass) + 1, self._pass + _MOST_USES)
        self._key[main] += (later - passes) << _PASS_BITS
        risen = used[~in_main & (self._uses[used] > 1)]
        if len(risen):
            self._queue[risen] = _MAIN
            self._key[risen] = (self._pass << _PASS_BITS) + self._latest_keys(len(risen))
            self._sizes[_SMALL] -= len(risen)
            self._sizes[_MAIN] += len(risen)

    def _left(self, rows: Rows) -> None:
        out = self._out
        for block, queue, row in zip(self._ids.ids_of(rows), self._queue[rows].tolist(), rows.tolist(), strict=True):
            self._sizes[queue] -= 1
            if row in out and queue == _SMALL:
                self._ghosts[block] = None
            elif row in out:
                self._pass = max(self._pass, self._key_at[row] >> _PASS_BITS)
        most = int(self._settings.ghost_share * len(self))
        while len(self._ghosts) > most:
            self._ghosts.popitem(last=False)

    def _walk_begins(self) -> None:
        self._walk_sizes = list(self._sizes)

    def _yielded(self, row: int) -> None:
        self._walk_sizes[self._queue_at[row]] -= 1

    def _next_queue(self) -> int:
        small, main = self._head(_SMALL), self._head(_MAIN)
        if small is None or main is None:
            return _SMALL if small is not None else _MAIN if main is not None else -1
        return _SMALL if self._walk_sizes[_SMALL] > self._settings.small_share * sum(self._walk_sizes) else _MAIN

    def _grow(self) -> None:
        super()._grow()
        self._uses = longer(self._uses, len(self._key))
