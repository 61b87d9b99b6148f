# SPDX-License-Identifier: Apache-2.0
"""A worker's loads under way, from their orders to their reports: in a step, or beside the steps.

Invariants
1. Every load that was ordered is reported, by its deadline at the latest, aborted requests' too. What of it must be
   computed is said by pages, or, where the engine does not keep all (`keeps_all`), by the request, which has nothing
   then: what layers with a window would need for computing the rest lies in pages that it did not get for the load.
2. Once a load is reported, nothing of it writes to the engine's pages any more.
3. On a device a load that belongs to a step is settled, and its failure known, before the step's results are reported.
4. What was ordered before a reset counts for nothing after it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field

from connectors.base import FailOpen
from connectors.vllm_device import DeviceLoad
from connectors.vllm_pages import DevicePages, EnginePages
from connectors.vllm_plan import LoadOrder, LoadReport, Report, VllmSettings, pages_of
from kvstore.api import Load, LoadedBlock, SaysWhole
from kvstore.layout import BlockLayout

log = logging.getLogger("kvstore.connector.vllm")

_IDLE_WAIT_S = 0.002
"""How long a step without work waits for a load: longer delays new requests, shorter only spins."""

_COPIERS = min(4, len(os.sched_getaffinity(0)))
"""Threads that copy one load beside the steps."""

_AT_ONCE = 8
"""Blocks that a load copies between two looks at whether it still should: each call costs 20 µs beside the copy."""

_AT_ONCE_IN_STEP = 64
"""The same of a load that a step waits for, which was predicted to take little: each call takes two passages."""


@dataclass(eq=False)
class _Job:
    """One load. Whoever copies holds one of `locks` for each block, and nobody else that one."""

    order: LoadOrder
    deadline_s: float
    locks: tuple[threading.Lock, ...]
    copies: DeviceLoad | None = None
    """Where the pages are a device's."""
    held: ExitStack = field(default_factory=ExitStack)
    load: Load | None = None
    """What lets go of the load, and the load, if it was begun, where it belongs to a step and pages are a device's."""
    cancelled: bool = False
    void: bool = False
    """What it holds is of before a reset."""
    ended: bool = False
    stop: int = 0
    """Blocks up to here are in place."""
    seconds: dict[str, float] = field(default_factory=dict)
    num_blocks: dict[str, int] = field(default_factory=dict)

    def cancel(self) -> None:
        """Nothing of it writes to the engine's pages afterwards."""
        self.cancelled = True
        if self.copies is not None and not self.ended:
            self.copies.give_up()
        for lock in self.locks:
            with lock:  # whoever takes it next sees that the load is cancelled
                pass

    def note(self, tier: str, num_blocks: int, seconds: float) -> None:
        self.seconds[tier] = self.seconds.get(tier, 0.0) + seconds
        self.num_blocks[tier] = self.num_blocks.get(tier, 0) + num_blocks


class WorkerLoads:
    """See the module. For the engine's thread. What `adopt`, `layers` and `pages` are, `WorkerSide` says.

    Attributes:
        beside: loads beside the steps, by request, until they are reported.
        in_step: those of the step at hand on a device, until they are settled.
    """

    def __init__(
        self,
        settings: VllmSettings,
        layout: BlockLayout,
        adopt: Callable[[object], Load],
        pages: EnginePages | DevicePages,
        fail_open: FailOpen,
        report: Report,
        *,
        layers: range,
        keeps_all: bool,
        now_s: Callable[[], float],
    ) -> None:
        self._adopt = adopt
        self._pages = pages
        self._device = pages if isinstance(pages, DevicePages) else None
        self._host = None if isinstance(pages, DevicePages) else pages
        self._fail_open = fail_open
        self._report = report
        self._layers = layers
        self._step_layers = settings.step_layers
        self._block_tokens = layout.model.block_tokens
        self._block_bytes = sum(layout.parts[part].num_bytes for part in pages.parts)
        self._now_s = now_s
        self.beside: dict[str, _Job] = {}
        self.in_step: list[_Job] = []
        self._keeps_all = keeps_all
        self._bad_pages: set[int] = set()
        self._failed: set[str] = set()
        self._ended = threading.Condition()
        self._pool = ThreadPoolExecutor(settings.load_threads, thread_name_prefix="kvstore-load")
        self._helpers = ThreadPoolExecutor(max(1, _COPIERS - 1), thread_name_prefix="kvstore-copy")

    def begin(self, order: LoadOrder, *, layered: bool) -> None:
        """Carry out a load that belongs to the step at hand, or start one beside the steps."""
        locks = tuple(threading.Lock() for _ in range(_COPIERS))
        job = _Job(order, self._now_s() + order.timeout_s, locks, stop=order.start)
        if self._device is not None:
            step_layers = self._step_layers if layered and order.in_step else 0
            job.copies = DeviceLoad(self._device, order, self._device.now(), self._block_bytes, step_layers)
        if order.in_step and job.copies is not None:
            copies = job.copies
            self._fail_open.call(lambda: self._begin(job, copies), None)
            self.in_step.append(job)
        elif order.in_step:
            self._run(job)
            self._note(job)
        else:
            self.beside[order.request] = job
            self._pool.submit(self._run, job)

    def void(self) -> None:
        """What is under way is of before a reset."""
        for job in self.beside.values():
            job.void = job.cancelled = True

    def take_ended(self, *, idle: bool) -> set[str]:
        """Requests whose load beside the steps has ended, well or not, each named once.

        Where a step is `idle` one is waited for, a moment.
        """
        if not self.beside:
            return set()
        if idle:
            with self._ended:
                self._ended.wait_for(lambda: any(job.ended for job in self.beside.values()), _IDLE_WAIT_S)
        now_s = self._now_s()
        ended = {name for name, job in self.beside.items() if job.ended or now_s >= job.deadline_s}
        for name in ended:
            self._note(self.beside.pop(name))
        return ended

    def take_bad(self) -> set[int]:
        """Pages of loads reported since the last call that the engine must compute."""
        bad, self._bad_pages = self._bad_pages, set()
        return bad

    def take_failed(self) -> set[str]:
        """Requests of loads that ended since the last call, of which the engine must compute all."""
        failed, self._failed = self._failed, set()
        return failed

    def _run(self, job: _Job) -> None:
        self._end(job, sound=self._fail_open.call(lambda: self._copy(job), False))

    def _end(self, job: _Job, *, sound: bool) -> None:
        with self._ended:
            if not sound:
                job.stop = job.order.start  # something may be wrong with any of it: none counts
            job.ended = True
            self._ended.notify_all()

    # On a device: begun before the forward pass, which waits for it; settled when the pass is on its way.

    def _begin(self, job: _Job, copies: DeviceLoad) -> None:
        if job.order.lease is None:
            return
        load = job.held.enter_context(self._adopt(job.order.lease))
        try:
            self._bring(job, copies, load)
        finally:
            if not copies.step_layers:
                copies.wait_for()
        job.load = load

    def _bring(self, job: _Job, copies: DeviceLoad, load: Load) -> None:
        """Begin copies, and finish those of blocks that do not stay."""
        then_s = self._now_s()

        def note(tier: str, num_blocks: int) -> bool:
            nonlocal then_s
            before_s, then_s = then_s, self._now_s()
            if job.cancelled or then_s > job.deadline_s:
                return False
            job.note(tier, num_blocks, then_s - before_s)
            return True

        try:
            job.stop = copies.bring(load, note)
        except BaseException:
            copies.finish()
            raise

    @property
    def go_by_layers(self) -> bool:
        """Whether the forward pass of this step has to say before which layer it is."""
        return any(job.copies is not None and job.copies.step_layers for job in self.in_step)

    def wait_for_layer(self, layer: int) -> None:
        """On the engine's thread, before what of the forward pass reads the KV of `layer` is ordered."""
        for job in self.in_step:
            if job.copies is not None and job.copies.step_layers:
                job.copies.wait_for(layer)

    def settle(self) -> None:
        """Wait for the copies of this step's loads, as the pass does, and see whether they count."""
        if not self.in_step:
            return
        jobs, self.in_step = self.in_step, []
        for job in jobs:
            assert job.copies is not None
            began_s, late = self._now_s(), not job.copies.is_done
            job.copies.finish()  # whatever the store does
            for tier, count in job.num_blocks.items() if late else ():
                # What was done before is not known; that it was quick is near enough.
                job.seconds[tier] += (self._now_s() - began_s) * count / sum(job.num_blocks.values())
            sound: list[bool] = []
            # Where the store rests as well: what was copied is as good, and the load must be let go of.
            self._fail_open.let_go(lambda job=job, sound=sound: sound.append(self._is_sound(job)))  # type: ignore[misc]
            self._end(job, sound=any(sound))
            self._note(job)

    def _is_sound(self, job: _Job) -> bool:
        """Let go of the load; True where what was copied is what it held, and the pass read nothing before."""
        with job.held:
            if job.load is None or job.copies is None:
                return False
            if not job.copies.was_waited_for(self._layers):
                self._step_layers = 0
                log.warning("the engine did not wait layer by layer as it does elsewhere: it computes one load again")
                return False
            return job.load.intact()

    def _copy(self, job: _Job) -> bool:
        """Copy blocks in; True where all that was copied is sound. Raises what the store raises."""
        order = job.order
        if order.lease is None or job.cancelled:
            return True
        with self._adopt(order.lease) as load:
            if job.copies is not None:
                self._bring(job, job.copies, load)
                began_s = self._now_s()
                job.copies.finish()
                for tier, count in job.num_blocks.items():
                    job.seconds[tier] += (self._now_s() - began_s) * count / sum(job.num_blocks.values())
            elif isinstance(load, SaysWhole) and load.is_whole:
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
        """Copy blocks that are all there on several threads: one alone does not reach what memory can do.

        In a step those are the engine's own. Threads of ours may use only the CPUs of the one that made them, and vLLM
        pins that to one: two took 6.9 to 7.9 ms for 64 MiB, as long as one. Let run elsewhere and begun when pages were
        the request's, they stood in the way of the threads that prepare the step: 4.3 ms instead of 1.1.
        """
        order, began_s = job.order, self._now_s()
        blocks: list[LoadedBlock] = []
        for block in load:
            if block.index != order.start + len(blocks) or block.index >= order.stop:
                break
            blocks.append(block)
        size = max(1, len(blocks) if order.in_step else -(-len(blocks) // _COPIERS))
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
        order, pages = job.order, self._host
        assert pages is not None
        tokens = range(order.first_token, order.stop_token)
        at_once = _AT_ONCE_IN_STEP if order.in_step else _AT_ONCE
        for at in range(0, len(blocks), at_once):
            with job.locks[copier]:
                if job.cancelled or self._now_s() > job.deadline_s:
                    return at
                # A match is over all parts, so that a hit is one on every rank; this rank copies its own.
                some = [
                    (block.index, [block.views[part] for part in self._pages.parts])
                    for block in blocks[at : at + at_once]
                ]
                pages.scatter(order.tables, some, tokens, together=order.in_step)
        return len(blocks)

    def _note(self, job: _Job) -> None:
        """Report a load that has ended, or is given up now."""
        order = job.order
        job.cancel()
        stop = job.stop if job.ended and not job.void else order.start
        if stop < order.stop and not self._keeps_all:
            self._failed.add(order.request)
        elif stop < order.stop:
            first = max(stop * self._block_tokens, order.first_token)
            self._bad_pages.update(pages_of(order.tables, self._pages.page_tokens, first, order.stop_token))
        self._report.loads[order.request] = LoadReport(
            stop,
            seconds=dict(job.seconds),
            num_bytes={tier: count * self._block_bytes for tier, count in job.num_blocks.items()},
        )

    def close(self) -> None:
        self.settle()
        for job in self.beside.values():
            job.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._helpers.shutdown(wait=True)
