# SPDX-License-Identifier: Apache-2.0
"""Tiers by name. A new one is a file here and a line in TIERS."""

from __future__ import annotations

from kvstore.registry import Registry
from kvstore.tiers.base import Tier

TIERS: Registry[Tier] = Registry(
    "tier", {"host": "kvstore.tiers.host:HostTier", "redis": "kvstore.tiers.redis:RedisTier"}
)

__all__ = ["TIERS", "Tier"]
