# SPDX-License-Identifier: Apache-2.0
"""Values into Redis: sent straight from the caller's memory, each with its account, parents before children.

A large value is hashed right before it is sent, in one go: that leaves it in the cache for the send. Hashing the next
one between sends, or in another thread, was slower on two cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore.block import BlockId, BlockMeta, PartKey
from kvstore.codecs import CODECS, Codec
from kvstore.layout import BlockLayout
from kvstore.tiers.redis_accounting import Accounting, Facts
from kvstore.tiers.redis_names import STEP_S
from kvstore.tiers.redis_wire import Buffer, ProtocolBroken, ReplyError, Wire, command
from kvstore.wire import frame
from kvstore.wire.frame import Header

_GROUP_BYTES = 1 << 20
_MAX_GROUP = 32
_MAX_GROUPS_IN_FLIGHT = 256
_RAW_ID = CODECS.load("raw").wire_id


@dataclass(slots=True)
class _Value:
    """A part on its way out."""

    key: PartKey
    meta: BlockMeta
    score: float
    raw_bytes: int
    payload: memoryview
    codec_id: int
    item_bytes: int


class Writer:
    """Sends values with their accounts, parents before children, and only where the parent is there."""

    def __init__(self, accounting: Accounting, codec: Codec, ttl_s: int) -> None:
        self._accounting = accounting
        self._names = accounting.names
        self._codec = codec
        self._ttl_s = ttl_s
        self._item_bytes: dict[tuple[int, int], int] = {}

    def learn(self, layout: BlockLayout) -> None:
        """Which element size a part of so many bytes has; a codec works by elements."""
        for part in layout.parts:
            self._item_bytes[part.part, part.num_bytes] = layout.item_bytes

    def write(
        self,
        wire: Wire,
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline: float,
        counts: dict[str, float],
    ) -> set[PartKey]:
        """As `Tier.write`, over a lent wire; numbers go to `counts`."""
        present, scores = self._plan(wire, parts, meta, deadline)
        if self._make_room(wire, [key for key in scores if key not in present], parts, deadline, counts):
            # What was evicted may have been a parent, or a part that was there.
            present, scores = self._plan(wire, parts, meta, deadline)
        counts["orphans_refused"] = len(parts) - len(scores)
        values = [
            self._value(key, meta[key.block], parts[key].cast("B"), score)
            for key, score in scores.items()
            if key not in present
        ]
        values = self._fitting(wire, values, deadline)
        landed = self._send(wire, values, deadline, counts)
        orphans = [value.key for value in values if value.key in landed]
        orphans = _without_parent(orphans, values, present | landed, meta)
        failed = [value.key for value in values if value.key not in landed]
        if failed or orphans:
            self._accounting.remove(wire, [*failed, *orphans], deadline)
            landed -= set(orphans)
            counts["write_failures"] = len(failed) + len(orphans)
        counts["written_blocks"] = len(landed)
        counts["written_bytes"] = sum(value.raw_bytes for value in values if value.key in landed)
        return present | landed

    def _plan(
        self,
        wire: Wire,
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline: float,
    ) -> tuple[set[PartKey], dict[PartKey, float]]:
        """What is there already, and scores of what may be written, in order.

        A score is that of a use now, but below the parent's: a chain that is cold in Redis gets a cold tail, and
        no tail outlives its head.
        """
        now_s = self._accounting.now_s(wire, deadline)
        parents = {key: key._replace(block=meta[key.block].parent) for key in parts if meta[key.block].depth}
        asked = list(dict.fromkeys([*parts, *parents.values()]))
        known = self._known_scores(wire, asked, deadline)
        scores: dict[PartKey, float] = {}
        for key in parts:
            score = now_s - meta[key.block].depth * STEP_S
            if key in known:
                scores[key] = known[key]
                continue
            parent = parents.get(key)
            if parent is not None:
                parent_score = scores.get(parent, known.get(parent))
                if parent_score is None:
                    continue
                score = min(score, parent_score - STEP_S)
            scores[key] = score
        return {key for key in parts if key in known}, scores

    def _known_scores(self, wire: Wire, keys: Sequence[PartKey], deadline: float) -> dict[PartKey, float]:
        """Scores of those keys whose value is there."""
        lookups = []
        for key in keys:
            bucket = self._names.bucket(key)
            lookups.append(command("ZSCORE", bucket.order, self._names.member(key.block, key.part)))
        wire.send([self._names.pipeline("EXISTS", keys), b"".join(lookups)], deadline)
        exists = wire.flags(len(keys), deadline)
        replies = [wire.reply(deadline) for _ in keys]
        known: dict[PartKey, float] = {}
        for key, there, reply in zip(keys, exists, replies, strict=True):
            if isinstance(reply, ReplyError):
                raise reply
            if there and isinstance(reply, bytes):
                known[key] = float(reply)
        return known

    def _make_room(
        self,
        wire: Wire,
        keys: Sequence[PartKey],
        parts: Mapping[PartKey, memoryview],
        deadline: float,
        counts: dict[str, float],
    ) -> bool:
        facts = self._accounting.facts(wire, deadline)
        num_bytes = sum(self._accounting.accounted_bytes(len(parts[key]) + 1024, facts) for key in keys)
        if not num_bytes:
            return False
        num_parts, freed = self._accounting.make_room(wire, num_bytes, deadline)
        counts["evicted_blocks"] = num_parts
        counts["evicted_bytes"] = freed
        return num_parts > 0

    def _fitting(self, wire: Wire, values: list[_Value], deadline: float) -> list[_Value]:
        """The head of `values` that fits into the capacity at all."""
        facts = self._accounting.facts(wire, deadline)
        if not facts.capacity_bytes:
            return values
        room = facts.capacity_bytes
        for index, value in enumerate(values):
            room -= self._accounting.accounted_bytes(value.raw_bytes + 1024, facts)
            if room < 0:
                return values[:index]
        return values

    def _value(self, key: PartKey, meta: BlockMeta, part: memoryview, score: float) -> _Value:
        item_bytes = self._item_bytes.get((key.part, len(part)), 1)
        encoded = self._codec.encode(part, item_bytes)
        if encoded is None or len(encoded) >= len(part):
            return _Value(key, meta, score, len(part), part, _RAW_ID, item_bytes)
        return _Value(key, meta, score, len(part), encoded, self._codec.wire_id, item_bytes)

    def _send(self, wire: Wire, values: Sequence[_Value], deadline: float, counts: dict[str, float]) -> set[PartKey]:
        """Send values in groups, each one transaction with its accounts. Returns the keys that arrived."""
        facts = self._accounting.facts(wire, deadline)
        landed: set[PartKey] = set()
        unanswered: list[Sequence[_Value]] = []
        index = 0
        while index < len(values):
            group = _group(values, index)
            index += len(group)
            wire.send(self._transaction(group, facts), deadline)
            unanswered.append(group)
            if len(unanswered) == _MAX_GROUPS_IN_FLIGHT:
                landed |= self._answers(wire, unanswered.pop(0), deadline, counts)
        for group in unanswered:
            landed |= self._answers(wire, group, deadline, counts)
        return landed

    def _transaction(self, group: Sequence[_Value], facts: Facts) -> list[Buffer]:
        """Values and their accounts, all or nothing."""
        buffers: list[Buffer] = [command("MULTI")]
        accounts: list[tuple[PartKey, float, int]] = []
        for value in group:
            header = _header(value)
            buffers += self._set(value, header)
            num_bytes = self._accounting.accounted_bytes(len(header) + len(value.payload), facts)
            accounts.append((value.key, value.score, num_bytes))
            self._accounting.written(num_bytes)
        buffers.append(self._accounting.account(accounts) + command("EXEC"))
        return buffers

    def _set(self, value: _Value, header: bytes) -> tuple[Buffer, Buffer, Buffer]:
        name = self._names.value(value.key)
        words, tail = (b"*5", b"\r\n$2\r\nEX\r\n$%d\r\n%d\r\n" % (len(str(self._ttl_s)), self._ttl_s))
        if not self._ttl_s:
            words, tail = b"*3", b"\r\n"
        head = b"%b\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (
            words,
            len(name),
            name.encode(),
            len(header) + len(value.payload),
        )
        return head + header, value.payload, tail

    def _answers(self, wire: Wire, group: Sequence[_Value], deadline: float, counts: dict[str, float]) -> set[PartKey]:
        """Replies to one transaction: all of its keys, or none."""
        for _ in range(len(group) + 2):  # MULTI, the queued SETs, the queued EVAL
            reply = wire.reply(deadline)
            if isinstance(reply, ReplyError):
                self._refused(reply, counts)
        reply = wire.reply(deadline)
        if isinstance(reply, ReplyError):
            self._refused(reply, counts)
            return set()
        if not isinstance(reply, list):
            raise ProtocolBroken("EXEC did not answer with a list")
        return {value.key for value in group}

    def _refused(self, error: ReplyError, counts: dict[str, float]) -> None:
        """Want of memory is answered with room at the next write; other refusals fail the call."""
        if error.code == "OOM":
            self._accounting.crowded = True
            counts["out_of_memory"] = counts.get("out_of_memory", 0) + 1
        elif error.code != "EXECABORT":
            raise error


def _header(value: _Value) -> bytes:
    return frame.pack(
        Header(
            value.key,
            value.meta,
            value.codec_id,
            value.item_bytes,
            value.raw_bytes,
            len(value.payload),
            frame.checksum(value.payload),
        )
    )


def _group(values: Sequence[_Value], start: int) -> Sequence[_Value]:
    """Consecutive values for one transaction: one large one, or small ones up to about a megabyte."""
    num_bytes = 0
    stop = start
    while stop < len(values) and stop - start < _MAX_GROUP and (stop == start or num_bytes < _GROUP_BYTES):
        num_bytes += len(values[stop].payload)
        stop += 1
    return values[start:stop]


def _without_parent(
    keys: Sequence[PartKey],
    values: Sequence[_Value],
    there: set[PartKey],
    meta: Mapping[BlockId, BlockMeta],
) -> list[PartKey]:
    """Those of `keys` whose parent was part of the write and failed, and what hangs on them."""
    gone = {value.key for value in values} - there
    orphans: list[PartKey] = []
    for key in keys:
        parent = key._replace(block=meta[key.block].parent)
        if meta[key.block].depth and parent in gone:
            gone.add(key)
            orphans.append(key)
    return orphans
