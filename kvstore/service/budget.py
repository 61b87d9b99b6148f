# SPDX-License-Identifier: Apache-2.0
"""How much of the arena one session may keep from being evicted, by its holds, loads and saves.

Invariants
1. What goes beyond is refused as a value: a match of nothing, a save of fewer blocks.
2. Blocks that several holds of a session share count once. Finding out takes a look at all of them, and is left until
   a sum that counts them again and again comes to the limit: until then a match pays for an addition.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from kvstore.block import BlockId
from kvstore.service.sessions import Held, Session


class PinBudget:
    """The same limit for every session. Thread-safe.

    Everything is registered in its session before it is looked at here, or under `session.saving`: two calls at once
    cannot both have the last bytes.
    """

    def __init__(self, limit_bytes: int, refused: Callable[[], None], now_s: Callable[[], float]) -> None:
        """`refused` is called for each match and save that is answered with less."""
        self._now_s = now_s
        self._limit_bytes = limit_bytes
        self._refused = refused

    def allows(self, session: Session, name: str) -> bool:
        """Whether the hold that a match has just left under `name` may stay; where not, it is no longer registered."""
        with session.lock:
            held = session.holds.get(name)
            session.pinned_bound += held.num_bytes if held is not None else 0
            if session.pinned_bound <= self._limit_bytes:
                return True
            session.pinned_bound = self._pinned_bytes(session)
            if session.pinned_bound <= self._limit_bytes:
                return True
            session.holds.pop(name, None)
        self._refused()
        return False

    def room_to_save(self, session: Session, wanted_bytes: int) -> int:
        """How many of so many bytes a session may fill. `session.saving` is held."""
        with session.lock:
            if session.pinned_bound + wanted_bytes > self._limit_bytes:
                session.pinned_bound = self._pinned_bytes(session, wanted_bytes)
            allowed = max(0, min(wanted_bytes, self._limit_bytes - session.pinned_bound))
            session.pinned_bound += allowed
        if allowed < wanted_bytes:
            self._refused()
        return allowed

    def _pinned_bytes(self, session: Session, more_bytes: int = 0) -> int:
        """What a session pins; blocks that are held twice count twice where even so there is room for more."""
        now_s = self._now_s()
        for name in [name for name, hold in session.holds.items() if hold.until_s <= now_s]:
            del session.holds[name]  # the store has let go of it
        held = [*session.holds.values(), *(load.held for load in session.loads.values())]
        saved_bytes = sum(save.open_bytes for save in session.saves.values())
        with_repeats = saved_bytes + sum(each.num_bytes for each in held)
        if with_repeats + more_bytes <= self._limit_bytes:
            return with_repeats
        return saved_bytes + _distinct_bytes(held)


def _distinct_bytes(held: Sequence[Held]) -> int:
    blocks: defaultdict[int, set[BlockId]] = defaultdict(set)
    for each in held:
        blocks[each.block_bytes].update(each.chain.ids[: each.num_blocks])
    similar_bytes = sum(each.num_similar * each.block_bytes for each in held)
    return similar_bytes + sum(block_bytes * len(ids) for block_bytes, ids in blocks.items())
