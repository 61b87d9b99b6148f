# SPDX-License-Identifier: Apache-2.0
"""Looking at single blocks, bringing a prefix into the host, and a tenant's limit, on a store."""

from __future__ import annotations

from kvstore.block import ModelId, Root
from kvstore.inspection import BlockInfo
from tests.conftest import MakeStore, chain_of, save_all
from tests.fakes import DictTier

THROUGH = {"write": "through"}


def test_a_block_is_described_as_it_was_saved(make_store: MakeStore, root: Root) -> None:
    store = make_store(tiers=[DictTier()], mover=THROUGH)
    chain = chain_of(root, 3)
    save_all(store, chain)
    assert store.flush(5)
    store.match(chain, "holder")
    absent = chain_of(root, 1, seed=1).ids[0]
    first, second, third, none = store.inspect([*chain.ids, absent])
    assert none == BlockInfo(absent)
    assert second == BlockInfo(
        id=chain.ids[1],
        resident=True,
        root=root.id,
        parent=chain.ids[0],
        depth=1,
        ready_parts=1,
        num_pins=1,
        num_children=1,
        tiers=("dict",),
        tokens=chain.meta(1).tokens,
    )
    assert (first.parent, first.depth, third.num_children) == (root.id, 0, 0)
    store.forget("holder")
    assert store.inspect(chain.ids[:1])[0].num_pins == 0


def test_a_block_that_is_only_being_filled_is_not_resident(make_store: MakeStore, root: Root) -> None:
    store = make_store()
    chain = chain_of(root, 1)
    with store.save(chain, 0, 1):
        assert store.inspect(chain.ids) == [BlockInfo(chain.ids[0])]


def test_anothers_block_looks_like_one_that_is_not_there(make_store: MakeStore, model: ModelId) -> None:
    store = make_store()
    mine, yours = chain_of(Root(model, salt=b"a"), 2), chain_of(Root(model, salt=b"b"), 2)
    save_all(store, mine)
    save_all(store, yours)
    infos = store.inspect([mine.ids[0], yours.ids[0]], lambda root: root == mine.root.id)
    assert [info.resident for info in infos] == [True, False]
    assert infos[1] == BlockInfo(yours.ids[0])


def test_media_digests_of_a_block_come_back_with_its_meta(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 1)
    chain.extend(range(32), media=[(20, b"an image")])
    save_all(store, chain)
    assert store.flush(5)
    assert [tier.meta[block] for block in chain.ids] == [chain.meta(index) for index in range(3)]
    assert tier.meta[chain.ids[1]].extra != b""


def test_warming_brings_a_prefix_from_below_into_the_host(make_store: MakeStore, root: Root) -> None:
    store = make_store(tiers=[DictTier()], mover=THROUGH)
    chain = chain_of(root, 8)
    save_all(store, chain, 0, 6)
    assert store.flush(5)
    store.drop_host()
    save_all(store, chain, 0, 2)
    counted = ("match.requests", "host.hit_blocks", "host.missed_blocks")
    before = [store.stats().get(name, 0) for name in counted]
    assert store.warm(chain, 5.0) == (6, 4)
    assert store.warm(chain, 5.0) == (6, 0)
    assert [store.stats().get(name, 0) for name in counted] == before, "no request asked"
    assert store.stats()["host.pinned_blocks"] == 0


def test_warming_what_is_nowhere_brings_nothing(make_store: MakeStore, root: Root) -> None:
    store = make_store(tiers=[DictTier()])
    assert store.warm(chain_of(root, 3), 5.0) == (0, 0)


def test_warming_a_prefix_larger_than_the_host_ends_where_the_host_is_full(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    chain = chain_of(root, 24)
    source = make_store(64, tiers=[tier], mover=THROUGH)
    save_all(source, chain)
    assert source.flush(5)
    store = make_store(8, tiers=[tier])
    num_host, num_promoted = store.warm(chain, 5.0)
    assert 1 <= num_host == num_promoted <= 8


def test_warming_ends_at_its_deadline(make_store: MakeStore, root: Root) -> None:
    from tests.fakes import FakeClock

    tier = DictTier()
    store = make_store(tiers=[tier], mover=THROUGH)
    chain = chain_of(root, 6)
    save_all(store, chain)
    assert store.flush(5)
    store.drop_host()
    clock = store._clock
    assert isinstance(clock, FakeClock)

    def tick(key: object) -> None:
        clock.time_s += 1.0

    tier.before_read = tick
    num_host, num_promoted = store.warm(chain, 0.5)
    assert 1 <= num_promoted <= num_host


def test_a_group_beyond_its_limit_loses_its_own_coldest_and_nobody_elses(make_store: MakeStore, model: ModelId) -> None:
    store = make_store(32)
    mine, yours = Root(model, salt=b"a"), Root(model, salt=b"b")
    store.limit(mine.id, "tenant", 6 * 4096)
    save_all(store, chain_of(yours, 8))
    save_all(store, chain_of(mine, 4, seed=1))
    save_all(store, chain_of(mine, 4, seed=2))
    chains = [chain_of(yours, 8), chain_of(mine, 4, seed=1), chain_of(mine, 4, seed=2)]
    assert [store.match(chain, "r").num_blocks for chain in chains] == [8, 2, 4]
    store.forget("r")
    assert store.stats()["host.quota_refused_blocks"] == 0


def test_a_group_whose_blocks_are_all_held_is_refused(make_store: MakeStore, model: ModelId) -> None:
    store = make_store(32)
    mine = Root(model, salt=b"a")
    store.limit(mine.id, "tenant", 4 * 4096)
    chain = chain_of(mine, 4, seed=1)
    save_all(store, chain)
    store.match(chain, "holder")
    with store.save(chain_of(mine, 3, seed=2), 0, 3) as save:
        assert (tuple(save.indices), save.num_refused) == ((), 3)
    assert store.stats()["host.quota_refused_blocks"] == 3
    store.forget("holder")
    store.limit(mine.id, "tenant", None)
    assert save_all(store, chain_of(mine, 8, seed=3)) == 8
