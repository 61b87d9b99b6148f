# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of cold prompts makes of the times it took."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest

pytest.importorskip("torch", reason="the benchmark makes a model")

from bench.vllm_cold import AGAIN, IDLE, OFF, OFF_AGAIN, OURS, PLAIN, ColdRow, Start, summarise

COSTS = {OURS: 1.01, OFF: 1.0, OFF_AGAIN: 1.0, PLAIN: 1.0, AGAIN: 1.0}


def rows(*, starts: int = 6, slow_engine: float = 1.0, stall: float = 1.0) -> list[ColdRow]:
    """Requests of half a second in one engine of each start, 1 % more with the connector.

    `slow_engine`: what that engine's times are multiplied by in the first start; `stall`: its first request's.
    """
    made = []
    for start, pair, arm in product(range(starts), range(5), COSTS):
        seconds = 0.5 * COSTS[arm]
        if start == 0 and arm not in (PLAIN, AGAIN):
            seconds *= slow_engine
        if start == pair == 0 and arm == OURS:
            seconds *= stall
        made.append(
            ColdRow(arm=arm, start=start, pair=pair, ttft_s=seconds, seconds=2 * seconds, sidecar_s=0.001, faults=start)
        )
    return made


def test_what_all_rounds_have_is_what_is_said_and_arms_that_do_not_differ_are_equal() -> None:
    summary = summarise(rows())
    for name in ("zero_reuse", "same_engine"):
        for figure in ("overhead_pct", "overhead_pct_low", "throughput_pct", "throughput_pct_high"):
            assert summary[f"{name}_{figure}"] == pytest.approx(1.0)
    for name in ("no_difference", "same_engine_no_difference", "configured"):
        assert summary[f"{name}_throughput_pct"] == pytest.approx(0.0, abs=1e-9)
    assert (summary["num_starts"], summary["num_pairs"]) == (6, 30)


def test_an_engine_that_is_slow_by_chance_widens_the_interval_between_engines_and_nothing_within_it() -> None:
    summary = summarise(rows(slow_engine=1.05))
    assert summary["zero_reuse_overhead_pct"] == pytest.approx(1.0)
    assert summary["zero_reuse_overhead_pct_high"] == pytest.approx(6.05)
    assert summary["same_engine_overhead_pct_high"] == pytest.approx(1.0)


def test_a_single_stall_moves_nothing() -> None:
    summary = summarise(rows(stall=3.0))
    assert summary["zero_reuse_overhead_pct_high"] == pytest.approx(1.0)
    assert summary["same_engine_overhead_pct_high"] == pytest.approx(1.0)


def test_what_the_sidecar_does_for_a_request_is_told_from_what_it_does_anyway() -> None:
    made = [ColdRow(**{**row, "sidecar_s": 0.004 if row["arm"] == OURS else 0.001}) for row in rows()]  # type: ignore[typeddict-item]
    summary = summarise(made)
    assert summary["sidecar_cpu_ms_a_request"] == pytest.approx(4.0)
    assert summary["sidecar_cpu_ms_idle"] == pytest.approx(1.0)


def test_one_engine_is_compared_with_itself_alone() -> None:
    summary = summarise([row for row in rows() if row["arm"] not in (PLAIN, AGAIN)])
    assert "zero_reuse_overhead_pct" not in summary
    assert summary["same_engine_overhead_pct"] == pytest.approx(1.0)


def test_what_vllm_takes_for_any_connector_is_told_apart_where_an_idle_one_was_there() -> None:
    made = rows()
    idle = [ColdRow(**{**row, "arm": IDLE, "ttft_s": 0.502}) for row in made if row["arm"] == PLAIN]  # type: ignore[typeddict-item]
    assert summarise([*made, *idle])["any_connector_overhead_pct"] == pytest.approx(0.4)
    assert "any_connector_overhead_pct" not in summarise(made)


def test_pages_that_had_to_be_given_are_said_of_each_arm() -> None:
    made = [ColdRow(**{**row, "faults": 9000 if row["arm"] == PLAIN else 3}) for row in rows()]  # type: ignore[typeddict-item]
    summary = summarise(made)
    assert (summary["faults_connector"], summary["faults_none"], summary["faults_taken_off"]) == (3, 9000, 3)


# -- the order of requests -------------------------------------------------------------------------------------


@dataclass
class Served:
    """What engines were asked, in order: (engine, whether with its connector, its prompt)."""

    asked: list[tuple[str, bool, list[int]]] = field(default_factory=list)
    awake: set[str] = field(default_factory=lambda: {"ours", "plain", "again"})

    def cpu_s(self) -> float:
        return float(len(self.asked))


@dataclass
class WarmsUp:
    """An engine whose time is its number of requests since another engine ran: 1 at first, 2 after its own."""

    name: str
    served: Served

    def serve(
        self, prompt: Sequence[int], *, new: int = 1, forget: bool = True, connected: bool = True
    ) -> dict[str, Any]:
        assert not forget
        assert self.served.awake == {self.name}, "while an engine serves the others are stopped"
        warm = bool(self.served.asked) and self.served.asked[-1][0] == self.name
        self.served.asked.append((self.name, connected, list(prompt)))
        seconds = 2.0 if warm else 1.0
        return {"ttft_s": seconds, "seconds": seconds, "hit_tokens": 0, "faults": 7}

    def rest(self) -> None:
        self.served.awake.discard(self.name)

    def wake(self) -> None:
        self.served.awake.add(self.name)


def test_every_timed_request_follows_an_untimed_one_of_its_arm_in_an_order_drawn_anew() -> None:
    served = Served()
    ours = WarmsUp("ours", served)
    engines = {OURS: ours, OFF: ours, OFF_AGAIN: ours, PLAIN: WarmsUp("plain", served), AGAIN: WarmsUp("again", served)}
    made = Start(3, engines, served, prompt_tokens=5, new=2, rng=random.Random(0)).measure(8)
    assert {row["ttft_s"] for row in made} == {2.0}, "no engine is timed when another has just run"
    assert {row["sidecar_s"] for row in made} == {1.0}, "the untimed one is not counted"
    assert Counter(row["arm"] for row in made) == dict.fromkeys(COSTS, 8)
    assert {row["faults"] for row in made} == {7}
    first, rounds = served.asked[:12], served.asked[12:]
    assert Counter(name for name, _, _ in first) == {"ours": 4, "plain": 4, "again": 4}
    assert len(rounds) == 8 * 5 * 2
    assert all(one[:2] == two[:2] for one, two in zip(rounds[::2], rounds[1::2], strict=True))
    asked = [(engine.name, arm not in (OFF, OFF_AGAIN)) for arm, engine in engines.items()]
    for at in range(0, len(rounds), 10):
        assert Counter(each[:2] for each in rounds[at : at + 10 : 2]) == Counter(asked)
    assert len({tuple(row["arm"] for row in made[at : at + 5]) for at in range(0, 40, 5)}) > 4
    prompts = {tuple(prompt) for _, _, prompt in served.asked}
    assert len(prompts) == len(served.asked), "nothing is ever reused"
