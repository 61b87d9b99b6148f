# SPDX-License-Identifier: Apache-2.0
"""Where a server cannot listen: it says so in a sentence, and leaves alone what is there."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvstore.errors import AccessDenied, ConfigError
from kvstore.private import open_directory, own_directory
from kvstore.service.admin import Admin, Target
from kvstore.service.knock import _refuse_stranger
from kvstore.service_options import default_directory
from tests.fakes import DictTier
from tests.ports import free_ports
from tests.service.conftest import StartServer
from tests.waiting import eventually

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


@pytest.mark.parametrize(
    ("service", "words"),
    [
        ({"listen_tcp": "127.0.0.1:{taken}"}, "cannot listen at"),
        ({"listen": "127.0.0.1:0", "listen_tcp": "127.0.0.1:{taken}"}, "cannot listen at"),
        ({"listen_tcp": "127.0.0.1:0", "tls_cert": "{gone}", "tls_key": "{gone}"}, "cannot be read"),
        ({"listen": "unix:{gone}/k.sock"}, "cannot make a socket in"),
        ({"group": "nobody-has-this"}, "there is no such group"),
        ({"secret_file": "{gone}"}, "cannot be read"),
    ],
)
def test_a_server_that_cannot_start_leaves_no_thread_no_socket_and_no_port(
    start_server: StartServer, directory: Path, service: dict[str, str], words: str
) -> None:
    (port,) = free_ports(1)  # which nobody else is given once it is free again
    with socket.create_server(("127.0.0.1", port)):
        filled = {key: text.format(taken=port, gone=directory / "gone") for key, text in service.items()}
        before = set(threading.enumerate())
        with pytest.raises(ConfigError, match=words):
            start_server(tiers=[DictTier()], service={**OPEN, **filled})
    assert eventually(lambda: not set(threading.enumerate()) - before), set(threading.enumerate()) - before
    assert [each.name for each in directory.iterdir() if each.suffix != ".lock"] == []
    assert start_server(service={"listen_tcp": f"127.0.0.1:{port}", **OPEN}).addresses[-1] == f"127.0.0.1:{port}"


def test_a_directory_for_sockets_is_its_users_alone_and_a_groups_to_pass(tmp_path: Path) -> None:
    place = tmp_path / "own"
    own_directory(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    open_directory(place, os.getegid())
    own_directory(place)
    assert (stat.S_IMODE(place.stat().st_mode), place.stat().st_gid) == (0o710, os.getegid())
    open_directory(place, None)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(place)
    (tmp_path / "file").touch()
    for other in ("link", "file"):
        with pytest.raises(ConfigError, match="no directory: have it removed"):
            own_directory(tmp_path / other)
    with pytest.raises(ConfigError, match="cannot be made: No such file"):
        own_directory(tmp_path / "nowhere" / "own")


def test_at_the_default_place_nobody_is_trusted_for_having_made_its_directory() -> None:
    with pytest.raises(AccessDenied, match="whom this user does not trust"):
        _refuse_stranger(os.geteuid() + 1, f"{default_directory()}/kvstore.sock")
    _refuse_stranger(os.geteuid(), f"{default_directory()}/kvstore.sock")


def test_at_another_users_place_that_user_is_trusted_and_not_who_made_the_directory() -> None:
    number = 40_000 + os.getpid() % 20_000
    place = Path(f"/tmp/kvstore-{number}")
    place.mkdir()
    try:
        if os.geteuid() == 0:
            os.chown(place, number + 1, -1)
        _refuse_stranger(number, f"{place}/kvstore.sock")
        with pytest.raises(AccessDenied, match="whom this user does not trust"):
            _refuse_stranger(number + 1, f"{place}/kvstore.sock")
    finally:
        place.rmdir()


AS_ANOTHER_USER = """
import os, sys, tempfile
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError
from kvstore.service.rights import Gate
from kvstore.service.server import Server

def server(**service):
    config = StoreConfig.load({"host": {"capacity_bytes": "1MiB"}, "service": service}, environ={})
    return Server(config, gate=Gate(config.service), tiers=[])

with tempfile.TemporaryDirectory() as name:  # loads what it may not read later
    first = server(listen=f"unix:{name}/k")
    first.start()
    first.stop()
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
for line in sys.stdin:
    try:
        again = server()
        again.start()
        again.stop()
        print(again.address, flush=True)
    except ConfigError as error:
        print(error, flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_the_default_socket_and_its_lock_lie_where_no_other_user_can_make_or_hold_them() -> None:
    uid = 40_000 + os.getpid() % 20_000
    place = Path(f"/tmp/kvstore-{uid}")
    environ = {**os.environ, "XDG_RUNTIME_DIR": ""}
    try:
        with subprocess.Popen(
            [sys.executable, "-c", AS_ANOTHER_USER, str(uid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        ) as process:

            def start() -> str:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                return process.stdout.readline().strip()

            place.mkdir()  # another user, who came first
            assert start().startswith(f"{place} is user 0's, or no directory")
            place.rmdir()
            assert start() == f"unix:{place}/kvstore.sock"
            found = place.stat()
            assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (uid, 0o700)
            assert [each.name for each in place.iterdir()] == ["kvstore.sock.door.lock"]
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(10) == 0
    finally:
        shutil.rmtree(place, ignore_errors=True)
