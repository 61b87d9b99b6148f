# SPDX-License-Identifier: Apache-2.0
"""The time that scores are made of: shared by all stores on a server, and only ever rising.

    kvs2:{000}:clock    hash: now (seconds, on the scale of scores), at (what the server's clock said then),
                        cold (the highest score up to which an eviction for all namespaces took)

It goes as the server's clock does, except where that jumps (a host that woke up, a failover to a host with another
time): then it goes on by as much as stores may have counted on since, whichever way the jump was. So a jump makes
neither the chains used last look cold nor those of before look old. Each store counts on by its own monotonic clock
from what it read last, and vouches for that when it looks again. While no store runs, no time passes; of the TTL of
values it does, by the server's own clock. Set forward by more than values have left of it, that ends them: all are
missed, and written again. Nothing is harmed by it, and a longer TTL than is asked for would keep prompts longer than
was asked, so it is left at that; `kvstore doctor` says where a clock is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvstore.tiers.redis_names import CLOCK, EPOCH_S, registry
from kvstore.tiers.redis_nodes import Talk, many
from kvstore.tiers.redis_wire import ProtocolBroken, command, integer, real

_GOOD_FOR_S = 60.0
_MOST_MISSED_S = 2 * _GOOD_FOR_S
"""Stores that run look once a minute."""
_YEAR_S = 366 * 86_400

# KEYS: clock, registry of its stripe. ARGV: the server's time, what the asking store counted on to, what may have been
# missed, how far ahead of both a score may be to be believed. A server without memory answers, and remembers later.
_READ = """
local at, now
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'hash' then
  at, now = tonumber(redis.call('HGET', KEYS[1], 'at')), tonumber(redis.call('HGET', KEYS[1], 'now'))
elseif kind ~= 'none' then
  redis.call('UNLINK', KEYS[1])
end
local says, counted = tonumber(ARGV[1]), tonumber(ARGV[2])
if at and now and math.abs(at) + math.abs(now) < 1e12 then
  local passed, most = says - at, math.max(tonumber(ARGV[3]), counted - now)
  if passed < -1 or passed > most then  -- it jumped: others may have counted on so far since
    passed = most
  end
  now = math.max(now + math.max(passed, 0), counted)
else
  now = math.max(says, counted, 1000)
  local roots = redis.pcall('ZREVRANGE', KEYS[2], 0, 63)
  local highest = now
  for i = 1, #roots do
    local order = string.gsub(KEYS[2], 'r$', roots[i] .. ':z')
    local last = redis.pcall('ZREVRANGE', order, 0, 0, 'WITHSCORES')
    local score = tonumber(last[2])
    if score and score < now + tonumber(ARGV[4]) then highest = math.max(highest, score) end
  end
  now = highest
end
now = string.format('%.6f', now)
redis.pcall('HSET', KEYS[1], 'at', string.format('%.6f', says), 'now', now)
local cold = tonumber(redis.call('HGET', KEYS[1], 'cold') or 0)
if not cold or not (cold < tonumber(now) + tonumber(ARGV[4])) then  -- no number, or one that no eviction has noted
  redis.call('HDEL', KEYS[1], 'cold')
  cold = 0
end
return {now, string.format('%.6f', cold)}
"""

# KEYS: clock. ARGV: score. Raises, never lowers: conversations that were closed lie below all others, and say nothing
# of how long others are kept.
_NOTE_COLD = """
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then return 0 end
local cold = tonumber(redis.call('HGET', KEYS[1], 'cold') or 0)
if cold and cold >= tonumber(ARGV[1]) then return 0 end
redis.pcall('HSET', KEYS[1], 'cold', ARGV[1])  -- a server without memory remembers the next one
return 1
"""

ServerTime = Callable[[Talk, float], float]
"""What the server's clock says, in seconds since 1970; asked over a conversation, under a deadline."""


def asked(talk: Talk, deadline: float) -> float:
    """By TIME, of the node that keeps the shared clock."""
    (reply,) = many(talk, [command("TIME")], deadline, place=0)
    if not isinstance(reply, list) or len(reply) != 2:
        raise ProtocolBroken("TIME did not give a time")
    seconds, micros = (integer(part) for part in reply if isinstance(part, bytes))
    return seconds + micros * 1e-6


class SharedClock:
    """This store's view of it. Thread-safe: what it keeps is only a hint.

    Args:
        server_time_s: the server's clock.
        monotonic_s: this host's.
    """

    def __init__(self, server_time_s: ServerTime = asked, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._server_time_s = server_time_s
        self._monotonic_s = monotonic_s
        self._read: tuple[float, float] | None = None
        """When by this host's clock, and what the shared one said."""
        self._cold = 0.0

    def now_s(self, talk: Talk, deadline: float) -> float:
        """Its time; looked at once a minute, counted on meanwhile."""
        here_s = self._monotonic_s()
        counted_s = 0.0
        if self._read is not None:
            read_at_s, said_s = self._read
            counted_s = said_s + here_s - read_at_s
            if here_s - read_at_s <= _GOOD_FOR_S:
                return counted_s
        says_s = self._server_time_s(talk, deadline) - EPOCH_S
        words = (repr(says_s), repr(counted_s), repr(_MOST_MISSED_S), repr(_YEAR_S))
        (reply,) = many(talk, [command("EVAL", _READ, 2, CLOCK, registry(0), *words)], deadline, place=0)
        if not isinstance(reply, list) or len(reply) != 2 or not all(isinstance(each, bytes) for each in reply):
            raise ProtocolBroken("the shared clock did not give a time")
        said, cold = (real(each) for each in reply if isinstance(each, bytes))
        now_s = max(said, counted_s)
        self._read = here_s, now_s
        self._cold = max(self._cold, cold)
        return now_s

    def note_cold(self, talk: Talk, score: float, deadline: float) -> None:
        """All that scored up to this was evicted, of whichever namespace."""
        if score > self._cold:
            self._cold = score
            many(talk, [command("EVAL", _NOTE_COLD, 1, CLOCK, repr(score))], deadline, place=0, partial=True)

    @property
    def kept_s(self) -> float | None:
        """How long ago what goes now was used last, as far as any store has noted; None while nothing ever went."""
        if self._read is None or not self._cold:
            return None
        read_at_s, said_s = self._read
        return max(0.0, said_s + self._monotonic_s() - read_at_s - self._cold)
