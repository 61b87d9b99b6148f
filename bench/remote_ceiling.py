# SPDX-License-Identifier: Apache-2.0
"""What bare gRPC reaches over a Unix socket: a stream of ready messages of 1 MiB, and a call that echoes 100 bytes.

No protobuf and no checksum: both sides pass bytes as they are, with the sidecar's channel options.

    python -m bench.remote_ceiling SOCKET NUM_MESSAGES        serves until its standard input ends
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from kvstore.service.handlers import SEND_AHEAD

MESSAGE_BYTES = 1 << 20
_SERVICE = "bench.Bare"
_LIMITS = (("grpc.max_send_message_length", 8 << 20), ("grpc.max_receive_message_length", 8 << 20))
_OPTIONS = (*_LIMITS, *SEND_AHEAD)


class Bare:
    """A client of the bare server."""

    def __init__(self, channel: grpc.Channel, num_messages: int) -> None:
        self._stream: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
            f"/{_SERVICE}/Stream", None, None
        )
        self._echo: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{_SERVICE}/Echo", None, None)
        self._num_messages = num_messages

    def receive_s(self, place: memoryview | None = None) -> float:
        """Seconds to receive every message once, and to put it in its `place`, where there is one."""
        at = 0
        began_s = time.perf_counter()
        for message in self._stream(b"go"):
            if place is not None:
                place[at : at + len(message)] = message
            at += len(message)
        seconds = time.perf_counter() - began_s
        if at != self._num_messages * MESSAGE_BYTES:
            raise RuntimeError(f"{at} bytes came of {self._num_messages} messages of {MESSAGE_BYTES}")
        return seconds

    def call_s(self) -> float:
        """Seconds of one small call, with a deadline as the sidecar's have."""
        began_s = time.perf_counter()
        self._echo(bytes(100), timeout=10)
        return time.perf_counter() - began_s


@contextlib.contextmanager
def bare_server(num_messages: int) -> Iterator[Bare]:
    """A server in a process of its own, and a client of it."""
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as folder:
        address = f"unix:{folder}/bare"
        command = [sys.executable, "-m", "bench.remote_ceiling", address, str(num_messages)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError("the bare server did not start")
            # Its own thread polls, or the caller's: whichever is faster here is the ceiling, as for the sidecar.
            options = (*_OPTIONS, ("SingleThreadedUnaryStream", 1))
            with grpc.insecure_channel(address, options=options) as channel:
                yield Bare(channel, num_messages)
            process.stdin.close()


def _serve(address: str, num_messages: int) -> None:
    rng = np.random.default_rng(0)
    # One object a message, as a store's blocks are: a single one would stay in the cache.
    messages = [rng.bytes(MESSAGE_BYTES) for _ in range(num_messages)]
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(
        lambda request, context: iter(messages), None, None
    )
    server = grpc.server(ThreadPoolExecutor(4), options=_OPTIONS)
    echo: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
        lambda request, context: request, None, None
    )
    handlers = {"Stream": handler, "Echo": echo}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    server.add_insecure_port(address)
    server.start()
    print("ready", flush=True)
    sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
