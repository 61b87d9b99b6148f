# SPDX-License-Identifier: Apache-2.0
"""Chains with bytes to write, buffers to read into, and both compared."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from itertools import chain

from kvstore.block import BlockId, BlockMeta, Chain, PartKey, Root
from kvstore.layout import layout_of
from kvstore.tiers.base import Tier
from kvstore.tiers.redis_names import Names
from tests.patient import CALL_DEADLINE_S

DEADLINE_S = CALL_DEADLINE_S


class Content:
    """A chain of `num_blocks` with reproducible bytes for each part, all different."""

    def __init__(
        self,
        root: Root,
        num_blocks: int,
        *,
        seed: int = 0,
        prefix: Sequence[int] = (),
        media: Sequence[tuple[int, bytes]] = (),
    ) -> None:
        rng = random.Random(f"{seed}")
        block_tokens = root.model.block_tokens
        fresh = [rng.randrange(1 << 20) for _ in range(num_blocks * block_tokens - len(prefix))]
        self.tokens = [*prefix, *fresh]
        self.chain = Chain(root, self.tokens, media=tuple(media))
        self.layout = layout_of(root.model)
        self.keys = self.chain.part_keys(0, num_blocks, self.layout.all_parts)
        self.meta: dict[BlockId, BlockMeta] = {
            block: self.chain.meta(index) for index, block in enumerate(self.chain.ids)
        }
        self.parts: dict[PartKey, memoryview] = {
            # Bytes follow from the key, as KV follows from the tokens: equal blocks have equal bytes.
            key: memoryview(random.Random(key.block + bytes([key.part])).randbytes(self._bytes(key)))
            for key in self.keys
        }

    def _bytes(self, key: PartKey) -> int:
        return self.layout.parts[key.part].num_bytes

    def write(self, tier: Tier, start: int = 0, stop: int | None = None) -> set[PartKey]:
        """Write blocks `start` … `stop`."""
        blocks = set(self.chain.ids[start:stop])
        parts = {key: part for key, part in self.parts.items() if key.block in blocks}
        return tier.write(parts, self.meta, DEADLINE_S)

    def buffers(self) -> dict[PartKey, memoryview]:
        return {key: memoryview(bytearray(b"\xee" * len(part))) for key, part in self.parts.items()}

    def read(self, tier: Tier, deadline_s: float = DEADLINE_S) -> list[PartKey]:
        """Keys the tier delivers, each held against what was written."""
        into = self.buffers()
        delivered = []
        for key in chain.from_iterable(tier.read(into, deadline_s)):
            assert into[key] == self.parts[key], "wrong bytes were delivered as right ones"
            delivered.append(key)
        return delivered

    def held_in_passing(self, tier: Tier, into: dict[PartKey, memoryview]) -> int:
        """The most bytes that Python held at once while all was written, and read into `into`."""
        tracemalloc.start()
        try:
            assert self.write(tier) == set(self.keys)
            assert [key for keys in tier.read(into, DEADLINE_S) for key in keys] == self.keys
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def name(self, index: int, num_buckets: int = 16) -> str:
        """Key of the value at position `index` of `keys`."""
        return Names(num_buckets).value(self.keys[index])
