# SPDX-License-Identifier: Apache-2.0
"""What lies in Redis, how much of it, and what leaves first. Shared by all writers, kept in Redis alone.

Invariants, held by Redis itself at every moment, however many writers there are and wherever one dies:
- a value is there exactly if its member and its accounted size are (but for a value whose TTL ran out: `sweep`);
- a bucket's byte count is the sum of its accounted sizes.
They hold because a value and its account change in one transaction (write) or one script (remove, evict).

Scripts go as EVAL with their text and not as EVALSHA: inside the write's transaction an unknown hash would leave
a value without an account, and hashing a few hundred bytes costs the server a microsecond.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.block import PartKey
from kvstore.tiers.redis_names import EPOCH_S, Bucket, Names, registry
from kvstore.tiers.redis_nodes import Talk, many
from kvstore.tiers.redis_wire import ProtocolBroken, command, integer, real

log = logging.getLogger("kvstore.tiers.redis")

_COLDEST_PER_BUCKET = 256
_EVICT_PER_CALL = 1000
_TARGET_SHARE = 0.99
"""How full it is after an eviction: each gives room to the writes of a while, and empty room holds no hits."""
_CLOCK_GOOD_FOR_S = 60.0
_TOTAL_GOOD_FOR_S = 0.25

# KEYS: registry, order, sizes, total of each part. ARGV: root, member, score, bytes of each part.
_ACCOUNT = """
for i = 0, #ARGV / 4 - 1 do
  local roots, order, sizes, total = KEYS[4 * i + 1], KEYS[4 * i + 2], KEYS[4 * i + 3], KEYS[4 * i + 4]
  local root, member, score, size = ARGV[4 * i + 1], ARGV[4 * i + 2], ARGV[4 * i + 3], ARGV[4 * i + 4]
  local old = redis.call('HGET', sizes, member)
  if old ~= size then
    redis.call('HSET', sizes, member, size)
    redis.call('INCRBY', total, size - (old or 0))
  end
  redis.call('ZADD', order, 'GT', score, member)
  redis.call('SADD', roots, root)
end
return #ARGV / 4
"""

_FORGET = """
local function forget(value, member)
  local size = redis.call('HGET', KEYS[2], member) or 0
  redis.call('UNLINK', value)
  redis.call('ZREM', KEYS[1], member)
  if redis.call('HDEL', KEYS[2], member) == 1 then redis.call('DECRBY', KEYS[3], size) end
  return tonumber(size)
end
"""

# KEYS: order, sizes, total, then values. ARGV: 'all' or 'missing', then members.
_REMOVE = (
    _FORGET
    + """
local bytes, count = 0, 0
for i = 2, #ARGV do
  local value = KEYS[i + 2]
  if ARGV[1] == 'all' or redis.call('EXISTS', value) == 0 then
    bytes = bytes + forget(value, ARGV[i])
    count = count + 1
  end
end
return {count, bytes}
"""
)

# KEYS: order, sizes, total. ARGV: what value names begin with, highest score to go, how many at most.
_EVICT = (
    _FORGET
    + """
local bytes = 0
local members = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[2], 'LIMIT', 0, ARGV[3])
for _, member in ipairs(members) do bytes = bytes + forget(ARGV[1] .. member, member) end
return {#members, bytes}
"""
)

# KEYS: order, sizes. ARGV: how many. Returns score, bytes, score, bytes, … from the coldest up.
_COLDEST = """
local coldest = redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1, 'WITHSCORES')
local reply = {}
for i = 1, #coldest, 2 do
  reply[i] = coldest[i + 1]
  reply[i + 1] = redis.call('HGET', KEYS[2], coldest[i]) or '0'
end
return reply
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the server says about itself."""

    capacity_bytes: int
    """0 for no limit."""
    rounds_up: bool
    """Its allocator serves size classes (jemalloc)."""


def size_class(num_bytes: int) -> int:
    """Bytes jemalloc takes for `num_bytes`: four classes from one power of two to the next."""
    if num_bytes <= 64:
        return 64
    step = 1 << max(4, (num_bytes - 1).bit_length() - 3)
    return -(-num_bytes // step) * step


class Accounting:
    """The bookkeeping operations over a lent wire. Thread-safe: it keeps hints only, Redis keeps the truth.

    Args:
        names: how keys are named.
        capacity_bytes: the limit over all buckets of all namespaces; 0 takes 80 % of the server's `maxmemory`,
            or no limit where it has none.
    """

    def __init__(self, names: Names, capacity_bytes: int) -> None:
        self.names = names
        self._capacity_bytes = capacity_bytes
        self._facts: Facts | None = None
        self._clock_offset_s = 0.0
        self._clock_read_at = float("-inf")
        self._total_bytes = 0
        self._total_read_at = float("-inf")
        self.crowded = False
        """The server refused a write for want of memory: make room before the next."""

    # ── server ─────────────────────────────────────────────────────────────────────────────────────────────

    def facts(self, talk: Talk, deadline: float) -> Facts:
        if self._facts is None:
            limit, mem_allocator, policies = 0, "jemalloc", set()
            for place in talk.places(deadline):
                (reply,) = many(talk, [command("INFO", "memory")], deadline, place=place, partial=True)
                text = reply.decode(errors="replace") if isinstance(reply, bytes) else ""
                info = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
                limit += integer(info.get("maxmemory", "0").encode()) * 4 // 5
                mem_allocator = info.get("mem_allocator", mem_allocator)
                policies.add(info.get("maxmemory_policy", "noeviction"))
            self._facts = Facts(self._capacity_bytes or limit, "libc" not in mem_allocator)
            policy = ", ".join(sorted(policies))
            if policy != "noeviction":
                log.warning(
                    "redis: maxmemory-policy is %s, which tears holes into chains; set it to noeviction, "
                    "and capacity_bytes here",
                    policy,
                )
        return self._facts

    def accounted_bytes(self, stored_bytes: int, facts: Facts) -> int:
        """What a value of `stored_bytes` costs the server's memory."""
        return size_class(stored_bytes) if facts.rounds_up else stored_bytes

    def now_s(self, talk: Talk, deadline: float) -> float:
        """The server's time on the scale of scores; asked for once a minute."""
        now = time.monotonic()
        if now - self._clock_read_at > _CLOCK_GOOD_FOR_S:
            (reply,) = many(talk, [command("TIME")], deadline)
            if not isinstance(reply, list) or len(reply) != 2:
                raise ProtocolBroken("TIME did not give a time")
            seconds, micros = (integer(part) for part in reply if isinstance(part, bytes))
            self._clock_offset_s = seconds + micros * 1e-6 - EPOCH_S - now
            self._clock_read_at = now
        return now + self._clock_offset_s

    # ── writing ────────────────────────────────────────────────────────────────────────────────────────────

    def account(self, parts: Sequence[tuple[PartKey, float, int]]) -> bytes:
        """The command that accounts parts (key, score, bytes), for use inside a transaction with their SETs."""
        keys: list[bytes | str] = []
        values: list[bytes | str] = []
        for key, score, num_bytes in parts:
            bucket = self.names.bucket(key)
            keys += (bucket.registry, bucket.order, bucket.sizes, bucket.total)
            values += (bucket.root, self.names.member(key.block, key.part), repr(score), str(num_bytes))
        return _eval(_ACCOUNT, keys, values)

    @property
    def last_total_bytes(self) -> int:
        """Accounted bytes over all buckets, as last heard of and with our own writes since."""
        return self._total_bytes

    def written(self, num_bytes: int) -> None:
        """Hint that so much was added."""
        self._total_bytes += num_bytes

    # ── removing ───────────────────────────────────────────────────────────────────────────────────────────

    def remove(self, talk: Talk, keys: Iterable[PartKey], deadline: float, *, only: str = "all") -> int:
        """Remove values with their accounts; `only="missing"` those accounts whose value is gone."""
        grouped: dict[Bucket, list[str]] = {}
        for key in keys:
            grouped.setdefault(self.names.bucket(key), []).append(self.names.member(key.block, key.part))
        return self.remove_members(talk, grouped, deadline, only=only)

    def remove_members(
        self, talk: Talk, grouped: dict[Bucket, list[str]], deadline: float, *, only: str = "all"
    ) -> int:
        """As `remove`, by bucket and member."""
        commands = []
        for bucket, members in grouped.items():
            for at in range(0, len(members), _EVICT_PER_CALL):
                some = members[at : at + _EVICT_PER_CALL]
                values = [bucket.values + member for member in some]
                commands.append(_eval(_REMOVE, [bucket.order, bucket.sizes, bucket.total, *values], [only, *some]))
        return sum(count for count, _ in self._removals(talk, commands, deadline))

    def _removals(self, talk: Talk, commands: Sequence[bytes], deadline: float) -> list[tuple[int, int]]:
        results = []
        for reply in many(talk, commands, deadline, partial=True) if commands else []:
            if reply is None:  # its node does not answer, or the slot is on its way to another
                results.append((0, 0))
                continue
            if not isinstance(reply, list) or len(reply) != 2:
                raise ProtocolBroken("a removal did not say what it removed")
            count, num_bytes = reply
            if not isinstance(count, int) or not isinstance(num_bytes, int):
                raise ProtocolBroken("a removal did not say what it removed")
            self._total_bytes -= num_bytes
            results.append((count, num_bytes))
        return results

    # ── evicting ───────────────────────────────────────────────────────────────────────────────────────────

    def buckets(self, talk: Talk, deadline: float) -> list[Bucket]:
        """Every bucket anyone wrote to, as far as nodes answer."""
        stripes = self.names.stripes
        replies = many(talk, [command("SMEMBERS", registry(stripe)) for stripe in stripes], deadline, partial=True)
        return sorted(
            Bucket(stripe, root.decode(errors="replace"))
            for stripe, roots in zip(stripes, replies, strict=True)
            for root in (roots if isinstance(roots, list) else ())
            if isinstance(root, bytes)
        )

    def total_bytes(self, talk: Talk, deadline: float) -> int:
        """Accounted bytes over all buckets."""
        commands = [command("GET", bucket.total) for bucket in self.buckets(talk, deadline)]
        replies = many(talk, commands, deadline, partial=True) if commands else []
        self._total_bytes = sum(integer(reply) for reply in replies if isinstance(reply, bytes))
        self._total_read_at = time.monotonic()
        return self._total_bytes

    def make_room(self, talk: Talk, num_bytes: int, deadline: float) -> tuple[int, int]:
        """Evict so that `num_bytes` more fit. Returns parts and bytes evicted, in this order."""
        capacity_bytes = self.facts(talk, deadline).capacity_bytes
        crowded, self.crowded = self.crowded, False
        if not capacity_bytes and not crowded:
            return 0, 0
        stale = time.monotonic() - self._total_read_at > _TOTAL_GOOD_FOR_S
        if crowded or stale or self._total_bytes + num_bytes > capacity_bytes:
            self.total_bytes(talk, deadline)
        limit_bytes = capacity_bytes or self._total_bytes
        if crowded:  # whatever the settings say, what is there now is too much
            limit_bytes = min(limit_bytes, self._total_bytes)
        if self._total_bytes + num_bytes <= limit_bytes:
            return 0, 0
        return self.evict(talk, max(0, int(limit_bytes * _TARGET_SHARE) - num_bytes), deadline)

    def evict(self, talk: Talk, target_bytes: int, deadline: float) -> tuple[int, int]:
        """Evict the coldest of all buckets, under one watermark, until at most `target_bytes` are left."""
        num_parts = num_bytes = 0
        while (excess := self.total_bytes(talk, deadline) - target_bytes) > 0:
            buckets = self.buckets(talk, deadline)
            watermark = self._watermark(talk, buckets, excess, deadline)
            if watermark is None:
                break
            parts, freed = self.evict_below(talk, buckets, watermark, deadline)
            num_parts += parts
            num_bytes += freed
            if not parts:
                break  # used meanwhile, or on nodes that do not answer
        return num_parts, num_bytes

    def _watermark(self, talk: Talk, buckets: Sequence[Bucket], excess: int, deadline: float) -> bytes | None:
        """The score up to which `excess` bytes lie, as far as the coldest of each bucket let one see."""
        commands = [_eval(_COLDEST, [bucket.order, bucket.sizes], [str(_COLDEST_PER_BUCKET)]) for bucket in buckets]
        entries: list[tuple[float, bytes, int]] = []
        horizon = float("inf")
        for reply in many(talk, commands, deadline, partial=True) if commands else []:
            flat = [item for item in reply if isinstance(item, bytes)] if isinstance(reply, list) else []
            pairs = list(zip(flat[0::2], flat[1::2], strict=True))
            entries += ((real(score), score, integer(size)) for score, size in pairs)
            if len(pairs) == _COLDEST_PER_BUCKET:
                # What lies beyond was not seen, and may be colder than what other buckets offer.
                horizon = min(horizon, real(pairs[-1][0]))
        watermark: bytes | None = None
        for value, score, size in sorted(entries):
            if excess <= 0 or value > horizon:
                break
            watermark = score
            excess -= size
        return watermark

    def evict_below(self, talk: Talk, buckets: Sequence[Bucket], watermark: bytes, deadline: float) -> tuple[int, int]:
        """Evict whatever scores up to `watermark`. Returns parts and bytes. What was used meanwhile stays."""
        num_parts = num_bytes = 0
        pending = list(buckets)
        while pending:
            commands = [
                _eval(
                    _EVICT,
                    [bucket.order, bucket.sizes, bucket.total],
                    [bucket.values, watermark, str(_EVICT_PER_CALL)],
                )
                for bucket in pending
            ]
            results = self._removals(talk, commands, deadline)
            num_parts += sum(count for count, _ in results)
            num_bytes += sum(freed for _, freed in results)
            pending = [bucket for bucket, (count, _) in zip(pending, results, strict=True) if count == _EVICT_PER_CALL]
        return num_parts, num_bytes


def _eval(script: str, keys: Sequence[bytes | str], values: Sequence[bytes | str]) -> bytes:
    return command("EVAL", script, len(keys), *keys, *values)
