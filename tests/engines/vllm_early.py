# SPDX-License-Identifier: Apache-2.0
"""Scenarios of `vllm_runs` for blocks that are reused while the request that computes them still runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from connectors import base
from tests.engines.vllm_support import (
    BLOCK,
    NEW,
    Engine,
    Facts,
    FaultyStore,
    Reference,
    poison,
    tokens_of,
    worst_error,
)

_SHARED = 20 * BLOCK
_STEP = 64


class Crowd:
    """Requests that begin alike and are in the engine at once. It has no prefix cache of its own, or it would help."""

    def __init__(self, workdir: Path) -> None:
        self.reference, self.store = Reference(workdir), FaultyStore()
        self.engine = Engine(
            self.reference.directory, self.store, enable_prefix_caching=False, max_num_batched_tokens=_STEP
        )
        # What is waited for here comes; on a machine with other work it may take longer than the last time.
        base._PATIENCE = 100.0
        for seed, count in ((50, 400), (51, 150)):  # who knows nothing of what computing takes does not wait
            self.engine.generate([tokens_of(seed, count)], 4)

    def prompts(self, seed: int, count: int) -> list[list[int]]:
        shared = tokens_of(seed, _SHARED)
        return [[*shared, *tokens_of(seed + 1 + number, 40)] for number in range(count)]

    def want(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return [self.reference.generate(prompt, NEW) for prompt in prompts]


def burst(workdir: Path) -> Facts:
    """Four requests with one system prompt arrive together: the first computes it, the others take it as it comes."""
    crowd = Crowd(workdir)
    prompts = crowd.prompts(60, 4)
    answers = crowd.engine.together(prompts)
    facts: Facts = {
        "equal": [answer.tokens == want for answer, want in zip(answers, crowd.want(prompts), strict=True)],
        "computed_times": sum(max(0, _SHARED - answer.hits) for answer in answers) / _SHARED,
        "first_ended": answers[0].ended_at,
        "others_began": [answer.began_at for answer in answers[1:]],
        "error": worst_error(crowd.store, crowd.engine.model_id, crowd.reference, [*prompts[0], *answers[0].tokens])[0],
    }
    poison(crowd.store, crowd.engine.model_id, prompts[0])
    control, _ = crowd.engine.generate([prompts[0]])
    return {
        **facts,
        "control_differs": control[0] != answers[0].tokens,
        "held": crowd.engine.close(),
        "check": crowd.store.check(),
    }


def orphans(workdir: Path) -> Facts:
    """The one who computes is aborted in the middle of the prompt that three others wait for."""
    crowd = Crowd(workdir)
    prompts = crowd.prompts(70, 4)
    answers = crowd.engine.together(prompts, abort_at=3)
    facts: Facts = {
        "equal": [answer.tokens == want for answer, want in zip(answers[1:], crowd.want(prompts[1:]), strict=True)],
        "aborted": answers[0].tokens,
        "hits": [answer.hits for answer in answers[1:]],
        "marks": crowd.store.stats()["marks.live"],
        "error": worst_error(crowd.store, crowd.engine.model_id, crowd.reference, [*prompts[1], *answers[1].tokens])[0],
    }
    poison(crowd.store, crowd.engine.model_id, prompts[1])
    control, _ = crowd.engine.generate([prompts[1]])
    return {
        **facts,
        "control_differs": control[0] != answers[1].tokens,
        "held": crowd.engine.close(),
        "check": crowd.store.check(),
    }
