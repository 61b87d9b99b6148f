# SPDX-License-Identifier: Apache-2.0
"""A transformers cache that blocks are copied into and out of without a detour."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvstore.api import ABSENT, LoadedRun, OpenRun
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout, engine_dtype, layout_of
from kvstore.row_copy import RowCopier, Rows
from kvstore.transfer import (
    Blocks,
    Copying,
    PageCopier,
    PagedKV,
    SlotViews,
    Streams,
    copy_rows,
    streams_of,
    to_tensor,
)

T = TypeVar("T")

_CAPACITY_STEP = 256


class BlockCache(Cache):
    """A transformers cache over one tensor `[layers, 2, heads, capacity, dim]` for one sequence.

    `update` writes in place, and a block is one strided copy over all layers. On a device, and where blocks are lossy,
    a block is a page of it, copied on side streams: `update` has each layer of a forward pass wait for its own layer
    of what was begun. Implements `EngineMemory`.

    Args:
        step_layers: layers whose copies end together, for which a forward pass then waits together; 0 for all.
            Of rows, the first step alone: those after it grow.
        step_bytes: of blocks from a store, a step has as many layers more as are no more than so many bytes.
        streams: the device's; a test brings its own, and then gets a device's path on the CPU too.
    """

    def __init__(
        self,
        layout: BlockLayout,
        device: torch.device,
        capacity: int,
        *,
        step_layers: int = 0,
        step_bytes: int = 0,
        streams: Streams | None = None,
    ) -> None:
        self._block_layout = layout
        model = layout.model
        self._block_tokens = model.block_tokens
        self._whole = layout_of(replace(model, part_layers=0, part_heads=0, kv_dtype=engine_dtype(model.kv_dtype)))
        self._shape = (model.num_layers, 2, model.num_kv_heads, model.head_dim)
        self._dtype: torch.dtype = getattr(torch, engine_dtype(model.kv_dtype))
        self._device = device
        self._step_layers, self._step_bytes = step_layers, step_bytes
        self._given, self._streams = streams, streams or streams_of(device)
        self._beside = device.type != "cpu" or streams is not None
        self._in_pages = self._beside or bool(layout.packed)
        self._page_copier: PageCopier | None = None
        self._row_copier: RowCopier | None = None
        self._to_write: list[tuple[int, SlotViews]] = []
        self._runs: list[LoadedRun] = []
        self._reading: list[Copying] = []
        self._writing: list[Copying] = []
        self._storage = self._allocate(capacity)
        self._planes = [_CacheLayer(self, layer) for layer in range(model.num_layers)]
        self._refresh()
        super().__init__(layers=[*self._planes])

    def __deepcopy__(self, memo: dict[int, object]) -> BlockCache:
        other = BlockCache.__new__(BlockCache)
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for layer in other._planes:  # a copied weak reference would be to the original
            layer.belong_to(other)
        return other

    @torch.inference_mode(False)
    def _allocate(self, capacity: int) -> torch.Tensor:
        # An ordinary tensor wherever it is made: one of inference mode could not be written to outside it, where the
        # next request may be, and has no version.
        layers, kv, heads, dim = self._shape
        rounded = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        return torch.empty(layers, kv, heads, rounded, dim, dtype=self._dtype, device=self._device)

    @property
    def capacity(self) -> int:
        """Tokens there is room for without growing."""
        return int(self._storage.shape[3])

    @property
    def version(self) -> tuple[int, int]:
        """Changes with whatever torch writes to the cache, be it through `update`, a view or in place of the storage.

        Kernels of our own and copies by address may leave it as it is.
        """
        return self._storage.data_ptr(), self._storage._version

    def seen_as(self, layout: BlockLayout) -> BlockCache:
        """This cache's tensors as blocks of another namespace of the same model, such as a lossy one.

        Good until this one grows.
        """
        other = BlockCache(
            layout,
            self._device,
            1,
            step_layers=self._step_layers,
            step_bytes=self._step_bytes,
            streams=self._given,
        )
        if other._shape != self._shape or other._dtype != self._dtype:
            raise ConfigError(f"a cache of {self._shape} in {self._dtype} cannot be seen as {layout.model!r}")
        other._storage = self._storage
        other._refresh()
        other.set_length(self.get_seq_length())
        return other

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens`, and a quarter more, so that growing costs a constant a token.

        Doubling costs half of that constant, and of a device with half its memory in one cache more than there is.
        """
        if num_tokens > self.capacity:
            self.finish()
            self._page_copier = self._row_copier = None
            old = self._storage
            self._storage = self._allocate(num_tokens + num_tokens // 4)
            self._storage[:, :, :, : old.shape[3]].copy_(old)
            self._refresh()

    def set_length(self, num_tokens: int) -> None:
        """Say that the first `num_tokens` tokens are in place, and no others."""
        self.reserve(num_tokens)
        for layer in self._planes:
            layer.length = num_tokens

    def _refresh(self) -> None:
        """Have the layers take up the storage as it is now."""
        for layer, (keys, values) in zip(self._planes, _by_layer(self._storage), strict=True):
            layer.take(keys, values)

    def planes(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, `[1, heads, capacity, dim]`."""
        return self._storage[layer, 0].unsqueeze(0), self._storage[layer, 1].unsqueeze(0)

    def block(self, index: int) -> torch.Tensor:
        """Block `index`, a view `[layers, kv, tokens, heads, head_dim]`."""
        tokens = self._block_layout.model.block_tokens
        self.reserve((index + 1) * tokens)
        return self._storage[:, :, :, index * tokens : (index + 1) * tokens].transpose(2, 3)

    def _paged(self) -> PagedKV:
        """Block i is page i."""
        return PagedKV.of([self._storage], "layer kv head slot dim", page_tokens=self._block_tokens)

    def _pages(self) -> PageCopier:
        if self._page_copier is None:
            self._page_copier = PageCopier(self._block_layout, self._paged(), streams=self._given)
        return self._page_copier

    def _rows(self) -> RowCopier:
        if self._row_copier is None:
            self._row_copier = RowCopier(self._whole, self._paged(), streams=self._given)
        return self._row_copier

    def begin(self) -> None:
        """Begin the copies noted, all blocks in one call. The engine waits for them, for what it needs of them."""
        if not self._to_write and not self._runs:
            return
        copier = self._pages()
        table = range(copier.paged.num_pages)
        # Taken out of the list first: what fails once is not tried again.
        if writes := self._taken(self._to_write):
            self._writing.append(copier.start_scatter(table, writes, step_layers=self._step_of(len(writes))))
        for run in self._taken(self._runs):
            step_layers = self._step_of(len(run.offsets))
            self._writing.append(copier.start_scatter(table, run, step_layers=step_layers))

    def _step_of(self, num_blocks: int) -> int:
        """Layers of a step of so many blocks. One more than fit would send a small window after each full one."""
        layer_bytes = num_blocks * self._block_layout.block_bytes // self._block_layout.model.num_layers
        return self._step_layers and max(self._step_layers, self._step_bytes // max(1, layer_bytes))

    @staticmethod
    def _taken(noted: list[T]) -> list[T]:
        taken = noted[:]
        noted.clear()
        return taken

    def _ordered(self, start: Callable[[], Copying]) -> None:
        """Begin to read, after what is being written; the engine writes these pages again only when they were read."""
        for copying in self._writing:
            copying.order()
        reading = start()
        reading.order()
        self._reading.append(reading)

    def wait_for(self, layer: int) -> None:
        """Have what the engine's thread orders from now on find `layer` as it was loaded."""
        for copying in self._writing:
            copying.order(layer)  # of those that wait for one another once does

    def write_block(self, index: int, views: SlotViews) -> None:
        if self._in_pages:
            if (index + 1) * self._block_tokens > self.capacity:
                self.reserve((index + 1) * self._block_tokens)
            self._to_write.append((index, views))
            return
        for cell, slot in self._cells(index, views):
            copy_rows(cell, slot)

    def write_run(self, run: LoadedRun) -> None:
        if self._in_pages:
            self.reserve((run.start + len(run.offsets)) * self._block_tokens)
            self._runs.append(run)
            return
        for index, views in enumerate(self._views_of(run), run.start):
            self.write_block(index, views)

    def read_blocks(self, blocks: Blocks | OpenRun) -> None:
        if self._in_pages:
            self.begin()  # what is to be written first is read as it will be
            copier = self._pages()
            self._ordered(lambda: copier.start_gather(range(copier.paged.num_pages), blocks))
            return
        if isinstance(blocks, OpenRun):
            blocks = zip(blocks.indices.tolist(), self._views_of(blocks), strict=True)
        for index, views in blocks:
            for cell, slot in self._cells(index, views):
                copy_rows(slot, cell)

    def _views_of(self, run: LoadedRun | OpenRun) -> Iterator[SlotViews]:
        """Of each block of a run, one a part."""
        memory, sizes = run.memory, [part.num_bytes for part in self._block_layout.parts]
        for offsets in run.offsets.tolist():
            places = zip(offsets, sizes, strict=True)
            yield [None if at == ABSENT else memory[at : at + size] for at, size in places]

    def _cells(self, index: int, views: SlotViews) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(where a part lies in the cache, its slot as a tensor), for each slot."""
        block = self.block(index)
        return [
            (
                block[part.layers.start : part.layers.stop, :, :, part.heads.start : part.heads.stop],
                to_tensor(view, part, self._dtype),
            )
            for part, view in zip(self._block_layout.parts, views, strict=True)
            if view is not None
        ]

    def write_rows(self, rows: Rows) -> None:
        if not len(rows):
            return
        self.reserve((int(rows.positions.max()) + 1) * self._whole.model.block_tokens)
        if self._beside:
            self._writing.append(self._rows().start(rows, into_rows=False, step_layers=self._step_layers))
            return
        for index, row in rows:
            copy_rows(self.block(index), row)

    def read_rows(self, rows: Rows) -> None:
        if self._beside and len(rows):
            self._ordered(lambda: self._rows().start(rows, into_rows=True))
            return
        for index, row in rows:
            copy_rows(row, self.block(index))

    def warm_up(self, *, rows: bool, slots: bool) -> None:
        """Copy the first block, whose bytes are nobody's yet, out and in again: what a request would else wait for.

        Kernels are compiled, for a second each, and tried; memory is allocated that later copies go through.
        """
        if not self._in_pages:
            return
        if slots:
            views = [memoryview(bytearray(part.num_bytes)) for part in self._block_layout.parts]
            self.read_blocks([(0, views)])
            self.finish()
            self.write_block(0, views)
        if rows:
            first = np.zeros(1, np.int64)
            memory = torch.zeros((1, *self._whole.parts[0].shape), dtype=self._dtype, device=self._device)
            self.read_rows(Rows(memory, first, first))
            self.write_rows(Rows(memory, first, first))
        self.finish()

    @property
    def is_done(self) -> bool:
        return not (self._to_write or self._runs) and all(one.is_done for one in (*self._reading, *self._writing))

    def finish(self) -> None:
        self.begin()
        for copying in (*self._reading, *self._writing):
            copying.finish()
        self._reading, self._writing = [], []

    def wait_for_engine(self) -> None:
        """Return when the device has done what this thread's engine ordered."""
        self._streams.finish(self._streams.record(self._streams.engine()))


def _by_layer(storage: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, `[1, heads, tokens, dim]`: views of all from one call, not four for each."""
    planes = iter(storage.unsqueeze(2).flatten(0, 1).unbind(0))
    return zip(planes, planes, strict=True)


class _CacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a BlockCache, as transformers sees it."""

    is_sliding = False
    is_croppable = True

    def __init__(self, owner: BlockCache, layer: int) -> None:
        # Not the base's, which sets keys and values.
        self.length = 0
        self._layer = layer
        self.belong_to(owner)
        self.is_initialized = True

    def belong_to(self, owner: BlockCache) -> None:
        # Weakly: in a cycle with its layers a dropped cache would keep the device's memory until Python collects.
        self._owner_ref = weakref.ref(owner)

    @property
    def _owner(self) -> BlockCache:
        owner = self._owner_ref()
        if owner is None:
            raise ConfigError("a layer is used after its cache was dropped")
        return owner

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """From now on the layer's lie here, `[1, heads, capacity, dim]`."""
        self._keys, self._values = keys, values

    # Cut when somebody looks: for 32 layers whose length was said, that was 0.3 ms before the first of them was needed.

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        return self._keys.narrow(2, 0, self.length)

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        return self._values.narrow(2, 0, self.length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the storage is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.dtype != self._keys.dtype or key_states.shape[:2] != self._keys.shape[:2]:
            raise ConfigError(
                f"the model computes keys of shape {tuple(key_states.shape)} in {key_states.dtype}, the cache keeps "
                f"{tuple(self._keys.shape)} in {self._keys.dtype}: one sequence at a time, without autocast"
            )
        start, fresh, owner = self.length, key_states.shape[2], self._owner
        owner.reserve(start + fresh)
        owner.wait_for(self._layer)
        self._keys.narrow(2, start, fresh).copy_(key_states)
        self._values.narrow(2, start, fresh).copy_(value_states)
        self.length = start + fresh
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= min(abs(tokens_to_remove), self.length)
