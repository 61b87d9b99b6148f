# SPDX-License-Identifier: Apache-2.0
"""The device path, every way: the same bytes as the CPU's, in the order that events promise; CUDA too where it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="transfer copies torch tensors")

import numpy as np
import torch

from kvstore import copy_kernel, device_copy, stages
from kvstore.api import ABSENT, LoadedRun, OpenRun
from kvstore.copy_engine import host_bytes
from kvstore.copy_windows import Ints, address_of
from kvstore.device_copy import Way, best_way
from kvstore.layout import BlockLayout, layout_of
from kvstore.lossy import FORMATS
from kvstore.pinning import PinnedRanges
from kvstore.transfer import Copying, PageCopier, PagedKV
from tests.devices import DEVICES
from tests.devices import test_all_of_this_module_ran_on_cuda_too as test_all_of_this_module_ran_on_cuda_too
from tests.lazy_streams import LazyStream, LazyStreams
from tests.test_transfer import (
    ENGINES,
    LAYERS,
    PAGES,
    Engine,
    cross_layer,
    expected,
    fused_heads,
    hnd,
    model,
    nhd,
    odd_strides,
    slots_of,
    strided_dim,
    table,
)

NEEDS_TRITON = pytest.mark.skipif(not copy_kernel.HAS_TRITON, reason="NOT TESTED HERE: triton is not installed")
INTERPRETED = (NEEDS_TRITON, pytest.mark.slow)  # on the CPU the kernel is interpreted
WAYS = [pytest.param(way, id=way.value, marks=INTERPRETED if way is Way.STAGED else ()) for way in Way]
Make = Callable[[torch.dtype, int], Engine]


def placed(engine: Engine, device: str) -> PagedKV:
    """The engine's planes on `device`, with the strides they have."""
    if device == "cpu":
        return engine.kv
    moved: dict[int, torch.Tensor] = {}

    def there(plane: torch.Tensor) -> torch.Tensor:
        storage = plane.untyped_storage()
        whole = moved.setdefault(storage.data_ptr(), torch.empty(0, dtype=torch.uint8).set_(storage).to(device))
        flat = torch.empty(0, dtype=plane.dtype, device=device).set_(whole.untyped_storage())
        return flat.as_strided(plane.shape, plane.stride(), plane.storage_offset())

    return PagedKV(tuple(tuple(there(plane) for plane in layer) for layer in engine.kv.planes))


def logical(kv: PagedKV) -> torch.Tensor:
    return Engine(PagedKV(tuple(tuple(plane.cpu() for plane in layer) for layer in kv.planes)), []).logical()


def make_copier(layout: BlockLayout, kv: PagedKV, way: Way, streams: LazyStreams | None = None) -> PageCopier:
    copier = PageCopier(layout, kv, way=way, streams=streams)
    copier._by_address = False  # the CPU's own path has its tests
    return copier


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("page", [4, 16, 64])
@pytest.mark.parametrize("make", ENGINES, ids=lambda make: make.__name__)
def test_every_way_gathers_canonical_bytes_from_every_layout(make: Make, page: int, way: Way, device: str) -> None:
    layout = layout_of(model(part_layers=2, part_heads=2))
    kv = placed(make(torch.bfloat16, page), device)
    pages = table(page, 64)
    blocks = [(index, slots_of(layout, layout.all_parts, 0)) for index in (1, 0)]
    assert make_copier(layout, kv, way).gather(pages, blocks) == 2 * layout.block_bytes
    for index, slots in blocks:
        for part, slot in enumerate(slots):
            assert bytes(slot or b"") == expected(layout, part, logical(kv), pages, index)


GROUPS = [0, 1, 0]
"""Of the layers, where they have two page tables."""


def in_order(kv: torch.Tensor, tables: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logical KV whose pages are those that each layer's table names, in its order."""
    return torch.stack([kv[layer][:, list(tables[group])] for layer, group in enumerate(GROUPS)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("page", [4, 16, 64])
@pytest.mark.parametrize("make", [nhd, cross_layer, odd_strides], ids=lambda make: make.__name__)
def test_layers_with_page_tables_of_their_own_are_gathered_each_by_its_own(
    make: Make, page: int, way: Way, device: str
) -> None:
    layout = layout_of(model(part_layers=2, part_heads=2))
    kv = placed(make(torch.bfloat16, page), device)
    tables = [table(page, 64), table(page, 64)]
    copier = PageCopier(layout, kv, groups=GROUPS, way=way)
    blocks = [(index, slots_of(layout, layout.all_parts, 0)) for index in (1, 0)]
    blocks[0][1][0] = None
    copier.gather(tables, blocks)
    want = in_order(logical(kv), tables)
    for index, slots in blocks:
        for part, slot in enumerate(slots):
            if slot is not None:
                assert bytes(slot) == expected(layout, part, want, list(range(len(tables[0]))), index)
    tables[1][0] = ABSENT
    with pytest.raises(ValueError, match="page -1 is outside"):
        copier.gather(tables, blocks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [range(64), range(3, 61), range(20, 28)])
@pytest.mark.parametrize("page", [4, 16])
@pytest.mark.parametrize("make", [nhd, cross_layer, odd_strides], ids=lambda make: make.__name__)
def test_layers_whose_table_has_no_page_are_left_out_of_a_load_and_nothing_beside_it_is_written(
    make: Make, page: int, tokens: range, way: Way, device: str
) -> None:
    layout = layout_of(model(part_layers=2, part_heads=2))
    kv = placed(make(torch.bfloat16, page), device)
    tables = [table(page, 64), table(page, 64)]
    num_absent = 24 // page  # in the middle of a block, where pages are smaller
    tables[1][:num_absent] = [ABSENT] * num_absent
    blocks = [(index, slots_of(layout, layout.all_parts)) for index in range(4)]
    before = logical(kv)
    PageCopier(layout, kv, groups=GROUPS, way=way).start_scatter(tables, blocks, tokens=tokens).finish()
    want = before.clone()
    for layer, group in enumerate(GROUPS):
        for token in tokens:
            index, at = divmod(token, layout.model.block_tokens)
            if tables[group][token // page] == ABSENT:
                continue
            for part, slot in zip(layout.parts, blocks[index][1], strict=True):
                if layer in part.layers:
                    held = torch.frombuffer(slot, dtype=torch.uint8).view(*part.shape, 2)
                    heads = slice(part.heads.start, part.heads.stop)
                    want[layer, :, tables[group][token // page], token % page, heads] = held[
                        layer - part.layers.start, :, at
                    ]
    assert torch.equal(logical(kv), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("page", [4, 16, 64])
@pytest.mark.parametrize("make", ENGINES, ids=lambda make: make.__name__)
def test_every_way_scatters_what_the_cpu_scatters_and_nothing_beside_it(
    make: Make, page: int, way: Way, device: str
) -> None:
    layout = layout_of(model(part_layers=2, part_heads=2))
    engine = make(torch.bfloat16, page)
    kv = placed(engine, device)
    pages = table(page, 64)
    blocks = [(index, slots_of(layout, layout.all_parts)) for index in (0, 1)]
    blocks[1][1][2] = None
    before = engine.snapshot()
    make_copier(layout, kv, way).scatter(pages, blocks)
    if device == "cpu":
        done = engine.snapshot()
        for tensor, old in zip(engine.memory, before, strict=True):
            tensor.copy_(old)
        PageCopier(layout, engine.kv).scatter(pages, blocks)
        assert all(torch.equal(a, b) for a, b in zip(done, engine.memory, strict=True))
    else:
        PageCopier(layout, engine.kv).scatter(pages, blocks)
        assert torch.equal(logical(kv), engine.logical())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3fn", "uint8"])
@pytest.mark.parametrize("make", [nhd, hnd, odd_strides, strided_dim], ids=lambda make: make.__name__)
def test_every_dtype_round_trips_bit_for_bit(make: Make, dtype: str, way: Way, device: str) -> None:
    layout = layout_of(model(dtype))
    kv, other = (placed(make(getattr(torch, dtype), 4), device) for _ in range(2))
    slots = slots_of(layout, (0,), 0)
    make_copier(layout, kv, way).gather([9, 3, 7, 30], [(0, slots)])
    make_copier(layout, other, way).scatter([1, 39, 0, 2], [(0, slots)])
    there = expected(layout, 0, logical(other), [1, 39, 0, 2], 0)
    assert there == expected(layout, 0, logical(kv), [9, 3, 7, 30], 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
def test_mla_latents_of_an_odd_width_are_copied(way: Way, device: str) -> None:
    layout = layout_of(replace(model(num_kv=1), head_dim=37))
    tensors = [torch.randn(40, 4, 37).bfloat16().to(device) for _ in range(LAYERS)]
    kv = PagedKV.of(tensors, "page token dim")
    slots = slots_of(layout, (0,), 0)
    make_copier(layout, kv, way).gather([3, 0, 9, 39], [(0, slots)])
    assert bytes(slots[0] or b"") == expected(layout, 0, logical(kv), [3, 0, 9, 39], 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
def test_an_odd_width_touches_nothing_beside_its_slot_or_its_pages(way: Way, device: str) -> None:
    layout = layout_of(replace(model(num_kv=1), head_dim=37))
    host = [torch.randn(40, 4, 37).bfloat16() for _ in range(LAYERS)]
    kv = PagedKV.of([tensor.to(device, copy=True) for tensor in host], "page token dim")
    buffer = bytearray(b"\xa5" * (layout.block_bytes + 128))
    slot = memoryview(buffer)[64:-64]
    copier = make_copier(layout, kv, way)
    copier.gather([3, 0, 9, 38], [(0, [slot])])
    assert buffer[:64] == buffer[-64:] == b"\xa5" * 64
    copier.scatter([7, 38, 1, 20], [(0, [slot])])
    PageCopier(layout, PagedKV.of(host, "page token dim")).scatter([7, 38, 1, 20], [(0, [slot])])
    assert torch.equal(logical(kv), logical(PagedKV.of(host, "page token dim")))


def test_no_copy_over_the_link_spans_two_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(model())
    kv = nhd(torch.bfloat16, 4).kv
    slots = slots_of(layout, (0,), 0)
    start = address_of(slots[0] or memoryview(b""))
    ranges = PinnedRanges()
    ranges.add(start - 64, 100)
    ranges.add(start + 36, 1000)
    seen: list[tuple[int, int]] = []

    def watched(address: int, num_bytes: int) -> torch.Tensor:
        seen.append((address - start, num_bytes))
        return host_bytes(address, num_bytes)

    monkeypatch.setattr(device_copy, "PINNED", ranges)
    monkeypatch.setattr(device_copy, "host_bytes", watched)
    copier = make_copier(layout, kv, Way.INDEX)
    copier._on_device()._registers = True
    copier.gather([9, 3, 7, 30], [(0, slots)])
    assert seen == [(0, 36), (36, 1000), (1036, layout.block_bytes - 1036)]
    assert bytes(slots[0] or b"") == expected(layout, 0, logical(kv), [9, 3, 7, 30], 0)


def test_neighbours_that_are_registered_apart_do_not_cross_the_link_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(model())
    size = layout.block_bytes
    memory = memoryview(bytearray(2 * size))
    start, ranges = address_of(memory), PinnedRanges()
    ranges.add(start, size)
    ranges.add(start + size, size)
    monkeypatch.setattr(device_copy, "PINNED", ranges)
    kv = hnd(torch.bfloat16, 16).kv
    copier = make_copier(layout, kv, Way.INDEX)
    device, sent = copier._on_device(), []
    device._registers = True
    copy = device._engine.copy

    class Watched:
        def copy(self, into: Ints, sources: Ints, sizes: Ints, *, to_host: bool) -> None:
            sent.extend(zip(into.tolist(), sizes.tolist(), strict=True))
            copy(into, sources, sizes, to_host=to_host)

    device._engine = Watched()
    copier.gather([9, 3], [(0, [memory[:size]]), (1, [memory[size:]])])
    assert not any(at < start + size < at + length for at, length in sent)
    assert bytes(memory) == b"".join(expected(layout, 0, logical(kv), [9, 3], index) for index in (0, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [64, 128, 256])
@pytest.mark.parametrize("way", WAYS)
def test_pages_smaller_and_larger_than_blocks_of_64_kib_a_plane_are_copied(way: Way, page: int, device: str) -> None:
    layout = layout_of(replace(model(), block_tokens=128, head_dim=64))
    tensors = [torch.randn(2, 6, page, 4, 64).bfloat16().to(device) for _ in range(LAYERS)]
    kv = PagedKV.of(tensors, "kv page token head dim")
    slots = slots_of(layout, (0,), 0)
    pages = [4, 1, 0, 3]
    make_copier(layout, kv, way).gather(pages, [(1, slots)])
    assert bytes(slots[0] or b"") == expected(layout, 0, logical(kv), pages, 1)
    fresh = slots_of(layout, (0,))
    make_copier(layout, kv, way).scatter(pages, [(1, fresh)])
    assert bytes(fresh[0] or b"") == expected(layout, 0, logical(kv), pages, 1)


# -- lossy formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("make", [nhd, hnd, fused_heads], ids=lambda make: make.__name__)
def test_lossy_blocks_hold_the_format_and_come_back_decoded(make: Make, name: str, way: Way, device: str) -> None:
    import tests.test_transfer as shapes

    layout = layout_of(replace(model(f"bfloat16+{name}", part_layers=2, part_heads=2), head_dim=16))
    kept, shapes.DIM = shapes.DIM, 16
    try:
        engine = make(torch.bfloat16, 4)
    finally:
        shapes.DIM = kept
    for layer in engine.kv.planes:  # random bytes hold NaNs
        for plane in layer:
            plane.copy_(torch.randn(plane.shape))
    kv = placed(engine, device)
    pages, back = [9, 3, 7, 30], [1, 2, 4, 5]
    slots = slots_of(layout, layout.all_parts, 0)
    copier = make_copier(layout, kv, way)
    assert copier.gather(pages, [(0, slots)]) == layout.block_bytes
    copier.scatter(back, [(0, slots)])
    form = FORMATS[name]
    for part, slot in zip(layout.parts, slots, strict=True):
        planes = [
            [plane[pages][..., part.heads.start : part.heads.stop, :].flatten(0, 1) for plane in kv.planes[layer]]
            for layer in part.layers
        ]
        exact = torch.stack([torch.stack(layer) for layer in planes]).cpu()
        raw = form.encode(exact[None])
        assert bytes(slot or b"") == raw.numpy().tobytes()
        decoded = form.decode(raw, part.shape, torch.bfloat16)[0]
        for at, layer in enumerate(part.layers):
            for number, plane in enumerate(kv.planes[layer]):
                got = plane[back][..., part.heads.start : part.heads.stop, :].flatten(0, 1).cpu()
                assert torch.equal(got, decoded[at, number])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("page", [4, 16, 64])
@pytest.mark.parametrize("tokens", [range(5, 43), range(0, 39), range(16, 48), range(9, 11)])
@pytest.mark.parametrize("step_layers", [0, 1])
def test_a_load_of_some_tokens_writes_these_and_nothing_else(
    step_layers: int, tokens: range, page: int, way: Way, device: str
) -> None:
    layout = layout_of(model(part_layers=2, part_heads=2))
    engine = hnd(torch.bfloat16, page)
    before = engine.logical().clone()
    kv = placed(engine, device)
    full = table(page, 48)
    pages = full[: -(-tokens.stop // page)]  # ends with the tokens
    blocks = [(index, slots_of(layout, layout.all_parts)) for index in range(tokens.start // 16, -(-tokens.stop // 16))]
    make_copier(layout, kv, way).start_scatter(pages, blocks, tokens=tokens, step_layers=step_layers).finish()
    wanted = hnd(torch.bfloat16, page)
    PageCopier(layout, wanted.kv).scatter(full, blocks)
    everything = wanted.logical()
    for token in tokens:
        at = pages[token // page], token % page
        before[:, :, at[0], at[1]] = everything[:, :, at[0], at[1]]
    assert torch.equal(logical(kv), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_address", [True, False])
@pytest.mark.parametrize("step_layers", [0, 1])
def test_a_run_is_scattered_as_its_blocks_are(step_layers: int, by_address: bool, device: str) -> None:
    layout = layout_of(model(part_layers=2, part_heads=2))
    engine, other = hnd(torch.bfloat16, 16), hnd(torch.bfloat16, 16)
    for one, same in zip(engine.memory, other.memory, strict=True):
        same.copy_(one)
    sizes = [part.num_bytes for part in layout.parts]
    memory = memoryview(bytearray(torch.randint(0, 256, (5 * 8192,), dtype=torch.uint8).numpy().tobytes()))
    offsets = np.array([[8192 * at + sum(sizes[:part]) for part in range(len(sizes))] for at in (4, 0, 2)])
    blocks: list[tuple[int, list[memoryview | None]]] = [
        (index, [memory[at : at + size] for at, size in zip(each, sizes, strict=True)])
        for index, each in enumerate(offsets.tolist(), 1)
    ]
    kv, pages = placed(engine, device), table(16, 64)
    copier = PageCopier(layout, kv)
    copier._by_address = by_address and device == "cpu"
    run = LoadedRun(1, "host", memory.toreadonly(), offsets)
    assert sum(sizes) < 8192
    copying = copier.start_scatter(pages, run, step_layers=step_layers)
    copying.order()
    copying.finish()
    assert copying.num_bytes == 3 * layout.block_bytes
    PageCopier(layout, other.kv).scatter(pages, blocks)
    assert torch.equal(logical(kv), other.logical())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_address", [True, False])
@pytest.mark.parametrize("tokens", [range(21, 59), range(16, 64), range(33, 35), range(16, 50), range(40, 64)])
def test_some_tokens_of_a_run_are_written_as_those_of_its_blocks_are(
    tokens: range, by_address: bool, device: str
) -> None:
    layout = layout_of(model())
    size = layout.block_bytes
    engine, other = hnd(torch.bfloat16, 4), hnd(torch.bfloat16, 4)
    for one, same in zip(engine.memory, other.memory, strict=True):
        same.copy_(one)
    memory = memoryview(bytearray(torch.randint(0, 256, (3 * size,), dtype=torch.uint8).numpy().tobytes()))
    order = (2, 0, 1)
    blocks = [(index, [memory[at * size : (at + 1) * size]]) for index, at in enumerate(order, 1)]
    kv, pages = placed(engine, device), table(4, 64)
    copier, wanted = PageCopier(layout, kv), PageCopier(layout, other.kv)
    copier._by_address = by_address and device == "cpu"
    run = LoadedRun(1, "host", memory, np.array([[at * size] for at in order]))
    copier.start_scatter(pages, run, tokens=tokens).finish()
    wanted.start_scatter(pages, blocks, tokens=tokens).finish()
    assert torch.equal(logical(kv), other.logical())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_address", [True, False])
def test_a_save_s_run_is_filled_as_its_blocks_are_and_what_is_there_already_is_left_alone(
    by_address: bool, device: str
) -> None:
    layout = layout_of(model(part_layers=2, part_heads=2))
    engine, pages = hnd(torch.bfloat16, 16), table(16, 80)
    copier = PageCopier(layout, placed(engine, device))
    copier._by_address = by_address and device == "cpu"
    sizes = [part.num_bytes for part in layout.parts]
    offsets = np.array([[8192 * at + sum(sizes[:part]) for part in range(len(sizes))] for at in (4, 0, 2)])
    offsets[1, 2] = offsets[2, 0] = ABSENT
    memory = memoryview(bytearray(5 * 8192))
    wanted = bytearray(5 * 8192)
    indices = [1, 3, 4]
    for index, each in zip(indices, offsets.tolist(), strict=True):
        for part, (at, size) in enumerate(zip(each, sizes, strict=True)):
            if at != ABSENT:
                wanted[at : at + size] = expected(layout, part, engine.logical(), pages, index)
    num_bytes = copier.gather(pages, OpenRun(np.array(indices), memory, offsets))
    assert num_bytes == 3 * layout.block_bytes - sizes[2] - sizes[0]
    assert bytes(memory) == bytes(wanted)
    for part in (0, 1):  # all of one part
        offsets[:, part] = ABSENT
    assert copier.gather(pages, OpenRun(np.array(indices), memory, offsets)) == 3 * (sizes[2] + sizes[3]) - sizes[2]
    with pytest.raises(ValueError, match="read-only"):
        copier.gather(pages, OpenRun(np.array(indices), memory.toreadonly(), offsets))


def test_few_entries_of_a_long_page_table_are_looked_up_alone() -> None:
    layout = layout_of(model())
    copier = PageCopier(layout, hnd(torch.bfloat16, 4).kv)
    for table_of in (list, tuple):
        pages = table_of(number % PAGES for number in range(0, 7 * 4000, 7))
        for numbers in ([0, 1, 2], [2, 1, 0], [999, 3], [5]):
            found = copier._places(pages, np.array(numbers), to_slots=True)
            assert found.pages.tolist() == [[[pages[4 * number + at] for at in range(4)] for number in numbers]]
            assert found.pieces.tolist() == [[0] * 4 for _ in numbers]


@pytest.mark.parametrize("by_address", [True, False])
def test_a_run_that_reaches_beyond_its_memory_is_refused(by_address: bool) -> None:
    layout = layout_of(model())
    size = layout.block_bytes
    copier = PageCopier(layout, hnd(torch.bfloat16, 16).kv)
    copier._by_address = by_address
    for at in (-1, 1):
        with pytest.raises(ValueError, match=f"outside its memory of {size} bytes"):
            copier.start_scatter([1], LoadedRun(0, "host", memoryview(bytes(size)), np.array([[at]])))
    with pytest.raises(ValueError, match="2 slots a block for the 1 parts"):
        copier.start_scatter([1], LoadedRun(0, "host", memoryview(bytes(size)), np.array([[0, 0]])))
    for at in (-2, 1):
        with pytest.raises(ValueError, match=f"outside its memory of {size} bytes"):
            copier.gather([1], OpenRun(np.array([0]), memoryview(bytearray(size)), np.array([[at]])))
    with pytest.raises(ValueError, match="outside a page table"):
        copier.start_scatter([1], LoadedRun(1, "host", memoryview(bytes(size)), np.array([[0]])))


# -- order --------------------------------------------------------------------------------------------------------


def windowed(copier: PageCopier) -> PageCopier:
    """With stages so small that each block is a window."""
    copier._on_device()._stage_bytes = copier.layout.parts[0].num_bytes
    return copier


def uniform(tensor: torch.Tensor) -> float | None:
    """Its value, where it has one only."""
    values = tensor.float().unique().tolist()
    return float(values[0]) if len(values) == 1 else None


def fill(kv: PagedKV, pages: Sequence[int], value: float) -> None:
    """`value`, `value` + 10, … in one page after the other: what belongs to another page is told apart."""
    for layer in kv.planes:
        for plane in layer:
            for number, page in enumerate(pages):
                plane[page] = value + 10 * number


def found(kv: PagedKV, pages: Sequence[int]) -> list[set[float]]:
    return [
        {value for layer in kv.planes for plane in layer for value in plane[page].unique().tolist()} for page in pages
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(12))
def test_a_save_reads_what_the_forward_wrote_whatever_the_device_does_first(way: Way, seed: int) -> None:
    layout = layout_of(model())
    kv = cross_layer(torch.bfloat16, 16).kv
    streams = LazyStreams(seed)
    copier = windowed(make_copier(layout, kv, way, streams))
    pages = [5, 9, 2, 0, 7, 1]  # more than there are stages
    fill(kv, pages, 1.0)
    slots = [(index, slots_of(layout, (0,), 0)) for index in range(6)]
    streams.run_engine(lambda: fill(kv, pages, 2.0))
    copying = copier.start_gather(pages, slots)
    copying.order()
    streams.run_engine(lambda: fill(kv, pages, 3.0))  # the next owner of these pages
    streams.drain()
    for number, (_, (slot,)) in enumerate(slots):
        assert set(torch.frombuffer(slot, dtype=torch.bfloat16).tolist()) == {2.0 + 10 * number}
    assert copying.is_done


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(12))
def test_a_load_waits_for_the_last_reader_and_the_forward_waits_for_the_load(way: Way, seed: int) -> None:
    layout = layout_of(model())
    kv = cross_layer(torch.bfloat16, 16).kv
    streams = LazyStreams(seed)
    copier = windowed(make_copier(layout, kv, way, streams))
    pages = [5, 9, 2]  # one more than there are stages
    fill(kv, pages, 1.0)
    slots = [(index, slots_of(layout, (0,))) for index in range(3)]
    for number, (_, (slot,)) in enumerate(slots):
        torch.frombuffer(slot, dtype=torch.bfloat16).fill_(7.0 + 10 * number)
    seen: list[list[set[float]]] = []
    look = lambda: seen.append(found(kv, pages))
    streams.run_engine(look)
    copying = copier.start_scatter(pages, slots)
    assert not copying.is_done
    copying.order()
    streams.run_engine(look)
    streams.drain()
    assert seen == [[{1.0}, {11.0}, {21.0}], [{7.0}, {17.0}, {27.0}]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(12))
def test_each_layer_of_a_forward_finds_its_own_layer_loaded(way: Way, seed: int) -> None:
    layout = layout_of(model(part_heads=2))
    kv = cross_layer(torch.bfloat16, 16).kv
    streams = LazyStreams(seed)
    copier = windowed(make_copier(layout, kv, way, streams))
    pages = [5, 9, 2]
    fill(kv, pages, 1.0)
    slots = [(index, slots_of(layout, layout.all_parts)) for index in range(3)]
    for number, (_, views) in enumerate(slots):
        for view in views:
            torch.frombuffer(view, dtype=torch.bfloat16).fill_(7.0 + 10 * number)
    copying = copier.start_scatter(pages, slots, step_layers=1)
    seen: dict[int, list[set[float]]] = {}

    def look(layer: int) -> None:
        seen[layer] = found(PagedKV(kv.planes[layer : layer + 1]), pages)

    for layer in range(LAYERS):
        copying.order(layer)
        streams.run_engine(lambda layer=layer: look(layer))
    streams.finish(streams.record(streams.engine()))
    assert seen == {layer: [{7.0}, {17.0}, {27.0}] for layer in range(LAYERS)}
    copying.finish()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("lanes", [1, 2])
def test_copiers_of_one_device_share_its_stages_and_keep_each_other_s_bytes(lanes: int, seed: int) -> None:
    """One of them packs what it saves: what that leaves in a stage is not taken for the other's."""
    streams = LazyStreams(seed)
    exact, packed = layout_of(replace(model(), head_dim=16)), layout_of(replace(model("bfloat16+fp8"), head_dim=16))
    caches = [torch.zeros(LAYERS, 2, 6, 16, 4, 16).bfloat16() for _ in range(2)]
    copiers = []
    for layout, cache in zip((exact, packed), caches, strict=True):
        copier = make_copier(layout, PagedKV.of([cache], "layer kv page token head dim"), Way.INDEX, streams)
        copier._on_device()._lanes = range(lanes)
        copiers.append(windowed(copier))
    assert copiers[0]._on_device()._save is copiers[1]._on_device()._save
    saved, fresh = [], [torch.zeros_like(cache) for cache in caches]
    for turn in range(2):
        for at, (copier, cache) in enumerate(zip(copiers, caches, strict=True)):
            streams.run_engine(lambda cache=cache, value=1 + at + 2 * turn: cache.fill_(float(value)))  # type: ignore[misc]
            blocks = [(index, slots_of(copier.layout, (0,), 0)) for index in range(6)]
            copier.start_gather(range(6), blocks).order()
            saved.append((at, float(1 + at + 2 * turn), blocks))
    streams.drain()
    for at, value, blocks in saved:
        into = PagedKV.of([fresh[at]], "layer kv page token head dim")
        copier = make_copier(copiers[at].layout, into, Way.INDEX, streams)
        copier.start_scatter(range(6), blocks, step_layers=1).order()
        streams.drain()
        assert uniform(fresh[at]) == value


@pytest.mark.parametrize("seed", range(12))
def test_a_save_over_two_lanes_is_done_when_both_are(seed: int) -> None:
    layout, streams = layout_of(model()), LazyStreams(seed)
    kv = cross_layer(torch.bfloat16, 16).kv
    fill(kv, [5, 9, 2], 2.0)
    copier = windowed(make_copier(layout, kv, Way.INDEX, streams))
    copier._on_device()._lanes = range(2)
    slots = [(index, slots_of(layout, (0,), 0)) for index in range(3)]
    copier.start_gather([5, 9, 2], slots).finish()
    held = [set(torch.frombuffer(views[0] or b"", dtype=torch.bfloat16).tolist()) for _, views in slots]
    assert held == [{2.0}, {12.0}, {22.0}]


@pytest.mark.parametrize(("step_layers", "windows"), [(0, 4), (1, 3), (2, 3)])
def test_a_step_of_a_load_goes_in_windows_of_twice_a_stage_s_size(step_layers: int, windows: int) -> None:
    """What is waited for as a whole need not come in pieces, each of which costs the thread that submits it."""
    layout = layout_of(model())
    copier = windowed(make_copier(layout, cross_layer(torch.bfloat16, 16).kv, Way.INDEX))
    device, count = copier._on_device(), []
    send = device._over_the_link
    device._over_the_link = lambda *args, **named: count.append(send(*args, **named))  # type: ignore[method-assign]
    assert LAYERS == 3
    copier.start_scatter([5, 9, 2, 0], [(at, slots_of(layout, (0,))) for at in range(4)], step_layers=step_layers)
    assert len(count) == windows


def test_a_forward_can_begin_before_the_last_layers_are_there() -> None:
    layout = layout_of(model())
    kv = cross_layer(torch.bfloat16, 16).kv
    early = 0
    for seed in range(20):
        streams = LazyStreams(seed)
        copying = make_copier(layout, kv, Way.INDEX, streams).start_scatter(
            [5], [(0, slots_of(layout, (0,)))], step_layers=1
        )
        copying.order(0)
        seen: list[bool] = []
        streams.run_engine(lambda copying=copying, seen=seen: seen.append(copying.is_done))
        streams.drain()
        early += not seen[0]
    assert early > 0


def test_a_forward_may_write_saved_pages_again_while_their_bytes_are_still_on_the_link() -> None:
    layout = layout_of(model())
    early = 0
    for seed in range(20):
        kv = cross_layer(torch.bfloat16, 16).kv
        fill(kv, [5], 2.0)
        streams = LazyStreams(seed)
        slots = [(0, slots_of(layout, (0,), 0))]
        copying = make_copier(layout, kv, Way.INDEX, streams).start_gather([5], slots)
        copying.order()
        seen: list[bool] = []

        def overwrite(copying: Copying = copying, seen: list[bool] = seen, kv: PagedKV = kv) -> None:
            seen.append(copying.is_done)
            fill(kv, [5], 3.0)

        streams.run_engine(overwrite)
        streams.drain()
        early += not seen[0]
        assert set(torch.frombuffer(slots[0][1][0] or b"", dtype=torch.bfloat16).tolist()) == {2.0}
    assert early > 0


def saved_pages(copier: PageCopier, streams: LazyStreams, kv: PagedKV, num_blocks: int) -> tuple[bool, bool]:
    """(whether a save has what the pages held, whether the engine wrote them again before a byte had crossed)."""
    pages, crossed = list(range(num_blocks)), []
    send = copier._on_device()._over_the_link
    copier._on_device()._over_the_link = lambda *args, **named: crossed.append(send(*args, **named))  # type: ignore[method-assign]
    fill(kv, pages, 2.0)
    slots = [(index, slots_of(copier.layout, (0,), 0)) for index in range(num_blocks)]
    copier.start_gather(pages, slots).order()
    early: list[bool] = []
    streams.run_engine(lambda: (early.append(not crossed), fill(kv, pages, 300.0)))  # type: ignore[arg-type, return-value]
    streams.drain()
    values = [set(torch.frombuffer(views[0] or b"", dtype=torch.bfloat16).tolist()) for _, views in slots]
    return values == [{2.0 + 10 * number} for number in range(num_blocks)], early[0]


def test_a_save_of_four_windows_can_let_the_engine_go_on_before_a_byte_has_crossed_the_link() -> None:
    early = 0
    for seed in range(60):
        kv, streams = cross_layer(torch.bfloat16, 16).kv, LazyStreams(seed)
        sound, before = saved_pages(windowed(make_copier(layout_of(model()), kv, Way.INDEX, streams)), streams, kv, 4)
        assert sound
        early += before
    assert early > 0


def test_a_device_without_memory_for_more_stages_does_with_two(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, made = stages._allocate, []

    class Strict(LazyStreams):
        """Memory is asked for when the work is submitted, as on a device."""

        def submit(self, stream: LazyStream, action: Callable[[], None]) -> None:
            if "_make_room" in getattr(action, "__qualname__", ""):
                action()
            else:
                super().submit(stream, action)

    def scarce(*args: object) -> None:
        if len(made) == 2:
            raise torch.OutOfMemoryError("no more")
        made.append(allocate(*args))  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "_allocate", scarce)
    for seed in range(6):
        made.clear()
        kv, streams = cross_layer(torch.bfloat16, 16).kv, Strict(seed)
        copier = windowed(make_copier(layout_of(model()), kv, Way.INDEX, streams))
        assert saved_pages(copier, streams, kv, 6)[0]
        assert len(made) == len(copier._on_device()._save.stages) == 2


@pytest.mark.parametrize("to_slots", [True, False])
def test_a_copy_that_fails_while_it_is_submitted_leaves_nothing_running(to_slots: bool) -> None:
    layout = layout_of(model())
    kv = cross_layer(torch.bfloat16, 16).kv
    streams = LazyStreams(1)
    copier = windowed(make_copier(layout, kv, Way.INDEX, streams))
    device = copier._on_device()
    name = "_take_out" if to_slots else "_bring_in"
    submit, given = getattr(device, name), []

    def fails(*args: object, **named: object) -> object:
        if len(given) == 2:
            raise RuntimeError("no memory")
        given.append(submit(*args, **named))
        return given[-1]

    setattr(device, name, fails)
    slots = [(index, slots_of(layout, (0,))) for index in range(3)]
    start = copier.start_gather if to_slots else copier.start_scatter
    with pytest.raises(RuntimeError, match="no memory"):
        start([5, 9, 2], slots)
    assert not any(stream.queue for stream in streams._streams.values())
    setattr(device, name, submit)
    start([5, 9, 2], slots).finish()


def test_the_kernel_is_taken_on_a_device_where_it_works_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_kernel, "fault", lambda device: "")
    assert best_way(torch.device("cuda")) is Way.STAGED
    assert best_way(torch.device("cpu")) is Way.INDEX
    monkeypatch.setattr(copy_kernel, "fault", lambda device: "no compiler")
    assert best_way(torch.device("cuda")) is Way.INDEX
