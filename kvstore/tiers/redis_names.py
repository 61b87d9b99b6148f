# SPDX-License-Identifier: Apache-2.0
"""Names and scores in Redis: which key a part lies under, and where it stands in the order of eviction.

    kvs1:{<stripe>}:r                       set of the roots that have something in this stripe
    kvs1:{<stripe>}:<root>:v:<block>:<part>  value: frame header + payload
    kvs1:{<stripe>}:<root>:z                 sorted set: member "<block>:<part>", score below
    kvs1:{<stripe>}:<root>:s                 hash: member → accounted bytes
    kvs1:{<stripe>}:<root>:b                 sum of that hash

A *bucket* is what one namespace has in one stripe. <root> is 16 hex digits, <block> 64, <stripe> and <part> three
decimals: all names of one kind have one length, so commands can be put together without measuring. The stripe follows
from the block; it stands in braces, the Cluster's hash tag: all that a script or transaction touches lies on one
node, the list of namespaces included.

A score is the time of the last use in seconds since 2025 by the server's clock, less a microsecond for each step
down the chain. One use of a chain takes one time for all of it, and scores only ever rise: so a parent's score is
above its children's, and taking the lowest scores takes tails before heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvstore.block import BlockId, PartKey, RootId
from kvstore.layout import MAX_PARTS

EPOCH_S = 1_735_689_600.0
STEP_S = 1e-6
MAX_BUCKETS = 256
_MAX_ROOTS = 4096
"""Roots whose bucket names are kept at hand."""
_PARTS = tuple(f":{part:03d}" for part in range(MAX_PARTS))


class Bucket(NamedTuple):
    """What one namespace has in one stripe."""

    stripe: int
    root: str

    @property
    def prefix(self) -> str:
        return f"kvs1:{{{self.stripe:03d}}}:{self.root}"

    @property
    def registry(self) -> str:
        return registry(self.stripe)

    @property
    def order(self) -> str:
        return f"{self.prefix}:z"

    @property
    def sizes(self) -> str:
        return f"{self.prefix}:s"

    @property
    def total(self) -> str:
        return f"{self.prefix}:b"

    @property
    def values(self) -> str:
        """What the name of every value begins with; a member follows."""
        return f"{self.prefix}:v:"


def registry(stripe: int) -> str:
    """The set of roots that have something in a stripe."""
    return f"kvs1:{{{stripe:03d}}}:r"


def bucket_of(name: str) -> tuple[Bucket, str] | None:
    """Bucket and member that a value's name speaks of."""
    head, found, member = name.partition(":v:")
    stripe, _, root = head.removeprefix("kvs1:{").partition("}:")
    return (Bucket(int(stripe), root), member) if found and stripe.isdigit() else None


def root_tag(root: RootId) -> str:
    """How a namespace is named: by the first 64 bits of its root. Frames hold all of it."""
    return root[:8].hex()


class Names:
    """Names of keys for a fixed number of buckets, quickly."""

    def __init__(self, num_buckets: int) -> None:
        self._num_buckets = num_buckets
        self.stripes = range(num_buckets)
        self._buckets: dict[RootId, tuple[Bucket, ...]] = {}

    def bucket(self, key: PartKey) -> Bucket:
        return self._of(key.root)[key.block[0] % self._num_buckets]

    def stripe(self, key: PartKey) -> int:
        return key.block[0] % self._num_buckets

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
            buckets = tuple(Bucket(stripe, tag) for stripe in range(self._num_buckets))
            self._buckets[root] = buckets
        return buckets

    def touches(self, chains: Iterable[Sequence[PartKey]], now_s: float) -> list[bytes]:
        """`ZADD … XX GT` for each bucket, giving each chain's keys, head to tail, the scores of a use at `now_s`.

        Less than a microsecond a key; what several chains share is named once.
        """
        micros = round(now_s * 1e6)  # whole ones, so that no two depths round to one score
        num_buckets, parts = self._num_buckets, _PARTS
        pairs: dict[RootId, list[list[str]]] = {}
        seen: set[BlockId] = set()
        for chain in chains:
            stripes = pairs.setdefault(chain[0].root, [[] for _ in self.stripes])
            score, current, known = micros + 1, None, False
            for _, block, part in chain:
                if block != current:
                    current, known = block, block in seen
                    seen.add(block)
                    score -= 1
                    text = f"{score}e-6"
                    words = f"${len(text)}\r\n{text}\r\n$68\r\n{block.hex()}"
                if not known:
                    stripes[block[0] % num_buckets].append(f"{words}{parts[part]}\r\n")
        commands = []
        for root, stripes in pairs.items():
            for bucket, named in zip(self._of(root), stripes, strict=True):
                if named:
                    order = bucket.order
                    head = (
                        f"*{4 + 2 * len(named)}\r\n$4\r\nZADD\r\n${len(order)}\r\n{order}\r\n$2\r\nXX\r\n$2\r\nGT\r\n"
                    )
                    commands.append((head + "".join(named)).encode())
        return commands

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
