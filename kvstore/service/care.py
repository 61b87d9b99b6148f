# SPDX-License-Identifier: Apache-2.0
"""Looking in, and care: what people and scripts ask of a server.

What belongs to others looks like what is not there; counters of all, settings, clients and checks are for admins.
"""

from __future__ import annotations

from kvstore.block import DIGEST_BYTES, RootId
from kvstore.clock import Clock
from kvstore.config import StoreConfig
from kvstore.errors import AccessDenied, ConfigError
from kvstore.service.sessions import Session, SessionBook
from kvstore.store import KVStore
from kvstore.wire import kvstore_pb2 as pb


class Care:
    """Serves the calls of people and scripts over one store. Thread-safe."""

    def __init__(self, store: KVStore, sessions: SessionBook, config: StoreConfig, clock: Clock) -> None:
        self._store = store
        self._sessions = sessions
        self._config = config
        self._clock = clock

    def values(self) -> dict[str, float]:
        """Counters and gauges of the store and of the service."""
        return {
            **self._store.stats(),
            "service.sessions": len(self._sessions),
            "save.quarantined_slots": self._sessions.quarantine.num_slots,
        }

    def stats(self, session: Session) -> pb.StatsReply:
        if not session.rights.admin:
            with session.lock:
                mine = {
                    "session.holds": float(len(session.holds)),
                    "session.loads": float(len(session.loads)),
                    "session.saves": float(len(session.saves)),
                }
            return pb.StatsReply(values=mine)
        settings = [
            pb.Setting(key=key, value=str(value), source=source) for key, value, source in self._config.explain()
        ]
        return pb.StatsReply(values=self.values(), settings=settings, clients=self._clients())

    def _clients(self) -> list[pb.Client]:
        now_s = self._clock.now_s()
        return [
            pb.Client(
                name=session.name,
                pid=session.pid,
                mapped=session.mapped,
                age_s=now_s - session.opened_s,
                num_leases=len(session.loads) + len(session.saves),
            )
            for session in self._sessions.all()
        ]

    def inspect(self, session: Session, request: pb.InspectRequest) -> pb.InspectReply:
        raise ConfigError("inspect is not served yet")

    def clear(self, session: Session, request: pb.ClearRequest) -> pb.ClearReply:
        root = request.root
        if root and len(root) != DIGEST_BYTES:
            raise ConfigError(f"root has {len(root)} bytes: give {DIGEST_BYTES}, or none for everything")
        if not session.rights.admin:
            with session.lock:
                mine = {each.id for each in session.roots.values()}
            if not root:
                raise AccessDenied("only an admin clears everything: name a root")
            if root not in mine:
                return pb.ClearReply(num_blocks=0)
        return pb.ClearReply(num_blocks=self._store.clear(RootId(root) if root else None))

    def warm(self, session: Session, request: pb.WarmRequest) -> pb.WarmReply:
        raise ConfigError("warm is not served yet")

    def check(self, session: Session) -> pb.CheckReply:
        if not session.rights.admin:
            raise AccessDenied("only an admin checks the store")
        return pb.CheckReply(faults=self._store.check())
