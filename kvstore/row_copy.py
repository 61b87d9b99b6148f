# SPDX-License-Identifier: Apache-2.0
"""Copies between an engine's cache and rows: whole blocks of canonical bytes in memory of the same device.

What the device overlay is made of. No link is crossed and no stage is needed: one launch of the kernel for so many
layers of all the blocks, or torch's indexing where there is no kernel.

Invariants
1. All that touches rows runs on one stream of the device, in the order in which it was submitted. So whoever hands a
   row on when the copy that fills it was *submitted*, or gives a row to other bytes when its last reader was, never has
   to wait for either.
2. Pages are read and written only after what the engine had ordered by then; the engine waits by `Copying.order`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from kvstore.copy_pages import by_index, by_kernel, on_device
from kvstore.copy_under_way import Copying
from kvstore.copy_windows import WORD_BYTES, Ints, Part, PartWork, Window
from kvstore.device_copy import Way, best_way
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.paged import PagedKV
from kvstore.streams import Moment, Stream, Streams, streams_of

_ROWS = "rows"
_NONE: Ints = np.empty(0, np.int64)
_STEP_GROWTH = 2
"""Each step of a promotion has so many times the layers of all before it. What crosses no link is there long before
the forward pass wants it, and each launch costs the thread that is to order that pass some 60 µs: three do for 32
layers, where even steps of four were eight."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Blocks in rows of one tensor.

    Hundreds in arrays, for a request's first token waits for what is done for each: a tensor for each of 512 took
    2 ms. Iterating makes them: (position in the chain, `[layers, kv, tokens, heads, head_dim]`) pairs.

    Attributes:
        memory: `[rows, layers, kv, tokens, heads, head_dim]`, contiguous.
        positions: of each block, in its chain.
        numbers: of each block's row, in `memory`.
    """

    memory: torch.Tensor
    positions: Ints
    numbers: Ints

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for position, number in zip(self.positions.tolist(), self.numbers.tolist(), strict=True):
            yield position, self.memory[number]

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.memory.stride(0) * self.memory.element_size()

    def cut(self, start: int, stop: int) -> Rows:
        """The `start`th to before the `stop`th of them."""
        return Rows(self.memory, self.positions[start:stop], self.numbers[start:stop])


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """Blocks of one call, and what the device is told of them once the stream has put it there."""

    rows: Rows
    work: PartWork
    table: list[torch.Tensor] = field(default_factory=list)
    """One: the part's of the blocks' pages, then for each step where its first layer begins in each row. Where there is
    no kernel, the rows' numbers."""


class RowCopier:
    """Copies whole blocks between a cache, of which block i is page i, and rows.

    Args:
        layout: the model's, without a part grid, in the engine's dtype.
        paged: the cache.
        way: STAGED for the kernel, INDEX for indexing; None for the better that works there.
        streams: the device's; a test brings its own.
        num_programs: of a launch of the kernel; 0 for what fills the device. With fewer, work beside it gets a share of
            each processor, and the copy takes longer: what pays is not measured (`bench gpu --phases trials`).
    """

    def __init__(
        self,
        layout: BlockLayout,
        paged: PagedKV,
        *,
        way: Way | None = None,
        streams: Streams | None = None,
        num_programs: int = 0,
    ) -> None:
        (cell,) = layout.parts
        if paged.page_tokens != layout.model.block_tokens:
            raise ConfigError(f"pages have {paged.page_tokens} tokens, blocks {layout.model.block_tokens}")
        self._device = paged.device
        self._streams = streams or streams_of(self._device)
        self._way = way or best_way(self._device)
        self._num_programs = num_programs
        self._part = Part(layout, cell, paged.cut(slice(None), slice(None)), layout.model.block_tokens)

    def start(self, rows: Rows, *, into_rows: bool, step_layers: int = 0) -> Copying:
        """Begin. As `PageCopier.start_gather` where `into_rows`, else as `start_scatter`, but that `step_layers` are
        those of the first step, and later ones have more. Raises what the copy raises; then nothing of it is still
        being copied."""
        streams, lows = self._streams, self._steps(step_layers)
        highs = [*lows[1:], self._part.num_layers]
        stream = streams.side(_ROWS)
        steps: list[tuple[int, Moment]] = []
        try:
            streams.wait(stream, streams.record(streams.engine()))
            made = self._sent(rows, stream, lows)
            for number, (low, high) in enumerate(zip(lows, highs, strict=True)):
                window = Window(self._part, made.work, made.table, low, high, 0, len(rows))
                streams.submit(stream, partial(self._copy, window, made, number, into_rows))
                steps.append((low, streams.record(stream)))
        except BaseException:
            streams.finish(streams.record(stream))
            raise
        num_bytes = len(rows) * rows.row_bytes
        return Copying(num_bytes, streams, steps, (self, rows), steps[-1][1] if into_rows else None)

    def _steps(self, step_layers: int) -> list[int]:
        """First layer of each step."""
        lows, num_layers = [0], self._part.num_layers
        high = step_layers or num_layers
        while high < num_layers:
            lows.append(high)
            high += _STEP_GROWTH * high
        return lows

    def _sent(self, rows: Rows, stream: Stream, lows: Sequence[int]) -> _Sent:
        """What the launches are told of all the blocks, sent once."""
        pages = rows.positions.reshape(-1, 1)
        work = PartWork(pages, np.zeros_like(pages), _NONE)
        made = _Sent(rows, work)
        told = rows.numbers
        if self._way is not Way.INDEX:
            starts = rows.memory.data_ptr() + rows.numbers * rows.row_bytes
            skipped = np.array(lows, np.int64)[:, None] * self._part.layer_bytes
            told = np.concatenate((self._part.table(work), (starts + skipped).reshape(-1)))
        self._streams.submit(stream, lambda: made.table.append(on_device(told, self._device)))
        return made

    def _copy(self, window: Window, made: _Sent, number: int, into_rows: bool) -> None:
        rows, low, high = made.rows, window.low, window.high
        if self._way is not Way.INDEX:
            alignments = (rows.memory.data_ptr(), rows.row_bytes, low * self._part.layer_bytes)
            starts = window.pages + (1 + number) * len(rows) * WORD_BYTES
            by_kernel(window, starts, 0, alignments, to_slots=into_rows, num_programs=self._num_programs)
            return
        # Bytes are bytes, and devices do not index by fp8.
        held, chosen = rows.memory.view(torch.uint8)[:, low:high], made.table[0]
        if into_rows:
            values = torch.empty((len(rows), *held.shape[1:]), dtype=torch.uint8, device=self._device)
            by_index(window, values.view(-1), to_slots=True)
            held[chosen] = values
        else:
            by_index(window, held[chosen].view(-1), to_slots=False)
