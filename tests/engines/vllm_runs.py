# SPDX-License-Identifier: Apache-2.0
"""Runs of a real vLLM engine, one scenario a process; prints what was seen as one line of JSON.

    python -m tests.engines.vllm_runs SCENARIO WORKDIR

Needs a Python with vLLM. The reference is Hugging Face transformers on the same weights: its greedy tokens, and its
keys and values. A random model may stay "equal" on wrong bytes, so every run also compares what is stored with what
transformers computes, and has a control whose stored bytes are spoiled on purpose and whose tokens must change.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

import kvstore
from bench.models import random_llama
from connectors import vllm as connector_module
from connectors import vllm_scheduler
from kvstore.api import Match
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, TierUnavailable
from kvstore.store import KVStore
from kvstore.transfer import to_tensor

BLOCK = 32
PROMPT, NEW = 300, 84  # together 12 blocks: the last token, which has no KV, ends a block
Facts = dict[str, Any]


# -- the model and its reference -------------------------------------------------------------------------------


class Reference:
    """A small random Llama on disk, and what transformers makes of it."""

    def __init__(self, workdir: Path, dtype: torch.dtype = torch.float32) -> None:
        self.directory = workdir / "llama"
        self.model = random_llama(7, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, max_tokens=4096)
        self.model.to(dtype)
        if not self.directory.is_dir():
            self.model.save_pretrained(self.directory)

    def generate(self, prompt: Sequence[int], new: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        return [int(token) for token in out[0, len(prompt) :]]

    def kv(self, tokens: Sequence[int]) -> torch.Tensor:
        """[layers, kv, tokens, heads, dim] of a sequence."""
        with torch.no_grad():
            cache = self.model(torch.tensor([list(tokens)]), use_cache=True).past_key_values
        return torch.stack(
            [torch.stack([layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)]) for layer in cache.layers]
        )


def tokens_of(seed: int, count: int = PROMPT) -> list[int]:
    """Random tokens in which pieces come again, so that n-grams find something to propose."""
    generator = torch.Generator().manual_seed(seed)
    piece = torch.randint(1, 250, (count // 3,), generator=generator)
    return torch.cat([piece, piece, torch.randint(1, 250, (count - 2 * len(piece),), generator=generator)]).tolist()


# -- the store, with faults ------------------------------------------------------------------------------------


class FaultyStore(KVStore):
    """The real store with faults on demand.

    Attributes:
        unsettled: matches that say, so many times, that lower tiers were not heard yet.
        slow_s: how long each loaded block takes; ends_at: block at which loads end; breaks: loads raise.
        lies: loads say that their bytes may have changed.
    """

    def __init__(self) -> None:
        super().__init__(StoreConfig.load({"host": {"capacity_bytes": "64MiB", "prefault": False}}, environ={}))
        self.unsettled = 0
        self.slow_s = 0.0
        self.ends_at: int | None = None
        self.breaks = False
        self.lies = False
        self.num_matches = 0

    def match(self, *args: Any, **kwargs: Any) -> Match:
        self.num_matches += 1
        found = super().match(*args, **kwargs)
        if self.unsettled:
            self.unsettled -= 1
            return Match(found.num_blocks, found.num_host_blocks, 0, False, found.tiers)
        return found

    def load(self, request: str, num_blocks: int | None = None, *, start: int = 0) -> Any:
        if self.breaks:
            raise TierUnavailable("test", "breaks")
        return _FaultyLoad(self, super().load(request, num_blocks, start=start))


class _FaultyLoad:
    def __init__(self, store: FaultyStore, load: Any) -> None:
        self._store, self._load = store, load

    def __iter__(self) -> Iterator[Any]:
        for block in self._load:
            if block.index == self._store.ends_at:
                return
            time.sleep(self._store.slow_s)
            yield block

    def intact(self) -> bool:
        return not self._store.lies and self._load.intact()

    def close(self) -> None:
        self._load.close()

    def __enter__(self) -> _FaultyLoad:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- the engine ------------------------------------------------------------------------------------------------


class Engine:
    """A vLLM engine in this process over a store that outlives it."""

    def __init__(
        self, directory: Path, store: FaultyStore | None, *, extra: Mapping[str, Any] | None = None, **options: Any
    ):
        from vllm import LLM

        self.has_connector = store is not None or bool(extra)
        place: dict[str, Any] = {}
        if store is not None:
            place = {"embedded": f"test-{id(store)}"}
            connector_module.EMBEDDED.take(place["embedded"], lambda: store)
        transfer = {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "block_tokens": BLOCK,
                "load_rule": "always",
                **place,
                **(extra or {}),
            },
        }
        settings = {
            "dtype": "float32",
            "block_size": 32,
            "max_num_batched_tokens": 2048,
            "kv_cache_memory_bytes": 32 << 20,
            "max_num_seqs": 4,
            "max_model_len": 2048,
            "enforce_eager": True,
            **options,
        }
        self.llm = LLM(
            str(directory),
            skip_tokenizer_init=True,
            seed=0,
            disable_log_stats=False,
            kv_transfer_config=transfer if self.has_connector else None,
            **settings,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], new: int = NEW, **options: Any
    ) -> tuple[list[list[int]], list[int]]:
        """(new tokens, cached prompt tokens) of each prompt."""
        from vllm import SamplingParams

        lora = options.pop("lora_request", None)
        params = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": list(prompt), **options} for prompt in prompts]
        outs = self.llm.generate(inputs, params, use_tqdm=False, lora_request=lora)
        return [list(out.outputs[0].token_ids) for out in outs], [int(out.num_cached_tokens) for out in outs]

    def forget(self) -> None:
        """Empty the engine's own prefix cache."""
        assert self.llm.reset_prefix_cache()

    def metric(self, name: str) -> float:
        return sum(float(m.value) for m in self.llm.get_metrics() if m.name == name and hasattr(m, "value"))

    @property
    def connector(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler.connector

    @property
    def model_id(self) -> ModelId:
        return self.connector.model_id

    def close(self) -> list[str]:
        """Stop the engine; what its scheduler's side still held."""
        held = self.connector._scheduler.check() if self.has_connector else []
        self.llm.llm_engine.engine_core.shutdown()
        return held


# -- looking into the store ------------------------------------------------------------------------------------


def stored(store: Any, model: ModelId, tokens: Sequence[int], *, salt: bytes = b"") -> Iterator[tuple[int, Any]]:
    """(index, block) of what the store holds of a sequence."""
    chain = Chain(Root(model, salt=salt), list(tokens))
    found = store.match(chain, "look")
    with KVStore.load(store, "look", found.num_blocks) if isinstance(store, KVStore) else store.load("look") as load:
        for block in load:
            yield block.index, block


def worst_error(store: Any, model: ModelId, reference: Reference, tokens: Sequence[int]) -> tuple[float, int]:
    """(largest difference between stored and recomputed KV, number of blocks compared)."""
    want = reference.kv(tokens)
    worst, count, block_tokens = 0.0, 0, model.block_tokens
    layout = store.open(model)
    for index, block in stored(store, model, tokens):
        for part, view in zip(layout.parts, block.views, strict=True):
            has = to_tensor(view, part, want.dtype)
            mine = want[
                part.layers.start : part.layers.stop,
                :,
                index * block_tokens : (index + 1) * block_tokens,
                part.heads.start : part.heads.stop,
            ]
            worst = max(worst, float((has - mine).abs().max()))
        count += 1
    return worst, count


def spoil(store: KVStore, model: ModelId, tokens: Sequence[int]) -> None:
    """Turn the bytes of stored blocks around: right sizes, wrong KV."""
    layout = store.open(model)
    for _, block in stored(store, model, tokens):
        for slot, part in zip(block.slots, layout.parts, strict=True):
            view = store.arena.view(slot, part.num_bytes)
            view[:] = bytes(view)[::-1][:-2] + b"\x00\x00"
            numbers = torch.frombuffer(view, dtype=torch.float32)
            numbers.nan_to_num_(0.0, 0.0, 0.0).clamp_(-4, 4)


# -- scenarios -------------------------------------------------------------------------------------------------


def turns(workdir: Path, **options: Any) -> Facts:
    """Cold, again, a second turn with the answer in it, and the control."""
    reference = Reference(workdir)
    store = FaultyStore()
    extra = options.pop("extra", None)
    engine = Engine(reference.directory, store, extra=extra, **options)
    prompt = tokens_of(1)
    want = reference.generate(prompt, NEW)
    cold, cold_hits = engine.generate([prompt])
    error, num_blocks = worst_error(store, engine.model_id, reference, [*prompt, *want])
    engine.forget()
    warm, warm_hits = engine.generate([prompt])
    longer = [*prompt, *want, *tokens_of(2, 50)]
    engine.forget()
    second, second_hits = engine.generate([longer])
    error = max(error, worst_error(store, engine.model_id, reference, longer)[0])
    spoil(store, engine.model_id, longer)
    engine.forget()
    control, _ = engine.generate([longer])
    return {
        "equal": [cold[0] == want, warm[0] == want, second[0] == reference.generate(longer, NEW)],
        "hits": [cold_hits[0], warm_hits[0], second_hits[0]],
        "error": error,
        "num_blocks": num_blocks,
        "control_differs": control[0] != second[0],
        "metrics": {
            name: engine.metric(f"vllm:kvstore_{name}")
            for name in ("loads", "failed_loads", "saved_blocks", "loaded_bytes")
        },
        "num_distinct": len(set(want)),
        "held": engine.close(),
        "check": store.check(),
    }


def speculation(workdir: Path, *, clamp: bool = True, **options: Any) -> Facts:
    """Drafts by n-grams, many of them wrong, in answers that end on a block boundary.

    Without `clamp` the connector stores every block whose tokens are known, as it would without the save boundary.
    """
    reference = Reference(workdir)
    store = FaultyStore()
    if not clamp:
        vllm_scheduler.storable_finished = lambda computed, prompt, tokens, block: tokens // block
    options.setdefault(
        "speculative_config",
        {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    )
    engine = Engine(reference.directory, store, **options)
    prompts = [tokens_of(seed) for seed in range(10, 18)]
    wants = [reference.generate(prompt, NEW) for prompt in prompts]
    outs, _ = engine.generate(prompts)
    errors = [
        worst_error(store, engine.model_id, reference, [*prompt, *want])
        for prompt, want in zip(prompts, wants, strict=True)
    ]
    engine.forget()
    again, hits = engine.generate(prompts)
    longer = [*prompts[0], *wants[0], *tokens_of(2, 50)]
    engine.forget()
    before, _ = engine.generate([longer])
    spoil(store, engine.model_id, longer)
    engine.forget()
    control, _ = engine.generate([longer])
    return {
        "equal": [outs == wants, again == wants],
        "hits": hits,
        "error": max(error for error, _ in errors),
        "num_blocks": sorted({count for _, count in errors}),
        "drafted": engine.metric("vllm:spec_decode_num_draft_tokens"),
        "accepted": engine.metric("vllm:spec_decode_num_accepted_tokens"),
        "control_differs": control != before,
        "held": engine.close(),
        "check": store.check(),
    }


def preemption(workdir: Path) -> Facts:
    """Four requests that grow beyond the engine's pages."""
    reference = Reference(workdir)
    store = FaultyStore()
    # Without its own prefix cache, or the engine would find what it preempted there.
    options = {"num_gpu_blocks_override": 36, "max_model_len": 1024, "enable_prefix_caching": False}
    engine = Engine(reference.directory, store, **options)
    prompts = [tokens_of(seed, 200) for seed in range(30, 34)]
    wants = [reference.generate(prompt, 200) for prompt in prompts]
    outs, _ = engine.generate(prompts, 200)
    errors = [worst_error(store, engine.model_id, reference, [*p, *w])[0] for p, w in zip(prompts, wants, strict=True)]
    return {
        "equal": [outs == wants],
        "preemptions": engine.metric("vllm:num_preemptions"),
        "loads": engine.connector._scheduler.figures.counts.get("loads", 0),
        "error": max(errors),
        "held": engine.close(),
        "check": store.check(),
    }


def faults(workdir: Path, sync_load_ms: float = 20.0) -> Facts:
    """A store that ends loads early, breaks, lies, answers late or never: the same tokens, within the deadline."""
    reference = Reference(workdir)
    store = FaultyStore()
    extra = {"sync_load_ms": sync_load_ms, "load_deadline_ms": 2000, "match_deadline_ms": 100}
    engine = Engine(reference.directory, store, extra=extra)
    engine.connector._scheduler.fail_open.backoff_s = 0.0
    want: dict[int, list[int]] = {}
    facts: Facts = {"equal": {}, "seconds": {}, "failed": {}}

    def run(name: str, seed: int = 1) -> None:
        prompt = tokens_of(seed)
        want.setdefault(seed, reference.generate(prompt, NEW))
        engine.forget()
        failed = engine.connector._scheduler.figures.counts.get("failed_loads", 0)
        began_s = time.monotonic()
        outs, _ = engine.generate([prompt])
        facts["seconds"][name] = time.monotonic() - began_s
        facts["equal"][name] = outs[0] == want[seed]
        facts["failed"][name] = engine.connector._scheduler.figures.counts.get("failed_loads", 0) - failed

    run("cold")
    run("sound")
    for ends_at in (0, 4, 8):
        store.ends_at = ends_at
        run(f"ends at {ends_at}")
    store.ends_at = None
    store.breaks = True
    run("breaks")
    store.breaks, store.lies = False, True
    run("lies")
    store.lies, store.unsettled = False, 3
    matches = store.num_matches
    run("answers late")
    facts["asked"] = store.num_matches - matches
    store.unsettled = 1 << 30
    run("never answers")
    store.unsettled = 0
    store.slow_s = 0.5
    run("slow")
    store.slow_s = 0.0
    prompt = [*tokens_of(1), *want[1], *tokens_of(2, 50)]
    error, count = worst_error(store, engine.model_id, reference, prompt)
    facts |= {"error": error, "num_blocks": count, "held": engine.close(), "check": store.check()}
    return facts


def aborts(workdir: Path) -> Facts:
    """Requests that go away in the middle of their prompt, their load and their answer."""
    from vllm import SamplingParams

    reference = Reference(workdir)
    store = FaultyStore()
    engine = Engine(
        reference.directory, store, extra={"sync_load_ms": 0}, max_num_batched_tokens=64, max_model_len=1024
    )
    prompt = tokens_of(1)
    want = reference.generate(prompt, NEW)
    core, scheduler = engine.llm.llm_engine, engine.llm.llm_engine.engine_core.engine_core.scheduler
    params = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True, detokenize=False)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    seen: dict[str, Any] = {}

    def run(name: str, steps: int, until: str = "") -> None:
        core.add_request(name, {"prompt_token_ids": prompt}, params)
        for _ in range(steps):
            core.step()
            if until and any(r.status.name == until for r in scheduler.requests.values()):
                break
        seen[name] = [r.status.name for r in scheduler.requests.values()]
        core.abort_request([name])
        for _ in range(2000):
            idle = not core.has_unfinished_requests() and not scheduler.has_finished_requests()
            if idle and scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free:
                break
            engine.llm.llm_engine.engine_core.engine_core.step_fn()
            time.sleep(0.002)

    run("in its prompt", 3)
    early = store.stats()["host.blocks"]
    run("in its answer", 20)
    engine.forget()
    store.slow_s = 0.02
    run("in its load", 200, "WAITING_FOR_REMOTE_KVS")
    store.slow_s = 0.0
    back = scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    engine.forget()
    outs, hits = engine.generate([prompt])
    return {
        "equal": [outs[0] == want],
        "hits": hits,
        "seen": seen,
        "blocks_before_the_first_token": early,
        "pages_back": back,
        "error": worst_error(store, engine.model_id, reference, [*prompt, *want])[0],
        "held": engine.close(),
        "check": store.check(),
    }


def tenants(workdir: Path) -> Facts:
    """One prompt under two salts and none."""
    reference = Reference(workdir)
    store = FaultyStore()
    engine = Engine(reference.directory, store)
    prompt = tokens_of(1)
    want = reference.generate(prompt, NEW)
    facts: Facts = {"equal": [], "hits": []}
    for salt in ("a", "b", "", "a", "b", ""):
        engine.forget()
        outs, hits = engine.generate([prompt], **({"cache_salt": salt} if salt else {}))
        facts["equal"].append(outs[0] == want)
        facts["hits"].append(hits[0])
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    facts["blocks_after_reset"] = store.stats()["host.blocks"]
    return {**facts, "held": engine.close(), "check": store.check()}


def adapters(workdir: Path) -> Facts:
    """Two LoRA adapters, one of them under two names, and a third whose files change under its name."""
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    reference = Reference(workdir)
    store = FaultyStore()

    def write(name: str, seed: int) -> Path:
        directory = workdir / name
        directory.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for layer in range(3):
            for kind, size in (("q_proj", 128), ("v_proj", 64)):
                at = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
                weights[f"{at}.lora_A.weight"] = torch.randn(8, 128, generator=generator) * 0.2
                weights[f"{at}.lora_B.weight"] = torch.randn(size, 8, generator=generator) * 0.2
        save_file(weights, directory / "adapter_model.safetensors")
        settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"}
        settings |= {"task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": "x"}
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        return directory

    one, two = write("lora-one", 1), write("lora-two", 2)
    engine = Engine(reference.directory, store, enable_lora=True, max_lora_rank=8, max_loras=2, max_cpu_loras=4)
    prompt = tokens_of(1)
    facts: Facts = {"hits": [], "same": []}
    firsts: dict[str, list[int]] = {}
    asked = [("", 0), ("one", 1), ("two", 2), ("one", 1), ("two", 2), ("alias of one", 3), ("", 0)]
    paths = {"one": one, "two": two, "alias of one": one}
    for name, number in asked:
        engine.forget()
        lora = LoRARequest(name, number, str(paths[name])) if name else None
        if lora is not None:  # known before it is asked for: until then it would be a miss
            engine.connector._scheduler._adapters.of(lora).result()
        outs, hits = engine.generate([prompt], lora_request=lora)
        first = firsts.setdefault(str(paths.get(name, "")), outs[0])
        facts["same"].append(outs[0] == first)
        facts["hits"].append(hits[0])
    facts["num_answers"] = len({tuple(first) for first in firsts.values()})
    return {**facts, "held": engine.close(), "check": store.check()}


def fp8(workdir: Path) -> Facts:
    """Pages of fp8: the same answers from what was stored, byte for byte what the engine computes again."""
    reference = Reference(workdir)
    store = FaultyStore()
    try:
        engine = Engine(reference.directory, store, kv_cache_dtype="fp8")
    except NotImplementedError as error:
        return {"not_run": str(error)}
    prompt = tokens_of(1)
    cold, _ = engine.generate([prompt])
    model = engine.model_id
    first = {index: [bytes(view) for view in block.views] for index, block in stored(store, model, prompt)}
    engine.forget()
    warm, hits = engine.generate([prompt])
    store.clear()
    engine.forget()
    engine.generate([prompt])
    again = {index: [bytes(view) for view in block.views] for index, block in stored(store, model, prompt)}
    layout = store.open(model)
    for _, block in stored(store, model, prompt):
        for slot, part in zip(block.slots, layout.parts, strict=True):
            view = store.arena.view(slot, part.num_bytes)
            view[:] = bytes(byte & 0x3F for byte in bytes(view)[::-1])
    engine.forget()
    control, _ = engine.generate([prompt])
    return {
        "equal": [warm == cold],
        "hits": hits,
        "same_bytes": first == again and len(first) > 0,
        "kv_dtype": model.kv_dtype,
        "control_differs": control != cold,
        "held": engine.close(),
        "check": store.check(),
    }


def both_engines(workdir: Path) -> Facts:
    """What vLLM saved, transformers loads, and the reverse; once with the bytes spoiled."""
    from connectors.base import LoadRule
    from connectors.transformers import TransformersConnector

    reference = Reference(workdir)
    store = FaultyStore()
    engine = Engine(reference.directory, store, extra={"revision": "r1"})
    other = TransformersConnector(reference.model, store, revision="r1", block_tokens=BLOCK, load_rule=LoadRule.ALWAYS)
    facts: Facts = {"same_id": engine.model_id == other.model_id}
    if not facts["same_id"]:
        return {**facts, "ids": [str(engine.model_id), str(other.model_id)]}
    one, two = tokens_of(1), tokens_of(40)
    want = [reference.generate(prompt, NEW) for prompt in (one, two)]
    engine.generate([one])
    done = other.generate(torch.tensor([one]), max_new_tokens=NEW)
    facts["transformers_hits"] = sum(done.hit_tokens.values())
    facts["equal"] = [done.sequences[0, PROMPT:].tolist() == want[0]]
    other.generate(torch.tensor([two]), max_new_tokens=NEW)
    outs, facts["vllm_hits"] = engine.generate([two])
    facts["equal"].append(outs[0] == want[1])
    spoil(store, engine.model_id, two)
    engine.forget()
    facts["control_differs"] = engine.generate([two])[0] != outs
    return {**facts, "held": engine.close(), "check": store.check()}


def interface(workdir: Path) -> Facts:
    """The start-up check, against vLLM's interface and against one that has changed."""

    class Renamed(connector_module.KVConnectorBase_V1):  # type: ignore[misc]
        def get_num_new_matched_tokens(self, req: Any, num_computed_tokens: int) -> Any: ...

    connector_module.check_interface()
    try:
        connector_module.check_interface(Renamed)
    except ConfigError as error:
        return {"refused": str(error)}
    return {"refused": ""}


# -- through a sidecar -----------------------------------------------------------------------------------------


class Sidecar:
    """`kvstore serve` in a process of its own."""

    def __init__(self, workdir: Path, **settings: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="kv", dir="/tmp")) / "s"
        self.address = f"unix:{self.path}"
        self.log = (workdir / "sidecar.log").open("ab")
        self._settings = {"host.capacity_bytes": "128MiB", **settings}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "kvstore.service.cli", "serve", "--listen", self.address]
        for key, value in self._settings.items():
            command += ["--set", f"{key}={value}"]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.client = kvstore.connect(self.address, mapped=True, wait_s=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(20)
        self.log.close()
        shutil.rmtree(self.path.parent, ignore_errors=True)


def through_sidecar(workdir: Path) -> Facts:
    """The sidecar killed while an engine runs, and while a load is under way; and back again."""
    reference = Reference(workdir)
    sidecar = Sidecar(workdir)
    engine = Engine(reference.directory, None, extra={"address": sidecar.address})
    prompt = tokens_of(1)
    want = reference.generate(prompt, NEW)
    facts: Facts = {"equal": [], "hits": [], "seconds": []}

    def run() -> None:
        engine.forget()
        began_s = time.monotonic()
        outs, hits = engine.generate([prompt])
        facts["seconds"].append(time.monotonic() - began_s)
        facts["equal"].append(outs[0] == want)
        facts["hits"].append(hits[0])

    run()
    run()
    error, count = worst_error(sidecar.client, engine.model_id, reference, [*prompt, *want])
    sidecar.client.close()
    sidecar.kill()
    run()
    sidecar.start()
    for _ in range(40):
        run()
        if facts["hits"][-1]:
            break
        time.sleep(0.25)
    held = engine.close()
    sidecar.close()
    return {**facts, "error": error, "num_blocks": count, "held": held}


def child(workdir: Path, options: Mapping[str, Any]) -> Facts:
    """One engine of a fleet: its answers to some prompts, what it found, and what is stored then."""
    reference = Reference(workdir)
    extra = {"address": options["address"], "part_layers": 1, "part_heads": 1, **options.get("extra", {})}
    engine = Engine(reference.directory, None, extra=extra, **options.get("engine", {}))
    prompts = [tokens_of(seed) for seed in options["seeds"]]
    wants = [reference.generate(prompt, NEW) for prompt in prompts]
    facts: Facts = {"equal": [], "hits": []}
    for prompt, want in zip(prompts, wants, strict=True):
        outs, hits = engine.generate([prompt])
        facts["equal"].append(outs[0] == want)
        facts["hits"].append(hits[0])
    client = kvstore.connect(options["address"], mapped=True)
    errors = [worst_error(client, engine.model_id, reference, [*p, *w]) for p, w in zip(prompts, wants, strict=True)]
    facts |= {"error": max(error for error, _ in errors), "num_blocks": [count for _, count in errors]}
    client.close()
    return {**facts, "held": engine.close()}


def fleet(workdir: Path, *, parallel: Mapping[str, Any], environ: Mapping[str, str]) -> Facts:
    """A prompt saved by a parallel engine and loaded by a single one, and the reverse."""
    Reference(workdir)
    sidecar = Sidecar(workdir)

    def run(seeds: Sequence[int], *, many: bool) -> Facts:
        options = {"address": sidecar.address, "seeds": list(seeds), "engine": dict(parallel) if many else {}}
        done = subprocess.run(
            [sys.executable, "-m", "tests.engines.vllm_runs", "child", str(workdir), json.dumps(options)],
            env={**os.environ, **(environ if many else {})},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith("FACTS "))
        return dict(json.loads(line.removeprefix("FACTS ")))

    try:
        return {
            "many saves": run([1], many=True),
            "one loads": run([1, 2], many=False),
            "many loads": run([2, 1], many=True),
        }
    finally:
        sidecar.close()


TP2 = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}

SCENARIOS: dict[str, Callable[[Path], Facts]] = {
    "base": turns,
    "chunks_64": lambda workdir: turns(workdir, max_num_batched_tokens=64),
    "chunks_256": lambda workdir: turns(workdir, max_num_batched_tokens=256),
    "beside_the_step": lambda workdir: turns(workdir, extra={"sync_load_ms": 0}),
    "without_prefix_cache": lambda workdir: turns(workdir, enable_prefix_caching=False),
    "pages_of_128": lambda workdir: turns(workdir, block_size=128),
    "blocks_of_64": lambda workdir: turns(workdir, extra={"block_tokens": 64}),
    "fine_grid": lambda workdir: turns(workdir, extra={"part_layers": 1, "part_heads": 1}),
    "ngram": speculation,
    "ngram_without_clamp": lambda workdir: speculation(workdir, clamp=False),
    "preemption": preemption,
    "faults": faults,
    "faults_beside_the_step": lambda workdir: faults(workdir, 0.0),
    "aborts": aborts,
    "tenants": tenants,
    "adapters": adapters,
    "fp8": fp8,
    "both_engines": both_engines,
    "interface": interface,
    "through_sidecar": through_sidecar,
    "tp2": lambda workdir: fleet(workdir, parallel={"tensor_parallel_size": 2}, environ=TP2),
    "pp2": lambda workdir: fleet(
        workdir,
        parallel={
            "pipeline_parallel_size": 2,
            "enforce_eager": False,
            "compilation_config": {"mode": 3, "backend": "eager"},
        },
        environ=TP2,
    ),
}


def main() -> None:
    name, workdir = sys.argv[1], Path(sys.argv[2])
    torch.set_grad_enabled(False)
    facts = child(workdir, json.loads(sys.argv[3])) if name == "child" else SCENARIOS[name](workdir)
    print("FACTS " + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
