# SPDX-License-Identifier: Apache-2.0
"""Copy engines: the same rows as the CPU's, and the driver's call as its header has it."""

from __future__ import annotations

import ctypes

import pytest

pytest.importorskip("torch", reason="copy engines go through torch")

import numpy as np
import torch

from kvstore.copy_engine import BatchCopies, CopyEngine, HostCopies, TorchCopies, engine_of, fault
from tests.devices import DEVICES
from tests.devices import test_all_of_this_module_ran_on_cuda_too as test_all_of_this_module_ran_on_cuda_too


class Call:
    """Stands for cuMemcpyBatchAsync, reading its arguments as C would."""

    argtypes: tuple[type, ...] = ()
    restype: type | None = None

    def __init__(self) -> None:
        self.error = self.shift = 0
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
            ctypes.memmove(to + self.shift, source, size - self.shift)
        return 0


class Driver:
    def __init__(self) -> None:
        self.cuMemcpyBatchAsync = Call()


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


@pytest.mark.parametrize("to_host", [True, False])
def test_copies_go_where_they_belong(to_host: bool) -> None:
    assert rows(HostCopies(), to_host=to_host)
    driver = Driver()
    assert rows(BatchCopies(driver, lambda: 77), to_host=to_host)
    # count; in stream order; no hints, no flags; one set of attributes, from the first row on; the stream
    assert driver.cuMemcpyBatchAsync.seen == [(4, 1, 0, 0, 0, 0, 0, 0, 1, 77)]


def test_a_refused_batch_is_an_error_that_names_the_copy() -> None:
    driver = Driver()
    driver.cuMemcpyBatchAsync.error = 1
    with pytest.raises(RuntimeError, match="of 4 copies failed: CUDA error 1, copy 2"):
        rows(BatchCopies(driver, lambda: 77), to_host=True)


def test_nothing_is_asked_of_the_driver_for_no_copies() -> None:
    none = np.zeros(0, np.int64)
    driver = Driver()
    BatchCopies(driver, lambda: 77).copy(none, none, none, to_host=True)
    assert not driver.cuMemcpyBatchAsync.seen


def test_a_driver_without_the_call_has_no_batches() -> None:
    with pytest.raises(AttributeError):
        BatchCopies(object())


def test_a_driver_that_has_the_call_and_refuses_it_costs_time_and_no_copy(caplog: pytest.LogCaptureFixture) -> None:
    refusing, beside = Driver(), Driver()
    refusing.cuMemcpyBatchAsync.error = 801
    beside.cuMemcpyBatchAsync.shift = 1
    cpu = torch.device("cpu")
    assert fault(BatchCopies(Driver(), lambda: 77), cpu) == ""
    assert fault(BatchCopies(beside, lambda: 77), cpu) == "it copied other bytes than it was given"
    with caplog.at_level("WARNING"):
        meta = torch.device("meta")  # a device that is not the CPU, whose memory nobody can read
        assert isinstance(engine_of(meta, lambda: BatchCopies(refusing, lambda: 77)), TorchCopies)
    assert "CUDA error 801" in caplog.text


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_chosen_here_is_quick_and_works(device: str) -> None:
    chosen = engine_of(torch.device(device))
    assert not isinstance(chosen, TorchCopies)
    assert fault(chosen, torch.device(device)) == ""


def test_the_cpu_needs_no_driver() -> None:
    assert isinstance(engine_of(torch.device("cpu")), HostCopies)
