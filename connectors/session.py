# SPDX-License-Identifier: Apache-2.0
"""One request of an engine that runs in this process: load, announce, save, let go."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from connectors.base import CostModel, FailOpen, plan_save
from kvstore.api import DEVICE_TIER, HOST_TIER, NO_HINT, Announcement, Hint, KnowsWindows, Match, Store
from kvstore.block import Chain
from kvstore.device import DeviceOverlay

_PENDING_POLL_S = 0.002
_PENDING_POLL_SHARE = 0.01
"""Between two looks at pending blocks, of what they are predicted to take: who waits must not slow who computes."""
_RENEW_S = 1.0
"""Between renewals of an announcement; a mark lives for 2.5 s."""


class EngineMemory(Protocol):
    """Where an engine keeps one sequence's KV, block by block."""

    def write_block(self, index: int, views: Sequence[memoryview]) -> None:
        """Copy a stored block in: one view a part, all parts of the layout; they are read until `finish`."""

    def read_block(self, index: int, views: Sequence[memoryview | None]) -> None:
        """Copy a block out into slots; None where the part is there already."""

    def write_tensor(self, index: int, block: torch.Tensor) -> None:
        """Copy in a block that lies on the device, `[layers, kv, tokens, heads, head_dim]`."""

    def read_tensor(self, index: int, block: torch.Tensor) -> None:
        """Copy a block out into device memory."""

    def finish(self) -> None:
        """Return when the copies so far are done, whatever they run on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What the sessions of one engine share. `store` None is a device cache alone; both None saves nothing."""

    store: Store | None
    overlay: DeviceOverlay | None
    cost: CostModel
    fail_open: FailOpen
    max_wait_s: float
    """Longest wait of a request for an answer of lower tiers."""


class KeptAnnouncement:
    """An announcement that stays alive while a forward pass keeps the engine's thread busy."""

    def __init__(
        self, mark: Announcement, fail_open: FailOpen, predicted_s: float | None, *, every_s: float = _RENEW_S
    ) -> None:
        """`predicted_s`: what the pass will take; None where nobody knows."""
        self._every_s = every_s
        self._mark = mark
        self._fail_open = fail_open
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if predicted_s is None or predicted_s > every_s:
            self._thread = threading.Thread(target=self._renew, name="kvstore-announce", daemon=True)
            self._thread.start()

    def _renew(self) -> None:
        while not self._done.wait(self._every_s):
            self._fail_open.call(self._mark.renew, None)

    def withdraw(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()  # a renewal after this would announce again
        self._fail_open.call(self._mark.withdraw, None)


class Session:
    """One request: what it reuses, and what it leaves behind.

    load → announce → computed … → close. None of them raises for anything the store does.

    Attributes:
        hit_tokens: tokens reused, by tier; loaded_bytes: their bytes.
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
        hint: Hint = NO_HINT,
    ) -> None:
        self.hit_tokens: dict[str, int] = {}
        self.loaded_bytes = 0
        self.load_s = 0.0
        self.saved_blocks = 0
        self._connection = connection
        self._memory = memory
        self._chain = chain
        self._request = request
        self._prompt_tokens = prompt_tokens
        self._hint = hint
        self._announcement: KeptAnnouncement | None = None
        self._on_device = 0  # leading blocks the overlay has
        self._in_store = 0  # leading blocks the store's host tier has
        self._refused = False
        self._partial_tokens = 0  # after the loaded blocks, from one that begins alike

    # -- loading ---------------------------------------------------------------------------------------------

    def load(self) -> int:
        """Bring in what is there and cheaper to load than to compute; returns the tokens in place."""
        began_s = time.monotonic()
        num_blocks = on_device = self._load_from_device()
        if self._connection.store is not None:
            num_blocks = self._connection.fail_open.call(lambda: self._load_from_store(on_device), on_device)
        if num_blocks > on_device:
            self._save_to_device(num_blocks)
        self.load_s = time.monotonic() - began_s
        num_tokens = num_blocks * self._chain.block_tokens + self._partial_tokens
        self._note_saved(num_tokens)
        return num_tokens

    def _note_saved(self, num_tokens: int) -> None:
        """Tell the store what it was good for."""
        store = self._connection.store
        saved_s = self._connection.cost.saved_s(num_tokens, self.load_s)
        if store is not None and saved_s and self.loaded_bytes:
            self._connection.fail_open.call(lambda: store.note_saved(saved_s), None)

    def _load_from_device(self) -> int:
        overlay, cost = self._connection.overlay, self._connection.cost
        if overlay is None:
            return 0
        cap = cost.max_blocks(self._prompt_tokens)
        with overlay.match(self._chain, hint=self._hint) as run:
            self._on_device = run.num_blocks
            for index, block in run:
                if index < cap:
                    self._memory.write_tensor(index, block)
            self._memory.finish()
        num_blocks = min(self._on_device, cap)
        self._count(DEVICE_TIER, num_blocks)
        return num_blocks

    def _load_from_store(self, on_device: int) -> int:
        """Blocks in place, those from the device included. Raises what the store raises."""
        store = self._connection.store
        assert store is not None
        match = self._match(store)
        self._in_store = match.num_host_blocks
        if on_device:
            # Served from above, the chain's head would go cold below.
            store.touch(self._chain, on_device, self._hint)
        stop = self._connection.cost.plan_load(match, self._prompt_tokens, start=on_device)
        partial_tokens = self._match_partial(store, match, stop) if stop >= on_device else 0
        if stop <= on_device and not partial_tokens:
            store.forget(self._request)
            return on_device
        last = stop + bool(partial_tokens)
        counts: dict[str, int] = {}
        seconds: dict[str, float] = {}
        at, then_s = on_device, time.monotonic()
        with store.load(self._request, stop, start=on_device, partial_tokens=partial_tokens) as load:
            for block in load:
                if block.index != at:
                    break
                self._memory.write_block(at, block.views)
                at += 1
                if not (at < last and isinstance(load, KnowsWindows) and not load.comes_in_windows(at)):
                    self._memory.finish()  # the block may be gone as soon as the next one is asked for
                now_s = time.monotonic()
                counts[block.tier] = counts.get(block.tier, 0) + 1
                seconds[block.tier] = seconds.get(block.tier, 0.0) + now_s - then_s
                then_s = now_s
            self._memory.finish()
            if not load.intact():
                return on_device  # something may have been overwritten while it was copied: none of it counts
        whole = min(at, stop)
        self._in_store = max(self._in_store, whole)
        for tier, count in counts.items():
            self._count(tier, count)
            self._connection.cost.seen_load(tier, count * self._connection.cost.block_bytes, seconds[tier])
        if at > stop:
            self._partial_tokens = partial_tokens
            # What came with the block beyond its beginning is not this prompt's, and counts for nothing.
            self.hit_tokens[HOST_TIER] -= self._chain.block_tokens - partial_tokens
        return whole

    def _match_partial(self, store: Store, match: Match, stop: int) -> int:
        """Tokens after `stop` blocks that the beginning of another chain's block brings."""
        if not self._connection.cost.plan_partial(match, stop, self._prompt_tokens):
            return 0
        rest = self._prompt_tokens - 1 - stop * self._chain.block_tokens
        return min(store.match_partial(self._request), rest)

    def _match(self, store: Store) -> Match:
        """What the store has, after waiting for blocks that somebody else will finish before we could."""
        wait_s = self._connection.cost.plan_ask_s(self._prompt_tokens, self._connection.max_wait_s)
        match = store.match(self._chain, self._request, hint=self._hint, wait_s=wait_s)
        again_s = None if wait_s is None else 0.0
        cost, since_s, num_blocks = self._connection.cost, time.monotonic(), match.num_blocks
        while match.num_pending_blocks:
            limit_s = cost.plan_wait_s(match, self._prompt_tokens)
            if time.monotonic() - since_s >= limit_s:
                break
            time.sleep(max(_PENDING_POLL_S, _PENDING_POLL_SHARE * limit_s))
            match = store.match(self._chain, self._request, hint=self._hint, wait_s=again_s)
            if match.num_blocks > num_blocks:
                since_s, num_blocks = time.monotonic(), match.num_blocks
        return match

    def _count(self, tier: str, num_blocks: int) -> None:
        if num_blocks:
            self.hit_tokens[tier] = num_blocks * self._chain.block_tokens
            self.loaded_bytes += num_blocks * self._connection.cost.block_bytes

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
        """The first `num_tokens` tokens of the chain ran through the model: save the blocks they fill."""
        block_tokens = self._chain.block_tokens
        if self._connection.overlay is not None and plan_save(num_tokens, self._on_device, block_tokens):
            self._save_to_device(num_tokens // block_tokens)
        blocks = plan_save(num_tokens, self._in_store, block_tokens)
        if self._connection.store is not None and blocks and not self._refused:
            self._connection.fail_open.call(lambda: self._save_to_store(blocks), None)

    def _save_to_device(self, stop: int) -> None:
        overlay = self._connection.overlay
        if overlay is not None:
            overlay.save(self._chain, self._on_device, stop, self._memory.read_tensor, hint=self._hint)
            self._memory.finish()
            self._on_device = max(self._on_device, stop)

    def _save_to_store(self, blocks: range) -> None:
        store = self._connection.store
        assert store is not None
        with store.save(self._chain, blocks.start, blocks.stop, hint=self._hint) as save:
            for index in save.indices:
                self._memory.read_block(index, save.views(index))
            self._memory.finish()
            if save.indices:
                self.saved_blocks += save.commit()
            # Refused for room or for a missing parent: what comes after it would be refused as well.
            self._refused = save.num_refused > 0
        self._in_store = blocks.stop

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        store, mark = self._connection.store, self._announcement
        self._announcement = None
        if store is not None:
            if mark is not None:
                mark.withdraw()
            self._connection.fail_open.call(lambda: store.forget(self._request), None)
