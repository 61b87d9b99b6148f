# SPDX-License-Identifier: Apache-2.0
"""`bench gpu` runs without a device, says what it did not measure, and keeps what it has whatever a phase does."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the benchmark copies torch tensors")
pytest.importorskip("transformers", reason="the benchmark runs a model")

import torch

from bench import gpu, gpu_preflight
from bench.gpu_preflight import Lack
from kvstore import native

OWN = "tests.bench.gpu_phases"

FIGURES = (
    "d2h_ratio", "h2d_ratio", "bidi_ratio", "decode_slowdown_pct", "ttft_vs_floor_8k", "ttft_vs_floor_32k",
    "ttft_vs_floor_64k", "ttft_speedup_8k", "ttft_speedup_32k", "ttft_speedup_64k", "overlap_gain_32k",
    "fp8_gain_32k", "device_tier_overhead_pct", "device_rows_overhead_pct", "pin_delay_s",
)  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: the command would measure")
def test_without_a_device_it_says_so_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "absent.json"
    assert gpu.main(["--json", str(path)]) == 2
    found = json.loads(path.read_text())
    assert found["summary"] == dict.fromkeys(gpu.TARGETS)
    assert "nothing of this was measured" in found["rows"][0]["reason"]
    assert "no CUDA device here, so nothing was measured" in capsys.readouterr().err


def test_every_figure_that_was_promised_has_a_target() -> None:
    assert set(FIGURES) <= set(gpu.TARGETS)


def test_all_phases_together_stay_under_eight_minutes() -> None:
    assert sum(phase.limit_s for phase in gpu.PHASES) <= gpu._LIMIT_S < 480


@pytest.mark.skipif(shutil.which("cc") is None, reason="NOT TESTED HERE: there is no C compiler")
def test_all_loops_in_c_are_built_as_an_installation_builds_them(tmp_path: Path) -> None:
    root = Path(native.__file__).parent
    command = gpu.native_command(root, tmp_path / "loops.so")
    (extension,) = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    assert [str(Path(one).relative_to(root.parent)) for one in command if one.endswith(".c")] == extension["sources"]
    subprocess.run(command, check=True)
    loops = ctypes.CDLL(str(tmp_path / "loops.so"))
    for name in ("copy", "hash_chain", "touch_rows", "receive_begin", "sound_frames", "xxh3"):
        assert hasattr(loops, f"kvstore_{name}"), name


def patient(name: str) -> str:
    """A phase with time enough on a busy machine: its limits are of a device, which somebody pays for."""
    return f"{name}={gpu.Phase.of(name).target}@250"


@pytest.mark.slow
def test_on_the_cpu_the_script_runs_and_judges_no_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    phases = ",".join(patient(name) for name in ("split", "decode", "ttft", "turns"))
    assert gpu.main(["--device", "cpu", "--phases", phases, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["env"]["device"] == "cpu, tiny sizes: no figures"
    summary = found["summary"]
    assert summary["split_decode_equal"] is True
    beside = (
        "link",
        "link_save",
        "link_load",
        "load",
        *(f"{what}_{n}" for what in ("save", "both") for n in (100, 50, 25)),
    )
    assert {row["arm"] for row in found["rows"] if row["phase"] == "decode"} == set(beside)
    assert summary["decode_slowdown_pct"] == summary[f"decode_slowdown_pct_both_{100 * summary['save_share']:.0f}"]
    assert summary["ttft_64_outputs_equal"] is True
    assert summary["ttft_128_outputs_equal"] is True
    arms = {"recompute", "device", "host", "host_fp8"}
    assert {row["arm"] for row in found["rows"] if row["phase"] == "ttft"} >= {*arms, "device_rows"}
    turns = {row["arm"]: row for row in found["rows"] if row["phase"] == "turns" and "hit_blocks" in row}
    assert set(turns) >= {*arms, "redis", "redis_measured"}
    (decided,) = [row for row in found["rows"] if "predicted_load_s" in row]
    assert min(decided["predicted_compute_s"], decided["predicted_rest_s"], decided["predicted_load_s"]) > 0
    assert summary["turns_speedup_redis_measured"] > 0
    # Users overflow the device: there alone most is recomputed, with the host below it nothing is.
    assert turns["host"]["hit_blocks"]["host.hit_blocks"] > turns["device"]["hit_blocks"]["device.hit_blocks"]
    assert [row["faults"] for row in found["rows"] if "faults" in row] == [[]]
    out = capsys.readouterr().out
    assert "pin_delay_s                    not measured" in out
    assert "decode_slowdown_pct                     ran" in out


@pytest.mark.slow
def test_a_phase_that_raises_hangs_or_dies_costs_nothing_but_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_GRACE_S", 20.0)  # a busy machine takes that long to import torch
    path = tmp_path / "gpu.json"
    limits_s = {"raises": 60, "hangs": 1, "dies": 60, "works": 60}
    own = ",".join(f"{name}={OWN}:{name}@{limit_s}" for name, limit_s in limits_s.items())
    assert gpu.main(["--device", "cpu", "--phases", own, "--json", str(path)]) == 1
    summary = json.loads(path.read_text())["summary"]
    assert summary["raises_failed"] == "RuntimeError: no such kernel"
    assert summary["hangs_failed"] == "killed after 21 s"
    assert summary["dies_failed"] == "ended with -9"
    kept = [summary["before_it_raised"], summary["before_it_hung"], summary["before_it_died"], summary["it_worked"]]
    assert kept == [1, 2, 3, True]
    assert "failed: raises, hangs, dies" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_cut_off_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    own = ",".join(f"{name}={OWN}:{name}" for name in ("works", "raises"))
    asked = ["--device", "cpu", "--json", str(path), "--phases"]
    assert gpu.main([*asked, own]) == 1
    first = json.loads(path.read_text())["summary"]
    mended = own.replace(":raises", ":works_now") + f",last={OWN}:works_too"
    assert gpu.main([*asked, mended, "--resume"]) == 0
    record = json.loads(path.read_text())
    assert [row["phase"] for row in record["rows"]] == ["works", "raises"], "an error that is no more is left out"
    second = record["summary"]
    assert second["works_phase_s"] == first["works_phase_s"], "what is there is not run again"
    assert "raises_failed" in first
    assert "raises_failed" not in second
    assert (second["before_it_raised"], second["works_now"], second["works_too"]) == (1, True, True)
    assert second["total_s"] > first["total_s"]
    record["env"]["commit"] = "another"
    path.write_text(json.dumps(record))
    assert gpu.main([*asked, own, "--resume"]) == 2
    assert "has commit 'another', this run" in capsys.readouterr().err


def test_what_is_missing_is_said_with_the_wheels_to_bring(capsys: pytest.CaptureFixture[str]) -> None:
    redis = Lack("the package redis", "the tier of Redis", "redis")
    assert gpu_preflight.say([redis])
    said = capsys.readouterr().err
    assert "missing: the package redis; it costs the tier of Redis" in said
    assert "-d wheels redis" in said
    assert not gpu_preflight.say([Lack("the package torch", "everything", "torch", stops=True)])
    assert gpu.main(["--device", "cpu", "--preflight"]) == 0
    assert "imports" not in capsys.readouterr().err


def test_preflight_tries_what_phases_import_and_looks_at_the_device() -> None:
    (lack,) = gpu_preflight.import_lacks(["bench.gpu_copies", "bench.gpu_frob"])
    assert "bench.gpu_frob imports (ModuleNotFoundError" in lack.what
    assert gpu_preflight.device_lacks(80 << 30, "") == []
    small, no_kernel = gpu_preflight.device_lacks(24 << 30, "RuntimeError: no such instruction")
    assert "here are 24" in small.what
    assert "no such instruction" in no_kernel.what


def test_a_phase_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--phases", "split,frob"])
    assert "no phase is called frob" in capsys.readouterr().err


@pytest.mark.slow
def test_trials_try_every_choice_and_publish_none(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--phases", patient("trials"), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    windows = [row for row in found["rows"] if "bidi" in row]
    assert len({row["arm"] for row in windows}) == len(windows) == 12
    assert not set(found["summary"]) & set(gpu.TARGETS)
    assert not any(phase in gpu.PHASES for phase in gpu.TRIALS)
