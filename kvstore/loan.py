# SPDX-License-Identifier: Apache-2.0
"""Blocks of the host for who knows them by hash alone: another sidecar, which has the chain and nothing else of it.

Only the host is looked into, never a lower tier: two sidecars that read from each other must not ask in circles.
A loan pins what it found, like a load, under a lease with a deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from kvstore.block import BlockId, BlockMeta, RootId
from kvstore.index import Rows
from kvstore.lease import LeaseBook
from kvstore.tiers.host import HostTier


@dataclass(frozen=True, slots=True)
class LentBlock:
    """A block of a loan, valid until it is closed.

    Attributes:
        number: position among the ids asked for.
        views: read-only bytes of the asked parts, in the order asked.
        slots: where in the arena they begin.
        meta: what its hash was taken of.
    """

    number: int
    views: tuple[memoryview, ...]
    slots: tuple[int, ...]
    meta: BlockMeta


class Loan:
    """Those of some blocks that lie in the host with all asked parts. A context manager; leaving it returns them.

    Attributes:
        num_bytes: what its blocks take.
        is_cut: there were more than fitted into its limit.
    """

    def __init__(
        self,
        host: HostTier,
        leases: LeaseBook,
        root: RootId,
        blocks: Sequence[BlockId],
        parts: Sequence[int],
        deadline_s: Callable[[], float],
        limit_bytes: int,
    ) -> None:
        """Pin what is there, as much as takes `limit_bytes` at most.

        `deadline_s` says, whenever asked, until when a lease given now holds.
        """
        self._host = host
        self._leases = leases
        self._parts = tuple(parts)
        self._deadline_s = deadline_s
        pool = host.pool
        found, rows = pool.pin_resident(blocks)
        fits = np.array([self._fits(root, row) for row in rows.tolist()], bool)
        sizes = np.array([self._size(row) for row in rows.tolist()], np.int64) * fits
        within = sizes.cumsum() <= limit_bytes
        self.is_cut = bool((fits & ~within).any())
        fits &= within
        self.num_bytes = int(sizes[fits].sum())
        pool.unpin(rows[~fits])
        self._rows: Rows = rows[fits]
        numbers = {block: number for number, block in enumerate(blocks)}
        self._numbers = [numbers[block] for block, fit in zip(found, fits.tolist(), strict=True) if fit]
        self._lease = leases.add(self._rows, deadline_s())

    def _fits(self, root: RootId, row: int) -> bool:
        place, layout = self._host.pool.place_of(row)
        return place == root and set(self._parts) <= set(self._host.pool.ready_parts(row)) & set(layout.all_parts)

    def _size(self, row: int) -> int:
        """Bytes of a block, which is pinned as a whole."""
        return self._host.pool.place_of(row)[1].block_bytes

    @property
    def num_blocks(self) -> int:
        """Blocks this loan has."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[LentBlock]:
        """In the order asked for; ends early where the lease ran out. Ask `intact` after copying from one."""
        for number, row in sorted(zip(self._numbers, self._rows.tolist(), strict=True)):
            if not self._leases.renew(self._lease, self._deadline_s()):
                return
            _, layout = self._host.pool.place_of(row)
            views = self._host.views(row, layout, self._parts)
            slots = self._host.pool.slots_of(row)
            meta = self._host.pool.meta_of(row)
            if not self.intact():  # asked after looking: the row may be another block's by now
                return
            yield LentBlock(
                number, tuple(map(memoryview.toreadonly, views)), tuple(slots[part] for part in self._parts), meta
            )

    def intact(self) -> bool:
        """True while nothing handed out can have been overwritten."""
        return self._lease.alive

    def close(self) -> None:
        """Return the blocks."""
        self._leases.release(self._lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
