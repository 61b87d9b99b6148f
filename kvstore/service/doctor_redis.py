# SPDX-License-Identifier: Apache-2.0
"""What `kvstore doctor` says of lower tiers: the Redis or Valkey servers of our settings, and of a running server's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, TierError
from kvstore.service.findings import Finding, Verdict, note, ok, problem

if TYPE_CHECKING:
    from kvstore.tiers.redis_look import Look, Server

_TIMEOUT_S = 2.0
_SCAN_S = 10.0
"""For looking through the names of all keys: a million take a second."""
_LEAST_VERSION = {"redis": (7, 0), "valkey": (7, 2)}
_HIDDEN = "***"
_SKEW_S = 60.0
_SHOWN = 3
_CURES = {
    "READONLY": "name the primary, an address that leads to it, or its Sentinels (redis+sentinel://…)",
    "OOM": "find what fills it besides kvstore, or raise maxmemory",
    "NOREPLICAS": "bring its replicas back, or CONFIG SET min-replicas-to-write 0",
    "MISCONF": "CONFIG SET save '' (a cache keeps nothing on disk)",
}
"""By what a server answers to writes that it does not take."""
_RULE = "ACL SETUSER kvstore on '>PASSWORD' {rights}"
_LEAST_BUCKETS_OF_CLUSTER = 64
"""Each is one hash slot: of 16 over three nodes one gets 8 and the others 4 each, of 64 they get 22, 24 and 18."""


@dataclass(frozen=True, slots=True)
class Running:
    """What a running server shows of itself: settings by key, counters and gauges by name; empty without one."""

    settings: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """By tier, what it met there when it looked just now."""


@dataclass(frozen=True, slots=True)
class TierSettings:
    """Of a tier on Redis, with their defaults where none are known."""

    capacity_bytes: int = 0
    num_buckets: int = 16
    ttl_s: int = 2 * 86_400

    @classmethod
    def of(cls, options: object) -> TierSettings:
        return cls(**{name: int(getattr(options, name, getattr(cls(), name))) for name in cls.__slots__})


def examine_tiers(config: StoreConfig, running: Running) -> Iterator[Finding]:
    """Of our own settings, and of the running server's, which may have been told otherwise."""
    urls = {name: str(getattr(options, "url", "")) for name, options in config.tiers.items()}
    for key, value in running.settings.items():
        section, _, name = key.rpartition(".")
        if section.startswith("tiers.") and name == "url":
            urls.setdefault(section.removeprefix("tiers."), value)
    for name, url in urls.items():
        gone = False
        if url == "embedded":
            yield ok(name, "a server of our own, started with the store")
        elif _HIDDEN in url:
            yield note(name, f"the server uses {url}, with a password we do not have", "give doctor the same --config")
        elif url:
            mended = int(running.values.get(f"{name}.foreign_books", 0))
            for finding in examine_redis(name, url, TierSettings.of(config.tiers.get(name)), mended):
                gone |= finding.name in (name, f"{name} user") and finding.verdict is Verdict.PROBLEM
                yield finding
        if not gone:
            yield from _of_running(name, running)
        yield from _encryption(name, config, running.settings)
    if not urls:
        yield note("redis", "no lower tier is configured: blocks are kept on this host only")


def _of_running(name: str, running: Running) -> Iterator[Finding]:
    """What the running server meets there, whose user and password may be others than ours."""
    away = running.values.get(f"{name}.available") == 0
    if not away and running.values.get(f"{name}.may_write", 1):
        return
    why = running.failures.get(name, "")
    if not away:
        told = f"its user may not write there, and only what is there already is loaded: {why}".rstrip(": ")
        yield problem(f"{name} of the server", told, cure(why) or cure("NOPERM"))
        return
    told = "the running server gets no answer from it, and serves what is in its own memory alone"
    fix = "look in the server's log: its network, user or password are not those of this command"
    if cured := cure(why):
        told, fix = f"it refuses the running server, which serves what is in its own memory alone: {why}", cured
    yield problem(f"{name} of the server", told, fix)


def cure(why: str) -> str:
    """Of what a server said when it refused us; empty for other failures."""
    from kvstore.tiers.redis_rights import least_rights

    if "NOPERM" in why or "unknown command" in why:
        return f"{_RULE.format(rights=least_rights(cluster='cluster|' in why))}, on every node"
    if "cluster support disabled" in why:
        return "this server is no Cluster: use redis://"
    if "NOAUTH" in why or "Authentication required" in why:
        return "the server wants a password: put it into the URL"
    if "WRONGPASS" in why or "invalid username-password" in why:
        return "the server knows no such user or password: put those that it has into the URL"
    return ""


def _encryption(name: str, config: StoreConfig, settings: dict[str, str]) -> Iterator[Finding]:
    """Of our own settings, or of the running server's."""
    where = f"{name} encryption"
    path = str(getattr(config.tiers.get(name), "encryption_key_file", ""))
    path = path or settings.get(f"tiers.{name}.encryption_key_file", "")
    if not path:
        yield note(where, f"off: prompts and KV lie in {name} in the clear (tiers.{name}.encryption_key_file)")
        return
    try:
        from kvstore.wire.seal import Keys

        ids = [key_id.hex() for key_id in Keys.read(path).by_id]
    except ConfigError as error:
        yield problem(where, str(error), "use the same file on all hosts, readable by the sidecar's user only")
        return
    others = f", {len(ids) - 1} more open what is there" if len(ids) > 1 else ""
    yield ok(where, f"on: key {ids[0]} seals{others}; the same ids must show on all hosts")


def examine_redis(name: str, url: str, settings: TierSettings | None = None, num_mended: int = 0) -> Iterator[Finding]:
    """The primaries of one URL.

    Args:
        name, url: of the tier.
        settings: how it is set.
        num_mended: keys of other programs that a running server took away since its start.
    """
    from kvstore.tiers.redis_look import look  # half a second, which no other command is to pay

    settings = settings or TierSettings()
    try:
        seen = look(url, settings.num_buckets, _TIMEOUT_S, _SCAN_S)
    except (TierError, ConfigError) as error:
        cured = cure(str(error))
        fix = cured or f"check tiers.{name}.url, the network, user and password"
        yield problem(name, f"{'refuses us' if cured else 'does not answer'}: {error}", fix)
        return
    if seen.is_part:
        yield problem(
            f"{name} url",
            "it is a node of a Cluster: what lies on others is neither found nor written",
            f"set tiers.{name}.url to redis+cluster://HOST:PORT,HOST:PORT with some of its nodes",
        )
        return
    if seen.lacking:
        yield ok(name, f"answers in {1e3 * seen.took_s:.1f} ms")
    else:
        yield from _servers(name, seen, settings)
    if seen.refusal:
        fix = _CURES.get(seen.refusal.partition(" ")[0], "see what the server's log says of it")
        yield problem(f"{name} writes", f"none is taken now: {seen.refusal}", fix)
    yield _user(f"{name} user", url, seen)
    if not seen.lacking:
        yield _accounts(f"{name} accounts", seen, num_mended)
        yield about_clock(f"{name} clock", seen, settings.ttl_s)


def _servers(name: str, seen: Look, settings: TierSettings) -> Iterator[Finding]:
    number_of = f", {len(seen.servers)} primaries" if len(seen.servers) > 1 else ""
    for server in seen.servers:
        least = _LEAST_VERSION[server.kind]
        if tuple(int(part) for part in server.version.split(".")[:2] if part.isdigit()) < least:
            yield problem(name, f"{server.kind} {server.version}", f"use {server.kind} {least[0]}.{least[1]} or later")
            break
    else:
        yield ok(name, f"{server.kind} {server.version}{number_of}, answers in {1e3 * seen.took_s:.1f} ms")
    policy = next((server.policy for server in seen.servers if server.policy != "noeviction"), None)
    if policy is not None:
        yield problem(
            f"{name} maxmemory-policy",
            f"{policy}: the server itself tears holes into chains",
            "CONFIG SET maxmemory-policy noeviction (kvstore evicts by itself, tails first)",
        )
    if seen.is_cluster and settings.num_buckets < _LEAST_BUCKETS_OF_CLUSTER:
        yield note(
            f"{name} buckets",
            f"{settings.num_buckets} over {len(seen.servers)} primaries: some nodes hold more than others",
            f"set tiers.{name}.num_buckets to {_LEAST_BUCKETS_OF_CLUSTER} or more, the same on all hosts",
        )
    yield _maxmemory(name, seen.servers, settings.capacity_bytes)


def _maxmemory(name: str, servers: tuple[Server, ...], capacity_bytes: int) -> Finding:
    """Room for what is accounted, and a quarter more: connections, hashes and sets, and what the allocator rounds up.

    A value of a power of two and its header fall into the next size class of jemalloc, a quarter above; the tier counts
    that where the server uses jemalloc.
    """
    where = f"{name} maxmemory"
    limits = [server.maxmemory_bytes for server in servers]
    least_bytes = capacity_bytes * 5 // 4 // len(servers)
    if all(limits) and min(limits) >= least_bytes:
        budget = f"{(capacity_bytes or sum(limits) * 4 // 5) / 2**30:.2f} GiB of it for blocks"
        return ok(where, f"{sum(limits) / 2**30:.2f} GiB, {budget}")
    if all(limits):
        return problem(
            where,
            f"{min(limits) / 2**20:.0f} MiB a node is less than 1.25 times its share of tiers.{name}.capacity_bytes "
            f"({capacity_bytes / 2**20:.0f} MiB in all): writes are refused before blocks are evicted",
            f"CONFIG SET maxmemory {-(-least_bytes >> 20) + 1}mb, or leave capacity_bytes out (80 % of maxmemory)",
        )
    if capacity_bytes:
        return note(
            where,
            f"none; tiers.{name}.capacity_bytes is set, but what other clients write is not bounded",
            f"CONFIG SET maxmemory {(least_bytes >> 20) + 1}mb (1.25 times capacity_bytes)",
        )
    return problem(
        where,
        "has no limit: the server grows until its host is out of memory",
        f"CONFIG SET maxmemory {servers[0].memory_bytes * 3 // 4 >> 20 or 4096}mb, or set tiers.{name}.capacity_bytes",
    )


def _user(where: str, url: str, seen: Look) -> Finding:
    from kvstore.tiers.redis_rights import least_rights

    rule = _RULE.format(rights=least_rights(cluster=seen.is_cluster))
    if seen.lacking:
        shown = ", ".join(seen.lacking)
        return problem(where, f"is not let run, or not on kvs2:*, what is needed: {shown}", f"{rule}, on every node")
    return ok(where, f"may do all that is needed; enough would be: {rule}")


def _accounts(where: str, seen: Look, num_mended: int) -> Finding:
    so_far = f"; {num_mended} were taken away since the server's start" if num_mended else ""
    if seen.foreign is None:
        return note(where, f"not looked through: the names of all keys took more than {_SCAN_S:.0f} s{so_far}")
    if not seen.foreign:
        return ok(where, f"no key of another program in them{so_far}")
    names = [f"{name} holds a {kind}" for name, kind in list(seen.foreign.items())[:_SHOWN]]
    more = f", and {len(seen.foreign) - _SHOWN} more" if len(seen.foreign) > _SHOWN else ""
    return problem(
        where,
        f"{', '.join(names)}{more}: another program writes under our names{so_far}",
        "give it another database or server (what it put there is taken away, and rebuilt, as kvstore meets it)",
    )


def about_clock(where: str, seen: Look, ttl_s: int) -> Finding:
    """Scores do not follow it; but the time to live of values does.

    Set forward by what they have left, it ends them all at once: a cold cache, no more. Those in use have half of the
    TTL left at least. Set back, it only makes them live longer.
    """
    behind_s = -min(server.ahead_s for server in seen.servers)
    furthest_s = max((server.ahead_s for server in seen.servers), key=abs)
    if ttl_s and behind_s >= ttl_s / 2:
        return problem(
            where,
            f"{behind_s:.0f} s behind this host's: once it is set right, all values end by their time to live",
            "set the server's clock now, while there is little to lose, and keep it by NTP",
        )
    if abs(furthest_s) >= _SKEW_S:
        way = "ahead of" if furthest_s > 0 else "behind"
        return note(where, f"{abs(furthest_s):.0f} s {way} this host's: one of the two is wrong", "keep both by NTP")
    return ok(where, f"within {max(1.0, abs(furthest_s)):.0f} s of this host's")
