# SPDX-License-Identifier: Apache-2.0
"""What lossy blocks do to a real model's answers: perplexity, logits, and what it says by itself.

    python -m bench lossy --json FILE

For each document of real text the model computes a prefix once. Its KV is stored in a namespace of each format and
loaded again through a connector, as any request would; then the model goes on over it: over the text that follows
(perplexity, logits) and by itself, greedily. The reference goes on over the KV that was never moved, in one batch with
the others, so exact blocks must agree with it in every bit: that arm is the control. Arm `chunked` moves nothing and
computes the prefix in pieces, as engines do: what rounding alone does to the same figures. nvfp4 is emulated: its
bytes are those of the format, and attention runs over what they decode to.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LlamaForCausalLM

from bench.asked import print_figures
from bench.env import stamp
from bench.models import SMOLLM2_NAME, smollm2
from bench.options import whole
from bench.record import Scalar, write_json
from bench.workload import documents
from connectors.base import LoadRule
from connectors.transformers import TransformersConnector
from connectors.transformers_cache import BlockCache
from kvstore.block import Chain, Root
from kvstore.config import StoreConfig
from kvstore.lossy import FORMATS, drift
from kvstore.store import KVStore

HELP = "what fp8 and nvfp4 blocks do to a real model: perplexity, logit drift, greedy agreement"

EXACT = "exact"
CHUNKED = "chunked"
STORED = (EXACT, *FORMATS)
ARMS = (CHUNKED, *STORED)
_CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Text:
    """A prefix that is stored and loaded, and the text that follows it."""

    name: str
    prefix: tuple[int, ...]
    follows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model made of a prefix: logits `[followed, vocabulary]` over the text that follows, and its own words."""

    logits: torch.Tensor
    words: tuple[int, ...]


class Rig:
    """One model, a store, and a connector for each arm."""

    def __init__(self, model: LlamaForCausalLM, revision: str, *, block_tokens: int, capacity_bytes: int) -> None:
        self.model = model
        self.store = KVStore(StoreConfig.load({"host": {"capacity_bytes": capacity_bytes}}, environ={}))
        self.connectors = {
            arm: TransformersConnector(
                model,
                self.store,
                revision=revision,
                block_tokens=block_tokens,
                lossy="" if arm == EXACT else arm,
                resident_conversations=0,
                load_rule=LoadRule.ALWAYS,
            )
            for arm in STORED
        }

    def compute(self, text: Text, chunk_tokens: int = 0) -> BlockCache:
        """The prefix's KV as computed, in one pass or in chunks."""
        cache = BlockCache(self.connectors[EXACT].layout, self.model.device, len(text.prefix))
        prefix, step = torch.tensor([text.prefix]), chunk_tokens or len(text.prefix)
        with torch.no_grad():
            for start in range(0, len(text.prefix), step):
                self.model.base_model(prefix[:, start : start + step], past_key_values=cache, use_cache=True)
        return cache

    def reload(self, arm: str, text: Text, computed: BlockCache) -> BlockCache:
        """The prefix as stored and loaded by `arm`. Raises RuntimeError where it was not loaded whole."""
        connector = self.connectors[arm]
        chain = Chain(Root(connector.model_id), text.prefix)
        view = computed.seen_as(connector.layout)
        with self.store.save(chain, 0, len(chain)) as save:
            view.read_blocks(save.open_run())
            view.finish()
            save.commit()
        before = self._hits()
        _, cache = connector.prefill(torch.tensor([text.prefix + text.follows[:1]]))
        loaded = self._hits() - before
        if loaded != len(chain):
            raise RuntimeError(f"{loaded} of {len(chain)} blocks were loaded ({arm}, {text.name})")
        return cache

    def _hits(self) -> int:
        return int(self.store.stats().get("host.hit_blocks", 0))

    def go_on(self, text: Text, caches: Sequence[BlockCache], num_words: int) -> list[Answer]:
        """The answers over each cache's prefix: all in one batch, so that they differ by their caches alone."""
        length = len(text.prefix)
        follows = torch.tensor([text.follows[:-1]] * len(caches))
        with torch.no_grad():
            logits = self.model(follows, past_key_values=_stacked(caches, length), use_cache=True).logits
            again = _stacked(caches, length)
            tokens, words = follows[:, :1], []
            for _ in range(num_words):
                last = self.model(tokens, past_key_values=again, use_cache=True).logits[:, -1]
                tokens = last.argmax(-1, keepdim=True)
                words.append(tokens[:, 0].tolist())
        return [Answer(logits[at].float(), tuple(word[at] for word in words)) for at in range(len(caches))]


def _stacked(caches: Sequence[BlockCache], length: int) -> DynamicCache:
    """The first `length` tokens of several caches as one of as many sequences."""
    stacked = DynamicCache()
    for layer in range(len(caches[0].layers)):
        planes = [cache.planes(layer) for cache in caches]
        keys, values = (torch.cat([pair[kv][:, :, :length] for pair in planes]) for kv in (0, 1))
        stacked.update(keys, values, layer)
    return stacked


def compare(text: Text, wanted: Answer, got: Answer) -> dict[str, float | int]:
    """One document's figures of one arm.

    nll: nats a token over the text that follows. drift: ‖difference of logits‖ ÷ ‖logits‖, mean over tokens. kl: mean
    nats from the reference's distribution to the arm's. top1: share of tokens with the same first choice. agree: share
    of the model's own words that are the reference's; agree_run: those before the first that is not.
    """
    targets = torch.tensor(text.follows[1:])
    ours, theirs = got.logits.log_softmax(-1), wanted.logits.log_softmax(-1)
    same = [a == b for a, b in zip(wanted.words, got.words, strict=True)]
    away = (got.logits - wanted.logits).norm(dim=-1) / wanted.logits.norm(dim=-1)
    return {
        "tokens": len(targets),
        "nll": -ours.gather(1, targets[:, None]).mean().item(),
        "drift": away.mean().item(),
        "drift_max": away.max().item(),
        "kl": (theirs.exp() * (theirs - ours)).sum(-1).mean().item(),
        "top1": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        "agree": sum(same) / len(same),
        "agree_run": same.index(False) if False in same else len(same),
    }


def error_of(computed: BlockCache, num_blocks: int, name: str) -> float:
    """RMS of what `name` does to a prefix's KV, over the RMS of its values."""
    blocks = torch.stack([computed.block(index) for index in range(num_blocks)])
    return drift(blocks, name).relative_rms


def measure(
    rig: Rig, texts: Sequence[Text], num_words: int, block_tokens: int, chunk_tokens: int = _CHUNK_TOKENS
) -> list[dict[str, object]]:
    """A row a document and arm."""
    rows: list[dict[str, object]] = []
    for text in texts:
        computed = rig.compute(text)
        caches = [computed, rig.compute(text, chunk_tokens)]
        caches += [rig.reload(arm, text, computed) for arm in STORED]
        wanted, *answers = rig.go_on(text, caches, num_words)
        num_blocks = len(text.prefix) // block_tokens
        errors = {name: error_of(computed, num_blocks, name) for name in FORMATS}
        for arm, answer in zip(("reference", *ARMS), (wanted, *answers), strict=True):
            found = compare(text, wanted, answer)
            rows.append({"document": text.name, "arm": arm, **found, "kv_relative_rms": errors.get(arm, 0.0)})
        print(
            f"{text.name}: " + ", ".join(f"{row['arm']} {row['nll']:.4f}" for row in rows[-len(ARMS) - 1 :]), flush=True
        )
    return rows


def summarize(rows: Sequence[dict[str, object]], rig: Rig) -> dict[str, Scalar]:
    """Named figures: means over documents, each of as many tokens as the others."""

    def column(arm: str, name: str) -> list[float]:
        return [float(str(row[name])) for row in rows if row["arm"] == arm]

    mean = statistics.fmean
    reference = math.exp(mean(column("reference", "nll")))
    summary: dict[str, Scalar] = {
        "documents": len(column("reference", "nll")),
        "scored_tokens": int(sum(column("reference", "tokens"))),
        "perplexity_reference": reference,
        "exact_equal": max(column(EXACT, "drift_max")) == 0.0 and min(column(EXACT, "agree")) == 1.0,
    }
    exact_bytes = rig.connectors[EXACT].layout.block_bytes
    for arm in FORMATS:
        summary[f"{arm}_bytes_share"] = rig.connectors[arm].layout.block_bytes / exact_bytes
        summary[f"{arm}_kv_relative_rms"] = mean(column(arm, "kv_relative_rms"))
    for arm in ARMS:
        perplexity = math.exp(mean(column(arm, "nll")))
        summary |= {
            f"{arm}_perplexity": perplexity,
            f"{arm}_perplexity_change_pct": 100 * (perplexity / reference - 1),
            f"{arm}_logit_drift": mean(column(arm, "drift")),
            f"{arm}_logit_drift_max": max(column(arm, "drift_max")),
            f"{arm}_kl_nats": mean(column(arm, "kl")),
            f"{arm}_top1_share": mean(column(arm, "top1")),
            f"{arm}_greedy_agreement": mean(column(arm, "agree")),
            f"{arm}_greedy_run_tokens_mean": mean(column(arm, "agree_run")),
            f"{arm}_greedy_run_tokens_min": min(column(arm, "agree_run")),
        }
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in summary.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench lossy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=whole(1, 64), default=6, help="of the language reference (default 6)")
    parser.add_argument("--prefix", type=whole(64, 4096), default=1024, help="tokens stored and loaded (default 1024)")
    parser.add_argument("--tokens", type=whole(8, 1024), default=256, help="scored, and spoken, after it (default 256)")
    parser.add_argument("--json", metavar="FILE", help="write {name, env, rows, summary}")
    options = parser.parse_args(argv)
    block_tokens = 64
    if options.prefix % block_tokens:
        parser.error(f"--prefix must be a multiple of {block_tokens}")
    chat = smollm2(torch.bfloat16)
    cut = documents(chat.encode, options.prefix + options.tokens + 1)[: options.documents]
    if len(cut) < options.documents:
        parser.error(f"the language reference fills {len(cut)} such documents, not {options.documents}")
    texts = [Text(one.name, one.token_ids[: options.prefix], one.token_ids[options.prefix :]) for one in cut]
    rig = Rig(chat.model, chat.revision, block_tokens=block_tokens, capacity_bytes=1 << 30)
    rows = measure(rig, texts, options.tokens, block_tokens)
    summary = summarize(rows, rig)
    rig.store.close()
    env = stamp()
    env["model"], env["model_revision"] = SMOLLM2_NAME, chat.revision
    env["text_sha256"] = hashlib.sha256(repr([text.prefix + text.follows for text in texts]).encode()).hexdigest()
    if options.json:
        write_json(options.json, "lossy", env, rows, summary)
    print_figures("lossy-cpu", summary)
    return 0 if summary["exact_equal"] else 1
