# SPDX-License-Identifier: Apache-2.0
"""Eviction policies by name. A new one is a file here and a line in POLICIES."""

from __future__ import annotations

from kvstore.policies.base import Policy
from kvstore.registry import Registry

POLICIES: Registry[Policy] = Registry(
    "policy",
    {
        "lru": "kvstore.policies.lru:LruPolicy",
        "arc": "kvstore.policies.arc:ArcPolicy",
        "s3fifo": "kvstore.policies.s3fifo:S3FifoPolicy",
        "priority": "kvstore.policies.priority:PriorityPolicy",
        "returns": "kvstore.policies.returns:ReturnsPolicy",
    },
)

__all__ = ["POLICIES", "Policy"]
