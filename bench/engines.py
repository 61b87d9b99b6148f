# SPDX-License-Identifier: Apache-2.0
"""Engines a benchmark can run, behind one seam.

An engine serves prompts one at a time in *arms*: the same model, each time with another cache below it. A new
engine is one file with a class like `TransformersEngine`, and a line in ENGINES.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from bench.models import ChatModel
from connectors.base import LoadRule
from connectors.transformers import TransformersConnector
from kvstore.api import Hint
from kvstore.config import StoreConfig
from kvstore.lower_tiers import NOT_CHECKED
from kvstore.registry import Registry
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer


@dataclass(frozen=True, slots=True)
class Served:
    """One request's outcome: output ids past the prompt, and what it took."""

    output: tuple[int, ...]
    ttft_s: float
    hit_tokens: Mapping[str, int]
    bytes_moved: int


class Arm(Protocol):
    """One cache configuration with state of its own."""

    def prepare(self) -> None:
        """Untimed work before the next request: let demotions finish, empty the host, and so on."""

    def serve(self, token_ids: np.ndarray, conversation: str, turn: int, max_new_tokens: int) -> Served: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Memory:
    """Budgets of the arms, in bytes."""

    device_bytes: int
    host_bytes: int
    redis_bytes: int


class Engine(Protocol):
    """A loaded model that can be put over any cache. `arms` names what it knows."""

    arms: Mapping[str, Callable[[], Arm]]

    def __init__(self, chat: ChatModel, memory: Memory) -> None: ...


class Recompute:
    """The engine as it comes: `model.generate` with its own cache, nothing kept between requests."""

    def __init__(self, chat: ChatModel) -> None:
        # transformers types `generate` for a protocol that its own models do not match.
        self._generate = cast(Callable[..., torch.Tensor], getattr(chat.model, "generate"))  # noqa: B009

    def prepare(self) -> None:
        pass

    def serve(self, token_ids: np.ndarray, conversation: str, turn: int, max_new_tokens: int) -> Served:
        first_s: list[float] = []

        class Stamp(StoppingCriteria):
            def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
                if not first_s:
                    first_s.append(time.perf_counter())
                return torch.zeros(1, dtype=torch.bool)

        began_s = time.perf_counter()
        prompt = torch.from_numpy(token_ids.astype(np.int64))[None]
        sequences = self._generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([Stamp()]),
        )
        return Served(tuple(sequences[0, len(token_ids) :].tolist()), first_s[0] - began_s, {}, 0)

    def close(self) -> None:
        pass


_ALL_CHATS = 64
"""As many as the workload may have."""


class Connected:
    """The engine through our connector, over a store or over a device cache alone.

    `residents` conversations go on in the cache that their last turn left. None do where an arm is about a tier below:
    every turn is to take its prefix from there.
    """

    def __init__(
        self, chat: ChatModel, store: KVStore | None, device_bytes: int, *, drop_host: bool = False, residents: int = 0
    ) -> None:
        self._store = store
        self._drop_host = drop_host
        # Always load: an arm is about its tier, and the plan has a benchmark of its own.
        self._connector = TransformersConnector(
            chat.model,
            store,
            revision=chat.revision,
            device_budget_bytes=device_bytes,
            resident_conversations=residents,
            load_rule=LoadRule.ALWAYS,
        )
        if store is not None:
            store.wait_ready()

    def prepare(self) -> None:
        if self._store is not None:
            self._store.flush(60)
            if self._drop_host:
                self._store.drop_host()

    def serve(self, token_ids: np.ndarray, conversation: str, turn: int, max_new_tokens: int) -> Served:
        done = self._connector.generate(
            torch.from_numpy(token_ids.astype(np.int64))[None],
            max_new_tokens=max_new_tokens,
            hint=Hint(turn=turn),
            conversation=conversation,
        )
        output = tuple(done.sequences[0, len(token_ids) :].tolist())
        return Served(output, done.ttft_s, done.hit_tokens, done.loaded_bytes)

    def close(self) -> None:
        if self._store is not None:
            faults = [fault for fault in self._store.check() if not fault.startswith(NOT_CHECKED)]
            self._store.close()
            if faults:
                raise RuntimeError(f"the store ended unhealthy: {faults}")


class TransformersEngine:
    """A Hugging Face model in this process."""

    def __init__(self, chat: ChatModel, memory: Memory) -> None:
        self.chat = chat
        self._memory = memory
        self.arms: Mapping[str, Callable[[], Arm]] = {
            "recompute": lambda: Recompute(chat),
            "device": lambda: Connected(chat, None, memory.device_bytes),
            "device+host": lambda: Connected(chat, self._store(), memory.device_bytes),
            "device, unlimited": lambda: Connected(chat, None, memory.host_bytes, residents=_ALL_CHATS),
            "host": lambda: Connected(chat, self._store(), 0),
            "redis": lambda: Connected(chat, self._store(_redis_tier(memory)), 0, drop_host=True),
            "store": lambda: Connected(chat, self._store(_redis_tier(memory), write="on_reuse"), 0),
            "store, write-through": lambda: Connected(chat, self._store(_redis_tier(memory)), 0),
            "store down": lambda: Connected(chat, self._store(_dead_tier()), 0, drop_host=True),
        }

    def _store(self, tier: RedisTier | None = None, write: str = "through") -> KVStore:
        values = {
            "host": {"capacity_bytes": self._memory.host_bytes},
            "mover": {"write": write, "queue_bytes": self._memory.host_bytes},
        }
        return KVStore(StoreConfig.load(values, environ={}), tiers=[tier] if tier else [])


def _redis_tier(memory: Memory) -> RedisTier:
    """A Valkey of the arm's own, on a Unix socket."""
    return RedisTier(RedisTier.Options(capacity_bytes=memory.redis_bytes))


def _dead_tier() -> RedisTier:
    """A tier whose server was there and was killed."""
    server = EmbeddedServer()
    tier = RedisTier(RedisTier.Options(url=server.url))
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.pid, signal.SIGKILL)
    return tier


ENGINES: Registry[Engine] = Registry("engine", {"transformers": "bench.engines:TransformersEngine"})
