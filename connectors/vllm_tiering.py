# SPDX-License-Identifier: Apache-2.0
"""The Redis tier below vLLM's own offloading: for those who keep `OffloadingConnector` and its host memory.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
      "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592,
      "secondary_tiers": [{"type": "RedisTierManager", "module_path": "connectors.vllm_tiering",
                           "tiers": {"redis": {"url": "redis://cache:6379"}}}]}}'

Keys are vLLM's hashes and values its pages as they lie in its host memory, so nothing is shared with `connectors.vllm`:
they have a namespace of their own, which holds what vLLM's hash leaves out (weights, dtype, layout, split, instruction
set). What it costs over that connector: one copy more, whole chunks only, and hits only among engines of one split.

Everything runs in the scheduler's process and is called by its loop, so no method waits: a lookup is answered by the
next step, transfers run on threads. Only `drain_jobs` waits, as it must, for as long as the deadlines.

Invariants
1. Once a job's result is handed out, nothing of it touches vLLM's memory.
2. A value that could not be read whole and verified is named as failed: vLLM then drops its slot.
3. A key that failed to load is a miss for its request from then on, or vLLM would promote it again and again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from platform import machine
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from connectors.vllm_interface import not_importable

try:
    from vllm.v1.kv_offload.base import LookupResult, Medium, ReqContext, RequestOffloadingContext
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
except ImportError as error:
    raise not_importable(error, "connectors.vllm_tiering") from error

from connectors.vllm_identity import revision_of
from kvstore.errors import ConfigError, KVStoreError
from kvstore.keyed import KeyedValues

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec, OffloadKey, ScheduleEndContext
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

log = logging.getLogger("kvstore.connector.vllm")

_KEY_BYTES = 32 + 4
"""A SHA-256 and the group. Shorter hashes can be made to collide, which in a shared tier is somebody else's KV."""


def namespace_of(spec: OffloadingSpec, model: str = "", revision: str = "") -> dict[str, str]:
    """What vLLM's hashes leave out of what a value's bytes depend on.

    Raises ConfigError where the weights' revision is not known.
    """
    import vllm
    from torch.backends import cpu

    config = spec.config
    parallel = config.parallel
    return {
        "engine": f"vllm {vllm.__version__}",
        "machine": f"{machine()} {cpu.get_cpu_capability()}",  # on a CPU it decides the order inside pages
        "model": model or config.model.name,
        "revision": revision or revision_of(config.model.name, None),
        "dtype": str(config.model.dtype),
        "groups": repr([(group.group_id, group.tokens_per_block, group.layer_names) for group in config.groups]),
        "hashed": str(config.cache.tokens_per_hash),
        "chunk": str(config.cache.blocks_per_chunk),
        "layout": f"{config.kv_cache_layout} canonical={config.canonical_layout}",
        "replicated": str(config.replicated_layout),
        "split": f"tp{parallel.tp_size} pp{parallel.pp_size} pcp{parallel.pcp_size} dcp{parallel.dcp_size}",
        "bytes": f"{config.worker_kv_bytes_per_block} x {parallel.world_size}",
    }


class RedisTierManager(SecondaryTierManager):  # type: ignore[misc]  # vLLM may not be there when types are checked
    """What vLLM loads. Every public method is called by its scheduler.

    Args:
        tiers: settings of one lower tier, as in the store's configuration.
        model, revision: what the weights are called, where the hub's name or the files do not say it.
        lookup_deadline_ms: then a lookup that was not answered is a miss.
        load_deadline_ms, store_deadline_ms: of one job; what is not there by then failed.
        threads: transfers at once, and as many again for stores, so that loads never wait behind them.
        queue_bytes: of stores waiting or under way; more are refused, which frees vLLM's memory at once.
        locality: vLLM's, passed through.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        *,
        tiers: Mapping[str, object],
        model: str = "",
        revision: str = "",
        lookup_deadline_ms: float = 250.0,
        load_deadline_ms: float = 5000.0,
        store_deadline_ms: float = 5000.0,
        threads: int = 2,
        queue_bytes: int = 1 << 30,
        locality: str | None = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if threads < 1 or queue_bytes < 1:
            raise ConfigError(f"threads is {threads}, queue_bytes {queue_bytes}: both must be at least 1")
        self._rows = np.frombuffer(primary_kv_view.cast("B"), np.uint8).reshape(-1, self.block_size_bytes)
        self._values = KeyedValues.connect(tiers, namespace_of(offloading_spec, model, revision), self.block_size_bytes)
        self._lookup_s, self._load_s, self._store_s = (
            ms / 1e3 for ms in (lookup_deadline_ms, load_deadline_ms, store_deadline_ms)
        )
        self._queue_bytes = queue_bytes
        self._lock = threading.Condition()
        self._queued_bytes = 0
        self._num_running = 0
        self._closed = False
        self._finished: deque[JobResult] = deque()
        self._known: dict[str, dict[OffloadKey, bool]] = {}
        """By request: which of its keys are there, as far as has been heard."""
        self._asked: dict[str, dict[OffloadKey, float]] = {}
        """By request: until when an answer counts."""
        self._to_ask: dict[str, list[OffloadKey]] = {}
        self._lookups = ThreadPoolExecutor(1, thread_name_prefix="kvstore-lookup")
        self._loads = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-load")
        self._stores = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-store")

    # -- lookups -----------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        request = req_context.req_id
        if len(key) != _KEY_BYTES or self._closed:
            return LookupResult.MISS
        now_s = time.monotonic()
        with self._lock:
            known = self._known.setdefault(request, {})
            if key in known:
                return LookupResult.HIT if known[key] else LookupResult.MISS
            asked = self._asked.setdefault(request, {})
            if key in asked:
                if now_s < asked[key]:
                    return LookupResult.RETRY
                known[key] = False  # too late for this request
                return LookupResult.MISS
            asked[key] = now_s + self._lookup_s
            self._to_ask.setdefault(request, []).append(key)
        return LookupResult.RETRY

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Ask for all keys that this step looked up, in one round trip."""
        with self._lock:
            batch, self._to_ask = self._to_ask, {}
        if batch and not self._closed:
            self._lookups.submit(self._ask, batch)

    def _ask(self, batch: Mapping[str, list[OffloadKey]]) -> None:
        keys = list(dict.fromkeys(key for wanted in batch.values() for key in wanted))
        try:
            found = dict(zip(keys, self._values.contains(keys, self._lookup_s), strict=True))
        except KVStoreError:
            found = dict.fromkeys(keys, False)
        except Exception:  # the top of a thread: a fault of ours is a miss
            log.exception("a lookup failed")
            found = dict.fromkeys(keys, False)
        with self._lock:
            for request, wanted in batch.items():
                known = self._known.get(request)
                if known is not None:  # the request is still there
                    for key in wanted:
                        known.setdefault(key, found[key])

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        if not self._closed:
            self._values.touch([key for key in keys if len(key) == _KEY_BYTES])

    def on_request_finished(self, req_context: ReqContext) -> None:
        with self._lock:
            for table in (self._known, self._asked, self._to_ask):
                table.pop(req_context.req_id, None)

    # -- transfers ---------------------------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        num_bytes = len(job_metadata.keys) * self.block_size_bytes
        with self._lock:
            full = self._queued_bytes and self._queued_bytes + num_bytes > self._queue_bytes
            if full or self._closed:
                self._finished.append(JobResult(job_metadata.job_id, success=False))
                return
            self._queued_bytes += num_bytes
            self._num_running += 1
        self._stores.submit(self._run, job_metadata, num_bytes)

    def submit_load(self, job_metadata: TransferJob) -> None:
        with self._lock:
            if self._closed:
                self._finished.append(JobResult(job_metadata.job_id, success=False))
                return
            self._num_running += 1
        self._loads.submit(self._run, job_metadata, 0)

    def _run(self, job: TransferJob, queued_bytes: int) -> None:
        began_s, done = time.monotonic(), set[bytes]()
        try:
            if not self._closed:
                done = self._load(job) if job.is_promotion else self._store(job)
        except KVStoreError as error:
            log.debug("job %s failed: %s", job.job_id, error)
        except Exception:  # the top of a thread: a fault of ours fails the job
            log.exception("job %s failed", job.job_id)
        keys = set(job.keys)
        result = JobResult(
            job.job_id,
            success=done >= keys,
            successful_keys=[key for key in job.keys if key in done] if job.is_promotion else None,
            transfer_time=time.monotonic() - began_s,
            transfer_bytes=len(done) * self.block_size_bytes,
        )
        with self._lock:
            self._finished.append(result)
            self._queued_bytes -= queued_bytes
            self._num_running -= 1
            known = self._known.get(job.req_context.req_id)
            if job.is_promotion and known is not None:
                known.update(dict.fromkeys(keys - done, False))
            self._lock.notify_all()

    def _chunks(self, job: TransferJob) -> dict[bytes, memoryview]:
        rows = (self._rows[int(chunk)].data for chunk in job.chunk_ids)
        return {key: row for key, row in zip(job.keys, rows, strict=True) if len(key) == _KEY_BYTES}

    def _load(self, job: TransferJob) -> set[bytes]:
        return self._values.read(self._chunks(job), self._load_s)

    def _store(self, job: TransferJob) -> set[bytes]:
        chunks = self._chunks(job)
        keys = list(chunks)
        there = self._values.contains(keys, self._store_s)
        fresh = {key: chunks[key] for key, found in zip(keys, there, strict=True) if not found}
        stored = self._values.write(fresh, self._store_s) if fresh else set()
        return stored | {key for key, found in zip(keys, there, strict=True) if found}

    def get_finished_jobs(self) -> Iterable[JobResult]:
        with self._lock:
            taken, self._finished = self._finished, deque()
        return taken

    def drain_jobs(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._num_running == 0)

    def shutdown(self) -> None:
        """Jobs that have not begun fail; those under way end by their deadlines."""
        with self._lock:
            self._closed = True
        self.drain_jobs()
        for pool in (self._lookups, self._loads, self._stores):
            pool.shutdown(wait=True, cancel_futures=True)
        self._values.close()
        self._rows = self._rows[:0].copy()  # vLLM unmaps its memory next, which nothing may refer to
