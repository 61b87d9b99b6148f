# SPDX-License-Identifier: Apache-2.0
"""What callers wish for, under every policy that heeds hints: bands, durations, what is over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvstore.api import NO_HINT, Hint, Retention
from kvstore.block import BlockId
from kvstore.policies import POLICIES, Policy

DEAF = ["lru"]
HEED = [name for name in POLICIES if name not in DEAF]
BLOCK_TOKENS = 64
OVER, ORDINARY = -1, 50


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(number.to_bytes(32, "big")) for number in numbers]


def order(policy: Policy) -> list[int]:
    return [int.from_bytes(block, "big") for block in policy.victims()]


def use(policy: Policy, *numbers: int, hint: Hint = NO_HINT) -> None:
    """A request as a pool passes it on: what was there is used, the rest comes, and the chain was used."""
    known = next((at for at, each in enumerate(ids(*numbers)) if each not in policy), len(numbers))
    if known:
        policy.touch(ids(*numbers[:known]), replace(hint, asked=True))
    if numbers[known:]:
        policy.admit(ids(*numbers[known:]), hint)
        policy.touch(ids(*numbers), hint)


@pytest.fixture(params=HEED)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES.load(request.param)(POLICIES.options(request.param, {}))


def test_low_priority_goes_first_and_high_last(policy: Policy) -> None:
    use(policy, 1, hint=Hint(priority=90))
    use(policy, 2)
    use(policy, 3, hint=Hint(priority=20))
    use(policy, 4)
    use(policy, 5, hint=Hint(priority=10))
    victims = order(policy)
    assert victims[:2] == [5, 3]
    assert victims[-1] == 1


def test_what_is_past_its_time_to_live_goes_first_until_it_is_used(policy: Policy) -> None:
    use(policy, 1, hint=Hint(priority=10))
    use(policy, 2, 3, hint=Hint(ttl_s=60.0))
    use(policy, 4, hint=Hint(time_s=59.0))
    assert order(policy)[0] == 1
    use(policy, 4, hint=Hint(time_s=61.0))
    assert order(policy)[:3] == [3, 2, 1]
    use(policy, 2, 3, hint=Hint(time_s=62.0))
    assert order(policy)[0] == 1


def test_time_to_live_is_counted_from_the_last_use_that_states_one(policy: Policy) -> None:
    use(policy, 1, hint=Hint(ttl_s=60.0))
    use(policy, 1, hint=Hint(ttl_s=60.0, time_s=50.0))
    use(policy, 2, hint=Hint(priority=20, time_s=70.0))
    assert order(policy) == [2, 1]
    use(policy, 3, hint=Hint(time_s=111.0))
    assert order(policy)[0] == 1


def test_closed_conversation_goes_first_but_what_others_went_on_from(policy: Policy) -> None:
    use(policy, 1, 2, 10, 11, hint=Hint(time_s=1.0))
    use(policy, 1, 2, 20, 21, hint=Hint(time_s=2.0))
    use(policy, 9, hint=Hint(priority=5))
    use(policy, 1, 2, 20, 21, hint=Hint(time_s=3.0, closed=True))
    victims = order(policy)
    assert victims[:3] == [21, 20, 9]
    assert victims.index(11) < victims.index(2) < victims.index(1)


def test_one_request_cannot_lower_what_others_use_but_can_raise_it(policy: Policy) -> None:
    use(policy, 1, 10)
    use(policy, 1, 11)
    use(policy, 1, 10, hint=Hint(priority=0))
    policy.remove(ids(10, 11))
    use(policy, 2, hint=Hint(priority=40))
    assert order(policy) == [2, 1]
    use(policy, 3, hint=Hint(priority=60))
    use(policy, 1, hint=Hint(priority=80))
    assert order(policy) == [2, 3, 1]


def test_a_range_of_tokens_has_its_own_priority_for_its_duration(policy: Policy) -> None:
    """Of a chain of four blocks the second and third are dear; the last one goes first all the same."""
    wish = (Retention(BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS, 80, 60.0),)
    use(policy, 1, 2, 3, 4, hint=Hint(retention=wish, block_tokens=BLOCK_TOKENS))
    use(policy, 9, hint=Hint(priority=70))
    victims = order(policy)
    assert victims == [4, 9, 3, 2, 1]
    use(policy, 8, hint=Hint(time_s=61.0))
    assert order(policy)[-1] == 9


def test_what_is_over_promises_nothing() -> None:
    policy = POLICIES.load("returns")(None)
    use(policy, 1, 2)
    use(policy, 3, hint=Hint(closed=True))
    assert policy.return_odds(ids(1, 3)) == [1.0, 0.0]


class Block:
    def __init__(self, parent: int) -> None:
        self.parent = parent
        self.children: set[int] = set()
        self.ever = 0  # children it ever had
        self.priority = ORDINARY
        self.until_s = math.inf
        self.after = ORDINARY


HINTS = st.builds(
    Hint,
    priority=st.sampled_from([50, 50, 0, 20, 90]),
    closed=st.sampled_from([False, False, False, True]),
    ttl_s=st.sampled_from([None, None, 10.0, 100.0]),
    retention=st.lists(
        st.builds(
            Retention,
            start=st.sampled_from([0, 64, 200]),
            stop=st.sampled_from([None, 256, 500]),
            priority=st.sampled_from([10, 50, 80]),
            duration_s=st.sampled_from([None, 30.0]),
        ),
        max_size=2,
    ).map(tuple),
    block_tokens=st.just(BLOCK_TOKENS),
)


class Wishes(RuleBasedStateMachine):
    """Chats that branch, grow, are evicted and torn, beside a model that knows each block's priority, not the order."""

    name = "priority"

    def __init__(self) -> None:
        super().__init__()
        self.policy = POLICIES.load(self.name)(POLICIES.options(self.name, {}))
        self.blocks: dict[int, Block] = {}
        self.chains: list[list[int]] = [[]]
        self.now_s = 0.0
        self.next = 1

    @rule(data=st.data(), hint=HINTS, added=st.integers(0, 6), passes_s=st.sampled_from([0.0, 1.0, 40.0]))
    def request(self, data: st.DataObject, hint: Hint, added: int, passes_s: float) -> None:
        chain = data.draw(st.sampled_from(self.chains))
        known = next((at for at, each in enumerate(chain) if each not in self.blocks), len(chain))
        base = chain[: data.draw(st.integers(0, known))]
        if not (base or added):
            return  # nothing was used, so the policy did not hear of the time
        self.now_s += passes_s
        hint = replace(hint, time_s=self.now_s)
        fresh = list(range(self.next, self.next + added))
        self.next += added
        if base:
            self.policy.touch(ids(*base), replace(hint, asked=True))
            self.wish(base, hint)
        if fresh:
            self.policy.admit(ids(*fresh), hint)
            for number, parent in zip(fresh, [base[-1] if base else 0, *fresh], strict=False):
                self.blocks[number] = Block(parent)
                if parent:
                    self.blocks[parent].children.add(number)
                    self.blocks[parent].ever += 1
            self.policy.touch(ids(*base, *fresh), hint)
            self.wish([*base, *fresh], hint)
            self.chains.append([*base, *fresh])

    def wish(self, chain: Sequence[int], hint: Hint) -> None:
        for each in chain:
            self.expire(self.blocks[each])
            if self.blocks[each].priority == OVER:
                self.set(each, ORDINARY, None, ORDINARY)
        shared = max((at for at, each in enumerate(chain) if self.blocks[each].ever > 1), default=-1)
        if hint.closed:
            for each in chain[shared + 1 :]:
                self.set(each, OVER, None, ORDINARY)
            return
        if hint.priority != ORDINARY or hint.ttl_s is not None:
            stated = None if hint.priority == ORDINARY else hint.priority
            after = ORDINARY if hint.ttl_s is None else OVER
            for each in chain[shared + 1 if hint.priority < ORDINARY else 0 :]:
                self.set(each, stated, hint.ttl_s, after)
        for span in hint.retention:
            for at, each in enumerate(chain):
                touched = span.start < (at + 1) * BLOCK_TOKENS and (span.stop is None or at * BLOCK_TOKENS < span.stop)
                if touched and (at > shared or span.priority >= ORDINARY):
                    self.set(each, span.priority, span.duration_s, ORDINARY)

    def set(self, number: int, priority: int | None, duration_s: float | None, after: int) -> None:
        block = self.blocks[number]
        block.priority = block.priority if priority is None else priority
        block.until_s = math.inf if duration_s is None else self.now_s + duration_s
        block.after = after

    def expire(self, block: Block) -> None:
        if block.until_s <= self.now_s:
            block.priority = ORDINARY if block.ever > 1 and block.after == OVER else block.after
            block.until_s = math.inf

    def walk(self) -> Iterator[int]:
        """What the policy yields, each held against the model: an end, of the lowest priority that any end has."""
        for block in self.blocks.values():
            self.expire(block)
        below = {number: len(block.children) for number, block in self.blocks.items()}
        ends = {number for number, count in below.items() if not count}
        for yielded in self.policy.victims():
            number = int.from_bytes(yielded, "big")
            assert number in ends, "something hangs from it, or it went before"
            lowest = min(self.blocks[each].priority for each in ends)
            assert self.blocks[number].priority == lowest
            ends.remove(number)
            parent = self.blocks[number].parent
            if parent in below:
                below[parent] -= 1
                if not below[parent]:
                    ends.add(parent)
            yield number
        assert not ends

    @rule(count=st.integers(1, 30))
    def evict(self, count: int) -> None:
        gone = [number for number, _ in zip(self.walk(), range(count), strict=False)]
        self.policy.remove(ids(*gone))
        for number in gone:
            parent = self.blocks.pop(number).parent
            if parent in self.blocks:
                self.blocks[parent].children.discard(number)

    @invariant()
    def knows_its_blocks(self) -> None:
        assert len(self.policy) == len(self.blocks)

    def teardown(self) -> None:
        assert len(list(self.walk())) == len(self.blocks)


@pytest.mark.parametrize("name", HEED)
def test_an_end_of_the_lowest_priority_goes_next_whatever_was_wished_for(name: str) -> None:
    kind = type(f"Wishes_{name}", (Wishes,), {"name": name})
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
