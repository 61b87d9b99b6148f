# SPDX-License-Identifier: Apache-2.0
"""Lossless codecs of the lower tiers by name. A new one is a file here and a line in CODECS."""

from __future__ import annotations

from kvstore.codecs.base import Codec
from kvstore.registry import Registry

CODECS: Registry[Codec] = Registry(
    "codec", {"raw": "kvstore.codecs.raw:RawCodec", "lz4": "kvstore.codecs.lz4:Lz4Codec"}
)

__all__ = ["CODECS", "Codec"]
