# SPDX-License-Identifier: Apache-2.0
"""Loopback ports for servers that must know theirs before they listen."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack

_PORTS = range(12_000, 22_000)
"""Below those that the kernel gives to connections and to port 0, one of which could take a port between its choice and
its server's start; so are their Cluster buses, which are 10,000 above."""
_STRIDE = 8


def free_ports(count: int) -> list[int]:
    """Ports that are free, each with its Cluster bus; none that another worker of this run is given."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = [port for port in _PORTS if port % _STRIDE == worker % _STRIDE]
    found: list[int] = []
    for port in random.SystemRandom().sample(mine, len(mine)):
        if _is_free(port, port + 10_000):
            found.append(port)
            if len(found) == count:
                return found
    raise AssertionError(f"{len(found)} of {count} ports are free")


def _is_free(*ports: int) -> bool:
    with ExitStack() as bound:
        try:
            for port in ports:
                bound.enter_context(socket.socket()).bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
