# SPDX-License-Identifier: Apache-2.0
"""What can be said of a server from outside, for `kvstore doctor`: versions, settings, clocks, rights, foreign keys.

Nothing is changed: what the user may do is asked by queueing each command in a transaction that is never executed,
since the server refuses at once what it would not let run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvstore.errors import TierError, TierTimeout
from kvstore.tiers.redis_accounting import Accounting
from kvstore.tiers.redis_mend import Mender
from kvstore.tiers.redis_names import Names, prefix
from kvstore.tiers.redis_nodes import MOVING, Nodes, Options, Talk, many
from kvstore.tiers.redis_wire import Reply, ReplyError, command, integer

_KEY = f"{prefix(0)}probe"
_BY_WORDS: dict[str, tuple[str | int, ...]] = {
    "decrby": (_KEY, 1),
    "del": (_KEY,),
    "eval": ("return 0", 1, _KEY),
    "exists": (_KEY,),
    "expire": (_KEY, 1),
    "get": (_KEY,),
    "getrange": (_KEY, 0, 1),
    "hdel": (_KEY, "f"),
    "hexists": (_KEY, "f"),
    "hget": (_KEY, "f"),
    "hgetall": (_KEY,),
    "hkeys": (_KEY,),
    "hset": (_KEY, "f", 1),
    "hsetnx": (_KEY, "f", 1),
    "incrby": (_KEY, 1),
    "info": (),
    "mget": (_KEY,),
    "ping": (),
    "sadd": (_KEY, "m"),
    "scan": (0,),
    "set": (_KEY, 1),
    "sismember": (_KEY, "m"),
    "srem": (_KEY, "m"),
    "strlen": (_KEY,),
    "time": (),
    "ttl": (_KEY,),
    "type": (_KEY,),
    "unlink": (_KEY,),
    "zadd": (_KEY, 1, "m"),
    "zmscore": (_KEY, "m"),
    "zrange": (_KEY, 0, 0),
    "zrangebyscore": (_KEY, 0, 0),
    "zrem": (_KEY, "m"),
    "zrevrange": (_KEY, 0, 0),
    "zrevrangebyscore": (_KEY, 0, 0),
    "zscore": (_KEY, "m"),
}
"""What the tier says itself or in its scripts, which run with the user's rights, and words to ask with."""
_OF_CLUSTERS: dict[str, tuple[str | int, ...]] = {"asking": (), "cluster|slots": ()}
COMMANDS = tuple(sorted([*_BY_WORDS, "exec", "multi"]))
COMMANDS_OF_CLUSTERS = tuple(sorted(_OF_CLUSTERS))
KEYS = "kvs2:*"


def least_rights(*, cluster: bool) -> str:
    """Rules of an ACL user who may do what the tier does, and no more; `+select` beside it for another database."""
    commands = sorted((*COMMANDS, *COMMANDS_OF_CLUSTERS)) if cluster else COMMANDS
    return f"resetkeys ~{KEYS} resetchannels -@all " + " ".join(f"+{each}" for each in commands)


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
        lacking, refusal = _trial(nodes, deadline)
        took_s = time.monotonic() - began_s
        if lacking:
            return Look((), nodes.is_cluster, took_s, tuple(sorted(lacking)))
        with nodes.talk(deadline) as talk:
            servers = tuple(_server(talk, place, deadline) for place in talk.places(deadline))
        seen = Look(servers, nodes.is_cluster, took_s, refusal=refusal)
        return seen if seen.is_part else replace(seen, foreign=_foreign(nodes, num_buckets, scan_s))


def _trial(nodes: Nodes, deadline: float) -> tuple[set[str], str]:
    """Commands that some node does not let us run; and what one that lets us answers to a write where it takes none."""
    asked = _BY_WORDS | (_OF_CLUSTERS if nodes.is_cluster else {})
    try:
        with nodes.talk(deadline) as talk:
            places = talk.places(deadline)
    except TierError as error:
        if nodes.is_cluster and isinstance(error.__cause__, ReplyError) and error.__cause__.code == "NOPERM":
            return {"cluster|slots"}, ""  # without which no node is known that the others could be asked of
        raise
    refused: set[str] = set()
    refusal = ""
    for place in places:
        key = f"{prefix(place)}probe"
        with contextlib.suppress(_Enough), nodes.of_stripe(place, deadline).stores.lease(deadline) as wire:
            wire.send([command("EXEC"), command("MULTI")], deadline)
            begun = {name: wire.reply(deadline) for name in ("exec", "multi")}  # EXEC before MULTI has nothing to do
            refused |= _refused(begun)
            if "multi" not in refused:  # else what follows would be done
                requests = {
                    name: command(*name.split("|"), *(key if word == _KEY else word for word in words))
                    for name, words in asked.items()
                }
                wire.send([b"".join(requests.values())], deadline)
                answers = {name: wire.reply(deadline) for name in requests}
                refused |= _refused(answers)
                refusal = refusal or _refusal(answers["set"])
            raise _Enough  # so that the wire is closed, with what it has queued
    return refused, refusal


class _Enough(Exception):
    pass


def _refused(replies: Mapping[str, Reply | ReplyError]) -> set[str]:
    """Of an EXEC that may not be, the server says that it is aborted because of that."""
    codes = {name: reply.code for name, reply in replies.items() if isinstance(reply, ReplyError)}
    return {name for name, code in codes.items() if code in ("NOPERM", "EXECABORT")}


def _refusal(reply: Reply | ReplyError) -> str:
    is_about_us = isinstance(reply, ReplyError) and reply.code not in MOVING | {"NOPERM", "EXECABORT"}
    return str(reply) if is_about_us else ""


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
