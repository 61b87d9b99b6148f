# SPDX-License-Identifier: Apache-2.0
"""A read on a thread and a connection of its own, beside others of the same call: of other nodes, or other lanes.

Each reads its keys in their order, into buffers that are nobody else's, whatever its caller is at; the caller asks for
what it says, puts the reads' keys in the order of the call, and has all of them end before it ends itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import ClassVar

from kvstore.block import PartKey
from kvstore.errors import TierError
from kvstore.tiers.base import More
from kvstore.tiers.redis_nodes import Redirection
from kvstore.tiers.redis_pool import Connections
from kvstore.tiers.redis_read import Counts, Reader
from kvstore.tiers.redis_wire import ProtocolBroken, Wire


class Stopped(Exception):
    """The caller gave up: the wire was shut down under the thread that reads from it."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A key that lies on another node of a Cluster."""

    key: PartKey
    to: Redirection


Said = list[PartKey] | Moved | TierError | None
"""Keys that have come, in order; None at the end."""


class BesideRead:
    """One of the reads.

    Attributes:
        damaged, counts: as `Reader.read` fills them. For the caller when the thread has ended.
        took_s: of the read, waiting for a connection included.
    """

    says_moved: ClassVar[bool] = False
    """Else a redirection is an error."""

    def __init__(self, connections: Connections, into: Mapping[PartKey, memoryview]) -> None:
        self.into = into
        self.damaged: list[PartKey] = []
        self.counts = Counts()
        self.took_s = 0.0
        self.stopped = threading.Event()
        self._connections = connections
        self._said: SimpleQueue[Said] = SimpleQueue()
        self._wire: Wire | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, reader: Reader, deadline: float, more: More | None = None) -> None:
        """`more`: as in `Tier.read_on`, but on the thread; it may raise Stopped."""
        thread = threading.Thread(target=self._run, args=(reader, deadline, more), daemon=True)
        thread.name = "kvstore-redis-read"
        thread.start()
        self._thread = thread

    def _run(self, reader: Reader, deadline: float, more: More | None) -> None:
        began_s = time.perf_counter()
        moved = (lambda key, to: self._said.put(Moved(key, to))) if self.says_moved else None
        try:
            with self._connections.lease(deadline) as wire:
                try:
                    self._adopt(wire)
                    reading = reader.read(wire, self.into, deadline, self.damaged, self.counts, moved, more)
                    with closing(reading):  # before the wire is given back
                        for keys in reading:
                            self._said.put(keys)
                    self._adopt(None)
                except (ProtocolBroken, OSError):
                    if self.stopped.is_set():
                        raise Stopped from None
                    raise
        except Stopped:
            pass
        except TierError as error:
            self._said.put(error)
        finally:
            self.took_s = time.perf_counter() - began_s
            self._said.put(None)

    def _adopt(self, wire: Wire | None) -> None:
        with self._lock:
            if self.stopped.is_set():
                raise Stopped
            self._wire = wire

    def listen(self) -> Said:
        """What it says next; not to be asked after the end."""
        return self._said.get()

    def stop(self) -> None:
        """Shut its connection down under it, if it has not ended."""
        self.stopped.set()
        with self._lock:
            if self._wire is not None:
                self._wire.abort()

    def join(self) -> None:
        """Return when it has ended, by itself: its connection is then kept."""
        if self._thread is not None:
            self._thread.join()


def end_all(reads: Iterable[BesideRead], damaged: list[PartKey], counts: Counts) -> None:
    """End reads, wherever they are, and take over what they found out: then nothing writes to a buffer any more."""
    reads = list(reads)
    for read in reads:
        read.stop()
    for read in reads:
        read.join()
        damaged += read.damaged
        counts.add(read.counts)
