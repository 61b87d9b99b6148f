# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side of the vLLM connector: what to load, what to save, and when it is safe.

It runs in the engine's scheduling loop, so it waits for nothing where another request could be waiting for it: an
answer that is not there yet is `None` (vLLM asks again with the next step), a store that fails is a miss. It holds the
leases of loads; workers copy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from connectors.base import CostModel, FailOpen, LoadRule, plan_save
from connectors.hints import hint_of
from connectors.vllm_adapters import Adapter, AdapterDigests
from connectors.vllm_announced import Announced, KeptMark
from connectors.vllm_identity import EngineRequest, Roots, media_of
from connectors.vllm_plan import (
    NO_ORDERS,
    LoadOrder,
    LoadReport,
    Orders,
    Proof,
    Report,
    SaveOrder,
    Scheduled,
    VllmSettings,
    storable_finished,
    storable_running,
)
from connectors.vllm_resets import Resets
from kvstore.api import HOST_TIER, Hint, Load, Match, Store
from kvstore.block import Chain, ModelId, as_u32

log = logging.getLogger("kvstore.connector.vllm")

IN_TIME = 0.9
"""Share of a deadline after which waiting ends: that it has is noticed between steps, and takes effect in the next."""
_LOOK_S, _LOOK_SHARE = 0.002, 0.01
"""Between two looks at pending blocks: at least, and of what computing them is predicted to take. Asked in every step,
waiting requests would keep taking time from an engine beside them that is computing (how much was not measured)."""
_REST_S = 0.005
"""A step of an engine whose requests all wait. Longer would delay a new one, shorter only spins."""
_ALONE_S = 0.005
"""How long a match waits for lower tiers where the engine has no other request: most answer sooner, and steps that
compute nothing and ask again would take all of a core meanwhile. Longer would delay a request that comes now."""
_UNSEEN_BYTES_PER_S = 2e9
"""What the first load is taken to run at, when it is decided whether the step can wait for it."""


@dataclass(slots=True)
class _Tracked:
    """One request from its arrival to its end."""

    request: EngineRequest
    adapter: Future[Adapter]
    key: str
    media: list[tuple[int, bytes]]
    chain: Chain | None = None
    num_saved: int = 0
    """Blocks that a worker was told to save, or that a match has found: to offer those again took 1 ms of a hit."""
    told: int = 0
    """Tokens that workers' copies of the chain have."""
    asked_s: float | None = None
    lower_s: float | None = 0.0
    """How long lower tiers are worth waiting for, from `asked_s` on; None: they are not asked."""
    found_blocks: int = 0
    """Of the longest match since `asked_s`; it was first seen at `found_s`."""
    found_s: float = 0.0
    look_s: float = 0.0
    """No look at pending blocks before."""
    local_tokens: int = 0
    planned: int = 0
    """Blocks the plan ends at; 0 for no plan."""
    partial_tokens: int = 0
    """Tokens of the plan's last block, where that is another chain's which begins alike; 0 where it is whole."""
    in_step: bool = False
    in_store: int = 0
    gave_up: bool = False
    """A load failed: what is computed once is not asked for again."""
    announcement: KeptMark | None = None
    announced_to: int = 0
    """Blocks up to here are."""
    from_before: bool = False
    """Its KV may be of before a reset, or of its adapter as it was: not saved until the engine computes it anew."""
    to_prove: range | None = None
    """Tokens loaded for an adapter that the engine has not read since."""


@dataclass(slots=True)
class _Loading:
    """A load that workers were told of; kept until each of them reported, though the request may be gone."""

    load: Load
    start: int
    stop: int
    report: LoadReport | None = None


@dataclass(frozen=True, slots=True)
class _Sharing:
    """A load that workers hear of when they can take part in it."""

    order: LoadOrder
    lease: Future[object]
    deadline_s: float


@dataclass(slots=True)
class _Step:
    """What was scheduled, to learn from how long it took."""

    began_s: float
    new_tokens: int
    past_tokens: int


@dataclass(slots=True)
class Figures:
    """What happened: since the start, and since it was last taken."""

    counts: dict[str, float] = field(default_factory=dict)
    fresh: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float = 1.0) -> None:
        self.counts[name] = self.counts.get(name, 0.0) + value
        self.fresh[name] = self.fresh.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        taken, self.fresh = self.fresh, {}
        return taken


class SchedulerSide:
    """See the module. `share` makes of a load what a worker's store can take up.

    `may_be_alone` is False where other engines step together with this one, as under data parallelism: whatever waits
    here delays them. `may_trail`: what a step saves may still be on its way when others are scheduled.

    Where it may not, as on a CPU, workers copy on the engine's thread, and a token waits for it. So what a step fills
    is saved at the end of the next one, where one is to come: the first token does not wait. Nothing may have written
    to the pages by then, hence only if the request is in that step too.
    """

    def __init__(
        self,
        settings: VllmSettings,
        model: ModelId,
        store: Store,
        share: Callable[[Load], object],
        *,
        num_ranks: int = 1,
        may_be_alone: bool = True,
        may_trail: bool = False,
        now_s: Callable[[], float] = time.monotonic,
        adapters: AdapterDigests | None = None,
    ) -> None:
        self.model = model
        self._settings = settings
        self._store = store
        self._share = share
        self._num_ranks = num_ranks
        self._may_be_alone = may_be_alone
        self._saves_later = not may_trail
        self._now_s = now_s
        self._adapters = adapters or AdapterDigests()
        self._roots = Roots(model, settings.secret.encode())
        self._block_tokens = model.block_tokens
        self._is_opaque = model.is_opaque
        self.fail_open = FailOpen(now_s=now_s)
        self.layout = store.open(model)
        block_bytes = -(-self.layout.block_bytes // num_ranks)
        self.cost = CostModel(model.block_tokens, block_bytes, rule=LoadRule(settings.load_rule))
        self.figures = Figures()
        self._tracked: dict[str, _Tracked] = {}
        self._loading: dict[str, _Loading] = {}
        self._loads: list[LoadOrder] = []
        self._sharing: list[_Sharing] = []
        self._pool = ThreadPoolExecutor(settings.load_threads, thread_name_prefix="kvstore-share")
        self._saves: list[SaveOrder] = []
        self._ended: list[str] = []
        self._reset = False
        self._resets = Resets(store, num_reports=num_ranks if may_trail else 0, now_s=now_s)
        self._step: _Step | None = None
        self._num_waiting = 0
        """Requests that wait for pending blocks, of the step being scheduled."""
        self._announced = Announced(self.fail_open)
        self._next = 0

    # -- matching ----------------------------------------------------------------------------------------------

    def arrived(self, request: EngineRequest) -> None:
        """Begin to track; the digest of an adapter is computed from now on."""
        if request.request_id not in self._tracked:
            self._next += 1
            self._tracked[request.request_id] = _Tracked(
                request,
                self._adapters.of(request.lora_request),
                f"{request.request_id}#{self._next}",
                media_of(request),
            )

    def match(self, request: EngineRequest, local_tokens: int) -> tuple[int | None, bool]:
        """(tokens after the first `local_tokens` that can be loaded, whether beside the steps); None: ask again.

        May be called any number of times before `allocated`; a miss takes no pages, and lets go of what it held.
        """
        self.arrived(request)
        tracked = self._tracked[request.request_id]
        tracked.planned, tracked.to_prove = 0, None
        # Asked only where the request has no KV but what the engine's own cache has.
        tracked.from_before = local_tokens > 0 and self._adapters.was_rewritten(request.lora_request)
        if tracked.from_before:
            self._withdraw(tracked)
        if (
            not self._settings.load
            or tracked.from_before
            or self._adapters.is_mixed(request.lora_request)
            or request.skip_reading_prefix_cache
            or tracked.gave_up
            or request.request_id in self._loading
        ):
            return 0, False
        chain = self._chain(tracked)
        if chain is None or len(chain) * self._block_tokens <= local_tokens or not self._resets.allows(chain.root):
            return 0, False
        self._withdraw(tracked)
        if tracked.asked_s is not None and self._now_s() < tracked.look_s:
            self._num_waiting += 1
            return None, False
        found = self.fail_open.call(lambda: self._ask(tracked, chain), None)
        if found is None:
            return 0, False
        waited_s = self._waited_s(tracked)
        if self._worth_waiting(tracked, found, waited_s):
            return None, False
        return self._plan(tracked, found, local_tokens)

    def _ask(self, tracked: _Tracked, chain: Chain) -> Match:
        if tracked.asked_s is None:
            most_s = self._settings.match_deadline_ms / 1e3 * IN_TIME
            tracked.lower_s = self.cost.plan_ask_s(tracked.request.num_tokens, most_s)
        wait_s = tracked.lower_s
        if wait_s is not None:
            wait_s = min(wait_s, _ALONE_S) if self._may_be_alone and len(self._tracked) == 1 else 0.0
        return self._store.match(chain, tracked.key, hint=self._hint(tracked), wait_s=wait_s, soon=True)

    def _hint(self, tracked: _Tracked) -> Hint:
        request = tracked.request
        return hint_of(request.kv_transfer_params, prompt_tokens=request.num_prompt_tokens)

    def _waited_s(self, tracked: _Tracked) -> float:
        now_s = self._now_s()
        if tracked.asked_s is None:
            tracked.asked_s = tracked.found_s = now_s
            tracked.found_blocks, tracked.look_s = 0, 0.0
        return now_s - tracked.asked_s

    def _worth_waiting(self, tracked: _Tracked, match: Match, waited_s: float) -> bool:
        """Whether lower tiers may still answer in time, or somebody else finishes sooner than we would."""
        if not match.settled and waited_s < (tracked.lower_s or 0.0):
            return True
        left_s = self._settings.pending_deadline_ms / 1e3 - waited_s
        if match.num_pending_blocks and left_s > 0:
            now_s, limit_s = self._now_s(), self.cost.plan_wait_s(match, tracked.request.num_tokens)
            if match.num_blocks > tracked.found_blocks:
                tracked.found_blocks, tracked.found_s = match.num_blocks, now_s
            if now_s - tracked.found_s < limit_s:
                tracked.look_s = now_s + min(left_s, max(_LOOK_S, _LOOK_SHARE * limit_s))
                self._num_waiting += 1
                return True
        return False

    def _plan(self, tracked: _Tracked, match: Match, local_tokens: int) -> tuple[int, bool]:
        tracked.asked_s = None
        start = local_tokens // self._block_tokens
        stop = self.cost.plan_load(match, tracked.request.num_tokens, start=start)
        tracked.in_store = match.num_host_blocks
        tracked.num_saved = max(tracked.num_saved, match.num_host_blocks)
        partial_tokens = 0
        if (stop + 1) * self._block_tokens > local_tokens:
            have = max(0, local_tokens - stop * self._block_tokens)
            partial_tokens = self._match_partial(tracked, match, stop, have)
        tokens = stop * self._block_tokens + partial_tokens - local_tokens
        stop += bool(partial_tokens)
        if stop <= start or tokens <= 0:
            self._forget(tracked)
            return 0, False
        tracked.planned, tracked.partial_tokens, tracked.local_tokens = stop, partial_tokens, local_tokens
        seconds = self.cost.load_s(HOST_TIER, stop - start)
        seconds = seconds or (stop - start) * self.cost.block_bytes / _UNSEEN_BYTES_PER_S
        tracked.in_step = (
            stop - bool(partial_tokens) <= match.num_host_blocks and seconds * 1e3 <= self._settings.sync_load_ms
        )
        return tokens, not tracked.in_step

    def _match_partial(self, tracked: _Tracked, match: Match, stop: int, have: int) -> int:
        """Tokens after `stop` blocks that the beginning of another chain's block brings; the engine has `have`.

        None of opaque pages: what of a page is the first tokens' is not known.
        """
        num_tokens = tracked.request.num_tokens
        if self._is_opaque or not self.cost.plan_partial(match, stop, num_tokens, have=have):
            return 0
        found: int = self.fail_open.call(lambda: self._store.match_partial(tracked.key), 0)
        found = min(found, num_tokens - 1 - stop * self._block_tokens)
        return found if self.cost.is_worth_block(stop, num_tokens, found, have=have) else 0

    def _forget(self, tracked: _Tracked) -> None:
        self.fail_open.call(lambda: self._store.forget(tracked.key), None)

    def _chain(self, tracked: _Tracked) -> Chain | None:
        """The request's chain over all tokens it has; None while its identity is not known."""
        request = tracked.request
        if tracked.chain is None:
            if not tracked.adapter.done() or tracked.adapter.exception() is not None:
                return None
            salt = (request.cache_salt or "").encode()
            tracked.chain = Chain(self._roots.root(tracked.adapter.result().digest, salt))
        chain, known = tracked.chain, tracked.chain.num_tokens
        if request.num_tokens < known:
            # A streaming session took tokens back: what was hashed is no longer what the request says.
            tracked.chain, tracked.num_saved, tracked.told = None, 0, 0
            return self._chain(tracked)
        if request.num_tokens > known:
            media = [item for item in tracked.media if known <= item[0] < request.num_tokens]
            chain.extend(request.all_token_ids[known:], media=media)
        return chain

    # -- loading -----------------------------------------------------------------------------------------------

    def allocated(self, request: EngineRequest, pages: Sequence[int], external_tokens: int) -> None:
        """The engine has pages for the request: turn the plan into a load, or drop it."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or request.request_id in self._loading:
            return
        if external_tokens <= 0 or not tracked.planned:
            if tracked.planned:
                tracked.planned = 0
                self._forget(tracked)
            self._announce(tracked)
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
            pages=tuple(pages),
            lease=None,
            in_step=tracked.in_step,
            timeout_s=self._settings.load_deadline_ms / 1e3 * IN_TIME,
        )
        self.figures.add("loads")
        tracked.to_prove = range(order.first_token, order.stop_token)
        self._announce(tracked)
        if load is None:
            self._loads.append(order)  # workers report it as failed
            return
        self._loading[request.request_id] = _Loading(load, start, stop)
        if order.in_step:
            self._loads.append(replace(order, lease=self.fail_open.call(lambda: self._share(load), None)))
        else:
            # Sharing may wait for blocks of lower tiers, which this thread must not.
            sharing = self._pool.submit(lambda: self.fail_open.call(lambda: self._share(load), None))
            self._sharing.append(_Sharing(order, sharing, self._now_s() + order.timeout_s))

    def _shared(self) -> None:
        """Order what has been shared by now, and what has not been in time, which fails."""
        waiting, now_s = [], self._now_s()
        for item in self._sharing:
            if item.lease.done():
                left_s = max(0.0, item.deadline_s - now_s)
                self._loads.append(replace(item.order, lease=item.lease.result(), timeout_s=left_s))
            elif now_s >= item.deadline_s:
                self._loads.append(item.order)
            else:
                waiting.append(item)
        self._sharing = waiting

    def _announce(self, tracked: _Tracked) -> None:
        chain = tracked.chain
        start = max(tracked.in_store, tracked.num_saved)
        if not self._settings.save or tracked.from_before or chain is None or not self._resets.allows(chain.root):
            return
        if tracked.announcement is None and start < len(chain):
            mark = self.fail_open.call(lambda: self._store.announce(chain, start, len(chain)), None)
            tracked.announcement = None if mark is None else self._announced.keep(mark)
            tracked.announced_to = len(chain)

    def _withdraw(self, tracked: _Tracked) -> None:
        mark, tracked.announcement = tracked.announcement, None
        if mark is not None:
            mark.withdraw()

    # -- saving ------------------------------------------------------------------------------------------------

    def orders(self, step: Scheduled) -> Orders:
        """What workers must do in the step just scheduled."""
        if self._sharing:
            self._shared()
        self._note_step(step)
        self._resets.go_on()
        if self._settings.save:
            for request_id, num_scheduled in step.num_scheduled.items():
                tracked = self._tracked.get(request_id)
                computed = step.computed[request_id]
                if (
                    tracked is None
                    or tracked.from_before
                    or computed + num_scheduled < (tracked.num_saved + 1) * self._block_tokens  # most steps
                ):
                    continue
                request = tracked.request
                if self._saves_later and request.num_tokens + 1 < request.num_prompt_tokens + request.max_tokens:
                    num_scheduled = 0  # a step follows, unless pages are taken back: what they held is lost then
                stop = storable_running(computed, num_scheduled, request.num_tokens, self._block_tokens)
                if stop > tracked.num_saved:
                    self._save(tracked, stop, step.pages[request_id], holds=False)
        if not step.num_scheduled and self._num_waiting and not self._loads:
            time.sleep(_REST_S)
        self._num_waiting = 0
        proofs, idle = self._proofs(step), not step.num_scheduled
        if not (self._loads or self._saves or self._ended or proofs or self._reset or idle):
            return NO_ORDERS
        loads, saves, ended = tuple(self._loads), tuple(self._saves), tuple(self._ended)
        made = Orders(loads, saves, ended, proofs, idle=idle, reset=self._reset)
        self._loads, self._saves, self._ended, self._reset = [], [], [], False
        return made

    def _proofs(self, step: Scheduled) -> tuple[Proof, ...]:
        """What to look at again when the step has run, in which the engine reads adapters it does not have."""
        proofs = []
        for request_id in step.num_scheduled:
            tracked = self._tracked.get(request_id)
            if tracked is None or tracked.to_prove is None:
                continue
            loaded, tracked.to_prove = tracked.to_prove, None
            if (files := tracked.adapter.result().files) is not None:
                proofs.append(Proof(files, tuple(step.pages[request_id]), loaded.start, loaded.stop))
        return tuple(proofs)

    def _save(self, tracked: _Tracked, stop: int, pages: Sequence[int], *, holds: bool) -> bool:
        """Order blocks up to `stop` to be saved; False where there is nothing to save."""
        chain = self._chain(tracked)
        blocks = plan_save(stop * self._block_tokens, tracked.num_saved, self._block_tokens)
        if chain is None or not blocks or self.fail_open.resting or not self._resets.allows(chain.root):
            return False
        if self._adapters.is_mixed(tracked.request.lora_request):
            self._withdraw(tracked)
            return False
        if tracked.num_saved >= tracked.announced_to:
            self._withdraw(tracked)  # the steps that saved what was announced have run
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
                pages=tuple(pages),
                holds=holds,
                hint=self._hint(tracked),
                files=tracked.adapter.result().files,
            )
        )
        tracked.num_saved = stop
        return True

    def ended(self, request: EngineRequest, pages: Sequence[int]) -> bool:
        """The request is over. True: its pages must stay until workers report that they were saved."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False
        self._withdraw(tracked)
        self._forget(tracked)
        if request.request_id in self._loading and not self._reported(request.request_id):
            self._ended.append(request.request_id)
            return False  # the engine keeps the pages until the load is reported
        held = False
        if self._settings.save and not tracked.from_before:
            stop = storable_finished(
                request.num_computed_tokens, request.num_prompt_tokens, request.num_tokens, self._block_tokens
            )
            if stop > tracked.num_saved:
                held = self._save(tracked, stop, pages, holds=True)
        if not held:
            self._ended.append(request.request_id)
        return held

    def _reported(self, request_id: str) -> bool:
        report = self._loading[request_id].report
        return report is not None and report.num_ranks >= self._num_ranks

    # -- reports -----------------------------------------------------------------------------------------------

    def reported(self, report: Report) -> None:
        """Workers' news: release what is done, learn what it cost, take back what was not saved."""
        if report.is_foreign:
            self._rest()
        for request_id, done in report.loads.items():
            loading = self._loading.get(request_id)
            if loading is None:
                self._note_load(request_id, done, start=0, stop=None)
                continue
            loading.report = done if loading.report is None else loading.report.joined(done)
            if loading.report.num_ranks >= self._num_ranks:
                del self._loading[request_id]
                self._note_load(request_id, loading.report, start=loading.start, stop=loading.stop)
                self._note_saved(loading, loading.report)
                self.fail_open.call(loading.load.close, None)
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
            self._withdraw(tracked)

    def _note_load(self, request_id: str, done: LoadReport, *, start: int, stop: int | None) -> None:
        for tier, num_bytes in done.num_bytes.items():
            self.cost.seen_load(tier, num_bytes // self._num_ranks, done.seconds.get(tier, 0.0))
            self.figures.add(f"loaded_bytes.{tier}", num_bytes)
            self.figures.add(f"load_s.{tier}", done.seconds.get(tier, 0.0))
        tracked = self._tracked.get(request_id)
        failed = stop is None or done.stop < stop
        if failed:
            self.figures.add("failed_loads")
        if tracked is not None:
            tracked.gave_up = tracked.gave_up or failed
        if tracked is not None and failed:
            # Where nothing came of it, what it hangs from may be gone from the store as well, and is saved again.
            brought = stop is not None and done.stop > start
            tracked.num_saved = min(tracked.num_saved, done.stop if brought else 0)

    def _note_saved(self, loading: _Loading, done: LoadReport) -> None:
        """Tell the store what a load was good for."""
        past = loading.start * self._block_tokens
        num_tokens = done.stop * self._block_tokens - past
        saved_s = self.cost.saved_s(num_tokens, sum(done.seconds.values()), past_tokens=past) if num_tokens > 0 else 0.0
        if saved_s:
            self.fail_open.call(lambda: self._store.note_saved(saved_s), None)

    def _note_step(self, step: Scheduled) -> None:
        """Remember a step of one request's prefill: its time tells what computing costs."""
        self._step = None
        if len(step.num_scheduled) == 1:
            ((request_id, new_tokens),) = step.num_scheduled.items()
            if new_tokens > 1 and not any(order.in_step for order in self._loads):
                self._step = _Step(self._now_s(), new_tokens, step.computed[request_id])

    def stepped(self) -> None:
        """The step last scheduled has run."""
        step, self._step = self._step, None
        if step is not None:
            self.cost.seen_prefill(step.new_tokens, step.past_tokens, self._now_s() - step.began_s)

    # -- care --------------------------------------------------------------------------------------------------

    def clear(self) -> bool:
        """Remove every block under the roots this engine has used; True where every tier of the store did.

        vLLM empties caches when weights have changed. So what was computed before is not saved any more, and requests
        that go on save nothing until the engine computes them anew. Loads under way fail. What steps save that were
        scheduled before is removed when they have run. What could not be removed is not used: see `Resets`.
        """
        self._saves = [replace(order, start=order.stop) for order in self._saves if order.holds]
        for tracked in self._tracked.values():
            self._withdraw(tracked)
            self._forget(tracked)
            tracked.from_before, tracked.asked_s = True, None
            tracked.num_saved = tracked.in_store = tracked.planned = 0
        self._loads += [replace(item.order, lease=None) for item in self._sharing]
        is_new, self._sharing, self._reset = not self._reset, [], True
        return self._resets.begin([self._roots.root(b"", b""), *self._roots.all()], is_new=is_new)

    def close(self) -> None:
        for tracked in self._tracked.values():
            self._withdraw(tracked)
            self._forget(tracked)
        for loading in self._loading.values():
            self.fail_open.call(loading.load.close, None)
        self._tracked.clear()
        self._loading.clear()
        self._announced.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._resets.close()
        self._adapters.close()

    def check(self) -> list[str]:
        """What is still held; empty when no request is under way."""
        faults = [f"request {name} is tracked" for name in self._tracked]
        return faults + [f"the load of {name} was not reported" for name in self._loading]
