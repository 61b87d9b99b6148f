# SPDX-License-Identifier: Apache-2.0
"""A client's link to a server: one connection at a time, and one thread that keeps it up.

    up ──no answer in time──▶ resting ──it answers──▶ up
    up, resting ──gone, or our session is──▶ down ──unmapped, knocked, opened──▶ up

While the link is not up callers are told at once, without waiting for a deadline each.

Invariants
1. A connection belongs to one start of the server: its session, chain numbers and mapping never meet another's.
2. What the client is done with is said with the next call, or soon by itself, until the server has heard it.
3. A forked child never touches the parent's channel: every use is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np

from kvstore.block import Chain, ModelId
from kvstore.errors import ConfigError, KVStoreError, ProtocolError, ServiceUnavailable
from kvstore.layout import BlockLayout, layout_of
from kvstore.service.connection import Connection, LinkOptions, open_session
from kvstore.service.handshake import model_message
from kvstore.service.plane import DataPlane, Down
from kvstore.service.replies import Replies
from kvstore.service.status import UnknownChain, UnknownSession, error_of, is_transport
from kvstore.service_options import perhaps_tls
from kvstore.stats import MAX_SAVED_S, Stats, saved_seconds
from kvstore.wire import kvstore_pb2 as pb

log = logging.getLogger("kvstore.client")

Reply = TypeVar("Reply")

_TICK_S = 0.01
"""What is done with waits for a call to go with, one to two ticks. Without ticks each would cost a thread's waking."""
_QUIET_TICKS = 5
"""After so many without anything the thread sleeps until it is woken. With 50, each lonely request paid for 50."""
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0
_UNMAP_S = 5.0
_WATCH_S = 0.05


class Link:
    """Keeps a connection. Thread-safe."""

    def __init__(self, options: LinkOptions, make_plane: Callable[[float], DataPlane], stats: Stats) -> None:
        """`make_plane` gets what bytes need before a session is opened, within so many seconds; it may raise."""
        self.options = options
        self._make_plane = make_plane
        self._stats = stats
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._connection: Connection | None = None
        self._resting: Connection | None = None
        self._broken: Connection | None = None
        self._models: list[ModelId] = []
        self._streams: dict[int, tuple[float, Callable[[], None]]] = {}
        self._stream_numbers = itertools.count()
        self._closing = False
        self._drowsy = False
        self._num_quiet = 0
        self._waits = False
        self._saved_s = 0.0
        self._said_down = False
        self._unmap_from_s = 0.0
        self._refusal: KVStoreError | None = None
        self._thread = threading.Thread(target=self._run, name="kvstore-link", daemon=True)

    # -- using it ----------------------------------------------------------------------------------------------

    def start(self, wait_s: float) -> None:
        """Connect, and keep trying for `wait_s`. Raises ServiceUnavailable after that, or what the server refused."""
        deadline_s = time.monotonic() + wait_s
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                self._connect(None)
                break
            except ServiceUnavailable as error:
                if time.monotonic() + backoff_s >= deadline_s:
                    raise ServiceUnavailable(
                        f"no server answers at {self.options.address} ({error}): start one with kvstore serve"
                        + perhaps_tls(self.options.address, encrypted=self.options.encrypted)
                    ) from error
                time.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
        self._thread.start()

    def begin(self) -> None:
        """Keep trying from the thread, without waiting for it. Instead of `start`, or after it failed."""
        self._thread.start()

    def check_process(self) -> None:
        """Raise ConfigError in a forked child."""
        if os.getpid() != self._pid:
            raise ConfigError(
                f"this client belongs to process {self._pid} and was inherited by its forked child {os.getpid()}: "
                "call kvstore.connect in the child"
            )

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    def up(self) -> Connection:
        """The connection. Raises Down, ConfigError in a forked child or after `close`."""
        connection = self._connection
        if os.getpid() != self._pid:
            self.check_process()
        if connection is None:
            if self._closing:
                raise ConfigError("this client was closed: call kvstore.connect again")
            self._stats.add("client.failures.down")
            raise Down
        return connection

    def call(
        self,
        connection: Connection,
        method: Callable[..., Reply],
        request: Any,
        *,
        timeout_s: float | None = None,
        carries_ended: bool = True,
    ) -> Reply:
        """One call, with what is done with on board. Raises Down where nothing came of it, else the server's error."""
        self.check_process()
        ended = connection.done.take() if carries_ended else None
        if ended is not None:
            request.ended.CopyFrom(ended)
        try:
            return method(request, timeout=self.options.call_deadline_s if timeout_s is None else timeout_s)
        except BaseException as failure:
            connection.done.put_back(ended)
            if isinstance(failure, grpc.RpcError):
                raise self.failed(connection, failure) from None
            if isinstance(failure, ValueError):  # what gRPC raises on a channel that the link has closed since
                raise Down from None
            raise

    def stream(self, connection: Connection, method: Callable[..., Any], request: Any) -> Replies:
        """A call with many replies, with what is done with on board."""
        self.check_process()
        ended = connection.done.take()
        if ended is not None:
            request.ended.CopyFrom(ended)
        try:
            call = method(request)
        except ValueError:  # what gRPC raises on a channel that the link has closed since
            connection.done.put_back(ended)
            raise Down from None
        return Replies(self, connection, call, ended)

    def note_saved(self, seconds: float) -> None:
        """Raises ConfigError."""
        seconds = saved_seconds(seconds)
        with self._lock:
            self._saved_s += seconds

    def _take_saved(self) -> float:
        with self._lock:
            seconds = min(self._saved_s, MAX_SAVED_S)
            self._saved_s -= seconds
        return seconds

    def ended(
        self,
        connection: Connection,
        *,
        load: int = 0,
        save: int = 0,
        request: str = "",
        announced: pb.Announced | None = None,
    ) -> None:
        """The client is done with a load, a save (nobody of it writes to its slots), a hold, or what it announced."""
        if not connection.lost.is_set():
            connection.done.add(load=load, save=save, request=request, announced=announced)
            if self._drowsy:
                with self._lock:
                    self._wake.notify()

    def failed(self, connection: Connection, failure: grpc.RpcError) -> Exception:
        """Note a failed call; returns what to raise: Down, or the error that the server meant."""
        error = error_of(failure)
        if is_transport(failure):
            code = failure.code()
            self._stats.add(f"client.failures.{code.name.lower()}")
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._rest(connection, f"no answer within {self.options.call_deadline_s:g} s")
            else:
                self._lose(connection, str(error))
            return Down()
        if isinstance(error, UnknownSession):
            self._stats.add("client.failures.session")
            self._lose(connection, str(error))
            return Down()
        if isinstance(error, ServiceUnavailable):
            self._stats.add("client.failures.draining")
            connection.draining = True
            self._rest(connection, str(error))
            return Down()
        return error

    def about(self, connection: Connection, chain: Chain, send: Callable[[pb.ChainDelta, int], Reply]) -> Reply:
        """A call about a chain: what is new of it, or all where the server has lost it."""
        delta, num_blocks = connection.delta(chain, whole=False)
        try:
            reply = send(delta, num_blocks)
        except UnknownChain:
            delta, num_blocks = connection.delta(chain, whole=True)
            reply = send(delta, num_blocks)
        connection.heard(chain, num_blocks)
        return reply

    def stalled(self, connection: Connection, *, begun: bool) -> Exception:
        """Note replies that did not come in time: the first, or one after others, which says less of the server."""
        self._stats.add("client.failures.stalled")
        if not begun:
            self._rest(connection, f"no answer within {self.options.call_deadline_s:g} s")
        return Down()

    def watch(self, stall: Callable[[], None], within_s: float) -> int:
        """Call `stall` unless `progressed` or `unwatch` is called in time."""
        number = next(self._stream_numbers)
        with self._lock:
            self._streams[number] = (time.monotonic() + within_s, stall)
            self._wake.notify()
        return number

    def progressed(self, number: int, within_s: float) -> None:
        watched = self._streams.get(number)
        if watched is not None:
            self._streams[number] = (time.monotonic() + within_s, watched[1])

    def unwatch(self, number: int) -> None:
        self._streams.pop(number, None)

    # -- models ------------------------------------------------------------------------------------------------

    def open_model(self, model: ModelId) -> BlockLayout:
        """Agree on a model, now if the link is up and again whenever it comes back. Raises ConfigError."""
        layout = layout_of(model)
        with self._lock:  # first: a connection that comes up meanwhile finds it here
            is_new = model not in self._models
            if is_new:
                self._models.append(model)
        try:
            self._agree(self.up(), layout)
        except Down:
            pass
        except BaseException:
            if is_new:
                with self._lock:
                    self._models.remove(model)
            raise
        return layout

    def _agree(self, connection: Connection, layout: BlockLayout) -> None:
        model = layout.model
        if model in connection.models:
            return
        request = pb.OpenModelRequest(session=connection.session, model=model_message(model), digest=model.digest())
        try:
            reply: pb.OpenModelReply = connection.stub.OpenModel(request, timeout=self.options.call_deadline_s)
        except grpc.RpcError as failure:
            raise self.failed(connection, failure) from None
        sizes = np.frombuffer(reply.part_bytes, "<u8").tolist()
        mine = [part.num_bytes for part in layout.parts]
        if sizes != mine:
            raise ProtocolError(f"parts of {model.model!r} have {mine} bytes here, {sizes} at the server")
        connection.models[model] = reply.model

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            with self._lock:
                patience_s = self._patience_s(backoff_s)
                self._drowsy = patience_s is None
                if not self._closing and not (self._drowsy and self._has_done()):
                    self._wake.wait(patience_s)
                self._drowsy = False
                if self._closing:
                    return
            try:
                self._stall_late()  # up or not: who waits for a reply of a server that rests is told as well
                if self._connection is not None:
                    backoff_s = _FIRST_BACKOFF_S
                    self._tend(self._connection)
                elif self._try_again():
                    continue
                else:
                    backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            except Exception:  # a thread's top: the next round may do better
                log.exception("keeping the link to %s failed", self.options.address)

    def _has_done(self) -> bool:
        return self._connection is not None and bool(self._connection.done)

    def _patience_s(self, backoff_s: float) -> float | None:
        if self._connection is None:
            return backoff_s * random.uniform(0.5, 1.0)
        if self._num_quiet < _QUIET_TICKS:
            return _TICK_S
        return _WATCH_S if self._streams else None

    def _stall_late(self) -> None:
        now_s = time.monotonic()
        for number, (deadline_s, stall) in list(self._streams.items()):
            if deadline_s <= now_s:
                self.unwatch(number)
                stall()

    def _tend(self, connection: Connection) -> None:
        if not connection.done:
            self._num_quiet += 1
            self._waits = False
        elif not self._waits:
            self._num_quiet = 0
            self._waits = True  # most often a call comes by that takes it along
        else:
            self._waits = False
            self._say(connection)

    def _say(self, connection: Connection) -> None:
        try:
            self.call(connection, connection.stub.Release, pb.ReleaseRequest(session=connection.session))
        except (Down, KVStoreError):
            pass

    def _try_again(self) -> bool:
        """One try at getting up again."""
        resting = self._resting
        if resting is not None and resting.draining:
            # It takes nothing new; what was begun with it ends in order. Its session stream says when it stops.
            if resting.done:
                self._say(resting)
            return False
        if resting is not None:
            try:
                resting.stub.Release(pb.ReleaseRequest(session=resting.session), timeout=self.options.call_deadline_s)
            except grpc.RpcError as failure:
                if not self._still_rests(failure):
                    self._lose(resting, str(error_of(failure)))
                return False
            try:
                known = self._open_models(resting)
                with self._lock:
                    if self._resting is not resting:  # it ended as it answered: nobody would notice that again
                        return False
                    self._resting, self._connection = None, resting
                self._open_models(resting, known)
            except ServiceUnavailable:
                return False
            self._say_up("answers again")
            return True
        broken = self._broken
        if broken is not None and not self._dismantle(broken):
            return False
        try:
            # Where somebody has views yet, its slots stay out: the server takes a session before for one that is done.
            self._connect(broken if broken is None or broken.plane.close() else None)
        except ServiceUnavailable:
            return False
        except KVStoreError as error:
            if str(error) != str(self._refusal):
                self._refusal = error
                log.warning("the server at %s refuses this client: %s", self.options.address, error)
            return False
        self._say_up("is back")
        return True

    def _still_rests(self, failure: grpc.RpcError) -> bool:
        error = error_of(failure)
        code = failure.code()
        return isinstance(error, ServiceUnavailable) and (
            not is_transport(failure) or code is grpc.StatusCode.DEADLINE_EXCEEDED
        )

    # -- up and down -------------------------------------------------------------------------------------------

    def _connect(self, before: Connection | None) -> None:
        """A new connection. Raises ServiceUnavailable, or what the server refuses."""
        options = self.options
        connection = open_session(options, self._make_plane(options.call_deadline_s), before)
        in_place = False
        try:
            known = self._open_models(connection)
            with self._lock:
                self._connection, self._resting, self._broken, self._refusal = connection, None, None, None
                in_place = True
            # In place by now: a stream that ends at once must find the connection that it is the end of.
            connection.begin_beats(self._take_saved, lambda: self._lose(connection, "its session stream ended"))
        except BaseException:
            with self._lock:
                if self._connection is connection:
                    self._connection = None
            if not in_place:  # or somebody may be writing by it
                connection.leave(options.call_deadline_s)
            connection.plane.close()
            connection.channel.close()
            raise
        with contextlib.suppress(ServiceUnavailable):  # then it rests, or is lost, as after any call
            self._open_models(connection, known)  # who opened more meanwhile found no connection to ask

    def _open_models(self, connection: Connection, known: Sequence[ModelId] = ()) -> list[ModelId]:
        """Agree on all models that were opened but those `known`; returns all. Raises ServiceUnavailable."""
        with self._lock:
            models = list(self._models)
        for model in models:
            if model not in known:
                self._reopen(connection, model)
        return models

    def _reopen(self, connection: Connection, model: ModelId) -> None:
        try:
            self._agree(connection, layout_of(model))
        except Down:
            raise ServiceUnavailable("the server went away again") from None
        except KVStoreError as error:
            log.warning("model %r was open and is refused now: %s", model.model, error)

    def _rest(self, connection: Connection, reason: str) -> None:
        with self._lock:
            if self._connection is not connection:
                return
            self._connection, self._resting = None, connection
            self._wake.notify()
        self._say_down(reason)

    def _lose(self, connection: Connection, reason: str) -> None:
        with self._lock:
            if connection.lost.is_set():
                return
            connection.lost.set()
            if self._connection is not connection and self._resting is not connection:
                return
            self._connection, self._resting, self._broken = None, None, connection
            streams, self._streams = self._streams, {}
            self._wake.notify()
        for _, stall in streams.values():
            stall()
        if not self._closing:
            self._say_down(reason)

    def _dismantle(self, connection: Connection) -> bool:
        """Give up what a lost connection had: its channel, then its mapping. False while views are out."""
        connection.channel.close()
        if connection.plane.close():
            self._unmap_from_s = 0.0
            return True
        now_s = time.monotonic()
        self._unmap_from_s = self._unmap_from_s or now_s
        if now_s - self._unmap_from_s < _UNMAP_S:
            return False
        log.warning("views of the old server's memory are still in use: it stays mapped until they go")
        self._unmap_from_s = 0.0
        return True

    def _say_down(self, reason: str) -> None:
        if not self._said_down:
            self._said_down = True
            log.warning(
                "the server at %s is away, everything is a miss until it is back: %s", self.options.address, reason
            )

    def _say_up(self, what: str) -> None:
        if self._said_down:
            self._said_down = False
            log.info("the server at %s %s", self.options.address, what)

    def close(self) -> None:
        """Say what is done with, leave, unmap. Idempotent; does nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()  # it may bring up another connection yet
        with self._lock:
            connection = self._connection or self._resting or self._broken
            up = self._connection is not None
            self._connection = self._resting = None
        if connection is None:
            return
        if up:
            connection.leave(self.options.call_deadline_s)
        connection.lost.set()
        connection.channel.close()
        connection.plane.close()
