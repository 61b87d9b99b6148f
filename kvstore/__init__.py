# SPDX-License-Identifier: Apache-2.0
"""kvstore: tiered KV-cache offload for LLM serving. GPU → pinned host memory → shared Redis/Valkey.

Importing this loads neither torch nor redis nor grpc: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.api import Hint as Hint
    from kvstore.api import Load as Load
    from kvstore.api import Match as Match
    from kvstore.api import Save as Save
    from kvstore.api import Store as Store
    from kvstore.block import Chain as Chain
    from kvstore.block import ModelId as ModelId
    from kvstore.block import Root as Root
    from kvstore.config import StoreConfig as StoreConfig
    from kvstore.errors import ConfigError as ConfigError
    from kvstore.errors import KVStoreError as KVStoreError
    from kvstore.layout import BlockLayout as BlockLayout
    from kvstore.layout import layout_of as layout_of
    from kvstore.service.connect import connect as connect
    from kvstore.store import KVStore as KVStore

__version__ = "0.1.0"

_HOMES = {
    "BlockLayout": "layout",
    "Chain": "block",
    "ConfigError": "errors",
    "Hint": "api",
    "KVStore": "store",
    "KVStoreError": "errors",
    "Load": "api",
    "Match": "api",
    "ModelId": "block",
    "Root": "block",
    "Save": "api",
    "Store": "api",
    "StoreConfig": "config",
    "connect": "service.connect",
    "layout_of": "layout",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvstore.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
