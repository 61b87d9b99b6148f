# SPDX-License-Identifier: Apache-2.0
"""What the phases of `bench gpu` share: the machine and its sizes, the clock, and the record as it grows."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench.env import Stamp
from bench.record import Scalar, write_json


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large things are: those of the published figures on a device, tiny ones for the CPU reference."""

    layers: int
    heads: int
    dim: int
    page_tokens: int
    block_tokens: int
    num_blocks: int
    """Of the copies' prefix."""
    ceiling_bytes: int
    pin_bytes: int
    decode_width: int
    decode_layers: int
    prefixes: tuple[int, ...]
    suffix_tokens: int
    step_layers: int
    repeats: int
    users: int
    context_tokens: int
    """Of each user's chat before the measured turns, in the phase of chats."""


REAL = Sizes(
    layers=32,
    heads=8,
    dim=128,
    page_tokens=16,
    block_tokens=64,
    num_blocks=256,
    ceiling_bytes=1 << 30,
    pin_bytes=32 << 30,
    decode_width=4096,
    decode_layers=8,
    # The lengths that have a target come first: what the clock cuts off is the rest.
    prefixes=(8192, 32768, 65536, 2048, 16384),
    suffix_tokens=128,
    step_layers=4,
    repeats=5,
    users=16,
    context_tokens=4096,
)
QUICK = replace(REAL, num_blocks=128, pin_bytes=4 << 30, prefixes=(8192,), repeats=2, users=8, context_tokens=2048)
TINY = Sizes(
    layers=3,
    heads=2,
    dim=16,
    page_tokens=4,
    block_tokens=16,
    num_blocks=6,
    ceiling_bytes=1 << 16,
    pin_bytes=1 << 20,
    decode_width=32,
    decode_layers=2,
    prefixes=(64, 128),
    suffix_tokens=16,
    step_layers=1,
    repeats=2,
    users=4,
    context_tokens=64,
)


@dataclass(slots=True)
class Board:
    """Results so far, written down after every phase, and the time that is left.

    Attributes:
        limit_s: for the whole run; phase_limit_s: for the phase at work, from its beginning.
    """

    device: torch.device
    sizes: Sizes
    env: Stamp
    path: str | None
    limit_s: float
    rows: list[dict[str, object]] = field(default_factory=list)
    summary: dict[str, Scalar] = field(default_factory=dict)
    began_s: float = field(default_factory=time.perf_counter)
    phase_ends_s: float = 0.0

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def spent_s(self) -> float:
        return time.perf_counter() - self.began_s

    @property
    def left_s(self) -> float:
        """Of the phase, or of the run where that is less."""
        return min(self.phase_ends_s, self.began_s + self.limit_s) - time.perf_counter()

    def begin(self, limit_s: float) -> None:
        self.phase_ends_s = time.perf_counter() + limit_s

    def figure(self, name: str, value: Scalar) -> None:
        """A named figure. Floats to four digits: more were not measured."""
        self.summary[name] = float(f"{value:.4g}") if isinstance(value, float) else value

    def row(self, phase: str, **values: object) -> None:
        self.rows.append({"phase": phase, **values})

    def write(self) -> None:
        if self.path:
            write_json(Path(self.path), "gpu", self.env, self.rows, self.summary)

    def take(self, written: Path) -> None:
        """Take over what a phase wrote in a process of its own; nothing where it did not come to write."""
        if not written.exists():
            return
        record = json.loads(written.read_text())
        self.rows += record["rows"]
        self.summary |= record["summary"]

    def sync(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def timed(self, action: Callable[[], object]) -> float:
        """Seconds that `action` takes with all that it sets off on the device."""
        self.sync()
        began_s = time.perf_counter()
        action()
        self.sync()
        return time.perf_counter() - began_s

    def alternate(
        self, arms: dict[str, Callable[[], object]], repeats: int = 0, *, warm_up: int = 1
    ) -> dict[str, list[float]]:
        """Seconds of each arm, run one after the other in turns, after `warm_up` turns that do not count.

        Ends early where the phase's time does; every arm then has as many turns as the others.
        """
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(warm_up + (repeats or self.sizes.repeats)):
            if turn > warm_up and self.left_s <= 0:
                break
            for name, action in arms.items():
                took_s = self.timed(action)
                if turn >= warm_up:
                    seconds[name].append(took_s)
        return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)
