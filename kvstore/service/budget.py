# SPDX-License-Identifier: Apache-2.0
"""How much of the arena one tenant may keep from being evicted, by what all its sessions hold, load, save and fetch.

A session whose client has no tenant counts for itself.

Invariants
1. What goes beyond is refused as a value: a match of nothing, a save or a Fetch of fewer blocks.
2. Blocks that several holds share count once. Finding out takes a look at all of them, and is left until a sum that
   counts them again and again comes to the limit: until then a match pays for an addition.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from kvstore.block import BlockId
from kvstore.loan import Loan
from kvstore.service.session import Account, Held, Session
from kvstore.service.status import UnknownSession


class PinBudget:
    """The same limit for every account. Thread-safe.

    Everything is registered in its session before it is looked at here, or under `account.saving`: two calls at once
    cannot both have the last bytes.
    """

    def __init__(self, limit_bytes: int, refused: Callable[[], None], now_s: Callable[[], float]) -> None:
        """`refused` is called for each match and save that is answered with less."""
        self._now_s = now_s
        self._limit_bytes = limit_bytes
        self._refused = refused

    def allows(self, session: Session, name: str) -> bool:
        """Whether the hold that a match has just left under `name` may stay; where not, it is no longer registered."""
        account = session.account
        with account.lock:
            with session.lock:
                held = session.holds.get(name)
            account.pinned_bound += held.num_bytes if held is not None else 0
            if account.pinned_bound <= self._limit_bytes:
                return True
            account.pinned_bound = self._pinned_bytes(account)
            if account.pinned_bound <= self._limit_bytes:
                return True
            with session.lock:
                session.holds.pop(name, None)
        self._refused()
        return False

    def room_to_save(self, account: Account, wanted_bytes: int) -> int:
        """How many of so many bytes its sessions may fill. `account.saving` is held."""
        with account.lock:
            if account.pinned_bound + wanted_bytes > self._limit_bytes:
                account.pinned_bound = self._pinned_bytes(account, wanted_bytes)
            allowed = max(0, min(wanted_bytes, self._limit_bytes - account.pinned_bound))
            account.pinned_bound += allowed
        if allowed < wanted_bytes:
            self._refused()
        return allowed

    def lend(self, session: Session, lend: Callable[[int], Loan]) -> Loan:
        """A loan of as many bytes as `session` may still pin, registered in it; `lend` is given the number."""
        account = session.account
        with account.saving:
            with account.lock:
                account.pinned_bound = self._pinned_bytes(account)
                room = max(0, self._limit_bytes - account.pinned_bound)
            loan = lend(room)
            with session.lock:
                if not session.ended:
                    session.loans.add(loan)
            account.add(loan.num_bytes)
        if session.ended:
            loan.close()
            raise UnknownSession("the session has ended")
        if loan.is_cut:
            self._refused()
        return loan

    def returned(self, session: Session, loan: Loan) -> None:
        """A loan has ended."""
        loan.close()
        with session.lock:
            session.loans.discard(loan)

    def _pinned_bytes(self, account: Account, more_bytes: int = 0) -> int:
        """What its sessions pin; blocks that are held twice count twice where even so there is room for more."""
        now_s = self._now_s()
        held: list[Held] = []
        other_bytes = 0  # of saves and loans
        for session in account.sessions:
            with session.lock:
                for name in [name for name, hold in session.holds.items() if hold.until_s <= now_s]:
                    del session.holds[name]  # the store has let go of it
                held += session.holds.values()
                held += (load.held for load in session.loads.values())
                other_bytes += sum(save.open_bytes for save in session.saves.values())
                other_bytes += sum(loan.num_bytes for loan in session.loans)
        with_repeats = other_bytes + sum(each.num_bytes for each in held)
        if with_repeats + more_bytes <= self._limit_bytes:
            return with_repeats
        return other_bytes + _distinct_bytes(held)


def _distinct_bytes(held: Sequence[Held]) -> int:
    """A block comes with all before it: what lies before one that was seen, was seen."""
    seen: defaultdict[tuple[int, tuple[int, ...] | None], set[BlockId]] = defaultdict(set)
    for each in held:
        blocks = seen[each.block_bytes, each.parts]
        for at in range(each.num_blocks - 1, -1, -1):
            block = each.chain.ids[at]
            if block in blocks:
                break
            blocks.add(block)
    similar_bytes = sum(each.num_similar * each.block_bytes for each in held)
    return similar_bytes + sum(block_bytes * len(blocks) for (block_bytes, _), blocks in seen.items())
