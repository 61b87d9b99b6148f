# SPDX-License-Identifier: Apache-2.0
"""One request of an engine, from its arrival to its end: its chain, and what was found, planned, told and saved of it.

Invariants
1. The chain is of all that decides the KV of the tokens that the request has now, media that came later included.
2. What workers are told of it, they are told once: their copies have its first `told` tokens.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from connectors.hints import hint_of
from connectors.vllm_adapters import Adapter
from connectors.vllm_announced import KeptMark
from connectors.vllm_identity import EngineRequest, Roots, media_of
from kvstore.api import Hint
from kvstore.block import Chain


@dataclass(slots=True)
class Tracked:
    """See the module."""

    request: EngineRequest
    adapter: Future[Adapter]
    key: str
    """What the store knows it by: an engine may use an id again."""
    media: list[tuple[int, bytes]] = field(default_factory=list)
    """What token ids do not say, and where: see `media_of`."""
    num_features: int = 0
    """Of the request, when `media` was made."""
    chain: Chain | None = None
    num_saved: int = 0
    """Blocks that a worker was told to save, or that a match has found: to offer those again took 1 ms of a hit."""
    told: int = 0
    """Tokens that workers' copies of the chain have."""
    read_to: int = 0
    """Tokens up to here may be being read where they lie in the engine's pages, by saves."""
    asked_s: float | None = None
    lower_s: float | None = 0.0
    """How long lower tiers are worth waiting for, from `asked_s` on; None: they are not asked."""
    found_blocks: int = 0
    """Of the longest match since `asked_s`; it was first seen at `found_s`."""
    found_s: float = 0.0
    look_s: float = 0.0
    """No look at pending blocks before."""
    local_tokens: int = 0
    """That the engine's own cache has, as it said last."""
    has_run: bool = False
    """In a step since it last got pages: what the engine says it has computed is there, whoever brought it."""
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

    def __post_init__(self) -> None:
        self._look_at_media()

    def grow(self, roots: Roots) -> Chain | None:
        """The chain over all tokens that the request has; None while its identity is not known."""
        request = self.request
        if len(request.mm_features) != self.num_features:
            self._look_at_media()
        if self.chain is None:
            if not self.adapter.done() or self.adapter.exception() is not None:
                return None
            salt = (request.cache_salt or "").encode()
            self.chain = Chain(roots.root(self.adapter.result().digest, salt))
        chain, known = self.chain, self.chain.num_tokens
        if request.num_tokens < known:
            # A streaming session took tokens back: what was hashed is no longer what the request says.
            self._begin_anew()
            return self.grow(roots)
        if request.num_tokens > known:
            media = [item for item in self.media if known <= item[0] < request.num_tokens]
            chain.extend(request.all_token_ids[known:], media=media)
        return chain

    def _look_at_media(self) -> None:
        """Take in what the request has beside its tokens: a streaming session gets more as it goes on."""
        before = self.media
        self.media, self.num_features = media_of(self.request), len(self.request.mm_features)
        known = self.chain.num_tokens if self.chain is not None else 0
        if any(item[0] < known for item in self.media if item not in before):
            self._begin_anew()

    def _begin_anew(self) -> None:
        self.chain, self.num_saved, self.told = None, 0, 0

    def hint(self) -> Hint:
        """What eviction may use."""
        return hint_of(self.request.kv_transfer_params, prompt_tokens=self.request.num_prompt_tokens)

    def withdraw(self) -> None:
        """Announce nothing of it any more."""
        mark, self.announcement = self.announcement, None
        if mark is not None:
            mark.withdraw()
