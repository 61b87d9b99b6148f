# SPDX-License-Identifier: Apache-2.0
"""The host tier: blocks in the arena, the gateway every byte passes on its way up or down.

Not a keyed `Tier`: engines and lower tiers read and write its slots in place, so that bytes move once. A
copying `read`/`write` here would be a second way to do the same, used by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.arena import PAGE_BYTES, Arena, slot_stride
from kvstore.errors import ConfigError
from kvstore.index import NO_SLOT
from kvstore.layout import BlockLayout
from kvstore.numa import AUTO, check_setting, chosen_node
from kvstore.policies import POLICIES
from kvstore.pool import BlockPool


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """Settings of the host tier.

    Attributes:
        capacity_bytes: size of the arena.
        policy: a name in POLICIES; policy_options: its settings.
        prefault: populate the memory in the background at start.
        huge_pages: take the arena from the 2 MiB pages that the host reserved (vm.nr_hugepages), and fail without.
        numa_node: memory node that the arena is taken from while it has any: `auto` for that of the GPUs, if all are at
            one, `none`, or a number.
    """

    capacity_bytes: int = 4 << 30
    policy: str = "returns"
    policy_options: Mapping[str, object] = field(default_factory=dict)
    prefault: bool = True
    huge_pages: bool = False
    numa_node: str = AUTO

    def __post_init__(self) -> None:
        check_setting(self.numa_node)
        if self.capacity_bytes < PAGE_BYTES:
            raise ConfigError(f"host.capacity_bytes is {self.capacity_bytes}: give a size such as 8GiB")


class HostTier:
    """Blocks in pinnable host memory under one eviction policy; `shared` makes it memory that others can map."""

    def __init__(self, options: HostOptions, *, shared: bool = False) -> None:
        policy_class = POLICIES.load(options.policy)
        policy = policy_class(POLICIES.options(options.policy, options.policy_options))
        self.arena = Arena(
            options.capacity_bytes,
            prefault=options.prefault,
            shared=shared,
            huge_pages=options.huge_pages,
            numa_node=chosen_node(options.numa_node),
        )
        self.pool = BlockPool(self.arena, policy)

    def open(self, layout: BlockLayout) -> None:
        """Learn a model. Raises ConfigError where the arena could not hold one block of it."""
        needed = sum(slot_stride(part.num_bytes) for part in layout.parts)
        if needed > self.arena.capacity_bytes:
            raise ConfigError(
                f"host.capacity_bytes is {self.arena.capacity_bytes}, less than one block of "
                f"{layout.model.model!r}, which takes {needed}: raise host.capacity_bytes or lower block_tokens"
            )
        self.pool.open(layout, self.arena.capacity_bytes // needed)

    def views(self, row: int, layout: BlockLayout, parts: Sequence[int]) -> tuple[memoryview, ...]:
        """Bytes of `parts` of a pinned row. Writable; readers hand out `.toreadonly()`."""
        slots = self.pool.slots_of(row)
        assert all(slots[part] != NO_SLOT for part in parts), f"row {row} lacks one of parts {parts}"
        return tuple(self.arena.view(slots[part], layout.parts[part].num_bytes) for part in parts)

    def gauges(self) -> dict[str, float]:
        """Occupancy now, by stats name."""
        return {
            "host.blocks": len(self.pool),
            "host.used_bytes": self.arena.acquired_bytes,
            "host.capacity_bytes": self.arena.capacity_bytes,
            "host.evicted_blocks": self.pool.survey.num_evicted,
            "host.lost_blocks": self.pool.survey.num_lost,
            "host.quota_refused_blocks": self.pool.survey.num_quota_refused,
            "host.pinned_blocks": self.pool.survey.pinned_rows(),
        }

    def close(self) -> None:
        self.arena.close()
