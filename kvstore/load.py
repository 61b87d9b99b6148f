# SPDX-License-Identifier: Apache-2.0
"""A load in flight: host blocks at once, blocks of lower tiers as a fetch brings them into slots.

The fetch runs on a thread of the store's; the consumer iterates on its own. A block is handed out only when its
bytes are verified. A load larger than the arena goes in windows: what the consumer has passed gives way, from
the tail, to slots that belong to no block.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import accumulate, takewhile
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from kvstore.api import HOST_TIER, Hint
from kvstore.arena import PAGE_BYTES
from kvstore.block import BlockId, Chain, PartKey
from kvstore.errors import TierError
from kvstore.layout import BlockLayout, PartLayout
from kvstore.lease import Lease, LeaseBook
from kvstore.pool import Reservation, part_mask
from kvstore.stats import Stats
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier

_FIRST_BATCH_BYTES = 128 << 20
_BATCH_BYTES = 512 << 20
"""Asked of a tier at once. Between two batches its connection stands idle: 512 MiB over a local socket took 6 % less in
two batches than in four. The first is smaller, since nothing is asked for until its slots are reserved. Blocks are
handed out as they arrive."""
_SHARE = 2
"""Of the host, that a batch may be."""
_QUICK = 8
"""After a batch that took no more than such a part of its deadline, one of 512 MiB ends within its own."""
_LEAST_GROUP_BYTES = 1 << 20
_MOST_GROUP_BYTES = 16 << 20
"""Blocks become resident, and are handed out, so many bytes at a time: while that goes on nothing is received, and
what a hand-out costs (0.2 ms with the caches full of bulk bytes) is paid once. First and last groups are small: what
is not handed out cannot be copied."""


def batches(
    start: int, stop: int, block_bytes: int, most_bytes: int, deadline_s: float, now_s: Callable[[], float]
) -> Iterator[tuple[int, int]]:
    """Cuts blocks from `start` to `stop` into what is asked of a tier at once, each to be fetched before the next."""
    batch_bytes = _FIRST_BATCH_BYTES
    while start < stop:
        began_s = now_s()
        until = min(stop, start + max(1, min(batch_bytes, most_bytes) // block_bytes))
        yield start, until
        batch_bytes = _BATCH_BYTES if now_s() - began_s < deadline_s / _QUICK else _FIRST_BATCH_BYTES
        start = until


@dataclass(frozen=True, slots=True)
class ReadyBlock:
    """See `kvstore.api.LoadedBlock`."""

    index: int
    tier: str
    views: Sequence[memoryview]
    slots: Sequence[int]
    """Where in the arena the views begin."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to load and where it lies."""

    chain: Chain
    layout: BlockLayout
    parts: tuple[int, ...]
    start: int
    num_host_blocks: int
    """Chain index up to which the host has pinned blocks; the lease's rows are those from 0."""
    sources: tuple[tuple[Tier, int], ...]
    """(tier, number of blocks) that follow, in order."""
    hint: Hint
    read_deadline_s: float
    now_s: Callable[[], float]
    lease_s: float

    @property
    def stop(self) -> int:
        return self.num_host_blocks + sum(num_blocks for _, num_blocks in self.sources)

    def cells(self) -> list[PartLayout]:
        return [self.layout.parts[part] for part in self.parts]


class _Coming:
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


class BlockLoad:
    """Implements `kvstore.api.Load` over a host tier and a lease."""

    def __init__(self, plan: LoadPlan, host: HostTier, leases: LeaseBook, lease: Lease, stats: Stats) -> None:
        self._plan = plan
        self._host = host
        self._leases = leases
        self._lease = lease
        self._stats = stats
        self._ready: dict[int, ReadyBlock] = {}
        self._moved = threading.Condition()
        self._consumed = plan.start
        self._ended = not plan.sources
        self._closed = False
        self._fetching = False
        self._windowed = False
        self._scratch: list[tuple[int, ...]] = []

    @property
    def num_blocks(self) -> int:
        return self._plan.stop - self._plan.start

    @property
    def start(self) -> int:
        """Chain index of the first block."""
        return self._plan.start

    # -- consumer ----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[ReadyBlock]:
        index = self._plan.start
        while index < self._plan.stop:
            self.passed(index)  # asking for the next says that the ones before were copied
            block = self.wait_for(index)
            if block is None:
                return
            yield block
            index += 1
            # Those that came with it: what `passed` and `wait_for` do costs more than a small block does, and before
            # there are windows nobody waits to hear of each.
            while (block := self._ready.get(index)) is not None and not self._windowed and self._holds_on():
                yield block
                index += 1

    def _holds_on(self) -> bool:
        """`renew`, without asking for a lock each time."""
        until_s = self._plan.now_s() + self._plan.lease_s
        return self._lease.alive if until_s < self._lease.deadline_s + self._plan.lease_s / 8 else self.renew()

    def passed(self, index: int) -> None:
        """Every block before chain index `index` was copied: a window may move over them."""
        if self._plan.sources:
            with self._moved:
                self._consumed = max(self._consumed, index)
                if self._windowed:  # nobody waits for this before
                    self._moved.notify_all()

    def wait_for(self, index: int) -> ReadyBlock | None:
        """Block `index` once it is there, which moves no window; None where the load ended before it."""
        plan = self._plan
        with self._moved:
            if self._windowed and index < self._consumed:
                return None  # a window may have moved over it
        if index < plan.num_host_blocks:
            if not self.renew():
                return None
            block = self._block(index, HOST_TIER, int(self._lease.rows[index]))
            if plan.sources:
                with self._moved:
                    self._ready[index] = block
            # Asked again after looking: rows of a lease that ran out meanwhile may hold another block by now.
            return block if self.intact() else None
        with self._moved:
            if index not in self._ready:
                self._moved.wait_for(lambda: index in self._ready or self._ended)
            self._leases.renew(self._lease, plan.now_s() + plan.lease_s)
            return self._ready.get(index) if self._lease.alive else None

    def _block(self, index: int, tier: str, row: int) -> ReadyBlock:
        plan = self._plan
        views = self._host.views(row, plan.layout, plan.parts)
        slots = self._host.pool.slots_of(row)
        return ReadyBlock(
            index, tier, tuple(map(memoryview.toreadonly, views)), tuple(slots[part] for part in plan.parts)
        )

    def intact(self) -> bool:
        return self._lease.alive

    # -- a consumer in another process -------------------------------------------------------------------------

    def host_slots(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Slots [blocks, parts] of the blocks from `start` on that lie in the host, and their generations.

        Empty where the lease has run out.
        """
        plan = self._plan
        rows = self._lease.rows[plan.start : plan.num_host_blocks]
        slots = self._host.pool.slots_at(rows, plan.parts)
        generations = self.generations(slots)
        if not self._lease.alive:  # asked after looking, as above
            return slots[:0], generations[:0]
        return slots, generations

    def generations(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """Generation words of slots that a block was handed out in."""
        return self._host.arena.generation[slots // PAGE_BYTES]

    @property
    def is_whole(self) -> bool:
        """Whether all blocks are there already and stay valid until the load is closed."""
        return not self._plan.sources

    def comes_in_windows(self, index: int) -> bool:
        """Wait until it is known whether block `index` comes only when `passed` says that others were copied."""
        with self._moved:
            self._moved.wait_for(lambda: index in self._ready or self._ended or self._windowed)
            return self._windowed and index not in self._ready and not self._ended

    @property
    def is_fetching(self) -> bool:
        """Whether `close` would have to wait."""
        return self._fetching

    def renew(self) -> bool:
        """Push the lease's deadline out; False where it has run out already."""
        return self._leases.renew(self._lease, self._plan.now_s() + self._plan.lease_s)

    def end(self) -> None:
        """Bring in no more, and wait for nothing; `close` still has to follow."""
        with self._moved:
            self._closed = True
            self._moved.notify_all()

    def close(self) -> None:
        """Release. Waits until a fetch under way has stopped writing to the load's slots."""
        self.end()
        with self._moved:
            self._moved.wait_for(lambda: not self._fetching)
            scratch, self._scratch = self._scratch, []
        for slots in scratch:
            self._host.pool.release_scratch(slots)
        self._leases.release(self._lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- fetch -------------------------------------------------------------------------------------------------

    def begin_fetch(self) -> None:
        """Call before `fetch` is handed to a thread, so that `close` waits for it."""
        self._fetching = True

    def fetch(self) -> None:
        """Bring in what lower tiers hold, in order; ends at the first block that does not come."""
        at = self._plan.num_host_blocks
        block_bytes = sum(cell.num_bytes for cell in self._plan.cells())
        try:
            for tier, num_blocks in self._plan.sources:
                for start, stop in batches(
                    at,
                    at + num_blocks,
                    block_bytes,
                    self._host.arena.capacity_bytes // _SHARE,
                    self._plan.read_deadline_s,
                    self._plan.now_s,
                ):
                    if self._closed or not self._fetch_batch(tier, start, stop):
                        return
                at += num_blocks
        finally:
            with self._moved:
                self._ended = True
                self._fetching = False
                self._moved.notify_all()

    def _fetch_batch(self, tier: Tier, start: int, stop: int) -> bool:
        """True where all of `start` … `stop` was delivered."""
        plan, pool = self._plan, self._host.pool
        blocks = plan.chain.ids[start:stop]
        if not self._scratch:
            reserved, refused = pool.reserve(
                plan.chain.root.id, plan.layout, blocks, lambda at: plan.chain.meta(start + at), plan.parts
            )
            room = stop - refused
            if room > start and not self._read_into_pool(tier, start, room, reserved):
                return False
            start = room
        while start < stop:
            if not self._read_into_scratch(tier, start):
                return False
            start += 1
        return True

    def _read_into_pool(self, tier: Tier, start: int, stop: int, reserved: list[Reservation]) -> bool:
        """Promote: blocks become resident as they arrive. Others may be filling some of them."""
        plan, pool = self._plan, self._host.pool
        into = self._slots_by_key(start, reserved)
        filling = {start + item.position: item for item in reserved}
        pinned: dict[int, Reservation] = {}
        coming = _Coming(list(into), plan.layout, reserved)
        at = self._hand_out(tier, start, stop, filling, pinned)
        group_bytes = _LEAST_GROUP_BYTES
        try:
            with closing(self._reading(tier, into)) as reading:
                for some in reading:
                    if not coming.add(some):
                        break  # a hole: what follows it is of no use
                    if coming.num_bytes >= group_bytes:
                        last_bytes = coming.num_bytes
                        last = self._publish(start, coming.take(), filling, pinned)
                        at = self._hand_out(tier, at, stop, filling, pinned)
                        if at <= last:
                            break  # as is one that others did not bring
                        group_bytes = self._group_bytes(last, last_bytes)
                    if self._closed:
                        break
            if items := coming.take():
                self._publish(start, items, filling, pinned)
            at = self._hand_out(tier, at, stop, filling, pinned)
        finally:
            pool.abort(list(filling.values()))
            self._unpin(pinned.values())
        return at == stop

    def _group_bytes(self, index: int, last_bytes: int) -> int:
        """How many bytes to hand out at once after block `index`, having handed out `last_bytes`."""
        left_bytes = (self._plan.stop - index - 1) * sum(cell.num_bytes for cell in self._plan.cells())
        return min(_MOST_GROUP_BYTES, 2 * last_bytes, max(_LEAST_GROUP_BYTES, left_bytes // 4))

    def _publish(
        self,
        start: int,
        items: Sequence[Reservation],
        filling: dict[int, Reservation],
        pinned: dict[int, Reservation],
    ) -> int:
        """Make blocks resident; pinned from that moment on: a full arena could evict them before the hand-out.

        Their positions count from chain index `start`. Returns the index of the last.
        """
        for item in items:
            del filling[start + item.position]
        done = self._host.pool.publish(items, self._plan.hint, pins=1)
        pinned.update((start + item.position, item) for item in done)
        self._host.pool.may_be_shared([item.row for item in done])
        return start + items[-1].position

    def _unpin(self, items: Iterable[Reservation]) -> None:
        self._host.pool.unpin(np.array([item.row for item in items], np.int64))

    def _slots_by_key(self, start: int, reserved: list[Reservation]) -> dict[PartKey, memoryview]:
        root, ids = self._plan.chain.root.id, self._plan.chain.ids
        sizes, view = [part.num_bytes for part in self._plan.layout.parts], self._host.arena.view
        return {
            PartKey(root, ids[start + item.position], part): view(slot, sizes[part])
            for item in reserved
            for part, slot in zip(item.parts, item.slots, strict=True)
        }

    def _hand_out(
        self, tier: Tier, at: int, stop: int, filling: dict[int, Reservation], pinned: dict[int, Reservation]
    ) -> int:
        """Hand out resident blocks from `at` on, up to the first that this load is filling; returns where it stopped.

        Waits for blocks that somebody else is filling, and stops at one that did not become resident.
        """
        while at < stop and at not in filling and not self._closed:
            ours: list[Reservation] = []
            while (item := pinned.get(at + len(ours))) is not None and len(item.parts) == len(self._plan.parts):
                ours.append(item)
            if ours:
                rows = self._hand_out_ours(tier, at, ours)
                for index in range(at, at + len(rows)):
                    del pinned[index]
            else:
                rows = self._hand_out_others(tier, at, stop, filling, pinned)
            if not rows:
                return at
            at += len(rows)
        return at

    def _hand_out_ours(self, tier: Tier, at: int, items: Sequence[Reservation]) -> list[int]:
        """Blocks that this load brought in whole: their pins become the lease's."""
        rows = [item.row for item in items]
        self._leases.extend(self._lease, rows)
        sizes, view = [cell.num_bytes for cell in self._plan.cells()], self._host.arena.readable
        self._deliver(
            [
                ReadyBlock(index, tier.name, tuple(map(view, item.slots, sizes)), item.slots)
                for index, item in enumerate(items, at)
            ]
        )
        return rows

    def _hand_out_others(
        self, tier: Tier, at: int, stop: int, filling: dict[int, Reservation], pinned: dict[int, Reservation]
    ) -> list[int]:
        """Blocks that others brought in, or of which they are still writing parts."""
        chain = self._plan.chain
        until = at + 1
        while until < stop and until not in filling and until not in pinned:
            until += 1
        rows = self._pin_when_filled(chain.ids[at:until])
        if rows:
            taken = range(at, at + len(rows))
            self._unpin([pinned.pop(index) for index in taken if index in pinned])
            self._leases.extend(self._lease, rows)
            self._deliver([self._block(at + number, tier.name, row) for number, row in enumerate(rows)])
        return rows

    def _pin_when_filled(self, blocks: Sequence[BlockId]) -> list[int]:
        """Pin those of consecutive blocks that lead and are there, having waited for the first to be filled."""
        plan, need = self._plan, part_mask(self._plan.layout, self._plan.parts)
        rows = self._host.pool.pin_when_filled(blocks, need, plan.chain.root.id, plan.read_deadline_s)
        pinned: list[int] = rows.tolist()
        return pinned

    def _retire(self) -> None:
        """Take back the views of blocks that were passed: who kept one is refused rather than shown other bytes."""
        with self._moved:
            for index in [index for index in self._ready if index < self._consumed]:
                for view in self._ready.pop(index).views:
                    with suppress(BufferError):  # something was made over it, which is its maker's to drop
                        view.release()

    def _read_into_scratch(self, tier: Tier, index: int) -> bool:
        """One block of a load larger than the arena, in slots that belong to no block."""
        plan = self._plan
        with self._moved:  # every block handed out so far must have been copied by its consumer
            self._windowed = True
            self._moved.notify_all()
            if not self._moved.wait_for(lambda: self._closed or self._consumed >= index, timeout=plan.read_deadline_s):
                return False
        if self._closed:
            return False
        self._retire()
        if self._scratch:
            slots = self._scratch[-1]
            # Another block's from here on: who copies late, from elsewhere, must be able to tell.
            self._host.arena.generation[np.array(slots) // PAGE_BYTES] += 1
        else:
            found = self._acquire_window()
            if found is None:
                return False
            slots = found
            self._scratch.append(slots)
        into = {
            PartKey(plan.chain.root.id, plan.chain.ids[index], cell.part): self._host.arena.view(slot, cell.num_bytes)
            for cell, slot in zip(plan.cells(), slots, strict=True)
        }
        if sum(map(len, self._reading(tier, into))) != len(into):
            return False
        views = tuple(view.toreadonly() for view in into.values())
        self._deliver([ReadyBlock(index, tier.name, views, slots)])
        return True

    def _acquire_window(self) -> tuple[int, ...] | None:
        """Scratch slots, giving up pins of consumed blocks from the tail until there is room."""
        sizes = [cell.num_bytes for cell in self._plan.cells()]
        while (slots := self._host.pool.acquire_scratch(sizes)) is None:
            if not self._lease.alive or not len(self._lease.all_rows()):
                return None
            self._leases.shorten(self._lease, 1)
        return slots

    def _reading(self, tier: Tier, into: dict[PartKey, memoryview]) -> Generator[Sequence[PartKey], None, None]:
        """Keys as the tier fills them; a failure of the tier ends it, counted."""
        if not into:
            return
        began_s = self._plan.now_s()
        try:
            yield from tier.read(into, self._plan.read_deadline_s)
        except TierError:
            self._stats.add(f"{tier.name}.read_failures")
        finally:
            seconds = self._plan.now_s() - began_s
            self._stats.add(f"{tier.name}.read_s", seconds)  # what was read, the tier counts itself
            self._stats.observe(f"{tier.name}.read", seconds)

    def _deliver(self, blocks: Sequence[ReadyBlock]) -> None:
        with self._moved:
            self._ready.update((block.index, block) for block in blocks)
            self._moved.notify_all()
