# SPDX-License-Identifier: Apache-2.0
"""fp8 blocks unpacked into pages by one kernel: what torch decodes, bit for bit, and nothing beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the kernel is launched on torch tensors")

import torch

from kvstore import copy_kernel, unpack_kernel
from kvstore.block import ModelId
from kvstore.copy_windows import Window
from kvstore.device_copy import Way
from kvstore.layout import layout_of
from kvstore.lossy import FORMATS
from kvstore.transfer import PageCopier, PagedKV
from tests.compiled import compiled
from tests.devices import DEVICES
from tests.devices import test_all_of_this_module_ran_on_cuda_too as test_all_of_this_module_ran_on_cuda_too

pytestmark = pytest.mark.skipif(not copy_kernel.HAS_TRITON, reason="NOT TESTED HERE: triton is not installed")

LAYERS, PAGES = 2, 6
AXES = {
    "nhd": "kv page token head dim",
    "hnd": "kv page head token dim",
    "fused": "page token head kv dim",
    "dim_first": "page kv head dim token",
}


def identity(*, tokens: int = 16, heads: int = 4, dim: int = 32, dtype: str = "bfloat16", kv: int = 2) -> ModelId:
    return ModelId(
        model="m", revision="r", kv_dtype=f"{dtype}+fp8", num_layers=LAYERS, num_kv_heads=heads, head_dim=dim,
        num_kv=kv, block_tokens=tokens,
    )  # fmt: skip


def pages_of(model: ModelId, page: int, axes: str, device: str) -> PagedKV:
    sizes = {"kv": 2, "page": PAGES, "token": page, "head": model.num_kv_heads, "dim": model.head_dim}
    dtype = getattr(torch, model.kv_dtype.partition("+")[0])
    shape = [sizes[name] for name in axes.split() if model.num_kv == 2 or name in ("page", "token", "dim")]
    tensors = [torch.full(shape, 7.0, dtype=dtype, device=device) for _ in range(LAYERS)]
    return PagedKV.of(tensors, axes if model.num_kv == 2 else "page token dim")


def packed_blocks(model: ModelId, number: int) -> list[list[memoryview | None]]:
    """Of every part, every code but NaN, under scales of which no two are alike."""
    made: list[list[memoryview | None]] = []
    for _ in range(number):
        slots: list[memoryview | None] = []
        for part in layout_of(model).parts:
            _, kv, tokens, heads, dim = part.shape
            raw = torch.randint(0, 256, (LAYERS, kv * tokens * heads * dim), dtype=torch.uint8)
            raw[raw & 127 == 127] = 8
            scales = torch.rand(LAYERS, kv * heads) * torch.logspace(-9, 1.5, kv * heads)
            whole = torch.cat((raw, scales.view(torch.uint8)), dim=-1)
            slots.append(memoryview(bytearray(whole.numpy().tobytes())))
        made.append(slots)
    return made


def scattered(model: ModelId, page: int, axes: str, way: Way, device: str, blocks: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(5)
    kv = pages_of(model, page, axes, device)
    copier = PageCopier(layout_of(model), kv, way=way)
    copier._by_address = False
    full = [4, 1, 5, 0, 2][: -(-(1 + blocks) * model.block_tokens // page)]
    copier.scatter(full, list(enumerate(packed_blocks(model, blocks))))
    if way is Way.STAGED:
        assert len(copier._on_device()._unpack) == len(layout_of(model).parts)
    return [plane.cpu().contiguous().view(torch.int16) for layer in kv.planes for plane in layer]


@pytest.mark.slow  # on the CPU the kernel is interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize(
    ("tokens", "page", "heads", "dim", "part_heads"),
    [(16, 16, 4, 32, 0), (32, 16, 2, 128, 1), (16, 64, 4, 80, 2), (64, 256, 2, 64, 0), (128, 64, 1, 192, 0)],
)
def test_pages_hold_what_torch_decodes(
    tokens: int, page: int, heads: int, dim: int, part_heads: int, axes: str, dtype: str, device: str
) -> None:
    model = replace(identity(tokens=tokens, heads=heads, dim=dim, dtype=dtype), part_heads=part_heads)
    blocks = 3 if page < 128 else 2
    got = scattered(model, page, axes, Way.STAGED, device, blocks=min(blocks, PAGES * page // tokens - 1, 2))
    wanted = scattered(model, page, axes, Way.INDEX, "cpu", blocks=min(blocks, PAGES * page // tokens - 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert any((plane != torch.tensor(7.0, dtype=getattr(torch, dtype)).view(torch.int16)).any() for plane in got)


@pytest.mark.parametrize("device", DEVICES)
def test_a_latent_of_an_odd_width_is_unpacked_too(device: str) -> None:
    model = identity(heads=1, dim=36, kv=1)
    got, wanted = (scattered(model, 16, "page token dim", way, device, 1) for way in (Way.STAGED, Way.INDEX))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_every_head_is_scaled_by_its_own_number(device: str) -> None:
    """Codes of one value under scales 1, 2, 4, …: what a page then holds names the scale that was taken."""
    model = identity(heads=4, dim=16)
    kv = pages_of(model, 16, AXES["nhd"], device)
    one = torch.ones(2 * 16 * 4 * 16).to(torch.float8_e4m3fn).view(torch.uint8)
    layers = [torch.cat((one, (2.0 ** torch.arange(8 * at, 8 * at + 8)).view(torch.uint8))) for at in range(LAYERS)]
    copier = PageCopier(layout_of(model), kv, way=Way.STAGED)
    copier._by_address = False
    copier.scatter([3], [(0, [memoryview(bytearray(torch.cat(layers).numpy().tobytes()))])])
    found = [
        sorted(set(plane[3, :, head].flatten().tolist())) for layer in kv.planes for plane in layer for head in range(4)
    ]
    assert found == [[2.0**number] for number in range(8 * LAYERS)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_window_of_a_load_is_as_large_as_a_stage_in_packed_bytes(device: str) -> None:
    """And the launches of several windows, from a layer or a block in their middle, write what one would."""
    model = identity(dim=16)
    layout = layout_of(model)
    launched: list[tuple[int, int, int]] = []

    class Watched(unpack_kernel.Unpacking):
        def launch(self, window: Window, slots: int) -> None:
            launched.append((window.low, window.first, window.stop))
            super().launch(window, slots)

    blocks = list(enumerate(packed_blocks(model, 5)))
    kv, other = (pages_of(model, 16, AXES["hnd"], at) for at in (device, "cpu"))
    copier = PageCopier(layout, kv, way=Way.STAGED)
    copier._by_address = False
    made = copier._on_device()
    made._stage_bytes = layout.block_bytes // 2  # by layers twice as much: one layer of two blocks
    made._unpack = {part: Watched(part) for part in made._unpack}
    copier.start_scatter([4, 1, 5, 0, 2], blocks, step_layers=1).finish()
    PageCopier(layout, other).scatter([4, 1, 5, 0, 2], blocks)
    assert launched == [(low, first, min(first + 2, 5)) for low in (0, 1) for first in (0, 2, 4)]
    for layer, same in zip(kv.planes, other.planes, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(layer, same, strict=True))


def test_scales_at_odd_places_are_left_to_torch() -> None:
    model = identity(tokens=2, heads=1, dim=37, kv=1)
    kv = pages_of(model, 2, "page token dim", "cpu")
    copier = PageCopier(layout_of(model), kv, way=Way.STAGED)
    copier._by_address = False
    assert not copier._on_device()._unpack
    [[slot]] = packed_blocks(model, 1)
    copier.scatter([3], [(0, [slot])])
    raw = torch.frombuffer(slot, dtype=torch.uint8).view(1, LAYERS, -1)
    wanted = FORMATS["fp8"].decode(raw, (LAYERS, 1, 2, 1, 37), torch.bfloat16)
    assert torch.equal(torch.stack([layer[0][3] for layer in kv.planes]), wanted[0, :, 0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code_was_tried_before_the_kernel_is_used(dtype: torch.dtype, device: str) -> None:
    assert unpack_kernel.fault(torch.device(device), dtype) == ""


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_of_any_bits_stays_one(device: str) -> None:
    """CUDA's own has all of them set: rounded like a number, it would become a zero."""
    model = identity()
    kv = pages_of(model, 16, "kv page token head dim", device)
    copier = PageCopier(layout_of(model), kv, way=Way.STAGED)
    copier._by_address = False
    [[slot]] = packed_blocks(model, 1)
    assert slot is not None
    kv_bytes = 2 * 16 * 4 * 32
    slot[kv_bytes : kv_bytes + 4] = (0x7FFFFFFF).to_bytes(4, "little")  # the scale of layer 0, keys, head 0
    copier.scatter([3], [(0, [slot])])
    assert kv.planes[0][0][3][:, 0].isnan().all()
    assert not kv.planes[0][0][3][:, 1:].isnan().any()


def test_a_cache_that_has_grown_needs_no_kernel_of_its_own() -> None:
    """Each would be a second of compiling, in the middle of a request."""
    model = identity(tokens=16)
    made = []
    for tokens in (256, 2048):
        whole = torch.zeros(LAYERS, 2, 4, tokens, 32).bfloat16()
        copier = PageCopier(
            layout_of(model), PagedKV.of([whole], "layer kv head slot dim", page_tokens=16), way=Way.STAGED
        )
        made += copier._on_device()._unpack.values()
    assert made[0]._constants == made[1]._constants
    assert made[0]._steps != made[1]._steps


@pytest.mark.filterwarnings("ignore")  # Triton's own
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("axes", "page", "heads", "dim", "kv"),
    [("nhd", 16, 8, 128, 2), ("hnd", 64, 8, 128, 2), ("hnd", 16, 8, 80, 2), ("latent", 64, 1, 576, 1)],
)
def test_it_compiles_with_wide_accesses_and_spills_nothing(
    axes: str, page: int, heads: int, dim: int, kv: int, dtype: str, arch: int, tmp_path: Path
) -> None:
    model = identity(tokens=64, heads=heads, dim=dim, dtype=dtype, kv=kv)
    copier = PageCopier(
        layout_of(model), pages_of(model, page, AXES.get(axes, "page token dim"), "cpu"), way=Way.STAGED
    )
    copier._by_address = False
    (made,) = copier._on_device()._unpack.values()
    numbers = dict(zip(unpack_kernel._NUMBERS, (1 << 46, 1 << 46, 1 << 46, 1 << 20, 64, *made._steps), strict=True))
    found = compiled(unpack_kernel._unpack, numbers, made._keywords, arch, tmp_path)
    assert found.spilled_bytes == 0
    stores = {name for name in found.accesses if name.startswith("st.")}
    assert stores == {"st.global.v4.b32"}
    # The scales of one head are four bytes: what follows them lies at a multiple of four, and a warp's loads together.
    codes = "ld.global.b32" if axes == "latent" else "ld.global.v4.b32"
    assert found.accesses[codes]
    assert set(found.accesses) == {"ld.global.b64", "ld.global.b32", codes, *stores}
