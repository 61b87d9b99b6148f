# SPDX-License-Identifier: Apache-2.0
"""A worker's side of the vLLM connector: copies between the engine's pages and the store's slots.

Invariants
1. Every load that was ordered is reported, by its deadline at the latest, aborted requests' too.
2. Once a load is reported, nothing of it writes to the engine's pages any more.
3. Nothing is saved in a step in which a page it builds on failed to load, or whose adapter may not be the one that its
   blocks are named by.
4. On a device a load that belongs to a step is settled, and its failure known, before the step's results are reported.
5. Once a reset is reported, nothing that was ordered before it is published any more.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from connectors.base import FailOpen
from connectors.vllm_adapters import AdapterFiles
from connectors.vllm_device import DeviceLoad, DeviceSave
from connectors.vllm_identity import Roots
from connectors.vllm_pages import DevicePages, EnginePages
from connectors.vllm_plan import LoadOrder, LoadReport, Orders, Proof, Report, SaveOrder, VllmSettings, failed_pages
from kvstore.api import LendsMemory, Load, LoadedBlock, Register, Registration, Save, SaysWhole, Store
from kvstore.block import Chain, ModelId

log = logging.getLogger("kvstore.connector.vllm")

_IDLE_WAIT_S = 0.002
"""How long a step without work waits for a load: longer delays new requests, shorter only spins."""


_COPIERS = min(4, len(os.sched_getaffinity(0)))
"""Threads that copy one load beside the steps."""

_AT_ONCE = 8
"""Blocks that a load copies between two looks at whether it still should: each call costs 20 µs beside the copy."""

_AT_ONCE_IN_STEP = 64
"""The same of a load that a step waits for, which was predicted to take little: each call takes two passages."""


@dataclass(eq=False, slots=True)
class _Saving:
    """A save that goes on beside the steps."""

    order: SaveOrder
    began_s: float
    begun: DeviceSave
    done: Future[tuple[int, int] | None]


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


class WorkerSide:
    """See the module. `adopt` makes a Load of what the scheduler's side shared; `layers` are the pages'.

    `register`: tells the pages' device of the memory that slots lie in, without which its copies are slower.
    """

    def __init__(
        self,
        settings: VllmSettings,
        model: ModelId,
        store: Store,
        adopt: Callable[[object], Load],
        pages: EnginePages | DevicePages,
        *,
        layers: range = range(0),
        saves: bool = True,
        register: Register | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._registration: Registration | None = None
        if register is not None and isinstance(store, LendsMemory):
            self._registration = store.register_memory(register)
        self._adopt = adopt
        self._pages = pages
        self._device = pages if isinstance(pages, DevicePages) else None
        self._host = None if isinstance(pages, DevicePages) else pages
        self._layers = layers
        self._step_layers = settings.step_layers
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
        self._in_step: list[_Job] = []
        self._saving: list[_Saving] = []
        self._changed: set[AdapterFiles] = set()
        self._resets_due = 0
        """Resets to report when no void save is under way any more."""
        self._report = Report()
        self._pool = ThreadPoolExecutor(settings.load_threads, thread_name_prefix="kvstore-load")
        self._helpers = ThreadPoolExecutor(max(1, _COPIERS - 1), thread_name_prefix="kvstore-copy")
        self._savers = ThreadPoolExecutor(1, thread_name_prefix="kvstore-save")  # one: parents before children

    # -- loading -----------------------------------------------------------------------------------------------

    def load(self, orders: Orders, *, layered: bool = False) -> None:
        """Carry out loads that belong to this step, start the others. Before the forward pass where any is in it.

        `layered`: the pass will say before which layer it is, with `wait_for_layer`.
        """
        if orders.reset:
            for job in self._jobs.values():
                job.void = job.cancelled = True
            for saving in self._saving:
                saving.begun.void = True
            self._resets_due += 1
        for order in orders.loads:
            locks = tuple(threading.Lock() for _ in range(_COPIERS))
            job = _Job(order, self._now_s() + order.timeout_s, locks, stop=order.start)
            if self._device is not None:
                step_layers = self._step_layers if layered and order.in_step else 0
                job.copies = DeviceLoad(self._device, order, self._device.now(), self._block_bytes, step_layers)
            if order.in_step and job.copies is not None:
                self._guard(job, lambda job=job, copies=job.copies: self._begin(job, copies))  # type: ignore[misc]
                self._in_step.append(job)
            elif order.in_step:
                self._run(job)
                self._note(job)
            else:
                self._jobs[order.request] = job
                self._pool.submit(self._run, job)

    def _run(self, job: _Job) -> None:
        self._end(job, sound=self._guard(job, lambda: self._copy(job)))

    def _guard(self, job: _Job, action: Callable[[], bool]) -> bool:
        """The top of a load: a fault of ours costs a computation, not the engine."""
        try:
            return self.fail_open.call(action, False)
        except Exception:
            log.exception("a load of request %s failed", job.order.request)
            return False

    def _end(self, job: _Job, *, sound: bool) -> None:
        with self._ended:
            if not sound:
                job.stop = job.order.start  # something may be wrong with any of it: none counts
            job.ended = True
            self._ended.notify_all()

    # On a device: begun before the forward pass, which waits for it; settled when the pass is on its way.

    def _begin(self, job: _Job, copies: DeviceLoad) -> bool:
        if job.order.lease is None:
            return False
        load = job.held.enter_context(self._adopt(job.order.lease))
        try:
            self._bring(job, copies, load)
        finally:
            if not copies.step_layers:
                copies.wait_for()
        job.load = load
        return True

    def _bring(self, job: _Job, copies: DeviceLoad, load: Load) -> None:
        """Begin copies, and finish those of blocks that do not stay."""
        then_s = self._now_s()

        def note(tier: str) -> bool:
            nonlocal then_s
            before_s, then_s = then_s, self._now_s()
            if job.cancelled or then_s > job.deadline_s:
                return False
            job.note(tier, 1, then_s - before_s)
            return True

        try:
            job.stop = copies.bring(load, note)
        except BaseException:
            copies.finish()
            raise

    @property
    def goes_by_layers(self) -> bool:
        """Whether the forward pass of this step has to say before which layer it is."""
        return any(job.copies is not None and job.copies.step_layers for job in self._in_step)

    def wait_for_layer(self, layer: int) -> None:
        """On the engine's thread, before what of the forward pass reads the KV of `layer` is ordered."""
        for job in self._in_step:
            if job.copies is not None and job.copies.step_layers:
                job.copies.wait_for(layer)

    def _settle(self) -> None:
        """Wait for the copies of this step's loads, as the pass does, and see whether they count."""
        if not self._in_step:
            return
        jobs, self._in_step = self._in_step, []
        for job in jobs:
            assert job.copies is not None
            began_s, late = self._now_s(), not job.copies.is_done
            job.copies.finish()  # whatever the store does
            for tier, count in job.num_blocks.items() if late else ():
                # What was done before is not known; that it was quick is near enough.
                job.seconds[tier] += (self._now_s() - began_s) * count / sum(job.num_blocks.values())
            self._end(job, sound=self._guard(job, lambda job=job: self._is_sound(job)))  # type: ignore[misc]
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
        if order.lease is None:
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
                pages.scatter(order.pages, some, tokens, together=order.in_step)
        return len(blocks)

    def _note(self, job: _Job) -> None:
        """Report a load that has ended, or is given up now."""
        order = job.order
        job.cancel()
        stop = job.stop if job.ended and not job.void else order.start
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
        self._settle()
        if not (self._saving or self._jobs or self._sent):
            return set(), set()  # as in most steps, each of which a token waits for
        self._collect(wait_for_held=idle)
        if self._jobs and idle:
            with self._ended:
                self._ended.wait_for(lambda: any(job.ended for job in self._jobs.values()), _IDLE_WAIT_S)
        now_s = self._now_s()
        received = {name for name, job in self._jobs.items() if job.ended or now_s >= job.deadline_s}
        for name in received:
            self._note(self._jobs.pop(name))
        sent, self._sent = self._sent, set()
        return sent, received

    def bad_pages(self, proofs: Sequence[Proof] = ()) -> set[int]:
        """Pages of loads reported since the last call that the engine must compute, and of this step's `proofs`.

        Where it drafts tokens vLLM asks this before `save`, else after it.
        """
        self._settle()
        bad, self._bad_pages = self._bad_pages | self._disproved(proofs), set()
        return bad

    def _disproved(self, proofs: Sequence[Proof]) -> set[int]:
        bad: set[int] = set()
        for proof in proofs:
            if not self._is_unchanged(proof.files):
                bad.update(failed_pages(proof.pages, self._pages.page_tokens, proof.first_token, proof.stop_token))
        return bad

    # -- saving ------------------------------------------------------------------------------------------------

    def save(self, orders: Orders) -> None:
        """Copy out and publish what the step, or the one before, has filled; from a device, begin to.

        On a CPU when the pass has run. To do it at the start of the next step, or 20 ms later where none follows, cost
        3.4 % of throughput, where this cost 0.1 and 2.3 % in two runs: copies stood in the way of a pass then.
        """
        self._settle()
        if orders.proofs:
            self._bad_now |= self._disproved(orders.proofs)
        for order in orders.saves:
            begun = False
            try:
                if order.start == order.stop:
                    pass  # a reset left nothing of it to save; its pages are let go of
                elif order.files is not None and not self._is_unchanged(order.files):
                    pass  # nor will anything that follows be saved
                elif self._bad_now.intersection(order.pages):
                    # Computed on top of pages that did not load: the engine is about to compute it again.
                    self._report.unsaved[order.request] = order.start
                    self._grow(order)
                elif self._grow(order) and self._saves:
                    begun = self._publish(order)
            finally:
                if order.holds:
                    if not begun:
                        self._sent.add(order.request)
                    self._chains.pop(order.request, None)
        self._bad_now.clear()
        for request in orders.ended:
            self._chains.pop(request, None)

    def _is_unchanged(self, files: AdapterFiles) -> bool:
        """Whether the engine, which has read an adapter by now, read what its blocks are named by."""
        if files.are_unchanged:
            return True
        if files not in self._changed:
            self._changed.add(files)
            log.warning("%s changed under its requests: their KV is neither kept nor reused", files.directory)
        return False

    def _grow(self, order: SaveOrder) -> bool:
        """Extend this worker's copy of the chain; False where it does not fit what the scheduler's side knows."""
        if order.known == 0:
            self._chains[order.request] = Chain(self._roots.root(order.adapter, order.salt))
        chain = self._chains.get(order.request)
        if chain is None or chain.num_tokens != order.known:
            return False
        chain.extend(np.frombuffer(order.tokens, "<u4").astype(np.uint32), media=order.media)
        return True

    def _publish(self, order: SaveOrder) -> bool:
        """Save one order's blocks; True where that goes on beside the steps."""
        began_s = self._now_s()
        if (pages := self._device) is not None:
            begun = self.fail_open.call(lambda: DeviceSave.begin(pages, order, self._reserve(order)), None)
            if begun is None:
                self._published(order, None, began_s)
                return False
            self._saving.append(_Saving(order, began_s, begun, self._savers.submit(self._finish_save, begun)))
            return True
        self._published(order, self.fail_open.call(lambda: self._copy_out(order), None), began_s)
        return False

    def _finish_save(self, begun: DeviceSave) -> tuple[int, int] | None:
        done = self.fail_open.call(begun.publish, None)
        begun.let_go()  # where the store rests it was not called
        return done

    def _published(self, order: SaveOrder, done: tuple[int, int] | None, began_s: float) -> None:
        """Count what was saved; where the store failed, it is to be ordered again."""
        if done is None:
            self._report.unsaved[order.request] = order.start
            return
        self._count("saved_blocks", done[0])
        self._count("refused_blocks", done[1])
        self._count("save_s", self._now_s() - began_s)

    def _collect(self, *, wait_for_held: bool) -> None:
        """Take in saves that ended beside the steps. With nothing to compute, pages are not held for longer either."""
        if not (self._saving or self._resets_due):
            return
        if wait_for_held:
            wait([saving.done for saving in self._saving if saving.order.holds])
        waiting = []
        for saving in self._saving:
            order, done = saving.order, saving.done
            if not done.done():
                waiting.append(saving)
                continue
            self._published(order, None if done.exception() else done.result(), saving.began_s)
            if order.holds:
                self._sent.add(order.request)
        self._saving = waiting
        if self._resets_due and not any(saving.begun.void for saving in waiting):
            self._report.resets, self._resets_due = self._report.resets + self._resets_due, 0

    def _reserve(self, order: SaveOrder) -> Save:
        chain = self._chains[order.request]
        return self._store.save(chain, order.start, order.stop, parts=self._pages.parts, hint=order.hint)

    def _copy_out(self, order: SaveOrder) -> tuple[int, int]:
        """(blocks published, blocks refused). Raises what the store raises."""
        with self._reserve(order) as save:
            if not save.indices:
                return 0, save.num_refused
            pages = self._host
            assert pages is not None
            pages.gather(order.pages, [(index, save.views(index)) for index in save.indices])
            return save.commit(*save.indices), save.num_refused

    def _count(self, name: str, value: float) -> None:
        if value:
            self._report.counts[name] = self._report.counts.get(name, 0.0) + value

    # -- reports -----------------------------------------------------------------------------------------------

    def is_foreign(self) -> None:
        """Orders are for pages of another model than this worker's: say so in the next report."""
        self._report.is_foreign = True

    def report(self) -> Report | None:
        """News for the scheduler's side; None for none."""
        self._settle()
        self._collect(wait_for_held=False)
        if not self._report:
            return None
        taken, self._report = self._report, Report()
        return taken

    def close(self) -> None:
        self._settle()
        for job in self._jobs.values():
            job.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._savers.shutdown(wait=True)
        self._helpers.shutdown(wait=True)
        if self._registration is not None:
            self._registration.close()  # last: no copy may be under way
