# SPDX-License-Identifier: Apache-2.0
"""Which KV an engine computes, from vLLM's own configuration (a stand-in with what is looked at of it)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from connectors.vllm_identity import model_id_of
from connectors.vllm_plan import VllmSettings

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0], "rope_theta": 1e4}


def engine(
    *, rope: dict[str, object] | None = None, max_model_len: int = 4096, tp: int = 1, pp: int = 1, **changes: Any
) -> Any:
    text = SimpleNamespace(
        rope_parameters=rope or LINEAR, to_dict=lambda: {"hidden_size": 64, "torch_dtype": "float32"}
    )
    model = SimpleNamespace(
        hf_text_config=text,
        dtype="torch.bfloat16",
        quantization=None,
        architectures=["LlamaForCausalLM"],
        model="org/model",
        revision="0123abcd",
        max_model_len=max_model_len,
        is_encoder_decoder=False,
        use_mla=False,
        is_hybrid=False,
        get_sliding_window=lambda: None,
        get_total_num_hidden_layers=lambda: 4,
        get_total_num_kv_heads=lambda: 4,
        get_head_size=lambda: 16,
    )
    cache = SimpleNamespace(**{"cache_dtype": "auto", "kv_cache_dtype_skip_layers": [], **changes})
    parallel = SimpleNamespace(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
    )
    return SimpleNamespace(model_config=model, cache_config=cache, parallel_config=parallel)


def test_rope_is_the_one_the_engine_resolved() -> None:
    same, settings = model_id_of(engine(), VllmSettings()), VllmSettings()
    assert model_id_of(engine(max_model_len=8192), settings) == same
    assert model_id_of(engine(rope={**LINEAR, "factor": 4.0}), settings) != same
    # LongRoPE picks its factors by the longest context, so the same weights have other keys.
    assert model_id_of(engine(rope=LONG), settings) != model_id_of(engine(rope=LONG, max_model_len=8192), settings)


def test_ranks_are_not_in_the_identity_where_the_grid_is_given() -> None:
    settings = VllmSettings(part_layers=1, part_heads=1)
    ids = {model_id_of(engine(tp=tp, pp=pp), settings) for tp, pp in ((1, 1), (2, 1), (1, 2), (4, 4))}
    assert len(ids) == 1


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_another_kv_dtype_is_another_identity(dtype: str) -> None:
    assert model_id_of(engine(cache_dtype=dtype), VllmSettings()) != model_id_of(engine(), VllmSettings())
