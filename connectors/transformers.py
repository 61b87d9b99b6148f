# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers (5 and later): `generate` and plain forward passes that reuse stored prefixes.

    connector = TransformersConnector(model, store, revision="<commit of the weights>")
    done = connector.generate(input_ids, max_new_tokens=64, conversation="chat-17")
    done.sequences, done.ttft_s, done.hit_tokens

Stored blocks are copied straight into a preallocated cache, the rest of the prompt runs in chunks, and blocks
are saved as they fill, decoded ones included. A conversation's next turn goes on in the cache that its last one
ended with, where that is still there (`connectors.transformers_kept`). At most all but the last prompt token is
reused: with the whole prompt cached, `generate` returns wrong tokens without an error. One sequence at a time.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from connectors.base import Conversations, CostModel, FailOpen, LoadRule
from connectors.session import Connection, Session
from connectors.transformers_cache import BlockCache
from connectors.transformers_identity import model_id_of
from connectors.transformers_kept import KeptCaches
from kvstore.api import NO_HINT, Hint, LendsMemory, Registration, Store
from kvstore.block import Chain, Root
from kvstore.config import parse_bytes
from kvstore.device import DeviceOverlay
from kvstore.errors import ConfigError
from kvstore.layout import layout_of
from kvstore.pinning import CudaPins, Pinned, pin
from kvstore.transfer import Streams

log = logging.getLogger("kvstore.transformers")

_MAX_WARM_UP_S = 20.0
"""A start waits so long for kernels at most; Triton keeps on disk what it compiled, for the starts after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a `generate` returned, and what it cost.

    Attributes:
        sequences: `[1, prompt + new]` token ids, as from `model.generate`.
        ttft_s: from the call to the first new token, matching and loading included; load_s: that part of it.
        hit_tokens: prompt tokens reused, by tier; their sum is at most prompt_tokens − 1.
        in_place_tokens: those of the device's that were there already, in the cache that an earlier turn ended with.
        loaded_bytes: bytes that the others took; saved_blocks: blocks added to the store.
    """

    sequences: torch.Tensor
    ttft_s: float
    total_s: float
    load_s: float
    prompt_tokens: int
    new_tokens: int
    hit_tokens: Mapping[str, int]
    in_place_tokens: int
    loaded_bytes: int
    saved_blocks: int


class _OnToken(StoppingCriteria):
    """Called by `generate` after each new token: times the first one, saves the blocks that the others fill."""

    def __init__(self, session: Session, chain: Chain, prompt_tokens: int) -> None:
        self.first_s = 0.0
        self._session = session
        self._chain = chain
        self._seen = prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        num_tokens = input_ids.shape[1]
        fresh = input_ids[0, self._seen :].tolist()  # waits for the device: the token is there now
        if not self.first_s:
            self.first_s = time.perf_counter()
        self._chain.extend(fresh)
        self._seen = num_tokens
        # The newest token has not run through the model: its KV does not exist yet.
        self._session.computed(num_tokens - 1)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class TransformersConnector:
    """Prefix reuse for one loaded model.

    Args:
        model: a decoder-only model in evaluation mode, on one device.
        store: where blocks come from and go to; None keeps them on the device alone.
        revision: see `model_id_of`; it must identify the weights.
        block_tokens: tokens a block, a power of two.
        chunk_tokens: tokens a forward pass during prefill; blocks are saved after each. Fewer let others reuse a long
            prompt sooner and cost time: 512 made a prefill of 2,000 tokens on a CPU 5–16 % slower than one pass.
        adapter: content digest of the active LoRA adapter; required where one is loaded.
        salt: keeps tenants apart: what one saves, another with a different salt does not find.
        secret: keys block ids, so that nobody without it can guess them from prompts.
        part_layers, part_heads: the part grid; 0 means all, and fits engines without parallelism.
        lossy: format of stored blocks, such as `fp8`: half the bytes, and answers that may differ. Empty for exact.
        device_budget_bytes: memory for blocks kept on the device, above the store, as a number or a size such as
            "4GiB"; 0 for none.
        resident_conversations: so many requests leave their cache as it is, and the one that goes on from there is
            computed in it, with nothing copied: a conversation's next turn, or any prompt that begins like most of it.
            This is device memory beyond the budget, for each connector: a cache has the size of the longest request
            that it served, and a quarter. With 0 caches are kept for their memory alone, as many as requests overlap,
            two at most.
        step_layers: on a device, layers of a load that a forward pass waits for together; 0 for all of them.
            From the device tier this is the first step alone; those after it grow.
        step_bytes: of a load from the store, a step has as many layers more as are no more than so many bytes: the
            default is what a window of the copies takes, and each window costs the thread that is to order the pass
            some 0.3 ms: on an H100, 256 MiB by 16 layers were 3.7 ms sooner than by 4.
        max_wait_s: longest wait for an answer of lower tiers.
        load_rule: load where it is predicted to pay, or always.
        streams: the device's; a test brings its own, and then gets a device's path on the CPU too.

    Raises ConfigError for a model whose cache cannot be cut into blocks, and what `store.open` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: Store | None,
        *,
        revision: str,
        block_tokens: int = 64,
        chunk_tokens: int = 4096,
        adapter: bytes = b"",
        salt: bytes = b"",
        secret: bytes = b"",
        part_layers: int = 0,
        part_heads: int = 0,
        lossy: str = "",
        device_budget_bytes: int | str = 0,
        resident_conversations: int = 2,
        step_layers: int = 4,
        step_bytes: int = 128 << 20,
        max_wait_s: float = 0.25,
        load_rule: LoadRule = LoadRule.MEASURED,
        streams: Streams | None = None,
    ) -> None:
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {chunk_tokens}: it must be at least 1")
        if resident_conversations < 0:
            raise ConfigError(f"resident_conversations is {resident_conversations}: it must be 0 or more")
        if step_layers < 0:
            raise ConfigError(f"step_layers is {step_layers}: it must be 0 or more")
        if step_bytes < 0:
            raise ConfigError(f"step_bytes is {step_bytes}: it must be 0 or more")
        if getattr(model, "_hf_peft_config_loaded", False) and not adapter:
            raise ConfigError("the model has an adapter loaded: give its content digest as adapter=")
        self.model = model
        self._device = model.device  # walks through modules each time it is asked
        self._generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
        # The head over a chunk of 4,096 tokens costs a gigabyte for one row that is used.
        takes_one = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only: dict[str, int] = {"logits_to_keep": 1} if takes_one else {}
        self.model_id = model_id_of(
            model,
            revision=revision,
            block_tokens=block_tokens,
            part_layers=part_layers,
            part_heads=part_heads,
            lossy=lossy,
        )
        self.layout = layout_of(self.model_id) if store is None else store.open(self.model_id)
        self.overlay: DeviceOverlay | None = None
        if budget_bytes := parse_bytes(device_budget_bytes, "device_budget_bytes"):
            self.overlay = DeviceOverlay(self.layout, model.device, budget_bytes)
        self.cost = CostModel(block_tokens, self.layout.block_bytes, rule=load_rule)
        self.fail_open = FailOpen()
        # In the background: requests do not wait for it, their copies are only slower until it is done.
        self.pinned: Pinned | None = None
        self._registration: Registration | None = None
        if model.device.type == "cuda":
            self._registration = self._register(store)
        self._chunk_tokens = chunk_tokens
        self._step_layers, self._step_bytes = step_layers, step_bytes
        self._streams = streams
        self._connection = Connection(
            store=store,
            overlay=self.overlay,
            cost=self.cost,
            fail_open=self.fail_open,
            max_wait_s=max_wait_s,
        )
        self._conversations = Conversations(Root(self.model_id, adapter, salt, secret))
        self.kept = KeptCaches(resident_conversations, self._new_cache)
        if model.device.type == "cuda":
            self._warm_up()

    def _warm_up(self) -> None:
        """Have the copies' kernels compiled before a request has to wait for them."""
        began_s = time.perf_counter()
        thread = threading.Thread(target=self._copy_once, name="kvstore-warm-up", daemon=True)
        thread.start()
        thread.join(_MAX_WARM_UP_S)
        if thread.is_alive():
            log.warning(
                "the kernels of copies are not ready after %.0f s: going on, and a first request may wait for them",
                _MAX_WARM_UP_S,
            )
        else:
            log.info("the kernels of copies were made ready in %.1f s", time.perf_counter() - began_s)

    def _copy_once(self) -> None:
        try:
            cache = self._new_cache(self.model_id.block_tokens)
            cache.warm_up(rows=self.overlay is not None, slots=self._connection.store is not None)
        except Exception:  # the top of a thread; a request that fails in the same way is served without reuse
            log.exception("a first copy between the cache and the store's memory failed")

    def _register(self, store: object) -> Registration | None:
        return store.register_memory(self._pin) if isinstance(store, LendsMemory) else None

    def _pin(self, memory: memoryview) -> Pinned:
        self.pinned = pin(memory, runtime=CudaPins(self.model.device))
        return self.pinned

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        stopping_criteria: Sequence[StoppingCriteria] = (),
        streamer: BaseStreamer | None = None,
        hint: Hint = NO_HINT,
        request: str | None = None,
        conversation: str = "",
    ) -> Generation:
        """`model.generate` for one sequence, reusing and saving its prefix.

        Args:
            input_ids: the whole prompt, `[1, tokens]`.
            do_sample … pad_token_id: as in `model.generate`; None leaves the model's generation config to say.
            stopping_criteria, streamer: as in `model.generate`.
            hint: what eviction may use; request: an id for the store, made up if None.
            conversation: any id that all turns of a chat share; their common tokens are then hashed once.

        Raises ConfigError for a batch of more than one sequence. Never for anything the store does.
        """
        began_s = time.perf_counter()
        prompt = self._prompt(input_ids)
        num_tokens = prompt.shape[1]
        options = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "streamer": streamer,
        }
        chain = self._conversations.chain(conversation, input_ids[0].cpu().numpy())
        most_blocks = self.cost.max_blocks(num_tokens)
        cache, in_place = self.kept.take(chain, num_tokens + max_new_tokens, most_blocks, conversation)
        hint = replace(hint, prompt_tokens=num_tokens, conversation=hint.conversation or conversation)
        session = self._session(cache, chain, in_place, request, hint)
        try:
            computed = self._prefill_chunks(prompt, cache, session)
            beside = session.is_loading
            on_token = _OnToken(session, chain, num_tokens)
            last_s = time.perf_counter()
            with self._settling(prompt, cache, session):
                sequences = self._generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    past_key_values=cache,
                    max_new_tokens=max_new_tokens,
                    do_sample=do_sample,
                    num_beams=1,
                    num_return_sequences=1,
                    use_cache=True,
                    return_dict_in_generate=False,
                    stopping_criteria=StoppingCriteriaList([on_token, *stopping_criteria]),
                    **{name: value for name, value in options.items() if value is not None},
                )
            if not (beside and session.load_was_late):
                self.cost.seen_prefill(num_tokens - computed, computed, on_token.first_s - last_s)
        except torch.OutOfMemoryError:
            self.kept.shrink()
            raise
        finally:
            session.close()
            cache.wait_for_engine()  # of a request that failed something may be under way
            self.kept.give_back(cache, chain, session.sound_tokens, conversation)
        self._conversations.keep(conversation, chain, sequences[0].cpu().numpy())
        return Generation(
            sequences=sequences,
            ttft_s=on_token.first_s - began_s,
            total_s=time.perf_counter() - began_s,
            load_s=session.load_s,
            prompt_tokens=num_tokens,
            new_tokens=int(sequences.shape[1]) - num_tokens,
            hit_tokens=dict(session.hit_tokens),
            in_place_tokens=in_place * chain.block_tokens,
            loaded_bytes=session.loaded_bytes,
            saved_blocks=session.saved_blocks,
        )

    def prefill(
        self,
        input_ids: torch.Tensor,
        *,
        hint: Hint = NO_HINT,
        request: str | None = None,
        conversation: str = "",
        on_logits: Callable[[torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, BlockCache]:
        """Logits of the last prompt token, `[1, vocabulary]`, and the prompt's cache, which is the caller's.

        It may be the one that the conversation's last `generate` left here, which is then kept no more.

        `on_logits` gets the logits as soon as they are there; new blocks are saved after that.

        For forward passes of one's own: go on with `model(next_ids, past_key_values=cache)`.
        """
        prompt = self._checked(input_ids)
        num_tokens = prompt.shape[1]
        tokens = prompt[0].cpu().numpy()
        chain = self._conversations.chain(conversation, tokens)
        room, most_blocks = num_tokens + self.model_id.block_tokens, self.cost.max_blocks(num_tokens)
        cache, in_place = self.kept.part_with(chain, room, most_blocks, conversation)
        hint = replace(hint, prompt_tokens=num_tokens, conversation=hint.conversation or conversation)
        session = self._session(cache, chain, in_place, request, hint)
        try:
            computed = self._prefill_chunks(prompt, cache, session)
            beside, began_s = session.is_loading, time.perf_counter()
            with torch.no_grad():
                made = self.model(
                    self._there(prompt[:, computed:]), past_key_values=cache, use_cache=True, **self._last_only
                )
                if not session.settle():
                    made = self._again(prompt, cache, session)
                logits = made.logits[:, -1]
            cache.wait_for_engine()
            if not (beside and session.load_was_late):
                self.cost.seen_prefill(num_tokens - computed, computed, time.perf_counter() - began_s)
            if on_logits is not None:
                on_logits(logits)
            session.computed(num_tokens)
        except torch.OutOfMemoryError:
            self.kept.shrink()
            raise
        finally:
            session.close()
        self._conversations.keep(conversation, chain, tokens)
        return logits, cache

    def _session(self, cache: BlockCache, chain: Chain, in_place: int, request: str | None, hint: Hint) -> Session:
        return Session(
            self._connection,
            cache,
            chain,
            request or uuid.uuid4().hex,
            prompt_tokens=hint.prompt_tokens,
            in_place=in_place,
            hint=hint,
        )

    def _prefill_chunks(self, prompt: torch.Tensor, cache: BlockCache, session: Session) -> int:
        """Load what pays, then run all but the last chunk; returns the tokens in the cache.

        On a device the load may still be under way then: see `Session.settle`.
        """
        computed = session.load()
        cache.set_length(computed)
        session.announce(computed)
        return self._compute_chunks(prompt, cache, session, computed)

    def _compute_chunks(self, prompt: torch.Tensor, cache: BlockCache, session: Session, computed: int) -> int:
        """Run all but the last chunk of what follows `computed` tokens; returns the tokens in the cache.

        Chunks end at multiples of `chunk_tokens` wherever reuse ended, so that a token is computed in the same
        company as often as can be.
        """
        num_tokens = prompt.shape[1]
        while num_tokens - computed > self._chunk_tokens:
            stop = (computed // self._chunk_tokens + 1) * self._chunk_tokens
            beside, began_s = session.is_loading, time.perf_counter()
            with torch.no_grad():
                # Without the head: the logits of a chunk in the middle are of no use.
                self.model.base_model(self._there(prompt[:, computed:stop]), past_key_values=cache, use_cache=True)
            if not session.settle():
                computed = session.num_tokens
                cache.set_length(computed)
                continue
            cache.wait_for_engine()
            # A pass that waited for a load says nothing about its own time. Were every one over a load left out, who
            # finds something for each request would never come to know what computing takes, and load whatever it cost.
            if not (beside and session.load_was_late):
                self.cost.seen_prefill(stop - computed, computed, time.perf_counter() - began_s)
            session.computed(stop)
            computed = stop
        return computed

    def _again(self, prompt: torch.Tensor, cache: BlockCache, session: Session) -> CausalLMOutputWithPast:
        """Compute `prompt` over what is in place, after a load that turned out to be unsound; its last chunk's output.

        Straight to `forward`: whoever hooks the model sees one pass, as they would have without the load.
        """
        cache.set_length(session.num_tokens)
        computed = self._compute_chunks(prompt, cache, session, session.num_tokens)
        made: CausalLMOutputWithPast = self.model.forward(
            self._there(prompt[:, computed:]), past_key_values=cache, use_cache=True, **self._last_only
        )
        return made

    @contextmanager
    def _settling(self, prompt: torch.Tensor, cache: BlockCache, session: Session) -> Iterator[None]:
        """Have the load settled when the first pass of a `generate` is on its way, before it is seen by anybody.

        By a hook: what `generate` offers between the pass and the choice of a token comes after its own processors.
        """
        if not session.is_loading:
            yield
            return

        def settle(_model: object, _args: object, given: dict[str, object], _output: object) -> object:
            if given.get("past_key_values") is not cache or session.settle():
                return None
            return self._again(prompt[:, : cache.get_seq_length()], cache, session)

        hook = self.model.register_forward_hook(settle, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _prompt(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._there(self._checked(input_ids))

    def _there(self, ids: torch.Tensor) -> torch.Tensor:
        """On the model's device. Of a prompt from the host what is computed alone, for what is reused is not read."""
        return ids.to(self._device)

    @staticmethod
    def _checked(input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
            raise ConfigError(f"input_ids have shape {tuple(input_ids.shape)}: one sequence, [1, tokens], is served")
        return input_ids

    def _new_cache(self, num_tokens: int) -> BlockCache:
        return BlockCache(
            self.layout,
            self._device,
            num_tokens,
            step_layers=self._step_layers,
            step_bytes=self._step_bytes,
            streams=self._streams,
        )
