# SPDX-License-Identifier: Apache-2.0
"""Ids to rows against a dict, through growth, full buckets and reused rows; the table's columns."""

from __future__ import annotations

import gc
import hashlib
import random
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from kvstore.block import BlockId, Chain, Root
from kvstore.idmap import NO_ROW, IdMap, Rows
from kvstore.index import BlockTable
from tests.conftest import chain_of


def an_id(number: int) -> BlockId:
    return BlockId(hashlib.sha256(number.to_bytes(8, "big")).digest())


def agree(ids: IdMap, known: dict[BlockId, int], asked: Sequence[BlockId]) -> None:
    expected = [known.get(block, NO_ROW) for block in asked]
    assert ids.find(asked).tolist() == expected
    assert ids.find_evenly(asked).tolist() == expected
    assert [ids.get(block) for block in asked] == expected
    leading = expected.index(NO_ROW) if NO_ROW in expected else len(expected)
    assert ids.find_leading(asked).tolist() == expected[:leading]


@pytest.mark.parametrize("batch", [1, 5, 30, 400])
def test_rows_agree_with_a_dict_under_random_use(batch: int) -> None:
    rng, ids = random.Random(batch), IdMap()
    known: dict[BlockId, int] = {}
    hidden: list[int] = []
    numbers = 0
    for step in range(300):
        action = rng.random()
        if action < 0.5:
            fresh = [an_id(numbers + at) for at in range(rng.randint(1, batch))]
            numbers += len(fresh)
            rows = ids.add(fresh).tolist()
            assert not set(rows) & (set(known.values()) | set(hidden)), "a row was given twice"
            known.update(zip(fresh, rows, strict=True))
        elif action < 0.75 and known:
            gone = rng.sample(list(known), min(len(known), rng.randint(1, batch)))
            ids.free(_rows(known.pop(block) for block in gone))
        elif action < 0.9 and known:
            gone = rng.sample(list(known), min(len(known), rng.randint(1, batch)))
            rows = [known.pop(block) for block in gone]
            ids.hide(_rows(rows))
            hidden += rows
        elif hidden:
            ids.free(_rows(hidden))
            hidden = []
        asked = rng.sample(list(known), min(len(known), 50)) + [an_id(rng.randrange(numbers + 10)) for _ in range(10)]
        agree(ids, known, asked)
        if batch < 400 or step % 10 == 0:  # there are thousands then
            agree(ids, known, list(known))
        assert len(ids) == len(known)
        assert sorted(ids.live_rows().tolist()) == sorted([*known.values(), *hidden])
        assert sorted(ids.found_rows().tolist()) == sorted(known.values())
    assert {ids.id_of(row): row for row in known.values()} == known


def _rows(numbers: Iterable[int]) -> Rows:
    return np.array(list(numbers), np.int64)


def test_ids_that_share_a_bucket_and_a_tag_are_told_apart() -> None:
    """All begin alike, so they fall into one bucket of eight with one tag, and most overflow."""
    ids = IdMap()
    alike = [BlockId(b"\x07" * 16 + number.to_bytes(16, "big")) for number in range(40)]
    known = dict(
        zip(alike, ids.add(alike[:20]).tolist() + [ids.add([block]).tolist()[0] for block in alike[20:]], strict=True)
    )
    stranger = BlockId(b"\x07" * 16 + b"\xff" * 16)
    agree(ids, known, [*alike, stranger])
    for block in alike[::2]:
        ids.free(_rows([known.pop(block)]))
    agree(ids, known, [*alike, stranger])
    ids.free(_rows(known.values()))
    agree(ids, {}, alike)


def test_the_last_row_is_found_where_its_bucket_was_full_and_is_no_longer() -> None:
    """It overflowed; then its bucket's first way became empty, and an empty way reads like the last row."""
    ids = IdMap()
    alike = [BlockId(b"\x07" * 8 + number.to_bytes(24, "little")) for number in range(ids.capacity)]
    known = {block: int(ids.add([block])[0]) for block in alike}
    ids.free(_rows([known.pop(alike[0])]))
    agree(ids, known, [*alike[-2::-1], alike[-1]])


def test_a_row_of_a_freed_id_is_not_found_again_by_its_neighbours() -> None:
    """Runs of rows are compared with what lies there: what was freed still lies there."""
    ids = IdMap()
    chain = [an_id(number) for number in range(100)]
    rows = ids.add(chain)
    ids.hide(rows[40:50])
    ids.free(rows[60:70])
    found = ids.find(chain).tolist()
    assert [at for at, row in enumerate(found) if row == NO_ROW] == [*range(40, 50), *range(60, 70)]
    assert len(ids.find_leading(chain)) == 40


def test_an_id_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="each must be 32"):
        IdMap().find([BlockId(b"short")] * 20)


def test_a_chain_of_another_root_or_out_of_order_opens_nothing(root: Root) -> None:
    table, chain, other = BlockTable(), chain_of(root, 6), chain_of(root, 6, seed=1)
    table.widen(1, 4 * root.model.block_tokens)
    for root_number, each in enumerate((chain, other)):
        rows = table.add_run(each.ids, [each.meta(index) for index in range(6)], NO_ROW, root_number, 0)
        table.ready[rows] = 1
    assert len(table.leading(chain.ids, 1, 0)) == 6
    assert len(table.leading(chain.ids, 1, 1)) == 0
    assert len(table.leading([*chain.ids[:3], *other.ids[3:]], 1, 0)) == 3
    assert len(table.leading([*chain.ids[:2], *chain.ids[3:]], 1, 0)) == 2
    assert len(table.leading([chain.ids[0]] * 4, 1, 0)) == 1


def test_meta_comes_back_as_it_was_handed_in(root: Root) -> None:
    chain = Chain(root, range(160), media=[(20, b"image")])
    table = BlockTable()
    table.widen(1, 4 * root.model.block_tokens)
    metas = [chain.meta(index) for index in range(10)]
    rows = table.add_run(chain.ids, metas, NO_ROW, 0, 0)
    assert [table.meta(row, root.id, 4 * root.model.block_tokens) for row in rows.tolist()] == metas
    table.drop_all(rows)
    again = table.add_run(chain.ids, [meta._replace(extra=b"") for meta in metas], NO_ROW, 0, 0)
    assert {table.meta(row, root.id, 0).extra for row in again.tolist()} == {b""}


def test_blocks_are_no_objects_that_a_garbage_collection_would_visit(root: Root) -> None:
    table, chain = BlockTable(), chain_of(root, 3000)
    table.widen(1, 4 * root.model.block_tokens)
    metas = [chain.meta(index) for index in range(len(chain))]
    gc.collect()
    before = len(gc.get_objects())
    table.add_run(chain.ids, metas, NO_ROW, 0, 0)
    gc.collect()
    assert len(gc.get_objects()) - before < 50
