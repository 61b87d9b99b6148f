# SPDX-License-Identifier: Apache-2.0
"""Pages of vLLM as canonical bytes: orders found by probing kernels made up here, and plain strides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from connectors.vllm_order import WriteKernel
from connectors.vllm_pages import PackedPages, StridedPages
from kvstore.block import ModelId
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout, layout_of

PAGE, HEADS, DIM, LAYERS = 32, 2, 16, 3
Place = Callable[[int, int], int]


def layout(**settings: int) -> BlockLayout:
    made = {"block_tokens": 64, "part_layers": 0, "part_heads": 0, **settings}
    return layout_of(
        ModelId(
            model="m", revision="1", kv_dtype="float32", num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, **made
        )
    )


def kernel(k_place: Place, v_place: Place) -> WriteKernel:
    """A write kernel that puts (token, channel) of a head where the functions say."""
    k_at = torch.tensor([[k_place(token, dim) for dim in range(DIM)] for token in range(PAGE)])
    v_at = torch.tensor([[v_place(token, dim) for dim in range(DIM)] for token in range(PAGE)])

    def write(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
        flat = tensor.view(*tensor.shape[:2], -1)
        for number, slot in enumerate(slots.tolist()):
            page, token = divmod(slot, PAGE)
            flat[page][:, k_at[token]] = keys[number]
            flat[page][:, PAGE * DIM + v_at[token]] = values[number]

    return write


def plain(token: int, dim: int) -> int:
    return token * DIM + dim


def turned(token: int, dim: int) -> int:
    return dim * PAGE + token


def tiled(token: int, dim: int) -> int:
    """Tiles of 16 tokens; in a tile, pairs of channels of one token side by side."""
    return token // 16 * 16 * DIM + dim // 2 * 32 + token % 16 * 2 + dim % 2


def scattered(token: int, dim: int) -> int:
    return (token * DIM + dim) * 37 % (PAGE * DIM)


def paired(token: int, dim: int) -> int:
    """Pairs of tokens side by side."""
    return token // 2 * 2 * DIM + dim * 2 + token % 2


def tensors() -> list[torch.Tensor]:
    return [torch.zeros(9, HEADS, PAGE, 2 * DIM) for _ in range(LAYERS)]


def slots_of(pages: PackedPages, made: BlockLayout) -> list[memoryview]:
    return [memoryview(bytearray(made.parts[part].num_bytes)) for part in pages.parts]


ORDERS = pytest.mark.parametrize(
    ("k_place", "v_place"), [(plain, plain), (turned, plain), (tiled, plain), (tiled, paired), (plain, tiled)]
)


@ORDERS
@pytest.mark.parametrize("grid", [{}, {"part_layers": 1, "part_heads": 1}])
@pytest.mark.parametrize("block_tokens", [32, 64, 16])
def test_what_the_kernel_wrote_is_gathered_and_what_is_scattered_it_would_have_written(
    k_place: Place, v_place: Place, grid: dict[str, int], block_tokens: int
) -> None:
    made = layout(block_tokens=block_tokens, **grid)
    write = kernel(k_place, v_place)
    mine = tensors()
    pages = PackedPages(made, mine, range(LAYERS), range(HEADS), write=write, key_dtype=torch.float32)
    table = [5, 3, 8, 1]
    kv = torch.randn(LAYERS, 2, 128, HEADS, DIM)
    places = torch.tensor([table[token // PAGE] * PAGE + token % PAGE for token in range(128)])
    for layer, tensor in enumerate(mine):
        write(kv[layer, 0], kv[layer, 1], tensor, places)
    index = 64 // block_tokens
    held = slots_of(pages, made)
    pages.gather([table], [(index, held)])
    for part, view in zip(made.parts, held, strict=True):
        want = kv[
            part.layers.start : part.layers.stop,
            :,
            index * block_tokens : (index + 1) * block_tokens,
            part.heads.start : part.heads.stop,
        ]
        assert torch.equal(torch.frombuffer(view, dtype=torch.float32).view(part.shape), want)
    there = [tensor.clone() for tensor in mine]
    other = [4, 7, 2, 6]
    pages.scatter([other], [(index, held)], range(1 << 20), together=block_tokens == 64)
    wanted = places[index * block_tokens : (index + 1) * block_tokens]
    moved = torch.tensor(other)[torch.div(wanted.new_tensor(range(64, 64 + block_tokens)), PAGE, rounding_mode="floor")]
    moved = moved * PAGE + wanted % PAGE
    for layer, tensor in enumerate(there):
        span = slice(index * block_tokens, (index + 1) * block_tokens)
        write(kv[layer, 0, span], kv[layer, 1, span], tensor, moved)
        assert torch.equal(mine[layer], tensor)


def packed(made: BlockLayout, mine: list[torch.Tensor], held: list[memoryview], tokens: range) -> None:
    pages = PackedPages(made, mine, range(LAYERS), range(HEADS), write=kernel(turned, plain), key_dtype=torch.float32)
    pages.scatter([[5, 3, 8, 1]], [(1, held)], tokens, together=True)


def strided(made: BlockLayout, mine: list[torch.Tensor], held: list[memoryview], tokens: range) -> None:
    pages = StridedPages(made, mine, range(LAYERS), range(HEADS))
    pages.start_load([[5, 3, 8, 1]], [(1, held)], tokens, after=pages.now()).finish()


@pytest.mark.parametrize("load", [packed, strided])
@pytest.mark.parametrize("grid", [{}, {"part_layers": 1, "part_heads": 1}])
def test_nothing_below_the_first_token_is_written(
    load: Callable[[BlockLayout, list[torch.Tensor], list[memoryview], range], None], grid: dict[str, int]
) -> None:
    made = layout(**grid)
    mine = tensors()
    held = [memoryview(bytearray(made.parts[part].num_bytes)) for part in made.all_parts]
    for view in held:
        torch.frombuffer(view, dtype=torch.float32).fill_(1.0)
    load(made, mine, held, range(96, 128))
    assert all(not tensor[8].any() for tensor in mine)
    assert all(bool((tensor[1] == 1).all()) for tensor in mine)
    load(made, mine, held, range(64, 128))
    assert all(bool((tensor[8] == 1).all()) for tensor in mine)
    assert all(not tensor[page].any() for tensor in mine for page in (0, 2, 3, 4, 5, 6, 7))


@pytest.mark.parametrize("memory", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
def test_all_layouts_of_vllm_on_a_gpu_map_by_strides(memory: str) -> None:
    """vLLM names them by the axes layer, block, head, token (N) and channel, outermost first."""
    made = layout()
    sizes = {"L": LAYERS, "B": 9, "H": HEADS, "N": PAGE, "C": 2 * DIM}
    whole = torch.zeros([sizes[axis] for axis in memory])
    mine = list(whole.permute([memory.index(axis) for axis in "LBHNC"]))
    kv = torch.randn(LAYERS, 2, made.model.block_tokens, HEADS, DIM)
    slots = [memoryview(bytearray(kv.numpy().tobytes()))]
    pages = StridedPages(made, mine, range(LAYERS), range(HEADS))
    pages.start_load([[5, 3, 8, 1]], [(1, slots)], range(64, 128), after=pages.now()).finish()
    for layer, tensor in enumerate(mine):
        keys_values = tensor[[8, 1]].transpose(1, 2).reshape(-1, HEADS, 2, DIM)
        assert torch.equal(keys_values.permute(2, 0, 1, 3), kv[layer])
        assert not tensor[[0, 2, 3, 4, 5, 6, 7]].any()
    back = slots_of(pages, made)  # type: ignore[arg-type]
    pages.start_save([[5, 3, 8, 1]], [(1, back)]).finish()
    assert back[0] == slots[0]


def test_an_order_that_strides_do_not_describe_is_refused() -> None:
    with pytest.raises(ConfigError, match="strides do not describe"):
        PackedPages(
            layout(),
            tensors(),
            range(LAYERS),
            range(HEADS),
            write=kernel(scattered, plain),
            key_dtype=torch.float32,
        )


def test_blocks_that_pages_neither_divide_nor_hold_are_refused() -> None:
    mine = [torch.zeros(4, HEADS, 48, 2 * DIM) for _ in range(LAYERS)]

    def write(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
        flat = tensor.view(*tensor.shape[:2], 2, 48, DIM)
        for number, slot in enumerate(slots.tolist()):
            flat[slot // 48, :, 0, slot % 48] = keys[number]
            flat[slot // 48, :, 1, slot % 48] = values[number]

    with pytest.raises(ConfigError, match="one must divide the other"):
        PackedPages(layout(), mine, range(LAYERS), range(HEADS), write=write, key_dtype=torch.float32)


def test_a_kernel_that_loses_bytes_fails_its_trial() -> None:
    write = kernel(turned, plain)

    def lossy(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
        write(keys.round(decimals=1), values, tensor, slots)

    with pytest.raises(ConfigError, match="do not hold what its kernel wrote"):
        PackedPages(layout(), tensors(), range(LAYERS), range(HEADS), write=lossy, key_dtype=torch.float32)
