# SPDX-License-Identifier: Apache-2.0
"""Scenarios of `vllm_runs` for the tier below vLLM's own offloading: its contract, and an engine with it.

vLLM's worker that copies between pages and host memory refuses CPUs; a spec of our own copies by torch's indexing.
Everything else is vLLM's, and Redis is real.
"""

from __future__ import annotations

import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadingWorker,
    ReqContext,
    ScheduleEndContext,
    TransferResult,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from connectors.vllm_tiering import RedisTierManager
from kvstore.wire import frame
from tests.engines.vllm_shared import Redis, Relay
from tests.engines.vllm_support import NEW, Engine, Facts, Reference, tokens_of
from tests.waiting import eventually

CHUNK = 4096
AT_ONCE_S = 0.05
"""A call that takes longer waits for something: the deadlines here are ten times as long."""

# -- the contract ----------------------------------------------------------------------------------------------


def spec(**changes: Any) -> Any:
    """What a tier sees of vLLM's offloading."""
    parallel = {"rank": 0, "world_size": 1, "tp_size": 1, "pp_size": 1, "pcp_size": 1, "dcp_size": 1}
    parallel |= {"data_parallel_index": 0, "data_parallel_size": 1, "data_parallel_rank_local": None}
    made = {
        "groups": (OffloadingGroupConfig(32, ("layers.0",), 0),),
        "worker_kv_bytes_per_block": CHUNK,
        "enable_kv_cache_events": False,
        "extra_config": {},
        "engine_id": "e",
        "model": OffloadingModelConfig("m", "float32"),
        "cache": OffloadingCacheConfig(32, 1),
        "parallel": OffloadingParallelConfig(**parallel, is_parallelism_agnostic=False),
    }
    return SimpleNamespace(config=OffloadingConfig(**{**made, **changes}))


class Side:
    """One scheduler's tier over host memory of its own; every call is timed."""

    def __init__(self, url: str, *, num_chunks: int = 16, spec: Any = None, **options: Any) -> None:
        self.memory = np.zeros((num_chunks, CHUNK), np.int8)
        settings: dict[str, Any] = {"tiers": {"redis": {"url": url}}, "revision": "r", "lookup_deadline_ms": 500}
        settings |= {"load_deadline_ms": 500, "store_deadline_ms": 500, **options}
        self.tier = RedisTierManager(spec or globals()["spec"](), memoryview(self.memory), "redis", **settings)
        self.worst_s = 0.0
        self._job = 0

    def call(self, work: Callable[..., Any], *given: Any) -> Any:
        began_s = time.monotonic()
        got = work(*given)
        self.worst_s = max(self.worst_s, time.monotonic() - began_s)
        return got

    def fill(self, chunk: int, seed: int) -> None:
        self.memory[chunk] = np.random.default_rng(seed).integers(-128, 127, CHUNK)

    def submit(self, keys: Sequence[Any], chunks: Sequence[int], *, load: bool, request: str = "r") -> int:
        self._job += 1
        job = TransferJob(self._job, list(keys), np.array(chunks, np.int32), load, ReqContext(request))
        self.call(self.tier.submit_load if load else self.tier.submit_store, job)
        return self._job

    def results(self, count: int = 1) -> dict[int, JobResult]:
        found: dict[int, JobResult] = {}
        assert eventually(
            lambda: found.update({r.job_id: r for r in self.call(self.tier.get_finished_jobs)}) or len(found) >= count
        )
        return found

    def store(self, keys: Sequence[Any], chunks: Sequence[int]) -> JobResult:
        job = self.submit(keys, chunks, load=False)
        return self.results()[job]

    def load(self, keys: Sequence[Any], chunks: Sequence[int], request: str = "r") -> JobResult:
        job = self.submit(keys, chunks, load=True, request=request)
        return self.results()[job]

    def lookup(self, key: Any, request: str = "r") -> LookupResult:
        """As vLLM asks: again with every step until there is an answer."""
        context = ReqContext(request)
        for _ in range(1000):
            answer: LookupResult = self.call(self.tier.lookup, key, context)
            self.call(self.tier.on_schedule_end, ScheduleEndContext((), ()))
            if answer is not LookupResult.RETRY:
                return answer
            time.sleep(0.002)
        raise AssertionError("no answer")


def key_of(number: int) -> Any:
    return make_offload_key(number.to_bytes(32, "big"), 0)


KEYS = [key_of(number) for number in range(1, 9)]


def what_one_stores_another_loads(server: Redis, url: str) -> None:
    one, two = Side(url), Side(url)
    for chunk in range(4):
        one.fill(chunk, chunk)
    assert one.store(KEYS[:4], range(4)).success
    assert [two.lookup(key) for key in KEYS[:5]] == [LookupResult.HIT] * 4 + [LookupResult.MISS]
    done = two.load(KEYS[:4], [7, 5, 3, 1])
    assert done.success
    assert done.transfer_bytes == 4 * CHUNK
    assert np.array_equal(two.memory[[7, 5, 3, 1]], one.memory[:4])
    assert not two.memory[[0, 2, 4, 6]].any()
    assert max(one.worst_s, two.worst_s) < AT_ONCE_S
    for side in (one, two):
        side.tier.shutdown()


def what_is_missing_fails_alone_and_stays_a_miss(server: Redis, url: str) -> None:
    one, two = Side(url), Side(url)
    for chunk in range(3):
        one.fill(chunk, chunk)
    assert one.store(KEYS[:3], range(3)).success
    assert two.lookup(KEYS[1]) is LookupResult.HIT
    one.tier._values.remove([KEYS[1]])
    done = two.load(KEYS[:3], [0, 1, 2])
    assert (done.success, done.successful_keys) == (False, [KEYS[0], KEYS[2]])
    assert np.array_equal(two.memory[[0, 2]], one.memory[[0, 2]])
    assert two.lookup(KEYS[1]) is LookupResult.MISS  # or vLLM would promote it for ever
    two.tier.on_request_finished(ReqContext("r"))
    assert one.store([KEYS[1]], [1]).success
    assert two.lookup(KEYS[1]) is LookupResult.HIT  # another request asks anew
    for side in (one, two):
        side.tier.shutdown()


def damaged_and_foreign_values_are_no_hits(server: Redis, url: str) -> None:
    one, two = Side(url), Side(url)
    for chunk in range(3):
        one.fill(chunk, chunk)
    assert one.store(KEYS[:3], range(3)).success
    client = server.client()
    names = [next(client.scan_iter(f"*{one.tier._values.key(key).block.hex()}*")) for key in KEYS[:3]]
    value = bytearray(client.get(names[0]))
    value[-7] ^= 1
    client.set(names[0], bytes(value))
    client.set(names[1], client.get(names[2]))  # a sound value of another key
    done = two.load(KEYS[:3], [0, 1, 2])
    assert (done.success, done.successful_keys) == (False, [KEYS[2]])
    assert np.array_equal(two.memory[2], one.memory[2])
    for side in (one, two):
        side.tier.shutdown()


def other_weights_layouts_and_splits_are_other_namespaces(server: Redis, url: str) -> None:
    one = Side(url)
    one.fill(0, 0)
    assert one.store(KEYS[:1], [0]).success
    base = spec().config
    others = {
        "weights": Side(url, revision="s"),
        "dtype": Side(url, spec=spec(model=OffloadingModelConfig("m", "bfloat16"))),
        "layout": Side(url, spec=spec(kv_cache_layout="BLHNC")),
        "split": Side(url, spec=spec(parallel=OffloadingParallelConfig(**{**vars(base.parallel), "tp_size": 2}))),
        "hashing": Side(url, spec=spec(cache=OffloadingCacheConfig(16, 2))),
    }
    found = {name: side.lookup(KEYS[0]) for name, side in others.items()}
    assert set(found.values()) == {LookupResult.MISS}, found
    again = Side(url)
    assert again.lookup(KEYS[0]) is LookupResult.HIT
    for side in (one, again, *others.values()):
        side.tier.shutdown()


def keys_that_could_be_made_to_collide_are_left_alone(server: Redis, url: str) -> None:
    one = Side(url)
    short = make_offload_key(bytes(16), 0)
    assert not one.store([short], [0]).success
    assert one.lookup(short) is LookupResult.MISS
    one.tier.shutdown()


def a_stopped_server_delays_nothing_but_its_own_answers(server: Redis, url: str) -> None:
    one = Side(url)
    one.fill(0, 0)
    assert one.store(KEYS[:1], [0]).success
    one.worst_s = 0.0
    server.signal(signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        jobs = [one.submit(KEYS[:1], [1], load=True), one.submit(KEYS[1:2], [0], load=False)]
        assert one.lookup(KEYS[0]) is LookupResult.MISS
        one.call(one.tier.touch, KEYS, ReqContext("r"))
        one.call(one.tier.on_request_finished, ReqContext("r"))
        worst_s = one.worst_s
        one.tier.drain_jobs()
        assert time.monotonic() - began_s < 3.0
        found = one.results(2)
        assert [found[job].success for job in jobs] == [False, False]
        assert found[jobs[0]].successful_keys == []
        before = one.memory.copy()
    finally:
        server.signal(signal.SIGCONT)
    time.sleep(0.3)  # what was sent before arrives now, and must go nowhere
    assert np.array_equal(one.memory, before)
    assert worst_s < AT_ONCE_S
    assert eventually(lambda: one.lookup(KEYS[0], f"later {time.monotonic()}") is LookupResult.HIT)
    one.tier.shutdown()


def stores_beyond_the_queue_are_refused_at_once(server: Redis, url: str) -> None:
    one = Side(url, queue_bytes=2 * CHUNK, threads=1)
    server.signal(signal.SIGSTOP)
    try:
        jobs = [one.submit([key], [0], load=False) for key in KEYS[:4]]
        refused = {result.job_id for result in one.tier.get_finished_jobs()}
        assert refused == set(jobs[2:])
    finally:
        server.signal(signal.SIGCONT)
    one.tier.drain_jobs()
    assert set(one.results(2)) == set(jobs[:2])
    one.tier.shutdown()


def every_job_has_a_result_when_it_shuts_down(server: Redis, url: str) -> None:
    one = Side(url, threads=1)
    jobs = [one.submit(KEYS[:4], range(4), load=at % 2 == 1) for at in range(12)]
    one.tier.shutdown()
    assert {result.job_id for result in one.tier.get_finished_jobs()} == set(jobs)
    late = one.submit(KEYS[:1], [0], load=True)
    assert one.results()[late].success is False
    assert one.tier.lookup(KEYS[0], ReqContext("r")) is LookupResult.MISS


CONTRACT = (
    what_one_stores_another_loads,
    what_is_missing_fails_alone_and_stays_a_miss,
    damaged_and_foreign_values_are_no_hits,
    other_weights_layouts_and_splits_are_other_namespaces,
    keys_that_could_be_made_to_collide_are_left_alone,
    a_stopped_server_delays_nothing_but_its_own_answers,
    stores_beyond_the_queue_are_refused_at_once,
    every_job_has_a_result_when_it_shuts_down,
)


def contract(workdir: Path) -> Facts:
    """Each clause against a server of its own; what went wrong, by clause."""
    found: dict[str, str] = {}
    for clause in CONTRACT:
        with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
            server = Redis(Path(name))
            try:
                clause(server, f"unix://{server.path}")
                found[clause.__name__] = ""
            except Exception:  # noqa: BLE001  # all clauses are tried
                found[clause.__name__] = traceback.format_exc()[-1500:]
            finally:
                server.stop()
    return {"clauses": found}


# -- an engine -------------------------------------------------------------------------------------------------


class IndexWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies between the engine's pages and vLLM's host memory, at once."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._pages = [t.tensor.view(torch.int8).view(-1, t.page_size_bytes) for t in kv_caches.tensors]
        self._host = [region.create_next_worker_view(t.page_size_bytes) for t in kv_caches.tensors]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._copy(job_id, self._pages, src_spec.block_ids, self._host, dst_spec)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, CPULoadStoreSpec)
        for pages, host in zip(self._pages, self._host, strict=True):
            pages[torch.from_numpy(dst_spec.block_ids)] = host[torch.from_numpy(src_spec.chunk_ids)]
        self._done.append(TransferResult(job_id, success=True))
        return True

    def _copy(
        self, job_id: int, pages: list[torch.Tensor], blocks: Any, host: list[torch.Tensor], at: LoadStoreSpec
    ) -> bool:
        assert isinstance(at, CPULoadStoreSpec)
        for source, target in zip(pages, host, strict=True):
            target[torch.from_numpy(at.chunk_ids)] = source[torch.from_numpy(blocks)]
        self._done.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        taken, self._done = self._done, []
        return taken

    def wait(self, job_ids: set[int]) -> None:
        """Copies were done when they were submitted."""


class CpuTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's, for engines on a CPU."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not isinstance(self._worker, IndexWorker):
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = IndexWorker(kv_caches, region)
        return self._worker


def poison_values(server: Redis, tier: RedisTierManager) -> int:
    """Under every key there is, bytes that are not its: sound values, wrong numbers."""
    keys = [frame.unpack(value).meta.extra for value in map(server.client().get, server.client().scan_iter("*:v:*"))]
    generator = np.random.default_rng(5)
    numbers = [generator.standard_normal(tier.block_size_bytes // 4).astype(np.float32) for _ in keys]
    tier._values.remove(keys)
    written = tier._values.write({k: n.data.cast("B") for k, n in zip(keys, numbers, strict=True)}, 10.0)
    return len(written)


def tiering(workdir: Path) -> Facts:
    """Chats that overflow a small host memory come back from Redis; Redis dies in the middle of a promotion."""
    reference = Reference(workdir)
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        directory = Path(name)
        server = Redis(directory)
        relay = Relay(directory / "relay", server.path)
        extra = {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "tests.engines.vllm_tiering_runs",
            "cpu_bytes_to_use": 12 * 49152,  # 12 chunks; a prompt has 9
            "secondary_tiers": [
                {
                    "type": "RedisTierManager",
                    "module_path": "connectors.vllm_tiering",
                    "tiers": {"redis": {"url": f"unix://{directory}/relay"}},
                    "lookup_deadline_ms": 1000,
                    "load_deadline_ms": 1000,
                }
            ],
        }
        transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        engine = Engine(reference.directory, None, transfer=transfer)
        manager = engine.connector.connector_scheduler.manager
        prompts = [tokens_of(seed) for seed in range(50, 54)]
        wants = [reference.generate(prompt, NEW) for prompt in prompts]
        facts: Facts = {"equal": {}, "hits": {}, "ttft_s": {}}

        def run(name: str, which: int) -> None:
            engine.forget()
            outs, hits = engine.generate([prompts[which]])
            facts["equal"][name] = outs[0] == wants[which]
            facts["hits"][name], facts["ttft_s"][name] = hits[0], engine.ttft_s

        for which in range(4):
            run(f"cold {which}", which)
        server.wait_for(36)
        run("from Redis", 0)
        facts["chunk_hits"] = engine.metric("vllm:kv_offload_tiering_chunk_hits")
        facts["read_bytes"] = engine.metric("vllm:kv_offload_tiering_read_bytes")
        relay.arm(4 * 49152, server.kill)
        run("killed", 1)
        facts["acted"] = relay.acted
        run("gone", 2)
        server.start()
        relay.arm(1 << 60, lambda: None)
        time.sleep(1.1)  # as long as the breaker is open
        for which in range(4):
            run(f"saved again {which}", which)
        server.wait_for(27)
        facts["poisoned"] = poison_values(server, manager.secondary_tiers[0])
        run("warm-up of another", 3)
        equal = dict(facts["equal"])
        run("control", 0)
        facts |= {"control_differs": not facts["equal"]["control"], "equal": equal}
        facts["control_hits"] = facts["hits"]["control"]
        facts["jobs"] = len(manager._jobs)
        engine.close()
        manager.shutdown()
        server.stop()
        return facts


SCENARIOS: dict[str, Callable[[Path], Facts]] = {"tiering": tiering, "tiering_contract": contract}
