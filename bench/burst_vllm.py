# SPDX-License-Identifier: Apache-2.0
"""An engine for ``bench burst``: runs under a Python that has vLLM and serves bursts, a line of JSON each.

Its input: {"requests": [[arrival on the clock of time.monotonic, prompt], ...], "new": tokens to generate, "alone":
read no prefix cache at all}. Requests enter the engine when they arrive, between its steps, as those of a server do.
Its answer, after "ROW ": of each request the seconds from its arrival to its first token, tokens that were cached, and
the tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

_IDLE_S = 0.001


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    llm = LLM(
        options["model"],
        skip_tokenizer_init=True,
        dtype=options["dtype"],
        enforce_eager=True,
        max_model_len=options["max_tokens"],
        max_num_seqs=8,
        max_num_batched_tokens=options["step_tokens"],
        block_size=128,
        kv_cache_memory_bytes=10 * options["max_tokens"] * options["token_bytes"],
        seed=0,
        kv_transfer_config=options["transfer"],
    )
    print("ROW {}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        llm.reset_prefix_cache()
        params = SamplingParams(
            temperature=0,
            max_tokens=asked["new"],
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=asked["alone"],
        )
        print("ROW " + json.dumps(_serve(llm, asked["requests"], params)), flush=True)


def _serve(llm: Any, requests: list[tuple[float, list[int]]], params: Any) -> list[dict[str, Any]]:
    engine, core = llm.llm_engine, llm.llm_engine.engine_core.engine_core
    answers: dict[str, dict[str, Any]] = {}
    waiting = list(enumerate(requests))
    while waiting or engine.has_unfinished_requests():
        now_s = time.monotonic()
        while waiting and waiting[0][1][0] <= now_s:
            number, (_, prompt) = waiting.pop(0)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        if not engine.has_unfinished_requests():
            time.sleep(_IDLE_S)
            continue
        for out in engine.step():
            tokens = list(out.outputs[0].token_ids)
            if tokens and out.request_id not in answers:
                arrived_s = requests[int(out.request_id.split("-")[0])][0]
                answers[out.request_id] = {"ttft_s": time.monotonic() - arrived_s}
            if out.finished:
                answers[out.request_id] |= {"tokens": tokens, "hit_tokens": int(out.num_cached_tokens or 0)}
    for _ in range(100):  # what is saved at a request's end is copied in steps after it
        if not core.scheduler.requests and not core.scheduler.has_finished_requests():
            break
        core.step_fn()
    return [answers[name] for name in sorted(answers, key=lambda name: int(name.split("-")[0]))]


if __name__ == "__main__":
    main()
