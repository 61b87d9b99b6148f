# SPDX-License-Identifier: Apache-2.0
"""Engine connectors by name. Each is one file that imports its own engine, on use."""

from __future__ import annotations

from kvstore.registry import Registry

CONNECTORS: Registry[object] = Registry(
    "connector",
    {
        "transformers": "connectors.transformers:TransformersConnector",
        "vllm": "connectors.vllm:KVStoreConnector",
    },
)

__all__ = ["CONNECTORS"]
