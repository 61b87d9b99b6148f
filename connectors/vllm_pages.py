# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV tensors as canonical bytes.

vLLM registers one tensor a layer with axes (page, head, token, channel), the channels being K then V. On a GPU that is
what memory holds, in whichever order, and strides describe it: `kvstore.transfer` copies it. On a CPU each page is
packed in an order that its attention kernel likes, which `connectors.vllm_order` finds. Copies then go by strides in
both directions, a call for all layers of some blocks. Loading through the kernel itself costs a second copy, into the
tensors it takes, and its threads meet at a barrier a layer, for which a busy machine waits long.

Invariants: nothing below a load's first token is written; bytes are never converted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from connectors.vllm_groups import Ints, LayerGroups, arrays_of, chosen
from connectors.vllm_order import DIGIT, Axes, UnknownOrder, WriteKernel, plain, probe_order
from connectors.vllm_plan import Tables
from kvstore.api import ABSENT, LoadedRun, OpenRun
from kvstore.copying import ALONE, Shape, Team, compute_team, copy_places
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout, PartLayout
from kvstore.transfer import Blocks, Copying, Moment, PageCopier, PagedKV, PageIds, SlotViews, Streams, to_tensor


class EnginePages(Protocol):
    """The pages of one worker in host memory, seen as blocks. A copy is done when the call returns."""

    @property
    def parts(self) -> tuple[int, ...]:
        """Cells of the part grid that this worker holds."""

    @property
    def page_tokens(self) -> int: ...

    def gather(self, tables: Tables, blocks: Sequence[tuple[int, SlotViews]]) -> None:
        """Copy blocks, each an index and a slot a part, out into the slots; None where one is there already.

        Raises ValueError where a page of theirs is not there.

        On the engine's thread, and on those it computes with.
        """

    def scatter(
        self, tables: Tables, blocks: Sequence[tuple[int, SlotViews]], tokens: range, *, together: bool
    ) -> None:
        """Copy blocks in, as far as the sequence's `tokens` go: nothing below, and no page past them.

        Layers of a group that does not keep all tokens are left out where it has no page.

        `together`: on the engine's thread, and on those it computes with; otherwise on the calling thread alone.
        """


@runtime_checkable
class DevicePages(Protocol):
    """The pages of one worker on a device: many blocks in one call, and nothing waits for them. See `Copying`."""

    @property
    def parts(self) -> tuple[int, ...]: ...

    @property
    def page_tokens(self) -> int: ...

    def warm_up(self) -> None:
        """Copy a block out and in again, before there are requests: what the first of them would else wait for."""

    def now(self) -> Moment:
        """What the engine's thread, which calls this, has ordered so far."""

    def start_save(self, tables: Tables, blocks: Blocks | OpenRun, *, put_off: bool = False) -> Copying:
        """Begin to copy blocks out, after what the calling thread has ordered so far.

        `put_off`: as `PageCopier.start_gather`.
        """

    def start_load(
        self,
        tables: Tables,
        blocks: Blocks | LoadedRun,
        tokens: range,
        *,
        after: Moment,
        step_layers: int = 0,
    ) -> Copying:
        """Begin to copy blocks in: those of the sequence's `tokens`, and nothing else.

        Nothing is written before what the engine had ordered at `after` is done: the pages' last reader may still be
        running, and the streams of other threads say nothing about it.
        """


class StridedPages:
    """Pages that strides describe: every GPU layout. Implements `DevicePages`.

    `streams`: the device's; a test brings its own.
    """

    def __init__(
        self,
        layout: BlockLayout,
        tensors: Sequence[torch.Tensor],
        layers: range,
        heads: range,
        *,
        groups: LayerGroups | None = None,
        streams: Streams | None = None,
    ) -> None:
        self._groups = groups or LayerGroups.of_one(len(layers))
        dim = layout.model.head_dim
        keys, values = [one[..., :dim] for one in tensors], [one[..., dim:] for one in tensors]
        paged = PagedKV.separate(keys, values, "page head token dim")
        self._copier = PageCopier(
            layout,
            paged,
            layers=layers,
            heads=heads,
            groups=None if self._groups.keeps_all else self._groups.number.tolist(),
            streams=streams,
        )
        self.parts = self._copier.parts
        self.page_tokens = paged.page_tokens

    def warm_up(self) -> None:
        """See `DevicePages`. Kernels are compiled and tried, a second each, and the first stages allocated."""
        copier, block_tokens = self._copier, self._copier.layout.model.block_tokens
        table = range(1, 1 - -block_tokens // self.page_tokens)  # the first page may stand for none
        if len(table) < copier.paged.num_pages:
            views = [memoryview(bytearray(copier.layout.parts[part].num_bytes)) for part in self.parts]
            page_ids = self._page_ids([table] * len(self._groups.keeps))
            copier.gather(page_ids, [(0, views)])
            copier.scatter(page_ids, [(0, views)])

    def _page_ids(self, tables: Tables) -> PageIds:
        """As the copier has them: one table, or one a group, ABSENT where a group that lets go of pages has none."""
        if self._groups.keeps_all:
            (table,) = tables
            return table
        longest = max(map(len, tables))
        return [
            table if keeps else [*(page or ABSENT for page in table), *[ABSENT] * (longest - len(table))]
            for table, keeps in zip(tables, self._groups.keeps, strict=True)
        ]

    def now(self) -> Moment:
        return self._copier.now()

    def start_save(self, tables: Tables, blocks: Blocks | OpenRun, *, put_off: bool = False) -> Copying:
        return self._copier.start_gather(self._page_ids(tables), blocks, put_off=put_off)

    def start_load(
        self,
        tables: Tables,
        blocks: Blocks | LoadedRun,
        tokens: range,
        *,
        after: Moment,
        step_layers: int = 0,
    ) -> Copying:
        return self._copier.start_scatter(
            self._page_ids(tables), blocks, after=after, step_layers=step_layers, tokens=tokens
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    """How keys or values of one cell's piece of a page are copied: between where they begin on either side."""

    token_axes: Axes
    into_page: Shape
    into_slot: Shape
    page_offset: int
    """Bytes from a page's start to the keys or values of the cell's first head."""
    slot_offset: int
    """Bytes from a slot's start to the keys or values of its first layer."""


def _facing(axes: Axes, size: int, held_step: int) -> list[tuple[int, int, int]]:
    """(size, step in a page, step in a slot) of each axis over the first `size` indices, in elements."""
    sizes = [size // math.prod(count for count, _ in axes[1:]), *(count for count, _ in axes[1:])]
    held = [held_step * math.prod(sizes[at + 1 :]) for at in range(len(sizes))]
    return [(count, step, in_slot) for count, (_, step), in_slot in zip(sizes, axes, held, strict=True)]


class PackedPages:
    """Pages of vLLM's CPU attention.

    Args:
        tensors: one a layer, `[pages, heads, page tokens, 2 × head_dim]`, in layer order.
        groups: which of a request's tables each layer has its pages in; None for one that keeps all tokens.
        write: the engine's own kernel.
        key_dtype: what the model computes keys in; another than the tensors' means that the kernel converts.

    Raises UnknownOrder where no order is found, or where that fails its trial on random data, and ConfigError where
    blocks and pages do not fit each other.
    """

    def __init__(
        self,
        layout: BlockLayout,
        tensors: Sequence[torch.Tensor],
        layers: range,
        heads: range,
        *,
        groups: LayerGroups | None = None,
        write: WriteKernel,
        key_dtype: torch.dtype,
    ) -> None:
        model = layout.model
        self.parts = layout.parts_covering(layers, heads)
        self._layout, self._tensors, self._layers, self._heads = layout, tensors, layers, heads
        self._groups = groups or LayerGroups.of_one(len(layers))
        self.order = probe_order(write, tensors[0], model.head_dim, key_dtype, model.kv_dtype)
        self.page_tokens = int(tensors[0].shape[2])
        self._piece = min(self.page_tokens, model.block_tokens)
        if self.page_tokens % self._piece or model.block_tokens % self._piece or self._piece % self.order.token_step:
            raise ConfigError(
                f"block_tokens is {model.block_tokens}, the engine's pages hold {self.page_tokens} tokens: one must "
                f"divide the other, in steps of {self.order.token_step}"
            )
        if any(tensor.stride() != tensors[0].stride() for tensor in tensors):
            raise UnknownOrder("the engine's layers have different strides, which is not known here")
        self._dtype = tensors[0].dtype
        self._team = compute_team()
        self._addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        self._pieces = [[self._plan(layout.parts[part], kv) for kv in (0, 1)] for part in self.parts]
        self._try(write, key_dtype)

    def gather(self, tables: Tables, blocks: Sequence[tuple[int, SlotViews]]) -> None:
        # By the threads that have just computed and still spin: 16 MiB after a forward pass take 1.4 ms. With one of
        # ours beside the engine's, which waited for a core until one of those gave up, it was 3.4 to 5.3.
        self._copy(tables, blocks, None, self._team)

    def scatter(
        self, tables: Tables, blocks: Sequence[tuple[int, SlotViews]], tokens: range, *, together: bool
    ) -> None:
        self._copy(tables, blocks, tokens, self._team if together else ALONE)

    def _plan(self, cell: PartLayout, kv: int) -> _Piece:
        model, order, item = self._layout.model, self.order, self._dtype.itemsize
        token, dim, offset = (
            (order.k_token, order.k_dim, 0) if kv == 0 else (order.v_token, order.v_dim, order.v_offset)
        )
        head_step = self._tensors[0].stride(1)
        held_token_step = len(cell.heads) * model.head_dim
        heads = (len(cell.heads), head_step, model.head_dim)
        axes = [*_facing(token, self._piece, held_token_step), heads, *_facing(dim, model.head_dim, 1)]
        into_page = Shape.of([(size, step * item, held * item) for size, step, held in axes], item)
        return _Piece(
            token_axes=token,
            into_page=into_page,
            into_slot=into_page.turned(),
            page_offset=((cell.heads.start - self._heads.start) * head_step + offset) * item,
            slot_offset=kv * model.block_tokens * held_token_step * item,
        )

    def _copy(self, tables: Tables, blocks: Sequence[tuple[int, SlotViews]], within: range | None, team: Team) -> None:
        """In, as far as the tokens `within` go, or where that is None out."""
        arrays = arrays_of(tables)
        for at, (part, pieces) in enumerate(zip(self.parts, self._pieces, strict=True)):
            cell = self._layout.parts[part]
            indices, slots = [], []
            for index, views in blocks:
                view = views[at]
                if view is None:
                    continue
                if view.nbytes != cell.num_bytes or (within is None and view.readonly):
                    raise ValueError(f"block {index}: a slot of {view.nbytes} bytes for a part of {cell.num_bytes}")
                indices.append(index)
                slots.append(np.frombuffer(view, np.uint8).ctypes.data)
            for piece in pieces:
                held, engine = self._places(arrays, cell, piece, indices, slots, within)
                if within is None:
                    copy_places(held, engine, piece.into_slot, team=team)
                else:
                    copy_places(engine, held, piece.into_page, team=team)

    def _places(
        self,
        tables: Sequence[Ints],
        cell: PartLayout,
        piece: _Piece,
        indices: Sequence[int],
        slots: Sequence[int],
        within: range | None,
    ) -> tuple[npt.NDArray[np.uintp], npt.NDArray[np.uintp]]:
        """Where pieces lie, block by block: addresses in slots, and in the engine's pages."""
        block_tokens, item = self._layout.model.block_tokens, self._dtype.itemsize
        in_block = np.arange(0, block_tokens, self._piece, dtype=np.int64)
        first = np.repeat(np.asarray(indices, np.int64) * block_tokens, len(in_block))
        slot = np.repeat(np.asarray(slots, np.int64), len(in_block))
        past = np.tile(in_block, len(indices))
        tokens = first + past
        if within is not None:
            if within.start % self._piece:
                raise ValueError(f"a load begins at token {within.start}: pieces of pages hold {self._piece}")
            # A piece that begins within is copied to its end, which lies in the same page and is computed anew.
            inside = (tokens >= within.start) & (tokens < within.stop)
            tokens, slot, past = tokens[inside], slot[inside], past[inside]
        mine = range(cell.layers.start - self._layers.start, cell.layers.stop - self._layers.start)
        pages, there = self._groups.pages(
            tables, tokens // self.page_tokens, mine, len(self._tensors[0]), may_lack=within is not None
        )
        (_, step), *inner = piece.token_axes
        per_step = math.prod(size for size, _ in inner)
        token_bytes = len(cell.heads) * self._layout.model.head_dim * item
        layers = np.arange(len(cell.layers), dtype=np.int64)
        held = slot + piece.slot_offset + past * token_bytes
        in_page = (tokens % self.page_tokens // per_step * step) * item
        engine = pages * (self._tensors[0].stride(0) * item) + in_page[:, None] + piece.page_offset
        engine = engine + self._addresses[mine.start : mine.stop]
        held = held[:, None] + layers * (2 * block_tokens * token_bytes)
        return chosen(held, there).astype(np.uintp), chosen(engine, there).astype(np.uintp)

    def _try(self, write: WriteKernel, key_dtype: torch.dtype) -> None:
        """What the kernel writes must be what strides read, and what loading writes what the kernel would."""
        model = self._layout.model
        trial = copy(self)
        num_pages = 2 + model.block_tokens // self._piece
        shape = (num_pages, *self._tensors[0].shape[1:])
        trial._tensors = [torch.zeros(shape, dtype=self._dtype) for _ in self._layers]
        trial._addresses = np.array([tensor.data_ptr() for tensor in trial._tensors], np.int64)
        pages = list(range(num_pages - 1, 0, -1))
        slots = torch.tensor(
            [pages[t // self.page_tokens] * self.page_tokens + t % self.page_tokens for t in range(model.block_tokens)]
        )
        generator = torch.Generator().manual_seed(1)
        size = (len(self._layers), 2, model.block_tokens, len(self._heads), model.head_dim)
        wrote = torch.randn(size, generator=generator).to(key_dtype)
        if self._dtype != key_dtype:
            # Numbers that no conversion changes: the kernel cuts off what fp8 has no bits for, torch rounds.
            wrote = torch.randint(1 - DIGIT, DIGIT, size, generator=generator).to(key_dtype)
        for tensor, (keys, values) in zip(trial._tensors, wrote, strict=True):
            write(keys, values, tensor, slots)
        cells = [self._layout.parts[part] for part in self.parts]
        held = [memoryview(bytearray(cell.num_bytes)) for cell in cells]
        tables = [pages] * len(self._groups.keeps)
        trial.gather(tables, [(0, held)])
        want = [tensor.clone() for tensor in trial._tensors]
        for cell, view in zip(cells, held, strict=True):
            there = to_tensor(view, cell, self._dtype)
            mine = wrote[
                cell.layers.start - self._layers.start : cell.layers.stop - self._layers.start,
                :,
                :,
                cell.heads.start - self._heads.start : cell.heads.stop - self._heads.start,
            ]
            if not torch.equal(plain(there, model.kv_dtype), mine.float()):
                raise UnknownOrder("the engine's pages do not hold what its kernel wrote, in the order found")
        for tensor in trial._tensors:
            tensor.zero_()
        trial.scatter(tables, [(0, held)], range(model.block_tokens), together=True)
        if not all(torch.equal(a, b) for a, b in zip(trial._tensors, want, strict=True)):
            raise UnknownOrder("blocks loaded into the engine's pages are not what its kernel would have written")
