# SPDX-License-Identifier: Apache-2.0
"""Looking in, and care: what people and scripts ask of a server.

What belongs to others looks like what is not there; counters of all, settings, clients and checks are for admins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvstore.block import DIGEST_BYTES, RootId
from kvstore.clock import Clock
from kvstore.config import StoreConfig
from kvstore.errors import AccessDenied, ConfigError
from kvstore.inspection import BlockInfo
from kvstore.service.chains import split_ids
from kvstore.service.handshake import model_message
from kvstore.service.namespaces import Namespaces
from kvstore.service.session import Session
from kvstore.service.sessions import SessionBook
from kvstore.service.turns import Turns
from kvstore.store import KVStore
from kvstore.wire import kvstore_pb2 as pb

_MAX_INFOS = 4_096
"""Of one reply: with 256 tokens each they take 5 MB."""
_WARM_S = 60.0
_INSPECTS = 4
"""At once: each keeps the interpreter for some 50 ms."""
_WARMS = 8
"""At once: each may hold a thread for a minute."""


class Care:
    """Serves the calls of people and scripts over one store. Thread-safe."""

    def __init__(
        self, store: KVStore, sessions: SessionBook, namespaces: Namespaces, config: StoreConfig, clock: Clock
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._namespaces = namespaces
        self._config = config
        self._clock = clock
        self._inspecting = Turns("Inspect", _INSPECTS)
        self._warming = Turns("Warm", _WARMS)

    def values(self) -> dict[str, float]:
        """Counters and gauges of the store and of the service."""
        return {
            **self._store.stats(),
            "service.sessions": len(self._sessions),
            "service.over_share": self._sessions.num_over_share,
            "ttft.saved_s": self._sessions.ttft_saved_s,
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
                opened = [layout.model for layout in session.models]
            return pb.StatsReply(values=mine, models=map(model_message, opened))
        settings = [
            pb.Setting(key=key, value=str(value), source=source) for key, value, source in self._config.explain()
        ]
        models = map(model_message, self._store.models)
        return pb.StatsReply(values=self.values(), settings=settings, clients=self._clients(), models=models)

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
        with self._inspecting.taken(session.party):
            return self._inspect(session, request)

    def _inspect(self, session: Session, request: pb.InspectRequest) -> pb.InspectReply:
        chain = session.chains.resolve(request.chain) if request.HasField("chain") else None
        ids = split_ids(request.ids, "ids") if chain is None else list(chain.ids)
        rights = session.rights

        def may_see(root: RootId) -> bool:
            if chain is not None:
                return root == chain.root.id
            return rights.sees_all or self._namespaces.roots.allows(rights, root)

        infos = self._store.inspect(ids[:_MAX_INFOS], may_see)
        if chain is not None:
            infos = _along(infos, self._store.locate(chain.first(len(infos))))
        return pb.InspectReply(blocks=map(_message, infos), num_left_out=max(0, len(ids) - _MAX_INFOS))

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

    def warm(self, session: Session, request: pb.WarmRequest, remaining_s: float | None) -> pb.WarmReply:
        chain = session.chains.resolve(request.chain)
        contents = chain.verify(request.contents)
        if contents.start or contents.stop < len(chain):
            raise ConfigError(f"contents cover blocks {contents.start}…{contents.stop}: warm needs all {len(chain)}")
        # What comes up is charged to the session's tenant, however long ago the root was sent. A session without one
        # leaves it with whose it is; where that was forgotten, it is nobody's until the tenant itself uses it again.
        self._namespaces.show(session, chain.root)
        chain.describe(contents)
        try:
            limit_s = _WARM_S if remaining_s is None else min(_WARM_S, remaining_s * 0.9)
            with self._warming.taken(session.party):
                num_host, num_promoted = self._store.warm(chain, limit_s)
        finally:
            chain.undescribe(contents)
        return pb.WarmReply(num_host_blocks=num_host, num_promoted=num_promoted)

    def check(self, session: Session) -> pb.CheckReply:
        if not session.rights.admin:
            raise AccessDenied("only an admin checks the store")
        return pb.CheckReply(faults=self._store.check())


def _along(infos: list[BlockInfo], located: Mapping[str, Sequence[bool]]) -> list[BlockInfo]:
    """Blocks of a chain from its first on, with what lower tiers say of them now."""
    return [
        replace(info, depth=at, tiers=tuple(name for name, there in located.items() if there[at]))
        for at, info in enumerate(infos)
    ]


def _message(info: BlockInfo) -> pb.BlockInfo:
    return pb.BlockInfo(
        id=info.id,
        resident=info.resident,
        root=info.root,
        parent=info.parent,
        depth=info.depth,
        ready_parts=info.ready_parts,
        num_pins=info.num_pins,
        num_children=info.num_children,
        tiers=info.tiers,
        tokens=info.tokens,
    )
