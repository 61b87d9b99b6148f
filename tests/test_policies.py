# SPDX-License-Identifier: Apache-2.0
"""Conformance of every registered policy, and the definition of each."""

from __future__ import annotations

import random

import pytest

from kvstore.api import NO_HINT, Hint
from kvstore.block import BlockId
from kvstore.policies import POLICIES, Policy
from kvstore.policies.lru import LruPolicy


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(number.to_bytes(32, "big")) for number in numbers]


def order(policy: Policy) -> list[int]:
    return [int.from_bytes(block, "big") for block in policy.victims()]


@pytest.fixture(params=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES.load(request.param)(POLICIES.options(request.param, {}))


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
