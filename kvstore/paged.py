# SPDX-License-Identifier: Apache-2.0
"""Where an engine keeps its KV: which tensors hold it, and what each of their axes means.

Engines differ in the order of axes (NHD, HND), in whether keys and values share a tensor, and in whether one tensor
holds all layers. Here they become one thing, `PagedKV`: a plane per layer and per keys or values, with axes (page,
token, head, dim) and any strides. Nothing is copied: planes are views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout, engine_dtype

_AXES = ("layer", "kv", "page", "token", "head", "dim")


@dataclass(frozen=True, slots=True, eq=False)
class Planes:
    """Planes of some layers, cut to some heads.

    Attributes:
        first: one of them: the others differ in where they begin alone.
        addresses: where each begins, by layer and then keys or values.
        tensors: makes all of them, by layer.
    """

    first: torch.Tensor
    addresses: npt.NDArray[np.int64]
    tensors: Callable[[], list[list[torch.Tensor]]]


class PagedKV:
    """An engine's KV: for each layer, keys then values, each a view with axes (page, token, head, dim).

    Made with `of` or `separate`. All planes agree in shape, strides, dtype and device; any strides will do.

    Attributes:
        first: keys of the first layer.
    """

    def __init__(self, planes: Sequence[Sequence[torch.Tensor]]) -> None:
        self._planes = tuple(tuple(layer) for layer in planes)
        self._whole: torch.Tensor | None = None
        self.first = self._planes[0][0]
        self.num_layers, self.num_kv = len(self._planes), len(self._planes[0])
        for number, layer in enumerate(self._planes):
            for plane in layer:
                if kind_of(plane) != kind_of(self.first):
                    raise ConfigError(
                        f"layer {number} has KV of {kind_of(plane)}, layer 0 of {kind_of(self.first)}: "
                        "only layers that are alike can be copied together"
                    )

    @classmethod
    def _of_one(cls, whole: torch.Tensor) -> Self:
        """Planes of one tensor with all of `_AXES`, which nobody makes before they are asked for.

        A cache is made for a request, whose first token waits for it: 64 views of it, and a look at each, were 0.5 ms.
        """
        made = cls.__new__(cls)
        made._planes, made._whole, made.first = (), whole, whole[0, 0]
        made.num_layers, made.num_kv = whole.shape[:2]
        return made

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], axes: str, *, page_tokens: int = 0) -> PagedKV:
        """KV from one tensor per layer, or from one tensor with a `layer` axis.

        Args:
            tensors: the engine's tensors, in layer order.
            axes: what their axes are, in order, from `layer kv page token head dim`. `slot` stands for a flat
                axis of pages × tokens. An absent `kv` or `head` is taken as one (MLA).
            page_tokens: tokens a page, where the axes have `slot`.
        """
        if len(tensors) == 1:
            return cls._of_one(_logical(tensors[0], axes, page_tokens))
        planes: list[tuple[torch.Tensor, ...]] = []
        for tensor in tensors:
            for layer in _logical(tensor, axes, page_tokens):
                planes.append(tuple(layer))
        return cls(planes)

    @classmethod
    def separate(
        cls, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], axes: str, *, page_tokens: int = 0
    ) -> PagedKV:
        """KV from tensors of keys and tensors of values, one of each per layer."""
        k_planes = cls.of(keys, axes, page_tokens=page_tokens).planes
        v_planes = cls.of(values, axes, page_tokens=page_tokens).planes
        return cls([(k, v) for (k,), (v,) in zip(k_planes, v_planes, strict=True)])

    @property
    def planes(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        if self._whole is not None and not self._planes:
            self._planes = tuple(layer.unbind(0) for layer in self._whole.unbind(0))
        return self._planes

    def cut(self, layers: slice, heads: slice) -> Planes:
        """Planes of these layers of it, with these heads of it."""
        if (whole := self._whole) is None:
            planes = [[plane[:, :, heads] for plane in layer] for layer in self._planes[layers]]
            addresses = [plane.data_ptr() for layer in planes for plane in layer]
            return Planes(planes[0][0], np.array(addresses, np.int64), lambda: planes)
        cut = whole[layers, :, :, :, heads]
        by_layer, by_kv = (step * cut.element_size() for step in cut.stride()[:2])
        starts = np.arange(cut.shape[0])[:, None] * by_layer + np.arange(cut.shape[1]) * by_kv
        return Planes(
            cut[0, 0], cut.data_ptr() + starts.reshape(-1), lambda: [list(layer.unbind(0)) for layer in cut.unbind(0)]
        )

    @property
    def num_pages(self) -> int:
        return int(self.first.shape[0])

    @property
    def page_tokens(self) -> int:
        return int(self.first.shape[1])

    @property
    def num_heads(self) -> int:
        return int(self.first.shape[2])

    @property
    def head_dim(self) -> int:
        return int(self.first.shape[3])

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def device(self) -> torch.device:
        return self.first.device


def kind_of(plane: torch.Tensor) -> str:
    return f"shape {tuple(plane.shape)}, strides {plane.stride()}, {plane.dtype} on {plane.device}"


def _logical(tensor: torch.Tensor, axes: str, page_tokens: int) -> torch.Tensor:
    """`tensor` as a view with all of `_AXES`, in that order."""
    names = axes.split()
    if len(names) != tensor.dim():
        raise ConfigError(f"axes {axes!r} name {len(names)} axes, the tensor has {tensor.dim()}")
    if "slot" in names:
        at = names.index("slot")
        if page_tokens < 1 or tensor.shape[at] % page_tokens:
            raise ConfigError(f"a slot axis of {tensor.shape[at]} does not divide into pages of {page_tokens} tokens")
        tensor = tensor.unflatten(at, (-1, page_tokens))  # type: ignore[no-untyped-call]
        names[at : at + 1] = ["page", "token"]
    for name in ("layer", "kv", "head"):
        if name not in names:
            tensor = tensor.unsqueeze(0)
            names.insert(0, name)
    if sorted(names) != sorted(_AXES):
        raise ConfigError(f"axes {axes!r} must be among {' '.join(_AXES)}, with page and token (or slot) and dim")
    return tensor.permute([names.index(name) for name in _AXES])


def check_fit(layout: BlockLayout, paged: PagedKV, layers: range, heads: range) -> None:
    """Raise ConfigError naming the first way in which the tensors and the layout differ."""
    model = layout.model
    pairs = (
        ("layers", paged.num_layers, len(layers)),
        ("keys and values", paged.num_kv, model.num_kv),
        ("KV heads", paged.num_heads, len(heads)),
        ("head_dim", paged.head_dim, model.head_dim),
    )
    for what, has, wants in pairs:
        if has != wants:
            raise ConfigError(f"the engine's tensors have {has} {what}, the store's layout {wants}")
    dtype, wanted = str(paged.dtype).removeprefix("torch."), engine_dtype(model.kv_dtype)
    # Engines keep fp8 as uint8; anything else of the same size would be a silent reinterpretation.
    if dtype != wanted and not (dtype == "uint8" and wanted.startswith("float8")):
        raise ConfigError(f"the engine's tensors are {dtype}, the store's layout is {model.kv_dtype}")
    page_tokens, block_tokens = paged.page_tokens, model.block_tokens
    if page_tokens % block_tokens and block_tokens % page_tokens:
        raise ConfigError(
            f"pages of {page_tokens} tokens neither divide nor are divided by blocks of {block_tokens}: "
            "choose block_tokens accordingly"
        )


def extent_of(plane: torch.Tensor) -> int:
    """Bytes from a plane's first element to its last."""
    steps = zip(plane.shape, plane.stride(), strict=True)
    return plane.element_size() * (1 + sum((size - 1) * step for size, step in steps))
