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

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvstore.copy_pages import by_index, by_kernel, on_device
from kvstore.copy_windows import Part, PartWork, Window
from kvstore.device_copy import Copying, Way, best_way
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.streams import Moment, Stream, Streams, streams_of

Rows = Sequence[tuple[int, torch.Tensor]]
"""(position in the chain, `[layers, kv, tokens, heads, head_dim]`, contiguous) pairs."""

_ROWS = "rows"


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """Blocks of one call: tables of their pages and rows, one of each, once the stream has put them on the device."""

    rows: Rows
    work: PartWork
    alignment: int
    offsets: list[torch.Tensor] = field(default_factory=list)
    starts: list[torch.Tensor] = field(default_factory=list)


class RowCopier:
    """Copies whole blocks between a cache, of which block i is page i, and rows.

    Args:
        layout: the model's, without a part grid, in the engine's dtype.
        planes: for each layer, keys and values, each a view with axes (page, token, head, dim).
        way: STAGED for the kernel, INDEX for indexing; None for the better that works there.
        streams: the device's; a test brings its own.
    """

    def __init__(
        self,
        layout: BlockLayout,
        planes: Sequence[Sequence[torch.Tensor]],
        *,
        way: Way | None = None,
        streams: Streams | None = None,
    ) -> None:
        (cell,) = layout.parts
        if planes[0][0].shape[1] != layout.model.block_tokens:
            raise ConfigError(f"pages have {planes[0][0].shape[1]} tokens, blocks {layout.model.block_tokens}")
        self._device = planes[0][0].device
        self._streams = streams or streams_of(self._device)
        self._way = way or best_way(self._device)
        self._part = Part(layout, cell, [list(layer) for layer in planes], layout.model.block_tokens)

    def start(self, rows: Rows, *, into_rows: bool, step_layers: int = 0) -> Copying:
        """Begin. As `PageCopier.start_gather` where `into_rows`, else as `start_scatter`. Raises what the copy raises;
        then nothing of it is still being copied."""
        streams, num_layers = self._streams, len(self._part.planes)
        stream = streams.side(_ROWS)
        steps: list[tuple[int, Moment]] = []
        try:
            streams.wait(stream, streams.record(streams.engine()))
            made = self._sent(rows, stream)
            step = step_layers or num_layers
            for low in range(0, num_layers, step):
                window = Window(self._part, made.work, made.offsets, low, min(low + step, num_layers), 0, len(rows))
                streams.submit(stream, lambda window=window: self._copy(window, made, into_rows))  # type: ignore[misc]
                steps.append((low, streams.record(stream)))
        except BaseException:
            streams.finish(streams.record(stream))
            raise
        num_bytes = sum(row.nbytes for _, row in rows)
        return Copying(num_bytes, streams, steps, (self, rows), steps[-1][1] if into_rows else None)

    def _sent(self, rows: Rows, stream: Stream) -> _Sent:
        """What a launch is told of all the blocks, sent once."""
        pages = np.array([[index] for index, _ in rows], np.int64)
        work = PartWork(pages, np.zeros_like(pages), ())
        starts = np.array([row.data_ptr() for _, row in rows], np.int64)
        made = _Sent(rows, work, int(np.gcd.reduce(starts)))
        numbers = self._part.offsets(work)

        def send() -> None:
            made.offsets.append(on_device(numbers, self._device))
            made.starts.append(on_device(starts, self._device))

        self._streams.submit(stream, send)
        return made

    def _copy(self, window: Window, made: _Sent, into_rows: bool) -> None:
        rows, low, high = made.rows, window.low, window.high
        if self._way is not Way.INDEX:
            skipped = low * self._part.layer_bytes
            by_kernel(window, made.starts[0] + skipped, (made.alignment, skipped), to_slots=into_rows)
            return
        if into_rows:
            values = torch.empty(len(rows) * window.exact_bytes, dtype=torch.uint8, device=self._device)
            by_index(window, values, to_slots=True)
            for (_, row), one in zip(rows, values.view(len(rows), -1), strict=True):
                row[low:high].view(-1).view(torch.uint8).copy_(one)
        else:
            values = torch.stack([row[low:high].reshape(-1).view(torch.uint8) for _, row in rows])
            by_index(window, values.view(-1), to_slots=False)
