# SPDX-License-Identifier: Apache-2.0
"""The remote tier with a sidecar of its own to read from, for the tests that all tiers pass."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence

from kvstore.api import NO_HINT
from kvstore.block import BlockId, BlockMeta, PartKey, Root, RootId
from kvstore.config import StoreConfig
from kvstore.layout import BlockLayout
from kvstore.service.rights import Gate
from kvstore.service.server import Server
from kvstore.tiers.base import AS_USED, Later
from kvstore.tiers.remote import RemoteTier
from tests.patient import CALL_DEADLINE_S


class PeerWithContent(RemoteTier):
    """Reads as it does anywhere. What is written and removed, its peer's own engines would write and remove."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvstore-test-")
        address = f"unix:{self._folder.name}/s"
        values = {"host": {"capacity_bytes": 16 << 20, "prefault": False}, "service": {"listen": address}}
        config = StoreConfig.load(values, environ={})
        self._server = Server(config, gate=Gate(config.service))
        self._server.start()
        self._store = self._server._store
        self._layout: BlockLayout | None = None
        super().__init__(RemoteTier.Options(address=address, call_timeout_s=CALL_DEADLINE_S))

    def open(self, layout: BlockLayout) -> None:
        super().open(layout)
        self._store.open(layout.model)
        self._layout = layout

    def write(
        self,
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline_s: float,
        later: Later = AS_USED,
    ) -> set[PartKey]:
        if not parts:
            return super().write(parts, meta, deadline_s, later)
        assert self._layout is not None
        pool = self._store._host.pool
        for root, block in dict.fromkeys((key.root, key.block) for key in parts):
            # As a client of the peer would have shown it: a root that nobody has named in full is served to nobody.
            self._server._servicer._namespaces.roots._roots[root] = Root(self._layout.model)
            cells = [key.part for key in parts if (key.root, key.block) == (root, block)]
            reserved, _ = pool.filling.reserve(
                root, self._layout, [block], lambda *_, block=block: [meta[block]], cells
            )
            for item in reserved:
                for part, slot in zip(item.parts, item.slots, strict=True):
                    value = parts[PartKey(root, block, part)]
                    self._store.arena.view(slot, len(value))[:] = value
            pool.filling.publish(reserved, NO_HINT)
        return {key for key in parts if int(pool.survey.ready_masks(key.root, [key.block])[0]) >> key.part & 1}

    def remove(self, keys: Sequence[PartKey]) -> None:
        super().remove(keys)
        self._store._host.pool.remove([key.block for key in keys])

    def clear(self, root: RootId | None) -> None:
        super().clear(root)
        self._store._host.pool.clear(root)

    def check(self) -> list[str]:
        return [*super().check(), *self._server.check()]

    def close(self) -> None:
        super().close()
        self._server.stop()
        self._folder.cleanup()
