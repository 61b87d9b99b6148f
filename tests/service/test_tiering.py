# SPDX-License-Identifier: Apache-2.0
"""`kvstore serve` over a real Redis: what is let in, by what it stands there, and what a stopping server leaves."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from kvstore.api import NO_HINT, Hint, Store
from kvstore.block import Chain, ModelId, Root
from kvstore.tiers.redis_names import Names
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import chain_of, content, load_all
from tests.patient import CALL_DEADLINE_S, connect
from tests.service.test_cli import Serving
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.redis]

Serve = Callable[..., Serving]
PATIENT = f"request.lookup_deadline_s={CALL_DEADLINE_S}"


@pytest.fixture
def below() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def serve(tmp_path: Path, below: EmbeddedServer) -> Iterator[Serve]:
    made: list[Serving] = []

    def start(*words: str) -> Serving:
        made.append(Serving(tmp_path, "--redis-url", below.url, "--set", PATIENT, *words))
        return made[-1]

    yield start
    for each in made:
        each.end()


def save(store: Store, chain: Chain, hint: Hint = NO_HINT) -> None:
    with store.save(chain, 0, len(chain), hint=hint) as saving:
        for index in saving.indices:
            for part, view in enumerate(saving.views(index)):
                assert view is not None
                view[:] = content(chain, index, part, len(view))
        assert saving.commit() == len(chain)


def scores(client: redis.Redis, chain: Chain) -> list[float]:
    """Of what is in Redis."""
    names = Names(16)
    keys = chain.part_keys(0, len(chain), (0,))
    found = [client.zscore(names.bucket(key).order, names.member(key.block, 0)) for key in keys]
    return [score for score in found if score is not None]


def test_a_stopping_server_writes_down_what_it_alone_holds_and_the_next_one_finds_it(
    serve: Serve, model: ModelId
) -> None:
    chains = [chain_of(Root(model), 8, seed=seed) for seed in range(5)]
    first = serve("--tiering", "exclusive")
    with connect(first.address) as store:
        store.open(model)
        for chain in chains:
            save(store, chain)
        assert store.stats().get("mover.demoted_blocks", 0) == 0
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 0
    assert "all 40 blocks that the host alone held went to redis" in first.log.read_text()
    second = serve("--tiering", "exclusive")
    with connect(second.address) as store:
        store.open(model)
        for chain in chains:
            assert load_all(store, chain) == ["redis"] * 8


@pytest.mark.alone
def test_a_drain_ends_at_its_limit_and_says_what_is_left(serve: Serve, model: ModelId) -> None:
    words = ("--set", "service.drain_s=0.5", "--set", "mover.flush_s=0", "--set", "mover.write_bytes_per_s=8192")
    server = serve("--tiering", "exclusive", *words)
    with connect(server.address) as store:
        store.open(model)
        save(store, chain_of(Root(model), 40))
    server.process.send_signal(signal.SIGTERM)
    assert server.wait(10) == 0
    assert "of 40 blocks did not go to redis" in server.log.read_text()


def test_a_priority_says_what_is_let_in_and_where_it_stands(
    serve: Serve, below: EmbeddedServer, model: ModelId
) -> None:
    words = ("--set", "mover.write=through", "--set", "mover.min_priority=40", "--redis-policy", "priority")
    server = serve(*words)
    low, plain, high = (chain_of(Root(model), 4, seed=seed) for seed in range(3))
    with connect(server.address) as store, redis.Redis.from_url(below.url) as client:
        store.open(model)
        for chain, priority in ((low, 39), (plain, 50), (high, 100)):
            save(store, chain, Hint(priority=priority))
        wait_until(lambda: len(scores(client, high)) == 4)
        assert scores(client, low) == []
        assert scores(client, high)[0] - scores(client, plain)[0] == pytest.approx(600, abs=10)
        wait_until(lambda: store.stats()["mover.declined_blocks"] == 4)


def test_what_the_policy_thinks_will_not_come_back_is_not_let_in(
    serve: Serve, below: EmbeddedServer, model: ModelId
) -> None:
    server = serve("--set", "mover.write=on_reuse", "--set", "mover.min_return_probability=0.01")
    # By two clients: what one says of a chain, and says again, may reach the policy as one use.
    with (
        connect(server.address) as store,
        connect(server.address) as other,
        redis.Redis.from_url(below.url) as client,
    ):
        store.open(model)
        other.open(model)

        def ask(chain: Chain, hint: Hint = NO_HINT) -> None:
            other.match(chain, "a request", hint=hint)
            other.forget("a request")

        for seed in range(40):  # enough that come back for the policy to have learned
            chat = chain_of(Root(model), 2, seed=seed)
            save(store, chat)
            ask(chat)
        over, live = chain_of(Root(model), 4, seed=100), chain_of(Root(model), 4, seed=101)
        save(store, over)
        save(store, live)
        ask(over, Hint(closed=True))
        ask(live)
        wait_until(lambda: len(scores(client, live)) == 4)
        wait_until(lambda: store.stats().get("mover.declined_blocks", 0) >= 4)
        assert scores(client, over) == []
