# SPDX-License-Identifier: Apache-2.0
"""What a request can load: asked of the store, waited for where that pays, and planned.

Invariants
1. Nothing here waits where another request could be waiting for it: what is not there yet is to be asked for again.
2. A request waits no longer than its deadlines allow, and for others no longer than computing it itself would take.
3. A match that nothing is loaded of is let go of.
"""

from __future__ import annotations

from collections.abc import Callable

from connectors.base import CostModel, FailOpen
from connectors.vllm_plan import IN_TIME, VllmSettings
from connectors.vllm_tracked import Tracked
from kvstore.api import HOST_TIER, Match, Store
from kvstore.block import Chain

_LOOK_S, _LOOK_SHARE = 0.002, 0.01
"""Between two looks at pending blocks: at least, and of what computing them is predicted to take. Asked in every step,
waiting requests would keep taking time from an engine beside them that is computing (how much was not measured)."""
_ALONE_S = 0.005
"""How long a match waits for lower tiers where the engine has no other request: most answer sooner, and steps that
compute nothing and ask again would take all of a core meanwhile. Longer would delay a request that comes now."""
_UNSEEN_BYTES_PER_S = 2e9
"""What the first load is taken to run at, when it is decided whether the step can wait for it."""


class Matching:
    """See the module. For the scheduler's thread.

    `may_be_alone`: see `SchedulerSide`. `brings_parts`: of a block, the first tokens' KV can be told from the rest's.
    `in_steps`: a load may belong to a step.

    Attributes:
        num_waiting: requests that wait for pending blocks, since this was last set to 0.
    """

    def __init__(
        self,
        settings: VllmSettings,
        store: Store,
        cost: CostModel,
        fail_open: FailOpen,
        *,
        may_be_alone: bool,
        brings_parts: bool,
        in_steps: bool,
        now_s: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._store = store
        self._cost = cost
        self._fail_open = fail_open
        self._block_tokens = cost.block_tokens
        self._may_be_alone = may_be_alone
        self._brings_parts = brings_parts
        self._in_steps = in_steps
        self._now_s = now_s
        self.num_waiting = 0

    def match(self, tracked: Tracked, chain: Chain, local_tokens: int, *, alone: bool) -> tuple[int | None, bool]:
        """See `SchedulerSide.match`. `alone`: the engine has no other request."""
        if tracked.asked_s is not None and self._now_s() < tracked.look_s:
            self.num_waiting += 1
            return None, False
        found = self._fail_open.call(lambda: self._ask(tracked, chain, alone=alone), None)
        if found is None:
            return 0, False
        if self._worth_waiting(tracked, found, self._waited_s(tracked)):
            return None, False
        return self._plan(tracked, found, local_tokens)

    def _ask(self, tracked: Tracked, chain: Chain, *, alone: bool) -> Match:
        if tracked.asked_s is None:
            most_s = self._settings.match_deadline_ms / 1e3 * IN_TIME
            tracked.lower_s = self._cost.plan_ask_s(tracked.request.num_tokens, most_s)
        wait_s = tracked.lower_s
        if wait_s is not None:
            wait_s = min(wait_s, _ALONE_S) if self._may_be_alone and alone else 0.0
        return self._store.match(chain, tracked.key, hint=tracked.hint(), wait_s=wait_s, soon=True)

    def _waited_s(self, tracked: Tracked) -> float:
        now_s = self._now_s()
        if tracked.asked_s is None:
            tracked.asked_s = tracked.found_s = now_s
            tracked.found_blocks, tracked.look_s = 0, 0.0
        return now_s - tracked.asked_s

    def _worth_waiting(self, tracked: Tracked, match: Match, waited_s: float) -> bool:
        """Whether lower tiers may still answer in time, or somebody else finishes sooner than we would."""
        if not match.settled and waited_s < (tracked.lower_s or 0.0):
            return True
        left_s = self._settings.pending_deadline_ms / 1e3 - waited_s
        if match.num_pending_blocks and left_s > 0:
            now_s, limit_s = self._now_s(), self._cost.plan_wait_s(match, tracked.request.num_tokens)
            if match.num_blocks > tracked.found_blocks:
                tracked.found_blocks, tracked.found_s = match.num_blocks, now_s
            if now_s - tracked.found_s < limit_s:
                tracked.look_s = now_s + min(left_s, max(_LOOK_S, _LOOK_SHARE * limit_s))
                self.num_waiting += 1
                return True
        return False

    def _plan(self, tracked: Tracked, match: Match, local_tokens: int) -> tuple[int, bool]:
        tracked.asked_s = None
        start = local_tokens // self._block_tokens
        stop = self._cost.plan_load(match, tracked.request.num_tokens, start=start)
        tracked.in_store = match.num_host_blocks
        tracked.num_saved = max(tracked.num_saved, match.num_host_blocks)
        partial_tokens = 0
        if (stop + 1) * self._block_tokens > local_tokens:
            have = max(0, local_tokens - stop * self._block_tokens)
            partial_tokens = self._match_partial(tracked, match, stop, have)
        tokens = stop * self._block_tokens + partial_tokens - local_tokens
        stop += bool(partial_tokens)
        if stop <= start or tokens <= 0:
            self.forget(tracked)
            return 0, False
        tracked.planned, tracked.partial_tokens = stop, partial_tokens
        seconds = self._cost.load_s(HOST_TIER, stop - start)
        seconds = seconds or (stop - start) * self._cost.block_bytes / _UNSEEN_BYTES_PER_S
        tracked.in_step = (
            self._in_steps
            and stop - bool(partial_tokens) <= match.num_host_blocks
            and seconds * 1e3 <= self._settings.sync_load_ms
        )
        return tokens, not tracked.in_step

    def _match_partial(self, tracked: Tracked, match: Match, stop: int, have: int) -> int:
        """Tokens after `stop` blocks that the beginning of another chain's block brings; the engine has `have`.

        None of opaque pages: what of a page is the first tokens' is not known.
        """
        num_tokens = tracked.request.num_tokens
        if not self._brings_parts or not self._cost.plan_partial(match, stop, num_tokens, have=have):
            return 0
        found: int = self._fail_open.call(lambda: self._store.match_partial(tracked.key), 0)
        found = min(found, num_tokens - 1 - stop * self._block_tokens)
        return found if self._cost.is_worth_block(stop, num_tokens, found, have=have) else 0

    def forget(self, tracked: Tracked) -> None:
        """Let go of what a match holds."""
        self._fail_open.call(lambda: self._store.forget(tracked.key), None)
