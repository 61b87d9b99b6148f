# SPDX-License-Identifier: Apache-2.0
"""The store end to end over a fake lower tier: loads, saves, holds, demotion, faults."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from kvstore.block import Chain, ModelId, PartKey, Root
from kvstore.errors import ConfigError, LeaseError, UnknownLease
from kvstore.lease import LeaseBook
from kvstore.marks import MARK_TTL_S, Marks
from kvstore.store import KVStore
from tests.conftest import MakeStore, chain_of, content, load_all, save_all
from tests.fakes import DictTier, FakeClock

THROUGH = {"write": "through"}


def test_what_was_saved_is_loaded_byte_for_byte(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 10)
    assert save_all(store, chain) == 10
    assert load_all(store, chain) == ["host"] * 10


def test_a_longer_prompt_matches_its_saved_prefix(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 6)
    save_all(store, chain, 0, 4)
    match = store.match(chain, "r")
    assert (match.num_blocks, match.num_host_blocks, match.settled) == (4, 4, True)
    store.forget("r")


def test_a_miss_allocates_nothing(store: KVStore, root: Root) -> None:
    store.match(chain_of(root, 10), "r")
    assert store.stats()["host.used_bytes"] == 0
    store.forget("r")


def test_saving_again_wants_nothing(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 5)
    save_all(store, chain)
    with store.save(chain, 0, 5) as save:
        assert tuple(save.indices) == ()


def test_blocks_are_matchable_as_each_is_committed(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 3)
    with store.save(chain, 0, 3) as save:
        for index in save.indices:
            view = save.views(index)[0]
            assert view is not None
            view[:] = content(chain, index, 0, len(view))
            save.commit(index)
            assert store.match(chain, "r").num_blocks == index + 1
    store.forget("r")


def test_a_save_abandoned_half_way_leaves_no_trace(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 6)

    def forward_fails_half_way() -> None:
        with store.save(chain, 0, 6) as save:
            save.commit(0, 1)
            raise RuntimeError("forward failed")

    with pytest.raises(RuntimeError, match="forward failed"):
        forward_fails_half_way()
    assert store.match(chain, "r").num_blocks == 2
    store.forget("r")
    assert store.stats()["host.blocks"] == 2


def test_committing_a_block_twice_is_a_clear_error(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 2)
    with store.save(chain, 0, 2) as save:
        save.commit(0)
        with pytest.raises(LeaseError, match=r"blocks \[0\] are not open"):
            save.commit(0)


def test_a_full_host_of_pinned_blocks_refuses_the_save_and_nothing_else(make_store: MakeStore, root: Root) -> None:
    store = make_store(4)
    chain = chain_of(root, 4)
    save_all(store, chain)
    store.match(chain, "holder")
    with store.save(chain_of(root, 3, seed=1), 0, 3) as save:
        assert (tuple(save.indices), save.num_refused) == ((), 3)
    assert store.match(chain, "other").num_blocks == 4
    store.forget("holder")
    store.forget("other")
    assert save_all(store, chain_of(root, 3, seed=1)) == 3


def test_a_hold_keeps_what_was_found_until_the_load(make_store: MakeStore, root: Root) -> None:
    store = make_store(8)
    chain = chain_of(root, 4)
    save_all(store, chain)
    store.match(chain, "r")
    for seed in range(1, 9):
        save_all(store, chain_of(root, 4, seed=seed))
    with store.load("r") as load:
        assert [bytes(block.views[0]) for block in load] == [content(chain, i, 0, 4096) for i in range(4)]


def test_matching_again_replaces_the_hold(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 4)
    save_all(store, chain)
    for _ in range(3):
        store.match(chain, "r")
    assert store.stats()["lease.live"] == 1
    store.forget("r")
    assert store.stats()["host.pinned_blocks"] == 0


def test_an_expired_hold_gives_an_empty_load(make_store: MakeStore, root: Root, clock: FakeClock) -> None:
    store = make_store()
    chain = chain_of(root, 4)
    save_all(store, chain)
    store.match(chain, "r")
    clock.time_s += 11
    store._leases.expire(clock.now_s())
    try:
        with store.load("r") as load:
            assert list(load) == []
            assert not load.intact()
    except UnknownLease:
        pass  # the sweeper was quicker


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


def test_a_load_without_a_match_is_a_clear_error(store: KVStore) -> None:
    with pytest.raises(UnknownLease, match="'nobody' has no hold: call match first"):
        store.load("nobody")


def test_two_salts_share_nothing(store: KVStore, model: ModelId) -> None:
    save_all(store, chain_of(Root(model, salt=b"a"), 4))
    assert store.match(chain_of(Root(model, salt=b"b"), 4), "r").num_blocks == 0
    store.forget("r")


def test_an_announced_range_is_pending_until_committed_withdrawn_or_late(
    make_store: MakeStore, root: Root, clock: FakeClock
) -> None:
    store = make_store()
    chain = chain_of(root, 6)
    mark = store.announce(chain, 0, 5)
    assert store.match(chain, "r").num_pending_blocks == 5
    save_all(store, chain, 0, 2)
    match = store.match(chain, "r")
    assert (match.num_blocks, match.num_pending_blocks) == (2, 3)
    clock.time_s += 2
    mark.renew()
    clock.time_s += 2
    assert store.match(chain, "r").num_pending_blocks == 3
    clock.time_s += 1
    assert store.match(chain, "r").num_pending_blocks == 0
    store.announce(chain, 2, 6).withdraw()
    assert store.match(chain, "r").num_pending_blocks == 0
    store.forget("r")


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


def test_match_does_not_wait_for_a_slow_tier(make_store: MakeStore, root: Root) -> None:
    gate = threading.Event()

    class SlowTier(DictTier):
        def _answer(self) -> None:
            gate.wait(10)

    store = make_store(tiers=[SlowTier()])
    chain = chain_of(root, 4)
    match = store.match(chain, "r")
    assert not match.settled
    gate.set()
    assert store.match(chain, "r", wait_s=5).settled
    store.forget("r")


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


def test_a_tier_dying_in_mid_load_ends_it_early(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 8)
    save_all(store, chain)
    store.flush()
    store.drop_host()

    def die_at_five(key: PartKey) -> None:
        tier.down = key.block == chain.ids[4]

    tier.before_read = die_at_five
    assert load_all(store, chain) == ["dict"] * 5
    tier.down = False


def test_a_block_gone_between_match_and_load_ends_it_there(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 8)
    save_all(store, chain)
    store.flush()
    store.drop_host()
    store.match(chain, "r", wait_s=5)
    del tier.values[PartKey(root.id, chain.ids[3], 0)]
    with store.load("r") as load:
        assert [block.index for block in load] == [0, 1, 2]
    tier.values.clear()


def test_a_load_larger_than_the_arena_goes_in_windows(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    big = make_store(64, tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 40)
    save_all(big, chain)
    big.flush()
    small = make_store(8, tiers=[tier])
    assert load_all(small, chain) == ["dict"] * 40
    assert small.match(chain, "r").num_blocks > 0
    small.forget("r")


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


def test_closing_a_load_early_stops_the_fetch(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 30)
    save_all(store, chain)
    store.flush()
    store.drop_host()
    store.match(chain, "r", wait_s=5)
    with store.load("r") as load:
        next(iter(load))
    assert store.stats()["host.pinned_blocks"] == 0


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


def test_clear_empties_every_tier_under_one_root(make_store: MakeStore, model: ModelId) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    mine, yours = chain_of(Root(model, salt=b"a"), 3), chain_of(Root(model, salt=b"b"), 3)
    save_all(store, mine)
    save_all(store, yours)
    store.clear(mine.root.id)
    assert load_all(store, mine) == []
    assert load_all(store, yours, request="y") == ["host"] * 3
    assert {key.root for key in tier.values} == {yours.root.id}


# -- refusals --------------------------------------------------------------------------------------------------


def test_a_host_smaller_than_one_block_is_refused_naming_both(make_store: MakeStore, model: ModelId) -> None:
    store = make_store(1)
    with pytest.raises(ConfigError, match=r"capacity_bytes is 4096, less than one block of 'tiny', which takes 8192"):
        store.open(dataclasses.replace(model, num_layers=4))


def test_a_model_that_is_not_open_is_refused(store: KVStore, model: ModelId) -> None:
    with pytest.raises(ConfigError, match=r"'other' is not open: call store.open\(model\) first"):
        store.match(chain_of(Root(dataclasses.replace(model, model="other")), 1), "r")


@pytest.mark.parametrize("parts", [[], [0, 0], [1], [-1], [200]])
def test_parts_that_the_layout_lacks_or_names_twice_are_refused(store: KVStore, root: Root, parts: list[int]) -> None:
    chain = chain_of(root, 2)
    with pytest.raises(ConfigError, match="parts are"):
        store.match(chain, "r", parts=parts)
    with pytest.raises(ConfigError, match="parts are"):
        store.save(chain, 0, 2, parts=parts)


def test_marks_that_nobody_renews_are_forgotten(root: Root, clock: FakeClock) -> None:
    marks = Marks(clock)
    chain = chain_of(root, 3)
    dead, alive = marks.add(chain.ids[:2]), marks.add(chain.ids[2:])
    clock.time_s += MARK_TTL_S + 1
    alive.renew()
    marks.sweep()
    assert (len(marks), marks.run(chain.ids, 2)) == (1, 1)
    dead.withdraw()
    assert len(marks) == 1


def test_a_save_outside_the_chain_is_refused(store: KVStore, root: Root) -> None:
    with pytest.raises(ConfigError, match="blocks 1…9 are outside the chain, which has 3 full blocks"):
        store.save(chain_of(root, 3), 1, 9)


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
