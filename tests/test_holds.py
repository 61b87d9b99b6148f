# SPDX-License-Identifier: Apache-2.0
"""What a match leaves behind for its request, until it is loaded, forgotten or too old."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import pytest

from kvstore.api import NO_HINT, Hint
from kvstore.block import BlockId, Chain, Root
from kvstore.errors import ConfigError
from kvstore.holds import Hold
from kvstore.layout import layout_of
from kvstore.lease import Lease
from kvstore.lookup import Answer, Lookup
from kvstore.marks import Marks
from kvstore.policies.lru import LruPolicy
from kvstore.store import KVStore
from tests.conftest import MakeStore, chain_of, save_all
from tests.fakes import DictTier, FakeClock
from tests.waiting import wait_until


def test_a_hold_that_the_sweeper_ended_still_gives_an_empty_load(
    make_store: MakeStore, root: Root, clock: FakeClock
) -> None:
    store = make_store()
    chain = chain_of(root, 2)
    save_all(store, chain)
    store.match(chain, "r")
    clock.time_s += 30
    wait_until(lambda: not store.stats()["lease.live"])
    with store.load("r") as load:
        assert list(load) == []
    store.match(chain, "gone")
    clock.time_s += 1000
    wait_until(lambda: "gone" not in store._holds)


def test_a_load_that_is_refused_leaves_the_hold(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 2)
    save_all(store, chain)
    store.match(chain, "r")
    with pytest.raises(ConfigError, match="start is -1"):
        store.load("r", start=-1)
    with store.load("r") as load:
        assert len(list(load)) == 2


class Faulty(LruPolicy):
    """Fails where it is told of a use, while it is told to."""

    failing = False
    num_failures = 0

    def touch(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        if Faulty.failing:
            Faulty.num_failures += 1
            raise ZeroDivisionError("a policy's mistake")
        super().touch(blocks, hint)


def test_a_policy_that_fails_once_does_not_keep_holds_for_ever(
    make_store: MakeStore, root: Root, clock: FakeClock
) -> None:
    store = make_store(host={"capacity_bytes": 64 * 4096, "prefault": False, "policy": "tests.test_holds:Faulty"})
    chain = chain_of(root, 2)
    save_all(store, chain)
    Faulty.failing = True
    store.match(chain, "r")
    wait_until(lambda: Faulty.num_failures > 0)
    Faulty.failing = False
    clock.time_s += 30
    wait_until(lambda: not store.stats()["lease.live"])


class AtOnce(Future[Answer]):
    """An answer at which another thread looks just before this one is told that it is there."""

    def __init__(self, answer: Answer, look: Callable[[], None]) -> None:
        super().__init__()
        self.set_result(answer)
        self._look: Callable[[], None] | None = look

    def done(self) -> bool:
        look, self._look = self._look, None
        if look is not None:
            look()
        return super().done()


def test_two_who_take_in_a_newer_answer_at_once_both_have_it(make_store: MakeStore, root: Root) -> None:
    lookups = make_store(tiers=[DictTier()])._lookups
    chain = chain_of(root, 9)
    before: Future[Answer] = Future()
    before.set_result(Answer((), 0, 0.0))
    lookup = hold_of(chain, before).lookup
    assert lookup is not None
    lookup.again = AtOnce(Answer(((DictTier(), 9),), 0, 0.0), lambda: lookups.look_again(lookup, 0.0))
    lookups.look_again(lookup, 0.0)
    assert [count for _, count in lookup.sources(0)] == [9]


class Late(Future[Answer]):
    """An answer that comes when it has been looked for `num_looks` times."""

    def __init__(self, answer: Answer, num_looks: int) -> None:
        super().__init__()
        self._answer, self._num_looks = answer, num_looks

    def done(self) -> bool:
        if self._num_looks:
            self._num_looks -= 1
        elif not super().done():
            self.set_result(self._answer)
        return super().done()


def hold_of(chain: Chain, answer: Future[Answer]) -> Hold:
    parts = layout_of(chain.root.model).all_parts
    lease = Lease(np.empty(0, np.int64), 0.0)
    lookup = Lookup(chain, parts, 0, len(chain), NO_HINT, answer)
    return Hold(chain, layout_of(chain.root.model), parts, lease, NO_HINT, 0, lookup)


@pytest.mark.parametrize("num_looks", range(6))
def test_an_answer_that_comes_while_a_match_is_told_is_not_taken_for_none(
    root: Root, clock: FakeClock, num_looks: int
) -> None:
    chain = chain_of(root, 9)
    hold = hold_of(chain, Late(Answer(((DictTier(), 9),), 0, 0.0), num_looks))
    told = [hold.match(Marks(clock)) for _ in range(3)]
    assert all(match.num_blocks == 9 for match in told if match.settled)
    assert told[-1].num_blocks == 9
    assert told[-1].settled
