# SPDX-License-Identifier: Apache-2.0
"""Phase of `bench gpu` with chats: more users than the device has memory for, TTFT by where their turns find KV.

Every user has a context that was served before; users then take turns one after the other, each with some new tokens.
Their KV is twice the device's budget, so that least-recently-used order throws out what comes next: an arm that has
nothing below the device recomputes. All arms serve the same turns, one right after the other.

Arms load whatever is there, so that what they show is their tier. `redis_measured` runs as shipped: it loads where that
is predicted to beat computing, from what its own passes and loads took, and reads what the arm of Redis has written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.gpu_board import Board, median
from bench.gpu_ttft import Arm, make_model
from connectors.base import LoadRule
from connectors.transformers import TransformersConnector
from connectors.transformers_cache import BlockCache
from kvstore.config import StoreConfig
from kvstore.errors import KVStoreError
from kvstore.store import KVStore
from kvstore.tiers.base import Tier

_TURNS = 3
"""The first warms up and does not count."""
_MEASURED = "redis_measured"
_NUM_LEARNT = 3
"""Contexts that it computes before the turns, as it would have had to in the first turns of chats."""
_LEAST_S = 10.0
"""For what ends the phase: a turn is not begun with less than this left."""


@contextmanager
def _arms(board: Board, model: LlamaForCausalLM, total_bytes: int) -> Iterator[list[Arm]]:
    stores: list[KVStore] = []

    def store(capacity_bytes: int, tiers: list[Tier]) -> KVStore:
        values = {
            "host": {"capacity_bytes": capacity_bytes},
            "mover": {"write": "through" if tiers else "on_reuse", "queue_bytes": 2 * total_bytes},
        }
        stores.append(KVStore(StoreConfig.load(values, environ={}), tiers=tiers))
        return stores[-1]

    def arm(name: str, over: KVStore | None, *, budget_bytes: int = total_bytes // 2, lossy: str = "") -> Arm:
        always: dict[str, Any] = {"load_rule": LoadRule.ALWAYS, "max_wait_s": 30.0}
        connector = TransformersConnector(
            model,
            over,
            revision="random-0",
            block_tokens=board.sizes.block_tokens,
            device_budget_bytes=budget_bytes,
            resident_conversations=0,  # an arm is about its tiers
            lossy=lossy,
            **({} if name == _MEASURED else always),
        )
        return Arm(name, connector, over)

    # With room for what the turns add; Redis has a host tier above it that is too small as well.
    made = [arm("recompute", None, budget_bytes=0), arm("device", None), arm("host", store(2 * total_bytes, []))]
    made.append(arm("host_fp8", store(total_bytes, []), lossy="fp8"))
    try:
        from kvstore.tiers.redis import RedisTier

        shared = RedisTier(RedisTier.Options(capacity_bytes=3 * total_bytes))
        made.append(arm("redis", store(total_bytes // 4, [shared])))
        assert shared.server is not None
        beside = RedisTier(RedisTier.Options(url=shared.server.url, capacity_bytes=3 * total_bytes))
        made.append(arm(_MEASURED, store(total_bytes // 4, [beside])))
    except (ImportError, OSError, RuntimeError, KVStoreError) as error:
        board.row("turns", arm="redis", skipped=f"{type(error).__name__}: {error}")
    try:
        for one in made:
            if one.connector.pinned is not None:
                one.connector.pinned.wait(60)
        yield made
    finally:
        for one in made:
            if one.connector.pinned is not None:
                one.connector.pinned.close()
        for over in reversed(stores):  # the server goes with the store that started it
            over.close()


def turns(board: Board) -> None:
    """turns_ttft_…_s by arm (medians), turns_speedup_…, and what share of prompt tokens each arm reused."""
    sizes = board.sizes
    longest = sizes.context_tokens + (_TURNS + 1) * sizes.suffix_tokens
    with torch.no_grad():
        model = make_model(board)
        layout_tokens = sizes.block_tokens
        block_bytes = 4 * sizes.layers * sizes.heads * sizes.dim * layout_tokens
        total_bytes = sizes.users * -(-longest // layout_tokens) * block_bytes
        vocabulary = int(model.config.vocab_size)
        draw = torch.Generator().manual_seed(7)
        chats = [torch.randint(0, vocabulary, (1, sizes.context_tokens), generator=draw) for _ in range(sizes.users)]
        with _arms(board, model, total_bytes) as arms:
            _fill(board, model, [arm for arm in arms if arm.name != _MEASURED], chats)
            _learn(board, arms, draw, vocabulary)
            seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
            same: dict[str, list[bool]] = {arm.name: [] for arm in arms}
            first_hits = {}
            for turn in range(_TURNS):
                if turn == 1:
                    first_hits = {arm.name: _reused(arm) for arm in arms}
                for user in range(sizes.users):
                    if board.left_s <= _LEAST_S:
                        board.row("turns", turn=turn, user=user, skipped="no time left")
                        continue
                    more = torch.randint(0, vocabulary, (1, sizes.suffix_tokens), generator=draw)
                    chats[user] = torch.cat((chats[user], more), 1)
                    _turn(board, arms, chats[user], turn, seconds, same)
            _figures(board, arms, seconds, same, first_hits)
            board.write()  # ending pinned memory and stores may take longer than the phase has
            faults = [fault for arm in arms if arm.store is not None for fault in arm.store.check()]
            board.row("turns", users=sizes.users, kv_bytes=total_bytes, device_bytes=total_bytes // 2, faults=faults)


def _fill(board: Board, model: LlamaForCausalLM, arms: list[Arm], chats: list[torch.Tensor]) -> None:
    """Serve every context once, and keep its blocks in every arm as if that had computed them."""
    native = BlockCache(arms[0].connector.layout, board.device, chats[0].shape[1])
    for chat in chats:
        native.set_length(0)
        model(chat.to(board.device), past_key_values=native, use_cache=True, logits_to_keep=1)
        for arm in arms:
            arm.keep(native, chat)


def _learn(board: Board, arms: list[Arm], draw: torch.Generator, vocabulary: int) -> None:
    """Have the arm that decides by what things took see what computing takes; loads it sees in the first turn."""
    for arm in arms:
        for _ in range(_NUM_LEARNT if arm.name == _MEASURED else 0):
            arm.serve(board, torch.randint(0, vocabulary, (1, board.sizes.context_tokens), generator=draw))


def _turn(
    board: Board,
    arms: list[Arm],
    chat: torch.Tensor,
    turn: int,
    seconds: dict[str, list[float]],
    same: dict[str, list[bool]],
) -> None:
    wanted = -1
    for arm in arms:
        for one in arms:  # what the last arm left to be written down would go on beside this one
            if one.store is not None:
                one.store.flush(60)
        logits, took_s = arm.serve(board, chat)
        chosen = int(logits.argmax())
        wanted = chosen if wanted < 0 else wanted  # the first arm recomputes
        if turn:
            seconds[arm.name].append(took_s)
            same[arm.name].append(chosen == wanted)


def _reused(arm: Arm) -> dict[str, float]:
    """Blocks found so far, by tier."""
    found: dict[str, float] = {}
    for stats in [one.stats() for one in (arm.connector.overlay, arm.store) if one is not None]:
        found |= {name: value for name, value in stats.items() if name.endswith(".hit_blocks")}
    return found


def _figures(
    board: Board,
    arms: list[Arm],
    seconds: dict[str, list[float]],
    same: dict[str, list[bool]],
    first_hits: dict[str, dict[str, float]],
) -> None:
    for arm in arms:
        took_s = seconds[arm.name]
        if not took_s:
            continue
        hits = {name: value - first_hits[arm.name].get(name, 0.0) for name, value in _reused(arm).items()}
        board.row("turns", arm=arm.name, seconds=took_s, hit_blocks=hits, same_token=same[arm.name])
        if arm.name == _MEASURED:
            _decisions(board, arm)
        board.figure(f"turns_ttft_{arm.name}_s", median(took_s))
        board.figure(f"turns_same_token_share_{arm.name}", sum(same[arm.name]) / len(took_s))
        if arm.name != "recompute":
            board.figure(f"turns_speedup_{arm.name}", median(seconds["recompute"]) / median(took_s))


def _decisions(board: Board, arm: Arm) -> None:
    """By which costs it has decided, for a chat as it was before the turns."""
    cost, tokens = arm.connector.cost, board.sizes.context_tokens
    num_blocks = tokens // board.sizes.block_tokens
    board.row(
        "turns",
        arm=arm.name,
        predicted_compute_s=cost.prefill_s(tokens + board.sizes.suffix_tokens, 0),
        predicted_rest_s=cost.prefill_s(board.sizes.suffix_tokens, tokens),
        predicted_load_s=cost.load_s("redis", num_blocks),
    )
