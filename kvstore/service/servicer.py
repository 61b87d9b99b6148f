# SPDX-License-Identifier: Apache-2.0
"""The calls of kvstore.v1, each of them a line or two over the rooms that do the work.

sessions   Open, Session, Release                   requests   Match(Partial), Announce, Load, Save, Commit, Join, Touch
namespaces OpenModel
streams    Read, Write, Peek, Fetch                 watch      Watch
care       Stats, Inspect, Clear, Warm, Check
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import grpc
import numpy as np

from kvstore.block import FORMAT_VERSION
from kvstore.errors import AccessDenied, ConfigError, ProtocolError, ServiceUnavailable
from kvstore.service import streams
from kvstore.service.calls import Calls, Timed, remaining_s
from kvstore.service.care import Care
from kvstore.service.chains import ChainCache
from kvstore.service.door import Door, Peer
from kvstore.service.handlers import messages_of, read
from kvstore.service.handshake import MAX_MESSAGE_BYTES, common_version, hash_vector
from kvstore.service.lane import METHODS, LaneCall, Lanes, Method
from kvstore.service.namespaces import Namespaces
from kvstore.service.requests import Requests, numbers
from kvstore.service.rights import Gate, Shown
from kvstore.service.session import Session
from kvstore.service.sessions import SessionBook
from kvstore.service.status import UnknownSession
from kvstore.service.sums import Sums
from kvstore.service.watch import Watch
from kvstore.store import KVStore
from kvstore.wire import kvstore_pb2 as pb
from kvstore.wire.kvstore_pb2_grpc import KVStoreServicer

_MAX_NAME_BYTES = 256
_NOTHING = pb.Empty()
_UNARY = (
    *("Open", "OpenModel", "Match", "MatchPartial", "Announce", "Release", "LoadHost", "Save", "Commit", "Join"),
    *("Touch", "Stats", "Inspect", "Clear", "Warm", "Check", "Peek"),
)
_STREAMS = ("Session", "Load", "Read", "Fetch", "Watch")
_UPLOADS = ("Write",)
_STALL_S = 30.0
"""How long a stream of bytes may stand still before its client is given up."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What OpenReply says of a server."""

    boot_id: bytes
    version: str
    lease_s: float
    hold_s: float


class Servicer(KVStoreServicer):
    """Serves kvstore.v1. Make its methods handlers with `Calls`: that is done here, once, at the start."""

    def __init__(
        self,
        store: KVStore,
        sessions: SessionBook,
        namespaces: Namespaces,
        requests: Requests,
        care: Care,
        calls: Calls,
        *,
        identity: Identity,
        gate: Gate,
        door: Door | None,
    ) -> None:
        self.draining = threading.Event()
        self._store = store
        self._sessions = sessions
        self._namespaces = namespaces
        self._requests = requests
        self._care = care
        self._identity = identity
        self._gate = gate
        self._door = door
        self._prefaulted = False
        self._beating: set[grpc.ServicerContext] = set()
        self.stalls = streams.StallWatch(_STALL_S, most_strangers=max(1, calls.max_streams // 2))
        self._sums = Sums(store.arena)
        self._watch_room = Watch(store.events, namespaces.roots, identity.boot_id)
        for name in _UNARY:
            setattr(self, name, calls.unary(name, getattr(self, f"_{name.lower()}")))
        self.lanes = Lanes({name: self._by_lane(name, calls) for name in METHODS})
        for name in _STREAMS:
            setattr(self, name, calls.stream(name, getattr(self, f"_{name.lower()}")))
        for name in _UPLOADS:
            setattr(self, name, calls.upload(name, getattr(self, f"_{name.lower()}")))

    def _by_lane(self, name: str, calls: Calls) -> Method:
        kind, _ = messages_of(name)
        method = calls.observed(name, getattr(self, f"_{name.lower()}"))

        def answer(message: bytes, call: LaneCall) -> bytes:
            request = read(kind, message)
            if self._sessions.get(request.session).peer is not call.peer:
                raise AccessDenied("the session is another process's: open one of your own")
            reply: bytes = method(request, call).SerializeToString()
            return reply

        return answer

    # -- sessions ----------------------------------------------------------------------------------------------

    def _open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
        self._refuse_while_draining()
        version = common_version(list(request.protocol_versions))
        if request.format_version != FORMAT_VERSION:
            raise ProtocolError(
                f"this server keeps blocks in format {FORMAT_VERSION}, the client in {request.format_version}: "
                "upgrade the older one"
            )
        if request.hash_vector != hash_vector():
            raise ProtocolError(
                f"the client hashes blocks to other ids ({request.hash_vector.hex()[:16]}…) than this server "
                f"({hash_vector().hex()[:16]}…): run the same version of kvstore on both sides"
            )
        if len(request.client_name.encode()) > _MAX_NAME_BYTES:
            raise ConfigError(f"client_name has {len(request.client_name)} characters: at most {_MAX_NAME_BYTES} bytes")
        peer, uid = self._redeem(request.ticket)
        try:
            shown = Shown.of(
                request.token,
                uid=uid,
                certificate_name=_certificate_name(context),
                local=context.peer().startswith("unix:"),
            )
            session = self._sessions.open(
                name=request.client_name,
                pid=request.pid if peer is None else peer.pid,
                peer=peer,
                shown=shown,
                rights=self._gate.rights_of(shown),
            )
        except BaseException:
            if peer is not None and self._door is not None:
                self._door.forget(peer)  # a passage that led nowhere
            raise
        session.chains = ChainCache(lambda message: self._namespaces.root_of(session, message))
        if peer is not None and self._door is not None:
            lane = self._door.take_lane(peer)
            if lane is not None:
                self.lanes.begin(peer, lane)
            if not self._door.alive(peer):
                self.process_died(peer)
        if not self._gate.still_gives(session.rights, shown):  # read again since they were asked for
            self._sessions.leave(session)  # its client never learns of it, and writes nothing
            raise ServiceUnavailable("rights were changed just now: open again")
        if request.previous_session:
            self._end_previous(request.previous_session, session)
        return pb.OpenReply(
            session=session.id,
            protocol_version=version,
            boot_id=self._identity.boot_id,
            server_version=self._identity.version,
            lease_s=self._identity.lease_s,
            hold_s=self._identity.hold_s,
            max_message_bytes=MAX_MESSAGE_BYTES,
            engine_key=session.engine_key,
        )

    def process_died(self, peer: Peer) -> None:
        """Everything of a dead process ends."""
        self._sessions.process_died(peer)
        self.lanes.finish(peer)

    def _redeem(self, ticket: bytes) -> tuple[Peer | None, int | None]:
        """The process that has the memory, if it has, and its user, if the door told it."""
        if not ticket:
            return None, None
        peer = self._door.redeem(ticket) if self._door is not None else None
        if peer is not None:
            return peer, peer.uid
        uid = self._door.introduced(ticket) if self._door is not None else None
        if uid is None:
            raise AccessDenied("the ticket is unknown, used or too old: pass the door again")
        return None, uid

    def _end_previous(self, session_id: bytes, successor: Session) -> None:
        """The client has a new session, and has stopped using this one."""
        previous = self._sessions.find(session_id)
        if previous is not None and (previous.rights == successor.rights or previous.shown == successor.shown):
            self._sessions.leave(previous)

    def judge_again(self) -> None:
        """Rights were read again: who has others now has to come anew, and who has none does not get in."""
        if self._door is not None:
            self._door.allow(self._gate.mapping_uids(), self._gate.unmapped_uids())
        for session in self._sessions.all():
            if not self._gate.still_gives(session.rights, session.shown):
                self._sessions.revoke(session)
        self._namespaces.roots.keep(self._gate.tenants())

    def _openmodel(self, request: pb.OpenModelRequest, context: Timed) -> pb.OpenModelReply:
        self._refuse_while_draining()
        return self._namespaces.open_model(self._sessions.get(request.session), request)

    def _session(self, beats: Iterator[pb.Beat], context: grpc.ServicerContext) -> Iterator[pb.Notice]:
        session = None
        self._beating.add(context)
        with ExitStack() as streaming:
            streaming.callback(self._beating.discard, context)
            first = self.stalls.first(beats, context.cancel)
            for beat in itertools.chain([] if first is None else [first], beats):
                if session is None:
                    session = self._sessions.get(beat.session)
                    streaming.enter_context(self._sessions.streaming(session))
                    self._sessions.begin_stream(session, context.cancel)
                    streaming.callback(self._sessions.end_stream, session, context.cancel)
                if beat.bye:
                    streaming.close()  # else this stream would be cut off with the session
                    self._sessions.leave(session)
                    return
                live = frozenset(numbers(beat.live_leases, "live_leases", "<u8"))
                if session.ended:
                    raise UnknownSession("the session has ended: open again")
                self._sessions.beat(session, beat, live)
                begun = bool(beat.ticket) and self._begin_another_lane(session, beat.ticket)
                yield pb.Notice(draining=self.draining.is_set(), prefaulted=self._is_prefaulted(), lane_begun=begun)

    def _begin_another_lane(self, session: Session, ticket: bytes) -> bool:
        """Serve the lane of one more passage of a session's process; the passage itself is then forgotten."""
        door, peer = self._door, session.peer
        again = door.redeem(ticket) if door is not None else None
        if door is None or again is None:
            return False
        same = peer is not None and (again.pid, again.uid) == (peer.pid, peer.uid)
        lane = door.take_lane(again) if same else None
        door.forget(again)
        begun = lane is not None and self.lanes.begin(peer, lane)
        if peer is not None and not door.alive(peer):
            self.lanes.finish(peer)
        return begun

    def _is_prefaulted(self) -> bool:
        if not self._prefaulted:
            self._prefaulted = self._store.wait_ready(0)
        return self._prefaulted

    def _known(self, session_id: bytes, ended: pb.Ended) -> Session:
        """The session of a call, after what the client has ended before it."""
        session = self._sessions.get(session_id)
        if ended.loads or ended.saves or ended.requests or ended.announced:
            self._sessions.end(
                session, ended, numbers(ended.loads, "ended.loads", "<u8"), numbers(ended.saves, "ended.saves", "<u8")
            )
        return session

    def _release(self, request: pb.ReleaseRequest, context: Timed) -> pb.Empty:
        session = self._known(request.session, request.ended)
        if request.window_of:
            self._requests.passed(session, request.window_of, request.passed)
        return _NOTHING

    def _refuse_while_draining(self) -> None:
        if self.draining.is_set():
            raise ServiceUnavailable("the server is draining: open again later")

    # -- a request's life --------------------------------------------------------------------------------------

    def _match(self, request: pb.MatchRequest, context: Timed) -> pb.MatchReply:
        session = self._known(request.session, request.ended)
        self._refuse_while_draining()
        return self._requests.match(session, request, remaining_s(context) if request.wait_ms else None)

    def _matchpartial(self, request: pb.MatchPartialRequest, context: Timed) -> pb.MatchPartialReply:
        session = self._known(request.session, request.ended)
        self._refuse_while_draining()
        return self._requests.match_partial(session, request)

    def _announce(self, request: pb.AnnounceRequest, context: Timed) -> pb.Empty:
        self._requests.announce(self._known(request.session, request.ended), request)
        return _NOTHING

    def _load(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> Iterator[pb.LoadReply]:
        session = self._known(request.session, request.ended)
        with self._sessions.streaming(session):
            yield from self._requests.load(session, request)

    def _loadhost(self, request: pb.LoadRequest, context: Timed) -> pb.LoadReply:
        return self._requests.load_host(self._known(request.session, request.ended), request)

    def _save(self, request: pb.SaveRequest, context: Timed) -> pb.SaveReply:
        session = self._known(request.session, request.ended)
        self._refuse_while_draining()
        return self._requests.save(session, request)

    def _commit(self, request: pb.CommitRequest, context: Timed) -> pb.CommitReply:
        return self._requests.commit(self._known(request.session, request.ended), request)

    def _join(self, request: pb.JoinRequest, context: Timed) -> pb.Empty:
        self._requests.join(self._sessions.get(request.session), request)
        return _NOTHING

    def _touch(self, request: pb.TouchRequest, context: Timed) -> pb.Empty:
        self._requests.touch(self._known(request.session, request.ended), request)
        return _NOTHING

    # -- bytes -------------------------------------------------------------------------------------------------

    def _read(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        session = self._known(request.session, request.ended)
        with self._sessions.streaming(session):
            load = self._requests.begin_load(session, request).load
            try:
                yield from self.stalls.sending(streams.read(load, self._sums), context.cancel)
            finally:
                self._sessions.end_loads(session, [request.lease])

    def _write(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> pb.WriteReply:
        messages = self.stalls.receiving(messages, context.cancel)
        session_id, lease = streams.begin_write(messages)
        session = self._sessions.get(session_id)
        with self._sessions.streaming(session):
            served = session.save_of(lease)
            published = streams.write(served, messages, self._sums)
        if served.is_done:
            session.finish(lease)
        return pb.WriteReply(published=np.array(published, "<u4").tobytes())

    def _peek(self, request: pb.PeekRequest, context: grpc.ServicerContext) -> pb.PeekReply:
        rights = self._sessions.get(request.session).rights
        return streams.peek(self._store, self._namespaces.roots, rights, request)

    def _fetch(self, request: pb.PeekRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        session = self._sessions.get(request.session)
        with self._sessions.streaming(session):
            lend = partial(self._requests.lend, session)
            messages = streams.fetch(lend, self._namespaces.roots, session.rights, request, self._sums)
            yield from self.stalls.sending(messages, context.cancel)

    def end_streams(self) -> None:
        """Let streams that wait for nothing but time return: the server stops."""
        self._watch_room.close()
        for context in list(self._beating):
            context.cancel()

    def close(self) -> None:
        """Stop the threads. No call is served any more."""
        self.lanes.close()
        self._watch_room.close()
        self.stalls.close()

    # -- looking in, and care ----------------------------------------------------------------------------------

    def _stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsReply:
        return self._care.stats(self._known(request.session, request.ended))

    def _inspect(self, request: pb.InspectRequest, context: grpc.ServicerContext) -> pb.InspectReply:
        return self._care.inspect(self._sessions.get(request.session), request)

    def _clear(self, request: pb.ClearRequest, context: grpc.ServicerContext) -> pb.ClearReply:
        return self._care.clear(self._known(request.session, request.ended), request)

    def _warm(self, request: pb.WarmRequest, context: grpc.ServicerContext) -> pb.WarmReply:
        return self._care.warm(self._sessions.get(request.session), request, remaining_s(context))

    def _watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchReply]:
        session = self._sessions.get(request.session)
        with self._sessions.streaming(session):
            yield from self._watch_room.watch(session, request, context)

    def _check(self, request: pb.CheckRequest, context: grpc.ServicerContext) -> pb.CheckReply:
        return self._care.check(self._known(request.session, request.ended))


def _certificate_name(context: grpc.ServicerContext) -> str | None:
    names: Sequence[bytes] = context.auth_context().get("x509_common_name") or ()  # type: ignore[assignment]
    return names[0].decode(errors="replace") if names else None
