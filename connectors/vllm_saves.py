# SPDX-License-Identifier: Apache-2.0
"""A worker's saves: copied out of the engine's pages in the step, published there or, on a device, beside the steps.

Invariants
1. Parents are published before children: one thread does it, in the order of the steps.
2. Pages that wait for a save are let go of once, when it is done or was not begun.
3. Once a reset is reported, nothing that was ordered before it is published any more.
4. A worker's copy of a chain is the scheduler's side's, or nothing of it is saved.
5. Nothing writes to a page before it was read.

The fifth, on a device, where a save reads pages beside the steps that follow. What a save reads are tokens of its
request that are final: whoever computes on goes on behind them, in the same page too. So the engine's stream waits for
no save until something may write to those tokens all the same, and these are all the ways to that:

- Another request gets the pages. That takes their owner to let go of them, which vLLM does where a request ends, where
  it is preempted (resets do that too), and where a load brought nothing of a request that has computed nothing yet. The
  scheduler's side hears of the first two before the pages can be handed out, and says so with the next step (`ended`,
  `rewritten`), ahead of whose work the engine is told to wait.
- The owner goes on, and the engine lets go of pages that layers with a window have left behind
  (`vllm_groups.Groups.keeps_all` is False). It does so as it schedules a step, so the engine waits for all saves before
  each: of a long chunk as long as the link takes for what the stages do not hold.
- The request ended, and its last save holds the pages: they are let go of when that was published, and those before it.
  Where it was not begun, the engine waits for those before it.
- The owner computes the same tokens again, where a load failed on which others stand: then the step begins below what
  was ordered to be saved (`rewritten`). Drafts that are rejected lie behind that, and a draft model's layers are not
  read.
- A load of ours writes into the pages of a new owner: it begins behind what the engine's stream waits for. So does one
  of another connector, or it was not safe before either.

vLLM's second runner zeroes and copies pages ahead of `handle_preemptions`, for state-space layers and mixed dtypes
alone, which are refused. To wait in every case, as was done before, held the engine for as long as the link takes for
all of a save but what its stages hold: 768 MiB, some 15 ms of PCIe 5, after 8,192 tokens of an 8B model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from connectors.base import FailOpen
from connectors.vllm_adapters import AdapterFiles
from connectors.vllm_device import DeviceSave
from connectors.vllm_identity import Roots
from connectors.vllm_pages import DevicePages, EnginePages
from connectors.vllm_plan import Orders, Report, SaveOrder
from kvstore.api import Save, Store
from kvstore.block import Chain
from kvstore.transfer import LinkShare


@dataclass(eq=False, slots=True)
class _Saving:
    """A save that goes on beside the steps."""

    order: SaveOrder
    began_s: float
    begun: DeviceSave
    done: Future[tuple[int, int] | None]


class WorkerSaves:
    """See the module. For the engine's thread. `saves`: False where another rank has the same and writes it.

    `share`: of the link's time, what saves may take beside the steps.

    Attributes:
        beside: saves that go on beside the steps.
    """

    def __init__(
        self,
        store: Store,
        roots: Roots,
        pages: EnginePages | DevicePages,
        fail_open: FailOpen,
        report: Report,
        *,
        saves: bool,
        share: float,
        now_s: Callable[[], float],
    ) -> None:
        self._store = store
        self._roots = roots
        self._pages = pages
        self._device = pages if isinstance(pages, DevicePages) else None
        self._host = None if isinstance(pages, DevicePages) else pages
        self._fail_open = fail_open
        self._report = report
        self._saves = saves
        self._share = LinkShare(share, now_s=now_s) if share < 1 else None
        self._now_s = now_s
        self.beside: list[_Saving] = []
        self._chains: dict[str, Chain] = {}
        self._sent: set[str] = set()
        self._resets_due = 0
        """Resets to report when no void save is under way any more."""
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="kvstore-save")

    def carry_out(self, orders: Orders, bad_pages: set[int], is_unchanged: Callable[[AdapterFiles], bool]) -> None:
        """Save what the step, or the one before, has filled; from a device, begin to.

        Nothing on top of `bad_pages`, which the engine is about to compute again, nor under the name of an adapter that
        is not `is_unchanged`.
        """
        for order in orders.saves:
            begun = False
            try:
                if order.start == order.stop:
                    pass  # a reset left nothing of it to save; its pages are let go of
                elif order.files is not None and not is_unchanged(order.files):
                    pass  # nor will anything that follows be saved
                elif bad_pages and any(not bad_pages.isdisjoint(table) for table in order.tables):
                    self._unsaved(order)
                    self._grow(order)
                elif self._grow(order) and self._saves:
                    begun = self._publish(order)
            finally:
                if order.holds:
                    if not begun:
                        self.leave_pages({order.request})
                        self._sent.add(order.request)
                    self._chains.pop(order.request, None)
        for request in orders.ended:
            self._chains.pop(request, None)

    def leave_pages(self, requests: Collection[str]) -> None:
        """What the engine orders from now on may write to pages of `requests`: it waits until they were read."""
        for saving in self.beside:
            if saving.order.request in requests:
                saving.begun.leave_pages()

    def leave_all_pages(self) -> None:
        """What the engine orders from now on may write to any page."""
        for saving in self.beside:
            saving.begun.leave_pages()

    def void(self) -> None:
        """What is under way is of before a reset, which is to be reported when it has ended."""
        for saving in self.beside:
            saving.begun.void = True
        self._hurry()
        self._resets_due += 1

    def take_sent(self, *, idle: bool) -> set[str]:
        """Requests whose pages waited for their last save, and do no more, each named once.

        With nothing to compute, pages are not held for longer than it takes.
        """
        if not (self.beside or self._sent):
            return set()
        if idle:
            self._hurry()
        self.collect(wait_for_held=idle)
        sent, self._sent = self._sent, set()
        return sent

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
            share = None if order.holds else self._share
            if order.holds:  # its request has ended, and its pages wait for it and for those before it
                self._hurry()
            begun = self._fail_open.call(lambda: DeviceSave.begin(pages, order, self._reserve(order), share), None)
            if begun is None:
                self._published(order, None, began_s)
                return False
            self.beside.append(_Saving(order, began_s, begun, self._threads.submit(self._finish_save, begun)))
            return True
        self._published(order, self._fail_open.call(lambda: self._copy_out(order), None), began_s)
        return False

    def _hurry(self) -> None:
        """Those beside the steps are waited for, or there is no step that they could slow down."""
        for saving in self.beside:
            saving.begun.hurry()

    def _finish_save(self, begun: DeviceSave) -> tuple[int, int] | None:
        done = self._fail_open.call(begun.publish, None)
        begun.let_go()  # where the store rests it was not called
        return done

    def _published(self, order: SaveOrder, done: tuple[int, int] | None, began_s: float) -> None:
        """Count what was saved; where the store failed, it is to be ordered again."""
        if done is None:
            self._unsaved(order)
            return
        self._count("saved_blocks", done[0])
        self._count("refused_blocks", done[1])
        self._count("save_s", self._now_s() - began_s)

    def _unsaved(self, order: SaveOrder) -> None:
        """Have it ordered again, from the first block on that was not saved."""
        unsaved = self._report.unsaved
        unsaved[order.request] = min(order.start, unsaved.get(order.request, order.start))

    def collect(self, *, wait_for_held: bool = False) -> None:
        """Take in saves that ended beside the steps."""
        if not (self.beside or self._resets_due):
            return
        if wait_for_held:
            wait([saving.done for saving in self.beside if saving.order.holds])
        waiting = []
        for saving in self.beside:
            order, done = saving.order, saving.done
            if not done.done():
                waiting.append(saving)
                continue
            self._published(order, None if done.exception() else done.result(), saving.began_s)
            if order.holds:
                self._sent.add(order.request)
        self.beside = waiting
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
            pages.gather(order.tables, [(index, save.views(index)) for index in save.indices])
            return save.commit(*save.indices), save.num_refused

    def _count(self, name: str, value: float) -> None:
        if value:
            self._report.counts[name] = self._report.counts.get(name, 0.0) + value

    def close(self) -> None:
        self._hurry()
        self._threads.shutdown(wait=True)
