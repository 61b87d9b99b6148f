# SPDX-License-Identifier: Apache-2.0
"""Copy engines: the same rows as the CPU's, and the driver's calls as its header has them."""

from __future__ import annotations

import ctypes

import pytest

pytest.importorskip("torch", reason="copy engines go through torch")

import numpy as np
import torch

from kvstore.copy_engine import BatchCopies, Box, CopyEngine, HostCopies, engine_of


class Call:
    """Stands for cuMemcpyBatchAsync, reading its arguments as C would."""

    argtypes: tuple[type, ...] = ()
    restype: type | None = None

    def __init__(self) -> None:
        self.error = 0
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, *arguments: int) -> int:
        assert len(arguments) == len(self.argtypes)
        into, sources, sizes, count, attributes, indices, num_attributes, failed, stream = arguments
        order, *rest = (ctypes.c_uint * 6).from_address(attributes)
        (first,) = (ctypes.c_size_t * 1).from_address(indices)
        self.seen.append((count, order, *rest, first, num_attributes, stream))
        if self.error:
            (ctypes.c_size_t * 1).from_address(failed)[0] = 2
            return self.error
        words = [(ctypes.c_uint64 * count).from_address(at) for at in (into, sources, sizes)]
        for to, source, size in zip(*words, strict=True):
            ctypes.memmove(to, source, size)
        return 0


class Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint), ("id", ctypes.c_int))


class Operand(ctypes.Structure):
    """CUmemcpy3DOperand; of its union the larger member, that of pointers."""

    _fields_ = (
        ("type", ctypes.c_uint),
        ("ptr", ctypes.c_ulonglong),
        ("row_length", ctypes.c_size_t),
        ("layer_height", ctypes.c_size_t),
        ("location", Location),
    )


class Operation(ctypes.Structure):
    """CUDA_MEMCPY3D_BATCH_OP, as cuda.h declares it."""

    _fields_ = (
        ("src", Operand),
        ("dst", Operand),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
        ("order", ctypes.c_uint),
        ("flags", ctypes.c_uint),
    )


class BoxCall:
    """Stands for cuMemcpy3DBatchAsync."""

    argtypes: tuple[type, ...] = ()
    restype: type | None = None

    def __init__(self) -> None:
        self.error = 0
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, count: int, operations: int, failed: int, flags: int, stream: int) -> int:
        assert len(self.argtypes) == 5
        self.seen.append((count, flags, stream))
        if self.error:
            (ctypes.c_size_t * 1).from_address(failed)[0] = 1
            return self.error
        for one in (Operation * count).from_address(operations):
            assert (one.src.type, one.dst.type, one.order, one.flags, one.depth) == (1, 1, 1, 0, 1)
            assert (one.src.layer_height, one.dst.layer_height, one.src.location.type, one.dst.location.type) == (
                0,
            ) * 4
            for row in range(one.height):
                to, source = one.dst.ptr + row * one.dst.row_length, one.src.ptr + row * one.src.row_length
                ctypes.memmove(to, source, one.width)
        return 0


class Driver:
    def __init__(self) -> None:
        self.cuMemcpyBatchAsync = Call()
        self.cuMemcpy3DBatchAsync = BoxCall()


PLACES, TAKEN = np.array([19, 0, 7, 3], np.int64), np.array([4, 11, 0, 2], np.int64)


def rows(engine: CopyEngine, *, to_host: bool) -> bool:
    source = np.random.default_rng(1).integers(0, 256, (12, 64), np.uint8)
    into = np.zeros((20, 64), np.uint8)
    sizes = np.array([64, 64, 10, 64], np.int64)
    engine.copy(into.ctypes.data + PLACES * 64, source.ctypes.data + TAKEN * 64, sizes, to_host=to_host)
    wanted = np.zeros_like(into)
    for place, taken, size in zip(PLACES, TAKEN, sizes, strict=True):
        wanted[place, :size] = source[taken, :size]
    return bool((into == wanted).all())


def boxes(engine: CopyEngine, *, to_host: bool) -> bool:
    """Two boxes of three rows of 16 bytes: 64 bytes apart in `source`, 32 in `into`."""
    source = np.random.default_rng(1).integers(0, 256, (12, 64), np.uint8)
    into = np.zeros((20, 32), np.uint8)
    to = into.ctypes.data + np.array([10 * 32, 3], np.int64)
    engine.copy_boxes(to, source.ctypes.data + np.array([0, 5 * 64 + 8], np.int64), Box(3, 16, 32, 64), to_host=to_host)
    wanted = np.zeros_like(into)
    wanted[10:13, :16], wanted[0:3, 3:19] = source[0:3, :16], source[5:8, 8:24]
    return bool((into == wanted).all())


@pytest.mark.parametrize("to_host", [True, False])
def test_copies_go_where_they_belong(to_host: bool) -> None:
    assert rows(HostCopies(), to_host=to_host)
    driver = Driver()
    assert rows(BatchCopies(driver, lambda: 77), to_host=to_host)
    # count; in stream order; no hints, no flags; one set of attributes, from the first row on; the stream
    assert driver.cuMemcpyBatchAsync.seen == [(4, 1, 0, 0, 0, 0, 0, 0, 1, 77)]


@pytest.mark.parametrize("to_host", [True, False])
def test_boxes_go_where_they_belong(to_host: bool) -> None:
    assert boxes(HostCopies(), to_host=to_host)
    driver = Driver()
    assert boxes(BatchCopies(driver, lambda: 77), to_host=to_host)
    assert driver.cuMemcpy3DBatchAsync.seen == [(2, 0, 77)]


def test_a_refused_batch_is_an_error_that_names_the_copy() -> None:
    driver = Driver()
    driver.cuMemcpyBatchAsync.error = driver.cuMemcpy3DBatchAsync.error = 1
    with pytest.raises(RuntimeError, match="of 4 copies failed: CUDA error 1, copy 2"):
        rows(BatchCopies(driver, lambda: 77), to_host=True)
    with pytest.raises(RuntimeError, match=r"of 2 × Box.*row_bytes=16.* failed: CUDA error 1, copy 1"):
        boxes(BatchCopies(driver, lambda: 77), to_host=True)


def test_nothing_is_asked_of_the_driver_for_no_copies() -> None:
    none = np.zeros(0, np.int64)
    driver = Driver()
    BatchCopies(driver, lambda: 77).copy(none, none, none, to_host=True)
    BatchCopies(driver, lambda: 77).copy_boxes(none, none, Box(1, 1, 1, 1), to_host=True)
    assert not driver.cuMemcpyBatchAsync.seen
    assert not driver.cuMemcpy3DBatchAsync.seen


def test_a_driver_without_the_calls_has_no_batches() -> None:
    with pytest.raises(AttributeError):
        BatchCopies(object())


def test_the_cpu_needs_no_driver() -> None:
    assert isinstance(engine_of(torch.device("cpu")), HostCopies)
