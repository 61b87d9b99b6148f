# SPDX-License-Identifier: Apache-2.0
"""The same bytes over TLS, where neither scatter I/O nor socket flags exist."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from kvstore.api import NO_HINT
from kvstore.block import Root
from kvstore.errors import TierTimeout, TierUnavailable
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions
from tests.ports import free_ports
from tests.redis.conftest import MakeTier, binary_of
from tests.redis.content import DEADLINE_S, Content
from tests.waiting import timed


class TlsFront:
    """A loopback port that speaks TLS and passes all bytes on to a server."""

    def __init__(self, server: EmbeddedServer, certificate: Path, key: Path) -> None:
        self._target = server.unix_url.removeprefix("unix://")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                bare, _ = self._listener.accept()
            except OSError:
                return
            with suppress(OSError):
                near = self._context.wrap_socket(bare, server_side=True)
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._target)
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._pump, args=(source, sink)))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in (self._listener, *self._sockets):
            sock.close()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("NOT TESTED OVER TLS: no openssl here to make a certificate with")
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run([openssl, *words, *files], check=True, capture_output=True, timeout=60)
    return paths


@pytest.fixture(params=["valkey behind a front", "redis itself"])
def server(
    request: pytest.FixtureRequest, certificate: tuple[Path, Path], tmp_path: Path
) -> Iterator[tuple[EmbeddedServer, str]]:
    """A server, and its URL for TLS. The embedded Valkey was built without."""
    query = f"ssl_ca_certs={certificate[0]}"
    if request.param == "redis itself":
        (port,) = free_ports(1)
        launcher = tmp_path / "server"
        files = f"--tls-cert-file {certificate[0]} --tls-key-file {certificate[1]} --tls-auth-clients no"
        launcher.write_text(f'#!/bin/sh\nexec {binary_of("redis")} "$@" --tls-port {port} {files}\n')
        launcher.chmod(0o755)
        with EmbeddedServer(ServerOptions(binary=launcher)) as made:
            yield made, f"rediss://127.0.0.1:{port}/0?{query}"
        return
    with EmbeddedServer() as made:
        front = TlsFront(made, *certificate)
        yield made, f"rediss://127.0.0.1:{front.port}/0?{query}"
        front.close()


def large(root: Root, num_blocks: int) -> Content:
    """Blocks of 2 MiB."""
    return Content(Root(replace(root.model, head_dim=8192)), num_blocks)


def test_values_travel_over_tls(server: tuple[EmbeddedServer, str], make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(server[1])
    for content in (Content(root, 5), Content(root, 300), large(root, 5)):
        tier.open(content.layout)
        assert content.write(tier) == set(content.keys)
        assert all(tier.contains(content.keys, DEADLINE_S))
        assert content.read(tier) == content.keys
        tier.touch(content.keys, NO_HINT)
    assert tier.settle(DEADLINE_S)
    assert tier.stats.get("redis.touched_blocks") == 310


def test_connections_over_tls_are_used_again(
    server: tuple[EmbeddedServer, str], make_tier: MakeTier, root: Root
) -> None:
    tier, content = make_tier(server[1]), Content(root, 5)
    with redis.Redis.from_url(server[0].unix_url) as client:
        content.write(tier)
        content.read(tier)
        before = client.info("stats")["total_connections_received"]
        for _ in range(10):
            content.write(tier)
            tier.contains(content.keys, DEADLINE_S)
            content.read(tier)
        # What goes on in the background may have needed one more of either kind.
        assert client.info("stats")["total_connections_received"] <= before + 2


def test_values_over_tls_are_copied_nowhere_but_in_the_tls_object(
    server: tuple[EmbeddedServer, str], make_tier: MakeTier, root: Root
) -> None:
    tier, content = make_tier(server[1]), large(root, 8)
    tier.open(content.layout)
    into = content.buffers()
    content.write(tier, 0, 1)
    peak_bytes = content.held_in_passing(tier, into)
    assert into == content.parts
    assert peak_bytes < 1 << 20  # half a value


@pytest.mark.alone
@pytest.mark.parametrize("call", ["contains", "read", "write"])
def test_a_hung_server_costs_the_deadline_over_tls_too(
    call: str, server: tuple[EmbeddedServer, str], make_tier: MakeTier, root: Root
) -> None:
    tier, content = make_tier(server[1], healthy=False), large(root, 4)
    tier.open(content.layout)
    content.write(tier, 0, 2)
    content.read(tier)
    into = content.buffers()
    calls: dict[str, Callable[[], object]] = {
        "contains": lambda: tier.contains(content.keys, 1.0),
        "read": lambda: list(tier.read(into, 1.0)),
        "write": lambda: tier.write(content.parts, content.meta, 1.0),
    }
    os.kill(server[0].pid, signal.SIGSTOP)
    try:
        with timed() as took, pytest.raises(TierTimeout):
            calls[call]()
        assert took.took_s >= 0.9
        assert took.awake_s < 1.9
    finally:
        os.kill(server[0].pid, signal.SIGCONT)


def test_unknown_certificate_is_refused(server: tuple[EmbeddedServer, str], make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(server[1].partition("?")[0], healthy=False)
    with pytest.raises(TierUnavailable):
        tier.contains(Content(root, 1).keys, DEADLINE_S)
