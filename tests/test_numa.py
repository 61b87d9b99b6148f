# SPDX-License-Identifier: Apache-2.0
"""Memory is asked of a node before it is touched; what the kernel made of that is read back from the kernel."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import pytest

from kvstore import numa
from kvstore.arena import Arena
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError
from kvstore.numa import chosen_node, nodes_with_memory, prefer_node, preferred_node
from kvstore.store import KVStore

HERE = nodes_with_memory()


def refusal() -> str:
    """Why this host does not let us ask, empty where it does: containers often forbid it."""
    arena = Arena(1 << 20, prefault=False)
    return prefer_node(arena._memory.address, 1 << 20, (HERE or [0])[0])


needs_a_kernel_that_asks = pytest.mark.skipif(bool(refusal()), reason=f"the kernel refuses mbind: {refusal()}")


@needs_a_kernel_that_asks
@pytest.mark.parametrize("shared", [False, True])
def test_the_arenas_memory_is_asked_of_the_node_in_the_settings(shared: bool) -> None:
    node = HERE[-1]
    values = {"host": {"capacity_bytes": 8 << 20, "prefault": False, "numa_node": str(node)}}
    with KVStore(StoreConfig.load(values, environ={}), shared_memory=shared) as store:
        memory = store._host.arena._memory
        assert preferred_node(memory.address) == node
        assert preferred_node(memory.address + (8 << 20) - 4096) == node
    plain = Arena(8 << 20, prefault=False, shared=shared)
    assert preferred_node(plain._memory.address) is None
    plain.close()


def test_a_node_that_is_not_there_is_a_clear_error_before_any_memory_is_taken() -> None:
    values = {"host": {"capacity_bytes": 1 << 50, "numa_node": "777"}}
    with pytest.raises(ConfigError, match="host.numa_node is 777: this host's nodes with memory are "):
        KVStore(StoreConfig.load(values, environ={}))


@pytest.mark.parametrize("value", ["near", "-1", "", "1.5"])
def test_what_is_no_node_is_refused_with_the_settings(value: str) -> None:
    with pytest.raises(ConfigError, match=r"host.numa_node is .*: give auto \(that of the GPUs\), none, or"):
        StoreConfig.load({"host": {"numa_node": value}}, environ={})


def test_a_kernel_that_refuses_costs_one_sentence_and_no_memory(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numa, "_CALLS", {})
    with caplog.at_level(logging.WARNING):
        arena = Arena(1 << 20, prefault=False, numa_node=0)
    arena.view(0, 1)[0] = 1
    assert [record.message for record in caplog.records] == [
        f"the arena's memory may come from any node: preferring node 0: not known how on {os.uname().machine}"
    ]
    arena.close()


def test_nodes_are_read_as_the_kernel_writes_them() -> None:
    assert nodes_with_memory(lambda _: "0-2,5,8-9\n") == [0, 1, 2, 5, 8, 9]
    assert nodes_with_memory(lambda _: None) == []
    assert chosen_node("auto", lambda _: None) is None
    assert chosen_node("none", lambda _: "0-1") is None


def host(**gpus: str) -> tuple[Callable[[str], str | None], Callable[[], list[str]]]:
    """What a host with two nodes says of itself; `gpus`: the node of each, by name. There is a network card at 1."""
    said = {"/sys/devices/system/node/has_memory": "0-1\n"}
    devices = {"net": ("0x15b3", "0x020000", "1"), "sound": ("0x10de", "0x040300", "0")}
    devices |= {name: ("0x10de", "0x030200", node) for name, node in gpus.items()}
    for name, values in devices.items():
        for key, value in zip(("vendor", "class", "numa_node"), values, strict=True):
            said[f"/sys/bus/pci/devices/{name}/{key}"] = f"{value}\n"
    return said.get, lambda: sorted(devices)


def test_memory_comes_from_the_node_of_the_gpus_where_they_have_one() -> None:
    assert chosen_node("auto", *host(gpu0="1", gpu1="1")) == 1
    assert chosen_node("auto", *host(gpu0="0")) == 0
    assert chosen_node("auto", *host(gpu0="0", gpu1="1")) is None  # of two nodes neither is the nearer
    assert chosen_node("auto", *host(gpu0="-1")) is None  # a virtual machine that does not say
    assert chosen_node("auto", *host()) is None
    assert chosen_node("auto", *host(gpu0="7")) is None  # a node without memory
    assert chosen_node("0", *host(gpu0="1")) == 0
