# SPDX-License-Identifier: Apache-2.0
"""From a hold to a load: a lease is made of its pins, and what lies in lower tiers is fetched on threads of their own.

Invariants
1. A load has what its hold had, as far as that was still pinned when the lease began; of a hold that expired, nothing.
2. The beginning of another chain's block comes last, after the host's run, and never with blocks of lower tiers.
3. Closing the store ends what loads wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakSet

from kvstore.clock import Clock
from kvstore.config import RequestOptions
from kvstore.delivery import LoadPlan
from kvstore.holds import Hold
from kvstore.lease import LeaseBook
from kvstore.load import BlockLoad
from kvstore.lookup import Sources, first_of
from kvstore.lower_tiers import meet
from kvstore.mover import Mover
from kvstore.stats import Stats
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier


class Loading:
    """The loads of a store. Thread-safe."""

    def __init__(
        self,
        host: HostTier,
        tiers: Sequence[Tier],
        leases: LeaseBook,
        mover: Mover,
        settings: RequestOptions,
        clock: Clock,
        stats: Stats,
    ) -> None:
        self._host = host
        self._tiers = tiers
        self._leases = leases
        self._mover = mover
        self._settings = settings
        self._clock = clock
        self._stats = stats
        self._loads: WeakSet[BlockLoad] = WeakSet()  # so that closing the store ends what they are waiting for
        self._threads = ThreadPoolExecutor(settings.io_threads, thread_name_prefix="kvstore-fetch")

    def begin(self, hold: Hold, num_blocks: int | None, *, start: int, partial_tokens: int) -> BlockLoad:
        """A load of what `hold` has, which is nobody else's; for the arguments see `kvstore.api.Store.load`."""
        if not self._leases.renew(hold.lease, self._clock.now_s() + self._settings.lease_s):
            return self._begin(hold, 0, 0, ())
        num_host = hold.num_host
        if 0 < partial_tokens <= hold.num_partial_tokens and num_blocks in (None, num_host):
            # Nothing of lower tiers comes after it: it would have the same place.
            self._stats.add("host.partial_hit_tokens", partial_tokens)
            return self._begin(hold, min(start, num_host), num_host + 1, ())
        sources = hold.sources()
        stop = num_host + sum(count for _, count in sources)
        stop = stop if num_blocks is None else min(stop, num_blocks)
        return self._begin(hold, min(start, stop), min(num_host, stop), first_of(sources, stop - num_host))

    def _begin(self, hold: Hold, start: int, num_host_blocks: int, sources: Sources) -> BlockLoad:
        plan = LoadPlan(
            chain=hold.chain,
            layout=hold.layout,
            parts=hold.parts,
            start=start,
            num_host_blocks=num_host_blocks,
            sources=sources,
            hint=hold.hint,
            read_deadline_s=self._settings.read_deadline_s,
            now_s=self._clock.now_s,
            lease_s=self._settings.lease_s,
            stays=self._mover.stays,
        )
        load = BlockLoad(plan, self._host, self._leases, hold.lease, self._stats)
        self._loads.add(load)
        host_bytes = (plan.num_host_blocks - plan.start) * sum(hold.layout.parts[part].num_bytes for part in hold.parts)
        self._stats.add_all({"load.requests": 1, "host.read_bytes": max(0, host_bytes)})
        if sources:
            meet(self._tiers, hold.chain.root)
            self._threads.submit(self._fetch, load.begin_fetch(), plan)
        return load

    def _fetch(self, bring: Callable[[], None], plan: LoadPlan) -> None:
        try:
            bring()
            self._mover.came_up(plan.chain, plan.stop, plan.parts)
        except Exception:  # a thread's top: the load has ended, shorter
            self._stats.add("load.errors")
            raise

    def stop(self) -> None:
        """Bring in no more; loads that wait for something end."""
        for load in list(self._loads):
            load.stop()

    def close(self) -> None:
        """When nothing is brought in any more."""
        self._threads.shutdown(wait=True)
