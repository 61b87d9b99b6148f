# SPDX-License-Identifier: Apache-2.0
"""Where the two threads of a load meet: one brings blocks in (`kvstore.fetch`), one takes them (`kvstore.load`).

Invariants
1. A block is handed out only when its bytes are verified, and with its row in the lease: it stays until the lease ends.
2. Slots of a window get other bytes only once the consumer has said that it passed what they held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.api import Hint
from kvstore.block import Chain
from kvstore.layout import BlockLayout, PartLayout
from kvstore.lease import Lease, LeaseBook
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier


class Cells(NamedTuple):
    """What lies in the slots of a load's blocks."""

    readable: Callable[[int, int], memoryview]
    """Bytes of a slot, for who only reads."""
    sizes: tuple[int, ...]


class ReadyBlock:
    """See `kvstore.api.LoadedBlock`. Thousands are made in a load: views only of those that somebody looks at."""

    __slots__ = ("_cells", "_views", "index", "slots", "tier")

    def __init__(self, index: int, tier: str, slots: Sequence[int], cells: Cells) -> None:
        self.index = index
        self.tier = tier
        self.slots = slots
        """Where in the arena the views begin."""
        self._cells: Cells | None = cells
        self._views: tuple[memoryview, ...] | None = None

    @property
    def views(self) -> Sequence[memoryview]:
        """Raises ValueError where they were taken back."""
        if self._views is not None:
            return self._views
        cells = self._cells
        if cells is None:
            raise ValueError("the load has moved its window over this block")
        self._views = tuple(map(cells.readable, self.slots, cells.sizes))
        if self._cells is None:  # since it was looked at
            self.take_back()
        return self._views

    def take_back(self) -> None:
        """Other bytes are about to lie here: who kept a view is refused rather than shown them."""
        self._cells = None
        for view in self._views or ():
            with suppress(BufferError):  # something was made over it, which is its maker's to drop
                view.release()


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
    stays: Mapping[str, int]
    """Numbers of the tiers, by their names, that keep what is read from them."""

    @property
    def stop(self) -> int:
        return self.num_host_blocks + sum(num_blocks for _, num_blocks in self.sources)

    def cells(self) -> list[PartLayout]:
        return [self.layout.parts[part] for part in self.parts]


class Delivery:
    """The blocks of one load that are there, the lease that keeps them, and how far both sides are. Thread-safe.

    Attributes:
        ready: blocks that can be taken, by chain index. The consumer may look without a lock.
        windowed: blocks come in slots that others of them had, from now on; it only becomes true.
        stopped: no more is to be brought in; nobody waits for anything.
        fetching: a thread may be writing to the load's slots.
    """

    def __init__(self, plan: LoadPlan, host: HostTier, leases: LeaseBook, lease: Lease) -> None:
        self.plan = plan
        self.host = host
        self.lease = lease
        self.cells = Cells(host.arena.readable, tuple(cell.num_bytes for cell in plan.cells()))
        self.ready: dict[int, ReadyBlock] = {}
        self.windowed = False
        self.stopped = False
        self.fetching = False
        self._leases = leases
        self._moved = threading.Condition()
        self._passed = plan.start
        self._ended = not plan.sources

    # -- the lease ---------------------------------------------------------------------------------------------

    def renew(self) -> bool:
        """Push the lease's deadline out; False where it has run out already."""
        return self._leases.renew(self.lease, self.plan.now_s() + self.plan.lease_s)

    def shorten(self) -> bool:
        """Let go of the last block that the lease keeps; False where it keeps none."""
        if not self.lease.alive or not len(self.lease.all_rows()):
            return False
        self._leases.shorten(self.lease, 1)
        return True

    def release(self) -> None:
        """End the lease."""
        self._leases.release(self.lease)

    # -- for who brings blocks in ------------------------------------------------------------------------------

    def block(self, index: int, tier: str, row: int) -> ReadyBlock:
        """A resident block that is pinned."""
        slots = self.host.pool.slots_of(row)
        return ReadyBlock(index, tier, tuple(slots[part] for part in self.plan.parts), self.cells)

    def hand_out(self, blocks: Sequence[ReadyBlock], rows: Sequence[int] = ()) -> None:
        """Verified blocks can be taken. The pins of their rows become the lease's."""
        if rows:
            self._leases.extend(self.lease, rows)
        with self._moved:
            self.ready.update(zip([block.index for block in blocks], blocks, strict=True))
            self._moved.notify_all()

    def begin_window(self, index: int) -> bool:
        """Wait until all blocks before `index` were passed, and take back their views.

        From here on blocks come in windows. False where the load was stopped, or nobody passed them in time.
        """
        with self._moved:
            self.windowed = True
            self._moved.notify_all()
            if not self._moved.wait_for(
                lambda: self.stopped or self._passed >= index, timeout=self.plan.read_deadline_s
            ):
                return False
            if self.stopped:
                return False
            for passed in [each for each in self.ready if each < self._passed]:
                self.ready.pop(passed).take_back()
            return True

    def fetch_ended(self) -> None:
        """No more comes, and nobody writes to the load's slots any more."""
        with self._moved:
            self._ended = True
            self.fetching = False
            self._moved.notify_all()

    # -- for who takes them ------------------------------------------------------------------------------------

    def note(self, block: ReadyBlock) -> None:
        """A block of the host was taken: a window takes its views back, too."""
        with self._moved:
            self.ready[block.index] = block

    def wait_for(self, index: int) -> ReadyBlock | None:
        """Block `index` once it is there; None where the load ended before it."""
        with self._moved:
            if index not in self.ready:
                self._moved.wait_for(lambda: index in self.ready or self._ended)
            return self.ready.get(index)

    def pass_to(self, index: int) -> None:
        """Every block before chain index `index` was copied: a window may move over them."""
        with self._moved:
            self._passed = max(self._passed, index)
            if self.windowed:  # nobody waits for this before
                self._moved.notify_all()

    def is_passed(self, index: int) -> bool:
        """Whether a window may have moved over block `index`."""
        with self._moved:
            return self.windowed and index < self._passed

    def comes_in_windows(self, index: int) -> bool:
        """Wait until it is known whether block `index` comes only when `pass_to` says that others were copied."""
        with self._moved:
            self._moved.wait_for(lambda: index in self.ready or self._ended or self.windowed)
            return self.windowed and index not in self.ready and not self._ended

    def stop(self) -> None:
        """Bring in no more, and wait for nothing."""
        with self._moved:
            self.stopped = True
            self._moved.notify_all()

    def wait_fetched(self) -> None:
        """Wait until nobody writes to the load's slots."""
        with self._moved:
            self._moved.wait_for(lambda: not self.fetching)
