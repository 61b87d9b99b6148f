# SPDX-License-Identifier: Apache-2.0
"""`bench lossy`: exact blocks change nothing, lossy ones something, and each figure says what it claims to."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch", reason="the benchmark runs a model")
pytest.importorskip("transformers", reason="the benchmark runs a model")

import torch

from bench.lossy import ARMS, Answer, Rig, Text, compare, measure, summarize
from bench.models import random_llama

TEXTS = [
    Text(f"text {seed}", tuple((seed * 7 + at * at) % 200 for at in range(64)), tuple(range(seed, seed + 20)))
    for seed in (1, 2)
]


def rig(capacity_bytes: int = 8 << 20) -> Rig:
    return Rig(random_llama(3, dtype=torch.bfloat16), "seed-3", block_tokens=16, capacity_bytes=capacity_bytes)


@pytest.mark.slow
def test_exact_blocks_change_no_bit_and_lossy_ones_drift_by_their_format() -> None:
    made = rig()
    rows = measure(made, TEXTS, 12, 16, 24)
    summary = summarize(rows, made)
    assert [row["arm"] for row in rows] == 2 * ["reference", *ARMS]
    assert summary["exact_equal"] is True
    assert summary["exact_logit_drift"] == 0.0
    assert summary["exact_perplexity"] == summary["perplexity_reference"]
    assert 0 < float(str(summary["fp8_logit_drift"])) < float(str(summary["nvfp4_logit_drift"]))
    assert float(str(summary["nvfp4_bytes_share"])) < float(str(summary["fp8_bytes_share"])) < 0.6
    assert summary["scored_tokens"] == 2 * 19
    assert made.store.check() == []
    made.store.close()


def test_a_prefix_that_was_not_loaded_whole_is_an_error_and_no_figure() -> None:
    made = rig(capacity_bytes=3 * 4096)
    with pytest.raises(RuntimeError, match="blocks were loaded"):
        measure(made, TEXTS[:1], 4, 16)
    made.store.close()


def test_figures_are_what_they_are_called() -> None:
    text = Text("three words", (0,), (0, 1, 0, 1))
    even = Answer(torch.zeros(3, 2), (5, 6, 7, 8))
    sure = Answer(torch.tensor([[0.0, 50.0], [0.0, 50.0], [0.0, 50.0]]), (5, 6, 9, 8))
    found = compare(text, even, sure)
    assert found["tokens"] == 3
    assert found["nll"] == pytest.approx(50 / 3)  # right twice, sure of the wrong one once
    assert found["agree"] == 0.75
    assert found["agree_run"] == 2
    assert found["kl"] == pytest.approx(25 - math.log(2), abs=1e-3)
    assert compare(text, sure, sure)["drift"] == 0.0
