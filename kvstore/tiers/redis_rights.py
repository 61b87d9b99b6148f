# SPDX-License-Identifier: Apache-2.0
"""What our user must be let run, the ACL rule that says so, and whether a server lets it.

Nothing is changed: what the user may do is asked by queueing each command in a transaction that is never executed,
since the server refuses at once what it would not let run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from kvstore.errors import TierError
from kvstore.tiers.redis_errors import MOVING
from kvstore.tiers.redis_names import prefix
from kvstore.tiers.redis_nodes import Nodes
from kvstore.tiers.redis_wire import Reply, ReplyError, command

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


def trial(nodes: Nodes, deadline: float) -> tuple[set[str], str]:
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
            _welcome(begun)
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


def _welcome(replies: Mapping[str, Reply | ReplyError]) -> None:
    """Raise what a server says that runs nothing before it has a password."""
    for reply in replies.values():
        if isinstance(reply, ReplyError) and reply.code == "NOAUTH":
            raise reply


def _refused(replies: Mapping[str, Reply | ReplyError]) -> set[str]:
    """Of an EXEC that may not be, the server says that it is aborted because of that."""
    errors = {name: reply for name, reply in replies.items() if isinstance(reply, ReplyError)}
    return {name for name, error in errors.items() if error.is_denied or error.code == "EXECABORT"}


def _refusal(reply: Reply | ReplyError) -> str:
    if not isinstance(reply, ReplyError) or reply.is_denied or reply.code in MOVING | {"EXECABORT"}:
        return ""
    return str(reply)


def check_rights(nodes: Nodes, deadline: float) -> None:
    """Tell `nodes` whether our user may do all that is needed. Raises TierError where that cannot be asked.

    Where loads lack some, the server is as good as away: its breaker opens, and its probe asks for just these.
    """
    nodes.try_loads(deadline)
    lacking, _ = trial(nodes, deadline)
    why = f"NOPERM our user may not run, or not on {KEYS}, or the server does not know: {', '.join(sorted(lacking))}"
    if not lacking:
        nodes.allow()
    elif not nodes.denied:
        nodes.deny(why)
