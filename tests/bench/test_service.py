# SPDX-License-Identifier: Apache-2.0
"""The sidecar's benchmark, small: its parts work against a real `kvstore serve`."""

from __future__ import annotations

import time

import pytest

from bench.service import measure_loaders
from bench.sidecar import crowd, match_latency, sidecar

pytestmark = pytest.mark.slow


def test_a_crowd_that_watches_sees_events_while_matches_are_timed() -> None:
    with sidecar(64 << 20) as address:
        for meanwhile_s in (1, 5, 20):  # it takes a busy machine longer to subscribe, and to store
            with crowd(address, 4, num_processes=1) as seen:
                latency = match_latency(address, count=50, warm_up=5)
                time.sleep(meanwhile_s)
            assert 0 < latency.p50_ms <= latency.p99_ms
            if min(seen, default=0) > 0:
                break
    assert len(seen) == 4
    assert min(seen) > 0


def test_clients_that_load_at_once_all_get_somewhere() -> None:
    summary, rows = measure_loaders(0.3)
    assert summary["clients8_fairness"] >= 1
    assert summary["clients8_total_ratio"] > 0
    assert len(rows) == 2
