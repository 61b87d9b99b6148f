# SPDX-License-Identifier: Apache-2.0
"""Another host's sidecar as a tier: blocks that lie in its memory, before Redis is asked.

    [tiers.remote]                     # above [tiers.redis]: tiers are asked in the order they stand
    address = "cache-2:9400"
    tls_ca = "/etc/kvstore/ca.pem"
    token_file = "/etc/kvstore/peer-token"

A peer is read, never written: `write` stores nothing, `remove` and `clear` leave it alone, since what it holds is its
own engines' to keep. It is asked by block hash, and only for what lies in its host: two sidecars may read from each
other. It checks the token's rights to a namespace, and a namespace that none of its own clients use holds nothing.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import ClassVar

from kvstore.api import Hint
from kvstore.block import BlockId, BlockMeta, PartKey, RootId
from kvstore.clock import check_seconds
from kvstore.errors import ConfigError, TierError, TierTimeout
from kvstore.layout import BlockLayout
from kvstore.service.peer import MAX_IDS, Counts, Peer, PeerOptions
from kvstore.tiers.base import AS_USED, Later, Tier

_MAX_SEEN = 65_536


class RemoteTier(Tier):
    """Reads blocks from the host tier of another sidecar."""

    @dataclass(frozen=True, slots=True)
    class Options:
        """Settings.

        Attributes:
            address: of the peer, host:port (or unix:PATH).
            token_file: file with the access token, readable by its owner only; empty for none.
            tls_ca, tls_cert, tls_key: PEM files: who signed the peer's certificate, and our own for it.
            call_timeout_s: deadline of calls that are given none, and of connecting.
        """

        address: str = ""
        token_file: str = ""
        tls_ca: str = ""
        tls_cert: str = ""
        tls_key: str = ""
        call_timeout_s: float = 0.5

        def __post_init__(self) -> None:
            if not self.address:
                raise ConfigError("address is empty: give the peer's as host:port, such as cache-2:9400, or unix:PATH")
            if bool(self.tls_cert) != bool(self.tls_key):
                raise ConfigError("tls_cert and tls_key go together: give both, or neither")
            check_seconds("call_timeout_s", self.call_timeout_s)

    name: ClassVar[str] = "remote"
    read_only: ClassVar[bool] = True

    def __init__(self, options: RemoteTier.Options) -> None:
        self.options: RemoteTier.Options = options
        super().__init__(options)
        self._peer = Peer(
            self.name,
            PeerOptions(
                address=options.address,
                token_file=options.token_file,
                tls_ca=options.tls_ca,
                tls_cert=options.tls_cert,
                tls_key=options.tls_key,
                call_deadline_s=options.call_timeout_s,
            ),
        )
        self._lock = threading.Lock()
        self._seen: OrderedDict[BlockId, None] = OrderedDict()
        """Blocks that the peer had: chains without one are not worth a touch."""

    def open(self, layout: BlockLayout) -> None:
        """Nothing to learn: a root commits to the model and its layout."""

    def contains(self, keys: Sequence[PartKey], deadline_s: float) -> list[bool]:
        deadline = time.monotonic() + deadline_s
        there: dict[PartKey, bool] = {}
        for root in dict.fromkeys(key.root for key in keys):
            mine = [key for key in keys if key.root == root]
            blocks = list(dict.fromkeys(key.block for key in mine))
            parts = sorted({key.part for key in mine})
            for at in range(0, len(blocks), MAX_IDS):
                some = blocks[at : at + MAX_IDS]
                present = self._peer.present(root, some, parts, self._left_s(deadline))
                every = [PartKey(root, block, part) for block in some for part in parts]
                there.update((key, byte == 1) for key, byte in zip(every, present, strict=True))
        self._note({key.block for key, found in there.items() if found})
        return [there[key] for key in keys]

    def read(self, into: Mapping[PartKey, memoryview], deadline_s: float) -> Iterator[list[PartKey]]:
        return self._read(into, time.monotonic() + deadline_s)

    def _read(self, into: Mapping[PartKey, memoryview], deadline: float) -> Iterator[list[PartKey]]:
        counts = Counts()
        try:
            for root, parts, blocks in _runs(into):
                for block, part in self._peer.fetch(root, blocks, parts, self._left_s(deadline), counts):
                    yield [PartKey(root, block, part)]
        finally:
            self._count(asdict(counts))

    def write(
        self,
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline_s: float,
        later: Later = AS_USED,
    ) -> set[PartKey]:
        """Stores nothing: a peer is read only."""
        return set()

    def touch(self, keys: Sequence[PartKey], hint: Hint, later: Later = AS_USED) -> None:
        """Passed on where the peer is known to have had a block of the chain. A failure is let go."""
        blocks = list(dict.fromkeys(key.block for key in keys))
        with self._lock:
            used = next((at for at in range(len(blocks), 0, -1) if blocks[at - 1] in self._seen), 0)
        for at in range(0, min(used, MAX_IDS), MAX_IDS):
            try:
                self._peer.present(
                    keys[0].root, blocks[at:used], [keys[0].part], self.options.call_timeout_s, used=True
                )
            except TierError:
                return

    def remove(self, keys: Sequence[PartKey]) -> None:
        """Leaves the peer alone."""

    def clear(self, root: RootId | None) -> None:
        """Leaves the peer alone."""

    def check(self) -> list[str]:
        """Nothing is kept here that could be broken; the peer has a check of its own."""
        return []

    def close(self) -> None:
        self._peer.close()

    def gauges(self) -> dict[str, float]:
        return {f"{self.name}.available": float(self._peer.is_up)}

    def _left_s(self, deadline: float) -> float:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TierTimeout(self.name, "the deadline passed")
        return left_s

    def _note(self, blocks: set[BlockId]) -> None:
        with self._lock:
            for block in blocks:
                self._seen[block] = None
                self._seen.move_to_end(block)
            while len(self._seen) > _MAX_SEEN:
                self._seen.popitem(last=False)

    def _count(self, counts: Mapping[str, float]) -> None:
        self.stats.add_all({f"{self.name}.{name}": amount for name, amount in counts.items() if amount})


_Run = tuple[RootId, tuple[int, ...], dict[BlockId, list[memoryview]]]


def _runs(into: Mapping[PartKey, memoryview]) -> Iterator[_Run]:
    """Consecutive blocks of which the same parts are wanted: most often all there are."""
    run: _Run | None = None
    for (root, block), keys in groupby(into, key=lambda key: (key.root, key.block)):
        cells = list(keys)
        parts = tuple(key.part for key in cells)
        if run is None or (run[0], run[1]) != (root, parts) or block in run[2] or len(run[2]) == MAX_IDS:
            if run is not None:
                yield run
            run = (root, parts, {})
        run[2][block] = [into[key].cast("B") for key in cells]
    if run is not None:
        yield run
