# SPDX-License-Identifier: Apache-2.0
"""Copies between an engine's paged KV tensors and slots.

    PageCopier   gather (save) and scatter (load) whole blocks, many in one call; begun and waited for, or both at once
    to_tensor    a slot as a tensor, without a copy
    copy_rows    one strided copy between tensors, for engines that have no pages

A slot is a memoryview of a part's canonical bytes, `[layers][kv][tokens][heads][head_dim]`. Bytes are never
converted here, so fp8 and bf16 are just bytes; the one exception is a namespace that asked for a lossy format
(`kvstore.lossy`), which is packed and unpacked on the engine's device.

Invariants: nothing outside the named pages, layers and heads is read or written; page ids and sizes are
checked before the first byte moves; when `gather` or `scatter` returns, its copies are done, on a device too. How they
are done is in `kvstore.cpu_copy` and `kvstore.device_copy`.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from kvstore.api import ABSENT, LoadedRun, OpenRun
from kvstore.copy_under_way import Copying as Copying
from kvstore.copy_under_way import LinkShare as LinkShare
from kvstore.copy_windows import Ints, PartWork, address_of
from kvstore.copying import assign
from kvstore.cpu_copy import CpuCopier
from kvstore.device_copy import DeviceCopier
from kvstore.device_copy import Way as Way
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout, PartLayout
from kvstore.paged import PagedKV as PagedKV
from kvstore.paged import Planes, check_fit, extent_of, kind_of
from kvstore.streams import Moment as Moment
from kvstore.streams import Streams as Streams
from kvstore.streams import streams_of as streams_of

SlotViews = Sequence[memoryview | None]
"""Bytes of a block, one entry for each part of the copier; None where the part is not to be copied."""

Blocks = Iterable[tuple[int, SlotViews]]
"""(position in the chain, slots) pairs."""


def to_tensor(view: memoryview, part: PartLayout, dtype: torch.dtype) -> torch.Tensor:
    """A slot as a tensor of `part.shape` over the same bytes.

    The tensor keeps the view alive. Do not write where the view is read-only: torch cannot say so.
    """
    if view.nbytes != part.num_bytes:
        raise ValueError(f"the slot has {view.nbytes} bytes, part {part.part} has {part.num_bytes}")
    # Through an address: torch warns for every read-only buffer it is given.
    array = np.frombuffer(view, np.uint8)
    raw = (ctypes.c_char * view.nbytes).from_address(array.ctypes.data)
    raw.keep = array  # type: ignore[attr-defined]  # the tensor holds raw, raw holds the view
    return torch.frombuffer(raw, dtype=dtype).view(part.shape)


def copy_rows(into: torch.Tensor, source: torch.Tensor) -> None:
    """`into.copy_(source)` for tensors alike in shape and dtype, each with any strides.

    On the CPU it runs on this thread alone: torch splits such copies over its thread pool, whose
    barrier costs ten times the copy as soon as another process wants a core. With a device on either side it
    is torch's own copy, asynchronous where the host side is pinned.
    """
    if into.shape != source.shape or into.dtype != source.dtype:
        raise ValueError(f"cannot copy {kind_of(source)} into {kind_of(into)}")
    if into.device.type != "cpu" or source.device.type != "cpu":
        into.copy_(source, non_blocking=True)
        return
    row_bytes = into.element_size()
    axes = list(zip(into.shape, into.stride(), source.stride(), strict=True))
    axes = [(size, a * row_bytes, b * row_bytes) for size, a, b in axes]
    while axes and (axes[-1][0] == 1 or axes[-1][1] == axes[-1][2] == row_bytes):
        row_bytes *= axes.pop()[0]
    shape = tuple(size for size, _, _ in axes)
    row: np.dtype[np.void] = np.dtype((np.void, row_bytes))
    views = []
    for tensor, at in ((into, 1), (source, 2)):
        steps = tuple(axis[at] for axis in axes)
        views.append(np.ndarray(shape, row, _memory(tensor.data_ptr(), extent_of(tensor)), strides=steps))
    assign(views[0], views[1])


PageIds = Sequence[int] | Sequence[Sequence[int]]
"""A sequence's page table, or several, see `PageCopier`."""


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Pages, `[tables, blocks, pieces of a block]`, and which of a page's pieces it is, `[blocks, pieces]`."""

    pages: Ints
    pieces: Ints


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """Blocks of one call.

    Attributes:
        numbers: positions in the chain, `[blocks]`.
        addresses: where the slot of each part begins, `[blocks, parts]`; 0 for one that is not to be copied.
        held: what keeps their memory.
    """

    numbers: Ints
    addresses: Ints
    held: object

    def of(self, chosen: Ints | npt.NDArray[np.bool_]) -> _Slots:
        return _Slots(self.numbers[chosen], self.addresses[chosen], self.held)


class PageCopier:
    """Copies blocks between `paged` and slots of the parts that are exactly its layers × heads.

    Args:
        layout: the model's, from `Store.open`.
        paged: the engine's tensors.
        layers, heads: which of the model's these tensors hold (one rank's under TP or PP); all if None.
        groups: of each layer, the number of its page table, where a sequence has several: then `page_ids` are all of
            these, and ABSENT a page that is not there, whose layers a load leaves out.
        way: how a device copies, see `kvstore.device_copy`; None for the best that works there.
        streams: the device's; a test brings its own, and then gets a device's path on the CPU too.

    Raises ConfigError where the tensors do not fit the layout, where pages are neither a divisor nor a
    multiple of a block, where the part grid is coarser than the rank, or where there are groups and a lossy format.
    """

    def __init__(
        self,
        layout: BlockLayout,
        paged: PagedKV,
        *,
        layers: range | None = None,
        heads: range | None = None,
        groups: Sequence[int] | None = None,
        way: Way | None = None,
        streams: Streams | None = None,
    ) -> None:
        model = layout.model
        layers = range(model.num_layers) if layers is None else layers
        heads = range(model.num_kv_heads) if heads is None else heads
        check_fit(layout, paged, layers, heads)
        if groups is not None and layout.packed:
            raise ConfigError("layers with page tables of their own are not stored in a lossy format")
        self.layout = layout
        self.paged = paged
        self.parts = layout.parts_covering(layers, heads)
        self._cells = [layout.parts[part] for part in self.parts]
        self._sizes: Ints = np.array([cell.num_bytes for cell in self._cells], np.int64)
        self._block_tokens = model.block_tokens
        self._piece_tokens = min(paged.page_tokens, model.block_tokens)
        self._pieces = model.block_tokens // self._piece_tokens
        self._layer_at = layers.start
        self._head_at = heads.start
        self._groups: Ints | None = None if groups is None else np.array(groups, np.int64)
        self._by_address = paged.device.type == "cpu" and not layout.packed and streams is None and groups is None
        self._way, self._streams = way, streams
        self._device: DeviceCopier | None = None
        self._lock = threading.Lock()

    @property
    def block_bytes(self) -> int:
        """Bytes a block has over this copier's parts."""
        return sum(cell.num_bytes for cell in self._cells)

    @property
    def num_views(self) -> int:
        """Strided copies that a piece of a page costs, over all parts."""
        return self._on_cpu.num_views

    def gather(self, page_ids: PageIds, blocks: Blocks | OpenRun) -> int:
        """Copy blocks from the engine into slots; returns the bytes copied.

        Args:
            page_ids: the sequence's page table; entry i holds its tokens from i × page tokens on.
            blocks: with writable slots for `parts`. A run of them costs the caller's thread less.
        """
        return _finished(self.start_gather(page_ids, blocks))

    def scatter(self, page_ids: PageIds, blocks: Blocks | LoadedRun) -> int:
        """Copy blocks from slots into the engine's pages; arguments and result as in `gather`."""
        return _finished(self.start_scatter(page_ids, blocks))

    def _slots_of(self, blocks: Blocks | LoadedRun | OpenRun, *, to_slots: bool) -> _Slots:
        """Refuses slots that do not fit."""
        if not isinstance(blocks, LoadedRun | OpenRun):
            return self._slots_of_views(list(blocks), to_slots)
        memory, offsets, least = blocks.memory, blocks.offsets, 0
        if offsets.shape[1] != len(self._sizes):
            raise ValueError(f"a run has {offsets.shape[1]} slots a block for the {len(self.parts)} parts {self.parts}")
        if isinstance(blocks, OpenRun):
            numbers, least = blocks.indices, ABSENT
        else:
            numbers = np.arange(blocks.start, blocks.start + len(offsets))
        if ((offsets < least) | (offsets > memory.nbytes - self._sizes)).any():
            raise ValueError(f"a run has slots outside its memory of {memory.nbytes} bytes")
        if to_slots and memory.readonly:
            raise ValueError("the slots of a run are read-only")
        return _Slots(numbers, np.where(offsets < 0, 0, address_of(memory) + offsets), memory)

    def _slots_of_views(self, work: Sequence[tuple[int, SlotViews]], to_slots: bool) -> _Slots:
        addresses, sizes = [], self._sizes.tolist()
        for index, views in work:
            if len(views) != len(sizes):
                raise ValueError(f"block {index} has {len(views)} slots for the {len(self.parts)} parts {self.parts}")
            for size, view in zip(sizes, views, strict=True):
                if view is None:
                    addresses.append(0)
                    continue
                if view.nbytes != size:
                    raise ValueError(f"block {index}: a slot of {view.nbytes} bytes for a part of {size}")
                if to_slots and view.readonly:
                    raise ValueError(f"block {index}: the slot is read-only")
                addresses.append(address_of(view))
        numbers = np.array([index for index, _ in work], np.int64)
        return _Slots(numbers, np.array(addresses, np.int64).reshape(len(work), len(sizes)), work)

    def _places(self, page_ids: PageIds, numbers: Ints, *, to_slots: bool) -> _Places:
        """Refuses what is outside."""
        tokens = numbers[:, None] * self._block_tokens + np.arange(self._pieces) * self._piece_tokens
        least = 0 if to_slots else self._least
        pages = [self._pages_in(table, numbers, tokens, least) for table in self._tables(page_ids)]
        return _Places(np.stack(pages), tokens % self.paged.page_tokens // self._piece_tokens)

    def _tables(self, page_ids: PageIds) -> Sequence[Sequence[int]]:
        return cast(Sequence[Sequence[int]], [page_ids] if self._groups is None else page_ids)

    @property
    def _least(self) -> int:
        """Of what stands in a page table."""
        return 0 if self._groups is None else ABSENT

    def _pages_in(self, table: Sequence[int], numbers: Ints, tokens: Ints, least: int) -> Ints:
        page_tokens, num_pages = self.paged.page_tokens, self.paged.num_pages
        outside = (numbers < 0) | ((numbers + 1) * self._block_tokens > len(table) * page_tokens)
        if outside.any():
            index = numbers[int(outside.argmax())]
            raise ValueError(f"block {index} is outside a page table of {len(table)} × {page_tokens} tokens")
        pages = _chosen(table, tokens // page_tokens)
        outside = (pages < least) | (pages >= num_pages)
        if outside.any():
            at, piece = divmod(int(outside.argmax()), self._pieces)
            page = pages[at, piece]
            raise ValueError(f"block {numbers[at]}: page {page} is outside the engine's {num_pages} pages")
        return pages

    def _planes_of(self, cell: PartLayout) -> Planes:
        """A part's planes, cut to its heads."""
        heads = slice(cell.heads.start - self._head_at, cell.heads.stop - self._head_at)
        layers = slice(cell.layers.start - self._layer_at, cell.layers.stop - self._layer_at)
        return self.paged.cut(layers, heads)

    def start_gather(
        self, page_ids: PageIds, blocks: Blocks | OpenRun, *, after: Moment = None, put_off: bool = False
    ) -> Copying:
        """`gather`, begun: on a device it returns at once, on the CPU when it is done. See `Copying`.

        Args:
            after: the moment, from `now`, at which the engine's work on these pages is done; None for now.
            put_off: what lies in the device's own memory is not sent before `Copying.finish` or `finish_by`, or before
                others want the room: the engine need not wait for it.
        """
        slots = self._slots_of(blocks, to_slots=True)
        return self._start(page_ids, slots, to_slots=True, after=after, put_off=put_off)

    def start_scatter(
        self,
        page_ids: PageIds,
        blocks: Blocks | LoadedRun,
        *,
        after: Moment = None,
        step_layers: int = 0,
        tokens: range | None = None,
    ) -> Copying:
        """`scatter`, begun, as in `start_gather`. With `step_layers` a forward pass may begin before it ends.

        The first layers of all blocks are there first: `Copying.order(layer)` before each layer of the pass.

        Args:
            tokens: of the sequence; of blocks that reach beyond them only these are written, whatever else the page
                holds: a forward pass may be writing it. The page table may end with them.
        """
        slots = self._slots_of(blocks, to_slots=False)
        if tokens is not None:
            first = slots.numbers * self._block_tokens
            whole = (first >= tokens.start) & (first + self._block_tokens <= tokens.stop)
            if not whole.all():
                inside = slots.of(whole)
                parts = self._parts_of(self._places(page_ids, inside.numbers, to_slots=False), inside)
                for at in np.flatnonzero(~whole).tolist():
                    parts += self._cut(page_ids, slots.of(np.array([at])), tokens)
                return self._on_device().start(parts, to_slots=False, after=after, step_layers=step_layers)
        return self._start(page_ids, slots, to_slots=False, after=after, step_layers=step_layers)

    def _cut(self, page_ids: PageIds, block: _Slots, tokens: range) -> list[tuple[int, PartWork]]:
        """Work for those of one block's tokens that are among `tokens`."""
        index = int(block.numbers[0])
        first = index * self._block_tokens
        low, high = max(first, tokens.start), min(first + self._block_tokens, tokens.stop)
        if low >= high:
            return []
        page_tokens, tables = self.paged.page_tokens, self._tables(page_ids)
        places = _Places(np.zeros((len(tables), 1, self._pieces), np.int64), np.zeros((1, self._pieces), np.int64))
        for piece in range((low - first) // self._piece_tokens, -(-(high - first) // self._piece_tokens)):
            token = first + piece * self._piece_tokens
            places.pieces[0, piece] = token % page_tokens // self._piece_tokens
            for at, table in enumerate(tables):
                if index < 0 or high > len(table) * page_tokens:
                    raise ValueError(f"token {high - 1} is outside a page table of {len(table)} × {page_tokens} tokens")
                page = table[token // page_tokens]
                if not self._least <= page < self.paged.num_pages:
                    raise ValueError(f"block {index}: page {page} is outside the engine's {self.paged.num_pages} pages")
                places.pages[at, 0, piece] = page
        return self._parts_of(places, block, slice(low - first, high - first))

    def now(self) -> Moment:
        """The moment at which all that this thread's stream of the engine has by now is done: for `after`.

        For a copy that another thread begins: that thread's stream says nothing about the forward pass.
        """
        streams = self._on_device().streams
        return streams.record(streams.engine())

    def _start(
        self,
        page_ids: PageIds,
        slots: _Slots,
        *,
        to_slots: bool,
        after: Moment = None,
        step_layers: int = 0,
        put_off: bool = False,
    ) -> Copying:
        parts = self._parts_of(self._places(page_ids, slots.numbers, to_slots=to_slots), slots)
        if self._by_address:
            return self._on_cpu.start(parts, to_slots=to_slots)
        device = self._on_device()
        return device.start(parts, to_slots=to_slots, after=after, step_layers=step_layers, put_off=put_off)

    def _parts_of(self, places: _Places, slots: _Slots, cut: slice | None = None) -> list[tuple[int, PartWork]]:
        parts: list[tuple[int, PartWork]] = []
        for at in range(len(self._cells)):
            addresses = slots.addresses[:, at]
            if (chosen := addresses != 0).any():
                pages = places.pages[:, chosen]
                work = PartWork(
                    pages[0] if self._groups is None else pages,
                    places.pieces[chosen],
                    addresses[chosen],
                    slots.held,
                    cut,
                )
                parts.append((at, work))
        return parts

    @functools.cached_property
    def _on_cpu(self) -> CpuCopier:
        return CpuCopier(self._cells, [self._planes_of(cell) for cell in self._cells], self._piece_tokens)

    def _on_device(self) -> DeviceCopier:
        with self._lock:
            if self._device is None:
                planes = [self._planes_of(cell) for cell in self._cells]
                groups = None
                if self._groups is not None:
                    layers = [
                        range(c.layers.start - self._layer_at, c.layers.stop - self._layer_at) for c in self._cells
                    ]
                    groups = [self._groups[one.start : one.stop] for one in layers]
                self._device = DeviceCopier(
                    self.layout,
                    self._cells,
                    planes,
                    self._piece_tokens,
                    groups=groups,
                    way=self._way,
                    streams=self._streams,
                )
            return self._device


def _finished(copying: Copying) -> int:
    copying.finish()
    return copying.num_bytes


def _chosen(page_ids: Sequence[int], entries: Ints) -> Ints:
    """These entries of a page table, which may be much longer than what is copied."""
    if isinstance(page_ids, range):
        return page_ids.start + page_ids.step * entries
    if entries.size:
        low, high = int(entries.min()), int(entries.max())
        if high - low < 2 * entries.size:
            return np.array(page_ids[low : high + 1], np.int64)[entries - low]
    return np.array([page_ids[entry] for entry in entries.ravel().tolist()], np.int64).reshape(entries.shape)


def _memory(address: int, num_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * num_bytes).from_address(address))
