# SPDX-License-Identifier: Apache-2.0
"""How a vLLM worker's pages are stored: as canonical bytes where their order is known, as they are where it is not.

On a CPU the order is found by letting the engine's own layers write known numbers; on a device it is known of attention
kernels whose source was read. Everything else is opaque (`vllm_opaque`), under a fingerprint of what is gathered here:
a fact that is left out of it is one day a wrong hit, one too many a miss.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from platform import machine
from typing import TYPE_CHECKING, Any

import torch

from connectors.vllm_code import (
    attention_classes,
    attention_name,
    name_of,
    package_digest,
    packages_of,
    releases,
    settings_in,
    source_digest,
)
from connectors.vllm_groups import LayerGroups
from connectors.vllm_identity import RankSlice
from connectors.vllm_opaque import (
    OpaqueDevicePages,
    OpaquePages,
    opaque_model,
    page_digest,
    steps_in_page,
)
from connectors.vllm_order import UnknownOrder, WriteKernel
from connectors.vllm_pages import DevicePages, EnginePages, PackedPages, StridedPages
from connectors.vllm_plan import PageLayout
from kvstore.block import ModelId
from kvstore.errors import ConfigError
from kvstore.layout import layout_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PLAIN_ON_DEVICES = (
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl",
    "vllm.v1.attention.backends.flashinfer.FlashInferImpl",
    "vllm.v1.attention.backends.flex_attention.FlexAttentionImpl",
    "vllm.v1.attention.backends.triton_attn.TritonAttentionImpl",
)
"""What writes keys to the first half of a page's channels and values to the second, by strides and nothing else, in the
KV dtypes that are stored. Those for ROCm do not: they split and shuffle pages by settings of their own."""

_KERNEL_FAILS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a kernel, or a layer that was not made for being asked, raises."""


@dataclass(frozen=True, slots=True)
class StoredPages:
    """A worker's pages, and under which identity they are stored. `why` they are opaque; empty where they are not."""

    model: ModelId
    pages: EnginePages | DevicePages
    why: str = ""


@dataclass(frozen=True, slots=True)
class Worker:
    """What one worker has.

    Attributes:
        engine: its name and release; platform: what it runs on, see `platform_of`; config: its VllmConfig.
        model: the identity of its KV in canonical bytes.
        layers: vLLM's attention layers, in order, and tensors: their pages.
        page_bytes: that the engine counts for a page of one layer.
        groups: of `layers`.
    """

    engine: str
    platform: str
    config: VllmConfig
    model: ModelId
    layers: Sequence[Any]
    tensors: Sequence[torch.Tensor]
    mine: RankSlice
    page_bytes: int
    groups: LayerGroups

    @property
    def is_on_device(self) -> bool:
        return self.tensors[0].device.type != "cpu"

    @property
    def key_dtype(self) -> torch.dtype:
        """What the model computes keys in; the kernel may convert them."""
        dtype: torch.dtype = self.config.model_config.dtype
        return dtype


def stored_pages(worker: Worker, wanted: PageLayout) -> StoredPages:
    """How to store the pages of `worker`. Raises ConfigError where they cannot be as `wanted`."""
    why = "it is set so"
    if wanted is not PageLayout.OPAQUE:
        try:
            return StoredPages(worker.model, _canonical(worker))
        except UnknownOrder as error:
            if wanted is PageLayout.CANONICAL:
                raise
            why = str(error)
    page_tokens = int(worker.tensors[0].shape[2])
    made = opaque_model(worker.model, facts_of(worker), page_tokens=page_tokens, rank_heads=len(worker.mine.heads))
    has_bytes = worker.tensors[0][0].numel() * worker.tensors[0].element_size()
    if has_bytes != worker.page_bytes:
        raise ConfigError(
            f"a page of one layer has {worker.page_bytes} bytes, of which the engine gives {has_bytes} to be stored: "
            "what the others mean is not known"
        )
    kind = OpaqueDevicePages if worker.is_on_device else OpaquePages
    pages = kind(layout_of(made), worker.tensors, worker.mine.layers, worker.mine.heads, groups=worker.groups)
    return StoredPages(made, pages, why)


def agreed_model(told: Mapping[tuple[int, int], tuple[ModelId, str]], ranks: Sequence[tuple[int, int]]) -> ModelId:
    """The identity under which ranks keep their pages as they are: all of `ranks`, and the same on each.

    Args:
        told: by rank (of the pipeline, of tensors), its identity, and why it stores pages as they are. Ranks that store
            canonical bytes say nothing.

    Raises ConfigError where ranks differ.
    """
    models = {model for model, _ in told.values()}
    if len(models) == 1 and told.keys() >= set(ranks):
        return models.pop()
    said = [
        f"pp{rank[0]} tp{rank[1]}: " + (f"{told[rank][0].layout}, {told[rank][1]}" if rank in told else "canonical")
        for rank in sorted({*told, *ranks})
    ]
    raise ConfigError(
        f"of the engine's {len(ranks)} ranks not all pack their pages alike, which is not stored ({'; '.join(said)}); "
        'set "layout": "opaque" to store those of all ranks as they are, which does where they run the same kernels'
    )


def _canonical(worker: Worker) -> EnginePages | DevicePages:
    layout, mine = layout_of(worker.model), worker.mine
    if worker.is_on_device:
        for name in sorted({name_of(type(layer.impl)) for layer in worker.layers}):
            if name not in _PLAIN_ON_DEVICES:
                raise UnknownOrder(f"how {name} orders its pages is not known here")
        return StridedPages(layout, worker.tensors, mine.layers, mine.heads, groups=worker.groups)
    write = _guarded(_kernel_of(worker.layers))
    return PackedPages(
        layout,
        worker.tensors,
        mine.layers,
        mine.heads,
        groups=worker.groups,
        write=write,
        key_dtype=worker.key_dtype,
    )


# -- the engine's kernel ---------------------------------------------------------------------------------------


class _Unscaled:
    """An attention layer whose scales are 1: the probe's numbers are to be found as they are."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._k_scale = self._v_scale = torch.ones(())
        self._k_scale_float = self._v_scale_float = 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _kernel_of(layers: Sequence[Any]) -> WriteKernel:
    """The write kernel of the engine's own layers. Raises UnknownOrder where they have none, or several."""
    kinds = {(attention_name(layer.attn_backend, type(layer.impl)), getattr(layer, "isa", None)) for layer in layers}
    if len(kinds) != 1:
        raise UnknownOrder(f"the engine's layers write pages in {len(kinds)} ways")
    layer = layers[0]
    update = getattr(layer.impl, "do_kv_cache_update", None)
    if update is None or getattr(layer.attn_backend, "forward_includes_kv_cache_update", True):
        raise UnknownOrder(f"{name_of(type(layer.impl))} writes pages only as part of attention")
    unscaled = _Unscaled(layer)

    def write(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
        update(unscaled, keys, values, tensor, slots)

    return write


def _guarded(write: WriteKernel) -> WriteKernel:
    """`write`, whose failure says that the order is not known."""

    def tried(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
        try:
            write(keys, values, tensor, slots)
        except _KERNEL_FAILS as error:
            raise UnknownOrder(f"the engine's write kernel cannot be tried: {type(error).__name__}: {error}") from error

    return tried


# -- what decides the bytes of a page ----------------------------------------------------------------------------


def facts_of(worker: Worker) -> dict[str, str]:
    """All that decides what a page's bytes mean, beside the model's identity; the same on every rank of an engine.

    Threads are not among them: how many wrote a page shows in the digest of what was written, if it shows at all.
    """
    first, parallel = worker.tensors[0], worker.config.parallel_config
    kinds = {(layer.attn_backend, type(layer.impl)) for layer in worker.layers}
    classes = set[type]().union(*(attention_classes(*kind) for kind in kinds))
    packages = packages_of(classes)
    return {
        "format": f"1, {'keys and values' if worker.is_on_device else 'pages'}",
        "engine": f"{worker.engine}, torch {torch.__version__}",
        "platform": worker.platform,
        "attention": "; ".join(sorted({attention_name(*kind) for kind in kinds})),
        "source": source_digest(classes),
        "packages": " ".join(f"{name} {package_digest(name)}" for name in packages),
        "releases": releases(packages),
        "isa": " ".join(sorted({str(getattr(layer, "isa", "")) for layer in worker.layers})),
        "settings": repr(worker.config.attention_config),
        "environ": repr(settings_in(os.environ, packages)),
        "page": f"{tuple(first.shape[1:])} {first.dtype} {steps_in_page(first)}",
        "kv dtype": f"{worker.config.cache_config.cache_dtype} of {worker.key_dtype}",
        "split": f"tp{parallel.tensor_parallel_size} pp{parallel.pipeline_parallel_size} heads{len(worker.mine.heads)}",
        "written": "not tried on a device" if worker.is_on_device else _digest_of_write(worker),
    }


def _digest_of_write(worker: Worker) -> str:
    try:
        return page_digest(_guarded(_kernel_of(worker.layers)), worker.tensors[0], worker.key_dtype)
    except UnknownOrder:
        return "cannot be tried"


def platform_of(device: torch.device) -> str:
    """Device or instruction set, as far as kernels tell them apart."""
    if device.type == "cuda":
        version = torch.version.hip or torch.version.cuda
        return (
            f"{device.type} {version} {torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
        )
    if device.type == "cpu":
        return f"cpu {machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} {machine()}"
