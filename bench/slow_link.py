# SPDX-License-Identifier: Apache-2.0
"""A proxy before a Redis server over which replies come, and commands go if asked, no faster than a link carries.

In a process of its own: in the engine's its threads would take the interpreter from what is measured.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import tempfile
import threading
import time
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 256 << 10
_AHEAD_S = 0.002
"""What a link that stood still may send at once."""
_START_S = 60.0
_spawn = multiprocessing.get_context("spawn")


class SlowLink:
    """Listens on a Unix socket of its own, passes on to another. A context manager.

    Commands pass unhindered, unless `both_ways`: then they have as much again for themselves. `each`: every connection
    has so much for itself, as where a network limits single flows.
    """

    def __init__(self, target: str, *, both_ways: bool = False, each: bool = False) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kvstore-link-")
        path = str(Path(self._directory.name) / "s")
        self.url = f"unix://{path}"
        self._speed = _spawn.Value("d", 0.0)
        listening = _spawn.Event()
        self._process = _spawn.Process(
            target=_serve, args=(path, target, self._speed, listening, both_ways, each), daemon=True
        )
        self._process.start()
        if not listening.wait(_START_S):
            raise RuntimeError("the proxy did not start")

    @property
    def bytes_per_s(self) -> float:
        """Of all connections together, or of each; 0 is as fast as the proxy goes. May be changed at any time."""
        return float(self._speed.value)

    @bytes_per_s.setter
    def bytes_per_s(self, value: float) -> None:
        self._speed.value = value

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# -- the proxy's process ---------------------------------------------------------------------------------------


class _Link:
    """What connections share, or one has."""

    def __init__(self, speed: Synchronized[float]) -> None:
        self._speed = speed
        self._lock = threading.Lock()
        self._free_s = 0.0

    def wait(self, num_bytes: int) -> None:
        """Until these bytes would have arrived."""
        speed = float(self._speed.value)
        if speed <= 0:
            return
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic() - _AHEAD_S) + num_bytes / speed
            due_s = self._free_s
        time.sleep(max(0.0, due_s - time.monotonic()))


def _serve(path: str, target: str, speed: Synchronized[float], listening: Event, both_ways: bool, each: bool) -> None:
    link = _Link(speed)
    way_there = _Link(speed) if both_ways else None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        listening.set()
        while True:
            near, _ = listener.accept()
            far = socket.socket(socket.AF_UNIX)
            far.connect(target)
            threading.Thread(target=_pass, args=(near, far, way_there), daemon=True).start()
            back = _Link(speed) if each else link
            threading.Thread(target=_pass, args=(far, near, back), daemon=True).start()


def _pass(source: socket.socket, sink: socket.socket, link: _Link | None) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with contextlib.suppress(OSError):
        while size := source.recv_into(buffer):
            if link is not None:
                link.wait(size)
            sink.sendall(buffer[:size])
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
