# SPDX-License-Identifier: Apache-2.0
"""Limits for tests in which a late answer is a failure: those of the product are what an engine may wait for (half a
second a call, a quarter a lookup), and a busy machine takes longer now and then. Tests of the limits set their own."""

from __future__ import annotations

from functools import partial

from kvstore.service import connect as connecting

CALL_DEADLINE_S = 20.0
REQUEST = {"lookup_deadline_s": CALL_DEADLINE_S}
"""The section `request` of a store that asks a lower tier."""

REDIS = {"connect_timeout_s": CALL_DEADLINE_S, "call_timeout_s": CALL_DEADLINE_S}
"""Options of a tier on Redis."""

connect = partial(connecting.connect, call_deadline_s=CALL_DEADLINE_S, wait_s=CALL_DEADLINE_S)
