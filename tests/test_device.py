# SPDX-License-Identifier: Apache-2.0
"""The device overlay: a budget that holds, runs that stay while pinned, heads that outlive tails."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch", reason="the overlay keeps torch tensors")


from kvstore.block import BlockId, Chain, ModelId, Root
from kvstore.device import DeviceOverlay
from kvstore.errors import ConfigError
from kvstore.layout import layout_of
from kvstore.row_copy import Rows

MODEL = ModelId(
    model="m",
    revision="r",
    kv_dtype="float32",
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    block_tokens=4,
    part_layers=1,
    part_heads=1,
)
LAYOUT = layout_of(MODEL)
ROOT = Root(MODEL)


def overlay(num_blocks: int) -> DeviceOverlay:
    return DeviceOverlay(LAYOUT, "cpu", num_blocks * LAYOUT.block_bytes + 1)


def chain_of(seed: int, num_blocks: int) -> Chain:
    rng = random.Random(seed)
    return Chain(ROOT, [rng.randrange(1000) for _ in range(4 * num_blocks)])


def mark_of(block: BlockId) -> float:
    """What the tests fill a block with, so that it can be told from every other."""
    return float(int.from_bytes(block[:3], "little"))


def put(device: DeviceOverlay, chain: Chain, start: int, stop: int) -> int:
    def copy_into(rows: Rows) -> None:
        for index, tensor in rows:
            tensor.fill_(mark_of(chain.ids[index]))

    return device.save(chain, start, stop, copy_into)


def held(device: DeviceOverlay, chain: Chain) -> int:
    """Length of the run, after checking that each block is what it claims to be."""
    with device.match(chain) as run:
        for index, tensor in run.rows:
            assert tuple(tensor.shape) == (2, 2, 4, 2, 4)
            assert (tensor == mark_of(chain.ids[index])).all()
        return run.num_blocks


def test_a_budget_below_one_block_is_refused_naming_both_numbers() -> None:
    with pytest.raises(ConfigError, match=f"budget is 100 bytes, .* takes {LAYOUT.block_bytes}"):
        DeviceOverlay(LAYOUT, "cpu", 100)


def test_blocks_come_back_in_order_with_their_bytes() -> None:
    device, chain = overlay(8), chain_of(1, 5)
    assert put(device, chain, 0, 3) == 3
    assert held(device, chain) == 3
    assert put(device, chain, 0, 5) == 2
    assert held(device, chain) == 5
    assert device.check() == []


def test_a_block_without_its_parent_is_not_taken_in() -> None:
    device, chain = overlay(8), chain_of(1, 5)
    assert put(device, chain, 2, 5) == 0
    assert held(device, chain) == 0
    assert device.check() == []


def test_the_budget_holds_and_tails_go_before_heads() -> None:
    device, old, new = overlay(6), chain_of(1, 5), chain_of(2, 4)
    put(device, old, 0, 5)
    put(device, new, 0, 4)
    assert held(device, new) == 4
    assert held(device, old) == 2
    assert device.stats()["device.blocks"] == 6
    assert device.check() == []


def test_a_touched_chain_outlives_one_that_was_not() -> None:
    device, first, second = overlay(6), chain_of(1, 3), chain_of(2, 3)
    put(device, first, 0, 3)
    put(device, second, 0, 3)
    device.touch(first, 3)
    put(device, chain_of(3, 2), 0, 2)
    assert held(device, first) == 3
    assert held(device, second) == 1
    assert device.check() == []


def test_a_pinned_run_is_neither_evicted_nor_overwritten() -> None:
    device, old, new = overlay(4), chain_of(1, 3), chain_of(2, 4)
    put(device, old, 0, 3)
    with device.match(old) as run:
        assert put(device, new, 0, 4) == 1
        for index, tensor in run.rows:
            assert (tensor == mark_of(old.ids[index])).all()
    assert put(device, new, 0, 4) == 3
    assert held(device, new) == 4
    assert device.check() == []


def test_a_copy_that_fails_leaves_nothing_of_its_blocks() -> None:
    device, chain = overlay(4), chain_of(1, 3)
    put(device, chain, 0, 1)

    def copy_into(rows: Rows) -> None:
        assert [index for index, _ in rows] == [1, 2]
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        device.save(chain, 0, 3, copy_into)
    assert held(device, chain) == 1
    assert put(device, chain, 0, 3) == 2
    assert device.check() == []


def test_random_use_agrees_with_itself_and_stays_within_budget() -> None:
    rng = random.Random(5)
    device = overlay(10)
    chains = [chain_of(seed % 7, rng.randrange(1, 8)) for seed in range(20)]
    for _ in range(300):
        chain = rng.choice(chains)
        start = held(device, chain)
        stop = rng.randrange(start, len(chain) + 1)
        assert put(device, chain, start, stop) <= stop - start
        assert held(device, chain) >= start
        assert device.stats()["device.blocks"] <= 10
    assert device.check() == []
    device.clear()
    assert device.stats()["device.blocks"] == 0
    assert device.check() == []
