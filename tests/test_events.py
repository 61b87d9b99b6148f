# SPDX-License-Identifier: Apache-2.0
"""Block events: a subscriber that applies what it is told knows what the pool holds, exactly."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable

import pytest

from kvstore.api import NO_HINT
from kvstore.arena import PAGE_BYTES, Arena
from kvstore.block import Chain, ModelId, Root, RootId, hash_blocks
from kvstore.errors import TierUnavailable
from kvstore.events import Batch, BlockEvent, EventKind, EventLog, Subscription
from kvstore.idmap import unpack_ids
from kvstore.layout import layout_of
from kvstore.policies.lru import LruPolicy
from kvstore.pool import BlockPool
from tests.conftest import MakeStore, chain_of, save_all
from tests.fakes import DictTier
from tests.waiting import wait_until


class Picture:
    """What a subscriber believes: every event must fit what came before it."""

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.blocks: dict[bytes, RootId] = {}
        self.sequence = subscription.poll(max_blocks=0).sequence
        self.gaps = 0
        self.done = False

    def follow(self, max_blocks: int = 8192) -> None:
        """Apply one batch; numbers rise by one an event once the snapshot is over."""
        batch = self.subscription.poll(max_blocks=max_blocks)
        self.gaps += batch.gap
        self.done |= batch.snapshot_done
        for event in batch.events:
            self.apply(event)
        if not batch.gap:
            assert batch.sequence >= self.sequence
        self.sequence = batch.sequence

    def catch_up(self) -> dict[bytes, RootId]:
        while True:
            before = (self.sequence, len(self.blocks), self.done)
            self.follow()
            if (self.sequence, len(self.blocks), self.done) == before:
                return self.blocks

    def apply(self, event: BlockEvent) -> None:
        if event.kind is EventKind.CLEARED:
            self.blocks = {block: root for block, root in self.blocks.items() if root != event.root}
            return
        ids = unpack_ids(event.ids)
        assert ids
        if event.kind is EventKind.REMOVED:
            for block in ids:
                assert self.blocks.pop(block) == event.root, "removed, and never stored"
            return
        if not event.depth:
            assert event.parent == event.root
        elif event.parent not in self.blocks:
            assert self.subscription._omitted, "stored before its parent"
        assert hash_blocks(event.parent, event.tokens, len(event.tokens) // 4 // len(ids)) == ids
        for block in ids:
            assert block not in self.blocks, "stored twice"
            self.blocks[block] = event.root


class World:
    """A pool that random writers use, and what of it is whole."""

    def __init__(self, model: ModelId, num_pages: int, seed: int, ring_bytes: int = 64 << 20) -> None:
        self.rng = random.Random(seed)
        self.roots = [Root(model, salt=salt) for salt in (b"a", b"b", b"c")]
        self.layout = layout_of(model)
        self.pool = BlockPool(Arena(num_pages * PAGE_BYTES, prefault=False), LruPolicy())
        self.pool.open(self.layout)
        self.log = EventLog(self.pool, ring_bytes=ring_bytes)
        self.chains = [chain_of(root, 1 + seed % 9, seed=seed) for root in self.roots for seed in range(8)]
        self.chains += [self._fork(self.rng.choice(self.chains)) for _ in range(12)]
        self.held: list[object] = []

    def _fork(self, chain: Chain) -> Chain:
        keep = self.rng.randrange(len(chain) + 1)
        tokens = b"".join(chain.meta(index).tokens for index in range(keep))
        fork = Chain(chain.root, memoryview(tokens).cast("I").tolist())
        fork.extend([self.rng.randrange(1000) for _ in range(self.rng.randrange(5) * chain.block_tokens)])
        return fork

    def save(self, chain: Chain, parts: tuple[int, ...] | None = None) -> None:
        cells = self.layout.all_parts if parts is None else parts
        reserved, _ = self.pool.filling.reserve(chain.root.id, self.layout, chain.ids, chain.metas, cells)
        keep = self.rng.randrange(len(reserved) + 1) if self.rng.random() < 0.3 else len(reserved)
        self.pool.filling.publish(reserved[:keep], NO_HINT)
        self.pool.filling.abort(reserved[keep:])
        self.pool.touch(chain.ids, len(chain))

    def step(self) -> None:
        chain = self.rng.choice(self.chains)
        action = self.rng.random()
        if action < 0.75:
            cells = self.layout.all_parts
            self.save(chain, tuple(self.rng.sample(cells, self.rng.randint(1, len(cells)))))
        elif action < 0.85 and len(chain):
            self.pool.remove([self.rng.choice(chain.ids)])
        elif action < 0.88:
            self.pool.clear(chain.root.id)
        elif action < 0.89:
            self.pool.clear()
        elif action < 0.95:
            rows = self.pool.pin_leading(chain.ids, 1, chain.root.id)
            self.held.append(rows)
        elif self.held:
            self.pool.unpin(self.held.pop(self.rng.randrange(len(self.held))))  # type: ignore[arg-type]

    def whole(self, may_see: Callable[[RootId], bool] = lambda root: True) -> dict[bytes, RootId]:
        mask = (1 << len(self.layout.parts)) - 1
        found: dict[bytes, RootId] = {}
        for chain in self.chains:
            if may_see(chain.root.id):
                for block in chain.ids[: self.pool.leading(chain.ids, mask, chain.root.id)]:
                    found[block] = chain.root.id
        return found


@pytest.fixture
def gridded(model: ModelId) -> ModelId:
    return dataclasses.replace(model, part_heads=1)


@pytest.mark.parametrize("seed", range(12))
def test_snapshot_and_stream_tell_of_every_block_exactly_once(gridded: ModelId, seed: int) -> None:
    """Evictions, removals, clears, partial saves and pins go on while snapshots are read a few blocks at a time."""
    world = World(gridded, 40, seed)
    pictures: list[Picture] = []
    for step in range(400):
        world.step()
        if step % 40 == 10:
            pictures.append(Picture(world.log.subscribe()))
        for picture in pictures:
            if world.rng.random() < 0.4:
                picture.follow(max_blocks=world.rng.randint(1, 6))
    for picture in pictures:
        assert picture.catch_up() == world.whole()
        assert picture.done
        assert picture.gaps == 0
    assert world.pool.check() == []
    assert world.pool.survey.num_evicted > 50


@pytest.mark.parametrize("seed", range(4))
def test_numbers_rise_by_one_for_each_event_that_may_be_seen(model: ModelId, seed: int) -> None:
    world = World(model, 40, seed)
    mine = world.roots[0].id
    with world.log.subscribe(False, lambda root: root == mine) as narrow, world.log.subscribe(False) as wide:
        narrow_at, wide_at = narrow.poll().sequence, wide.poll().sequence
        for _ in range(200):
            world.step()
        seen, all_seen = narrow.poll(), wide.poll()
    assert {event.root for event in seen.events} == {mine}
    assert [event for event in all_seen.events if event.root == mine] == list(seen.events)
    assert seen.sequence - narrow_at == len(seen.events)
    assert all_seen.sequence - wide_at == len(all_seen.events) > len(seen.events)


def test_a_filtered_snapshot_holds_nothing_of_others(model: ModelId) -> None:
    world = World(model, 200, 1)
    for chain in world.chains:
        world.save(chain)
    allowed = {world.roots[0].id, world.roots[2].id}
    picture = Picture(world.log.subscribe(True, allowed.__contains__))
    assert picture.catch_up() == world.whole(allowed.__contains__)
    assert set(picture.blocks.values()) == allowed


def test_a_subscriber_that_falls_behind_is_told_and_the_ring_stays_bounded(model: ModelId) -> None:
    world = World(model, 40, 2, ring_bytes=20_000)
    with world.log.subscribe() as slow:
        for _ in range(300):
            world.step()
            assert world.log._held_bytes <= 20_000
        batch = slow.poll()
        assert (batch.events, batch.gap) == ((), True)
        assert not slow.poll().gap
        picture = Picture(world.log.subscribe())
        assert picture.catch_up() == world.whole()


def test_a_flood_of_anothers_events_is_no_gap(model: ModelId, root: Root) -> None:
    """A gap told for what one may not see would tell of it."""
    world = World(model, 40, 3, ring_bytes=20_000)
    mine = Root(model, salt=b"mine").id
    with world.log.subscribe(False, lambda each: each == mine) as quiet:
        before = quiet.poll().sequence
        for _ in range(300):
            world.step()
        batch = quiet.poll()
        assert (batch.events, batch.gap, batch.sequence) == ((), False, before)


def test_a_subscriber_goes_on_after_the_number_it_had(model: ModelId) -> None:
    world = World(model, 40, 4)
    keeper = world.log.subscribe(False)
    picture = Picture(world.log.subscribe())
    for _ in range(100):
        world.step()
    picture.catch_up()
    picture.subscription.close()
    for _ in range(100):
        world.step()
    picture.subscription = world.log.subscribe(after=picture.sequence)
    assert picture.catch_up() == world.whole()
    assert picture.gaps == 0
    keeper.close()


def test_going_on_after_a_time_in_which_nobody_listened_is_a_gap(model: ModelId) -> None:
    world = World(model, 40, 5)
    with world.log.subscribe() as first:
        last = first.poll().sequence
    for _ in range(20):
        world.step()
    assert world.log.subscribe(after=last).poll().gap


def test_who_waits_is_told_of_a_gap_at_once(model: ModelId) -> None:
    log = EventLog(World(model, 40, 3).pool, max_roots=1)
    told: list[Batch] = []
    with log.subscribe(snapshot=False) as subscription:
        log.cleared(Root(model, salt=b"a").id)
        assert subscription.poll().events
        waiting = threading.Thread(target=lambda: told.append(subscription.poll(20.0)), daemon=True)
        waiting.start()
        wait_until(lambda: log._num_waiting == 1)
        log.cleared(Root(model, salt=b"b").id)
        waiting.join(10)
    assert [batch.gap for batch in told] == [True]


def test_counts_of_more_roots_than_are_kept_begin_anew_with_a_gap_for_everybody(model: ModelId) -> None:
    pool = World(model, 40, 3).pool
    log = EventLog(pool, max_roots=3)
    roots = [Root(model, salt=bytes([number])) for number in range(5)]
    with log.subscribe() as all_along, log.subscribe(may_see=lambda root: root == roots[0].id) as of_the_first:
        first = all_along.poll()
        assert first.snapshot_done
        assert of_the_first.poll().snapshot_done
        for root in roots[:3]:
            log.cleared(root.id)
        before = all_along.poll().sequence
        assert of_the_first.poll().events
        for root in roots[3:]:
            log.cleared(root.id)
        for follower in (all_along, of_the_first):
            assert follower.poll().gap
        assert len(log._counts) <= 3
        log.cleared(roots[0].id)
        after = all_along.poll()
        assert [event.root for event in after.events] == [roots[0].id]
        assert not of_the_first.poll().gap
        with log.subscribe(snapshot=False, after=before) as late, log.subscribe(after=after.sequence) as in_time:
            assert late.poll().gap
            assert in_time.poll() == Batch((), after.sequence)


def test_nothing_is_recorded_while_nobody_listens(model: ModelId) -> None:
    world = World(model, 40, 6)
    for _ in range(50):
        world.step()
    assert len(world.log._entries) == 0
    with world.log.subscribe():
        for _ in range(50):
            world.step()
        assert len(world.log._entries) > 0
    assert len(world.log._entries) == 0


def test_a_poll_waits_for_the_first_event_and_a_close_wakes_it(model: ModelId) -> None:
    world = World(model, 40, 7)
    subscription = world.log.subscribe(False)
    got: list[int] = []

    def follow() -> None:
        for _ in range(2):
            got.append(len(subscription.poll(60).events))

    thread = threading.Thread(target=follow)
    thread.start()
    world.save(chain_of(world.roots[0], 3, seed=99))
    while not got:
        thread.join(0.01)
    subscription.close()
    thread.join(10)
    assert not thread.is_alive()
    assert got[0] >= 1


def test_subscribers_in_threads_agree_with_a_pool_that_others_use(gridded: ModelId) -> None:
    world = World(gridded, 60, 8)
    stop = threading.Event()
    failures: list[BaseException] = []
    pictures: list[Picture] = []

    def watch() -> None:
        try:
            picture = Picture(world.log.subscribe())
            pictures.append(picture)
            while not stop.is_set():
                picture.follow(max_blocks=7)
        except BaseException as error:  # noqa: BLE001  # shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=watch) for _ in range(3)]
    for _ in range(100):
        world.step()
    for thread in threads:
        thread.start()
    for _ in range(400):
        world.step()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert [picture.catch_up() for picture in pictures] == [world.whole()] * 3


def test_a_store_tells_of_saves_and_of_what_is_cleared(make_store: MakeStore, root: Root) -> None:
    store = make_store()
    chain = chain_of(root, 4)
    with store.events.subscribe() as subscription:
        assert subscription.poll().snapshot_done
        save_all(store, chain)
        store.clear(root.id)
        stored, cleared = subscription.poll().events
    assert (stored.kind, unpack_ids(stored.ids), stored.tier) == (EventKind.STORED, chain.ids, "host")
    assert stored.tokens == b"".join(chain.meta(index).tokens for index in range(4))
    assert (cleared.kind, cleared.root) == (EventKind.CLEARED, root.id)


def test_a_store_tells_of_what_a_lower_tier_confirmed_and_of_its_clearing(make_store: MakeStore, root: Root) -> None:
    tier = DictTier()
    store = make_store(tiers=[tier], mover={"write": "through"})
    chain, other = chain_of(root, 4), chain_of(root, 3, seed=1)
    with store.events.subscribe(snapshot=False) as subscription:
        save_all(store, chain)
        assert store.flush()
        below = [event for event in subscription.poll().events if event.tier == tier.name]
        assert [(event.kind, event.depth) for event in below] == [(EventKind.STORED, 0)]
        assert unpack_ids(below[0].ids) == chain.ids
        assert below[0].tokens == b"".join(chain.meta(index).tokens for index in range(4))
        assert below[0].parent == root.id
        tier.down = True
        save_all(store, other)
        assert store.flush()
        assert {event.tier for event in subscription.poll().events} == {"host"}, "what was not confirmed is not told"
        with pytest.raises(TierUnavailable):
            store.clear()
        assert {event.tier for event in subscription.poll().events} == {"host"}, "nor what could not be cleared"
        tier.down = False
        store.clear(root.id)
        cleared = [event for event in subscription.poll().events if event.kind is EventKind.CLEARED]
        assert (tier.name, root.id) in {(event.tier, event.root) for event in cleared}


def test_runs_of_a_lower_tier_are_consecutive_blocks_of_one_chain(make_store: MakeStore, root: Root) -> None:
    store = make_store()
    chains = [chain_of(root, 3, seed=seed) for seed in (1, 2)]
    told = [(root.id, chain.ids[index], chain.meta(index)) for chain in chains for index in range(3)]
    del told[1]
    with store.events.subscribe(snapshot=False) as subscription:
        store.events.demoted("below", told)
        events = subscription.poll().events
    assert [(event.depth, event.num_blocks) for event in events] == [(0, 1), (2, 1), (0, 3)]


def test_a_block_removed_while_pinned_is_neither_in_the_snapshot_nor_in_the_stream(model: ModelId) -> None:
    world = World(model, 40, 9)
    chain = chain_of(world.roots[0], 4)
    world.save(chain)
    with world.log.subscribe() as subscription:
        known = world.whole()
        rows = world.pool.pin_leading(chain.ids, 1, chain.root.id)
        world.pool.remove(chain.ids[2:3])
        picture = Picture(subscription)
        assert picture.catch_up() == world.whole() == dict(list(known.items())[:2])
        world.pool.unpin(rows)
        assert subscription.poll().events == ()
