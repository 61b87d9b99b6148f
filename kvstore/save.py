# SPDX-License-Identifier: Apache-2.0
"""A save in two phases: slots are reserved, filled by the caller, then published block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kvstore.api import Hint
from kvstore.arena import Arena
from kvstore.block import Chain
from kvstore.errors import LeaseError
from kvstore.layout import BlockLayout
from kvstore.pool import BlockPool, Reservation


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
        self._open = {plan.start + item.position: item for item in reserved[0]}
        self._committed = committed
        self.indices: tuple[int, ...] = tuple(self._open)
        self.num_refused = reserved[1]

    def views(self, index: int) -> tuple[memoryview | None, ...]:
        item = self._open.get(index)
        if item is None:
            raise LeaseError(f"block {index} is not open in this save: open are {list(self._open)}")
        slots = dict(zip(item.parts, item.slots, strict=True))
        return tuple(
            self._arena.view(slots[part], self._plan.layout.parts[part].num_bytes) if part in slots else None
            for part in self._plan.parts
        )

    def commit(self, *indices: int) -> int:
        chosen = sorted(indices) if indices else list(self._open)
        unknown = [index for index in chosen if index not in self._open]
        if unknown:
            raise LeaseError(f"blocks {unknown} are not open in this save: open are {list(self._open)}")
        done = self._pool.publish([self._open.pop(index) for index in chosen], self._plan.hint)
        if done:
            published = [self._plan.start + item.position for item in done]
            self._pool.touch(self._plan.chain.ids, published[-1] + 1, self._plan.hint)
            self._committed(published)
        return len(done)

    def abort(self) -> None:
        items, self._open = list(self._open.values()), {}
        self._pool.abort(items)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
