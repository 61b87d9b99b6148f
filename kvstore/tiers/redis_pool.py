# SPDX-License-Identifier: Apache-2.0
"""Connections to one server.

redis-py connects and authenticates; the socket then belongs to a `Wire`. A wire goes back to the pool only if its
conversation ended well and in step; anything else, a generator closed early included, closes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any, cast

import redis
import redis.backoff
import redis.retry

from kvstore.errors import ConfigError, TierError, TierTimeout, TierUnavailable
from kvstore.tiers.redis_breaker import Breaker
from kvstore.tiers.redis_errors import MOVING, TIER, Refused, map_redis_errors
from kvstore.tiers.redis_stream import stream_over
from kvstore.tiers.redis_wire import ReplyError, Wire, command

log = logging.getLogger("kvstore.tiers.redis")

Address = tuple[str, int]
Place = Address | Callable[[float], Address] | None
"""Where to connect instead of to the URL's host: an address, or who says it, given the seconds there are."""
_FAIR_WAIT_S = 0.09
"""A working server answers something within this, even behind a few large values of others."""
_MOST_LEFT = 16
_PREPARE_RARER = 10
"""Where connecting ahead of need has failed, it comes so many times as late as the first probe of a server that did."""
_LOADED = "kvs2:{000}:probe"
_LOADS = [command("EXISTS", _LOADED), command("GET", _LOADED), command("MGET", _LOADED)]
"""Of each kind that requests wait for: a server that answers a PING may still refuse these."""


class Connections:
    """Up to `limit` wires, made when needed, the most recently used first. Thread-safe."""

    def __init__(
        self,
        url: str,
        limit: int,
        connect_timeout_s: float,
        breaker: Breaker,
        place: Place = None,
    ) -> None:
        self._place = place
        try:
            # Only parses: nothing connects here.
            self._template = redis.ConnectionPool.from_url(url, protocol=2)
            self._template.connection_class(**self._template.connection_kwargs)
        except (ValueError, TypeError) as exc:
            raise ConfigError(
                f"the redis URL is not usable: {exc}; use redis://, rediss:// (TLS) or unix://, redis+cluster:// or "
                "redis+sentinel:// (rediss+… with TLS), or 'embedded'"
            ) from exc
        self._connect_timeout_s = connect_timeout_s
        self._breaker = breaker
        self._changed = threading.Condition()
        self._idle: list[tuple[int, Wire]] = []
        self._limit = self._free = limit
        self._prepares = False
        self._prepare_at_s = float("-inf")
        self._num_left = 0
        """Attempts to connect that nobody waits for any more, and that have not ended."""
        self._closed = False
        self._owner = os.getpid()

    @contextlib.contextmanager
    def lease(self, deadline: float) -> Iterator[Wire]:
        """A wire for one conversation. Raises TierUnavailable or TierTimeout; wakes the breaker on both.

        A time-out while waiting for a wire, or after the server was heard in this conversation, says that it is
        busy and not that it is gone: the breaker stays closed. So it does where an answer is there that this process,
        held up, did not come to read in time, and where the server takes no writes (`Refused`).
        """
        self._breaker.admit()
        self._take_place(deadline)
        started = time.monotonic()
        # A failure may mean that this is the primary no more: wires of before are not used again.
        era = self._breaker.num_failures
        wire: Wire | None = None
        try:
            with map_redis_errors():
                wire = self._idle_wire() or self._connect(deadline)
                wire.heard = False
                yield wire
        except TierError as exc:
            if isinstance(exc, Refused):
                # Loads go on; replies may still be on their way here, so the wire does not.
                self._breaker.heard_at = time.monotonic()
            elif era != self._breaker.num_failures:
                # It began before a failure that is known: a late word on the server of then. Taken for one on that of
                # now, each call that still waited for a lost primary turned off the one that had taken over.
                pass
            elif not isinstance(exc, TierTimeout):
                self._breaker.failed(exc)
            elif wire is None or not wire.has_answered:
                # It was not waited for beyond the deadline, however late this thread runs.
                fair = min(time.monotonic(), deadline) - started >= _FAIR_WAIT_S
                (self._breaker.failed if fair else self._breaker.doubted)(exc)
            self._give_place(wire, None)
            raise
        except BaseException:
            self._give_place(wire, None)
            raise
        if wire.heard and era == self._breaker.num_failures:  # else it tells of a server that was left since
            self._breaker.succeeded()
        self._give_place(wire, era if wire.in_step() else None)

    # ── wires beside a lease ───────────────────────────────────────────────────────────────────────────────

    @property
    def num_idle(self) -> int:
        """Wires that lie here, connected."""
        return min(self._free, len(self._idle))

    def spare(self) -> contextlib.AbstractContextManager[Wire] | None:
        """A wire that lies here, for who has a lease already and may use more; None where there is none. To be entered.

        Neither waits nor connects, and tells the breaker nothing: what fails of a conversation is told once.
        """
        with self._changed:
            if not self.num_idle or self._closed or os.getpid() != self._owner:
                return None
            self._free -= 1
        era = self._breaker.num_failures
        wire = self._idle_wire()
        if wire is None:
            self._give_place(None, None)
            return None
        wire.heard = False
        return self._lend(wire, era)

    @contextlib.contextmanager
    def _lend(self, wire: Wire, era: int) -> Iterator[Wire]:
        try:
            yield wire
        except BaseException:
            self._give_place(wire, None)
            raise
        self._give_place(wire, era if wire.in_step() else None)

    def prepare(self, num_wires: int) -> None:
        """Have so many connected before long, for `spare`. A server that lets nobody in any more is no failure."""
        with self._changed:
            is_due = not self._closed and time.monotonic() >= self._prepare_at_s
            if self._prepares or not is_due or self._num_wires >= num_wires:
                return
            self._prepares = True
        thread = threading.Thread(target=self._prepare, args=(num_wires,), daemon=True)
        thread.name = "kvstore-redis-prepare"
        try:
            thread.start()
        except RuntimeError:  # no more threads are to be had
            self._prepares = False

    @property
    def _num_wires(self) -> int:
        return self._limit - self._free + len(self._idle)

    def _prepare(self, num_wires: int) -> None:
        try:
            while True:
                with self._changed:
                    if self._closed or self._num_wires >= min(num_wires, self._limit):
                        return
                    self._free -= 1
                era, wire = self._breaker.num_failures, None
                try:
                    with map_redis_errors():
                        wire = self._connect(time.monotonic() + self._connect_timeout_s)
                finally:
                    self._give_place(wire, era)
        except TierError as error:
            log.debug("redis: no further connection for loads: %s", error)
            self._prepare_at_s = time.monotonic() + _PREPARE_RARER * self._breaker.open_s
        finally:
            self._prepares = False

    # ── connecting ─────────────────────────────────────────────────────────────────────────────────────────

    def probe(self) -> None:
        """Connect anew and see whether the server takes part, and loads work. Raises TierError.

        Leaves the breaker alone. What it asks is what calls ask: of one that answers nothing but a PING, each probe
        would find that it is back, and the next call that it is not.
        """
        deadline = time.monotonic() + self._connect_timeout_s
        with map_redis_errors():
            wire = self._connect(deadline)
            try:
                self._greet(wire, deadline)
                self._try_loads(wire, deadline)
            finally:
                wire.close()

    def ping(self, silent_s: float) -> float:
        """See whether the server still takes part, where it was not heard for `silent_s`: the breaker learns of it.

        Returns after how many seconds to come again. Nothing is sent where the breaker refuses calls: it has a probe.
        """
        left_s = self._breaker.heard_at + silent_s - time.monotonic()
        if left_s > 0:
            return left_s
        deadline = time.monotonic() + self._connect_timeout_s
        with contextlib.suppress(TierError), self.lease(deadline) as wire:
            self._greet(wire, deadline)
        return silent_s

    def _greet(self, wire: Wire, deadline: float) -> None:
        """Raises ReplyError, or what sockets raise, where the server does not work, or takes no writes."""
        wire.send([command("PING"), command("HELLO", "2")], deadline)
        reply, about = wire.reply(deadline), wire.reply(deadline)
        if isinstance(reply, ReplyError):  # LOADING, MASTERDOWN
            raise reply
        # In a Cluster the topology says who is what.
        if not isinstance(self._place, tuple) and isinstance(about, list) and b"replica" in about:
            raise ReplyError("READONLY it is a replica, and takes no writes")

    def try_loads(self, deadline: float) -> None:
        """See whether loads work. Raises TierError; the breaker learns of it."""
        with self.lease(deadline) as wire:
            self._try_loads(wire, deadline)

    def _try_loads(self, wire: Wire, deadline: float) -> None:
        in_cluster = isinstance(self._place, tuple)
        commands = [*_LOADS, command("CLUSTER", "SLOTS")] if in_cluster else _LOADS
        wire.send([b"".join(commands)], deadline)
        for reply in [wire.reply(deadline) for _ in commands]:
            if isinstance(reply, ReplyError) and not reply.is_of_type and reply.code not in MOVING:
                raise reply

    def _take_place(self, deadline: float) -> None:
        with self._changed:
            if os.getpid() != self._owner:
                raise TierUnavailable(TIER, "the process forked: open a store of its own in the child")
            got = self._changed.wait_for(lambda: self._free > 0 or self._closed, max(0.0, deadline - time.monotonic()))
            if self._closed:
                raise TierUnavailable(TIER, "the tier is closed")
            if not got:
                raise TierTimeout(TIER, "no connection became free before the deadline")
            self._free -= 1

    def _give_place(self, wire: Wire | None, era: int | None) -> None:
        """Take a wire back, to be lent again where no failure came after its era, which is None for one that is spoilt.

        A call can outlast a failover: its wire, to a primary that is one no more, would lie here unused and open.
        """
        with self._changed:
            self._free += 1
            if wire is not None and era == self._breaker.num_failures and not self._closed:
                self._idle.append((era, wire))
                wire = None
            self._changed.notify()
        if wire is not None:
            wire.close()

    def _idle_wire(self) -> Wire | None:
        """The wire used last that the server has not closed meanwhile. Those of before a failure are closed."""
        while True:
            era, wire = self._breaker.num_failures, None
            with self._changed:
                stale = [each for of, each in self._idle if of != era]
                self._idle = [each for each in self._idle if each[0] == era]
                if self._idle:
                    _, wire = self._idle.pop()
            for each in stale:
                each.close()
            if wire is None or wire.alive():
                return wire
            wire.close()

    def _connect(self, deadline: float) -> Wire:
        """On a thread of its own: to resolve a name knows no limit, and redis-py's is for each piece that it reads."""
        limit_s = min(self._connect_timeout_s, deadline - time.monotonic())
        if limit_s <= 0:
            raise TimeoutError("the deadline passed before connecting")
        if self._num_left >= _MOST_LEFT:
            raise TimeoutError(f"{self._num_left} attempts to connect have not ended yet")
        attempt: Future[socket.socket] = Future()
        thread = threading.Thread(target=self._attempt, args=(attempt, limit_s), daemon=True)
        thread.name = "kvstore-redis-connect"
        thread.start()
        try:
            sock = attempt.result(limit_s)
        except TimeoutError:
            with self._changed:
                left = attempt.cancel()
                self._num_left += left
            if left:
                raise TimeoutError(f"not connected within {limit_s:.3g} s") from None
            sock = attempt.result()  # it ended just now
        return Wire(stream_over(sock))

    def _attempt(self, attempt: Future[socket.socket], limit_s: float) -> None:
        sock: socket.socket | None = None
        try:
            sock = self._connected(limit_s)
            attempt.set_result(sock)
        except InvalidStateError:  # nobody waits for it any more
            if sock is not None:
                sock.close()
        except BaseException as exc:  # noqa: BLE001 (whoever waits has it)
            with contextlib.suppress(InvalidStateError):
                attempt.set_exception(exc)
        finally:
            with self._changed:
                self._num_left -= attempt.cancelled()

    def _connected(self, limit_s: float) -> socket.socket:
        settings = dict(self._template.connection_kwargs)
        if self._place is not None:
            began = time.monotonic()
            settings["host"], settings["port"] = self._place if isinstance(self._place, tuple) else self._place(limit_s)
            limit_s = max(0.01, limit_s - (time.monotonic() - began))
        settings |= {
            "socket_connect_timeout": limit_s,
            "socket_timeout": limit_s,
            "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        }
        connection = cast(Any, self._template.connection_class)(**settings)
        connection.connect()
        sock, connection._sock = connection._sock, None  # from here on the socket is ours alone
        return cast(socket.socket, sock)

    def close(self) -> None:
        """Close idle wires now and lent ones as they come back."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for _, wire in idle:
            wire.close()
