# SPDX-License-Identifier: Apache-2.0
"""Leases of loads that workers carry out: held by the scheduler's side from the order to the last worker's report.

Invariants
1. A load that was begun is ordered once, shared or, where that fails or takes too long, to be reported as failed.
2. Its lease is kept until every worker has reported, though the request may be gone: they may be copying from it.
3. Until then what is computed on its pages is not known to stand on the right KV: see `are_under`. Other requests may
   be computing on them too, since the engine's own prefix cache has the pages of a load from its step on.
4. A lease is let go of, whatever the store does meanwhile: a sidecar keeps those of a living engine for ever.
5. Nothing here waits: not for blocks to come, nor for a tier's read to end.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from connectors.base import FailOpen
from connectors.vllm_plan import LoadOrder, LoadReport, Tables, pages_of
from kvstore.api import Load


@dataclass(slots=True)
class _Lease:
    """A load of blocks `start` … `stop`; None where the store did not give it.

    `pages`: into which it goes in a step; beside the steps nobody computes on them.
    """

    load: Load | None
    start: int
    stop: int
    pages: frozenset[int]
    report: LoadReport | None = None


@dataclass(frozen=True, slots=True)
class _Sharing:
    """A load that workers hear of when they can take part in it."""

    order: LoadOrder
    lease: Future[object]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class EndedLoad:
    """A load of blocks `start` … `stop` that every worker has reported; `pages` as in `_Lease`."""

    start: int
    stop: int
    pages: frozenset[int]
    report: LoadReport

    @property
    def failed(self) -> bool:
        """Whether a part of it has to be computed."""
        return self.report.stop < self.stop


class LoadLeases:
    """See the module. For the scheduler's thread. `share` makes of a load what a worker's store can take up."""

    def __init__(
        self,
        share: Callable[[Load], object],
        fail_open: FailOpen,
        *,
        num_ranks: int,
        num_threads: int,
        page_tokens: int,
        now_s: Callable[[], float],
    ) -> None:
        self._share = share
        self._fail_open = fail_open
        self._num_ranks = num_ranks
        self._page_tokens = page_tokens
        self._now_s = now_s
        self._leases: dict[str, _Lease] = {}
        self._orders: list[LoadOrder] = []
        self._sharing: list[_Sharing] = []
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kvstore-share")

    def __contains__(self, request_id: str) -> bool:
        """Whether a load of the request was begun and not reported by every worker."""
        return request_id in self._leases

    def are_under(self, tables: Tables) -> bool:
        """Whether what is computed with these page tables may stand on a load that not every worker has reported."""
        under = [lease.pages for lease in self._leases.values() if lease.pages]
        return any(not pages.isdisjoint(table) for pages in under for table in tables)

    def begin(self, order: LoadOrder, load: Load | None) -> None:
        """Order a load as soon as it can be shared. None, which the store did not give, workers report as failed."""
        stretch = pages_of(order.tables, self._page_tokens, order.first_token, order.stop_token)
        self._leases[order.request] = _Lease(load, order.start, order.stop, frozenset(stretch if order.in_step else ()))
        if load is None:
            self._orders.append(order)
        elif order.in_step:
            self._orders.append(replace(order, lease=self._shared(load)))
        else:
            # Sharing may wait for blocks of lower tiers, which this thread must not.
            sharing = self._pool.submit(self._shared, load)
            self._sharing.append(_Sharing(order, sharing, self._now_s() + order.timeout_s))

    def _shared(self, load: Load) -> object:
        return self._fail_open.call(lambda: self._share(load), None)

    def take_orders(self) -> tuple[LoadOrder, ...]:
        """What workers are to be told in the step at hand, each once."""
        if self._sharing:
            waiting, now_s = [], self._now_s()
            for item in self._sharing:
                if item.lease.done():
                    left_s = max(0.0, item.deadline_s - now_s)
                    self._orders.append(replace(item.order, lease=item.lease.result(), timeout_s=left_s))
                elif now_s >= item.deadline_s:
                    self._orders.append(item.order)
                else:
                    waiting.append(item)
            self._sharing = waiting
        orders, self._orders = tuple(self._orders), []
        return orders

    def void(self) -> None:
        """What was not ordered yet is of before a reset: it is to fail."""
        self._orders += [item.order for item in self._sharing]
        self._sharing = []

    def reported(self, request_id: str, report: LoadReport) -> EndedLoad | None:
        """A worker's news, or several's; the load and its end where it was the last's."""
        lease = self._leases.get(request_id)
        if lease is None:
            return None
        lease.report = report if lease.report is None else lease.report.joined(report)
        if lease.report.num_ranks < self._num_ranks:
            return None
        del self._leases[request_id]
        ended = EndedLoad(lease.start, lease.stop, lease.pages, lease.report)
        if lease.load is not None and ended.failed:
            self._pool.submit(self._let_go, lease.load)  # a tier may still be writing, which closing waits for
        elif lease.load is not None:
            self._let_go(lease.load)
        return ended

    def _let_go(self, load: Load) -> None:
        self._fail_open.let_go(load.close)

    def close(self) -> None:
        for lease in self._leases.values():
            if lease.load is not None:
                self._let_go(lease.load)
        self._leases.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check(self) -> list[str]:
        """What is still held; empty when no load is under way."""
        return [f"the load of {name} was not reported" for name in self._leases]
