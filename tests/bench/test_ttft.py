# SPDX-License-Identifier: Apache-2.0
"""The TTFT benchmark end to end on a tiny model with real servers, and the arithmetic of its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from bench.models import ChatModel, random_llama
from bench.report import TtftRow
from bench.ttft import REUSE_ARMS, ZERO_ARMS, Settings, parser, present, run, summarise
from bench.workload import Turn, Workload

TINY = Settings(
    users=2,
    turns=2,
    documents=1,
    doc_tokens=400,
    new_tokens=60,
    zero_requests=2,
    max_new_tokens=3,
    min_reused=300,
    device_bytes=256 << 10,
    host_bytes=8 << 20,
    redis_bytes=64 << 20,
)


class ByteTokenizer:
    """One token a byte."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode("ascii", "replace"))


def byte_chat() -> ChatModel:
    model = random_llama(0, max_tokens=8192)
    return ChatModel("tiny", "seed-0", Path(), model, cast(PreTrainedTokenizerFast, ByteTokenizer()))


@pytest.mark.redis
@pytest.mark.engine
def test_every_arm_gives_the_uncached_output_and_takes_its_prefix_from_its_tier(tmp_path: Path) -> None:
    rows, summary = run(TINY, byte_chat())
    assert summary["outputs_equal"] is True
    arms = {row["arm"] for row in rows}
    assert arms == {*REUSE_ARMS, *(f"zero reuse: {arm}" for arm in ZERO_ARMS)}
    later = [row for row in rows if row["turn"] == 2]
    tiers = {row["arm"]: set(row["hit_tokens"]) for row in later if not row["arm"].startswith("zero")}
    assert tiers["host"] == {"host"}
    assert tiers["redis"] == {"redis"}
    assert tiers["device, unlimited"] == {"device"}
    assert tiers["recompute"] == tiers["store down"] == set()
    assert "host" in tiers["device+host"], "the device budget must overflow"
    assert not any(row["hit_tokens"] for row in rows if row["arm"].startswith("zero"))
    present(rows, summary, str(tmp_path / "out.json"), str(tmp_path / "out.html"))
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result) == {"name", "env", "rows", "summary"}
    assert len(result["rows"]) == len(rows)
    assert "<html" in (tmp_path / "out.html").read_text()


def row(arm: str, turn: int, ttft_s: float, *, equal: bool = True) -> TtftRow:
    return TtftRow(
        arm=arm, turn=turn, user=0, ttft_s=ttft_s, prompt_tokens=2000, hit_tokens={}, bytes_moved=0, equal=equal
    )


def workload() -> Workload:
    ids = np.arange(4, dtype=np.uint32)
    turns = tuple(Turn(0, turn, "c", "d", ids, 100, reusable) for turn, reusable in ((1, 0), (2, 1700), (3, 900)))
    return Workload("multi_turn", 0, 1, 1, turns)


def rows_of(seconds: dict[str, list[float]]) -> list[TtftRow]:
    return [row(arm, turn, value) for arm, values in seconds.items() for turn, value in enumerate(values, start=1)]


def test_figures_count_only_later_turns_with_enough_reuse() -> None:
    arms = {
        "recompute": [9.0, 10.0, 1.0],
        "host": [9.0, 1.0, 1.0],
        "redis": [9.0, 2.0, 1.0],
        "device, unlimited": [9.0, 0.8, 1.0],
        "store down": [9.9, 11.0, 1.1],
    }
    zero = [
        row("zero reuse: store", 1, 1.02),
        row("zero reuse: store, write-through", 1, 1.3),
        row("zero reuse: recompute", 1, 1.0),
        row("zero reuse: store down", 1, 1.1),
    ]
    summary = summarise(rows_of(arms), zero, workload(), min_reused=1500)
    assert summary["speedup_host"] == 10.0
    assert summary["speedup_redis"] == 5.0
    assert summary["host_vs_device"] == pytest.approx(1.25)
    assert summary["redis_vs_device"] == pytest.approx(2.5)
    assert summary["store_down_overhead_pct"] == pytest.approx(10)
    assert summary["store_down_overhead_pct_high"] == pytest.approx(10)
    assert summary["zero_reuse_overhead_pct"] == pytest.approx(2)
    assert summary["zero_reuse_write_through_overhead_pct"] == pytest.approx(30)
    assert summary["requests_compared"] == 1


def test_a_dead_store_is_judged_by_the_requests_of_both_workloads() -> None:
    alike = {name: [1.0, 1.0, 1.0] for name in ("recompute", "host", "redis", "device, unlimited", "store down")}
    zero = [row(f"zero reuse: {arm}", turn, 1.0) for arm in ZERO_ARMS if arm != "store down" for turn in range(1, 6)]
    slow = [row("zero reuse: store down", turn, 1.2) for turn in range(1, 6)]
    summary = summarise(rows_of(alike), [*zero, *slow], workload(), min_reused=1500)
    assert summary["store_down_overhead_pct_low"] == pytest.approx(0)
    assert summary["store_down_overhead_pct_high"] == pytest.approx(20)
    assert 5 < float(str(summary["store_down_overhead_pct"])) < 20


def test_one_output_that_differs_is_enough_to_fail_equality() -> None:
    arms = {name: [1.0, 1.0, 1.0] for name in ("recompute", "host", "redis", "device, unlimited", "store down")}
    zero = [
        row("zero reuse: store", 1, 1.0, equal=False),
        row("zero reuse: store, write-through", 1, 1.0),
        row("zero reuse: recompute", 1, 1.0),
        row("zero reuse: store down", 1, 1.0),
    ]
    assert summarise(rows_of(arms), zero, workload(), 1500)["outputs_equal"] is False


def test_defaults_of_the_command_are_the_published_settings() -> None:
    options = vars(parser().parse_args([]))
    assert options.pop("json") is options.pop("html") is None
    assert options.pop("scenario") == "chats"
    assert Settings(**options) == Settings()
