# SPDX-License-Identifier: Apache-2.0
"""A worker's side of the vLLM connector: copies between the engine's pages and the store's slots, step by step.

What is under way is in `vllm_loads` and `vllm_saves`, with what holds of it. Here they meet what happens to adapters:
nothing is saved of a step whose adapter may not be the one that its blocks are named by.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from connectors.base import FailOpen
from connectors.vllm_adapters import AdapterFiles
from connectors.vllm_identity import Roots
from connectors.vllm_loads import WorkerLoads
from connectors.vllm_pages import DevicePages, EnginePages
from connectors.vllm_plan import Orders, Proof, Report, VllmSettings, pages_of
from connectors.vllm_saves import WorkerSaves
from kvstore.api import LendsMemory, Load, Register, Registration, Store
from kvstore.block import ModelId

log = logging.getLogger("kvstore.connector.vllm")


class WorkerSide:
    """See the module. `adopt` makes a Load of what the scheduler's side shared; `layers` are the pages'.

    `keeps_all`: see `SchedulerSide`. `saves`: False where another rank has the same and writes it. `register`: tells
    the pages' device of the memory that slots lie in, without which its copies are slower.

    Made before the engine captures graphs: a device's first copies compile kernels, and to load one, on whatever
    thread, breaks a capture.
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
        keeps_all: bool = True,
        register: Register | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registration: Registration | None = None
        if register is not None and isinstance(store, LendsMemory):
            self._registration = store.register_memory(register)
        self._page_tokens = pages.page_tokens
        self._keeps_all = keeps_all
        self.fail_open = FailOpen(now_s=now_s)
        self._report = Report()
        self._loads = WorkerLoads(
            settings,
            store.open(model),
            adopt,
            pages,
            self.fail_open,
            self._report,
            layers=layers,
            keeps_all=keeps_all,
            now_s=now_s,
        )
        self._saves = WorkerSaves(
            store,
            Roots(model, settings.secret.encode()),
            pages,
            self.fail_open,
            self._report,
            saves=saves and settings.save,
            share=settings.save_share,
            now_s=now_s,
        )
        self._changed: set[AdapterFiles] = set()
        if isinstance(pages, DevicePages):
            _warm_up(pages)

    # -- before and in the forward pass ------------------------------------------------------------------------

    def leave_pages(self, orders: Orders) -> None:
        """Before anything of the step writes to pages: some may have a new owner and still be read by a save."""
        if not self._keeps_all:
            self._saves.leave_all_pages()
        elif orders.ended or orders.rewritten:
            self._saves.leave_pages({*orders.ended, *orders.rewritten})

    def load(self, orders: Orders, *, layered: bool = False) -> None:
        """Carry out loads that belong to this step, start the others. Before the forward pass where any is in it.

        `layered`: the pass will say before which layer it is, with `wait_for_layer`.
        """
        if orders.reset:
            self._loads.void()
            self._saves.void()
        for order in orders.loads:
            self._loads.begin(order, layered=layered)

    @property
    def goes_by_layers(self) -> bool:
        """Whether the forward pass of this step has to say before which layer it is."""
        return self._loads.go_by_layers

    def wait_for_layer(self, layer: int) -> None:
        """On the engine's thread, before what of the forward pass reads the KV of `layer` is ordered."""
        self._loads.wait_for_layer(layer)

    # -- after it ----------------------------------------------------------------------------------------------

    def save(self, orders: Orders) -> None:
        """Copy out and publish what the step, or the one before, has filled; from a device, begin to.

        On a CPU when the pass has run. To do it at the start of the next step, or 20 ms later where none follows, cost
        3.4 % of throughput, where this cost 0.1 and 2.3 % in two runs: copies stood in the way of a pass then.
        """
        self._loads.settle()
        self._saves.carry_out(orders, self._disproved(orders.proofs), self._is_unchanged)

    def finished(self, *, idle: bool) -> tuple[set[str], set[str]]:
        """(requests whose last save is done, requests whose load has ended, well or not), each named once."""
        self._loads.settle()
        sent = self._saves.take_sent(idle=idle)
        return sent, self._loads.take_ended(idle=idle)

    def failed(self) -> set[str]:
        """Of requests whose load has ended, those of which the engine must compute all."""
        return self._loads.take_failed()

    def bad_pages(self, proofs: Sequence[Proof] = ()) -> set[int]:
        """Pages of loads reported since the last call that the engine must compute, and of this step's `proofs`.

        Where it drafts tokens vLLM asks this before `save`, else after it.
        """
        self._loads.settle()
        return self._loads.take_bad() | self._disproved(proofs)

    def _disproved(self, proofs: Sequence[Proof]) -> set[int]:
        bad: set[int] = set()
        for proof in proofs:
            if not self._is_unchanged(proof.files):
                bad.update(pages_of(proof.tables, self._page_tokens, proof.first_token, proof.stop_token))
        return bad

    def _is_unchanged(self, files: AdapterFiles) -> bool:
        """Whether the engine, which has read an adapter by now, read what its blocks are named by."""
        if files.are_unchanged:
            return True
        if files not in self._changed:
            self._changed.add(files)
            log.warning("%s changed under its requests: their KV is neither kept nor reused", files.directory)
        return False

    # -- reports -----------------------------------------------------------------------------------------------

    def is_foreign(self) -> None:
        """Orders are for pages of another model than this worker's: say so in the next report."""
        self._report.is_foreign = True

    def report(self) -> Report | None:
        """News for the scheduler's side; None for none."""
        self._loads.settle()
        self._saves.collect()
        return self._report.taken() if self._report else None

    def close(self) -> None:
        self._loads.close()
        self._saves.close()
        if self._registration is not None:
            self._registration.close()  # last: no copy may be under way


def _warm_up(pages: DevicePages) -> None:
    began_s = time.perf_counter()
    try:
        pages.warm_up()
        log.info("the device's copies were made ready in %.1f s", time.perf_counter() - began_s)
    except Exception:  # a load or save that fails in the same way costs a computation
        log.exception("a first copy between the engine's pages and memory of the host failed")
