# SPDX-License-Identifier: Apache-2.0
"""What runs of a real vLLM engine stand on: a model with its reference, a store with faults, an engine, a fork.

The reference is Hugging Face transformers on the same weights: its greedy tokens, and its keys and values. A random
model may stay "equal" on wrong bytes, so stored blocks are compared with what transformers computes, and controls
spoil them. Imported once by `vllm_runs`, which forks: nothing here may start a thread when it is imported.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Wherever there is room; that it is one thread is said before this process begins, see `runner`.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from transformers import AutoModelForCausalLM

from bench.models import random_llama
from connectors import vllm_link
from kvstore.api import Match
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.errors import TierUnavailable
from kvstore.store import KVStore
from kvstore.transfer import to_tensor

BLOCK = 32
PROMPT, NEW = 300, 84  # together 12 blocks: the last token, which has no KV, ends a block
Facts = dict[str, Any]
Media = Sequence[tuple[int, bytes]]


# -- the model and its reference -------------------------------------------------------------------------------


class Reference:
    """A model on disk, by default a small random Llama, and what transformers makes of it."""

    def __init__(self, workdir: Path, directory: Path | None = None, *, num_kv_heads: int = 2) -> None:
        self.directory = directory or workdir / f"llama-{num_kv_heads}"
        if directory is not None:
            self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
            return
        self.model = random_llama(7, num_layers=3, num_heads=4, num_kv_heads=num_kv_heads, head_dim=32, max_tokens=4096)
        if not self.directory.is_dir():
            self.model.save_pretrained(self.directory)

    def generate(self, prompt: Sequence[int], new: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                eos_token_id=None,
                do_sample=False,
            )
        return [int(token) for token in out[0, len(prompt) :]]

    def kv(self, tokens: Sequence[int]) -> torch.Tensor:
        """[layers, kv, tokens, heads, dim] of a sequence."""
        with torch.no_grad():
            cache = self.model(torch.tensor([list(tokens)]), use_cache=True).past_key_values
        return torch.stack(
            [torch.stack([layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)]) for layer in cache.layers]
        )


def tokens_of(seed: int, count: int = PROMPT) -> list[int]:
    """Random tokens in which pieces come again, so that n-grams find something to propose."""
    generator = torch.Generator().manual_seed(seed)
    piece = torch.randint(1, 250, (count // 3,), generator=generator)
    return torch.cat([piece, piece, torch.randint(1, 250, (count - 2 * len(piece),), generator=generator)]).tolist()


# -- the store, with faults ------------------------------------------------------------------------------------


class FaultyStore(KVStore):
    """The real store with faults on demand.

    Attributes:
        unsettled: matches that say, so many times, that lower tiers were not heard yet.
        slow_s: how long each loaded block takes; ends_at: block at which loads end; breaks: loads raise.
        lies: loads say that their bytes may have changed.
        spoils: loads bring numbers that are not the tokens', for controls where chains are not known.
    """

    def __init__(self) -> None:
        super().__init__(StoreConfig.load({"host": {"capacity_bytes": "64MiB", "prefault": False}}, environ={}))
        self.unsettled = 0
        self.slow_s = 0.0
        self.ends_at: int | None = None
        self.breaks = False
        self.lies = False
        self.spoils = False
        self.num_matches = 0

    def match(self, *args: Any, **kwargs: Any) -> Match:
        self.num_matches += 1
        found = super().match(*args, **kwargs)
        if self.unsettled:
            self.unsettled -= 1
            return Match(found.num_blocks, found.num_host_blocks, 0, False, found.tiers)
        return found

    def load(self, request: str, num_blocks: int | None = None, *, start: int = 0, partial_tokens: int = 0) -> Any:
        if self.breaks:
            raise TierUnavailable("test", "breaks")
        return _FaultyLoad(self, super().load(request, num_blocks, start=start, partial_tokens=partial_tokens))


class _FaultyLoad:
    def __init__(self, store: FaultyStore, load: Any) -> None:
        self._store, self._load = store, load

    def __iter__(self) -> Iterator[Any]:
        for block in self._load:
            if block.index == self._store.ends_at:
                return
            time.sleep(self._store.slow_s)
            if self._store.spoils:
                generator = torch.Generator().manual_seed(block.index)
                for slot, view in zip(block.slots, block.views, strict=True):
                    numbers = torch.randn(len(view) // 4, generator=generator)
                    self._store.arena.view(slot, len(view))[:] = numbers.numpy().tobytes()
            yield block

    def intact(self) -> bool:
        return not self._store.lies and self._load.intact()

    def close(self) -> None:
        self._load.close()

    def __enter__(self) -> _FaultyLoad:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- the engine ------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """Of one request: its tokens, prompt tokens that were cached, steps of its first and of its last token."""

    tokens: list[int] = field(default_factory=list)
    hits: int = 0
    began_at: int = 0
    ended_at: int = 0


PATIENT = {"call_deadline_ms": 10_000, "match_deadline_ms": 10_000}
"""Where a late answer would fail a test."""


class Engine:
    """A vLLM engine in this process over a store that outlives it."""

    def __init__(
        self,
        directory: Path,
        store: FaultyStore | None,
        *,
        extra: Mapping[str, Any] | None = None,
        transfer: Mapping[str, Any] | None = None,
        role: str = "kv_both",
        **options: Any,
    ):
        """`transfer` is vLLM's setting of another connector, instead of ours. Without `store`, what `extra` says."""
        from vllm import LLM

        self.has_connector = store is not None or bool(extra)
        place: dict[str, Any] = {}
        if store is not None:
            place = {"embedded": f"test-{id(store)}"}
            vllm_link.EMBEDDED.take(place["embedded"], lambda: store)
        ours = {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "connectors.vllm",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "block_tokens": BLOCK,
                "load_rule": "always",
                **PATIENT,
                **place,
                **(extra or {}),
            },
        }
        settings = {
            "dtype": "float32",
            "block_size": 32,
            "max_num_batched_tokens": 2048,
            "kv_cache_memory_bytes": 32 << 20,
            "max_num_seqs": 4,
            "max_model_len": 2048,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            **options,
        }
        self.llm = LLM(
            str(directory),
            seed=0,
            disable_log_stats=False,
            kv_transfer_config=transfer or (ours if self.has_connector else None),
            **settings,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], new: int = NEW, **options: Any
    ) -> tuple[list[list[int]], list[int]]:
        """(new tokens, cached prompt tokens) of each prompt. `says`: what the requests say to the store."""
        from vllm import SamplingParams

        lora, says = options.pop("lora_request", None), options.pop("says", None)
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        if says is not None:
            params.extra_args = {"kv_transfer_params": {"kvstore": says}}
        inputs = [{"prompt_token_ids": list(prompt), **options} for prompt in prompts]
        outs = self.llm.generate(inputs, params, use_tqdm=False, lora_request=lora)
        self.settle()
        self.ttft_s = max(float(out.metrics.first_token_latency) for out in outs)
        return [list(out.outputs[0].token_ids) for out in outs], [int(out.num_cached_tokens) for out in outs]

    def answer(self, prompt: Mapping[str, Any], new: int = NEW) -> tuple[list[int], int]:
        """(new tokens, cached prompt tokens) of a prompt in vLLM's own terms."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        (out,) = self.llm.generate([dict(prompt)], params, use_tqdm=False)
        self.settle()
        return list(out.outputs[0].token_ids), int(out.num_cached_tokens)

    def together(
        self, prompts: Sequence[Sequence[int]], new: int = NEW, *, abort_at: int | None = None
    ) -> list[Answer]:
        """Answers to prompts that arrive before the same step; the first is aborted before step `abort_at`."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        engine = self.llm.llm_engine
        answers = {str(number): Answer() for number in range(len(prompts))}
        for name, prompt in zip(answers, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        step = 0
        while engine.has_unfinished_requests():
            step += 1
            assert step < 5000, (
                f"after {step} steps there are {[r.status.name for r in self.scheduler.requests.values()]}"
            )
            if step == abort_at:
                engine.abort_request(["0"])
            for out in engine.step():
                answer = answers[str(out.request_id).split("-")[0]]
                answer.tokens = list(out.outputs[0].token_ids)
                answer.began_at = answer.began_at or step
                if out.finished:
                    answer.ended_at, answer.hits = step, int(out.num_cached_tokens or 0)
        self.settle()
        return list(answers.values())

    def settle(self) -> None:
        """Step until nothing is left of requests that ended: what is saved at their end is copied after it."""
        for _ in range(2000):
            if not self.scheduler.requests and not self.scheduler.has_finished_requests():
                return
            self.llm.llm_engine.engine_core.engine_core.step_fn()
        raise AssertionError(f"the engine still holds {list(self.scheduler.requests)}")

    def forget(self) -> None:
        """Empty the engine's own prefix cache."""
        assert self.llm.reset_prefix_cache()

    def spoil_pages(self) -> None:
        """Have the pages of an engine of one process hold nobody's numbers: by chance a page is its own successor."""
        for tensor in self.worker._loads._pages._tensors:
            tensor.fill_(7)

    def metric(self, name: str) -> float:
        return sum(float(m.value) for m in self.llm.get_metrics() if m.name == name and hasattr(m, "value"))

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def connector(self) -> Any:
        return self.scheduler.connector

    @property
    def worker(self) -> Any:
        """The worker's side of the connector, where it is in this process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    @property
    def model_id(self) -> ModelId:
        return self.connector.model_id

    def close(self) -> list[str]:
        """Stop the engine; what its scheduler's side still held."""
        held = self.connector._scheduler.check() if self.has_connector else []
        self.llm.llm_engine.engine_core.shutdown()
        return held


# -- a fork ----------------------------------------------------------------------------------------------------


def in_fork(work: Callable[[], Facts], log: Path | None = None) -> Facts:
    """What `work` returns, run in a fork: all is imported already, and no engine meets another's leavings.

    `log` takes what it prints. Raises RuntimeError where it dies.
    """
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "facts"
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if log is not None:
                    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(target, 1)
                    os.dup2(target, 2)
                torch.set_grad_enabled(False)
                gc.unfreeze = lambda: None  # type: ignore[assignment]  # as an engine ends it would, see `_import_all`
                answer.write_text(json.dumps(work()))
                code = 0
            except BaseException:  # noqa: BLE001  # a fork must not go on in its parent's place
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError(f"a run ended with {os.waitstatus_to_exitcode(status)}")
        return dict(json.loads(answer.read_text()))


# -- looking into the store ------------------------------------------------------------------------------------


def stored(
    store: Any,
    model: ModelId,
    tokens: Sequence[int],
    *,
    salt: bytes = b"",
    adapter: bytes = b"",
    media: Media = (),
) -> Iterator[tuple[int, Any]]:
    """(index, block) of what the store holds of a sequence."""
    chain = Chain(Root(model, salt=salt, adapter=adapter), list(tokens), media=media)
    found = store.match(chain, "look", wait_s=5)
    with KVStore.load(store, "look", found.num_blocks) if isinstance(store, KVStore) else store.load("look") as load:
        for block in load:
            yield block.index, block


def bytes_of(store: Any, model: ModelId, tokens: Sequence[int], *, adapter: bytes = b"") -> dict[int, list[bytes]]:
    """What the store holds of a sequence, by block: for KV that no other engine computes."""
    found = stored(store, model, tokens, adapter=adapter)
    return {index: [bytes(view) for view in block.views] for index, block in found}


def worst_error(
    store: Any,
    model: ModelId,
    reference: Reference,
    tokens: Sequence[int],
    *,
    salt: bytes = b"",
    ids: Sequence[int] | None = None,
    media: Media = (),
) -> tuple[float, int]:
    """(largest difference between stored and recomputed KV, number of blocks compared).

    `ids`: under which the blocks lie, with `media`, where those are not the tokens that were computed.
    """
    want = reference.kv(tokens)
    worst, count, block_tokens = 0.0, 0, model.block_tokens
    layout = store.open(model)
    for index, block in stored(store, model, tokens if ids is None else ids, salt=salt, media=media):
        for part, view in zip(layout.parts, block.views, strict=True):
            has = to_tensor(view, part, want.dtype)
            mine = want[
                part.layers.start : part.layers.stop,
                :,
                index * block_tokens : (index + 1) * block_tokens,
                part.heads.start : part.heads.stop,
            ]
            worst = max(worst, float((has - mine).abs().max()))
        count += 1
    return worst, count


def poison(
    store: Any,
    model: ModelId,
    tokens: Sequence[int],
    *,
    salt: bytes = b"",
    adapter: bytes = b"",
    media: Media = (),
) -> None:
    """Store KV under these tokens that is not theirs: right sizes and sums, wrong numbers."""
    store.open(model)
    store.clear()
    chain = Chain(Root(model, salt=salt, adapter=adapter), list(tokens), media=media)
    generator = torch.Generator().manual_seed(99)
    with store.save(chain, 0, len(chain)) as save:
        for index in save.indices:
            for view in save.views(index):
                numbers = torch.randn(len(view) // 4, generator=generator)
                view[:] = numbers.numpy().tobytes()
        assert save.commit() == len(chain)
