# SPDX-License-Identifier: Apache-2.0
"""LZ4 over byte planes: all first bytes of the elements, then all second bytes, and so on.

Neighbouring KV elements differ in their low mantissa bits and agree in sign and exponent, so LZ4 finds
nothing in the bytes as they lie and something in the planes of the high bytes. Encoded bytes:

    4 × item_bytes   one u32 a plane: its encoded length; the top bit says that the plane is stored as it is
    …                the planes, in order
    rest             the len(part) % item_bytes bytes that are no whole element

Whether it pays is found out on a few small samples first: data without structure costs well under a tenth of
what encoding it would.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

import lz4.block
import numpy as np
import numpy.typing as npt

from kvstore.codecs.base import Codec
from kvstore.errors import ConfigError

_STORED = 1 << 31
_MAX_PLANE_BYTES = 0x7E000000
"""What LZ4 takes in one block."""
_NUM_SAMPLES = 4
_SAMPLE_ITEMS = 4096

Plane = npt.NDArray[np.uint8]


class Lz4Codec(Codec):
    """Lossless, fast, and quick to say that it does not pay."""

    @dataclass(frozen=True, slots=True)
    class Options:
        """Settings.

        Attributes:
            min_gain: fraction of the bytes that must be saved; below it a part is left raw.
        """

        min_gain: float = 0.1

        def __post_init__(self) -> None:
            if not 0 <= self.min_gain < 1:
                raise ConfigError(f"min_gain is {self.min_gain}: use a fraction from 0 to below 1")

    name: ClassVar[str] = "lz4"
    wire_id: ClassVar[int] = 1

    def __init__(self, options: object = None) -> None:
        super().__init__(options)
        self._min_gain = options.min_gain if isinstance(options, Lz4Codec.Options) else Lz4Codec.Options().min_gain

    def encode(self, part: memoryview, item_bytes: int) -> memoryview | None:
        raw = np.frombuffer(part, np.uint8)
        num_items = len(raw) // item_bytes
        if num_items == 0 or num_items > _MAX_PLANE_BYTES:
            return None
        items = raw[: num_items * item_bytes].reshape(num_items, item_bytes)
        useful = self._useful_planes(items)
        if not any(useful):
            return None
        lengths: list[int] = []
        pieces: list[bytes] = []
        for plane, compress in enumerate(useful):
            straight = np.ascontiguousarray(items[:, plane])
            packed = lz4.block.compress(straight, store_size=False) if compress else None
            if packed is None or len(packed) >= num_items:
                lengths.append(num_items | _STORED)
                pieces.append(straight.tobytes())
            else:
                lengths.append(len(packed))
                pieces.append(packed)
        pieces.append(raw[num_items * item_bytes :].tobytes())
        encoded = struct.pack(f"<{item_bytes}I", *lengths) + b"".join(pieces)
        return memoryview(encoded) if len(encoded) <= len(raw) * (1 - self._min_gain) else None

    def _useful_planes(self, items: npt.NDArray[np.uint8]) -> list[bool]:
        """Which planes shrink, by samples; none where together they would miss the gain asked for."""
        num_items, item_bytes = items.shape
        starts = {int(at) for at in np.linspace(0, max(0, num_items - _SAMPLE_ITEMS), _NUM_SAMPLES)}
        sampled = [0] * item_bytes
        total = 0
        for start in starts:
            sample = items[start : start + _SAMPLE_ITEMS]
            total += len(sample)
            for plane in range(item_bytes):
                straight = np.ascontiguousarray(sample[:, plane])
                sampled[plane] += len(lz4.block.compress(straight, store_size=False))
        useful = [size < total * 0.98 for size in sampled]
        expected = sum(size if keep else total for size, keep in zip(sampled, useful, strict=True))
        # Matches reach no further than their sample, so samples understate; a little slack makes up for it.
        if expected > total * item_bytes * (1 - self._min_gain) * 1.02:
            return [False] * item_bytes
        return useful

    def decode(self, encoded: memoryview, item_bytes: int, into: memoryview) -> None:
        num_items, num_rest = divmod(len(into), item_bytes)
        table_bytes = 4 * item_bytes
        if num_items == 0 or len(encoded) < table_bytes:
            raise ValueError(f"{len(encoded)} bytes cannot be {len(into)} bytes of lz4 planes")
        target = np.frombuffer(into, np.uint8)
        items = target[: num_items * item_bytes].reshape(num_items, item_bytes)
        at = table_bytes
        for plane, word in enumerate(struct.unpack_from(f"<{item_bytes}I", encoded)):
            length = word & ~_STORED
            items[:, plane] = _plane(encoded[at : at + length], length, num_items, stored=bool(word & _STORED))
            at += length
        if len(encoded) - at != num_rest:
            raise ValueError(f"{len(encoded) - at} bytes follow the planes, not {num_rest}")
        into[len(into) - num_rest :] = encoded[at:]


def _plane(encoded: memoryview, length: int, num_items: int, *, stored: bool) -> Plane:
    """One decoded plane of exactly `num_items` bytes; `length` is what the table promised."""
    if len(encoded) != length:
        raise ValueError(f"a plane of {length} bytes is cut off after {len(encoded)}")
    if stored:
        plane = encoded
    else:
        try:
            # The size comes from our own buffer, never from the wire: nothing larger is ever allocated.
            plane = memoryview(lz4.block.decompress(encoded, uncompressed_size=num_items))
        except lz4.block.LZ4BlockError as exc:
            raise ValueError(f"not an lz4 block: {exc}") from exc
    if len(plane) != num_items:
        raise ValueError(f"a plane has {len(plane)} bytes, not {num_items}")
    return np.frombuffer(plane, np.uint8)
