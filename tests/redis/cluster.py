# SPDX-License-Identifier: Apache-2.0
"""A real Cluster on loopback: three primaries and three replicas, whose nodes tests may stop, kill and reshard."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import redis

from kvstore.tiers.valkey import embedded_binary
from tests.ports import free_ports
from tests.redis.rights import PASSWORD, USER, add_user

NODE_TIMEOUT_MS = 2000
NUM_SLOTS = 16_384


def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Wait for a condition, which may raise redis errors meanwhile; fails after `limit_s`."""
    end = time.monotonic() + limit_s
    last: Exception | None = None
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (redis.RedisError, OSError) as error:
            last = error
        time.sleep(0.02)
    raise AssertionError(f"it did not come about within {limit_s} s; last: {last}")


def caught_up(primary: Any, replica: Any) -> bool:
    """Whether a replica has all that its primary has told so far."""
    offset = primary.info("replication")["master_repl_offset"]
    return bool(replica.info("replication")["slave_repl_offset"] >= offset)


class ClusterNode:
    def __init__(self, binary: Path, port: int, directory: Path) -> None:
        self.port = port
        directory.mkdir()
        self.process = subprocess.Popen(
            [
                str(binary),
                *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""),
                *("--appendonly", "no", "--cluster-enabled", "yes", "--maxmemory", "64mb"),
                *("--maxmemory-policy", "noeviction", "--logfile", str(directory / "log")),
                *("--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--cluster-config-file", "nodes.conf"),
                *("--cluster-require-full-coverage", "no", "--cluster-replica-validity-factor", "0"),
                *("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0", "--repl-backlog-size", "4mb"),
                # Of a replica that has heard nothing yet, not even a ping, Redis does not tell; pings come every 10 s.
                *("--repl-ping-replica-period", "1"),
            ],
            stdout=subprocess.DEVNULL,
        )
        self.client: Any = redis.Redis(port=port, socket_timeout=5)

    @property
    def id(self) -> str:
        return str(self.do("CLUSTER MYID").decode())

    def do(self, name: str, *words: object) -> Any:
        """The reply as it came: of a name in one word, redis-py would parse it."""
        return self.client.execute_command(*name.split(" "), *words)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.client.close()


class Cluster:
    """Nodes 0, 1, 2 are primaries of a third of the slots each; 3, 4, 5 their replicas, in this order."""

    def __init__(self, binary: Path | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kvstore-cluster-")
        server = binary or embedded_binary()
        self.nodes = [ClusterNode(server, port, Path(self._directory.name) / str(port)) for port in free_ports(6)]
        try:
            self._form()
        except BaseException:
            self.close()
            raise

    def _form(self) -> None:
        for node in self.nodes:
            until(lambda node=node: node.client.ping())  # type: ignore[misc]
        third = NUM_SLOTS // 3
        bounds = [0, third, 2 * third, NUM_SLOTS]
        for number, node in enumerate(self.nodes[:3]):
            node.do("CLUSTER SET-CONFIG-EPOCH", number + 1)
            node.do("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        for node in self.nodes[1:]:
            self.nodes[0].do("CLUSTER MEET", "127.0.0.1", node.port)
        until(lambda: all(b"cluster_known_nodes:6" in node.do("CLUSTER INFO") for node in self.nodes))
        for number, node in enumerate(self.nodes[3:]):
            primary = self.nodes[number].id
            until(lambda node=node, primary=primary: node.do("CLUSTER REPLICATE", primary) == b"OK")  # type: ignore[misc]
        until(lambda: all(b"cluster_state:ok" in node.do("CLUSTER INFO") for node in self.nodes))
        until(lambda: all(node.client.info("replication").get("master_link_status") == "up" for node in self.nodes[3:]))
        until(lambda: all(len(self.owners(node)) == 3 for node in self.nodes))
        for node in self.nodes:  # users are each node's own
            add_user(node.client, cluster=True)

    def owners(self, node: ClusterNode) -> set[int]:
        """Ports of the primaries, as a node sees them; replicas must be known, too."""
        slots = node.do("CLUSTER SLOTS")
        return {int(entry[2][1]) for entry in slots if len(entry) > 3}

    @property
    def url(self) -> str:
        """For a user with the least rights there are to a tier."""
        user = f"{USER}:{quote(PASSWORD, safe='')}@"
        return f"redis+cluster://{user}" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:2])

    def kill_primary(self, number: int) -> None:
        self.nodes[number].process.send_signal(signal.SIGKILL)
        self.nodes[number].process.wait()

    def wait_for_failover(self, number: int) -> None:
        """Until every node that lives knows that the replica of primary `number` took over."""
        port = self.nodes[number + 3].port
        alive = [node for node in self.nodes if node.process.poll() is None]

        def took_over() -> bool:
            return all(port in {int(entry[2][1]) for entry in node.do("CLUSTER SLOTS")} for node in alive)

        until(took_over)

    def begin_moving(self, slot: int, source: int, target: int) -> None:
        """Between these two calls a slot's keys are asked for at both."""
        self.nodes[target].do("CLUSTER SETSLOT", slot, "IMPORTING", self.nodes[source].id)
        self.nodes[source].do("CLUSTER SETSLOT", slot, "MIGRATING", self.nodes[target].id)

    def move_keys(self, slot: int, source: int, target: int, limit: int = 1_000_000) -> int:
        names = self.nodes[source].do("CLUSTER GETKEYSINSLOT", slot, limit)
        for name in names:
            self.nodes[source].do("MIGRATE", "127.0.0.1", self.nodes[target].port, name, 0, 5000)
        return len(names)

    def end_moving(self, slot: int, source: int, target: int) -> None:
        for number in (target, source, *(each for each in range(3) if each not in (source, target))):
            self.nodes[number].do("CLUSTER SETSLOT", slot, "NODE", self.nodes[target].id)

    def flush(self) -> None:
        for node in self.nodes[:3]:
            node.do("FLUSHALL")

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
