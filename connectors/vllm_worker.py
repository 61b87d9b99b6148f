# SPDX-License-Identifier: Apache-2.0
"""A worker's side of the vLLM connector: copies between the engine's pages and the store's slots.

Invariants
1. Every load that was ordered is reported, by its deadline at the latest, aborted requests' too.
2. Once a load is reported, nothing of it writes to the engine's pages any more.
3. Nothing is saved in a step in which a page it builds on failed to load.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from connectors.base import FailOpen
from connectors.vllm_identity import Roots
from connectors.vllm_pages import EnginePages
from connectors.vllm_plan import LoadOrder, LoadReport, Orders, Report, SaveOrder, VllmSettings, failed_pages
from kvstore.api import Load, LoadedBlock, SaysWhole, Store
from kvstore.block import Chain, ModelId
from kvstore.transfer import Moment, SlotViews

log = logging.getLogger("kvstore.connector.vllm")

_IDLE_WAIT_S = 0.002
"""How long a step without work waits for a load: longer delays new requests, shorter only spins."""


_COPIERS = min(4, len(os.sched_getaffinity(0)))
"""Threads that copy one load together. Two copied 64 MiB of packed pages in 10 ms where one took 20."""

_FEW = 4
"""Blocks that are not worth waking a thread for."""


@dataclass(eq=False)
class _Job:
    """One load. Whoever copies holds one of `locks` for each block, and nobody else that one."""

    order: LoadOrder
    deadline_s: float
    after: Moment | None
    """What the engine had ordered when the load was."""
    locks: tuple[threading.Lock, ...]
    cancelled: bool = False
    ended: bool = False
    stop: int = 0
    """Blocks up to here are in place."""
    seconds: dict[str, float] = field(default_factory=dict)
    num_blocks: dict[str, int] = field(default_factory=dict)

    def cancel(self) -> None:
        """Nothing of it writes to the engine's pages afterwards."""
        self.cancelled = True
        for lock in self.locks:
            with lock:  # whoever takes it next sees that the load is cancelled
                pass

    def note(self, tier: str, num_blocks: int, seconds: float) -> None:
        self.seconds[tier] = self.seconds.get(tier, 0.0) + seconds
        self.num_blocks[tier] = self.num_blocks.get(tier, 0) + num_blocks


class WorkerSide:
    """See the module. `adopt` makes a Load of what the scheduler's side shared."""

    def __init__(
        self,
        settings: VllmSettings,
        model: ModelId,
        store: Store,
        adopt: Callable[[object], Load],
        pages: EnginePages,
        *,
        saves: bool = True,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._adopt = adopt
        self._pages = pages
        self._saves = saves and settings.save
        self._now_s = now_s
        self._roots = Roots(model, settings.secret.encode())
        layout = store.open(model)
        self._block_tokens = model.block_tokens
        self._block_bytes = sum(layout.parts[part].num_bytes for part in pages.parts)
        self.fail_open = FailOpen(now_s=now_s)
        self._chains: dict[str, Chain] = {}
        self._jobs: dict[str, _Job] = {}
        self._ended = threading.Condition()
        self._bad_pages: set[int] = set()
        self._bad_now: set[int] = set()
        self._sent: set[str] = set()
        self._report = Report()
        self._pool = ThreadPoolExecutor(settings.load_threads, thread_name_prefix="kvstore-load")
        self._helpers = ThreadPoolExecutor(max(1, _COPIERS - 1), thread_name_prefix="kvstore-copy")

    # -- loading -----------------------------------------------------------------------------------------------

    def load(self, orders: Orders) -> None:
        """Carry out loads that belong to this step, start the others. Before the forward pass where any is in it."""
        for order in orders.loads:
            locks = tuple(threading.Lock() for _ in range(_COPIERS))
            job = _Job(order, self._now_s() + order.timeout_s, self._pages.now(), locks, stop=order.start)
            if order.in_step:
                self._run(job)
                self._note(job)
            else:
                self._jobs[order.request] = job
                self._pool.submit(self._run, job)

    def _run(self, job: _Job) -> None:
        sound = False
        try:
            sound = self.fail_open.call(lambda: self._copy(job), False)
        except Exception:  # the top of a load: a fault of ours costs a computation, not the engine
            log.exception("a load of request %s failed", job.order.request)
        finally:
            with self._ended:
                if not sound:
                    job.stop = job.order.start  # something may be wrong with any of it: none counts
                job.ended = True
                self._ended.notify_all()

    def _copy(self, job: _Job) -> bool:
        """Copy blocks in; True where all that was copied is sound. Raises what the store raises."""
        order = job.order
        if order.lease is None:
            return True
        with self._adopt(order.lease) as load:
            # On a device copies go side by side as it is, and from one thread.
            if _COPIERS > 1 and job.after is None and isinstance(load, SaysWhole) and load.is_whole:
                self._copy_whole(job, load)
            else:
                self._copy_coming(job, load)
            return load.intact()

    def _copy_coming(self, job: _Job, load: Load) -> None:
        """Copy blocks as they come."""
        at, then_s = job.order.start, self._now_s()
        for block in load:
            if block.index != at or at >= job.order.stop or not self._copy_some(job, 0, [block]):
                return
            at += 1
            job.stop = at
            now_s = self._now_s()
            job.note(block.tier, 1, now_s - then_s)
            then_s = now_s

    def _copy_whole(self, job: _Job, load: Load) -> None:
        """Copy blocks that are all there on several threads: one alone does not reach what memory can do."""
        order, began_s = job.order, self._now_s()
        blocks: list[LoadedBlock] = []
        for block in load:
            if block.index != order.start + len(blocks) or block.index >= order.stop:
                break
            blocks.append(block)
        size = max(1, -(-len(blocks) // _COPIERS))
        mine, *others = [blocks[at : at + size] for at in range(0, max(1, len(blocks)), size)]
        helping = [self._helpers.submit(self._copy_some, job, at, some) for at, some in enumerate(others, 1)]
        try:
            counts = [self._copy_some(job, 0, mine)]
        finally:
            wait(helping)  # nothing may write once this has returned
        counts += [done.result() for done in helping]
        num_blocks = 0
        for some, count in zip([mine, *others], counts, strict=True):
            num_blocks += count
            if count < len(some):
                break
        job.stop = order.start + num_blocks
        seconds = self._now_s() - began_s
        for tier, count in Counter(block.tier for block in blocks[:num_blocks]).items():
            job.note(tier, count, seconds * count / num_blocks)

    def _copy_some(self, job: _Job, copier: int, blocks: Sequence[LoadedBlock]) -> int:
        """Copy blocks until the load is cancelled or late; how many were."""
        order = job.order
        tokens = range(order.first_token, order.stop_token)
        for at, block in enumerate(blocks):
            with job.locks[copier]:
                if job.cancelled or self._now_s() > job.deadline_s:
                    return at
                # A match is over all parts, so that a hit is one on every rank; this rank copies its own.
                views = [block.views[part] for part in self._pages.parts]
                self._pages.scatter(order.pages, block.index, views, tokens, job.after)
        return len(blocks)

    def _note(self, job: _Job) -> None:
        """Report a load that has ended, or is given up now."""
        order = job.order
        job.cancel()
        stop = job.stop if job.ended else order.start
        if stop < order.stop:
            first = max(stop * self._block_tokens, order.first_token)
            failed = failed_pages(order.pages, self._pages.page_tokens, first, order.stop_token)
            self._bad_pages.update(failed)
            if order.in_step:  # a request whose load ran beside the steps was not in this one
                self._bad_now.update(failed)
        self._report.loads[order.request] = LoadReport(
            stop,
            seconds=dict(job.seconds),
            num_bytes={tier: count * self._block_bytes for tier, count in job.num_blocks.items()},
        )

    def finished(self, *, idle: bool) -> tuple[set[str], set[str]]:
        """(requests whose last save is done, requests whose load has ended, well or not), each named once."""
        if self._jobs and idle:
            with self._ended:
                self._ended.wait_for(lambda: any(job.ended for job in self._jobs.values()), _IDLE_WAIT_S)
        now_s = self._now_s()
        received = {name for name, job in self._jobs.items() if job.ended or now_s >= job.deadline_s}
        for name in received:
            self._note(self._jobs.pop(name))
        sent, self._sent = self._sent, set()
        return sent, received

    def bad_pages(self) -> set[int]:
        """Pages of loads reported since the last call that the engine must compute."""
        bad, self._bad_pages = self._bad_pages, set()
        return bad

    # -- saving ------------------------------------------------------------------------------------------------

    def save(self, orders: Orders) -> None:
        """Copy out and publish what the step has filled."""
        for order in orders.saves:
            try:
                if self._bad_now.intersection(order.pages):
                    # Computed on top of pages that did not load: the engine is about to compute it again.
                    self._report.unsaved[order.request] = order.start
                    self._grow(order)
                elif self._grow(order) and self._saves:
                    self._publish(order)
            finally:
                if order.holds:
                    self._sent.add(order.request)
                    self._chains.pop(order.request, None)
        self._bad_now.clear()
        for request in orders.ended:
            self._chains.pop(request, None)

    def _grow(self, order: SaveOrder) -> bool:
        """Extend this worker's copy of the chain; False where it does not fit what the scheduler's side knows."""
        if order.known == 0:
            self._chains[order.request] = Chain(self._roots.root(order.adapter, order.salt))
        chain = self._chains.get(order.request)
        if chain is None or chain.num_tokens != order.known:
            return False
        chain.extend(np.frombuffer(order.tokens, "<u4").astype(np.uint32), media=order.media)
        return True

    def _publish(self, order: SaveOrder) -> None:
        """Save one order's blocks; where the store fails, they are to be ordered again."""
        began_s = self._now_s()
        done = self.fail_open.call(lambda: self._copy_out(order), None)
        if done is None:
            self._report.unsaved[order.request] = order.start
            return
        self._count("saved_blocks", done[0])
        self._count("refused_blocks", done[1])
        self._count("save_s", self._now_s() - began_s)

    def _copy_out(self, order: SaveOrder) -> tuple[int, int]:
        """(blocks published, blocks refused). Raises what the store raises."""
        chain = self._chains[order.request]
        with self._store.save(chain, order.start, order.stop, parts=self._pages.parts, hint=order.hint) as save:
            self._gather(order.pages, [(index, save.views(index)) for index in save.indices])
            return save.commit(*save.indices) if save.indices else 0, save.num_refused

    def _gather(self, pages: Sequence[int], blocks: Sequence[tuple[int, SlotViews]]) -> None:
        """Copy blocks out, on several threads: the engine waits, its cores are idle. On one, 16 MiB took 5 ms."""

        def some(those: Sequence[tuple[int, SlotViews]]) -> None:
            for index, views in those:
                self._pages.gather(pages, index, views)

        copiers = _COPIERS if self._pages.now() is None else 1  # on a device copies go side by side as it is
        size = max(_FEW, -(-len(blocks) // copiers))
        helping = [self._helpers.submit(some, blocks[at : at + size]) for at in range(size, len(blocks), size)]
        try:
            some(blocks[:size])
        finally:
            wait(helping)  # nothing may write to slots that are given up
        for done in helping:
            done.result()

    def _count(self, name: str, value: float) -> None:
        if value:
            self._report.counts[name] = self._report.counts.get(name, 0.0) + value

    # -- reports -----------------------------------------------------------------------------------------------

    def report(self) -> Report | None:
        """News for the scheduler's side; None for none."""
        if not self._report:
            return None
        taken, self._report = self._report, Report()
        return taken

    def close(self) -> None:
        for job in self._jobs.values():
            job.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._helpers.shutdown(wait=True)
