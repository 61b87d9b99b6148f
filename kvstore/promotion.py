# SPDX-License-Identifier: Apache-2.0
"""Promotion of consecutive blocks of a load: they become resident as a tier brings them, and are handed out in order.

Some of them others may be filling just then, or have brought meanwhile: those are waited for, and handed out in their
place. Where one does not come, what follows it is of no use, and the promotion ends there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import accumulate, takewhile
from types import TracebackType
from typing import Self

import numpy as np

from kvstore.block import PartKey
from kvstore.delivery import Delivery, ReadyBlock
from kvstore.layout import BlockLayout
from kvstore.pool import Reservation, part_mask

_LEAST_GROUP_BYTES = 1 << 20
_MOST_GROUP_BYTES = 64 << 20
"""Blocks become resident, and are handed out, so many bytes at a time: while that goes on nothing is received, and
what a hand-out costs (0.2 ms with the caches full of bulk bytes) is paid once. First and last groups are small: what
is not handed out cannot be copied."""


class Coming:
    """How far the parts of reserved blocks have come, which they do in their order."""

    def __init__(self, keys: list[PartKey], layout: BlockLayout, reserved: list[Reservation]) -> None:
        sizes = {parts: sum(layout.parts[part].num_bytes for part in parts) for parts in {x.parts for x in reserved}}
        self._keys = keys
        self._num_keys = 0
        self._reserved = reserved
        self._num_taken = 0
        self._key_ends = list(accumulate(len(item.parts) for item in reserved))
        self._byte_ends = [0, *accumulate(sizes[item.parts] for item in reserved)]

    def add(self, keys: Sequence[PartKey]) -> bool:
        """These have come; False where others should have come before one of them."""
        expected, num_same = self._keys[self._num_keys : self._num_keys + len(keys)], len(keys)
        if expected != list(keys):
            num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(expected, keys, strict=False)))
        self._num_keys += num_same
        return num_same == len(keys)

    @property
    def num_bytes(self) -> int:
        """Of blocks that are there whole, and were not taken yet."""
        return self._byte_ends[self._num_whole] - self._byte_ends[self._num_taken]

    @property
    def _num_whole(self) -> int:
        return bisect_right(self._key_ends, self._num_keys)

    def take(self) -> list[Reservation]:
        """These blocks, once."""
        first, self._num_taken = self._num_taken, self._num_whole
        return self._reserved[first : self._num_taken]


class Promotion:
    """Blocks `start` … `stop` of a load, of which `reserved` are to be filled; their positions count from `start`.

    A context: what is not resident when it is left never was.
    """

    def __init__(self, delivery: Delivery, tier_name: str, start: int, stop: int, reserved: list[Reservation]) -> None:
        self._delivery = delivery
        self._pool = delivery.host.pool
        self._tier_name = tier_name
        self._start = start
        self._stop = stop
        self._at = start  # the next to be handed out
        self._reserved = reserved
        self._filling = {start + item.position: item for item in reserved}
        self._pinned: dict[int, Reservation] = {}  # resident since we filled them, and not handed out yet

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.abort(list(self._filling.values()))
        self._unpin(self._pinned.values())

    def slots(self) -> dict[PartKey, memoryview]:
        """Where the tier is to put which part, in the order in which they are to come."""
        chain, layout = self._delivery.plan.chain, self._delivery.plan.layout
        sizes, view = [part.num_bytes for part in layout.parts], self._delivery.host.arena.view
        return {
            PartKey(chain.root.id, chain.ids[self._start + item.position], part): view(slot, sizes[part])
            for item in self._reserved
            for part, slot in zip(item.parts, item.slots, strict=True)
        }

    def run(self, coming: Coming, reading: Generator[Sequence[PartKey], None, None]) -> bool:
        """Hand out what `reading` says has come, and what others bring; whether that is all. Ends the reading."""
        self._hand_out()
        group_bytes = _LEAST_GROUP_BYTES
        with closing(reading):
            for some in reading:
                if not coming.add(some):
                    break  # a hole: what follows it is of no use
                if coming.num_bytes >= group_bytes:
                    last_bytes = coming.num_bytes
                    last = self._publish(coming.take())
                    self._hand_out()
                    if self._at <= last:
                        break  # as is one that others did not bring
                    group_bytes = self._group_bytes(last, last_bytes)
                if self._delivery.stopped:
                    break
        if items := coming.take():
            self._publish(items)
        self._hand_out()
        return self._at == self._stop

    def _group_bytes(self, index: int, last_bytes: int) -> int:
        """How many bytes to hand out at once after block `index`, having handed out `last_bytes`."""
        plan = self._delivery.plan
        left_bytes = (plan.stop - index - 1) * sum(cell.num_bytes for cell in plan.cells())
        return min(_MOST_GROUP_BYTES, 2 * last_bytes, max(_LEAST_GROUP_BYTES, left_bytes // 4))

    def _publish(self, items: Sequence[Reservation]) -> int:
        """Make blocks resident; pinned from that moment on: a full arena could evict them before the hand-out.

        Returns the index of the last.
        """
        for item in items:
            del self._filling[self._start + item.position]
        plan = self._delivery.plan
        done = self._pool.publish(items, plan.hint, pins=1, below=plan.stays.get(self._tier_name))
        self._pinned.update((self._start + item.position, item) for item in done)
        self._pool.may_be_shared([item.row for item in done])
        return self._start + items[-1].position

    def _unpin(self, items: Iterable[Reservation]) -> None:
        self._pool.unpin(np.array([item.row for item in items], np.int64))

    def _hand_out(self) -> None:
        """Hand out resident blocks up to the first that this load is filling, or that others did not bring."""
        delivery, num_parts = self._delivery, len(self._delivery.plan.parts)
        while self._at < self._stop and self._at not in self._filling and not delivery.stopped:
            ours: list[Reservation] = []
            while (item := self._pinned.get(self._at + len(ours))) is not None and len(item.parts) == num_parts:
                ours.append(item)
            num_blocks = self._hand_out_ours(ours) if ours else self._hand_out_others()
            if not num_blocks:
                return
            self._at += num_blocks

    def _hand_out_ours(self, items: Sequence[Reservation]) -> int:
        """Blocks that this load brought in whole."""
        sizes = [cell.num_bytes for cell in self._delivery.plan.cells()]
        view, name = self._delivery.host.arena.readable, self._tier_name
        self._delivery.hand_out(
            [
                ReadyBlock(index, name, tuple(map(view, item.slots, sizes)), item.slots)
                for index, item in enumerate(items, self._at)
            ],
            [item.row for item in items],
        )
        for index in range(self._at, self._at + len(items)):
            del self._pinned[index]
        return len(items)

    def _hand_out_others(self) -> int:
        """Blocks that others brought in, or of which they are still writing parts; waits for the first."""
        plan, delivery, at = self._delivery.plan, self._delivery, self._at
        until = at + 1
        while until < self._stop and until not in self._filling and until not in self._pinned:
            until += 1
        blocks, need = plan.chain.ids[at:until], part_mask(plan.layout, plan.parts)
        pinned = self._pool.pin_when_filled(blocks, need, plan.chain.root.id, plan.read_deadline_s)
        rows = pinned.tolist()
        if rows:
            taken = range(at, at + len(rows))
            self._unpin([self._pinned.pop(index) for index in taken if index in self._pinned])
            try:
                ready = [delivery.block(at + each, self._tier_name, row) for each, row in enumerate(rows)]
            except BaseException:
                self._pool.unpin(pinned)
                raise
            delivery.hand_out(ready, rows)
        return len(rows)
