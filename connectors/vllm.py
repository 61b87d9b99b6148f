# SPDX-License-Identifier: Apache-2.0
"""vLLM: prefixes saved once and loaded by any engine, through vLLM's KV connector interface.

    --kv-transfer-config '{"kv_connector": "KVStoreConnector", "kv_connector_module_path": "connectors.vllm",
      "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"address": "unix:/run/kvstore/kvstore.sock"}}'

vLLM makes one of these in its scheduler and one in every worker. This module is the adapter alone; what is decided
is in `vllm_scheduler`, what is copied in `vllm_worker`, which KV it is in `vllm_identity`, whose store in `vllm_link`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from connectors.vllm_interface import check_interface, not_importable, untested, vllm_version

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorHandshakeMetadata,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
        KVConnectorWorkerMetadata,
        SupportsHMA,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

    from connectors.vllm_metrics import KVStorePromMetrics, KVStoreStats
except ImportError as error:
    raise not_importable(error) from error

from connectors.vllm_device import goes_by_layers
from connectors.vllm_groups import Groups
from connectors.vllm_identity import drafter_with_kv, model_id_of, rank_slice
from connectors.vllm_layout import Worker, agreed_model, platform_of, stored_pages
from connectors.vllm_link import CLOSED, embedded, sidecar
from connectors.vllm_plan import NO_ORDERS, Orders, PageLayout, Report, Scheduled, VllmSettings
from connectors.vllm_scheduler import SchedulerSide
from connectors.vllm_worker import WorkerSide
from kvstore.api import Register
from kvstore.block import ModelId
from kvstore.errors import ConfigError
from kvstore.pinning import CudaPins, pin

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger("kvstore.connector.vllm")

_OPAQUE = (
    "pages are stored as they are (%s), under %s, in blocks of %d tokens: they serve only engines that are the same in "
    "release, attention, instructions or device, dtypes, page size and split over ranks, and blocks are reused whole; "
    "see connectors/vllm.md"
)
_FOREIGN = (
    "nothing is loaded or saved: this worker's pages are %s, and the scheduler's side took them for %s; where several "
    "connectors are used, list KVStoreConnector first, and none that has a handshake of its own (NIXL, say)"
)
_DRAFTS = (
    "nothing is loaded: the drafter (%s) has KV of its own, which is not stored, so that after a load hardly a draft "
    "would be accepted, and answers would take as long as without drafts; load_with_drafts loads all the same"
)


# -- what travels ----------------------------------------------------------------------------------------------


class KVStoreHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # vLLM may not be there with mypy
    """What a worker tells the scheduler's side at the start: its pages are stored as they are, under which identity."""

    def __init__(self, model: ModelId, why_opaque: str) -> None:
        self.model, self.why_opaque = model, why_opaque


class KVStoreMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Orders of one step, over blocks of `model`; None where there are none."""

    def __init__(self, orders: Orders, model: ModelId | None) -> None:
        self.orders, self.model = orders, model


_NOTHING_TO_DO = KVStoreMetadata(NO_ORDERS, None)


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
        check_interface(KVConnectorBase_V1, SupportsHMA)
        if role == KVConnectorRole.SCHEDULER and (line := untested(vllm_version())):
            log.warning(line)
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = vllm_config
        transfer = vllm_config.kv_transfer_config
        settings = VllmSettings.of(transfer.kv_connector_extra_config or {})
        loads = settings.load and transfer.is_kv_consumer
        if loads and not settings.load_with_drafts and (drafter := drafter_with_kv(vllm_config)):
            loads = False
            if role == KVConnectorRole.SCHEDULER:
                log.warning(_DRAFTS, drafter)
        self._settings = replace(settings, load=loads, save=settings.save and transfer.is_kv_producer)
        self._groups = Groups.of(kv_cache_config.kv_cache_groups)
        if loads and not self._groups.keeps_all and drafter_with_kv(vllm_config):
            raise ConfigError(
                "load_with_drafts is set for a model with layers in groups: loads beside both are not tried"
            )
        self._model: ModelId = model_id_of(vllm_config, self._settings)
        self._groups.check_block(self._model.block_tokens)
        if transfer.kv_load_failure_policy != "recompute":
            raise ConfigError('a load that fails must be computed: set "kv_load_failure_policy": "recompute"')
        link = sidecar if self._settings.address else embedded
        self._link = link(vllm_config, self._settings, is_worker=role == KVConnectorRole.WORKER)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._layers: dict[str, int] = {}
        self._orders = NO_ORDERS
        """Of the step at hand, to this worker."""
        self._why_opaque = ""
        self._said_foreign = False

    @property
    def model_id(self) -> ModelId:
        """Which KV this engine computes: what a chain's root is made of. As workers have told, once they have."""
        return self._model

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # -- scheduler ---------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """What workers have found their pages to be, where that is not canonical bytes."""
        told = {rank: one for rank, one in metadata.items() if isinstance(one, KVStoreHandshake)}
        if told:
            parallel = self._config.parallel_config
            ranks = product(range(parallel.pipeline_parallel_size), range(parallel.tensor_parallel_size))
            model = agreed_model({rank: (one.model, one.why_opaque) for rank, one in told.items()}, list(ranks))
            if self._scheduler is not None and self._scheduler.model != model:
                raise ConfigError("workers tell how they keep their pages when requests have come already")
            self._model = model
            why = next(iter(told.values())).why_opaque
            is_wanted = PageLayout(self._settings.layout) is PageLayout.OPAQUE
            log.log(logging.INFO if is_wanted else logging.WARNING, _OPAQUE, why, model.layout, model.block_tokens)
        self._side()

    def _side(self) -> SchedulerSide:
        """Made when workers have told, or else with the first request."""
        if self._scheduler is None:
            parallel, scheduling = self._config.parallel_config, self._config.scheduler_config
            self._scheduler = SchedulerSide(
                self._settings,
                self._model,
                self._link.store,
                self._link.share,
                page_tokens=self._groups.page_tokens,
                num_ranks=parallel.world_size,
                may_be_alone=parallel.data_parallel_size == 1,
                may_trail=bool(scheduling.async_scheduling)
                or parallel.pipeline_parallel_size > 1
                or self._config.device_config.device_type != "cpu",
                keeps_all=self._groups.keeps_all,
            )
        return self._scheduler

    def on_new_request(self, request: Request) -> None:
        self._side().arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._side().match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._side().allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        preempted = scheduler_output.preempted_req_ids or ()
        # As they are: of what was told before, the engine may have let go of some since.
        tables = scheduler_output.kv_connector_block_state.resolve_block_ids
        step = Scheduled(scheduler_output.num_scheduled_tokens, computed, tables, preempted)
        side = self._side()
        orders = side.orders(step)
        return KVStoreMetadata(orders, side.model) if orders is not NO_ORDERS else _NOTHING_TO_DO

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._side().stepped()
        found = connector_output.kv_connector_worker_meta
        if isinstance(found, KVStoreWorkerMetadata):
            self._side().reported(found.report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._side().ended(request, block_ids), None

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
        self._layers = _layers_of(kv_caches, mine.layers)
        tensors = [kv_caches[name] for name in self._layers]
        if tensors[0].shape[2] != self._groups.page_tokens:
            raise ConfigError(
                f"the engine hands out pages of {self._groups.page_tokens} tokens and keeps them as several of "
                f"{tensors[0].shape[2]}: set --block-size to a size that its attention takes whole"
            )
        known = self._config.compilation_config.static_forward_context
        owners = [getattr(known[name], "kv_sharing_target_layer_name", None) or name for name in self._layers]
        worker = Worker(
            engine=f"vllm {vllm_version()}",
            platform=platform_of(tensors[0].device),
            config=self._config,
            model=self._model,
            layers=[known[name] for name in self._layers],
            tensors=tensors,
            mine=mine,
            page_bytes=self._groups.page_bytes,
            groups=self._groups.of_layers(owners),
        )
        stored = stored_pages(worker, PageLayout(self._settings.layout))
        self._model, self._why_opaque = stored.model, stored.why
        self._groups.check_block(self._model.block_tokens)
        self._worker = WorkerSide(
            self._settings,
            self._model,
            self._link.store,
            self._link.adopt,
            stored.pages,
            layers=mine.layers,
            saves=mine.saves,
            keeps_all=self._groups.keeps_all,
            register=_register_with(tensors[0].device),
        )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """None of canonical bytes: of several connectors vLLM passes on only what the first one says."""
        return KVStoreHandshake(self._model, self._why_opaque) if self._model.is_opaque else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """The first call of a step: pages that were taken back may have other owners, who have written nothing yet."""
        if self._worker is not None and isinstance(kv_connector_metadata, KVStoreMetadata):
            self._worker.leave_pages(kv_connector_metadata.orders)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._orders = self._orders_in(connector_metadata)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self._orders = NO_ORDERS

    def has_connector_metadata(self) -> bool:
        """Whether vLLM calls `wait_for_layer_load` and `save_kv_layer` for every layer of the step at hand.

        It asks this before each; where no load goes by layers, as in any step that only decodes, both would do nothing.
        """
        return self._worker is not None and self._worker.goes_by_layers

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        orders = self._orders
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
            self._worker.save(self._orders)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        sent, received = self._worker.finished(idle=self._orders.idle)
        return KVConnectorTransferResults(sent, received, self._worker.failed())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.bad_pages(self._orders.proofs) if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._worker.report() if self._worker is not None else None
        return None if report is None else KVStoreWorkerMetadata(report)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
        self._worker = self._scheduler = None
        close, self._link = self._link.close, CLOSED
        close()

    def _orders_in(self, found: KVConnectorMetadata) -> Orders:
        if not isinstance(found, KVStoreMetadata):
            return NO_ORDERS
        if found.model is None or found.model == self._model:
            return found.orders
        if not self._said_foreign:
            self._said_foreign = True
            log.error(_FOREIGN, self._model.layout, found.model.layout)
            if self._worker is not None:
                self._worker.is_foreign()
        return found.orders.refused()


def _layers_of(kv_caches: Mapping[str, torch.Tensor], layers: range) -> dict[str, int]:
    """Names and numbers of the model's own layers, in order; a draft model's, which share the pages, are left out."""
    from vllm.model_executor.models.utils import extract_layer_index

    found: dict[int, str] = {}
    for name in kv_caches:
        index = extract_layer_index(name)
        if name.startswith("draft_model") or index not in layers:
            continue
        if index in found:
            raise ConfigError(
                f"two of the engine's tensors are layer {index} ({name}): which is the model's is unclear"
            )
        found[index] = name
    missing = [index for index in layers if index not in found]
    if missing:
        raise ConfigError(f"the engine registered no KV for layers {missing} of the model")
    return {found[index]: index for index in layers}


def _register_with(device: torch.device) -> Register | None:
    """What tells `device` of the memory that slots lie in, each worker its own; None where it copies by itself."""
    if device.type != "cuda":
        return None
    return lambda memory: pin(memory, runtime=CudaPins(device))
