# SPDX-License-Identifier: Apache-2.0
"""Which KV an engine computes, from vLLM's own configuration (a stand-in with what is looked at of it)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from connectors.vllm_identity import model_id_of, rank_slice
from connectors.vllm_plan import VllmSettings
from kvstore.block import ModelId
from kvstore.errors import ConfigError

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
        get_total_num_hidden_layers=lambda: 4,
        get_total_num_kv_heads=lambda: 4,
        get_head_size=lambda: 16,
        get_layers_start_end_indices=lambda parallel: (0, 4),
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


def test_whatever_else_changes_the_numbers_is_another_identity() -> None:
    def model_of(cache_dtype: str = "auto", **changes: object) -> ModelId:
        config = engine(cache_dtype=cache_dtype)
        vars(config.model_config).update(changes)
        return model_id_of(config, VllmSettings())

    def facts(**changes: object) -> SimpleNamespace:
        text = {"hidden_size": 64, "torch_dtype": "float32", **changes}
        return SimpleNamespace(rope_parameters=LINEAR, to_dict=lambda: text)

    assert model_of() == model_of(hf_text_config=facts())
    assert model_of(hf_text_config=facts(hidden_size=128)) != model_of()
    assert model_of(quantization="awq") != model_of()
    assert model_of(dtype="torch.float16") != model_of()
    # Pages of one dtype either way, but the numbers that were rounded to it were other ones.
    assert model_of("fp8", dtype="torch.float16") != model_of("fp8")
    assert model_of("bfloat16", dtype="torch.float32") != model_of("bfloat16")


def test_ranks_are_not_in_the_identity_where_the_grid_is_given() -> None:
    settings = VllmSettings(part_layers=1, part_heads=1)
    ids = {model_id_of(engine(tp=tp, pp=pp), settings) for tp, pp in ((1, 1), (2, 1), (1, 2), (4, 4))}
    assert len(ids) == 1


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_another_kv_dtype_is_another_identity(dtype: str) -> None:
    assert model_id_of(engine(cache_dtype=dtype), VllmSettings()) != model_id_of(engine(), VllmSettings())


@pytest.mark.parametrize(
    ("tp", "slices"),
    [
        (1, [(range(4), True)]),
        (2, [(range(2), True), (range(2, 4), True)]),
        # Twice as many ranks as heads: two hold each, and one of them writes it.
        (8, [(range(head, head + 1), first) for head in range(4) for first in (True, False)]),
    ],
)
def test_every_head_is_saved_by_one_rank(tp: int, slices: list[tuple[range, bool]]) -> None:
    found = [rank_slice(engine(tp=tp), rank) for rank in range(tp)]
    assert [(each.heads, each.saves) for each in found] == slices
    assert {each.layers for each in found} == {range(4)}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"use_mla": True}, "multi-head latent attention"),
        ({"is_hybrid": True}, "state-space"),
        ({"revision": "main"}, "revision of 'org/model' is not known"),
    ],
)
def test_models_that_cannot_be_told_apart_or_cut_are_refused(changes: dict[str, object], why: str) -> None:
    config = engine()
    vars(config.model_config).update(changes)
    with pytest.raises(ConfigError, match=why):
        model_id_of(config, VllmSettings())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cache_dtype": "int8_per_token_head"}, "is not stored"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "different KV dtypes"),
    ],
)
def test_kv_whose_scales_are_not_known_is_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        model_id_of(engine(**changes), VllmSettings())


@pytest.mark.parametrize("which", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_ranks_that_share_a_sequences_tokens_are_refused(which: str) -> None:
    config = engine()
    setattr(config.parallel_config, which, 2)
    with pytest.raises(ConfigError, match="context parallelism"):
        model_id_of(config, VllmSettings())
