# SPDX-License-Identifier: Apache-2.0
"""One client as the server sees it, and what it holds; `kvstore.service.sessions` has how all of it ends."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.block import Root
from kvstore.errors import CapacityError, ConfigError, UnknownLease
from kvstore.layout import BlockLayout
from kvstore.load import BlockLoad
from kvstore.loan import Loan
from kvstore.marks import Mark
from kvstore.service.chains import ChainCache, Contents, ServedChain
from kvstore.service.door import Peer
from kvstore.service.rights import Rights, Shown
from kvstore.service.saves import ServedSave
from kvstore.service.status import UnknownSession

MAX_HOLDS = 65_536
MAX_LEASES = 65_536
MAX_MARKS = 4_096
_MAX_TOMBSTONES = 4_096
_MAX_FINISHED = 1_024


class Held(NamedTuple):
    """Leading blocks of a chain that a match, or a load, keeps pinned."""

    chain: ServedChain
    num_blocks: int
    block_bytes: int
    """Of the parts asked."""
    parts: tuple[int, ...] | None
    """Those; None for all."""
    until_s: float = math.inf
    """When it lapses by itself."""
    num_similar: int = 0
    """Blocks of other chains among them: one at most."""

    @property
    def num_bytes(self) -> int:
        return (self.num_blocks + self.num_similar) * self.block_bytes


@dataclass(slots=True, eq=False)
class ServedLoad:
    """A load of a client, with what it keeps described meanwhile."""

    load: BlockLoad
    held: Held
    contents: Contents | None

    def close(self) -> None:
        """May wait for a fetch under way."""
        self.load.close()
        if self.contents is not None:
            self.held.chain.undescribe(self.contents)


@dataclass(slots=True, eq=False)
class Account:
    """What the sessions of a tenant keep from eviction together; one session's, where it has no tenant.

    Attributes:
        saving: held from reserving a save's slots, or pinning a loan's, until it is registered. Taken before `lock`.
        pinned_bound: bytes that they pin, at most (`kvstore.service.budget`); guarded by `lock`, as the rest is.
        num_streams: streaming calls of theirs.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    saving: threading.Lock = field(default_factory=threading.Lock)
    pinned_bound: int = 0
    sessions: set[Session] = field(default_factory=set)
    num_streams: int = 0

    @property
    def is_idle(self) -> bool:
        return not self.sessions and not self.num_streams

    def add(self, num_bytes: int) -> None:
        """So many more are pinned, and registered."""
        with self.lock:
            self.pinned_bound += num_bytes


@dataclass(slots=True, eq=False)
class Session:
    """One client. Mappings are guarded by `lock`.

    Attributes:
        id, engine_key: capabilities, 16 random bytes each. number: for the store's request keys.
        peer: the process, where it passed the door.
        account: what counts what it pins.
        loading: held while a load begins whose call may come twice at once.
        shown: what its rights were given for.
        holds: what each match that may be loaded keeps, oldest first.
        loans: what its Fetch calls pin.
    """

    id: bytes
    engine_key: bytes
    number: int
    name: str
    pid: int
    peer: Peer | None
    shown: Shown
    rights: Rights
    opened_s: float
    last_seen_s: float
    chains: ChainCache = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    loading: threading.Lock = field(default_factory=threading.Lock)
    account: Account = field(default_factory=Account)
    ended: bool = False
    cancels: set[Callable[[], object]] = field(default_factory=set)
    """Each ends one of its Session streams."""
    in_use: bool = False
    """Whether its client has begun a stream, or what it may be writing was fenced: it has the answer to its Open."""
    models: list[BlockLayout] = field(default_factory=list)
    roots: dict[tuple[int, bytes, bytes], Root] = field(default_factory=dict)
    holds: OrderedDict[str, Held] = field(default_factory=OrderedDict)
    loads: dict[int, ServedLoad] = field(default_factory=dict)
    saves: dict[int, ServedSave] = field(default_factory=dict)
    loans: set[Loan] = field(default_factory=set)
    finished: OrderedDict[int, ServedSave] = field(default_factory=OrderedDict)
    """Saves that were committed whole, for a commit whose reply was lost."""
    joined: dict[tuple[bytes, int], ServedSave] = field(default_factory=dict)
    """Saves of other sessions that this one's process writes to, by engine key and number."""
    marks: OrderedDict[tuple[int, int, int, int], Mark] = field(default_factory=OrderedDict)
    tombstones: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def party(self) -> str | Account:
        """Whose share its calls take: its tenant's, which outlives every session, or else its own."""
        return self.rights.tenant or self.account

    @property
    def mapped(self) -> bool:
        return self.peer is not None

    def key(self, request: str) -> str:
        """The store's name for a request of this client."""
        return f"{self.number}/{request}"

    def layout(self, model: int) -> BlockLayout:
        """Layout of a model by its number. Raises ConfigError."""
        if not 1 <= model <= len(self.models):
            raise ConfigError(f"root.model is {model}: this session has opened models 1…{len(self.models)}")
        return self.models[model - 1]

    def add_load(self, number: int, load: ServedLoad) -> None:
        """Register. Raises, with nothing registered, where that lease may not begin any more."""
        with self.lock:
            self._admit(number, self.loads)
            self.loads[number] = load
        self.account.add(load.held.num_bytes)

    def add_save(self, number: int, save: ServedSave) -> ServedSave:
        """Register; returns the one that is there where an earlier call of that number has done so."""
        with self.lock:
            there = self._save(number)
            if there is not None:
                return there
            self._admit(number, self.saves)
            self.saves[number] = save
            return save

    def add_hold(self, request: str, held: Held) -> str | None:
        """Note what a match left; returns a request to forget for it, where there are too many."""
        with self.lock:
            if self.ended:
                raise UnknownSession("the session has ended")
            self.holds.pop(request, None)
            self.holds[request] = held
            return self.holds.popitem(last=False)[0] if len(self.holds) > MAX_HOLDS else None

    def repeated_save(self, number: int) -> ServedSave | None:
        """The save that an earlier call of that number made."""
        with self.lock:
            return self._save(number)

    def _save(self, number: int) -> ServedSave | None:
        return self.saves.get(number) or self.finished.get(number)

    def save_of(self, number: int) -> ServedSave:
        """A save by its number. Raises UnknownLease."""
        with self.lock:
            save = self._save(number)
        if save is None:
            raise UnknownLease(f"no save has number {number} in this session: it ended")
        return save

    def finish(self, number: int) -> None:
        """A save has nothing open any more."""
        with self.lock:
            save = self.saves.pop(number, None)
            if save is not None:
                self.finished[number] = save
                if len(self.finished) > _MAX_FINISHED:
                    self.finished.popitem(last=False)

    def _admit(self, number: int, leases: dict[int, ServedLoad] | dict[int, ServedSave]) -> None:
        if self.ended:
            raise UnknownSession("the session has ended")
        if number in self.tombstones:
            raise UnknownLease(f"lease {number} was ended before it began")
        if number in leases:
            raise ConfigError(f"lease is {number}, which is in use: number leases 1, 2, 3, …")
        if len(leases) >= MAX_LEASES:
            raise CapacityError(f"the session has {MAX_LEASES} leases, which is the limit: release some")

    def bury(self, number: int) -> None:
        """Remember that a lease ended. The lock is held."""
        self.tombstones[number] = None
        if len(self.tombstones) > _MAX_TOMBSTONES:
            self.tombstones.popitem(last=False)
