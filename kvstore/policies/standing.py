# SPDX-License-Identifier: Apache-2.0
"""Where a use puts blocks in the order of a tier that stores share: at its own time, earlier, or later.

A shared tier has one order, kept by its server: by a score, which is a time. So a policy there is no queue but a
function: from what the store at hand knows of the blocks it uses, to seconds that are added to the time of the use. All
scores stay times of one clock, and comparable, whatever loads the stores have and whichever policy each goes by. What
no store says lies where its last use was.

`span_s` is how long the tier at hand keeps what nobody uses: `-span_s` makes a block the next to go, `span_s` has it
stay twice as long. Whoever keeps the order sees to it that no parent is placed below its child, however these functions
answer; and places only rise, so that of two uses the one that puts a block later counts.

These are not the policies of a store's own tiers (`kvstore.policies.base`), which see every block come and go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from kvstore.api import NO_HINT, Hint

Standing = Callable[[Hint, Sequence[int], Sequence[float], float], list[float]]
"""(hint of the use, chain indices of the blocks, how likely each is used again, span_s) to seconds for each block."""

LRU = "lru"
PRIORITY = "priority"
RETURNS = "returns"
_RATE = 0.25
_LEAST_ODDS = 1e-3


def lru(hint: Hint, indices: Sequence[int], odds: Sequence[float], span_s: float) -> list[float]:
    """Least recently used: a use counts when it was.

    Reference: as in `kvstore.policies.lru`. Not for tiers in which some prompts must outlast the traffic of others.
    """
    return [0.0] * len(indices)


def priority(hint: Hint, indices: Sequence[int], odds: Sequence[float], span_s: float) -> list[float]:
    """Priorities that the caller gives: a use of priority p lasts p/50 times as long as an ordinary one.

    A range's duration bounds how much longer, or less long, that may be; `Hint.ttl_s` how long in all, after which the
    block is the next to go. Unlike in `kvstore.policies.priority` a priority is no rank that traffic cannot wear down:
    what was used long enough ago goes, whatever it was given. Not for callers who give everything 100: it is LRU then.
    Nor for what goes down at eviction, when no request is at hand that says a priority.

    Reference: NVIDIA TensorRT-LLM, "KV cache reuse", `KvCacheRetentionConfig`.
    """
    return [_wished_s(hint, index, span_s) for index in indices]


def _wished_s(hint: Hint, index: int, span_s: float) -> float:
    wish = hint.retention_of(index)
    level = hint.priority if wish is None else wish.priority
    later_s = span_s * (level - NO_HINT.priority) / NO_HINT.priority
    if wish is not None and wish.duration_s is not None:
        later_s = min(max(later_s, -wish.duration_s), wish.duration_s)
    if wish is None and hint.ttl_s is not None:
        later_s = min(later_s, hint.ttl_s - span_s)
    return later_s


def returns(hint: Hint, indices: Sequence[int], odds: Sequence[float], span_s: float) -> list[float]:
    """Return probability: what is half as likely used again counts as used a sixth of `span_s` earlier.

    The odds are those of the host's own policy, of `returns` there and 1 for all where that is another: then this is
    LRU. The rate, and that it goes by the logarithm, was chosen on the first halves of two published traces and of made
    up chats, over 2 to 20 % of their blocks: 0.2 points of hits lost at worst to 2.0 won. Twice the rate lost 0.9 at
    worst; by the probability itself (`-span_s * (1 - p)`) 0.4, and 19 where that was half as much again.

    Reference: as in `kvstore.policies.returns`. Not where stores see too little of the traffic to learn who returns.
    """
    return [max(-span_s, _RATE * span_s * math.log(max(p, _LEAST_ODDS))) for p in odds]


STANDINGS: Mapping[str, Standing] = {LRU: lru, PRIORITY: priority, RETURNS: returns}
"""By the name that settings give them."""
