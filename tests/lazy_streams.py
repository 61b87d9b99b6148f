# SPDX-License-Identifier: Apache-2.0
"""Streams that run what they were given as late as they may, and in any order that the waits allow.

A device does the same, only rarely enough that a missing event passes every other test.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class LazyMoment:
    stream: LazyStream
    number: int

    @property
    def reached(self) -> bool:
        return self.stream.num_done >= self.number


@dataclass(eq=False)
class LazyStream:
    name: str
    queue: deque[Callable[[], None] | LazyMoment] = field(default_factory=deque)
    num_given: int = 0
    num_done: int = 0


class LazyStreams:
    """Implements `kvstore.streams.Streams`. `run_engine` is the engine's forward pass.

    As on a device, another thread's engine stream is another. Until `may_finish` is set, other threads than the one
    that made it wait in `finish`.
    """

    def __init__(self, seed: int = 0) -> None:
        self.may_finish = threading.Event()
        self.may_finish.set()
        self._owner = threading.get_ident()
        self._lock = threading.RLock()
        self._random = random.Random(seed)
        self._streams = {"engine": LazyStream("engine")}
        self.log: list[str] = []
        self.waits: list[tuple[str, str]] = []
        """(stream, stream that it was told to wait for), of all times."""

    def engine(self) -> LazyStream:
        mine = threading.get_ident()
        return self.side("engine" if mine == self._owner else f"engine of {mine}")

    def side(self, name: str) -> LazyStream:
        with self._lock:
            return self._streams.setdefault(name, LazyStream(name))

    def submit(self, stream: LazyStream, action: Callable[[], None]) -> None:
        with self._lock:
            stream.queue.append(action)
            stream.num_given += 1

    def record(self, stream: LazyStream) -> LazyMoment:
        with self._lock:
            return LazyMoment(stream, stream.num_given)

    def wait(self, stream: LazyStream, moment: LazyMoment) -> None:
        with self._lock:
            self.waits.append((stream.name, moment.stream.name))
            stream.queue.append(moment)
            stream.num_given += 1

    def is_reached(self, moment: LazyMoment) -> bool:
        return moment.reached

    def finish(self, moment: LazyMoment) -> None:
        """Run what the moment needs, and now and then what it does not."""
        if threading.get_ident() != self._owner:
            assert self.may_finish.wait(10)
        with self._lock:
            while not moment.reached:
                self.step()

    def run_engine(self, action: Callable[[], None]) -> None:
        self.submit(self.engine(), action)

    def drain(self) -> None:
        with self._lock:
            while self._has_more():
                self.step()

    def go_on(self, count: int) -> None:
        """Do so many things, or all there is."""
        with self._lock:
            for _ in range(count):
                if self._has_more():
                    self.step()

    def _has_more(self) -> bool:
        return any(stream.queue for stream in self._streams.values())

    def step(self) -> None:
        """Do one thing of a stream that may go on."""
        able = [stream for stream in self._streams.values() if stream.queue and _may_run(stream.queue[0])]
        assert able, "every stream waits: a deadlock"
        stream = self._random.choice(able)
        item = stream.queue.popleft()
        if not isinstance(item, LazyMoment):
            self.log.append(stream.name)
            item()
        stream.num_done += 1


class BesideEngine(LazyStreams):
    """For an engine that computes when it is told to, as a model does on the CPU: what it waits for runs right then.

    All else runs as late as it may.
    """

    def wait(self, stream: LazyStream, moment: LazyMoment) -> None:
        if not stream.name.startswith("engine"):
            super().wait(stream, moment)
            return
        with self._lock:
            while not moment.reached:
                self.step()


def _may_run(item: Callable[[], None] | LazyMoment) -> bool:
    return not isinstance(item, LazyMoment) or item.reached
