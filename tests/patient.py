# SPDX-License-Identifier: Apache-2.0
"""Limits for tests in which a late answer is a failure: those of the product are what an engine may wait for (half a
second a call, a quarter a lookup), and a busy machine takes longer now and then. Tests of the limits set their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.service.client import SidecarStore

CALL_DEADLINE_S = 20.0
REQUEST = {"lookup_deadline_s": CALL_DEADLINE_S}
"""The section `request` of a store that asks a lower tier."""

REDIS = {"connect_timeout_s": CALL_DEADLINE_S, "call_timeout_s": CALL_DEADLINE_S}
"""Options of a tier on Redis."""


def connect(*args: Any, **options: Any) -> SidecarStore:
    """As `kvstore.service.connect`."""
    from kvstore.service.connect import connect as connect_in_time  # with gRPC, which tests that fork do without

    return connect_in_time(*args, **{"call_deadline_s": CALL_DEADLINE_S, "wait_s": CALL_DEADLINE_S, **options})
