# SPDX-License-Identifier: Apache-2.0
"""What lies in Redis, how much of it, and what leaves first. Shared by all writers, kept in Redis alone.

Invariants, held by Redis itself at every moment, however many writers there are and wherever one dies:
- a value is there exactly if its member and its accounted size are (but for a value whose TTL ran out: `sweep`);
- a bucket's byte count is the sum of its accounted sizes, a stripe's the sum of its buckets';
- no member scores below its namespace's place in the stripe's registry.
They hold because a value and its account change in one transaction (write) or one script (remove, evict).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from kvstore.block import PartKey
from kvstore.tiers.redis_clock import SharedClock
from kvstore.tiers.redis_facts import ServerFacts
from kvstore.tiers.redis_names import STEP_S, Bucket, Names, prefix, registry, used, words
from kvstore.tiers.redis_nodes import Talk, many, raise_foreign
from kvstore.tiers.redis_scripts import ACCOUNT, COLDEST, COOL, EVICT, FORK, REMOVE
from kvstore.tiers.redis_tenants import Tenants
from kvstore.tiers.redis_wire import ProtocolBroken, ReplyError, command, integer, real

_MOST_TENANT_ROOTS = 512
"""Of a tenant at its capacity that has more namespaces, those that it wrote under longest ago go whole, used or not:
each round of an eviction asks for all that are left."""
_COLDEST_AT_FIRST = 32
_COLDEST_PER_BUCKET = 256
"""How many members of each stripe an eviction looks at: few in its first round, which is all that most need, then
twice as many a round. With as many in all of them five sixths of a write's time went into replies that said no more."""
_EVICT_PER_CALL = 1000
_MAX_ROUNDS = 1000
"""Of an eviction: each evicts, or learns how cold some more namespaces are."""
_TARGET_SHARE = 0.99
"""How full it is after an eviction: each gives room to the writes of a while, and empty room holds no hits."""
_TOTAL_GOOD_FOR_S = 0.25
"""By what other stores write meanwhile, capacity may be exceeded; the next write evicts it."""
_SPAN_S = 600.0
"""How long what nobody uses is taken to be kept while nothing ever had to go: then order does not matter yet."""


class Accounting:
    """The bookkeeping operations over a lent wire. Thread-safe: it keeps hints only, Redis keeps the truth.

    Args:
        names: how keys are named.
        capacity_bytes: the limit over all buckets of all namespaces; 0 takes 80 % of the server's `maxmemory`,
            or no limit where it has none.
        namespace_bytes, tenant_bytes: the limit of each namespace, and of all those of a tenant; 0 for none.
    """

    def __init__(self, names: Names, capacity_bytes: int, namespace_bytes: int = 0, tenant_bytes: int = 0) -> None:
        self.names = names
        self.tenants = Tenants(tenant_bytes)
        self.namespace_bytes = namespace_bytes
        self.server = ServerFacts(capacity_bytes)
        self._clock = SharedClock()
        self._total_bytes = 0
        self._total_read_at = float("-inf")
        self.crowded = False
        """The server refused a write for want of memory: make room before the next."""

    def now_s(self, talk: Talk, deadline: float) -> float:
        """The time on the scale of scores."""
        return self._clock.now_s(talk, deadline)

    @property
    def span_s(self) -> float:
        """How long what nobody uses is kept, as far as any store has seen it go."""
        kept_s = self._clock.kept_s
        return _SPAN_S if kept_s is None else kept_s

    # ── writing ────────────────────────────────────────────────────────────────────────────────────────────

    def account(self, parts: Sequence[tuple[PartKey, float, int]]) -> bytes:
        """The command that accounts parts (key, score, bytes), for use inside a transaction with their SETs."""
        keys, values = [], []
        for key, score, num_bytes in parts:
            bucket = self.names.bucket(key)
            keys.append(bucket.books)
            member = self.names.member(key.block, key.part)
            values.append(words(bucket.root, member, repr(score), str(num_bytes)))
        head = b"*%d\r\n" % (3 + 9 * len(parts)) + words("EVAL", ACCOUNT, str(5 * len(parts)))
        return b"".join([head, *keys, *values])

    @property
    def last_total_bytes(self) -> int:
        """Accounted bytes over all buckets, as last heard of and with our own writes since."""
        return self._total_bytes

    def written(self, num_bytes: int) -> None:
        """Hint that so much was added."""
        self._total_bytes += num_bytes

    # ── cooling ────────────────────────────────────────────────────────────────────────────────────────────

    def fork(self, talk: Talk, keys: Iterable[PartKey], deadline: float) -> None:
        """Note that others than those who wrote these went on from them, perhaps."""
        commands = []
        for key in keys:
            bucket = self.names.bucket(key)
            commands.append(_eval(FORK, [bucket.order, bucket.forks], [self.names.member(key.block, key.part)]))
        many(talk, commands, deadline, partial=True)

    def cool(
        self, talk: Talk, keys: Sequence[PartKey], start: int, age_s: float, deadline: float
    ) -> tuple[Sequence[PartKey], int]:
        """Let the end of a chain look unused for `age_s`: from `start` on, and behind all others went on from.

        Returns that end, and how many of it that lowered. Children stay below parents: what was colder stays as cold.
        """
        asked = keys[start:]
        members = [(self.names.bucket(key), self.names.member(key.block, key.part)) for key in asked]
        commands = [command("SISMEMBER", bucket.forks, member) for bucket, member in members]
        flags = talk.ask(commands, deadline) if commands else []
        # A node that does not answer, or holds no set there, says nothing: then it may be shared.
        behind = next((at for at in range(len(flags), 0, -1) if flags[at - 1] != 0), 0)
        while 0 < behind < len(asked) and asked[behind].block == asked[behind - 1].block:
            behind += 1  # other parts of that block
        oldest_s = self.now_s(talk, deadline) - age_s
        depths = {block: depth for depth, block in enumerate(dict.fromkeys(key.block for key in keys))}
        scored: dict[Bucket, list[str]] = {}
        for key, (bucket, member) in zip(asked[behind:], members[behind:], strict=True):
            scored.setdefault(bucket, []).extend((repr(oldest_s - depths[key.block] * STEP_S), member))
        cooling = [_eval(COOL, [b.registry, b.order], [b.root, *words]) for b, words in scored.items()]
        replies = many(talk, cooling, deadline, partial=True) if cooling else []
        return asked[behind:], sum(reply for reply in replies if isinstance(reply, int))

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
                commands.append(
                    _eval(REMOVE, [bucket.used, bucket.order, bucket.sizes, bucket.total, *values], [only, *some])
                )
        return sum(count for count, _, _ in self._removals(talk, commands, deadline))

    def _removals(self, talk: Talk, commands: Sequence[bytes], deadline: float) -> list[tuple[int, int, bool]]:
        """Of each command, parts and bytes removed, and whether there may be more to remove."""
        results = []
        for reply in many(talk, commands, deadline, partial=True) if commands else []:
            if reply is None:  # its node does not answer, or the slot is on its way to another
                results.append((0, 0, False))
                continue
            if not isinstance(reply, list) or len(reply) < 2:
                raise ProtocolBroken("a removal did not say what it removed")
            count, num_bytes, *more = reply
            if not isinstance(count, int) or not isinstance(num_bytes, int):
                raise ProtocolBroken("a removal did not say what it removed")
            self._total_bytes -= num_bytes
            results.append((count, num_bytes, more == [1]))
        return results

    # ── evicting ───────────────────────────────────────────────────────────────────────────────────────────

    def buckets(self, talk: Talk, deadline: float) -> list[Bucket]:
        """Every bucket anyone wrote to, as far as nodes answer."""
        stripes = self.names.stripes
        commands = [command("ZRANGE", registry(stripe), 0, -1) for stripe in stripes]
        replies = many(talk, commands, deadline, partial=True)
        return sorted(
            Bucket(stripe, root.decode(errors="replace"))
            for stripe, roots in zip(stripes, replies, strict=True)
            for root in (roots if isinstance(roots, list) else ())
            if isinstance(root, bytes)
        )

    @property
    def limits(self) -> list[int]:
        """Those that are set here, in bytes."""
        return [limit for limit in (self.namespace_bytes, self.tenants.capacity_bytes) if limit]

    def total_bytes(self, talk: Talk, deadline: float, roots: Sequence[str] = ()) -> int:
        """Accounted bytes of all namespaces, or of some. For whoever makes room: what it says of all is remembered."""
        total = self.counted_bytes(talk, deadline, roots)
        if not roots:
            self._total_bytes = total
            self._total_read_at = time.monotonic()
        return total

    def counted_bytes(self, talk: Talk, deadline: float, roots: Sequence[str] = ()) -> int:
        """Accounted bytes of all namespaces, or of some."""
        if roots:
            return sum(self._bytes_of(talk, roots, deadline)[0].values())
        replies = many(talk, [command("GET", used(stripe)) for stripe in self.names.stripes], deadline, partial=True)
        return sum(_count(reply) for reply in replies if isinstance(reply, bytes))

    def _bytes_of(self, talk: Talk, roots: Sequence[str], deadline: float) -> tuple[dict[str, int], bool]:
        """Accounted bytes of each of some namespaces, and whether all nodes were heard."""
        asked = [command("MGET", *(Bucket(stripe, root).total for root in roots)) for stripe in self.names.stripes]
        found = dict.fromkeys(roots, 0)
        replies = many(talk, asked, deadline, partial=True)
        for reply in replies:
            for root, total in zip(roots, reply if isinstance(reply, list) else (), strict=False):
                found[root] += _count(total) if isinstance(total, bytes) else 0
        return found, all(isinstance(reply, list) for reply in replies)

    def make_room(self, talk: Talk, num_bytes: Mapping[str, int], deadline: float) -> tuple[int, int]:
        """Evict so that so many bytes more fit, by namespace; of each first what is its own, then what is its tenant's.

        Returns parts and bytes evicted, in this order.
        """
        num_parts = freed_bytes = 0
        for root, more_bytes in num_bytes.items() if self.namespace_bytes else ():
            if self.total_bytes(talk, deadline, [root]) + more_bytes > self.namespace_bytes:
                target_bytes = max(0, int(self.namespace_bytes * _TARGET_SHARE) - more_bytes)
                parts, freed = self.evict(talk, target_bytes, deadline, [root])
                num_parts += parts
                freed_bytes += freed
        for tenant, shares in self.tenants.shares(num_bytes).items():
            parts, freed = self._make_room_of(talk, tenant, shares, deadline)
            num_parts += parts
            freed_bytes += freed
        parts, freed = self._make_room_for_all(talk, sum(num_bytes.values()), deadline)
        return num_parts + parts, freed_bytes + freed

    def _make_room_of(self, talk: Talk, tenant: str, shares: Mapping[str, int], deadline: float) -> tuple[int, int]:
        """As `make_room`, for what one tenant is to have more."""
        tenants, more_bytes = self.tenants, sum(shares.values())
        if tenants.fits(tenant, shares):
            return 0, 0
        num_parts = freed_bytes = 0
        now_s = self.now_s(talk, deadline)
        roots = tenants.roots(talk, tenant, list(shares), now_s, deadline)
        by_root, all_heard = self._bytes_of(talk, list(roots), deadline)
        if all_heard:
            empty = [root for root, lately in roots.items() if not by_root[root] and not lately]
            tenants.forget(talk, tenant, empty, now_s, deadline)
        num_bytes = sum(by_root.values())
        kept = [root for root in roots if by_root[root]]
        if kept and num_bytes + more_bytes > tenants.capacity_bytes:  # without any name it would be everybody's
            surplus = max(0, len(kept) - _MOST_TENANT_ROOTS)
            if surplus:
                num_parts, freed_bytes = self.evict_below(talk, b"+inf", deadline, kept[:surplus])
            target_bytes = max(0, int(tenants.capacity_bytes * _TARGET_SHARE) - more_bytes)
            parts, freed = self.evict(talk, target_bytes, deadline, kept[surplus:])
            num_parts += parts
            freed_bytes += freed
        tenants.note_sum(tenant, num_bytes - freed_bytes + more_bytes)
        return num_parts, freed_bytes

    def _make_room_for_all(self, talk: Talk, num_bytes: int, deadline: float) -> tuple[int, int]:
        capacity_bytes = self.server.facts(talk, deadline).capacity_bytes
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

    def evict(self, talk: Talk, target_bytes: int, deadline: float, roots: Sequence[str] = ()) -> tuple[int, int]:
        """Evict the coldest of all namespaces, or of some, under one watermark, down to `target_bytes`."""
        num_parts = num_bytes = 0
        for number in range(_MAX_ROUNDS):
            excess = self.total_bytes(talk, deadline, roots) - target_bytes
            if excess <= 0:
                break
            num_coldest = min(_COLDEST_PER_BUCKET, _COLDEST_AT_FIRST << min(number, 8))
            watermark, more = self._watermark(talk, excess, num_coldest, deadline, roots)
            if watermark is None:
                if more:
                    continue
                break
            parts, freed = self.evict_below(talk, watermark, deadline, roots)
            num_parts += parts
            num_bytes += freed
            if parts and not roots:
                self._clock.note_cold(talk, real(watermark), deadline)
            if not parts:
                break  # used meanwhile, or on nodes that do not answer
        return num_parts, num_bytes

    def _watermark(
        self, talk: Talk, excess: int, num_coldest: int, deadline: float, roots: Sequence[str]
    ) -> tuple[bytes | None, bool]:
        """The score up to which `excess` bytes lie, as far as the `num_coldest` of each stripe let one see.

        And whether one would see more by looking again: namespaces that were used are warmer than the registry said.
        """
        commands = [
            _eval(COLDEST, [registry(stripe)], [prefix(stripe), str(num_coldest), *roots])
            for stripe in self.names.stripes
        ]
        entries: list[tuple[float, bytes, int]] = []
        horizon = float("inf")
        for reply in many(talk, commands, deadline, partial=True):
            flat = [item for item in reply if isinstance(item, bytes)] if isinstance(reply, list) else []
            entries += ((real(score), score, integer(size)) for score, size in zip(flat[1::2], flat[2::2], strict=True))
            if flat:  # what lies beyond was not seen, and may be colder than what other stripes offer
                horizon = min(horizon, real(flat[0]))
        watermark: bytes | None = None
        for value, score, size in sorted(entries):
            if excess <= 0 or value > horizon:
                break
            watermark = score
            excess -= size
        return watermark, horizon < float("inf")

    def evict_below(self, talk: Talk, watermark: bytes, deadline: float, roots: Sequence[str] = ()) -> tuple[int, int]:
        """Evict whatever scores up to `watermark`. Returns parts and bytes. What was used meanwhile stays."""
        num_parts = num_bytes = 0
        pending = list(self.names.stripes)
        while pending:
            commands = [
                _eval(
                    EVICT,
                    [registry(stripe), used(stripe)],
                    [prefix(stripe), watermark, str(_EVICT_PER_CALL), *roots],
                )
                for stripe in pending
            ]
            results = self._removals(talk, commands, deadline)
            num_parts += sum(count for count, _, _ in results)
            num_bytes += sum(freed for _, freed, _ in results)
            pending = [stripe for stripe, (_, _, more) in zip(pending, results, strict=True) if more]
        return num_parts, num_bytes


def _count(reply: bytes) -> int:
    """A counter; what is no number is another program's."""
    try:
        return integer(reply)
    except ProtocolBroken as exc:
        raise_foreign(ReplyError(f"WRONGTYPE of a counter: {exc}"))
        raise


def _eval(script: str, keys: Sequence[bytes | str], values: Sequence[bytes | str]) -> bytes:
    return command("EVAL", script, len(keys), *keys, *values)
