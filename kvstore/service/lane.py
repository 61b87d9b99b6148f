# SPDX-License-Identifier: Apache-2.0
"""The lane: a socket pair between a client that passed the door and the server, for calls too small for gRPC.

A unary call of gRPC wakes some six threads, one after the other; where a core sleeps between two calls that is over a
millisecond. On the lane the same messages wake one thread on each side. It is a short cut and nothing else: whatever
goes by it may go by gRPC as well, and does where the lane is busy or broken. A call that breaks it goes again by gRPC:
every call that takes a lane may come twice. The process then passes the door once more, and its session's next beat
carries the ticket: the new passage's lane takes the place of the broken one.

    request   frame bytes u32 · number u32 · deadline in ms u32 · method, 16 bytes · message
    reply     frame bytes u32 · number u32 · status u32 · message, or error class NUL text

Invariants
1. One call at a time. A client that gave one up takes no lane until its late reply has come, so a reply is the last
   request's; one that stopped within a frame never takes it again.
2. A lane serves sessions of the process it was given to, and of no other.
3. The server's thread waits for its client alone, and ends with it.
4. A process has one lane that is served, and at most one more, whose last call is finished.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import grpc

from kvstore.errors import KVStoreError, ProtocolError
from kvstore.service.handlers import messages_of
from kvstore.service.handshake import MAX_MESSAGE_BYTES
from kvstore.service.knock import limit
from kvstore.service.status import ERROR_KEY, code_of, name_of

log = logging.getLogger("kvstore.service.lane")

METHODS = (
    *("OpenModel", "Match", "MatchPartial", "Announce", "Release", "LoadHost", "Save", "Commit", "Join", "Touch"),
)
"""Calls that take a lane: those of a request's life."""

_REQUEST = struct.Struct("<III16s")
_REPLY = struct.Struct("<III")
_READ_BYTES = 1 << 16
_PATIENCE_S = 0.002
"""How long a call waits for the one before it: what gRPC would take longer."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class _Frames:
    """Reads frames off a stream socket: a length that includes itself, then the rest."""

    def __init__(self, end: socket.socket, before: Callable[[], None] = lambda: None) -> None:
        """`before` is called before each wait for bytes, and may raise."""
        self._end = end
        self._before = before
        self._kept = b""
        self._whole = bytearray()
        """A frame that did not come at once, and how much of it is there."""
        self._num_there = 0

    def next(self) -> bytes:
        """The next frame; b"" at the end of the stream.

        Raises what `recv` raises, and can then be asked again; ProtocolError for a frame that cannot be one.
        """
        if not self._whole:
            while len(self._kept) < 4:
                self._before()
                more = self._end.recv(_READ_BYTES)
                if not more:
                    return b""
                self._kept += more
            kept = self._kept
            size = _frame_bytes(kept)
            if len(kept) >= size:
                self._kept = kept[size:]
                return kept[:size]
            self._whole = bytearray(size)
            self._whole[: len(kept)] = kept
            self._num_there = len(kept)
            self._kept = b""
        return self._rest()

    def _rest(self) -> bytes:
        with memoryview(self._whole) as view:
            while self._num_there < len(view):
                self._before()
                num_bytes = self._end.recv_into(view[self._num_there :])
                if not num_bytes:
                    return b""
                self._num_there += num_bytes
        frame = bytes(self._whole)
        self._whole = bytearray()
        return frame


def _frame_bytes(begun: bytes) -> int:
    """Size of a frame that begins so. Raises ProtocolError."""
    size = int.from_bytes(begun[:4], "little")
    if not _REPLY.size <= size <= MAX_MESSAGE_BYTES + _REQUEST.size:
        raise ProtocolError(f"a frame of {size} bytes: {_REPLY.size} to {MAX_MESSAGE_BYTES} are possible")
    return size


# -- the server's side -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LaneCall:
    """What a method may ask about its call.

    Attributes:
        peer: the process whose lane it came by.
    """

    deadline_s: float | None
    peer: object

    def time_remaining(self) -> float | None:
        """As gRPC's: seconds until nobody waits for the answer; None where that was not said."""
        return self.deadline_s


class Method(Protocol):
    """Parses, answers and builds. Raises KVStoreError and nothing else."""

    def __call__(self, message: bytes, call: LaneCall) -> bytes: ...


class Lanes:
    """The server's ends, a thread each. Thread-safe."""

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self._methods = {name.encode().ljust(16, b"\0"): method for name, method in methods.items()}
        self._lock = threading.Lock()
        self._served: dict[socket.socket, tuple[object, threading.Thread]] = {}
        self._closed = False

    def begin(self, peer: object, end: socket.socket) -> bool:
        """Serve a client on its lane until it hangs up, or `finish`, or the next one begins; False where not."""
        thread = threading.Thread(target=self._run, args=(peer, end), name="kvstore-lane", daemon=True)
        with self._lock:
            before = self._ends_of(peer)
            if self._closed or len(before) > 1:
                end.close()
                return False
            try:
                thread.start()
            except RuntimeError as error:  # no more threads: its client goes by gRPC
                log.warning("a lane was not opened: %s", error)
                end.close()
                return False
            self._served[end] = (peer, thread)
            for other in before:
                _hang_up(other)
        return True

    def finish(self, peer: object) -> None:
        """Hang up on a client; a call under way is finished. Idempotent."""
        with self._lock:
            for end in self._ends_of(peer):
                _hang_up(end)

    def _ends_of(self, peer: object) -> list[socket.socket]:
        return [end for end, (whose, _) in self._served.items() if whose == peer]

    def __len__(self) -> int:
        return len(self._served)

    def close(self) -> None:
        """Hang up on everybody, and wait for calls under way."""
        with self._lock:
            self._closed = True
            threads = [thread for _, thread in self._served.values()]
            for end in self._served:
                _hang_up(end)
        for thread in threads:
            thread.join()

    def _run(self, peer: object, end: socket.socket) -> None:
        frames = _Frames(end)
        try:
            while frame := frames.next():
                end.sendall(self._answer(peer, frame))
        except OSError:  # it hung up, or did not read
            pass
        except ProtocolError as error:
            log.warning("a client does not keep to the lane: %s", error)
        except Exception:  # a thread's top
            log.exception("a lane failed")
        finally:
            with self._lock:
                del self._served[end]
                end.close()

    def _answer(self, peer: object, frame: bytes) -> bytes:
        if len(frame) < _REQUEST.size:
            raise ProtocolError(f"a request of {len(frame)} bytes: its head has {_REQUEST.size}")
        _, number, deadline_ms, name = _REQUEST.unpack_from(frame)
        method = self._methods.get(name)
        status = 0
        try:
            if method is None:
                raise ProtocolError(f"no method {name!r} here: {', '.join(METHODS)} take a lane")
            body = method(frame[_REQUEST.size :], LaneCall(deadline_ms / 1000 if deadline_ms else None, peer))
        except KVStoreError as error:
            status = code_of(error).value[0]
            body = f"{name_of(error)}\0{error}".encode()
        return _REPLY.pack(_REPLY.size + len(body), number, status) + body


def _hang_up(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other side has
        pass


# -- the client's side -------------------------------------------------------------------------------------------


class LaneError(grpc.RpcError):
    """A failed call, as gRPC would have failed it."""

    def __init__(self, code: grpc.StatusCode, details: str, kind: str = "") -> None:
        super().__init__(details)
        self._code = code
        self._details = details
        self._kind = kind

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return ((ERROR_KEY, self._kind),) if self._kind else ()


class LaneBroken(LaneError):
    """Nothing more comes by this lane, and nobody knows whether the server has heard the call."""

    def __init__(self, details: str) -> None:
        super().__init__(grpc.StatusCode.UNAVAILABLE, details)


class Lane:
    """The client's end, and after it broke the next one. Thread-safe. Not for a forked child."""

    def __init__(self, end: socket.socket, pass_door: Callable[[], tuple[socket.socket, bytes]] | None = None) -> None:
        """`pass_door` gives another end and its ticket. It raises KVStoreError or OSError where none is to be had."""
        self._pass_door = pass_door
        self._lock = threading.Lock()
        self._number = 0
        self._until_s = 0.0
        self._closed = False
        self._aside: socket.socket | None = None
        """An end that the server is being asked to serve."""
        self._take_up(end)

    def _take_up(self, end: socket.socket) -> None:
        end.setblocking(True)
        self._end = end
        self._frames = _Frames(end, self._limit)
        self._limit_s = 0.0
        self._late = False
        """Whether a call was given up whose reply is still to come."""
        self._broken = False

    def ask_anew(self) -> bytes:
        """Where the lane broke, pass the door; the ticket for the server, or b"". For one thread at a time."""
        if self._pass_door is None or self._closed or not self._broken:
            return b""
        try:
            end, ticket = self._pass_door()
        except (KVStoreError, OSError) as error:  # the next beat asks again; until then calls go by gRPC
            log.info("no new lane in place of a broken one: %s", error)
            return b""
        with self._lock:
            self._aside = end
        return ticket

    def begin_anew(self, served: bool) -> None:
        """The server's answer to the ticket: whether it serves the new end."""
        with self._lock:
            end, self._aside = self._aside, None
            if end is None:
                return
            if not served or self._closed:
                end.close()
                return
            self._end.close()
            self._take_up(end)

    def take(self) -> bool:
        """Whether the lane is the caller's for one `call`, which gives it back."""
        if self._broken or not self._lock.acquire(timeout=_PATIENCE_S):
            return False
        if not self._closed and self._usable():
            return True
        self._lock.release()
        return False

    def _usable(self) -> bool:
        """Whether the next reply is the next call's; takes in the late one if it is there. The lock is held."""
        if self._broken or not self._late:
            return not self._broken
        self._until_s = time.monotonic() + _PATIENCE_S
        try:
            if not self._frames.next():
                self._broken = True
            self._late = False
        except BlockingIOError:
            return False
        except (OSError, ProtocolError):
            self._broken = True
        return not self._broken

    def call(self, method: bytes, message: bytes, timeout_s: float) -> bytes:
        """One call by a lane that was taken. Raises LaneError."""
        try:
            self._until_s = time.monotonic() + timeout_s
            self._number = number = (self._number + 1) & 0xFFFFFFFF
            self._send(_REQUEST.pack(_REQUEST.size + len(message), number, int(timeout_s * 1000), method), message)
            return self._reply(number)
        except LaneError:
            raise
        except BaseException:  # an interrupt, which may have come within a frame
            self._broken = True
            raise
        finally:
            self._lock.release()

    def _limit(self) -> None:
        """Let the kernel end the next wait at the call's deadline, or up to 10 ms later: most waits set nothing."""
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise BlockingIOError
        if not left_s <= self._limit_s <= left_s + 0.01:
            limit(self._end, socket.SO_RCVTIMEO, left_s)
            limit(self._end, socket.SO_SNDTIMEO, left_s)
            self._limit_s = left_s

    def _send(self, head: bytes, message: bytes) -> None:
        rest = memoryview(head + message)
        try:
            while rest:
                self._limit()
                rest = rest[self._end.send(rest) :]
        except OSError as error:
            self._broken = True  # perhaps within a frame
            self._fail(error)

    def _reply(self, number: int) -> bytes:
        try:
            frame = self._frames.next()
        except BlockingIOError as error:
            self._late = True
            self._fail(error)
        except (OSError, ProtocolError) as error:
            self._fail(error)
        if not frame:
            self._broken = True
            raise LaneBroken("the server hung up")
        _, answered, status = _REPLY.unpack_from(frame)
        if answered != number:
            self._fail(ProtocolError(f"a reply to call {answered} came to call {number}"))
        if status:
            kind, _, details = frame[_REPLY.size :].decode(errors="replace").partition("\0")
            raise LaneError(_CODES.get(status, grpc.StatusCode.UNKNOWN), details, kind)
        return frame[_REPLY.size :]

    def _fail(self, error: OSError | ProtocolError) -> NoReturn:
        if isinstance(error, BlockingIOError):
            raise LaneError(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time") from None
        self._broken = True
        raise LaneBroken(str(error)) from None

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._closed = self._broken = True
        _hang_up(self._end)
        with self._lock:
            self._end.close()
            if self._aside is not None:
                self._aside.close()


class LaneStub:
    """A stub whose unary calls take the lane where they can; everything else goes by `stub`."""

    def __init__(self, stub: Any, lane: Lane) -> None:
        self._stub = stub
        for name in METHODS:
            setattr(self, name, _Unary(lane, name, getattr(stub, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stub, name)


class _Unary:
    __slots__ = ("_lane", "_method", "_parse", "_slow")

    def __init__(self, lane: Lane, name: str, slow: Callable[..., Any]) -> None:
        self._lane = lane
        self._method = name.encode().ljust(16, b"\0")
        self._parse = messages_of(name)[1].FromString
        self._slow = slow

    def __call__(self, request: Any, timeout: float) -> Any:
        message = request.SerializeToString()
        if len(message) > MAX_MESSAGE_BYTES or not self._lane.take():
            return self._slow(request, timeout=timeout)
        until_s = time.monotonic() + timeout
        try:
            reply = self._lane.call(self._method, message, timeout)
        except LaneBroken:
            return self._slow(request, timeout=max(0.0, until_s - time.monotonic()))
        return self._parse(reply)
