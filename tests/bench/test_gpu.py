# SPDX-License-Identifier: Apache-2.0
"""`bench gpu` runs without a device, says what it did not measure, and keeps what it has if a phase fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the benchmark copies torch tensors")
pytest.importorskip("transformers", reason="the benchmark runs a model")

import torch

from bench import gpu
from bench.gpu_board import Board


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: the command would measure")
def test_without_a_device_it_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no CUDA device here, so nothing was measured" in capsys.readouterr().err


def test_on_the_cpu_the_script_runs_and_judges_no_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--phases", "split,decode,ttft", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["env"]["device"] == "cpu, tiny sizes: no figures"
    assert found["summary"]["split_decode_equal"] is True
    assert found["summary"]["ttft_64_outputs_equal"] is True
    assert {row["arm"] for row in found["rows"] if row["phase"] == "ttft"} >= {
        "recompute",
        "device",
        "host",
        "host_fp8",
    }
    out = capsys.readouterr().out
    assert "pin_delay_s                    not measured" in out
    assert "decode_slowdown_pct                     ran" in out


def test_a_phase_that_fails_costs_its_own_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    phases = [gpu.Phase("broken", 5, "tests.bench.test_gpu:broken"), *(p for p in gpu.PHASES if p.name == "decode")]
    monkeypatch.setattr(gpu, "PHASES", tuple(phases))
    assert gpu.main(["--device", "cpu", "--json", str(path)]) == 1
    summary = json.loads(path.read_text())["summary"]
    assert summary["broken_failed"] == "RuntimeError: no such kernel"
    assert "decode_slowdown_pct" in summary


def broken(board: Board) -> None:
    raise RuntimeError("no such kernel")
