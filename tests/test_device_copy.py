# SPDX-License-Identifier: Apache-2.0
"""The device path, every way: the same bytes as the CPU's, in the order that events promise; CUDA too where it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="transfer copies torch tensors")

import torch

from kvstore import copy_kernel, device_copy
from kvstore.copy_engine import host_bytes
from kvstore.copy_windows import address_of
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


# -- order --------------------------------------------------------------------------------------------------------


def windowed(copier: PageCopier) -> PageCopier:
    """With stages so small that each block is a window."""
    copier._on_device()._stage_bytes = copier.layout.parts[0].num_bytes
    return copier


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
    allocate, made = device_copy._allocate, []

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

    monkeypatch.setattr(device_copy, "_allocate", scarce)
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
    submit, given = device._submit, []

    def fails(*args: object) -> None:
        if len(given) == 2:
            raise RuntimeError("no memory")
        given.append(submit(*args))  # type: ignore[arg-type]

    device._submit = fails  # type: ignore[method-assign]
    slots = [(index, slots_of(layout, (0,))) for index in range(3)]
    start = copier.start_gather if to_slots else copier.start_scatter
    with pytest.raises(RuntimeError, match="no memory"):
        start([5, 9, 2], slots)
    assert not any(stream.queue for stream in streams._streams.values())
    device._submit = submit  # type: ignore[method-assign]
    start([5, 9, 2], slots).finish()


def test_the_kernel_is_taken_on_a_device_where_it_works_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_kernel, "fault", lambda device: "")
    assert best_way(torch.device("cuda")) is Way.STAGED
    assert best_way(torch.device("cpu")) is Way.INDEX
    monkeypatch.setattr(copy_kernel, "fault", lambda device: "no compiler")
    assert best_way(torch.device("cuda")) is Way.INDEX
