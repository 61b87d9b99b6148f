# SPDX-License-Identifier: Apache-2.0
"""What a tier is: a keyed place for parts of blocks. Batches only; a miss is an absence, not an error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from kvstore.api import Hint
from kvstore.block import BlockId, BlockMeta, PartKey, Root, RootId
from kvstore.layout import BlockLayout
from kvstore.policies.standing import LRU
from kvstore.stats import Stats

Later = Mapping[BlockId, float]
"""How many seconds later than it was a use of a block counts, earlier where that is below 0; 0 for those not named."""
AS_USED: Later = MappingProxyType({})

More = Callable[[], Mapping[PartKey, memoryview]]
"""Prepares further buffers to read into."""


class Tier(ABC):
    """A place below (or at) the host. Thread-safe. Deadlines are durations in seconds for the whole call.

    A failing tier raises TierError from any call; the store turns that into a miss. A value that is not what
    was asked for (corrupt, foreign, short) never raises: it is removed, counted in stats and left out.
    """

    @dataclass(frozen=True, slots=True)
    class Options:
        """Settings of this tier."""

    name: ClassVar[str]
    read_only: ClassVar[bool] = False
    """Nothing is ever demoted to it; `write` would store nothing."""
    keeps_marks: ClassVar[bool] = False
    """Tells other stores what is being computed: `mark`, `unmark` and `marked_to` do something."""
    is_exclusive: bool = False
    """Who writes here takes back what it reads: it is kept above from then on, and no sign that others want it here."""
    absent: Callable[[Sequence[BlockId]], None] = staticmethod(lambda blocks: None)
    """Told, on a thread of the tier's, which blocks of a chain that was touched are not there: to be believed there no
    more. By tiers that hear of it as they touch."""
    ranking: str = LRU
    """By what blocks are placed in its order: a name in `kvstore.policies.standing`. Who writes and touches asks it."""

    def __init__(self, options: object) -> None:
        self.options = options
        self.stats = Stats()

    @abstractmethod
    def open(self, layout: BlockLayout) -> None:
        """Learn a model before any of its keys are used. Idempotent."""

    @abstractmethod
    def contains(self, keys: Sequence[PartKey], deadline_s: float) -> list[bool]:
        """Presence of each key, as far as known without reading values."""

    @abstractmethod
    def read(self, into: Mapping[PartKey, memoryview], deadline_s: float) -> Iterator[Sequence[PartKey]]:
        """Fill buffers in mapping order; yield keys once their buffers are filled and verified.

        Those that came together are yielded together, one at least: of small parts, a key at a time costs more than
        receiving it. Keys that are missing or corrupt are skipped. Once the iterator ends, is closed, or raises, by
        time-out included, nothing writes to `into` any more. Buffers of keys not yielded hold garbage.
        """

    def read_on(self, into: Mapping[PartKey, memoryview], more: More, deadline_s: float) -> Iterator[Sequence[PartKey]]:
        """As `read`, of `into` and then of what `more` gives, which takes the caller a while to prepare.

        `more` is called once, by the thread that iterates. A tier that answers late asks for `into` before.
        """
        return self.read({**into, **more()}, deadline_s)

    @abstractmethod
    def write(
        self,
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline_s: float,
        later: Later = AS_USED,
    ) -> set[PartKey]:
        """Store parts, parents before children as mapped; return the keys that are certainly there now.

        What is new there stands in the tier's order as if used now, or as much later as `later` says: as far as it
        keeps such an order, and never above what it hangs from.

        The caller keeps the bytes unchanged during the call, and knows the parents of the first block to be
        in the tier or in the mapping. `meta` has an entry for each block named.
        """

    @abstractmethod
    def touch(self, keys: Sequence[PartKey], hint: Hint, later: Later = AS_USED) -> None:
        """A chain was used, now or as much `later`: its keys from the root, head to tail. Best effort, coalesced."""

    @abstractmethod
    def remove(self, keys: Sequence[PartKey]) -> None:
        """Remove on request. Unknown keys are passed over."""

    @abstractmethod
    def clear(self, root: RootId | None) -> None:
        """Remove everything under `root`, or everything this tier owns."""

    @abstractmethod
    def check(self) -> list[str]:
        """Broken invariants; empty when healthy."""

    @abstractmethod
    def close(self) -> None:
        """Stop threads, close connections."""

    def meet(self, root: Root) -> None:  # noqa: B027 (most tiers do not care)
        """Told of each root before anything under it is written: its digest does not say whose it is. Idempotent."""

    def retire(self, keys: Sequence[PartKey], start: int) -> None:  # noqa: B027 (most tiers have no order of their own)
        """The conversation of a chain ended: its keys, head to tail, of which from `start` on only it is known to use.

        They may go before others do, children before parents. Best effort, after touches handed over before.
        """

    @property
    def span_s(self) -> float:
        """How long it keeps what nobody uses, as far as it knows: the unit in which `ranking` shifts a use."""
        return 0.0

    # For tiers that several stores share. Most tiers keep no marks, so these do nothing rather than be abstract.

    def mark(self, root: RootId, blocks: Sequence[BlockId], ttl_s: float) -> None:  # noqa: B027
        """Say that a run of one chain is being computed here, for `ttl_s` from now."""

    def unmark(self, root: RootId, blocks: Sequence[BlockId]) -> None:  # noqa: B027
        """Take back the marks of this store whose runs began with these blocks."""

    def marked_to(self, root: RootId, blocks: Sequence[BlockId], at: int, deadline_s: float) -> int:
        """Index, `at` or more, up to which other stores say that they compute the chain `blocks` from `at` on."""
        return at

    @property
    def refuses(self) -> bool:
        """Whether any call made now would fail at once. Waits for nothing: no lock, no system call."""
        return False

    def gauges(self) -> Mapping[str, float]:
        """What is true now and that nobody counts, under names that begin with the tier's. Waits for nothing."""
        return {}

    def bind(self, stats: Stats) -> None:
        """Count into `stats` from now on, under names that begin with the tier's."""
        self.stats = stats
