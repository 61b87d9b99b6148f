# SPDX-License-Identifier: Apache-2.0
"""Priorities that the caller gives: the lowest goes first, the least recently used of equals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.errors import ConfigError
from kvstore.policies.runs import Run, RunPolicy


class PriorityPolicy(RunPolicy):
    """LRU that heeds hints: priorities from 0 (first to go) to 100, durations, closed conversations, and nothing else.

    All other policies but `lru` heed the same hints in the same way (`kvstore.policies.bands`), and order blocks of
    equal priority by their own lights; this one does so by last use, tail first. Without hints it is `lru`.

    `Hint.retention` gives ranges of tokens a priority, `Hint.priority` the rest where it is not the ordinary one; a
    block that a range touches anywhere has the range's. After the range's duration a block has the ordinary priority
    again; after `Hint.ttl_s` it goes first, until it is used. A use that states no priority for a block leaves its
    own. A block never goes before what hangs from it, whatever its priority: so a system prompt of 100 keeps no more
    than itself, and a last turn of 100 keeps all of its conversation.

    Reference: NVIDIA TensorRT-LLM, "KV cache reuse", `KvCacheRetentionConfig`.
    """

    name = "priority"

    @dataclass(frozen=True, slots=True)
    class Options:
        """Settings.

        Attributes:
            ordinary: priority of blocks that nobody gave one, 0 to 100.
        """

        ordinary: int = 50

        def __post_init__(self) -> None:
            if not 0 <= self.ordinary <= 100:
                raise ConfigError(f"ordinary is {self.ordinary}: give a priority from 0 to 100, such as 50")

    def __init__(self, options: object = None) -> None:
        settings = options if isinstance(options, PriorityPolicy.Options) else PriorityPolicy.Options()
        super().__init__(options, ordinary=settings.ordinary)

    def _enter(self, run: Run, hint: Hint) -> None:
        run.key = self._latest_key()

    def _use(self, runs: list[Run], starts: Sequence[int], blocks: Sequence[BlockId], hint: Hint) -> None:
        for run in reversed(runs):
            run.key = self._latest_key()

    def _next_queue(self) -> int:
        return 0 if self._head(0) else -1
