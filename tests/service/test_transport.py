# SPDX-License-Identifier: Apache-2.0
"""How a client reaches a server: TCP with TLS from end to end, and the Unix sockets as other users find them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.block import ModelId, Root
from kvstore.config import StoreConfig
from kvstore.errors import AccessDenied, ConfigError, KVStoreError, ServiceUnavailable
from kvstore.service.admin import Target
from kvstore.service.knock import knock
from kvstore.service.peer import PeerOptions
from tests.conftest import chain_of, load_all, save_all
from tests.patient import connect
from tests.service.certificates import Authority
from tests.service.conftest import ROOT, ServerProcess

TOKEN = "alice-alice-alice"
TOKENS = f"""
[[client]]
token = "{TOKEN}"
salts = ["alice"]
[[client]]
certificate = "engine"
admin = true
"""


# -- TCP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other-ca"), "theirs")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[ServerProcess]:
    """A server over TCP that wants a certificate of ours, and looks at tokens."""
    directory = tmp_path_factory.mktemp("s")
    tokens = directory / "tokens.toml"
    tokens.write_text(TOKENS)
    tokens.chmod(0o600)
    signed = authority.sign("server")
    service: dict[str, object] = {
        "listen_tcp": "127.0.0.1:0",
        "tls_cert": str(signed.cert),
        "tls_key": str(signed.key),
        "client_ca": str(authority.cert),
        "tokens_file": str(tokens),
    }
    process = ServerProcess(directory, service=service)
    yield process
    assert process.stop() == 0, process.log.read_text()[-4000:]


def credentials(
    trusts: Authority, signed_by: Authority | None, *, name: str = "engine", token: str = ""
) -> dict[str, Any]:
    shown = signed_by.sign(name) if signed_by is not None else None
    return {
        "tls_ca": str(trusts.cert),
        "tls_cert": "" if shown is None else str(shown.cert),
        "tls_key": "" if shown is None else str(shown.key),
        "token": token,
    }


def test_blocks_come_and_go_over_tls_with_a_certificate_and_a_token(
    process: ServerProcess, authority: Authority, model: ModelId
) -> None:
    hers = chain_of(Root(model, salt=b"alice"), 6)
    with connect(process.tcp_address, **credentials(authority, authority, token=TOKEN)) as alice:
        alice.open(model)
        assert save_all(alice, hers) == 6
        assert load_all(alice, hers) == ["host"] * 6
        with pytest.raises(AccessDenied, match="no right to the namespace"):
            alice.match(chain_of(Root(model), 2), "r")
    with connect(process.tcp_address, **credentials(authority, authority)) as engine:
        engine.open(model)
        assert load_all(engine, hers) == ["host"] * 6, "its certificate has rights of its own"
        assert engine.check() == []


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("engine", "wrong-wrong-wrong", "access token is not known"),
        ("somebody", "", "certificate 'somebody' has no rights"),
    ],
)
def test_a_wrong_token_or_name_is_refused_and_said(
    process: ServerProcess, authority: Authority, name: str, token: str, words: str
) -> None:
    with pytest.raises(AccessDenied, match=words):
        connect(process.tcp_address, **credentials(authority, authority, name=name, token=token))


@pytest.mark.parametrize("case", ["we trust another", "signed by another", "no certificate", "no TLS"])
def test_a_connection_that_tls_refuses_is_no_server_and_soon_given_up(
    process: ServerProcess, authority: Authority, stranger: Authority, case: str
) -> None:
    shown = {
        "we trust another": credentials(stranger, authority, token=TOKEN),
        "signed by another": credentials(authority, stranger, token=TOKEN),
        "no certificate": credentials(authority, None, token=TOKEN),
        "no TLS": {"token": TOKEN},
    }[case]
    began_s = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="no server answers at") as caught:
        connect(process.tcp_address, **shown, wait_s=1.0)
    assert time.monotonic() - began_s < 15
    assert ("if it speaks TLS, set KVSTORE_TLS_CA" in str(caught.value)) is (case == "no TLS")


def test_a_token_never_goes_over_a_network_in_the_clear(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Refused before anything is sent, or any name looked up: by clients, by commands, by a sidecar that reads."""
    held = tmp_path / "token"
    held.write_text(TOKEN)
    held.chmod(0o600)
    for address in ("cache.invalid:9400", "192.0.2.1:9400", "[2001:db8::1]:9400", "0.0.0.0:9400"):
        ways: list[Callable[[str], object]] = [
            lambda at: connect(at, token=TOKEN, wait_s=0.0),
            lambda at: Target.of(at, environ={"KVSTORE_TOKEN": TOKEN}),
            lambda at: PeerOptions(address=at, token_file=str(held)).link_options(),
        ]
        for way in ways:
            with pytest.raises(ConfigError, match=re.escape(f"token would go to {address} in the clear")):
                way(address)
        Target.of(address, environ={"KVSTORE_TOKEN": TOKEN, "KVSTORE_TLS_CA": str(authority.cert)})
        Target.of(address, environ={})
    for address in ("localhost:9400", "127.0.0.1:9400", "[::1]:9400", "unix:/run/k.sock"):
        Target.of(address, environ={"KVSTORE_TOKEN": TOKEN})
    monkeypatch.setenv("KVSTORE_SEND_MY_TOKEN_OVER_THE_NETWORK_IN_THE_CLEAR", "yes")
    Target.of("cache.invalid:9400", environ={"KVSTORE_TOKEN": TOKEN})
    assert StoreConfig.load({}).host.capacity_bytes, "it is no unknown setting of a store"


def test_a_unix_socket_is_reached_with_tls_set_for_other_servers(
    process: ServerProcess, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_TLS_CA", str(authority.cert))
    with connect(process.address) as store:
        assert store.check() == []


def test_plain_tcp_does_not_start() -> None:
    tried = subprocess.run(
        [sys.executable, "-m", "kvstore.service.cli", "serve", "--listen", "127.0.0.1:0", "--host-capacity", "16MiB"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert tried.returncode == 2
    assert "service listens on 127.0.0.1:0 without TLS: set service.tls_cert" in tried.stderr


# -- Unix sockets, and other users -----------------------------------------------------------------------------

GROUP, MEMBER, OTHER_MEMBER, OUTSIDER = 54_320, 54_321, 54_322, 54_323

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that every user may look into, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="kvstore-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def serve_for(open_directory: Path) -> Iterator[Callable[..., ServerProcess]]:
    made: list[ServerProcess] = []

    def serve(**service: object) -> ServerProcess:
        made.append(ServerProcess(open_directory, service=service))
        return made[-1]

    yield serve
    for process in made:
        assert process.stop() == 0


def knock_as(uid: int, groups: list[int], path: str) -> str:
    """What the door says to a process of that user: "open", or the error."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            with knock(path, 5.0) as passed:
                said = "open" if passed.capacity_bytes else "empty"
        except KVStoreError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException as error:  # noqa: BLE001 the child's top
            said = repr(error)
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as result:
        said = result.read()
    os.waitpid(child, 0)
    return said


def modes(directory: Path) -> set[tuple[int, int]]:
    """Mode and group of the service's socket and the door's."""
    found = [os.stat(directory / name) for name in ("kvstore.sock", "kvstore.sock.door")]
    return {(each.st_mode & 0o777, each.st_gid) for each in found}


@needs_root
def test_without_a_group_the_sockets_are_this_users_alone(
    serve_for: Callable[..., ServerProcess], open_directory: Path
) -> None:
    serve_for()
    path = str(open_directory / "kvstore.sock")
    assert modes(open_directory) == {(0o600, os.getegid())}
    assert knock_as(OUTSIDER, [GROUP], path).startswith(f"AccessDenied: user {OUTSIDER} may not connect to")


@needs_root
def test_with_a_group_its_members_come_in_and_nobody_else(
    serve_for: Callable[..., ServerProcess], open_directory: Path
) -> None:
    serve_for(group=str(GROUP))
    path = str(open_directory / "kvstore.sock")
    assert modes(open_directory) == {(0o660, GROUP)}
    assert knock_as(MEMBER, [GROUP], path) == "open"
    assert knock_as(OUTSIDER, [], path).startswith(f"AccessDenied: user {OUTSIDER} may not connect to")


@needs_root
def test_listed_users_alone_map_the_arena_though_the_group_may_use_the_socket(
    serve_for: Callable[..., ServerProcess], open_directory: Path
) -> None:
    serve_for(group=str(GROUP), allowed_uids=[MEMBER])
    path = str(open_directory / "kvstore.sock")
    assert knock_as(MEMBER, [GROUP], path) == "open"
    refused = knock_as(OTHER_MEMBER, [GROUP], path)
    assert f"user {OTHER_MEMBER} may not map this arena: name it in service.allowed_uids" in refused


@needs_root
def test_the_server_needs_no_more_than_an_ordinary_user_has(open_directory: Path, model: ModelId) -> None:
    """As root here: elsewhere every test of this suite shows it."""
    os.chown(open_directory, OUTSIDER, OUTSIDER)
    become = f"os.setgroups([]); os.setgid({OUTSIDER}); os.setuid({OUTSIDER})"  # after imports that it may not read
    code = f"import os, sys; from tests.service import serving; {become}; sys.exit(serving.main(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(open_directory), "64", "{}"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        assert (open_directory / "kvstore.sock").stat().st_uid == OUTSIDER
        with connect(f"unix:{open_directory}/kvstore.sock") as store:
            store.open(model)
            chain = chain_of(Root(model), 4)
            assert save_all(store, chain) == 4
            assert load_all(store, chain) == ["host"] * 4
        process.communicate()
    assert process.returncode == 0
