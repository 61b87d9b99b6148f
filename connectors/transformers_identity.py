# SPDX-License-Identifier: Apache-2.0
"""Which model a transformers model is to the store, and why some cannot be any."""

from __future__ import annotations

import hashlib
import json

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from connectors.base import VOLATILE_CONFIG
from kvstore.block import ModelId
from kvstore.errors import ConfigError


def model_id_of(
    model: PreTrainedModel,
    *,
    revision: str,
    block_tokens: int = 64,
    part_layers: int = 0,
    part_heads: int = 0,
    lossy: str = "",
) -> ModelId:
    """The ModelId of a loaded model.

    Args:
        revision: what tells these weights from any others of this architecture: a commit hash of the hub, or a
            digest of the weight files. Never a branch such as `main`, a date or a path: two sets of weights
            under one revision would read each other's KV, and nothing could notice.
        lossy: a format of `kvstore.layout.PACKED`, such as `fp8`, or empty for exact blocks: another namespace.

    Raises ConfigError, naming why, where the KV of a prefix cannot be cut into blocks.
    """
    if not revision or revision in ("main", "master", "latest"):
        raise ConfigError(f"revision is {revision!r}: give the commit or a digest of the weights")
    config = model.config.get_text_config(decoder=True)
    _refuse_uncuttable(model, config)
    heads = int(config.num_attention_heads)
    facts = {key: value for key, value in config.to_dict().items() if key not in VOLATILE_CONFIG}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    rope = getattr(config, "rope_parameters", None)
    return ModelId(
        model=f"{type(model).__name__}-{digest}",
        revision=revision,
        kv_dtype=str(model.dtype).removeprefix("torch.") + (f"+{lossy}" if lossy else ""),
        num_layers=int(config.num_hidden_layers),
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        position=json.dumps(rope, sort_keys=True, default=str) if rope else "",
        block_tokens=block_tokens,
        part_layers=part_layers,
        part_heads=part_heads,
    )


def _refuse_uncuttable(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Raise ConfigError where blocks of this model's cache would not stand for its prefix."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ConfigError(f"{name} is an encoder-decoder: its cache depends on the encoder's input, not on a prefix")
    if config is not model.config:
        raise ConfigError(f"{name} takes more than text: placeholder tokens do not identify images or sound")
    if not isinstance(model, GenerationMixin) or not _keeps_plain_cache(model):
        raise ConfigError(f"{name} does not generate from a per-layer KV cache")
    if getattr(config, "kv_lora_rank", None):
        raise ConfigError(f"{name} uses multi-head latent attention (kv_lora_rank): keys and values differ in width")
    layer_types = set(get_layer_types_and_kwargs(config)[0])
    reasons = {
        "sliding_attention": "sliding windows drop the keys of earlier tokens",
        "chunked_attention": "chunked attention drops the keys of earlier tokens",
        "linear_attention": "linear attention and state-space layers keep one state, not a key per token",
        "conv": "convolution layers keep one state, not a key per token",
        "hybrid": "hybrid layers keep a recurrent state beside their keys",
        "hybrid_sliding": "hybrid layers keep a recurrent state beside their keys",
        "dummy": "some layers share or lack a cache",
        "indexed_attention": "sparse attention keeps indexer keys beside its cache",
    }
    for layer_type in sorted(layer_types - {"full_attention"}):
        raise ConfigError(f"{name} has {layer_type} layers: {reasons.get(layer_type, 'their cache is not known here')}")
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        raise ConfigError(f"{name} attends to later tokens: a prefix's keys depend on what follows it")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        raise ConfigError(f"{name} has rope_type {rope['rope_type']!r}: keys depend on the length of the whole input")
    cache_kind = getattr(model.generation_config, "cache_implementation", None)
    if cache_kind not in (None, "dynamic"):
        raise ConfigError(f"{name} generates with a {cache_kind!r} cache: unset generation_config.cache_implementation")
    if len({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}) > 1:
        raise ConfigError(f"{name} is spread over several devices: its cache is not in one place")


def _keeps_plain_cache(model: GenerationMixin) -> bool:
    """Whether transformers itself would give this model a cache of one entry a layer."""
    return bool(model._supports_default_dynamic_cache())  # type: ignore[misc]
