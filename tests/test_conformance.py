# SPDX-License-Identifier: Apache-2.0
"""What every store does, by the public interface alone: in this process, behind a sidecar that shares its memory,
and behind one that sends bytes. A store is conformant when these pass; what only one of them does is tested with it.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kvstore.api import ABSENT, GivesOpenRun, GivesRun, Hint, KnowsWindows, Load, LoadedBlock, Store
from kvstore.block import Chain, ModelId, PartKey, Root
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, LeaseError, UnknownLease
from kvstore.service.remote import RemoteLoad
from kvstore.service.rights import Gate
from kvstore.service.server import Server
from kvstore.service.uploads import RemoteSave
from kvstore.store import KVStore
from kvstore.tiers.base import Tier
from tests.conftest import chain_of, content, load_all, save_all
from tests.fakes import DictTier, FakeClock
from tests.patient import connect
from tests.service.conftest import HELD, config_of
from tests.waiting import eventually, wait_until

MakeAnyStore = Callable[..., Store]


def in_process(
    directory: Path, clock: FakeClock, num_blocks: int, tiers: Sequence[Tier], sections: dict[str, dict[str, object]]
) -> Iterator[Store]:
    values = {"host": {"capacity_bytes": num_blocks * 4096, "prefault": False}, **sections}
    with KVStore(StoreConfig.load(values, environ={}), clock=clock, tiers=tiers) as store:
        yield store
        store.flush(5)


def in_process_exclusive(
    directory: Path, clock: FakeClock, num_blocks: int, tiers: Sequence[Tier], sections: dict[str, dict[str, object]]
) -> Iterator[Store]:
    sections = {**sections, "mover": {**sections.get("mover", {}), "tiering": "exclusive"}}
    yield from in_process(directory, clock, num_blocks, tiers, sections)


def behind_a_server(*, mapped: bool) -> Callable[..., Iterator[Store]]:
    def make(
        directory: Path,
        clock: FakeClock,
        num_blocks: int,
        tiers: Sequence[Tier],
        sections: dict[str, dict[str, object]],
    ) -> Iterator[Store]:
        config = config_of(directory, num_blocks, sections)
        server = Server(config, gate=Gate(config.service), clock=clock, tiers=tiers)
        server.start()
        try:
            # Long enough for a machine that does much else: what misses are worth is not what is tested here.
            with connect(server.address, mapped=mapped) as store:
                yield store
                server.drain(5)
        finally:
            server.stop()

    return make


STORES = {
    "in process": in_process,
    "in process, exclusive": in_process_exclusive,
    "local client": behind_a_server(mapped=True),
    "remote client": behind_a_server(mapped=False),
}


def holds(store: Store) -> dict[str, float]:
    return {name: value for name, value in store.stats().items() if name in HELD and value}


@pytest.fixture(params=STORES)
def make_any(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, clock: FakeClock, model: ModelId
) -> Iterator[MakeAnyStore]:
    """Makes stores of a number of one-page blocks; each must end healthy, with nothing held."""
    made: list[tuple[Iterator[Store], Store]] = []

    def make(num_blocks: int = 64, *, tiers: Sequence[Tier] = (), **sections: dict[str, object]) -> Store:
        life = STORES[request.param](tmp_path_factory.mktemp("c"), clock, num_blocks, tiers, sections)
        store = next(life)
        made.append((life, store))
        store.open(model)
        return store

    yield make
    for life, store in made:
        # Not at once: what the mover writes to a lower tier is pinned until it is written.
        let_go = eventually(lambda store=store: not holds(store))
        faults = store.check()
        held = holds(store)
        assert list(life) == []
        assert faults == []
        assert let_go, held


@pytest.fixture
def store(make_any: MakeAnyStore) -> Store:
    return make_any()


def tier_with(*chains: Chain, model: ModelId) -> DictTier:
    """A lower tier that holds the chains, as another replica left it."""
    tier = DictTier()
    config = StoreConfig.load({"mover": {"write": "through"}}, environ={})
    with KVStore(dataclasses.replace(config, host=dataclasses.replace(config.host, prefault=False)), tiers=[tier]) as s:
        s.open(model)
        for chain in chains:
            save_all(s, chain)
        assert s.flush()
    return tier


def indices_of(load: Load) -> list[int]:
    with load:
        return [block.index for block in load]


# -- saving and finding ----------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded_byte_for_byte(store: Store, root: Root) -> None:
    chain = chain_of(root, 10)
    assert save_all(store, chain) == 10
    assert load_all(store, chain) == ["host"] * 10


def test_a_longer_prompt_matches_its_saved_prefix(store: Store, root: Root) -> None:
    chain = chain_of(root, 6)
    save_all(store, chain, 0, 4)
    match = store.match(chain, "r")
    assert (match.num_blocks, match.num_host_blocks, match.settled) == (4, 4, True)
    assert match.tiers == (("host", 4),)
    store.forget("r")


def test_another_chain_of_the_same_tokens_finds_the_same_blocks(store: Store, root: Root) -> None:
    save_all(store, chain_of(root, 5))
    assert load_all(store, chain_of(root, 5)) == ["host"] * 5


def test_a_conversation_that_goes_on_matches_turn_by_turn(store: Store, root: Root) -> None:
    tokens = np.random.default_rng(3).integers(0, 50_000, 16 * 12)
    chain = Chain(root)
    for turn in range(4):
        chain.extend(tokens[turn * 48 : (turn + 1) * 48])
        assert store.match(chain, "r").num_blocks == 3 * turn
        store.forget("r")
        save_all(store, chain, 3 * turn)
    assert load_all(store, chain) == ["host"] * 12


def test_a_miss_allocates_nothing(store: Store, root: Root) -> None:
    store.match(chain_of(root, 10), "r")
    assert store.stats()["host.used_bytes"] == 0
    store.forget("r")


def test_saving_again_wants_nothing(store: Store, root: Root) -> None:
    chain = chain_of(root, 5)
    save_all(store, chain)
    with store.save(chain, 0, 5) as save:
        assert tuple(save.indices) == ()


def test_blocks_are_matchable_as_each_is_committed(store: Store, root: Root) -> None:
    chain = chain_of(root, 3)
    with store.save(chain, 0, 3) as save:
        for index in save.indices:
            view = save.views(index)[0]
            assert view is not None
            view[:] = content(chain, index, 0, len(view))
            assert save.commit(index) == 1
            assert store.match(chain, "r").num_blocks == index + 1
    store.forget("r")


def test_a_save_abandoned_half_way_leaves_no_trace(store: Store, root: Root) -> None:
    chain = chain_of(root, 6)

    def forward_fails_half_way() -> None:
        with store.save(chain, 0, 6) as save:
            for index in (0, 1):
                view = save.views(index)[0]
                assert view is not None
                view[:] = content(chain, index, 0, len(view))
            save.commit(0, 1)
            raise RuntimeError("forward failed")

    with pytest.raises(RuntimeError, match="forward failed"):
        forward_fails_half_way()
    assert store.match(chain, "r").num_blocks == 2
    store.forget("r")
    assert store.stats()["host.blocks"] == 2


def test_committing_a_block_twice_is_a_clear_error(store: Store, root: Root) -> None:
    chain = chain_of(root, 2)
    with store.save(chain, 0, 2) as save:
        view = save.views(0)[0]
        assert view is not None
        view[:] = content(chain, 0, 0, len(view))
        save.commit(0)
        with pytest.raises(LeaseError, match=r"blocks \[0\] are not open"):
            save.commit(0)


def test_a_block_named_twice_in_a_commit_is_committed_once(store: Store, root: Root) -> None:
    chain = chain_of(root, 2)
    with store.save(chain, 0, 2) as save:
        for index in (0, 1):
            view = save.views(index)[0]
            assert view is not None
            view[:] = content(chain, index, 0, len(view))
        assert save.commit(1, 0, 1, 0) == 2
        assert save.commit() == 0
        with pytest.raises(LeaseError, match="block 1 is not open in this save"):
            save.views(1)


def test_a_full_host_of_pinned_blocks_refuses_the_save_and_nothing_else(make_any: MakeAnyStore, root: Root) -> None:
    store = make_any(4)
    chain = chain_of(root, 4)
    save_all(store, chain)
    store.match(chain, "holder")
    with store.save(chain_of(root, 3, seed=1), 0, 3) as save:
        assert (tuple(save.indices), save.num_refused) == ((), 3)
    assert store.match(chain, "other").num_blocks == 4
    store.forget("holder")
    store.forget("other")
    assert save_all(store, chain_of(root, 3, seed=1)) == 3


def test_blocks_with_media_are_saved_and_told_apart(store: Store, root: Root) -> None:
    tokens = np.arange(64)
    cat, dog = Chain(root, tokens, media=[(5, b"cat")]), Chain(root, tokens, media=[(5, b"dog")])
    save_all(store, cat)
    assert load_all(store, cat) == ["host"] * 4
    assert store.match(dog, "r").num_blocks == 0
    store.forget("r")


def test_two_salts_share_nothing(store: Store, model: ModelId) -> None:
    save_all(store, chain_of(Root(model, salt=b"a"), 4))
    assert store.match(chain_of(Root(model, salt=b"b"), 4), "r").num_blocks == 0
    store.forget("r")


def test_parts_written_by_two_ranks_make_one_block(store: Store, model: ModelId) -> None:
    gridded = Root(dataclasses.replace(model, part_heads=1))
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


def test_a_part_that_is_there_already_is_not_wanted(store: Store, model: ModelId) -> None:
    gridded = Root(dataclasses.replace(model, part_heads=1))
    store.open(gridded.model)
    chain = chain_of(gridded, 1)
    with store.save(chain, 0, 1, parts=(1,)) as save:
        view = save.views(0)[0]
        assert view is not None
        view[:] = content(chain, 0, 1, len(view))
        save.commit()
    with store.save(chain, 0, 1) as save:
        first, second = save.views(0)
        assert first is not None
        assert second is None
        first[:] = content(chain, 0, 0, len(first))
        assert save.commit() == 1
    assert load_all(store, chain) == ["host"]


def test_a_save_s_run_says_where_the_views_of_its_open_blocks_are(store: Store, model: ModelId) -> None:
    chain = chain_of(Root(dataclasses.replace(model, part_heads=1)), 5)
    sizes = [part.num_bytes for part in store.open(chain.root.model).parts]
    with store.save(chain, 0, 2, parts=(1,)) as save:
        for index in save.indices:
            (view,) = save.views(index)
            assert view is not None
            view[:] = content(chain, index, 1, len(view))
        save.commit()
    with store.save(chain, 0, 5) as save:
        if isinstance(save, RemoteSave):  # its client has memory of its own, a buffer for each block
            assert not isinstance(save, GivesOpenRun)
            return
        assert isinstance(save, GivesOpenRun)
        for wanted in (range(5), range(1, 5)):
            run = save.open_run()
            assert run.indices.tolist() == list(wanted)
            assert (run.offsets == ABSENT).tolist() == [[False, index < 2] for index in wanted]
            for index, offsets in zip(run.indices.tolist(), run.offsets.tolist(), strict=True):
                for part, (at, size) in enumerate(zip(offsets, sizes, strict=True)):
                    if at != ABSENT:
                        run.memory[at : at + size] = content(chain, index, part, size)
                assert [view is None for view in save.views(index)] == [at == ABSENT for at in offsets]
            save.commit(wanted[0])
        save.commit()
        assert len(save.open_run().indices) == 0
    assert load_all(store, chain) == ["host"] * 5


# -- holds, leases, announcements ------------------------------------------------------------------------------


def test_a_hold_keeps_what_was_found_until_the_load(make_any: MakeAnyStore, root: Root) -> None:
    store = make_any(8)
    chain = chain_of(root, 4)
    save_all(store, chain)
    store.match(chain, "r")
    for seed in range(1, 9):
        save_all(store, chain_of(root, 4, seed=seed))
    with store.load("r") as load:
        assert [bytes(block.views[0]) for block in load] == [content(chain, i, 0, 4096) for i in range(4)]
        assert load.intact()


def test_matching_again_replaces_the_hold(store: Store, root: Root) -> None:
    chain = chain_of(root, 4)
    save_all(store, chain)
    for _ in range(3):
        store.match(chain, "r")
    assert store.stats()["lease.live"] == 1
    store.forget("r")
    assert store.stats()["host.pinned_blocks"] == 0


def test_forgetting_twice_or_nothing_is_fine(store: Store) -> None:
    store.forget("never matched")
    store.forget("never matched")


def test_a_load_takes_the_range_it_is_asked_for(store: Store, root: Root) -> None:
    chain = chain_of(root, 8)
    save_all(store, chain)
    store.match(chain, "r")
    with store.load("r", 6, start=2) as load:
        assert load.num_blocks == 4
        assert [block.index for block in load] == [2, 3, 4, 5]
    store.match(chain, "r")
    assert indices_of(store.load("r", 3, start=5)) == []


def test_an_expired_hold_gives_an_empty_load(make_any: MakeAnyStore, root: Root, clock: FakeClock) -> None:
    store = make_any()
    chain = chain_of(root, 4)
    save_all(store, chain)
    store.match(chain, "r")
    clock.time_s += 11
    wait_until(lambda: store.stats()["lease.live"] == 0)
    try:
        with store.load("r") as load:
            assert list(load) == []
            assert not load.intact()
    except UnknownLease:
        pass  # it was swept


def test_a_load_without_a_match_is_a_clear_error(store: Store) -> None:
    with pytest.raises(UnknownLease, match="'nobody' has no hold: call match first"):
        store.load("nobody")


def test_an_announced_range_is_pending_until_committed_withdrawn_or_late(
    store: Store, root: Root, clock: FakeClock
) -> None:
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


def test_of_two_announcements_of_one_range_each_withdrawal_ends_its_own(store: Store, root: Root) -> None:
    chain = chain_of(root, 5)
    first, second = store.announce(chain, 0, 5), store.announce(chain, 0, 5)
    first.withdraw()
    assert store.match(chain, "r").num_pending_blocks == 5
    second.withdraw()
    assert store.match(chain, "r").num_pending_blocks == 0
    store.forget("r")


def test_an_announcement_under_one_salt_is_not_seen_under_another(store: Store, model: ModelId) -> None:
    mine, yours = chain_of(Root(model, salt=b"a"), 4), chain_of(Root(model, salt=b"b"), 4)
    store.announce(mine, 0, 4)
    assert store.match(yours, "r").num_pending_blocks == 0
    store.forget("r")


def test_what_was_committed_and_is_gone_again_is_nobodys_to_wait_for(store: Store, root: Root) -> None:
    chain = chain_of(root, 6)
    mark = store.announce(chain, 0, 6)
    assert store.stats()["marks.live"] == 6
    save_all(store, chain, 0, 4)
    assert store.stats()["marks.live"] == 2, "the rest is still being computed"
    store.clear(root.id)
    match = store.match(chain, "r")
    assert (match.num_blocks, match.num_pending_blocks) == (0, 0), "its producer does not compute it twice"
    store.forget("r")
    mark.withdraw()


def test_a_touch_keeps_a_chain_from_being_evicted_first(make_any: MakeAnyStore, root: Root) -> None:
    store = make_any(8)
    first, second = chain_of(root, 4), chain_of(root, 4, seed=1)
    save_all(store, first)
    save_all(store, second)
    store.touch(first, 4, Hint(conversation="c", turn=2))
    save_all(store, chain_of(root, 4, seed=2))
    assert load_all(store, first) == ["host"] * 4
    assert store.match(second, "r").num_blocks == 0
    store.forget("r")


def test_threads_save_and_load_at_once(make_any: MakeAnyStore, root: Root) -> None:
    store = make_any(256)
    shared = chain_of(root, 8)
    save_all(store, shared)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            chain = chain_of(root, 6, seed=100 + seed)
            for turn in range(5):
                save_all(store, chain)
                assert load_all(store, chain, request=f"{seed}/{turn}") == ["host"] * 6
                assert load_all(store, shared, request=f"{seed}/{turn}/shared") == ["host"] * 8
        except BaseException as error:  # noqa: BLE001 a thread's top
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


# -- lower tiers -----------------------------------------------------------------------------------------------


def test_a_block_of_a_lower_tier_is_loaded_and_promoted(make_any: MakeAnyStore, root: Root, model: ModelId) -> None:
    chain = chain_of(root, 9)
    store = make_any(tiers=[tier_with(chain, model=model)])
    assert load_all(store, chain) == ["dict"] * 9
    assert load_all(store, chain) == ["host"] * 9


def test_media_of_a_lower_tier_are_promoted_too(make_any: MakeAnyStore, root: Root, model: ModelId) -> None:
    chain = Chain(root, np.arange(80), media=[(20, b"cat"), (33, b"dog")])
    store = make_any(tiers=[tier_with(chain, model=model)])
    assert load_all(store, chain) == ["dict"] * 5


def test_the_head_comes_from_the_host_and_the_tail_from_below(
    make_any: MakeAnyStore, root: Root, model: ModelId
) -> None:
    chain = chain_of(root, 8)
    tier = tier_with(chain, model=model)
    store = make_any(tiers=[tier])
    save_all(store, chain, 0, 3)
    match = store.match(chain, "r", wait_s=5)
    assert match.tiers == (("host", 3), ("dict", 5))
    assert tier.asked[-1] == 5, "the lower tier is asked only about what the host lacks"
    store.forget("r")
    assert load_all(store, chain) == ["host"] * 3 + ["dict"] * 5


def test_match_does_not_wait_for_a_slow_tier(make_any: MakeAnyStore, root: Root) -> None:
    gate = threading.Event()

    class SlowTier(DictTier):
        def _answer(self) -> None:
            gate.wait(10)

    store = make_any(tiers=[SlowTier()])
    chain = chain_of(root, 4)
    assert not store.match(chain, "r").settled
    gate.set()
    assert store.match(chain, "r", wait_s=5).settled
    store.forget("r")


def test_lower_tiers_are_asked_soon_for_who_will_match_again(make_any: MakeAnyStore, root: Root) -> None:
    tier = DictTier()
    store = make_any(tiers=[tier])
    chain = chain_of(root, 5)
    save_all(store, chain, stop=3)
    tier.asked.clear()  # of a greeting
    assert not store.match(chain, "r").settled
    store.forget("r")
    store.match(chain, "r", soon=True)
    wait_until(lambda: bool(tier.asked))
    assert tier.asked == [2]
    store.forget("r")


def test_lower_tiers_that_are_not_worth_asking_are_not_asked(make_any: MakeAnyStore, root: Root) -> None:
    asked: list[int] = []

    class Watched(DictTier):
        def contains(self, keys: Sequence[PartKey], deadline_s: float) -> list[bool]:
            asked.append(len(keys))
            return super().contains(keys, deadline_s)

    store = make_any(tiers=[Watched()])
    chain = chain_of(root, 2)
    before = len(asked)  # a greeting
    match = store.match(chain, "r", wait_s=None)
    assert match.settled
    assert (match.num_blocks, len(asked)) == (0, before)
    assert store.match(chain, "r", wait_s=5).settled
    assert asked[before:] == [len(chain)]
    store.forget("r")


def test_a_tier_dying_in_mid_load_ends_it_early(make_any: MakeAnyStore, root: Root, model: ModelId) -> None:
    chain = chain_of(root, 8)
    tier = tier_with(chain, model=model)
    store = make_any(tiers=[tier])

    def die_at_five(key: PartKey) -> None:
        tier.down = key.block == chain.ids[4]

    tier.before_read = die_at_five
    assert load_all(store, chain) == ["dict"] * 5
    tier.down = False


def test_a_block_gone_between_match_and_load_ends_it_there(make_any: MakeAnyStore, root: Root, model: ModelId) -> None:
    chain = chain_of(root, 8)
    tier = tier_with(chain, model=model)
    store = make_any(tiers=[tier])
    store.match(chain, "r", wait_s=5)
    lost = tier.values.pop(PartKey(root.id, chain.ids[3], 0))
    assert indices_of(store.load("r")) == [0, 1, 2]
    tier.values[PartKey(root.id, chain.ids[3], 0)] = lost


def test_a_load_larger_than_the_arena_goes_in_windows(make_any: MakeAnyStore, root: Root, model: ModelId) -> None:
    chain = chain_of(root, 40)
    store = make_any(8, tiers=[tier_with(chain, model=model)])
    assert load_all(store, chain) == ["dict"] * 40
    assert store.match(chain, "r").num_blocks > 0
    store.forget("r")


def test_blocks_of_a_window_stay_until_the_next_one_is_said_to_come(
    make_any: MakeAnyStore, root: Root, model: ModelId
) -> None:
    chain = chain_of(root, 40)
    store = make_any(8, tiers=[tier_with(chain, model=model)])
    store.match(chain, "r", wait_s=5)
    windows: list[int] = []
    held: list[LoadedBlock] = []
    with store.load("r") as load:
        assert isinstance(load, KnowsWindows)
        for block in load:
            held.append(block)
            following = block.index + 1
            if following < 40 and not load.comes_in_windows(following):
                continue
            for one in held:  # copied as late as may be
                assert bytes(one.views[0]) == content(chain, one.index, 0, one.views[0].nbytes)
            windows.append(len(held))
            held = []
        assert load.intact()
    assert sum(windows) == 40
    assert len(windows) > 1 or isinstance(load, RemoteLoad)  # whose client has memory of its own, with room for all


def test_a_load_that_fits_comes_in_no_windows(make_any: MakeAnyStore, root: Root, model: ModelId) -> None:
    chain = chain_of(root, 12)
    store = make_any(tiers=[tier_with(chain, model=model)])
    store.match(chain, "r", wait_s=5)
    with store.load("r") as load:
        assert isinstance(load, KnowsWindows)
        blocks = [block for block in load if not load.comes_in_windows(min(block.index + 1, 11))]
        assert [bytes(one.views[0]) for one in blocks] == [
            content(chain, index, 0, blocks[0].views[0].nbytes) for index in range(12)
        ]
        assert load.intact()


def test_a_run_has_the_bytes_of_the_blocks_it_stands_for(make_any: MakeAnyStore, model: ModelId) -> None:
    chain = chain_of(Root(dataclasses.replace(model, part_layers=1)), 9)
    store = make_any()
    assert len(store.open(chain.root.model).parts) > 1
    save_all(store, chain)
    store.match(chain, "r")
    with store.load("r", 8, start=3) as load:
        if isinstance(load, RemoteLoad):  # its client has memory of its own
            assert not isinstance(load, GivesRun)
            return
        assert isinstance(load, GivesRun)
        run = load.run()
        assert run is not None
        assert (run.start, run.tier, len(run.offsets)) == (3, "host", 5)
        assert run.memory.readonly
        for offsets, block in zip(run.offsets.tolist(), load, strict=True):
            sizes = [view.nbytes for view in block.views]
            held = [run.memory[at : at + size] for at, size in zip(offsets, sizes, strict=True)]
            assert held == list(block.views)
            assert bytes(held[0]) == content(chain, block.index, 0, sizes[0])
        assert load.intact()


def test_what_is_still_to_come_is_no_run(make_any: MakeAnyStore, root: Root, model: ModelId) -> None:
    chain = chain_of(root, 12)
    store = make_any(tiers=[tier_with(chain, model=model)])
    store.match(chain, "r", wait_s=5)
    with store.load("r") as load:
        assert not isinstance(load, GivesRun) or load.run() is None
        assert len(list(load)) == 12


def test_closing_a_load_early_stops_the_fetch(make_any: MakeAnyStore, root: Root, model: ModelId) -> None:
    chain = chain_of(root, 30)
    store = make_any(tiers=[tier_with(chain, model=model)])
    store.match(chain, "r", wait_s=5)
    with store.load("r") as load:
        next(iter(load))
    wait_until(lambda: store.stats()["host.pinned_blocks"] == 0)


def test_clear_empties_every_tier_under_one_root(make_any: MakeAnyStore, model: ModelId) -> None:
    mine, yours = chain_of(Root(model, salt=b"a"), 3), chain_of(Root(model, salt=b"b"), 3)
    tier = tier_with(mine, yours, model=model)
    store = make_any(tiers=[tier])
    assert load_all(store, mine) == ["dict"] * 3
    assert store.clear(mine.root.id) == 3
    assert load_all(store, mine) == []
    assert load_all(store, yours, request="y") == ["dict"] * 3
    assert {key.root for key in tier.values} == {yours.root.id}


def test_what_was_being_saved_when_the_store_was_cleared_is_not_there_afterwards(store: Store, root: Root) -> None:
    chain = chain_of(root, 4)
    with store.save(chain, 0, 4) as save:
        assert len(save.indices) == 4
        store.clear(root.id)
        save.commit()
    assert store.match(chain, "r").num_blocks == 0
    store.forget("r")
    assert save_all(store, chain) == 4


# -- refusals --------------------------------------------------------------------------------------------------


def test_a_host_smaller_than_one_block_is_refused_naming_both(make_any: MakeAnyStore, model: ModelId) -> None:
    store = make_any(1)
    with pytest.raises(ConfigError, match=r"capacity_bytes is 4096, less than one block of 'tiny', which takes 8192"):
        store.open(dataclasses.replace(model, num_layers=4))


def test_a_model_that_is_not_open_is_refused(store: Store, model: ModelId) -> None:
    with pytest.raises(ConfigError, match=r"'other' is not open: call store.open\(model\) first"):
        store.match(chain_of(Root(dataclasses.replace(model, model="other")), 1), "r")


def test_a_save_outside_the_chain_is_refused(store: Store, root: Root) -> None:
    with pytest.raises(ConfigError, match="blocks 1…9 are outside the chain, which has 3 full blocks"):
        store.save(chain_of(root, 3), 1, 9)


@pytest.mark.parametrize("parts", [(), (1,), (0, 0), (-1,), (200,)])
def test_parts_that_the_grid_lacks_or_named_twice_are_refused(store: Store, root: Root, parts: tuple[int, ...]) -> None:
    chain = chain_of(root, 2)
    with pytest.raises(ConfigError, match="parts are"):
        store.match(chain, "r", parts=parts)
    with pytest.raises(ConfigError, match="parts are"):
        store.save(chain, 0, 2, parts=parts)


# -- counting --------------------------------------------------------------------------------------------------


def test_time_that_loads_saved_adds_up(store: Store) -> None:
    store.note_saved(1.5)
    store.note_saved(0.25)
    wait_until(lambda: store.stats().get("ttft.saved_s") == 1.75)
    assert store.stats()["ttft.saved_s"] == 1.75


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, 1e9])
def test_what_is_no_time_is_not_counted(store: Store, seconds: float) -> None:
    with pytest.raises(ConfigError, match="seconds saved are"):
        store.note_saved(seconds)
