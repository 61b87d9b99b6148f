# SPDX-License-Identifier: Apache-2.0
"""Servers and clients on real sockets: in this process where a test looks inside, in their own where it kills them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from kvstore.clock import Clock
from kvstore.config import StoreConfig
from kvstore.service.client import SidecarStore
from kvstore.service.rights import Gate
from kvstore.service.server import Server
from kvstore.tiers.base import Tier
from tests.patient import REQUEST, connect
from tests.waiting import eventually

ROOT = Path(__file__).parent.parent.parent
Sections = Mapping[str, Mapping[str, object]]
StartServer = Callable[..., Server]
Connect = Callable[..., SidecarStore]


def config_of(directory: Path, num_blocks: int, sections: Sections) -> StoreConfig:
    """Settings of a server of so many one-page blocks, at a socket in `directory`."""
    values = {name: dict(section) for name, section in sections.items()}
    values["host"] = {"capacity_bytes": num_blocks * 4096, "prefault": False, **values.get("host", {})}
    values["request"] = {**REQUEST, **values.get("request", {})}
    # Memory is so small here that one test has all of it at once.
    service = {"listen": f"unix:{directory}/kvstore.sock", "max_session_share": 1.0}
    values["service"] = {**service, **values.get("service", {})}
    return StoreConfig.load(values, environ={})


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path: a socket's has at most 107 bytes."""
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def start_server(directory: Path) -> Iterator[StartServer]:
    """Starts servers in this process; each must end healthy, with nothing held."""
    made: list[Server] = []

    def start(
        num_blocks: int = 64,
        *,
        clock: Clock | None = None,
        tiers: Sequence[Tier] = (),
        gate: type[Gate] = Gate,
        **sections: dict[str, object],
    ) -> Server:
        config = config_of(directory, num_blocks, sections)
        server = Server(config, gate=gate(config.service), clock=clock, tiers=tiers)
        server.start()
        made.append(server)
        return server

    yield start
    for server in made:
        server.drain(5)
        let_go = eventually(lambda server=server: not held_by(server))
        faults = server.check()
        held = held_by(server)
        server.stop()
        assert faults == []
        assert let_go, held


def held_by(server: Server) -> dict[str, float]:
    return {name: value for name, value in server.stats().items() if name in HELD and value}


HELD = ("host.pinned_blocks", "lease.live", "save.quarantined_slots")
"""Gauges that are zero when nobody holds anything."""


@pytest.fixture
def client(start_server: StartServer) -> Iterator[SidecarStore]:
    """A client that maps the memory of a server in this process."""
    with connect(start_server().address) as store:
        yield store


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, directory: Path, num_blocks: int = 64, **sections: dict[str, object]) -> None:
        self.address = f"unix:{directory}/kvstore.sock"
        self.log = directory / "server.log"
        self._arguments = [str(directory), str(num_blocks), json.dumps(sections)]
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Start it, again after a `kill`."""
        command = [sys.executable, "-m", "tests.service.serving", *self._arguments]
        with open(self.log, "a") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        said = self._process.stdout.readline().split()
        assert said[:1] == ["ready"], self.log.read_text()[-4000:]
        self.tcp_address = said[-1]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def faults(self) -> list[str]:
        """Ends of the traces in its log: errors that nobody foresaw."""
        traces = self.log.read_text().split("Traceback (most recent call last):\n")[1:]
        return [next((line for line in trace.splitlines() if not line.startswith(" ")), "") for trace in traces]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a stop is waited for, since it takes the process a moment."""
        os.kill(self.pid, number)
        state = Path(f"/proc/{self.pid}/stat")
        for _ in range(1000):
            if number != signal.SIGSTOP or state.read_text().rpartition(")")[2].split()[0] == "T":
                return
            time.sleep(0.005)
        raise AssertionError("the server did not stop")

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)
        self._close()

    def stop(self) -> int:
        """Let it end in order; its exit code says whether its store was healthy, with nothing held."""
        assert self._process is not None
        if self._process.returncode is not None:
            return self._process.returncode
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait(30)
        self._close()
        return code

    def _close(self) -> None:
        assert self._process is not None
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture
def start_process(directory: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers in processes of their own, which must end healthy unless they were killed."""
    made: list[ServerProcess] = []

    def start(num_blocks: int = 64, **sections: dict[str, object]) -> ServerProcess:
        made.append(ServerProcess(directory, num_blocks, **sections))
        return made[-1]

    yield start
    for process in made:
        process.signal(signal.SIGCONT) if process._process and process._process.poll() is None else None
        assert process.stop() in (0, -signal.SIGKILL), process.log.read_text()[-4000:]
