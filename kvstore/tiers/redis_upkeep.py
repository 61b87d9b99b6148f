# SPDX-License-Identifier: Apache-2.0
"""Background work of the Redis tier: touches, removal of damaged values, ageing, a sweep now and then.

And a look at how full the server is and how it is set, once a minute, the first at once. And a PING where nothing
else was said for `ping_every_s`, so that what is shown of a server that nobody needs is seconds old, and who needs it
next does not pay for finding out that it went or came back. The PING is the thread's alone: no request waits for it,
nor for a connection because of it, since loads have theirs. It costs the server 19 us (with HELLO, which says whether
it is a replica now) and the store 60: a store that uses its server sends none, and a thousand idle ones send 333 a
second, 0.6 % of a core of the server's. To one that is away each connects once a second, and every five seconds where
it is away for long (`redis_breaker`).

One thread, one bounded queue: what does not fit is dropped and counted, since a lost touch costs a little order
and a late one would cost a load its connection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.block import BlockId, PartKey
from kvstore.errors import TierError
from kvstore.stats import Stats
from kvstore.tiers.redis_accounting import Accounting
from kvstore.tiers.redis_errors import WrongBooks
from kvstore.tiers.redis_growth import Growth, free_end, note, note_only
from kvstore.tiers.redis_mend import Mender
from kvstore.tiers.redis_names import Touch, Use
from kvstore.tiers.redis_nodes import Nodes, Talk, many, sound
from kvstore.tiers.redis_rights import check_rights
from kvstore.tiers.redis_sweep import Sweeper
from kvstore.tiers.redis_wire import command

log = logging.getLogger("kvstore.tiers.redis")

_MAX_CHAINS = 256
_MAX_DAMAGED = 65_536
_MAX_BORROWED = 4096
_MOST_SHIFT_S = 43_200.0
_MAX_REMEMBERED = 65_536
_AGE_EVERY_S = 60.0
"""Or an eighth of the TTL, where that is less: or the TTL would come before it."""
_LOOK_EVERY_S = 60.0
_LOOK_AGAIN_S = 5.0
"""After a look that failed."""
_SILENT_S = 10.0
"""For how long a server may answer nothing in a sweep, which as a whole may take a quarter of an hour: all else that
this thread does waits for it, and so does the word that the server hangs."""
_KEYS_PER_PIPELINE = 2048
_KEYS_KEPT = 65_536
_NO_KEY = -2
"""What TTL says of a value that is not there."""
SWEEP_MARK = "kvs2:{000}:sweep"


def most_shift_s(ttl_s: int) -> float:
    """By how much a score may differ from the time of use: the private end of a chain that was closed looks so old.

    A quarter of the TTL at most, or ageing by score would take what was used just now, and the TTL come before it.
    """
    return min(_MOST_SHIFT_S, ttl_s / 4) if ttl_s else _MOST_SHIFT_S


def _later_of(one: Mapping[BlockId, float], other: Mapping[BlockId, float]) -> Mapping[BlockId, float]:
    if not one and not other:
        return one
    return {block: max(one.get(block, 0.0), other.get(block, 0.0)) for block in one.keys() | other.keys()}


def _portions(uses: Sequence[Use]) -> Iterator[Sequence[Use]]:
    """`uses` in order, as many at once as have so many keys, one at least: their words are kept until the answers."""
    start = num_keys = 0
    for at, use in enumerate(uses):
        if num_keys and num_keys + len(use.keys) > _KEYS_KEPT:
            yield uses[start:at]
            start, num_keys = at, 0
        num_keys += len(use.keys)
    yield uses[start:]


def _words(steps: Iterable[Sequence[Touch]], sent: list[Touch]) -> Iterator[list[bytes]]:
    """The commands of each step, whose touches are noted in `sent`."""
    for touches in steps:
        sent += touches
        yield [touch.words for touch in touches]


class _Ended(NamedTuple):
    """A chain whose end may go."""

    keys: Sequence[PartKey]
    start: int
    note_children: bool


@dataclass(slots=True)
class _Work:
    """What waits to be done."""

    chains: OrderedDict[PartKey, Use] = field(default_factory=OrderedDict)
    damaged: dict[PartKey, None] = field(default_factory=dict)
    borrowed: dict[PartKey, None] = field(default_factory=dict)
    growths: list[Growth] = field(default_factory=list)
    retired: OrderedDict[PartKey, _Ended] = field(default_factory=OrderedDict)
    repair: bool = False
    look: bool = False

    def __bool__(self) -> bool:
        asked = self.chains or self.damaged or self.borrowed or self.growths or self.retired
        return bool(asked or self.repair or self.look)


class Upkeep:
    """Owns the thread. Thread-safe."""

    def __init__(
        self,
        nodes: Nodes,
        accounting: Accounting,
        sweeper: Sweeper,
        *,
        ttl_s: int,
        call_timeout_s: float,
        sweep_every_s: float,
        ping_every_s: float,
    ) -> None:
        self.absent: Callable[[Sequence[BlockId]], None] = lambda blocks: None
        """As `Tier.absent`."""
        self._stats = Stats()
        self._room: dict[str, float] = {}
        self._nodes = nodes
        self._accounting = accounting
        self._sweeper = sweeper
        self._ttl_s = ttl_s
        self._call_timeout_s = call_timeout_s
        self._sweep_every_s = sweep_every_s
        self._ping_every_s = ping_every_s
        self._changed = threading.Condition()
        self._waiting = _Work(look=True)
        self._mender = Mender(accounting)
        self._busy = False
        self._closed = False
        self._ttl_seen_at: OrderedDict[PartKey, float] = OrderedDict()
        now = time.monotonic()
        self._age_every_s = min(_AGE_EVERY_S, ttl_s / 8)
        self._age_at = now + self._age_every_s
        self._look_at = now
        self._rights_known = False
        self._rights_at = now
        self._ping_at = now + ping_every_s
        self._sweep_at = now + sweep_every_s
        self._thread = threading.Thread(target=self._run, name="kvstore-redis-upkeep", daemon=True)
        self._thread.start()

    # ── called from other threads ──────────────────────────────────────────────────────────────────────────

    @property
    def stats(self) -> Stats:
        return self._stats

    def bind(self, stats: Stats) -> None:
        """Count there from now on. What was seen of the server before is told there too."""
        self._stats = stats
        for name, value in self._room.items():
            stats.set(name, value)

    def touch(self, keys: Sequence[PartKey], later: Mapping[BlockId, float]) -> None:
        """A chain was used. Touches of the same chain that were not sent yet become one, at the later place of both."""
        if not keys:
            return
        with self._changed:
            before = self._waiting.chains.pop(keys[-1], None)
            if before is not None:
                later = _later_of(before.later, later)
            self._waiting.chains[keys[-1]] = Use(keys, later)
            if len(self._waiting.chains) > _MAX_CHAINS:
                self._waiting.chains.popitem(last=False)
                self.stats.add("redis.dropped_touches")
            self._changed.notify_all()

    def borrowed(self, key: PartKey) -> None:
        """A chain was found here as far as this key: others than we may go on from it, or we from others'."""
        with self._changed:
            if len(self._waiting.borrowed) < _MAX_BORROWED:
                self._waiting.borrowed[key] = None
            self._changed.notify_all()

    def grew(self, growth: Growth) -> None:
        """A store wrote that takes back what it reads: only what several chains hang from has to stay then."""
        with self._changed:
            if len(self._waiting.growths) < _MAX_CHAINS:
                self._waiting.growths.append(growth)
            else:
                self.stats.add("redis.dropped_marks")
            self._changed.notify_all()

    def retire(self, keys: Sequence[PartKey], start: int, *, note_children: bool = False) -> None:
        """As `Tier.retire`; `note_children`: for `redis_growth`."""
        if start >= len(keys):
            return
        with self._changed:
            self._waiting.retired[keys[-1]] = _Ended(keys, start, note_children)
            if len(self._waiting.retired) > _MAX_CHAINS:
                self._waiting.retired.popitem(last=False)
            self._changed.notify_all()

    def discard(self, keys: Sequence[PartKey]) -> None:
        """Values that are not what they should be: remove them."""
        with self._changed:
            if len(self._waiting.damaged) < _MAX_DAMAGED:
                self._waiting.damaged.update(dict.fromkeys(keys))
            self._changed.notify_all()

    def mend(self, deadline: float) -> None:
        """A key of the accounting holds something else: take it away, rebuild, and sweep in the background."""
        with self._nodes.talk(deadline) as talk:
            found = self._mender.mend(talk, deadline)
        if found:
            self.stats.add("redis.foreign_books", len(found))
            with self._changed:
                self._waiting.repair = True
                self._changed.notify_all()

    def settle(self, deadline_s: float) -> bool:
        """Wait until all that was handed over is done; False if time ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._busy or self._waiting) or self._closed, deadline_s)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(self._call_timeout_s + 1.0)

    # ── the thread ─────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed, self._idle_s())
                if self._closed:
                    return
                work, self._waiting = self._waiting, _Work()
                self._busy = True
            try:
                self._ping()
                self._check_rights()
                try:
                    self._do(work)
                except WrongBooks:
                    self.mend(time.monotonic() + self._call_timeout_s)
                    self._do(work)
            except TierError:
                # The breaker has said so already. Touches are lost, damaged values are found again when read.
                self.stats.add("redis.upkeep_failures")
            except Exception:
                log.exception("redis: background work failed")
                self.stats.add("redis.upkeep_failures")

    def _idle_s(self) -> float:
        times = [self._look_at]
        times += [] if self._rights_known and not self._nodes.denied else [self._rights_at]
        times += [self._age_at] if self._ttl_s else []
        times += [self._sweep_at] if self._sweep_every_s else []
        times += [self._ping_at] if self._ping_every_s else []
        return max(0.0, min(times) - time.monotonic())

    def _ping(self) -> None:
        if self._ping_every_s and time.monotonic() >= self._ping_at:
            left_s = self._nodes.ping(self._ping_every_s)
            self._ping_at = time.monotonic() + left_s

    def _check_rights(self) -> None:
        """At first, and for as long as some lack: else the first write would find out, and nothing that all are there.

        One that is taken away later is noticed by who needs it.
        """
        now = time.monotonic()
        if (self._rights_known and not self._nodes.denied) or now < self._rights_at:
            return
        self._rights_at = now + _LOOK_AGAIN_S
        check_rights(self._nodes, now + self._call_timeout_s)
        self._rights_known = True

    def _do(self, work: _Work) -> None:
        now = time.monotonic()
        age = bool(self._ttl_s) and now >= self._age_at
        sweep = bool(self._sweep_every_s) and now >= self._sweep_at
        look = work.look or now >= self._look_at
        if not (work or age or sweep or look):
            return
        # Set before the attempt, so that a failing one is not repeated at once.
        if age:
            self._age_at = now + self._age_every_s
        if sweep:
            self._sweep_at = now + self._sweep_every_s
        if look:
            self._look_at = now + _LOOK_AGAIN_S
        deadline = now + self._call_timeout_s
        with self._nodes.talk(deadline) as talk:
            if work.damaged:
                self._accounting.remove(talk, work.damaged, deadline)
            if work.chains:
                self._touch(talk, list(work.chains.values()), deadline)
            if work.borrowed:
                self._accounting.fork(talk, work.borrowed, deadline)
            if work.growths:
                note(talk, self._accounting.names, work.growths, deadline)
            for ended in work.retired.values():  # after their touches
                self._cool(talk, ended, deadline)
            if age:
                self._age(talk, deadline)
            if look:
                self._look(talk, deadline)
                self._look_at = now + _LOOK_EVERY_S
        if sweep or work.repair:
            self._sweep(whoever_else_did=work.repair)

    def _touch(self, talk: Talk, uses: Sequence[Use], deadline: float) -> None:
        """One time for all chains at hand: a head that several share is touched once, and stays above all tails."""
        now_s = self._accounting.now_s(talk, deadline)
        for some in _portions(uses):
            self._touch_at(talk, some, now_s, deadline)
        if self._ttl_s:
            for use in uses:
                self._refresh(talk, use.keys, deadline)

    def _touch_at(self, talk: Talk, uses: Sequence[Use], now_s: float, deadline: float) -> None:
        sent: list[Touch] = []
        replies = sound(
            talk.ask_in_steps(_words(self._accounting.names.touches(uses, now_s), sent), deadline), partial=True
        )
        self.stats.add("redis.touched_blocks", sum(len(use.keys) for use in uses))
        # What was not raised is not there, or stands higher already.
        short = [
            touch
            for touch, raised in zip(sent, replies, strict=True)
            if raised is not None and raised != len(touch.rows)
        ]
        if short:
            self._look_for(talk, short, deadline)

    def _look_for(self, talk: Talk, touches: Sequence[Touch], deadline: float) -> None:
        """Say which members are not there: who believes that they are would never write them again."""
        replies = many(talk, [touch.scores() for touch in touches], deadline, partial=True)
        gone = [
            touch.block(at)
            for touch, scores in zip(touches, replies, strict=True)
            for at, score in enumerate(scores if isinstance(scores, list) else ())
            if score is None
        ]
        if gone:
            self.absent(gone)

    def _cool(self, talk: Talk, ended: _Ended, deadline: float) -> None:
        start, stop = ended.start, len(ended.keys)
        if ended.note_children:
            start, stop = free_end(talk, self._accounting.names, ended.keys, deadline)
            if start == stop:
                return
        age_s = most_shift_s(self._ttl_s)
        cooled, num_lowered = self._accounting.cool(talk, ended.keys[:stop], start, age_s, deadline)
        self.stats.add("redis.retired_blocks", num_lowered)
        if ended.note_children:
            note_only(talk, self._accounting.names, cooled, deadline)

    def _refresh(self, talk: Talk, chain: Sequence[PartKey], deadline: float) -> None:
        """Give the chain's values their full TTL again where half of it is used, parents first.

        Each is looked at no oftener than every eighth of the TTL: most touches stop here, those of a next turn
        at what the conversation was in the last.
        """
        now = time.monotonic()
        start, seen_at = self._seen_to(chain, now)
        if start == len(chain):
            return
        names = self._accounting.names
        for at in range(start, len(chain), _KEYS_PER_PIPELINE):
            keys = chain[at : at + _KEYS_PER_PIPELINE]
            left = many(talk, [command("TTL", names.value(key)) for key in keys], deadline)
            half = self._ttl_s / 2
            old = [key for key, ttl in zip(keys, left, strict=True) if isinstance(ttl, int) and 0 <= ttl < half]
            if old:
                many(talk, [command("EXPIRE", names.value(key), self._ttl_s) for key in old], deadline)
                self.stats.add("redis.refreshed_ttls", len(old))
            if gone := [key.block for key, ttl in zip(keys, left, strict=True) if ttl == _NO_KEY]:
                self.absent(gone)
        self._ttl_seen_at[chain[-1]] = seen_at
        if len(self._ttl_seen_at) > _MAX_REMEMBERED:
            self._ttl_seen_at.popitem(last=False)

    def _seen_to(self, chain: Sequence[PartKey], now: float) -> tuple[int, float]:
        """How much of a chain was looked at lately, and when the part of it that was not looked at for longest was."""
        for at in range(len(chain), 0, -1):
            seen_at = self._ttl_seen_at.get(chain[at - 1])
            if seen_at is not None and now - seen_at < self._ttl_s / 8:
                return at, seen_at
        return 0, now

    def _age(self, talk: Talk, deadline: float) -> None:
        """Evict what nobody used for half the TTL, tails first, so that the TTL never has to."""
        oldest = repr(self._accounting.now_s(talk, deadline) - self._ttl_s / 2).encode()
        num_parts, num_bytes = self._accounting.evict_below(talk, oldest, deadline)
        if num_parts:
            self.stats.add_all({"redis.aged_blocks": num_parts, "redis.aged_bytes": num_bytes})

    def _look(self, talk: Talk, deadline: float) -> None:
        """How full the server is: also before this store writes anything, and with what others wrote.

        Wrong books are left to whoever writes: two that mend at once may each give up what the other has rebuilt.
        """
        facts = self._accounting.server.ask(talk, deadline)
        try:
            used_bytes = self._accounting.counted_bytes(talk, deadline)
        except WrongBooks:
            return
        self._room = {"redis.used_bytes": used_bytes, "redis.capacity_bytes": facts.capacity_bytes}
        for name, value in self._room.items():
            self.stats.set(name, value)

    def _sweep(self, *, whoever_else_did: bool) -> None:
        """Sweep, unless another store on this server did within the interval and that is not to count."""
        deadline = time.monotonic() + max(self._call_timeout_s, self._sweep_every_s / 4)
        with self._nodes.talk(deadline, max(self._call_timeout_s, _SILENT_S)) as talk:
            mark = command("SET", SWEEP_MARK, "1", "NX", "EX", max(1, int(self._sweep_every_s * 0.9)))
            taken, left_s = many(talk, [mark, command("TTL", SWEEP_MARK)], deadline)
            if left_s == -1:  # another program's, for good
                many(talk, [command("DEL", SWEEP_MARK)], deadline)
            elif taken != b"OK" and not whoever_else_did:
                return
            found = self._sweeper.sweep(talk, deadline)
        self.stats.add_all({f"redis.swept_{name}": float(count) for name, count in found.items()})
