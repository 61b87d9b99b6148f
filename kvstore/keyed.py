# SPDX-License-Identifier: Apache-2.0
"""A lower tier for values under somebody else's keys: an engine that offloads by itself, with hashes of its own.

No host tier, no chains, no layout: bytes of one size that only engines of the same namespace can read. Each value is
a block of its own in the tier, so it is verified, accounted and evicted like any other: the tier recomputes its id
from the foreign key, which travels in the frame, and checks its checksum before anybody sees it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from kvstore.api import Hint
from kvstore.block import BlockId, BlockMeta, ModelId, PartKey, Root
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, TierError
from kvstore.layout import layout_of
from kvstore.stats import Stats
from kvstore.tiers import TIERS, Tier

_ROW_BYTES = 2
"""The smallest block there is has two tokens: values are taken as rows of so many."""


class KeyedValues:
    """Values of one size in one namespace of one lower tier. Thread-safe; every call blocks up to its deadline."""

    def __init__(self, tier: Tier, namespace: Mapping[str, str], value_bytes: int) -> None:
        """Take over `tier`, which `close` closes.

        Args:
            namespace: whatever makes two engines' bytes under one key differ, by name.
            value_bytes: of every value; an even number.
        """
        if value_bytes < _ROW_BYTES or value_bytes % _ROW_BYTES:
            raise ConfigError(f"values of {value_bytes} bytes: give an even number of bytes")
        digest = hashlib.sha256()
        for name, value in sorted(namespace.items()):
            for text in (name, value):
                digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
        model = ModelId(
            model="keyed",
            revision=digest.hexdigest(),
            kv_dtype="uint8",
            num_layers=1,
            num_kv_heads=1,
            num_kv=1,
            head_dim=value_bytes // _ROW_BYTES,
            block_tokens=_ROW_BYTES,
            layout=f"opaque:{digest.hexdigest()[:16]}",
        )
        self.value_bytes = value_bytes
        self.root = Root(model)
        self.stats = Stats()
        self._tier = tier
        tier.bind(self.stats)
        tier.open(layout_of(model))

    @classmethod
    def connect(cls, tiers: Mapping[str, object], namespace: Mapping[str, str], value_bytes: int) -> KeyedValues:
        """Over one tier by its settings, as in a configuration file: `{"redis": {"url": "redis://cache:6379"}}`.

        Raises ConfigError for none, several, or unknown settings.
        """
        config = StoreConfig.load({"tiers": dict(tiers)}, environ={})
        if len(config.tiers) != 1:
            raise ConfigError(f"{len(config.tiers)} tiers are given: give one, e.g. {{'redis': {{'url': …}}}}")
        ((name, options),) = config.tiers.items()
        tier = TIERS.load(name)(options)
        try:
            return cls(tier, namespace, value_bytes)
        except ConfigError:
            tier.close()
            raise

    def key(self, foreign: bytes) -> PartKey:
        return PartKey(self.root.id, self._meta(foreign).block_id(), 0)

    def _meta(self, foreign: bytes) -> BlockMeta:
        return BlockMeta(BlockId(self.root.id), 0, b"", foreign)

    def contains(self, keys: Sequence[bytes], deadline_s: float) -> list[bool]:
        """Presence of each key. Raises TierError."""
        return self._tier.contains([self.key(key) for key in keys], deadline_s)

    def read(self, into: Mapping[bytes, memoryview], deadline_s: float) -> set[bytes]:
        """Fill buffers; the keys whose buffers are filled and verified. Buffers of others hold garbage.

        Nothing writes to any buffer once this returns or raises. Raises TierError where nothing was read; where
        some was, returns that.
        """
        foreign = {self.key(key): key for key in into}
        found: set[bytes] = set()
        reading = self._tier.read({ours: into[key] for ours, key in foreign.items()}, deadline_s)
        try:
            for keys in reading:
                found.update(foreign[ours] for ours in keys)
        except TierError:
            if not found:
                raise
        return found

    def write(self, values: Mapping[bytes, memoryview], deadline_s: float) -> set[bytes]:
        """Store values; the keys that are certainly there now. Raises TierError."""
        foreign = {self.key(key): key for key in values}
        metas = {ours.block: self._meta(key) for ours, key in foreign.items()}
        stored = self._tier.write({ours: values[key] for ours, key in foreign.items()}, metas, deadline_s)
        return {foreign[ours] for ours in stored}

    def touch(self, keys: Sequence[bytes]) -> None:
        """A run of keys was used, head to tail. Does not block."""
        self._tier.touch([self.key(key) for key in keys], Hint())

    def remove(self, keys: Sequence[bytes]) -> None:
        self._tier.remove([self.key(key) for key in keys])

    def check(self) -> list[str]:
        """Broken invariants of the tier; empty when healthy."""
        return self._tier.check()

    def close(self) -> None:
        self._tier.close()
