# SPDX-License-Identifier: Apache-2.0
"""Names and touches of many parts at once, by the loops in C and without them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kvstore import native
from kvstore.block import BlockId, PartKey, RootId
from kvstore.tiers.redis_names import STEP_S, Names, Use, root_tag

RNG = np.random.default_rng(7)
ROOTS = [RootId(RNG.bytes(32)) for _ in range(3)]
NOW_S = 59_816_123.123456


@pytest.fixture(params=["in C", "in Python"], autouse=True)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in Python":
        monkeypatch.setattr(native, "names", False)
    elif not native.names:
        pytest.skip("the loops in C were not built")


def keys_of(root: RootId, num_blocks: int, parts: Sequence[int] = (0,)) -> list[PartKey]:
    blocks = [BlockId(RNG.bytes(32)) for _ in range(num_blocks)]
    return [PartKey(root, block, part) for block in blocks for part in parts]


def words(command: bytes) -> list[str]:
    """Those of one command of RESP, whose lengths are checked."""
    lines = command.decode().split("\r\n")
    assert lines.pop() == ""
    assert lines[0] == f"*{len(lines) // 2}"
    assert lines[1::2] == [f"${len(word)}" for word in lines[2::2]]
    return lines[2::2]


def scores_of(names: Names, uses: Sequence[Use]) -> list[tuple[str, str, float]]:
    """(sorted set, member, score) of every command, in order."""
    found = []
    for touch in (touch for step in names.touches(uses, NOW_S) for touch in step):
        verb, order, *flags = words(touch.words)[:5]
        assert (verb, flags) == ("ZADD", ["XX", "GT", "CH"])
        pairs = words(touch.words)[5:]
        found += [(order, member, float(score)) for score, member in zip(pairs[::2], pairs[1::2], strict=True)]
        assert words(touch.scores()) == ["ZMSCORE", order, *pairs[1::2]]
        assert [names.member(touch.block(at), 0)[:64] for at in range(len(touch.rows))] == [
            member[:64] for member in pairs[1::2]
        ]
    return found


@pytest.mark.parametrize("num_buckets", [1, 16, 256])
@pytest.mark.parametrize(("num_blocks", "parts"), [(1, (0,)), (3, (0, 7, 63)), (2500, (0,)), (400, (0, 1, 2, 3))])
def test_a_touch_names_every_part_once_a_step_lower_for_each_block(
    num_buckets: int, num_blocks: int, parts: Sequence[int]
) -> None:
    names, keys = Names(num_buckets), keys_of(ROOTS[0], num_blocks, parts)
    depths = {key: at // len(parts) for at, key in enumerate(keys)}
    expected = {
        (names.bucket(key).order, names.member(key.block, key.part)): NOW_S - depths[key] * STEP_S for key in keys
    }
    found = scores_of(names, [Use(keys, {})])
    assert len(found) == len(keys)
    assert {(order, member) for order, member, _ in found} == set(expected)
    assert all(score == pytest.approx(expected[order, member], abs=STEP_S / 4) for order, member, score in found)


def test_what_counts_as_used_later_takes_all_before_it_along() -> None:
    names, keys = Names(4), keys_of(ROOTS[0], 700)
    late = {keys[600].block: 30.0, keys[10].block: -5.0}
    scores = {member: score for _, member, score in scores_of(names, [Use(keys, late)])}
    got = [scores[names.member(key.block, 0)] - NOW_S for key in keys]
    assert got[:601] == pytest.approx([30 - at * STEP_S for at in range(601)], abs=STEP_S)
    assert got[601:] == pytest.approx([-at * STEP_S for at in range(601, 700)], abs=STEP_S)


def test_a_head_that_chains_share_is_named_once() -> None:
    names, head = Names(16), keys_of(ROOTS[0], 300)
    uses = [Use([*head, *keys_of(ROOTS[0], 40)], {}) for _ in range(3)]
    found = scores_of(names, uses)
    assert len(found) == len({member for _, member, _ in found}) == 300 + 3 * 40
    tails = {names.member(key.block, 0) for use in uses for key in use.keys[300:]}
    lowest_head = min(score for _, member, score in found if member not in tails)
    assert lowest_head > max(score for _, member, score in found if member in tails)


@pytest.mark.parametrize("num_keys", [0, 1, 5, 900])
def test_values_of_several_namespaces_are_named_each_by_its_own(num_keys: int) -> None:
    names = Names(16)
    keys = [keys_of(ROOTS[at % 3], 1, (at % 64,))[0] for at in range(num_keys)]
    commands = names.commands("GET", keys)
    assert [words(command) for command in commands] == [["GET", names.value(key)] for key in keys]
    assert b"".join(commands) == names.pipeline("GET", keys)
    for key in keys:
        stripe = f"{key.block[0] % 16:03d}"
        assert names.value(key) == f"kvs2:{{{stripe}}}:{root_tag(key.root)}:v:{key.block.hex()}:{key.part:03d}"
