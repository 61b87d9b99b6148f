# SPDX-License-Identifier: Apache-2.0
"""Settings of demotion: when blocks go to lower tiers, and which."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvstore.clock import check_seconds
from kvstore.errors import ConfigError


class Tiering(Enum):
    """How the host and lower tiers share blocks; see `kvstore.spill`."""

    INCLUSIVE = "inclusive"
    EXCLUSIVE = "exclusive"


class WriteMode(Enum):
    """When a block goes down.

    through: as soon as it is committed. on_reuse: when a later request matches it (three quarters of chat blocks
    never are). on_evict: when it is among the coldest tenth of a full host tier; eviction itself never waits.

    Only a store that writes through marks in lower tiers what is being computed, so that stores of other hosts wait for
    it (`kvstore.fleet`): the others cannot promise that it will come there.
    """

    THROUGH = "through"
    ON_REUSE = "on_reuse"
    ON_EVICT = "on_evict"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoverOptions:
    """Settings of demotion.

    Attributes:
        write: when blocks go to lower tiers: through, on_reuse or on_evict.
        tiering: inclusive, or exclusive: blocks go down when they are about to leave the host, whatever `write` says,
            uses in the host do not warm them below, and what came up goes first there (`kvstore.spill`). The rest of
            the host goes down when the store is closed, within `flush_s`, or drained.
        min_priority: blocks of which the request that commits or reuses them says less stay in the host; 0 to 100.
        min_return_probability: those that the host's policy (`returns`) thinks less likely used again stay there.
            What a block that goes down hangs from goes too, whatever is thought of it.
        write_bytes_per_s: budget; 0 for none.
        queue_bytes: blocks waiting to go down; more are dropped.
        write_deadline_s: for one batch of at most 256 MiB.
        flush_s: how long `close` waits for the queue.
    """

    write: str = "on_reuse"
    tiering: str = Tiering.INCLUSIVE.value
    min_priority: int = 0
    min_return_probability: float = 0.0
    write_bytes_per_s: int = 0
    queue_bytes: int = 1 << 30
    write_deadline_s: float = 10.0
    flush_s: float = 10.0

    def __post_init__(self) -> None:
        accepted = [mode.value for mode in WriteMode]
        if self.write not in accepted:
            raise ConfigError(f"mover.write is {self.write!r}: use one of {', '.join(accepted)}")
        tierings = [tiering.value for tiering in Tiering]
        if self.tiering not in tierings:
            raise ConfigError(f"mover.tiering is {self.tiering!r}: use one of {', '.join(tierings)}")
        if self.min_priority > 100:
            raise ConfigError(f"mover.min_priority is {self.min_priority}: give 0 (all) to 100")
        if self.min_priority and self.mode is WriteMode.ON_EVICT:
            raise ConfigError(
                "mover.min_priority needs mover.write through or on_reuse, and inclusive tiers: nobody asks at eviction"
            )
        if not 0 <= self.min_return_probability <= 1:
            raise ConfigError(f"mover.min_return_probability is {self.min_return_probability}: give 0 (all) to 1")
        for name, least_s in (("write_deadline_s", 0.001), ("flush_s", 0.0)):
            check_seconds(f"mover.{name}", getattr(self, name), least=least_s)

    @property
    def is_exclusive(self) -> bool:
        """Whether a block is to be in one tier."""
        return self.tiering == Tiering.EXCLUSIVE.value

    @property
    def mode(self) -> WriteMode:
        """When blocks go down."""
        return WriteMode.ON_EVICT if self.is_exclusive else WriteMode(self.write)
