# SPDX-License-Identifier: Apache-2.0
"""Whether a server is believed to work: the circuit breaker before its connections."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from kvstore.errors import TierError, TierUnavailable
from kvstore.tiers.redis_errors import TIER

log = logging.getLogger("kvstore.tiers.redis")

_DOUBTS_ARE_FAILURE = 3
_RARER = 0.1
_MOST_RARE = 5.0
"""A probe comes after a tenth of the time that the server is away, at most this many times as late as the first: a
restart is noticed at once, and a thousand stores that wait for one which is away for long try 200 times a second."""


class Breaker:
    """Closed while the server works; open after a failure, until a probe finds it working again.

    While open all calls are refused at once. A refusal costs microseconds, so a dead server costs its callers nothing
    but shorter hits. `probe` is tried every `open_s`, rarer where it goes on for long, on a thread that lives as long
    as the breaker is open; with no probe, or an `open_s` of 0, one call in `open_s` is let through to try. `changed` is
    told True when the server is believed to work again, and False when not.
    """

    def __init__(self, open_s: float, changed: Callable[[bool], None] = lambda closed: None) -> None:
        self.open_s = open_s
        self._changed = changed
        self._lock = threading.Lock()
        self._failing = False
        self._num_doubts = 0
        self.heard_at = float("-inf")
        """When the server last worked, in monotonic seconds."""
        self.num_failures = 0
        """How often it has opened, or could have."""
        self._retry_at = 0.0
        self._last_error = ""
        self._failed_at = 0.0
        self._closed = threading.Event()
        self.probe: Callable[[], None] | None = None
        """Raises TierError where the server does not work. Must not ask this breaker."""

    def admit(self) -> None:
        """Raises TierUnavailable unless a call may be made now."""
        if not self._failing:
            return
        if not self.refuses:
            with self._lock:
                if not self.refuses:
                    # This call is the probe; others wait for its outcome.
                    self._retry_at = time.monotonic() + self.open_s
                    return
        raise TierUnavailable(TIER, f"not tried again yet after: {self._last_error}")

    @property
    def is_open(self) -> bool:
        """Whether the server is believed not to work. Waits for nobody."""
        return self._failing

    @property
    def refuses(self) -> bool:
        """Whether a call made now would be refused. Waits for nobody."""
        return self._failing and (self._probes or time.monotonic() < self._retry_at)

    @property
    def _probes(self) -> bool:
        return self.probe is not None and self.open_s > 0

    def _keep_probing(self, probe: Callable[[], None]) -> None:
        began_at = time.monotonic()
        while self._failing:
            away_s = time.monotonic() - began_at
            wait_s = min(max(self.open_s, _RARER * away_s), _MOST_RARE * self.open_s)
            if self._closed.wait(wait_s * random.uniform(0.8, 1.0)):  # stores that lost it at once do not come at once
                return
            try:
                probe()
            except TierError as error:
                self._last_error = str(error)
            else:
                self.succeeded()

    def close(self) -> None:
        """Probe no more."""
        self._closed.set()

    def succeeded(self) -> None:
        """The server answered."""
        self._num_doubts = 0
        self.heard_at = time.monotonic()
        if not self._failing:
            return
        with self._lock:
            if self._failing:
                self._failing = False
                self._changed(True)
                away_s = time.monotonic() - self._failed_at
                log.info("redis: answers again (it was off for %.3g s after: %s)", away_s, self._last_error)

    def failed(self, error: TierError) -> None:
        """The server cannot be reached, refuses, or said nothing for a fair time."""
        with self._lock:
            self._num_doubts = 0
            self.num_failures += 1
            self._last_error = str(error)
            self._retry_at = time.monotonic() + self.open_s
            if self._failing:
                return
            self._failing = True
            self._failed_at = time.monotonic()
            self._changed(False)
        log.warning("redis: off until it answers again: %s", error)
        if self.probe is not None and self._probes:
            thread = threading.Thread(target=self._keep_probing, args=(self.probe,), daemon=True)
            thread.name = "kvstore-redis-probe"
            thread.start()

    def doubted(self, error: TierError) -> None:
        """A short deadline passed in silence: the server may just be busy. A few of these in a row are a failure."""
        self._num_doubts += 1
        if self._failing or self._num_doubts >= _DOUBTS_ARE_FAILURE:
            self.failed(error)
