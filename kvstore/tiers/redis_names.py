# SPDX-License-Identifier: Apache-2.0
"""Names and scores in Redis: which key a part lies under, and where it stands in the order of eviction.

    kvs2:{<stripe>}:r                       sorted set: root that has something in this stripe, score no member is below
    kvs2:{<stripe>}:u                       bytes of all roots in this stripe
    kvs2:{<stripe>}:<root>:v:<block>:<part>  value: frame header + payload
    kvs2:{<stripe>}:<root>:z                 sorted set: member "<block>:<part>", score below
    kvs2:{<stripe>}:<root>:s                 hash: member → accounted bytes
    kvs2:{<stripe>}:<root>:b                 sum of that hash
    kvs2:{<stripe>}:<root>:f                 set: members that another store than their writer's went on from, perhaps
    kvs2:{<stripe>}:<root>:k                 hash: members and the one child each has (`redis_growth`)
    kvs2:{<stripe>}:<root>:m:<block>         who computes the chain from this block on (`redis_marks`)
    kvs2:{000}:t:<tenant>                    sorted set: roots of a tenant (`redis_tenants`)
    kvs2:{000}:clock                         the time that scores are made of (`redis_clock`)

A *bucket* is what one namespace has in one stripe. <root> is 16 hex digits, <block> 64, <stripe> and <part> three
decimals: all names of one kind have one length, so commands can be put together without measuring. The stripe follows
from the block; it stands in braces, the Cluster's hash tag: all that a script or transaction touches lies on one
node, the list of namespaces included.

A score is the time of the last use in seconds since 2025 by the shared clock, less a microsecond for each step
down the chain, and earlier or later as a store's policy says (`kvstore.policies.standing`). One use of a chain takes
one time for all of it, nothing in it counts as used earlier than what hangs from it, and scores only ever rise: so a
parent's score is above its children's, and taking the lowest scores takes tails before heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore import native
from kvstore.block import DIGEST_BYTES, BlockId, PartKey, RootId
from kvstore.layout import MAX_PARTS
from kvstore.native import MEMBER_BYTES, Named

EPOCH_S = 1_735_689_600.0
STEP_S = 1e-6
MAX_BUCKETS = 256
TOUCH_STEPS = (128, 640, 1280)
"""Keys of the first steps of a touch, and of all after them. The server takes one in and puts it in order, at 0.8 us a
key, while the next is put together, at 0.3: so it begins early, and never waits."""
_MAX_ROOTS = 1024
"""Roots whose bucket names are kept at hand."""
_PARTS = tuple(f":{part:03d}" for part in range(MAX_PARTS))
_ROOT, _BLOCK, _PART = map(itemgetter, range(3))
_NUM_DIGITS = 18
_MEMBER_AT = len("$21\r\n") + _NUM_DIGITS + len("e-6\r\n")
"""Where the word of a member begins in a row of a touch."""
_ROW_BYTES = _MEMBER_AT + len("$68\r\n") + MEMBER_BYTES


@dataclass(frozen=True, order=True)
class Bucket:
    """What one namespace has in one stripe. Its names are put together once: a write asks for five a part."""

    stripe: int
    root: str

    @cached_property
    def prefix(self) -> str:
        return prefix(self.stripe) + self.root

    @cached_property
    def registry(self) -> str:
        return registry(self.stripe)

    @cached_property
    def used(self) -> str:
        return used(self.stripe)

    @cached_property
    def order(self) -> str:
        return f"{self.prefix}:z"

    @cached_property
    def sizes(self) -> str:
        return f"{self.prefix}:s"

    @cached_property
    def total(self) -> str:
        return f"{self.prefix}:b"

    @cached_property
    def forks(self) -> str:
        return f"{self.prefix}:f"

    @cached_property
    def only(self) -> str:
        return f"{self.prefix}:k"

    @cached_property
    def marks(self) -> str:
        """What the name of every announcement begins with; a block follows."""
        return f"{self.prefix}:m:"

    @cached_property
    def values(self) -> str:
        """What the name of every value begins with; a member follows."""
        return f"{self.prefix}:v:"

    @cached_property
    def books(self) -> bytes:
        """The keys of an account, as words of RESP."""
        return words(self.registry, self.used, self.order, self.sizes, self.total)


class Touch(NamedTuple):
    """The part of a touch that concerns one bucket."""

    words: bytes
    """The command, whose reply is how many members it raised."""
    order: str
    rows: NDArray[np.uint8]
    """[members, bytes]: score and member of each, as words."""

    def scores(self) -> bytes:
        """The command that asks for the score of each: who has none is not there."""
        order, count = self.order, len(self.rows)
        words = f"*{2 + count}\r\n$7\r\nZMSCORE\r\n${len(order)}\r\n{order}\r\n".encode()
        return words + self.rows[:, _MEMBER_AT:].tobytes()

    def block(self, at: int) -> BlockId:
        """The block of member `at`."""
        return BlockId(bytes.fromhex(self.rows[at, -MEMBER_BYTES:][:64].tobytes().decode()))


class Use(NamedTuple):
    """A chain that was used."""

    keys: Sequence[PartKey]
    """From the root, head to tail."""
    later: Mapping[BlockId, float]
    """Seconds by which the use counts later than it was, by block."""


def _above_children(keys: Sequence[PartKey], later: Mapping[BlockId, float]) -> NDArray[np.int64]:
    """Microseconds [keys] by which each counts as used later: as is said of it, or of any behind it if that is more."""
    own = np.array([later.get(block, 0.0) for block in map(_BLOCK, keys)])
    places: NDArray[np.int64] = np.rint(np.maximum.accumulate(own[::-1])[::-1] * 1e6).astype(np.int64)
    return places


def words(*texts: str) -> bytes:
    """`texts`, all ASCII, as words of RESP."""
    return "".join([f"${len(text)}\r\n{text}\r\n" for text in texts]).encode()


def prefix(stripe: int) -> str:
    """What all names of a stripe begin with; a bucket's go on with its root."""
    return f"kvs2:{{{stripe:03d}}}:"


def registry(stripe: int) -> str:
    """The roots that have something in a stripe, the coldest first, as far as it is known."""
    return f"kvs2:{{{stripe:03d}}}:r"


def used(stripe: int) -> str:
    """Bytes of all that is in a stripe."""
    return f"kvs2:{{{stripe:03d}}}:u"


CLOCK = f"{prefix(0)}clock"
_OF_BUCKET = rb"kvs2:\{([0-9]{3})\}:([0-9a-f]{16}):"
_VALUE_NAME = re.compile(_OF_BUCKET + rb"v:([0-9a-f]{64}:[0-9]{3})")
_BOOK_NAME = re.compile(_OF_BUCKET + rb"[zsb]")
VALUE_NAME_BYTES = len(Bucket(0, 16 * "0").values) + 64 + len(":000")


def bucket_of(name: bytes) -> tuple[Bucket, str] | None:
    """Bucket and member that a value's name speaks of; None for what is none, whoever named it so."""
    found = _VALUE_NAME.fullmatch(name)
    return None if found is None else (_bucket(found), found[3].decode())


def book_of(name: bytes) -> Bucket | None:
    """The bucket that a name of its order, sizes or total speaks of; None for other names."""
    found = _BOOK_NAME.fullmatch(name)
    return None if found is None else _bucket(found)


def _bucket(found: re.Match[bytes]) -> Bucket:
    return Bucket(int(found[1]), found[2].decode())


def root_tag(root: RootId) -> str:
    """How a namespace is named: by the first 64 bits of its root. Frames hold all of it."""
    return root[:8].hex()


class Names:
    """Names of keys for a fixed number of buckets, quickly."""

    def __init__(self, num_buckets: int) -> None:
        self._num_buckets = num_buckets
        self.stripes = range(num_buckets)
        self._buckets: dict[RootId, tuple[Bucket, ...]] = {}
        self._heads: dict[tuple[RootId, str], bytes] = {}

    def bucket(self, key: PartKey) -> Bucket:
        return self._of(key.root)[key.block[0] % self._num_buckets]

    def stripe(self, key: PartKey) -> int:
        return key.block[0] % self._num_buckets

    @staticmethod
    def member(block: BlockId, part: int) -> str:
        return f"{block.hex()}{_PARTS[part]}"

    def value(self, key: PartKey) -> str:
        return self.bucket(key).values + self.member(key.block, key.part)

    def mark(self, key: PartKey) -> str:
        """What the announcement is called that begins with this block."""
        return self.bucket(key).marks + key.block.hex()

    def ask_marks(self, root: RootId, blocks: Sequence[BlockId]) -> bytes:
        """`MGET` of the announcements that begin with these blocks."""
        buckets, count = self._of(root), self._num_buckets
        heads = [f"${len(bucket.marks) + 64}\r\n{bucket.marks}" for bucket in buckets]
        words = [f"{heads[block[0] % count]}{block.hex()}\r\n" for block in blocks]
        return f"*{1 + len(words)}\r\n$4\r\nMGET\r\n{''.join(words)}".encode()

    def _of(self, root: RootId) -> tuple[Bucket, ...]:
        buckets = self._buckets.get(root)
        if buckets is None:
            if len(self._buckets) > _MAX_ROOTS:
                self._buckets.clear()
                self._heads.clear()
            tag = root_tag(root)
            buckets = tuple(Bucket(stripe, tag) for stripe in range(self._num_buckets))
            self._buckets[root] = buckets
        return buckets

    def touches(self, uses: Sequence[Use], now_s: float) -> Iterator[list[Touch]]:
        """`ZADD … XX GT CH` for buckets, giving each chain's keys, head to tail, the scores of a use at `now_s`.

        What counts as used later, or earlier, does, but nothing earlier than what hangs from it.

        In steps, each a list of commands: the server sorts one while the next is put together. What several chains
        share is named once.
        """
        micros = round(now_s * 1e6)  # whole ones, so that no two depths round to one score
        seen: set[PartKey] = set()
        alike = not any(later for _, later in uses)
        for keys, later in uses:
            places = None if alike else _above_children(keys, later)
            orders = [bucket.order for bucket in self._of(keys[0].root)]
            depth, last = -1, None
            for at, stop in _steps(len(keys)):
                some = keys[at:stop]
                depth += some[0].block != last
                skip = bytes(map(seen.__contains__, some)) if seen else None
                own = None if places is None else places[at:stop]
                rows, counts, depth = _touch_rows(_named(some), skip, micros, depth, own, self._num_buckets)
                last = some[-1].block
                if len(rows):
                    yield _touches(orders, rows, counts)
            if alike and len(uses) > 1:
                seen.update(keys)

    def rows(self, keys: Sequence[PartKey], before: str = "") -> NDArray[np.uint8]:
        """[keys, bytes]: what comes `before` each, and its value's name as a word of RESP."""
        numbers = {root: number for number, root in enumerate(set(map(_ROOT, keys)))}
        heads = b"".join(self._heads_of(root, before) for root in numbers)
        roots = None
        if len(numbers) > 1:
            roots = np.fromiter((numbers[key.root] for key in keys), np.uint32, len(keys))
        head_bytes = len(heads) // (len(numbers) * self._num_buckets)
        return _name_rows(_named(keys), roots, self._num_buckets, heads, head_bytes)

    def _heads_of(self, root: RootId, before: str) -> bytes:
        """What comes before the member in the words of a value's name, by bucket."""
        heads = self._heads.get((root, before))
        if heads is None:
            buckets = self._of(root)
            heads = "".join(f"{before}${VALUE_NAME_BYTES}\r\n{bucket.values}" for bucket in buckets).encode()
            self._heads[root, before] = heads
        return heads

    def pipeline(self, verb: str, keys: Sequence[PartKey]) -> bytes:
        """`verb <value name>` for each key, as RESP."""
        return self.rows(keys, f"*2\r\n${len(verb)}\r\n{verb}\r\n").tobytes() if keys else b""

    def commands(self, verb: str, keys: Sequence[PartKey]) -> list[bytes]:
        """As `pipeline`, each command by itself."""
        joined = self.pipeline(verb, keys)
        size = len(joined) // max(1, len(keys))  # names have one length
        return [joined[at : at + size] for at in range(0, len(joined), max(1, size))]

    def scores(self, keys: Sequence[PartKey]) -> list[bytes]:
        """`ZSCORE` for each key: a third of what `command` takes."""
        parts, found = _PARTS, []
        for root, block, part in keys:
            order = self._of(root)[block[0] % self._num_buckets].order
            found.append(b"*3\r\n$6\r\nZSCORE\r\n" + words(order, f"{block.hex()}{parts[part]}"))
        return found


# Rows of names, by C where that was built.


def _named(keys: Sequence[PartKey]) -> Named:
    return Named(b"".join(map(_BLOCK, keys)), bytes(map(_PART, keys)))


def _name_rows(
    named: Named, roots: NDArray[np.uint32] | None, num_buckets: int, heads: bytes, head_bytes: int
) -> NDArray[np.uint8]:
    """As `native.name_rows`."""
    if native.names:
        rows = np.empty((len(named), head_bytes + MEMBER_BYTES), np.uint8)
        native.name_rows(named, roots, num_buckets, heads, rows)
        return rows
    first = [0] * len(named) if roots is None else (roots * num_buckets).tolist()
    cut = [heads[at : at + head_bytes] for at in range(0, len(heads), head_bytes)]
    each = zip(first, _members(named), strict=True)
    words = [cut[at + block[0] % num_buckets] + word for at, (block, word) in each]
    return np.frombuffer(b"".join(words), np.uint8).reshape(len(named), -1)


def _touch_rows(
    named: Named, skip: bytes | None, micros: int, depth: int, later: NDArray[np.int64] | None, num_buckets: int
) -> tuple[NDArray[np.uint8], NDArray[np.uintp], int]:
    """Rows, how many each bucket has, and the depth of the last: as `native.touch_rows`."""
    counts = np.zeros(num_buckets, np.uintp)
    if native.names:
        rows = np.empty((len(named) - sum(skip or b""), _ROW_BYTES), np.uint8)
        return rows, counts, native.touch_rows(named, skip, micros, depth, later, counts, rows)
    places = [0] * len(named) if later is None else later.tolist()
    sorted_rows: list[list[bytes]] = [[] for _ in range(num_buckets)]
    last = None
    for place, skipped, (block, word) in zip(places, skip or bytes(len(named)), _members(named), strict=True):
        depth += last is not None and block != last
        last = block
        if not skipped:
            score = b"$%d\r\n%0*de-6\r\n" % (_NUM_DIGITS + 3, _NUM_DIGITS, micros - depth + place)
            sorted_rows[block[0] % num_buckets].append(b"%b$68\r\n%b" % (score, word))
    counts[:] = list(map(len, sorted_rows))
    made = b"".join(chain.from_iterable(sorted_rows))
    return np.frombuffer(made, np.uint8).reshape(-1, _ROW_BYTES), counts, depth


def _members(named: Named) -> Iterator[tuple[bytes, bytes]]:
    """Block, and member without its length as the end of a word, of each."""
    for at, part in enumerate(named.parts):
        block = named.blocks[DIGEST_BYTES * at : DIGEST_BYTES * (at + 1)]
        yield block, f"{block.hex()}{_PARTS[part]}\r\n".encode()


def _steps(num_keys: int) -> Iterator[tuple[int, int]]:
    """Where each step of a touch begins and ends."""
    at, sizes = 0, iter(TOUCH_STEPS)
    while at < num_keys:
        stop = min(at + next(sizes, TOUCH_STEPS[-1]), num_keys)
        yield at, stop
        at = stop


def _touches(orders: Sequence[str], rows: NDArray[np.uint8], counts: NDArray[np.uintp]) -> list[Touch]:
    """`ZADD` for each sorted set that has rows, which lie in the order of sets."""
    ends = counts.cumsum().tolist()
    return [
        Touch(_touch_head(order, end - start) + rows[start:end].tobytes(), order, rows[start:end])
        for order, start, end in zip(orders, [0, *ends[:-1]], ends, strict=True)
        if end > start
    ]


def _touch_head(order: str, count: int) -> bytes:
    """What `ZADD` of so many members begins with."""
    return (
        f"*{5 + 2 * count}\r\n$4\r\nZADD\r\n${len(order)}\r\n{order}\r\n$2\r\nXX\r\n$2\r\nGT\r\n$2\r\nCH\r\n"
    ).encode()
