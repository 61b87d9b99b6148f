# SPDX-License-Identifier: Apache-2.0
"""The device overlay: blocks kept in device memory above any store, for engines without a paged pool.

Own index, budget and policy, over the same pool as the host tier. Blocks are whole (all parts in one slot of
canonical bytes), and slots are rows of one tensor allocated at the start, so the budget is what is taken.
On a machine without a device it lies in host memory, and the budget holds all the same.

Nobody waits for copies between it and the engine, on the host or otherwise: they all run on one stream (see
`kvstore.row_copy`). A block can be matched as soon as the copy that fills it was submitted, and its row goes to
another block as soon as the last copy out of it was: what comes after runs after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
import torch

from kvstore.api import NO_HINT, Hint
from kvstore.block import Chain, ModelId
from kvstore.clock import Clock, MonotonicClock
from kvstore.errors import ConfigError
from kvstore.index import Rows as Pinned
from kvstore.layout import BlockLayout, engine_dtype, layout_of
from kvstore.policies import POLICIES, Policy
from kvstore.pool import BlockPool
from kvstore.row_copy import Rows


class _Slots:
    """Slots of one size, by number. Implements the pool's `Slots`."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_acquired = 0
        self._free = list(range(num_slots))[::-1]

    def acquire_many(self, num_bytes: int, count: int) -> list[int]:
        taken = self._free[::-1][:count]
        del self._free[len(self._free) - len(taken) :]
        self.num_acquired += len(taken)
        return taken

    def release_many(self, slots: Sequence[int]) -> None:
        self.num_acquired -= len(slots)
        self._free += slots

    def same_class(self, one_bytes: int, other_bytes: int) -> bool:
        return True

    def below_share(self, num_bytes: int) -> bool:
        return False

    def extent_of(self, slot: int) -> range:
        return range(slot, slot + 1)

    def check(self) -> list[str]:
        if len(set(self._free)) != len(self._free) or len(self._free) + self.num_acquired != self.num_slots:
            return [f"device: {self.num_slots} slots, {len(self._free)} free, {self.num_acquired} counted out"]
        return []


class DeviceRun:
    """The leading blocks of a chain that are on the device, pinned. A context manager; leaving it unpins.

    To be left when the copies out of it were submitted; they need not be done.
    """

    def __init__(self, pool: BlockPool, memory: torch.Tensor, pinned: Pinned) -> None:
        self._pool = pool
        self._pinned = pinned
        self.rows = Rows(memory, np.arange(len(pinned)), pool.slots_at(pinned, (0,))[:, 0])
        """Head to tail; read only."""

    @property
    def num_blocks(self) -> int:
        return len(self.rows)

    def release(self) -> None:
        """Unpin. What is submitted after that must not read the rows. Idempotent."""
        pinned, self._pinned = self._pinned, self._pinned[:0]
        self.rows = self.rows.cut(0, 0)
        self._pool.unpin(pinned)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class DeviceOverlay:
    """Blocks of one model in device memory.

    Args:
        layout: the model's; its part grid does not matter here.
        device: where the blocks lie.
        budget_bytes: memory to take, rounded down to whole blocks; allocated now.
        policy: a name in POLICIES, with policy_options.

    Raises ConfigError where the budget is less than one block.
    """

    def __init__(
        self,
        layout: BlockLayout,
        device: torch.device | str,
        budget_bytes: int,
        *,
        policy: str = "lru",
        policy_options: Mapping[str, object] | None = None,
        clock: Clock | None = None,
    ) -> None:
        # Above the link nothing is packed: what a lossy namespace keeps here is what it would unpack.
        whole: ModelId = replace(
            layout.model, part_layers=0, part_heads=0, kv_dtype=engine_dtype(layout.model.kv_dtype)
        )
        self.layout = layout_of(whole)
        if budget_bytes < self.layout.block_bytes:
            raise ConfigError(
                f"device budget is {budget_bytes} bytes, one block of {whole.model!r} takes "
                f"{self.layout.block_bytes}: raise the budget, lower block_tokens, or set it to 0 for no overlay"
            )
        self.num_slots = budget_bytes // self.layout.block_bytes
        dtype: torch.dtype = getattr(torch, whole.kv_dtype)
        shape = (self.num_slots, *self.layout.parts[0].shape)
        # zeros, not empty: the pages are faulted in now rather than under the first requests.
        self._memory = torch.zeros(shape, dtype=dtype, device=device)
        made: Policy = POLICIES.load(policy)(POLICIES.options(policy, policy_options or {}))
        self._pool = BlockPool(_Slots(self.num_slots), made)
        self._pool.open(self.layout, self.num_slots)
        self._clock = clock or MonotonicClock()
        self._num_hits = 0
        self._num_missed = 0

    def match(self, chain: Chain, *, hint: Hint = NO_HINT) -> DeviceRun:
        """The leading blocks of `chain` that are here, pinned and touched."""
        rows = self._pool.pin_leading(chain.ids, 1, chain.root.id)
        self._num_hits += len(rows)
        self._num_missed += len(chain) - len(rows)
        self.touch(chain, len(rows), hint=replace(hint, asked=True))
        return DeviceRun(self._pool, self._memory, rows)

    def save(
        self,
        chain: Chain,
        start: int,
        stop: int,
        copy_into: Callable[[Rows], None],
        *,
        hint: Hint = NO_HINT,
    ) -> int:
        """Take in blocks `start` … `stop`, evicting as needed; returns how many are new here.

        `copy_into(rows)` submits the copies that fill them; if it raises, none is taken in. Blocks that are here
        already are passed over, and so are those that find no room or whose parent is not here.
        """
        reserved, _ = self._pool.filling.reserve(
            chain.root.id, self.layout, chain.ids[start:stop], chain.metas, (0,), start
        )
        if reserved:
            try:
                places = np.array([(item.at, item.slots[0]) for item in reserved], np.int64)
                copy_into(Rows(self._memory, places[:, 0], places[:, 1]))
            except BaseException:
                self._pool.filling.abort(reserved)
                raise
        published = self._pool.filling.publish(reserved, self._filled_in(hint))
        self.touch(chain, stop, hint=hint)
        return len(published)

    def touch(self, chain: Chain, num_blocks: int, *, hint: Hint = NO_HINT) -> None:
        """Say that the first `num_blocks` were used."""
        self._pool.touch(chain.ids, num_blocks, self._filled_in(hint))

    def _filled_in(self, hint: Hint) -> Hint:
        return replace(hint, time_s=self._clock.now_s(), block_tokens=self.layout.model.block_tokens)

    def clear(self) -> int:
        """Drop every block that is not pinned. Returns how many stopped being matchable."""
        return self._pool.clear()

    def stats(self) -> dict[str, float]:
        """Counters and gauges by dotted name, as `Store.stats`."""
        return {
            "device.blocks": len(self._pool),
            "device.capacity_bytes": self.num_slots * self.layout.block_bytes,
            "device.evicted_blocks": self._pool.survey.num_evicted,
            "device.hit_blocks": self._num_hits,
            "device.missed_blocks": self._num_missed,
        }

    def check(self) -> list[str]:
        """Broken invariants; empty when healthy."""
        faults = self._pool.check()
        if pinned := self._pool.survey.pinned_rows():
            faults.append(f"device: {pinned} blocks are pinned")
        return faults
