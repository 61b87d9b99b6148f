# SPDX-License-Identifier: Apache-2.0
"""Lower tiers by name. A new one is a file here and a line in TIERS. The host tier is the gateway, not one of them."""

from __future__ import annotations

from kvstore.registry import Registry
from kvstore.tiers.base import Tier

TIERS: Registry[Tier] = Registry(
    "tier", {"redis": "kvstore.tiers.redis:RedisTier", "remote": "kvstore.tiers.remote:RemoteTier"}
)

__all__ = ["TIERS", "Tier"]
