# SPDX-License-Identifier: Apache-2.0
"""Phases of `bench gpu` with a model: time to first token by where the prefix comes from; decoding over reloaded KV.

The model has the shape of Llama 3.1 8B and random weights, which cost the same to run. Prompts are a prefix that was
served before and a fresh suffix. Every arm's logits are compared with those over the prefix's own, never moved KV, and
its hits are counted; the floor is bytes ÷ pinned bandwidth plus the plain forward of the suffix over a resident cache,
both of the same run.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.gpu_board import Board, median
from connectors.base import LoadRule
from connectors.transformers import TransformersConnector
from connectors.transformers_cache import BlockCache
from kvstore.block import Chain, Root
from kvstore.config import StoreConfig
from kvstore.errors import KVStoreError
from kvstore.store import KVStore
from kvstore.tiers.base import Tier
from kvstore.transfer import PageCopier, PagedKV

_LEAST_S = 20.0
"""A length is not begun with less than this left."""


def make_model(board: Board) -> LlamaForCausalLM:
    sizes = board.sizes
    real = board.on_cuda
    config = LlamaConfig(
        hidden_size=4096 if real else 64,
        intermediate_size=14336 if real else 64,
        num_attention_heads=32 if real else 4,
        vocab_size=128256 if real else 256,
        num_hidden_layers=sizes.layers,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with board.device:
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    return model


_CHAT = "chat"


@dataclass
class Arm:
    """One place for prefixes to come from; `in_place`, the cache that the chat's last turn ended with."""

    name: str
    connector: TransformersConnector
    store: KVStore | None
    drop_host: bool = False
    in_place: bool = False

    def keep(self, native: BlockCache, prefix: torch.Tensor) -> None:
        """Save the prefix's blocks from `native`, as if this arm had computed them."""
        connector = self.connector
        cache = native.seen_as(connector.layout)
        chain = Chain(Root(connector.model_id), prefix[0].tolist())
        if connector.overlay is not None:
            connector.overlay.save(chain, 0, len(chain), cache.read_rows)
        if self.store is not None:
            with self.store.save(chain, 0, len(chain)) as save:
                cache.read_blocks(save.open_run())
                cache.finish()
                save.commit()
            self.store.flush(60)
        cache.finish()

    @property
    def hit_blocks(self) -> float:
        """Blocks found so far where this arm is to find them."""
        if self.in_place:
            return self.connector.kept.num_hit_blocks
        if self.connector.overlay is not None:
            return self.connector.overlay.stats()["device.hit_blocks"]
        assert self.store is not None
        return self.store.stats().get("redis.hit_blocks" if self.drop_host else "host.hit_blocks", 0.0)

    def serve(self, board: Board, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Logits of the last token of a prompt, and the seconds until they were there."""
        board.sync()
        began_s = time.perf_counter()
        took_s: list[float] = []

        def note(_: torch.Tensor) -> None:
            board.sync()
            took_s.append(time.perf_counter() - began_s)

        logits, _ = self.connector.prefill(ids, on_logits=note, conversation=_CHAT if self.in_place else "")
        return logits[0].float(), took_s[0]

    def chat(self, ids: torch.Tensor) -> torch.Tensor:
        """Serve the turn before the one that is measured; the token that it says."""
        return self.connector.generate(ids, max_new_tokens=1, conversation=_CHAT).sequences[:, -1:]

    def prepare(self) -> None:
        if self.store is not None:
            self.store.flush(60)
            if self.drop_host:
                self.store.drop_host()


@contextmanager
def arms_for(board: Board, model: LlamaForCausalLM, longest: int) -> Iterator[list[Arm]]:
    """Device in place and by rows, pinned host, host fp8, and Redis where its server can be started."""
    block_bytes = 4 * board.sizes.layers * board.sizes.heads * board.sizes.dim * board.sizes.block_tokens
    need = (longest // board.sizes.block_tokens + 64) * block_bytes
    stores: list[KVStore] = []

    def store(tiers: list[Tier]) -> KVStore:
        values = {
            "host": {"capacity_bytes": need},
            "mover": {"write": "through" if tiers else "on_reuse", "queue_bytes": 2 * need},
        }
        stores.append(KVStore(StoreConfig.load(values, environ={}), tiers=tiers))
        return stores[-1]

    def connect(over: KVStore | None, *, residents: int = 0, **settings: object) -> TransformersConnector:
        return TransformersConnector(
            model,
            over,
            revision="random-0",
            block_tokens=board.sizes.block_tokens,
            load_rule=LoadRule.ALWAYS,
            max_wait_s=30.0,
            resident_conversations=residents,
            **settings,  # type: ignore[arg-type]
        )

    made = [Arm("device", connect(None, residents=1, device_budget_bytes=need), None, in_place=True)]
    made.append(Arm("device_rows", connect(None, device_budget_bytes=need), None))
    host, packed = store([]), store([])
    made.append(Arm("host", connect(host), host))
    made.append(Arm("host_fp8", connect(packed, lossy="fp8"), packed))
    try:
        from kvstore.tiers.redis import RedisTier

        redis = store([RedisTier(RedisTier.Options(capacity_bytes=2 * need))])
        made.append(Arm("redis", connect(redis), redis, drop_host=True))
    except (ImportError, OSError, RuntimeError, KVStoreError) as error:
        board.row("ttft", arm="redis", skipped=f"{type(error).__name__}: {error}")
    try:
        for arm in made:
            if (pinned := arm.connector.pinned) is not None and not pinned.wait(60):
                board.row("ttft", arm=arm.name, pinned_bytes=pinned.num_bytes, failure=pinned.failure)
        yield made
    finally:
        for arm in made:
            if arm.connector.pinned is not None:
                arm.connector.pinned.close()
        for one in stores:
            one.close()


def ttft(board: Board) -> None:
    """ttft_* figures, one length after the other until the time is over. Raises at the end what a length raised."""
    failed: Exception | None = None
    with torch.no_grad():
        model = make_model(board)
        bandwidth = _pinned_bandwidth(board)
        with arms_for(board, model, max(board.sizes.prefixes)) as arms:
            for length in board.sizes.prefixes:
                if board.left_s < _LEAST_S and board.on_cuda:
                    board.row("ttft", prefix=length, skipped="no time left")
                    continue
                try:
                    _one_length(board, model, arms, length, bandwidth)
                except (RuntimeError, MemoryError) as error:  # no room for this length: the others are still to come
                    traceback.print_exc()
                    # Without its frames, which hold this length's tensors.
                    failed = failed or error.with_traceback(None)
                    board.row("ttft", prefix=length, error=f"{type(error).__name__}: {error}"[:300])
                if failed is not None:  # after the handler, which holds the frames of an error as well
                    gc.collect()
                    torch.cuda.empty_cache()
                board.write()
    if failed is not None:
        raise failed


def _pinned_bandwidth(board: Board) -> float:
    """Bytes a second from pinned host memory to the device, one large copy."""
    size = board.sizes.ceiling_bytes
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=board.on_cuda)
    there = torch.zeros(size, dtype=torch.uint8, device=board.device)
    return size / median(board.alternate({"copy": lambda: there.copy_(pinned, non_blocking=True)})["copy"])


def _one_length(board: Board, model: LlamaForCausalLM, arms: list[Arm], length: int, bandwidth: float) -> None:
    sizes = board.sizes
    name = f"{length // 1024}k" if length >= 1024 else str(length)
    vocabulary = int(model.config.vocab_size)
    draw = torch.Generator().manual_seed(length)
    prefix = torch.randint(0, vocabulary, (1, length), generator=draw)
    layout = arms[0].connector.layout
    native = BlockCache(layout, board.device, length + sizes.suffix_tokens)
    on_device = prefix.to(board.device)

    def recompute() -> None:
        native.set_length(0)
        model(torch.cat((on_device, suffix), 1), past_key_values=native, use_cache=True, logits_to_keep=1)

    suffix = torch.randint(0, vocabulary, (1, sizes.suffix_tokens), generator=draw).to(board.device)
    computed = board.alternate({"recompute": recompute}, 1 if length > 20_000 else 2)["recompute"]
    native.set_length(0)
    model(on_device, past_key_values=native, use_cache=True, logits_to_keep=1)
    for arm in arms:
        arm.keep(native, prefix)
    seconds: dict[str, list[float]] = {"recompute": computed, "resident": []}
    drifts: dict[str, list[float]] = {}
    same: dict[str, bool] = {}
    tokens: list[bool] = []
    for turn in range(1 + (sizes.repeats if length < 20_000 else 3)):
        if turn > 1 and board.left_s <= 5:
            break
        # Fresh each turn: what the last one left in the stores must not be a longer hit.
        suffix = torch.randint(0, vocabulary, (1, sizes.suffix_tokens), generator=draw).to(board.device)
        for arm in arms:  # what the last turn left to be saved would compute beside the floor
            if arm.store is not None:
                arm.store.flush(60)
        for arm in arms:
            if arm.in_place:  # what is measured is what follows
                suffix[:, 1:2] = arm.chat(torch.cat((prefix, suffix[:, :1].cpu()), 1))
        native.set_length(length)
        wanted: list[torch.Tensor] = []
        forward = lambda into=wanted, more=suffix: into.append(
            model(more, past_key_values=native, use_cache=True, logits_to_keep=1).logits[0, -1].float()
        )
        resident_s = board.timed(forward)
        if turn:
            seconds["resident"].append(resident_s)
        whole = torch.cat((prefix, suffix.cpu()), 1)
        for arm in arms:
            arm.prepare()
            before = arm.hit_blocks
            got, took_s = arm.serve(board, whole)
            hit = arm.hit_blocks - before == length // layout.model.block_tokens
            if turn:
                seconds.setdefault(arm.name, []).append(took_s)
            error = ((got - wanted[0]).norm() / wanted[0].norm()).item()
            drifts.setdefault(arm.name, []).append(error)
            if arm.name == "host_fp8":  # its own figures; random weights have no token to agree on
                tokens.append(int(got.argmax()) == int(wanted[0].argmax()))
            exact = arm.name == "host_fp8" or error == 0.0
            same[arm.name] = same.get(arm.name, True) and hit and exact
    board.figure(f"fp8_same_token_share_{name}", sum(tokens) / max(1, len(tokens)))
    board.figure(f"fp8_kv_drift_{name}", _kv_drift(arms, native, prefix))
    overlap = _overlapped(board, model, native, arms, prefix, length)
    _figures(board, name, length, seconds, drifts, same, layout.block_bytes // sizes.block_tokens * length / bandwidth)
    if overlap:
        board.row("overlap", prefix=length, **overlap)
        board.figure(f"overlap_gain_{name}", overlap["apart_s"] / overlap["overlapped_s"])


def _kv_drift(arms: list[Arm], native: BlockCache, prefix: torch.Tensor) -> float:
    """RMS of the error that fp8 left in the prefix's keys and values, over their RMS."""
    connector = next(arm for arm in arms if arm.name == "host_fp8").connector
    cache = connector.prefill(prefix)[1]
    length = (prefix.shape[1] - 1) // connector.model_id.block_tokens * connector.model_id.block_tokens
    exact, loaded = (one._storage[:, :, :, :length] for one in (native, cache))
    error, whole = 0.0, 0.0
    for layer in range(exact.shape[0]):  # a layer at a time: all of them in float32 would not fit
        error += (loaded[layer].float() - exact[layer].float()).square().sum().item()
        whole += exact[layer].float().square().sum().item()
    return float((error / whole) ** 0.5)


def _figures(
    board: Board,
    name: str,
    length: int,
    seconds: dict[str, list[float]],
    drifts: dict[str, list[float]],
    same: dict[str, bool],
    link_s: float,
) -> None:
    at = {arm: median(values) for arm, values in seconds.items() if values}
    floor_s = link_s + at["resident"]
    board.row("ttft", prefix=length, arm="floor", link_s=link_s, forward_s=at["resident"], ttft_s=floor_s)
    for arm, took_s in at.items():
        board.row(
            "ttft",
            prefix=length,
            arm=arm,
            ttft_s=took_s,
            seconds=seconds[arm],
            equal=same.get(arm),
            drift=drifts.get(arm),
        )
        board.figure(f"ttft_{name}_{arm}_s", took_s)
    board.figure(f"ttft_{name}_outputs_equal", all(same.values()))
    if "host" in at:
        board.figure(f"ttft_vs_floor_{name}", at["host"] / floor_s)
        board.figure(f"ttft_speedup_{name}", at["recompute"] / at["host"])
    if "host_fp8" in at and "host" in at:
        board.figure(f"fp8_gain_{name}", at["host"] / at["host_fp8"])
        board.figure(f"fp8_logit_drift_{name}", median(drifts["host_fp8"]))
    if "redis" in at:
        board.figure(f"ttft_speedup_redis_{name}", at["recompute"] / at["redis"])
    for arm, figure in (("device", "device_tier_overhead_pct"), ("device_rows", "device_rows_overhead_pct")):
        if arm in at:
            overhead_pct = 100 * (at[arm] / at["resident"] - 1)
            board.figure(f"{figure}_{name}", overhead_pct)
            if name == "32k":
                board.figure(figure, overhead_pct)


def _overlapped(
    board: Board, model: LlamaForCausalLM, native: BlockCache, arms: list[Arm], prefix: torch.Tensor, length: int
) -> dict[str, float]:
    """Load and forward one after the other, and with each layer waiting for its own blocks only."""
    arm = next(arm for arm in arms if arm.name == "host")
    store, layout = arm.store, arm.connector.layout
    assert store is not None
    tokens = layout.model.block_tokens
    chain = Chain(Root(layout.model), prefix[0].tolist())
    copier = PageCopier(layout, PagedKV.of([native._storage], "layer kv head slot dim", page_tokens=tokens))
    copier._by_address = False
    table = range(native.capacity // tokens)
    more = torch.ones((1, board.sizes.suffix_tokens), dtype=torch.int64, device=board.device)
    if store.match(chain, "overlap").num_host_blocks < len(chain):
        return {}
    with store.load("overlap") as load:
        blocks = [(block.index, block.views) for block in load]

        def forward() -> None:
            native.set_length(length)
            model(more, past_key_values=native, use_cache=True, logits_to_keep=1)

        def together(step_layers: int) -> None:
            copying = copier.start_scatter(table, blocks, step_layers=step_layers)
            hooks = [
                layer.register_forward_pre_hook(lambda *_, at=at: copying.order(at))
                for at, layer in enumerate(model.model.layers)
            ]
            try:
                forward()
            finally:
                for hook in hooks:
                    hook.remove()
                copying.finish()

        def apart() -> None:
            copier.scatter(table, blocks)
            forward()

        chosen = board.sizes.step_layers
        arms_of: dict[str, Callable[[], object]] = {"apart": apart, "overlapped": lambda: together(chosen)}
        for step in {1, 2 * chosen, 4 * chosen} - {chosen}:  # what to choose instead: fewer steps are fewer copies
            arms_of[f"overlapped_by_{step}"] = lambda step=step: together(step)  # type: ignore[misc]
        seconds = board.alternate(arms_of)
    return {f"{name}_s": median(values) for name, values in seconds.items() if values}


# -- decoding over reloaded pages --------------------------------------------------------------------------------


def split_decode(board: Board) -> None:
    """Attention of one query over pages that were saved and loaded elsewhere: equal, bit for bit, for every split."""
    from bench.gpu_copies import copy_rig

    with copy_rig(board) as rig:
        num_blocks = len(rig.blocks) // 2
        pages = num_blocks * board.sizes.block_tokens // board.sizes.page_tokens
        source, into = rig.page_ids[:pages], rig.page_ids[pages : 2 * pages]
        copier = rig.copier()
        copier.gather(source, rig.blocks[:num_blocks])
        copier.scatter(into, rig.blocks[:num_blocks])
        keys, values = rig.kv.planes[0]
        query = torch.randn(4 * board.sizes.heads, board.sizes.dim, device=board.device)
        whole = _attend(query, keys[source], values[source], 1)
        equal, worst = True, 0.0
        for splits in (1, 4, 16, 64):
            native = _attend(query, keys[source], values[source], splits)
            reloaded = _attend(query, keys[into], values[into], splits)
            same = torch.equal(native, reloaded)
            error = ((native - whole).norm() / whole.norm()).item()
            board.row("split decode", splits=splits, equal=same, drift_from_one=error)
            equal, worst = equal and same, max(worst, error)
        board.figure("split_decode_equal", equal)
        board.figure("split_decode_drift", worst)


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, splits: int) -> torch.Tensor:
    """Attention in float32 over pages (page, token, head, dim), in so many parts that are merged by their weights."""
    heads = keys.shape[2]
    grouped = query.view(heads, -1, query.shape[-1])
    parts = []
    for key, value in zip(
        keys.flatten(0, 1).float().tensor_split(splits), values.flatten(0, 1).float().tensor_split(splits), strict=True
    ):
        if not len(key):
            continue
        scores = torch.einsum("hgd,thd->hgt", grouped, key) / query.shape[-1] ** 0.5
        weight = scores.logsumexp(-1)
        parts.append((torch.einsum("hgt,thd->hgd", scores.softmax(-1), value), weight))
    total = torch.stack([weight for _, weight in parts]).logsumexp(0)
    return sum(((weight - total).exp()[..., None] * out for out, weight in parts), torch.zeros_like(grouped))
