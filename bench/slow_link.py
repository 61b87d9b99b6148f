# SPDX-License-Identifier: Apache-2.0
"""A proxy before a Redis server over which replies come no faster than a link would carry them."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 256 << 10
_AHEAD_S = 0.002
"""What a link that stood still may send at once."""


class SlowLink:
    """Listens on a Unix socket of its own, passes on to another. Commands pass unhindered. A context manager.

    All connections share one link; `bytes_per_s` may be changed at any time, 0 is as fast as the proxy goes.
    """

    def __init__(self, target: str) -> None:
        self.bytes_per_s = 0.0
        self._target = target
        self._directory = tempfile.TemporaryDirectory(prefix="kvstore-link-")
        path = Path(self._directory.name) / "s"
        self.url = f"unix://{path}"
        self._lock = threading.Lock()
        self._free_s = 0.0
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            with self._lock:
                self._sockets += (near, far)
            threading.Thread(target=self._pass, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, limited: bool) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        with contextlib.suppress(OSError):
            while size := source.recv_into(buffer):
                if limited:
                    self._wait(size)
                sink.sendall(buffer[:size])
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _wait(self, num_bytes: int) -> None:
        """Until these bytes would have arrived."""
        if self.bytes_per_s <= 0:
            return
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic() - _AHEAD_S) + num_bytes / self.bytes_per_s
            due_s = self._free_s
        time.sleep(max(0.0, due_s - time.monotonic()))

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
