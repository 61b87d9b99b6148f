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
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from kvstore import native
from kvstore.block import FORMAT_VERSION, hash_chain
from kvstore.config import StoreConfig
from kvstore.errors import AccessDenied, ConfigError, KVStoreError, ServiceUnavailable
from kvstore.service.admin import Admin, Target
from kvstore.service.knock import knock
from kvstore.service.preflight import Needs, preflight
from kvstore.service.rights import Gate, read_secret
from kvstore.service_options import socket_path
from kvstore.store import NOT_CHECKED

_REDIS_TIMEOUT_S = 2.0
_DOOR_TIMEOUT_S = 2.0
_LEAST_VERSION = {"redis": (7, 0), "valkey": (7, 2)}
_PROBES = 20
_SLOW_RPC_S = 0.01
_HIDDEN = "***"
_CLUSTER = "+cluster://"


class Verdict(Enum):
    OK = "ok"
    PROBLEM = "problem"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was seen, and for a problem what to do."""

    name: str
    verdict: Verdict
    detail: str
    fix: str = ""


def _ok(name: str, detail: str) -> Finding:
    return Finding(name, Verdict.OK, detail)


def _problem(name: str, detail: str, fix: str) -> Finding:
    return Finding(name, Verdict.PROBLEM, detail, fix)


def _note(name: str, detail: str, fix: str = "") -> Finding:
    return Finding(name, Verdict.NOTE, detail, fix)


def examine(config: StoreConfig, target: Target, *, expected: bool = True) -> Iterator[Finding]:
    """Every check, as it is made. `expected`: that no server was ever started there is a problem."""
    path = socket_path(target.address)
    yield _libraries()
    yield _hashing()
    if path is not None or config.service.tcp_addresses:  # else it is another host's server that is asked
        yield _rights(config)
    settings: dict[str, str] = {}
    running = False
    if not expected and path is not None and not path.exists():
        yield _note("server", f"none yet: {path} does not exist", "kvstore serve")
    else:
        yield _socket(target.address)
        running = yield from _met(target, settings)
    if path is not None or config.tiers or any(key.startswith("tiers.") for key in settings):
        yield from _redis_servers(config, settings)
    else:
        yield _note(
            "redis", "not looked at: no settings of a lower tier are known here", "give doctor the same --config"
        )
    yield from _memory(config, running)


def _met(target: Target, settings: dict[str, str]) -> Generator[Finding, None, bool]:
    """What the server says, and whether it let us in; its settings, as far as it shows them, go into `settings`."""
    running = False
    try:
        with Admin(target, name="kvstore doctor") as admin:
            running = True
            yield from _server(admin, settings)
    except ServiceUnavailable as error:
        yield _problem("server", str(error), "kvstore serve")
    except AccessDenied as error:
        yield _problem("server", f"it lets us not in: {error}", "set KVSTORE_TOKEN to a token of its tokens file")
    except KVStoreError as error:
        yield _problem("server", str(error), "install the same version of kvstore on both sides")
    return running


# ---- this installation ----


def _libraries() -> Finding:
    return _ok("libraries", ", ".join(f"{name} {version(name)}" for name in ("kvstore", "grpcio", "protobuf", "redis")))


def _hashing() -> Finding:
    """The chain hashed in C and in Python: two ways that must never differ."""
    tokens = bytes(range(256)) * 4
    head = b"kvblock1" + (64).to_bytes(4, "little") + bytes(4)
    fast = native.hash_chain(bytes(32), head, tokens, 256)
    if fast is None:
        return _note("hashing", "in Python: three times slower than in C", "install a C compiler, then kvstore again")
    if list(fast) != hash_chain(bytes(32), head, tokens, 256):
        return _problem("hashing", "C and Python give different hashes", "reinstall kvstore: its C module is broken")
    return _ok("hashing", f"in C, the same as in Python; format {FORMAT_VERSION}")


def _rights(config: StoreConfig) -> Finding:
    try:
        Gate(config.service)
        read_secret(config.service)
    except KVStoreError as error:
        return _problem("rights", str(error), "as the line says")
    options = config.service
    if options.serve_anyone_on_the_network_without_authentication and options.tcp_addresses:
        return _problem(
            "rights",
            f"{', '.join(options.tcp_addresses)} serves anyone who reaches it",
            "set service.tls_cert, service.tls_key and service.tokens_file, and take the flag away",
        )
    return _ok("rights", "TLS and access are set" if options.tcp_addresses else "Unix socket only")


# ---- the server ----


def _socket(address: str) -> Finding:
    path = socket_path(address)
    if path is None:
        return _ok("socket", f"{address} (TCP)")
    try:
        status = path.stat()
    except FileNotFoundError:
        return _problem("socket", f"{path} does not exist", "kvstore serve, or name another with --address")
    except OSError as error:
        return _problem("socket", f"{path}: {error.strerror}", "run as the server's user, or join its group")
    if not stat.S_ISSOCK(status.st_mode):
        return _problem("socket", f"{path} is no socket", f"rm {path}, then kvstore serve")
    if status.st_mode & 0o007:
        return _problem("socket", f"{path} is open to every user", f"chmod o= {path}")
    try:
        with knock(path, _DOOR_TIMEOUT_S) as opened:
            capacity = opened.capacity_bytes / 2**30
    except AccessDenied as error:
        return _note("socket", f"{path} is there, but memory is not shared with us: {error}")
    except KVStoreError as error:
        return _problem("socket", str(error), "kvstore serve; a server that was killed left the socket behind")
    mode = stat.S_IMODE(status.st_mode)
    return _ok("socket", f"{path}, mode {mode:04o}, uid {status.st_uid}; its door gives {capacity:.1f} GiB to map")


def _server(admin: Admin, settings: dict[str, str]) -> Iterator[Finding]:
    opened = admin.opened
    yield _ok("server", f"version {opened.server_version}, boot {opened.boot_id.hex()[:8]}")
    # Open has compared them: a server that hashes differently refuses.
    yield _ok("hash vectors", "client and server give the same ids")
    times_s: list[float] = []
    serving = True
    for _ in range(_PROBES):
        began_s = time.perf_counter()
        serving = admin.serving()
        times_s.append(time.perf_counter() - began_s)
    if not serving:
        yield _problem("health", "the server is stopping: it takes no requests", "kvstore serve, once it is gone")
    middle_s = statistics.median(times_s)
    if middle_s > _SLOW_RPC_S:
        yield _problem(
            "calls", f"take {1e3 * middle_s:.1f} ms", "look for a busy or throttled host (kvstore top, cgroup)"
        )
    else:
        yield _ok("calls", f"take {1e3 * middle_s:.2f} ms (median of {_PROBES})")
    settings.update({setting.key: setting.value for setting in admin.stats().settings})
    yield from _store(admin)


def _store(admin: Admin) -> Iterator[Finding]:
    try:
        faults = admin.check()
    except AccessDenied:
        yield _note("store", "not checked: only an admin may", "use the token of an admin")
        return
    except ServiceUnavailable as error:
        yield _problem("store", str(error), "try again while the server is less busy")
        return
    away = [fault for fault in faults if fault.startswith(NOT_CHECKED)]
    broken = [fault for fault in faults if not fault.startswith(NOT_CHECKED)]
    for fault in broken:
        yield _problem("store", fault, "report it with the server's log; kvstore clear empties the store")
    for fault in away:
        # Blocks in the host are served all the same, and what is wrong with the tier has a line of its own.
        why = fault.removeprefix(NOT_CHECKED).removeprefix(": ")
        yield _note("store", f"no account of a tier that does not answer now ({why})", "see that tier's line")
    if not broken:
        yield _ok("store", "no invariant is broken" + (" in what could be looked at" if away else ""))


# ---- Redis ----


def _redis_servers(config: StoreConfig, settings: dict[str, str]) -> Iterator[Finding]:
    """Of our own settings, and of the running server's, which may have been told otherwise."""
    urls = {name: str(getattr(options, "url", "")) for name, options in config.tiers.items()}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if section.startswith("tiers.") and name == "url":
            urls.setdefault(section.removeprefix("tiers."), value)
    for name, url in urls.items():
        if url == "embedded":
            yield _ok(name, "a server of our own, started with the store")
        elif _HIDDEN in url:
            yield _note(name, f"the server uses {url}, with a password we do not have", "give doctor the same --config")
        elif url:
            yield from _redis(name, url, int(getattr(config.tiers.get(name), "capacity_bytes", 0)))
        yield from _encryption(name, config, settings)
    if not urls:
        yield _note("redis", "no lower tier is configured: blocks are kept on this host only")


def _encryption(name: str, config: StoreConfig, settings: dict[str, str]) -> Iterator[Finding]:
    """Of our own settings, or of the running server's."""
    where = f"{name} encryption"
    path = str(getattr(config.tiers.get(name), "encryption_key_file", ""))
    path = path or settings.get(f"tiers.{name}.encryption_key_file", "")
    if not path:
        yield _note(where, f"off: prompts and KV lie in {name} in the clear (tiers.{name}.encryption_key_file)")
        return
    try:
        from kvstore.wire.seal import Keys

        ids = [key_id.hex() for key_id in Keys.read(path).by_id]
    except ConfigError as error:
        yield _problem(where, str(error), "use the same file on all hosts, readable by the sidecar's user only")
        return
    others = f", {len(ids) - 1} more open what is there" if len(ids) > 1 else ""
    yield _ok(where, f"on: key {ids[0]} seals{others}; the same ids must show on all hosts")


def _redis(name: str, url: str, capacity_bytes: int) -> Iterator[Finding]:
    import redis  # half a second, which no other command is to pay

    try:
        began_s = time.perf_counter()
        primaries = _primaries(url)
        took_s = time.perf_counter() - began_s
    except (redis.RedisError, redis.exceptions.RedisClusterException, OSError, ValueError, ConfigError) as error:
        yield _problem(name, f"does not answer: {error}", f"check tiers.{name}.url, the network, user and password")
        return
    number_of = f", {len(primaries)} primaries" if len(primaries) > 1 else ""
    for info in primaries:
        kind = "valkey" if "valkey_version" in info else "redis"
        number = str(info.get("valkey_version", info.get("redis_version", "0")))
        least = _LEAST_VERSION[kind]
        if tuple(int(part) for part in number.split(".")[:2] if part.isdigit()) < least:
            yield _problem(name, f"{kind} {number}", f"use {kind} {least[0]}.{least[1]} or later")
            break
    else:
        yield _ok(name, f"{kind} {number}{number_of}, answers in {1e3 * took_s:.1f} ms")
    policy = next((each for info in primaries if (each := str(info.get("maxmemory_policy"))) != "noeviction"), None)
    if policy is not None:
        yield _problem(
            f"{name} maxmemory-policy",
            f"{policy}: the server itself tears holes into chains",
            "CONFIG SET maxmemory-policy noeviction (kvstore evicts by itself, tails first)",
        )
    yield _maxmemory(name, primaries, capacity_bytes)


def _primaries(url: str) -> list[dict[str, Any]]:
    """What a server says about itself, or the primary that Sentinels know, or each primary of a Cluster."""
    import redis

    from kvstore.tiers.redis_sentinel import Sentinels

    limits = {"socket_connect_timeout": _REDIS_TIMEOUT_S, "socket_timeout": _REDIS_TIMEOUT_S}
    sentinels = Sentinels.of(url)
    if sentinels is not None:
        host, port = sentinels.primary(_REDIS_TIMEOUT_S)
        parts = urlsplit(sentinels.server_url)
        login, at, _ = parts.netloc.rpartition("@")
        url = parts._replace(netloc=f"{login}{at}{f'[{host}]' if ':' in host else host}:{port}").geturl()
    if _CLUSTER not in url:
        with redis.Redis.from_url(url, **limits) as client:
            return [{**client.info("server"), **client.info("memory")}]
    # redis-py takes one node of a Cluster, and asks it for the others.
    first = urlsplit(url.replace(_CLUSTER, "://"))
    cluster = redis.RedisCluster.from_url(first._replace(netloc=first.netloc.partition(",")[0]).geturl(), **limits)
    try:
        nodes = cluster.get_primaries()  # type: ignore[no-untyped-call]
        return [
            {**cluster.info("server", target_nodes=node), **cluster.info("memory", target_nodes=node)} for node in nodes
        ]
    finally:
        cluster.close()


def _maxmemory(name: str, primaries: list[dict[str, Any]], capacity_bytes: int) -> Finding:
    """Room for what is accounted, and a quarter more: connections, hashes and sets, and what the allocator rounds up.

    A value of a power of two and its header fall into the next size class of jemalloc, a quarter above; the tier counts
    that where the server uses jemalloc.
    """
    where = f"{name} maxmemory"
    limits = [int(info.get("maxmemory", 0)) for info in primaries]
    least_bytes = capacity_bytes * 5 // 4 // len(primaries)
    if all(limits) and min(limits) >= least_bytes:
        budget = f"{(capacity_bytes or sum(limits) * 4 // 5) / 2**30:.2f} GiB of it for blocks"
        return _ok(where, f"{sum(limits) / 2**30:.2f} GiB, {budget}")
    if all(limits):
        return _problem(
            where,
            f"{min(limits) / 2**20:.0f} MiB a node is less than 1.25 times its share of tiers.{name}.capacity_bytes "
            f"({capacity_bytes / 2**20:.0f} MiB in all): writes are refused before blocks are evicted",
            f"CONFIG SET maxmemory {-(-least_bytes >> 20) + 1}mb, or leave capacity_bytes out (80 % of maxmemory)",
        )
    if capacity_bytes:
        return _note(
            where,
            f"none; tiers.{name}.capacity_bytes is set, but what other clients write is not bounded",
            f"CONFIG SET maxmemory {(least_bytes >> 20) + 1}mb (1.25 times capacity_bytes)",
        )
    total = int(primaries[0].get("total_system_memory", 0))
    return _problem(
        where,
        "has no limit: the server grows until its host is out of memory",
        f"CONFIG SET maxmemory {total * 3 // 4 >> 20 or 4096}mb, or set tiers.{name}.capacity_bytes",
    )


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
        detail = found.available if found.required == "0 B" else f"{found.available} (required: {found.required})"
        if found.ok:
            yield _ok(found.name, detail)
        else:
            yield (_problem if found.needed else _note)(found.name, detail, found.fix)
