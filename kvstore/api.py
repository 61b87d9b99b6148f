# SPDX-License-Identifier: Apache-2.0
"""What a store is: the protocol that the in-process store and the sidecar's client both keep.

A request's life:  open → match → (load) → announce → save … → forget.
Nothing here raises for a miss, a rejection or back-pressure; those are values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvstore.block import Chain, ModelId, RootId
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout

DEVICE_TIER = "device"
HOST_TIER = "host"


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a range of a prompt's tokens should stay: `priority` 0 to 100 for `duration_s`, None for any time.

    `stop` is the first token after the range, None for the chain's end. Raises ConfigError for what is no range.
    """

    start: int
    stop: int | None
    priority: int
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop < self.start):
            raise ConfigError(f"retention is of tokens {self.start}…{self.stop}: give a range such as 0…1024")
        _check_wish("retention.priority", self.priority, "retention.duration_s", self.duration_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """What a connector knows about a request and an eviction policy may use. All of it is optional.

    Attributes:
        conversation: any id that is the same for all turns of one chat.
        turn: 1 for the first.
        prompt_tokens, new_blocks: length of the prompt, and how many of its blocks nobody had.
        priority: 0 (drop first) to 100; 50 for ordinary.
        retention: priorities of ranges of tokens; of two that overlap the later counts.
        ttl_s: keep at least this long if possible, then drop first.
        closed: the conversation ended; its private blocks will not come back.
            Priorities, times and ends are heeded by every policy but `lru`.
        time_s: the store's clock; asked: a request began with this use, False where one adds to what it computed.
            block_tokens: tokens a block. The store fills these in.
    """

    conversation: str = ""
    turn: int = 0
    prompt_tokens: int = 0
    new_blocks: int = 0
    priority: int = 50
    retention: tuple[Retention, ...] = ()
    ttl_s: float | None = None
    closed: bool = False
    time_s: float = 0.0
    asked: bool = False
    block_tokens: int = 0

    def __post_init__(self) -> None:
        _check_wish("hint.priority", self.priority, "hint.ttl_s", self.ttl_s)

    def retention_of(self, block: int) -> Retention | None:
        """The range that has the say over the chain's block `block`: the last of those that touch it anywhere."""
        start, stop = block * self.block_tokens, (block + 1) * self.block_tokens
        for each in reversed(self.retention if self.block_tokens else ()):
            if each.start < stop and (each.stop is None or each.stop > start):
                return each
        return None

    def priority_of(self, block: int) -> int:
        """What the hint says of the chain's block `block`: a range that touches it anywhere has the say."""
        wish = self.retention_of(block)
        return self.priority if wish is None else wish.priority


def _check_wish(name: str, priority: int, time_name: str, time_s: float | None) -> None:
    if not 0 <= priority <= 100:
        raise ConfigError(f"{name} is {priority}: give 0 (first to go) to 100")
    if time_s is not None and not (math.isfinite(time_s) and time_s >= 0):
        raise ConfigError(f"{time_name} is {time_s}: give seconds from 0 on")


NO_HINT = Hint()


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a chain is there. `num_blocks` leading blocks can be loaded now.

    Attributes:
        num_blocks: run from the first block, over host and the lower tiers that have answered.
        num_host_blocks: the part of it that lies in the host tier.
        num_pending_blocks: blocks right after the run that somebody announced and is computing.
        settled: False while a lower tier is still being asked; match again for its answer.
        tiers: (tier name, number of blocks) along the run; sums to num_blocks.
    """

    num_blocks: int
    num_host_blocks: int
    num_pending_blocks: int
    settled: bool
    tiers: tuple[tuple[str, int], ...] = ()


class LoadedBlock(Protocol):
    """A block whose bytes are in place and verified, valid until the Load is closed or moves its window on."""

    @property
    def index(self) -> int:
        """Position in the chain."""

    @property
    def tier(self) -> str:
        """Where it came from."""

    @property
    def views(self) -> Sequence[memoryview]:
        """Read-only bytes of the asked parts, in the order asked; shapes as in `BlockLayout.parts`."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedRun:
    """Blocks of a load that follow each other, all there, in one stretch of memory: thousands, and one object.

    Attributes:
        start: position in the chain of the first.
        tier: where they came from.
        memory: read-only, and as good as the load is.
        offsets: where in it each of the asked parts begins, `[blocks, parts]`; shapes as in `BlockLayout.parts`.
    """

    start: int
    tier: str
    memory: memoryview
    offsets: npt.NDArray[np.int64]


ABSENT = -1
"""In the place of an offset, for a part that has none."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenRun:
    """Blocks of a save that are to be filled, in one stretch of memory.

    Attributes:
        indices: positions in the chain, head to tail, `[blocks]`.
        memory: writable, and as good as the save is; no more than the slots is to be written.
        offsets: where in it each of the asked parts begins, `[blocks, parts]`; ABSENT where the part is there already.
    """

    indices: npt.NDArray[np.int64]
    memory: memoryview
    offsets: npt.NDArray[np.int64]


class Load(Protocol):
    """Blocks of a chain arriving in order. A context manager; leaving it releases the blocks.

    Iteration ends early at the first block that turns out to be missing, corrupt or late: what came before is
    a shorter hit. For a load larger than the arena, a block is valid only until the iterator moves on.
    """

    @property
    def num_blocks(self) -> int:
        """Blocks this load will try to deliver."""

    def __iter__(self) -> Iterator[LoadedBlock]: ...

    def intact(self) -> bool:
        """True while nothing handed out can have been overwritten. Ask after the copy, before reporting success."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Save(Protocol):
    """Slots to fill and publish. A context manager; leaving it aborts what was not committed.

    Attributes:
        indices: chain positions that are wanted, head to tail; blocks already there are left out.
        num_refused: blocks that found no room (everything evictable is pinned) or whose parent is not resident.
    """

    @property
    def indices(self) -> Sequence[int]: ...

    @property
    def num_refused(self) -> int: ...

    def views(self, index: int) -> Sequence[memoryview | None]:
        """Writable bytes of block `index`, one for each asked part; None where the part is there already."""

    def commit(self, *indices: int) -> int:
        """Publish filled blocks, head to tail; no argument means all. Returns how many became matchable."""

    def abort(self) -> None:
        """Give back every slot not committed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Announcement(Protocol):
    """A mark that says a range is being computed here. Ends by commit, withdrawal or, unrenewed, by its TTL."""

    def renew(self) -> None: ...

    def withdraw(self) -> None: ...


class Store(Protocol):
    """A tiered store of KV blocks, thread-safe, synchronous.

    `parts` arguments name cells of the part grid; None means all of them.
    """

    def open(self, model: ModelId) -> BlockLayout:
        """Agree on a model. Raises ConfigError where the store cannot hold one of its blocks."""

    def match(
        self,
        chain: Chain,
        request: str,
        *,
        hint: Hint = NO_HINT,
        parts: Sequence[int] | None = None,
        wait_s: float | None = 0.0,
        soon: bool = False,
    ) -> Match:
        """How much of `chain` is there, holding what the host has for a short while under `request`.

        Answers from the host at once. Lower tiers are asked in the background about what follows; a later call,
        or this one if `wait_s` allows, has their answer. With `wait_s` None they are not asked: what they hold would
        not be worth loading. Repeating it replaces the request's hold. Where `wait_s` is 0 and the host has something,
        the request may go on with that, and they are asked when it is matched again; `soon`: at once, since it will be.
        """

    def load(self, request: str, num_blocks: int | None = None, *, start: int = 0, partial_tokens: int = 0) -> Load:
        """Turn the hold of `request` into a lease and fetch blocks `start` … `num_blocks` of its match.

        `partial_tokens`: as many as `match_partial` said, together with all blocks of the match. The load then has
        one block more, another chain's, whose first `partial_tokens` tokens are this chain's as well. The rest are not.

        Raises UnknownLease where the request has no hold. A hold that expired gives an empty load.
        """

    def match_partial(self, request: str) -> int:
        """Tokens after the run of `request`'s match with which a block in the host begins as well, and hold that one.

        KV of a token depends on the tokens up to it alone, so a load may bring these. 0 without a match, and where
        blocks of lower tiers follow the host's. To be asked after the match was settled; matching again drops it.
        """

    def forget(self, request: str) -> None:
        """Drop the request's hold, if any."""

    def announce(self, chain: Chain, start: int, stop: int) -> Announcement:
        """Say that blocks `start` … `stop` are being computed here. Costs no slot."""

    def save(
        self,
        chain: Chain,
        start: int,
        stop: int,
        *,
        parts: Sequence[int] | None = None,
        hint: Hint = NO_HINT,
    ) -> Save:
        """Reserve slots for those of blocks `start` … `stop` that are not there."""

    def touch(self, chain: Chain, num_blocks: int, hint: Hint = NO_HINT) -> None:
        """Say that the first `num_blocks` were used, though not loaded from here (a device cache served them)."""

    def clear(self, root: RootId | None = None) -> int:
        """Remove every block under `root`, or of all roots, from every tier; returns how many left the host.

        Raises TierError where a lower tier may still hold some of it, or get some yet, and ServiceUnavailable where
        nobody answers: clear again. Tiers that are only read from here keep theirs.
        """

    def note_saved(self, seconds: float) -> None:
        """A request's first token came so much sooner because of a load, as its connector reckons. For metrics.

        Raises ConfigError for what is no time.
        """

    def stats(self) -> Mapping[str, float]:
        """Counters and gauges by dotted name, such as `host.hits` (blocks) and `redis.read_bytes`."""

    def check(self) -> list[str]:
        """Broken invariants; empty when healthy."""

    def close(self) -> None:
        """Flush pending write-through within the configured limit, then stop threads and release memory."""


class Registration(Protocol):
    """Memory that a device's driver knows of, so that the device copies from and to it by itself."""

    def close(self) -> None:
        """Have the driver forget it. No copy may be under way. Idempotent."""


Register = Callable[[memoryview], Registration]
"""Tells a device's driver of memory; returns at once, and keeps the view until the registration is closed."""


@runtime_checkable
class LendsMemory(Protocol):
    """A store whose slots lie in this process's memory, in one place or, after a restart of its server, in another."""

    def register_memory(self, register: Register) -> Registration:
        """Have `register` called with all of the memory, writable: to be registered, never written through.

        Where memory comes from a server, it is called once that has it ready, and again for what a restarted server
        has; what it returned is closed before memory is unmapped, when no view of it is left. Closing what this
        returns ends that, with whatever is registered.
        """


@runtime_checkable
class KnowsWindows(Protocol):
    """A load that can say whether its blocks stay valid: then several can be under way to a device at once."""

    def comes_in_windows(self, index: int) -> bool:
        """Whether block `index` comes only in place of those before it; waits until that is known."""


@runtime_checkable
class SaysWhole(Protocol):
    """A load that can say whether there is nothing to wait for: then several threads can copy from it."""

    @property
    def is_whole(self) -> bool:
        """Whether all blocks are there already and stay valid until the load is closed."""


@runtime_checkable
class GivesRun(Protocol):
    """A load that can hand out all its blocks as one run, in place of being iterated over."""

    def run(self) -> LoadedRun | None:
        """None where they are not all there, or not of one tier, or will not stay until the load is closed."""


@runtime_checkable
class GivesOpenRun(Protocol):
    """A save that can hand out the slots of all its open blocks as one run, in place of views of each."""

    def open_run(self) -> OpenRun:
        """Raises what `Save.views` raises."""
