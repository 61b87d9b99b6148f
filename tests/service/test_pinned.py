# SPDX-License-Identifier: Apache-2.0
"""A server's memory, registered with a client's device: once, in the background, and never after it is unmapped."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("torch", reason="pinning goes through torch")

from kvstore.api import LendsMemory, Registration
from kvstore.block import Root
from kvstore.pinning import PINNED, Pinned, pin
from kvstore.service.client import SidecarStore
from tests.conftest import chain_of, load_all, save_all
from tests.patient import connect
from tests.service.conftest import ServerProcess, StartServer
from tests.test_pinning import FakeCuda
from tests.waiting import wait_until


class Engine:
    """What a connector does with a store's memory."""

    def __init__(self, store: SidecarStore, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.pins: list[Pinned] = []
        self.registration = store.register_memory(self._pin)

    def _pin(self, memory: memoryview) -> Registration:
        self.pins.append(pin(memory, runtime=self.cuda))
        return self.pins[-1]

    @property
    def bytes_held(self) -> int:
        return sum(self.cuda.held.values())

    @property
    def bytes_pinned(self) -> int:
        """What it may ask for: noted some moments after the device holds it."""
        return sum(pinned.num_bytes for pinned in self.pins)


def test_a_clients_mapping_is_registered_and_let_go_with_the_client(start_server: StartServer, root: Root) -> None:
    server, cuda = start_server(64), FakeCuda()
    with connect(server.address) as store:
        assert isinstance(store, LendsMemory)
        store.open(root.model)
        engine = Engine(store, cuda)
        wait_until(lambda: engine.bytes_pinned == 64 * 4096)
        chain = chain_of(root, 4)
        save_all(store, chain)
        store.match(chain, "r")
        with store.load("r") as load:
            for block in load:
                address = int(np.frombuffer(block.views[0], np.uint8).ctypes.data)
                assert PINNED.covers(address, block.views[0].nbytes)
                del block
    assert cuda.held == {}


def test_nobody_waits_for_a_mapping_to_be_registered(start_server: StartServer, root: Root) -> None:
    server, cuda = start_server(64), FakeCuda()
    cuda.gate.clear()
    with connect(server.address) as store:
        store.open(root.model)
        engine = Engine(store, cuda)
        chain = chain_of(root, 4)
        assert save_all(store, chain) == 4
        assert load_all(store, chain) == ["host"] * 4
        assert engine.bytes_held == 0
        cuda.gate.set()


def test_after_a_crash_the_old_memory_is_unregistered_before_the_new_is_registered(
    start_process: Callable[..., ServerProcess], root: Root
) -> None:
    process, cuda = start_process(), FakeCuda()
    with connect(process.address) as store:
        store.open(root.model)
        engine = Engine(store, cuda)
        chain = chain_of(root, 4)
        for start in range(2):
            wait_until(lambda: store.is_up and engine.bytes_pinned == 64 * 4096)
            assert len(engine.pins) == start + 1
            assert all(pinned.num_bytes == 0 for pinned in engine.pins[:-1]), "old memory is still registered"
            assert save_all(store, chain) == 4
            process.kill()
            process.start()
            wait_until(lambda start=start: len(engine.pins) == start + 2)
    assert cuda.held == {}


def test_memory_under_a_copy_stays_registered_though_its_server_is_gone(
    start_process: Callable[..., ServerProcess], root: Root
) -> None:
    process, cuda = start_process(), FakeCuda()
    with connect(process.address) as store:
        store.open(root.model)
        engine = Engine(store, cuda)
        chain = chain_of(root, 2)
        save_all(store, chain)
        wait_until(lambda: engine.bytes_pinned == 64 * 4096)
        store.match(chain, "r")
        with store.load("r") as load:
            views = [block.views[0] for block in load]
            process.kill()
            wait_until(lambda: not store.is_up)
            address = int(np.frombuffer(views[0], np.uint8).ctypes.data)
            assert PINNED.covers(address, views[0].nbytes), "unregistered under a copy"
            assert not load.intact() or engine.bytes_held == 64 * 4096
        del views
        wait_until(lambda: engine.bytes_held == 0)


def test_a_device_that_refuses_is_heard_once_and_everything_goes_on(
    start_server: StartServer, root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    server, cuda = start_server(64), FakeCuda(limit_bytes=0)
    with caplog.at_level(logging.WARNING, "kvstore.pinning"), connect(server.address) as store:
        store.open(root.model)
        engine = Engine(store, cuda)
        wait_until(lambda: bool(engine.pins) and bool(engine.pins[0].failure))
        chain = chain_of(root, 4)
        save_all(store, chain)
        for _ in range(3):
            assert load_all(store, chain) == ["host"] * 4
    (said,) = [record for record in caplog.records if record.name == "kvstore.pinning"]
    assert "copies of the rest are slower" in said.getMessage()


def test_two_engines_of_a_process_share_one_registration(start_server: StartServer) -> None:
    server, cuda = start_server(64), FakeCuda()
    with connect(server.address) as store:
        one, other = Engine(store, cuda), Engine(store, cuda)
        wait_until(lambda: one.bytes_pinned + other.bytes_pinned == 64 * 4096)
        assert len(one.pins) + len(other.pins) == 1
        one.registration.close()
        one.registration.close()
        assert one.bytes_held == 64 * 4096
        other.registration.close()
        assert one.bytes_held == 0


def test_a_client_that_maps_nothing_registers_nothing(start_server: StartServer) -> None:
    server, cuda = start_server(64), FakeCuda()
    with connect(server.address, mapped=False) as store:
        engine = Engine(store, cuda)
        assert store.is_up
        engine.registration.close()
    assert engine.pins == []
