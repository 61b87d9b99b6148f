# SPDX-License-Identifier: Apache-2.0
"""What waits for the mover: within bounds, once for each chain, and with its place given back."""

from __future__ import annotations

import pytest

from kvstore.api import NO_HINT, Hint
from kvstore.backlog import _MAX_CHAINS, Backlog, Stretch
from kvstore.block import Chain, ModelId, Root
from kvstore.stats import Stats
from tests.conftest import chain_of

BLOCK_BYTES = 4096
WHOLE = (0,)


@pytest.fixture
def stats() -> Stats:
    return Stats()


@pytest.fixture
def backlog(stats: Stats) -> Backlog:
    """For four blocks."""
    return Backlog(4 * BLOCK_BYTES + 100, stats)


def add(backlog: Backlog, chain: Chain, start: int = 0, stop: int | None = None) -> list[bytes]:
    return list(backlog.add(chain.ids[start:stop], BLOCK_BYTES, NO_HINT, [0]))


# ── blocks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_blocks_that_find_no_room_the_tail_is_dropped_and_counted(
    backlog: Backlog, stats: Stats, root: Root
) -> None:
    chain = chain_of(root, 6)
    assert add(backlog, chain) == list(chain.ids[4:])
    assert stats.snapshot()["mover.dropped_blocks"] == 2
    assert backlog.num_bytes == 4 * BLOCK_BYTES
    assert [block in backlog for block in chain.ids] == [True] * 4 + [False] * 2


def test_blocks_that_wait_already_take_no_more_room(backlog: Backlog, stats: Stats, root: Root) -> None:
    chain = chain_of(root, 4)
    assert add(backlog, chain, 0, 2) == []
    assert add(backlog, chain) == []
    assert backlog.num_bytes == 4 * BLOCK_BYTES
    jobs = [backlog.take().job, backlog.take().job]
    assert [list(job.blocks) for job in jobs if job is not None] == [list(chain.ids[:2]), list(chain.ids[2:])]
    assert "mover.dropped_blocks" not in stats.snapshot()


def test_a_block_being_written_may_wait_again_since_a_part_may_have_come(backlog: Backlog, root: Root) -> None:
    chain = chain_of(root, 2)
    add(backlog, chain)
    assert backlog.take().job is not None
    assert chain.ids[0] in backlog
    assert backlog.is_empty
    assert add(backlog, chain) == []
    assert not backlog.is_empty


def test_what_is_being_written_keeps_its_place_until_that_is_done(backlog: Backlog, root: Root) -> None:
    chain, other = chain_of(root, 4), chain_of(root, 1, seed=1)
    add(backlog, chain)
    backlog.take()
    assert add(backlog, other) == list(other.ids)
    backlog.done()
    assert (backlog.num_bytes, chain.ids[0] in backlog) == (0, False)
    assert add(backlog, other) == []
    backlog.done()  # of nothing
    assert backlog.num_bytes == BLOCK_BYTES


def test_a_failed_write_is_tried_once_more_for_the_tiers_that_failed_and_keeps_its_place(
    backlog: Backlog, root: Root
) -> None:
    chain, behind = chain_of(root, 3), chain_of(root, 1, seed=1)
    backlog.add(chain.ids[1:], BLOCK_BYTES, Hint(priority=70), [0, 1])
    add(backlog, behind)
    job = backlog.take().job
    assert job is not None
    assert backlog.again(job, chain.ids, [1])  # with what it hangs from
    backlog.done()
    assert backlog.num_bytes == 3 * BLOCK_BYTES
    between = backlog.take().job
    assert between is not None
    assert list(between.blocks) == list(behind.ids)
    backlog.done()
    second = backlog.take().job
    assert second is not None
    assert (list(second.blocks), list(second.tiers), second.hint.priority) == (list(chain.ids), [1], 70)
    assert not backlog.again(second, second.blocks, [1])
    backlog.done()
    assert (backlog.num_bytes, backlog.is_empty) == (0, True)


# ── chains ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_chain_that_is_used_again_waits_once_and_last(backlog: Backlog, root: Root) -> None:
    chain, other = chain_of(root, 3), chain_of(root, 3, seed=1)
    for time_s, each in enumerate((chain, other, chain_of(root, 3))):
        backlog.add_use(Stretch(each, 3, WHOLE), Hint(time_s=float(time_s)))
    uses = backlog.take().uses
    assert [(stretch.chain.ids[2], hint.time_s) for stretch, hint in uses] == [(other.ids[2], 1), (chain.ids[2], 2)]
    assert backlog.take() == (None, [], [])


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (Hint(priority=80), Hint(priority=20), 80),
        (Hint(priority=20), Hint(priority=80), 80),
        (Hint(priority=80), Hint(priority=20, closed=True), 20),
        (Hint(priority=80, closed=True), Hint(priority=20), 20),
    ],
)
def test_of_two_uses_the_one_that_asked_for_more_counts_unless_one_closes_the_conversation(
    backlog: Backlog, root: Root, first: Hint, second: Hint, together: int
) -> None:
    stretch = Stretch(chain_of(root, 3), 3, WHOLE)
    backlog.add_use(stretch, first)
    backlog.add_use(stretch, second)
    ((_, hint),) = backlog.take().uses
    assert hint.priority == together


def test_other_lengths_and_parts_of_a_chain_wait_beside_it(backlog: Backlog, root: Root) -> None:
    chain = chain_of(root, 3)
    stretches = [Stretch(chain, 3, WHOLE), Stretch(chain, 2, WHOLE), Stretch(chain, 3, (0, 1))]
    for each in stretches:
        backlog.add_use(each, NO_HINT)
        backlog.add_risen(each)
        backlog.add_risen(each)
    round_ = backlog.take()
    assert [stretch for stretch, _ in round_.uses] == stretches
    assert round_.risen == stretches


def test_chains_beyond_the_bound_are_dropped_and_counted_but_for_those_that_wait(
    backlog: Backlog, stats: Stats, model: ModelId
) -> None:
    root = Root(model)
    chains = [Chain(root, [number] * model.block_tokens) for number in range(_MAX_CHAINS + 2)]
    for chain in [*chains, chains[0]]:
        backlog.add_use(Stretch(chain, 1, WHOLE), NO_HINT)
        backlog.add_risen(Stretch(chain, 1, WHOLE))
    counted = stats.snapshot()
    assert (counted["mover.dropped_touches"], counted["mover.dropped_risen"]) == (2, 2)
    round_ = backlog.take()
    assert (len(round_.uses), len(round_.risen)) == (_MAX_CHAINS, _MAX_CHAINS)
    assert round_.uses[-1][0].chain is chains[0]


def test_nothing_waits_once_it_is_cleared(backlog: Backlog, root: Root) -> None:
    chain = chain_of(root, 2)
    add(backlog, chain, 0, 1)
    backlog.take()
    add(backlog, chain, 1)
    backlog.add_use(Stretch(chain, 2, WHOLE), NO_HINT)
    backlog.add_risen(Stretch(chain, 2, WHOLE))
    assert not backlog.is_empty
    backlog.clear()
    assert (backlog.is_empty, backlog.num_bytes, chain.ids[1] in backlog) == (True, BLOCK_BYTES, False)
    backlog.done()
    assert backlog.num_bytes == 0
