# SPDX-License-Identifier: Apache-2.0
"""Copies between a device's pages and slots on side streams: what `PageCopier` does where the engine is not on the CPU.

Ways; both move the same bytes:

    STAGED   the kernel of `copy_kernel` between pages and a stage on the device, and one call a window for the large
             copies between the stage and slots
    INDEX    the same with torch's indexing in place of the kernel: where there is no Triton, and on the CPU

What else was tried on an H100 (PCIe 5): shares of large pinned copies for device to host, host to device and both at
once, 1 GiB a call (2 GiB are in `bench/results`), and what a decode step beside both loses, of which the link alone
takes 5 to 6 %:

    STAGED                                            0.93  0.94  0.87    8 … 10 %
    a copy through torch for each block               0.91  0.92  0.69    8 %   the caller's CPU is what it waits for
    stages of 32, 16, 8 MiB instead of 64             0.92  0.94  0.72   10 %   launches again; 8 MiB: 0.77, 0.6, 0.45
    the kernel on pinned host memory, without stages  0.88  0.87  0.67  110 %   32 programs; 8: 0.84, 29 %; 132: 500 %
    copy engines, a row of 32 KiB at a time           0.61  0.55  0.34    2 %   1 µs of the CPU a row, in the driver
    copy engines, boxes of all planes of a page       0.93  0.94  0.83    8 %   cuMemcpy3DBatchAsync: no gain for its
                                                                                conditions on pages and slots
    the same by a cuMemcpy2DAsync each                0.90  0.93  0.79   10 %

Order on a device, for windows that take turns with two stages, in a save up to four (arrows are events; nothing blocks
the host until `finish`; what a save puts off, `copy_under_way` says):

    save   engine ─after─▶ kernels: fill stage ─filled─▶ copies: stage → slots ─free─▶ kernels: fill it again
    load   copies: slots → stage ─filled─▶ kernels (after `after`): stage → pages ─free─▶ copies: fill it again
                                               └─ a moment each step of layers ─▶ engine

Invariants
1. Nothing reads a page before `after`: what the engine had submitted by then is done.
2. Nothing writes a page before `after` either: the last reader of a reused page may still be running.
3. If a call raises, nothing of it is still being copied.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvstore import copy_kernel
from kvstore.copy_engine import CopyEngine, engine_of, host_bytes
from kvstore.copy_pages import by_index, by_kernel, on_device
from kvstore.copy_under_way import Copying, CopyingOut, Sending
from kvstore.copy_windows import Ints, Part, PartWork, Window
from kvstore.layout import BlockLayout, PartLayout
from kvstore.lossy import FORMATS
from kvstore.paged import Planes
from kvstore.pinning import PINNED
from kvstore.stages import LEAST_STAGES, Stage, stages_of
from kvstore.streams import Moment, Stream, Streams, streams_of
from kvstore.unpack_kernel import Unpacking, unpackings

STAGE_BYTES = 64 << 20
SAVE_STAGES = 4
"""A save's pages are free for the engine again when its last window is in a stage: so many windows need not wait for
the link. 256 MiB are 2,048 tokens of an 8B model. A load has two: its pages are written at the other end."""
_BY_LAYERS = 2
"""Times as large may a window be of a load that goes by layers."""


class Way(enum.Enum):
    """See the module."""

    STAGED = "staged"
    INDEX = "index"


class DeviceCopier:
    """See the module.

    Args:
        planes: of each of `cells`, cut to the part's heads. groups: see `Part`.
        way: None for the best that works here.
        stage_bytes: of a window; twice as many where a load goes by layers. num_stages: of each direction.
        num_lanes: streams that the windows of a direction cross the link on in turns.
    """

    def __init__(
        self,
        layout: BlockLayout,
        cells: Sequence[PartLayout],
        planes: Sequence[Planes],
        piece_tokens: int,
        *,
        groups: Sequence[Ints] | None = None,
        way: Way | None = None,
        streams: Streams | None = None,
        copy_engine: CopyEngine | None = None,
        stage_bytes: int = STAGE_BYTES,
        num_stages: tuple[int, int] = (SAVE_STAGES, LEAST_STAGES),
        num_lanes: int = 1,
    ) -> None:
        self.device = planes[0].first.device
        self.streams = streams or streams_of(self.device)
        self.way = way or best_way(self.device)
        self._parts = [
            Part(layout, cell, of, piece_tokens, None if groups is None else groups[at])
            for at, (cell, of) in enumerate(zip(cells, planes, strict=True))
        ]
        self._format = FORMATS[layout.packed] if layout.packed else None
        unpacks = layout.packed == "fp8" and self.way is Way.STAGED
        self._unpack: dict[Part, Unpacking] = unpackings(self._parts) if unpacks else {}
        self._dtype = planes[0].first.dtype
        self._engine = copy_engine or engine_of(self.device)
        self._registers = self.device.type == "cuda"
        self._stage_bytes = stage_bytes
        self._lanes = range(num_lanes)
        self._save = stages_of(self.streams, self.device, "save", num_stages[0])
        self._load = stages_of(self.streams, self.device, "load", num_stages[1])

    def start(
        self,
        work: Sequence[tuple[int, PartWork]],
        *,
        to_slots: bool,
        after: Moment = None,
        step_layers: int = 0,
        put_off: bool = False,
    ) -> Copying:
        """Submit copies of (part, blocks) pairs.

        Args:
            after: when the engine's pages may be read or written; None for now, as the calling thread's stream has it.
            step_layers: layers whose copies end together, so that a forward pass can begin before the last are there;
                0 for all.
            put_off: of a save, windows that lie in stages are not sent before their stage is wanted or it is finished.
        """
        stages, streams, name = (self._save if to_slots else self._load), self.streams, "save" if to_slots else "load"
        kernels = streams.side(f"{name} kernels")
        lanes = [streams.side(f"{name} copies {lane}") for lane in self._lanes]
        if after is None:
            after = streams.record(streams.engine())
        steps: list[tuple[int, Moment]] = []
        sendings: list[Sending] = []
        num_bytes = number = 0
        with stages.lock:
            try:
                streams.wait(kernels, after)
                for first_layer, windows in self._steps(work, step_layers, kernels, unpacks=not to_slots):
                    for window in windows:
                        num_bytes += window.num_blocks * window.slot_bytes
                        lane = lanes[number % len(lanes)]
                        if to_slots:
                            sendings.append(self._take_out(window, kernels, lane, put_off=put_off))
                        else:
                            self._bring_in(window, kernels, lane)
                        number += 1
                    steps.append((first_layer, streams.record(kernels)))
            except BaseException:
                for sending in sendings:
                    sending.drop()
                for stream in (kernels, *lanes):
                    streams.finish(streams.record(stream))
                raise
        if to_slots and steps:
            return CopyingOut(num_bytes, streams, stages.lock, sendings, (self, work), steps[-1][1])
        return Copying(num_bytes, streams, steps, (self, work))

    def _steps(
        self, work: Sequence[tuple[int, PartWork]], step_layers: int, kernels: Stream, *, unpacks: bool
    ) -> list[tuple[int, list[Window]]]:
        """(first layer, windows) in the order of layers: all of a step's blocks before the next step's first."""
        steps: dict[int, list[Window]] = {}
        for at, blocks in work:
            part, num_blocks = self._parts[at], len(blocks.addresses)
            table: list[torch.Tensor] = []
            way = self._way_of(blocks)
            if way is Way.STAGED:
                self.streams.submit(kernels, _sent(part.table(blocks), self.device, table))
            num_layers = part.num_layers
            registered = self._registers and PINNED.holds_whole(blocks.addresses, num_layers * part.slot_layer_bytes)
            all_registered = bool(np.all(registered))
            step = step_layers or num_layers
            for low in range(0, num_layers, step):
                high = min(low + step, num_layers)
                # Blocks that are unpacked into the pages take no room but their packed bytes.
                packed = unpacks and way is Way.STAGED and part in self._unpack
                layer_bytes = part.slot_layer_bytes if packed else part.layer_bytes
                size = max(1, self._window_bytes(by_layers=step < num_layers) // ((high - low) * layer_bytes))
                steps.setdefault(part.cell.layers.start + low, []).extend(
                    Window(part, blocks, table, low, high, first, min(first + size, num_blocks), all_registered)
                    for first in range(0, num_blocks, size)
                )
        return sorted(steps.items())

    def _window_bytes(self, *, by_layers: bool) -> int:
        """A step is waited for as a whole, so cutting it gains nothing, and each window is some 0.3 ms of the thread
        that is to order the pass: 16 of 64 MiB were 5 ms on an H100. What half as many are is not measured.
        """
        return _BY_LAYERS * self._stage_bytes if by_layers else self._stage_bytes

    def _way_of(self, blocks: PartWork) -> Way:
        return self.way if blocks.tokens is None else Way.INDEX  # kernels know whole pieces only

    def _take_out(self, window: Window, kernels: Stream, lane: Stream, *, put_off: bool) -> Sending:
        """Submit one window's way into a stage, and on to its slots, or have that wait until the stage is wanted."""
        streams, way = self.streams, self._way_of(window.work)
        num_bytes = window.num_blocks * window.exact_bytes  # before they are packed
        stage = self._save.take(streams, kernels, num_bytes, self._window_bytes(by_layers=False))
        if not stage.is_new:
            streams.wait(kernels, stage.free)
        streams.submit(kernels, lambda: self._fill(way, stage, window))
        stage.free = filled = streams.record(kernels)
        stage.waiting = sending = Sending(streams, filled, lane, lambda: self._send(stage, window))
        stage.is_new = False
        if not put_off:
            stage.free, stage.waiting = sending.send(), None
            if sending.error is not None:
                raise sending.error
        return sending

    def _bring_in(self, window: Window, kernels: Stream, lane: Stream) -> None:
        """Submit one window's way into a stage, and on to the pages."""
        streams, way = self.streams, self._way_of(window.work)
        num_bytes = window.num_blocks * window.slot_bytes
        stage = self._load.take(streams, kernels, num_bytes, self._window_bytes(by_layers=True))
        if not stage.is_new:
            streams.wait(lane, stage.free)
        streams.submit(lane, lambda: self._fetch(stage, window))
        streams.wait(kernels, streams.record(lane))
        streams.submit(kernels, lambda: self._empty(way, stage, window))
        stage.free, stage.is_new = streams.record(kernels), False

    # -- what runs on the streams ------------------------------------------------------------------------------

    def _fill(self, way: Way, stage: Stage, window: Window) -> None:
        """Pages → stage, packed where the format is lossy."""
        values = stage.memory[0][: window.num_blocks * window.exact_bytes]
        self._between(way, stage, window, values, to_slots=True)
        if self._format is not None:
            shaped = values.view(self._dtype).view(window.part.shape_of(window.num_blocks, window.high - window.low))
            stage.packed = self._format.encode(shaped).view(-1)
        else:
            stage.packed = None  # of another copier's save

    def _send(self, stage: Stage, window: Window) -> None:
        """Stage → slots."""
        held = stage.packed if stage.packed is not None else stage.memory[0]
        self._over_the_link(held, window, to_slots=True)

    def _fetch(self, stage: Stage, window: Window) -> None:
        """Slots → stage."""
        self._over_the_link(stage.memory[0], window, to_slots=False)

    def _empty(self, way: Way, stage: Stage, window: Window) -> None:
        """Stage → pages."""
        if way is Way.STAGED and (unpack := self._unpack.get(window.part)) is not None:
            unpack.launch(window, stage.memory[0].data_ptr())
            return
        values = stage.memory[0][: window.num_blocks * window.slot_bytes]
        if self._format is not None:
            blocks, *shape = window.part.shape_of(window.num_blocks, window.high - window.low)
            raw = values.view(blocks, shape[0], window.part.slot_layer_bytes)
            layers, kv, tokens, heads, dim = shape
            made = self._format.decode(raw, (layers, kv, tokens, heads, dim), self._dtype)
            values = made.contiguous().view(-1).view(torch.uint8)
        self._between(way, stage, window, values, to_slots=False)

    def _between(self, way: Way, stage: Stage, window: Window, values: torch.Tensor, *, to_slots: bool) -> None:
        """Between pages and `values`, canonical bytes on the device."""
        if way is Way.INDEX:
            by_index(window, values, to_slots=to_slots)
            return
        size, begin = window.exact_bytes, values.data_ptr()
        by_kernel(window, begin, size, (size, begin), to_slots=to_slots)

    def _over_the_link(self, held: torch.Tensor, window: Window, *, to_slots: bool) -> None:
        """Between `held`, the window's blocks one after the other, and their slots: as few copies as can be."""
        hosts, size = window.slots, window.slot_bytes
        first, sizes = np.arange(len(hosts)), np.full(len(hosts), size)
        follows = hosts[1:] - hosts[:-1] == size
        if joined := bool(follows.any()):  # neighbours go together
            first = np.concatenate((first[:1], np.flatnonzero(~follows) + 1))
            hosts, sizes = hosts[first], np.diff(first, append=len(hosts)) * size
        there = held.data_ptr() + first * size
        if self._registers and (joined or not window.registered):
            whole = PINNED.holds_whole(hosts, sizes)
            if not whole.all():
                self._in_pieces(held, hosts[~whole], first[~whole] * size, sizes[~whole], to_slots)
                hosts, there, sizes = hosts[whole], there[whole], sizes[whole]
        into, sources = (hosts, there) if to_slots else (there, hosts)
        self._engine.copy(into, sources, sizes, to_host=to_slots)

    def _in_pieces(self, held: torch.Tensor, hosts: Ints, starts: Ints, sizes: Ints, to_slots: bool) -> None:
        """Copies of what lies in no registration, or in more than one. Through torch, which takes any memory."""
        for address, start, size in zip(hosts.tolist(), starts.tolist(), sizes.tolist(), strict=True):
            for offset, cut, _ in PINNED.cuts(address, size):
                host = host_bytes(address + offset, cut)
                piece = held[start + offset : start + offset + cut]
                if to_slots:
                    host.copy_(piece, non_blocking=True)
                else:
                    piece.copy_(host, non_blocking=True)


def best_way(device: torch.device) -> Way:
    """What to take where nobody says otherwise. On the CPU the kernel is interpreted: good for tests, and slow."""
    return Way.STAGED if device.type == "cuda" and not copy_kernel.fault(device) else Way.INDEX


def _sent(numbers: Ints, device: torch.device, into: list[torch.Tensor]) -> Callable[[], None]:
    def send() -> None:
        into.append(on_device(numbers, device))

    return send
