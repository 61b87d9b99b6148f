# SPDX-License-Identifier: Apache-2.0
"""Scenarios of `vllm_runs` for LoRA adapters, which are known by content: also when it changes under a request."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.engines.vllm_support import (
    NEW,
    Engine,
    Facts,
    FaultyStore,
    Reference,
    bytes_of,
    in_fork,
    poison,
    tokens_of,
)


def write(directory: Path, seed: int) -> Path:
    """A small random adapter, in place of the one that is there."""
    from safetensors.torch import save_file

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


class Adapted:
    """An engine with adapters over a store."""

    def __init__(self, workdir: Path, **extra: object) -> None:
        self.store = FaultyStore()
        settings = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 4}
        self.engine = Engine(Reference(workdir).directory, self.store, extra=extra or None, **settings)
        self._next = 0

    def lora(self, directory: Path, name: str = "", number: int = 0, *, load_inplace: bool = False) -> Any:
        """An adapter under a name and number of its own, unless they are given."""
        from vllm.lora.request import LoRARequest

        self._next += 1
        number = number or 100 + self._next
        return LoRARequest(name or f"a{number}", number, str(directory), load_inplace=load_inplace)

    def digest(self, lora: Any) -> bytes:
        return bytes(self.engine.connector._scheduler._adapters.of(lora).result().digest)

    def ask(self, lora: Any, *, before: Callable[[], object] = lambda: None) -> tuple[list[int], int]:
        """(answer, cached tokens) of the prompt; `before` is done when the request has come and not begun."""
        from vllm import SamplingParams

        core = self.engine.llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        core.add_request(f"r{self._next}", {"prompt_token_ids": tokens_of(1)}, params, lora_request=lora)
        (tracked,) = self.engine.connector._scheduler._tracked.values()
        tracked.adapter.result()  # until it is known there is no reuse
        before()
        self._next += 1
        answer: tuple[list[int], int] = ([], 0)
        while core.has_unfinished_requests():
            for out in core.step():
                answer = list(out.outputs[0].token_ids), int(out.num_cached_tokens or 0)
        self.engine.settle()
        return answer


def adapters(workdir: Path) -> Facts:
    """Two LoRA adapters, one of them under two names."""
    adapted = Adapted(workdir)
    engine, store = adapted.engine, adapted.store
    one, two = write(workdir / "lora-one", 1), write(workdir / "lora-two", 2)
    prompt = tokens_of(1)
    facts: Facts = {"hits": [], "same": []}
    firsts: dict[str, list[int]] = {}
    asked = [("", 0), ("one", 1), ("two", 2), ("one", 1), ("two", 2), ("alias of one", 3), ("", 0)]
    paths = {"one": one, "two": two, "alias of one": one}
    for name, number in asked:
        engine.forget()
        lora = adapted.lora(paths[name], name, number) if name else None
        if lora is not None:  # known before it is asked for: until then it would be a miss
            adapted.digest(lora)
        outs, hits = engine.generate([prompt], lora_request=lora)
        first = firsts.setdefault(str(paths.get(name, "")), outs[0])
        facts["same"].append(outs[0] == first)
        facts["hits"].append(hits[0])
    facts["num_answers"] = len({tuple(first) for first in firsts.values()})
    digest = adapted.digest(adapted.lora(one, "one", 1))
    first_bytes = bytes_of(store, engine.model_id, prompt, adapter=digest)
    store.clear()
    engine.forget()
    engine.generate([prompt], lora_request=adapted.lora(one, "one", 1))
    again = bytes_of(store, engine.model_id, prompt, adapter=digest)
    facts["same_bytes"] = first_bytes == again and len(again) == 9
    engine.forget()
    engine.generate([prompt])
    facts["control_differs"] = _control(adapted, digest, adapted.lora(one, "one", 1), firsts[str(one)])
    engine.forget()
    poison(store, engine.model_id, prompt)
    engine.forget()
    facts["control_differs"] = facts["control_differs"] and engine.generate([prompt])[0][0] != firsts[""]
    return {**facts, "held": engine.close(), "check": store.check()}


def _control(adapted: Adapted, digest: bytes, lora: Any, want: Sequence[int]) -> bool:
    """Whether wrong bytes under an adapter give another answer."""
    poison(adapted.store, adapted.engine.model_id, tokens_of(1), adapter=digest)
    adapted.engine.forget()
    return adapted.ask(lora)[0] != list(want)


def rewritten(workdir: Path) -> Facts:
    """Adapters whose files change between a request's arrival and its first step, in which vLLM reads them."""
    return {
        how: in_fork(lambda ms=ms: _rewritten(workdir / f"rewritten-{ms:g}", workdir, ms))  # type: ignore[misc]
        for how, ms in (("in_step", 20.0), ("beside", 0.0))
    }


def _rewritten(directory: Path, workdir: Path, sync_load_ms: float) -> Facts:
    directory.mkdir(exist_ok=True)
    adapted = Adapted(workdir, sync_load_ms=sync_load_ms)
    engine, store, model = adapted.engine, adapted.store, adapted.engine.model_id
    old, new = write(directory / "old", 1), write(directory / "new", 2)
    wants = [adapted.ask(adapted.lora(each))[0] for each in (old, new)]
    digests = [adapted.digest(adapted.lora(each)) for each in (old, new)]

    def stored(which: int) -> int:
        return len(bytes_of(store, model, tokens_of(1), adapter=digests[which]))

    # Nothing is loaded: what is computed with the new one must not lie under the old one's name.
    store.clear()
    engine.forget()
    path = write(directory / "saved", 1)
    saved, _ = adapted.ask(adapted.lora(path), before=lambda: write(path, 2))
    facts: Facts = {"stored": [stored(0), stored(1)], "hits": [], "equal": [saved == wants[1]]}
    # Under another path vLLM's own cache does not know it: what it finds is the store's.
    for each, want in ((old, wants[0]), (new, wants[1]), (old, wants[0])):
        answer, hits = adapted.ask(adapted.lora(each))
        facts["equal"].append(answer == want)
        facts["hits"].append(hits)
        engine.forget()
    # The old one's KV is there, and is loaded before vLLM reads the new one.
    path = write(directory / "loaded", 1)
    loaded, facts["hits_before"] = adapted.ask(adapted.lora(path), before=lambda: write(path, 2))
    facts["equal"].append(loaded == wants[1])
    # What vLLM's own cache has of an adapter by name and path is served by vLLM, and no longer stored.
    store.clear()
    engine.forget()
    path = write(directory / "kept", 1)
    lora = adapted.lora(path, "kept", 7)
    adapted.ask(lora)
    store.clear()
    write(path, 2)
    _, facts["hits_kept"] = adapted.ask(adapted.lora(path, "kept", 7, load_inplace=True))
    facts["stored_kept"] = [stored(0), stored(1)]
    facts["control_differs"] = _control(adapted, digests[0], adapted.lora(old), wants[0])
    return {**facts, "num_answers": len({*map(tuple, wants)}), "held": engine.close(), "check": store.check()}
