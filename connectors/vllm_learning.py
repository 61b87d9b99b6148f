# SPDX-License-Identifier: Apache-2.0
"""What steps and loads took: learnt for the next plans, told to the store, counted for the engine's metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from connectors.base import CostModel, FailOpen
from connectors.vllm_leases import EndedLoad
from connectors.vllm_plan import LoadOrder, Scheduled
from kvstore.api import Store


@dataclass(slots=True)
class _Step:
    """What was scheduled, to learn from how long it took."""

    began_s: float
    new_tokens: int
    past_tokens: int


@dataclass(slots=True)
class Figures:
    """What happened: since the start, and since it was last taken."""

    counts: dict[str, float] = field(default_factory=dict)
    fresh: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float = 1.0) -> None:
        self.counts[name] = self.counts.get(name, 0.0) + value
        self.fresh[name] = self.fresh.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        taken, self.fresh = self.fresh, {}
        return taken


class Learning:
    """See the module. For the scheduler's thread."""

    def __init__(
        self, store: Store, cost: CostModel, fail_open: FailOpen, *, num_ranks: int, now_s: Callable[[], float]
    ) -> None:
        self.figures = Figures()
        self._store = store
        self._cost = cost
        self._fail_open = fail_open
        self._num_ranks = num_ranks
        self._now_s = now_s
        self._step: _Step | None = None

    def load_ended(self, ended: EndedLoad) -> None:
        """Every worker has reported it."""
        done = ended.report
        for tier, num_bytes in done.num_bytes.items():
            self._cost.seen_load(tier, num_bytes // self._num_ranks, done.seconds.get(tier, 0.0))
            self.figures.add(f"loaded_bytes.{tier}", num_bytes)
            self.figures.add(f"load_s.{tier}", done.seconds.get(tier, 0.0))
        if ended.failed:
            self.figures.add("failed_loads")
        self._note_saved(ended)

    def _note_saved(self, ended: EndedLoad) -> None:
        """Tell the store what a load was good for."""
        past = ended.start * self._cost.block_tokens
        num_tokens = ended.report.stop * self._cost.block_tokens - past
        load_s = sum(ended.report.seconds.values())
        saved_s = self._cost.saved_s(num_tokens, load_s, past_tokens=past) if num_tokens > 0 else 0.0
        if saved_s:
            self._fail_open.call(lambda: self._store.note_saved(saved_s), None)

    def scheduled(self, step: Scheduled, loads: Sequence[LoadOrder]) -> None:
        """Remember a step of one request's prefill: its time tells what computing costs."""
        self._step = None
        if len(step.num_scheduled) == 1:
            ((request_id, new_tokens),) = step.num_scheduled.items()
            if new_tokens > 1 and not any(order.in_step for order in loads):
                self._step = _Step(self._now_s(), new_tokens, step.computed[request_id])

    def stepped(self) -> None:
        """The step last scheduled has run."""
        step, self._step = self._step, None
        if step is not None:
            self._cost.seen_prefill(step.new_tokens, step.past_tokens, self._now_s() - step.began_s)
