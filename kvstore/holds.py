# SPDX-License-Identifier: Apache-2.0
"""Holds: what a match leaves behind for a short while under its request's id, so that nothing is gone before the load.

Invariants
1. A request has one hold: to match again replaces it, and returns the pins of the one before.
2. It ends once: by a load, which makes a lease of it, by being forgotten, or by its deadline, which returns its pins.
3. One whose deadline has passed is known for a while longer: a load that comes late is told that there is nothing, not
   that it never matched.
4. Lock order: holds → leases → pool. No tier is asked and no lease of another's ended under the lock.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.api import HOST_TIER, Hint, Match
from kvstore.block import Chain
from kvstore.layout import BlockLayout
from kvstore.lease import Lease, LeaseBook
from kvstore.lookup import Lookup, Sources
from kvstore.marks import Marks
from kvstore.pool import BlockPool, part_mask

_DEAD_HOLD_S = 60.0


@dataclass(slots=True)
class Hold:
    """A chain that a request was matched with, and what was found of it."""

    chain: Chain
    layout: BlockLayout
    parts: tuple[int, ...]
    lease: Lease
    hint: Hint
    num_host: int
    """Blocks of the chain among the lease's rows; one row after them is another chain's, which begins alike."""
    lookup: Lookup | None = None
    """What lower tiers hold of it; None where they were not asked."""
    put_off: bool = False
    """They are to be asked when it is matched again."""
    num_partial_tokens: int = 0

    def sources(self) -> Sources:
        """What lower tiers hold after the host's run, as far as they have answered."""
        return () if self.lookup is None else self.lookup.sources(self.num_host)

    def match(self, marks: Marks) -> Match:
        """What was found, as far as is known by now."""
        # Looked at before the answer is: one that comes in between is told of next time, and not taken for none.
        settled = not self.put_off if self.lookup is None else self.lookup.settled
        num_host, sources = self.num_host, self.sources()
        num_blocks = num_host + sum(count for _, count in sources)
        tiers = (((HOST_TIER, num_host),) if num_host else ()) + tuple((tier.name, count) for tier, count in sources)
        num_pending = marks.run(self.chain.root.id, self.chain.ids, num_blocks)
        if self.lookup is not None:
            num_pending = max(num_pending, self.lookup.pending_to - num_blocks)
        return Match(
            num_blocks=num_blocks,
            num_host_blocks=num_host,
            num_pending_blocks=num_pending,
            settled=settled,
            tiers=tiers,
        )


class Holds:
    """The holds of a store, by request. Thread-safe."""

    def __init__(self, pool: BlockPool, leases: LeaseBook) -> None:
        self._pool = pool
        self._leases = leases
        self._lock = threading.Lock()
        self._holds: dict[str, Hold] = {}

    def put(self, request: str, hold: Hold) -> bool:
        """Keep `hold`, with what the request's hold before knows of the same chain; True where it had none."""
        with self._lock:
            before = self._holds.get(request)
            known = None if before is None else before.lookup
            if known is not None and known.serves(hold.chain, hold.parts, hold.num_host):
                hold.lookup = known
            self._holds[request] = hold
        if before is not None:
            self._leases.release(before.lease)
        return before is None

    def find(self, request: str) -> Hold | None:
        """The request's hold, which stays."""
        with self._lock:
            return self._holds.get(request)

    def take(self, request: str) -> Hold | None:
        """The request's hold, for a load to make a lease of: nobody else gets it."""
        with self._lock:
            return self._holds.pop(request, None)

    def forget(self, request: str) -> None:
        """End the request's hold, if it has one."""
        if (hold := self.take(request)) is not None:
            self._leases.release(hold.lease)

    def hold_similar(self, request: str, index: int, tokens: npt.NDArray[np.uint32]) -> int:
        """Hold a block, too, that follows the first `index` and begins with some of `tokens`; returns how many.

        Asked again it says the same. 0 where that is not where the host's run ends, and where more follows it below.
        """
        # All of it under the lock: of two calls at once, each would pin a block, and a load would hand out the first
        # one's for as many tokens as the second one's begins alike.
        with self._lock:
            hold = self._holds.get(request)
            if hold is None or hold.num_host != index or hold.sources():
                return 0
            if not hold.num_partial_tokens:
                chain, need = hold.chain, part_mask(hold.layout, hold.parts)
                before = chain.ids[index - 1] if index else None
                row, num_tokens = self._pool.pin_similar(before, tokens, need, chain.root.id)
                if num_tokens and self._leases.append(hold.lease, row):
                    hold.num_partial_tokens = num_tokens
            return hold.num_partial_tokens

    def sweep(self, now_s: float) -> None:
        """Know no more of holds that ended long ago, by their deadlines."""
        with self._lock:
            dead = [
                request
                for request, hold in self._holds.items()
                if not hold.lease.alive and hold.lease.deadline_s < now_s - _DEAD_HOLD_S
            ]
            for request in dead:
                del self._holds[request]

    def __contains__(self, request: str) -> bool:
        return request in self._holds
