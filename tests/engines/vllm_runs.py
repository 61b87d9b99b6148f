# SPDX-License-Identifier: Apache-2.0
"""Runs of a real vLLM engine, one scenario a fork, so that vLLM is imported once.

    python -m tests.engines.vllm_runs WORKDIR

reads names of scenarios from its input, a line each, and answers each with `done NAME` when what was seen lies as
JSON in WORKDIR/NAME.json (or, where the run died, what it said in WORKDIR/NAME.log). Needs a Python with vLLM.
Every scenario compares greedy tokens and stored KV with transformers' and has a control whose stored bytes are
wrong and whose tokens must differ; `vllm_support` has what that takes, `vllm_shared` what runs through a sidecar.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from connectors import vllm as connector_module
from connectors import vllm_link, vllm_scheduler
from kvstore.errors import ConfigError
from tests.engines import (
    vllm_adapters,
    vllm_early,
    vllm_hints,
    vllm_images,
    vllm_inputs,
    vllm_killed,
    vllm_resets,
    vllm_scrambled,
    vllm_shared,
    vllm_tiering_runs,
    vllm_windows,
)
from tests.engines.vllm_support import (
    BLOCK,
    NEW,
    PROMPT,
    Engine,
    Facts,
    FaultyStore,
    Reference,
    bytes_of,
    in_fork,
    poison,
    stored,
    tokens_of,
    worst_error,
)

# -- scenarios -------------------------------------------------------------------------------------------------


def turns(
    workdir: Path,
    *,
    reference: Reference | None = None,
    prompt_tokens: int = PROMPT,
    own_store: bool = False,
    **options: Any,
) -> Facts:
    """Cold, again, a second turn with the answer in it, and the control.

    `own_store`: the engine makes its store from `extra`, as from the flag.
    """
    reference = reference or Reference(workdir)
    given = None if own_store else FaultyStore()
    extra = options.pop("extra", None)
    engine = Engine(reference.directory, given, extra=extra, **options)
    store = given or engine.connector._link.store
    prompt = tokens_of(1, prompt_tokens)
    want = reference.generate(prompt, NEW)
    cold, cold_hits = engine.generate([prompt])
    error, num_blocks = worst_error(store, engine.model_id, reference, [*prompt, *want])
    engine.forget()
    engine.spoil_pages()
    warm, warm_hits = engine.generate([prompt])
    longer = [*prompt, *want, *tokens_of(2, 50)]
    engine.forget()
    engine.spoil_pages()
    second, second_hits = engine.generate([longer])
    error = max(error, worst_error(store, engine.model_id, reference, longer)[0])
    poison(store, engine.model_id, longer)
    engine.forget()
    engine.spoil_pages()
    control, _ = engine.generate([longer])
    fits = store.check()
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
        "keeps": engine.connector._groups.keeps,
        "is_real": type(store).__name__ == "KVStore",
        "held": engine.close(),
        "check": fits,
        "left_open": len(vllm_link.EMBEDDED._stores),
    }


def partial_blocks(workdir: Path) -> Facts:
    """Prompts that part from another within a block, in its middle, by a token, and in the very first one."""
    reference = Reference(workdir)
    store = FaultyStore()
    engine = Engine(reference.directory, store)
    first = tokens_of(1)
    prompts = [first, *([*first[:shared], *tokens_of(20 + shared, 90)] for shared in (210, 33, 20))]
    equal, hits, error = [], [], 0.0
    for prompt in prompts:
        engine.forget()
        answers, found = engine.generate([prompt])
        want = reference.generate(prompt, NEW)
        equal.append(answers[0] == want)
        hits.append(found[0])
        error = max(error, worst_error(store, engine.model_id, reference, [*prompt, *want])[0])
    engine.forget()
    poison(store, engine.model_id, first)
    last = [*first[:20], *tokens_of(5, 90)]
    control, _ = engine.generate([last])
    return {
        "equal": equal,
        "hits": hits,
        "error": error,
        "control_differs": control[0] != reference.generate(last, NEW),
        "held": engine.close(),
        "check": store.check(),
    }


NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def draft_model(workdir: Path) -> dict[str, Any]:
    """A draft model that is often right: the model itself, with noise on its weights."""
    directory = workdir / "draft"
    model = Reference(workdir).model
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        weight += torch.randn(weight.shape, generator=generator) * weight.std() * 0.05
    model.save_pretrained(directory)
    return {"method": "draft_model", "model": str(directory), "num_speculative_tokens": 3}


def medusa(workdir: Path) -> dict[str, Any]:
    """Heads that propose what the model itself would say next: sometimes right where an answer repeats itself."""
    from safetensors.torch import save_file

    directory = workdir / "medusa"
    directory.mkdir(exist_ok=True)
    model = Reference(workdir).model
    vocabulary, hidden = model.lm_head.weight.shape
    weights = {}
    for head in range(2):
        weights[f"blocks.{head}.layers.0.weight"] = torch.zeros(hidden, hidden)
        weights[f"lm_heads.{head}.weight"] = model.lm_head.weight.detach().clone()
    save_file(weights, directory / "model.safetensors")
    settings = {"architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": hidden, "num_heads": 2}
    settings |= {"num_hidden_layers": 1, "vocab_size": vocabulary, "torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(settings))
    return {"method": "medusa", "model": str(directory), "num_speculative_tokens": 2}


def eagle(workdir: Path) -> dict[str, Any]:
    """A layer that proposes what the model itself would say next, as `medusa`'s heads do. It has KV of its own."""
    from safetensors.torch import save_file

    directory = workdir / "eagle"
    directory.mkdir(exist_ok=True)
    model = Reference(workdir).model
    hidden = model.config.hidden_size
    weights = {
        f"layers.0.{name}": torch.zeros_like(weight) if "o_proj" in name or "down_proj" in name else weight.clone()
        for name, weight in model.model.layers[0].state_dict().items()
        if "input_layernorm" not in name
    }
    weights["fc.weight"] = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1)
    weights["embed_tokens.weight"] = model.model.embed_tokens.weight.detach().clone()
    save_file(weights, directory / "model.safetensors")
    settings = {**json.loads((workdir / "llama-2" / "config.json").read_text()), "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(settings))
    return {"method": "eagle", "model": str(directory), "num_speculative_tokens": 3}


def speculation(
    workdir: Path, drafts: dict[str, Any], *, clamp: bool = True, reference: Reference | None = None
) -> Facts:
    """Drafts, many of them wrong, in answers that end on a block boundary.

    Without `clamp` the connector stores every block whose tokens are known, as it would without the save boundary.
    """
    reference = reference or Reference(workdir)
    store = FaultyStore()
    if not clamp:
        vllm_scheduler.storable_finished = lambda computed, prompt, tokens, block: tokens // block
    engine = Engine(reference.directory, store, extra={"load_with_drafts": True}, speculative_config=drafts)
    prompts = [tokens_of(seed) for seed in range(10, 18)]
    wants = [reference.generate(prompt, NEW) for prompt in prompts]
    outs, _ = engine.generate(prompts)
    errors = [
        worst_error(store, engine.model_id, reference, [*prompt, *want])
        for prompt, want in zip(prompts, wants, strict=True)
    ]
    facts = {
        "error": max(error for error, _ in errors),
        "num_blocks": sorted({count for _, count in errors}),
        "drafted": engine.metric("vllm:spec_decode_num_draft_tokens"),
        "accepted": engine.metric("vllm:spec_decode_num_accepted_tokens"),
    }
    if not clamp:
        return {**facts, "equal": [outs == wants], "held": engine.close()}
    engine.forget()
    again, hits = engine.generate(prompts)
    # What the engine's own cache still has goes before what the store has: all of it, or with EAGLE all but a block.
    kept, kept_hits = engine.generate(prompts)
    facts |= {"equal": [outs == wants, again == wants, kept == wants], "hits": hits, "kept_hits": kept_hits}
    longer = [*prompts[0], *wants[0], *tokens_of(2, 50)]
    engine.forget()
    before, _ = engine.generate([longer])
    facts["control_differs"] = control(engine, store, longer, before[0])
    return {**facts, "held": engine.close(), "check": store.check()}


def drafter_alone(workdir: Path) -> Facts:
    """A draft model as shipped: what it computes is stored, and nothing is loaded for it."""
    reference = Reference(workdir)
    store = FaultyStore()
    engine = Engine(reference.directory, store, speculative_config=draft_model(workdir))
    prompts = [tokens_of(seed) for seed in range(10, 14)]
    engine.generate(prompts)
    accepted = engine.metric("vllm:spec_decode_num_accepted_tokens")
    engine.forget()
    outs, hits = engine.generate(prompts)
    return {
        "equal": [outs == [reference.generate(prompt, NEW) for prompt in prompts]],
        "hits": hits,
        "num_blocks": worst_error(store, engine.model_id, reference, prompts[0])[1],
        "accepted": [accepted, engine.metric("vllm:spec_decode_num_accepted_tokens") - accepted],
        "held": engine.close(),
        "check": store.check(),
    }


def control(engine: Engine, store: FaultyStore, prompt: Sequence[int], want: Sequence[int]) -> bool:
    """Whether an answer on wrong bytes is another one, as it must be: else equal answers would prove nothing."""
    poison(store, engine.model_id, prompt)
    engine.forget()
    outs, _ = engine.generate([prompt], len(want))
    return outs[0] != list(want)


def preemption(workdir: Path, *, reference: Reference | None = None, num_pages: int = 36, **options: Any) -> Facts:
    """Four requests that grow beyond the engine's pages."""
    reference = reference or Reference(workdir)
    store = FaultyStore()
    # Without its own prefix cache, or the engine would find what it preempted there.
    options |= {"num_gpu_blocks_override": num_pages, "max_model_len": 1024, "enable_prefix_caching": False}
    engine = Engine(reference.directory, store, **options)
    prompts = [tokens_of(seed, 200) for seed in range(30, 34)]
    wants = [reference.generate(prompt, 200) for prompt in prompts]
    side, lost = engine.connector._side(), []
    orders = side.orders
    side.orders = lambda step: lost.extend(step.preempted) or orders(step)
    outs, _ = engine.generate(prompts, 200)
    errors = [worst_error(store, engine.model_id, reference, [*p, *w])[0] for p, w in zip(prompts, wants, strict=True)]
    return {
        "equal": [outs == wants],
        "preemptions": engine.metric("vllm:num_preemptions"),
        "lost": len(lost),
        "loads": engine.connector._scheduler.figures.counts.get("loads", 0),
        "error": max(errors),
        "control_differs": control(engine, store, prompts[0], wants[0]),
        "held": engine.close(),
        "check": store.check(),
    }


def faults(workdir: Path, sync_load_ms: float = 20.0, *, reference: Reference | None = None) -> Facts:
    """A store that ends loads early, breaks, lies, answers late or never: the same tokens, within the deadline."""
    reference = reference or Reference(workdir)
    store = FaultyStore()
    extra = {"sync_load_ms": sync_load_ms, "load_deadline_ms": 1000, "match_deadline_ms": 1000}
    engine = Engine(reference.directory, store, extra=extra)
    engine.connector._scheduler.fail_open.backoff_s = 0.0
    want: dict[int, list[int]] = {}
    facts: Facts = {"equal": {}, "ttft_s": {}, "failed": {}}

    def run(name: str, seed: int = 1) -> None:
        prompt = tokens_of(seed)
        want.setdefault(seed, reference.generate(prompt, NEW))
        engine.forget()
        failed = engine.connector._scheduler.figures.counts.get("failed_loads", 0)
        outs, _ = engine.generate([prompt])
        facts["ttft_s"][name] = engine.ttft_s
        facts["equal"][name] = outs[0] == want[seed]
        facts["failed"][name] = engine.connector._scheduler.figures.counts.get("failed_loads", 0) - failed

    run("warm-up", 9)
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
    # In the step, lateness is seen between blocks. The load has nine tenths of the deadline, and so many are too many:
    # what one block takes beyond that is this store's, whose blocks are all there and come slowly all the same.
    store.slow_s = 0.1
    run("slow")
    store.slow_s = 0.0
    facts["computed_s"] = vllm_shared.recomputed_s(engine, tokens_of(1))
    slowest_s = max(seconds for name, seconds in facts["ttft_s"].items() if name != "warm-up")
    facts |= {"added_s": slowest_s - facts["computed_s"], "deadline_s": 1.0}
    prompt = [*tokens_of(1), *want[1], *tokens_of(2, 50)]
    error, count = worst_error(store, engine.model_id, reference, prompt)
    facts |= {"error": error, "num_blocks": count, "control_differs": control(engine, store, tokens_of(1), want[1])}
    return {**facts, "held": engine.close(), "check": store.check()}


def aborts(workdir: Path, *, reference: Reference | None = None) -> Facts:
    """Requests that go away in the middle of their prompt, their load and their answer."""
    from vllm import SamplingParams

    reference = reference or Reference(workdir)
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
        "control_differs": control(engine, store, prompt, want),
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
    errors = [worst_error(store, engine.model_id, reference, [*prompt, *want], salt=salt) for salt in (b"a", b"b", b"")]
    facts |= {"error": max(error for error, _ in errors), "num_blocks": [count for _, count in errors]}
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    facts["blocks_after_reset"] = store.stats()["host.blocks"]
    poison(store, engine.model_id, prompt, salt=b"a")
    engine.forget()
    salted, _ = engine.generate([prompt], cache_salt="a")
    facts["control_differs"] = control(engine, store, prompt, want) and salted[0] != want
    return {**facts, "held": engine.close(), "check": store.check()}


def fp8(workdir: Path, kv_cache_dtype: str = "fp8") -> Facts:
    """Pages of fp8: the same answers from what was stored, byte for byte what the engine computes again."""
    reference = Reference(workdir)
    store = FaultyStore()
    try:
        engine = Engine(reference.directory, store, kv_cache_dtype=kv_cache_dtype)
    except NotImplementedError as error:
        return {"not_run": str(error)}
    prompt = tokens_of(1)
    cold, _ = engine.generate([prompt])
    model = engine.model_id
    first = bytes_of(store, model, prompt)
    engine.forget()
    warm, hits = engine.generate([prompt])
    store.clear()
    engine.forget()
    engine.generate([prompt])
    again = bytes_of(store, model, prompt)
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


def both_engines(
    workdir: Path, directory: Path | None = None, prompts: tuple[list[int], list[int]] | None = None, new: int = NEW
) -> Facts:
    """What vLLM saved, transformers loads, and the reverse; once with wrong bytes."""
    from connectors.base import LoadRule
    from connectors.transformers import TransformersConnector

    reference = Reference(workdir, directory)
    store = FaultyStore()
    engine = Engine(reference.directory, store, extra={"revision": "r1"}, max_model_len=512)
    other = TransformersConnector(
        reference.model,
        store,
        revision="r1",
        block_tokens=BLOCK,
        resident_conversations=0,  # from the store, whatever it served before
        load_rule=LoadRule.ALWAYS,
    )
    facts: Facts = {"same_id": engine.model_id == other.model_id}
    if not facts["same_id"]:
        return {**facts, "ids": [str(engine.model_id), str(other.model_id)]}
    one, two = prompts or (tokens_of(1), tokens_of(40))
    want = [reference.generate(prompt, new) for prompt in (one, two)]
    engine.generate([one], new)
    facts["error"], facts["num_blocks"] = worst_error(store, engine.model_id, reference, [*one, *want[0]])
    done = other.generate(torch.tensor([one]), max_new_tokens=new)
    facts["transformers_hits"] = sum(done.hit_tokens.values())
    facts["equal"] = [done.sequences[0, len(one) :].tolist() == want[0]]
    other.generate(torch.tensor([two]), max_new_tokens=new)
    outs, facts["vllm_hits"] = engine.generate([two], new)
    facts["equal"].append(outs[0] == want[1])
    facts["num_distinct"] = len({*want[0], *want[1]})
    poison(store, engine.model_id, two)
    engine.forget()
    facts["control_differs"] = engine.generate([two], new)[0] != outs
    done = other.generate(torch.tensor([two]), max_new_tokens=new)
    facts["transformers_control_differs"] = done.sequences[0, len(two) :].tolist() != want[1]
    return {**facts, "held": engine.close(), "check": store.check()}


def smollm2(workdir: Path) -> Facts:
    """SmolLM2 and questions about two texts, saved by one engine and loaded by the other, both ways."""
    from transformers import PreTrainedTokenizerFast

    directory = workdir / "smollm2"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    notes = ["".join(f"Note {n}: box {n * k % 13} holds {n * k % 97} marbles.\n" for n in range(12)) for k in (7, 5)]
    asked = [[{"role": "user", "content": f"{note}Tell a long story about these boxes."}] for note in notes]
    one, two = (tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in asked)
    facts = both_engines(workdir, directory, (list(one), list(two)), new=24)
    return {**facts, "prompt_tokens": [len(one), len(two)]}


def refusals(workdir: Path) -> Facts:
    """Engines that must not start, each with one thing that the connector cannot serve; and that one without does."""
    reference = Reference(workdir)
    base = connector_module.KVConnectorBase_V1

    def renamed(self: Any, req: Any, num_computed_tokens: int) -> Any: ...

    def another_interface() -> Facts:
        base.get_num_new_matched_tokens = renamed
        return start()

    def start(directory: Path = reference.directory, **options: Any) -> Facts:
        try:
            engine = Engine(directory, FaultyStore(), **options)
        except ConfigError as error:
            return {"refused": str(error)}
        return {"refused": "", "held": engine.close()}

    ours = {"kv_connector": "KVStoreConnector", "kv_connector_module_path": "connectors.vllm", "kv_role": "kv_both"}
    extra = {"kv_connector_extra_config": {"block_tokens": BLOCK}}
    windows = vllm_windows.of_some_layers(workdir)
    tried: dict[str, Callable[[], Facts]] = {
        "nothing": start,
        "windows below a block": lambda: start(directory=windows.directory, extra={"block_tokens": 64}),
        "chunks below a block": lambda: start(
            directory=vllm_windows.of_chunks(workdir).directory, extra={"block_tokens": 128}
        ),
        "windows beside a drafter": lambda: start(
            directory=windows.directory,
            extra={"load_with_drafts": True},
            speculative_config=draft_model(workdir),
        ),
        "interface": another_interface,
        "policy": lambda: start(transfer={**ours, **extra}),
        "setting": lambda: start(extra={"adress": "unix:/tmp/s"}),
        "block": lambda: start(extra={"block_tokens": 64}, block_size=96),
        "ranks": lambda: start(extra={"embedded": ""}, distributed_executor_backend="mp"),
    }
    return {name: in_fork(one)["refused"] for name, one in tried.items()}


SCENARIOS: dict[str, Callable[[Path], Facts]] = {
    "partial": partial_blocks,
    "base": turns,
    "chunks_64": lambda workdir: turns(workdir, max_num_batched_tokens=64),
    "chunks_256": lambda workdir: turns(workdir, max_num_batched_tokens=256),
    "chunks_2048": lambda workdir: turns(workdir, prompt_tokens=2092, max_num_batched_tokens=2048, max_model_len=4096),
    "in_process": lambda workdir: turns(
        workdir, own_store=True, extra={"store": {"host": {"capacity_bytes": "64MiB", "prefault": False}}}
    ),
    "beside_the_step": lambda workdir: turns(workdir, extra={"sync_load_ms": 0}),
    "without_prefix_cache": lambda workdir: turns(workdir, enable_prefix_caching=False),
    "pages_of_128": lambda workdir: turns(workdir, block_size=128),
    "blocks_of_64": lambda workdir: turns(workdir, extra={"block_tokens": 64}),
    "fine_grid": lambda workdir: turns(workdir, extra={"part_layers": 1, "part_heads": 1}),
    "ngram": lambda workdir: speculation(workdir, NGRAM),
    "ngram_without_clamp": lambda workdir: speculation(workdir, NGRAM, clamp=False),
    "draft_model": lambda workdir: speculation(workdir, draft_model(workdir)),
    "medusa": lambda workdir: speculation(workdir, medusa(workdir)),
    "eagle": lambda workdir: speculation(workdir, eagle(workdir)),
    "drafter_alone": drafter_alone,
    "preemption": preemption,
    "windows": lambda workdir: turns(
        workdir, reference=vllm_windows.of_some_layers(workdir), max_num_batched_tokens=64
    ),
    "windows_in_one_step": lambda workdir: turns(
        workdir, reference=vllm_windows.of_some_layers(workdir), enable_prefix_caching=False
    ),
    "windows_in_pages_of_128": lambda workdir: turns(
        workdir, reference=vllm_windows.of_some_layers(workdir), block_size=128
    ),
    "windows_kept": lambda workdir: turns(
        workdir, reference=vllm_windows.of_some_layers(workdir), **vllm_windows.KEPT, max_num_batched_tokens=64
    ),
    "windows_and_shared_layers": lambda workdir: turns(
        workdir, reference=vllm_windows.of_shared_layers(workdir), max_num_batched_tokens=64
    ),
    "windows_and_shared_layers_kept": lambda workdir: turns(
        workdir, reference=vllm_windows.of_shared_layers(workdir), **vllm_windows.KEPT, max_num_batched_tokens=64
    ),
    "windows_and_sinks": lambda workdir: turns(
        workdir, reference=vllm_windows.with_sinks(workdir), max_num_batched_tokens=64
    ),
    "windows_alone": lambda workdir: turns(
        workdir, reference=vllm_windows.of_all_layers(workdir), max_num_batched_tokens=96
    ),
    "windows_through_preemption": lambda workdir: preemption(
        workdir, reference=vllm_windows.of_some_layers(workdir), num_pages=52, max_num_batched_tokens=128
    ),
    "windows_in_chats": lambda workdir: vllm_windows.chats(
        workdir, num_gpu_blocks_override=48, max_num_batched_tokens=128
    ),
    "windows_and_drafts": lambda workdir: speculation(workdir, NGRAM, reference=vllm_windows.of_some_layers(workdir)),
    "windows_and_faults": lambda workdir: faults(workdir, reference=vllm_windows.of_some_layers(workdir)),
    "windows_and_aborts": lambda workdir: aborts(workdir, reference=vllm_windows.of_some_layers(workdir)),
    "chunked_attention": lambda workdir: vllm_windows.chunks(workdir, max_num_batched_tokens=64),
    "chunked_attention_kept": lambda workdir: vllm_windows.chunks(workdir, **vllm_windows.KEPT),
    "faults": faults,
    "faults_beside_the_step": lambda workdir: faults(workdir, 0.0),
    "aborts": aborts,
    "tenants": tenants,
    "adapters": vllm_adapters.adapters,
    "adapters_rewritten": vllm_adapters.rewritten,
    "hints": vllm_hints.hints,
    "images": vllm_images.images,
    "fp8": fp8,
    "fp8_e5m2": lambda workdir: fp8(workdir, "fp8_e5m2"),
    "both_engines": both_engines,
    "smollm2": smollm2,
    "refusals": refusals,
    "burst": vllm_early.burst,
    "orphans": vllm_early.orphans,
    "embeddings": vllm_inputs.embeddings,
    "killed": vllm_killed.killed,
    "resets": vllm_resets.resets,
    **vllm_scrambled.SCENARIOS,
    **vllm_shared.SCENARIOS,
    **vllm_tiering_runs.SCENARIOS,
}


def _import_all() -> None:
    """Everything an engine needs, before the first fork."""
    import vllm.v1.worker.cpu_worker
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models import llama
    from vllm.v1.executor import multiproc_executor

    import connectors.transformers

    for module in (LLM, SamplingParams, llama, vllm.v1.worker.cpu_worker, connectors.transformers):
        assert module
    # On a CPU vLLM has workers of their own start anew, and each would import all of this again.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    # Out of the collector's sight: each fork would touch, and so copy, all there is of it, and that five times as an
    # engine starts (2 s of its 2.5 s of CPU) and twice as it ends.
    gc.collect()
    gc.freeze()


def main() -> None:
    workdir = Path(sys.argv[1])
    _import_all()
    for line in sys.stdin:
        name = line.strip()
        try:
            facts = in_fork(partial(SCENARIOS[name], workdir), workdir / f"{name}.log")
            (workdir / f"{name}.json").write_text(json.dumps(facts))
        except RuntimeError as error:
            with (workdir / f"{name}.log").open("a") as log:
                log.write(f"{error}\n")
        print(f"done {name}", flush=True)


if __name__ == "__main__":
    main()
