# SPDX-License-Identifier: Apache-2.0
"""Blocks between an engine's cache and rows of device memory: the same bytes, and an order that nothing can upset."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("torch", reason="rows are torch tensors")

import numpy as np
import torch

from kvstore import copy_kernel
from kvstore.block import ModelId
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout, layout_of
from kvstore.row_copy import RowCopier, Rows
from kvstore.transfer import PagedKV, Way
from tests.devices import DEVICES, test_all_of_this_module_ran_on_cuda_too  # noqa: F401
from tests.lazy_streams import LazyMoment, LazyStream, LazyStreams

LAYERS, HEADS, DIM, TOKENS, BLOCKS = 3, 2, 8, 4, 5
WAYS = [Way.INDEX, *([Way.STAGED] if copy_kernel.HAS_TRITON else [])]


def layout(dtype: str = "bfloat16", *, num_kv: int = 2) -> BlockLayout:
    return layout_of(
        ModelId(
            model="m", revision="r", kv_dtype=dtype, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM,
            num_kv=num_kv, block_tokens=TOKENS,
        )
    )  # fmt: skip


class Cache:
    """A sequence's cache, `[layers, kv, heads, tokens, dim]`, of which block i is page i."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> None:
        self.storage = torch.zeros(LAYERS, 2, HEADS, BLOCKS * TOKENS, DIM, dtype=torch.float32).to(dtype).to(device)
        self.kv = PagedKV.of([self.storage], "layer kv head slot dim", page_tokens=TOKENS)

    def block(self, index: int) -> torch.Tensor:
        return self.storage[:, :, :, index * TOKENS : (index + 1) * TOKENS].transpose(2, 3)


def rows_of(count: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(count, LAYERS, 2, TOKENS, HEADS, DIM, dtype=torch.float32).to(dtype).to(device)


def chosen(memory: torch.Tensor, places: dict[int, int]) -> Rows:
    """Blocks at these positions, in these rows."""
    return Rows(memory, np.array([*places]), np.array([*places.values()]))


def uniform(tensor: torch.Tensor) -> float | None:
    """Its value, where it has one only."""
    values = tensor.float().unique().tolist()
    return float(values[0]) if len(values) == 1 else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step_layers", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
def test_blocks_go_into_rows_and_back_bit_for_bit(dtype: str, step_layers: int, way: Way, device: str) -> None:
    kind = getattr(torch, dtype)
    cache, rows = Cache(device, kind), rows_of(3, device, kind)
    cache.storage.copy_(torch.randn(cache.storage.shape).to(kind))
    copier = RowCopier(layout(dtype), cache.kv, way=way)
    copier.start(chosen(rows, {4: 2, 0: 0, 1: 1}), into_rows=True).finish()
    for row, index in ((2, 4), (0, 0), (1, 1)):
        assert torch.equal(rows[row].view(torch.uint8), cache.block(index).contiguous().view(torch.uint8))
    before = cache.storage.clone()
    copier.start(chosen(rows, {3: 2, 2: 0}), into_rows=False, step_layers=step_layers).finish()
    after = cache.storage.clone()
    for index, row in ((3, 2), (2, 0)):
        assert torch.equal(cache.block(index).contiguous().view(torch.uint8), rows[row].view(torch.uint8))
    for untouched in (0, 1, 4):
        cut = slice(untouched * TOKENS, (untouched + 1) * TOKENS)
        assert torch.equal(before[:, :, :, cut].view(torch.uint8), after[:, :, :, cut].view(torch.uint8))


def test_pages_that_are_no_blocks_are_refused() -> None:
    kv = PagedKV.of([torch.zeros(LAYERS, 2, HEADS, 8, DIM).bfloat16()], "layer kv head slot dim", page_tokens=2)
    with pytest.raises(ConfigError, match="pages have 2 tokens, blocks 4"):
        RowCopier(layout(), kv)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(12))
def test_a_demotion_reads_what_the_forward_wrote_and_the_next_one_waits_until_it_has(way: Way, seed: int) -> None:
    cache, rows, streams = Cache(), rows_of(1), LazyStreams(seed)
    copier = RowCopier(layout(), cache.kv, way=way, streams=streams)
    streams.run_engine(lambda: cache.storage.fill_(1.0))
    demoting = copier.start(chosen(rows, {2: 0}), into_rows=True)
    assert not demoting.is_done
    demoting.order()
    streams.run_engine(lambda: cache.storage.fill_(2.0))
    streams.drain()
    assert uniform(rows[0]) == 1.0
    assert demoting.is_done


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(12))
def test_a_promotion_waits_for_the_last_reader_and_each_layer_for_its_own(way: Way, seed: int) -> None:
    cache, rows, streams = Cache(), rows_of(1), LazyStreams(seed)
    copier = RowCopier(layout(), cache.kv, way=way, streams=streams)
    rows[0].fill_(7.0)
    seen: list[float | None] = []
    streams.run_engine(lambda: seen.append(uniform(cache.storage)))
    promoting = copier.start(chosen(rows, {2: 0}), into_rows=False, step_layers=1)
    for layer in range(LAYERS):
        promoting.order(layer)
        streams.run_engine(lambda layer=layer: seen.append(uniform(cache.block(2)[layer])))
    streams.finish(streams.record(streams.engine()))
    assert seen == [0.0, 7.0, 7.0, 7.0]


def test_a_forward_begins_before_the_last_layers_are_promoted() -> None:
    early = 0
    for seed in range(20):
        cache, rows, streams = Cache(), rows_of(1), LazyStreams(seed)
        copier = RowCopier(layout(), cache.kv, way=Way.INDEX, streams=streams)
        promoting = copier.start(chosen(rows, {2: 0}), into_rows=False, step_layers=1)
        promoting.order(0)
        seen: list[bool] = []
        streams.run_engine(lambda promoting=promoting, seen=seen: seen.append(promoting.is_done))
        streams.drain()
        early += not seen[0]
    assert early > 0


class CountedWaits(LazyStreams):
    """Counts what an engine's streams are told to wait for."""

    num_waits = 0

    def wait(self, stream: LazyStream, moment: LazyMoment) -> None:
        self.num_waits += stream.name.startswith("engine")
        super().wait(stream, moment)


def test_an_engine_is_told_to_wait_once_for_layers_that_end_together() -> None:
    cache, rows, streams = Cache(), rows_of(1), CountedWaits(1)
    copier = RowCopier(layout(), cache.kv, way=Way.INDEX, streams=streams)
    promoting = copier.start(chosen(rows, {2: 0}), into_rows=False, step_layers=1)
    told = []
    for layer in (0, 0, 1, 2, 0, 1, None):
        promoting.order(layer)
        told.append(streams.num_waits)
    assert told == [1, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("seed", range(12))
def test_another_thread_of_the_engine_waits_for_itself_and_so_does_the_first_one_afterwards(seed: int) -> None:
    cache, rows, streams = Cache(), rows_of(1), LazyStreams(seed)
    copier = RowCopier(layout(), cache.kv, way=Way.INDEX, streams=streams)
    rows[0].fill_(7.0)
    seen: list[float | None] = []

    def passes() -> None:
        for layer in range(LAYERS):
            promoting.order(layer)
            streams.run_engine(lambda layer=layer: seen.append(uniform(cache.block(2)[layer])))  # type: ignore[misc]

    promoting = copier.start(chosen(rows, {2: 0}), into_rows=False, step_layers=1)
    promoting.order(0)
    other = threading.Thread(target=passes)
    other.start()
    other.join(10)
    passes()
    streams.drain()
    assert seen == [7.0] * (2 * LAYERS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(12))
def test_a_row_goes_from_hand_to_hand_without_anybody_waiting(way: Way, seed: int) -> None:
    """Filled, read, given to another block and read again, by two engines: each reader finds what it was promised."""
    streams, rows = LazyStreams(seed), rows_of(1)
    one, other = Cache(), Cache()
    copiers = [RowCopier(layout(), cache.kv, way=way, streams=streams) for cache in (one, other)]
    streams.run_engine(lambda: one.storage.fill_(1.0))
    copiers[0].start(chosen(rows, {0: 0}), into_rows=True).order()
    copiers[1].start(chosen(rows, {3: 0}), into_rows=False)
    streams.run_engine(lambda: one.storage.fill_(2.0))
    copiers[0].start(chosen(rows, {1: 0}), into_rows=True)
    copiers[1].start(chosen(rows, {4: 0}), into_rows=False)
    streams.drain()
    assert (uniform(other.block(3)), uniform(other.block(4))) == (1.0, 2.0)


def test_a_copy_that_fails_while_it_is_submitted_leaves_nothing_running() -> None:
    cache, rows, streams = Cache(), rows_of(1), LazyStreams(1)
    copier = RowCopier(layout(), cache.kv, way=Way.INDEX, streams=streams)
    submit, given = streams.submit, []

    def fails(*args: object) -> None:
        if len(given) == 2:
            raise RuntimeError("no memory")
        given.append(submit(*args))  # type: ignore[arg-type]

    streams.submit = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no memory"):
        copier.start(chosen(rows, {0: 0}), into_rows=False, step_layers=1)
    assert not any(stream.queue for stream in streams._streams.values())
