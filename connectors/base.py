# SPDX-License-Identifier: Apache-2.0
"""What all connectors share: deciding what to load and save, and failing open.

CostModel       predicted prefill and load times, learnt while serving
plan_save       which blocks are full and not saved yet
Conversations   chains kept from turn to turn, so that only new tokens are hashed
FailOpen        the one place where a failing store becomes a miss
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from connectors.fit import Fit
from kvstore.api import HOST_TIER, Match
from kvstore.block import Chain, Root, Tokens, as_u32
from kvstore.errors import KVStoreError, LeaseError

log = logging.getLogger("kvstore.connector")
T = TypeVar("T")

_PREFILL_DECAY = 0.95
"""Weight of what was known when a new prefill is seen: about the last twenty count."""
_LOAD_DECAY = 0.8
_PATIENCE = 1.25
"""Waiting for a producer may take so much longer than computing is predicted to. At 1 one that runs exactly as fast as
this engine was given up just before it was done, whenever a prediction was a little short."""
_RELIEF = 1.03
"""A tier that is passed over gains 3 % of believed speed each time, so that one bad spell is not for ever."""
_TRY_SHARE = 0.05
"""A try of a tier that was slow when last seen may make its request so much longer. Trying all that the tier had made
single requests two and three times as long, where they were the slowest already."""
_FIRST_BYTES = 256 << 20
"""Of the first load from a lower tier, while nobody knows how slow it is. All that it has of a prompt of 32k tokens of
an 8B model would take 40 s over a link of 0.1 GB/s, where computing them takes a second and a half."""
_FREE_SHARE = 0.01
"""A load that takes so little of what computing takes is worth it, whatever the prefill is predicted to gain by it:
computing less takes no longer, and what is loaded shows what the rest takes. By the fit alone a single short pass that
stalled could make all cost a constant, which nothing loaded would reduce: then nothing was loaded, so no short pass was
seen, and two hundred prompts in a row were computed that lay in the host."""
_FEWEST_TOKENS = 16
"""Of the beginning of another chain's block. By chance prompts begin alike for a token or two, and a whole block was
loaded for it; the pass takes no less time for a few tokens less: matrix products go by tiles of some rows."""
_MAX_CONVERSATIONS = 4096
VOLATILE_CONFIG = frozenset(
    (
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
"""Keys of a model's configuration that do not change the KV of a token. One list: engines that leave out different
ones would give the same model two identities, and share nothing."""


class LoadRule(Enum):
    """When a block that is there is loaded."""

    MEASURED = "measured"
    """Where loading is predicted to beat computing."""
    ALWAYS = "always"
    """Whenever it is there: for measurements, and where energy matters more than time."""


class CostModel:
    """Learns what prefill and loading cost here, and plans loads by it.

    Prefill of `new` tokens after `past` ones takes a·new + b·new·(past + new/2) + c seconds: a for the matrix
    products, b for attention, c for what every pass costs. Loading from a tier takes so much a byte, and so much a
    load. All are fitted by least squares on relative errors, newest first. What was never seen is taken as free to
    load or dear to compute: the first try of everything is a load, and is measured; of a lower tier no more than would
    soon be there from a slow one. Not thread-safe; races cost precision alone.
    """

    def __init__(self, block_tokens: int, block_bytes: int, *, rule: LoadRule = LoadRule.MEASURED) -> None:
        self.rule = rule
        self.block_tokens = block_tokens
        self.block_bytes = block_bytes
        self._prefill = Fit(3, decay=_PREFILL_DECAY)
        self._loads: dict[str, Fit] = {}
        self._relief: dict[str, float] = {}

    def seen_prefill(self, new_tokens: int, past_tokens: int, seconds: float) -> None:
        """A forward pass over `new_tokens` after `past_tokens` took `seconds`.

        One that took longer than computing all of it was predicted to has stalled: it counts as no longer than that.
        """
        if new_tokens >= 1 and seconds > 0:
            all_s = self.prefill_s(new_tokens + past_tokens, 0) if past_tokens else None
            self._prefill.see(_prefill_terms(new_tokens, past_tokens), min(seconds, all_s or seconds))

    def seen_load(self, tier: str, num_bytes: int, seconds: float) -> None:
        """Bytes of `tier` took `seconds` to be in the engine's memory."""
        if num_bytes >= 1 and seconds > 0:
            self._loads.setdefault(tier, Fit(2, decay=_LOAD_DECAY)).see((num_bytes, 1), seconds)
            self._relief[tier] = 1.0

    def prefill_s(self, new_tokens: int, past_tokens: int) -> float | None:
        """Predicted seconds; None before any prefill was seen."""
        return self._prefill.predict(_prefill_terms(new_tokens, past_tokens))

    def load_s(self, tier: str, num_blocks: int) -> float:
        """Predicted seconds; 0 for a tier never loaded from. Fewer the more often it was passed over."""
        return self._seen_load_s(tier, num_blocks) * self._relief.get(tier, 1.0)

    def _seen_load_s(self, tier: str, num_blocks: int) -> float:
        """What it would take if the tier is as it was when it was last loaded from."""
        fit = self._loads.get(tier)
        if fit is None or num_blocks < 1:
            return 0.0
        return fit.predict((num_blocks * self.block_bytes, 1)) or 0.0

    def saved_s(self, num_tokens: int, load_s: float, *, past_tokens: int = 0) -> float:
        """Seconds that loading tokens after `past_tokens`, which took `load_s`, saved over computing them."""
        return max(0.0, (self.prefill_s(num_tokens, past_tokens) or 0.0) - load_s)

    def plan_load(self, match: Match, prompt_tokens: int, *, start: int = 0) -> int:
        """How many leading blocks to load: fewest seconds to the first token, by what is known.

        Never the whole prompt: its last token must run through the model, or there are no logits to go on from.

        Args:
            start: leading blocks the engine has already; they cost nothing and are not loaded.
        """
        cap = min(match.num_blocks, self.max_blocks(prompt_tokens), self._first_stop(match, start))
        best, best_s = min(start, cap), self._rest_s(prompt_tokens, min(start, cap))
        if best_s is None or not match.tiers or self.rule is LoadRule.ALWAYS:
            return max(cap, best)
        # Time saved grows faster than linearly in blocks, time spent linearly within a tier: only the ends of
        # tiers can be best.
        free_s = _FREE_SHARE * best_s
        sure, sure_s = best, best_s  # by what was seen, whatever has changed since
        at, spent_s, seen_s = 0, 0.0, 0.0
        passed_over: list[str] = []
        for tier, count in match.tiers:
            stop = min(at + count, cap)
            num_loaded = max(0, stop - max(at, start))
            spent_s += self.load_s(tier, num_loaded)
            seen_s += self._seen_load_s(tier, num_loaded)
            at += count
            rest_s = self._rest_s(prompt_tokens, stop)
            if stop <= start or rest_s is None:
                continue
            if seen_s + rest_s < sure_s or seen_s <= free_s:
                sure, sure_s = stop, seen_s + rest_s
            if spent_s + rest_s < best_s or spent_s <= free_s:
                best, best_s = stop, spent_s + rest_s
                passed_over.clear()
            else:
                passed_over.append(tier)
        self._relieve(passed_over)
        return best if best <= sure else self._plan_try(match, prompt_tokens, start, sure, sure_s, best)

    def _first_stop(self, match: Match, start: int) -> int:
        """Where a load is to end, if it goes to a lower tier for the first time."""
        at = 0
        for tier, count in match.tiers:
            if self.rule is not LoadRule.ALWAYS and tier != HOST_TIER and tier not in self._loads:
                return max(at, start) + max(1, _FIRST_BYTES // self.block_bytes)
            at += count
        return match.num_blocks

    def _plan_try(self, match: Match, prompt_tokens: int, start: int, sure: int, sure_s: float, most: int) -> int:
        """How much to load where only more than `sure` would show whether a tier has become faster.

        One block more, and twice as many again and again while that would not make the request `_TRY_SHARE` longer.
        """
        stop = sure + 1
        while stop < most:
            further = min(most, sure + 2 * (stop - sure))
            rest_s = self._rest_s(prompt_tokens, further)
            if rest_s is None or self._run_s(match, start, further) + rest_s > (1 + _TRY_SHARE) * sure_s:
                break
            stop = further
        return stop

    def _run_s(self, match: Match, start: int, stop: int) -> float:
        """What loading the match's blocks from `start` to `stop` would take if all tiers are as they were."""
        at, seconds = 0, 0.0
        for tier, count in match.tiers:
            seconds += self._seen_load_s(tier, min(at + count, stop) - max(at, start))
            at += count
        return seconds

    def _relieve(self, tiers: Iterable[str]) -> None:
        for tier in tiers:
            if tier in self._relief:
                self._relief[tier] /= _RELIEF

    def plan_ask_s(self, prompt_tokens: int, limit_s: float, *, start: int = 0) -> float | None:
        """How long a request should wait to hear what lower tiers hold, at most `limit_s`; None: it should not ask.

        It should not where all of the prompt after the `start` blocks that the engine has would not be worth loading,
        whichever of the known tiers had it, nor where there are no more. Asking beside the prefill costs a little where
        that keeps all cores busy: 0.5 ms of 27 for 128 tokens, and more on a machine with other work.
        """
        num_blocks = self.max_blocks(prompt_tokens)
        if start and num_blocks <= start:
            return None
        computing_s, rest_s = self._rest_s(prompt_tokens, start), self._rest_s(prompt_tokens, num_blocks)
        lower = [tier for tier in self._loads if tier != HOST_TIER]
        if self.rule is LoadRule.ALWAYS or computing_s is None or rest_s is None or not lower:
            return limit_s
        load_s = min(self.load_s(tier, num_blocks - start) for tier in lower)
        gain_s = max(computing_s - rest_s, _FREE_SHARE * computing_s) - load_s
        if gain_s <= 0:
            self._relieve(lower)  # they are passed over, too
            return None
        return min(limit_s, gain_s)

    def plan_partial(self, match: Match, stop: int, prompt_tokens: int, *, have: int = 0) -> bool:
        """Whether to ask for the beginning of one block more, where `stop` blocks are to be loaded.

        Not where blocks of lower tiers follow, nor where not even as much as could be found would be worth it. `have`:
        see `is_worth_block`.
        """
        rest = prompt_tokens - 1 - stop * self.block_tokens
        if stop < match.num_blocks or match.num_blocks > match.num_host_blocks:
            return False
        return self.is_worth_block(stop, prompt_tokens, min(rest, self.block_tokens - 1), have=have)

    def is_worth_block(self, stop: int, prompt_tokens: int, num_tokens: int, *, have: int = 0) -> bool:
        """Whether the first `num_tokens` of the block after `stop` others are worth loading a whole block.

        `have`: so many of these tokens the engine has already.
        """
        past, gained = stop * self.block_tokens, num_tokens - have
        if gained < 1 or self.rule is LoadRule.ALWAYS:
            return gained > 0
        if gained < _FEWEST_TOKENS:
            return False
        whole_s = self.prefill_s(prompt_tokens - past - have, past + have)
        less_s = self.prefill_s(prompt_tokens - past - num_tokens, past + num_tokens)
        return whole_s is None or less_s is None or self.load_s(HOST_TIER, 1) < whole_s - less_s

    def plan_wait_s(self, match: Match, prompt_tokens: int, *, start: int = 0) -> float:
        """How long waiting for the pending blocks can pay: what computing them here would take, and some patience.

        Nothing for those of the first `start`, which the engine has.

        Counted from the last time that one of them arrived: who sees progress waits for the rest alone.
        """
        cap = self.max_blocks(prompt_tokens)
        have = max(start, match.num_blocks)
        pending = min(match.num_blocks + match.num_pending_blocks, cap) - have
        if pending <= 0:
            return 0.0
        computing_s = self.prefill_s(pending * self.block_tokens, have * self.block_tokens) or 0.0
        return _PATIENCE * computing_s

    def max_blocks(self, prompt_tokens: int) -> int:
        """Blocks of a prompt that may come from elsewhere: those of its first `prompt_tokens` − 1 tokens."""
        return max(0, prompt_tokens - 1) // self.block_tokens

    def _rest_s(self, prompt_tokens: int, num_blocks: int) -> float | None:
        past = num_blocks * self.block_tokens
        return self.prefill_s(prompt_tokens - past, past)


def _prefill_terms(new_tokens: int, past_tokens: int) -> tuple[float, float, float]:
    return new_tokens, new_tokens * (past_tokens + new_tokens / 2), 1


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
        except Exception as error:  # noqa: BLE001  # the one place for it: nothing a store does may fail a request
            self._fail(error)
            return otherwise
        if self._down:
            self._down = False
            log.info("the store answers again: loads and saves resume")
        return result

    def let_go(self, action: Callable[[], object]) -> None:
        """Run what ends a use of the store, which must not be left out where calls are skipped."""
        try:
            action()
        except Exception as error:  # noqa: BLE001  # as above
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.num_failures += 1
        self._retry_at_s = self._now_s() + self.backoff_s
        if not self._down:
            self._down = True
            bug = not isinstance(error, (KVStoreError, OSError))
            log.warning("the store failed, going on without it: %s: %s", type(error).__name__, error, exc_info=bug)
