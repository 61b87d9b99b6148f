# SPDX-License-Identifier: Apache-2.0
"""Images in a real engine: what a prompt shows is part of which KV it is, though its token ids do not say it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.engines.vllm_support import NEW, Engine, Facts, FaultyStore, tokens_of

_VOCABULARY = 256
_SIDE, _QUERIES = 28, 8
"""Pixels of an image, and tokens that it becomes, which come before the text."""


def images(workdir: Path) -> Facts:
    """One text under two images, twice each, and then under the first one's pixels in another object."""
    from PIL import Image

    store = FaultyStore()
    engine = Engine(_model(workdir / "blip2"), store, skip_tokenizer_init=False, extra={"model": "b", "revision": "1"})
    red, blue = (Image.new("RGB", (_SIDE, _SIDE), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    facts: Facts = {"hits": [], "answers": [], "num_blocks": []}

    def ask(image: Image.Image) -> tuple[list[list[int]], list[int]]:
        engine.forget()
        return engine.generate([tokens_of(1)], multi_modal_data={"image": image})

    for image in (red, blue, red, blue, red.copy()):
        answers, hits = ask(image)
        facts["hits"].append(hits[0])
        facts["answers"].append(answers[0])
        facts["num_blocks"].append(store.stats()["host.blocks"])
    first, second, *again = facts["answers"]
    facts["equal"] = [answer == want for answer, want in zip(again, (first, second, first), strict=True)]
    store.spoils = True  # which chain an image's is only vLLM knows
    facts["control_differs"] = ask(red)[0][0] != first
    return {**facts, "num_tokens": _QUERIES + len(tokens_of(1)) + NEW, "held": engine.close(), "check": store.check()}


def _model(directory: Path) -> Path:
    """A small random BLIP-2: of the models with images that vLLM has, one that runs without torchvision."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
        PreTrainedTokenizerFast,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**small, image_size=_SIDE, patch_size=14).to_dict(),
        qformer_config=Blip2QFormerConfig(**small, vocab_size=_VOCABULARY, encoder_hidden_size=32).to_dict(),
        text_config=OPTConfig(
            vocab_size=_VOCABULARY,
            hidden_size=128,
            ffn_dim=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=2048,
            word_embed_proj_dim=128,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        ).to_dict(),
        num_query_tokens=_QUERIES,
        image_token_index=_VOCABULARY - 1,
    )
    Blip2ForConditionalGeneration(config).float().save_pretrained(directory)
    words = {**{f"t{number}": number for number in range(_VOCABULARY - 1)}, "<image>": _VOCABULARY - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")),
        unk_token="t0",
        pad_token="t0",
        additional_special_tokens=["<image>"],
    )
    looks = BlipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    Blip2Processor(image_processor=looks, tokenizer=tokenizer, num_query_tokens=_QUERIES).save_pretrained(directory)
    return directory
