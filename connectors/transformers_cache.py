# SPDX-License-Identifier: Apache-2.0
"""A transformers cache that blocks are copied into and out of without a detour."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout, engine_dtype
from kvstore.transfer import Copying, PageCopier, PagedKV, SlotViews, copy_rows, to_tensor

_CAPACITY_STEP = 256
_BATCH_BYTES = 64 << 20
"""Noted blocks are begun when there are so many: a window's worth of a device's copies."""


class BlockCache(Cache):
    """A transformers cache over one tensor `[layers, 2, heads, capacity, dim]` for one sequence.

    `update` writes in place, and a block is one strided copy over all layers. On a device, and where blocks are lossy,
    a block is a page of it, copied on side streams until `finish`. Implements `EngineMemory`.
    """

    def __init__(self, layout: BlockLayout, device: torch.device, capacity: int) -> None:
        self._block_layout = layout
        model = layout.model
        self._shape = (model.num_layers, 2, model.num_kv_heads, model.head_dim)
        self._dtype: torch.dtype = getattr(torch, engine_dtype(model.kv_dtype))
        self._device = device
        self._in_pages = device.type != "cpu" or bool(layout.packed)
        self._copier: PageCopier | None = None
        self._to_read: list[tuple[int, SlotViews]] = []
        self._to_write: list[tuple[int, SlotViews]] = []
        self._under_way: list[Copying] = []
        self._storage = self._allocate(capacity)
        self._planes = [_CacheLayer(self, layer) for layer in range(model.num_layers)]
        super().__init__(layers=[*self._planes])

    def _allocate(self, capacity: int) -> torch.Tensor:
        layers, kv, heads, dim = self._shape
        rounded = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        return torch.empty(layers, kv, heads, rounded, dim, dtype=self._dtype, device=self._device)

    @property
    def capacity(self) -> int:
        """Tokens there is room for without growing."""
        return int(self._storage.shape[3])

    def seen_as(self, layout: BlockLayout) -> BlockCache:
        """This cache's tensors as blocks of another namespace of the same model, such as a lossy one.

        Good until this one grows.
        """
        other = BlockCache(layout, self._device, 1)
        if other._shape != self._shape or other._dtype != self._dtype:
            raise ConfigError(f"a cache of {self._shape} in {self._dtype} cannot be seen as {layout.model!r}")
        other._storage = self._storage
        other.set_length(self.get_seq_length())
        return other

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens`, at least doubling, so that growing costs a constant a token."""
        if num_tokens > self.capacity:
            self.finish()
            self._copier = None
            old = self._storage
            self._storage = self._allocate(max(num_tokens, 2 * self.capacity))
            self._storage[:, :, :, : old.shape[3]].copy_(old)
            for layer in self._planes:
                layer.refresh()

    def set_length(self, num_tokens: int) -> None:
        """Say that the first `num_tokens` tokens are in place, and no others."""
        self.reserve(num_tokens)
        for layer in self._planes:
            layer.length = num_tokens
            layer.refresh()

    def planes(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, `[1, heads, capacity, dim]`."""
        return self._storage[layer, 0].unsqueeze(0), self._storage[layer, 1].unsqueeze(0)

    def block(self, index: int) -> torch.Tensor:
        """Block `index`, a view `[layers, kv, tokens, heads, head_dim]`."""
        tokens = self._block_layout.model.block_tokens
        self.reserve((index + 1) * tokens)
        return self._storage[:, :, :, index * tokens : (index + 1) * tokens].transpose(2, 3)

    def _later(self, index: int, views: Sequence[memoryview | None], into: list[tuple[int, SlotViews]]) -> None:
        """Note a block to be copied with its neighbours: what a call costs is paid once for all of them."""
        self.reserve((index + 1) * self._block_layout.model.block_tokens)
        into.append((index, views))
        if len(into) * self._block_layout.block_bytes >= _BATCH_BYTES:
            self._begin()

    def _begin(self) -> None:
        """Begin the copies noted."""
        if self._copier is None:
            tokens = self._block_layout.model.block_tokens
            paged = PagedKV.of([self._storage], "layer kv head slot dim", page_tokens=tokens)
            self._copier = PageCopier(self._block_layout, paged)
        table = range(self._copier.paged.num_pages)
        for blocks, start in ((self._to_read, self._copier.start_gather), (self._to_write, self._copier.start_scatter)):
            if taken := blocks[:]:
                blocks.clear()  # first: what fails once is not tried again
                self._under_way.append(start(table, taken))

    def write_block(self, index: int, views: Sequence[memoryview]) -> None:
        if self._in_pages:
            self._later(index, views, self._to_write)
            return
        for cell, slot in self._cells(index, views):
            copy_rows(cell, slot)

    def read_block(self, index: int, views: Sequence[memoryview | None]) -> None:
        if self._in_pages:
            self._later(index, views, self._to_read)
            return
        for cell, slot in self._cells(index, views):
            copy_rows(slot, cell)

    def _cells(self, index: int, views: Sequence[memoryview | None]) -> list[tuple[torch.Tensor, torch.Tensor]]:
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

    def write_tensor(self, index: int, block: torch.Tensor) -> None:
        copy_rows(self.block(index), block)

    def read_tensor(self, index: int, block: torch.Tensor) -> None:
        copy_rows(block, self.block(index))

    def finish(self) -> None:
        if self._to_read or self._to_write:
            self._begin()
        done, self._under_way = self._under_way, []
        for copying in done:
            copying.order()
            copying.finish()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


class _CacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a BlockCache, as transformers sees it."""

    is_sliding = False
    is_croppable = True

    def __init__(self, owner: BlockCache, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0
        self._owner = owner
        self._layer = layer
        self.is_initialized = True
        self.refresh()

    def refresh(self) -> None:
        """Take up the owner's storage as it is now."""
        self._keys, self._values = self._owner.planes(self._layer)
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]

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
        start, stop = self.length, self.length + key_states.shape[2]
        self._owner.reserve(stop)
        self._keys[:, :, start:stop] = key_states
        self._values[:, :, start:stop] = value_states
        self.length = stop
        self.keys, self.values = self._keys[:, :, :stop], self._values[:, :, :stop]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0
        self.refresh()

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= min(abs(tokens_to_remove), self.length)
        self.refresh()
