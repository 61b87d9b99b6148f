# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of vLLM run: engines, the sidecar and LMCache's server, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.models import cache_directory, publish, smollm2

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-vllm/bin/python"
LMCACHE_PYTHON = ROOT / ".venv-lmcache/bin/python"
VOCABULARY = 4096
"""Tokens that prompts are made of; every model here has as many."""


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


def model_options(name: str, dtype: str) -> dict[str, object]:
    """What an engine is told of a model: where it lies, and what a token's KV takes.

    Args:
        name: `random`, a seeded Llama of about 100 M parameters, or `smollm2`, the real SmolLM2-135M.
    """
    item = 4 if dtype == "float32" else 2
    if name == "smollm2":
        return {"model": str(smollm2().directory), "dtype": dtype, "token_bytes": 30 * 2 * 3 * 64 * item}
    directory = publish(cache_directory() / "llama-100m-seed0", make_model)
    return {"model": str(directory), "dtype": dtype, "token_bytes": 8 * 2 * 8 * 64 * item}


def native_dtype() -> str:
    """bfloat16 where the CPU computes in it; elsewhere it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    return "bfloat16" if "avx512_bf16" in flags else "float32"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of an engine against itself is told: the model, where vLLM is, where the result goes."""
    add = parser.add_argument
    add("--model", choices=("random", "smollm2"), default="random", help="about 100 M parameters, or SmolLM2-135M")
    add("--dtype", default=native_dtype(), help="of weights and KV (default here %(default)s)")
    add("--python", type=Path, default=PYTHON, help="a Python that has vLLM")
    add("--json", type=Path, help="write the result here")


# -- processes -------------------------------------------------------------------------------------------------


class Engine:
    """`bench.vllm_arms` in a process of its own; `wait` before the first request."""

    def __init__(
        self,
        python: Path,
        options: dict[str, object],
        *,
        module: str = "bench.vllm_arms",
        also: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`also` is added to its environment."""
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the engine
        self._process = subprocess.Popen(
            [str(python), "-m", module, json.dumps(options)],
            cwd=ROOT,
            env={**environ, "PYTHONPATH": str(ROOT), **also},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def wait(self) -> None:
        """Until it is up: engines start side by side, and then each is waited for once."""
        self.answer()

    def serve(
        self, prompt: Sequence[int], *, new: int = 1, forget: bool = True, connected: bool = True
    ) -> dict[str, Any]:
        return self.ask({"prompt": list(prompt), "new": new, "forget": forget, "connected": connected})

    def ask(self, order: dict[str, object]) -> dict[str, Any]:
        self.send(order)
        return self.answer()

    def send(self, order: dict[str, object]) -> None:
        """Ask without waiting: `answer` must follow."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ROW "):
                row: dict[str, Any] = json.loads(line.removeprefix("ROW "))
                return row
        self._log.seek(0)
        raise RuntimeError(f"the engine ended:\n{self._log.read().decode(errors='replace')[-3000:]}")

    def rest(self) -> None:
        """Stop all its threads until `wake`; it must not be serving."""
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Idempotent."""
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self.wake()
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


class Sidecar:
    """`kvstore serve`, which can be ended and started again with other settings; a context manager."""

    def __init__(self, directory: Path, redis_url: str) -> None:
        self.address = f"unix:{directory}/s"
        self._log = directory / "sidecar.log"
        self._command = [sys.executable, "-m", "kvstore.service.cli", "serve", "--listen", self.address]
        self._command += ["--host-capacity", "2GiB", *(("--redis-url", redis_url) if redis_url else ())]
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

    def cpu_s(self) -> float:
        """CPU that it has had so far, threads that ended included."""
        assert self._process is not None
        return time.clock_gettime(~self._process.pid << 3 | 2)  # clock_getcpuclockid(3), which Python lacks

    def hang(self) -> None:
        """Stop it: its sockets stay, and nothing answers, until it is ended."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        """Let it finish what it writes to Redis, and go."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(60)
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def transfer_to(name: str, module: str, extra: dict[str, object]) -> dict[str, object]:
    return {
        "kv_connector": name,
        "kv_connector_module_path": module,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


@contextmanager
def lmcache(python: Path) -> Iterator[dict[str, object]]:
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
            yield transfer_to(
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
