# SPDX-License-Identifier: Apache-2.0
"""The engine's half of ``bench vllm``: runs under a Python that has vLLM, prints its rows as JSON.

One warm engine serves all arms in turn, so that pages, caches and clocks are alike; an arm differs in what was
emptied before its request. The token after the prompt is all that is generated.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 4096


def make_model(directory: Path) -> None:
    """A seeded Llama of about 100 M parameters, 16 KiB of KV a token in bf16."""
    if (directory / "config.json").is_file():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(directory)


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    directory = Path(options["model"])
    make_model(directory)
    from vllm import LLM, SamplingParams

    transfer = None
    if options["extra"] is not None:
        transfer = {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": options["extra"],
        }
    llm = LLM(
        str(directory),
        skip_tokenizer_init=True,
        dtype=options["dtype"],
        enforce_eager=True,
        max_model_len=options["reused"] + 1024,
        max_num_seqs=4,
        max_num_batched_tokens=2048,
        block_size=128,
        kv_cache_memory_bytes=1 << 30,
        seed=0,
        disable_log_stats=False,
        kv_transfer_config=transfer,
    )
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(1)

    def random_tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    def serve(prompt: list[int]) -> tuple[float, int, list[int]]:
        (out,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        assert out.metrics is not None
        return float(out.metrics.first_token_latency), int(out.num_cached_tokens or 0), list(out.outputs[0].token_ids)

    reused = random_tokens(options["reused"])
    for _ in range(2):  # warm: kernels, pages, and the prefix in the store
        llm.reset_prefix_cache()
        serve([*reused, *random_tokens(64)])
    rows: list[dict[str, object]] = []

    def row(arm: str, new: int, prompt: list[int], expect: list[int] | None = None) -> list[int]:
        ttft_s, hit, tokens = serve(prompt)
        rows.append({"arm": arm, "new_tokens": new, "ttft_s": ttft_s, "hit_tokens": hit})
        if expect is not None:
            rows[-1]["equal"] = tokens == expect
        return tokens

    for repeat in range(options["repeats"]):
        for new in options["new"]:
            suffix = random_tokens(new)
            if transfer is not None:
                llm.reset_prefix_cache()
                row("store", new, [*reused, *suffix])
            else:
                llm.reset_prefix_cache()
                serve([*reused, *random_tokens(16)])
            # The prefix is in the engine's cache now. Another suffix: this one's blocks were just saved.
            row("engine hit", new, [*reused, *random_tokens(new)])
        if repeat < options["cold"]:
            llm.reset_prefix_cache()
            row("recompute", options["new"][-1], random_tokens(options["reused"] + options["new"][-1]))
            time.sleep(0.1)
    print("ROWS " + json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
