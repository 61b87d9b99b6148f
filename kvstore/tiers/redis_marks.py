# SPDX-License-Identifier: Apache-2.0
"""Announcements in Redis: who is computing which blocks, so that another replica waits instead of doing it again.

    kvs2:{<stripe>}:<root>:m:<block>    producer (16 bytes), then the first 8 bytes of each block being computed

One mark a chain, named by the first block that is being computed. It lives for its TTL and is renewed by its producer:
a producer that died is no longer waited for. As blocks land the producer names the mark anew, by where it has got to;
so a reader looks back over the last `_LOOK_BACK` blocks of its chain, and a mark counts as far as its blocks are the
reader's. Nothing is believed on the word of a mark: who waits for nothing loses the time it was ready to wait.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from kvstore.block import BlockId, PartKey, RootId
from kvstore.tiers.redis_names import Names
from kvstore.tiers.redis_nodes import Talk, many, sound
from kvstore.tiers.redis_wire import Reply, command

_TAG_BYTES = 8
_MAX_BLOCKS = 4096
_LOOK_BACK = 128
_PRODUCER_BYTES = 16

# KEYS: mark. ARGV: producer, blocks, TTL in ms. The first producer keeps it.
_SET = """
local value = redis.pcall('GET', KEYS[1])  -- what is no string is no mark, and is written over
if type(value) == 'string' and string.sub(value, 1, #ARGV[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1] .. ARGV[2], 'PX', ARGV[3])
return 1
"""

# KEYS: mark. ARGV: producer.
_DROP = """
local value = redis.pcall('GET', KEYS[1])
if type(value) == 'string' and string.sub(value, 1, #ARGV[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class RedisMarks:
    """One producer's marks, and a look at others'. Thread-safe."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._producer = secrets.token_bytes(_PRODUCER_BYTES)

    def set(self, talk: Talk, root: RootId, blocks: Sequence[BlockId], ttl_s: float, deadline: float) -> bool:
        """Mark a run of one chain, or renew its mark; False where another producer's stands there."""
        tags = b"".join(block[:_TAG_BYTES] for block in blocks[:_MAX_BLOCKS])
        words = (self._name(root, blocks[0]), self._producer, tags, int(ttl_s * 1000))
        return many(talk, [command("EVAL", _SET, 1, *words)], deadline) == [1]

    def drop(self, talk: Talk, root: RootId, blocks: Sequence[BlockId], deadline: float) -> None:
        """Take back our marks that these blocks name."""
        many(talk, [command("EVAL", _DROP, 1, self._name(root, block), self._producer) for block in blocks], deadline)

    def stop(self, talk: Talk, root: RootId, blocks: Sequence[BlockId], at: int, deadline: float) -> int:
        """Index in `blocks`, `at` or more, up to which other producers say that they compute the chain from `at` on."""
        commands, places = self.questions(root, blocks, at, by_stripe=talk.by_stripe)
        return self.stop_of(sound(talk.ask(commands, deadline), partial=True), places, blocks, at)

    def questions(
        self, root: RootId, blocks: Sequence[BlockId], at: int, *, by_stripe: bool
    ) -> tuple[list[bytes], list[Sequence[int]]]:
        """The commands that ask for the marks that may tell of the chain from `at` on, and their blocks' places in it.

        One command of them all, or one a stripe: a GET for each took five times as long to put together and to read.
        """
        near = range(max(0, at - _LOOK_BACK), min(at + 1, len(blocks)))
        places: list[Sequence[int]] = [near] if near else []
        if by_stripe:
            stripes: dict[int, list[int]] = {}
            for place in near:
                stripes.setdefault(self._names.stripe(PartKey(root, blocks[place], 0)), []).append(place)
            places = list(stripes.values())
        return [self._names.ask_marks(root, [blocks[place] for place in some]) for some in places], places

    def stop_of(
        self, replies: Sequence[Reply], places: Sequence[Sequence[int]], blocks: Sequence[BlockId], at: int
    ) -> int:
        """What `stop` is, by the answers to `questions`. What is no string is no mark: MGET gives nothing for it."""
        best = at
        for reply, some in zip(replies, places, strict=True):
            if isinstance(reply, list) and any(reply):
                best = max(best, self._stop_of(reply, some, blocks, at))
        return best

    def _stop_of(self, values: Sequence[Reply], places: Sequence[int], blocks: Sequence[BlockId], at: int) -> int:
        best = at
        for start, value in zip(places, values, strict=True):
            if isinstance(value, bytes) and value[:_PRODUCER_BYTES] != self._producer:
                tags = value[_PRODUCER_BYTES:]
                ours = b"".join(block[:_TAG_BYTES] for block in blocks[start : start + len(tags) // _TAG_BYTES])
                best = max(best, start + _num_alike(ours, tags))
        return best

    def _name(self, root: RootId, block: BlockId) -> str:
        return self._names.mark(PartKey(root, block, 0))


def _num_alike(ours: bytes, theirs: bytes) -> int:
    """How many leading tags are the same."""
    num_tags = min(len(ours), len(theirs)) // _TAG_BYTES
    if ours[: num_tags * _TAG_BYTES] == theirs[: num_tags * _TAG_BYTES]:
        return num_tags
    slices = (slice(at, at + _TAG_BYTES) for at in range(0, num_tags * _TAG_BYTES, _TAG_BYTES))
    return next(number for number, tag in enumerate(slices) if ours[tag] != theirs[tag])
