# SPDX-License-Identifier: Apache-2.0
"""A scenario of `vllm_runs`: caches are emptied under requests at every stage, because the weights have changed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from tests.engines.vllm_support import NEW, Engine, Facts, FaultyStore, Reference, poison, tokens_of, worst_error
from tests.waiting import eventually


def reweigh(model: torch.nn.Module, seed: int) -> None:
    """Other weights, the same in vLLM and in transformers: those of the norms, which have one name in both."""
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if "norm" in name:
                generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                weight.copy_(1 + torch.randn(weight.shape, generator=generator) / 2)


class Updated:
    """An engine whose weights change under its requests, and a reference that follows."""

    def __init__(self, workdir: Path) -> None:
        self.reference, self.store = Reference(workdir), FaultyStore()
        extra = {"sync_load_ms": 0}
        self.engine = Engine(self.reference.directory, self.store, extra=extra, max_num_batched_tokens=64)
        self.tokens: dict[str, list[int]] = {}

    def reweigh(self, seed: int) -> None:
        reweigh(self.reference.model, seed)
        self.engine.llm.apply_model(lambda model: reweigh(model, seed))

    def add(self, name: str, prompt: list[int]) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        self.engine.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        self.tokens[name] = []

    def step_until(self, there: Callable[[], bool]) -> None:
        core = self.engine.llm.llm_engine
        for _ in range(5000):
            if there():
                return
            for out in core.step():
                self.tokens[str(out.request_id).split("-")[0]] = list(out.outputs[0].token_ids)
        raise AssertionError(f"it did not come about: {self.states()}")

    def finish(self) -> None:
        self.step_until(lambda: not self.engine.llm.llm_engine.has_unfinished_requests())
        self.engine.settle()

    def states(self) -> dict[str, str]:
        return {name.split("-")[0]: r.status.name for name, r in self.engine.scheduler.requests.items()}

    def num_computed(self, name: str) -> int:
        found = [r.num_computed_tokens for key, r in self.engine.scheduler.requests.items() if key.startswith(name)]
        return int(found[0]) if found else 0

    def num_stored(self) -> int:
        return int(self.store.stats()["host.blocks"])

    def error(self, tokens: list[int]) -> tuple[float, int]:
        return worst_error(self.store, self.engine.model_id, self.reference, tokens)

    def ask(self, prompt: list[int]) -> tuple[bool, int]:
        """(whether the answer is that of the weights as they are, prompt tokens that were cached)."""
        outs, hits = self.engine.generate([prompt])
        return outs[0] == self.reference.generate(prompt, NEW), hits[0]


def resets(workdir: Path) -> Facts:
    """One request answers, one computes its prompt, one loads: first with all computed anew, then as they are."""
    updated = Updated(workdir)
    engine, answers, prefills = updated.engine, tokens_of(1), tokens_of(2)
    facts: Facts = {}

    updated.add("answers", answers)
    updated.step_until(lambda: len(updated.tokens["answers"]) == 40)
    updated.add("prefills", prefills)
    updated.step_until(lambda: updated.num_computed("prefills") > 100)
    before = list(updated.tokens["answers"])
    facts["anew"] = {"stored_before": updated.num_stored(), "states": updated.states()}
    updated.reweigh(1)
    done = engine.llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    facts["anew"] |= {"done": done, "stored_after": updated.num_stored()}
    updated.finish()
    want = updated.reference.generate([*answers, *before], NEW - len(before))
    others = updated.reference.generate(prefills, NEW)
    facts["anew"] |= {
        "began": updated.tokens["answers"][: len(before)] == before,
        "equal": [updated.tokens["answers"][len(before) :] == want, updated.tokens["prefills"] == others],
        "stored": [updated.error([*answers, *before, *want]), updated.error([*prefills, *others])],
    }
    engine.forget()
    facts["anew"]["again"] = updated.ask(prefills)

    engine.forget()
    updated.add("answers", tokens_of(3))
    updated.step_until(lambda: len(updated.tokens["answers"]) == 40)
    updated.add("prefills", tokens_of(4))
    updated.step_until(lambda: updated.num_computed("prefills") > 100)
    updated.store.slow_s = 0.2
    updated.add("loads", prefills)
    updated.step_until(lambda: bool(engine.worker._loads.beside))
    assert eventually(lambda: any(2 <= job.stop < 9 for job in engine.worker._loads.beside.values())), "in its middle"
    failed = engine.connector._scheduler.figures.counts.get("failed_loads", 0)
    facts["as they are"] = {"stored_before": updated.num_stored(), "states": updated.states()}
    updated.reweigh(2)
    done = engine.llm.reset_prefix_cache(reset_connector=True)
    facts["as they are"] |= {"done": done, "stored_after": updated.num_stored()}
    updated.store.slow_s = 0.0
    updated.finish()
    others = updated.reference.generate(prefills, NEW)
    facts["as they are"] |= {
        "failed": engine.connector._scheduler.figures.counts["failed_loads"] - failed,
        "equal": [updated.tokens["loads"] == others],
        "stored": [updated.error([*prefills, *others])],
        "kept": [updated.error(tokens_of(3))[1], updated.error(tokens_of(4))[1]],
    }
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    facts["as they are"]["again"] = updated.ask(tokens_of(3))

    poison(updated.store, engine.model_id, prefills)
    engine.forget()
    facts["control_differs"] = not updated.ask(prefills)[0]
    return {**facts, "held": engine.close(), "check": updated.store.check()}
