# SPDX-License-Identifier: Apache-2.0
"""Stages: device memory through which the windows of copies go in turns, one set for each direction of a device.

All copiers of a device share them. Their windows follow one another on the same streams anyway, and stages of its own
were 384 MiB for each cache that an engine keeps, and allocations before the first token of each that it makes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from kvstore.copy_under_way import Sending
from kvstore.streams import Moment, Stream, Streams

LEAST_STAGES = 2


@dataclass(slots=True, eq=False)
class Stage:
    num_bytes: int = 0
    memory: list[torch.Tensor] = field(default_factory=list)
    """One, once the kernels' stream has allocated it."""
    free: Moment = None
    """When what it was last used for is done; meaningless while it `is_new`."""
    is_new: bool = True
    waiting: Sending | None = None
    """The window of a save that lies in it, where that may be put off."""
    packed: torch.Tensor | None = None
    """Lossy bytes of a save under way. Replaced only on the kernels' stream after `free`: then nobody reads them."""


class Stages:
    """One direction's of a device. Made by `stages_of`.

    Attributes:
        lock: held while a call is submitted: windows of two threads would meet in a stage.
    """

    def __init__(self, device: torch.device, number: int) -> None:
        self.lock = threading.Lock()
        self.stages = [Stage() for _ in range(number)]
        self._device = device
        self._next = 0

    def take(self, streams: Streams, kernels: Stream, num_bytes: int, room_bytes: int) -> Stage:
        """The next stage, with room for `num_bytes`; where it has to be made, for `room_bytes`.

        They go on in turns from call to call: a call that began with the first again would wait for the one before it,
        and find what that has put off in the only stage it wants. What was put off in the stage is sent.

        Where the device has no memory for more, two do.
        """
        number, self._next = self._next % len(self.stages), self._next + 1
        stage = self.stages[number]
        try:
            self._make_room(streams, kernels, stage, num_bytes, room_bytes)
        except torch.cuda.OutOfMemoryError:
            if number < LEAST_STAGES:
                raise
            for one in self.stages[LEAST_STAGES:]:
                _send_waiting(one)
                if not one.is_new:  # copies of its bytes may be under way, on a stream that did not allocate them
                    streams.finish(one.free)
            del self.stages[LEAST_STAGES:]
            stage = self.stages[number % LEAST_STAGES]
            self._make_room(streams, kernels, stage, num_bytes, room_bytes)
        return stage

    def _make_room(self, streams: Streams, kernels: Stream, stage: Stage, num_bytes: int, room_bytes: int) -> None:
        _send_waiting(stage)
        if num_bytes > stage.num_bytes:
            if not stage.is_new:
                streams.finish(stage.free)
            room_bytes = max(num_bytes, room_bytes)
            # On the kernels' stream: memory that an allocator hands out on one stream may still be in use there by
            # whoever gave it back.
            streams.submit(kernels, lambda: _allocate(stage, room_bytes, self._device))
            stage.num_bytes = room_bytes
            stage.free, stage.is_new = streams.record(kernels), False


def _send_waiting(stage: Stage) -> None:
    if stage.waiting is not None:
        stage.free, stage.waiting = stage.waiting.send(), None


def _allocate(stage: Stage, num_bytes: int, device: torch.device) -> None:
    stage.memory[:] = [torch.empty(num_bytes, dtype=torch.uint8, device=device)]


_made: WeakKeyDictionary[Streams, dict[tuple[torch.device, str, int], Stages]] = WeakKeyDictionary()
_lock = threading.Lock()


def stages_of(streams: Streams, device: torch.device, direction: str, number: int) -> Stages:
    """The `number` of them of `direction`; made when first asked for."""
    with _lock:
        made = _made.setdefault(streams, {})
        return made.setdefault((device, direction, number), Stages(device, number))
