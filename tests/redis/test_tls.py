# SPDX-License-Identifier: Apache-2.0
"""The same bytes over TLS, where neither scatter I/O nor socket flags exist."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.block import Root
from kvstore.errors import TierUnavailable
from kvstore.tiers.valkey import EmbeddedServer
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content


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


@pytest.fixture
def front(own_server: EmbeddedServer, certificate: tuple[Path, Path]) -> Iterator[TlsFront]:
    front = TlsFront(own_server, *certificate)
    yield front
    front.close()


def test_values_travel_over_tls(
    front: TlsFront, certificate: tuple[Path, Path], make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(f"rediss://127.0.0.1:{front.port}/0?ssl_ca_certs={certificate[0]}")
    for head_dim in (16, 8192):
        content = Content(Root(replace(root.model, head_dim=head_dim)), 5)
        assert content.write(tier) == set(content.keys)
        assert all(tier.contains(content.keys, DEADLINE_S))
        assert content.read(tier) == content.keys


def test_unknown_certificate_is_refused(front: TlsFront, make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(f"rediss://127.0.0.1:{front.port}/0", healthy=False)
    with pytest.raises(TierUnavailable):
        tier.contains(Content(root, 1).keys, DEADLINE_S)
