# SPDX-License-Identifier: Apache-2.0
"""Roots that clients have shown: what one tenant makes pushes out nothing of another's."""

from __future__ import annotations

import pytest

from kvstore.block import ModelId, Root
from kvstore.service.rights import FULL, Rights
from kvstore.service.roots import RootBook


@pytest.fixture
def hers(model: ModelId) -> Root:
    return Root(model, salt=b"alice")


def test_a_tenant_that_makes_many_roots_pushes_out_its_own_oldest_and_nobody_elses(model: ModelId, hers: Root) -> None:
    book = RootBook(max_roots=10)
    book.learn(hers, "alice")
    his = [Root(model, adapter=b"%d" % number, salt=b"bob") for number in range(100)]
    for root in his:
        book.learn(root, "bob")
        book.learn(his[0], "bob")
    assert 5 <= len(book) <= 11
    assert book.allows(FULL, hers.id)
    assert book.allows(FULL, his[0].id), "it is used all the time"
    assert not book.allows(FULL, his[1].id)
    assert book.allows(FULL, his[99].id)


def test_a_root_of_two_tenants_is_known_until_both_have_forgotten_it(model: ModelId, hers: Root) -> None:
    book = RootBook(max_roots=1)
    other = Root(model, salt=b"other")
    book.learn(hers, "alice")
    book.learn(hers, "bob")
    book.learn(other, "alice")
    assert book.allows(FULL, hers.id)
    book.learn(other, "bob")
    assert not book.allows(FULL, hers.id)
    assert len(book) == 1


def test_what_a_tenant_showed_is_forgotten_with_it_and_each_time_is_counted(model: ModelId, hers: Root) -> None:
    book = RootBook()
    his, ours = Root(model, salt=b"bob"), Root(model, salt=b"all")
    book.learn(hers, "alice")
    book.learn(ours, "alice")
    book.learn(his, "bob")
    book.learn(ours)
    book.keep({"alice", "bob"})
    assert (len(book), book.num_folds) == (3, 0)
    book.keep({"bob"})
    assert [book.allows(FULL, root.id) for root in (hers, his, ours)] == [False, True, True]
    assert book.num_folds == 1


def test_what_is_known_is_open_to_those_who_have_the_right(hers: Root) -> None:
    book = RootBook()
    book.learn(hers, "alice")
    assert book.allows(Rights(salts=frozenset({b"alice"}), models=None), hers.id)
    assert not book.allows(Rights(salts=frozenset({b"bob"}), models=None), hers.id)
    assert not book.allows(FULL, bytes(32))
