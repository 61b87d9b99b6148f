# SPDX-License-Identifier: Apache-2.0
"""Conformance of every registered policy, and the definition of each."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import inspect
import itertools
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.api import NO_HINT, Hint, Retention
from kvstore.block import BlockId
from kvstore.policies import POLICIES, Policy
from kvstore.policies.arc import ArcPolicy
from kvstore.policies.lru import LruPolicy
from kvstore.policies.priority import PriorityPolicy
from kvstore.policies.returns import ReturnsPolicy
from kvstore.policies.runs import Run, RunPolicy
from kvstore.policies.s3fifo import S3FifoPolicy
from kvstore.policies.shadow import Shadow


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(number.to_bytes(32, "big")) for number in numbers]


def order(policy: Policy) -> list[int]:
    return [int.from_bytes(block, "big") for block in policy.victims()]


@pytest.fixture(params=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES.load(request.param)(POLICIES.options(request.param, {}))


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_policy_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    said = POLICIES.load(name).__doc__ or ""
    assert len(said) > 300, "its definition"
    assert re.search(r"\b(19|20)\d\d\b|Reference: ", said), "its paper"


def test_every_admitted_block_is_a_victim_once(policy: Policy) -> None:
    policy.admit(ids(1, 2, 3), NO_HINT)
    policy.admit(ids(4), NO_HINT)
    assert sorted(order(policy)) == [1, 2, 3, 4]
    assert len(policy) == 4


def test_suffixes_go_before_prefixes(policy: Policy) -> None:
    policy.admit(ids(1, 2, 3), NO_HINT)
    policy.touch(ids(1, 2, 3), NO_HINT)
    victims = order(policy)
    assert victims.index(3) < victims.index(2) < victims.index(1)


def test_removed_and_unknown_blocks_are_not_victims(policy: Policy) -> None:
    policy.admit(ids(1, 2), NO_HINT)
    policy.remove(ids(1, 9))
    policy.touch(ids(1, 2, 9), NO_HINT)
    assert order(policy) == [2]
    assert ids(1)[0] not in policy
    assert ids(2)[0] in policy


def test_iterating_changes_nothing(policy: Policy) -> None:
    policy.admit(ids(*range(200)), NO_HINT)
    assert order(policy) == order(policy)


def test_victims_may_be_removed_and_skipped_while_iterating(policy: Policy) -> None:
    rng = random.Random(3)
    policy.admit(ids(*range(500)), NO_HINT)
    seen = []
    for block in policy.victims():
        seen.append(block)
        if rng.random() < 0.5:
            policy.remove([block])
    assert len(seen) == len(set(seen)) == 500


def test_random_use_keeps_known_blocks_exact(policy: Policy) -> None:
    rng = random.Random(4)
    known: set[int] = set()
    for step in range(2000):
        number = rng.randrange(300)
        hint = Hint(time_s=step, turn=rng.randrange(5), prompt_tokens=rng.randrange(9000))
        if number not in known:
            policy.admit(ids(number), hint)
            known.add(number)
        elif rng.random() < 0.3:
            policy.remove(ids(number))
            known.discard(number)
        else:
            policy.touch(ids(number), hint)
    assert set(order(policy)) == known


def test_suffixes_go_before_prefixes_in_random_trees(policy: Policy) -> None:
    """Chats that branch, grow, come back and are evicted, under hints of every kind."""
    rng = random.Random(5)
    parents: dict[int, int] = {}
    chains: list[list[int]] = [[]]
    for step in range(600):
        base = rng.choice(chains)[: rng.randint(0, 12)]
        hint = Hint(time_s=3.0 * step, priority=rng.choice((50, 50, 0, 100)), closed=rng.random() < 0.05)
        known = [each for each in base if ids(each)[0] in policy]
        base = base[: len(known)] if known == base[: len(known)] else []
        if base:
            policy.touch(ids(*base), replace(hint, asked=True))
        fresh = [10_000 + 20 * step + at for at in range(rng.randint(1, 9))]
        parents.update(zip(fresh, [base[-1] if base else -1, *fresh[:-1]], strict=True))
        policy.admit(ids(*fresh), hint)
        policy.touch(ids(*base, *fresh), hint)
        chains.append([*base, *fresh])
        if len(policy) > 300:
            gone = [block for block, _ in zip(policy.victims(), range(rng.randint(1, 60)), strict=False)]
            policy.remove(gone)
        if step % 20 == 0:
            place = {number: at for at, number in enumerate(order(policy))}
            assert len(place) == len(policy)
            wrong = [each for each in place if place.get(parents[each], len(place)) < place[each]]
            assert not wrong, f"{wrong[:3]} go after their prefixes, at step {step}"


def chat(policy: Policy, *numbers: int, hint: Hint = NO_HINT, known: int = 0) -> None:
    """A request as a pool passes it on: what was there is used, the rest comes, and the chain was used."""
    if known:
        policy.touch(ids(*numbers[:known]), replace(hint, asked=True))
    if numbers[known:]:
        policy.admit(ids(*numbers[known:]), hint)
        policy.touch(ids(*numbers), hint)


def test_arc_keeps_what_was_used_twice_from_a_scan() -> None:
    arc = ArcPolicy()
    chat(arc, 1, 2)
    chat(arc, 1, 2, known=2)
    for number in range(10, 20):
        chat(arc, number)
    assert order(arc)[-2:] == [2, 1]
    assert order(arc)[:2] == [10, 11]


def test_arc_gives_recency_more_room_when_what_it_evicted_returns() -> None:
    arc = ArcPolicy()
    chat(arc, 1)
    chat(arc, 1, known=1)
    chat(arc, 2)
    assert order(arc)[0] == 2  # used once
    assert next(arc.victims()) == ids(2)[0]
    arc.remove(ids(2))
    chat(arc, 2)  # by the ghost list: it counts as used twice, and used once may hold one block more from now on
    chat(arc, 3)
    assert order(arc) == [1, 2, 3]


def test_s3fifo_lets_one_pass_traffic_out_first_and_gives_the_used_another_turn() -> None:
    policy = S3FifoPolicy()
    for number in (1, 2):
        chat(policy, number)
        chat(policy, number, known=1)
        chat(policy, number, known=1)  # twice: to the main queue
    chat(policy, 1, known=1)
    for number in range(10, 15):
        chat(policy, number)
    victims = order(policy)
    assert victims[:5] == [10, 11, 12, 13, 14]
    assert victims[5:] == [2, 1]  # 1 was used in the main queue


def test_priority_lowest_first_lru_inside_and_ordinary_again_after_the_duration() -> None:
    policy = PriorityPolicy()
    chat(policy, 1, hint=Hint(priority=90, retention=(), time_s=1.0))
    chat(policy, 2, hint=Hint(time_s=2.0))
    chat(policy, 3, hint=Hint(priority=10, time_s=3.0))
    chat(policy, 4, hint=Hint(time_s=4.0))
    assert order(policy) == [3, 2, 4, 1]
    lasting = Hint(retention=(Retention(0, None, 100, 60.0),), block_tokens=64, time_s=5.0)
    chat(policy, 2, hint=lasting, known=1)
    assert order(policy) == [3, 4, 1, 2]
    chat(policy, 4, hint=Hint(time_s=65.0), known=1)
    assert order(policy) == [3, 2, 4, 1]


def test_priority_by_range_of_tokens_and_a_use_without_leaves_it() -> None:
    """Of a chain of four blocks the middle ones are dear; what hangs from them goes first all the same."""
    policy = PriorityPolicy()
    hint = Hint(retention=(Retention(64, 192, 80),), block_tokens=64)
    chat(policy, 1, 2, 3, 4, hint=hint)
    chat(policy, 9)
    assert order(policy) == [4, 9, 3, 2, 1]
    chat(policy, 1, 2, 3, 4, known=4)
    assert order(policy) == [9, 4, 3, 2, 1]


class ByLastUse(RunPolicy):
    """Runs in one queue by last use: what `LruPolicy` does a block at a time."""

    name = "by_last_use"

    def __init__(self) -> None:
        super().__init__(None)

    def _enter(self, run: Run, hint: Hint) -> None:
        run.key = self._latest_key()

    def _use(self, runs: list[Run], starts: Sequence[int], blocks: Sequence[BlockId], hint: Hint) -> None:
        for run in reversed(runs):
            run.key = self._latest_key()

    def _next_queue(self) -> int:
        return 0 if self._head(0) else -1


def test_runs_by_last_use_are_exact_lru() -> None:
    """Chats that branch anywhere, are used in part, come back shortened, and lose tails in walks that break off."""
    rng, lru, runs = random.Random(9), LruPolicy(), ByLastUse()
    both: tuple[Policy, Policy] = (lru, runs)
    chains: list[list[int]] = [[]]
    for step in range(3000):
        base = rng.choice(chains)[: rng.randint(0, 15)]
        known = next((at for at, each in enumerate(base) if ids(each)[0] not in lru), len(base))
        fresh = [10_000 + 20 * step + at for at in range(rng.choice((0, 1, 1, 4, 9)))]
        chain = base[:known] + fresh
        for each in both:
            chat(each, *chain, known=known)
        chains.append(chain)
        if len(lru) > 400:
            walks = [each.victims() for each in both]
            for _ in range(rng.randint(1, 8)):
                gone = [[next(walk)] for walk in walks]
                assert gone[0] == gone[1]
                for each in both:
                    each.remove(gone[0])
            skipped = [next(walk) for walk in walks]  # pinned, say
            assert skipped[0] == skipped[1]
        if step % 50 == 0:
            assert order(runs) == order(lru), step
        assert len(runs) == len(lru)
    assert len(runs._runs) < len(runs) / 2  # or it would not be worth having them


class InTurns(ByLastUse):
    """Each use puts a run into the next of five queues, which give in turns."""

    name = "in_turns"
    num_queues = 5

    def _use(self, runs: list[Run], starts: Sequence[int], blocks: Sequence[BlockId], hint: Hint) -> None:
        super()._use(runs, starts, blocks, hint)
        for run in runs:
            run.queue = (run.queue + 1) % self.num_queues

    def _next_queue(self) -> int:
        ends = [(run.key, queue) for queue in range(self.num_queues) if (run := self._head(queue)) is not None]
        return min(ends)[1] if ends else -1


@pytest.mark.parametrize("at_once", [1, 7, 2048])
def test_entries_that_are_out_of_date_are_dropped_some_at_a_time_and_none_that_counts(at_once: int) -> None:
    runs, most = InTurns(), 0
    runs.compacted_at_once = at_once
    for block in range(200):
        runs.admit(ids(block), NO_HINT)
        runs.touch(ids(block), NO_HINT)
    for turn in range(100):
        for block in range(200):
            runs.touch(ids(block), NO_HINT)
            most = max(most, sum(map(len, runs._heaps.lists)))
            assert runs._heaps.num_entries == sum(map(len, runs._heaps.lists))
        if turn % 10 == 0:
            assert order(runs) == list(range(200))
    assert at_once == 1 or most < 2 * 200 + 1024 + 1024


def test_a_use_adds_no_entry_and_moves_none_until_it_comes_up() -> None:
    runs = ByLastUse()
    for turn in range(50):
        for block in range(200):
            chat(runs, block, known=turn and 1)
    assert runs._heaps.num_entries == 200
    assert order(runs) == list(range(200))


def test_full_garbage_collections_walk_no_ids() -> None:
    runs = ByLastUse()
    for step in range(100):
        known = next((at for at, each in enumerate(ids(1, 2)) if each not in runs), 2)
        chat(runs, 1, 2, *range(100 * step + 10, 100 * step + 40), known=known)
        runs.remove(list(itertools.islice(runs.victims(), 10)))
    gc.collect()
    assert not any(gc.is_tracked(run.ids) for run in runs._runs.values())
    assert not any(map(gc.is_tracked, runs._numbers))


def test_blocks_that_are_committed_one_by_one_are_one_run() -> None:
    runs = ByLastUse()
    for length in range(1, 50):
        runs.admit(ids(length), NO_HINT)
        runs.touch(ids(*range(1, length + 1)), NO_HINT)
    assert len(runs._runs) == 1
    assert order(runs) == list(range(49, 0, -1))


def test_a_hole_in_a_run_leaves_both_sides() -> None:
    runs = ByLastUse()
    chat(runs, 1, 2, 3, 4, 5, 6)
    runs.remove(ids(5, 3))
    assert sorted(order(runs)) == [1, 2, 4, 6]
    chat(runs, 11, 12, 13, 14)
    walk = runs.victims()
    seen = [next(walk) for _ in range(5)]  # all of the first chat, and the second's tail
    runs.remove(ids(12))  # while it walks
    assert seen[-1] == ids(14)[0]
    assert {*seen, *walk} == set(ids(1, 2, 4, 6, 11, 13, 14))
    assert sorted(order(runs)) == [1, 2, 4, 6, 11, 13, 14]


def long_and_short(policy: Policy, num_steps: int, returning: int, *, half_full: bool = False, room: int = 120) -> int:
    """Requests of eight blocks and of one by turns; those of `returning` blocks come back once, 60 s later.

    By last use alone there is no room for them so long.

    `half_full`: each ends with a block that its next turn has otherwise. Returns the number of the next block.
    """
    numbers = iter(range(1, 1_000_000))
    waiting: list[tuple[float, list[int]]] = []
    for step in range(num_steps):
        now_s = 2.0 * step
        fresh = [next(numbers) for _ in range(8 if step % 2 else 1)]
        chat(policy, *fresh, hint=Hint(time_s=now_s))
        if len(fresh) == returning:
            waiting.append((now_s + 60.0, fresh[:-1] if half_full else fresh))
        while waiting and waiting[0][0] <= now_s:
            _, before = waiting.pop(0)
            known = len([each for each in before if ids(each)[0] in policy])
            chat(policy, *before, next(numbers), hint=Hint(time_s=now_s), known=known)
        while len(policy) > room:
            policy.remove([next(policy.victims())])
    return next(numbers)


def test_returns_learns_who_comes_back() -> None:
    """Long first prompts return after 60 s, short ones never: the short ones go first, though used later."""
    policy = ReturnsPolicy()
    at = long_and_short(policy, 3000, returning=8)
    long, short = list(range(at, at + 8)), at + 8
    chat(policy, *long, hint=Hint(time_s=6000.0))
    chat(policy, short, hint=Hint(time_s=6010.0))
    victims = order(policy)
    assert victims.index(short) < min(victims.index(each) for each in long)


def test_returns_learns_that_last_blocks_do_not_come_back() -> None:
    """They go before the rest of what was used earlier; where the whole comes back, they do not."""
    for half_full in (True, False):
        policy = ReturnsPolicy()
        at = long_and_short(policy, 3000, returning=8, half_full=half_full)
        early, late = list(range(at, at + 8)), list(range(at + 8, at + 16))
        chat(policy, *early, hint=Hint(time_s=6000.0))
        chat(policy, *late, hint=Hint(time_s=6010.0))
        victims = order(policy)
        assert (victims.index(late[-1]) < victims.index(early[-2])) is half_full


def test_returns_keeps_what_several_went_on_from() -> None:
    """Requests of one block never return; one of which two went on outlasts one that was used later."""
    policy = ReturnsPolicy()
    shared = long_and_short(policy, 3000, returning=8)
    chat(policy, shared, shared + 1, hint=Hint(time_s=6000.0))
    chat(policy, shared, shared + 2, hint=Hint(time_s=6000.0), known=1)
    chat(policy, shared + 3, hint=Hint(time_s=6001.0))
    policy.remove(ids(shared + 1, shared + 2))
    victims = order(policy)
    assert victims.index(shared + 3) < victims.index(shared)


def shadowed(
    shadow: Shadow, steps: range, worth_of: tuple[float, float], rng: random.Random, *, in_vain: bool = False
) -> list[bool]:
    """Half of the requests are for one of sixty blocks, at level 1, the others for new ones, at level 0.

    `worth_of` levels: a lower one goes first. The real cache has what the sample's has, or `in_vain` nothing while the
    levels are believed. Returns whether they are, after each request.
    """
    believed = []
    for step in steps:
        again = rng.random() < 0.5
        number = rng.randrange(60) if again else 1000 + step
        block = BlockId(hashlib.sha256(str(number).encode()).digest())
        had = int(block in shadow._level_of and not (in_vain and shadow.wins))
        shadow.use([block], 0, had, [(0, int(again))], float(step), lambda level, _: (worth_of[level], math.inf))
        believed.append(shadow.wins)
    return believed


RIGHT, WRONG, SAME = (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_shadow_believes_levels_that_are_right_and_none_that_are_wrong(seed: int) -> None:
    for worth_of, expected in ((RIGHT, 1.0), (WRONG, 0.0)):
        shadow = Shadow(2)
        shadow.resize(100)
        believed = shadowed(shadow, range(6000), worth_of, random.Random(seed))
        assert sum(believed[1000:]) / 5000 == pytest.approx(expected, abs=0.02)


def test_shadow_believes_nothing_where_nothing_differs() -> None:
    shadow = Shadow(2)
    shadow.resize(5000)
    assert not any(shadowed(shadow, range(2000), RIGHT, random.Random(3)))


@pytest.mark.parametrize("seed", range(5))
def test_shadow_takes_its_trust_back_soon_and_gives_it_again(seed: int) -> None:
    """However long the levels were right before."""
    rng, shadow = random.Random(seed), Shadow(2)
    shadow.resize(100)
    assert shadowed(shadow, range(8000), RIGHT, rng)[-1]
    assert not any(shadowed(shadow, range(8000, 9000), WRONG, rng)[400:])
    assert shadowed(shadow, range(9000, 11_000), RIGHT, rng)[-1]


@pytest.mark.parametrize("seed", range(5))
def test_shadow_is_believed_less_and_less_where_the_real_cache_does_not_keep_its_promises(seed: int) -> None:
    shadow = Shadow(2)
    shadow.resize(100)
    believed = shadowed(shadow, range(12_000), RIGHT, random.Random(seed), in_vain=True)
    begins = [at for at in range(1, len(believed)) if believed[at] and not believed[at - 1]]
    waits = [later - earlier for earlier, later in itertools.pairwise(begins)]
    assert sum(believed) < 0.4 * len(believed)
    assert waits[-1] > 2 * waits[0]


@pytest.mark.parametrize("seed", range(5))
def test_shadow_counts_what_short_requests_lose_though_long_ones_won_more(seed: int) -> None:
    """Long requests win a block each, short ones lose the only one that they ask for."""
    rng, shadow = random.Random(seed), Shadow(2)
    for _ in range(400):
        shadow._judge(rng.choice((0, 0, 0, 30)), 50)
    assert shadow.wins
    for _ in range(40):  # hits of blocks are even by now, those of requests are not
        shadow._judge(1, 50)
        shadow._judge(-1, 1)
    assert not shadow.wins


def test_shadow_believes_no_few_requests_however_long_they_are() -> None:
    shadow = Shadow(2)
    for _ in range(100):
        shadow._judge(0, 50)
    for _ in range(5):
        shadow._judge(2000, 2000)
    assert not shadow.wins
    shadow._judge(2000, 2000)
    assert shadow.wins


def judgements_until(shadow: Shadow, wins: bool, more: int) -> int:
    """How many requests with so many hits more it takes."""
    for number in range(1, 5000):
        shadow._judge(more, 10)
        if shadow.wins == wins:
            return number
    raise AssertionError


def test_shadow_counts_against_levels_what_they_lost_since_they_were_disbelieved() -> None:
    taken = []
    for meanwhile in ((10, -10), (-10, -10)):
        shadow = Shadow(2)
        judgements_until(shadow, True, 3)
        judgements_until(shadow, False, -3)
        for more in meanwhile * 50:
            shadow._judge(more, 10)
        taken.append(judgements_until(shadow, True, 10))
    assert taken[1] > 1.5 * taken[0]


def test_shadow_has_less_patience_with_levels_that_were_disbelieved_before() -> None:
    shadow = Shadow(2)
    lost = []
    for _ in range(3):
        judgements_until(shadow, True, 10)
        for _ in range(300):
            shadow._judge(0, 10)
        lost.append(judgements_until(shadow, False, -1))
    assert lost[0] > lost[1] > lost[2]


def test_shadow_judges_a_request_as_one_that_asks_first_and_saves_the_rest_piece_by_piece() -> None:
    """All uses together ask for eight blocks; as several requests the squares of its parts would be counted."""
    shadow = Shadow(2)
    shadow.resize(100)
    blocks = ids(*range(8))
    for step in range(4):  # the last is not judged yet
        for start, stop in ((0, 4), (4, 5), (5, 8)):
            shadow.use(blocks[:stop], start, 4, [(0, 1)], float(step), lambda level, _: (0.0, math.inf))
            shadow._lru.clear()
    more = [0, 8, 8]  # LRU had nothing each time, the levels all of it from the second on
    assert shadow._square == pytest.approx(sum(each * each for each in more), rel=0.01)
    assert shadow._square_requests == pytest.approx(2, rel=0.01)


def disbelieved(times: int) -> Shadow:
    shadow = Shadow(2)
    for _ in range(times):
        judgements_until(shadow, True, 10)
        judgements_until(shadow, False, -10)
    return shadow


def test_shadow_asks_for_more_of_levels_that_were_disbelieved_but_not_for_ever_nor_without_bound() -> None:
    first = judgements_until(disbelieved(0), True, 10)
    at_once = judgements_until(disbelieved(3), True, 10)
    assert at_once > 3 * first
    later = disbelieved(3)
    for _ in range(30_000):
        later._judge(0, 10)
    assert judgements_until(later, True, 10) == pytest.approx(first, abs=2)
    assert judgements_until(disbelieved(16), True, 10) < 8 * at_once


def test_samples_begin_with_the_cache_where_its_size_is_known() -> None:
    policy = ReturnsPolicy()
    policy.expect(100)
    chat(policy, 1, 2, 3)
    policy.expect(0)  # nobody knows
    assert set(policy._shadow._lru) == set(ids(1, 2, 3))


class LooksAnew(ReturnsPolicy):
    """Remembers nothing of which heads its queues have, nor do those of its sample."""

    name = "looks_anew"

    def _use(self, runs: list[Run], starts: Sequence[int], blocks: Sequence[BlockId], hint: Hint) -> None:
        self._shadow.relearned()
        super()._use(runs, starts, blocks, hint)

    def _walk_begins(self) -> None:
        super()._walk_begins()
        self._changed.update(range(self.num_queues))


def believing(policy: ReturnsPolicy, monkeypatch: pytest.MonkeyPatch) -> ReturnsPolicy:
    policy.expect(400)
    policy._shadow.wins = True
    monkeypatch.setattr(policy._shadow, "_judge", lambda more, num_asked: None)
    return policy


@pytest.mark.parametrize("seed", range(3))
def test_heads_that_returns_remembers_are_those_that_it_would_find(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chats that branch, are used in part and return after any time, and lose tails in walks that break off."""
    rng, policies = random.Random(seed), [believing(kind(), monkeypatch) for kind in (ReturnsPolicy, LooksAnew)]
    first, anew = policies
    chains: list[list[int]] = [[]]
    time_s = 0.0
    for step in range(1500):
        time_s += 30.0 if rng.random() < 0.05 else rng.random() / 10
        base = rng.choice(chains[-40:] if rng.random() < 0.7 else chains)
        base = base[: rng.choice((len(base), len(base), rng.randint(0, 9)))]
        known = next((at for at, each in enumerate(base) if ids(each)[0] not in first), len(base))
        chain = base[:known] + [10_000 + 20 * step + at for at in range(rng.choice((0, 1, 2, 9)))]
        for each in policies:
            chat(each, *chain, known=known, hint=Hint(time_s=time_s))
        chains.append(chain)
        while len(first) > 300 or rng.random() < 0.2:
            walks, share = [each.victims() for each in policies], rng.choice((0.0, 0.8, 1.0))
            for _ in range(rng.randint(1, 12)):
                gone = [next(walk, None) for walk in walks]
                assert gone[0] == gone[1]
                assert first._heads == anew._heads
                if gone[0] is not None and rng.random() < share:  # the others are held
                    for each in policies:
                        each.remove([gone[0]])
        assert list(first._shadow._level_of) == list(anew._shadow._level_of)
    assert first._by_odds


def test_returns_is_lru_until_it_has_learned() -> None:
    lru, policy, rng = LruPolicy(), ReturnsPolicy(), random.Random(8)
    for step in range(25):
        chain = [100 * step + at for at in range(rng.randint(1, 6))]
        for each in (lru, policy):
            chat(each, *chain, hint=Hint(time_s=float(step)))
    assert order(policy) == order(lru)


def runs_over_the_registry(check: object) -> bool:
    """Whether it is a test that takes a policy of each kind, and nothing else."""
    return (
        inspect.isfunction(check)
        and check.__name__.startswith("test_")
        and list(inspect.signature(check).parameters) == ["policy"]
    )


def test_recipe_in_contributing_makes_a_policy_that_conforms(tmp_path: Path) -> None:
    """The code is taken from the page as it stands, and put through the tests that run over the registry."""
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.split("## Add a policy")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    source = tmp_path / "fifo_of_the_recipe.py"
    source.write_text(code[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.stem] = module
    try:
        spec.loader.exec_module(module)
        target = f"{source.stem}:FifoPolicy"
        test_every_policy_says_what_it_is_and_where_it_comes_from(target)
        checks = [check for check in list(globals().values()) if runs_over_the_registry(check)]
        assert test_suffixes_go_before_prefixes_in_random_trees in checks
        for check in checks:
            check(POLICIES.load(target)(POLICIES.options(target, {})))
    finally:
        del sys.modules[source.stem]


def test_lru_is_exact_and_tail_first() -> None:
    lru = LruPolicy()
    lru.admit(ids(1, 2, 3), NO_HINT)  # 3 2 1
    lru.admit(ids(4), NO_HINT)  # 3 2 1 4
    lru.touch(ids(1, 2, 3), NO_HINT)  # 4 3 2 1
    assert order(lru) == [4, 3, 2, 1]
    lru.touch(ids(4), NO_HINT)
    assert order(lru) == [3, 2, 1, 4]


class SmallSteps(LruPolicy):
    step = 5


@pytest.mark.parametrize("kind", [LruPolicy, SmallSteps])
def test_lru_is_exact_under_random_use_of_chains(kind: type[LruPolicy]) -> None:
    """Against a list that moves: also where most of the coldest are used again, or removed, after they were sorted."""
    rng, lru = random.Random(6), kind()
    expected: list[int] = []
    numbers = 0
    for _ in range(3000):
        action = rng.random()
        if action < 0.4 or not expected:
            chain = list(range(numbers, numbers + rng.randint(1, 12)))
            numbers += len(chain)
            lru.admit(ids(*chain), NO_HINT)
            expected += chain[::-1]
        elif action < 0.7:
            chain = rng.sample(expected[: rng.randint(1, len(expected))], 1) + rng.sample(
                expected, min(3, len(expected))
            )
            chain = list(dict.fromkeys(chain))
            lru.touch(ids(*chain), NO_HINT)
            expected = [each for each in expected if each not in chain] + chain[::-1]
        elif action < 0.9:
            gone = expected[: rng.randint(1, 8)]
            walk = lru.victims()
            assert [int.from_bytes(next(walk), "big") for _ in gone] == gone
            lru.remove(ids(*gone))
            expected = expected[len(gone) :]
        else:
            assert order(lru)[:200] == expected[:200]
    assert order(lru) == expected
