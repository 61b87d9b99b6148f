# SPDX-License-Identifier: Apache-2.0
"""In which order vLLM's attention on a CPU packs a page of keys and values: that differs by instruction set.

The engine's own write kernel writes known values, and where they are found is reduced to strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvstore.errors import ConfigError

Axes = tuple[tuple[int, int], ...]
"""(size, step in elements) of each axis that an index splits into, outermost first."""

WriteKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(keys, values [tokens, heads, dim], one layer's tensor, slot of each token): write them as the engine does."""


class UnknownOrder(ConfigError):
    """The engine packs its pages in an order that is not known here: they can be kept as they are, or not at all."""


DIGIT = 4
"""Values the probe writes lie below it: exact in every dtype, the fp8 ones included."""


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


def probe_order(
    write: WriteKernel, tensor: torch.Tensor, head_dim: int, key_dtype: torch.dtype, kv_dtype: str
) -> PackedOrder:
    """Find the order in which `write` packs a page of a tensor like `tensor`, whose elements mean `kv_dtype`.

    Raises UnknownOrder where it is not an affine function of the bits of token and channel.
    """
    _, heads, page_tokens, _ = tensor.shape
    scratch = torch.zeros((2, *tensor.shape[1:]), dtype=tensor.dtype)
    slots = torch.arange(page_tokens, dtype=torch.int64) + page_tokens  # page 1: an offset of 0 proves nothing
    number = torch.arange(page_tokens * head_dim).view(page_tokens, 1, head_dim).expand(-1, heads, -1)
    num_digits = math.ceil(math.log(page_tokens * head_dim, DIGIT))
    found: list[torch.Tensor] = []
    for which in (0, 1):
        seen = torch.zeros(heads, page_tokens * 2 * head_dim, dtype=torch.int64)
        marked = torch.zeros_like(seen, dtype=torch.bool)
        for digit in range(num_digits):
            value = (number // DIGIT**digit % DIGIT).to(key_dtype).contiguous()
            blank = torch.zeros_like(value)
            keys, values = (value, blank) if which == 0 else (blank, value)
            write(keys, values, scratch, slots)
            seen += plain(scratch[1], kv_dtype).reshape(heads, -1).round().long() * DIGIT**digit
        mark = torch.ones(page_tokens, heads, head_dim, dtype=key_dtype)
        blank = torch.zeros_like(mark)
        keys, values = (mark, blank) if which == 0 else (blank, mark)
        write(keys, values, scratch, slots)
        marked = plain(scratch[1], kv_dtype).reshape(heads, -1) != 0
        if not (torch.equal(seen[0].expand_as(seen), seen) and int(marked[0].sum()) == page_tokens * head_dim):
            raise UnknownOrder("the engine's pages are packed across heads, which is not known here")
        place = torch.empty(page_tokens * head_dim, dtype=torch.int64)
        where = torch.nonzero(marked[0])[:, 0]
        if not torch.equal(seen[0][where].sort().values, torch.arange(len(place))):
            raise UnknownOrder("the engine's pages do not hold each number once, as it was written")
        place[seen[0][where]] = where
        found.append(place.view(page_tokens, head_dim))
    k_offset, v_offset = int(found[0][0, 0]), int(found[1][0, 0])
    if k_offset:
        raise UnknownOrder(f"the engine's keys begin {k_offset} elements into a page, which is not known here")
    k_token, k_dim = _affine(found[0])
    v_token, v_dim = _affine(found[1] - v_offset)
    return PackedOrder(k_token, k_dim, v_token, v_dim, v_offset)


def plain(page: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """Numbers, where the engine keeps them as bytes of `kv_dtype`."""
    return (page.view(getattr(torch, kv_dtype)) if page.dtype == torch.uint8 else page).float()


def _affine(place: torch.Tensor) -> tuple[Axes, Axes]:
    """Axes of token and channel such that `place[token, channel]` is the sum of their steps."""
    tokens, dims = place.shape
    token_axes = _split(place[:, 0])
    dim_axes = _split(place[0])
    steps = [_walk(token_axes), _walk(dim_axes)]
    if not torch.equal(steps[0][:, None] + steps[1][None, :], place):
        raise UnknownOrder(f"the engine packs pages of {tokens} × {dims} in an order that strides do not describe")
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
