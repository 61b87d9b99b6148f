# SPDX-License-Identifier: Apache-2.0
"""The streaming copy equals numpy's assignment, to the byte and to the border."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.copying import MIN_BYTES, Shape, assign, compute_team, copy_bytes, copy_places
from kvstore.native import is_built


def test_the_native_copy_is_built_here() -> None:
    assert is_built(), "kvstore._native is missing: is there a C compiler? run `make venv` again"


@given(lead=st.integers(0, 200), tail=st.integers(0, 200), extra=st.integers(0, 300), shift=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_any_alignment_and_length_copies_exactly_and_nothing_beyond(
    lead: int, tail: int, extra: int, shift: int
) -> None:
    size = MIN_BYTES + extra
    source = np.random.default_rng(0).integers(0, 256, size + shift, np.uint8)
    into = np.full(lead + size + tail, 7, np.uint8)
    assign(into[lead : lead + size], source[shift:])
    assert np.array_equal(into[lead : lead + size], source[shift:])
    assert (into[:lead] == 7).all()
    assert (into[lead + size :] == 7).all()


@pytest.mark.parametrize("row", [1, 7, 100, 256, 333, 4096])
@pytest.mark.parametrize("flip", [False, True])
def test_strided_axes_copy_like_numpy(row: int, flip: bool) -> None:
    rng = np.random.default_rng(row)
    count = MIN_BYTES // row // 12 + 1
    source = rng.integers(0, 256, (2, count + 3, 3, 2, row + 5), np.uint8)[:, 1:-2, :, :, 2:-3].transpose(1, 0, 3, 2, 4)
    into = np.zeros((count, 2, 2, 3, row + 9), np.uint8)
    expected = into.copy()
    target, wanted = into[..., 4:-5], expected[..., 4:-5]
    if flip:
        target, wanted, source = target[::-1], wanted[::-1], source[:, ::-1]
    wanted[...] = source
    assign(target, source)
    assert np.array_equal(into, expected)


@given(
    item=st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]),
    across=st.integers(1, 80),
    down=st.integers(1, 40),
    shift=st.sampled_from([0, 64, 1, 8]),
    gap=st.sampled_from([0, 64, 3]),
)
@settings(max_examples=300, deadline=None)
def test_turned_elements_copy_like_numpy_and_nothing_beyond(
    item: type[np.unsignedinteger[npt.NBitBase]], across: int, down: int, shift: int, gap: int
) -> None:
    """[heads, down, across] from [across, heads, down]: elements in a row here are far apart there."""
    num_heads = 2
    size = np.dtype(item).itemsize
    rng = np.random.default_rng(across * down)
    source = rng.integers(1, 200, (across, num_heads, down)).astype(item)
    memory = np.zeros(num_heads * down * (across + gap) * size + 1024, np.uint8)
    start = -memory.ctypes.data % 64 + shift * size
    whole = memory[start : start + num_heads * down * (across + gap) * size].view(item)
    into = whole.reshape(num_heads, down, across + gap)[:, :, :across]
    expected = memory.copy()
    wanted = expected[start : start + num_heads * down * (across + gap) * size].view(item)
    wanted.reshape(num_heads, down, across + gap)[:, :, :across] = source.transpose(1, 2, 0)
    axes = list(zip(into.shape, into.strides, source.transpose(1, 2, 0).strides, strict=True))
    shape = Shape.of(axes, size)
    copy_places([into.ctypes.data], [source.ctypes.data], shape)
    assert np.array_equal(memory, expected)
    back = np.zeros_like(source)
    copy_places([back.ctypes.data], [into.ctypes.data], shape.turned())
    assert np.array_equal(back, source)


def test_arrays_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot copy"):
        assign(np.zeros(4, np.uint8), np.zeros(5, np.uint8))
    frozen = np.frombuffer(bytes(4), np.uint8)
    with pytest.raises(ValueError, match="read-only"):
        assign(frozen, np.zeros(4, np.uint8))


def test_bytes_copy_between_views() -> None:
    source = np.random.default_rng(1).bytes(MIN_BYTES * 3)
    into = bytearray(len(source))
    copy_bytes(memoryview(into), memoryview(source))
    assert into == source


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("num_places", [1, 2, 37])
@pytest.mark.parametrize("turned", [False, True])
def test_a_team_of_the_threads_that_torch_computes_with_copies_what_one_thread_does(
    num_places: int, turned: bool
) -> None:
    rng = np.random.default_rng(num_places)
    source = rng.integers(1, 200, (num_places, 64, 1024)).astype(np.uint16)
    if turned:
        into = np.zeros((num_places, 1024, 64), np.uint16)
        axes = [(64, 2, 2048), (1024, 128, 2)]
    else:
        into = np.zeros((num_places, 64, 1024), np.uint16)
        axes = [(64, 2048, 2048), (1024, 2, 2)]
    shape = Shape.of(axes, 2)
    copy_places([each.ctypes.data for each in into], [each.ctypes.data for each in source], shape, team=compute_team())
    assert np.array_equal(into, source.transpose(0, 2, 1) if turned else source)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as torch computes with, so that there is a team of them."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.rand(1 << 20).sum()
    yield
    torch.set_num_threads(before)


def test_torch_has_a_team_here() -> None:
    pytest.importorskip("torch")
    assert compute_team().value
