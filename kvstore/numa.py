# SPDX-License-Identifier: Apache-2.0
"""Which memory node (NUMA) a stretch of memory is taken from, for hosts that have several.

A device copies from the memory of its own node at the link's rate, and from another's at what lies between the two.
Memory is *preferred* from a node, never bound to it: where that one is full, another serves.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

from kvstore.errors import ConfigError

AUTO, NONE = "auto", "none"
_ONLINE = "/sys/devices/system/node/has_memory"
_PCI = "/sys/bus/pci/devices"
_NVIDIA, _DISPLAY = "0x10de", "0x03"

# No function of libc's: (mbind, get_mempolicy) by number.
_CALLS = {"x86_64": (237, 239), "aarch64": (235, 236)}
_PREFERRED = 1
_OF_ADDRESS = 2
_MAX_NODES = 1024
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_Mask = ctypes.c_ulong * (_MAX_NODES // _WORD_BITS)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Read = Callable[[str], str | None]
"""Text of a file; None where it cannot be read."""


def read_file(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def check_setting(value: str) -> None:
    """Raise ConfigError for what is neither `auto`, `none` nor a number."""
    if value not in (AUTO, NONE) and not re.fullmatch(r"\d{1,3}", value):
        raise ConfigError(f"host.numa_node is {value!r}: give auto (that of the GPUs), none, or a node's number")


def nodes_with_memory(read: Read = read_file) -> list[int]:
    """Of this host; empty where it does not say."""
    found: list[int] = []
    for piece in (read(_ONLINE) or "").strip().split(","):
        low, _, high = piece.partition("-")
        if low.isdigit():
            found += range(int(low), int(high or low) + 1)
    return found


def pci_devices() -> list[str]:
    """Names of what is plugged in."""
    try:
        return sorted(os.listdir(_PCI))
    except OSError:
        return []


def nodes_of_gpus(read: Read = read_file, devices: Callable[[], list[str]] = pci_devices) -> list[int]:
    """The nodes that the host's NVIDIA GPUs are at; empty where there are none, or none says.

    Not by CUDA, which is asked by whoever copies: an arena is made before, and in a sidecar that has no device.
    """
    gpus = [name for name in devices() if _is_gpu(f"{_PCI}/{name}", read)]
    said = {(read(f"{_PCI}/{name}/numa_node") or "").strip() for name in gpus}
    return sorted(int(node) for node in said if node.isdigit())


def _is_gpu(path: str, read: Read) -> bool:
    return (read(f"{path}/vendor") or "").strip() == _NVIDIA and (read(f"{path}/class") or "").startswith(_DISPLAY)


def chosen_node(setting: str, read: Read = read_file, devices: Callable[[], list[str]] = pci_devices) -> int | None:
    """The node that memory is to come from; None for the kernel's own choice.

    Raises ConfigError for a node that this host does not have.
    """
    check_setting(setting)
    if setting == NONE:
        return None
    nodes = nodes_with_memory(read)
    if setting == AUTO:
        near = nodes_of_gpus(read, devices) if len(nodes) > 1 else []
        return near[0] if len(near) == 1 and near[0] in nodes else None
    if int(setting) not in nodes:
        there = ", ".join(map(str, nodes)) or "unknown here"
        raise ConfigError(f"host.numa_node is {setting}: this host's nodes with memory are {there}")
    return int(setting)


def prefer_node(address: int, num_bytes: int, node: int) -> str:
    """Have pages of this memory that nobody has touched yet taken from `node`; what went wrong, empty for nothing.

    `address` is a page's. Memory shared by a descriptor keeps this for every process that maps it.
    """
    mask = _Mask()
    mask[node // _WORD_BITS] = 1 << node % _WORD_BITS
    return _call(
        0, ctypes.c_void_p(address), ctypes.c_ulong(num_bytes), _PREFERRED, mask, ctypes.c_ulong(_MAX_NODES), 0
    )


def preferred_node(address: int) -> int | None:
    """What `prefer_node` has set for the page at `address`; None for nothing. Raises OSError where nobody says."""
    mode, mask = ctypes.c_int(), _Mask()
    fault = _call(1, ctypes.byref(mode), mask, ctypes.c_ulong(_MAX_NODES), ctypes.c_void_p(address), _OF_ADDRESS)
    if fault:
        raise OSError(fault)
    nodes = [node for node in range(_MAX_NODES) if mask[node // _WORD_BITS] >> node % _WORD_BITS & 1]
    return nodes[0] if mode.value == _PREFERRED and nodes else None


def _call(which: int, *arguments: object) -> str:
    calls = _CALLS.get(platform.machine())
    if calls is None:
        return f"not known how on {platform.machine()}"
    if _libc.syscall(ctypes.c_long(calls[which]), *arguments) == 0:
        return ""
    return os.strerror(ctypes.get_errno())
