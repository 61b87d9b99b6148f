# SPDX-License-Identifier: Apache-2.0
"""Least recently used, tail first: exact LRU over chains."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice

from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.policies.base import Policy

_BATCH = 64


class LruPolicy(Policy):
    """Exact LRU in which a chain's tail is older than its head, so that eviction shortens prefixes.

    On real chat traces it is the baseline that frequency policies lose to. Cost: one move in an OrderedDict a
    block. Do not use it for one-pass scans larger than the tier; nothing resists them.
    """

    name = "lru"

    def __init__(self, options: object = None) -> None:
        super().__init__(options)
        # Coldest first. OrderedDict, not dict: popping the front of a dict scans over the holes left behind.
        self._order: OrderedDict[BlockId, None] = OrderedDict()

    def admit(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        for block in reversed(blocks):
            self._order[block] = None

    def touch(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        order = self._order
        move = order.move_to_end
        for block in reversed(blocks):
            if block in order:
                move(block)

    def remove(self, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            self._order.pop(block, None)

    def victims(self) -> Iterator[BlockId]:
        num_skipped = 0
        while batch := list(islice(self._order, num_skipped, num_skipped + _BATCH)):
            for block in batch:
                yield block
                if block in self._order:
                    num_skipped += 1

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._order
