# SPDX-License-Identifier: Apache-2.0
"""The servers behind one URL: one, or the primaries of a Cluster; which keys lie where, and talking to all of them.

Everything of a stripe (`redis_names`) lies in one hash slot, so a stripe is what moves between nodes, and a command
goes where the hash tag in its bytes says, as in the server itself. The topology is asked for when first needed, and
again when a node redirects, refuses or fails. Each node has connections and a breaker of its own: one that died costs
the keys it held, until its replica has taken over.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit, urlunsplit

from redis.crc import key_slot

from kvstore.errors import ConfigError, TierError, TierUnavailable
from kvstore.tiers.redis_breaker import Breaker
from kvstore.tiers.redis_errors import MOVING, TIER, Denied, Refused, map_redis_errors
from kvstore.tiers.redis_pool import Address, Connections, Place
from kvstore.tiers.redis_sentinel import Sentinels
from kvstore.tiers.redis_wire import ProtocolBroken, Reply, ReplyError, Wire, command

log = logging.getLogger("kvstore.tiers.redis")

_CLUSTER = "+cluster"
_REFRESH_EVERY_S = 0.1
_ROUNDS = 3
"""How often a command follows redirections."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to reach nodes; see `RedisTier.Options`."""

    connections: int
    lanes: int
    connect_timeout_s: float
    breaker_open_s: float


class Node:
    """One server: connections for loads, those that large loads take beside, as many as for loads for all else.

    One breaker for all.
    """

    def __init__(self, url: str, options: Options, changed: Callable[[bool], None], place: Place) -> None:
        self.address = place if isinstance(place, tuple) else None
        self.breaker = Breaker(options.breaker_open_s, changed)
        how = (options.connect_timeout_s, self.breaker, place)
        self.loads = Connections(url, options.connections, *how)
        self.lanes = Connections(url, options.lanes - 1, *how)
        self.stores = Connections(url, options.connections, *how)
        self.breaker.probe = self.stores.probe

    def close(self) -> None:
        self.breaker.close()
        for each in (self.loads, self.lanes, self.stores):
            each.close()


class Nodes:
    """All nodes of one URL. Thread-safe.

    Args:
        url: as redis-py reads them; `redis+cluster://host:port,host:port` (or `rediss+cluster`) names some nodes of a
            Cluster, which names the rest; `redis+sentinel://…` Sentinels that know the primary (`redis_sentinel`).
        num_stripes: stripes to find nodes for.
        changed: told True when all nodes in use work, False when one does not.
    """

    def __init__(self, url: str, num_stripes: int, options: Options, changed: Callable[[bool], None]) -> None:
        self._sentinels = Sentinels.of(url)
        self.is_cluster, self._url, self._seeds = _parse(self._sentinels.server_url if self._sentinels else url)
        self._options = options
        self._changed = changed
        self.noted: Callable[[bool], None] = lambda may_write: None
        """Told False when our user turns out to have the rights for loads and not all others, True when it has."""
        self.denied = ""
        """What the server said of that; empty where nothing is known to be denied."""
        self._lock = threading.Lock()
        self._slots = [key_slot(b"{%03d}" % stripe) for stripe in range(num_stripes)]
        self._known: dict[Address | None, Node] = {}
        self._of_stripe: list[Node] = []
        self._refreshed_at = float("-inf")
        self._stale = self.is_cluster
        first = self._node(self._seeds[0] if self.is_cluster else None)
        if not self.is_cluster:
            self._of_stripe = [first] * num_stripes

    def _node(self, address: Address | None) -> Node:
        node = self._known.get(address)
        if node is None:
            place = self._sentinels.primary if self._sentinels else address
            node = self._known[address] = Node(self._url, self._options, lambda _: self._tell(), place)
        return node

    def _tell(self) -> None:
        """Say how it stands now. One that died and whose replica took over is in nobody's way."""
        with self._lock:
            used = self._of_stripe or self._known.values()
            self._changed(not any(node.breaker.is_open for node in used))

    # ── topology ───────────────────────────────────────────────────────────────────────────────────────────────

    def of_stripe(self, stripe: int, deadline: float) -> Node:
        """The primary that holds a stripe. Raises TierError where the topology is not to be had."""
        if self._stale:
            self._refresh(deadline)
        return self._of_stripe[stripe]

    @property
    def refuses(self) -> bool:
        """Whether every call would be refused now. Of a Cluster each node has its own say: not known."""
        return not self.is_cluster and self._of_stripe[0].breaker.refuses

    def at(self, address: Address) -> Node:
        """The node at an address that another node named."""
        with self._lock:
            return self._node(address)

    def learn(self, to: Redirection) -> None:
        """A node said that a slot is another's now. It knows better than one that has not heard of it yet."""
        with self._lock:
            node = self._node(to.address)
            self._of_stripe = [
                node if slot == to.slot else old for slot, old in zip(self._slots, self._of_stripe, strict=True)
            ]
        self.suspect()

    def suspect(self) -> None:
        """A node redirected us or failed: ask anew before the next command."""
        self._stale = self.is_cluster

    def _refresh(self, deadline: float) -> None:
        with self._lock:
            if not self._stale or (self._of_stripe and time.monotonic() - self._refreshed_at < _REFRESH_EVERY_S):
                return
            self._refreshed_at = time.monotonic()
            candidates = list(dict.fromkeys([*self._of_stripe, *self._known.values(), *map(self._node, self._seeds)]))
        error: TierError = TierUnavailable(TIER, "no node of the cluster is known")
        for node in candidates:
            try:
                limit = min(deadline, time.monotonic() + self._options.connect_timeout_s)  # one that hangs: ask others
                with node.stores.lease(limit) as wire:
                    wire.send([command("CLUSTER", "SLOTS")], limit)
                    reply = wire.reply(limit)
                    if isinstance(reply, ReplyError):  # denied or not: nothing is to be had without it
                        raise TierUnavailable(TIER, f"ReplyError: {reply}") from reply
                    addresses = _primaries(reply, self._slots, node.address)
            except TierError as failed:
                error = failed
                continue
            with self._lock:
                self._of_stripe = [self._node(address) for address in addresses]
                self._stale = False
            self._tell()
            return
        if not self._of_stripe:
            raise error

    def ping(self, silent_s: float) -> float:
        """`Connections.ping` of each node in use; after how many seconds to come again."""
        if self._stale:
            with contextlib.suppress(TierError), map_redis_errors():
                self._refresh(time.monotonic() + self._options.connect_timeout_s)
        left_s = silent_s
        for node in dict.fromkeys(self._of_stripe):
            left_s = min(left_s, node.stores.ping(silent_s))
            if node.breaker.is_open:
                self.suspect()
        return left_s

    def split(self, stripes: Iterable[int], deadline: float) -> dict[Node, list[int]]:
        """Positions of `stripes` by node."""
        nodes: dict[Node, list[int]] = {}
        for position, stripe in enumerate(stripes):
            nodes.setdefault(self.of_stripe(stripe, deadline), []).append(position)
        return nodes

    # ── rights ─────────────────────────────────────────────────────────────────────────────────────────────────

    def try_loads(self, deadline: float) -> None:
        """See whether loads may be had of each node in use. Raises TierError; its breaker learns of it."""
        self.of_stripe(0, deadline)
        for node in dict.fromkeys(self._of_stripe):
            node.stores.try_loads(deadline)

    @contextlib.contextmanager
    def sparing_loads(self) -> Iterator[None]:
        """In a conversation that is no load: what our user may not do there is no failure of it: loads go on."""
        try:
            with map_redis_errors():
                yield
        except Denied as error:
            why = str(error).removeprefix(f"{TIER}: ")
            self.deny(why)
            raise Refused(TIER, why) from error

    def deny(self, why: str) -> None:
        """Something that writes and upkeep need is denied."""
        with self._lock:
            before, self.denied = self.denied, why
        if not before:
            self.noted(False)
            log.warning("redis: is only read until our user may write: %s: `kvstore doctor` has the rule", why)

    def allow(self) -> None:
        """All that is needed is allowed."""
        with self._lock:
            before, self.denied = self.denied, ""
        if before:
            self.noted(True)
            log.info("redis: our user may write again (it was only read after: %s)", before)

    # ── conversations ──────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def talk(self, deadline: float, ask_s: float = math.inf) -> Iterator[Talk]:
        """A conversation with all nodes that is no load; `ask_s`: how long one `ask` may take. Raises TierError."""
        if self.is_cluster:
            with self.sparing_loads():  # what its replies turn out to be
                yield ClusterTalk(self, len(self._slots), ask_s)
            return
        with self._of_stripe[0].stores.lease(deadline) as wire, self.sparing_loads():
            yield Talk(wire, ask_s)

    def close(self) -> None:
        with self._lock:
            nodes = list(self._known.values())
        for node in nodes:
            node.close()


class Talk:
    """Commands to one server, over one wire."""

    by_stripe: ClassVar[bool] = False
    """A command's keys must be of one stripe."""

    def __init__(self, wire: Wire, ask_s: float = math.inf) -> None:
        self.wire = wire
        self._ask_s = ask_s

    def places(self, deadline: float) -> list[int]:
        """A stripe of each node, for commands that are about a node."""
        return [0]

    def ask(self, commands: Sequence[bytes], deadline: float, place: int | None = None) -> list[Reply | ReplyError]:
        """Replies to commands, in order, errors as values; all to the node of stripe `place` where one is given."""
        deadline = min(deadline, time.monotonic() + self._ask_s)
        self.wire.send([b"".join(commands)], deadline)
        return [self.wire.reply(deadline) for _ in commands]

    def ask_in_steps(self, steps: Iterable[Sequence[bytes]], deadline: float) -> list[Reply | ReplyError]:
        """As `ask`, each step sent as soon as it is put together. For short replies: they are read at the end."""
        num_commands = 0
        for commands in steps:
            self.wire.send([b"".join(commands)], deadline)
            num_commands += len(commands)
        return [self.wire.reply(deadline) for _ in range(num_commands)]


class ClusterTalk(Talk):
    """Commands to the nodes of a Cluster, each by its hash tag; node after node.

    No wire is held between calls, nor two at once: conversations cannot wait for each other's.
    """

    by_stripe: ClassVar[bool] = True

    def __init__(self, nodes: Nodes, num_stripes: int, ask_s: float = math.inf) -> None:
        self._nodes = nodes
        self._ask_s = ask_s
        self._num_stripes = num_stripes

    def places(self, deadline: float) -> list[int]:
        return [positions[0] for positions in self._nodes.split(range(self._num_stripes), deadline).values()]

    def ask(self, commands: Sequence[bytes], deadline: float, place: int | None = None) -> list[Reply | ReplyError]:
        """As of one server; a node that failed answers with the error `UNREACHABLE`."""
        deadline = min(deadline, time.monotonic() + self._ask_s)
        replies: list[Reply | ReplyError] = [None] * len(commands)
        pending = list(range(len(commands)))
        for _ in range(_ROUNDS):
            stripes = [stripe_of(commands[at]) if place is None else place for at in pending]
            again: list[int] = []
            for node, positions in self._nodes.split(stripes, deadline).items():
                chosen = [pending[position] for position in positions]
                for at, reply in zip(chosen, self._ask(node, [commands[at] for at in chosen], deadline), strict=True):
                    replies[at] = reply
                    if isinstance(reply, ReplyError) and reply.code in ("MOVED", "UNREACHABLE", "ASK"):
                        again.append(at)
            if not again:
                break
            pending = self._follow(again, commands, replies, deadline)
            if not pending:
                break
        return replies

    def ask_in_steps(self, steps: Iterable[Sequence[bytes]], deadline: float) -> list[Reply | ReplyError]:
        return self.ask([command for commands in steps for command in commands], deadline)

    def _ask(self, node: Node, commands: Sequence[bytes], deadline: float) -> list[Reply | ReplyError]:
        try:
            with node.stores.lease(deadline) as wire:
                return Talk(wire).ask(commands, deadline)
        except TierError as error:
            self._nodes.suspect()
            return [ReplyError(f"UNREACHABLE {error}") for _ in commands]

    def _follow(
        self,
        redirected: Sequence[int],
        commands: Sequence[bytes],
        replies: list[Reply | ReplyError],
        deadline: float,
    ) -> list[int]:
        """Ask where ASK says, for this once; returns what is to be asked again by a newer topology."""
        moved: list[int] = []
        for at in redirected:
            reply = replies[at]
            target = redirection(reply) if isinstance(reply, ReplyError) else None
            if target is None:
                moved.append(at)
            elif not target.asking:
                self._nodes.learn(target)
                moved.append(at)
            else:
                _, replies[at] = self._ask(self._nodes.at(target.address), [ASKING, commands[at]], deadline)
        return moved


ASKING = command("ASKING")


@dataclass(frozen=True, slots=True)
class Redirection:
    """Where else to ask: from now on (MOVED), or for this one command (ASK)."""

    slot: int
    address: Address
    asking: bool


def redirection(error: ReplyError) -> Redirection | None:
    """What an error such as `MOVED 3999 127.0.0.1:6381` says; None for other errors."""
    words = str(error).split(" ")
    if words[0] not in ("MOVED", "ASK") or len(words) < 3:
        return None
    host, _, port = words[2].rpartition(":")
    sound = host and port.isdigit() and words[1].isdigit()
    return Redirection(int(words[1]), (host, int(port)), words[0] == "ASK") if sound else None


def stripe_of(request: bytes) -> int:
    """The stripe in a command's first key; 0 for commands without one."""
    at = request.find(b"kvs2:{")
    return int(request[at + 6 : at + 9]) if at >= 0 else 0


def many(
    talk: Talk, commands: Sequence[bytes], deadline: float, *, place: int | None = None, partial: bool = False
) -> list[Reply]:
    """Replies to commands. Raises the first ReplyError once all are read.

    `partial`: stripes of a Cluster that cannot answer now give None instead, as long as others do.
    """
    return sound(talk.ask(commands, deadline, place), partial=partial)


def sound(answers: Sequence[Reply | ReplyError], *, partial: bool = False) -> list[Reply]:
    """`answers` as replies; see `many`."""
    replies: list[Reply] = []
    error: ReplyError | None = None
    num_lost = 0
    for reply in answers:
        if not isinstance(reply, ReplyError):
            replies.append(reply)
        elif partial and (reply.code in MOVING or reply.code == "UNREACHABLE"):
            num_lost += 1
            error = error or reply
            replies.append(None)
        else:
            raise_foreign(reply)
    if error is not None and num_lost == len(answers):
        raise_foreign(error)
    return replies


def raise_foreign(error: ReplyError) -> None:
    """Raise an error of the server as what callers of the tier expect."""
    with map_redis_errors():
        raise error


def _parse(url: str) -> tuple[bool, str, list[Address]]:
    """Whether it is a Cluster, a URL for redis-py, and the Cluster's named nodes."""
    parts = urlsplit(url)
    if not parts.scheme.endswith(_CLUSTER):
        return False, url, []
    user, at, hosts = parts.netloc.rpartition("@")
    seeds: list[Address] = []
    for host in hosts.split(","):
        name, _, port = host.rpartition(":")
        if not name or not port.isdigit():
            raise ConfigError(f"the redis URL names the node {host!r}: use redis+cluster://host:port,host:port")
        seeds.append((name.strip("[]"), int(port)))
    scheme = parts.scheme.removesuffix(_CLUSTER)
    return True, urlunsplit((scheme, f"{user}{at}{hosts.split(',')[0]}", "", parts.query, "")), seeds


def _primaries(reply: Reply, slots: Sequence[int], asked: Address | None) -> list[Address]:
    """The primary of each slot, from CLUSTER SLOTS."""
    owners: list[tuple[int, int, Address]] = []
    for entry in reply if isinstance(reply, list) else []:
        if isinstance(entry, list) and len(entry) >= 3 and isinstance(entry[2], list):
            first, last, (host, port, *_) = entry[0], entry[1], entry[2]
            if isinstance(first, int) and isinstance(last, int) and isinstance(port, int):
                # A node that does not know its own name leaves it out: it is where we asked.
                name = host.decode(errors="replace") if isinstance(host, bytes) and host else (asked or ("", 0))[0]
                owners.append((first, last, (name, port)))
    found: list[Address] = []
    for slot in slots:
        address = next((address for first, last, address in owners if first <= slot <= last), None)
        if address is None:
            raise ProtocolBroken(f"no node serves slot {slot}")
        found.append(address)
    return found
