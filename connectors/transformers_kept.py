# SPDX-License-Identifier: Apache-2.0
"""Caches kept between requests, each with whose tokens it holds: a conversation's next turn goes on in its own.

What a request is given in place was computed there, or loaded there and found sound, and nothing wrote to it since:

1. Blocks are compared by their ids, which commit to model, adapter, salt, secret and the whole prefix.
2. A cache is in one request's hands at a time, and remembers nothing while it is.
3. It comes back when no copy into or out of it is under way and the device has done what was ordered, with the tokens
   that `Session.sound_tokens` vouches for.
4. Whatever torch wrote to it while it lay here, such as a hook of the model's that kept it, shows in its `version`:
   then it holds nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from connectors.transformers_cache import BlockCache
from kvstore.block import Chain

log = logging.getLogger("kvstore.transformers")

_FEWEST_KEPT = 2
"""Caches kept for their memory at least: fresh from the system it faults at 1 GB/s, slower than many a prefill."""


@dataclass(eq=False, slots=True)
class _Kept:
    """A cache that holds the first `num_blocks` blocks of `chain`, if it still is of that `version`."""

    cache: BlockCache
    chain: Chain
    num_blocks: int
    conversation: str
    version: tuple[int, int]

    def shared(self, chain: Chain) -> int:
        """Leading blocks of `chain` that it holds."""
        if self.cache.version != self.version:
            self.num_blocks = 0
        mine, theirs = self.chain.ids, chain.ids
        low, high = 0, min(self.num_blocks, len(theirs))
        while low < high:  # an id commits to all before it
            middle = (low + high + 1) // 2
            if mine[middle - 1] == theirs[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low


class KeptCaches:
    """See the module. Thread-safe.

    Args:
        num_resident: caches that remember what they hold; the longest unused forget first. With 0 none does, and they
            are kept for their memory.
        new: makes a cache with room for so many tokens.

    Attributes:
        num_hit_blocks: blocks that requests were given in place.
    """

    def __init__(self, num_resident: int, new: Callable[[int], BlockCache]) -> None:
        self.num_resident = num_resident
        self.num_hit_blocks = 0
        self._new = new
        self._kept: list[_Kept] = []  # longest unused first
        self._lock = threading.Lock()

    def take(self, chain: Chain, num_tokens: int, most_blocks: int, conversation: str = "") -> tuple[BlockCache, int]:
        """A cache with room for `num_tokens`, and how many leading blocks of `chain` it holds, `most_blocks` at most.

        To be given back.
        """
        room = num_tokens + num_tokens // 4 if self.num_resident else num_tokens  # for turns to come: growing copies
        choose = lambda: self._own(chain, most_blocks, conversation, others=True) or self._spare()
        return self._hand_out(choose, chain, num_tokens, most_blocks, room)

    def part_with(
        self, chain: Chain, num_tokens: int, most_blocks: int, conversation: str = ""
    ) -> tuple[BlockCache, int]:
        """`take` for good: the conversation's own cache or a new one, and no other, since none comes back for it."""
        choose = lambda: self._own(chain, most_blocks, conversation, others=False)
        return self._hand_out(choose, chain, num_tokens, most_blocks, num_tokens)

    def _hand_out(
        self, choose: Callable[[], _Kept | None], chain: Chain, num_tokens: int, most_blocks: int, room: int
    ) -> tuple[BlockCache, int]:
        """What `choose` takes from here, else a new cache with `room`."""
        cache, num_blocks = self._removed(choose, chain, num_tokens, most_blocks)
        with suppress(torch.OutOfMemoryError):
            if cache is None:
                return self._new(room), 0
            cache.reserve(num_tokens)
            return cache, num_blocks
        cache = None  # of the old and the new there may be no room for both
        self.shrink()
        return self._new(num_tokens), 0

    def _removed(
        self, choose: Callable[[], _Kept | None], chain: Chain, num_tokens: int, most_blocks: int
    ) -> tuple[BlockCache | None, int]:
        with self._lock:
            kept = choose()
            if kept is None:
                return None, 0
            self._kept.remove(kept)
            num_blocks = min(kept.shared(chain), most_blocks)
            self.num_hit_blocks += num_blocks
            # Growing would copy what is of no use.
            return (kept.cache, num_blocks) if num_blocks or kept.cache.capacity >= num_tokens else (None, 0)

    def _own(self, chain: Chain, most_blocks: int, conversation: str, *, others: bool) -> _Kept | None:
        """The cache that holds most of the chain, of the conversation's and of `others`' those that are half like it.

        Who only begins alike does not take the rest away from another that may go on.
        """
        own, own_blocks = None, 0
        for kept in self._kept:
            num_blocks = min(kept.shared(chain), most_blocks)
            mine = bool(conversation) and conversation == kept.conversation
            if num_blocks > own_blocks and (mine or (others and 2 * num_blocks >= kept.num_blocks)):
                own, own_blocks = kept, num_blocks
        return own

    def _spare(self) -> _Kept | None:
        """The cache whose contents are worth least; None where there may be one more."""
        if empty := [kept for kept in self._kept if not kept.num_blocks]:
            return max(empty, key=lambda kept: kept.cache.capacity)
        return self._kept[0] if len(self._kept) >= max(1, self.num_resident) else None

    def give_back(self, cache: BlockCache, chain: Chain, sound_tokens: int, conversation: str = "") -> None:
        """Keep `cache`, whose first `sound_tokens` tokens are those of `chain`, for requests to come."""
        num_blocks = min(sound_tokens // chain.block_tokens, len(chain)) if self.num_resident else 0
        with self._lock:
            self._kept.append(_Kept(cache, chain, num_blocks, conversation, cache.version))
            resident = [kept for kept in self._kept if kept.num_blocks]
            for kept in resident[: max(0, len(resident) - self.num_resident)]:
                kept.num_blocks = 0
            while len(self._kept) > max(_FEWEST_KEPT, self.num_resident):
                self._kept.remove(next((kept for kept in self._kept if not kept.num_blocks), self._kept[0]))

    def clear(self) -> None:
        """Let go of all caches that lie here, and so of their memory."""
        with self._lock:
            self._kept.clear()

    def shrink(self) -> None:
        """The device has no room for so many: let go of all, and from now on keep fewer than were in use."""
        with self._lock:
            if not self._kept:
                return
            num_resident = sum(kept.num_blocks > 0 for kept in self._kept)  # and the one that asked for memory
            self.num_resident = min(self.num_resident, max(1, num_resident))
            self._kept.clear()
        log.warning(
            "the device is out of memory: from now on %d conversations are resident (resident_conversations)",
            self.num_resident,
        )
