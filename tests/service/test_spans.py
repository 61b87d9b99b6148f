# SPDX-License-Identifier: Apache-2.0
"""Calls as spans: with OpenTelemetry's package where it is installed, and at no cost where it is not."""

from __future__ import annotations

import sys
import time

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvstore.service.metrics import Latencies
from kvstore.service.spans import recorder


@pytest.mark.alone
def test_without_the_package_there_is_nothing_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    assert recorder() is None
    latencies = Latencies()
    began_s = time.thread_time()
    for _ in range(10_000):
        latencies.observe("Match", 0.001)
    assert (time.thread_time() - began_s) / 10_000 < 20e-6, "a call is counted, and nothing else is done"


def test_a_call_is_a_span_with_its_length_and_its_failure() -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    latencies = Latencies()
    latencies.observe("Match", 0.25)
    latencies.observe("Load", 0.5, "NOT_FOUND")
    found, failed = kept.get_finished_spans()
    assert (found.name, (found.end_time or 0) - (found.start_time or 0)) == ("kvstore.v1.KVStore/Match", 250_000_000)
    assert found.status.is_ok
    assert failed.attributes is not None
    assert (failed.attributes["rpc.grpc.status"], failed.status.is_ok) == ("NOT_FOUND", False)
