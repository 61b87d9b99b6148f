# SPDX-License-Identifier: Apache-2.0
"""Copies between a device's pages and slots on side streams: what `PageCopier` does where the engine is not on the CPU.

Ways, to be told apart by measurement (`python -m bench gpu`); all move the same bytes:

    STAGED   the kernel of `copy_kernel` between pages and a stage on the device, one large copy a block beyond it
    INDEX    the same with torch's indexing in place of the kernel: where there is no Triton, and on the CPU
    DIRECT   the kernel between pages and pinned host memory: no stage, but its programs wait for the link
    BATCH    copy engines between pages and pinned host memory, row by row: no processor is involved at all

STAGED stands as the default for a reason, not for a figure: its copies over the link are as large as a block, and it
takes the device's processors for a few dozen µs a window. No device has timed the four yet; the losers and by how much
belong here as soon as one has. DIRECT and BATCH need pinned slots, BATCH needs pages whose rows are long; a call whose
slots or pages are not like that is done STAGED.

Order on a device, for windows that take turns with two stages, in a save up to four (arrows are events; nothing blocks
the host until `finish`):

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
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvstore import copy_kernel
from kvstore.copy_engine import CopyEngine, engine_of, host_bytes, reads_host_memory
from kvstore.copy_pages import by_index, by_kernel, on_device
from kvstore.copy_windows import Ints, Part, PartWork, Window, address_of
from kvstore.layout import BlockLayout, PartLayout
from kvstore.lossy import FORMATS
from kvstore.pinning import PINNED
from kvstore.streams import Moment, Stream, Streams, streams_of

_STAGE_BYTES = 64 << 20
_SAVE_STAGES = 4
"""A save's pages are free for the engine again when its last window is in a stage: so many windows need not wait for
the link. 256 MiB are 2,048 tokens of an 8B model. A load has two: its pages are written at the other end."""
_LEAST_STAGES = 2
_MIN_ROW_BYTES = 4 << 10
"""Rows shorter than this are not worth a copy engine's call each."""
_DIRECT_PROGRAMS = 32
"""Enough loads in flight to fill a link, few enough to leave the device to the forward pass."""


class Way(enum.Enum):
    """See the module."""

    STAGED = "staged"
    INDEX = "index"
    DIRECT = "direct"
    BATCH = "batch"


class Copying:
    """A copy under way. Its slots, and a load's pages, are not to be touched before it is finished.

    Attributes:
        num_bytes: what moves.
    """

    def __init__(
        self,
        num_bytes: int,
        streams: Streams,
        steps: Sequence[tuple[int, Moment]] = (),
        held: object = None,
        read: Moment | None = None,
    ) -> None:
        self.num_bytes = num_bytes
        self._streams = streams
        self._steps = steps  # (first layer, reached when the step is done), in order
        self._held = held  # what the copies read and write stays alive
        self._read = read  # of a save: when the last page was read, which is before the last byte crossed the link

    @property
    def is_done(self) -> bool:
        return not self._steps or self._streams.is_reached(self._steps[-1][1])

    def finish(self) -> None:
        """Return when it is done. Idempotent."""
        if self._steps:
            self._streams.finish(self._steps[-1][1])
        self._held = None

    def order(self, layer: int | None = None) -> None:
        """Have the engine's work, as submitted by this thread from now on, wait for `layer` (of the model) or for all.

        After a load the engine then finds it in its pages; after a save it may write the pages again, though their
        bytes may still be on the link. It does not block the caller; `finish` must still be called before the slots
        are released.
        """
        if self._read is not None:
            self._streams.wait(self._streams.engine(), self._read)
            return
        moments = [moment for first, moment in self._steps if layer is None or first <= layer]
        if moments:
            self._streams.wait(self._streams.engine(), moments[-1])


@dataclass(slots=True, eq=False)
class _Stage:
    num_bytes: int = 0
    memory: list[torch.Tensor] = field(default_factory=list)
    """One, once the kernels' stream has allocated it."""
    free: Moment = None
    """When what it was last used for is done; meaningless while it `is_new`."""
    is_new: bool = True
    packed: torch.Tensor | None = None
    """Lossy bytes of a save under way. Replaced only on the kernels' stream after `free`: then nobody reads them."""


@dataclass(slots=True, eq=False)
class _Direction:
    name: str
    stages: list[_Stage]
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a call is submitted: windows of two threads would meet in a stage."""


class DeviceCopier:
    """See the module.

    Args:
        planes: of each of `cells`, `[layer][kv]` tensors (page, token, head, dim) cut to the part's heads.
        way: None for the best that works here.
    """

    def __init__(
        self,
        layout: BlockLayout,
        cells: Sequence[PartLayout],
        planes: Sequence[list[list[torch.Tensor]]],
        piece_tokens: int,
        *,
        way: Way | None = None,
        streams: Streams | None = None,
        copy_engine: CopyEngine | None = None,
        stage_bytes: int = _STAGE_BYTES,
    ) -> None:
        self.device = planes[0][0][0].device
        self.streams = streams or streams_of(self.device)
        self.way = way or best_way(self.device)
        self._parts = [Part(layout, cell, of, piece_tokens) for cell, of in zip(cells, planes, strict=True)]
        self._format = FORMATS[layout.packed] if layout.packed else None
        self._dtype = planes[0][0][0].dtype
        self._engine = copy_engine or engine_of(self.device)
        self._reads_host = reads_host_memory(self.device)
        self._stage_bytes = stage_bytes
        self._save = _Direction("save", [_Stage() for _ in range(_SAVE_STAGES)])
        self._load = _Direction("load", [_Stage() for _ in range(_LEAST_STAGES)])

    def start(
        self,
        work: Sequence[tuple[int, PartWork]],
        *,
        to_slots: bool,
        after: Moment = None,
        step_layers: int = 0,
    ) -> Copying:
        """Submit copies of (part, blocks) pairs.

        Args:
            after: when the engine's pages may be read or written; None for now, as the calling thread's stream has it.
            step_layers: layers whose copies end together, so that a forward pass can begin before the last are there;
                0 for all.
        """
        direction, streams = (self._save if to_slots else self._load), self.streams
        kernels, copies = streams.side(f"{direction.name} kernels"), streams.side(f"{direction.name} copies")
        if after is None:
            after = streams.record(streams.engine())
        way = self._possible(work)
        steps: list[tuple[int, Moment]] = []
        num_bytes = 0
        with direction.lock:
            try:
                streams.wait(kernels, after)
                if way is Way.BATCH:
                    streams.wait(copies, after)
                number = 0
                for first_layer, windows in self._steps(work, step_layers, kernels):
                    for window in windows:
                        num_bytes += window.num_blocks * window.slot_bytes
                        if window.work.tokens is None:
                            self._submit(way, direction, number, window, to_slots, kernels, copies)
                        else:  # the other ways know whole pieces only
                            self._submit(Way.INDEX, direction, number, window, to_slots, kernels, copies)
                            if way is Way.BATCH:  # whose moments are on `copies`
                                streams.wait(copies, streams.record(kernels))
                        number += 1
                    on_copies = way is Way.BATCH or (to_slots and way is not Way.DIRECT)
                    steps.append((first_layer, streams.record(copies if on_copies else kernels)))
            except BaseException:
                for stream in (kernels, copies):
                    streams.finish(streams.record(stream))
                raise
            read = streams.record(kernels) if to_slots and way is not Way.BATCH and steps else None
        return Copying(num_bytes, streams, steps, (self, work), read)

    def _possible(self, work: Sequence[tuple[int, PartWork]]) -> Way:
        """The chosen way, or the one that works for these slots and pages too."""
        if self.way not in (Way.DIRECT, Way.BATCH):
            return self.way
        other = best_way(self.device)
        if self._format is not None or (self.way is Way.DIRECT and not self._reads_host):
            return other
        if self.way is Way.BATCH and any(self._parts[at].piece.row_bytes < _MIN_ROW_BYTES for at, _ in work):
            return other
        if self.device.type == "cuda":
            views = [view for _, part in work for view in part.views]
            cuts = [PINNED.cuts(address_of(view), view.nbytes) for view in views]
            if any(len(cut) > 1 or not cut[0][2] for cut in cuts):
                return other
        return self.way

    def _steps(
        self, work: Sequence[tuple[int, PartWork]], step_layers: int, kernels: Stream
    ) -> list[tuple[int, list[Window]]]:
        """(first layer, windows) in the order of layers: all of a step's blocks before the next step's first."""
        steps: list[tuple[int, list[Window]]] = []
        for at, blocks in work:
            part, num_blocks = self._parts[at], len(blocks.views)
            offsets: list[torch.Tensor] = []
            self.streams.submit(kernels, _sent(part.offsets(blocks), self.device, offsets))
            num_layers = len(part.planes)
            step = step_layers or num_layers
            for low in range(0, num_layers, step):
                high = min(low + step, num_layers)
                size = max(1, self._stage_bytes // ((high - low) * part.layer_bytes))
                windows = [
                    Window(part, blocks, offsets, low, high, first, min(first + size, num_blocks))
                    for first in range(0, num_blocks, size)
                ]
                steps.append((part.cell.layers.start + low, windows))
        return sorted(steps, key=lambda step: step[0])

    def _submit(
        self,
        way: Way,
        direction: _Direction,
        number: int,
        window: Window,
        to_slots: bool,
        kernels: Stream,
        copies: Stream,
    ) -> None:
        """Submit one window. `number`: of its call, which says which stage it goes through."""
        streams = self.streams
        if way is Way.DIRECT:
            streams.submit(kernels, lambda: self._direct(window, to_slots))
            return
        if way is Way.BATCH:
            streams.submit(copies, lambda: self._rows(window, to_slots))
            return
        num_bytes = window.num_blocks * max(window.exact_bytes, window.slot_bytes)
        stage = self._stage(direction, number, num_bytes, kernels, copies)
        first, second = (kernels, copies) if to_slots else (copies, kernels)
        before: Callable[[], None]
        then: Callable[[], None]
        if to_slots:
            before, then = lambda: self._fill(way, stage, window), lambda: self._send(stage, window)
        else:
            before, then = lambda: self._fetch(stage, window), lambda: self._empty(way, stage, window)
        if not stage.is_new:
            streams.wait(first, stage.free)
        streams.submit(first, before)
        streams.wait(second, streams.record(first))
        streams.submit(second, then)
        stage.free, stage.is_new = streams.record(second), False

    def _stage(self, direction: _Direction, number: int, num_bytes: int, kernels: Stream, copies: Stream) -> _Stage:
        """The stage of a call's window `number`, with room for it. Where the device has no memory for more, two do."""
        stages = direction.stages
        stage = stages[number % len(stages)]
        try:
            self._make_room(stage, num_bytes, kernels, copies)
        except torch.cuda.OutOfMemoryError:
            if number % len(stages) < _LEAST_STAGES:
                raise
            for one in stages[_LEAST_STAGES:]:
                if not one.is_new:  # copies of its bytes may be under way, on a stream that did not allocate them
                    self.streams.finish(one.free)
            del stages[_LEAST_STAGES:]
            stage = stages[number % len(stages)]
            self._make_room(stage, num_bytes, kernels, copies)
        return stage

    def _make_room(self, stage: _Stage, num_bytes: int, kernels: Stream, copies: Stream) -> None:
        if num_bytes <= stage.num_bytes:
            return
        if not stage.is_new:
            self.streams.finish(stage.free)
        room_bytes = max(num_bytes, self._stage_bytes)
        # On the kernels' stream, and the copies wait for it: memory that an allocator hands out on one stream may
        # still be in use there by whoever gave it back.
        self.streams.submit(kernels, lambda: _allocate(stage, room_bytes, self.device))
        self.streams.wait(copies, self.streams.record(kernels))
        stage.num_bytes = room_bytes

    # -- what runs on the streams ------------------------------------------------------------------------------

    def _fill(self, way: Way, stage: _Stage, window: Window) -> None:
        """Pages → stage, packed where the format is lossy."""
        values = stage.memory[0][: window.num_blocks * window.exact_bytes]
        self._between(way, window, values, to_slots=True)
        if self._format is not None:
            shaped = values.view(self._dtype).view(window.part.shape_of(window.num_blocks, window.high - window.low))
            stage.packed = self._format.encode(shaped).view(-1)

    def _send(self, stage: _Stage, window: Window) -> None:
        """Stage → slots."""
        held = stage.packed if stage.packed is not None else stage.memory[0]
        self._over_the_link(held, window, to_slots=True)

    def _fetch(self, stage: _Stage, window: Window) -> None:
        """Slots → stage."""
        self._over_the_link(stage.memory[0], window, to_slots=False)

    def _empty(self, way: Way, stage: _Stage, window: Window) -> None:
        """Stage → pages."""
        values = stage.memory[0][: window.num_blocks * window.slot_bytes]
        if self._format is not None:
            blocks, *shape = window.part.shape_of(window.num_blocks, window.high - window.low)
            raw = values.view(blocks, shape[0], window.part.slot_layer_bytes)
            layers, kv, tokens, heads, dim = shape
            made = self._format.decode(raw, (layers, kv, tokens, heads, dim), self._dtype)
            values = made.contiguous().view(-1).view(torch.uint8)
        self._between(way, window, values, to_slots=False)

    def _between(self, way: Way, window: Window, values: torch.Tensor, *, to_slots: bool) -> None:
        """Between pages and `values`, canonical bytes on the device."""
        if way is Way.INDEX:
            by_index(window, values, to_slots=to_slots)
            return
        starts = torch.arange(window.num_blocks, dtype=torch.int64, device=self.device) * window.exact_bytes
        by_kernel(window, starts + values.data_ptr(), (window.exact_bytes, values.data_ptr()), to_slots=to_slots)

    def _direct(self, window: Window, to_slots: bool) -> None:
        part = window.part
        views = window.work.views[window.first : window.stop]
        starts = np.array([address_of(view) for view in views], np.int64) + window.low * part.slot_layer_bytes
        slots = on_device(starts, self.device)
        by_kernel(window, slots, tuple(starts.tolist()), to_slots=to_slots, num_programs=_DIRECT_PROGRAMS)

    def _over_the_link(self, held: torch.Tensor, window: Window, *, to_slots: bool) -> None:
        """Between `held`, the window's blocks one after the other, and their slots: as few copies as can be."""
        skipped, size = window.low * window.part.slot_layer_bytes, window.slot_bytes
        runs: list[tuple[int, int, int]] = []  # address, offset in held, bytes
        for number, view in enumerate(window.work.views[window.first : window.stop]):
            address = address_of(view) + skipped
            if runs and runs[-1][0] + runs[-1][2] == address:
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + size)
            else:
                runs.append((address, number * size, size))
        for address, start, num_bytes in runs:
            for offset, cut, _ in PINNED.cuts(address, num_bytes):
                host = host_bytes(address + offset, cut)
                piece = held[start + offset : start + offset + cut]
                if to_slots:
                    host.copy_(piece, non_blocking=True)
                else:
                    piece.copy_(host, non_blocking=True)

    def _rows(self, window: Window, to_slots: bool) -> None:
        """Every contiguous row between pages and slots, as one batch."""
        part, chosen = window.part, slice(window.first, window.stop)
        (size0, size1, _), (step0, step1, _), row = part.piece.sizes, part.piece.steps, part.piece.row_bytes
        pieces = window.work.pages.shape[1]
        offsets = part.offsets(window.work).reshape(-1, pieces)[chosen]
        planes = part.addresses[window.low * part.num_kv : window.high * part.num_kv]
        rows = (np.arange(size0)[:, None] * step0 + np.arange(size1) * step1).reshape(-1)
        engine = planes[None, :, None, None] + offsets[:, None, :, None] + rows
        starts = np.array([address_of(view) for view in window.work.views[chosen]], np.int64)
        starts += window.low * part.slot_layer_bytes
        inside = np.arange(len(planes))[:, None, None] * part.plane_bytes
        inside = inside + np.arange(pieces)[:, None] * part.piece.num_bytes + np.arange(len(rows)) * row
        slots = starts[:, None, None, None] + inside
        into, source = (slots, engine) if to_slots else (engine, slots)
        self._engine.copy(into.reshape(-1), source.reshape(-1), row, to_host=to_slots)


def best_way(device: torch.device) -> Way:
    """What to take where nobody says otherwise. On the CPU the kernel is interpreted: good for tests, and slow."""
    return Way.STAGED if device.type == "cuda" and not copy_kernel.fault(device) else Way.INDEX


def _allocate(stage: _Stage, num_bytes: int, device: torch.device) -> None:
    stage.memory[:] = [torch.empty(num_bytes, dtype=torch.uint8, device=device)]


def _sent(numbers: Ints, device: torch.device, into: list[torch.Tensor]) -> Callable[[], None]:
    def send() -> None:
        into.append(on_device(numbers, device))

    return send
