# SPDX-License-Identifier: Apache-2.0
"""An engine for ``bench vllm``: runs under a Python that has vLLM and serves what it is told, a line of JSON each.

Its input: {"prompt": [...], "new": tokens to generate, "forget": empty the engine's own prefix cache first,
"connected": false takes the connector off the engine for this request}. Its answer, after "ROW ": seconds to the first
token and to the last, tokens that were cached, the tokens, and pages that the kernel had to give the process meanwhile.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _let_vllm_look_at_llvmlite() -> None:
    """Where a connector has imported numba, vLLM 0.32 looks at every object of every module and stumbles over one."""
    try:
        ffi = importlib.import_module("llvmlite.binding.ffi")
    except ImportError:
        return
    ffi.lib._fntab["__dict__"] = {}  # where it looks up its attributes, each a function of the library


class Connector:
    """An engine's connector, which can be taken off between requests: for vLLM there is none then.

    Everything that vLLM asks is whether one of these two is None; of what it was configured to, nothing else is left on
    a CPU. The connector's threads stay, with nothing to do.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._state: Any = importlib.import_module("vllm.distributed.kv_transfer.kv_transfer_state")
        self._ends = (scheduler.connector, self._state._KV_CONNECTOR_AGENT)

    def connect(self, connected: bool) -> None:
        self._scheduler.connector, self._state._KV_CONNECTOR_AGENT = self._ends if connected else (None, None)


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    if options["transfer"] and options["transfer"]["kv_connector"].startswith("LMCache"):
        _let_vllm_look_at_llvmlite()
    from vllm import LLM, SamplingParams

    llm = LLM(
        options["model"],
        skip_tokenizer_init=True,
        dtype=options["dtype"],
        enforce_eager=True,
        max_model_len=options["max_tokens"],
        max_num_seqs=4,
        max_num_batched_tokens=2048,
        block_size=128,
        # Pages for two prompts of the longest kind, so that every request gets pages that were used before.
        kv_cache_memory_bytes=2 * options["max_tokens"] * options["token_bytes"],
        seed=0,
        disable_log_stats=False,
        kv_transfer_config=options["transfer"],
    )
    core = llm.llm_engine.engine_core.engine_core
    connector = Connector(core.scheduler)
    print("ROW {}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        connector.connect(asked.get("connected", True))
        if asked["forget"]:
            llm.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
        began_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began_s = time.perf_counter()
        (out,) = llm.generate([{"prompt_token_ids": asked["prompt"]}], params, use_tqdm=False)
        assert out.metrics is not None
        for _ in range(100):  # what is saved at a request's end is copied in steps after it
            if not core.scheduler.requests and not core.scheduler.has_finished_requests():
                break
            core.step_fn()
        seconds = time.perf_counter() - began_s
        row = {
            "ttft_s": float(out.metrics.first_token_latency),
            "seconds": seconds,
            "hit_tokens": int(out.num_cached_tokens or 0),
            "tokens": list(out.outputs[0].token_ids),
            "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began_faults,
        }
        print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
