# SPDX-License-Identifier: Apache-2.0
"""`kvstore` as people and scripts run it: real processes, sockets, signals and terminals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvstore.block import Chain, ModelId, Root
from kvstore.errors import AccessDenied, ConfigError, ServiceUnavailable
from kvstore.layout import layout_of
from kvstore.service.admin import Admin, Target
from kvstore.service.cli_commands import app
from kvstore.service.cli_serve import notify, read_config
from kvstore.service.cli_tables import blocks_table, event_line, events
from kvstore.service.handshake import model_message
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions
from kvstore.wire import kvstore_pb2 as pb
from kvstore.wire.kvstore_pb2_grpc import KVStoreStub
from tests.conftest import save_all
from tests.patient import connect
from tests.ports import free_ports
from tests.redis.content import Content
from tests.service.certificates import Authority
from tests.waiting import eventually

pytestmark = pytest.mark.slow  # a process a command

KVSTORE = (sys.executable, "-m", "kvstore.service.cli")
LONG_S = 60.0
"""For what takes a process each time that one looks, and several seconds where many others want the processors."""
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KVSTORE_")}
    return {**kept, "NO_COLOR": "1", "TERM": "xterm", **more}


def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KVSTORE, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
    )


def examined(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """What doctor says once calls take no longer than they should, as they do while others want the processors."""
    for _ in range(10):
        asked = run("doctor", *words, **more)
        if "busy or throttled host" not in asked.stdout:
            break
    return asked


class Serving:
    """`kvstore serve` in a process of its own, ready."""

    def __init__(self, directory: Path, *words: str, **more: str) -> None:
        self.address = f"unix:{directory}/k.sock"
        self.directory = directory
        flags = ["serve", "--listen", self.address, "--host-capacity", "1MiB", "--set", "host.prefault=false"]
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*KVSTORE, *flags, *words], stdout=subprocess.PIPE, stderr=log, text=True, env=environment(**more)
            )
        self.printed: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line.rstrip("\n"))
            if line.startswith("ready: "):
                return
        self.end()
        raise AssertionError(f"never ready: {self.log.read_text()}")

    def admin(self, **more: str) -> Admin:
        return Admin(Target(address=self.address, **more))

    def ask(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return run(*words, KVSTORE_ADDRESS=self.address, **more)

    def values(self) -> dict[str, float]:
        values: dict[str, float] = json.loads(self.ask("status", "--json").stdout)["values"]
        return values

    @contextlib.contextmanager
    def running(self, *words: str) -> Iterator[IO[str]]:
        """A command that goes on until this ends; what it prints."""
        env = environment(KVSTORE_ADDRESS=self.address)
        with subprocess.Popen([*KVSTORE, *words], stdout=subprocess.PIPE, text=True, env=env) as process:
            assert process.stdout is not None
            try:
                yield process.stdout
            finally:
                process.send_signal(signal.SIGINT)

    def wait(self, limit_s: float = 20.0) -> int:
        return self.process.wait(limit_s)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    made: list[Serving] = []

    def start(*words: str, **more: str) -> Serving:
        made.append(Serving(tmp_path, *words, **more))
        return made[-1]

    yield start
    for each in made:
        each.end()


MakeServing = Callable[..., Serving]


# ---- the server's life ----


def test_serve_prints_its_settings_with_their_sources_and_one_ready_line(tmp_path: Path, serve: MakeServing) -> None:
    config = tmp_path / "kvstore.toml"
    config.write_text('[request]\nhold_s = 3.0\n[service]\nlisten = "unix:/nowhere/else.sock"\n')
    server = serve("--config", str(config), "--set", "mover.write=through", KVSTORE_SERVICE__MAX_STREAMS="7")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in server.printed[:-1]}
    assert rows["request.hold_s"] == ["3.0", f"file {config}"]
    assert rows["service.listen"] == [server.address, "command line"]
    assert rows["service.max_streams"] == ["7", "environment KVSTORE_SERVICE__MAX_STREAMS"]
    assert rows["mover.write"] == ["through", "command line"]
    assert rows["host.policy"] == ["returns", "default"]
    assert re.fullmatch(rf"ready: {server.address} arena 1\.0 MiB boot [0-9a-f]{{8}}", server.printed[-1])
    reply = json.loads(server.ask("status", "--json").stdout)
    assert reply["settings"]["request.hold_s"] == {"value": "3.0", "source": f"file {config}"}
    assert reply["values"]["host.capacity_bytes"] == 1 << 20
    assert server.printed[-1].endswith(reply["boot_id"][:8])


def test_sigterm_ends_it_in_order_and_leaves_no_socket(serve: MakeServing) -> None:
    server = serve()
    assert (server.directory / "k.sock").stat().st_mode & 0o777 == 0o600
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not (server.directory / "k.sock").exists()
    assert not (server.directory / "k.sock.door").exists()
    assert [line.split(": ")[-1] for line in server.log.read_text().splitlines()][-1] == "stopped"


def hold_a_save(admin: Admin, model: ModelId) -> None:
    """Leave a save open, which a draining server waits for."""
    stub = KVStoreStub(admin._channel)  # type: ignore[no-untyped-call]
    session, chain = admin.opened.session, Chain(Root(model), range(16))
    opened = stub.OpenModel(pb.OpenModelRequest(session=session, model=model_message(model), digest=model.digest()))
    root = pb.Root(model=opened.model, id=chain.root.id)
    reply = stub.Save(
        pb.SaveRequest(
            session=session,
            chain=pb.ChainDelta(chain=1, ids=b"".join(chain.ids), root=root),
            stop=1,
            contents=pb.Contents(tokens=chain.meta(0).tokens),
            lease=1,
        )
    )
    assert reply.indices


def test_a_second_sigterm_stops_at_once_what_the_first_would_have_waited_for(
    serve: MakeServing, model: ModelId
) -> None:
    server = serve("--set", "service.drain_s=300")
    with contextlib.suppress(ServiceUnavailable), server.admin() as admin:
        hold_a_save(admin, model)
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: not admin.serving())
        with pytest.raises(ServiceUnavailable):
            server.admin()
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 1
    assert "stopping at once" in server.log.read_text()


def test_draining_ends_at_its_limit(serve: MakeServing, model: ModelId) -> None:
    server = serve("--set", "service.drain_s=0.3")
    with server.admin() as admin:
        hold_a_save(admin, model)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_client_meets_a_server_that_was_started_again(serve: MakeServing) -> None:
    first = serve()
    with first.admin() as admin:
        boot = admin.opened.boot_id
        first.process.kill()
        first.wait()
        with pytest.raises(ServiceUnavailable, match="no server answers at unix:.*start one with `kvstore serve`"):
            admin.stats()
        serve()
        assert eventually(lambda: answers(admin))
        assert admin.opened.boot_id != boot


def test_a_fresh_server_says_how_full_redis_is_and_warns_where_redis_has_no_limit(
    serve: MakeServing, model: ModelId
) -> None:
    with EmbeddedServer() as valkey:
        tier = RedisTier(RedisTier.Options(url=valkey.url))
        tier.open(layout_of(model))
        assert Content(Root(model), 4).write(tier)
        used = tier.accounted_bytes()
        tier.close()
        server = serve("--redis-url", valkey.url)
        assert eventually(lambda: "redis.capacity_bytes" in server.values(), LONG_S)
        assert server.values()["redis.used_bytes"] == used
        assert eventually(lambda: "maxmemory" in server.log.read_text())
        (line,) = [line for line in server.log.read_text().splitlines() if "maxmemory" in line]
        assert "redis: maxmemory is not set" in line
        assert "`kvstore doctor` has the fix, under redis maxmemory" in line
        doctor = server.ask("doctor", "--redis-url", valkey.url).stdout
        assert "redis maxmemory: has no limit" in doctor


def test_watch_goes_on_with_a_server_that_was_started_again_and_tells_of_the_gap(serve: MakeServing) -> None:
    first = serve()
    env = environment(KVSTORE_ADDRESS=first.address)
    words = [*KVSTORE, "watch", "--snapshot", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert json.loads(watching.stdout.readline())["kind"] == "snapshot_done"
        first.process.kill()
        first.wait()
        assert watching.stderr.readline().startswith(f"kvstore: lost the server at {first.address} (")
        serve()
        assert watching.stderr.readline() == f"kvstore: the server at {first.address} is back\n"
        assert [json.loads(watching.stdout.readline())["kind"] for _ in range(2)] == ["gap", "snapshot_done"]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 130


def answers(admin: Admin) -> bool:
    try:
        admin.stats()
    except ServiceUnavailable:
        return False
    return True


def test_sighup_reads_the_tokens_again(tmp_path: Path, serve: MakeServing) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("")
    tokens.chmod(0o600)
    server = serve("--set", f"service.tokens_file={tokens}")
    token = "a-token-of-somebody-new"
    with pytest.raises(AccessDenied, match="the access token is not known here"):
        server.admin(token=token)
    tokens.write_text(f'[[client]]\ntoken = "{token}"\n')
    server.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: "rights read again: 1 clients" in server.log.read_text())
    with server.admin(token=token) as admin:
        assert not admin.stats().settings, "settings are for admins"
    assert server.process.poll() is None


def test_systemd_is_told_when_it_is_ready_and_when_it_stops(tmp_path: Path, serve: MakeServing) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        server = serve(NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert systemd.recv(100) == b"READY=1"
        server.process.send_signal(signal.SIGTERM)
        assert systemd.recv(100) == b"STOPPING=1"


def test_an_abstract_notify_socket_is_reached_and_a_missing_one_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0kvstore-test-{os.getpid()}")
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@kvstore-test-{os.getpid()}")
        notify("READY=1")
        assert systemd.recv(100) == b"READY=1"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")


def test_metrics_are_served_beside_it(serve: MakeServing) -> None:
    server = serve("--set", "service.metrics_listen=127.0.0.1:0", "--set", "service.log_format=json")
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    url = next(line["message"].split()[-1] for line in lines if line["message"].startswith("metrics at"))
    with server.admin(), urllib.request.urlopen(url, timeout=5) as reply:
        text = reply.read().decode()
    assert "kvstore_host_capacity_bytes 1.048576e+06" in text
    assert 'kvstore_rpc_seconds_count{rpc="Open"} 1.0' in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["serve", "--set", "host.capacity=5"], "unknown key host.capacity (from command line): known are"),
        (["serve", "--set", "mover.write"], "--set mover.write: give SECTION.KEY=VALUE"),
        (["serve", "--host-capacity", "much"], "host.capacity_bytes is 'much': give a number of bytes, or a size"),
        (["serve", "--listen", "0.0.0.0:9400"], "service listens on 0.0.0.0:9400 without TLS"),
        (["serve", "--config", "/nowhere.toml"], "config file /nowhere.toml cannot be read: No such file"),
        (["serve", "--host-capacity", "900TiB"], "memory: 900"),
        (["serve", "--listen", "unix:/nowhere/k.sock"], "/nowhere"),
        (["status", "--address", "unix:/nowhere/k.sock"], "no server answers at unix:/nowhere/k.sock: start one"),
        (["status", "--address", "nonsense"], "'nonsense': give unix:PATH or host:port"),
        (["clear", "--root", "1f"], "--root is '1f': give the 64 hex digits"),
        (["inspect", "[1]", "--salt", "hex:x"], "take hex digits"),
        (["warm", "[1]", "--address", "unix:/nowhere/k.sock"], "no server answers at unix:/nowhere/k.sock: start one"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], says: str) -> None:
    done = run(*words, XDG_RUNTIME_DIR="")
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if " kvstore.service" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kvstore: ")
    assert says in lines[0]


def test_output_that_cannot_be_written_is_one_line_and_no_trace() -> None:
    with open("/dev/full", "w") as full:
        words = [*KVSTORE, "serve", "--host-capacity", "1MiB", "--set", "mover.write=x"]
        for command in ([*KVSTORE, "--help"], [*words[:-2]]):
            done = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment(XDG_RUNTIME_DIR="")
            )
            assert done.returncode == 2
            # A server that could not say that it is ready logs, from a thread, before or after this.
            assert "kvstore: [Errno 28] No space left on device" in done.stderr.splitlines()
            assert "Traceback" not in done.stderr


def test_a_terminal_of_another_alphabet_is_no_failure(serve: MakeServing) -> None:
    server = serve()
    shown = server.ask("status", PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "host" in shown.stdout


def test_status_names_the_models_that_are_open_and_who_can_read_their_blocks(serve: MakeServing) -> None:
    server = serve()
    model = {"model": "tiny", "revision": "0123456789abcdef", "kv_dtype": "bfloat16", "num_layers": 2}
    ids = [
        ModelId(**model, num_kv_heads=2, head_dim=16, layout=layout)  # type: ignore[arg-type]
        for layout in ("canonical", "opaque:12ab")
    ]
    with connect(server.address) as client:
        for one in ids:
            client.open(one)
        shown, told = server.ask("status").stdout, json.loads(server.ask("status", "--json").stdout)
    for layout in ("canonical", "opaque:12ab"):
        assert re.search(rf"tiny +0123456789ab +bfloat16 +64 +{layout}", shown), shown
    assert [ModelId(**each) for each in told["models"]] == ids


def test_a_second_server_in_the_same_place_is_refused_and_the_first_serves_on(
    tmp_path: Path, serve: MakeServing
) -> None:
    server = serve()
    second = run("serve", "--listen", server.address, "--host-capacity", "1MiB")
    assert second.returncode == 2
    assert "another service runs at" in second.stderr
    assert server.ask("status", "--json").returncode == 0


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """Paths of a server's certificate, which is its own authority, and of its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("NOT TESTED OVER TLS: no openssl here to make a certificate with")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", cert, "-keyout", key]
    subprocess.run([openssl, *words], check=True, capture_output=True, timeout=60)
    return cert, key


def test_over_tcp_only_tls_and_a_token_get_in_while_the_unix_socket_needs_neither(
    tmp_path: Path, serve: MakeServing, certificate: tuple[str, str]
) -> None:
    cert, key = certificate
    token = "a-token-of-the-administrator"
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[[client]]\ntoken = "{token}"\nadmin = true\n')
    tokens.chmod(0o600)
    settings = {"listen_tcp": "127.0.0.1:0", "tls_cert": cert, "tls_key": key, "tokens_file": str(tokens)}
    server = serve(*(word for name, value in settings.items() for word in ("--set", f"service.{name}={value}")))
    found = re.search(r"serving at .*(127\.0\.0\.1:\d+)", server.log.read_text())
    assert found is not None
    tcp = found[1]
    asked = run("status", "--json", KVSTORE_ADDRESS=tcp, KVSTORE_TOKEN=token, KVSTORE_TLS_CA=cert)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["address"] == tcp
    nobody = run("status", KVSTORE_ADDRESS=tcp, KVSTORE_TLS_CA=cert)
    assert (nobody.returncode, nobody.stdout) == (2, "")
    assert "no credential was shown: send an access token" in nobody.stderr
    assert run("status", KVSTORE_ADDRESS=tcp, KVSTORE_TOKEN=token).returncode == 2, "without TLS"
    with server.admin() as admin:
        assert admin.stats().settings


def test_over_tcp_a_client_certificate_of_the_right_authority_gets_in_and_nothing_else(
    tmp_path: Path, serve: MakeServing
) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    own = ours.sign("server")
    settings = {"listen_tcp": "127.0.0.1:0", "tls_cert": own.cert, "tls_key": own.key, "client_ca": ours.cert}
    server = serve(*(word for name, value in settings.items() for word in ("--set", f"service.{name}={value}")))
    found = re.search(r"serving at .*(127\.0\.0\.1:\d+)", server.log.read_text())
    assert found is not None
    where = {"KVSTORE_ADDRESS": found[1], "KVSTORE_TLS_CA": str(ours.cert)}
    for authority, code in ((ours, 0), (theirs, 2), (None, 2)):
        shown = authority.sign("engine") if authority is not None else None
        files = {} if shown is None else {"KVSTORE_TLS_CERT": str(shown.cert), "KVSTORE_TLS_KEY": str(shown.key)}
        asked = run("status", "--json", **where, **files)
        assert asked.returncode == code, asked.stderr
        assert bool(asked.stdout) == (code == 0)


# ---- what asks it ----


def test_doctor_is_content_with_a_sound_server_and_with_none_says_what_is_missing(
    tmp_path: Path, serve: MakeServing
) -> None:
    server = serve()
    well = examined("--json", KVSTORE_ADDRESS=server.address)
    report = json.loads(well.stdout)
    names = {finding["name"]: finding["verdict"] for finding in report["findings"]}
    assert (well.returncode, report["problems"]) == (0, 0), well.stdout
    assert {"socket", "server", "hash vectors", "calls", "store", "memory"} <= names.keys()
    server.process.kill()
    server.wait()
    ill = server.ask("doctor")
    assert ill.returncode == 1
    assert "problem server: no server answers at" in ill.stdout
    assert "fix: kvstore serve" in ill.stdout
    assert "problem memory" not in ill.stdout
    large = server.ask("doctor", "--host-capacity", "900TiB")
    assert "problem memory" in large.stdout
    assert "lower host.capacity_bytes" in large.stdout


def test_what_doctor_meets_is_in_its_findings_and_nowhere_else() -> None:
    done = run("doctor", "--redis-url", "redis://127.0.0.1:1")
    assert "redis: does not answer" in done.stdout
    assert done.stderr == ""


def test_doctor_says_that_the_store_is_sound_where_only_redis_is_away(serve: MakeServing) -> None:
    server = serve("--redis-url", "redis://127.0.0.1:1")
    report = json.loads(examined("--json", KVSTORE_ADDRESS=server.address).stdout)
    store = [(found["verdict"], found["detail"]) for found in report["findings"] if found["name"] == "store"]
    assert store == [("ok", "no invariant is broken in what could be looked at")]
    assert {found["name"] for found in report["findings"] if found["verdict"] == "problem"} == {"redis"}
    (socket_line,) = [found["detail"] for found in report["findings"] if found["name"] == "socket"]
    assert socket_line.endswith("its door gives 1 MiB to map")


def test_doctor_takes_the_flags_of_serve_and_finds_the_server_by_them(serve: MakeServing) -> None:
    server = serve()
    flags = ("--listen", server.address, "--tiering", "inclusive", "--redis-policy", "lru", "--redis-url", "embedded")
    asked = examined(*flags)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert f"socket: {server.directory}/k.sock" in asked.stdout


def test_what_prevents_the_start_stands_alone(tmp_path: Path) -> None:
    failed = run("serve", "--listen", f"unix:{tmp_path}/k.sock", "--host-capacity", "900TiB")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert len(failed.stderr.splitlines()) == 1
    assert "lower host.capacity_bytes" in failed.stderr


def test_a_redis_that_nobody_named_is_said_to_be_private(serve: MakeServing) -> None:
    says = "tiers.redis.url is not set: a private server is started"
    assert says in serve("--set", "tiers.redis.lanes=2").log.read_text()


def test_sizes_are_shown_in_units_and_given_to_scripts_in_bytes(serve: MakeServing) -> None:
    server = serve()
    rows = {line.split()[0]: line.split()[1:3] for line in server.printed[:-1]}
    assert rows["host.capacity_bytes"] == ["1", "MiB"]
    assert re.search(r"^host\.capacity_bytes +1 MiB +command line", server.ask("status").stdout, re.MULTILINE)
    reply = json.loads(server.ask("status", "--json").stdout)
    assert reply["settings"]["host.capacity_bytes"]["value"] == "1048576"


def test_clear_asks_before_it_empties_everything(serve: MakeServing) -> None:
    server = serve()
    refused = server.ask("clear")
    assert refused.returncode == 2
    assert "say --yes" in refused.stderr
    assert json.loads(server.ask("clear", "--yes", "--json").stdout) == {"blocks": 0}


def test_top_prints_an_interval_for_scripts(serve: MakeServing) -> None:
    server = serve()
    line = json.loads(server.ask("top", "--json", "--once", "--every", "0.1").stdout)
    assert line["clients"] == 1, "itself"
    assert line["values"]["host.capacity_bytes"] > 0
    assert line["per_second"]["host.capacity_bytes"] == 0
    assert 0.1 <= line["seconds"] < LONG_S


def test_top_prints_a_frame_for_a_pipe_and_a_screen_that_q_ends_for_a_terminal(serve: MakeServing) -> None:
    server = serve()
    frame = server.ask("top", "--once", "--every", "0.1")
    assert frame.returncode == 0
    assert re.search(r"^host +░+ 0\.0/1\.0 MiB 0%", frame.stdout, re.MULTILINE)
    screen, terminal = pty.openpty()
    with subprocess.Popen(
        [*KVSTORE, "top", "--every", "0.1", "--address", server.address],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment(COLUMNS="80", LINES="24"),
    ) as process:
        os.close(terminal)
        seen = read_until(screen, "matches 0/s")
        os.write(screen, b"q")
        assert read_until(screen, "\x1b[?1049l"), "the screen is given back"
        assert process.wait(10) == 0
    os.close(screen)
    assert "kvstore top" in ANSI.sub("", seen)


def read_until(fd: int, text: str, limit_s: float = 20.0) -> str:
    """What a terminal showed until `text`, escape sequences included."""
    seen = ""
    deadline = time.monotonic() + limit_s
    while text not in seen and text not in ANSI.sub("", seen):
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"never showed {text!r}: {seen!r}"
        seen += os.read(fd, 65536).decode(errors="replace")
    return seen


def test_completion_is_there() -> None:
    assert "complete" in run("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout


# ---- in process ----


def test_flags_become_settings_of_the_one_schema() -> None:
    config = read_config(None, {"host.capacity_bytes": "2GiB", "tiers.redis.url": ""}, ["tiers.redis.codec=lz4"])
    assert config.host.capacity_bytes == 2 << 30
    assert config.sources["tiers.redis.codec"] == "command line"
    assert "tiers.redis.url" not in config.sources
    with pytest.raises(ConfigError, match="--set nosection=1"):
        read_config(None, {}, ["nosection=1"])


def test_the_flag_wins_over_the_environment_for_the_address() -> None:
    environ = {"KVSTORE_ADDRESS": "unix:/env.sock", "KVSTORE_TOKEN": "secret"}
    assert Target.of("unix:/flag.sock", environ=environ).address == "unix:/flag.sock"
    assert Target.of(environ=environ, default="unix:/config.sock").address == "unix:/env.sock"
    assert Target.of(environ={}, default="unix:/config.sock").address == "unix:/config.sock"
    assert "secret" not in repr(Target.of(environ=environ))


@pytest.mark.parametrize("command", ["serve", "doctor", "status", "top", "inspect", "watch", "clear", "warm"])
def test_help_teaches_by_example(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert f"Example:  kvstore {command}" in shown.output


def test_the_first_page_says_how_to_begin() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "kvstore serve --host-capacity 32GiB" in shown
    assert "KVSTORE_ADDRESS" in shown


def test_flags_name_the_settings_they_stand_for() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for key in ("service.listen", "host.capacity_bytes", "tiers.redis.url"):
        assert f"({key})" in shown


def test_events_are_one_line_a_block() -> None:
    stored = pb.BlockEvent(kind=pb.BlockEvent.STORED, tier="host", root=bytes(32), ids=b"a" * 32 + b"b" * 32, depth=4)
    stored.tokens = b"".join(number.to_bytes(4, "little") for number in range(4))
    cleared = pb.BlockEvent(kind=pb.BlockEvent.CLEARED, root=bytes(32))
    lines = list(events(pb.WatchReply(sequence=9, gap=True, events=[stored, cleared], snapshot_done=True)))
    assert [line["kind"] for line in lines] == ["gap", "stored", "stored", "cleared", "snapshot_done"]
    assert [(line["id"], line["depth"], line["tokens"]) for line in lines[1:3]] == [
        ((b"a" * 32).hex(), 4, [0, 1]),
        ((b"b" * 32).hex(), 5, [2, 3]),
    ]
    assert list(map(event_line, lines)) == [
        "gap      events were missed: what came before is out of date  event 9",
        "stored   host    616161616161  block 4      2 tokens: 0 1",
        "stored   host    626262626262  block 5      2 tokens: 2 3",
        "cleared          all of 000000000000  event 9",
        "snapshot is complete: events follow  event 9",
    ]


def test_a_line_of_an_event_fits_80_columns() -> None:
    event = pb.BlockEvent(kind=pb.BlockEvent.REMOVED, tier="remote", root=b"r" * 32, ids=b"a" * 32, depth=99_999)
    for tokens in (b"", b"".join(number.to_bytes(4, "little") for number in range(150_000, 150_064))):
        event.tokens = tokens
        ((line,),) = [map(event_line, events(pb.WatchReply(sequence=10**9, events=[event])))]
        assert 60 < len(line) <= 80, line
        assert "616161616161  block 99999" in line
        assert "event 1000000000" in line or "64 tokens: 150000 150001" in line
    assert len(event_line({"kind": "gap", "sequence": 10**5})) <= 80


def test_a_redis_that_dies_is_shown_by_every_command_though_nobody_uses_it(
    tmp_path: Path, serve: MakeServing, model: ModelId
) -> None:
    (port,) = free_ports(1)
    tokens = json.dumps(list(range(2 * model.block_tokens)))
    with EmbeddedServer(ServerOptions(port=port)) as valkey:
        words = ["--redis-url", valkey.url, "--set", "tiers.redis.ping_every_s=0.1"]
        server = serve(*words, "--set", "service.metrics_listen=127.0.0.1:0")
        (line,) = [line for line in server.log.read_text().splitlines() if "metrics at" in line]
        with connect(server.address) as store:
            store.open(model)
            save_all(store, Chain(Root(model), json.loads(tokens)))
        assert eventually(lambda: server.values()["redis.available"] == 1, LONG_S)
        assert "does not answer" not in server.ask("status").stdout
    assert eventually(lambda: server.values()["redis.available"] == 0, LONG_S)
    with urllib.request.urlopen(line.split()[-1], timeout=5) as reply:
        assert "kvstore_redis_breaker_closed 0.0" in reply.read().decode()
    for command in ("status", "top --once --every 0.1"):
        shown = server.ask(*command.split())
        assert "redis does not answer: hits are shorter until it does. Why: kvstore doctor" in shown.stdout
        assert shown.returncode == 0  # the sidecar is well
    for command in ("inspect", "warm"):
        shown = server.ask(command, tokens)
        assert (
            shown.stderr
            == "kvstore: redis does not answer: what lies there is not counted (`kvstore doctor` says why)\n"
        )
        assert shown.returncode == 0
    cleared = server.ask("clear", "--yes")
    assert cleared.returncode == 2
    assert cleared.stderr.startswith("kvstore: the server's memory was cleared, but not all below it (redis: ")
    assert server.values()["host.blocks"] == 0
    assert server.ask("doctor").returncode == 1


def test_the_model_of_a_running_server_makes_a_file_for_inspect(
    tmp_path: Path, serve: MakeServing, model: ModelId
) -> None:
    server = serve()
    none = server.ask("inspect", "[1]")
    assert none.returncode == 2
    assert "no engine has opened a model since this server started" in none.stderr
    tokens = json.dumps(list(range(2 * model.block_tokens)))
    with connect(server.address) as store:
        store.open(model)
        store.open(replace(model, model="other"))
        save_all(store, Chain(Root(model), json.loads(tokens)))
    assert "2 of 2 blocks are there" in server.ask("inspect", tokens).stdout  # in one alone
    several = server.ask("inspect", json.dumps([7] * 2 * model.block_tokens))
    assert several.returncode == 2
    assert "jq '.models[N]' > model.json" in several.stderr
    file = tmp_path / "model.json"
    for at, opened in enumerate(json.loads(server.ask("status", "--json").stdout)["models"]):
        file.write_text(json.dumps(opened))  # what jq '.models[N]' prints
        found = server.ask("inspect", tokens, "--model", str(file))
        there = opened["model"] == model.model
        assert f"{2 * there} of 2 blocks are there" in found.stdout, (at, found)
        assert found.stderr == ""
    file.write_text(json.dumps({**opened, "revision": "another"}))
    assert "no engine has opened this very model here" in server.ask("inspect", tokens, "--model", str(file)).stderr


def test_a_narrow_terminal_has_ids_by_their_beginning_and_all_columns(serve: MakeServing, model: ModelId) -> None:
    server = serve()
    block = "ab" * 32
    wide = server.ask("inspect", block).stdout
    assert block in wide
    assert "whole ids" not in wide
    console = Console(file=io.StringIO(), width=80)
    info = pb.BlockInfo(id=bytes.fromhex(block), tiers=["host", "redis"], resident=True)
    console.print(blocks_table([info], along=True, whole_ids=False))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert {"block", "id", "where", "parts", "pins", "children", "tokens"} == set(text.splitlines()[0].split())
    assert "abababababab " in text
    assert "1 of 1 blocks are there; --json has whole ids" in text
