# SPDX-License-Identifier: Apache-2.0
"""A proxy before a Redis server that spoils one reply when told to: what networks and servers do on bad days.

It reads the server's stream reply by reply. A fault is armed for the n-th reply from now, over all connections, and
strikes once; `struck` says whether it did. Delays of every reply are a setting of their own.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ERRORS = {
    "wrong type": b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
    "oom": b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    "loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "readonly": b"-READONLY You can't write against a read only replica.\r\n",
    "moved": b"-MOVED 3999 127.0.0.1:1\r\n",
}
KINDS = ("delay", "drop", "cut", "truncate", "short", "flip", "reorder", "nil", *ERRORS)
"""Faults of replies."""


@dataclass(slots=True)
class Fault:
    kind: str
    after_replies: int
    seed: int
    delay_s: float = 0.0


class FaultProxy:
    """Listens on a Unix socket of its own, or a loopback port, and passes on to a Unix socket. A context manager."""

    def __init__(self, target: str, *, tcp: bool = False) -> None:
        self.target = target
        """Of connections to come; may be changed at any time."""
        self._directory = tempfile.TemporaryDirectory(prefix="kvstore-proxy-")
        path = Path(self._directory.name) / "s"
        self._tcp = tcp
        self._listener = socket.create_server(("127.0.0.1", 0)) if tcp else socket.socket(socket.AF_UNIX)
        if not tcp:
            self._listener.bind(str(path))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0" if tcp else f"unix://{path}"
        self.delay_s = 0.0
        """Before every reply."""
        self._lock = threading.Lock()
        self._armed: Fault | None = None
        self.struck = False
        self._sessions: dict[threading.Thread, tuple[socket.socket, socket.socket]] = {}
        self._listener.listen(64)
        self._closed = threading.Event()
        self._accepter = threading.Thread(target=self._accept, daemon=True)
        self._accepter.start()

    def arm(self, fault: Fault | None) -> None:
        """Let `fault` strike once; None takes back what has not struck yet."""
        with self._lock:
            self._armed = fault
            self.struck = False

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._tcp:
                near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(self.target)
            except OSError:
                near.close()
                far.close()
                continue
            thread = threading.Thread(target=self._serve, args=(near, far), daemon=True)
            with self._lock:
                self._sessions[thread] = (near, far)
            thread.start()

    def _serve(self, near: socket.socket, far: socket.socket) -> None:
        requests = threading.Thread(target=self._pass_requests, args=(near, far), daemon=True)
        requests.start()
        self._pass_replies(near, far)
        _hang_up(near, far)
        requests.join()
        near.close()
        far.close()
        with self._lock:
            self._sessions.pop(threading.current_thread(), None)

    def _pass_requests(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 18):
                far.sendall(data)
        _hang_up(near, far)

    def _pass_replies(self, near: socket.socket, far: socket.socket) -> None:
        buffered = b""
        held: bytes | None = None
        with contextlib.suppress(OSError):
            while data := far.recv(1 << 18):
                buffered += data
                out: list[bytes] = []
                while (length := reply_length(buffered, 0)) is not None:
                    reply, buffered = buffered[:length], buffered[length:]
                    fault = self._due()
                    if held is not None:
                        out += [reply, held]
                        held = None
                    elif fault is None:
                        out.append(reply)
                    elif fault.kind == "reorder":
                        held = reply
                    elif fault.kind == "drop":
                        near.sendall(b"".join(out))
                        while far.recv(1 << 18):  # the line is open and silent until the client hangs up
                            pass
                        return
                    elif fault.kind == "cut":
                        near.sendall(b"".join(out) + reply[: random.Random(fault.seed).randrange(len(reply))])
                        break
                    else:
                        if fault.kind == "delay":
                            time.sleep(fault.delay_s)
                        out.append(spoiled(reply, fault))
                else:
                    if self.delay_s:
                        time.sleep(self.delay_s)
                    near.sendall(b"".join(out))
                    continue
                break

    def _due(self) -> Fault | None:
        with self._lock:
            fault = self._armed
            if fault is None:
                return None
            fault.after_replies -= 1
            if fault.after_replies >= 0:
                return None
            self._armed = None
            self.struck = True
            return fault

    def close(self) -> None:
        self._closed.set()
        _hang_up(self._listener)
        self._accepter.join()
        self._listener.close()
        with self._lock:
            sessions = dict(self._sessions)
        for thread, sockets in sessions.items():
            _hang_up(*sockets)
            thread.join()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SlowProxy:
    """A `FaultProxy` in a process of its own, which delays and does nothing else. A context manager.

    In the process that is measured its threads would take the interpreter from what is measured, reply by reply.
    """

    def __init__(self, target: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = self._heard()

    def delay(self, seconds: float) -> None:
        """Before every reply from now on."""
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)
        self._heard()

    def _heard(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the proxy's process ended")
        return line.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # its input ends, and so it does


def _serve_delays(target: str) -> None:
    """What the process of a `SlowProxy` does: says its address, then takes delays until there are no more."""
    with FaultProxy(target) as proxy:
        print(proxy.url, flush=True)
        for line in sys.stdin:
            proxy.delay_s = float(line)
            print("so it is", flush=True)


def _hang_up(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def reply_length(data: bytes, at: int) -> int | None:
    """End of the RESP reply that begins at `at`; None where it is not whole."""
    end = data.find(b"\r\n", at)
    if end < 0:
        return None
    kind, end = data[at : at + 1], end + 2
    if kind == b"$":
        size = int(data[at + 1 : end - 2])
        end += size + 2 if size >= 0 else 0
        return end if len(data) >= end else None
    if kind == b"*":
        for _ in range(max(0, int(data[at + 1 : end - 2]))):
            following = reply_length(data, end)
            if following is None:
                return None
            end = following
    return end


def spoiled(reply: bytes, fault: Fault) -> bytes:
    """`reply` as the fault leaves it."""
    rng = random.Random(fault.seed)
    if fault.kind in ERRORS:
        return ERRORS[fault.kind]
    if fault.kind == "nil":
        return b"$-1\r\n"
    if fault.kind == "flip":
        broken = bytearray(reply)
        for _ in range(rng.choice((1, 1, 2, 8))):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        return bytes(broken)
    if fault.kind == "truncate":  # bytes are lost within: all that follows is out of step
        start = rng.randrange(len(reply))
        return reply[:start] + reply[start + 1 + rng.randrange(64) :]
    if fault.kind == "short" and reply[:1] == b"$":  # a value that was written shorter: in step, and wrong
        body = reply[reply.find(b"\r\n") + 2 : -2]
        body = body[: rng.randrange(max(1, len(body)))]
        return b"$%d\r\n%b\r\n" % (len(body), body)
    return reply


if __name__ == "__main__":
    _serve_delays(sys.argv[1])
