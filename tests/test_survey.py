# SPDX-License-Identifier: Apache-2.0
"""Questions to a pool, of beliefs about lower tiers too: what they answer, and that they change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from kvstore.api import NO_HINT
from kvstore.arena import PAGE_BYTES, Arena
from kvstore.block import BlockId, Chain, Root
from kvstore.index import Rows
from kvstore.layout import layout_of
from kvstore.policies.lru import LruPolicy
from kvstore.pool import BlockPool
from kvstore.survey import Survey
from tests.conftest import chain_of


@pytest.fixture
def pool(root: Root) -> Iterator[BlockPool]:
    arena = Arena(32 * PAGE_BYTES, prefault=False)
    pool = BlockPool(arena, LruPolicy())
    pool.open(layout_of(root.model))
    yield pool
    assert pool.check() == []
    arena.close()


def put(pool: BlockPool, chain: Chain) -> None:
    reserved, refused = pool.filling.reserve(chain.root.id, layout_of(chain.root.model), chain.ids, chain.metas, (0,))
    assert (len(pool.filling.publish(reserved, NO_HINT)), refused) == (len(reserved), 0)


def rows_of(pool: BlockPool, chain: Chain) -> Rows:
    return pool._residents.leading(chain.ids, 1, chain.root.id)


@contextmanager
def frozen(pool: BlockPool) -> Iterator[None]:
    """Whoever writes to a column of the table meanwhile gets a ValueError."""
    table = pool._residents.table
    columns = [each for owner in (table, table.ids) for each in vars(owner).values() if isinstance(each, np.ndarray)]
    assert len(columns) > 10
    for column in columns:
        column.setflags(write=False)
    try:
        yield
    finally:
        for column in columns:
            column.setflags(write=True)


QUESTIONS: dict[str, Callable[[BlockPool, Chain], object]] = {
    "describe": lambda pool, chain: pool.survey.describe([*chain.ids, BlockId(bytes(32))]),
    "ready_masks": lambda pool, chain: pool.survey.ready_masks(chain.root.id, chain.ids).tolist(),
    "is_filling": lambda pool, chain: [pool.survey.is_filling(block, 1) for block in chain.ids],
    "shared_to": lambda pool, chain: pool.survey.shared_to(chain.ids, chain.root.id),
    "ancestry": lambda pool, chain: pool.survey.ancestry(chain.ids[-1]),
    "holds": lambda pool, chain: pool.beliefs.holds(rows_of(pool, chain), 0),
    "missing": lambda pool, chain: pool.beliefs.missing(chain.ids, 0),
    "whole_rows": lambda pool, chain: [each.tolist() for each in pool.survey.whole_rows(lambda root: True)],
    "describe_run": lambda pool, chain: pool.survey.describe_run(rows_of(pool, chain), 1 << 40),
    "held_bytes": lambda pool, chain: pool.survey.held_bytes(chain.root.id),
    "pinned_rows": lambda pool, chain: pool.survey.pinned_rows(),
    "num_evicted": lambda pool, chain: pool.survey.num_evicted,
    "num_lost": lambda pool, chain: pool.survey.num_lost,
    "num_quota_refused": lambda pool, chain: pool.survey.num_quota_refused,
}


def test_every_question_is_asked_below() -> None:
    asked = {name for name in vars(Survey) if not name.startswith("_")}
    assert asked | {"holds", "missing"} == set(QUESTIONS)


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_changes_nothing(pool: BlockPool, root: Root, name: str) -> None:
    chain = chain_of(root, 8)
    put(pool, chain)
    put(pool, chain_of(root, 3, seed=1))
    pool.touch(chain.ids, 8)  # waits: to look is not to settle
    order = list(pool._residents._touches.values())
    with frozen(pool):
        first = QUESTIONS[name](pool, chain)
        assert QUESTIONS[name](pool, chain) == first
    assert list(pool._residents._touches.values()) == order


def test_who_writes_to_a_frozen_table_is_caught(pool: BlockPool, root: Root) -> None:
    chain = chain_of(root, 2)
    put(pool, chain)
    with frozen(pool), pytest.raises(ValueError, match="read-only"):
        pool.pin_leading(chain.ids, 1, root.id)


def test_what_is_missing_below_comes_with_all_it_hangs_from_parents_first(pool: BlockPool, root: Root) -> None:
    chain, other = chain_of(root, 6), chain_of(root, 3, seed=1)
    put(pool, chain)
    put(pool, other)
    missing = pool.beliefs.missing([other.ids[2], chain.ids[5], chain.ids[3]], 1)
    assert missing == [*other.ids, *chain.ids]
    rows = rows_of(pool, chain)[:4]
    pool.beliefs.add(rows, 1, [(0,)] * 4)
    assert pool.beliefs.missing([chain.ids[5], chain.ids[2]], 1) == list(chain.ids[4:])
    assert pool.beliefs.missing([chain.ids[5]], 0) == list(chain.ids)  # another tier
    assert pool.beliefs.holds(rows_of(pool, chain), 1) == [True] * 4 + [False] * 2
    assert pool.beliefs.missing([BlockId(bytes(32))], 1) == []


def test_the_ancestry_of_a_block_is_its_chain_and_of_an_unknown_one_nothing(pool: BlockPool, root: Root) -> None:
    chain = chain_of(root, 6)
    put(pool, chain)
    assert pool.survey.ancestry(chain.ids[3]) == list(chain.ids[:4])
    assert pool.survey.ancestry(BlockId(bytes(32))) == []


def test_a_chain_is_shared_up_to_where_another_goes_on_from_it(pool: BlockPool, root: Root) -> None:
    tokens = list(range(6 * 16))
    chain, fork = Chain(root, tokens), Chain(root, [*tokens[: 2 * 16], *tokens[3 * 16 :]])
    put(pool, chain)
    assert pool.survey.shared_to(chain.ids, root.id) == 0
    put(pool, fork)
    assert pool.survey.shared_to(chain.ids, root.id) == 2
    assert pool.survey.shared_to(chain_of(root, 3, seed=1).ids, root.id) == 3  # nothing is known of it


def test_a_block_is_below_where_all_parts_of_it_that_are_here_were_read_from_there(pool: BlockPool, root: Root) -> None:
    halves = Root(replace(root.model, part_layers=1))
    layout, chain = layout_of(halves.model), chain_of(halves, 3)
    pool.open(layout)

    def fill(num_blocks: int, part: int, below: int | None) -> list[list[bool]]:
        reserved, _ = pool.filling.reserve(halves.id, layout, chain.ids[:num_blocks], chain.metas, (part,))
        assert len(pool.filling.publish(reserved, NO_HINT, below=below)) == num_blocks
        return [pool.beliefs.holds(rows_of(pool, chain), tier) for tier in (0, 1)]

    assert fill(3, 0, 1) == [[False] * 3, [True] * 3]
    assert fill(1, 1, 1) == [[False] * 3, [True] * 3]
    pool.remove(chain.ids[2:])
    rows = rows_of(pool, chain)
    reserved, _ = pool.filling.reserve(halves.id, layout, chain.ids[1:], chain.metas, (0, 1), 1)
    pool.filling.publish(reserved, NO_HINT)
    assert pool.beliefs.holds(rows, 1) == [True, False], "one part of the second was made here"
    assert pool.beliefs.holds(rows_of(pool, chain), 1) == [True, False, False]
    pool.beliefs.deny([chain.ids[0], BlockId(bytes(32))], 1)
    assert pool.beliefs.holds(rows_of(pool, chain), 1) == [False] * 3


def test_a_block_made_here_is_not_below_for_a_part_that_was_read_there(pool: BlockPool, root: Root) -> None:
    halves = Root(replace(root.model, part_layers=1))
    layout, chain = layout_of(halves.model), chain_of(halves, 3)
    pool.open(layout)
    for part, below in ((0, None), (1, 0)):
        reserved, _ = pool.filling.reserve(halves.id, layout, chain.ids, chain.metas, (part,))
        pool.filling.publish(reserved, NO_HINT, below=below)
    assert pool.beliefs.holds(rows_of(pool, chain), 0) == [False] * 3
