# SPDX-License-Identifier: Apache-2.0
"""A prompt named on a command line, as a chain: token ids from JSON or a file, or text and a tokenizer.

Engines that serve chats put each conversation into the tokenizer's chat template before they count tokens: `chat`
does the same, so that its blocks are those of the engine.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from kvstore.block import Chain, ModelId, Root
from kvstore.errors import ConfigError

MODEL_EXAMPLE = (
    '{"model": "Qwen/Qwen3-8B", "revision": "main", "kv_dtype": "bfloat16", "num_layers": 36, '
    '"num_kv_heads": 8, "head_dim": 128}'
)
MODEL_FILE = "`kvstore status --json | jq '.models[0]' > model.json` writes the file"
_HASH = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """Where the prompt's chain begins.

    Attributes:
        model: path of a JSON or TOML file with the fields of `kvstore.block.ModelId`.
        salt, adapter: as in `kvstore.block.Root`.
        secret: the cluster's secret, where it has one.
        open_models: of the server: where `model` is empty and there is one of these, it is meant.
    """

    model: str
    salt: bytes = b""
    adapter: bytes = b""
    secret: bytes = b""
    open_models: tuple[ModelId, ...] = ()

    def root(self) -> Root:
        return Root(self._model(), adapter=self.adapter, salt=self.salt, secret=self.secret)

    def _model(self) -> ModelId:
        if self.model or not self.open_models:
            return read_model(self.model)
        if len(self.open_models) > 1:
            names = ", ".join(sorted({_told_apart(model) for model in self.open_models}))
            raise ConfigError(
                f"the server has {len(self.open_models)} models open ({names}): say which by --model FILE, where "
                f"{MODEL_FILE.replace('.models[0]', '.models[N]')}"
            )
        return self.open_models[0]


def _told_apart(model: ModelId) -> str:
    return f"{model.model}, {model.layout}" if model.is_opaque else model.model


def as_hash(text: str) -> bytes | None:
    """The 32 bytes of a block hash in hex; None where `text` is something else."""
    return bytes.fromhex(text) if _HASH.fullmatch(text) else None


def read_model(path: str) -> ModelId:
    """The model in a file. Raises ConfigError naming the field that is wrong."""
    if not path:
        raise ConfigError(
            "no engine has opened a model since this server started: give --model FILE, or a block hash; "
            f"{MODEL_FILE} where an engine has opened one, and it looks like {MODEL_EXAMPLE}"
        )
    try:
        text = Path(path).read_text()
        fields = tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    except OSError as error:
        raise ConfigError(f"model file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise ConfigError(f"model file {path} is neither JSON nor TOML (name it .toml): {error}") from error
    known = {item.name: item for item in dataclasses.fields(ModelId)}
    if not isinstance(fields, dict) or not fields.keys() <= known.keys():
        wrong = sorted(fields.keys() - known.keys()) if isinstance(fields, dict) else [type(fields).__name__]
        raise ConfigError(f"model file {path}: unknown field {wrong[0]!r}: known are {', '.join(known)}")
    missing = [name for name, item in known.items() if item.default is dataclasses.MISSING and name not in fields]
    if missing:
        raise ConfigError(f"model file {path}: {', '.join(missing)} missing")
    for name, value in fields.items():
        kind = int if known[name].type == "int" else str
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"model file {path}: {name} is {value!r}: give a {'number' if kind is int else 'string'}")
    return ModelId(**fields)


def read_prompt(prompt: str, namespace: Namespace, tokenizer: str = "", *, chat: bool = False) -> Chain:
    """The chain of `prompt`: a file, or the thing itself; a JSON list of token ids, or text for `tokenizer`.

    With `chat`: what a user says, or a JSON list of messages ({"role": …, "content": …}), up to where an answer
    begins.

    Raises ConfigError where it holds no full block.
    """
    root = namespace.root()
    text = Path(prompt).read_text() if _is_file(prompt) else prompt
    tokens = None if chat else _listed(text)
    if tokens is None and text is prompt and _looks_like_a_file(prompt):
        raise ConfigError(f"there is no file {prompt}: give one, or a prompt, or token ids as a JSON list")
    if tokens is None:
        loaded = _tokenizer(tokenizer)
        tokens = _templated(loaded, text, tokenizer) if chat else cast("list[int]", loaded.encode(text))
    try:
        chain = Chain(root, tokens)
    except ValueError as error:
        raise ConfigError(f"the prompt is no list of token ids: {error}") from error
    if not len(chain):
        raise ConfigError(f"the prompt has {len(tokens)} tokens: a block needs {root.model.block_tokens}")
    return chain


def _is_file(prompt: str) -> bool:
    try:
        return Path(prompt).is_file()
    except (OSError, ValueError):  # a long prompt is no file name
        return False


def _looks_like_a_file(prompt: str) -> bool:
    """One word with an ending or folders: no prompt of a full block."""
    return not any(map(str.isspace, prompt)) and (bool(Path(prompt).suffix) or "/" in prompt) and len(prompt) < 256


def _listed(text: str) -> list[int] | None:
    """Token ids, where `text` is a JSON list of whole numbers; None where it is something else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return None
    return value


def _messages(text: str) -> list[dict[str, object]]:
    """A conversation: a JSON list of messages, or what a user says. Raises ConfigError for another list."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if not isinstance(value, list):
        return [{"role": "user", "content": text}]
    if not value or not all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value):
        raise ConfigError(
            '--chat takes text, or a JSON list of messages, such as \'[{"role": "user", "content": "Hello"}]\''
        )
    return value


def _templated(loaded: Any, text: str, name: str) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, up to where an answer begins."""
    if not loaded.chat_template:
        raise ConfigError(f"tokenizer {name!r} has no chat template: give one of a chat model, or leave out --chat")
    messages = _messages(text)
    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise ConfigError("--chat needs a package: pip install jinja2") from error
    try:
        tokens = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(f"the chat template of {name!r} refuses these messages: {error}") from error
    return cast("list[int]", tokens)


@cache
def _tokenizer(name: str) -> Any:
    if not name:
        raise ConfigError(
            "the prompt is text: give --tokenizer NAME (as transformers takes it), or token ids as a JSON list, "
            "such as '[1, 2, 3]', or a file that holds one"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError("--tokenizer needs a package: pip install transformers, or give token ids") from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
