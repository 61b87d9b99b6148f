# SPDX-License-Identifier: Apache-2.0
"""Calls as OpenTelemetry spans, where its package is installed and the process exports them.

A span is made once its call has ended, from what is taken of every call anyway: without the package, or where nothing
was set up to take spans, a call pays for a comparison. Which spans go where is for OpenTelemetry's own settings
(OTEL_TRACES_EXPORTER, …) and its `opentelemetry-instrument`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

Record = Callable[[str, float, str], None]
"""Told of a call that has ended just now: its name, seconds, and the status it failed with or ""."""


def recorder() -> Record | None:
    """What makes spans of calls; None without the package."""
    try:
        trace: Any = importlib.import_module("opentelemetry.trace")
    except ModuleNotFoundError:
        return None
    tracer = trace.get_tracer("kvstore.service")
    provider, unset = trace.get_tracer_provider, trace.ProxyTracerProvider
    failed = trace.Status(trace.StatusCode.ERROR)

    def record(rpc: str, seconds: float, failure: str) -> None:
        if isinstance(provider(), unset):
            return  # nobody takes spans: to make one all the same took 20 µs of each call
        ended_ns = time.time_ns()
        span = tracer.start_span(
            f"kvstore.v1.KVStore/{rpc}", kind=trace.SpanKind.SERVER, start_time=ended_ns - int(seconds * 1e9)
        )
        if failure:
            span.set_attribute("rpc.grpc.status", failure)
            span.set_status(failed)
        span.end(ended_ns)

    return record
