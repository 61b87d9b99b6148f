# SPDX-License-Identifier: Apache-2.0
"""Copy engines: the same rows as the CPU's, and the driver's call as its header has it."""

from __future__ import annotations

import ctypes

import pytest

pytest.importorskip("torch", reason="copy engines go through torch")

import numpy as np
import torch

from kvstore.copy_engine import BatchCopies, CopyEngine, HostCopies, engine_of, reads_host_memory


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


class Driver:
    def __init__(self) -> None:
        self.cuMemcpyBatchAsync = Call()


def rows(engine: CopyEngine, *, to_host: bool) -> tuple[bool, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    source = np.random.default_rng(1).integers(0, 256, (12, 64), np.uint8)
    into = np.zeros((20, 64), np.uint8)
    places = np.array([19, 0, 7, 3], np.int64)
    taken = np.array([4, 11, 0, 2], np.int64)
    engine.copy(into.ctypes.data + places * 64, source.ctypes.data + taken * 64, 64, to_host=to_host)
    return bool((into[places] == source[taken]).all()) and int((into != 0).any(1).sum()) == 4, into


@pytest.mark.parametrize("to_host", [True, False])
def test_rows_go_where_they_belong(to_host: bool) -> None:
    assert rows(HostCopies(), to_host=to_host)[0]
    driver = Driver()
    assert rows(BatchCopies(driver, lambda: 77), to_host=to_host)[0]
    # count; in stream order; no hints, no flags; one set of attributes, from the first row on; the stream
    assert driver.cuMemcpyBatchAsync.seen == [(4, 1, 0, 0, 0, 0, 0, 0, 1, 77)]


def test_a_refused_batch_is_an_error_that_names_the_row() -> None:
    driver = Driver()
    driver.cuMemcpyBatchAsync.error = 1
    with pytest.raises(RuntimeError, match="4 rows of 64 bytes failed: CUDA error 1, row 2"):
        rows(BatchCopies(driver, lambda: 77), to_host=True)


def test_a_driver_without_the_call_has_no_batches() -> None:
    with pytest.raises(AttributeError):
        BatchCopies(object())


def test_the_cpu_needs_no_driver() -> None:
    assert isinstance(engine_of(torch.device("cpu")), HostCopies)
    assert reads_host_memory(torch.device("cpu"))
