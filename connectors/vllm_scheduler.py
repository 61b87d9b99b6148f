# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side of the vLLM connector: what to load, what to save, and when it is safe.

It runs in the engine's scheduling loop, so it waits for nothing where another request could be waiting for it: an
answer that is not there yet is `None` (vLLM asks again with the next step), a store that fails is a miss. It holds the
leases of loads; workers copy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from connectors.base import CostModel, FailOpen, LoadRule, plan_save
from connectors.vllm_adapters import AdapterDigests
from connectors.vllm_announced import Announced
from connectors.vllm_identity import EngineRequest, Roots
from connectors.vllm_learning import Learning
from connectors.vllm_leases import EndedLoad, LoadLeases
from connectors.vllm_match import Matching
from connectors.vllm_plan import (
    IN_TIME,
    NO_ORDERS,
    LoadOrder,
    Orders,
    Proof,
    Report,
    SaveOrder,
    Scheduled,
    Tables,
    VllmSettings,
    frozen,
    kept_from,
    storable_finished,
    storable_running,
)
from connectors.vllm_resets import Resets
from connectors.vllm_tracked import Tracked
from kvstore.api import Load, Store
from kvstore.block import ModelId, as_u32

log = logging.getLogger("kvstore.connector.vllm")

_REST_S = 0.005
"""A step of an engine whose requests all wait. Longer would delay a new one, shorter only spins."""


@dataclass(slots=True)
class _LateSave:
    """What is to be saved of a request that ended when a load that it stands on was not reported: up to `stop`."""

    tracked: Tracked
    stop: int
    tables: Tables


class SchedulerSide:
    """See the module. `share` makes of a load what a worker's store can take up.

    `may_be_alone` is False where other engines step together with this one, as under data parallelism: whatever waits
    here delays them. `may_trail`: what a step saves may still be on its way when others are scheduled.

    Where it may not, as on a CPU, workers copy on the engine's thread, and a token waits for it. So what a step fills
    is saved at the end of the next one, where one is to come: the first token does not wait. Nothing may have written
    to the pages by then, hence only if the request is in that step too.

    `keeps_all` is False where the engine lets go of pages that layers with a window have left behind, as it schedules
    the step after. Then what a step fills is saved at its end, and of what is saved later, blocks whose pages are not
    all there any more are left out. A load is whole or counts for nothing, and runs beside the steps: of such an
    engine's requests vLLM takes back those alone that have not begun, and all that they have. Nor is anything loaded
    for an adapter, which may prove to be another in the first step.
    """

    def __init__(
        self,
        settings: VllmSettings,
        model: ModelId,
        store: Store,
        share: Callable[[Load], object],
        *,
        page_tokens: int,
        num_ranks: int = 1,
        may_be_alone: bool = True,
        may_trail: bool = False,
        keeps_all: bool = True,
        now_s: Callable[[], float] = time.monotonic,
        adapters: AdapterDigests | None = None,
    ) -> None:
        self.model = model
        self._settings = settings
        self._store = store
        self._num_ranks = num_ranks
        self._saves_later = keeps_all and not may_trail
        self._keeps_all = keeps_all
        self._page_tokens = page_tokens
        self._now_s = now_s
        self._adapters = adapters or AdapterDigests()
        self._roots = Roots(model, settings.secret.encode())
        self._block_tokens = model.block_tokens
        self.fail_open = FailOpen(now_s=now_s)
        self.layout = store.open(model)
        block_bytes = -(-self.layout.block_bytes // num_ranks)
        self.cost = CostModel(model.block_tokens, block_bytes, rule=LoadRule(settings.load_rule))
        self._matching = Matching(
            settings,
            store,
            self.cost,
            self.fail_open,
            may_be_alone=may_be_alone,
            brings_parts=not model.is_opaque,
            in_steps=keeps_all,
            now_s=now_s,
        )
        self._learning = Learning(store, self.cost, self.fail_open, num_ranks=num_ranks, now_s=now_s)
        self.figures = self._learning.figures
        self._tracked: dict[str, Tracked] = {}
        self._leases = LoadLeases(
            share,
            self.fail_open,
            num_ranks=num_ranks,
            num_threads=settings.load_threads,
            page_tokens=page_tokens,
            now_s=now_s,
        )
        self._saves: list[SaveOrder] = []
        self._late: list[_LateSave] = []
        self._ended: list[str] = []
        self._reset = False
        self._resets = Resets(store, num_reports=num_ranks if may_trail else 0, now_s=now_s)
        self._announced = Announced(self.fail_open)
        self._next = 0

    # -- matching ----------------------------------------------------------------------------------------------

    def arrived(self, request: EngineRequest) -> None:
        """Begin to track; the digest of an adapter is computed from now on."""
        if request.request_id not in self._tracked:
            self._next += 1
            self._tracked[request.request_id] = Tracked(
                request,
                self._adapters.of(request.lora_request),
                f"{request.request_id}#{self._next}",
            )

    def match(self, request: EngineRequest, local_tokens: int) -> tuple[int | None, bool]:
        """(tokens after the first `local_tokens` that can be loaded, whether beside the steps); None: ask again.

        May be called any number of times before `allocated`; a miss takes no pages, and lets go of what it held.
        """
        self.arrived(request)
        tracked = self._tracked[request.request_id]
        tracked.planned, tracked.to_prove, tracked.local_tokens, tracked.has_run = 0, None, local_tokens, False
        # Asked only where the request has no KV but what the engine's own cache has.
        tracked.from_before = local_tokens > 0 and self._adapters.was_rewritten(request.lora_request)
        if tracked.from_before:
            tracked.withdraw()
        if (
            not self._settings.load
            or tracked.from_before
            or self._adapters.is_mixed(request.lora_request)
            or (request.lora_request is not None and not self._keeps_all)
            or request.skip_reading_prefix_cache
            or tracked.gave_up
            or request.request_id in self._leases
        ):
            return 0, False
        chain = tracked.grow(self._roots)
        if chain is None or len(chain) * self._block_tokens <= local_tokens or not self._resets.allows(chain.root):
            return 0, False
        tracked.withdraw()
        return self._matching.match(tracked, chain, local_tokens, alone=len(self._tracked) == 1)

    # -- loading -----------------------------------------------------------------------------------------------

    def allocated(self, request: EngineRequest, tables: Tables, external_tokens: int) -> None:
        """The engine has pages for the request: turn the plan into a load, or drop it."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or request.request_id in self._leases:
            return
        if external_tokens <= 0 or not tracked.planned:
            if tracked.planned:
                tracked.planned = 0
                self._matching.forget(tracked)
            self._announce(tracked, tables)
            return
        start, stop = tracked.local_tokens // self._block_tokens, tracked.planned
        tracked.planned = 0
        partial_tokens = tracked.partial_tokens
        num_whole = stop - bool(partial_tokens)
        load = self.fail_open.call(
            lambda: self._store.load(tracked.key, num_whole, start=start, partial_tokens=partial_tokens), None
        )
        order = LoadOrder(
            request=request.request_id,
            first_token=tracked.local_tokens,
            stop_token=num_whole * self._block_tokens + partial_tokens,
            start=start,
            stop=stop,
            tables=frozen(tables),
            lease=None,
            in_step=tracked.in_step,
            timeout_s=self._settings.load_deadline_ms / 1e3 * IN_TIME,
        )
        self.figures.add("loads")
        tracked.to_prove = range(order.first_token, order.stop_token)
        self._announce(tracked, tables)
        self._leases.begin(order, load)

    def _announce(self, tracked: Tracked, tables: Tables) -> None:
        """Say what the request is about to compute, if that will be saved."""
        mixed = self._adapters.is_mixed(tracked.request.lora_request)
        if not self._settings.save or tracked.from_before or mixed or tracked.announcement is not None:
            return
        chain = tracked.grow(self._roots)  # only now where nothing was asked for: a producer
        start = max(tracked.in_store, tracked.num_saved)
        if self._first_kept(tables, start, tracked.local_tokens // self._block_tokens) > start:
            return  # what hangs from blocks that are not stored is not either
        if chain is not None and start < len(chain) and self._resets.allows(chain.root):
            mark = self.fail_open.call(lambda: self._store.announce(chain, start, len(chain)), None)
            tracked.announcement = None if mark is None else self._announced.keep(mark)
            tracked.announced_to = len(chain)

    # -- saving ------------------------------------------------------------------------------------------------

    def orders(self, step: Scheduled) -> Orders:
        """What workers must do in the step just scheduled."""
        loads = self._leases.take_orders()
        self._learning.scheduled(step, loads)
        self._resets.go_on()
        rewritten = self._order_saves(step)
        if not step.num_scheduled and self._matching.num_waiting and not loads:
            time.sleep(_REST_S)
        self._matching.num_waiting = 0
        proofs, idle = self._proofs(step), not step.num_scheduled
        if not (loads or self._saves or self._ended or rewritten or proofs or self._reset or idle):
            return NO_ORDERS
        made = Orders(loads, tuple(self._saves), tuple(self._ended), rewritten, proofs, idle=idle, reset=self._reset)
        self._saves, self._ended, self._reset = [], [], False
        return made

    def _order_saves(self, step: Scheduled) -> tuple[str, ...]:
        """Have saved what the step, or the one before, fills.

        Returns requests whose pages may be written in it though saves ordered before may be reading them, each named
        once: preempted ones, whose pages may be others' already, and those that compute again what was saved.
        """
        rewritten = []
        for request_id in step.preempted:
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.read_to:
                tracked.read_to = 0
                rewritten.append(request_id)
        for request_id, num_scheduled in step.num_scheduled.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            tracked.has_run = True
            computed = step.computed[request_id]
            if computed < tracked.read_to:
                tracked.read_to = computed
                rewritten.append(request_id)
            if (
                not self._settings.save
                or tracked.from_before
                or computed + num_scheduled < (tracked.num_saved + 1) * self._block_tokens  # most steps
            ):
                continue
            request = tracked.request
            if self._saves_later and request.num_tokens + 1 < request.num_prompt_tokens + request.max_tokens:
                num_scheduled = 0  # a step follows, unless pages are taken back: what they held is lost then
            stop = storable_running(computed, num_scheduled, request.num_tokens, self._block_tokens)
            if stop <= tracked.num_saved:
                continue
            tables = step.tables(request_id)
            if not self._leases.are_under(tables):
                self._save(tracked, stop, tables, holds=False)
        return tuple(rewritten)

    def _proofs(self, step: Scheduled) -> tuple[Proof, ...]:
        """What to look at again when the step has run, in which the engine reads adapters it does not have."""
        proofs = []
        for request_id in step.num_scheduled:
            tracked = self._tracked.get(request_id)
            if tracked is None or tracked.to_prove is None:
                continue
            loaded, tracked.to_prove = tracked.to_prove, None
            if (files := tracked.adapter.result().files) is not None:
                proofs.append(Proof(files, frozen(step.tables(request_id)), loaded.start, loaded.stop))
        return tuple(proofs)

    def _first_kept(self, tables: Tables, start: int, stop: int) -> int:
        """Of blocks `start` … `stop`, the first one from which on the engine has all their pages."""
        if self._keeps_all or stop <= start:
            return start
        tokens = kept_from(tables, self._page_tokens, start * self._block_tokens, stop * self._block_tokens)
        return min(stop, -(-tokens // self._block_tokens))

    def _save(self, tracked: Tracked, stop: int, tables: Tables, *, holds: bool) -> bool:
        """Order blocks up to `stop` to be saved; False where there is nothing to save."""
        tracked.num_saved = self._first_kept(tables, tracked.num_saved, stop)
        chain = tracked.grow(self._roots)
        blocks = plan_save(stop * self._block_tokens, tracked.num_saved, self._block_tokens)
        if chain is None or not blocks or self.fail_open.resting or not self._resets.allows(chain.root):
            return False
        if self._adapters.is_mixed(tracked.request.lora_request):
            tracked.withdraw()
            return False
        if tracked.num_saved >= tracked.announced_to:
            tracked.withdraw()  # the steps that saved what was announced have run
        # What is computed again was told before: a chain does not shrink.
        known, tracked.told = tracked.told, max(tracked.told, stop * self._block_tokens)
        media = tuple(item for item in tracked.media if known <= item[0] < tracked.told)
        tokens = as_u32(tracked.request.all_token_ids[known : tracked.told]).astype("<u4", copy=False).tobytes()
        root = chain.root
        self._saves.append(
            SaveOrder(
                request=tracked.request.request_id,
                start=blocks.start,
                stop=stop,
                adapter=root.adapter,
                salt=root.salt,
                known=known,
                tokens=tokens,
                media=media,
                tables=frozen(tables),
                holds=holds,
                hint=tracked.hint(),
                files=tracked.adapter.result().files,
            )
        )
        tracked.num_saved, tracked.read_to = stop, max(tracked.read_to, stop * self._block_tokens)
        return True

    def ended(self, request: EngineRequest, tables: Tables) -> bool:
        """The request is over. True: its pages must stay until workers report that they were saved."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False
        tracked.withdraw()
        self._matching.forget(tracked)
        is_under = self._leases.are_under(tables)
        if request.request_id in self._leases and not is_under:
            self._ended.append(request.request_id)
            return False  # the engine keeps the pages until the load is reported, and has computed nothing in them
        held = False
        # Of one that has not run, another connector may still be loading what the engine counts as computed.
        if self._settings.save and tracked.has_run and not tracked.from_before:
            stop = storable_finished(
                request.num_computed_tokens, request.num_prompt_tokens, request.num_tokens, self._block_tokens
            )
            if stop > tracked.num_saved and is_under:
                self._late.append(_LateSave(tracked, stop, frozen(tables)))
                held = True
            elif stop > tracked.num_saved:
                held = self._save(tracked, stop, tables, holds=True)
        if not held:
            self._ended.append(request.request_id)
        return held

    def _save_late(self, ended: EndedLoad) -> None:
        """Save what stood on a load that has ended; where that failed, let go of the pages alone."""
        late, self._late = self._late, []
        for each in late:
            if ended.failed and any(not ended.pages.isdisjoint(table) for table in each.tables):
                each.stop = 0
            if self._leases.are_under(each.tables):
                self._late.append(each)
            elif not self._save(each.tracked, each.stop, each.tables, holds=True):
                self._saves.append(SaveOrder.of_nothing(each.tracked.request.request_id))

    # -- reports -----------------------------------------------------------------------------------------------

    def reported(self, report: Report) -> None:
        """Workers' news: release what is done, learn what it cost, take back what was not saved."""
        if report.is_foreign:
            self._rest()
        for request_id, done in report.loads.items():
            if (ended := self._leases.reported(request_id, done)) is not None:
                self._load_ended(request_id, ended)
        for request_id, block in report.unsaved.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                tracked.num_saved = min(tracked.num_saved, block)
        for name, value in report.counts.items():
            self.figures.add(name, value)
        self._resets.carried_out(report.resets)

    def _rest(self) -> None:
        """Load, save and announce nothing more: workers cannot, and others would wait for what never comes."""
        self._settings = replace(self._settings, load=False, save=False)
        for tracked in self._tracked.values():
            tracked.withdraw()

    def _load_ended(self, request_id: str, ended: EndedLoad) -> None:
        self._learning.load_ended(ended)
        tracked = self._tracked.get(request_id)
        if ended.failed and tracked is not None:
            tracked.gave_up = True
            # Where nothing came of it, what it hangs from may be gone from the store as well, and is saved again.
            stop = ended.report.stop
            tracked.num_saved = min(tracked.num_saved, stop if stop > ended.start else 0)
        self._save_late(ended)

    def stepped(self) -> None:
        """The step last scheduled has run."""
        self._learning.stepped()

    # -- care --------------------------------------------------------------------------------------------------

    def clear(self) -> bool:
        """Remove every block under the roots this engine has used; True where every tier of the store did.

        vLLM empties caches when weights have changed. So what was computed before is not saved any more, and requests
        that go on save nothing until the engine computes them anew. Loads under way fail. What steps save that were
        scheduled before is removed when they have run. What could not be removed is not used: see `Resets`.
        """
        self._saves = [replace(order, start=order.stop) for order in self._saves if order.holds]
        for tracked in self._tracked.values():
            tracked.withdraw()
            self._matching.forget(tracked)
            tracked.from_before, tracked.asked_s = True, None
            tracked.num_saved = tracked.in_store = tracked.planned = 0
        for late in self._late:
            late.stop = 0
        self._leases.void()
        is_new, self._reset = not self._reset, True
        return self._resets.begin([self._roots.root(b"", b""), *self._roots.all()], is_new=is_new)

    def close(self) -> None:
        for tracked in self._tracked.values():
            tracked.withdraw()
            self._matching.forget(tracked)
        self._tracked.clear()
        self._leases.close()
        self._announced.close()
        self._resets.close()
        self._adapters.close()

    def check(self) -> list[str]:
        """What is still held; empty when no request is under way."""
        return [
            *(f"request {name} is tracked" for name in self._tracked),
            *(f"the last save of {late.tracked.key} waits for a load" for late in self._late),
            *self._leases.check(),
        ]
