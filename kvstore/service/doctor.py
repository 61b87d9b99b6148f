# SPDX-License-Identifier: Apache-2.0
"""`kvstore doctor`: each check is one line that says ok, or what is wrong and how to put it right.

A check never raises and never waits longer than a few seconds; one that cannot be made says so. The server may be
down: what can be seen without it is still checked.
"""

from __future__ import annotations

import stat
import statistics
import time
from collections.abc import Generator, Iterator
from importlib.metadata import version

from kvstore import native
from kvstore.block import FORMAT_VERSION, hash_chain
from kvstore.config import StoreConfig
from kvstore.errors import AccessDenied, KVStoreError, ServiceUnavailable
from kvstore.lower_tiers import NOT_CHECKED
from kvstore.service.admin import Admin, Target
from kvstore.service.doctor_redis import Running, examine_tiers
from kvstore.service.findings import Finding, Verdict, note, ok, problem
from kvstore.service.knock import knock
from kvstore.service.preflight import Needs, preflight, size
from kvstore.service.reach import MayNotConnect
from kvstore.service.rights import Gate, read_secret
from kvstore.service_options import socket_path

_DOOR_TIMEOUT_S = 2.0
_PROBES = 20
_SLOW_RPC_S = 0.01


def examine(config: StoreConfig, target: Target, *, expected: bool = True) -> Iterator[Finding]:
    """Every check, as it is made. `expected`: that no server was ever started there is a problem."""
    path = socket_path(target.address)
    yield _libraries()
    yield _hashing()
    if path is not None or config.service.tcp_addresses:  # else it is another host's server that is asked
        yield _rights(config)
    server = Running()
    running = False
    away: dict[str, Finding] = {}
    if not expected and path is not None and not path.exists():
        yield note("server", f"none yet: {path} does not exist", "kvstore serve")
    else:
        yield _socket(target.address)
        running = yield from _met(target, server, away)
    if config.tiers or server.settings:
        for finding in examine_tiers(config, server):
            if finding.verdict is Verdict.PROBLEM:
                away.pop(finding.name.removesuffix(" of the server"), None)
            yield finding
    else:
        yield note(
            "redis", "not checked: no settings of one are known here", "give the server's --config or --redis-url"
        )
    yield from away.values()  # of tiers that have no line of their own which says so
    yield from _memory(config, running)


def _met(target: Target, server: Running, away: dict[str, Finding]) -> Generator[Finding, None, bool]:
    """What the server says, and whether it let us in; what it shows of itself goes into `server`.

    What it could not look at now goes into `away`, by tier.
    """
    running = False
    try:
        with Admin(target, name="kvstore doctor") as admin:
            running = True
            yield from _server(admin, server)
            yield from _store(admin, server, away)
    except MayNotConnect as error:
        yield problem("server", str(error), "run as the server's user, or join its group")
    except ServiceUnavailable as error:
        yield problem("server", str(error), "kvstore serve")
    except AccessDenied as error:
        yield problem("server", f"it lets us not in: {error}", "set KVSTORE_TOKEN to a token of its tokens file")
    except KVStoreError as error:
        yield problem("server", str(error), "install the same version of kvstore on both sides")
    return running


# ---- this installation ----


def _libraries() -> Finding:
    return ok("libraries", ", ".join(f"{name} {version(name)}" for name in ("kvstore", "grpcio", "protobuf", "redis")))


def _hashing() -> Finding:
    """The chain hashed in C and in Python: two ways that must never differ."""
    tokens = bytes(range(256)) * 4
    head = b"kvblock1" + (64).to_bytes(4, "little") + bytes(4)
    fast = native.hash_chain(bytes(32), head, tokens, 256)
    if fast is None:
        return note("hashing", "in Python: three times slower than in C", "install a C compiler, then kvstore again")
    if list(fast) != hash_chain(bytes(32), head, tokens, 256):
        return problem("hashing", "C and Python give different hashes", "reinstall kvstore: its C module is broken")
    return ok("hashing", f"in C, the same as in Python; format {FORMAT_VERSION}")


def _rights(config: StoreConfig) -> Finding:
    try:
        Gate(config.service)
        read_secret(config.service)
    except KVStoreError as error:
        return problem("rights", str(error), "as the line says")
    options = config.service
    if options.serve_anyone_on_the_network_without_authentication and options.tcp_addresses:
        return problem(
            "rights",
            f"{', '.join(options.tcp_addresses)} serves anyone who reaches it",
            "set service.tls_cert, service.tls_key and service.tokens_file, and take the flag away",
        )
    said = "TLS and access are set" if options.tcp_addresses else "Unix socket only"
    return ok("rights", said + (f"; clients of {options.tokens_file}" if options.tokens_file else ""))


# ---- the server ----


def _socket(address: str) -> Finding:
    path = socket_path(address)
    if path is None:
        return ok("socket", f"{address} (TCP)")
    try:
        status = path.stat()
    except FileNotFoundError:
        return problem("socket", f"{path} does not exist", "kvstore serve, or name another with --address")
    except OSError as error:
        return problem("socket", f"{path}: {error.strerror}", "run as the server's user, or join its group")
    if not stat.S_ISSOCK(status.st_mode):
        return problem("socket", f"{path} is no socket", "name the server's with --address, or move that file away")
    if status.st_mode & 0o007:
        return problem("socket", f"{path} is open to every user", f"chmod o= {path}")
    try:
        with knock(path, _DOOR_TIMEOUT_S) as opened:
            capacity = size(opened.capacity_bytes)
    except AccessDenied as error:
        return note("socket", f"{path} is there, but memory is not shared with us: {error}")
    except KVStoreError as error:
        return problem("socket", str(error), "kvstore serve; a server that was killed left the socket behind")
    mode = stat.S_IMODE(status.st_mode)
    return ok("socket", f"{path}, mode {mode:04o}, uid {status.st_uid}; its door gives {capacity} to map")


def _server(admin: Admin, server: Running) -> Iterator[Finding]:
    opened = admin.opened
    yield ok("server", f"version {opened.server_version}, boot {opened.boot_id.hex()[:8]}")
    # Open has compared them: a server that hashes differently refuses.
    yield ok("hash vectors", "client and server give the same ids")
    times_s: list[float] = []
    serving = True
    for _ in range(_PROBES):
        began_s = time.perf_counter()
        serving = admin.serving()
        times_s.append(time.perf_counter() - began_s)
    if not serving:
        yield problem("health", "the server is stopping: it takes no requests", "kvstore serve, once it is gone")
    middle_s = statistics.median(times_s)
    if middle_s > _SLOW_RPC_S:
        yield problem(
            "calls", f"take {1e3 * middle_s:.1f} ms", "look for a busy or throttled host (kvstore top, cgroup)"
        )
    else:
        yield ok("calls", f"take {1e3 * middle_s:.2f} ms (median of {_PROBES})")
    stats = admin.stats()
    server.settings.update({setting.key: setting.value for setting in stats.settings})
    server.values.update(stats.values)


def _store(admin: Admin, server: Running, away: dict[str, Finding]) -> Iterator[Finding]:
    try:
        faults = admin.check()
    except AccessDenied:
        yield note("store", "not checked: only an admin may", "use the token of an admin")
        return
    except ServiceUnavailable as error:
        yield problem("store", str(error), "try again while the server is less busy")
        return
    broken = [fault for fault in faults if not fault.startswith(NOT_CHECKED)]
    for fault in broken:
        yield problem("store", fault, "report it with the server's log; kvstore clear empties the store")
    for fault in faults:
        if fault.startswith(NOT_CHECKED):  # blocks in the host are served all the same
            tier, _, why = fault.removeprefix(NOT_CHECKED).removeprefix(": ").partition(": ")
            server.failures[tier] = why
            away[tier] = note("store", f"{tier} was not looked at, since it did not answer: {why}", "run this again")
    if not broken:
        yield ok("store", "no invariant is broken" + (" in what could be looked at" if away else ""))


# ---- memory ----


def _memory(config: StoreConfig, running: bool) -> Iterator[Finding]:
    """What the host must have; a server that runs has its memory already."""
    options = config.service
    capacity_bytes = 0 if running else config.host.capacity_bytes
    needs = Needs(
        capacity_bytes=capacity_bytes,
        pin_memory=options.pin_memory,
        huge_pages=config.host.huge_pages,
        numa_node=config.host.numa_node,
        max_sessions=options.max_sessions,
    )
    for found in preflight(needs):
        detail = found.available if found.required in ("", "0 B") else f"{found.available} (required: {found.required})"
        if found.ok:
            yield ok(found.name, detail)
        else:
            yield (problem if found.needed else note)(found.name, detail, found.fix)
