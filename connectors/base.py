# SPDX-License-Identifier: Apache-2.0
"""What all connectors share: deciding what to load and save, and failing open.

CostModel       predicted prefill and load times, learnt while serving
plan_save       which blocks are full and not saved yet
Conversations   chains kept from turn to turn, so that only new tokens are hashed
FailOpen        the one place where a failing store becomes a miss
Session         one request of an engine that runs in this process: load, announce, save, let go
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kvstore.api import DEVICE_TIER, NO_HINT, Announcement, Hint, Match, Store
from kvstore.block import Chain, Root, Tokens, as_u32
from kvstore.device import DeviceOverlay
from kvstore.errors import KVStoreError, LeaseError

log = logging.getLogger("kvstore.connector")
T = TypeVar("T")

_PREFILL_DECAY = 0.95
"""Weight of what was known when a new prefill is seen: about the last twenty count."""
_LOAD_DECAY = 0.8
_RELIEF = 1.02
"""A tier that is passed over gains 2 % of believed speed each time, so that one bad spell is not for ever."""
_MAX_CONVERSATIONS = 4096
_PENDING_POLL_S = 0.002


class LoadRule(Enum):
    """When a block that is there is loaded."""

    MEASURED = "measured"
    """Where loading is predicted to beat computing."""
    ALWAYS = "always"
    """Whenever it is there: for measurements, and where energy matters more than time."""


class CostModel:
    """Learns what prefill and loading cost here, and plans loads by it.

    Prefill of `new` tokens after `past` ones takes a·new + b·new·(past + new/2) seconds: a for the matrix
    products, b for attention. Both are fitted by least squares on relative errors, newest first. A tier loads
    at an averaged rate in bytes per second. What was never seen is taken as free to load or dear to compute: the
    first try of everything is a load, and is measured. Not thread-safe; races cost precision alone.
    """

    def __init__(self, block_tokens: int, block_bytes: int, *, rule: LoadRule = LoadRule.MEASURED) -> None:
        self.rule = rule
        self.block_tokens = block_tokens
        self.block_bytes = block_bytes
        self._rates: dict[str, float] = {}
        self._moments: npt.NDArray[np.float64] = np.zeros(5)
        self._fit: tuple[float, float] | None = None

    def seen_prefill(self, new_tokens: int, past_tokens: int, seconds: float) -> None:
        """A forward pass over `new_tokens` after `past_tokens` took `seconds`."""
        if new_tokens < 1 or seconds <= 0:
            return
        x, y = new_tokens / seconds, new_tokens * (past_tokens + new_tokens / 2) / seconds
        self._moments = self._moments * _PREFILL_DECAY + np.array([x * x, x * y, y * y, x, y])
        self._fit = self._solve()

    def _solve(self) -> tuple[float, float]:
        """(a, b), none negative: where the fit wants one below zero, the other explains all."""
        xx, xy, yy, sum_x, sum_y = self._moments
        det = xx * yy - xy * xy
        if det > 1e-6 * xx * yy:  # else all seen had one shape, which tells a and b apart no more
            a, b = (sum_x * yy - sum_y * xy) / det, (sum_y * xx - sum_x * xy) / det
            if a >= 0 and b >= 0:
                return float(a), float(b)
            if a < 0:
                return 0.0, float(sum_y / yy)
        return float(sum_x / xx), 0.0

    def seen_load(self, tier: str, num_bytes: int, seconds: float) -> None:
        """Bytes of `tier` took `seconds` to be in the engine's memory."""
        if num_bytes < 1 or seconds <= 0:
            return
        rate = num_bytes / seconds
        before = self._rates.get(tier, rate)
        # Averaged as time per byte: a mean of rates would believe the fast ones.
        self._rates[tier] = 1 / (_LOAD_DECAY / before + (1 - _LOAD_DECAY) / rate)

    def prefill_s(self, new_tokens: int, past_tokens: int) -> float | None:
        """Predicted seconds; None before any prefill was seen."""
        if self._fit is None:
            return None
        a, b = self._fit
        return a * new_tokens + b * new_tokens * (past_tokens + new_tokens / 2)

    def load_s(self, tier: str, num_blocks: int) -> float:
        """Predicted seconds; 0 for a tier never loaded from."""
        rate = self._rates.get(tier)
        return 0.0 if rate is None else num_blocks * self.block_bytes / rate

    def plan_load(self, match: Match, prompt_tokens: int, *, start: int = 0) -> int:
        """How many leading blocks to load: fewest seconds to the first token, by what is known.

        Never the whole prompt: its last token must run through the model, or there are no logits to go on from.

        Args:
            start: leading blocks the engine has already; they cost nothing and are not loaded.
        """
        cap = min(match.num_blocks, self.max_blocks(prompt_tokens))
        best, best_s = min(start, cap), self._rest_s(prompt_tokens, min(start, cap))
        if best_s is None or not match.tiers or self.rule is LoadRule.ALWAYS:
            return max(cap, best)
        # Time saved grows faster than linearly in blocks, time spent linearly within a tier: only the ends of
        # tiers can be best.
        at, spent_s = 0, 0.0
        passed_over: list[str] = []
        for tier, count in match.tiers:
            stop = min(at + count, cap)
            spent_s += self.load_s(tier, max(0, stop - max(at, start)))
            at += count
            rest_s = self._rest_s(prompt_tokens, stop)
            if stop > start and rest_s is not None:
                if spent_s + rest_s < best_s:
                    best, best_s = stop, spent_s + rest_s
                    passed_over.clear()
                else:
                    passed_over.append(tier)
        for tier in passed_over:
            if tier in self._rates:
                self._rates[tier] *= _RELIEF
        return best

    def plan_wait_s(self, match: Match, prompt_tokens: int) -> float:
        """How long waiting for the pending blocks can pay: what computing them here would take."""
        cap = self.max_blocks(prompt_tokens)
        pending = min(match.num_blocks + match.num_pending_blocks, cap) - match.num_blocks
        if pending <= 0:
            return 0.0
        return self.prefill_s(pending * self.block_tokens, match.num_blocks * self.block_tokens) or 0.0

    def max_blocks(self, prompt_tokens: int) -> int:
        """Blocks of a prompt that may come from elsewhere: those of its first `prompt_tokens` − 1 tokens."""
        return max(0, prompt_tokens - 1) // self.block_tokens

    def _rest_s(self, prompt_tokens: int, num_blocks: int) -> float | None:
        past = num_blocks * self.block_tokens
        return self.prefill_s(prompt_tokens - past, past)


def plan_save(num_computed_tokens: int, num_saved_blocks: int, block_tokens: int) -> range:
    """Blocks that are full, hold only tokens that ran through the model, and are not saved yet."""
    return range(num_saved_blocks, max(num_saved_blocks, num_computed_tokens // block_tokens))


class Conversations:
    """Chains by conversation id, each with its tokens; the longest unused go first."""

    def __init__(self, root: Root, *, max_conversations: int = _MAX_CONVERSATIONS) -> None:
        self._root = root
        self._max = max_conversations
        self._chains: OrderedDict[str, tuple[Chain, npt.NDArray[np.uint32]]] = OrderedDict()

    def chain(self, conversation: str, tokens: Tokens) -> Chain:
        """A chain over exactly `tokens`: the conversation's own, extended, where they go on from its last turn.

        Where they do not (an edited turn, a template that drops earlier thinking) it is a fresh one; so it is
        for an empty id. A chain is handed out once: `keep` brings it back.
        """
        array = as_u32(tokens)
        chain, known = self._chains.pop(conversation, (None, array[:0]))
        if chain is None or len(known) > len(array) or not np.array_equal(known, array[: len(known)]):
            return Chain(self._root, array)
        chain.extend(array[len(known) :])
        return chain

    def keep(self, conversation: str, chain: Chain, tokens: Tokens) -> None:
        """Keep `chain`, which holds exactly `tokens`, for the next turn."""
        if conversation:
            self._chains[conversation] = (chain, as_u32(tokens))
            while len(self._chains) > self._max:
                self._chains.popitem(last=False)


class FailOpen:
    """Runs store calls so that a failure is a miss: the request goes on, the store is left alone for a while.

    The one place where store errors end. A failure is counted, logged once until things change, and for
    `backoff_s` further calls return at once; then one call tries again.
    """

    def __init__(self, *, backoff_s: float = 1.0, now_s: Callable[[], float] = time.monotonic) -> None:
        self.backoff_s = backoff_s
        self.num_failures = 0
        self.num_skipped = 0
        self._now_s = now_s
        self._down = False
        self._retry_at_s = 0.0

    @property
    def resting(self) -> bool:
        """True while calls are skipped."""
        return self._down and self._now_s() < self._retry_at_s

    def call(self, action: Callable[[], T], otherwise: T) -> T:
        """What `action` returns; `otherwise` where it fails or is skipped."""
        if self.resting:
            self.num_skipped += 1
            return otherwise
        try:
            result = action()
        except LeaseError:
            # The store answered: this hold is gone, which is a miss and no reason to leave the store alone.
            self.num_failures += 1
            return otherwise
        except (KVStoreError, OSError) as error:
            self._fail(error)
            return otherwise
        if self._down:
            self._down = False
            log.info("the store answers again: loads and saves resume")
        return result

    def _fail(self, error: Exception) -> None:
        self.num_failures += 1
        self._retry_at_s = self._now_s() + self.backoff_s
        if not self._down:
            self._down = True
            log.warning("the store failed, going on without it: %s: %s", type(error).__name__, error)


class EngineMemory(Protocol):
    """Where an engine keeps one sequence's KV, block by block."""

    def write_block(self, index: int, views: Sequence[memoryview]) -> None:
        """Copy a stored block in: one view a part, all parts of the layout."""

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
        self._announcement: Announcement | None = None
        self._on_device = 0  # leading blocks the overlay has
        self._in_store = 0  # leading blocks the store's host tier has
        self._refused = False

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
        return num_blocks * self._chain.block_tokens

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
        if stop <= on_device:
            store.forget(self._request)
            return on_device
        counts: dict[str, int] = {}
        seconds: dict[str, float] = {}
        at, then_s = on_device, time.monotonic()
        with store.load(self._request, stop, start=on_device) as load:
            for block in load:
                if block.index != at:
                    break
                self._memory.write_block(at, block.views)
                self._memory.finish()
                at += 1
                now_s = time.monotonic()
                counts[block.tier] = counts.get(block.tier, 0) + 1
                seconds[block.tier] = seconds.get(block.tier, 0.0) + now_s - then_s
                then_s = now_s
            if not load.intact():
                return on_device  # something may have been overwritten while it was copied: none of it counts
        self._in_store = max(self._in_store, at)
        for tier, count in counts.items():
            self._count(tier, count)
            self._connection.cost.seen_load(tier, count * self._connection.cost.block_bytes, seconds[tier])
        return at

    def _match(self, store: Store) -> Match:
        """What the store has, after waiting for blocks that somebody else will finish before we could."""
        match = store.match(self._chain, self._request, hint=self._hint, wait_s=self._connection.max_wait_s)
        deadline_s = time.monotonic() + self._connection.cost.plan_wait_s(match, self._prompt_tokens)
        while match.num_pending_blocks and time.monotonic() < deadline_s:
            time.sleep(_PENDING_POLL_S)
            match = store.match(self._chain, self._request, hint=self._hint)
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
            self._announcement = self._connection.fail_open.call(
                lambda: store.announce(self._chain, start, len(self._chain)), None
            )

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
        if self._announcement is not None:
            self._announcement.renew()

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        store, mark = self._connection.store, self._announcement
        self._announcement = None
        if store is not None:
            if mark is not None:
                self._connection.fail_open.call(mark.withdraw, None)
            self._connection.fail_open.call(lambda: store.forget(self._request), None)
