# SPDX-License-Identifier: Apache-2.0
"""What a server says about itself as far as accounts depend on it: how much may lie there, and what a value costs."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from kvstore.tiers.redis_nodes import Talk, sound
from kvstore.tiers.redis_wire import command, integer

log = logging.getLogger("kvstore.tiers.redis")


def size_class(num_bytes: int) -> int:
    """Bytes jemalloc takes for `num_bytes`: four classes from one power of two to the next."""
    if num_bytes <= 64:
        return 64
    step = 1 << max(4, (num_bytes - 1).bit_length() - 3)
    return -(-num_bytes // step) * step


@dataclass(frozen=True, slots=True)
class Facts:
    """What the server says about itself."""

    capacity_bytes: int
    """0 for no limit."""
    rounds_up: bool
    """Its allocator serves size classes (jemalloc)."""

    def accounted_bytes(self, stored_bytes: int) -> int:
        """What a value of `stored_bytes` costs the server's memory."""
        return size_class(stored_bytes) if self.rounds_up else stored_bytes


class ServerFacts:
    """What is known of the server or servers. Thread-safe.

    Args:
        capacity_bytes: as for `Accounting`.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._facts: Facts | None = None
        self._warning = threading.Lock()
        self._warned = ""

    def facts(self, talk: Talk, deadline: float) -> Facts:
        """As last heard."""
        return self._facts or self.ask(talk, deadline)

    def ask(self, talk: Talk, deadline: float) -> Facts:
        """As they are now. What is wrong with them is logged, once for as long as it stays so.

        Where a node does not answer, what was known of all of them stays: its limit is not 0 for that. Where nothing
        was, what the others say is given, and not kept.
        """
        limit, mem_allocator, policies, unlimited, whole = 0, "jemalloc", set(), False, True
        asked = [command("INFO", "memory")]
        answers = [answer for place in talk.places(deadline) for answer in talk.ask(asked, deadline, place)]
        for reply in sound(answers, partial=True):
            if not isinstance(reply, bytes):
                whole = False
                continue
            info = dict(line.split(":", 1) for line in reply.decode(errors="replace").splitlines() if ":" in line)
            node_limit = integer(info.get("maxmemory", "0").encode())
            limit += node_limit * 4 // 5
            unlimited |= not node_limit
            mem_allocator = info.get("mem_allocator", mem_allocator)
            policies.add(info.get("maxmemory_policy", "noeviction"))
        self._warn(", ".join(sorted(policies - {"noeviction"})), unlimited=unlimited and not self._capacity_bytes)
        facts = Facts(self._capacity_bytes or limit, "libc" not in mem_allocator)
        if whole:
            self._facts = facts
        return self._facts or facts

    def _warn(self, policy: str, *, unlimited: bool) -> None:
        """Of what makes blocks leave in another order than ours, or the server grow for ever."""
        wrong = []
        if policy:
            wrong.append(f"maxmemory-policy is {policy}, which drops heads of chains before their tails")
        if unlimited:
            wrong.append("maxmemory is not set, nor capacity_bytes here, so that it grows until its host is full")
        text = "; ".join(wrong)
        with self._warning:
            if text and text != self._warned:
                log.warning("redis: %s: `kvstore doctor` has the fix, under redis maxmemory", text)
            self._warned = text
