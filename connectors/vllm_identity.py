# SPDX-License-Identifier: Apache-2.0
"""Which KV a vLLM engine computes: the model's identity from the engine's configuration, a request's from the request.

Nothing here comes from rank or parallelism but the part grid, and that only where it is not configured. What cannot
be told apart is refused at the start (a model) or served without reuse (a request).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from connectors.base import VOLATILE_CONFIG
from connectors.vllm_plan import VllmSettings
from kvstore.block import ModelId, Root
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""How the names of files end that hold weights."""
_FP8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


# -- the model -------------------------------------------------------------------------------------------------


def model_id_of(config: VllmConfig, settings: VllmSettings) -> ModelId:
    """The ModelId of an engine. It is the same in its scheduler and in every worker.

    Raises ConfigError, naming why, where the KV of a prefix cannot be identified or cut into blocks.
    """
    model = config.model_config
    _refuse_unknown(config)
    text = model.hf_text_config
    facts = {key: value for key, value in text.to_dict().items() if key not in VOLATILE_CONFIG}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    weights_dtype = str(model.dtype).removeprefix("torch.")
    cache_dtype = str(config.cache_config.cache_dtype)
    kv_dtype = _FP8.get(cache_dtype, weights_dtype if cache_dtype == "auto" else cache_dtype)
    extras = {
        "weights": weights_dtype if kv_dtype != weights_dtype else "",
        "quantization": str(model.quantization or ""),
    }
    part_layers, part_heads = _grid(config, settings)
    return ModelId(
        model=settings.model or f"{model.architectures[0]}-{digest}",
        revision=settings.revision or revision_of(str(model.model), model.revision, text),
        kv_dtype=kv_dtype,
        num_layers=int(model.get_total_num_hidden_layers()),
        num_kv_heads=int(model.get_total_num_kv_heads()),
        head_dim=int(model.get_head_size()),
        scale_digest=json.dumps({key: value for key, value in extras.items() if value}) if any(extras.values()) else "",
        position=_position(text, int(model.max_model_len)),
        block_tokens=settings.block_tokens,
        part_layers=part_layers,
        part_heads=part_heads,
    )


def _position(text: Any, max_model_len: int) -> str:
    """RoPE as the engine resolved it. LongRoPE picks its factors by the engine's longest context."""
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        return ""
    if "longrope" in json.dumps(rope, default=str) or "dynamic" in json.dumps(rope, default=str):
        rope = {**rope, "max_model_len": max_model_len}
    return json.dumps(rope, sort_keys=True, default=str)


def _grid(config: VllmConfig, settings: VllmSettings) -> tuple[int, int]:
    """The configured part grid, else the coarsest that this engine's ranks can read and write."""
    model, parallel = config.model_config, config.parallel_config
    heads, tp = int(model.get_total_num_kv_heads()), int(parallel.tensor_parallel_size)
    part_heads = settings.part_heads or (0 if tp == 1 else max(1, heads // tp))
    part_layers = settings.part_layers
    if not part_layers and parallel.pipeline_parallel_size > 1:
        part_layers = 1
    return part_layers, part_heads


def _refuse_unknown(config: VllmConfig) -> None:
    model, cache = config.model_config, config.cache_config
    name = model.architectures[0] if model.architectures else "the model"
    if model.is_encoder_decoder:
        raise ConfigError(f"{name} is an encoder-decoder: its cache depends on the encoder's input, not on a prefix")
    if model.use_mla:
        raise ConfigError(f"{name} uses multi-head latent attention: its pages are not keys and values")
    if model.is_hybrid:
        raise ConfigError(
            f"{name} has state-space or linear attention layers: they keep one state, not a key per token"
        )
    if cache.kv_cache_dtype_skip_layers:
        raise ConfigError("kv_cache_dtype_skip_layers is set: layers of different KV dtypes are not stored")
    dtype = str(cache.cache_dtype)
    if dtype not in (*_FP8, "auto", "bfloat16", "float16"):
        raise ConfigError(f"kv cache dtype {dtype!r} is not stored: use auto, {', '.join(_FP8)}")
    if (
        config.parallel_config.decode_context_parallel_size > 1
        or config.parallel_config.prefill_context_parallel_size > 1
    ):
        raise ConfigError("context parallelism spreads one sequence's tokens over ranks, which is not stored")


def drafter_with_kv(config: VllmConfig) -> str:
    """How the engine drafts, where that keeps KV of the prompt beside the model's own (EAGLE, MTP, a draft model)."""
    drafting = config.speculative_config
    return str(drafting.method) if drafting is not None and drafting.uses_draft_kv_cache() else ""


def revision_of(model: str, revision: str | None, config: Any = None) -> str:
    """What tells these weights from any others: the hub's commit, or a digest of the weight files.

    Raises ConfigError where neither is known.
    """
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return str(commit)
    directory = Path(model)
    if not directory.is_dir():
        if revision and revision not in ("main", "master", "latest"):
            return revision
        raise ConfigError(f"the revision of {model!r} is not known: set kv_connector_extra_config.revision")
    return directory_digest(directory)


def directory_digest(directory: Path) -> str:
    """SHA-256 over names and contents of the weight files, remembered by their stamps."""
    files = sorted(path for path in directory.iterdir() if path.suffix in WEIGHTS)
    if not files:
        raise ConfigError(f"{directory} has no weight files: set kv_connector_extra_config.revision")
    return contents_digest(directory, files)


def contents_digest(directory: Path, files: Sequence[Path]) -> str:
    """SHA-256 over names and contents of files in `directory`, remembered by their stamps."""
    names = [path.relative_to(directory).as_posix() for path in files]
    found = [path.stat() for path in files]
    stamps = [[name, *stamp_of(s)] for name, s in zip(names, found, strict=True)]
    key = hashlib.sha256(json.dumps([str(directory.resolve()), stamps]).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME")
    remembered = (Path(base) if base else Path.home() / ".cache") / "kvstore" / "weights" / key
    try:
        return remembered.read_text()
    except OSError:
        pass
    digest = hashlib.sha256()
    for name, path in zip(names, files, strict=True):
        with path.open("rb") as file:
            digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    text = digest.hexdigest()
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        fresh = remembered.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        fresh.write_text(text)
        fresh.replace(remembered)
    except OSError:
        pass  # a cache that cannot be written costs a digest at each start
    return text


def stamp_of(found: os.stat_result) -> tuple[int, int, int, int]:
    """What is another when a file's content is. Its time of change too: a copy may be given any time of writing."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


# -- a rank ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RankSlice:
    """Which layers and heads of the model one worker holds. `saves`: it is the replica that writes them."""

    layers: range
    heads: range
    saves: bool = True


def rank_slice(config: VllmConfig, tp_rank: int) -> RankSlice:
    """The slice of this worker; `config` is the worker's own, whose parallel_config knows its rank."""
    model, parallel = config.model_config, config.parallel_config
    start, stop = model.get_layers_start_end_indices(parallel)
    heads, tp = int(model.get_total_num_kv_heads()), int(parallel.tensor_parallel_size)
    if tp <= heads:
        count = heads // tp
        return RankSlice(range(start, stop), range(tp_rank * count, (tp_rank + 1) * count))
    copies = tp // heads
    head = tp_rank // copies
    return RankSlice(range(start, stop), range(head, head + 1), saves=tp_rank % copies == 0)


# -- a request -------------------------------------------------------------------------------------------------


class LoraRequest(Protocol):
    """What is looked at of vLLM's."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool


class MediaPosition(Protocol):
    offset: int


class MediaFeature(Protocol):
    identifier: str
    mm_position: MediaPosition


class EngineRequest(Protocol):
    """What the connector looks at of vLLM's Request."""

    request_id: str
    num_tokens: int
    num_prompt_tokens: int
    num_computed_tokens: int
    max_tokens: int
    all_token_ids: Sequence[int]
    cache_salt: str | None
    lora_request: LoraRequest | None
    mm_features: Sequence[MediaFeature]
    prompt_embeds: Any
    prompt_is_token_ids: Sequence[bool] | None
    skip_reading_prefix_cache: bool
    kv_transfer_params: Mapping[str, object] | None


def media_of(request: EngineRequest) -> list[tuple[int, bytes]]:
    """(token offset, digest) of what the request's token ids do not say."""
    items = [
        (int(feature.mm_position.offset), hashlib.sha256(str(feature.identifier).encode()).digest())
        for feature in request.mm_features
    ]
    if request.prompt_embeds is not None:
        embeds = request.prompt_embeds.detach().cpu().contiguous()
        # Which places are tokens, too: the ids do not say it, since 0 stands for an embedding and is also a token.
        tokens = "".join("01"[is_token] for is_token in request.prompt_is_token_ids or ())
        head = f"{tuple(embeds.shape)}|{embeds.dtype}|{tokens}|".encode()
        content = embeds.flatten().view(torch.uint8).numpy().tobytes()
        items.append((0, hashlib.sha256(b"embeds|" + head + content).digest()))
    return sorted(items)


class Roots:
    """Roots by adapter and salt, made once each."""

    def __init__(self, model: ModelId, secret: bytes) -> None:
        self._model, self._secret = model, secret
        self._made: dict[tuple[bytes, bytes], Root] = {}

    def root(self, adapter: bytes, salt: bytes) -> Root:
        key = (adapter, salt)
        if key not in self._made:
            self._made[key] = Root(self._model, adapter, salt, self._secret)
        return self._made[key]

    def all(self) -> list[Root]:
        return list(self._made.values())
