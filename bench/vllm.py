# SPDX-License-Identifier: Apache-2.0
"""Time to first token in a real vLLM engine on the CPU: recompute, the engine's own prefix cache, and the store.

One engine with the connector and one without live through the whole run and take turns, so that ratios compare
requests that were served seconds apart by engines that are equally warm. The sidecar is started again before each
round: the first request for a prefix then finds it in Redis alone, the next ones in host memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.env import stamp
from bench.models import cache_directory, publish
from bench.report import percentiles, print_table, write_json
from kvstore.tiers.valkey import EmbeddedServer

HELP = "time to first token in a real vLLM engine on the CPU, through the sidecar and without"
ROOT = Path(__file__).parent.parent
VOCABULARY = 4096
_START_S = 240.0

TARGETS: dict[str, tuple[str, float]] = {
    "ttft_vs_engine_hit": ("TTFT through the sidecar ÷ the engine's own hit, 232 new tokens", 1.15),
    "added_ms_16": ("milliseconds over the engine's own hit, 16 new tokens", 25.0),
    "redis_vs_host": ("TTFT from Redis, cold host ÷ from host", 1.5),
    "zero_reuse_overhead_pct": ("% of TTFT where nothing is reused", 2.0),
    "zero_reuse_throughput_pct": ("% of throughput where nothing is reused", 2.0),
    "ttft_vs_lmcache": ("TTFT through the sidecar ÷ LMCache's", 0.85),
}


class ArmRow(TypedDict):
    """One request."""

    arm: str
    round: int
    prefix: int
    new_tokens: int
    ttft_s: float
    seconds: float
    hit_tokens: int


def make_model(directory: Path) -> None:
    """A seeded Llama of about 100 M parameters, 16 KiB of KV a token in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(directory)


# -- processes -------------------------------------------------------------------------------------------------


class Engine:
    """`bench.vllm_arms` in a process of its own; `wait` before the first request."""

    def __init__(self, python: Path, options: dict[str, object]) -> None:
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the engine
        self._process = subprocess.Popen(
            [str(python), "-m", "bench.vllm_arms", json.dumps(options)],
            cwd=ROOT,
            env={**environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def wait(self) -> None:
        """Until it is up: engines start side by side, and then each is waited for once."""
        self._answer()

    def serve(self, prompt: Sequence[int], *, new: int = 1, forget: bool = True) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "new": new, "forget": forget}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ROW "):
                row: dict[str, Any] = json.loads(line.removeprefix("ROW "))
                return row
        self._log.seek(0)
        raise RuntimeError(f"the engine ended:\n{self._log.read().decode(errors='replace')[-3000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Sidecar:
    """`kvstore serve`, which can be ended and started again with other settings; a context manager."""

    def __init__(self, directory: Path, redis_url: str) -> None:
        self.address = f"unix:{directory}/s"
        self._log = directory / "sidecar.log"
        self._command = [sys.executable, "-m", "kvstore.service.cli", "serve", "--listen", self.address]
        self._command += ["--host-capacity", "2GiB", "--redis-url", redis_url]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *settings: str) -> None:
        self.end()
        command = [*self._command, *(part for setting in settings for part in ("--set", setting))]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        deadline_s = time.monotonic() + 60
        while "ready:" not in self._log.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"kvstore serve did not become ready:\n{self._log.read_text()}")
            time.sleep(0.05)

    def end(self) -> None:
        """Let it finish what it writes to Redis, and go."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def _transfer(name: str, module: str, extra: dict[str, object]) -> dict[str, object]:
    return {
        "kv_connector": name,
        "kv_connector_module_path": module,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


@contextmanager
def _lmcache(python: Path) -> Iterator[dict[str, object]]:
    """LMCache's server, its memory shared with the engine (its fastest way); yields the engine's settings."""
    port, http_port = 5577, 8099
    command = [str(python), "-m", "lmcache.cli.main", "server", "--host", "localhost", "--port", str(port)]
    command += ["--http-host", "127.0.0.1", "--http-port", str(http_port), "--chunk-size", "256", "--l1-size-gb", "2"]
    command += ["--l1-init-size-gb", "2", "--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
    environ = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*command, "--disable-observability"], env=environ, stdout=log, stderr=log)
        try:
            _wait_for(server, http_port)
            yield _transfer(
                "LMCacheMPConnector",
                "lmcache.integration.vllm.lmcache_mp_connector",
                {
                    "lmcache.mp.host": "tcp://localhost",
                    "lmcache.mp.port": port,
                    "lmcache.mp.mp_transfer_mode": "lmcache_driven",
                },
            )
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Until the server's last port, which is its HTTP one, takes connections."""
    deadline_s = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("LMCache's server did not start") from None
            time.sleep(0.2)


# -- the run ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """What is measured, and what was."""

    reused: int
    num_prefixes: int
    rounds: int
    pairs: int
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
            ask(peer, "LMCache", 232)

    def nothing_reused(self, ours: Engine, plain: Engine, *, prompt_tokens: int = 1024, new: int = 16) -> None:
        """Pairs of prompts that nobody has seen, in alternating order."""
        for number in range(self.pairs):
            self._round = number
            order = [(ours, "nothing reused"), (plain, "no connector, nothing reused")]
            for engine, arm in order if number % 2 else order[::-1]:
                prompt = self.tokens(prompt_tokens)
                self.ask(engine, arm, prompt, prefix=-1, shared=0, new=new, forget=False)


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


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, from order statistics: about √n ranks to each side."""
    ordered = sorted(values)
    reach = 0.98 * len(ordered) ** 0.5
    middle = (len(ordered) - 1) / 2
    return ordered[max(0, int(middle - reach))], ordered[min(len(ordered) - 1, int(middle + reach + 1))]


def summarise(rows: Sequence[ArmRow]) -> dict[str, Any]:
    def ttft(row: ArmRow) -> float:
        return row["ttft_s"]

    def median(arm: str, new: int) -> float:
        return statistics.median(row["ttft_s"] for row in rows if row["arm"] == arm and row["new_tokens"] == new)

    overhead = [100 * (r - 1) for r in _ratios(rows, "nothing reused", "no connector, nothing reused", None, ttft)]
    throughput = [
        100 * (ratio - 1)
        for ratio in _ratios(rows, "nothing reused", "no connector, nothing reused", None, lambda row: row["seconds"])
    ]
    summary: dict[str, Any] = {
        "ttft_vs_engine_hit": statistics.median(_ratios(rows, "host", "engine hit", 232, ttft)),
        "ttft_vs_engine_hit_16": statistics.median(_ratios(rows, "host", "engine hit", 16, ttft)),
        "added_ms_16": 1e3 * (median("host", 16) - median("engine hit", 16)),
        "added_ms_232": 1e3 * (median("host", 232) - median("engine hit", 232)),
        "full_prompt_ms": 1e3 * median("host, full prompt", 0),
        "redis_vs_host": statistics.median(_ratios(rows, "redis", "host", 232, ttft)),
        "vs_recompute": median("host", 232) / statistics.median(r["ttft_s"] for r in rows if r["arm"] == "computed"),
        "zero_reuse_overhead_pct": statistics.median(overhead),
        "zero_reuse_overhead_pct_low": interval(overhead)[0],
        "zero_reuse_overhead_pct_high": interval(overhead)[1],
        "zero_reuse_throughput_pct": statistics.median(throughput),
        "zero_reuse_throughput_pct_low": interval(throughput)[0],
        "zero_reuse_throughput_pct_high": interval(throughput)[1],
        "zero_reuse_pairs": len(overhead),
    }
    peer = _ratios(rows, "host", "LMCache", 232, ttft)
    if peer:
        summary["ttft_vs_lmcache"] = statistics.median(peer)
    return summary


def _native_dtype() -> str:
    """bfloat16 where the CPU computes in it; elsewhere it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    return "bfloat16" if "avx512_bf16" in flags else "float32"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench vllm", description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--reused", type=int, default=4096, help="tokens of a prefix (default 4096)")
    add("--prefixes", type=int, default=4, help="prefixes (default 4)")
    add("--rounds", type=int, default=5, help="times that each is served (default 5)")
    add("--pairs", type=int, default=24, help="pairs of requests that reuse nothing (default 24)")
    add("--dtype", default=_native_dtype(), help="of weights and KV (default here %(default)s)")
    add("--lmcache", action="store_true", help="compare with LMCache, which must be installed beside vLLM")
    add("--python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="a Python that has vLLM")
    add("--json", type=Path, help="write the result here")
    return made


def main(argv: list[str]) -> int:
    asked = parser().parse_args(argv)
    if not asked.python.exists():
        parser().error(f"{asked.python} is not there: `make venv-vllm` installs vLLM")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines and servers end with it
    run = Run(asked.reused, asked.prefixes, asked.rounds, asked.pairs)
    options = {
        "model": str(publish(cache_directory() / "llama-100m-seed0", make_model)),
        "dtype": asked.dtype,
        "max_tokens": asked.reused + 512,
    }
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv", dir="/tmp")))
        redis = stack.enter_context(EmbeddedServer())
        sidecar = stack.enter_context(Sidecar(directory, redis.url))
        sidecar.start("mover.write=through")
        ours = _transfer("KVStoreConnector", "connectors.vllm", {"address": sidecar.address})
        engines = [
            stack.enter_context(Engine(asked.python, {**options, "transfer": transfer})) for transfer in (ours, None)
        ]
        peer = None
        if asked.lmcache:
            transfer = stack.enter_context(_lmcache(asked.python))
            peer = stack.enter_context(Engine(asked.python, {**options, "transfer": transfer}))
        for engine in [*engines, peer] if peer else engines:
            engine.wait()
        run.warm_up([*engines, peer] if peer else engines)
        run.reuse(engines[0], engines[1], sidecar, peer)
        run.nothing_reused(engines[0], engines[1])
    summary = summarise(run.rows)
    present(run.rows, summary)
    if asked.json:
        write_json(asked.json, "vllm", stamp(), run.rows, {**summary, "dtype": asked.dtype})
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
    for name, value in summary.items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        what, limit = TARGETS.get(name, ("", None))
        met = "" if limit is None else f"   {what}: ≤ {limit:g} {'met' if _number(value) <= limit else 'NOT MET'}"
        print(f"{name:<32} {text}{met}")


def _number(value: object) -> float:
    assert isinstance(value, float)
    return value
