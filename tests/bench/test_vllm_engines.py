# SPDX-License-Identifier: Apache-2.0
"""Processes of engines: stopped while others serve, and ended all the same."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the module makes a model")

from bench.vllm_engines import Engine
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads a process's state from /proc")


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_an_engine_at_rest_runs_nothing_until_it_is_woken_and_ends_without() -> None:
    with Engine(Path(sys.executable), {}, module="tests.bench.echo_arms", also={"KEPT": "yes"}) as engine:
        row = engine.answer()
        assert row["kept"] == "yes"
        engine.rest()
        wait_until(lambda: state(row["pid"]) == "T")
        engine.wake()
        assert engine.ask({}) == row
        engine.rest()
        wait_until(lambda: state(row["pid"]) == "T")
        left_s = time.monotonic()
    assert time.monotonic() - left_s < 20, "it was not killed for not ending"
    assert not Path(f"/proc/{row['pid']}").exists()
