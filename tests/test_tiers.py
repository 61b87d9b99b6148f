# SPDX-License-Identifier: Apache-2.0
"""What every tier in the registry promises. A new tier is put under test by its line in MADE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import pytest
import redis

from kvstore.api import NO_HINT
from kvstore.block import ModelId, Root
from kvstore.layout import layout_of
from kvstore.stats import Stats
from kvstore.tiers import TIERS
from kvstore.tiers.base import Tier
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer
from tests.patient import REDIS
from tests.redis.content import DEADLINE_S, Content
from tests.redis.rights import add_user, as_user
from tests.service.peers import PeerWithContent


class LeastRights(RedisTier):
    """On a server of its own, as a user who may do what doctor names and no more."""

    def __init__(self) -> None:
        self._own = EmbeddedServer()
        with redis.Redis.from_url(self._own.url) as client:
            add_user(client)
        super().__init__(RedisTier.Options(url=as_user(self._own.url), **REDIS))

    def close(self) -> None:
        super().close()
        self._own.close()


# A tier as it can run in a test, on nothing that must be there already; by its name, and what is special about it.
MADE: Mapping[str, Callable[[], Tier]] = {
    "redis, least rights": LeastRights,
    "redis": lambda: TIERS.load("redis")(TIERS.options("redis", {"url": "embedded", **REDIS})),
    "remote": PeerWithContent,
}

pytestmark = pytest.mark.redis


def test_every_tier_can_be_made_to_be_tested() -> None:
    assert {name.partition(",")[0] for name in MADE} == set(TIERS)


@pytest.fixture(scope="module", params=sorted(MADE))
def opened(request: pytest.FixtureRequest) -> Iterator[Tier]:
    tier = MADE[request.param]()
    yield tier
    tier.close()


@pytest.fixture(params=["one part", "four parts"])
def root(request: pytest.FixtureRequest) -> Root:
    cells = {} if request.param == "one part" else {"part_layers": 1, "part_heads": 1}
    return Root(
        ModelId(
            model="tiny",
            revision="1",
            kv_dtype="bfloat16",
            num_layers=2,
            num_kv_heads=2,
            head_dim=16,
            block_tokens=16,
            **cells,  # type: ignore[arg-type]
        )
    )


@pytest.fixture
def tier(opened: Tier, root: Root) -> Iterator[Tier]:
    opened.clear(None)
    opened.bind(Stats())
    opened.open(layout_of(root.model))
    yield opened
    assert opened.check() == []


def test_what_was_written_is_there_and_reads_back_in_order(tier: Tier, root: Root) -> None:
    content = Content(root, 12)
    assert tier.contains(content.keys, DEADLINE_S) == [False] * len(content.keys)
    assert content.write(tier) == set(content.keys)
    assert tier.contains(content.keys, DEADLINE_S) == [True] * len(content.keys)
    assert content.read(tier) == content.keys


def test_missing_keys_are_skipped_and_their_neighbours_delivered(tier: Tier, root: Root) -> None:
    content, stranger = Content(root, 4), Content(root, 3, seed=1)
    content.write(tier)
    mixed = [key for pair in zip(content.keys, [*stranger.keys, *stranger.keys], strict=False) for key in pair]
    into = {key: memoryview(bytearray(len((content.parts | stranger.parts)[key]))) for key in mixed}
    delivered = list(chain.from_iterable(tier.read(into, DEADLINE_S)))
    assert delivered == [key for key in into if key in content.parts]
    assert all(into[key] == content.parts[key] for key in delivered)
    assert tier.contains(mixed, DEADLINE_S) == [key in content.parts for key in mixed]


def test_empty_batches_are_answered_with_nothing(tier: Tier) -> None:
    assert tier.contains([], DEADLINE_S) == []
    assert list(tier.read({}, DEADLINE_S)) == []
    assert tier.write({}, {}, DEADLINE_S) == set()
    tier.touch([], NO_HINT)
    tier.remove([])


def test_writing_again_changes_nothing(tier: Tier, root: Root) -> None:
    content = Content(root, 4)
    assert content.write(tier) == content.write(tier) == set(content.keys)
    assert content.read(tier) == content.keys


def test_block_is_written_only_where_its_parent_is(tier: Tier, root: Root) -> None:
    content = Content(root, 8)
    assert content.write(tier, 4, 8) == set()
    assert not any(tier.contains(content.keys, DEADLINE_S))
    assert len(content.write(tier, 0, 4)) == len(content.keys) // 2
    assert len(content.write(tier, 4, 8)) == len(content.keys) // 2
    assert content.read(tier) == content.keys


def test_removed_keys_are_gone_and_unknown_ones_passed_over(tier: Tier, root: Root) -> None:
    content, stranger = Content(root, 4), Content(root, 2, seed=1)
    content.write(tier)
    num_parts = len(content.layout.parts)
    tier.remove([*content.keys[-num_parts:], *stranger.keys])
    assert content.read(tier) == content.keys[:-num_parts]


def test_clearing_one_root_leaves_the_others(tier: Tier, root: Root) -> None:
    mine, other = Content(root, 3), Content(Root(root.model, salt=b"other"), 3)
    mine.write(tier)
    other.write(tier)
    tier.clear(root.id)
    assert mine.read(tier) == []
    assert other.read(tier) == other.keys
    tier.clear(None)
    assert other.read(tier) == []


def test_read_that_is_closed_early_leaves_the_tier_usable(tier: Tier, root: Root) -> None:
    content = Content(root, 12)
    content.write(tier)
    into = content.buffers()
    reading = tier.read(into, DEADLINE_S)
    first = set(next(reading))
    reading.close()  # type: ignore[attr-defined]
    untouched = [bytes(buffer) for key, buffer in into.items() if key not in first]
    assert content.read(tier) == content.keys
    assert [bytes(buffer) for key, buffer in into.items() if key not in first] == untouched


def test_touching_is_accepted_for_what_is_there_and_what_is_not(tier: Tier, root: Root) -> None:
    content = Content(root, 4)
    content.write(tier, 0, 2)
    tier.touch(content.keys, NO_HINT)
    assert content.read(tier) == content.keys[: len(content.keys) // 2]


def test_what_counts_as_used_earlier_or_later_is_there_like_anything_else(tier: Tier, root: Root) -> None:
    content = Content(root, 4)
    later = dict(zip(content.chain.ids, (-1e12, 50.0, 1e12, 0.0), strict=True))
    assert tier.write(content.parts, content.meta, DEADLINE_S, later) == set(content.keys)
    tier.touch(content.keys, NO_HINT, later)
    assert tier.span_s >= 0
    assert content.read(tier) == content.keys


def test_opening_a_model_twice_is_harmless(tier: Tier, root: Root) -> None:
    tier.open(layout_of(root.model))
    tier.open(layout_of(root.model))
