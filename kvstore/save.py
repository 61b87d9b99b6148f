# SPDX-License-Identifier: Apache-2.0
"""A save in two phases: slots are reserved, filled by the caller, then published block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from kvstore.api import ABSENT, Hint, OpenRun
from kvstore.arena import Arena
from kvstore.block import Chain
from kvstore.filling import Reservation
from kvstore.layout import BlockLayout
from kvstore.open_blocks import OpenBlocks
from kvstore.pool import BlockPool


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What to save."""

    chain: Chain
    layout: BlockLayout
    parts: tuple[int, ...]
    start: int
    hint: Hint


class BlockSave:
    """Implements `kvstore.api.Save` over a pool. `committed` is called with the chain indices just published."""

    def __init__(
        self,
        plan: SavePlan,
        arena: Arena,
        pool: BlockPool,
        reserved: tuple[list[Reservation], int],
        committed: Callable[[Sequence[int]], None],
    ) -> None:
        self._plan = plan
        self._arena = arena
        self._pool = pool
        self._open = OpenBlocks({item.at: item for item in reserved[0]})
        self._committed = committed
        self.indices: tuple[int, ...] = tuple(self._open)
        self.num_refused = reserved[1]

    def views(self, index: int) -> tuple[memoryview | None, ...]:
        item = self._open.place(index)
        slots = dict(zip(item.parts, item.slots, strict=True))
        return tuple(
            self._arena.view(slots[part], self._plan.layout.parts[part].num_bytes) if part in slots else None
            for part in self._plan.parts
        )

    def open_run(self) -> OpenRun:
        """See `kvstore.api.GivesOpenRun`."""
        parts = self._plan.parts
        offsets = [
            item.slots if item.parts == parts else [ABSENT if at is None else at for at in self.slots(index)]
            for index, item in self._open.items()
        ]
        return OpenRun(
            np.array([*self._open], np.int64),
            self._arena.view(0, self._arena.capacity_bytes),
            np.array(offsets, np.int64).reshape(-1, len(parts)),
        )

    @property
    def num_open(self) -> int:
        """Blocks neither published nor given back."""
        return len(self._open)

    def slots(self, index: int) -> tuple[int | None, ...]:
        """Where in the arena the views of an open block begin."""
        item = self._open[index]
        slots = dict(zip(item.parts, item.slots, strict=True))
        return tuple(slots.get(part) for part in self._plan.parts)

    def commit(self, *indices: int) -> int:
        return len(self.publish(indices or self._open))

    def publish(self, indices: Iterable[int]) -> list[int]:
        """Publish filled blocks; returns those that became matchable. Raises LeaseError for one that is not open."""
        done = self._pool.filling.publish(
            [self._open.pop(index) for index in self._open.chosen(indices)], self._plan.hint
        )
        if done:
            published = [item.at for item in done]
            self._pool.touch(self._plan.chain.ids, published[-1] + 1, self._plan.hint)
            self._committed(published)
            return published
        return []

    def detach(self) -> tuple[int, ...]:
        """Like `abort`, but somebody may still be writing: the slots stay out until `Filling.release_loose`."""
        items, self._open = list(self._open.values()), OpenBlocks()
        return self._pool.filling.detach(items)

    def abort(self) -> None:
        items, self._open = list(self._open.values()), OpenBlocks()
        self._pool.filling.abort(items)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
