# SPDX-License-Identifier: Apache-2.0
"""What the codec benchmark makes of the times it took, and that it runs."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the benchmark computes a model's KV")

from bench import codec
from bench.codec import AGAIN, AUTO, LZ4, RANDOM, RAW, Cell, measure, random_bytes, row_of, summarise

pytestmark = pytest.mark.redis


def cell(**seconds: float) -> Cell:
    made = Cell(again_of=RAW)
    for at in range(10):
        noise = 1 + 0.001 * (at % 3)
        for arm, each in seconds.items():
            made.add(AGAIN if arm == "again" else arm, 0.4 * each * noise, 0.6 * each * noise)
    return made


def test_auto_is_held_against_the_better_one_of_the_cell() -> None:
    slow_link = row_of(0.2, "real", cell(raw=2.0, lz4=1.5, auto=1.53, again=2.02), 10**9)
    fast_link = row_of(5.0, "real", cell(raw=0.1, lz4=1.0, auto=0.12, again=0.1), 10**9)
    assert (slow_link["better"], fast_link["better"]) == (LZ4, RAW)
    assert slow_link["auto_pct"] == pytest.approx(2.0)
    assert slow_link["read_pct"] == pytest.approx(2.0)
    assert slow_link["null_pct"] == pytest.approx(1.0)
    assert fast_link["auto_pct"] == pytest.approx(20.0)
    found = summarise([slow_link, fast_link])
    assert found["codec_auto_worst_pct"] == pytest.approx(20.0)
    assert found["codec_auto_worst_cell"] == "5.0 GB/s, real"
    assert found["codec_cells_over"] == found["codec_cells_surely_over"] == 1
    assert found["codec_auto_best_gain_pct"] == pytest.approx(23.5)


@pytest.mark.alone
@pytest.mark.slow
def test_a_cell_is_measured_on_a_real_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_CELL_S", 0.0)  # three rounds are enough to see it work
    rows = measure({RANDOM: random_bytes(2, 0)}, (0.2,), 3, seed=0)
    assert [row["GB/s"] for row in rows] == [0.2, "direct"]
    assert all(int(str(row["rounds"])) >= 3 and row["auto_encodes"] is False for row in rows)
    assert 0.1 < float(str(rows[0]["raw_gb_per_s"])) < 0.25
    assert AUTO in str(rows[0].keys())
