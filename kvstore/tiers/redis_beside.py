# SPDX-License-Identifier: Apache-2.0
"""A read on a thread and a connection of its own, beside others of the same call: of other nodes, or other lanes.

Each reads its keys in their order, into buffers that are nobody else's, whatever its caller is at; the caller asks for
what it says, puts the reads' keys in the order of the call, and has all of them end before it ends itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import ClassVar

from kvstore.block import PartKey
from kvstore.tiers.redis_nodes import Redirection
from kvstore.tiers.redis_read import Counts, Reader
from kvstore.tiers.redis_wire import ProtocolBroken, Wire


class _Stopped(Exception):
    """The caller gave up: the wire was shut down under the thread that reads from it."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A key that lies on another node of a Cluster."""

    key: PartKey
    to: Redirection


class BesideRead:
    """One of the reads.

    Attributes:
        damaged, counts: as `Reader.read` fills them. For the caller when the thread has ended.
        heard: whether the server said anything. Likewise.
    """

    says_moved: ClassVar[bool] = False
    """Else a redirection is an error."""
    may_wait: ClassVar[bool] = False
    """For its connection."""

    def __init__(self, lease: AbstractContextManager[Wire], into: Mapping[PartKey, memoryview]) -> None:
        """`lease` is entered once, on the thread."""
        self.into = into
        self.damaged: list[PartKey] = []
        self.counts = Counts()
        self.heard = False
        self._lease = lease
        self._said: SimpleQueue[list[PartKey] | Moved | BaseException | None] = SimpleQueue()
        self._began = False
        self._stopped = False
        self._wire: Wire | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._owner = os.getpid()

    def start(self, reader: Reader, deadline: float) -> None:
        thread = threading.Thread(target=self._run, args=(reader, deadline), daemon=True)
        thread.name = "kvstore-redis-read"
        try:
            thread.start()
        except RuntimeError:  # no more threads are to be had
            self._run(reader, deadline)
        else:
            self._thread = thread

    def _run(self, reader: Reader, deadline: float) -> None:
        moved = (lambda key, to: self._said.put(Moved(key, to))) if self.says_moved else None
        try:
            with self._lease as wire:
                try:
                    self._adopt(wire)
                    reading = reader.read(wire, self.into, deadline, self.damaged, self.counts, moved)
                    with closing(reading):  # before the wire is given back
                        for keys in reading:
                            self._said.put(keys)
                    self._adopt(None)
                except (ProtocolBroken, OSError):
                    if self._stopped:
                        raise _Stopped from None
                    raise
                finally:
                    self.heard = wire.heard
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 (whoever listens has it)
            if not self._stopped:
                self._said.put(error)
        finally:
            self._said.put(None)

    def _adopt(self, wire: Wire | None) -> None:
        with self._lock:
            if self._stopped:
                raise _Stopped
            self._began = True
            self._wire = wire

    @property
    def is_silent(self) -> bool:
        """Whether `listen` would wait."""
        return self._said.empty()

    def listen(self) -> list[PartKey] | Moved | None:
        """What it says next: keys that have come, in order, or None at the end, after which it is not to be asked.

        Raises what ended the read, whatever that is.
        """
        said = self._said.get()
        if isinstance(said, BaseException):
            try:
                raise said
            finally:
                del said  # its traceback has this frame, and others that hold the buffers
        return said

    def stop(self) -> bool:
        """Shut its connection down under it, if it has not ended; whether it is to be joined.

        Not in a forked child, whose connection it is not.
        """
        if os.getpid() != self._owner:
            return False
        with self._lock:
            self._stopped = True
            if self._wire is not None:
                self._wire.abort()
            return self._began or not self.may_wait

    def join(self) -> None:
        """Return when it has ended, by itself: its connection is then kept."""
        if self._thread is not None:
            self._thread.join()

    def forget(self) -> None:
        """Let go of buffers, and of what nobody asked for: an error's traceback leads to them, and back here."""
        self.into = {}
        self._said = SimpleQueue()


def end_all(reads: Iterable[BesideRead], damaged: list[PartKey], counts: Counts) -> None:
    """End reads, wherever they are, and take over what they found out: then nothing writes to a buffer any more.

    One that still waits for a connection is left to that: it gives it back as soon as it gets it.
    """
    reads = list(reads)
    begun = [read for read in reads if read.stop()]
    for read in begun:
        read.join()
    for read in reads:
        read.forget()
        damaged += read.damaged
        counts.add(read.counts)
