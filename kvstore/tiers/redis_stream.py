# SPDX-License-Identifier: Apache-2.0
"""Sockets in blocking mode, under a deadline: plain ones, whose time-outs the kernel keeps, and TLS.

redis-py makes the connection (URL, TLS, ACL, database); then its socket is ours.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Protocol

from kvstore.native import Received, Receiving, Run, receive

Buffer = bytes | bytearray | memoryview


class Stream(Protocol):
    """Blocking socket I/O under a deadline. Raises TimeoutError once it has passed."""

    def send(self, buffers: list[Buffer], deadline: float, meanwhile: Callable[[], bool] | None = None) -> int:
        """Send some of `buffers`; while the other side is not ready, `meanwhile` may be called, see `Wire.send`."""

    def recv(self, view: memoryview, deadline: float, *, fill: bool) -> int: ...

    def begin_run(self, run: Run, deadline: float) -> Receiving | None:
        """As `native.receive`; None where this stream cannot. Nothing else is received until `end_run`."""

    def end_run(self, receiving: Receiving) -> Received: ...

    def silent(self) -> bool:
        """Open, and nothing waits to be read."""

    def has_come(self) -> bool:
        """Open, and something waits to be read."""

    def close(self) -> None: ...

    def shut_down(self) -> None:
        """End the stream under whoever is reading from it."""


def _remaining_s(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("the deadline passed")
    return remaining


def _await(poller: select.poll, deadline: float) -> None:
    """Until the socket is ready, or has failed, which the next call on it says."""
    if not poller.poll(1e3 * _remaining_s(deadline)):
        raise TimeoutError("the deadline passed")


class PlainStream:
    """A socket in blocking mode whose time-outs the kernel keeps.

    Python's own time-outs make the socket non-blocking, and such a socket hands out what little lies in its buffer;
    this one fills megabytes in one call (MSG_WAITALL). That a call can begin is waited for by a poll: after a signal
    Python begins one that has moved nothing anew, with all its time, and one that has moved something returns.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock.fileno(), select.POLLIN)
        self._writable.register(sock.fileno(), select.POLLOUT)
        self._armed_s = {socket.SO_SNDTIMEO: 0.0, socket.SO_RCVTIMEO: 0.0}
        sock.setblocking(True)

    def _limit(self, option: int, deadline: float) -> None:
        """Have the kernel end a call by the deadline, or somewhat before: then there is another try."""
        remaining_s = _remaining_s(deadline)
        if 0.8 * remaining_s <= self._armed_s[option] <= 0.88 * remaining_s:
            return  # near enough: spares a system call for most values
        # Its timers fire late by up to an eighth: 32 ms in 250.
        self._armed_s[option] = 0.88 * remaining_s
        seconds, fraction = divmod(self._armed_s[option], 1.0)
        # A zero would mean "for ever".
        packed = struct.pack("@ll", int(seconds), max(1, int(fraction * 1e6)))
        self._sock.setsockopt(socket.SOL_SOCKET, option, packed)

    def send(self, buffers: list[Buffer], deadline: float, meanwhile: Callable[[], bool] | None = None) -> int:
        _remaining_s(deadline)
        try:  # before it is waited for: it counts as writable only once a good part of its buffer is free
            return self._sock.sendmsg(buffers, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            if meanwhile is not None and meanwhile():
                return 0
        while True:
            _await(self._writable, deadline)
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                return self._sock.sendmsg(buffers)
            except BlockingIOError:
                continue

    def recv(self, view: memoryview, deadline: float, *, fill: bool) -> int:
        while True:
            _await(self._readable, deadline)
            if fill:
                self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                return self._sock.recv_into(view, 0, socket.MSG_WAITALL if fill else socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue

    def begin_run(self, run: Run, deadline: float) -> Receiving | None:
        return receive(run, self._sock.fileno(), deadline, self._armed_s[socket.SO_RCVTIMEO])

    def end_run(self, receiving: Receiving) -> Received:
        got = receiving.close()
        self._armed_s[socket.SO_RCVTIMEO] = got.armed_s
        return got

    def silent(self) -> bool:
        return not _state(self._sock)

    def has_come(self) -> bool:
        return _state(self._sock) == select.POLLIN

    def close(self) -> None:
        self._sock.close()

    def shut_down(self) -> None:
        _shut_down(self._sock)


class TlsStream:
    """A TLS socket: no scatter I/O, no flags; OpenSSL copies anyway."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock

    def send(self, buffers: list[Buffer], deadline: float, meanwhile: Callable[[], bool] | None = None) -> int:
        self._sock.settimeout(_remaining_s(deadline))
        self._sock.sendall(buffers[0])
        return len(buffers[0])

    def recv(self, view: memoryview, deadline: float, *, fill: bool) -> int:
        self._sock.settimeout(_remaining_s(deadline))
        return self._sock.recv_into(view)

    def begin_run(self, run: Run, deadline: float) -> Receiving | None:
        return None

    def end_run(self, receiving: Receiving) -> Received:
        return receiving.close()

    def silent(self) -> bool:
        return self._sock.pending() == 0 and not _state(self._sock)

    def has_come(self) -> bool:
        return self._sock.pending() > 0 or _state(self._sock) == select.POLLIN

    def close(self) -> None:
        self._sock.close()

    def shut_down(self) -> None:
        _shut_down(self._sock)


def _state(sock: socket.socket) -> int:
    """What waits on the descriptor itself: bytes (POLLIN), an end or an error (other bits too), or nothing (0)."""
    poller = select.poll()
    poller.register(sock.fileno(), select.POLLIN | select.POLLRDHUP)
    found = poller.poll(0)
    return found[0][1] if found else 0


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side may have been first
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def stream_over(sock: socket.socket) -> Stream:
    """The fastest stream for this kind of socket."""
    return TlsStream(sock) if isinstance(sock, ssl.SSLSocket) else PlainStream(sock)
