# SPDX-License-Identifier: Apache-2.0
"""A store in a dict, with faults on demand: what connectors are tested against when the store must misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from kvstore.api import HOST_TIER, NO_HINT, Hint, Match
from kvstore.block import BlockId, Chain, ModelId, RootId
from kvstore.errors import TierUnavailable, UnknownLease
from kvstore.layout import BlockLayout, layout_of


@dataclass
class Faults:
    """What goes wrong. All off at first.

    Attributes:
        failing: methods that raise TierUnavailable.
        break_load_at: number of blocks after which a load raises.
        end_load_at: number of blocks after which a load just ends.
        skip_load_at: number of a block that a load leaves out, against the protocol.
        overwritten: loads report that their bytes may have changed, and they have.
        full: saves are refused.
        whole: not a fault: loads say that all their blocks are there and stay until they are closed.
    """

    failing: set[str] = field(default_factory=set)
    break_load_at: int | None = None
    end_load_at: int | None = None
    skip_load_at: int | None = None
    overwritten: bool = False
    full: bool = False
    whole: bool = False


@dataclass(frozen=True)
class FakeBlock:
    index: int
    tier: str
    views: Sequence[memoryview]


class FakeLoad:
    def __init__(self, store: FakeStore, chain: Chain, start: int, stop: int) -> None:
        self._store, self._chain, self._start, self._stop = store, chain, start, stop
        self._given: list[bytearray] = []

    @property
    def num_blocks(self) -> int:
        return self._stop - self._start

    @property
    def is_whole(self) -> bool:
        return self._store.faults.whole

    def __iter__(self) -> Iterator[FakeBlock]:
        faults = self._store.faults
        for number, index in enumerate(range(self._start, self._stop)):
            if number == faults.end_load_at:
                return
            if number == faults.skip_load_at:
                continue
            if number == faults.break_load_at:
                raise TierUnavailable("fake", "gone in the middle of a load")
            # A copy that is scrambled when the iterator moves on: who keeps a view too long, notices.
            held = [bytearray(part) for part in self._store.blocks[self._chain.ids[index]]]
            if faults.overwritten:
                held = [bytearray(b"\x3f" * len(part)) for part in held]
            self._given += held
            yield FakeBlock(index, self._store.tier, [memoryview(part).toreadonly() for part in held])
            if not faults.whole:
                self._scramble()

    def _scramble(self) -> None:
        for part in self._given:
            part[:] = b"\x7f" * len(part)

    def intact(self) -> bool:
        self._store.when_asked()
        return not self._store.faults.overwritten

    def close(self) -> None:
        self._store.open_loads.discard(id(self))
        self._scramble()

    def __enter__(self) -> Self:
        self._store.open_loads.add(id(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FakeSave:
    def __init__(self, store: FakeStore, chain: Chain, indices: list[int], num_refused: int) -> None:
        self._store, self._chain = store, chain
        self.indices: Sequence[int] = tuple(indices)
        self.num_refused = num_refused
        self._open = {index: [bytearray(part.num_bytes) for part in store.layout_of(chain).parts] for index in indices}

    def views(self, index: int) -> Sequence[memoryview | None]:
        return [memoryview(part) for part in self._open[index]]

    def commit(self, *indices: int) -> int:
        chosen = indices or tuple(self._open)
        for index in chosen:
            # As they are now: what is copied into them later is too late.
            self._store.blocks[self._chain.ids[index]] = [bytearray(part) for part in self._open.pop(index)]
            self._store.roots[self._chain.ids[index]] = self._chain.root.id
        return len(chosen)

    def abort(self) -> None:
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class FakeAnnouncement:
    def __init__(self, store: FakeStore, start: int, stop: int) -> None:
        self._store = store
        store.announced.append((start, stop))
        store.live_announcements += 1

    def renew(self) -> None:
        self._store.enter("renew")

    def withdraw(self) -> None:
        self._store.live_announcements -= 1


class FakeStore:
    """Implements `kvstore.api.Store`."""

    def __init__(self, *, tier: str = HOST_TIER) -> None:
        self.faults = Faults()
        self.tier = tier
        self.blocks: dict[BlockId, list[bytearray]] = {}
        self.roots: dict[BlockId, RootId] = {}
        self.cleared: list[RootId | None] = []
        self.calls: list[str] = []
        self.announced: list[tuple[int, int]] = []
        self.touched: list[int] = []
        self.live_announcements = 0
        self.saved_s = 0.0
        self.hints: list[Hint] = []
        self.waits: list[float | None] = []
        """What each match was told to wait."""
        self.soon: list[bool] = []
        """Whether it said that it would come back."""
        self.similar = 0
        """Tokens that `match_partial` finds."""
        self.open_loads: set[int] = set()
        self.when_asked: Callable[[], None] = lambda: None
        self.num_pending = 0
        self._holds: dict[str, tuple[Chain, int]] = {}
        self._layouts: dict[ModelId, BlockLayout] = {}

    def enter(self, method: str) -> None:
        self.calls.append(method)
        if method in self.faults.failing or "all" in self.faults.failing:
            raise TierUnavailable("fake", f"{method} does not answer")

    def layout_of(self, chain: Chain) -> BlockLayout:
        return self._layouts[chain.root.model]

    def open(self, model: ModelId) -> BlockLayout:
        self._layouts[model] = layout_of(model)
        return self._layouts[model]

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
        self.enter("match")
        self.hints.append(hint)
        self.waits.append(wait_s)
        self.soon.append(soon)
        run = 0
        while run < len(chain) and chain.ids[run] in self.blocks:
            run += 1
        self._holds[request] = (chain, run)
        on_host = run if self.tier == HOST_TIER else 0
        return Match(run, on_host, self.num_pending, True, ((self.tier, run),) if run else ())

    def match_partial(self, request: str) -> int:
        self.enter("match_partial")
        return self.similar

    def load(self, request: str, num_blocks: int | None = None, *, start: int = 0, partial_tokens: int = 0) -> FakeLoad:
        self.enter("load")
        if request not in self._holds:
            raise UnknownLease(f"request {request!r} has no hold")
        chain, run = self._holds.pop(request)
        stop = run if num_blocks is None else min(run, num_blocks)
        return FakeLoad(self, chain, min(start, stop), stop)

    def forget(self, request: str) -> None:
        self.enter("forget")
        self._holds.pop(request, None)

    def announce(self, chain: Chain, start: int, stop: int) -> FakeAnnouncement:
        self.enter("announce")
        return FakeAnnouncement(self, start, stop)

    def save(
        self,
        chain: Chain,
        start: int,
        stop: int,
        *,
        parts: Sequence[int] | None = None,
        hint: Hint = NO_HINT,
    ) -> FakeSave:
        self.enter("save")
        self.hints.append(hint)
        absent = [index for index in range(start, stop) if chain.ids[index] not in self.blocks]
        orphan = start > 0 and chain.ids[start - 1] not in self.blocks
        if self.faults.full or orphan:
            return FakeSave(self, chain, [], len(absent))
        return FakeSave(self, chain, absent, 0)

    def touch(self, chain: Chain, num_blocks: int, hint: Hint = NO_HINT) -> None:
        self.enter("touch")
        self.touched.append(num_blocks)

    def clear(self, root: RootId | None = None) -> int:
        self.enter("clear")
        self.cleared.append(root)
        gone = [block for block in self.blocks if root in (None, self.roots[block])]
        for block in gone:
            del self.blocks[block]
        return len(gone)

    def note_saved(self, seconds: float) -> None:
        self.saved_s += seconds

    def stats(self) -> Mapping[str, float]:
        return {"host.blocks": len(self.blocks)}

    def check(self) -> list[str]:
        """Anything a request should have let go of by now."""
        faults = [f"hold of {request} is left" for request in self._holds]
        if self.live_announcements:
            faults.append(f"{self.live_announcements} announcements are left")
        if self.open_loads:
            faults.append(f"{len(self.open_loads)} loads are open")
        return faults

    def close(self) -> None: ...
