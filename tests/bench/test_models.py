# SPDX-License-Identifier: Apache-2.0
"""The models to measure with: that the converted one is whole, and that reused KV gives its own output.

The real model is converted into the user's cache once and stays there, as it does for benchmarks.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import DynamicCache, LlamaForCausalLM

from bench import models
from bench.models import ChatModel
from bench.workload import SYSTEM, Workload, multi_turn

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def smollm2() -> ChatModel:
    try:
        models.smollm2_gguf()
    except FileNotFoundError:
        pytest.skip(f"{models.SMOLLM2_PACKAGE} is not installed")
    return models.smollm2()


@pytest.fixture(scope="module")
def workload(smollm2: ChatModel) -> Workload:
    return multi_turn(smollm2.encode, users=4, turns=2, num_documents=2)


def continued(
    model: LlamaForCausalLM, ids: list[int], num_tokens: int, reused: int = 0, cached: list[int] | None = None
) -> list[int]:
    """Return the greedy continuation of ids, the first `reused` of which come from a cache filled before.

    The cache is filled with `cached` where that is given, which is how a wrong hit looks.
    """
    whole = torch.tensor([ids])
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        if reused:
            before = torch.tensor([ids if cached is None else cached])[:, :reused]
            model(before, past_key_values=cache, logits_to_keep=1)
        made = model.generate(  # type: ignore[misc]
            whole,
            attention_mask=torch.ones_like(whole),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=num_tokens,
        )
    return [int(token) for token in made[0, len(ids) :]]


# ---- the real model's tokenizer ----


@pytest.mark.parametrize(("markup", "token"), [("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)])
def test_a_piece_of_markup_is_one_token_wherever_it_stands(smollm2: ChatModel, markup: str, token: int) -> None:
    assert smollm2.encode(markup) == [token]
    assert smollm2.encode(f"a{markup}b").count(token) == 1


def test_encoding_adds_nothing_of_its_own(smollm2: ChatModel) -> None:
    assert smollm2.encode("") == []
    assert len(smollm2.encode("Hello")) == 1


def test_text_survives_encoding_and_decoding(smollm2: ChatModel) -> None:
    for text in (*topics.values(), "naïve ☃ 東京 🦊\n\n\t  x", SYSTEM):
        assert smollm2.decode(smollm2.encode(text)) == text


def test_digits_are_tokens_of_their_own(smollm2: ChatModel) -> None:
    # So the model was trained; a GGUF file does not say it, and the spaces before a number go wrong unnoticed.
    assert [smollm2.decode([token]) for token in smollm2.encode("in   1024")] == ["in", "   ", "1", "0", "2", "4"]


def test_the_models_end_token_ends_a_turn(smollm2: ChatModel) -> None:
    assert smollm2.tokenizer.eos_token_id == 2
    assert smollm2.model.generation_config is not None
    assert smollm2.model.generation_config.eos_token_id == 2


def test_the_workloads_markup_is_what_the_chat_template_writes(smollm2: ChatModel, workload: Workload) -> None:
    for turn in workload.turns:
        prompt = smollm2.decode(turn.token_ids.tolist())
        said = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", prompt, re.DOTALL)
        messages = [{"role": role, "content": content} for role, content in said]
        assert len(messages) == 2 * turn.turn
        written = smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert written == prompt


def test_a_default_workload_has_the_lengths_that_the_study_has(workload: Workload) -> None:
    for turn in workload.turns:
        assert 1700 < len(turn.token_ids) < 2100
        if turn.turn > 1:
            assert turn.num_reusable_tokens >= 1500
            assert 70 <= turn.num_new_tokens <= 130


# ---- the real model ----


def test_the_model_answers_in_english_and_stops(smollm2: ChatModel) -> None:
    prompt = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    answer = smollm2.decode(continued(smollm2.model, smollm2.encode(str(prompt)), 24))
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_revision_is_the_digest_of_the_weights_file(smollm2: ChatModel) -> None:
    assert smollm2.revision == models.file_digest(models.smollm2_gguf())
    assert smollm2.revision in smollm2.directory.name


def test_an_uncached_run_and_one_on_reused_kv_say_the_same(smollm2: ChatModel, workload: Workload) -> None:
    last = workload.turns[-1]
    ids = last.token_ids.tolist()[-400:]
    assert continued(smollm2.model, ids, 12, reused=320) == continued(smollm2.model, ids, 12)


@pytest.mark.slow
def test_a_conversion_gives_a_model_that_loads_in_half_precision(
    smollm2: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh = models.smollm2(torch.bfloat16)
    assert fresh.directory.is_relative_to(tmp_path)
    assert os.listdir(fresh.directory.parent) == [fresh.directory.name]
    assert fresh.model.dtype == torch.bfloat16
    weight, expected = fresh.model.lm_head.weight, smollm2.model.lm_head.weight
    assert torch.equal(weight, expected.to(torch.bfloat16))
    for text in (SYSTEM, "in   1024"):
        assert fresh.encode(text) == smollm2.encode(text)


# ---- where converted models live ----


def test_converted_models_live_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_directory() == tmp_path / "kvstore" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_directory() == Path.home() / ".cache" / "kvstore" / "models"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(fresh: Path) -> None:
        (fresh / "half").write_text("")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        models.publish(tmp_path / "model", build)
    assert os.listdir(tmp_path) == []


def test_a_build_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    def build(fresh: Path) -> None:
        assert not (tmp_path / "model").exists()
        (fresh / "weights").write_text("mine")

    assert models.publish(tmp_path / "model", build) == tmp_path / "model"
    assert (tmp_path / "model" / "weights").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


def test_what_is_published_is_not_built_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    models.publish(tmp_path / "model", lambda fresh: pytest.fail("built again"))


def test_of_two_that_build_at_once_the_first_to_end_wins(tmp_path: Path) -> None:
    def build(fresh: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights").write_text("theirs")
        (fresh / "weights").write_text("mine")

    models.publish(tmp_path / "model", build)
    assert (tmp_path / "model" / "weights").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["model"]


# ---- random models ----


def test_a_random_model_is_its_seed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = models.random_llama(5).lm_head.weight
    torch.manual_seed(2)
    assert torch.equal(one, models.random_llama(5).lm_head.weight)
    assert not torch.equal(one, models.random_llama(6).lm_head.weight)
    assert torch.equal(one.to(torch.bfloat16), models.random_llama(5, dtype=torch.bfloat16).lm_head.weight)


def test_building_a_random_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    models.random_llama(5)
    assert torch.equal(torch.rand(4), expected)


def test_a_random_model_has_the_shape_asked_for() -> None:
    model = models.random_llama(0, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=32, vocab_size=97)
    cache = DynamicCache(config=model.config)
    logits = model(torch.tensor([[1, 2, 3]]), past_key_values=cache).logits
    assert logits.shape == (1, 3, 97)
    shapes = [layer.keys.shape for layer in cache.layers]  # type: ignore[union-attr]
    assert shapes == [(1, 4, 3, 32)] * 3


def test_a_random_model_notices_one_wrong_token_in_its_cache() -> None:
    changed = 0
    for seed in range(10):
        model = models.random_llama(seed)
        ids = torch.randint(0, 256, (1, 96), generator=torch.Generator().manual_seed(seed)).tolist()[0]
        wrong = [*ids[:40], (ids[40] + 1) % 256, *ids[41:]]
        right = continued(model, ids, 16)
        assert continued(model, ids, 16, reused=64) == right
        changed += continued(model, ids, 16, reused=64, cached=wrong) != right
    assert changed >= 9
