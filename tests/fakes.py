# SPDX-License-Identifier: Apache-2.0
"""Fakes that plug into seams: a clock, a tier in a dict, and one that misbehaves on request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvstore.api import Hint
from kvstore.block import BlockId, BlockMeta, PartKey, RootId
from kvstore.errors import TierUnavailable
from kvstore.layout import BlockLayout
from kvstore.tiers.base import AS_USED, Later, Tier


class FakeClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def now_s(self) -> float:
        return self.time_s


class DictTier(Tier):
    """A tier in a dict that keeps the contract, refuses orphans, and records touches."""

    name = "dict"

    def __init__(self) -> None:
        super().__init__(None)
        self.values: dict[PartKey, bytes] = {}
        self.meta: dict[BlockId, BlockMeta] = {}
        self.touched: list[list[PartKey]] = []
        self.asked: list[int] = []
        self.down = False
        self.before_read: Callable[[PartKey], None] = lambda key: None
        self.together = 1
        """How many keys a read yields at once."""
        self.lock = threading.Lock()

    def _answer(self) -> None:
        if self.down:
            raise TierUnavailable(self.name, "is down")

    def open(self, layout: BlockLayout) -> None:
        pass

    def contains(self, keys: Sequence[PartKey], deadline_s: float) -> list[bool]:
        self._answer()
        self.asked.append(len(keys))
        return [key in self.values for key in keys]

    def read(self, into: Mapping[PartKey, memoryview], deadline_s: float) -> Iterator[list[PartKey]]:
        found: list[PartKey] = []
        for key, buffer in into.items():
            self._answer()
            self.before_read(key)
            if key in self.values:
                buffer[:] = self.values[key]
                found.append(key)
            if len(found) == self.together:
                yield found
                found = []
        if found:
            yield found

    def write(
        self,
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline_s: float,
        later: Later = AS_USED,
    ) -> set[PartKey]:
        self._answer()
        written: set[PartKey] = set()
        with self.lock:
            for key, view in parts.items():
                what = meta[key.block]
                if what.depth and PartKey(key.root, what.parent, key.part) not in self.values:
                    continue
                self.values[key] = bytes(view)
                self.meta[key.block] = what
                written.add(key)
        return written

    def touch(self, keys: Sequence[PartKey], hint: Hint, later: Later = AS_USED) -> None:
        self._answer()
        self.touched.append(list(keys))

    def remove(self, keys: Sequence[PartKey]) -> None:
        for key in keys:
            self.values.pop(key, None)

    def clear(self, root: RootId | None) -> None:
        self._answer()
        self.values = {key: value for key, value in self.values.items() if root is not None and key.root != root}

    def check(self) -> list[str]:
        return [
            f"dict: {key} lacks its parent"
            for key in self.values
            if self.meta[key.block].depth
            and PartKey(key.root, self.meta[key.block].parent, key.part) not in self.values
        ]

    def close(self) -> None:
        pass
