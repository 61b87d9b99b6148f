# SPDX-License-Identifier: Apache-2.0
"""Models for `vllm_runs` whose layers do not all attend to every token, prompts being many times what they see."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

from tests.engines.vllm_support import (
    BLOCK,
    NEW,
    Engine,
    Facts,
    FaultyStore,
    Reference,
    bytes_of,
    poison,
    tokens_of,
    worst_error,
)

WINDOW = 48
"""No multiple of a page."""
CHUNK = 64
KEPT = {"disable_hybrid_kv_cache_manager": True}
"""The engine keeps in one group what layers with windows have left behind."""
_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class _Windowed(Reference):
    """A reference whose KV is that of all tokens: transformers' own cache keeps what a layer still attends to.

    Attributes:
        sources: of each layer, the one whose keys and values it attends to; None where that is itself.
    """

    sources: Sequence[int] | None = None

    def kv(self, tokens: Sequence[int]) -> torch.Tensor:
        cache = DynamicCache()
        with torch.no_grad():
            self.model(torch.tensor([list(tokens)]), use_cache=True, past_key_values=cache)
        layers = [cache.layers[at] for at in self.sources or range(len(cache.layers))]
        return torch.stack(
            [torch.stack([layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)]) for layer in layers]
        )


def _made(directory: Path, make: Callable[[], Any]) -> _Windowed:
    if not directory.is_dir():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            make().save_pretrained(directory)
    return _Windowed(directory.parent, directory)


def of_some_layers(workdir: Path) -> Reference:
    """A Gemma 3, of whose layers every other one has a window and a RoPE of its own."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        **_SIZES,
        num_hidden_layers=4,
        layer_types=kinds,
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
        tie_word_embeddings=False,
    )
    return _made(workdir / "gemma-3", lambda: Gemma3ForCausalLM(config))


def of_shared_layers(workdir: Path) -> Reference:
    """A Gemma 3n, whose last layers attend to keys and values of earlier ones: with a window and without."""
    config = Gemma3nTextConfig(
        **{**_SIZES, "initializer_range": 0.05},
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        sliding_window=WINDOW,
        num_kv_shared_layers=3,
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=32,
        laurel_rank=16,
        activation_sparsity_pattern=[0.0] * 6,
    )
    reference = _made(workdir / "gemma-3n", lambda: Gemma3nForCausalLM(config))
    reference.sources = [0, 1, 2, 1, 1, 2]
    return reference


def with_sinks(workdir: Path) -> Reference:
    """A gpt-oss: every other layer has a window, all have sinks, and tokens go to some of its experts."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 2048}
    config = GptOssConfig(
        **{**_SIZES, "intermediate_size": 128},
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={**rope, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        tie_word_embeddings=False,
    )
    return _made(workdir / "gpt-oss", lambda: GptOssForCausalLM(config))


def of_all_layers(workdir: Path, window: int = WINDOW) -> Reference:
    """A Mistral."""
    config = MistralConfig(**_SIZES, num_hidden_layers=3, sliding_window=window)
    return _made(workdir / f"mistral-{window}", lambda: MistralForCausalLM(config))


def of_chunks(workdir: Path) -> Reference:
    """A Llama 4 without experts: every other layer attends to its token's chunk alone."""
    config = Llama4TextConfig(
        **_SIZES,
        num_hidden_layers=4,
        intermediate_size_mlp=256,
        attention_chunk_size=CHUNK,
        no_rope_layers=[1, 0, 1, 0],
        moe_layers=[],
        interleave_moe_layer_step=0,
        num_local_experts=1,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return _made(workdir / "llama-4", lambda: Llama4ForCausalLM(config))


def chunks(workdir: Path, **options: Any) -> Facts:
    """Turns of a model with chunks. Its pages are stored as they are: on a CPU its layers are of two kinds."""
    reference = of_chunks(workdir)
    store = FaultyStore()
    engine = Engine(reference.directory, store, **options)
    prompt = tokens_of(1)
    longer = [*prompt, *reference.generate(prompt, NEW), *tokens_of(2, 50)]
    wants = [reference.generate(each, NEW) for each in (prompt, prompt, longer)]
    equal, hits = [], []
    for each, want in zip((prompt, prompt, longer), wants, strict=True):
        outs, found = engine.generate([each])
        engine.forget()
        engine.spoil_pages()
        equal.append(outs[0] == want)
        hits.append(found[0])
    reused = bytes_of(store, engine.model_id, longer)
    store.clear()
    engine.generate([longer])
    engine.forget()
    computed = bytes_of(store, engine.model_id, longer)
    poison(store, engine.model_id, longer)
    control, _ = engine.generate([longer])
    return {
        "equal": equal,
        "hits": hits,
        "apart": max(_apart(reused[index], computed[index]) for index in computed),
        "num_blocks": [len(reused), len(computed)],
        "control_differs": control[0] != wants[2],
        "keeps": engine.connector._groups.keeps,
        "layout": engine.model_id.layout.partition(":")[0],
        "held": engine.close(),
        "check": store.check(),
    }


def chats(workdir: Path, *, rounds: int = 12, **options: Any) -> Facts:
    """Chats that grow side by side in an engine with few pages: what its own cache has of them changes, and is less.

    `began`: where loads began, and how many tokens they brought.
    """
    reference, lot = of_some_layers(workdir), random.Random(5)
    store = FaultyStore()
    engine = Engine(reference.directory, store, max_model_len=768, **options)
    side, began = engine.connector._side(), []
    match = side.match

    def watched(request: Any, local_tokens: int) -> Any:
        found = match(request, local_tokens)
        if found[0]:
            began.append((local_tokens, found[0]))
        return found

    side.match = watched
    said = [tokens_of(40 + number, 150) for number in range(3)]
    equal = []
    for at in range(rounds):
        some = lot.sample(range(len(said)), lot.randint(1, 3))
        outs, _ = engine.generate([said[number] for number in some], 30)
        for number, out in zip(some, outs, strict=True):
            equal.append(out == reference.generate(said[number], 30))
            said[number] = [*said[number], *out, *tokens_of(100 + at, 15)]
    found = [worst_error(store, engine.model_id, reference, each[:-15]) for each in said]
    poison(store, engine.model_id, said[0])
    engine.forget()
    control, _ = engine.generate([said[0]], 30)
    return {
        "equal": equal,
        "began": began,
        "preemptions": engine.metric("vllm:num_preemptions"),
        "error": max(error for error, _ in found),
        "missing": [len(each[:-15]) // BLOCK - count for each, (_, count) in zip(said, found, strict=True)],
        "control_differs": control[0] != reference.generate(said[0], 30),
        "keeps": engine.connector._groups.keeps,
        "held": engine.close(),
        "check": store.check(),
    }


def _apart(one: Sequence[bytes], other: Sequence[bytes]) -> float:
    """Largest difference between the numbers of two blocks."""
    has, want = (torch.frombuffer(bytearray(b"".join(views)), dtype=torch.float32) for views in (one, other))
    return float((has - want).abs().max())
