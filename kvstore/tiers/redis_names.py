# SPDX-License-Identifier: Apache-2.0
"""Names and scores in Redis: which key a part lies under, and where it stands in the order of eviction.

    kvs1:buckets                                   set of the bucket tags in use, of every namespace
    kvs1:{<root>:<bucket>}:v:<block>:<part>        value: frame header + payload
    kvs1:{<root>:<bucket>}:z                       sorted set: member "<block>:<part>", score below
    kvs1:{<root>:<bucket>}:s                       hash: member → accounted bytes
    kvs1:{<root>:<bucket>}:b                       sum of that hash

<root> is 16 hex digits, <block> 64, <bucket> and <part> three decimals: all names of one kind have one length,
so commands can be put together without measuring. What stands in braces is the Cluster hash tag: all a script
touches for one bucket lies on one node.

A score is the time of the last use in seconds since 2025 by the server's clock, less a microsecond for each step
down the chain. One use of a chain takes one time for all of it, and scores only ever rise: so a parent's score is
above its children's, and taking the lowest scores takes tails before heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvstore.block import BlockId, PartKey, RootId
from kvstore.layout import MAX_PARTS

REGISTRY = b"kvs1:buckets"
EPOCH_S = 1_735_689_600.0
STEP_S = 1e-6
MAX_BUCKETS = 256
_MAX_ROOTS = 4096
"""Roots whose bucket names are kept at hand."""
_PARTS = tuple(f":{part:03d}" for part in range(MAX_PARTS))


class Bucket(NamedTuple):
    """One bucket of one namespace, by its tag `<root>:<bucket>`."""

    tag: str

    @property
    def order(self) -> str:
        return f"kvs1:{{{self.tag}}}:z"

    @property
    def sizes(self) -> str:
        return f"kvs1:{{{self.tag}}}:s"

    @property
    def total(self) -> str:
        return f"kvs1:{{{self.tag}}}:b"

    @property
    def values(self) -> str:
        """What the name of every value begins with; a member follows."""
        return f"kvs1:{{{self.tag}}}:v:"


def root_tag(root: RootId) -> str:
    """How a namespace is named: by the first 64 bits of its root. Frames hold all of it."""
    return root[:8].hex()


class Names:
    """Names of keys for a fixed number of buckets, quickly."""

    def __init__(self, num_buckets: int) -> None:
        self._num_buckets = num_buckets
        self._buckets: dict[RootId, tuple[Bucket, ...]] = {}

    def bucket(self, key: PartKey) -> Bucket:
        return self._of(key.root)[key.block[0] % self._num_buckets]

    @staticmethod
    def member(block: BlockId, part: int) -> str:
        return f"{block.hex()}{_PARTS[part]}"

    def value(self, key: PartKey) -> str:
        return self.bucket(key).values + self.member(key.block, key.part)

    def _of(self, root: RootId) -> tuple[Bucket, ...]:
        buckets = self._buckets.get(root)
        if buckets is None:
            if len(self._buckets) > _MAX_ROOTS:
                self._buckets.clear()
            tag = root_tag(root)
            buckets = tuple(Bucket(f"{tag}:{number:03d}") for number in range(self._num_buckets))
            self._buckets[root] = buckets
        return buckets

    def pipeline(self, verb: str, keys: Iterable[PartKey]) -> bytes:
        """`verb <value name>` for each key, as RESP: about a third of a microsecond a key."""
        num_buckets, parts = self._num_buckets, _PARTS
        commands: list[str] = []
        heads: tuple[str, ...] = ()
        current: RootId | None = None
        for root, block, part in keys:
            if root != current:
                current = root
                prefixes = [bucket.values for bucket in self._of(root)]
                name_bytes = len(prefixes[0]) + 64 + len(parts[0])
                start = f"*2\r\n${len(verb)}\r\n{verb}\r\n${name_bytes}\r\n"
                heads = tuple(start + prefix for prefix in prefixes)
            commands.append(f"{heads[block[0] % num_buckets]}{block.hex()}{parts[part]}\r\n")
        return "".join(commands).encode()
