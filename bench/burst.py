# SPDX-License-Identifier: Apache-2.0
"""A burst: many users with one system prompt at once, on two engine processes that share a sidecar.

Without a store every request computes the prompt again, and those that came later wait for it in the queue as well.
With it the first one computes, the others of both engines wait for its blocks and load them. TTFT counts from the
moment a request arrives, queue included. Engines of vLLM have a third arm: no store, but the engine's own prefix cache,
which cannot help the other process. Before each burst the engines' own caches are emptied, and each burst has a system
prompt that nobody has seen; arms take turns in rotating order.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import Progress

import kvstore
from bench.asked import print_figures
from bench.env import stamp
from bench.models import smollm2
from bench.options import whole
from bench.report import print_table, write_json
from bench.reuse_plots import plot_burst
from bench.sidecar import sidecar
from bench.vllm_engines import PYTHON, VOCABULARY, Engine, Sidecar, model_options, transfer_to
from bench.workload import documents
from connectors.transformers import TransformersConnector
from kvstore.api import Hint

HELP = "a burst of users with one system prompt, on two engines that share a sidecar"

ENGINES = 2
BLOCK_TOKENS = 64
NO_REUSE, OWN_CACHE, KVSTORE = "no reuse", "engine's own prefix cache", "kvstore"
_QUESTION_TOKENS = 32
_NEW_TOKENS = 4
_START_S = 600.0
_spawn = multiprocessing.get_context("spawn")

Rows = list[dict[str, object]]


@dataclass(frozen=True, slots=True)
class Request:
    """A user's prompt and when it arrives, on the clock of `time.monotonic`."""

    user: int
    token_ids: list[int]
    arrives_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request; `hit_tokens` were not computed for it."""

    user: int
    ttft_s: float
    hit_tokens: int
    output: tuple[int, ...]


class Fleet(Protocol):
    """Engine processes that stay up for the whole run."""

    @property
    def arms(self) -> tuple[str, ...]: ...

    def system_prompts(self, count: int, num_tokens: int) -> list[list[int]]: ...

    def question(self, rng: np.random.Generator) -> list[int]: ...

    def serve(self, arm: str, requests: Sequence[Request]) -> list[Answer]:
        """Serve them when they arrive; users go to the engines in turn."""


# -- transformers ----------------------------------------------------------------------------------------------


class TransformersFleet:
    """SmolLM2 in processes that serve one request after the other."""

    arms: tuple[str, ...] = (NO_REUSE, KVSTORE)

    def __init__(self, stack: ExitStack, num_tokens: int) -> None:
        self._chat = smollm2(torch.float32)
        address = stack.enter_context(sidecar(2 << 30))
        warm_up = [list(each.token_ids) for each in documents(self._chat.encode, num_tokens)[-ENGINES:]]
        self._pipes = [self._start(stack, address, [prompt]) for prompt in warm_up]
        for pipe in self._pipes:
            if not pipe.poll(_START_S) or pipe.recv() != "ready":
                raise RuntimeError("an engine did not start")

    @staticmethod
    def _start(stack: ExitStack, address: str, warm_up: list[list[int]]) -> Connection:
        ours, theirs = _spawn.Pipe()
        process = _spawn.Process(target=_engine, args=(theirs, address), daemon=True)
        process.start()
        stack.callback(process.join, 20)
        stack.callback(ours.send, None)
        ours.send(warm_up)
        return ours

    def system_prompts(self, count: int, num_tokens: int) -> list[list[int]]:
        """Real text; the last ones were the warm-up."""
        texts = [list(each.token_ids) for each in documents(self._chat.encode, num_tokens)]
        if len(texts) < count + ENGINES:
            raise ValueError(f"there is text for {len(texts)} prompts of {num_tokens} tokens: ask for fewer rounds")
        return texts[:count]

    def question(self, rng: np.random.Generator) -> list[int]:
        return [int(token) for token in rng.integers(100, 40_000, _QUESTION_TOKENS)]

    def serve(self, arm: str, requests: Sequence[Request]) -> list[Answer]:
        for number, pipe in enumerate(self._pipes):
            pipe.send((arm, requests[number::ENGINES]))
        return [answer for pipe in self._pipes for answer in pipe.recv()]


def _engine(pipe: Connection, address: str) -> None:
    """An engine process: warms up, then serves what comes through the pipe, with and without the store."""
    chat = smollm2(torch.float32)
    with kvstore.connect(address, call_deadline_s=10) as store:
        arms = {
            NO_REUSE: TransformersConnector(chat.model, None, revision=chat.revision, resident_conversations=0),
            KVSTORE: TransformersConnector(chat.model, store, revision=chat.revision, resident_conversations=0),
        }

        def serve(arm: str, token_ids: list[int]) -> tuple[float, int, tuple[int, ...]]:
            done = arms[arm].generate(torch.tensor([token_ids]), max_new_tokens=_NEW_TOKENS, hint=Hint(turn=1))
            return done.ttft_s, sum(done.hit_tokens.values()), tuple(done.sequences[0, len(token_ids) :].tolist())

        for prompt in pipe.recv():  # what computing costs here is learnt before the first burst
            serve(KVSTORE, prompt)
        pipe.send("ready")
        while (order := pipe.recv()) is not None:
            arm, requests = order
            answers = []
            for request in requests:
                time.sleep(max(0.0, request.arrives_s - time.monotonic()))
                began_s = time.monotonic()
                ttft_s, hit_tokens, output = serve(arm, request.token_ids)
                queued_s = began_s - request.arrives_s
                answers.append(Answer(request.user, queued_s + ttft_s, hit_tokens, output))
            pipe.send(answers)


# -- vLLM ------------------------------------------------------------------------------------------------------


class VllmFleet:
    """A seeded Llama of 100 M parameters in vLLM: two engines with the connector, and two without."""

    arms: tuple[str, ...] = (NO_REUSE, OWN_CACHE, KVSTORE)

    def __init__(self, stack: ExitStack, num_tokens: int, *, python: Path, dtype: str, step_tokens: int) -> None:
        self._rng = np.random.default_rng(1)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv", dir="/tmp")))
        server = stack.enter_context(Sidecar(directory, ""))
        server.start()
        options: dict[str, object] = {
            **model_options("random", dtype),
            "max_tokens": num_tokens + 256,
            "step_tokens": step_tokens,
        }
        transfer = transfer_to("KVStoreConnector", "connectors.vllm", {"address": server.address})

        def start(connector: object) -> list[Engine]:
            made = {**options, "transfer": connector}
            return [stack.enter_context(Engine(python, made, module="bench.burst_vllm")) for _ in range(ENGINES)]

        self._engines: Mapping[bool, list[Engine]] = {True: start(transfer), False: start(None)}
        for engines in self._engines.values():
            for engine in engines:
                engine.wait()
        for arm in self.arms * 2:  # one engine after the other: what computing costs alone is learnt
            for engine in self._engines[arm == KVSTORE]:
                prompt = self.system_prompts(1, num_tokens)[0]
                engine.ask(self._order(arm, [Request(0, prompt, time.monotonic())]))

    def system_prompts(self, count: int, num_tokens: int) -> list[list[int]]:
        return [[int(token) for token in self._rng.integers(1, VOCABULARY, num_tokens)] for _ in range(count)]

    def question(self, rng: np.random.Generator) -> list[int]:
        return [int(token) for token in rng.integers(1, VOCABULARY, _QUESTION_TOKENS)]

    @staticmethod
    def _order(arm: str, requests: Sequence[Request]) -> dict[str, object]:
        return {
            "requests": [(request.arrives_s, request.token_ids) for request in requests],
            "new": _NEW_TOKENS,
            "alone": arm == NO_REUSE,
        }

    def serve(self, arm: str, requests: Sequence[Request]) -> list[Answer]:
        engines = self._engines[arm == KVSTORE]
        shares = [requests[number::ENGINES] for number in range(ENGINES)]
        for engine, share in zip(engines, shares, strict=True):
            engine.send(self._order(arm, share))
        answers: list[Answer] = []
        for engine, share in zip(engines, shares, strict=True):
            rows: Any = engine.answer()
            for request, row in zip(share, rows, strict=True):
                answers.append(Answer(request.user, row["ttft_s"], row["hit_tokens"], tuple(row["tokens"])))
        return answers


# -- the run ---------------------------------------------------------------------------------------------------


def measure(
    make: Callable[[ExitStack, int], Fleet], users: int, prompt_tokens: int, rounds: int, within_s: float, seed: int
) -> tuple[dict[str, float | bool], Rows]:
    """Bursts in every arm, in rotating order; each round has a system prompt that nobody has seen."""
    rng = np.random.default_rng(seed)
    with ExitStack() as stack, Progress(auto_refresh=False) as progress:
        fleet = make(stack, prompt_tokens)
        task = progress.add_task("bursts", total=rounds * len(fleet.arms))
        answers: dict[str, list[list[Answer]]] = {arm: [] for arm in fleet.arms}
        for number, system in enumerate(fleet.system_prompts(rounds, prompt_tokens)):
            prompts = [system + fleet.question(rng) for _ in range(users)]
            at = number % len(fleet.arms)
            for arm in (*fleet.arms[at:], *fleet.arms[:at]):
                answers[arm].append(_burst(fleet, arm, prompts, within_s))
                progress.update(task, advance=1, refresh=True)
    return _figures(answers, prompt_tokens)


def _burst(fleet: Fleet, arm: str, prompts: list[list[int]], within_s: float) -> list[Answer]:
    """One burst: users arrive evenly over `within_s` and go to the engines in turn."""
    now_s = time.monotonic() + 0.2
    step_s = within_s / max(1, len(prompts) - 1)
    requests = [Request(user, prompt, now_s + user * step_s) for user, prompt in enumerate(prompts)]
    return sorted(fleet.serve(arm, requests), key=lambda answer: answer.user)


def _figures(answers: dict[str, list[list[Answer]]], prompt_tokens: int) -> tuple[dict[str, float | bool], Rows]:
    shared = prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    rows: Rows = []
    times_computed: dict[str, list[float]] = {arm: [] for arm in answers}
    for arm, bursts in answers.items():
        for number, burst in enumerate(bursts):
            computed = sum(1 - min(answer.hit_tokens, shared) / shared for answer in burst)
            times_computed[arm].append(computed)
            for answer in burst:
                rows.append(
                    {
                        "arm": arm,
                        "burst": number,
                        "user": answer.user,
                        "ttft_s": answer.ttft_s,
                        "hit_tokens": answer.hit_tokens,
                        "equal": answer.output == answers[NO_REUSE][number][answer.user].output,
                    }
                )
    means = {arm: statistics.median(_means(bursts)) for arm, bursts in answers.items()}
    pairs = zip(_means(answers[NO_REUSE]), _means(answers[KVSTORE]), strict=True)
    summary: dict[str, float | bool] = {
        "burst_speedup": statistics.median(without / ours for without, ours in pairs),
        "prefix_computed_times": max(times_computed[KVSTORE]),
        "outputs_equal": all(bool(row["equal"]) for row in rows),
        "ttft_mean_no_reuse_s": means[NO_REUSE],
        "ttft_mean_kvstore_s": means[KVSTORE],
    }
    if OWN_CACHE in means:
        summary["ttft_mean_own_cache_s"] = means[OWN_CACHE]
        summary["speedup_over_own_cache"] = means[OWN_CACHE] / means[KVSTORE]
        summary["own_cache_prefix_computed_times"] = max(times_computed[OWN_CACHE])
    return summary, rows


def _means(bursts: list[list[Answer]]) -> list[float]:
    return [statistics.mean(answer.ttft_s for answer in burst) for burst in bursts]


def _table(rows: Rows) -> Rows:
    groups: dict[tuple[object, object], Rows] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["burst"]), []).append(row)
    return [
        {
            "arm": arm,
            "burst": burst,
            "TTFT first": min(ttfts := [float(str(row["ttft_s"])) for row in members]),
            "mean": statistics.mean(ttfts),
            "max": max(ttfts),
            "reused": sum(int(str(row["hit_tokens"])) for row in members),
            "equal": all(bool(row["equal"]) for row in members),
        }
        for (arm, burst), members in groups.items()
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench ttft --scenario burst",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--engine", choices=["transformers", "vllm"], default="vllm")
    add("--users", type=whole(2, 64), default=8, help="requests of a burst (default: 8)")
    add("--tokens", type=whole(256, 6000), default=2048, help="of the system prompt (default: 2048)")
    add("--rounds", type=whole(1, 20), default=3, help="bursts in each arm (default: 3)")
    add("--within", type=float, default=0.1, help="seconds over which they arrive (default: 0.1)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of a vLLM engine (default: float32)")
    add("--step-tokens", type=whole(64, 8192), default=2048, help="vLLM's max_num_batched_tokens (default: 2048)")
    add("--python", type=Path, default=PYTHON, help="a Python that has vLLM")
    add("--seed", type=whole(0, 2**32 - 1), default=0)
    add("--json", type=Path, metavar="FILE", help="write {name, env, rows, summary}, and a plot beside it")
    options = parser.parse_args(argv)

    def fleet(stack: ExitStack, num_tokens: int) -> Fleet:
        if options.engine == "transformers":
            return TransformersFleet(stack, num_tokens)
        return VllmFleet(stack, num_tokens, python=options.python, dtype=options.dtype, step_tokens=options.step_tokens)

    summary, rows = measure(fleet, options.users, options.tokens, options.rounds, options.within, options.seed)
    table = _table(rows)
    print_table("Burst", table, list(table[0]))
    print_figures("burst-cpu", summary)
    if options.json:
        write_json(options.json, "burst", stamp(), rows, {**summary, "engine": options.engine, "seed": options.seed})
        plot_burst(rows, options.json.with_suffix(".png"))
        print(f"written: {options.json}")
    return 0
