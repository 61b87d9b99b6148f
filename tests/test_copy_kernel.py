# SPDX-License-Identifier: Apache-2.0
"""The copy kernel compiles for a device that is not here, with sixteen bytes an access; shapes are merged exactly."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the kernel is launched on torch tensors")

import numpy as np
import torch

from kvstore import copy_kernel
from kvstore.copy_kernel import PieceShape, Places, copy_pieces
from tests.compiled import compiled

_MAP_NORESERVE = 0x4000  # of Linux; Python has it from 3.13 on

NEEDS_TRITON = pytest.mark.skipif(not copy_kernel.HAS_TRITON, reason="NOT TESTED HERE: triton is not installed")


@pytest.mark.parametrize(
    ("sizes", "steps", "merged", "row_bytes"),
    [
        ((16, 8, 128), (2048, 256, 2), ((1, 1, 16384), (0, 0, 2)), 32768),  # token, head, dim without gaps
        ((16, 8, 128), (256, 4096, 2), ((16, 8, 128), (256, 4096, 2)), 256),  # heads before tokens
        ((16, 8, 128), (4096, 256, 2), ((1, 16, 1024), (0, 4096, 2)), 2048),  # keys beside values
        ((16, 1, 576), (1152, 7, 2), ((1, 1, 9216), (0, 0, 2)), 18432),  # a latent has one head
        ((1, 1, 1), (5, 5, 5), ((1, 1, 1), (0, 0, 2)), 2),
        ((4, 4, 8), (128, 32, 4), ((1, 1, 128), (0, 0, 4)), 2),  # every other element
    ],
)
def test_axes_without_gaps_become_one(
    sizes: tuple[int, ...], steps: tuple[int, ...], merged: tuple[tuple[int, ...], ...], row_bytes: int
) -> None:
    shape = PieceShape.of(sizes, steps, 2)
    assert (shape.sizes, shape.steps) == merged
    assert shape.row_bytes == row_bytes


def test_words_are_as_wide_as_everything_they_must_divide() -> None:
    whole = PieceShape.of((16, 8, 128), (2048, 256, 2), 2)
    assert whole.word_bytes(4096, 32768) == 8
    assert whole.word_bytes(4098) == 2
    assert PieceShape.of((4, 1, 37), (74, 0, 2), 2).word_bytes(4096) == 8
    assert PieceShape.of((4, 1, 37), (80, 0, 2), 2).word_bytes(4096) == 2
    assert PieceShape.of((4, 4, 8), (128, 32, 4), 2).word_bytes(4096) == 2


_ARCHS = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]
_PIECES = {
    "tokens before heads": PieceShape.of((16, 8, 128), (2048, 256, 2), 2),
    "heads before tokens": PieceShape.of((64, 8, 128), (256, 256 * 65792, 2), 2),
    "keys beside values": PieceShape.of((16, 8, 128), (512, 512 * 16, 2), 2),
    "a latent": PieceShape.of((64, 1, 576), (1152, 0, 2), 2),
    "fp8": PieceShape.of((16, 8, 128), (1024, 128, 1), 1),
    "an odd width": PieceShape.of((16, 1, 37), (74, 0, 2), 2),
    "far apart": PieceShape.of((64, 8, 128), (256, 4 << 30, 2), 2),
}


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore")  # Triton's own
@pytest.mark.parametrize("arch", _ARCHS)
@pytest.mark.parametrize("to_slots", [True, False])
@pytest.mark.parametrize(("tabled", "grouped"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("name", _PIECES)
def test_it_compiles_with_accesses_of_sixteen_bytes_and_spills_nothing(
    name: str, tabled: bool, grouped: bool, to_slots: bool, arch: int, tmp_path: Path
) -> None:
    shape = _PIECES[name]
    made = copy_kernel._launch(shape, 16, 4 * shape.num_bytes, 4, tabled=tabled, grouped=grouped, to_slots=to_slots)
    numbers = (
        1 << 46,
        1 << 46,
        (1 << 46) * grouped,
        1 << 46,
        0,
        1 << 20,
        64,
        made.chunks,
        4 * shape.num_bytes,
        shape.num_bytes,
        *made.steps,
    )
    named = dict(zip(copy_kernel._NUMBERS, numbers, strict=True))
    found = compiled(copy_kernel._copy, named, made.constants, arch, tmp_path)
    assert made.constants["FAR"] == (name == "far apart")
    assert found.spilled_bytes == 0
    if name == "an odd width":  # its pieces are multiples of eight bytes alone
        assert set(found.accesses) == {"ld.global.b64", "st.global.b64"}
    else:  # loads of the tables are one word each; all that moves KV is two words wide
        assert found.accesses["ld.global.b64"] == 2 + tabled + grouped
        assert set(found.accesses) == {"ld.global.b64", "ld.global.v2.b64", "st.global.v2.b64"}


@NEEDS_TRITON
@pytest.mark.parametrize("to_slots", [True, False])
def test_heads_may_lie_further_apart_than_32_bits_count(to_slots: bool) -> None:
    """Three heads, two gibibytes apart, in words of two bytes: the last is 2³¹ words after the first."""
    gib, row_bytes = 1 << 30, 6
    # Never touched but in a few places. Who counts in 32 bits finds himself before the plane, in the same memory.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    whole = np.frombuffer(mmap.mmap(-1, 9 * gib, flags=flags), np.uint8)
    plane, slot = whole[4 * gib :], np.arange(1, 1 + 3 * row_bytes, dtype=np.uint8)
    rows = [plane[at * 2 * gib :][:row_bytes] for at in range(3)]
    if to_slots:
        for at, row in enumerate(rows):
            row[:] = slot[at * row_bytes :][:row_bytes]
        slot = np.zeros_like(slot)
    table = np.array([plane.ctypes.data, 0], np.int64)
    at = table.ctypes.data
    shape = PieceShape.of((1, 3, 3), (0, 2 * gib, 2), 2)
    places = Places(at, 1, at + 8, 1, 1, slot.ctypes.data, slot.nbytes, 2)
    copy_pieces(places, shape, torch.device("cpu"), plane_bytes=slot.nbytes, to_slots=to_slots)
    assert slot.tolist() == list(range(1, 1 + 3 * row_bytes))
    assert [row.tolist() for row in rows] == slot.reshape(3, row_bytes).tolist()


@NEEDS_TRITON
@pytest.mark.parametrize("to_slots", [True, False])
def test_a_cache_that_has_grown_needs_no_kernel_of_its_own(to_slots: bool) -> None:
    """Each would be a second of compiling, in the middle of a request."""
    launches = [
        copy_kernel._launch(
            PieceShape.of((64, 8, 128), (256, 256 * capacity, 2), 2),
            16,
            131072,
            1,
            tabled=False,
            grouped=False,
            to_slots=to_slots,
        )
        for capacity in (256, 2048, 65792)
    ]
    assert launches[0].constants == launches[1].constants == launches[2].constants
    assert [made.steps for made in launches] == [(16, 256 * capacity // 16) for capacity in (256, 2048, 65792)]
