# SPDX-License-Identifier: Apache-2.0
"""A load in flight, as its consumer has it: blocks of the host at once, those of lower tiers as they are brought in.

The consumer iterates on its own thread, or, where it is another process, asks by index; `kvstore.fetch` brings blocks
in on another thread, and `kvstore.delivery` is where the two meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from kvstore.api import HOST_TIER, LoadedRun
from kvstore.arena import PAGE_BYTES
from kvstore.delivery import Delivery, LoadPlan, ReadyBlock
from kvstore.fetch import Fetch
from kvstore.lease import Lease, LeaseBook
from kvstore.stats import Stats
from kvstore.tiers.host import HostTier


class BlockLoad:
    """Implements `kvstore.api.Load` over a host tier and a lease."""

    def __init__(self, plan: LoadPlan, host: HostTier, leases: LeaseBook, lease: Lease, stats: Stats) -> None:
        self._plan = plan
        self._host = host
        self._lease = lease
        self._delivery = Delivery(plan, host, leases, lease)
        self._fetch = Fetch(self._delivery, stats)

    @property
    def num_blocks(self) -> int:
        return self._plan.stop - self._plan.start

    @property
    def start(self) -> int:
        """Chain index of the first block."""
        return self._plan.start

    def begin_fetch(self) -> Callable[[], None]:
        """What brings in the blocks of lower tiers, to be run on a thread. From here on `close` waits for it."""
        self._delivery.fetching = True
        return self._fetch.run

    # -- consumer ----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[ReadyBlock]:
        return self._others() if self._plan.sources else self._residents()

    def _residents(self) -> Iterator[ReadyBlock]:
        """Blocks of a load that has them all: looked up at once, for 5 µs each were half of what 512 of them took."""
        plan, lease, cells = self._plan, self._lease, self._delivery.cells
        if not self.renew():
            return
        slots = self._host.pool.slots_at(lease.rows[plan.start : plan.num_host_blocks], plan.parts).tolist()
        for index, each in enumerate(slots, plan.start):
            # Asked after looking: rows of a lease that ran out meanwhile may hold another block by now.
            fresh_s = lease.deadline_s - plan.lease_s * 7 / 8
            if not (lease.alive if plan.now_s() < fresh_s else self.renew()):
                return
            yield ReadyBlock(index, HOST_TIER, each, cells)

    def _others(self) -> Iterator[ReadyBlock]:
        index, delivery = self._plan.start, self._delivery
        while index < self._plan.stop:
            self.passed(index)  # asking for the next says that the ones before were copied
            block = self.wait_for(index)
            if block is None:
                return
            yield block
            index += 1
            # Those that came with it: what `passed` and `wait_for` do costs more than a small block does, and before
            # there are windows nobody waits to hear of each.
            now_s, lease = self._plan.now_s, self._lease
            fresh_s = lease.deadline_s - self._plan.lease_s * 7 / 8  # until then it need not be renewed
            while (
                (block := delivery.ready.get(index)) is not None
                and not delivery.windowed
                and (lease.alive if now_s() < fresh_s else self.renew())
            ):
                yield block
                index += 1

    def passed(self, index: int) -> None:
        """Every block before chain index `index` was copied: a window may move over them."""
        if self._plan.sources:
            self._delivery.pass_to(index)

    def wait_for(self, index: int) -> ReadyBlock | None:
        """Block `index` once it is there, which moves no window; None where the load ended before it."""
        plan, delivery = self._plan, self._delivery
        if plan.sources and delivery.is_passed(index):
            return None  # a window may have moved over it
        if index < plan.num_host_blocks:
            if not self.renew():
                return None
            block = delivery.block(index, HOST_TIER, int(self._lease.rows[index]))
            if plan.sources:
                delivery.note(block)
            # Asked again after looking: rows of a lease that ran out meanwhile may hold another block by now.
            return block if self.intact() else None
        brought = delivery.wait_for(index)
        self.renew()
        return brought if self.intact() else None

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

    def run(self) -> LoadedRun | None:
        """See `kvstore.api.GivesRun`. Without blocks where the lease has run out."""
        if not self.is_whole:
            return None
        self.renew()
        arena = self._host.arena
        return LoadedRun(self._plan.start, HOST_TIER, arena.readable(0, arena.capacity_bytes), self.host_slots()[0])

    def comes_in_windows(self, index: int) -> bool:
        """Wait until it is known whether block `index` comes only when `passed` says that others were copied."""
        return self._delivery.comes_in_windows(index)

    # -- its end -----------------------------------------------------------------------------------------------

    @property
    def is_fetching(self) -> bool:
        """Whether `close` would have to wait."""
        return self._delivery.fetching

    def renew(self) -> bool:
        """Push the lease's deadline out; False where it has run out already."""
        return self._delivery.renew()

    def stop(self) -> None:
        """Bring in no more, and wait for nothing; `close` still has to follow."""
        self._delivery.stop()

    def close(self) -> None:
        """Release. Waits until a fetch under way has stopped writing to the load's slots."""
        self._delivery.stop()
        self._delivery.wait_fetched()
        self._fetch.release()
        self._delivery.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
