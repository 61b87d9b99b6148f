# SPDX-License-Identifier: Apache-2.0
"""Scenarios of `vllm_runs` for prompts that are no tokens: embeddings, whose ids all look alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from connectors.vllm_identity import media_of
from tests.engines.vllm_support import (
    NEW,
    Engine,
    Facts,
    FaultyStore,
    Media,
    Reference,
    poison,
    tokens_of,
    worst_error,
)


def embeddings(workdir: Path) -> Facts:
    """Two prompts as their embeddings, each twice, a prompt of the token that stands for them, and mixtures of both,
    whose ids and embeddings are the same and only their masks differ."""
    reference = Reference(workdir)
    store = FaultyStore()
    engine = Engine(reference.directory, store, enable_prompt_embeds=True)
    prompts = [tokens_of(1), tokens_of(2)]
    wants = [reference.generate(prompt, NEW) for prompt in prompts]
    zeros = [0] * len(prompts[0])
    facts: Facts = {"equal": [], "hits": []}

    def ask(prompt: dict[str, Any], want: Sequence[int]) -> None:
        engine.forget()
        answer, hits = engine.answer(prompt)
        facts["equal"].append(answer == list(want))
        facts["hits"].append(hits)

    embedded = [reference.model.model.embed_tokens(torch.tensor(prompt)) for prompt in prompts]
    for number in (0, 1, 0, 1):
        ask({"prompt_embeds": embedded[number]}, wants[number])
    ask({"prompt_token_ids": zeros}, reference.generate(zeros, NEW))
    masks = [[at < count for at in range(len(zeros))] for count in (0, 100)]
    mixed = reference.generate([0] * 100 + prompts[0][100:], NEW)
    for which in (0, 1, 1):
        says = {"prompt_embeds": embedded[0], "prompt_token_ids": zeros, "prompt_is_token_ids": masks[which]}
        ask(says, mixed if which else wants[0])
    found = [
        worst_error(store, engine.model_id, reference, [*prompt, *want], ids=[*zeros, *want], media=_media_of(embeds))
        for prompt, want, embeds in zip(prompts, wants, embedded, strict=True)
    ]
    facts |= {"error": max(error for error, _ in found), "num_blocks": [count for _, count in found]}
    poison(store, engine.model_id, zeros, media=_media_of(embedded[0]))
    engine.forget()
    facts["control_differs"] = engine.answer({"prompt_embeds": embedded[0]})[0] != wants[0]
    return {**facts, "held": engine.close(), "check": store.check()}


def _media_of(embeds: torch.Tensor) -> Media:
    request: Any = SimpleNamespace(mm_features=(), prompt_embeds=embeds, prompt_is_token_ids=None)
    return media_of(request)
