# SPDX-License-Identifier: Apache-2.0
"""Copies between paged engine tensors and slots: bit-exact, whatever the layout, and nothing else touched."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest

pytest.importorskip("torch", reason="transfer copies torch tensors")

import torch

from kvstore.block import ModelId
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout, layout_of
from kvstore.transfer import PageCopier, PagedKV, copy_rows, to_tensor

LAYERS, HEADS, DIM, PAGES = 3, 4, 8, 40
POISON = 0xA5


def model(
    dtype: str = "bfloat16",
    *,
    block_tokens: int = 16,
    num_kv: int = 2,
    part_layers: int = 0,
    part_heads: int = 0,
) -> ModelId:
    return ModelId(
        model="m",
        revision="r",
        kv_dtype=dtype,
        num_layers=LAYERS,
        num_kv_heads=HEADS if num_kv == 2 else 1,
        head_dim=DIM,
        num_kv=num_kv,
        block_tokens=block_tokens,
        part_layers=part_layers,
        part_heads=part_heads,
    )


@dataclass
class Engine:
    """Engine tensors of one layout, and the memory around them to watch."""

    kv: PagedKV
    memory: list[torch.Tensor]

    def logical(self) -> torch.Tensor:
        """All KV as bytes [layer, kv, page, token, head, dim, byte], a copy."""
        planes = [torch.stack([_bytes(plane) for plane in layer]) for layer in self.kv.planes]
        return torch.stack(planes)

    def snapshot(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.memory]


def _bytes(plane: torch.Tensor) -> torch.Tensor:
    contiguous = plane.clone(memory_format=torch.contiguous_format)
    return contiguous.view(torch.uint8).view(*plane.shape, plane.element_size())


def _buffer(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor over random bytes with a poisoned margin on both sides."""
    item = torch.empty(0, dtype=dtype).element_size()
    size = item * int(torch.tensor(shape).prod())
    memory = torch.full((size + 512,), POISON, dtype=torch.uint8)
    memory[256 : 256 + size] = torch.randint(0, 256, (size,), dtype=torch.uint8)
    return memory, memory[256 : 256 + size].view(dtype).view(shape)


def nhd(dtype: torch.dtype, page: int) -> Engine:
    made = [_buffer(dtype, 2, PAGES, page, HEADS, DIM) for _ in range(LAYERS)]
    return Engine(PagedKV.of([t for _, t in made], "kv page token head dim"), [m for m, _ in made])


def nhd_page_first(dtype: torch.dtype, page: int) -> Engine:
    made = [_buffer(dtype, PAGES, 2, page, HEADS, DIM) for _ in range(LAYERS)]
    return Engine(PagedKV.of([t for _, t in made], "page kv token head dim"), [m for m, _ in made])


def hnd(dtype: torch.dtype, page: int) -> Engine:
    made = [_buffer(dtype, 2, PAGES, HEADS, page, DIM) for _ in range(LAYERS)]
    return Engine(PagedKV.of([t for _, t in made], "kv page head token dim"), [m for m, _ in made])


def fused_heads(dtype: torch.dtype, page: int) -> Engine:
    made = [_buffer(dtype, PAGES, page, HEADS, 2, DIM) for _ in range(LAYERS)]
    return Engine(PagedKV.of([t for _, t in made], "page token head kv dim"), [m for m, _ in made])


def cross_layer(dtype: torch.dtype, page: int) -> Engine:
    memory, tensor = _buffer(dtype, PAGES, LAYERS, 2, page, HEADS, DIM)
    return Engine(PagedKV.of([tensor], "page layer kv token head dim"), [memory])


def descending(dtype: torch.dtype, page: int) -> Engine:
    memory, tensor = _buffer(dtype, LAYERS, 2, PAGES, page, HEADS, DIM)
    layers = [tensor[layer] for layer in reversed(range(LAYERS))]
    return Engine(PagedKV.of(layers, "kv page token head dim"), [memory])


def separate(dtype: torch.dtype, page: int) -> Engine:
    made = [_buffer(dtype, PAGES * page, HEADS, DIM) for _ in range(2 * LAYERS)]
    keys, values = [t for _, t in made[:LAYERS]], [t for _, t in made[LAYERS:]]
    return Engine(PagedKV.separate(keys, values, "slot head dim", page_tokens=page), [m for m, _ in made])


def odd_strides(dtype: torch.dtype, page: int) -> Engine:
    made = [_buffer(dtype, 2, PAGES + 3, page + 1, HEADS + 2, DIM + 5) for _ in range(LAYERS)]
    cut = [t[:, 1 : PAGES + 1, :page, 1 : HEADS + 1, 2 : DIM + 2] for _, t in made]
    return Engine(PagedKV.of(cut, "kv page token head dim"), [m for m, _ in made])


def strided_dim(dtype: torch.dtype, page: int) -> Engine:
    made = [_buffer(dtype, 2, PAGES, page, HEADS, DIM, 2) for _ in range(LAYERS)]
    return Engine(PagedKV.of([t[..., 1] for _, t in made], "kv page token head dim"), [m for m, _ in made])


ENGINES: list[Callable[[torch.dtype, int], Engine]] = [
    nhd, nhd_page_first, hnd, fused_heads, cross_layer, descending, separate, odd_strides, strided_dim,
]  # fmt: skip


def slots_of(layout: BlockLayout, parts: tuple[int, ...], fill: int | None = None) -> list[memoryview | None]:
    """Fresh slots for one block: random bytes, or `fill`."""
    slots: list[memoryview | None] = []
    for part in parts:
        size = layout.parts[part].num_bytes
        source = torch.randint(0, 256, (size,), dtype=torch.uint8) if fill is None else torch.full((size,), fill)
        slots.append(memoryview(bytearray(source.to(torch.uint8).numpy().tobytes())))
    return slots


def expected(layout: BlockLayout, part: int, kv: torch.Tensor, pages: list[int], index: int) -> bytes:
    """Canonical bytes of one part, read token by token from logical KV bytes."""
    cell = layout.parts[part]
    page_tokens = kv.shape[3]
    tokens = []
    for token in range(index * layout.model.block_tokens, (index + 1) * layout.model.block_tokens):
        page, at = pages[token // page_tokens], token % page_tokens
        tokens.append(kv[cell.layers.start : cell.layers.stop, :, page, at, cell.heads.start : cell.heads.stop])
    return bytes(torch.stack(tokens, dim=2).contiguous().numpy().tobytes())


def table(page_tokens: int, num_tokens: int) -> list[int]:
    """Distinct pages in random order, the last page of the engine among them."""
    count = -(-num_tokens // page_tokens)
    return [PAGES - 1, *torch.randperm(PAGES - 1)[: count - 1].tolist()]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("page", [1, 4, 16, 64])
@pytest.mark.parametrize("make", ENGINES, ids=lambda make: make.__name__)
def test_gather_gives_canonical_bytes_for_every_layout_and_page_size(
    make: Callable[[torch.dtype, int], Engine], page: int
) -> None:
    layout = layout_of(model())
    engine = make(torch.bfloat16, page)
    copier = PageCopier(layout, engine.kv)
    pages = table(page, 80)[: -(-32 // page) if page < 32 else 2]
    blocks = [(index, slots_of(layout, copier.parts, 0)) for index in (1, 0)]
    before = engine.snapshot()
    assert copier.gather(pages, blocks) == 2 * layout.block_bytes
    for index, slots in blocks:
        assert bytes(slots[0] or b"") == expected(layout, 0, engine.logical(), pages, index)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.memory, strict=True))


@pytest.mark.parametrize("page", [1, 4, 16, 64])
@pytest.mark.parametrize("make", ENGINES, ids=lambda make: make.__name__)
def test_scatter_writes_its_pages_and_not_a_byte_beside_them(
    make: Callable[[torch.dtype, int], Engine], page: int
) -> None:
    layout = layout_of(model())
    engine = make(torch.bfloat16, page)
    copier = PageCopier(layout, engine.kv)
    pages = table(page, 80)[: max(2, 32 // page)]
    slots = slots_of(layout, copier.parts)
    before, memory = engine.logical(), engine.snapshot()
    copier.scatter(pages, [(1, slots)])
    after = engine.logical()
    assert expected(layout, 0, after, pages, 1) == bytes(slots[0] or b"")
    # Put the block's tokens back: everything, padding and margins included, is then as it was.
    back: list[memoryview | None] = [memoryview(bytearray(expected(layout, 0, before, pages, 1)))]
    copier.scatter(pages, [(1, back)])
    assert all(torch.equal(a, b) for a, b in zip(memory, engine.memory, strict=True))
    changed = (after != before).flatten(4).any(-1).any(0).any(0)
    own = torch.zeros_like(changed)
    for token in range(16, 32):
        own[pages[token // page], token % page] = True
    assert not (changed & ~own).any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "uint8"])
@pytest.mark.parametrize("make", [nhd, hnd], ids=lambda make: make.__name__)
def test_every_dtype_round_trips_bit_for_bit(make: Callable[[torch.dtype, int], Engine], dtype: str) -> None:
    layout = layout_of(model(dtype))
    engine, other = make(getattr(torch, dtype), 4), make(getattr(torch, dtype), 4)
    slots = slots_of(layout, (0,), 0)
    PageCopier(layout, engine.kv).gather([9, 3, 7, 30], [(0, slots)])
    PageCopier(layout, other.kv).scatter([1, 39, 0, 2], [(0, slots)])
    assert expected(layout, 0, other.logical(), [1, 39, 0, 2], 0) == expected(
        layout, 0, engine.logical(), [9, 3, 7, 30], 0
    )


def test_two_engines_of_different_layout_and_page_size_read_each_others_blocks() -> None:
    layout = layout_of(model())
    writer, reader = nhd(torch.bfloat16, 16), hnd(torch.bfloat16, 4)
    slots = slots_of(layout, (0,), 0)
    PageCopier(layout, writer.kv).gather([5], [(0, slots)])
    PageCopier(layout, reader.kv).scatter([8, 1, 30, 2], [(0, slots)])
    assert expected(layout, 0, reader.logical(), [8, 1, 30, 2], 0) == expected(layout, 0, writer.logical(), [5], 0)


@pytest.mark.parametrize("make", ENGINES, ids=lambda make: make.__name__)
def test_a_grid_of_parts_copies_head_and_layer_slices(make: Callable[[torch.dtype, int], Engine]) -> None:
    layout = layout_of(model(part_layers=2, part_heads=2))
    engine = make(torch.bfloat16, 8)
    copier = PageCopier(layout, engine.kv)
    assert copier.parts == (0, 1, 2, 3)
    slots = slots_of(layout, copier.parts, 0)
    copier.gather([4, 2], [(0, slots)])
    for part, slot in zip(copier.parts, slots, strict=True):
        assert bytes(slot or b"") == expected(layout, part, engine.logical(), [4, 2], 0)
    fresh = slots_of(layout, copier.parts)
    copier.scatter([4, 2], [(0, [None, fresh[1], None, None])])
    logical = engine.logical()
    for part, slot in ((0, slots[0]), (1, fresh[1]), (2, slots[2]), (3, slots[3])):
        assert bytes(slot or b"") == expected(layout, part, logical, [4, 2], 0)


def test_ranks_of_a_parallel_engine_fill_the_blocks_of_a_single_one() -> None:
    layout = layout_of(model(part_layers=1, part_heads=2))
    whole = nhd(torch.bfloat16, 16)
    slots = slots_of(layout, layout.all_parts, 0)
    for layers in (range(2), range(2, 3)):
        for heads in (range(2), range(2, 4)):
            planes = tuple(
                tuple(plane[:, :, heads.start : heads.stop] for plane in whole.kv.planes[layer]) for layer in layers
            )
            rank = PageCopier(layout, PagedKV(planes), layers=layers, heads=heads)
            assert len(rank.parts) == len(layers)
            rank.gather([6], [(0, [slots[part] for part in rank.parts])])
    for part, slot in enumerate(slots):
        assert bytes(slot or b"") == expected(layout, part, whole.logical(), [6], 0)


def test_mla_latents_have_neither_kv_nor_head_axis() -> None:
    layout = layout_of(model(num_kv=1))
    tensors = [torch.randn(PAGES, 4, DIM).bfloat16() for _ in range(LAYERS)]
    kv = PagedKV.of(tensors, "page token dim")
    slots = slots_of(layout, (0,), 0)
    PageCopier(layout, kv).gather([3, 0, 9, 39], [(0, slots)])
    assert slots[0] is not None
    got = to_tensor(slots[0], layout.parts[0], torch.bfloat16)
    want = torch.stack([torch.cat([t[p] for p in (3, 0, 9, 39)]) for t in tensors])
    assert torch.equal(got[:, 0, :, 0], want)


@pytest.mark.parametrize("pages", [[1, 2, 3, PAGES], [1, 2, 3, -1]])
def test_a_page_outside_the_engine_is_refused_before_any_copy(pages: list[int]) -> None:
    layout = layout_of(model())
    engine = nhd(torch.bfloat16, 4)
    before = engine.snapshot()
    with pytest.raises(ValueError, match="outside the engine's 40 pages"):
        PageCopier(layout, engine.kv).scatter(pages, [(0, slots_of(layout, (0,)))])
    assert all(torch.equal(a, b) for a, b in zip(before, engine.memory, strict=True))


def test_blocks_past_the_page_table_and_slots_of_another_size_are_refused() -> None:
    layout = layout_of(model())
    copier = PageCopier(layout, nhd(torch.bfloat16, 4).kv)
    with pytest.raises(ValueError, match="block 1 is outside a page table of 4 × 4 tokens"):
        copier.scatter([1, 2, 3, 4], [(1, slots_of(layout, (0,)))])
    with pytest.raises(ValueError, match="block -1 is outside"):
        copier.scatter([1, 2, 3, 4], [(-1, slots_of(layout, (0,)))])
    with pytest.raises(ValueError, match="a slot of 3 bytes"):
        copier.gather([1, 2, 3, 4], [(0, [memoryview(bytearray(3))])])


def test_a_read_only_slot_cannot_be_gathered_into() -> None:
    layout = layout_of(model())
    copier = PageCopier(layout, nhd(torch.bfloat16, 4).kv)
    slot = memoryview(bytes(layout.block_bytes))
    with pytest.raises(ValueError, match="read-only"):
        copier.gather([1, 2, 3, 4], [(0, [slot])])


def test_tensors_that_do_not_fit_the_layout_are_named() -> None:
    layout = layout_of(model())
    with pytest.raises(ConfigError, match="tensors are float16, the store's layout is bfloat16"):
        PageCopier(layout, nhd(torch.float16, 4).kv)
    with pytest.raises(ConfigError, match="have 3 layers, the store's layout 2"):
        PageCopier(layout, nhd(torch.bfloat16, 4).kv, layers=range(2))
    with pytest.raises(ConfigError, match="pages of 12 tokens"):
        PageCopier(layout, nhd(torch.bfloat16, 12).kv)
    with pytest.raises(ConfigError, match="axes 'kv page token' name 3 axes"):
        PagedKV.of([torch.zeros(2, 3, 4, 5)], "kv page token")
    with pytest.raises(ConfigError, match="layer 1"):
        PagedKV.of([torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 4, 5, 7)], "kv page token head dim")


def test_a_slot_becomes_a_tensor_without_a_copy_or_a_warning() -> None:
    layout = layout_of(model())
    part = layout.parts[0]
    data = bytearray(part.num_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = to_tensor(memoryview(data).toreadonly(), part, torch.bfloat16)
    assert tuple(tensor.shape) == part.shape
    data[0:2] = bytes((0x80, 0x3F))
    assert tensor.flatten()[0] == 1.0


def test_layers_at_equal_distances_are_copied_as_one_view() -> None:
    layout = layout_of(model())
    for make in (cross_layer, descending):
        assert PageCopier(layout, make(torch.bfloat16, 4).kv).num_views == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_strided_copy_moves_its_rows_and_nothing_beside_them(dtype: torch.dtype) -> None:
    memory, storage = _buffer(dtype, LAYERS, 2, HEADS, 64, DIM)
    _, slot = _buffer(dtype, LAYERS, 2, 16, HEADS, DIM)
    before = memory.clone()
    span = storage[:, :, :, 16:32].transpose(2, 3)
    copy_rows(span, slot)
    assert torch.equal(_bytes(span), _bytes(slot))
    back = torch.empty_like(slot)
    copy_rows(back, span)
    assert torch.equal(_bytes(back), _bytes(slot))
    after = memory.clone()
    memory.copy_(before)
    changed = (after != before)[256:-256].view(LAYERS, 2, HEADS, 64, -1)
    assert not changed[:, :, :, :16].any()
    assert not changed[:, :, :, 32:].any()
    assert torch.equal(after[:256], before[:256])
    assert torch.equal(after[-256:], before[-256:])


def test_a_strided_copy_refuses_another_shape_or_dtype() -> None:
    with pytest.raises(ValueError, match="cannot copy"):
        copy_rows(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="cannot copy"):
        copy_rows(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16))
