# SPDX-License-Identifier: Apache-2.0
"""A primary and its replica that tests may kill, stop and promote; who finds the primary: Sentinels, or an address."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from kvstore.errors import TierError
from kvstore.tiers.redis import RedisTier
from tests.ports import free_ports
from tests.redis.cluster import caught_up, until
from tests.redis.content import Content

BACK_WITHIN_S = 60.0
"""Of a failover: Sentinels notice after half a second, vote, promote, and we look every tenth of one. One that was held
up for two seconds trusts no clock for thirty."""


class Server:
    """A server, or a Sentinel, on a loopback port."""

    def __init__(self, binary: Path, directory: Path, *words: str, sentinel: str = "") -> None:
        (self.port,) = free_ports(1)
        home = directory / str(self.port)
        home.mkdir()
        config = home / "conf"
        config.write_text(sentinel)
        self.process = subprocess.Popen(
            [
                *(str(binary), str(config), *(["--sentinel"] if sentinel else [])),
                *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(home), "--logfile", str(home / "log")),
                *words,
            ],
            stdout=subprocess.DEVNULL,
        )
        self.client: Any = redis.Redis(port=self.port, socket_timeout=5)
        until(lambda: bool(self.client.ping()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.kill()
        self.client.close()


class Pair:
    """A primary and its replica."""

    def __init__(self, binary: Path, directory: Path) -> None:
        words = ("--save", "", "--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")
        self.binary, self.directory = binary, directory
        self.primary = Server(binary, directory, *words)
        self.replica = Server(binary, directory, *words, "--replicaof", f"127.0.0.1 {self.primary.port}")
        self.sentinels: list[Server] = []
        until(lambda: self.replica.client.info("replication").get("master_link_status") == "up")

    def watch(self, count: int = 3) -> str:
        """Start Sentinels; their URL."""
        text = (
            f"sentinel monitor cache 127.0.0.1 {self.primary.port} {count // 2 + 1}\n"
            "sentinel down-after-milliseconds cache 500\nsentinel failover-timeout cache 3000\n"
        )
        self.sentinels = [Server(self.binary, self.directory, sentinel=text) for _ in range(count)]
        for each in self.sentinels:  # looks at servers every 10 s, and speaks to the others every two, unless told
            each.client.execute_command("SENTINEL", "DEBUG", "info-period", 500, "publish-period", 200)

        def complete() -> bool:
            states = [each.client.sentinel_master("cache") for each in self.sentinels]
            return all(state["num-other-sentinels"] == count - 1 and state["num-slaves"] == 1 for state in states)

        until(complete)
        return "redis+sentinel://" + ",".join(f"127.0.0.1:{each.port}" for each in self.sentinels) + "/cache"

    def replicated(self) -> None:
        """Wait until the replica has all of it. WAIT would see to what its own connection wrote: nothing."""
        until(lambda: caught_up(self.primary.client, self.replica.client))

    def close(self) -> None:
        for server in (*self.sentinels, self.replica, self.primary):
            server.close()


def works(tier: RedisTier, content: Content) -> None:
    """Until blocks are written and read again, with no call of anybody else."""

    def whole() -> bool:
        with suppress(TierError):
            return content.write(tier) == set(content.keys) and content.read(tier) == content.keys
        return False

    until(whole, BACK_WITHIN_S)


class Pointer:
    """An address that leads to one server or the other, as a name or a virtual address does. Known connections stay."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self._sockets += [near, far]
            for pair in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=pair)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def is_unused(self) -> bool:
        """Whether every connection has ended, on both sides."""
        return not any(thread.is_alive() for thread in self._threads[1:])

    def close(self) -> None:
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in (self._listener, *self._sockets):
            sock.close()
