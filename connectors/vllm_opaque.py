# SPDX-License-Identifier: Apache-2.0
"""Pages of vLLM as they are: for engines whose order is not known.

What such bytes mean only an engine knows that packs them alike. So they lie in a namespace of their own, named by a
fingerprint of all that decides it (`ModelId.layout`), and are never cut: a block is some whole pages, and a part is
what one rank holds of them. A page counts when all its tokens are final, and is written whole or not at all.

    page_digest   what the engine's write kernel makes of known numbers
    opaque_model  the identity under which pages are kept as they are
    OpaquePages   copies of whole pages, in host memory; OpaqueDevicePages, on a device
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from connectors.vllm_groups import LayerGroups, arrays_of, chosen
from connectors.vllm_order import WriteKernel
from connectors.vllm_pages import StridedPages
from connectors.vllm_plan import Tables
from kvstore.api import LoadedRun
from kvstore.block import ModelId
from kvstore.copying import ALONE, Shape, Team, compute_team, copy_places
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.transfer import Blocks, Copying, Moment, SlotViews, Streams

_BASE = 4
"""Numbers that are written lie below it: exact in every dtype, the fp8 ones included."""
_NUM_PAGES = 8
_TRIED = (1, 4, 6)
"""Pages that are written, of so many: an order that goes by the page's number, modulo whatever, is not the same in all
three, unless the modulus is larger than they tell."""
_BACKGROUNDS = (0x00, 0x5A)
"""Bytes that pages hold before: what was not written differs. A number in every dtype, and none that was written."""
_LARGEST_BLOCK = 256


def page_digest(write: WriteKernel, tensor: torch.Tensor, key_dtype: torch.dtype) -> str:
    """Digest of pages like those of `tensor`, `[pages, heads, tokens, 2 × dim]`, after `write` filled them.

    Every number of a page gets one of its own, in digits of several pages: two kernels that put a single one elsewhere
    have different digests. Raises what the kernel raises, and ConfigError where a page does not stand alone, so that
    its bytes in another page would be other numbers: where they are not the same each time, or in each page, or however
    many tokens come at once; where other pages are written; where not all numbers are found in the page.
    """
    _, heads, tokens, channels = tensor.shape
    number = torch.arange(heads * tokens * channels).view(2, tokens, heads, channels // 2)
    digest, digits = hashlib.sha256(), []
    for digit in range(-(-(number.numel() - 1).bit_length() // 2)):
        keys, values = (number // _BASE**digit % _BASE).to(key_dtype)
        page = _written(write, tensor, keys.contiguous(), values.contiguous())
        digest.update(page.tobytes())
        digits.append(page.reshape(number.numel(), -1))
    places = np.ascontiguousarray(np.concatenate(digits, axis=1))
    if len(set(places.view(f"V{places.shape[1]}").ravel().tolist())) < number.numel():
        raise ConfigError("the engine's write kernel does not put all numbers it is given into the page")
    return digest.hexdigest()


def _written(
    write: WriteKernel, tensor: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> npt.NDArray[np.uint8]:
    """Bytes of a page that holds `keys` and `values`. Raises ConfigError where it does not stand alone."""
    slots = torch.arange(len(keys), dtype=torch.int64)
    found = []
    for background in _BACKGROUNDS:
        scratch = torch.empty((_NUM_PAGES, *tensor.shape[1:]), dtype=tensor.dtype)
        held = scratch.view(torch.uint8).numpy().reshape(_NUM_PAGES, -1)
        held.fill(background)
        whole, turned, single = (page * len(keys) + slots for page in _TRIED)
        write(keys, values, scratch, whole)
        write(keys.flip(0).contiguous(), values.flip(0).contiguous(), scratch, turned.flip(0).contiguous())
        for token in range(len(keys)):
            write(keys[token : token + 1], values[token : token + 1], scratch, single[token : token + 1])
        found.append(held)
    first, second = (pages[list(_TRIED)] for pages in found)
    if not np.array_equal(first[0], second[0]):
        raise ConfigError(
            "the engine's write kernel makes other bytes of the same numbers each time, or leaves bytes of a page as "
            "they were"
        )
    for background, pages in zip(_BACKGROUNDS, found, strict=True):
        if (np.delete(pages, _TRIED, axis=0) != background).any():
            raise ConfigError("the engine's write kernel writes other pages beside the one it is told")
    if not all(np.array_equal(first[0], page) for page in (*first, *second)):
        raise ConfigError(
            "the engine's write kernel makes other bytes of the same numbers in another page, or where fewer tokens "
            "come at once"
        )
    bytes_of: npt.NDArray[np.uint8] = first[0]
    return bytes_of


def fingerprint(facts: Mapping[str, str]) -> str:
    """32 hex digits over facts by name: no two different lists meet."""
    digest = hashlib.sha256()
    for name, value in sorted(facts.items()):
        for text in (name, value):
            digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    return digest.hexdigest()[:32]


def opaque_model(model: ModelId, facts: Mapping[str, str], *, page_tokens: int, rank_heads: int) -> ModelId:
    """`model`, with pages as an engine has them of which `facts` say all that decides their bytes.

    Args:
        page_tokens: of the engine. Blocks grow to a whole page where they were shorter.
        rank_heads: KV heads that one rank holds: pages are not cut by heads, so a part has so many.

    Raises ConfigError where no block is made of whole pages.
    """
    block_tokens = max(model.block_tokens, page_tokens)
    if block_tokens % page_tokens or block_tokens > _LARGEST_BLOCK or block_tokens & (block_tokens - 1):
        raise ConfigError(
            f"the engine's pages hold {page_tokens} tokens in an order that is not known here, so that only whole ones "
            f"can be stored: block_tokens, a power of two up to {_LARGEST_BLOCK}, must be a multiple"
        )
    return replace(
        model,
        layout=f"opaque:{fingerprint(facts)}",
        block_tokens=block_tokens,
        part_heads=0 if rank_heads == model.num_kv_heads else rank_heads,
    )


def steps_in_page(tensor: torch.Tensor) -> str:
    """How a page of `tensor` lies in memory: its axes' steps, outermost first, in elements.

    A step beyond a page tells how many pages or layers there are, which changes nothing within: only that it is.
    """
    page = tensor.stride(0)
    steps = [str(step) if step < page else "beyond" for step in tensor.stride()[1:]]
    order = sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)
    return f"steps {' '.join(steps)}, axes {' '.join(map(str, order))}"


class OpaquePages:
    """Whole pages of tensors in host memory. Implements `EnginePages`.

    A part's bytes are `[layers][pages][a page of one layer]`, a page being its `[heads, tokens, channels]` as they
    stand in the tensor.

    Raises ConfigError where tensors differ, or where pages do not fill the layout's parts exactly: bytes beside the
    keys and values, such as scales, would have no place.
    """

    def __init__(
        self,
        layout: BlockLayout,
        tensors: Sequence[torch.Tensor],
        layers: range,
        heads: range,
        *,
        groups: LayerGroups | None = None,
    ) -> None:
        first = tensors[0]
        self._groups = groups or LayerGroups.of_one(len(layers))
        self.page_tokens = int(first.shape[2])
        self._layout, self._tensors, self._first_layer = layout, tensors, layers.start
        self.parts = layout.parts_covering(layers, heads)
        check_whole(layout, tensors, heads)
        self._page_bytes = first[0].numel() * first.element_size()
        self._pages_a_block = layout.model.block_tokens // self.page_tokens
        self._addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        item, held = first.element_size(), first[0].contiguous().stride()
        axes = [
            (size, slot * item, step * item)
            for size, slot, step in zip(first.shape[1:], held, first.stride()[1:], strict=True)
        ]
        self._into_slot = Shape.of(axes, item)
        self._team = compute_team()

    def gather(self, tables: Tables, blocks: Sequence[tuple[int, SlotViews]]) -> None:
        for held, engine in self._places(tables, blocks, None):
            copy_places(held, engine, self._into_slot, team=self._team)

    def scatter(
        self, tables: Tables, blocks: Sequence[tuple[int, SlotViews]], tokens: range, *, together: bool
    ) -> None:
        """Raises ValueError where `tokens` begin or end within a page: the rest of that page is not this load's."""
        _check_uncut(tokens, self.page_tokens)
        team: Team = self._team if together else ALONE
        for held, engine in self._places(tables, blocks, tokens):
            copy_places(engine, held, self._into_slot.turned(), team=team)

    def _places(
        self, tables: Tables, blocks: Sequence[tuple[int, SlotViews]], within: range | None
    ) -> list[tuple[npt.NDArray[np.uintp], npt.NDArray[np.uintp]]]:
        """For each part, addresses of its pages in slots and in the engine."""
        arrays = arrays_of(tables)
        found = []
        for at, part in enumerate(self.parts):
            cell = self._layout.parts[part]
            given = [(index, view) for index, views in blocks if (view := views[at]) is not None]
            for index, view in given:
                if view.nbytes != cell.num_bytes or (within is None and view.readonly):
                    raise ValueError(f"block {index}: a slot of {view.nbytes} bytes for a part of {cell.num_bytes}")
            slots = np.array([np.frombuffer(view, np.uint8).ctypes.data for _, view in given], np.int64)
            first = np.array([index for index, _ in given], np.int64) * self._pages_a_block
            in_block = np.arange(self._pages_a_block, dtype=np.int64)
            entries = (first[:, None] + in_block).ravel()
            held = (slots[:, None] + in_block * self._page_bytes).ravel()
            if within is not None:
                begins = entries * self.page_tokens
                inside = (begins >= within.start) & (begins < within.stop)
                entries, held = entries[inside], held[inside]
            mine = range(cell.layers.start - self._first_layer, cell.layers.stop - self._first_layer)
            numbers, there = self._groups.pages(
                arrays, entries, mine, len(self._tensors[0]), may_lack=within is not None
            )
            layers = np.arange(len(cell.layers), dtype=np.int64)
            step = self._tensors[0].stride(0) * self._tensors[0].element_size()
            engine = numbers * step + self._addresses[mine.start : mine.stop]
            held = held[:, None] + layers * (self._pages_a_block * self._page_bytes)
            found.append((chosen(held, there).astype(np.uintp), chosen(engine, there).astype(np.uintp)))
        return found


class OpaqueDevicePages(StridedPages):
    """Whole pages of tensors on a device. Implements `DevicePages`.

    They are copied as `StridedPages` copies keys and values, whatever their numbers are: over a whole page that names
    each of them once, and the fingerprint says that it was done so.
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
        check_whole(layout, tensors, heads)
        super().__init__(layout, tensors, layers, heads, groups=groups, streams=streams)

    def start_load(
        self,
        tables: Tables,
        blocks: Blocks | LoadedRun,
        tokens: range,
        *,
        after: Moment,
        step_layers: int = 0,
    ) -> Copying:
        _check_uncut(tokens, self.page_tokens)
        return super().start_load(tables, blocks, tokens, after=after, step_layers=step_layers)


def _check_uncut(tokens: range, page_tokens: int) -> None:
    if tokens.start % page_tokens or tokens.stop % page_tokens:
        raise ValueError(f"a load of {tokens} would write part of a page of {page_tokens} tokens")


def check_whole(layout: BlockLayout, tensors: Sequence[torch.Tensor], heads: range) -> None:
    """Raise ConfigError unless pages are alike, blocks are whole pages, and parts are what a rank holds of them."""
    first, model = tensors[0], layout.model
    if any(one.shape[1:] != first.shape[1:] or one.stride() != first.stride() for one in tensors):
        raise ConfigError("the engine's layers have pages of different shapes, which are not stored")
    if any(one.dtype != first.dtype for one in tensors):
        raise ConfigError("the engine's layers have pages of different dtypes, which are not stored")
    page_tokens = int(first.shape[2])
    if model.block_tokens % page_tokens:
        raise ConfigError(f"blocks of {model.block_tokens} tokens are not whole pages of {page_tokens}")
    if any(cell.heads != heads for cell in layout.parts if cell.heads.start in heads):
        raise ConfigError(f"pages that hold heads {heads.start} to {heads.stop} are not cut: part_heads is finer")
    layer_bytes = layout.layer_bytes(len(heads)) * page_tokens // model.block_tokens
    has_bytes = first[0].numel() * first.element_size()
    if has_bytes != layer_bytes:
        raise ConfigError(f"a page of one layer has {has_bytes} bytes, keys and values {layer_bytes}: it is not stored")
