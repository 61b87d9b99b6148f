# SPDX-License-Identifier: Apache-2.0
"""Hints reach the policy of a store, whether it is in this process or behind the wire."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from kvstore import KVStore, StoreConfig
from kvstore.api import NO_HINT, Hint, Retention, Store
from kvstore.block import BlockId, Root
from kvstore.policies.lru import LruPolicy
from tests.conftest import chain_of
from tests.patient import connect
from tests.service.conftest import StartServer

HEARD: list[Hint] = []


class Hearing(LruPolicy):
    """LRU that notes what it is told."""

    def admit(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        HEARD.append(hint)
        super().admit(blocks, hint)

    def touch(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        HEARD.append(hint)
        super().touch(blocks, hint)


@pytest.fixture(params=["in_process", "over_the_wire"])
def store(request: pytest.FixtureRequest, root: Root, start_server: StartServer) -> Iterator[Store]:
    """Room for 256 blocks at most."""
    HEARD.clear()
    policy = "tests.service.test_hints:Hearing"
    opened: KVStore | Store
    if request.param == "in_process":
        opened = KVStore(StoreConfig.load({"host": {"capacity_bytes": "1MiB", "policy": policy}}))
    else:
        opened = connect(start_server(16, host={"policy": policy}).address)
    try:
        opened.open(root.model)
        yield opened
    finally:
        opened.close()


FULL = Hint(
    conversation="chat-17",
    turn=3,
    prompt_tokens=999,
    new_blocks=2,
    priority=0,
    retention=(Retention(0, 128, 100, 60.0), Retention(128, None, 20)),
    ttl_s=5.0,
    closed=True,
)


def plain(hint: Hint) -> Hint:
    """Without what the store fills in."""
    return replace(hint, time_s=0.0, asked=False, block_tokens=0)


@pytest.mark.parametrize("hint", [FULL, Hint(retention=(Retention(5, None, 0),)), NO_HINT])
def test_a_hint_arrives_as_it_was_given(store: Store, root: Root, hint: Hint) -> None:
    chain = chain_of(root, 3)
    with store.save(chain, 0, 3, hint=hint) as save:
        save.commit()
    assert {plain(each) for each in HEARD} == {hint}
    assert HEARD[0].block_tokens == root.model.block_tokens
    store.match(chain, "r", hint=hint)
    store.touch(chain, 3, hint)
    store.forget("r")
    # Uses wait until order matters: the next block that finds no room, or four times a second.
    other = chain_of(root, 300, seed=9)
    with store.save(other, 0, 300) as save:
        save.commit()
    assert {plain(each) for each in HEARD if each.asked} == {hint}
