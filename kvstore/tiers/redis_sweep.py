# SPDX-License-Identifier: Apache-2.0
"""Looking at all that lies in Redis: repair (`sweep`), the same look without a hand (`check`), and `clear`.

Writers keep accounts right at every moment; what is left to repair is what no single bucket can hold: blocks whose
parent another store evicted in between, values whose TTL ran out, and what foreign hands changed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvstore.block import PartKey, RootId
from kvstore.tiers.redis_accounting import Accounting
from kvstore.tiers.redis_names import STEP_S, Bucket, bucket_of, prefix, registry, root_tag, used
from kvstore.tiers.redis_nodes import Talk, many
from kvstore.tiers.redis_wire import Reply, command, integer, real
from kvstore.wire import frame
from kvstore.wire.frame import FrameError, Header

_PAGE = 512
_HEAD_BYTES = frame.MIN_HEADER_BYTES + frame.SEAL_BYTES + 4 * frame.MAX_TOKENS + 1024
"""What is fetched of each value: all of its header, unless many images end in the block."""
_MAX_PASSES = 16

# KEYS: order, sizes, total, registry. ARGV: root. Makes both lists name the same members, the total their sum, and the
# registry's score that of the coldest.
_RECOUNT = """
local sum, fixed = 0, 0
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  if redis.call('HEXISTS', KEYS[2], member) == 0 then
    redis.call('ZREM', KEYS[1], member)
    fixed = fixed + 1
  end
end
local sizes = redis.call('HGETALL', KEYS[2])
for i = 1, #sizes, 2 do
  if redis.call('ZSCORE', KEYS[1], sizes[i]) then
    sum = sum + sizes[i + 1]
  else
    redis.call('HDEL', KEYS[2], sizes[i])
    fixed = fixed + 1
  end
end
if sum ~= tonumber(redis.call('GET', KEYS[3]) or 0) then
  redis.call('DEL', KEYS[3])  -- or a server without memory refuses
  redis.call('SET', KEYS[3], string.format('%.0f', sum))
  fixed = fixed + 1
end
local coldest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if coldest[2] then
  redis.call('ZREM', KEYS[4], ARGV[1])
  redis.call('ZADD', KEYS[4], coldest[2], ARGV[1])
end
return fixed
"""

# KEYS: registry, used. ARGV: what a bucket's names begin with before its root. Makes used the sum of all totals.
_RESUM = """
local sum = 0
for _, root in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  sum = sum + (redis.call('GET', ARGV[1] .. root .. ':b') or 0)
end
local used = tonumber(redis.call('GET', KEYS[2]) or 0)
if used ~= sum or sum == 0 then redis.call('DEL', KEYS[2]) end
if used ~= sum and sum ~= 0 then redis.call('SET', KEYS[2], string.format('%.0f', sum)) end
return used == sum and 0 or 1
"""

# KEYS: registry, order, total. ARGV: root. A bucket without members is named no longer; its next write names it again.
_RETIRE = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('DEL', KEYS[3], string.sub(KEYS[2], 1, -2) .. 'f', string.sub(KEYS[2], 1, -2) .. 'k')
return redis.call('ZREM', KEYS[1], ARGV[1])
"""


def recount(bucket: Bucket) -> bytes:
    """The command that makes a bucket's lists and its sum agree."""
    return command("EVAL", _RECOUNT, 4, bucket.order, bucket.sizes, bucket.total, bucket.registry, bucket.root)


def resum(stripe: int) -> bytes:
    """The command that makes a stripe's bytes the sum of its buckets'."""
    return command("EVAL", _RESUM, 2, registry(stripe), used(stripe), prefix(stripe))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A member with what its value says of it."""

    bucket: Bucket
    member: str
    score: float
    header: Header | None = None
    there: bool = False
    parent_there: bool = True
    parent_score: float | None = None

    @property
    def parent(self) -> PartKey | None:
        """The same part of the block before; None for a chain's first."""
        if self.header is None or not self.header.meta.depth:
            return None
        return self.header.key._replace(block=self.header.meta.parent)


class Sweeper:
    """Reads members from the highest score down, parents before children, a page at a time."""

    def __init__(self, accounting: Accounting) -> None:
        self._accounting = accounting
        self._names = accounting.names

    # ── repair ─────────────────────────────────────────────────────────────────────────────────────────────

    def sweep(self, talk: Talk, deadline: float) -> dict[str, int]:
        """Repair until a pass finds nothing. Returns how much of each kind was found."""
        found: dict[str, int] = {"strays": self._remove_strays(talk, deadline)}
        for _ in range(_MAX_PASSES):
            changes = self._pass(talk, deadline)
            for name, count in changes.items():
                found[name] = found.get(name, 0) + count
            if not any(changes.values()):
                break
        found["recounted"] = 0
        for bucket in self._accounting.buckets(talk, deadline):
            retire = command("EVAL", _RETIRE, 3, bucket.registry, bucket.order, bucket.total, bucket.root)
            fixed, _ = many(talk, [recount(bucket), retire], deadline)
            found["recounted"] += fixed if isinstance(fixed, int) else 0
        sums = [resum(stripe) for stripe in self._names.stripes]
        found["recounted"] += sum(fixed for fixed in many(talk, sums, deadline) if isinstance(fixed, int))
        return found

    def _pass(self, talk: Talk, deadline: float) -> dict[str, int]:
        changes = {"empty": 0, "orphans": 0, "damaged": 0, "lowered": 0}
        for page in self._pages(talk, None, deadline):
            gone: set[PartKey] = set()
            doomed: dict[Bucket, list[str]] = {}
            empty: dict[Bucket, list[str]] = {}
            lowered: list[bytes] = []
            for entry in page:
                parent = entry.parent
                if not entry.there:
                    empty.setdefault(entry.bucket, []).append(entry.member)
                elif entry.header is None:
                    doomed.setdefault(entry.bucket, []).append(entry.member)
                    changes["damaged"] += 1
                elif parent is not None and (parent in gone or not entry.parent_there):
                    doomed.setdefault(entry.bucket, []).append(entry.member)
                    gone.add(entry.header.key)
                    changes["orphans"] += 1
                elif entry.parent_score is not None and entry.parent_score <= entry.score:
                    score = repr(entry.parent_score - STEP_S)
                    lowered.append(command("ZADD", entry.bucket.order, "XX", "LT", score, entry.member))
            if empty:
                changes["empty"] += self._accounting.remove_members(talk, empty, deadline, only="missing")
            if doomed:
                self._accounting.remove_members(talk, doomed, deadline)
            if lowered:
                many(talk, lowered, deadline)
                changes["lowered"] += len(lowered)
        return changes

    def _remove_strays(self, talk: Talk, deadline: float) -> int:
        """Values that no member speaks of: nobody would ever evict them."""
        strays: dict[Bucket, list[str]] = {}
        for bucket, member in self._unaccounted(talk, deadline):
            strays.setdefault(bucket, []).append(member)
        return self._accounting.remove_members(talk, strays, deadline) if strays else 0

    def _unaccounted(self, talk: Talk, deadline: float) -> list[tuple[Bucket, str]]:
        """Values that have no member, by scanning all keys."""
        return [value for place in talk.places(deadline) for value in self._unaccounted_at(talk, place, deadline)]

    def _unaccounted_at(self, talk: Talk, place: int, deadline: float) -> Iterator[tuple[Bucket, str]]:
        cursor = b"0"
        while True:
            scan = command("SCAN", cursor, "MATCH", "kvs2:{*}:*:v:*", "COUNT", _PAGE)
            (reply,) = many(talk, [scan], deadline, place=place)
            if not isinstance(reply, list) or not isinstance(reply[1], list):
                return
            named = [at for name in reply[1] if isinstance(name, bytes) and (at := bucket_of(name)) is not None]
            # Stores with more buckets than this one see to their own, on nodes that are not known for them here.
            found = [(bucket, member) for bucket, member in named if bucket.stripe in self._names.stripes]
            lookups = [command("ZSCORE", bucket.order, member) for bucket, member in found]
            scores = many(talk, lookups, deadline) if lookups else []
            yield from (value for value, score in zip(found, scores, strict=True) if score is None)
            cursor = reply[0] if isinstance(reply[0], bytes) else b"0"
            if cursor == b"0":
                return

    # ── looking ────────────────────────────────────────────────────────────────────────────────────────────

    def _pages(self, talk: Talk, root: RootId | None, deadline: float) -> Iterator[list[_Entry]]:
        """All members with their headers and their parents' state, from the highest score down."""
        buckets = [
            bucket
            for bucket in self._accounting.buckets(talk, deadline)
            if root is None or bucket.root == root_tag(root)
        ]
        descending = heapq.merge(
            *(self._members(talk, bucket, deadline) for bucket in buckets), key=lambda entry: -entry.score
        )
        page: list[_Entry] = []
        for entry in descending:
            page.append(entry)
            if len(page) == _PAGE:
                yield self._with_headers(talk, page, deadline)
                page = []
        if page:
            yield self._with_headers(talk, page, deadline)

    def _members(self, talk: Talk, bucket: Bucket, deadline: float) -> Iterator[_Entry]:
        """Pages follow scores and not ranks, which shift while members come and go."""
        highest, num_ties = b"+inf", 0
        while True:
            window = ("WITHSCORES", "LIMIT", num_ties, _PAGE)
            query = command("ZREVRANGEBYSCORE", bucket.order, highest, "-inf", *window)
            (reply,) = many(talk, [query], deadline)
            flat = [item for item in reply if isinstance(item, bytes)] if isinstance(reply, list) else []
            for member, score in zip(flat[0::2], flat[1::2], strict=True):
                yield _Entry(bucket, member.decode(errors="replace"), real(score))
            if len(flat) < 2 * _PAGE:
                return
            lowest = flat[-1]
            num_ties = flat[1::2].count(lowest) + (num_ties if lowest == highest else 0)
            highest = lowest

    def _with_headers(self, talk: Talk, page: Sequence[_Entry], deadline: float) -> list[_Entry]:
        values = [entry.bucket.values + entry.member for entry in page]
        kinds = many(talk, [command("TYPE", value) for value in values], deadline)
        strings = [value for value, kind in zip(values, kinds, strict=True) if kind == b"string"]
        lookups = [command("GETRANGE", value, 0, _HEAD_BYTES - 1) for value in strings]
        lookups += [command("STRLEN", value) for value in strings]
        replies = many(talk, lookups, deadline)
        heads, lengths = iter(self._whole(talk, strings, replies, deadline)), iter(replies[len(strings) :])
        entries = []
        for entry, kind in zip(page, kinds, strict=True):
            if kind == b"none":
                entries.append(entry)
            else:
                header = _header(next(heads), next(lengths)) if kind == b"string" else None
                if header is not None and self._names.member(header.key.block, header.key.part) != entry.member:
                    header = None
                entries.append(replace(entry, header=header, there=True))
        return self._with_parents(talk, entries, deadline)

    def _whole(self, talk: Talk, values: Sequence[str], heads: Sequence[Reply], deadline: float) -> list[Reply]:
        """`heads` of `values`, those again that ended within their header."""
        whole = list(heads[: len(values)])
        short = [at for at, head in enumerate(whole) if isinstance(head, bytes) and _cut_off(head)]
        lookups = [command("GETRANGE", values[at], 0, frame.MAX_HEADER_BYTES - 1) for at in short]
        for at, head in zip(short, many(talk, lookups, deadline) if lookups else (), strict=True):
            whole[at] = head
        return whole

    def _with_parents(self, talk: Talk, entries: Sequence[_Entry], deadline: float) -> list[_Entry]:
        parents = [parent for entry in entries if (parent := entry.parent) is not None]
        if not parents:
            return list(entries)
        lookups = [command("EXISTS", self._names.value(parent)) for parent in parents]
        for parent in parents:
            member = self._names.member(parent.block, parent.part)
            lookups.append(command("ZSCORE", self._names.bucket(parent).order, member))
        replies = many(talk, lookups, deadline)
        exists, scores = iter(replies[: len(parents)]), iter(replies[len(parents) :])
        result = []
        for entry in entries:
            if entry.parent is None:
                result.append(entry)
                continue
            score = next(scores)
            result.append(
                replace(
                    entry,
                    parent_there=next(exists) == 1,
                    parent_score=real(score) if isinstance(score, bytes) else None,
                )
            )
        return result

    # ── check and clear ────────────────────────────────────────────────────────────────────────────────────

    def check(self, talk: Talk, deadline: float) -> list[str]:
        """Broken invariants in words; see `RedisTier.check`."""
        problems = [f"{bucket.values}{member} has no account" for bucket, member in self._unaccounted(talk, deadline)]
        unreachable: set[PartKey] = set()  # of all pages: unlike a sweep's, what a page finds stays where it is
        for page in self._pages(talk, None, deadline):
            for entry in page:
                where = f"{entry.bucket.values}{entry.member}"
                if not entry.there:
                    problems.append(f"{where} is accounted and not there")
                elif entry.header is None:
                    problems.append(f"{where} is damaged")
                elif not entry.parent_there:
                    problems.append(f"{where} lacks its parent")
                    unreachable.add(entry.header.key)
                elif entry.parent in unreachable:
                    problems.append(f"{where} hangs from one that lacks its parent")
                    unreachable.add(entry.header.key)
                elif entry.parent_score is not None and entry.parent_score <= entry.score:
                    problems.append(f"{where} scores above its parent")
        buckets = self._accounting.buckets(talk, deadline)
        for bucket in buckets:
            problems += self._check_sums(talk, bucket, deadline)
        for stripe in self._names.stripes:
            totals = [command("GET", bucket.total) for bucket in buckets if bucket.stripe == stripe]
            says, *each = map(_as_int, many(talk, [command("GET", used(stripe)), *totals], deadline))
            if says != sum(each):
                problems.append(f"{used(stripe)} says {says}, its namespaces sum to {sum(each)}")
        return problems

    def _check_sums(self, talk: Talk, bucket: Bucket, deadline: float) -> list[str]:
        members, sizes, total, coldest, place = many(
            talk,
            [
                command("ZRANGE", bucket.order, 0, -1),
                command("HGETALL", bucket.sizes),
                command("GET", bucket.total),
                command("ZRANGE", bucket.order, 0, 0, "WITHSCORES"),
                command("ZSCORE", bucket.registry, bucket.root),
            ],
            deadline,
        )
        named = set(members) if isinstance(members, list) else set()
        flat = sizes if isinstance(sizes, list) else []
        by_member = dict(zip(flat[0::2], (_as_int(size) for size in flat[1::2]), strict=True))
        problems = []
        lowest = coldest[1] if isinstance(coldest, list) and len(coldest) == 2 else b"inf"
        if isinstance(place, bytes) and isinstance(lowest, bytes) and real(place) > real(lowest):
            problems.append(f"{bucket.prefix}: a member scores below its place in the registry")
        if named != set(by_member):
            problems.append(f"{bucket.prefix}: {len(named)} members are ordered and {len(by_member)} have sizes")
        if sum(by_member.values()) != _as_int(total):
            problems.append(f"{bucket.prefix}: sizes sum to {sum(by_member.values())}, the count says {_as_int(total)}")
        values = [bucket.values + member.decode(errors="replace") for member in by_member if isinstance(member, bytes)]
        lengths = many(talk, [command("STRLEN", value) for value in values], deadline) if values else []
        for value, length, size in zip(values, lengths, by_member.values(), strict=True):
            if _as_int(length) > size:
                problems.append(f"{value} has {_as_int(length)} bytes and {size} accounted")
        return problems

    def clear(self, talk: Talk, root: RootId | None, deadline: float) -> None:
        """Remove everything of a namespace, or of all."""
        self._accounting.evict_below(talk, b"+inf", deadline, () if root is None else [root_tag(root)])
        if root is None:
            self._remove_strays(talk, deadline)


def _cut_off(head: bytes) -> bool:
    """Its header says that it is longer."""
    try:
        return len(head) == _HEAD_BYTES < frame.measure(head)
    except FrameError:
        return False


def _header(head: Reply, length: Reply) -> Header | None:
    """The header of a value that begins so and is so long; None where that is not a frame."""
    if not isinstance(head, bytes) or not isinstance(length, int):
        return None
    try:
        header = frame.unpack(head)
        if header.seal is None and header.meta.block_id() != header.key.block:
            return None  # of a sealed one only who opens it can say
        header_bytes = frame.measure(head)
    except FrameError:
        return None
    return header if header_bytes + header.payload_bytes == length else None


def _as_int(reply: Reply) -> int:
    return integer(reply) if isinstance(reply, bytes) else reply if isinstance(reply, int) else 0
