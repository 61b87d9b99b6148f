# SPDX-License-Identifier: Apache-2.0
"""What a bare socket reaches: GET and SET of whole values in RESP, no frame, no checksum, no bookkeeping.

As fast as I could make them: pipelined, blocking sockets, each value received in one call into memory of its own
that was touched before, sent from where it lies. As many connections as asked for, a thread each.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

_AHEAD_BYTES = 4 << 20
"""Asked for beyond the value being received: what hides a round trip. All at once is slower."""
_MAX_AHEAD = 64
_GROUP_BYTES = 1 << 20


def connect(url: str) -> socket.socket:
    """A blocking socket to the server of a unix:// or redis:// URL."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(parts.path)
    else:
        connection = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _fill(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        received = connection.recv_into(view, 0, socket.MSG_WAITALL)
        if not received:
            raise ConnectionError("the server closed the connection")
        view = view[received:]


def _send(connection: socket.socket, buffers: list[bytes | memoryview]) -> None:
    while buffers:
        sent = connection.sendmsg(buffers)
        while buffers and sent >= len(buffers[0]):
            sent -= len(buffers.pop(0))
        if sent:
            buffers[0] = memoryview(buffers[0])[sent:]


def _gets(keys: Sequence[bytes]) -> bytes:
    return b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys)


def _set_some(connection: socket.socket, keys: Sequence[bytes], values: Sequence[memoryview]) -> None:
    per_send = max(1, min(_MAX_AHEAD, _GROUP_BYTES // len(values[0])))
    for at in range(0, len(keys), per_send):
        buffers: list[bytes | memoryview] = []
        for key, value in zip(keys[at : at + per_send], values[at : at + per_send], strict=True):
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
            buffers += (head, value, b"\r\n")
        _send(connection, buffers)
    replies = memoryview(bytearray(5 * len(keys)))
    _fill(connection, replies)
    if bytes(replies) != b"+OK\r\n" * len(keys):
        raise ConnectionError("a SET was refused")


def _get_some(connection: socket.socket, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> None:
    """Each buffer takes a value, and then the length line of the next: two receives a value would be one more."""
    size = len(buffers[0])
    line = b"$%d\r\n" % size
    ahead = max(2, min(_MAX_AHEAD, _AHEAD_BYTES // size))
    connection.sendall(_gets(keys[:ahead]))
    head = memoryview(bytearray(len(line)))
    between = memoryview(bytearray(2 + len(line)))
    _fill(connection, head)
    asked = ahead
    for number, buffer in enumerate(buffers):
        if asked < len(keys) and asked - number <= max(1, ahead // 2):
            connection.sendall(_gets(keys[asked : number + 1 + ahead]))
            asked = number + 1 + ahead
        _fill(connection, buffer)
        last = number == len(buffers) - 1
        _fill(connection, between[:2] if last else between)
        if not last and between[2:] != line:
            raise ConnectionError("a GET was refused")


def _spread(url: str, count: int, connections: int, work: Callable[[socket.socket, slice], None]) -> float:
    """Seconds for `work` on each connection's share of `count` values, all at once."""
    sockets = [connect(url) for _ in range(connections)]
    try:
        slices = [slice(number, count, connections) for number in range(connections)]
        threads = [threading.Thread(target=work, args=pair) for pair in list(zip(sockets, slices, strict=True))[1:]]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        work(sockets[0], slices[0])
        for thread in threads:
            thread.join()
        return time.perf_counter() - began
    finally:
        for each in sockets:
            each.close()


def names(count: int) -> list[bytes]:
    return [b"raw:%06d" % number for number in range(count)]


def raw_set_s(url: str, values: Sequence[memoryview], connections: int = 1) -> float:
    """Seconds to SET every value."""
    keys = names(len(values))
    return _spread(url, len(values), connections, lambda sock, part: _set_some(sock, keys[part], values[part]))


def raw_get_s(url: str, buffers: Sequence[memoryview], connections: int = 1) -> float:
    """Seconds to GET every value that `raw_set_s` put there, each into its buffer of the same size."""
    keys = names(len(buffers))
    return _spread(url, len(buffers), connections, lambda sock, part: _get_some(sock, keys[part], buffers[part]))


def raw_remove(url: str, count: int) -> None:
    """Remove what `raw_set_s` put there."""
    keys = names(count)
    with connect(url) as connection:
        connection.sendall(b"*%d\r\n$6\r\nUNLINK\r\n" % (len(keys) + 1))
        connection.sendall(b"".join(b"$%d\r\n%b\r\n" % (len(key), key) for key in keys))
        connection.recv(64)
