# SPDX-License-Identifier: Apache-2.0
"""A burst: many users with one system prompt at once, on two engine processes that share a sidecar.

Without a store every request computes the prompt again, and those that came later wait for it in the queue as well.
With it the first one computes, the others of both engines wait for its blocks and load them. TTFT counts from the
moment a request arrives, queue included; each engine serves one request after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
from rich.progress import Progress

import kvstore
from bench.env import stamp
from bench.models import smollm2
from bench.options import whole
from bench.report import print_table, write_json
from bench.sidecar import sidecar
from bench.workload import documents
from connectors.transformers import TransformersConnector
from kvstore.api import Hint

HELP = "a burst of users with one system prompt, on two engines that share a sidecar"

ENGINES = 2
BLOCK_TOKENS = 64
_QUESTION_TOKENS = 32
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
    """What became of a request; `hit_tokens` came from the store."""

    user: int
    ttft_s: float
    hit_tokens: int
    output: tuple[int, ...]


def _engine(pipe: Connection, address: str, max_new_tokens: int) -> None:
    """An engine process: warms up, then serves what comes through the pipe, with and without the store."""
    chat = smollm2(torch.float32)
    with kvstore.connect(address, call_deadline_s=10) as store:
        arms = {
            "no store": TransformersConnector(chat.model, None, revision=chat.revision),
            "kvstore": TransformersConnector(chat.model, store, revision=chat.revision),
        }

        def serve(arm: str, token_ids: list[int]) -> tuple[float, int, tuple[int, ...]]:
            done = arms[arm].generate(torch.tensor([token_ids]), max_new_tokens=max_new_tokens, hint=Hint(turn=1))
            return done.ttft_s, sum(done.hit_tokens.values()), tuple(done.sequences[0, len(token_ids) :].tolist())

        for prompt in pipe.recv():  # what computing costs here is learnt before the first burst
            for arm in arms:
                serve(arm, prompt)
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


def measure(
    users: int, prompt_tokens: int, rounds: int, within_s: float, seed: int
) -> tuple[dict[str, float | bool], Rows]:
    """Bursts with and without the store, alternating; each round has a system prompt that nobody has seen."""
    chat = smollm2(torch.float32)
    texts = [list(each.token_ids) for each in documents(chat.encode, prompt_tokens)]
    if len(texts) < rounds + 2:
        raise ValueError(f"there is text for {len(texts)} prompts of {prompt_tokens} tokens, not for {rounds + 2}")
    rng = np.random.default_rng(seed)
    warm_up, systems = texts[:2], texts[2:]
    answers: dict[str, list[list[Answer]]] = {"no store": [], "kvstore": []}
    with sidecar(2 << 30) as address, contextlib.ExitStack() as stack, Progress(auto_refresh=False) as progress:
        task = progress.add_task("bursts", total=2 * rounds)
        pipes = [_start(stack, address, [warm_up[number]]) for number in range(ENGINES)]
        for pipe in pipes:
            if not pipe.poll(_START_S) or pipe.recv() != "ready":
                raise RuntimeError("an engine did not start")
        for number in range(rounds):
            prompts = [systems[number] + rng.integers(100, 40_000, _QUESTION_TOKENS).tolist() for _ in range(users)]
            for arm in ("no store", "kvstore") if number % 2 else ("kvstore", "no store"):
                answers[arm].append(_burst(pipes, arm, prompts, within_s))
                progress.update(task, advance=1, refresh=True)
        for pipe in pipes:
            pipe.send(None)
    return _figures(answers, prompt_tokens)


def _start(stack: contextlib.ExitStack, address: str, warm_up: list[list[int]]) -> Connection:
    ours, theirs = _spawn.Pipe()
    process = _spawn.Process(target=_engine, args=(theirs, address, 4), daemon=True)
    process.start()
    stack.callback(process.join, 20)
    ours.send(warm_up)
    return ours


def _burst(pipes: list[Connection], arm: str, prompts: list[list[int]], within_s: float) -> list[Answer]:
    """One burst: users arrive evenly over `within_s` and go to the engines in turn."""
    now_s = time.monotonic() + 0.1
    step_s = within_s / max(1, len(prompts) - 1)
    requests = [Request(user, prompt, now_s + user * step_s) for user, prompt in enumerate(prompts)]
    for number, pipe in enumerate(pipes):
        pipe.send((arm, requests[number::ENGINES]))
    found: list[Answer] = []
    for pipe in pipes:
        found += pipe.recv()
    return sorted(found, key=lambda answer: answer.user)


def _figures(answers: dict[str, list[list[Answer]]], prompt_tokens: int) -> tuple[dict[str, float | bool], Rows]:
    shared = prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    rows: Rows = []
    times_computed: dict[str, list[float]] = {arm: [] for arm in answers}
    for arm, bursts in answers.items():
        for number, burst in enumerate(bursts):
            computed = sum(1 - min(answer.hit_tokens, shared) / shared for answer in burst)
            times_computed[arm].append(computed)
            ttfts = [answer.ttft_s for answer in burst]
            rows.append(
                {
                    "arm": arm,
                    "burst": number,
                    "TTFT mean": statistics.mean(ttfts),
                    "TTFT max": max(ttfts),
                    "prefix computed": computed,
                }
            )
    means = {arm: statistics.median(_means(bursts)) for arm, bursts in answers.items()}
    outputs = {arm: [[answer.output for answer in burst] for burst in bursts] for arm, bursts in answers.items()}
    summary: dict[str, float | bool] = {
        "burst_speedup": means["no store"] / means["kvstore"],
        "prefix_computed_times": max(times_computed["kvstore"]),
        "outputs_equal": outputs["kvstore"] == outputs["no store"],
    }
    return summary, rows


def _means(bursts: list[list[Answer]]) -> list[float]:
    return [statistics.mean(answer.ttft_s for answer in burst) for burst in bursts]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench burst", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=whole(2, 64), default=8, help="requests of a burst (default: 8)")
    parser.add_argument("--tokens", type=whole(256, 6000), default=2048, help="of the system prompt (default: 2048)")
    parser.add_argument("--rounds", type=whole(1, 20), default=3, help="bursts in each arm (default: 3)")
    parser.add_argument("--within", type=float, default=0.1, help="seconds over which they arrive (default: 0.1)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument("--json", metavar="FILE", help="write {name, env, rows, summary}")
    options = parser.parse_args(argv)
    summary, rows = measure(options.users, options.tokens, options.rounds, options.within, options.seed)
    print_table("Burst", rows, ["arm", "burst", "TTFT mean", "TTFT max", "prefix computed"])
    for key, value in summary.items():
        print(f"{key:24} {value if isinstance(value, bool) else format(value, '.3f')}")
    if options.json:
        write_json(options.json, "burst", stamp(), rows, summary)
        print(f"written: {options.json}")
    return 0
