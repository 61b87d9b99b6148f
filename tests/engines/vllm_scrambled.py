# SPDX-License-Identifier: Apache-2.0
"""Engines whose page order nobody knows: an attention backend that scrambles each page, registered as vLLM's own are.

Which order it is only `ORDER` says: between two of them nothing differs but what their kernel does to a page.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from connectors.vllm import KVStoreHandshake
from kvstore.errors import ConfigError
from tests.engines.vllm_shared import Sidecar
from tests.engines.vllm_support import (
    BLOCK,
    Engine,
    Facts,
    FaultyStore,
    Reference,
    bytes_of,
    in_fork,
    poison,
    stored,
    tokens_of,
)
from tests.patient import connect

ORDER = [1]
"""Seed of the order, of this process and those it forks."""

_NEW = 24
_SMALL = {"kv_cache_memory_bytes": 1280 << 10, "max_model_len": 576}
"""All pages are turned over for each layer of each step."""


@cache
def _place(size: int, seed: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _plain(pages: torch.Tensor) -> torch.Tensor:
    flat = pages.reshape(len(pages), -1)
    return flat[:, _place(flat.shape[1], ORDER[0])].view(pages.shape)


class ScrambledImpl(CPUAttentionBackendImpl):
    """Attention over pages whose numbers are permuted, each page alike."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        plain = _plain(kv_cache)
        super().do_kv_cache_update(layer, key, value, plain, slot_mapping)
        flat = kv_cache.view(len(kv_cache), -1)
        flat[:, _place(flat.shape[1], ORDER[0])] = plain.view(flat.shape)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *more: Any,
        **named: Any,
    ) -> torch.Tensor:
        if attn_metadata is not None:
            kv_cache = _plain(kv_cache)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *more, **named)


class ScrambledBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[ScrambledImpl]:
        return ScrambledImpl


def scramble(order: int) -> None:
    """From now on engines of this process pack their pages so; 0: as vLLM does."""
    if order:
        ORDER[0] = order
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{ScrambledBackend.__name__}")


# -- one engine ------------------------------------------------------------------------------------------------


class _Heard(logging.Handler):
    """Levels at which the connector said that pages are stored as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[str] = []
        logging.getLogger("kvstore.connector.vllm").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "stored as they are" in record.getMessage():
            self.levels.append(record.levelname)


def kept(workdir: Path, order: int = 0, **options: Any) -> Facts:
    """Cold, again, a prompt that parts from it within a block, a second turn, and the control."""
    scramble(order)
    reference, store = Reference(workdir), FaultyStore()
    extra = {"layout": "auto" if order else "opaque", **options.pop("extra", {})}
    heard = _Heard()
    engine = Engine(reference.directory, store, extra=extra, **{**_SMALL, **options})
    prompt = tokens_of(1)
    want = reference.generate(prompt, _NEW)
    longer = [*prompt, *want, *tokens_of(2, 50)]
    alike = [*prompt[:210], *tokens_of(3, 90)]
    facts: Facts = {"layout": engine.model_id.layout, "block_tokens": engine.model_id.block_tokens}
    facts |= {"equal": [], "hits": [], "num_distinct": len(set(want)), "warned": "WARNING" in heard.levels}
    for tokens in (prompt, prompt, alike, longer):
        engine.forget()
        outs, hits = engine.generate([tokens], _NEW)
        facts["equal"].append(outs[0] == reference.generate(tokens, _NEW))
        facts["hits"].append(hits[0])
    facts["num_blocks"] = sum(1 for _ in stored(store, engine.model_id, longer))
    before = bytes_of(store, engine.model_id, prompt)
    store.clear()
    engine.forget()
    engine.generate([prompt], _NEW)
    facts["same_bytes"] = before == bytes_of(store, engine.model_id, prompt) and len(before) > 0
    facts["failed_loads"] = engine.metric("vllm:kvstore_failed_loads")
    poison(store, engine.model_id, longer)
    engine.forget()
    facts["control_differs"] = engine.generate([longer], _NEW)[0][0] != outs[0]
    return {**facts, "held": engine.close(), "check": store.check()}


def kept_through_preemption(workdir: Path) -> Facts:
    """Four requests that grow beyond the engine's pages, which are scrambled."""
    scramble(1)
    reference, store = Reference(workdir), FaultyStore()
    options = {"num_gpu_blocks_override": 18, "max_model_len": 512, "enable_prefix_caching": False}
    engine = Engine(reference.directory, store, **options)
    prompts = [tokens_of(seed, 100) for seed in range(30, 34)]
    wants = [reference.generate(prompt, 100) for prompt in prompts]
    outs, _ = engine.generate(prompts, 100)
    facts: Facts = {
        "layout": engine.model_id.layout,
        "equal": [outs == wants],
        "preemptions": engine.metric("vllm:num_preemptions"),
        "loads": engine.connector._scheduler.figures.counts.get("loads", 0),
        "failed_loads": engine.metric("vllm:kvstore_failed_loads"),
    }
    poison(store, engine.model_id, prompts[0])
    engine.forget()
    facts["control_differs"] = engine.generate([prompts[0]], 100)[0][0] != wants[0]
    return {**facts, "held": engine.close(), "check": store.check()}


# -- several on one sidecar ----------------------------------------------------------------------------------------


def _member(workdir: Path, address: str, order: int, layout: str, options: dict[str, Any], spoil: bool) -> Facts:
    scramble(order)
    reference = Reference(workdir)
    engine = Engine(reference.directory, None, extra={"address": address, "layout": layout}, **{**_SMALL, **options})
    facts: Facts = {"layout": engine.model_id.layout, "equal": [], "hits": []}
    want = reference.generate(tokens_of(1), _NEW)
    for _ in range(2):
        outs, hits = engine.generate([tokens_of(1)], _NEW)
        facts["equal"].append(outs[0] == want)
        facts["hits"].append(hits[0])
        engine.forget()
    if spoil:
        with connect(address, mapped=True) as client:
            poison(client, engine.model_id, tokens_of(1))
        outs, hits = engine.generate([tokens_of(1)], _NEW)
        facts |= {"control_differs": outs[0] != want, "control_hits": hits[0]}
    return {**facts, "held": engine.close()}


_Member = tuple[str, int, str, dict[str, Any]]
"""Name, order (0: vLLM's), the connector's layout, and options of an engine."""
_STRANGERS: Sequence[_Member] = (
    ("canonical", 0, "auto", {}),
    ("scrambled otherwise", 2, "auto", {}),
    ("scrambled", 1, "auto", {}),
)
# All as vLLM packs them: what differs is how many hold a part of each page.
_RANKS: Sequence[_Member] = (("one", 0, "opaque", {}), ("two", 0, "opaque", {"tensor_parallel_size": 2}))


def strangers(workdir: Path, members: Sequence[_Member]) -> Facts:
    """Engines of one model on one sidecar that pack pages differently, one after the other, and the last once more."""
    Reference(workdir)
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        sidecar = Sidecar(Path(name))

        def run(order: int, layout: str, options: dict[str, Any], *, spoil: bool = False) -> Facts:
            return in_fork(lambda: _member(workdir, sidecar.address, order, layout, options, spoil))

        try:
            first = {member: run(*how) for member, *how in members}
            return {"first": first, "again": run(*members[-1][1:], spoil=True)}
        finally:
            sidecar.stop()


class Talker(KVConnectorBase_V1):
    """A connector that does nothing, and speaks first."""

    class Word(KVConnectorHandshakeMetadata):
        pass

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return self.Word()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return _NoOrders()


class _NoOrders(KVConnectorMetadata):
    pass


def untold(workdir: Path) -> Facts:
    """The scheduler's side does not hear what workers found, because of a connector before it; and hears, before it.

    Where it did not, it takes pages for canonical: of those there are, which this engine must neither load nor add to.
    """
    Reference(workdir)
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        sidecar = Sidecar(Path(name))
        try:
            with sidecar.connect() as client:
                in_fork(lambda: _member(workdir, sidecar.address, 0, "auto", {}, False))
                facts: Facts = {"there": client.stats()["host.blocks"]}
                for how in ("after", "before"):
                    made = in_fork(lambda how=how: _beside_talker(workdir, sidecar.address, how))  # type: ignore[misc]
                    facts[how] = {**made, "num_blocks": client.stats()["host.blocks"]}
            return facts
        finally:
            sidecar.stop()


def _beside_talker(workdir: Path, address: str, how: str) -> Facts:
    scramble(1)
    reference = Reference(workdir)
    common = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    talker = {"kv_connector": "Talker", "kv_connector_module_path": __name__, **common}
    ours = {"kv_connector": "KVStoreConnector", "kv_connector_module_path": "connectors.vllm", **common}
    ours["kv_connector_extra_config"] = {"address": address, "block_tokens": BLOCK, "load_rule": "always"}
    order = [talker, ours] if how == "after" else [ours, talker]
    transfer = {"kv_connector": "MultiConnector", **common, "kv_connector_extra_config": {"connectors": order}}
    engine = Engine(reference.directory, None, transfer=transfer, **_SMALL)
    facts: Facts = {"equal": [], "hits": []}
    for seed in (1, 2, 1, 2):
        outs, hits = engine.generate([tokens_of(seed)], _NEW)
        facts["equal"].append(outs[0] == reference.generate(tokens_of(seed), _NEW))
        facts["hits"].append(hits[0])
        engine.forget()
    (mine,) = (each for each in engine.connector._connectors if not isinstance(each, Talker))
    counts = mine._scheduler.figures.counts
    facts |= {name: counts.get(name, 0) for name in ("loads", "failed_loads")}
    facts |= {"layout": mine.model_id.layout, "held": mine._scheduler.check(), "late": ""}
    try:
        mine.set_xfer_handshake_metadata_pp_aware(
            {(0, 0): KVStoreHandshake(replace(mine.model_id, layout="opaque:another"), "too late")}
        )
    except ConfigError as error:
        facts["late"] = str(error)
    return {**facts, "layout_then": mine.model_id.layout}


SCENARIOS: dict[str, Callable[[Path], Facts]] = {
    "kept": lambda workdir: kept(workdir, 1),
    "kept_beside_the_step": lambda workdir: kept(
        workdir, 1, extra={"sync_load_ms": 0}, max_num_batched_tokens=64, enable_prefix_caching=False
    ),
    "kept_pages_of_128": lambda workdir: kept(workdir, block_size=128),
    "kept_blocks_of_64": lambda workdir: kept(workdir, 1, extra={"block_tokens": 2 * BLOCK}),
    "kept_through_preemption": kept_through_preemption,
    "strangers": lambda workdir: strangers(workdir, _STRANGERS),
    "ranks": lambda workdir: strangers(workdir, _RANKS),
    "untold": untold,
}
