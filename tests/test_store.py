# SPDX-License-Identifier: Apache-2.0
"""The store end to end over a fake lower tier: loads, saves, holds, demotion, faults."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kvstore.api import Hint
from kvstore.block import BlockId, Chain, ModelId, PartKey, Root, RootId
from kvstore.config import StoreConfig
from kvstore.delivery import Cells, ReadyBlock
from kvstore.errors import TierTimeout, TierUnavailable
from kvstore.lease import LeaseBook
from kvstore.marks import MARK_TTL_S, Marks
from kvstore.pace import Pace
from kvstore.save import BlockSave
from kvstore.store import KVStore
from kvstore.tiers.base import AS_USED, Later, More
from tests.conftest import MakeStore, chain_of, content, load_all, save_all
from tests.fakes import DictTier, FakeClock
from tests.waiting import wait_until

THROUGH = {"write": "through"}


def test_a_load_whose_lease_ran_out_says_so(make_store: MakeStore, root: Root, clock: FakeClock) -> None:
    store = make_store()
    chain = chain_of(root, 4)
    save_all(store, chain)
    store.match(chain, "r")
    with store.load("r") as load:
        blocks = iter(load)
        next(blocks)
        clock.time_s += 100
        leases: LeaseBook = store._leases
        leases.expire(clock.now_s())
        assert not load.intact()
        assert list(blocks) == []


# -- lower tiers -----------------------------------------------------------------------------------------------


def test_a_block_written_through_comes_back_from_the_lower_tier(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 9)
    save_all(store, chain)
    assert store.flush()
    assert len(tier.values) == 9
    store.drop_host()
    assert load_all(store, chain) == ["dict"] * 9
    assert load_all(store, chain) == ["host"] * 9, "a hit below is promoted"


def test_the_head_comes_from_the_host_and_the_tail_from_below(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 8)
    save_all(store, chain)
    store.flush()
    store._host.pool.remove([chain.ids[3]])
    tier.asked.clear()
    match = store.match(chain, "r", wait_s=5)
    assert match.tiers == (("host", 3), ("dict", 5))
    assert tier.asked == [5], "the lower tier is asked only about what the host lacks"
    store.forget("r")
    assert load_all(store, chain) == ["host"] * 3 + ["dict"] * 5


def test_on_reuse_writes_only_what_a_second_request_asked_for(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover={"write": "on_reuse"})
    chain = chain_of(root, 6)
    save_all(store, chain, 0, 6)
    store.flush()
    assert len(tier.values) == 0
    load_all(store, chain_of(root, 3), request="again")
    store.flush()
    assert set(tier.values) == set(chain.part_keys(0, 3, (0,)))


def test_on_evict_writes_the_cold_end_of_a_full_host(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(20, tiers=[tier], mover={"write": "on_evict"})
    save_all(store, chain_of(root, 4))
    store.flush()
    assert len(tier.values) == 0
    for seed in range(1, 5):
        save_all(store, chain_of(root, 4, seed=seed))
    with store._mover._wake:
        assert store._mover._wake.wait_for(lambda: len(tier.values) >= 2, timeout=5)
    assert tier.check() == []


def test_a_tier_that_lost_its_blocks_gets_the_whole_chain_again(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 8)
    save_all(store, chain, 0, 4)
    store.flush()
    tier.values.clear()
    save_all(store, chain, 4, 8)
    store.flush()
    assert len(tier.values) == 8
    assert tier.check() == []


def test_a_dead_tier_is_a_shorter_hit_and_is_filled_when_it_returns(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain, other = chain_of(root, 6), chain_of(root, 4, seed=1)
    tier.down = True
    save_all(store, chain)
    store.flush()
    assert load_all(store, chain) == ["host"] * 6
    assert load_all(store, other, request="other") == []
    assert store.stats()["mover.failed_blocks"] >= 6
    tier.down = False
    load_all(store, chain)
    store.flush()
    assert len(tier.values) == 6


def test_a_window_does_not_move_over_host_blocks_that_were_not_copied(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    big = make_store(64, tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 40)
    save_all(big, chain)
    big.flush()
    small = make_store(8, tiers=[tier])
    head = chain_of(root, 40)
    save_all(small, head, 0, 8)  # the host's run fills the arena
    reading = threading.Event()
    tier.before_read = lambda key: reading.set()
    assert small.match(chain, "r", wait_s=5).num_host_blocks == 8
    with small.load("r") as load:
        for block in load:
            if block.index < 8:
                assert not reading.wait(0.05), f"a window opened while block {block.index} was being copied"
            for part, view in enumerate(block.views):
                assert bytes(view) == content(chain, block.index, part, len(view)), f"block {block.index}"
        assert load.intact()
    assert reading.is_set()


def test_two_loads_of_one_chain_fetch_each_block_once(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 20)
    save_all(store, chain)
    store.flush()
    store.drop_host()
    reads: list[PartKey] = []
    tier.before_read = reads.append
    both = threading.Barrier(2)
    results: list[int] = []

    def run(name: str) -> None:
        store.match(chain, name, wait_s=5)
        both.wait(5)
        results.append(len(indices_of(store, name)))

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [20, 20]
    assert len(reads) == len(set(reads)) == 20


def indices_of(store: KVStore, request: str) -> list[int]:
    with store.load(request) as load:
        return [block.index for block in load]


def test_a_match_served_by_the_host_touches_the_whole_chain_below(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 5)
    save_all(store, chain)
    load_all(store, chain)
    store.flush()
    assert chain.part_keys(0, 5, (0,)) in tier.touched


def test_a_queue_over_its_bound_drops_writes_and_counts_them(make_store: MakeStore, root: Root) -> None:
    gate = threading.Event()

    class StuckTier(DictTier):
        def _answer(self) -> None:
            gate.wait(10)

    tier = StuckTier()
    store = make_store(tiers=[tier], mover={**THROUGH, "queue_bytes": 4 * 4096})
    for seed in range(4):
        save_all(store, chain_of(root, 4, seed=seed))
    gate.set()
    store.flush()
    assert store.stats()["mover.dropped_blocks"] >= 4
    assert tier.check() == []


# -- refusals --------------------------------------------------------------------------------------------------


def test_marks_that_nobody_renews_are_forgotten(root: Root, clock: FakeClock) -> None:
    marks = Marks(clock)
    chain = chain_of(root, 3)
    dead, alive = marks.add(root.id, chain.ids[:2]), marks.add(root.id, chain.ids[2:])
    clock.time_s += MARK_TTL_S + 1
    alive.renew()
    marks.sweep()
    assert (len(marks), marks.run(root.id, chain.ids, 2)) == (1, 1)
    dead.withdraw()
    assert len(marks) == 1


# -- several parts a block -------------------------------------------------------------------------------------


@pytest.fixture
def gridded(model: ModelId) -> Root:
    """Two parts a block, one a head."""
    return Root(dataclasses.replace(model, part_heads=1))


def test_a_block_that_lacks_one_part_below_ends_the_load_and_leaves_no_trace(
    make_store: MakeStore, gridded: Root
) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    store.open(gridded.model)
    chain = chain_of(gridded, 8)
    save_all(store, chain)
    store.flush()
    store.drop_host()
    store.match(chain, "r", wait_s=5)
    lost = tier.values.pop(PartKey(gridded.id, chain.ids[3], 1))
    with store.load("r") as load:
        assert [block.index for block in load] == [0, 1, 2]
    assert store.match(chain, "r").num_host_blocks == 3
    store.forget("r")
    assert store.stats()["host.used_bytes"] == 3 * 2 * 4096
    tier.values[PartKey(gridded.id, chain.ids[3], 1)] = lost


@pytest.mark.parametrize("together", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("lost", [0, 1, 8, 9, 22, 23])
def test_a_load_ends_before_the_first_part_that_is_lost_however_many_come_at_once(
    make_store: MakeStore, gridded: Root, together: int, lost: int
) -> None:
    tier = DictTier()
    tier.together = together
    store = make_store(tiers=[tier], mover=THROUGH)
    store.open(gridded.model)
    chain = chain_of(gridded, 12)
    save_all(store, chain)
    assert store.flush()
    store.drop_host()
    store.match(chain, "load", wait_s=5)
    keys = chain.part_keys(0, 12, (0, 1))
    del tier.values[keys[lost]]  # after it was found
    read: list[PartKey] = []
    tier.before_read = read.append
    with store.load("load") as load:
        for block in load:
            for part, view in enumerate(block.views):
                assert bytes(view) == content(chain, block.index, part, len(view))
        assert load.intact()
    assert together > 1 or len(read) <= lost + 2, "what follows is of no use"
    assert load_all(store, chain) == ["host"] * (lost // 2)
    tier.remove(keys)  # a chain with a hole in it is what `check` would find


def test_a_tier_that_yields_other_keys_than_come_next_is_not_believed(make_store: MakeStore, root: Root) -> None:
    class Astray(DictTier):
        """Tells of a part that it did not bring, among others that it did."""

        def read(self, into: Mapping[PartKey, memoryview], deadline_s: float) -> Iterator[list[PartKey]]:
            keys = list(into)
            for keys_at_once in super().read({key: into[key] for key in keys if key != keys[3]}, deadline_s):
                yield keys_at_once[:4] + keys_at_once[5:]

    tier = Astray()
    tier.together = 100
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 9)
    save_all(store, chain)
    assert store.flush()
    store.drop_host()
    assert load_all(store, chain) == ["dict"] * 3


def matched_below(make_store: MakeStore, root: Root) -> tuple[KVStore, Chain]:
    """A chain of 9 blocks that a lower tier holds alone, matched for request `load`; leases last 10 s."""
    store = make_store(tiers=[DictTier()], mover=THROUGH, request={"lease_s": 10})
    chain = chain_of(root, 9)
    save_all(store, chain)
    assert store.flush()
    store.drop_host()
    store.match(chain, "load", wait_s=5)
    return store, chain


def test_a_consumer_that_takes_its_time_over_blocks_that_came_at_once_keeps_its_lease(
    make_store: MakeStore, root: Root, clock: FakeClock
) -> None:
    store, chain = matched_below(make_store, root)
    leases: LeaseBook = store._leases
    with store.load("load") as load:
        load.wait_for(8)  # they are all there
        for block in load:
            assert bytes(block.views[0]) == content(chain, block.index, 0, len(block.views[0]))
            clock.time_s += 6
            assert leases.expire(clock.now_s()) == 0
        assert load.intact()
    assert block.index == 8


@pytest.mark.parametrize("how", ["late", "taken"])
def test_blocks_that_came_at_once_are_handed_out_no_more_once_the_lease_ended(
    make_store: MakeStore, root: Root, clock: FakeClock, how: str
) -> None:
    store, _ = matched_below(make_store, root)
    leases: LeaseBook = store._leases
    with store.load("load") as load:
        load.wait_for(8)
        blocks = iter(load)
        assert [next(blocks).index for _ in range(3)] == [0, 1, 2]
        if how == "late":
            clock.time_s += 11
        leases.expire(clock.now_s() + (0 if how == "late" else 100))
        assert list(blocks) == []
        assert not load.intact()


def test_parts_written_by_two_ranks_make_one_block(make_store: MakeStore, gridded: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    store.open(gridded.model)
    chain = chain_of(gridded, 3)
    for part in (0, 1):
        assert store.match(chain, "both").num_blocks == 0
        with store.save(chain, 0, 3, parts=(part,)) as save:
            for index in save.indices:
                view = save.views(index)[0]
                assert view is not None
                view[:] = content(chain, index, part, len(view))
            save.commit()
        assert store.match(chain, "rank", parts=(part,)).num_blocks == 3
    store.forget("both")
    store.forget("rank")
    assert load_all(store, chain) == ["host"] * 3
    store.flush()
    store.drop_host()
    assert load_all(store, chain) == ["dict"] * 3


def test_a_tier_that_came_back_empty_is_filled_again_by_use(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain, other = chain_of(root, 4), chain_of(root, 2, seed=1)
    save_all(store, chain)
    store.flush()
    tier.down = True
    save_all(store, other)
    store.flush()
    tier.values.clear()
    tier.down = False
    load_all(store, other, request="other")
    store.flush()
    load_all(store, chain)
    store.flush()
    assert len(tier.values) == 6


def test_a_chain_that_grew_is_asked_for_again(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    whole = chain_of(root, 6)
    save_all(store, whole)
    store.flush()
    store.drop_host()
    tokens = b"".join(whole.meta(index).tokens for index in range(6))
    growing = Chain(root, np.frombuffer(tokens, "<u4")[: 3 * 16])
    assert store.match(growing, "r", wait_s=5).num_blocks == 3
    growing.extend(np.frombuffer(tokens, "<u4")[3 * 16 :])
    assert store.match(growing, "r", wait_s=5).num_blocks == 6
    store.forget("r")


def test_a_block_is_handed_out_only_when_every_part_of_it_is_whole(make_store: MakeStore, gridded: Root) -> None:
    tier = DictTier()
    full = make_store(tiers=[tier], mover=THROUGH)
    full.open(gridded.model)
    chain = chain_of(gridded, 3)
    save_all(full, chain)
    full.flush()
    store = make_store(tiers=[tier], request={"read_deadline_s": 0.2})
    store.open(gridded.model)
    with store.save(chain, 0, 3, parts=(0,)):  # another rank is writing part 0 of each, and does not finish
        store.match(chain, "r", wait_s=5)
        with store.load("r") as load:
            assert list(load) == []
    assert load_all(store, chain) == ["dict"] * 3


def test_blocks_that_others_begin_while_a_batch_is_prepared_end_that_batch_and_not_the_load(
    make_store: MakeStore, root: Root
) -> None:
    few, num_blocks = (8 << 20) // 4096, (8 << 20) // 4096 + 12
    prepared: list[tuple[int, int]] = []
    saves: list[BlockSave] = []

    class Between(DictTier):
        """Somebody begins to save what comes after the first of a batch, before their successors have slots."""

        def read_on(self, into: Mapping[PartKey, memoryview], more: More, deadline_s: float) -> Iterator[list[PartKey]]:
            if not prepared:
                saves.append(store.save(chain, few, few + 2))
            prepared.append((len(into), len(rest := more())))
            return self.read({**into, **rest}, deadline_s)

    tier = Between()
    tier.together = 64
    store = make_store(4 * num_blocks, tiers=[tier], mover=THROUGH)
    chain = chain_of(root, num_blocks)
    save_all(store, chain)
    assert store.flush()
    store.drop_host()

    def finish() -> None:
        wait_until(lambda: store._host.pool.leading(chain.ids, 1, chain.root.id) == few)
        with saves[0] as save:
            for index in save.indices:
                view = save.views(index)[0]
                assert view is not None
                view[:] = content(chain, index, 0, len(view))
            save.commit()

    with ThreadPoolExecutor(1) as threads:
        finished = threads.submit(finish)
        assert len(load_all(store, chain)) == num_blocks
        finished.result()
    assert prepared == [(few, 0), (10, 0)]


def test_nothing_is_read_where_others_do_not_bring_what_comes_first(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH, request={"read_deadline_s": 0.1})
    chain = chain_of(root, 8)
    save_all(store, chain)
    assert store.flush()
    store.drop_host()
    read: list[PartKey] = []
    tier.before_read = read.append
    with store.save(chain, 0, 2):  # by somebody who does not get done
        store.match(chain, "r", wait_s=5)
        with store.load("r") as load:
            assert (list(load), read) == ([], [])


def test_blocks_kept_after_a_window_moved_on_are_refused_not_shown_other_bytes(
    make_store: MakeStore, root: Root
) -> None:
    tier = DictTier()
    big = make_store(64, tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 20)
    save_all(big, chain)
    big.flush()
    small = make_store(4, tiers=[tier])
    small.match(chain, "r", wait_s=5)
    with small.load("r") as load:
        kept = list(load)
        assert len(kept) == 20
        wrong = 0
        for block in kept[:-1]:
            try:
                wrong += bytes(block.views[0]) != content(chain, block.index, 0, len(block.views[0]))
            except ValueError:  # released
                continue
        assert wrong == 0
        assert list(load) == [], "a second pass cannot see what windows moved over"


def test_a_view_made_while_its_block_is_taken_back_is_refused() -> None:
    def readable(slot: int, num_bytes: int) -> memoryview:
        block.take_back()
        return memoryview(bytes(num_bytes))

    block = ReadyBlock(0, "dict", (0,), Cells(readable, (8,)))
    with pytest.raises(ValueError, match="released"):
        bytes(block.views[0])
    with pytest.raises(ValueError, match="released"):
        bytes(block.views[0])
    taken = ReadyBlock(0, "dict", (0,), Cells(readable, (8,)))
    taken.take_back()
    with pytest.raises(ValueError, match="moved its window"):
        bytes(taken.views[0])


def test_a_window_of_a_load_whose_lease_died_ends(make_store: MakeStore, root: Root, clock: FakeClock) -> None:
    tier = DictTier()
    big = make_store(64, tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 8)
    save_all(big, chain)
    big.flush()
    small = make_store(4, tiers=[tier], request={"read_deadline_s": 5, "lease_s": 10})
    small.match(chain, "r", wait_s=5)
    load = small.load("r")
    blocks = iter(load)
    taken = [next(blocks).index for _ in range(4)]
    clock.time_s += 11
    while load.intact():  # the sweeper ends the lease
        threading.Event().wait(0.01)
    other = small.match(chain, "other")  # and another request pins what it had pinned
    assert (taken, other.num_host_blocks) == ([0, 1, 2, 3], 4)
    assert list(blocks) == []
    load.close()
    small.forget("other")


def test_of_a_save_nothing_is_published_where_nothing_is_named(store: KVStore, root: Root) -> None:
    """As a repeated commit of the service does: none of what it names is open any more."""
    with store.save(chain_of(root, 2), 0, 2) as save:
        assert save.publish([]) == []
        assert save.num_open == 2


def test_a_tier_that_raises_anything_gives_its_queue_back(make_store: MakeStore, root: Root) -> None:
    class Buggy(DictTier):
        broken = True

        def write(self, *args: object) -> set[PartKey]:  # type: ignore[override]
            if self.broken:
                raise ZeroDivisionError
            return super().write(*args)  # type: ignore[arg-type]

    tier = Buggy()
    store = make_store(tiers=[tier], mover=THROUGH)
    save_all(store, chain_of(root, 4))
    assert store.flush(5)
    assert store.stats()["mover.queued_bytes"] == 0
    tier.broken = False
    save_all(store, chain_of(root, 4, seed=1))
    assert store.flush(5)
    assert len(tier.values) == 4


def test_a_slow_write_budget_pins_nothing(root: Root) -> None:
    tier = DictTier()
    mover = {**THROUGH, "write_bytes_per_s": 1, "flush_s": 0}
    values = {"host": {"capacity_bytes": 8 * 4096, "prefault": False}, "mover": mover}
    with KVStore(StoreConfig.load(values, environ={}), tiers=[tier]) as store:
        store.open(root.model)
        save_all(store, chain_of(root, 8))
        while not tier.values:
            threading.Event().wait(0.01)
        other = chain_of(root, 8, seed=1)
        assert save_all(store, other) == 8, "what waits for its budget kept a save from finding room"
        assert store.check() == []


def test_closing_a_store_ends_its_loads(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    big = make_store(64, tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 20)
    save_all(big, chain)
    big.flush()
    reading, go = threading.Event(), threading.Event()

    def wait(key: PartKey) -> None:
        reading.set()
        go.wait(5)

    store = KVStore(StoreConfig.load({"host": {"capacity_bytes": 8 * 4096}}, environ={}), tiers=[tier])
    store.open(root.model)
    store.match(chain, "r", wait_s=5)
    tier.before_read = wait
    load = store.load("r")
    assert reading.wait(5)
    closing = threading.Thread(target=store.close)
    closing.start()
    while not load._delivery.stopped:
        threading.Event().wait(0.01)
    go.set()
    closing.join(5)
    assert not closing.is_alive()
    assert list(load) == []
    load.close()
    tier.before_read = lambda key: None


def test_a_clear_that_a_tier_did_not_carry_out_says_so_and_is_carried_out_elsewhere(
    make_store: MakeStore, root: Root
) -> None:
    class Other(DictTier):
        name = "other"

    tier, other = DictTier(), Other()
    store = make_store(tiers=[tier, other], mover=THROUGH)
    chain = chain_of(root, 6)
    save_all(store, chain)
    store.flush()
    tier.down = True
    with pytest.raises(TierUnavailable, match="dict"):
        store.clear(root.id)
    assert (len(other.values), store.stats()["host.blocks"]) == (0, 0)
    assert store.stats()["dict.clear_failures"] == 1
    tier.down = False
    store.clear(root.id)
    assert load_all(store, chain) == []


def test_what_is_being_written_down_during_a_clear_does_not_outlast_it(make_store: MakeStore, root: Root) -> None:
    writing, go = threading.Event(), threading.Event()

    class Slow(DictTier):
        def write(self, *args: Any, **kwargs: Any) -> set[PartKey]:
            writing.set()
            assert go.wait(10)
            return super().write(*args, **kwargs)

    tier = Slow()
    store = make_store(tiers=[tier], mover={**THROUGH, "flush_s": 0.2})
    save_all(store, chain_of(root, 6))
    assert writing.wait(10)
    with pytest.raises(TierTimeout, match="after the clear"):
        store.clear(root.id)
    threading.Timer(0.05, go.set).start()
    store.flush()
    assert len(tier.values) == 6, "it came after the clear, as was said"
    store.clear(root.id)
    assert len(tier.values) == 0
    writing.clear(), go.clear()
    save_all(store, chain_of(root, 6, seed=1))
    assert writing.wait(10)
    threading.Timer(0.05, go.set).start()
    store.clear(root.id)
    assert len(tier.values) == 0, "it was waited for"


def test_what_a_load_brings_up_during_a_clear_does_not_outlast_it(make_store: MakeStore, root: Root) -> None:
    class Late(DictTier):
        def clear(self, root: RootId | None) -> None:
            with store.load("r") as load:  # the host was cleared, and this tier not yet
                brought.append(len(list(load)))
            super().clear(root)

    brought: list[int] = []
    store = make_store(tiers=[Late()], mover=THROUGH)
    chain = chain_of(root, 6)
    save_all(store, chain)
    store.flush()
    store.drop_host()
    assert store.match(chain, "r", wait_s=5).num_blocks == 6
    store.clear(root.id)
    assert brought == [6]
    assert load_all(store, chain) == []


def test_one_use_that_cannot_be_passed_down_takes_no_other_along(make_store: MakeStore, root: Root) -> None:
    go = threading.Event()

    class Odd(DictTier):
        def touch(self, keys: Sequence[PartKey], hint: Hint, later: Later = AS_USED) -> None:
            assert go.wait(10)
            super().touch(keys, hint, later)
            if len(self.touched) == 2:
                raise RuntimeError("a bug")

        def write(self, *args: Any, **kwargs: Any) -> set[PartKey]:
            raise RuntimeError("another")

    tier = Odd()
    store = make_store(tiers=[tier], mover=THROUGH)
    chains = [chain_of(root, 3, seed=seed) for seed in range(4)]
    for number, chain in enumerate(chains):  # the first keeps the thread until the others wait for it
        store.touch(chain, 3)
        if number == 0:
            wait_until(lambda: store._mover._busy)
    lost: list[BlockId] = []
    store._mover.lost = lost.extend
    save_all(store, chains[0])
    go.set()
    store.flush()
    assert len(tier.touched) == 4
    assert lost == chains[0].ids[:3]
    assert store.stats()["mover.failed_blocks"] == 3
    assert store.stats()["mover.errors"] == 2


@pytest.mark.parametrize("end", ["load", "forget", "another chain"])
def test_what_nobody_waits_for_is_not_asked_of_lower_tiers(make_store: MakeStore, root: Root, end: str) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier])
    save_all(store, chain_of(root, 3))
    assert not store.match(chain_of(root, 8), "r").settled
    if end == "load":
        with store.load("r") as load:
            assert [block.index for block in load] == [0, 1, 2]
    elif end == "forget":
        store.forget("r")
    else:
        store.match(chain_of(root, 3), "r")
        store.forget("r")
    store.close()  # which ends what was asked
    assert tier.asked == []


def test_a_question_that_was_put_off_is_asked_once_and_answered_to_who_waits(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    save_all(store, chain_of(root, 8))
    store.flush()
    store.drop_host()
    save_all(store, chain_of(root, 3))
    chain = chain_of(root, 8)
    assert not store.match(chain, "r").settled
    found = store.match(chain, "r", wait_s=5)
    assert (found.settled, found.num_blocks) == (True, 8)
    assert tier.asked == [5]
    store.forget("r")


def test_uses_of_one_head_are_passed_down_together(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 5)
    save_all(store, chain)
    store.flush()
    began_s = time.monotonic()
    for _ in range(2000):
        store.match(chain, "r")
        store.forget("r")
    store.flush()
    assert 1 <= len(tier.touched) <= 2 + (time.monotonic() - began_s) / 0.5


def test_a_use_is_passed_down_without_anybody_asking_for_it(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 5)
    save_all(store, chain)
    store.flush()
    load_all(store, chain)
    wait_until(lambda: chain.part_keys(0, 5, (0,)) in tier.touched)


def test_a_use_of_blocks_that_lie_below_queues_nothing(make_store: MakeStore, root: Root) -> None:
    class Gated(DictTier):
        def __init__(self) -> None:
            super().__init__()
            self.writing, self.gate = threading.Event(), threading.Event()

        def write(self, *args: Any, **named: Any) -> set[PartKey]:
            self.writing.set()
            self.gate.wait(10)
            return super().write(*args, **named)

    tier = Gated()
    store = make_store(tiers=[tier], mover={"write": "on_reuse"})
    below, other = chain_of(root, 4), chain_of(root, 6, seed=1)
    for chain in (below, other):
        save_all(store, chain)
    tier.gate.set()
    load_all(store, below)
    store.flush()
    tier.gate.clear()
    tier.writing.clear()
    load_all(store, other, request="other")
    assert tier.writing.wait(10)  # the thread is at it, and takes nothing else
    queued_bytes = store.stats()["mover.queued_bytes"]
    load_all(store, below, request="again")
    assert store.stats()["mover.queued_bytes"] == queued_bytes > 0
    tier.gate.set()


def test_a_tier_that_refuses_is_not_asked_and_keeps_nobody_waiting(make_store: MakeStore, root: Root) -> None:
    class Refusing(DictTier):
        refusing = True

        @property
        def refuses(self) -> bool:
            return self.refusing

    tier = Refusing()
    store = make_store(tiers=[tier])
    chain = chain_of(root, 3)
    match = store.match(chain, "while it refuses")
    assert match.settled
    assert match.num_blocks == 0
    assert tier.asked == []
    assert store.stats()["dict.lookup_failures"] == 1
    tier.refusing = False
    store.match(chain, "later", wait_s=5)
    assert tier.asked == [3]
    store.forget("while it refuses")
    store.forget("later")


def test_a_batch_is_what_a_tier_moves_in_a_quarter_of_its_deadline_by_the_batch_before() -> None:
    pace, mib = Pace(128 << 20, 512 << 20, 4.0), 1 << 20
    assert pace.num_bytes == 128 * mib
    pace.took(0, 0.0)
    assert pace.num_bytes == 128 * mib, "nothing that came says nothing"
    pace.took(128 * mib, 0.5)
    assert pace.num_bytes == 256 * mib
    pace.took(256 * mib, 0.1)
    assert pace.num_bytes == 512 * mib
    pace.took(512 * mib, 10.0)
    assert pace.num_bytes == 128 * mib
    pace.took(mib, 0.0)
    pace.failed()
    assert pace.num_bytes == 128 * mib
    assert Pace(128 * mib, 48 * mib, 4.0).num_bytes == 48 * mib, "of a small host no more than its share"
