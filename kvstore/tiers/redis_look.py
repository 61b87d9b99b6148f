# SPDX-License-Identifier: Apache-2.0
"""What can be said of a server from outside, for `kvstore doctor`: versions, settings, clocks, rights, foreign keys.

Nothing is changed.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace

from kvstore.errors import TierTimeout
from kvstore.tiers.redis_accounting import Accounting
from kvstore.tiers.redis_mend import Mender
from kvstore.tiers.redis_names import Names
from kvstore.tiers.redis_nodes import Nodes, Options, Talk, many
from kvstore.tiers.redis_rights import trial
from kvstore.tiers.redis_wire import command, integer


@dataclass(frozen=True, slots=True)
class Server:
    """One primary.

    Attributes:
        kind: "valkey" or "redis".
        version: as it says.
        maxmemory_bytes: 0 for no limit.
        policy: what it does at that limit.
        memory_bytes: of its host.
        ahead_s: by how much its clock is ahead of this host's.
        in_cluster: whether it is a node of a Cluster.
    """

    kind: str
    version: str
    maxmemory_bytes: int
    policy: str
    memory_bytes: int
    ahead_s: float
    in_cluster: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen.

    Attributes:
        servers: the primaries; none where the user may not ask.
        is_cluster: whether they are one.
        took_s: until the first of them had answered.
        lacking: commands the user may not run, or not on our keys.
        foreign: keys of the accounting with what another program put there; None where looking took too long.
        refusal: what a server that takes no writes now answers to one.
    """

    servers: tuple[Server, ...]
    is_cluster: bool
    took_s: float
    lacking: tuple[str, ...] = ()
    foreign: dict[str, str] | None = field(default_factory=dict)
    refusal: str = ""

    @property
    def is_part(self) -> bool:
        """It is a node of a Cluster, and the URL does not say so: only what lies there would be seen."""
        return not self.is_cluster and any(server.in_cluster for server in self.servers)


def look(url: str, num_buckets: int, timeout_s: float, scan_s: float) -> Look:
    """Look at the server or servers of a URL. Raises TierError, or ConfigError for the URL.

    Args:
        url, num_buckets: as in `RedisTier.Options`.
        timeout_s: for all but looking through keys.
        scan_s: for that.
    """
    deadline = time.monotonic() + timeout_s
    nodes = Nodes(url, num_buckets, Options(1, 1, timeout_s, 0.0), lambda works: None)
    with contextlib.closing(nodes):
        began_s = time.monotonic()
        lacking, refusal = trial(nodes, deadline)
        took_s = time.monotonic() - began_s
        if lacking:
            return Look((), nodes.is_cluster, took_s, tuple(sorted(lacking)))
        with nodes.talk(deadline) as talk:
            servers = tuple(_server(talk, place, deadline) for place in talk.places(deadline))
        seen = Look(servers, nodes.is_cluster, took_s, refusal=refusal)
        return seen if seen.is_part else replace(seen, foreign=_foreign(nodes, num_buckets, scan_s))


def _server(talk: Talk, place: int, deadline: float) -> Server:
    before_s = time.time()
    now, about, memory = many(
        talk, [command("TIME"), command("INFO", "server"), command("INFO", "memory")], deadline, place=place
    )
    here_s = (before_s + time.time()) / 2
    text = b"\n".join(each for each in (about, memory) if isinstance(each, bytes)).decode(errors="replace")
    info = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    seconds = integer(now[0]) if isinstance(now, list) and now and isinstance(now[0], bytes) else here_s
    return Server(
        kind="valkey" if "valkey_version" in info else "redis",
        version=info.get("valkey_version", info.get("redis_version", "0")),
        maxmemory_bytes=int(info.get("maxmemory", "0")),
        policy=info.get("maxmemory_policy", "noeviction"),
        memory_bytes=int(info.get("total_system_memory", "0")),
        ahead_s=seconds - here_s,
        in_cluster="cluster" in (info.get("redis_mode"), info.get("server_mode")),
    )


def _foreign(nodes: Nodes, num_buckets: int, scan_s: float) -> dict[str, str] | None:
    deadline = time.monotonic() + scan_s
    try:
        with nodes.talk(deadline) as talk:
            return Mender(Accounting(Names(num_buckets), 0)).foreign(talk, deadline)
    except TierTimeout:
        return None
