# SPDX-License-Identifier: Apache-2.0
"""What a codec is: bytes of one part in, bytes of one value out, and exactly back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


class Codec(ABC):
    """Lossless, thread-safe, stateless from the outside.

    `wire_id` stands in the frame of every value, so that a reader decodes what it finds, whatever it is
    configured to write; an id once published is never given to another codec.
    """

    @dataclass(frozen=True, slots=True)
    class Options:
        """Settings of this codec."""

    name: ClassVar[str]
    wire_id: ClassVar[int]

    def __init__(self, options: object = None) -> None:
        self.options = options

    @abstractmethod
    def encode(self, part: memoryview, item_bytes: int) -> memoryview | None:
        """Encoded bytes of `part` (C-contiguous bytes of elements of `item_bytes`), or None where it does not pay.

        None means: store it raw. The raw codec returns `part` itself, no copy.
        """

    @abstractmethod
    def decode(self, encoded: memoryview, item_bytes: int, into: memoryview) -> None:
        """Fill `into` from `encoded`. Raises ValueError where it does not give exactly len(into) bytes."""
