# SPDX-License-Identifier: Apache-2.0
"""What every save keeps, wherever its bytes go: which of its blocks can still be filled and committed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from kvstore.errors import LeaseError

Place = TypeVar("Place")


class OpenBlocks(dict[int, Place]):
    """Blocks that are neither published nor given back, by chain index; of each, where its bytes go."""

    def place(self, index: int) -> Place:
        """Of a block. Raises LeaseError for one that is not open."""
        try:
            return self[index]
        except KeyError:
            raise LeaseError(f"block {index} is not open in this save: open are {list(self)}") from None

    def chosen(self, indices: Iterable[int]) -> list[int]:
        """Those named, each once, head to tail. Raises LeaseError for one that is not open."""
        chosen = sorted(set(indices))
        unknown = [index for index in chosen if index not in self]
        if unknown:
            raise LeaseError(f"blocks {unknown} are not open in this save: open are {list(self)}")
        return chosen
