# SPDX-License-Identifier: Apache-2.0
"""One request of an engine that runs in this process: load, announce, save, let go."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

from connectors.base import CostModel, FailOpen, plan_save
from connectors.engine_memory import EngineMemory
from connectors.session_announcement import KeptAnnouncement
from connectors.session_load import Loading
from kvstore.api import DEVICE_TIER, HOST_TIER, NO_HINT, GivesOpenRun, Hint, Match, Save, Store
from kvstore.block import Chain
from kvstore.device import DeviceOverlay

T = TypeVar("T")

_PENDING_POLL_S = 0.002
_PENDING_POLL_SHARE = 0.01
"""Between two looks at pending blocks, of what they are predicted to take: who waits must not slow who computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What the sessions of one engine share. `store` None is a device cache alone; both None saves nothing."""

    store: Store | None
    overlay: DeviceOverlay | None
    cost: CostModel
    fail_open: FailOpen
    max_wait_s: float
    """Longest wait of a request for an answer of lower tiers."""


@dataclass(frozen=True, eq=False)
class _Saving:
    """A save whose copies may still be under way; `held` lets go of it, when they are done."""

    held: ExitStack
    save: Save
    start: int


class Session:
    """One request: what it reuses, and what it leaves behind.

    load → announce → (a forward pass is ordered → settle → computed) … → close. None of them raises for anything the
    store does.

    Args:
        in_place: leading blocks of the chain that are in `memory` from the start, fewer than the whole prompt.

    Attributes:
        num_tokens: in place, from the start or by what was loaded.
        sound_tokens: leading tokens of the chain whose KV is in `memory` for certain: there from the start, computed,
            or loaded and found intact.
        load_was_late: whether the pass over the load may have waited for it, or was in vain: its time tells nothing.
        hit_tokens: tokens reused, by tier, those in place as the device's; loaded_bytes: what was copied for them.
        saved_blocks: blocks that the store did not have and now has.
    """

    def __init__(
        self,
        connection: Connection,
        memory: EngineMemory,
        chain: Chain,
        request: str,
        *,
        prompt_tokens: int,
        in_place: int = 0,
        hint: Hint = NO_HINT,
    ) -> None:
        self.num_tokens = self.sound_tokens = in_place * chain.block_tokens
        self.load_was_late = False
        self.hit_tokens: dict[str, int] = {}
        self.loaded_bytes = 0
        self.load_s = 0.0
        self.saved_blocks = 0
        self._connection = connection
        self._memory = memory
        self._chain = chain
        self._request = request
        self._prompt_tokens = prompt_tokens
        self._in_place = in_place
        self._hint = hint
        self._announcement: KeptAnnouncement | None = None
        self._loading: Loading | None = None
        self._saving: _Saving | None = None
        self._on_device = 0  # leading blocks the overlay has
        self._in_store = 0  # leading blocks the store's host tier has
        self._holds = False  # whether the store may keep something for this request
        self._refused = False

    # -- loading ---------------------------------------------------------------------------------------------

    def load(self) -> int:
        """Bring in what is there and cheaper to load than to compute; returns the tokens in place.

        On a device it begins to: what the engine computes over them counts only once `settle` has said so.
        """
        began_s = time.monotonic()
        block_tokens = self._chain.block_tokens
        num_blocks = self._load_from_device()
        self.num_tokens = self.sound_tokens = num_blocks * block_tokens
        if self._connection.store is not None:
            self._loading = self._connection.fail_open.call(lambda: self._load_from_store(num_blocks), None)
        self.load_s = time.monotonic() - began_s
        if self._loading is None:
            self._note_saved()
        else:
            self.num_tokens = self._loading.stop * block_tokens + self._loading.partial_tokens
        if self._memory.is_done:
            self.settle()
        return self.num_tokens

    @property
    def is_loading(self) -> bool:
        """Whether a forward pass ordered now is one over the load: `load_was_late` says, once it is settled, more."""
        return self._loading is not None

    def settle(self) -> bool:
        """Wait for the copies under way, as the engine does by itself; after a forward pass was ordered.

        False where that pass may have read what had been overwritten in the store: nothing that it computed may be
        used, and `num_tokens` are in place.
        """
        self._settle_save()
        loading, self._loading = self._loading, None
        return loading is None or self._settle_load(loading)

    def _settle_load(self, loading: Loading) -> bool:
        began_s, late = time.monotonic(), not self._memory.is_done
        self.load_was_late = late
        self._memory.finish()  # whatever the store does
        ended_s = time.monotonic()
        self.load_s += ended_s - began_s
        if not _let_go(loading.held, self._connection.fail_open, loading.load.intact, False):
            self.num_tokens = loading.start * self._chain.block_tokens
            self.load_was_late = True
            self._in_store = 0  # what was there may be gone; what is not is passed over
            self._note_saved()
            return False
        in_all = sum(loading.num_blocks.values())
        for tier, count in loading.num_blocks.items():
            # What was done before anybody looked took a time that nobody knows: that it was short is near enough.
            copying_s = (ended_s - loading.begun_s) * count / in_all if late else 0.0
            self._count(tier, count)
            num_bytes = count * self._connection.cost.block_bytes
            self._connection.cost.seen_load(tier, num_bytes, loading.seconds[tier] + copying_s)
        if loading.partial_tokens:
            # What came with the block beyond its beginning is not this prompt's, and counts for nothing.
            self.hit_tokens[HOST_TIER] -= self._chain.block_tokens - loading.partial_tokens
        self.sound_tokens = self.num_tokens
        self._in_store = max(self._in_store, loading.stop)
        if loading.stop > loading.start:
            self._save_to_device(loading.stop)
        self._note_saved()
        return True

    def _note_saved(self) -> None:
        """Tell the store what it was good for."""
        store = self._connection.store
        if store is None or not self.hit_tokens:
            return
        saved_s = self._connection.cost.saved_s(self.num_tokens, self.load_s)
        if saved_s:
            self._connection.fail_open.call(lambda: store.note_saved(saved_s), None)

    def _load_from_device(self) -> int:
        """Begin to copy in what the overlay has beyond the blocks in place; returns how many there are then."""
        overlay, num_blocks = self._connection.overlay, self._in_place
        if overlay is not None:
            # All of the chain, though much of it may be in place: its head would go cold, and be saved again.
            with overlay.match(self._chain, hint=self._hint) as run:
                self._on_device = run.num_blocks
                cap = self._connection.cost.max_blocks(self._prompt_tokens)
                rows = run.rows.cut(num_blocks, cap)
                self._memory.write_rows(rows)
                num_blocks += len(rows)
        self._count(DEVICE_TIER, num_blocks, in_place=self._in_place)
        return num_blocks

    def _load_from_store(self, on_device: int) -> Loading | None:
        """Begin to load what follows `on_device` blocks. Raises what the store raises."""
        store = self._connection.store
        assert store is not None
        match = self._match(store, on_device)
        self._holds = True
        self._in_store = match.num_host_blocks
        if on_device:
            # Served from above, the chain's head would go cold below.
            store.touch(self._chain, on_device, self._hint)
        stop = self._connection.cost.plan_load(match, self._prompt_tokens, start=on_device)
        partial_tokens = self._match_partial(store, match, stop) if stop >= on_device else 0
        if stop <= on_device and not partial_tokens:
            store.forget(self._request)
            return None
        with ExitStack() as held:
            load = held.enter_context(store.load(self._request, stop, start=on_device, partial_tokens=partial_tokens))
            held.callback(self._memory.finish)  # before the load goes, however this ends
            made = Loading(load, on_device)
            made.bring(self._memory, stop, partial_tokens, self._connection.cost.block_bytes)
            made.held = held.pop_all()
        return made

    def _match_partial(self, store: Store, match: Match, stop: int) -> int:
        """Tokens after `stop` blocks that the beginning of another chain's block brings."""
        cost, num_tokens = self._connection.cost, self._prompt_tokens
        if not cost.plan_partial(match, stop, num_tokens):
            return 0
        found = min(store.match_partial(self._request), num_tokens - 1 - stop * self._chain.block_tokens)
        return found if cost.is_worth_block(stop, num_tokens, found) else 0

    def _match(self, store: Store, on_device: int) -> Match:
        """What the store has, after waiting for blocks that somebody else will finish before we could."""
        wait_s = self._connection.cost.plan_ask_s(self._prompt_tokens, self._connection.max_wait_s, start=on_device)
        match = store.match(self._chain, self._request, hint=self._hint, wait_s=wait_s)
        again_s = None if wait_s is None else 0.0
        cost, since_s, num_blocks = self._connection.cost, time.monotonic(), match.num_blocks
        while match.num_pending_blocks:
            limit_s = cost.plan_wait_s(match, self._prompt_tokens, start=on_device)
            if time.monotonic() - since_s >= limit_s:
                break
            time.sleep(max(_PENDING_POLL_S, _PENDING_POLL_SHARE * limit_s))
            match = store.match(self._chain, self._request, hint=self._hint, wait_s=again_s)
            if match.num_blocks > num_blocks:
                since_s, num_blocks = time.monotonic(), match.num_blocks
        return match

    def _count(self, tier: str, num_blocks: int, *, in_place: int = 0) -> None:
        if num_blocks:
            self.hit_tokens[tier] = num_blocks * self._chain.block_tokens
            self.loaded_bytes += (num_blocks - in_place) * self._connection.cost.block_bytes

    # -- saving ----------------------------------------------------------------------------------------------

    def announce(self, num_tokens: int) -> None:
        """Say that what follows the first `num_tokens` tokens of the chain is being computed here."""
        store, start = self._connection.store, num_tokens // self._chain.block_tokens
        if store is not None and start < len(self._chain):
            fail_open, cost = self._connection.fail_open, self._connection.cost
            mark = fail_open.call(lambda: store.announce(self._chain, start, len(self._chain)), None)
            if mark is not None:
                predicted_s = cost.prefill_s(self._prompt_tokens - num_tokens, num_tokens)
                self._announcement = KeptAnnouncement(mark, fail_open, predicted_s)

    def computed(self, num_tokens: int) -> None:
        """The first `num_tokens` tokens of the chain ran through the model: save the blocks they fill.

        On a device it begins to: they are published by the next call that finds them copied, `settle` or `close`.
        """
        block_tokens = self._chain.block_tokens
        self.sound_tokens = max(self.sound_tokens, num_tokens)
        if self._connection.overlay is not None and plan_save(num_tokens, self._on_device, block_tokens):
            self._save_to_device(num_tokens // block_tokens)
        if self._saving is not None and self._memory.is_done:
            self._settle_save()
        blocks = plan_save(num_tokens, self._in_store, block_tokens)
        if self._connection.store is not None and blocks and not self._refused:
            self._settle_save()
            self._saving = self._connection.fail_open.call(lambda: self._save_to_store(blocks), None)
            if self._memory.is_done:
                self._settle_save()

    def _save_to_device(self, stop: int) -> None:
        overlay = self._connection.overlay
        if overlay is not None:
            overlay.save(self._chain, self._on_device, stop, self._memory.read_rows, hint=self._hint)
            self._on_device = max(self._on_device, stop)

    def _save_to_store(self, blocks: range) -> _Saving:
        """Begin to copy out what the store has room for. Raises what the store raises."""
        store = self._connection.store
        assert store is not None
        with ExitStack() as held:
            save = held.enter_context(store.save(self._chain, blocks.start, blocks.stop, hint=self._hint))
            held.callback(self._memory.finish)  # before slots are given up, however this ends
            if save.indices:  # by arrays where that goes: views of each are 4 us of the engine's thread
                views = ((index, save.views(index)) for index in save.indices)
                self._memory.read_blocks(save.open_run() if isinstance(save, GivesOpenRun) else views)
            # Refused for room or for a missing parent: what comes after it would be refused as well.
            self._refused = save.num_refused > 0
            self._in_store = blocks.stop
            return _Saving(held.pop_all(), save, blocks.start)

    def _settle_save(self) -> None:
        """Publish what was saved, when it is copied."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        self._memory.finish()
        commit = lambda: saving.save.commit() if saving.save.indices else 0
        published = _let_go(saving.held, self._connection.fail_open, commit, None)
        if published is None:
            self._in_store = min(self._in_store, saving.start)  # to be saved again
        else:
            self.saved_blocks += published

    def close(self) -> None:
        """Publish what is left, and let go of everything. Idempotent."""
        self._settle_save()
        if self._loading is not None:  # nobody came to know whether it was any good
            self._connection.fail_open.let_go(self._loading.held.close)
            self._loading = None
        self._memory.finish()
        store, mark = self._connection.store, self._announcement
        self._announcement = None
        if store is not None:
            if mark is not None:
                mark.withdraw()
            if self._holds:
                self._connection.fail_open.let_go(lambda: store.forget(self._request))


def _let_go(held: ExitStack, fail_open: FailOpen, last: Callable[[], T], otherwise: T) -> T:
    """What `last` returns, asked before `held` is let go of; it is, too, where the store is not to be asked."""

    def ask() -> T:
        with held:
            return last()

    try:
        return fail_open.call(ask, otherwise)
    finally:
        fail_open.let_go(held.close)
