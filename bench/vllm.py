# SPDX-License-Identifier: Apache-2.0
"""Time to first token in a real vLLM engine on the CPU: recompute, the engine's own prefix cache, and the store.

One engine with the connector and one without live through the whole run and take turns, so that ratios compare
requests that were served seconds apart by engines that are equally warm. The sidecar is started again before each
round: the first request for a prefix then finds it in Redis alone, the next ones in host memory.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from bench.asked import print_figures
from bench.env import stamp
from bench.report import percentiles, print_table, write_json
from bench.vllm_engines import (
    LMCACHE_PYTHON,
    PYTHON,
    VOCABULARY,
    Engine,
    Sidecar,
    lmcache,
    model_options,
    native_dtype,
    transfer_to,
)
from kvstore.tiers.valkey import EmbeddedServer

HELP = "time to first token in a real vLLM engine on the CPU, through the sidecar and without"


class ArmRow(TypedDict):
    """One request."""

    arm: str
    round: int
    prefix: int
    new_tokens: int
    ttft_s: float
    seconds: float
    hit_tokens: int


# -- the run ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """What is measured, and what was."""

    reused: int
    num_prefixes: int
    rounds: int
    rows: list[ArmRow] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(1))
    _round: int = 0

    def tokens(self, count: int) -> list[int]:
        return [self._random.randrange(1, VOCABULARY) for _ in range(count)]

    def ask(
        self, engine: Engine, arm: str, prompt: Sequence[int], *, prefix: int, shared: int, new: int = 1, forget: bool
    ) -> None:
        row = engine.serve(prompt, new=new, forget=forget)
        self.rows.append(
            ArmRow(
                arm=arm,
                round=self._round,
                prefix=prefix,
                new_tokens=len(prompt) - shared,
                ttft_s=row["ttft_s"],
                seconds=row["seconds"],
                hit_tokens=row["hit_tokens"],
            )
        )
        print(f"{arm}: {row['ttft_s']:.3f} s, {row['hit_tokens']} of {len(prompt)} reused", file=sys.stderr, flush=True)

    def warm_up(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            prompt = self.tokens(self.reused)
            for forget in (True, True, False):
                engine.serve([*prompt, *self.tokens(64)], forget=forget)

    def reuse(self, ours: Engine, plain: Engine, sidecar: Sidecar, peer: Engine | None) -> None:
        """Prefixes computed once and written down; then served from Redis, from the host and by the engine."""
        prefixes = [self.tokens(self.reused) for _ in range(self.num_prefixes)]
        for number, prefix in enumerate(prefixes):
            for engine, arm in ((plain, "no connector, computed"), (ours, "computed")):
                self.ask(engine, arm, [*prefix, *self.tokens(232)], prefix=number, shared=0, forget=True)
            if peer is not None:
                peer.serve([*prefix, *self.tokens(232)])
        for number in range(1, self.rounds + 1):
            self._round = number
            sidecar.start()  # the host is empty; Redis has the prefixes
            time.sleep(1.5)  # engines look for a sidecar that went every second
            for at, prefix in enumerate(prefixes):
                self._prefix(ours, plain, peer, at, prefix)

    def _prefix(self, ours: Engine, plain: Engine, peer: Engine | None, number: int, prefix: list[int]) -> None:
        def ask(engine: Engine, arm: str, new: int, *, forget: bool = True) -> list[int]:
            prompt = [*prefix, *self.tokens(new)]
            self.ask(engine, arm, prompt, prefix=number, shared=len(prefix), forget=forget)
            return prompt

        ask(ours, "redis", 232)
        for new in (232, 16):
            prompt = ask(ours, "host", new)
            ask(ours, "engine hit", new, forget=False)  # the prefix is in the engine's own cache now
            if new == 232:
                self.ask(ours, "host, full prompt", prompt, prefix=number, shared=len(prompt), forget=True)
        if self._round == 1:
            plain.serve([*prefix, *self.tokens(16)])
            for new in (232, 16):
                ask(plain, "no connector, engine hit", new, forget=False)
        if peer is not None:
            # In an order drawn anew, and each after one that its engine served just before: that makes it quicker.
            for engine, arm in self._random.sample([(ours, "host beside LMCache"), (peer, "LMCache")], k=2):
                engine.serve([*prefix, *self.tokens(232)])
                ask(engine, arm, 232)


# -- figures ---------------------------------------------------------------------------------------------------


def _ratios(
    rows: Sequence[ArmRow], over: str, under: str, new: int | None, value: Callable[[ArmRow], float]
) -> list[float]:
    """Of requests for the same prefix in the same round."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        if row["arm"] in (over, under) and new in (None, row["new_tokens"]):
            found.setdefault((row["round"], row["prefix"]), {})[row["arm"]] = value(row)
    return [pair[over] / pair[under] for pair in found.values() if len(pair) == 2]


def summarise(rows: Sequence[ArmRow]) -> dict[str, Any]:
    def ttft(row: ArmRow) -> float:
        return row["ttft_s"]

    def median(arm: str, new: int) -> float:
        return statistics.median(row["ttft_s"] for row in rows if row["arm"] == arm and row["new_tokens"] == new)

    summary: dict[str, Any] = {
        "ttft_vs_engine_hit": statistics.median(_ratios(rows, "host", "engine hit", 232, ttft)),
        "ttft_vs_engine_hit_16": statistics.median(_ratios(rows, "host", "engine hit", 16, ttft)),
        "added_ms_16": 1e3 * (median("host", 16) - median("engine hit", 16)),
        "added_ms_232": 1e3 * (median("host", 232) - median("engine hit", 232)),
        "full_prompt_ms": 1e3 * median("host, full prompt", 0),
        "redis_vs_host": statistics.median(_ratios(rows, "redis", "host", 232, ttft)),
        "vs_recompute": median("host", 232) / statistics.median(r["ttft_s"] for r in rows if r["arm"] == "computed"),
    }
    peer = _ratios(rows, "host beside LMCache", "LMCache", 232, ttft)
    if peer:
        summary["ttft_vs_lmcache"] = statistics.median(peer)
    return summary


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench vllm", description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--model", choices=("random", "smollm2"), default="random", help="about 100 M parameters, or SmolLM2-135M")
    add("--reused", type=int, default=4096, help="tokens of a prefix (default 4096)")
    add("--prefixes", type=int, default=4, help="prefixes (default 4)")
    add("--rounds", type=int, default=5, help="times that each is served (default 5)")
    add("--dtype", default=native_dtype(), help="of weights and KV (default here %(default)s)")
    add("--lmcache", action="store_true", help="compare with LMCache, which `make venv-lmcache` installs beside vLLM")
    add("--python", type=Path, default=PYTHON, help="a Python that has vLLM")
    add("--json", type=Path, help="write the result here")
    return made


def main(argv: list[str]) -> int:
    asked = parser().parse_args(argv)
    for python, wanted in ((asked.python, "venv-vllm"), (LMCACHE_PYTHON, "venv-lmcache" if asked.lmcache else "")):
        if wanted and not python.exists():
            parser().error(f"{python} is not there: `make {wanted}` installs it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines and servers end with it
    run = Run(asked.reused, asked.prefixes, asked.rounds)
    options = {**model_options(asked.model, asked.dtype), "max_tokens": asked.reused + 512}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv", dir="/tmp")))
        redis = stack.enter_context(EmbeddedServer())
        sidecar = stack.enter_context(Sidecar(directory, redis.url))
        sidecar.start("mover.write=through")
        ours = transfer_to("KVStoreConnector", "connectors.vllm", {"address": sidecar.address})
        engines = [
            stack.enter_context(Engine(asked.python, {**options, "transfer": transfer})) for transfer in (ours, None)
        ]
        peer = None
        if asked.lmcache:
            transfer = stack.enter_context(lmcache(LMCACHE_PYTHON))
            peer = stack.enter_context(Engine(LMCACHE_PYTHON, {**options, "transfer": transfer}))
        for engine in [*engines, peer] if peer else engines:
            engine.wait()
        run.warm_up([*engines, peer] if peer else engines)
        run.reuse(engines[0], engines[1], sidecar, peer)
    summary = summarise(run.rows)
    present(run.rows, summary)
    if asked.json:
        write_json(asked.json, "vllm", stamp(), run.rows, {**summary, "model": asked.model, "dtype": asked.dtype})
    return 0


def present(rows: Sequence[ArmRow], summary: dict[str, Any]) -> None:
    groups: dict[tuple[str, int], list[ArmRow]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["new_tokens"]), []).append(row)
    shown = [
        {
            "arm": arm,
            "new_tokens": new,
            "reused": statistics.median(row["hit_tokens"] for row in members),
            **percentiles([row["ttft_s"] for row in members]),
        }
        for (arm, new), members in groups.items()
    ]
    print_table("TTFT, seconds", shown, ["arm", "new_tokens", "reused", "p50", "p90", "max", "count"])
    print_figures("vllm-ttft-cpu", summary)
