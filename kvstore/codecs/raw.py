# SPDX-License-Identifier: Apache-2.0
"""The codec that changes nothing and copies nothing."""

from __future__ import annotations

from typing import ClassVar

from kvstore.codecs.base import Codec


class RawCodec(Codec):
    """Bytes as they are. Readers of raw values receive straight into their buffer and never call `decode`."""

    name: ClassVar[str] = "raw"
    wire_id: ClassVar[int] = 0

    def encode(self, part: memoryview, item_bytes: int) -> memoryview | None:
        return part

    def decode(self, encoded: memoryview, item_bytes: int, into: memoryview) -> None:
        if len(encoded) != len(into):
            raise ValueError(f"a raw payload of {len(encoded)} bytes does not fill {len(into)}")
        into[:] = encoded
