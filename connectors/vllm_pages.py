# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV tensors as canonical bytes.

vLLM registers one tensor a layer with axes (page, head, token, channel), the channels being K then V. On a GPU that
is what memory holds, in whichever order, and strides describe it: `kvstore.transfer` copies it. On a CPU each
page is packed in an order that its attention kernel likes, and differs by instruction set. The order is found by
letting the engine's own write kernel write known values, reduced to strides, and tried on random data.

Invariants: nothing below a load's first token is written; bytes are never converted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.transfer import Moment, PageCopier, PagedKV, SlotViews, to_tensor

Axes = tuple[tuple[int, int], ...]
"""(size, step in elements) of each axis that an index splits into, outermost first."""

WriteKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(keys, values [tokens, heads, dim], one layer's tensor, slot of each token): write them as the engine does."""

_STAGE_BYTES = 64 << 20
"""Blocks are handed to the write kernel so many bytes at a time. Its threads meet at a barrier after each call, which
on a busy machine costs more than the copy: with one call a block and layer, 64 MiB took up to 1.4 s, mostly 30 ms."""
_DIGIT = 8
"""Values the probe writes lie below it: exact in every dtype, fp8 included."""


class EnginePages(Protocol):
    """The pages of one worker, seen as blocks."""

    @property
    def parts(self) -> tuple[int, ...]:
        """Cells of the part grid that this worker holds."""

    @property
    def page_tokens(self) -> int: ...

    def gather(self, pages: Sequence[int], index: int, views: SlotViews) -> None:
        """Copy block `index` out into slots, one a part, None where it is there already."""

    def writer(self, pages: Sequence[int], first_token: int) -> PageWriter:
        """For one load, whose tokens below `first_token` are left out.

        Made on the engine's thread: nothing is written before what that thread's stream has by then is done. The
        pages' last reader may still be running, and the streams of other threads say nothing about it.
        """


class PageWriter(Protocol):
    """Copies a load's blocks in, in order. What was written is in place only as far as `flush` or `write` say."""

    def write(self, index: int, views: Sequence[memoryview]) -> int:
        """Take block `index`; the views may change afterwards. Returns how many blocks are in place by now."""

    def flush(self) -> int:
        """Put everything in place; returns how many blocks that makes."""


class StridedPages:
    """Pages that strides describe: every GPU layout, and the CPU's where it is not packed."""

    def __init__(self, layout: BlockLayout, tensors: Sequence[torch.Tensor], layers: range, heads: range) -> None:
        dim = layout.model.head_dim
        keys, values = [one[..., :dim] for one in tensors], [one[..., dim:] for one in tensors]
        self._paged = PagedKV.separate(keys, values, "page head token dim")
        self._copier = PageCopier(layout, self._paged, layers=layers, heads=heads)
        self._layers, self._heads = layers, heads
        self.parts = self._copier.parts
        self.page_tokens = self._paged.page_tokens

    def gather(self, pages: Sequence[int], index: int, views: SlotViews) -> None:
        self._copier.gather(pages, [(index, views)])

    def writer(self, pages: Sequence[int], first_token: int) -> PageWriter:
        after = self._copier.now() if self._paged.device.type == "cuda" else None
        return _AtOnce(lambda index, views: self._scatter(pages, index, views, first_token, after))

    def _scatter(
        self, pages: Sequence[int], index: int, views: SlotViews, first_token: int, after: Moment | None
    ) -> None:
        layout = self._copier.layout
        first = index * layout.model.block_tokens
        if first_token <= first:
            self._copier.start_scatter(pages, [(index, views)], after=after).finish()
            return
        if after is not None:
            self._copier.wait_for(after)
        for part, view in zip(self.parts, views, strict=True):  # at most one block a load is cut
            if view is None:
                continue
            cell = layout.parts[part]
            held = to_tensor(view, cell, self._paged.dtype).to(self._paged.device)
            heads = slice(cell.heads.start - self._heads.start, cell.heads.stop - self._heads.start)
            for token in range(first_token, first + layout.model.block_tokens):
                page, at = int(pages[token // self.page_tokens]), token % self.page_tokens
                for layer in cell.layers:
                    for kv, plane in enumerate(self._paged.planes[layer - self._layers.start]):
                        plane[page, at, heads] = held[layer - cell.layers.start, kv, token - first]
        if after is not None:
            torch.cuda.current_stream(self._paged.device).synchronize()


class _AtOnce:
    """A writer that keeps nothing back."""

    def __init__(self, scatter: Callable[[int, SlotViews], None]) -> None:
        self._scatter = scatter
        self._count = 0

    def write(self, index: int, views: Sequence[memoryview]) -> int:
        self._scatter(index, views)
        self._count += 1
        return self._count

    def flush(self) -> int:
        return self._count


@dataclass(frozen=True, slots=True)
class PackedOrder:
    """Where a head's keys and values of one page lie, in elements from the head's start."""

    k_token: Axes
    k_dim: Axes
    v_token: Axes
    v_dim: Axes
    v_offset: int

    @property
    def token_step(self) -> int:
        """Fewest tokens that can be told apart by a slice: pieces of a page are multiples of it."""
        return max(math.prod(size for size, _ in axes[1:]) for axes in (self.k_token, self.v_token))


def probe_order(write: WriteKernel, tensor: torch.Tensor, head_dim: int, key_dtype: torch.dtype) -> PackedOrder:
    """Find the order in which `write` packs a page of a tensor like `tensor`.

    Raises ConfigError where it is not an affine function of the bits of token and channel.
    """
    _, heads, page_tokens, _ = tensor.shape
    scratch = torch.zeros((2, *tensor.shape[1:]), dtype=tensor.dtype)
    slots = torch.arange(page_tokens, dtype=torch.int64) + page_tokens  # page 1: an offset of 0 proves nothing
    number = torch.arange(page_tokens * head_dim).view(page_tokens, 1, head_dim).expand(-1, heads, -1)
    num_digits = math.ceil(math.log(page_tokens * head_dim, _DIGIT))
    found: list[torch.Tensor] = []
    for which in (0, 1):
        seen = torch.zeros(heads, page_tokens * 2 * head_dim, dtype=torch.int64)
        marked = torch.zeros_like(seen, dtype=torch.bool)
        for digit in range(num_digits):
            value = (number // _DIGIT**digit % _DIGIT).to(key_dtype).contiguous()
            blank = torch.zeros_like(value)
            keys, values = (value, blank) if which == 0 else (blank, value)
            write(keys, values, scratch, slots)
            seen += _plain(scratch[1]).reshape(heads, -1).round().long() * _DIGIT**digit
        mark = torch.ones(page_tokens, heads, head_dim, dtype=key_dtype)
        blank = torch.zeros_like(mark)
        keys, values = (mark, blank) if which == 0 else (blank, mark)
        write(keys, values, scratch, slots)
        marked = _plain(scratch[1]).reshape(heads, -1) != 0
        if not (torch.equal(seen[0].expand_as(seen), seen) and int(marked[0].sum()) == page_tokens * head_dim):
            raise ConfigError("the engine's pages are packed across heads, which is not known here")
        place = torch.empty(page_tokens * head_dim, dtype=torch.int64)
        where = torch.nonzero(marked[0])[:, 0]
        place[seen[0][where]] = where
        found.append(place.view(page_tokens, head_dim))
    k_offset, v_offset = int(found[0][0, 0]), int(found[1][0, 0])
    if k_offset:
        raise ConfigError(f"the engine's keys begin {k_offset} elements into a page, which is not known here")
    k_token, k_dim = _affine(found[0])
    v_token, v_dim = _affine(found[1] - v_offset)
    return PackedOrder(k_token, k_dim, v_token, v_dim, v_offset)


def _plain(page: torch.Tensor) -> torch.Tensor:
    """Bytes of fp8 as the numbers they stand for."""
    return (page.view(torch.float8_e4m3fn) if page.dtype == torch.uint8 else page).float()


def _affine(place: torch.Tensor) -> tuple[Axes, Axes]:
    """Axes of token and channel such that `place[token, channel]` is the sum of their steps."""
    tokens, dims = place.shape
    token_axes = _split(place[:, 0])
    dim_axes = _split(place[0])
    steps = [_walk(token_axes), _walk(dim_axes)]
    if not torch.equal(steps[0][:, None] + steps[1][None, :], place):
        raise ConfigError(f"the engine packs pages of {tokens} × {dims} in an order that strides do not describe")
    return token_axes, dim_axes


def _split(line: torch.Tensor) -> Axes:
    """The fewest axes whose steps give `line`, which starts at 0."""
    axes: list[tuple[int, int]] = []
    size, at = len(line), 1
    while at < size:
        step = int(line[at])
        count = 1
        while (count + 1) * at <= size and (count * at >= size or int(line[count * at]) == count * step):
            count += 1
        while size % (count * at):
            count -= 1
        axes.append((count, step))
        at *= count
        if count == 1:
            break
    return tuple(reversed(axes)) or ((1, 1),)


def _walk(axes: Axes) -> torch.Tensor:
    total = torch.zeros(1, dtype=torch.int64)
    for size, step in axes:
        total = (total[:, None] + torch.arange(size)[None, :] * step).flatten()
    return total


class _Staged:
    """A writer that gathers blocks in a stage and hands them to the kernel together."""

    def __init__(self, owner: PackedPages, pages: Sequence[int], first_token: int) -> None:
        self._owner, self._pages, self._first_token = owner, pages, first_token
        self._stage: torch.Tensor | None = None
        self._first = 0  # index of the stage's first block
        self._held = 0
        self._count = 0

    def write(self, index: int, views: Sequence[memoryview]) -> int:
        if self._stage is None:
            self._stage = self._owner.take_stage()
        if not self._held:
            self._first = index
        self._owner.put(self._stage, self._held * self._owner.block_tokens, index, views)
        self._held += 1
        return self.flush() if self._held == self._owner.stage_blocks else self._count

    def flush(self) -> int:
        if self._stage is not None:
            first = self._first * self._owner.block_tokens
            skip = max(0, self._first_token - first)
            self._owner.write_stage(self._stage, self._pages, first, skip, self._held * self._owner.block_tokens)
            self._count += self._held
            self._owner.give_back(self._stage)
            self._stage, self._held = None, 0
        return self._count


def _raw(tensor: torch.Tensor) -> npt.NDArray[np.unsignedinteger[npt.NBitBase]]:
    """A tensor's bytes in numpy, which knows no bfloat16."""
    size = tensor.element_size()
    return tensor.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[size]).numpy()


class PackedPages:
    """Pages of vLLM's CPU attention.

    Args:
        tensors: one a layer, `[pages, heads, page tokens, 2 × head_dim]`, in layer order.
        write: the engine's own kernel.
        key_dtype: what the model computes keys in; another than the tensors' means that the kernel converts.

    Raises ConfigError where the order is unknown or fails its trial on random data.
    """

    def __init__(
        self,
        layout: BlockLayout,
        tensors: Sequence[torch.Tensor],
        layers: range,
        heads: range,
        *,
        write: WriteKernel,
        key_dtype: torch.dtype,
    ) -> None:
        model = layout.model
        self.parts = layout.parts_covering(layers, heads)
        self._layout, self._tensors, self._layers, self._heads = layout, tensors, layers, heads
        self._write = write
        self.order = probe_order(write, tensors[0], model.head_dim, key_dtype)
        self.page_tokens = int(tensors[0].shape[2])
        self._piece = min(self.page_tokens, model.block_tokens)
        if self.page_tokens % self._piece or model.block_tokens % self._piece or self._piece % self.order.token_step:
            raise ConfigError(
                f"block_tokens is {model.block_tokens}, the engine's pages hold {self.page_tokens} tokens: one must "
                f"divide the other, in steps of {self.order.token_step}"
            )
        self._by_kernel = tensors[0].dtype == key_dtype
        block_bytes = sum(layout.parts[part].num_bytes for part in self.parts)
        self._stage_blocks = max(1, _STAGE_BYTES // block_bytes)
        self._stages: list[torch.Tensor] = []
        self._dtype = tensors[0].dtype
        self._planes = [self._planes_of(tensor) for tensor in tensors]
        self._try(key_dtype)

    def gather(self, pages: Sequence[int], index: int, views: SlotViews) -> None:
        self._copy(pages, index, views, index * self._layout.model.block_tokens, to_slots=True)

    def writer(self, pages: Sequence[int], first_token: int) -> PageWriter:
        if self._by_kernel:
            return _Staged(self, pages, first_token)
        return _AtOnce(lambda index, views: self._copy(pages, index, views, first_token, to_slots=False))

    def take_stage(self) -> torch.Tensor:
        """Keys and values of some blocks side by side, [layers, kv, tokens, heads, dim]; give it back."""
        try:
            return self._stages.pop()
        except IndexError:
            model = self._layout.model
            tokens = self._stage_blocks * model.block_tokens
            return torch.zeros(len(self._layers), 2, tokens, len(self._heads), model.head_dim, dtype=self._dtype)

    def give_back(self, stage: torch.Tensor) -> None:
        self._stages.append(stage)

    def put(self, stage: torch.Tensor, at: int, index: int, views: Sequence[memoryview]) -> None:
        """Copy block `index` into a stage at token `at`. In numpy: torch would share it out among threads."""
        tokens = self._layout.model.block_tokens
        into = _raw(stage)
        for part, view in zip(self.parts, views, strict=True):
            cell = self._layout.parts[part]
            layers = slice(cell.layers.start - self._layers.start, cell.layers.stop - self._layers.start)
            heads = slice(cell.heads.start - self._heads.start, cell.heads.stop - self._heads.start)
            into[layers, :, at : at + tokens, heads] = _raw(to_tensor(view, cell, self._dtype))

    def write_stage(self, stage: torch.Tensor, pages: Sequence[int], first: int, skip: int, stop: int) -> None:
        """Have the kernel write a stage's tokens `skip` … `stop`, whose first one is the sequence's token `first`."""
        tokens = np.arange(first + skip, first + stop)
        table = np.asarray(pages, np.int64)
        slots = torch.from_numpy(table[tokens // self.page_tokens] * self.page_tokens + tokens % self.page_tokens)
        for layer, tensor in enumerate(self._tensors):
            self._write(stage[layer, 0, skip:stop], stage[layer, 1, skip:stop], tensor, slots)

    @property
    def stage_blocks(self) -> int:
        return self._stage_blocks

    @property
    def block_tokens(self) -> int:
        return self._layout.model.block_tokens

    def _planes_of(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as views with axes (page, head, token axes …, channel axes …)."""
        order, steps = self.order, tensor.stride()
        planes = []
        for token, dim, offset in ((order.k_token, order.k_dim, 0), (order.v_token, order.v_dim, order.v_offset)):
            sizes = (*tensor.shape[:2], *(size for size, _ in (*token, *dim)))
            strides = (steps[0], steps[1], *(step for _, step in (*token, *dim)))
            planes.append(tensor.as_strided(sizes, strides, tensor.storage_offset() + offset))
        return planes[0], planes[1]

    def _copy(self, pages: Sequence[int], index: int, views: SlotViews, first_token: int, *, to_slots: bool) -> None:
        block_tokens = self._layout.model.block_tokens
        first = index * block_tokens
        for part, view in zip(self.parts, views, strict=True):
            if view is None:
                continue
            cell = self._layout.parts[part]
            held = to_tensor(view, cell, self._dtype)
            heads = slice(cell.heads.start - self._heads.start, cell.heads.stop - self._heads.start)
            for token in range(max(first, first_token), first + block_tokens, self._piece):
                page, at = int(pages[token // self.page_tokens]), token % self.page_tokens
                block = held[:, :, token - first : token - first + self._piece]
                for number, layer in enumerate(cell.layers):
                    for kv, plane in enumerate(self._planes[layer - self._layers.start]):
                        mine, theirs = self._facing(block[number, kv], plane[page, heads], kv, at)
                        mine.copy_(theirs) if to_slots else theirs.copy_(mine)

    def _facing(self, block: torch.Tensor, plane: torch.Tensor, kv: int, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A piece of a slot `[tokens, heads, dim]` and of a page, both as (head, token axes …, channel axes …)."""
        token, dim = (self.order.k_token, self.order.k_dim) if kv == 0 else (self.order.v_token, self.order.v_dim)
        inner = math.prod(size for size, _ in token[1:])
        sizes = [len(block) // inner, *(size for size, _ in token[1:])]
        mine = block.unflatten(2, [size for size, _ in dim]).unflatten(0, sizes)  # type: ignore[no-untyped-call]
        return mine.movedim(len(sizes), 0), plane[:, at // inner : at // inner + sizes[0]]

    def _try(self, key_dtype: torch.dtype) -> None:
        """What the kernel writes must be what strides read, and what loading writes what the kernel would."""
        model = self._layout.model
        trial = PackedPages.__new__(PackedPages)
        trial._layout, trial._layers, trial._heads = self._layout, self._layers, self._heads
        trial._write, trial.order, trial.parts = self._write, self.order, self.parts
        trial.page_tokens, trial._piece, trial._dtype = self.page_tokens, self._piece, self._dtype
        trial._by_kernel, trial._stage_blocks, trial._stages = self._by_kernel, 1, []
        num_pages = 2 + model.block_tokens // self._piece
        shape = (num_pages, *self._tensors[0].shape[1:])
        trial._tensors = [torch.zeros(shape, dtype=self._dtype) for _ in self._layers]
        trial._planes = [trial._planes_of(tensor) for tensor in trial._tensors]
        pages = list(range(num_pages - 1, 0, -1))
        slots = torch.tensor(
            [pages[t // self.page_tokens] * self.page_tokens + t % self.page_tokens for t in range(model.block_tokens)]
        )
        generator = torch.Generator().manual_seed(1)
        wrote = torch.randn(
            len(self._layers), 2, model.block_tokens, len(self._heads), model.head_dim, generator=generator
        ).to(key_dtype)
        for tensor, (keys, values) in zip(trial._tensors, wrote, strict=True):
            self._write(keys, values, tensor, slots)
        cells = [self._layout.parts[part] for part in self.parts]
        held = [memoryview(bytearray(cell.num_bytes)) for cell in cells]
        trial.gather(pages, 0, held)
        want = [tensor.clone() for tensor in trial._tensors]
        for cell, view in zip(cells, held, strict=True):
            there = to_tensor(view, cell, self._dtype)
            mine = wrote[
                cell.layers.start - self._layers.start : cell.layers.stop - self._layers.start,
                :,
                :,
                cell.heads.start - self._heads.start : cell.heads.stop - self._heads.start,
            ]
            same = self._dtype == key_dtype
            if not (torch.equal(there, mine) if same else torch.allclose(_plain(there), mine.float(), 0.1, 0.02)):
                raise ConfigError("the engine's pages do not hold what its kernel wrote, in the order found")
        for tensor in trial._tensors:
            tensor.zero_()
        writer = trial.writer(pages, 0)
        writer.write(0, held)
        writer.flush()
        if not all(torch.equal(a, b) for a, b in zip(trial._tensors, want, strict=True)):
            raise ConfigError("blocks loaded into the engine's pages are not what its kernel would have written")
