# SPDX-License-Identifier: Apache-2.0
"""What a bare socket reaches: GET and SET of whole values in RESP, no frame, no checksum, no bookkeeping."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from urllib.parse import urlsplit


def _connect(url: str) -> socket.socket:
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
        received = connection.recv_into(view)
        if not received:
            raise ConnectionError("the server closed the connection")
        view = view[received:]


def _line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\r\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("the server closed the connection")
        line += byte
    return line[:-2]


def raw_set_s(url: str, values: Sequence[memoryview]) -> float:
    """Seconds to SET every value, one connection, replies read as they come."""
    with _connect(url) as connection:
        began = time.perf_counter()
        for number, value in enumerate(values):
            key = b"raw:%d" % number
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
            connection.sendall(head)
            connection.sendall(value)
            connection.sendall(b"\r\n")
            if _line(connection) != b"+OK":
                raise ConnectionError("SET was refused")
        return time.perf_counter() - began


def raw_get_s(url: str, values: Sequence[memoryview]) -> float:
    """Seconds to GET every value into memory touched before, one pipelined connection; then removes them."""
    size = len(values[0])
    # One buffer a value, as a store has: a single one would stay in the cache.
    buffers = [memoryview(bytearray(b"\x01" * (size + 2))) for _ in values]
    keys = [b"raw:%d" % number for number in range(len(values))]
    with _connect(url) as connection:
        began = time.perf_counter()
        connection.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys))
        for buffer in buffers:
            if _line(connection) != b"$%d" % size:
                raise ConnectionError("GET was refused")
            _fill(connection, buffer)
        seconds = time.perf_counter() - began
        connection.sendall(b"*%d\r\n$3\r\nDEL\r\n" % (len(keys) + 1))
        connection.sendall(b"".join(b"$%d\r\n%b\r\n" % (len(key), key) for key in keys))
        _line(connection)
    return seconds
