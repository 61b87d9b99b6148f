# SPDX-License-Identifier: Apache-2.0
"""What goes down at eviction, and what uses and loads say meanwhile, over a tier that misbehaves on request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import pytest

from kvstore.api import NO_HINT, Hint
from kvstore.block import BlockId, BlockMeta, Chain, PartKey, Root
from kvstore.errors import TierUnavailable
from kvstore.store import KVStore
from kvstore.tiers.base import AS_USED, Later
from tests.conftest import MakeStore, chain_of, save_all
from tests.fakes import DictTier
from tests.waiting import wait_until

ON_EVICT: dict[str, object] = {"write": "on_evict"}
EXCLUSIVE: dict[str, object] = {"tiering": "exclusive"}


class Watched(DictTier):
    """Calls what a test gives it, once, at its next write, touch or retirement; remembers the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.at_next: list[Callable[[], None]] = []
        self.num_writes = 0
        self.uses: list[tuple[list[PartKey], Hint]] = []
        self.retired: list[list[PartKey]] = []

    @property
    def refuses(self) -> bool:
        return self.down

    def _call(self) -> None:
        if self.at_next:
            self.at_next.pop()()

    def write(
        self,
        parts: Mapping[PartKey, memoryview],
        meta: Mapping[BlockId, BlockMeta],
        deadline_s: float,
        later: Later = AS_USED,
    ) -> set[PartKey]:
        self.num_writes += 1
        self._call()
        return super().write(parts, meta, deadline_s, later)

    def touch(self, keys: Sequence[PartKey], hint: Hint, later: Later = AS_USED) -> None:
        self._call()
        self.uses.append((list(keys), hint))

    def retire(self, keys: Sequence[PartKey], start: int) -> None:
        self._call()
        self.retired.append(list(keys))


def fill(store: KVStore, root: Root) -> None:
    """All but a block or two of 20."""
    for seed in range(5):
        assert save_all(store, chain_of(root, 4, seed=seed)) == 4


def fails_of_a_bug() -> None:
    raise RuntimeError("a bug")


# ── at eviction ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_comes_while_cold_blocks_are_written_has_the_next_of_them_written(
    make_store: MakeStore, root: Root
) -> None:
    tier = Watched()
    store = make_store(20, tiers=[tier], mover=ON_EVICT)
    late = chain_of(root, 4, seed=100)
    tier.at_next.append(lambda: save_all(store, late) and None)
    fill(store, root)
    wait_until(lambda: tier.num_writes >= 2)


def test_a_bug_while_cold_blocks_are_written_has_them_written_again(make_store: MakeStore, root: Root) -> None:
    tier = Watched()
    store = make_store(20, tiers=[tier], mover=ON_EVICT)
    tier.at_next.append(fails_of_a_bug)
    fill(store, root)
    wait_until(lambda: len(tier.values) >= 2)
    assert store.stats()["mover.errors"] == 1


def test_a_tier_that_fails_under_a_write_gets_those_blocks_when_it_takes_calls_again(
    make_store: MakeStore, root: Root
) -> None:
    tier = Watched()
    store = make_store(20, tiers=[tier], mover=ON_EVICT)
    failed = threading.Event()

    def fails() -> None:
        tier.down = True
        failed.set()
        raise TierUnavailable(tier.name, "went away")

    fill_last = chain_of(root, 2, seed=100)
    for seed in range(4):
        save_all(store, chain_of(root, 4, seed=seed))
    assert store.flush(5)
    tier.at_next.append(fails)
    save_all(store, fill_last)
    assert failed.wait(5)
    assert store.flush(5)
    tier.down = False
    wait_until(lambda: len(tier.values) >= 1)


def test_chains_whose_heads_a_tier_lost_go_down_whole_wherever_in_a_drain_they_come(
    make_store: MakeStore, root: Root
) -> None:
    tier = DictTier()
    store = make_store(512, tiers=[tier], mover=EXCLUSIVE)
    chains = [chain_of(root, 6, seed=seed) for seed in range(60)]
    for chain in chains:
        save_all(store, chain, 0, 1)
    assert store.drain(5)
    tier.values.clear()
    for chain in chains:
        save_all(store, chain, 1, 6)  # three blocks are written at a time: of one chain or of two
    assert store.drain(5)
    assert len(tier.values) == 360
    assert tier.check() == []


def test_a_bug_in_a_tier_that_gives_blocks_up_leaves_nothing_pinned(make_store: MakeStore, root: Root) -> None:
    tier = Watched()
    store = make_store(tiers=[tier], mover=EXCLUSIVE)
    chain = chain_of(root, 4)
    save_all(store, chain)
    assert store.drain(5)
    tier.at_next.append(fails_of_a_bug)
    store.touch(chain, 4, NO_HINT)
    wait_until(lambda: store.stats().get("mover.errors", 0) == 1)
    assert store.flush(5)
    assert store.stats()["host.pinned_blocks"] == 0


# ── what waits ──────────────────────────────────────────────────────────────────────────────────────────────────


def while_it_is_busy(store: KVStore, tier: Watched, other: Chain, say: Callable[[], None]) -> None:
    """Say something while the mover passes on a use of another chain."""
    busy, over = threading.Event(), threading.Event()

    def wait() -> None:
        busy.set()
        assert over.wait(5)

    tier.at_next.append(wait)
    store.touch(other, 1, Hint(closed=True))
    assert busy.wait(5)
    say()
    over.set()
    assert store.flush(5)


CLOSED = Hint(closed=True)
HIGH, LOW = Hint(priority=90), Hint(priority=20)


@pytest.mark.parametrize(
    ("first", "second", "passed_on"),
    [(HIGH, LOW, 90), (LOW, HIGH, 90), (HIGH, CLOSED, 50), (Hint(priority=90, closed=True), LOW, 20)],
)
def test_of_two_uses_that_wait_the_higher_priority_is_passed_on_unless_the_conversation_ended(
    first: Hint, second: Hint, passed_on: int, make_store: MakeStore, root: Root
) -> None:
    tier = Watched()
    store = make_store(tiers=[tier])
    chain, other = chain_of(root, 4), chain_of(root, 1, seed=1)

    def say() -> None:
        store.touch(chain, 4, first)
        store.touch(chain, 4, second)

    while_it_is_busy(store, tier, other, say)
    ((_, hint),) = [use for use in tier.uses if len(use[0]) == 4]
    assert (hint.priority, hint.closed) == (passed_on, second.closed)


def test_what_is_said_of_other_parts_of_a_chain_is_passed_on_too(make_store: MakeStore, root: Root) -> None:
    tier = Watched()
    store = make_store(tiers=[tier], mover=EXCLUSIVE)
    chain, other = chain_of(root, 3), chain_of(root, 1, seed=1)
    save_all(store, chain)
    save_all(store, other)
    assert store.drain(5)
    tier.retired.clear()
    mover = store._mover

    def say() -> None:
        for part in (0, 1):
            mover.came_up(chain, 3, (part,))

    while_it_is_busy(store, tier, other, say)
    assert [chain.part_keys(0, 3, (part,)) for part in (0, 1)] == [keys for keys in tier.retired if len(keys) == 3]
