# SPDX-License-Identifier: Apache-2.0
"""Promotion of consecutive blocks of a load: they become resident as a tier brings them, and are handed out in order.

Some of them others may be filling just then, or have brought meanwhile: those are waited for, and handed out in their
place. Where one does not come, what follows it is of no use, and the promotion ends there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import accumulate, chain, islice, repeat, takewhile
from types import TracebackType
from typing import Self

import numpy as np

from kvstore.block import PartKey, named
from kvstore.delivery import Delivery, ReadyBlock
from kvstore.filling import Reservation
from kvstore.layout import BlockLayout
from kvstore.pool import part_mask

_LEAST_GROUP_BYTES = 2 << 20
_MOST_GROUP_BYTES = 64 << 20
"""Blocks become resident, and are handed out, so many bytes at a time: what that costs (0.2 ms with the caches full of
bulk bytes, in which a tier receives what its socket has room for) is paid once. First and last groups are small:
what is not handed out cannot be copied."""


class Coming:
    """How far the parts of reserved blocks have come, which they do in their order."""

    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout
        self._keys: list[PartKey] = []
        self._num_keys = 0
        self._reserved: list[Reservation] = []
        self._num_taken = 0
        self._key_ends: list[int] = []
        self._byte_ends = [0]

    def expect(self, keys: Iterable[PartKey], reserved: Sequence[Reservation]) -> None:
        """These are to come next."""
        cells = self._layout.parts
        sizes = {parts: sum(cells[part].num_bytes for part in parts) for parts in {item.parts for item in reserved}}
        key_ends = accumulate((len(item.parts) for item in reserved), initial=len(self._keys))
        byte_ends = accumulate((sizes[item.parts] for item in reserved), initial=self._byte_ends.pop())
        self._keys += keys
        self._reserved += reserved
        self._key_ends += islice(key_ends, 1, None)
        self._byte_ends += byte_ends

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
    """Blocks of a load from `start` on; `reserve` says which of them are filled here, and how far it goes.

    A context: what is not resident when it is left never was.
    """

    def __init__(self, delivery: Delivery, tier_name: str, start: int) -> None:
        self._delivery = delivery
        self._pool = delivery.host.pool
        self._tier_name = tier_name
        self._at = start  # the next to be handed out
        self.stop = start
        """Index up to which blocks have slots, or are there."""
        self._coming = Coming(delivery.plan.layout)
        self._pinned: deque[Reservation] = deque()  # resident since we filled them, and not handed out yet
        self._filling: deque[Reservation] = deque()  # all that follow

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.filling.abort(list(self._filling))
        self._unpin(self._pinned)

    def reserve(self, stop: int, *, alone: bool = False) -> dict[PartKey, memoryview]:
        """Go on to `stop`, or as far as there is room. Gives where the tier is to put which part, in their order.

        `alone`: not where others have begun with what comes next. To wait for them in the middle of a reading would
        keep a connection from them, and what came after theirs could not become resident before.
        """
        plan = self._delivery.plan
        root, ids, cells = plan.chain.root.id, plan.chain.ids, plan.layout.parts
        reserved, num_refused = self._pool.filling.reserve(
            root, plan.layout, ids[self.stop : stop], plan.chain.metas, plan.parts, self.stop
        )
        if alone and not (reserved and reserved[0].at == self.stop):
            self._pool.filling.abort(reserved)
            return {}
        self.stop = stop - num_refused
        self._filling += reserved
        parts = [part for item in reserved for part in item.parts]
        keys = named(PartKey, repeat(root), [ids[item.at] for item in reserved for _ in item.parts], parts)
        slots = chain.from_iterable(item.slots for item in reserved)
        views = self._delivery.host.arena.views(slots, [cells[part].num_bytes for part in parts])
        into = dict(zip(keys, views, strict=True))
        self._coming.expect(into, reserved)
        return into

    def run(self, reading: Generator[Sequence[PartKey], None, None]) -> bool:
        """Hand out what `reading` says has come, and what others bring; whether that is all. Ends the reading."""
        coming, group_bytes = self._coming, _LEAST_GROUP_BYTES
        with closing(reading):
            self._hand_out()
            if self._at < self.stop and not (self._filling and self._filling[0].at == self._at):
                return False  # others did not bring theirs, or nobody wants more
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
        return self._at == self.stop

    def _group_bytes(self, index: int, last_bytes: int) -> int:
        """How many bytes to hand out at once after block `index`, having handed out `last_bytes`."""
        plan = self._delivery.plan
        left_bytes = (plan.stop - index - 1) * sum(cell.num_bytes for cell in plan.cells())
        return min(_MOST_GROUP_BYTES, 2 * last_bytes, max(_LEAST_GROUP_BYTES, left_bytes // 2))

    def _publish(self, items: Sequence[Reservation]) -> int:
        """Make the first of what is being filled resident; pinned from that moment on, or a full arena could evict it.

        Returns the index of the last.
        """
        for _ in items:
            self._filling.popleft()
        plan = self._delivery.plan
        done = self._pool.filling.publish(items, plan.hint, pins=1, below=plan.stays.get(self._tier_name))
        self._pinned += done
        self._pool.may_be_shared([item.row for item in done])
        return items[-1].at

    def _unpin(self, items: Iterable[Reservation]) -> None:
        self._pool.unpin(np.array([item.row for item in items], np.int64))

    def _hand_out(self) -> None:
        """Hand out resident blocks up to the first that this load is filling, or that others did not bring."""
        delivery, num_parts = self._delivery, len(self._delivery.plan.parts)
        while self._at < self.stop and not delivery.stopped:
            num_blocks = 0
            for item in self._pinned:
                if item.at != self._at + num_blocks or len(item.parts) != num_parts:
                    break
                num_blocks += 1
            if num_blocks:
                self._hand_out_ours(list(islice(self._pinned, num_blocks)))
            elif self._filling and self._filling[0].at == self._at:
                return
            else:
                num_blocks = self._hand_out_others()
                if not num_blocks:
                    return
            self._at += num_blocks

    def _hand_out_ours(self, items: Sequence[Reservation]) -> None:
        """Blocks that this load brought in whole."""
        name, cells = self._tier_name, self._delivery.cells
        self._delivery.hand_out(
            [ReadyBlock(item.at, name, item.slots, cells) for item in items],
            [item.row for item in items],
        )
        for _ in items:
            self._pinned.popleft()

    def _hand_out_others(self) -> int:
        """Blocks that others brought in, or of which they are still writing parts; waits for the first."""
        plan, delivery, at = self._delivery.plan, self._delivery, self._at
        shared = self._pinned.popleft() if self._pinned and self._pinned[0].at == at else None
        try:
            next_ours = (queue[0].at for queue in (self._pinned, self._filling) if queue)
            blocks, need = plan.chain.ids[at : next(next_ours, self.stop)], part_mask(plan.layout, plan.parts)
            pinned = self._pool.pin_when_filled(blocks, need, plan.chain.root.id, plan.read_deadline_s)
        finally:
            if shared is not None:
                self._unpin([shared])
        rows = pinned.tolist()
        if rows:
            try:
                ready = [delivery.block(at + each, self._tier_name, row) for each, row in enumerate(rows)]
            except BaseException:
                self._pool.unpin(pinned)
                raise
            delivery.hand_out(ready, rows)
        return len(rows)
