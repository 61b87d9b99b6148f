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

from binascii import hexlify
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.block import BlockId, PartKey, RootId
from kvstore.layout import MAX_PARTS

EPOCH_S = 1_735_689_600.0
STEP_S = 1e-6
MAX_BUCKETS = 256
TOUCH_STEPS = (256, 512, 1280)
"""Keys of the first steps of a touch, and of all after them. The server puts one in order, at 0.4 us a key, while the
next is put together, at 0.2: so it begins early, and never waits."""
_MAX_ROOTS = 4096
"""Roots whose bucket names are kept at hand."""
_PARTS = tuple(f":{part:03d}" for part in range(MAX_PARTS))
_ROOT, _BLOCK, _PART = map(itemgetter, range(3))
_MEMBER_BYTES = 64 + len(":000\r\n")
_PART_ROWS = np.frombuffer("".join(f"{part}\r\n" for part in _PARTS).encode(), np.uint8).reshape(MAX_PARTS, -1)
_THREE_DIGITS = np.frombuffer(b"".join(b"%03d" % number for number in range(1000)), np.uint8).reshape(1000, 3)
_NUM_DIGITS = 18
_SCORE_ROW = np.frombuffer(b"$21\r\n" + bytes(_NUM_DIGITS) + b"e-6\r\n$68\r\n", np.uint8)
_DIGITS_AT = 5
_MEMBER_AT = len(_SCORE_ROW) - len("$68\r\n")
"""Where the word of a member begins in a row."""


class Bucket(NamedTuple):
    """What one namespace has in one stripe."""

    stripe: int
    root: str

    @property
    def prefix(self) -> str:
        return prefix(self.stripe) + self.root

    @property
    def registry(self) -> str:
        return registry(self.stripe)

    @property
    def used(self) -> str:
        return used(self.stripe)

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
    def forks(self) -> str:
        return f"{self.prefix}:f"

    @property
    def only(self) -> str:
        return f"{self.prefix}:k"

    @property
    def marks(self) -> str:
        """What the name of every announcement begins with; a block follows."""
        return f"{self.prefix}:m:"

    @property
    def values(self) -> str:
        """What the name of every value begins with; a member follows."""
        return f"{self.prefix}:v:"


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
        return BlockId(bytes.fromhex(self.rows[at, len(_SCORE_ROW) :][:64].tobytes().decode()))


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
VALUE_NAME_BYTES = len(Bucket(0, 16 * "0").values) + 64 + len(":000")


def bucket_of(name: str) -> tuple[Bucket, str] | None:
    """Bucket and member that a value's name speaks of."""
    head, found, member = name.partition(":v:")
    stripe, _, root = head.removeprefix("kvs2:{").partition("}:")
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
        for chain, later in uses:
            places = None if alike else _above_children(chain, later)
            orders = [bucket.order for bucket in self._of(chain[0].root)]
            depth, last = -1, None
            for at, stop in _steps(len(chain)):
                some = chain[at:stop]
                blocks = list(map(_BLOCK, some))
                ids = _ids(blocks)
                depths = np.full(len(some), depth)
                quads = ids.view(np.uint64)  # a quarter as much to compare
                depths[1:] += (quads[1:] != quads[:-1]).any(axis=1).cumsum()
                depths += blocks[0] != last
                depth, last = int(depths[-1]), blocks[-1]
                rows = np.empty((len(some), len(_SCORE_ROW) + _MEMBER_BYTES), np.uint8)
                _put_scores(rows, micros - depths if places is None else micros - depths + places[at:stop])
                _put_members(rows[:, len(_SCORE_ROW) :], some, blocks)
                stripes = ids[:, 0] % self._num_buckets
                if seen:
                    fresh = [key not in seen for key in some]
                    rows, stripes = rows[fresh], stripes[fresh]
                if commands := _touches(orders, rows, stripes):
                    yield commands
            if alike and len(uses) > 1:
                seen.update(chain)

    def rows(self, keys: Sequence[PartKey]) -> NDArray[np.uint8]:
        """[keys, bytes]: each key's value name as a word of RESP."""
        numbers = {root: number for number, root in enumerate(set(map(_ROOT, keys)))}
        heads = [f"${VALUE_NAME_BYTES}\r\n{bucket.values}" for root in numbers for bucket in self._of(root)]
        table = np.frombuffer("".join(heads).encode(), np.uint8).reshape(len(heads), -1)
        blocks = list(map(_BLOCK, keys))
        which = (_ids(blocks)[:, 0] % self._num_buckets).astype(np.intp)
        if len(numbers) > 1:
            which += self._num_buckets * np.fromiter((numbers[key.root] for key in keys), np.intp, len(keys))
        rows = np.empty((len(keys), table.shape[1] + _MEMBER_BYTES), np.uint8)
        rows[:, : table.shape[1]] = table.take(which, axis=0)
        _put_members(rows[:, table.shape[1] :], keys, blocks)
        return rows

    def pipeline(self, verb: str, keys: Iterable[PartKey]) -> bytes:
        """`verb <value name>` for each key, as RESP: a quarter of a microsecond a key, few or many."""
        num_buckets, parts = self._num_buckets, _PARTS
        commands: list[str] = []
        heads: tuple[str, ...] = ()
        current: RootId | None = None
        for root, block, part in keys:
            if root != current:
                current = root
                start = f"*2\r\n${len(verb)}\r\n{verb}\r\n${VALUE_NAME_BYTES}\r\n"
                heads = tuple(start + bucket.values for bucket in self._of(root))
            commands.append(f"{heads[block[0] % num_buckets]}{block.hex()}{parts[part]}\r\n")
        return "".join(commands).encode()

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
            member = f"{block.hex()}{parts[part]}"
            found.append(f"*3\r\n$6\r\nZSCORE\r\n${len(order)}\r\n{order}\r\n${len(member)}\r\n{member}\r\n".encode())
        return found


# Names of thousands of keys at once, as rows of one length: string formatting took three times as long.


def _ids(blocks: Sequence[BlockId]) -> NDArray[np.uint8]:
    """[blocks, 32]"""
    return np.frombuffer(b"".join(blocks), np.uint8).reshape(len(blocks), -1)


def _put_members(rows: NDArray[np.uint8], keys: Sequence[PartKey], blocks: Sequence[BlockId]) -> None:
    """Fill [keys, 70] with the members that keys are, and the end of a word."""
    hexed = hexlify(b"".join(blocks))
    rows[:, :-6] = np.frombuffer(hexed, np.uint8).reshape(len(blocks), -1)
    rows[:, -6:] = _PART_ROWS.take(np.frombuffer(bytes(map(_PART, keys)), np.uint8), axis=0)


def _put_scores(rows: NDArray[np.uint8], micros: NDArray[np.int64]) -> None:
    """Fill the first bytes of [keys, bytes] with scores as words, and the length of the word that follows."""
    rows[:, : len(_SCORE_ROW)] = _SCORE_ROW
    for at in range(_DIGITS_AT + _NUM_DIGITS, _DIGITS_AT, -3):
        above = micros // 1000
        rows[:, at - 3 : at] = _THREE_DIGITS.take(micros - 1000 * above, axis=0)
        micros = above
        if micros.min() == micros.max():  # one chain, one time: they differ in few digits
            rows[:, _DIGITS_AT : at - 3] = np.frombuffer(b"%0*d" % (at - 3 - _DIGITS_AT, micros[0]), np.uint8)
            return


def _steps(num_keys: int) -> Iterator[tuple[int, int]]:
    """Where each step of a touch begins and ends."""
    at, sizes = 0, iter(TOUCH_STEPS)
    while at < num_keys:
        stop = min(at + next(sizes, TOUCH_STEPS[-1]), num_keys)
        yield at, stop
        at = stop


def _touches(orders: Sequence[str], rows: NDArray[np.uint8], stripes: NDArray[np.uint8]) -> list[Touch]:
    """`ZADD` for each sorted set that has rows."""
    rows = rows.take(np.argsort(stripes, kind="stable"), axis=0)
    ends = np.bincount(stripes, minlength=len(orders)).cumsum().tolist()
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
