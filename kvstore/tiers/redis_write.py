# SPDX-License-Identifier: Apache-2.0
"""Values into Redis: sent straight from the caller's memory, each with its account, parents before children.

The next value is hashed while the server has not yet taken the one before, piece by piece between sends that would
wait: hashed before its send it cost a fifth of the rate, and a thread of its own fought for the second core (on a
quicker machine, by a Unix socket: 0.67 of a bare one's rate where this has 0.87, and 0.90 without any hash). Sending,
hashing and filling in checksums by a thread in C, while the next group is made here, was slower too: 0.73 of a bare
socket's rate where this has 0.80 (Unix socket), 0.72 for 0.82 (TCP), since a woken server takes that thread's core.
A frame whose payload's checksum follows it, so that each piece is hashed in the cache as it goes, by one thread in C:
0.65 for 0.93 (TCP), 0.88 for 0.97 (Unix socket). Hashing costs less then, and the sender more often finds the socket
full with nothing else to do.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.block import BlockId, BlockMeta, PartKey, RootId
from kvstore.layout import BlockLayout
from kvstore.tiers.redis_accounting import Accounting
from kvstore.tiers.redis_codec import CodecChoice
from kvstore.tiers.redis_errors import MOVING
from kvstore.tiers.redis_facts import Facts
from kvstore.tiers.redis_names import STEP_S, root_tag
from kvstore.tiers.redis_nodes import Talk, many
from kvstore.tiers.redis_sealed import Locked, Scratch
from kvstore.tiers.redis_stream import Buffer
from kvstore.tiers.redis_wire import ProtocolBroken, ReplyError, Wire, command, real
from kvstore.wire import frame
from kvstore.wire.frame import TAG_BYTES, Checksum, Header

if TYPE_CHECKING:
    from kvstore.wire.seal import Sealer, Sealing  # a library that only encryption needs

_GROUP_BYTES = 1 << 20
_MAX_GROUP = 32
_MAX_GROUPS_IN_FLIGHT = 256

Item = tuple[PartKey, BlockMeta, memoryview, float]
"""A part to write, with its score."""
SendItems = Callable[[Wire, Sequence[Item]], set[PartKey]]
"""Sends items over a lent wire; returns the keys that arrived."""


@dataclass(frozen=True, slots=True)
class _Value:
    """A part as it goes out. Holds encoded bytes, so there are only those of the group being sent and of the next."""

    key: PartKey
    meta: BlockMeta
    score: float
    raw_bytes: int
    payload: memoryview
    codec_id: int
    item_bytes: int
    work: Checksum | Sealing
    """What is left to do with the payload before it can go."""


@dataclass(slots=True)
class _Spent:
    """Of one conversation: time on encoding, and bytes that it left to send; which namespaces are encoded in it."""

    encode_s: float = 0.0
    num_bytes: int = 0
    encodes: dict[RootId, bool] = field(default_factory=dict)


class Writer:
    """Sends values with their accounts, parents before children, and only where the parent is there."""

    def __init__(
        self,
        accounting: Accounting,
        codec: CodecChoice,
        ttl_s: int,
        locked: Locked,
        sealer: Sealer | None,
        *,
        by_stripe: bool,
    ) -> None:
        self._by_stripe = by_stripe
        self._accounting = accounting
        self._names = accounting.names
        self._codec = codec
        self._ttl_s = ttl_s
        self._locked = locked
        self._sealer = sealer
        self._extra_bytes = 0 if sealer is None else frame.SEAL_BYTES + TAG_BYTES
        self._item_bytes: dict[tuple[int, int], int] = {}
        self.met: Callable[[PartKey], None] = lambda key: None
        """Told the last key of a write that was there already."""
        self.grew: Callable[[Sequence[PartKey], Mapping[BlockId, BlockMeta]], None] = lambda landed, meta: None
        """Told what a write brought there, parents first."""

    def learn(self, layout: BlockLayout) -> None:
        """Which element size a part of so many bytes has; a codec works by elements."""
        for part in layout.parts:
            self._item_bytes[part.part, part.num_bytes] = layout.item_bytes

    def write(
        self,
        talk: Talk,
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline: float,
        counts: dict[str, float],
        send: Callable[[Sequence[Item], SendItems], set[PartKey]],
        later: Mapping[BlockId, float],
    ) -> set[PartKey]:
        """As `Tier.write`; `send` says which items go over which wire, and numbers go to `counts`."""
        present, scores = self._plan(talk, parts, meta, deadline, later)
        if self._make_room(talk, [key for key in scores if key not in present], parts, meta, deadline, counts):
            # What was evicted may have been a parent, or a part that was there.
            present, scores = self._plan(talk, parts, meta, deadline, later)
        counts["orphans_refused"] = len(parts) - len(scores)
        fresh = self._fitting(talk, [key for key in scores if key not in present], parts, meta, deadline)
        items = [(key, meta[key.block], parts[key].cast("B"), scores[key]) for key in fresh]
        facts = self._accounting.server.facts(talk, deadline)
        landed = send(items, lambda wire, some: self._send(wire, some, facts, deadline, counts)) if items else set()
        failed = _with_descendants([key for key in fresh if key not in landed], fresh, meta)
        if failed:
            self._accounting.remove(talk, failed, deadline)
            landed -= set(failed)
            counts["write_failures"] = len(failed)
        self._locked.discard(landed)
        counts["written_blocks"] = len(landed)
        counts["written_bytes"] = sum(parts[key].nbytes for key in landed)
        if landed:
            self.grew([key for key in fresh if key in landed], meta)
        if present:
            self.met(next(key for key in reversed(list(parts)) if key in present))
        return present | landed

    def _plan(
        self,
        talk: Talk,
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline: float,
        later: Mapping[BlockId, float],
    ) -> tuple[set[PartKey], dict[PartKey, float]]:
        """What is there already, and scores of what may be written, in order.

        A score is that of a use now, or as much later as is said of it or of what hangs from it, but below the
        parent's: a chain that is cold in Redis gets a cold tail, and no tail outlives its head.
        """
        later = _above_children(parts, meta, later)
        now_s = self._accounting.now_s(talk, deadline)
        parents = {key: key._replace(block=meta[key.block].parent) for key in parts if meta[key.block].depth}
        asked = list(dict.fromkeys([*parts, *parents.values()]))
        known = self._known_scores(talk, asked, deadline)
        scores: dict[PartKey, float] = {}
        for key in parts:
            score = now_s + later.get(key.block, 0.0) - meta[key.block].depth * STEP_S
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

    def _known_scores(self, talk: Talk, keys: Sequence[PartKey], deadline: float) -> dict[PartKey, float]:
        """Scores of those of `keys` whose values are there.

        One without a member is left out, and so written anew, and so is one that was found to be locked.
        """
        values, scores = self._names.commands("EXISTS", keys), self._names.scores(keys)
        began_s = time.perf_counter()
        replies = many(talk, values + scores, deadline, partial=True) if keys else []
        self._codec.link.answered(time.perf_counter() - began_s)
        return {
            key: real(score)
            for key, exists, score in zip(keys, replies[: len(keys)], replies[len(keys) :], strict=True)
            if exists == 1 and isinstance(score, bytes) and key not in self._locked
        }

    def _make_room(
        self,
        talk: Talk,
        keys: Sequence[PartKey],
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline: float,
        counts: dict[str, float],
    ) -> bool:
        facts = self._accounting.server.facts(talk, deadline)
        num_bytes: dict[str, int] = {}
        for key in keys:
            tag = root_tag(key.root)
            num_bytes[tag] = num_bytes.get(tag, 0) + self._most_bytes(parts[key], meta[key.block], facts)
        if not num_bytes:
            return False
        num_parts, freed = self._accounting.make_room(talk, num_bytes, deadline)
        counts["evicted_blocks"] = num_parts
        counts["evicted_bytes"] = freed
        return num_parts > 0

    def _fitting(
        self,
        talk: Talk,
        keys: Sequence[PartKey],
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline: float,
    ) -> Sequence[PartKey]:
        """The head of `keys` that fits into the capacity at all."""
        facts = self._accounting.server.facts(talk, deadline)
        limits = [limit for limit in (facts.capacity_bytes, *self._accounting.limits) if limit]
        if not limits:
            return keys
        room = min(limits)
        for index, key in enumerate(keys):
            room -= self._most_bytes(parts[key], meta[key.block], facts)
            if room < 0:
                return keys[:index]
        return keys

    def _most_bytes(self, part: memoryview, meta: BlockMeta, facts: Facts) -> int:
        """What a part is accounted with if no codec makes it smaller."""
        stored_bytes = frame.header_bytes(len(meta.tokens) // 4, len(meta.extra)) + part.nbytes + self._extra_bytes
        return facts.accounted_bytes(stored_bytes)

    def _value(
        self, key: PartKey, meta: BlockMeta, part: memoryview, score: float, scratch: Scratch, *, encoded: bool
    ) -> _Value:
        item_bytes = self._item_bytes.get((key.part, len(part)), 1)
        codec_id, payload = self._codec.encode(key.root, part, item_bytes, encoded=encoded)
        if self._sealer is None:
            return _Value(key, meta, score, len(part), payload, codec_id, item_bytes, Checksum(payload))
        into = scratch.take(len(payload) + TAG_BYTES)
        header = Header(key, meta, codec_id, item_bytes, len(part), len(payload), 0)
        sealing = self._sealer.seal(header, payload, into)
        return _Value(key, meta, score, len(part), into, codec_id, item_bytes, sealing)

    def _values(self, items: Sequence[Item], spent: _Spent) -> Iterator[list[_Value]]:
        """Values of each group, which is to be sent before the one after the next is asked for."""
        scratch = Scratch()
        for group in self._groups(items):
            scratch.turn()
            began_s = time.perf_counter()
            values = [self._value(*item, scratch, encoded=spent.encodes[item[0].root]) for item in group]
            spent.encode_s += time.perf_counter() - began_s
            spent.num_bytes += sum(len(value.payload) for value in values)
            yield values

    def _send(
        self, wire: Wire, items: Sequence[Item], facts: Facts, deadline: float, counts: dict[str, float]
    ) -> set[PartKey]:
        """Send parts in groups, each one transaction with its accounts. Returns the keys that arrived."""
        landed: set[PartKey] = set()
        unanswered: deque[list[PartKey]] = deque()
        num_bytes: Counter[RootId] = Counter()
        for key, _, part, _ in items:
            num_bytes[key.root] += len(part)
        spent = _Spent(encodes=self._codec.encodes(num_bytes))
        began_s = time.perf_counter()
        groups = self._values(items, spent)
        following = next(groups, None)
        while following is not None:
            group, following = following, next(groups, None)
            wire.send(self._transaction(group, facts), deadline, _hashing(following or ()))
            unanswered.append([value.key for value in group])
            if len(unanswered) == _MAX_GROUPS_IN_FLIGHT:
                landed |= self._answers(wire, unanswered.popleft(), deadline, counts)
        for keys in unanswered:
            landed |= self._answers(wire, keys, deadline, counts)
        took_s = time.perf_counter() - began_s
        self._codec.link.sent(spent.num_bytes, took_s - spent.encode_s)
        self._codec.wrote(spent.encodes, num_bytes, took_s)
        return landed

    def _groups(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Consecutive items for one transaction each: one large one, or small ones up to about a megabyte.

        In a Cluster those of one stripe: a transaction lies on one node, and stays whole when a slot moves.
        """
        start = num_bytes = 0
        for index, (key, _, part, _) in enumerate(items):
            full = num_bytes >= _GROUP_BYTES or index - start == _MAX_GROUP
            apart = self._by_stripe and self._names.stripe(key) != self._names.stripe(items[start][0])
            if index > start and (full or apart):
                yield items[start:index]
                start, num_bytes = index, 0
            num_bytes += part.nbytes
        if items:
            yield items[start:]

    def _transaction(self, group: Sequence[_Value], facts: Facts) -> list[Buffer]:
        """Values and their accounts, all or nothing."""
        buffers: list[Buffer] = [command("MULTI")]
        accounts: list[tuple[PartKey, float, int]] = []
        for value in group:
            header = _header(value)
            buffers += self._set(value, header)
            num_bytes = facts.accounted_bytes(len(header) + len(value.payload))
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

    def _answers(self, wire: Wire, keys: Sequence[PartKey], deadline: float, counts: dict[str, float]) -> set[PartKey]:
        """Replies to one transaction: all of its keys, or none."""
        for _ in range(len(keys) + 2):  # MULTI, the queued SETs, the queued EVAL
            reply = wire.reply(deadline)
            if isinstance(reply, ReplyError):
                self._refused(reply, counts)
        reply = wire.reply(deadline)
        if isinstance(reply, ReplyError):
            self._refused(reply, counts)
            return set()
        if not isinstance(reply, list):
            raise ProtocolBroken("EXEC did not answer with a list")
        return set(keys)

    def _refused(self, error: ReplyError, counts: dict[str, float]) -> None:
        """Want of memory is answered with room at the next write; other refusals fail the call."""
        if error.code == "OOM":
            self._accounting.crowded = True
            counts["out_of_memory"] = counts.get("out_of_memory", 0) + 1
        elif error.code != "EXECABORT" and error.code not in MOVING:  # what moves is written at the next try
            raise error


def _header(value: _Value) -> bytes:
    if not isinstance(value.work, Checksum):
        return value.work.header()
    return frame.pack(
        Header(
            value.key,
            value.meta,
            value.codec_id,
            value.item_bytes,
            value.raw_bytes,
            len(value.payload),
            value.work.value(),
        )
    )


def _hashing(values: Sequence[_Value]) -> Callable[[], bool]:
    """Hashes `values`, or seals them, a piece a call; False once all is done."""
    return lambda: any(value.work.step() for value in values)


def _above_children(
    parts: Iterable[PartKey], meta: Mapping[BlockId, BlockMeta], later: Mapping[BlockId, float]
) -> Mapping[BlockId, float]:
    """`later` of the blocks of `parts`, parents first, or what is said of any behind them if that is more."""
    if not later:
        return later
    places = {key.block: later.get(key.block, 0.0) for key in parts}
    for block in reversed(places):
        parent = meta[block].parent if meta[block].depth else None
        if parent is not None and parent in places:
            places[parent] = max(places[parent], places[block])
    return places


def _with_descendants(
    failed: Sequence[PartKey], written: Sequence[PartKey], meta: Mapping[BlockId, BlockMeta]
) -> list[PartKey]:
    """`failed`, and those of `written` (parents first) that hang on them."""
    gone = set(failed)
    for key in written if gone else ():
        if meta[key.block].depth and key._replace(block=meta[key.block].parent) in gone:
            gone.add(key)
    return [key for key in written if key in gone]
