# SPDX-License-Identifier: Apache-2.0
"""The shared tier: parts of blocks as values in Redis or Valkey.

One value per part, a frame header and a payload. Values are sent from the caller's memory and received into it;
a value that is not exactly the one asked for is a miss, is removed, and is counted. What leaves when space runs
out is decided here and not by the server (`maxmemory-policy noeviction`): the least recently used chains, or what
`kvstore.policies.standing` puts before them, tails before heads, by an order that all writers share
(`redis_accounting`).

    redis_names       which key, which score        redis_wire    RESP straight from and into memory
    redis_accounting  what is there, what goes      redis_pool    connections
    redis_read        values into buffers           redis_write   values with their accounts, in order
    redis_nodes       which node, talk to all       redis_cluster batches over the nodes of a Cluster
    redis_sweep       repair, and check             redis_upkeep  touches, ageing, sweeps in the background
    redis_presence    which keys are there          redis_marks   who is computing what
    redis_sealed      values of keys not at hand    redis_sentinel who is the primary
    redis_codec       whether encoding them pays    redis_compared by what calls with it and without took
    redis_clock       the time that scores are of   redis_mend     what other programs spoilt
    redis_growth      what hangs from what          redis_look     what doctor can see
    redis_facts       what a server says of itself  redis_scripts  what it does for the accounts
    redis_tenants     whose which namespace is      redis_stream   sockets under a deadline
    redis_lanes       several connections a load    redis_beside   reads on threads of their own
    redis_rights      what our user may do          redis_breaker  whether it is believed to work
    redis_errors      what it and its sockets raise
    valkey            a server of our own, for url="embedded"
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

from kvstore.api import Hint
from kvstore.block import BlockId, BlockMeta, PartKey, Root, RootId
from kvstore.clock import check_seconds
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.policies.standing import LRU, STANDINGS
from kvstore.stats import Stats
from kvstore.tiers.base import AS_USED, Later, More, Tier
from kvstore.tiers.redis_accounting import Accounting
from kvstore.tiers.redis_cluster import ClusterBatches
from kvstore.tiers.redis_codec import AUTO, CodecChoice
from kvstore.tiers.redis_errors import TIER, Refused, WrongBooks
from kvstore.tiers.redis_growth import growth_of
from kvstore.tiers.redis_lanes import LaneChoice, LanesRead
from kvstore.tiers.redis_marks import RedisMarks
from kvstore.tiers.redis_mend import Mender
from kvstore.tiers.redis_names import MAX_BUCKETS, Names
from kvstore.tiers.redis_nodes import Nodes, Talk
from kvstore.tiers.redis_nodes import Options as NodeOptions
from kvstore.tiers.redis_presence import present
from kvstore.tiers.redis_read import Counts, Reader
from kvstore.tiers.redis_rights import check_rights
from kvstore.tiers.redis_sealed import Locked
from kvstore.tiers.redis_sweep import Sweeper
from kvstore.tiers.redis_upkeep import Upkeep, most_shift_s
from kvstore.tiers.redis_write import Item, SendItems, Writer
from kvstore.tiers.valkey import EmbeddedServer

if TYPE_CHECKING:
    from kvstore.wire.seal import Sealer  # a library that only encryption needs

T = TypeVar("T")

EMBEDDED = "embedded"
_MAX_TTL_S = 10 * 365 * 86_400
_EMBEDDED_CAPACITY_BYTES = 1 << 30
_WAKING_S = 0.02
_WAKING_SHARE = 0.05
"""Of a deadline, to act upon it: kernel timers fire up to 5 ms late, and a busy machine runs threads later."""
_LONG_CALL_S = 60.0
"""For calls that look at everything there is."""


class RedisTier(Tier):
    """Redis 7 or Valkey, one node or a Cluster. Each process has its own; any number of them share a server."""

    @dataclass(frozen=True, slots=True)
    class Options:
        """Settings.

        Attributes:
            url: redis://, rediss:// or unix://, as redis-py reads them (user, password, database, TLS files in
                the query); `embedded` starts a server that lives as long as this process. For a Cluster
                redis+cluster:// or rediss+cluster:// with some of its nodes: redis+cluster://host:port,host:port
                For a primary that Sentinels know: redis+sentinel://host:port,host:port/service (`redis_sentinel`).
            capacity_bytes: limit of what all stores on this server keep together; give all the same. 0 takes
                80 % of the server's `maxmemory`, and where it has none, no limit (1 GiB for `embedded`).
            namespace_capacity_bytes: limit of each namespace (a model with its adapter under a tenant's salt): what is
                written beyond it evicts the coldest of the same namespace. Give all stores the same. 0 for none.
            tenant_capacity_bytes: the same of each tenant's salt, all models and adapters together (`redis_tenants`).
            policy: by what this store places what it writes and uses in the server's one order: `lru`, `priority` or
                `returns` (`kvstore.policies.standing`), not `priority` where blocks go down at eviction. Stores with
                different ones may share a server: each places its own uses, and the later place counts.
            num_buckets: how many ways a namespace is cut, and over how many slots of a Cluster it is spread (64 or
                more then). Part of key names: stores that share must agree.
            connections: for loads, and as many again for all else, so that loads never wait behind stores.
            lanes: connections that a large load takes at most, all but one beside those. How many it takes is measured
                (`redis_lanes`); 1 for never more than one. In a Cluster a load takes one of each node.
            encryption_key_file: file with keys, one a line, that only its owner may read: payloads and token ids are
                sealed with AES-256-GCM, by the first; `kvstore.wire.seal` says what stays in the clear, and how keys
                are changed. Values that are not sealed are then not taken. Empty for no encryption.
            codec: how values are written: `auto` (with lz4 where and while that is measured to be faster than raw, for
                each namespace by itself; `redis_codec`), `raw` or `lz4`. Whatever codec a value names is read.
            ttl_s: backstop of the server: a value that nobody used and nobody evicted goes after this. Ageing
                by score comes at half of it, tails first. 0 for neither. A server's clock that is set forward by more
                than half of it may end all values at once: a cold cache.
            connect_timeout_s: for resolving a name, connecting and authenticating, within the call's deadline.
            call_timeout_s: deadline of calls that are given none, and of background work.
            breaker_open_s: how often a server that failed is tried in the background (a fifth as often after it was
                away for fifty times as long); calls are refused at once meanwhile. With 0 every call tries.
            ping_every_s: how long a server may be silent before it is asked whether it is there, in the background
                (`redis_upkeep` says what that costs); 0 for never: then only the next use finds out.
            sweep_every_s: how often one of all stores repairs what crashes and expiry left; 0 for never. It looks
                at every header: about 0.1 s for a thousand parts, in the background.
        """

        url: str = field(default=EMBEDDED, repr=False)  # it may hold a password
        capacity_bytes: int = 0
        namespace_capacity_bytes: int = 0
        tenant_capacity_bytes: int = 0
        policy: str = LRU
        num_buckets: int = 16
        connections: int = 2
        lanes: int = 4
        codec: str = AUTO
        encryption_key_file: str = ""
        ttl_s: int = 2 * 86_400
        connect_timeout_s: float = 1.0
        call_timeout_s: float = 5.0
        breaker_open_s: float = 1.0
        ping_every_s: float = 3.0
        sweep_every_s: float = 3600.0

        def __post_init__(self) -> None:
            _check_password(self.url)
            if not 1 <= self.num_buckets <= MAX_BUCKETS:
                raise ConfigError(f"num_buckets is {self.num_buckets}: use 1 to {MAX_BUCKETS} (16 is a good default)")
            if self.policy not in STANDINGS:
                raise ConfigError(f"policy of tier redis is {self.policy!r}: use one of {', '.join(STANDINGS)}")
            if self.connections < 1:
                raise ConfigError(f"connections is {self.connections}: use at least 1 (2 to 4 is a good choice)")
            if self.lanes < 1:
                raise ConfigError(f"lanes is {self.lanes}: use at least 1 (4 is a good default)")
            for name in ("capacity_bytes", "namespace_capacity_bytes", "tenant_capacity_bytes", "ttl_s"):
                if getattr(self, name) < 0:
                    raise ConfigError(f"{name} is {getattr(self, name)}: it must not be negative")
            if self.ttl_s > _MAX_TTL_S:
                raise ConfigError(f"ttl_s is {self.ttl_s}: give at most {_MAX_TTL_S} (ten years), or 0 for none")
            for name in ("sweep_every_s", "breaker_open_s", "ping_every_s"):
                check_seconds(name, getattr(self, name), least=0)
            for name in ("connect_timeout_s", "call_timeout_s"):
                check_seconds(name, getattr(self, name))

    name: ClassVar[str] = "redis"
    keeps_marks: ClassVar[bool] = True

    def __init__(self, options: RedisTier.Options | None = None) -> None:
        self.options: RedisTier.Options = options or RedisTier.Options()
        super().__init__(self.options)
        self.ranking = self.options.policy
        self._codec = CodecChoice(self.options.codec)
        sealer = _sealer(self.options.encryption_key_file)
        names = Names(self.options.num_buckets)
        # Refuse a bad URL before a server is started for nothing.
        self.server = EmbeddedServer() if self.options.url == EMBEDDED else None
        url = self.server.url if self.server else self.options.url
        capacity_bytes = self.options.capacity_bytes or (_EMBEDDED_CAPACITY_BYTES if self.server else 0)
        self._available = self._may_write = True
        self._nodes = Nodes(
            url,
            self.options.num_buckets,
            NodeOptions(
                self.options.connections,
                self.options.lanes,
                self.options.connect_timeout_s,
                self.options.breaker_open_s,
            ),
            self._note_state,
        )
        self._nodes.noted = self._note_rights
        self._names = names
        self._accounting = Accounting(
            names, capacity_bytes, self.options.namespace_capacity_bytes, self.options.tenant_capacity_bytes
        )
        self._locked = Locked()
        self._writer = Writer(
            self._accounting, self._codec, self.options.ttl_s, self._locked, sealer, by_stripe=self._nodes.is_cluster
        )
        self._reader = Reader(names, self._locked, sealer)
        self.lanes = LaneChoice(self.options.lanes)
        self._marks = RedisMarks(names)
        self._cluster = ClusterBatches(self._nodes, names, self._reader) if self._nodes.is_cluster else None
        self._sweeper = Sweeper(self._accounting)
        self._upkeep = Upkeep(
            self._nodes,
            self._accounting,
            self._sweeper,
            ttl_s=self.options.ttl_s,
            call_timeout_s=self.options.call_timeout_s,
            sweep_every_s=self.options.sweep_every_s,
            ping_every_s=self.options.ping_every_s,
        )
        self._upkeep.absent = lambda blocks: self.absent(blocks)
        self._writer.met, self._writer.grew = self._met, self._grew
        self.bind(self.stats)

    def bind(self, stats: Stats) -> None:
        super().bind(stats)
        self._upkeep.bind(stats)
        # It may have failed before anybody counted.
        stats.set(f"{self.name}.available", self._available)
        stats.set(f"{self.name}.may_write", self._may_write)

    def open(self, layout: BlockLayout) -> None:
        self._writer.learn(layout)

    def meet(self, root: Root) -> None:
        self._accounting.tenants.learn(root)

    @property
    def refuses(self) -> bool:
        return self._nodes.refuses

    def contains(self, keys: Sequence[PartKey], deadline_s: float) -> list[bool]:
        # A request waits for this: time to wake up, and to say that nothing came, is part of it.
        deadline = time.monotonic() + deadline_s - min(_WAKING_S, _WAKING_SHARE * deadline_s)
        if not keys:
            return []
        if self._cluster is not None:
            found = self._cluster.contains(keys, deadline)
        else:
            with self._nodes.of_stripe(0, deadline).loads.lease(deadline) as wire:
                found = present(wire, self._names, keys, deadline, by_stripe=False)
        return self._locked.without(keys, found)

    def read(self, into: Mapping[PartKey, memoryview], deadline_s: float) -> Iterator[list[PartKey]]:
        return self._read(into, None, time.monotonic() + deadline_s)

    def read_on(self, into: Mapping[PartKey, memoryview], more: More, deadline_s: float) -> Iterator[list[PartKey]]:
        return self._read(into, more, time.monotonic() + deadline_s)

    def _read(self, into: Mapping[PartKey, memoryview], more: More | None, deadline: float) -> Iterator[list[PartKey]]:
        if not into:
            return
        damaged: list[PartKey] = []
        counts = Counts()
        last: PartKey | None = None
        try:
            if self._cluster is not None:
                for keys in self._cluster.read({**into, **(more() if more else {})}, deadline, damaged, counts):
                    last = keys[-1]
                    yield keys
                return
            node = self._nodes.of_stripe(0, deadline)
            reading = LanesRead(self._reader, self.lanes, node, into, more, deadline, damaged, counts)
            with closing(iter(reading)) as coming:
                for keys in coming:
                    last = keys[-1]
                    yield keys
            self._note_load(reading, counts, next(iter(into)).root, last)
        finally:
            self._count(asdict(counts))
            if last is not None:
                self._met(last)
            if damaged:
                self._upkeep.discard(damaged)

    def _note_load(self, reading: LanesRead, counts: Counts, root: RootId, last: PartKey | None) -> None:
        """Have the codec's choice learn of a load that ended well."""
        if reading.is_large:
            self.stats.set(f"{self.name}.lanes", self.lanes.best)
        if reading.is_typical:
            decode_s = counts.decode_s / reading.num_lanes
            self._codec.link.received(counts.read_bytes - counts.decoded_saved_bytes, reading.took_s - decode_s)
            if counts.read_blocks and last is not None and last.root == root:
                share = counts.decoded_blocks / counts.read_blocks
                self._codec.loaded(root, counts.read_bytes, reading.took_s, share)

    def write(
        self,
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline_s: float,
        later: Later = AS_USED,
    ) -> set[PartKey]:
        deadline = time.monotonic() + deadline_s
        if not parts:
            return set()
        self._refuse_denied()
        later = self._within_bounds(later)
        try:
            return self._write(parts, meta, deadline, later)
        except WrongBooks:
            self._upkeep.mend(deadline)
            return self._write(parts, meta, deadline, later)

    def _within_bounds(self, later: Later) -> Later:
        most_s = most_shift_s(self.options.ttl_s)
        return {block: min(max(seconds, -most_s), most_s) for block, seconds in later.items()}

    def _write(
        self, parts: Mapping[PartKey, memoryview], meta: Mapping[BlockId, BlockMeta], deadline: float, later: Later
    ) -> set[PartKey]:
        counts: dict[str, float] = {}
        try:
            with self._nodes.talk(deadline) as talk:
                return self._writer.write(talk, parts, meta, deadline, counts, self._sender(talk, deadline), later)
        finally:
            self.stats.set(f"{self.name}.used_bytes", self._accounting.last_total_bytes)
            self._codec.report(self.name, self.stats)
            self._count(counts)

    def _sender(self, talk: Talk, deadline: float) -> Callable[[Sequence[Item], SendItems], set[PartKey]]:
        """Sends over the conversation's own wire, or over one to each node."""
        cluster = self._cluster
        if cluster is not None:
            return lambda items, send: cluster.send(items, send, deadline)
        return lambda items, send: send(talk.wire, items)

    def _count(self, counts: Mapping[str, float]) -> None:
        self.stats.add_all({f"{self.name}.{name}": amount for name, amount in counts.items() if amount})

    def _met(self, key: PartKey) -> None:
        if not self.is_exclusive:
            self._upkeep.borrowed(key)

    def _grew(self, landed: Sequence[PartKey], meta: Mapping[BlockId, BlockMeta]) -> None:
        if self.is_exclusive:
            self._upkeep.grew(growth_of(landed, meta))

    def _note_state(self, available: bool) -> None:
        self._available = available
        self.stats.set(f"{self.name}.available", available)

    def _note_rights(self, may_write: bool) -> None:
        self._may_write = may_write
        self.stats.set(f"{self.name}.may_write", may_write)

    def _refuse_denied(self) -> None:
        """What the server is known not to let us write is not sent."""
        if self._nodes.denied:
            raise Refused(TIER, f"not tried again yet after: {self._nodes.denied}")

    @property
    def span_s(self) -> float:
        return min(self._accounting.span_s, most_shift_s(self.options.ttl_s))

    def touch(self, keys: Sequence[PartKey], hint: Hint, later: Later = AS_USED) -> None:
        self._upkeep.touch(keys, self._within_bounds(later))

    def retire(self, keys: Sequence[PartKey], start: int) -> None:
        self._upkeep.retire(keys, start, note_children=self.is_exclusive)

    def remove(self, keys: Sequence[PartKey]) -> None:
        deadline = time.monotonic() + self.options.call_timeout_s
        if keys:
            self._on_sound_books(lambda talk: self._accounting.remove(talk, keys, deadline), deadline)

    def clear(self, root: RootId | None) -> None:
        deadline = time.monotonic() + _LONG_CALL_S
        self._on_sound_books(lambda talk: self._sweeper.clear(talk, root, deadline), deadline)

    def _on_sound_books(self, work: Callable[[Talk], T], deadline: float) -> T:
        """What `work` gives; once more where it met a key that holds something else, and that was mended."""
        try:
            with self._nodes.talk(deadline) as talk:
                return work(talk)
        except WrongBooks:
            self._upkeep.mend(deadline)
            with self._nodes.talk(deadline) as talk:
                return work(talk)

    def mark(self, root: RootId, blocks: Sequence[BlockId], ttl_s: float) -> None:
        deadline = time.monotonic() + self.options.call_timeout_s
        with self._nodes.talk(deadline) as talk:
            self._marks.set(talk, root, blocks, ttl_s, deadline)

    def unmark(self, root: RootId, blocks: Sequence[BlockId]) -> None:
        deadline = time.monotonic() + self.options.call_timeout_s
        with self._nodes.talk(deadline) as talk:
            self._marks.drop(talk, root, blocks, deadline)

    def marked_to(self, root: RootId, blocks: Sequence[BlockId], at: int, deadline_s: float) -> int:
        deadline = time.monotonic() + deadline_s
        if self._nodes.is_cluster:
            with self._nodes.talk(deadline) as talk:
                return self._marks.stop(talk, root, blocks, at, deadline)
        with self._nodes.of_stripe(0, deadline).loads.lease(deadline) as wire:  # a request waits for this
            return self._marks.stop(Talk(wire), root, blocks, at, deadline)

    def sweep(self) -> dict[str, int]:
        """Repair what crashes and expiry left: returns what was found, by kind. Costs a look at every header."""
        deadline = time.monotonic() + _LONG_CALL_S
        return self._on_sound_books(lambda talk: self._sweeper.sweep(talk, deadline), deadline)

    def settle(self, deadline_s: float) -> bool:
        """Wait until touches and removals handed to the background are done; False if time ran out first."""
        return self._upkeep.settle(deadline_s)

    def accounted_bytes(self) -> int:
        """What all stores keep on this server, by its own count."""
        deadline = time.monotonic() + self.options.call_timeout_s
        with self._nodes.talk(deadline) as talk:
            return self._accounting.total_bytes(talk, deadline)

    def check(self) -> list[str]:
        """Broken invariants: accounts without values or the reverse, wrong sums, blocks without their parents.

        Meaningful while nobody writes.
        """
        deadline = time.monotonic() + _LONG_CALL_S
        if self._nodes.denied:
            check_rights(self._nodes, deadline)
        self._refuse_denied()
        with self._nodes.talk(deadline) as talk:
            foreign = Mender(self._accounting).foreign(talk, deadline)
            if foreign:  # sums and orders would be those of another program
                return [
                    f"{name} holds a {kind} of another program; kvstore mends it as it meets it"
                    for name, kind in foreign.items()
                ]
            return self._sweeper.check(talk, deadline)

    def close(self) -> None:
        self._upkeep.close()
        self._nodes.close()
        if self.server is not None:
            self.server.close()


def _check_password(url: str) -> None:
    """Raise ConfigError, repeating nothing of it, for a URL whose password ends the host's place too early.

    Whoever parses it sees a port in the password's beginning, and says so in an error.
    """
    place = re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0]
    ports = [colon and port for _, colon, port in (node.rpartition(":") for node in place.split(","))]
    cut = any(port and not port.isdigit() and not port.endswith("]") for port in ports)
    if "@" not in place and "@" in url and cut:
        raise ConfigError("the redis URL has a password with /, ? or # in it: write them as %2F, %3F, %23")


def _sealer(key_file: str) -> Sealer | None:
    if not key_file:
        return None
    from kvstore.wire.seal import Keys, Sealer

    return Sealer(Keys.read(key_file))
