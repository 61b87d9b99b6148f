# SPDX-License-Identifier: Apache-2.0
"""What another program put under a key of the accounting is taken away, and what it overwrote is rebuilt.

A list where a bucket's sorted set belongs would make every script on it fail: nothing of that stripe could be written,
used or evicted any more. What is rebuilt comes from what is left beside it: members from the sizes, sizes from the
values, sums from the sizes, registries from the names of keys. Members whose scores are lost count as used just now;
the sweep that follows puts each below its parent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from kvstore.tiers.redis_accounting import Accounting
from kvstore.tiers.redis_names import Bucket, book_of, registry, used
from kvstore.tiers.redis_nodes import Talk, many
from kvstore.tiers.redis_sweep import recount, resum
from kvstore.tiers.redis_wire import Reply, command

log = logging.getLogger("kvstore.tiers.redis")

_PAGE = 512

# KEYS: one. ARGV: type, 'keep' to look only. Returns what was there if that is something else. By script, since another
# store may have put it right meanwhile.
_OUST = """
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'string' and ARGV[1] == 'string' then
  local text = redis.call('GET', KEYS[1])
  if string.find(text, '^%-?%d+$') then return '' end
  kind = 'string that is no number'
elseif kind == ARGV[1] or kind == 'none' then
  return ''
end
if ARGV[2] ~= 'keep' then redis.call('UNLINK', KEYS[1]) end
return kind
"""


class Mender:
    """Finds foreign keys in the accounting of all stores on a server, and puts it right again."""

    def __init__(self, accounting: Accounting) -> None:
        self._accounting = accounting

    def foreign(self, talk: Talk, deadline: float) -> dict[str, str]:
        """Keys of the accounting that hold something else, and what; nothing is changed."""
        found: dict[str, str] = {}
        self._oust(talk, deadline, found, "keep")
        return found

    def mend(self, talk: Talk, deadline: float) -> dict[str, str]:
        """Take them away and rebuild. Returns what was found."""
        found: dict[str, str] = {}
        buckets = self._oust(talk, deadline, found, "take")
        if not found:
            return found
        for name, kind in found.items():
            log.warning("redis: %s held a %s, which another program put there: rebuilt from what is left", name, kind)
        stripes = {bucket.stripe for bucket in buckets if found.keys() & _names(bucket)}
        stripes |= {stripe for stripe in self._accounting.names.stripes if found.keys() & _names_of_all(stripe)}
        for bucket in buckets:
            if bucket.stripe in stripes:
                if bucket.sizes in found:
                    self._rebuild_sizes(talk, bucket, deadline)
                elif bucket.order in found:
                    self._rebuild_order(talk, bucket, deadline)
                many(talk, [recount(bucket)], deadline)
        many(talk, [resum(stripe) for stripe in sorted(stripes)], deadline)
        return found

    def _oust(self, talk: Talk, deadline: float, found: dict[str, str], how: str) -> list[Bucket]:
        """Note foreign keys in `found`; returns all buckets there are."""
        stripes = self._accounting.names.stripes
        wanted = {registry(stripe): "zset" for stripe in stripes} | {used(stripe): "string" for stripe in stripes}
        self._look(talk, wanted, deadline, found, how)
        # Registries do not name all: what was put where a bucket is to begin is in none.
        ordered = sorted({bucket for place in talk.places(deadline) for bucket in self._buckets(talk, place, deadline)})
        wanted = {bucket.order: "zset" for bucket in ordered} | {bucket.sizes: "hash" for bucket in ordered}
        self._look(talk, wanted | {bucket.total: "string" for bucket in ordered}, deadline, found, how)
        return ordered

    @staticmethod
    def _look(talk: Talk, wanted: dict[str, str], deadline: float, found: dict[str, str], how: str) -> None:
        names = list(wanted)
        for at in range(0, len(names), _PAGE):
            some = names[at : at + _PAGE]
            asked = [command("EVAL", _OUST, 1, name, wanted[name], how) for name in some]
            for name, kind in zip(some, many(talk, asked, deadline, partial=True), strict=True):
                if isinstance(kind, bytes) and kind:
                    found[name] = kind.decode()

    def _buckets(self, talk: Talk, place: int, deadline: float) -> Iterator[Bucket]:
        """What the names of a node's keys speak of, as far as stores like this one would use it."""
        cursor = b"0"
        while True:
            scan = command("SCAN", cursor, "MATCH", "kvs2:{[0-9][0-9][0-9]}:*:[zsb]", "COUNT", 8 * _PAGE)
            (reply,) = many(talk, [scan], deadline, place=place)
            if not isinstance(reply, list) or not isinstance(reply[1], list):
                return
            for name in reply[1]:
                bucket = book_of(name) if isinstance(name, bytes) else None
                if bucket is not None and bucket.stripe in self._accounting.names.stripes:
                    yield bucket
            cursor = reply[0] if isinstance(reply[0], bytes) else b"0"
            if cursor == b"0":
                return

    def _rebuild_order(self, talk: Talk, bucket: Bucket, deadline: float) -> None:
        (reply,) = many(talk, [command("HKEYS", bucket.sizes)], deadline)
        score = repr(self._accounting.now_s(talk, deadline))
        for members in _pages(reply):
            scored = [word for member in members for word in (score, member)]
            many(talk, [command("ZADD", bucket.order, "NX", *scored)], deadline)

    def _rebuild_sizes(self, talk: Talk, bucket: Bucket, deadline: float) -> None:
        """Of what has a value; members without one are left for `recount` to drop."""
        (reply,) = many(talk, [command("ZRANGE", bucket.order, 0, -1)], deadline)
        facts = self._accounting.server.facts(talk, deadline)
        for members in _pages(reply):
            names = [bucket.values.encode() + member for member in members]
            lengths = many(talk, [command("STRLEN", name) for name in names], deadline)
            sized = [
                command("HSETNX", bucket.sizes, member, facts.accounted_bytes(length))
                for member, length in zip(members, lengths, strict=True)
                if isinstance(length, int) and length
            ]
            if sized:
                many(talk, sized, deadline)


def _names(bucket: Bucket) -> set[str]:
    return {bucket.order, bucket.sizes, bucket.total}


def _names_of_all(stripe: int) -> set[str]:
    return {registry(stripe), used(stripe)}


def _pages(reply: Reply) -> list[Sequence[bytes]]:
    members = [member for member in reply if isinstance(member, bytes)] if isinstance(reply, list) else []
    return [members[at : at + _PAGE] for at in range(0, len(members), _PAGE)]
