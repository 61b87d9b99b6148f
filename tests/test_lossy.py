# SPDX-License-Identifier: Apache-2.0
"""Lossy formats: bounded errors, bytes as written down, and an identity that exact blocks never meet."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="the formats are torch operations")

import torch

from kvstore.block import Chain, ModelId, Root
from kvstore.errors import ConfigError
from kvstore.layout import PACKED, engine_dtype, layout_of
from kvstore.lossy import FORMATS, drift
from tests.devices import DEVICES
from tests.devices import test_all_of_this_module_ran_on_cuda_too as test_all_of_this_module_ran_on_cuda_too

EXACT = ModelId(model="m", revision="r", kv_dtype="bfloat16", num_layers=3, num_kv_heads=2, head_dim=32, block_tokens=4)
SHAPE = (3, 2, 4, 2, 32)


def values(*, blocks: int = 5, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Heads of very different size, as keys have them."""
    made = torch.randn(blocks, *SHAPE, generator=torch.Generator().manual_seed(3))
    return (made * torch.tensor([0.01, 40.0])[:, None]).to(dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_a_lossy_namespace_shares_no_identity_with_an_exact_one(name: str) -> None:
    lossy = replace(EXACT, kv_dtype=f"bfloat16+{name}")
    others = [EXACT, replace(EXACT, kv_dtype="float8_e4m3fn"), replace(EXACT, kv_dtype=f"float16+{name}")]
    others += [replace(EXACT, kv_dtype=f"bfloat16+{other}") for other in FORMATS if other != name]
    for other in others:
        assert Root(lossy).id != Root(other).id
        assert layout_of(lossy).fingerprint != layout_of(other).fingerprint
        assert not set(Chain(Root(lossy), range(16)).ids) & set(Chain(Root(other), range(16)).ids)
    assert engine_dtype(lossy.kv_dtype) == "bfloat16"


def test_every_format_of_the_layout_is_there_and_no_other() -> None:
    assert set(FORMATS) == set(PACKED)


@pytest.mark.parametrize("dtype", ["bfloat16+fp4", "float32+fp8", "uint8+fp8", "+fp8", "bfloat16+"])
def test_formats_that_nobody_defined_are_refused_by_name(dtype: str) -> None:
    with pytest.raises(ConfigError, match="kv_dtype is .*: use one of .*bfloat16.fp8"):
        layout_of(replace(EXACT, kv_dtype=dtype))


def test_nvfp4_refuses_a_head_that_does_not_divide_into_its_groups() -> None:
    with pytest.raises(ConfigError, match="head_dim is 24: nvfp4 takes multiples of 16"):
        layout_of(replace(EXACT, kv_dtype="bfloat16+nvfp4", head_dim=24))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "rms", "worst"), [("fp8", 0.04, 1 / 16), ("nvfp4", 0.14, 0.25)])
def test_the_error_stays_within_what_the_format_can_do(name: str, rms: float, worst: float, device: str) -> None:
    """e4m3 has 3 bits after the leading one: half a step is 1/16. e2m1 has one: 1/6 of the top and more below."""
    made = values().to(device)
    for head in range(2):
        found = drift(made[..., head : head + 1, :], name)
        assert 0 < found.relative_rms < rms
        assert found.max_over_amax < worst


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_layout_layer_after_layer(name: str) -> None:
    layout = layout_of(replace(EXACT, kv_dtype=f"bfloat16+{name}"))
    made = values()
    raw = FORMATS[name].encode(made)
    assert raw.shape == (5, 3, layout.layer_bytes(2))
    assert raw[0].numel() == layout.block_bytes == layout.parts[0].num_bytes
    assert layout.block_bytes < 0.52 * layout_of(EXACT).block_bytes
    assert torch.equal(FORMATS[name].encode(made[:, 1:2]), raw[:, 1:2])


@pytest.mark.parametrize("name", FORMATS)
def test_a_head_does_not_feel_another_heads_scale(name: str) -> None:
    made = values()
    louder = made.clone()
    louder[..., 1, :] *= 64
    decode, encode = FORMATS[name].decode, FORMATS[name].encode
    quiet = [decode(encode(each), SHAPE, torch.bfloat16)[..., 0, :] for each in (made, louder)]
    assert torch.equal(*quiet)


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_decoded_once_survives_further_rounds_unchanged(name: str) -> None:
    """A block that is loaded and saved again must not wear out."""
    form = FORMATS[name]
    once = form.decode(form.encode(values(dtype=torch.float32)), SHAPE, torch.float32)
    again = form.decode(form.encode(once), SHAPE, torch.float32)
    assert torch.allclose(once, again, rtol=1e-5 if name == "fp8" else 0.07, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_nans_and_infinities_do_not_spoil_their_neighbours(name: str) -> None:
    form = FORMATS[name]
    odd = values()
    odd[0] = 0
    odd[1, 0, 0, 0, 0, 0] = torch.nan
    odd[1, 0, 0, 0, 0, 1] = -torch.inf
    back = form.decode(form.encode(odd), SHAPE, torch.bfloat16)
    assert back.isfinite().all()
    assert (back[0] == 0).all()
    assert back[1, 0, 0, 0, 0, 0] == 0
    assert back[1, 0, 0, 0, 0, 1] < 0
    assert torch.equal(back[2:], form.decode(form.encode(odd[2:]), SHAPE, torch.bfloat16))


def test_fp8_is_what_torch_rounds_to_times_a_scale() -> None:
    made = torch.zeros(1, 1, 1, 2, 1, 2)
    made.view(-1)[:] = torch.tensor([448.0, -1.0, 0.3, 17.0])
    raw = FORMATS["fp8"].encode(made)
    assert raw[0, 0, :4].tolist() == made.view(-1).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    assert raw[0, 0, 4:].clone().view(torch.float32).item() == 1.0


def test_nvfp4_codes_lie_two_a_byte_with_ties_to_even() -> None:
    made = torch.zeros(1, 1, 1, 1, 1, 16)
    # With 6 × 448 as the largest value of the head and 6 × 448 of this group, one unit of e2m1 is 448.
    units = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -6, -0.5, -1, -1.5, -2, -3, -4, 0.24])
    made.view(-1)[:] = units * 448
    raw = FORMATS["nvfp4"].encode(made)[0, 0]
    codes = [half for byte in raw[:8].tolist() for half in (byte & 15, byte >> 4)]
    assert codes == [7, 0, 2, 2, 4, 4, 6, 6, 15, 9, 10, 11, 12, 13, 14, 0]
    assert raw[8:9].view(torch.float8_e4m3fn).float().item() == 448
    assert raw[9:].clone().view(torch.float32).item() == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED HERE: no CUDA device")
@pytest.mark.parametrize("name", FORMATS)
def test_a_device_packs_the_same_bytes_as_the_cpu(name: str) -> None:
    made = values()
    assert torch.equal(FORMATS[name].encode(made.cuda()).cpu(), FORMATS[name].encode(made))
