# SPDX-License-Identifier: Apache-2.0
"""Background work of the Redis tier: touches, removal of damaged values, ageing, and a sweep now and then.

One thread, one bounded queue: what does not fit is dropped and counted, since a lost touch costs a little order
and a late one would cost a load its connection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

from kvstore.block import PartKey
from kvstore.errors import TierError
from kvstore.stats import Stats
from kvstore.tiers.redis_accounting import Accounting
from kvstore.tiers.redis_nodes import Nodes, Talk, many, sound
from kvstore.tiers.redis_sweep import Sweeper
from kvstore.tiers.redis_wire import command

log = logging.getLogger("kvstore.tiers.redis")

_MAX_CHAINS = 256
_MAX_DAMAGED = 65_536
_MAX_REMEMBERED = 65_536
_AGE_EVERY_S = 60.0
_KEYS_PER_PIPELINE = 2048
SWEEP_MARK = "kvs2:{000}:sweep"


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
    ) -> None:
        self.stats = Stats()
        self._nodes = nodes
        self._accounting = accounting
        self._sweeper = sweeper
        self._ttl_s = ttl_s
        self._call_timeout_s = call_timeout_s
        self._sweep_every_s = sweep_every_s
        self._changed = threading.Condition()
        self._chains: OrderedDict[PartKey, Sequence[PartKey]] = OrderedDict()
        self._damaged: dict[PartKey, None] = {}
        self._busy = False
        self._closed = False
        self._ttl_seen_at: OrderedDict[PartKey, float] = OrderedDict()
        now = time.monotonic()
        self._age_at = now + _AGE_EVERY_S
        self._sweep_at = now + sweep_every_s
        self._thread = threading.Thread(target=self._run, name="kvstore-redis-upkeep", daemon=True)
        self._thread.start()

    # ── called from other threads ──────────────────────────────────────────────────────────────────────────

    def touch(self, keys: Sequence[PartKey]) -> None:
        """A chain was used. Touches of the same chain that were not sent yet become one."""
        if not keys:
            return
        with self._changed:
            self._chains[keys[-1]] = keys
            self._chains.move_to_end(keys[-1])
            if len(self._chains) > _MAX_CHAINS:
                self._chains.popitem(last=False)
                self.stats.add("redis.dropped_touches")
            self._changed.notify_all()

    def discard(self, keys: Sequence[PartKey]) -> None:
        """Values that are not what they should be: remove them."""
        with self._changed:
            if len(self._damaged) < _MAX_DAMAGED:
                self._damaged.update(dict.fromkeys(keys))
            self._changed.notify_all()

    def settle(self, deadline_s: float) -> bool:
        """Wait until all that was handed over is done; False if time ran out first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._busy or self._chains or self._damaged) or self._closed, deadline_s
            )

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
                self._changed.wait_for(lambda: bool(self._chains or self._damaged or self._closed), self._idle_s())
                if self._closed:
                    return
                chains, self._chains = self._chains, OrderedDict()
                damaged, self._damaged = self._damaged, {}
                self._busy = True
            try:
                self._work(list(chains.values()), list(damaged))
            except TierError:
                # The breaker has said so already. Touches are lost, damaged values are found again when read.
                self.stats.add("redis.upkeep_failures")
            except Exception:
                log.exception("redis: background work failed")
                self.stats.add("redis.upkeep_failures")

    def _idle_s(self) -> float:
        times = [self._age_at] if self._ttl_s else []
        times += [self._sweep_at] if self._sweep_every_s else []
        return max(0.0, min(times) - time.monotonic()) if times else threading.TIMEOUT_MAX

    def _work(self, chains: Sequence[Sequence[PartKey]], damaged: Sequence[PartKey]) -> None:
        now = time.monotonic()
        age = bool(self._ttl_s) and now >= self._age_at
        sweep = bool(self._sweep_every_s) and now >= self._sweep_at
        # Set before the attempt, so that a failing one is not repeated at once.
        if age:
            self._age_at = now + _AGE_EVERY_S
        if sweep:
            self._sweep_at = now + self._sweep_every_s
        deadline = now + self._call_timeout_s
        with self._nodes.talk(deadline) as talk:
            if damaged:
                self._accounting.remove(talk, damaged, deadline)
            if chains:
                self._touch(talk, chains, deadline)
            if age:
                self._age(talk, deadline)
        if sweep:
            self._sweep()

    def _touch(self, talk: Talk, chains: Sequence[Sequence[PartKey]], deadline: float) -> None:
        """One time for all chains at hand: a head that several share is touched once, and stays above all tails."""
        now_s = self._accounting.now_s(talk, deadline)
        sound(talk.ask_in_steps(self._accounting.names.touches(chains, now_s), deadline), partial=True)
        self.stats.add("redis.touched_blocks", sum(map(len, chains)))
        if self._ttl_s:
            for chain in chains:
                self._refresh(talk, chain, deadline)

    def _refresh(self, talk: Talk, chain: Sequence[PartKey], deadline: float) -> None:
        """Give the chain's values their full TTL again where half of it is used, parents first.

        Looked at no oftener than every eighth of the TTL for a chain: most touches stop here.
        """
        now = time.monotonic()
        seen_at = self._ttl_seen_at.get(chain[-1])
        if seen_at is not None and now - seen_at < self._ttl_s / 8:
            return
        names = self._accounting.names
        for at in range(0, len(chain), _KEYS_PER_PIPELINE):
            keys = chain[at : at + _KEYS_PER_PIPELINE]
            left = many(talk, [command("TTL", names.value(key)) for key in keys], deadline)
            half = self._ttl_s / 2
            old = [key for key, ttl in zip(keys, left, strict=True) if isinstance(ttl, int) and 0 <= ttl < half]
            if old:
                many(talk, [command("EXPIRE", names.value(key), self._ttl_s) for key in old], deadline)
                self.stats.add("redis.refreshed_ttls", len(old))
        self._ttl_seen_at[chain[-1]] = now
        if len(self._ttl_seen_at) > _MAX_REMEMBERED:
            self._ttl_seen_at.popitem(last=False)

    def _age(self, talk: Talk, deadline: float) -> None:
        """Evict what nobody used for half the TTL, tails first, so that the TTL never has to."""
        oldest = repr(self._accounting.now_s(talk, deadline) - self._ttl_s / 2).encode()
        num_parts, num_bytes = self._accounting.evict_below(talk, oldest, deadline)
        self.stats.set("redis.used_bytes", self._accounting.total_bytes(talk, deadline))
        if num_parts:
            self.stats.add_all({"redis.aged_blocks": num_parts, "redis.aged_bytes": num_bytes})

    def _sweep(self) -> None:
        """Sweep, unless another store on this server did within the interval."""
        deadline = time.monotonic() + max(self._call_timeout_s, self._sweep_every_s / 4)
        with self._nodes.talk(deadline) as talk:
            mark = command("SET", SWEEP_MARK, "1", "NX", "EX", max(1, int(self._sweep_every_s * 0.9)))
            if many(talk, [mark], deadline) != [b"OK"]:
                return
            found = self._sweeper.sweep(talk, deadline)
        self.stats.add_all({f"redis.swept_{name}": float(count) for name, count in found.items()})
