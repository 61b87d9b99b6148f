# SPDX-License-Identifier: Apache-2.0
"""A prompt on a command line names the same blocks that an engine would ask for."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.block import Chain, ModelId, Root
from kvstore.errors import ConfigError
from kvstore.service.prompt import Namespace, as_hash, read_model, read_prompt

TOKENS = list(range(40))


@pytest.fixture
def model_file(tmp_path: Path, model: ModelId) -> str:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(dataclasses.asdict(model)))
    return str(path)


def test_token_ids_given_in_place_or_in_a_file_give_the_engines_chain(
    tmp_path: Path, model: ModelId, model_file: str
) -> None:
    wanted = Chain(Root(model, salt=b"acme", secret=b"s" * 16), TOKENS).ids
    namespace = Namespace(model=model_file, salt=b"acme", secret=b"s" * 16)
    (tmp_path / "prompt.json").write_text(json.dumps(TOKENS))
    for prompt in (json.dumps(TOKENS), str(tmp_path / "prompt.json")):
        assert read_prompt(prompt, namespace).ids == wanted
    assert read_prompt(json.dumps(TOKENS), Namespace(model=model_file)).ids != wanted


@pytest.mark.parametrize("name", ["nothing.json", "folder/nothing", "/tmp/nothing.txt"])
def test_a_file_that_is_not_there_is_not_taken_for_a_prompt(model_file: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"no file {name}"):
        read_prompt(name, Namespace(model=model_file), tokenizer="any")


def test_a_model_may_be_toml_with_what_has_no_default_alone(tmp_path: Path, model: ModelId) -> None:
    path = tmp_path / "model.toml"
    path.write_text(
        'model = "tiny"\nrevision = "1"\nkv_dtype = "bfloat16"\nnum_layers = 2\nnum_kv_heads = 2\nhead_dim = 16\n'
        "block_tokens = 16\n"
    )
    assert read_prompt(json.dumps(TOKENS), Namespace(model=str(path))).root == Root(model)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("hello", "the prompt is text: give --tokenizer NAME"),
        ("[1, 2]", "the prompt has 2 tokens: a block needs 16"),
        (json.dumps([-1] * 16), "token ids must lie in"),
        (json.dumps(["a"] * 16), "the prompt is text"),
        (json.dumps([True] * 16), "the prompt is text"),
        ("x" * 100_000, "the prompt is text"),
    ],
)
def test_a_wrong_prompt_is_one_clear_sentence(model_file: str, prompt: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_prompt(prompt, Namespace(model=model_file))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.json", "{", "is neither JSON nor TOML"),
        ("m.json", "[]", "unknown field 'list'"),
        ("m.json", '{"model": "a", "layers": 2}', "unknown field 'layers': known are model, revision"),
        ("m.json", '{"model": "a"}', "revision, kv_dtype, num_layers, num_kv_heads, head_dim missing"),
        ("m.toml", 'model = "a"\nrevision = 1\n', "missing"),
        (
            "m.json",
            '{"model":"a","revision":"1","kv_dtype":"bfloat16","num_layers":"2","num_kv_heads":2,"head_dim":16}',
            "num_layers is '2': give a number",
        ),
    ],
)
def test_a_wrong_model_file_is_one_clear_sentence(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_prompt("[1]", Namespace(model=str(tmp_path / name)))


def test_without_a_model_the_error_says_what_to_give_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --model FILE") as caught:
        read_prompt("[1]", Namespace(model=""))
    said = str(caught.value)
    assert "`kvstore status --json | jq '.models[0]' > model.json` writes the file" in said
    (example,) = re.findall(r"{.*?}", said)
    (tmp_path / "m.json").write_text(example)
    assert read_model(str(tmp_path / "m.json")).model == "Qwen/Qwen3-8B"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_prompt("[1]", Namespace(model="/nowhere/model.json"))


def test_without_a_model_the_only_one_that_is_open_is_meant(model: ModelId) -> None:
    assert read_prompt(json.dumps(TOKENS), Namespace(model="", open_models=(model,))).root == Root(model)
    two = (model, replace(model, model="other"))
    with pytest.raises(ConfigError, match=r"the server has 2 models open \(other, tiny\): say which by --model FILE"):
        read_prompt(json.dumps(TOKENS), Namespace(model="", open_models=two))
    kept = (model, replace(model, layout="opaque:12ab"))
    with pytest.raises(ConfigError, match=r"2 models open \(tiny, tiny, opaque:12ab\): say which"):
        read_prompt(json.dumps(TOKENS), Namespace(model="", open_models=kept))


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if messages[0].role == 'tool' %}{{ raise_exception('tools come second') }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> Callable[[str], str]:
    """Writes a tokenizer of bytes, with a chat template or without; returns its path."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    def make(template: str) -> str:
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        model = tokenizers.models.BPE({letter: number for number, letter in enumerate(letters)}, [])
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        whole = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
        if template:
            whole.chat_template = template
        path = str(tmp_path / f"tokenizer-{len(template)}")
        whole.save_pretrained(path)
        return path

    return make


def test_a_chat_goes_through_the_tokenizers_template_as_an_engine_does_it(
    make_tokenizer: Callable[[str], str], tmp_path: Path, model_file: str
) -> None:
    path, namespace = make_tokenizer(TEMPLATE), Namespace(model=model_file)
    as_text = read_prompt("<user>What is a prefix, please?<assistant>", namespace, path)
    said = "What is a prefix, please?"
    messages = json.dumps([{"role": "user", "content": said}])
    (tmp_path / "messages.json").write_text(messages)
    for prompt in (said, messages, str(tmp_path / "messages.json")):
        assert read_prompt(prompt, namespace, path, chat=True).ids == as_text.ids
    assert read_prompt(said + " " * 16, namespace, path).ids != as_text.ids


def test_a_chat_that_cannot_be_is_one_clear_sentence(make_tokenizer: Callable[[str], str], model_file: str) -> None:
    path, namespace = make_tokenizer(TEMPLATE), Namespace(model=model_file)
    for prompt in ("[1, 2]", "[]", '[{"role": "user"}]'):
        with pytest.raises(ConfigError, match="--chat takes text, or a JSON list of messages"):
            read_prompt(prompt, namespace, path, chat=True)
    with pytest.raises(ConfigError, match="refuses these messages: tools come second"):
        read_prompt('[{"role": "tool", "content": "x"}]', namespace, path, chat=True)
    with pytest.raises(ConfigError, match="has no chat template"):
        read_prompt("Hello, hello, hello.", namespace, make_tokenizer(""), chat=True)


def test_only_64_hex_digits_are_a_hash() -> None:
    assert as_hash("0f" * 32) == b"\x0f" * 32
    for text in ("0f" * 31, "0g" * 32, "0f" * 33, "", "[1, 2]", "0f" * 32 + "\n"):
        assert as_hash(text) is None
