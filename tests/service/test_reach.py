# SPDX-License-Identifier: Apache-2.0
"""Who cannot reach a server is told why, and what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.errors import ServiceUnavailable
from kvstore.service.reach import unreachable
from tests.ports import free_ports

AS_NOBODY = """
import os, sys
from kvstore.service.reach import unreachable
os.setgroups([]); os.setgid(4242); os.setuid(4242)
error = unreachable(sys.argv[1], encrypted=False)
print(type(error).__name__, error)
"""


def test_a_socket_that_is_not_there_or_left_behind_asks_for_a_server(directory: Path) -> None:
    address = f"unix:{directory}/s"
    for _ in range(2):
        error = unreachable(address, encrypted=False)
        assert isinstance(error, ServiceUnavailable)
        assert f"no server answers at {address}: start one with `kvstore serve`" in str(error)
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(f"{directory}/s") if not (directory / "s").exists() else None


def test_a_file_that_is_no_socket_is_said_to_be_none(directory: Path) -> None:
    (directory / "s").write_text("")
    assert f"{directory}/s is no socket" in str(unreachable(f"unix:{directory}/s", encrypted=False))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("closed", ["the socket", "its directory"])
def test_a_user_who_may_not_connect_is_told_so_and_not_to_start_another_server(closed: str, directory: Path) -> None:
    for parent in (directory, directory.parent, directory.parent.parent):
        if parent != Path("/tmp"):
            parent.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/s")
        listener.listen()
        (directory / "s").chmod(0o600)
        directory.chmod(0o755 if closed == "the socket" else 0o700)
        words = [sys.executable, "-c", AS_NOBODY, f"unix:{directory}/s"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("MayNotConnect this user (uid 4242) may not connect"), done
    assert "run as the server's user" in done.stdout


def test_a_host_without_an_address_and_a_port_where_nobody_listens_are_told_apart() -> None:
    assert "the host nowhere.invalid is not known here" in str(unreachable("nowhere.invalid:9400", encrypted=False))
    (port,) = free_ports(1)
    assert "(Connection refused): start one" in str(unreachable(f"127.0.0.1:{port}", encrypted=False))


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_port_where_something_else_listens_is_said_to_be_that(encrypted: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = str(unreachable(f"127.0.0.1:{listener.getsockname()[1]}", encrypted=encrypted))
    assert "something listens there that does not speak as kvstore does" in said
    assert ("if it speaks TLS" in said) is not encrypted
    assert ("who signed its certificate" in said) is encrypted
