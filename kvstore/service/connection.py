# SPDX-License-Identifier: Apache-2.0
"""One connection of a client: its session with one start of a server, and what both know of each other."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import grpc
import numpy as np

from kvstore.block import FORMAT_VERSION, Chain, ModelId
from kvstore.clock import check_seconds
from kvstore.errors import AccessDenied, ConfigError, KVStoreError, ServiceUnavailable
from kvstore.service.handlers import SEND_AHEAD
from kvstore.service.handshake import MAX_MESSAGE_BYTES, PROTOCOL_VERSIONS, hash_vector
from kvstore.service.knock import Unmapped, knock, trust_socket
from kvstore.service.lane import LaneStub
from kvstore.service.plane import DataPlane
from kvstore.service.status import error_of
from kvstore.service_options import check_token_is_hidden, socket_path
from kvstore.wire import kvstore_pb2 as pb
from kvstore.wire.kvstore_pb2_grpc import KVStoreStub

_MOST_SKIPPED = 5
"""Of so many beats with nothing to say only one is sent. One took 3 ms of CPU, on both sides together, from an engine
that computes on the same cores."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new connection never takes over the socket of a dead one
    ("SingleThreadedUnaryStream", 1),
)
_ELSEWHERE = (
    # A server that hangs, or a host that is cut off, is lost within 22 s though nothing is asked of it. By gRPC's own
    # threads: no Python runs, and a server that is busy answers. Servers hang up on who pings oftener than every 10 s.
    ("grpc.keepalive_time_ms", 12_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    *SEND_AHEAD,
)
"""Of clients whose bytes come by streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """How a client reaches a server.

    Attributes:
        address: unix:PATH or host:port. mapped: map the arena; otherwise bytes come and go by streams.
        may_stream: also where mapped, if this user has limited rights, for which there is no map.
        call_deadline_s: of each call. progress_s: of each next block of a load from lower tiers.
        buffer_bytes: memory that bytes of an unmapped client pass through, at most.
        token, tls_ca, tls_cert, tls_key: credentials; files in PEM.
    """

    address: str
    mapped: bool
    name: str
    may_stream: bool = False
    call_deadline_s: float = 0.5
    progress_s: float = 10.0
    buffer_bytes: int = 1 << 30
    token: str = ""
    tls_ca: bytes = b""
    tls_cert: bytes = b""
    tls_key: bytes = b""

    def __post_init__(self) -> None:
        check_seconds("call_deadline_s", self.call_deadline_s)
        check_seconds("progress_s", self.progress_s)
        check_token_is_hidden(self.address, self.token, encrypted=self.encrypted)

    @property
    def encrypted(self) -> bool:
        """Whether bytes cross a network under TLS; a Unix socket has none, and needs none."""
        return socket_path(self.address) is None and bool(self.tls_ca or self.tls_cert)


class Done:
    """What the client is done with, until the server has heard it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loads: list[int] = []
        self._saves: list[int] = []
        self._requests: list[str] = []
        self._announced: list[pb.Announced] = []

    def __bool__(self) -> bool:
        return bool(self._loads or self._saves or self._requests or self._announced)

    def add(self, *, load: int = 0, save: int = 0, request: str = "", announced: pb.Announced | None = None) -> None:
        with self._lock:
            if load:
                self._loads.append(load)
            if save:
                self._saves.append(save)
            if request:
                self._requests.append(request)
            if announced is not None:
                self._announced.append(announced)

    def take(self) -> pb.Ended | None:
        """All of it, to be sent; None where there is nothing."""
        if not self:
            return None
        with self._lock:
            ended = pb.Ended(
                loads=np.array(self._loads, "<u8").tobytes(),
                saves=np.array(self._saves, "<u8").tobytes(),
                requests=self._requests,
                announced=self._announced,
            )
            self._loads, self._saves, self._requests, self._announced = [], [], [], []
        return ended

    def put_back(self, ended: pb.Ended | None) -> None:
        """It was not heard. Ending twice does no harm."""
        if ended is not None:
            with self._lock:
                self._loads += np.frombuffer(ended.loads, "<u8").tolist()
                self._saves += np.frombuffer(ended.saves, "<u8").tolist()
                self._requests += ended.requests
                self._announced += ended.announced


@dataclass(slots=True)
class _Known:
    """What the server knows of a chain."""

    number: int
    num_blocks: int = 0


@dataclass(slots=True, eq=False)
class Connection:
    """One session with one start of a server.

    Attributes:
        highest_lease, live_loads: what beats say; a load's number becomes both at once, under `leasing`. A beat that
            had it as the highest and not as live would end the load as one that this client does not know of: a
            server that is ahead with the load's own call then finds nothing to send.
        draining: the server has said that it stops soon.
        lost: set once, when nothing more comes of it.
    """

    channel: grpc.Channel
    stub: KVStoreStub
    plane: DataPlane
    opened: pb.OpenReply
    models: dict[ModelId, int] = field(default_factory=dict)
    chains: WeakKeyDictionary[Chain, _Known] = field(default_factory=WeakKeyDictionary)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    leases: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    highest_lease: int = 0
    live_loads: set[int] = field(default_factory=set)
    leasing: threading.Lock = field(default_factory=threading.Lock)
    done: Done = field(default_factory=Done)
    draining: bool = False
    lost: threading.Event = field(default_factory=threading.Event)

    @property
    def session(self) -> bytes:
        return self.opened.session

    def next_lease(self, *, load: bool = False) -> int:
        """A number for a save, or for a load, which is live until it is taken out of `live_loads`."""
        with self.leasing:
            self.highest_lease = number = next(self.leases)
            if load:
                self.live_loads.add(number)
        return number

    def beat(self, saved_s: float, ticket: bytes = b"") -> pb.Beat:
        """What this client has, seconds that it reports, and the ticket of another lane."""
        with self.leasing:
            live, highest = list(self.live_loads), self.highest_lease
        packed = np.array(live, "<u8").tobytes()
        return pb.Beat(
            session=self.session, live_leases=packed, highest_lease=highest, ttft_saved_s=saved_s, ticket=ticket
        )

    def delta(self, chain: Chain, *, whole: bool) -> tuple[pb.ChainDelta, int]:
        """A message about all of `chain` as it is now, and its number of blocks. Raises ConfigError."""
        known = self.chains.get(chain)
        if known is None:
            known = self.chains.setdefault(chain, _Known(next(self.numbers)))
        if whole:
            known.num_blocks = 0
        start = known.num_blocks
        ids = chain.ids[start:]
        if start:
            return pb.ChainDelta(
                chain=known.number, num_known=start, ids=b"".join(ids), known_tail=chain.ids[start - 1]
            ), start + len(ids)
        model = self.models.get(chain.root.model)
        if model is None:
            raise ConfigError(f"model {chain.root.model.model!r} is not open: call store.open(model) first")
        root = pb.Root(model=model, adapter=chain.root.adapter, salt=chain.root.salt, id=chain.root.id)
        return pb.ChainDelta(chain=known.number, ids=b"".join(ids), root=root), len(ids)

    def heard(self, chain: Chain, num_blocks: int) -> None:
        """The server has so many blocks of the chain."""
        known = self.chains.get(chain)
        if known is not None:
            known.num_blocks = max(known.num_blocks, num_blocks)

    def begin_beats(self, take_saved: Callable[[], float], ended: Callable[[], None]) -> None:
        """Open the stream of beats. It runs on a thread of gRPC's, which reads the notices as well.

        `take_saved` gives seconds to report, `ended` is called when the stream ends.
        """
        every_s = max(0.05, min(1.0, self.opened.lease_s / 4))
        most = max(1, min(_MOST_SKIPPED, int(self.opened.lease_s / 4 / every_s)))
        begun: queue.SimpleQueue[Any] = queue.SimpleQueue()
        lane = self.plane.lane

        def beats() -> Iterator[pb.Beat]:
            notices, is_ready, num_skipped = None, False, 0
            while not self.lost.wait(0 if notices is None else every_s):
                ticket = b"" if lane is None else lane.ask_anew()
                saved_s = take_saved()
                num_skipped += 1
                if is_ready and num_skipped < most and not ticket and not saved_s:
                    continue
                num_skipped = 0
                yield self.beat(saved_s, ticket)
                notices = notices or begun.get()
                try:
                    notice = next(notices)
                except (grpc.RpcError, StopIteration):
                    return
                is_ready = notice.prefaulted
                if is_ready:
                    self.plane.prefaulted()
                if lane is not None and ticket:
                    lane.begin_anew(notice.lane_begun)

        call = self.stub.Session(beats())
        begun.put(call)
        call.add_done_callback(lambda _: ended())

    def leave(self, timeout_s: float) -> None:
        """Tell the server that nothing more comes."""
        try:
            bye = iter([pb.Beat(session=self.session, bye=True)])
            for _ in self.stub.Session(bye, timeout=timeout_s):
                pass
        except grpc.RpcError:
            pass


def open_session(options: LinkOptions, plane: DataPlane, before: Connection | None) -> Connection:
    """A session with a server; `before` is the connection it replaces.

    Raises ServiceUnavailable, or what the server refuses; then the plane is closed.
    """
    try:
        channel = open_channel(options, mapped=plane.lane is not None)
    except BaseException:
        plane.close()
        raise
    try:
        stub: Any = KVStoreStub(channel)  # type: ignore[no-untyped-call]
        if plane.lane is not None:
            stub = LaneStub(stub, plane.lane)
        request = pb.OpenRequest(
            protocol_versions=PROTOCOL_VERSIONS,
            format_version=FORMAT_VERSION,
            hash_vector=hash_vector(),
            ticket=plane.ticket,
            token=options.token,
            client_name=options.name,
            pid=os.getpid(),
            previous_session=b"" if before is None else before.session,
        )
        opened = _open(stub, request, options)
        if plane.boot_id and plane.boot_id != opened.boot_id:
            raise ServiceUnavailable("the server was restarted between its door and its answer")
    except BaseException:
        plane.close()
        channel.close()
        raise
    return Connection(channel, stub, plane, opened)


def _open(stub: Any, request: pb.OpenRequest, options: LinkOptions) -> pb.OpenReply:
    """Where the server tells users apart, and was not told which this is, the door tells it."""
    timeout_s = max(options.call_deadline_s, 1.0)
    try:
        opened: pb.OpenReply = stub.Open(request, timeout=timeout_s)
    except grpc.RpcError as failure:
        error, path = error_of(failure), socket_path(options.address)
        if not isinstance(error, AccessDenied) or request.ticket or request.token or path is None:
            raise error from None
        try:
            knock(path, options.call_deadline_s).close()
        except Unmapped as known:
            request.ticket = known.ticket
        except AccessDenied:
            raise
        except KVStoreError:
            raise error from None
        else:
            raise error from None
        try:
            opened = stub.Open(request, timeout=timeout_s)
        except grpc.RpcError as again:
            raise error_of(again) from None
    return opened


def open_channel(options: LinkOptions, *, mapped: bool) -> grpc.Channel:
    """A channel to the server, with TLS where there are files for it."""
    if (place := socket_path(options.address)) is not None:
        trust_socket(place)
    channel_options = CHANNEL_OPTIONS if mapped else (*CHANNEL_OPTIONS, *_ELSEWHERE)
    if not options.encrypted:
        return grpc.insecure_channel(options.address, options=channel_options)
    credentials = grpc.ssl_channel_credentials(
        options.tls_ca or None, options.tls_key or None, options.tls_cert or None
    )
    return grpc.secure_channel(options.address, credentials, options=channel_options)
