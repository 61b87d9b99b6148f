# SPDX-License-Identifier: Apache-2.0
"""The copy kernel compiles for a device that is not here, with sixteen bytes an access; shapes are merged exactly."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the kernel is launched on torch tensors")

from kvstore import copy_kernel
from kvstore.copy_kernel import PieceShape

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


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore")  # Triton's own
@pytest.mark.parametrize("to_slots", [True, False])
@pytest.mark.parametrize("tabled", [True, False])
@pytest.mark.parametrize(("size0", "size1", "size2"), [(1, 1, 4096), (16, 8, 32)])
def test_it_compiles_for_hopper_with_wide_accesses(
    tabled: bool, to_slots: bool, size0: int, size1: int, size2: int
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton.JITFunction(copy_kernel._copy)
    constants = {
        "PIECES": 4, "SIZE0": size0, "SIZE1": size1, "SIZE2": size2, "STEP2": 1, "WORDS": 4096, "WORD_BYTES": 8,
        "ALIGN": 16, "BLOCK": 2048, "TABLED": tabled, "TO_SLOTS": to_slots,
    }  # fmt: skip
    source = ASTSource(
        fn=kernel,
        signature={
            **{name: "i64" if name in ("planes", "pages", "slots") else "i32" for name in copy_kernel._NUMBERS},
            **dict.fromkeys(constants, "constexpr"),
        },
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    ptx = made.asm["ptx"]
    # Loads of the tables are one word each; all that moves KV is two words wide.
    assert ptx.count("ld.global.b64") == 2 + tabled
    assert "ld.global.v2.b64" in ptx
    assert "st.global.v2.b64" in ptx
    assert "st.global.b64" not in ptx


@NEEDS_TRITON
@pytest.mark.parametrize("to_slots", [True, False])
def test_a_cache_that_has_grown_needs_no_kernel_of_its_own(to_slots: bool) -> None:
    """Each would be a second of compiling, in the middle of a request."""
    launches = [
        copy_kernel._launch(PieceShape.of((64, 8, 128), (256, 256 * capacity, 2), 2), 16, 131072, 1, False, to_slots)
        for capacity in (256, 2048, 65792)
    ]
    assert launches[0].constants == launches[1].constants == launches[2].constants
    assert [made.steps for made in launches] == [(16, 256 * capacity // 16) for capacity in (256, 2048, 65792)]
