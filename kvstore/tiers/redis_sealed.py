# SPDX-License-Identifier: Apache-2.0
"""What sealed values need beside their keys: which ones were found locked, and memory to seal into.

A value sealed with a key that is not here is a miss and stays where it is: others may have the key. It is remembered
for a while, so that it is not counted on again, nor fetched for nothing; and written over as soon as it was computed
here, so that values of a key that nobody has any more do not stand in the way until they age out.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvstore.block import PartKey

_GOOD_FOR_S = 60.0
_MAX_KEYS = 65_536


class Locked:
    """Keys whose values could not be opened here lately. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: OrderedDict[PartKey, float] = OrderedDict()

    def add(self, key: PartKey) -> None:
        with self._lock:
            self._until[key] = time.monotonic() + _GOOD_FOR_S
            self._until.move_to_end(key)
            if len(self._until) > _MAX_KEYS:
                self._until.popitem(last=False)

    def discard(self, keys: Iterable[PartKey]) -> None:
        if self._until:
            with self._lock:
                for key in keys:
                    self._until.pop(key, None)

    def without(self, keys: Sequence[PartKey], flags: list[bool]) -> list[bool]:
        """`flags` of `keys`, False for those that are locked."""
        if not self._until:
            return flags
        return [flag and key not in self for key, flag in zip(keys, flags, strict=True)]

    def __contains__(self, key: PartKey) -> bool:
        return bool(self._until) and self._until.get(key, 0.0) > time.monotonic()


class Scratch:
    """Memory for the sealed values of two groups: one on its way, one being prepared. Not thread-safe."""

    def __init__(self) -> None:
        self._halves = [memoryview(b""), memoryview(b"")]
        self._turn = 0
        self._at = 0

    def turn(self) -> None:
        """Begin a group: what the group before the last took is free again."""
        self._turn ^= 1
        self._at = 0

    def take(self, num_bytes: int) -> memoryview:
        """Memory that is the group's until the second turn from now."""
        if self._at + num_bytes > len(self._halves[self._turn]):
            # What was taken of the smaller one stays its takers'.
            self._halves[self._turn] = memoryview(bytearray(max(self._at + num_bytes, 1 << 20)))
            self._at = 0
        self._at += num_bytes
        return self._halves[self._turn][self._at - num_bytes : self._at]
