# SPDX-License-Identifier: Apache-2.0
"""Side streams and the moments at which they wait for one another: the seam between copies and a device.

    Streams       what copies ask of a device
    CudaStreams   CUDA's streams and events
    InOrder       the CPU: everything is done when it is submitted

Tests have a third one, which runs what was submitted as late and in as odd an order as the waits allow.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch

Stream = object
"""Work in order. Only the `Streams` that made it knows what it is."""
Moment = object
"""A point in a stream: reached when all that was submitted before it is done."""


class Streams(Protocol):
    """Submits work to streams of one device. Nothing here blocks the caller but `finish`."""

    def engine(self) -> Stream:
        """The stream on which the calling thread's engine work runs."""

    def side(self, name: str) -> Stream:
        """A stream of our own: one for each name."""

    def submit(self, stream: Stream, action: Callable[[], None]) -> None:
        """Have `action` launch its work on `stream`."""

    def record(self, stream: Stream) -> Moment:
        """The moment at which all that `stream` has so far is done."""

    def wait(self, stream: Stream, moment: Moment) -> None:
        """What `stream` gets from now on starts after `moment`."""

    def finish(self, moment: Moment) -> None:
        """Return when `moment` is reached."""

    def is_reached(self, moment: Moment) -> bool: ...


class InOrder:
    """Streams of the CPU."""

    def engine(self) -> Stream:
        return None

    def side(self, name: str) -> Stream:
        return None

    def submit(self, stream: Stream, action: Callable[[], None]) -> None:
        action()

    def record(self, stream: Stream) -> Moment:
        return None

    def wait(self, stream: Stream, moment: Moment) -> None:
        pass

    def finish(self, moment: Moment) -> None:
        pass

    def is_reached(self, moment: Moment) -> bool:
        return True


class CudaStreams:
    """Streams of one CUDA device. Thread-safe."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sides: dict[str, torch.cuda.Stream] = {}
        self._lock = threading.Lock()

    def engine(self) -> Stream:
        return torch.cuda.current_stream(self._device)

    def side(self, name: str) -> Stream:
        with self._lock:
            stream = self._sides.get(name)
            if stream is None:
                # Of the lowest priority there is, the default, which an engine's stream has too.
                stream = self._sides[name] = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            return stream

    def submit(self, stream: Stream, action: Callable[[], None]) -> None:
        # The device first: leaving a stream of another device than the thread's sets that one again.
        with self._on_device(), torch.cuda.stream(cast(torch.cuda.Stream, stream)):
            action()

    def record(self, stream: Stream) -> Moment:
        return cast(torch.cuda.Stream, stream).record_event()

    def wait(self, stream: Stream, moment: Moment) -> None:
        cast(torch.cuda.Stream, stream).wait_event(cast(torch.cuda.Event, moment))

    def finish(self, moment: Moment) -> None:
        with self._on_device():  # what torch does by itself for an event that is recorded or waited for, not here
            cast(torch.cuda.Event, moment).synchronize()

    def is_reached(self, moment: Moment) -> bool:
        with self._on_device():
            return bool(cast(torch.cuda.Event, moment).query())  # type: ignore[no-untyped-call]

    def _on_device(self) -> AbstractContextManager[None]:
        """CUDA makes a context on the thread's device when it is called there. A thread that never chose one has the
        first: half a gigabyte of it for each worker of a machine."""
        return torch.cuda.device(self._device)


@functools.cache
def streams_of(device: torch.device) -> Streams:
    """Streams of `device`; those of the CPU for any device that is not CUDA.

    One set a device: memory that torch allocates on a stream is used again only there.
    """
    return CudaStreams(device) if device.type == "cuda" else InOrder()
