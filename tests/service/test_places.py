# SPDX-License-Identifier: Apache-2.0
"""Where a server cannot listen: it says so in a sentence, and leaves alone what is there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.service.admin import Admin, Target
from tests.service.conftest import StartServer

OPEN: dict[str, object] = {"serve_anyone_on_the_network_without_authentication": True}


def test_the_socket_of_another_program_that_answers_is_not_replaced(start_server: StartServer, directory: Path) -> None:
    path = directory / "kvstore.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match="somebody answers at .*kvstore.sock: stop that service"):
            start_server()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["a file", "a directory"])
def test_what_is_no_socket_is_not_replaced(start_server: StartServer, directory: Path, make: object) -> None:
    path = directory / "kvstore.sock"
    assert callable(make)
    make(path)
    with pytest.raises(ConfigError, match="exists and is no socket: remove it"):
        start_server()
    assert path.exists()
    assert not path.is_socket()
    assert not (directory / "kvstore.sock.door").exists()


def test_a_socket_that_a_dead_program_left_is_replaced(start_server: StartServer, directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "kvstore.sock"))
    with Admin(Target(address=start_server().address)) as admin:
        assert admin.serving()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_a_port_that_is_in_use_is_named(
    start_server: StartServer, directory: Path, family: socket.AddressFamily
) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family) as other:
        other.bind((host, 0))
        other.listen()
        place = f"{host if family == socket.AF_INET else f'[{host}]'}:{other.getsockname()[1]}"
        with pytest.raises(ConfigError) as raised:
            start_server(service={"listen_tcp": place, **OPEN})
    assert str(raised.value).startswith(f"cannot listen at {place}: ")
    assert "another program does" in str(raised.value)
    assert "GRPC_VERBOSITY" not in str(raised.value)
    assert not (directory / "kvstore.sock").exists()


def test_a_server_is_reached_over_ipv6(start_server: StartServer) -> None:
    server = start_server(service={"listen_tcp": "[::1]:0", **OPEN})
    (_, address) = server.addresses
    assert address.startswith("[::1]:")
    with Admin(Target(address=address)) as admin:
        assert admin.serving()
