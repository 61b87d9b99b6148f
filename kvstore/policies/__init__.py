# SPDX-License-Identifier: Apache-2.0
"""Eviction policies by name. A new one is a file here and a line in POLICIES."""

from __future__ import annotations

from kvstore.policies.base import Policy
from kvstore.registry import Registry

POLICIES: Registry[Policy] = Registry("policy", {"lru": "kvstore.policies.lru:LruPolicy"})

__all__ = ["POLICIES", "Policy"]
