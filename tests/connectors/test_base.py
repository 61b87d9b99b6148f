# SPDX-License-Identifier: Apache-2.0
"""Plans by learnt costs, chains kept between turns, and failing open."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest

pytest.importorskip("torch", reason="connectors copy torch tensors")

from connectors.base import Conversations, CostModel, FailOpen, LoadRule, plan_save
from connectors.fit import Fit, least_eigenvalue
from kvstore.api import Match
from kvstore.block import Chain, ModelId, Root
from kvstore.errors import ConfigError, LeaseExpired, TierUnavailable

MODEL = ModelId(model="m", revision="r", kv_dtype="float32", num_layers=1, num_kv_heads=1, head_dim=1, block_tokens=4)
ROOT = Root(MODEL)
A, B = 1e-3, 1e-6


def model_that_knows(a: float = A, b: float = B, **rates: float) -> CostModel:
    """A cost model for blocks of 4 tokens and 1,000 bytes, taught exact costs."""
    cost = CostModel(4, 1000)
    for new, past in ((100, 0), (500, 0), (100, 5000), (500, 2000)):
        cost.seen_prefill(new, past, a * new + b * new * (past + new / 2))
    for tier, rate in rates.items():
        cost.seen_load(tier, 1000, 1000 / rate)
    return cost


def match_of(*tiers: tuple[str, int], pending: int = 0) -> Match:
    total = sum(count for _, count in tiers)
    return Match(total, dict(tiers).get("host", 0), pending, True, tiers)


def test_prefill_cost_is_learnt_from_what_was_seen() -> None:
    cost = model_that_knows()
    assert cost.prefill_s(300, 1000) == pytest.approx(A * 300 + B * 300 * 1150, rel=1e-3)


def test_one_shape_alone_still_gives_a_usable_cost() -> None:
    cost = CostModel(4, 1000)
    for _ in range(5):
        cost.seen_prefill(100, 0, 0.5)
    assert cost.prefill_s(200, 0) == pytest.approx(1.0)


def test_costs_are_never_negative_whatever_was_seen() -> None:
    cost = CostModel(4, 1000)
    for new, past, seconds in ((10, 0, 9.0), (500, 4000, 0.1), (20, 0, 5.0), (400, 0, 0.2)):
        cost.seen_prefill(new, past, seconds)
        predicted = cost.prefill_s(100, 100)
        assert predicted is not None
        assert predicted >= 0


def test_what_was_never_seen_is_loaded_so_that_it_is_measured() -> None:
    assert CostModel(4, 1000).plan_load(match_of(("host", 10)), 100) == 10
    assert model_that_knows().plan_load(match_of(("host", 10)), 100) == 10


def test_of_a_lower_tier_that_nobody_knows_yet_a_load_takes_what_is_soon_there_even_if_it_is_slow() -> None:
    block_bytes = 8 << 20
    cost = CostModel(64, block_bytes)
    match = match_of(("host", 10), ("redis", 500))
    first = 10 + (256 << 20) // block_bytes
    assert cost.plan_load(match, 32_768) == first
    assert cost.plan_load(match, 32_768, start=20) == first + 10, "from where the engine has none on"
    assert cost.plan_load(match_of(("host", 510)), 32_768) == 510, "the host is known to be quick"
    assert CostModel(64, block_bytes, rule=LoadRule.ALWAYS).plan_load(match, 32_768) == 510
    assert CostModel(64, 1 << 30).plan_load(match_of(("redis", 5)), 1000) == 1
    cost.seen_load("redis", 256 << 20, 0.1)
    assert cost.plan_load(match, 32_768) == 510


@pytest.mark.parametrize(("bytes_per_s", "most"), [(4e9, 1.1), (0.5e9, 1.15), (0.1e9, 1.6)])
def test_an_engine_that_starts_beside_a_warm_but_slow_tier_is_soon_as_quick_as_without(
    bytes_per_s: float, most: float
) -> None:
    """An 8B model on a large device, whose passes take 40 ms however short; all of every prompt is in the tier.

    Where the first load was of all that was there, 20 requests took 2.8 times as long at 0.1 GB/s.
    """
    draw = random.Random(0)
    cost = CostModel(64, 8 << 20)

    def computing_s(new: int, past: int) -> float:
        return 0.04 + 27e-6 * new + 9e-10 * new * (past + new / 2)

    took_s = without_s = 0.0
    for _ in range(20):
        stored = draw.randrange(2048, 32_768, 64)
        prompt = stored + draw.randint(64, 500)
        stop = cost.plan_load(match_of(("redis", stored // 64)), prompt)
        load_s = stop * (8 << 20) / bytes_per_s * draw.gauss(1, 0.05)
        if stop:
            cost.seen_load("redis", stop * (8 << 20), load_s)
        pass_s = computing_s(prompt - 64 * stop, 64 * stop) * draw.gauss(1, 0.05)
        cost.seen_prefill(prompt - 64 * stop, 64 * stop, pass_s)
        took_s += load_s + pass_s
        without_s += computing_s(prompt, 0)
    assert took_s < most * without_s


def test_a_fast_tier_is_loaded_and_a_slow_one_recomputed() -> None:
    cost = model_that_knows(host=1e8, redis=1e4)
    assert cost.plan_load(match_of(("host", 10), ("redis", 10)), 100) == 10
    assert cost.plan_load(match_of(("redis", 20)), 100) == 0


def test_a_slow_tier_is_crossed_where_a_fast_one_behind_it_pays_for_both() -> None:
    cost = model_that_knows(host=1e8, redis=2e5, remote=1e9)
    assert cost.plan_load(match_of(("host", 10), ("redis", 1), ("remote", 1000)), 5000) == 1011


def test_a_tier_that_was_slow_once_is_tried_again_in_time() -> None:
    cost = model_that_knows(redis=2e5)
    assert cost.plan_load(match_of(("redis", 20)), 100) == 0
    tries = 0
    while cost.plan_load(match_of(("redis", 20)), 100) == 0:
        tries += 1
        assert tries < 200
    assert tries > 5


def test_a_try_of_a_slow_tier_costs_little_and_shows_whether_it_has_become_fast() -> None:
    cost = model_that_knows(redis=1e4)
    loads = [cost.plan_load(match_of(("redis", 200)), 1000) for _ in range(300)]
    tried = next(filter(None, loads))
    computing_s, rest_s = cost.prefill_s(1000, 0), cost.prefill_s(1000 - 4 * tried, 4 * tried)
    assert computing_s is not None
    assert rest_s is not None
    assert tried * 1000 / 1e4 + rest_s < 1.1 * computing_s  # a single block is the least there is
    cost.seen_load("redis", 1000 * tried, tried * 1000 / 1e4)
    assert cost.plan_load(match_of(("redis", 200)), 1000) == 0  # as slow as before
    assert next(filter(None, (cost.plan_load(match_of(("redis", 200)), 1000) for _ in range(300)))) == tried
    cost.seen_load("redis", 1000 * tried, tried * 1000 / 1e8)
    assert cost.plan_load(match_of(("redis", 200)), 1000) == 200


def test_a_try_goes_beyond_a_fast_tier_whose_blocks_are_loaded_all_the_same() -> None:
    cost = model_that_knows(host=1e8, redis=2e5)
    loads = [cost.plan_load(match_of(("host", 10), ("redis", 10)), 100) for _ in range(100)]
    assert loads[0] == 10
    assert set(loads) <= set(range(10, 15))
    assert max(loads) > 10


def test_lower_tiers_are_not_asked_where_nothing_of_theirs_would_be_loaded_and_are_again_in_time() -> None:
    assert CostModel(4, 1000).plan_ask_s(100, 0.25) == 0.25
    assert model_that_knows(host=1e3).plan_ask_s(100, 0.25) == 0.25  # of lower tiers nothing was seen
    fast, slow = model_that_knows(redis=1e9), model_that_knows(redis=2e5)
    computing_s = fast.prefill_s(100, 0)
    assert computing_s is not None
    assert 0.9 * computing_s < (fast.plan_ask_s(100, 0.25) or 0) < computing_s
    answers = [slow.plan_ask_s(100, 0.25) for _ in range(100)]
    assert answers[:5] == [None] * 5
    assert answers[-1]


def test_what_the_engine_has_is_neither_asked_for_nor_waited_for() -> None:
    fast = model_that_knows(redis=1e9)
    rest_s = fast.prefill_s(40, 60)
    assert rest_s is not None
    assert 0.85 * rest_s < (fast.plan_ask_s(100, 1.0, start=15) or 0) < rest_s
    assert fast.plan_ask_s(100, 1.0, start=24) is None, "the last block is computed"
    assert model_that_knows(redis=3e5).plan_ask_s(100, 1.0, start=15) is not None, (
        "nine blocks are to be loaded, not all"
    )
    assert CostModel(4, 1000, rule=LoadRule.ALWAYS).plan_ask_s(100, 1.0, start=24) is None
    pending = Match(0, 0, 20, True, ())
    assert fast.plan_wait_s(pending, 100, start=20) == 0
    assert fast.plan_wait_s(pending, 100, start=16) < fast.plan_wait_s(pending, 100, start=12)
    assert fast.plan_wait_s(pending, 100, start=12) < fast.plan_wait_s(pending, 100)


@pytest.mark.parametrize("stalled_s", [5.0, 8.0, 60.0])
@pytest.mark.parametrize(("tier", "load_s"), [("host", 0.0065), ("redis", 0.3)])
def test_a_short_pass_that_stalled_does_not_end_loading(tier: str, load_s: float, stalled_s: float) -> None:
    block_bytes = 2_949_120
    costs, match = CostModel(64, block_bytes), Match(10, 10 if tier == "host" else 0, 0, True, ((tier, 10),))
    costs.seen_prefill(631, 0, 4.0)
    costs.seen_load(tier, 10 * block_bytes, load_s)
    costs.seen_prefill(19, 640, stalled_s)
    for prompt, seconds in ((631, 5.0), (659, 4.0), (631, 6.0), (659, 4.5)):
        costs.seen_prefill(prompt, 0, seconds)
    assert costs.plan_load(match, 659) == 10
    assert (costs.plan_ask_s(659, 0.25) or 0.0) > 0


def test_what_costs_next_to_nothing_to_load_is_loaded_though_no_gain_is_seen() -> None:
    costs, match = CostModel(64, 1000), Match(10, 10, 0, True, (("host", 10),))
    for tokens in (100, 659):  # all cost a constant, or so it looks
        costs.seen_prefill(tokens, 0, 1.0)
    costs.seen_load("host", 10_000, 0.009)
    assert costs.plan_load(match, 659) == 10
    for _ in range(20):
        costs.seen_load("host", 10_000, 0.05)
    assert costs.plan_load(match, 659) == 0


def test_the_rule_always_loads_however_slow() -> None:
    cost = CostModel(4, 1000, rule=LoadRule.ALWAYS)
    cost.seen_prefill(100, 0, 1e-6)
    cost.seen_load("redis", 10, 100.0)
    assert cost.plan_load(match_of(("redis", 20)), 100) == 20


@pytest.mark.parametrize(("prompt", "blocks"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (40, 9)])
def test_the_last_prompt_token_is_never_loaded(prompt: int, blocks: int) -> None:
    for cost in (CostModel(4, 1000), model_that_knows(host=1e12)):
        assert cost.plan_load(match_of(("host", 10)), prompt) == blocks


def test_blocks_that_are_on_the_device_cost_nothing() -> None:
    cost = model_that_knows(redis=2e5)
    assert cost.plan_load(match_of(("redis", 20)), 100, start=20) == 20
    assert cost.plan_load(match_of(("host", 3)), 100, start=5) == 3


def test_waiting_for_pending_blocks_lasts_as_long_as_computing_them() -> None:
    cost = model_that_knows()
    waiting = cost.plan_wait_s(match_of(("host", 2), pending=5), 1000)
    computing = cost.prefill_s(20, 8)
    assert computing is not None
    assert computing < waiting < 1.5 * computing
    assert cost.plan_wait_s(match_of(("host", 2)), 1000) == 0
    assert CostModel(4, 1000).plan_wait_s(match_of(pending=5), 1000) == 0


def test_only_full_blocks_of_computed_tokens_are_saved() -> None:
    assert plan_save(15, 0, 4) == range(3)
    assert plan_save(16, 3, 4) == range(3, 4)
    assert not plan_save(16, 4, 4)
    assert not plan_save(3, 7, 4)


def test_a_conversation_hashes_only_its_new_tokens() -> None:
    chats = Conversations(ROOT)
    chain = chats.chain("c", [1, 2, 3, 4, 5])
    chain.extend([6, 7])
    chats.keep("c", chain, [1, 2, 3, 4, 5, 6, 7])
    again = chats.chain("c", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert again is chain
    assert again.ids == Chain(ROOT, range(1, 10)).ids


@pytest.mark.parametrize("tokens", [[1, 2, 3, 9, 5, 6, 7, 8], [1, 2, 3, 4], [9]])
def test_a_conversation_that_goes_another_way_gets_a_chain_of_its_own(tokens: list[int]) -> None:
    chats = Conversations(ROOT)
    chain = chats.chain("c", [1, 2, 3, 4, 5])
    chats.keep("c", chain, [1, 2, 3, 4, 5])
    other = chats.chain("c", tokens)
    assert other is not chain
    assert other.ids == Chain(ROOT, tokens).ids


def test_requests_without_a_conversation_share_no_chain() -> None:
    chats = Conversations(ROOT)
    chain = chats.chain("", [1, 2])
    chats.keep("", chain, [1, 2])
    assert chats.chain("", [1, 2, 3]) is not chain


def test_the_oldest_conversations_are_forgotten() -> None:
    chats = Conversations(ROOT, max_conversations=2)
    chains = {name: chats.chain(name, [1]) for name in "abc"}
    for name, chain in chains.items():
        chats.keep(name, chain, [1])
    assert chats.chain("a", [1]) is not chains["a"]
    assert chats.chain("c", [1]) is chains["c"]


class Time:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def fail() -> int:
    raise TierUnavailable("redis", "down")


def test_a_failure_is_the_default_and_the_store_is_left_alone_for_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Time()
    guard = FailOpen(backoff_s=1.0, now_s=clock)
    with caplog.at_level(logging.INFO, logger="kvstore.connector"):
        assert guard.call(fail, 7) == 7
        calls: list[int] = []
        assert guard.call(lambda: calls.append(1), None) is None
        assert calls == []
        clock.now_s += 1.0
        assert guard.call(fail, 7) == 7
        clock.now_s += 1.0
        assert guard.call(lambda: 5, 7) == 5
        assert guard.call(lambda: 6, 7) == 6
    assert (guard.num_failures, guard.num_skipped) == (2, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_an_expired_lease_is_a_miss_and_not_a_dead_store() -> None:
    guard = FailOpen(now_s=Time())

    def expired() -> int:
        raise LeaseExpired("too late")

    assert guard.call(expired, 0) == 0
    assert not guard.resting
    assert guard.call(lambda: 3, 0) == 3


def test_nothing_that_a_store_raises_fails_a_request(caplog: pytest.LogCaptureFixture) -> None:
    for error in (ConnectionResetError("reset"), ConfigError("not open"), RuntimeError("shut down"), KeyError(1)):

        def broken(error: Exception = error) -> int:
            raise error

        assert FailOpen(now_s=Time()).call(broken, 1) == 1
    # A bug is a miss as well, but it says where it is.
    assert [bool(record.exc_info) for record in caplog.records] == [False, False, True, True]


def test_costs_are_those_of_least_squares_where_none_is_negative() -> None:
    rng = np.random.default_rng(1)
    fit = Fit(3, decay=1.0)
    terms = rng.uniform(1, 100, (30, 3))
    seconds = terms @ [0.3, 0.2, 5.0] * rng.uniform(0.99, 1.01, 30)
    for row, took in zip(terms.tolist(), seconds.tolist(), strict=True):
        fit.see(row, took)
    want = np.linalg.lstsq(terms / seconds[:, None], np.ones(30), rcond=None)[0]
    assert (want > 0).all()
    assert [fit.predict(row) for row in np.eye(3).tolist()] == pytest.approx(want.tolist())


def test_the_least_eigenvalue_is_what_numpy_finds() -> None:
    rng = np.random.default_rng(1)
    for size in (1, 2, 3):
        for _ in range(50):
            seen = rng.normal(size=(size, 5)) + rng.normal(size=5) * rng.uniform(0, 100)
            alike = seen @ seen.T
            scale = np.sqrt(np.diag(alike))
            alike /= np.outer(scale, scale)
            assert least_eigenvalue(alike.tolist()) == pytest.approx(np.linalg.eigvalsh(alike)[0], abs=1e-9)
    assert least_eigenvalue(np.eye(3).tolist()) == 1
