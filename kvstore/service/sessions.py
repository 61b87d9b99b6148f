# SPDX-License-Identifier: Apache-2.0
"""Clients as the server sees them: what each holds, and how all of it ends.

A session ends when its process is dead (a mapped client: the kernel says so), when its stream has been gone for a
moment (a client without a mapping), when the client says bye, or when its rights are not what they were. Loads of a
silent client lapse by their deadline.

Invariants
1. Nothing is registered in a session that has ended, or under a number that was ended before it began: the late
   call gives back what it took.
2. Slots that a living process may still be writing to are neither free nor part of a block: they are quarantined
   until every writer has said that it is done, or is dead.
3. A session's lock is a leaf: it is not held across a call of the store. The book's comes before an account's, and both
   before it.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from kvstore.clock import Clock
from kvstore.errors import CapacityError, ConfigError, UnknownLease
from kvstore.service.door import Peer
from kvstore.service.rights import Rights, Shown
from kvstore.service.saves import Quarantine
from kvstore.service.session import Account, ServedLoad, Session
from kvstore.service.status import UnknownSession
from kvstore.stats import MAX_SAVED_S
from kvstore.wire import kvstore_pb2 as pb

log = logging.getLogger("kvstore.service")

STREAM_GRACE_S = 5.0
"""A client without a mapping may be without its Session stream for this long."""
_STALL_S = 2.0
"""Of one beat: a client's slip must not spoil the sum for good."""


class SessionBook:
    """Every session, by id and by process. Thread-safe."""

    def __init__(
        self,
        *,
        clock: Clock,
        lease_s: float,
        max_sessions: int,
        max_streams: int,
        forget: Callable[[str], None],
        forget_peer: Callable[[Peer], None],
        quarantine: Quarantine,
    ) -> None:
        self.quarantine = quarantine
        self.num_over_share = 0
        """Matches and saves that were answered with less, because their session or tenant pinned its share already."""
        self.ttft_saved_s = 0.0
        """Time to first token that clients report as saved."""
        self._clock = clock
        self._lease_s = lease_s
        self._max_sessions = max_sessions
        # A tenant has half of what there is: with all of it, it could keep the others out.
        self._max_tenant_sessions, self._max_tenant_streams = max(1, max_sessions // 2), max(1, max_streams // 2)
        self._forget = forget
        self._forget_peer = forget_peer
        self._lock = threading.Lock()
        self._sessions: dict[bytes, Session] = {}
        self._revoked: dict[bytes, Session] = {}
        """Ended, but their processes live and have the memory."""
        self._by_engine_key: dict[bytes, Session] = {}
        self._accounts: dict[str, Account] = {}
        """By tenant."""
        self._number = 0
        # Ending a load may wait for its fetch: no call and no death waits for that.
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="kvstore-closer")
        self._closing = threading.Event()
        self._sweeper = threading.Thread(target=self._run, name="kvstore-sessions", daemon=True)
        self._sweeper.start()

    # -- coming ------------------------------------------------------------------------------------------------

    def open(self, *, name: str, pid: int, peer: Peer | None, shown: Shown, rights: Rights) -> Session:
        """A new session. Raises CapacityError at the limit, which for a tenant's is half of all."""
        now_s = self._clock.now_s()
        with self._lock:
            if len(self._sessions) >= self._max_sessions:
                raise CapacityError(f"{self._max_sessions} sessions are open, which is service.max_sessions")
            account = self._accounts.get(rights.tenant) if rights.tenant else None
            if account is not None and len(account.sessions) >= self._max_tenant_sessions:
                raise CapacityError(
                    f"the tenant has {self._max_tenant_sessions} sessions open, half of service.max_sessions"
                )
            self._number += 1
            ids = secrets.token_bytes(16), secrets.token_bytes(16)
            session = Session(*ids, self._number, name, pid, peer, shown, rights, now_s, now_s)
            self._sessions[session.id] = session
            self._by_engine_key[session.engine_key] = session
            if rights.tenant:
                session.account = self._accounts.setdefault(rights.tenant, session.account)
            with session.account.lock:
                session.account.sessions.add(session)
        return session

    @contextmanager
    def streaming(self, session: Session) -> Iterator[None]:
        """While a streaming call of a session runs. Raises CapacityError where its tenant has its share of them."""
        account = session.account
        with account.lock:
            if session not in account.sessions:  # the account may be another one by now
                raise UnknownSession("the session has ended: open again")
            if session.rights.tenant and account.num_streams >= self._max_tenant_streams:
                raise CapacityError(
                    f"the tenant has {self._max_tenant_streams} streams open, half of service.max_streams"
                )
            account.num_streams += 1
        try:
            yield
        finally:
            with account.lock:
                account.num_streams -= 1
                is_idle = account.is_idle
            if is_idle:
                with self._lock:
                    self._drop_idle(session)

    def _drop_idle(self, session: Session) -> None:
        """Forget the account of a tenant that has nothing here any more: while a stream of its last session runs, that
        counts for the next one as well. The book's lock is held."""
        account, tenant = session.account, session.rights.tenant
        with account.lock:
            if account.is_idle and self._accounts.get(tenant) is account:
                del self._accounts[tenant]

    def get(self, session_id: bytes) -> Session:
        """Raises UnknownSession."""
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession("no such session here: the server was restarted, or the session ended; open again")
        return session

    def find(self, session_id: bytes) -> Session | None:
        """A session, also one that was revoked and whose process lives."""
        return self._sessions.get(session_id) or self._revoked.get(session_id)

    def by_engine_key(self, key: bytes) -> Session:
        """Raises UnknownLease."""
        session = self._by_engine_key.get(key)
        if session is None:
            raise UnknownLease("no session has this engine key: it ended, or the server was restarted")
        return session

    def all(self) -> list[Session]:
        with self._lock:
            return list(self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)

    def note_over_share(self) -> None:
        """A session, or tenant, came to its share of the memory."""
        with self._lock:
            self.num_over_share += 1

    # -- staying -----------------------------------------------------------------------------------------------

    def begin_stream(self, session: Session, cancel: Callable[[], object]) -> None:
        """A Session stream, which `cancel` ends: its client may say nothing more, and it would be served for good."""
        with session.lock:
            if session.ended:
                raise UnknownSession("the session has ended: open again")
            session.cancels.add(cancel)
            session.in_use = True

    def end_stream(self, session: Session, cancel: Callable[[], object]) -> None:
        with session.lock:
            session.cancels.discard(cancel)
            session.last_seen_s = self._clock.now_s()

    def beat(self, session: Session, beat: pb.Beat, live: frozenset[int]) -> None:
        """Renew read leases that the client still has; end those it does not know of."""
        session.last_seen_s = self._clock.now_s()
        if beat.ttft_saved_s:
            if not 0 <= beat.ttft_saved_s <= MAX_SAVED_S:
                raise ConfigError(f"ttft_saved_s is {beat.ttft_saved_s}: give seconds, at most {MAX_SAVED_S:g} a beat")
            with self._lock:
                self.ttft_saved_s += beat.ttft_saved_s
        with session.lock:
            loads = list(session.loads.items())
        gone = []
        for number, served in loads:
            if number in live:
                served.load.renew()
            elif number <= beat.highest_lease:
                gone.append(number)
        self.end_loads(session, gone)

    def end(self, session: Session, ended: pb.Ended, loads: Iterable[int], saves: Iterable[int]) -> None:
        """What the client says it is done with."""
        self.end_loads(session, loads)
        self.end_saves(session, saves)
        for request in ended.requests:
            with session.lock:
                session.holds.pop(request, None)
            self._forget(session.key(request))
        for one in ended.announced:
            with session.lock:
                mark = session.marks.pop((one.chain, one.start, one.stop, one.number), None)
            if mark is not None:
                mark.withdraw()

    def end_loads(self, session: Session, numbers: Iterable[int]) -> None:
        for number in numbers:
            with session.lock:
                served = session.loads.pop(number, None)
                session.bury(number)
            if served is not None:
                self._close(served)

    def end_saves(self, session: Session, numbers: Iterable[int]) -> None:
        """The client writes to these no more. Other writers of theirs may."""
        for number in numbers:
            with session.lock:
                served = session.saves.pop(number, None)
                session.bury(number)
            if served is not None:
                served.leave(session)
                self.quarantine.give_up(served)

    def _close(self, served: ServedLoad) -> None:
        if served.load.is_fetching and not self._closing.is_set():
            self._closer.submit(served.close)
        else:
            served.close()

    # -- going -------------------------------------------------------------------------------------------------

    def revoke(self, session: Session) -> None:
        """End a session whose client would go on. One that has the memory may be writing, until its process ends."""
        with self._lock:
            if self._sessions.get(session.id) is not session:
                return  # it ended meanwhile, and nothing would end it again
            if session.mapped:
                self._revoked[session.id] = session
        log.warning("client %r (pid %d) lost its rights: its session ends", session.name, session.pid)
        if not session.mapped:
            self._end(session)
            return
        log.warning("pid %d keeps the memory that it has mapped until it ends", session.pid)
        self._let_go(session)
        self._fence(session)

    def leave(self, session: Session) -> None:
        """The client has gone, and writes nothing any more."""
        self._end(session)
        if session.peer is not None and not self.quarantine.waits_for(session):
            self._forget_peer(session.peer)

    def process_died(self, peer: Peer) -> None:
        """Everything of a dead process ends."""
        with self._lock:
            known = [*self._sessions.values(), *self._revoked.values()]
        for session in [each for each in known if each.peer is peer]:
            self._end(session)

    def _end(self, session: Session) -> None:
        """What it holds goes, and it writes no more."""
        self._let_go(session)
        with self._lock:
            self._revoked.pop(session.id, None)
        with session.lock:
            saves, joined = list(session.saves), list(session.joined.values())
            session.joined.clear()
        self.end_saves(session, saves)
        for save in joined:
            save.leave(session)
        self.quarantine.left(session)

    def _let_go(self, session: Session) -> None:
        """It is served no more, and keeps nothing from eviction but what it may be writing to."""
        with self._lock:
            self._sessions.pop(session.id, None)
            self._by_engine_key.pop(session.engine_key, None)
            with session.account.lock:
                session.account.sessions.discard(session)
            self._drop_idle(session)
        with session.lock:
            session.ended = True
            cancels, session.cancels = session.cancels, set()
            loads, loans = list(session.loads), list(session.loans)
            holds, marks = list(session.holds), list(session.marks.values())
            session.holds.clear()
            session.marks.clear()
            session.loans.clear()
        for cancel in cancels:
            cancel()
        self.end_loads(session, loads)
        for loan in loans:
            loan.close()
        for request in holds:
            self._forget(session.key(request))
        for mark in marks:
            mark.withdraw()

    def _fence(self, session: Session) -> None:
        """A silent process that lives: others may save its blocks, nobody gets the slots it may be writing to."""
        with session.lock:
            session.in_use = True
            saves = list(session.saves.values())
            for number in session.saves:
                session.bury(number)
            session.saves.clear()
        for served in saves:
            self.quarantine.give_up(served)
        with self._lock:
            is_gone = session.id not in self._sessions and session.id not in self._revoked
        if is_gone:  # its process has died meanwhile, which is said once
            self.quarantine.left(session)

    def _began_nothing(self, session: Session) -> bool:
        """Whether its client has done nothing with it; if so, it can begin nothing any more."""
        with session.lock:
            nothing = not (session.in_use or session.saves or session.joined)
            session.ended = session.ended or nothing
        return nothing

    def _run(self) -> None:
        last_s = self._clock.now_s()
        while not self._closing.wait(0.5):
            now_s = self._clock.now_s()
            stalled_s = now_s - last_s if now_s - last_s > _STALL_S else 0.0
            last_s = now_s
            for session in self.all():
                # This process did not run: beats sent meanwhile wait in the socket.
                session.last_seen_s += stalled_s
                if session.cancels:
                    silent_s = self._lease_s
                else:
                    silent_s = min(self._lease_s, STREAM_GRACE_S) if not session.mapped else self._lease_s
                if now_s - session.last_seen_s <= silent_s:
                    continue
                if not session.mapped:
                    self._end(session)
                elif self._began_nothing(session):
                    self.leave(session)  # its client never had the answer to its Open, and has opened another
                else:
                    self._fence(session)

    def close(self) -> None:
        """End every session; the server has stopped."""
        self._closing.set()
        self._sweeper.join()
        for session in [*self.all(), *self._revoked.values()]:
            self._end(session)
        self._closer.shutdown(wait=True)
        self.quarantine.clear()
