# SPDX-License-Identifier: Apache-2.0
"""The process that runs scenarios of `vllm_runs` under the Python that has vLLM, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ.get("TEST_VLLM_PYTHON") or ROOT / ".venv-vllm/bin/python")
"""What `make venv-vllm` prepares, or another Python with vLLM."""


_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
"""Of the process before it begins: OpenMP looks once, when torch is loaded. Two threads on tensors of this size spend
their time waiting for each other, four times the CPU time of one, and more where others want a core."""


def there_is_vllm() -> bool:
    """Whether PYTHON is there and whole: an installation that was cut short has no mark."""
    return PYTHON.exists() and ("TEST_VLLM_PYTHON" in os.environ or (PYTHON.parent.parent / ".ready").exists())


class Runner:
    """Runs scenarios one after the other; a context manager. `workdir` takes models, answers and logs."""

    def __init__(self, workdir: Path, python: Path = PYTHON) -> None:
        self._workdir = workdir
        # Bytecode is written whatever the environment says: importing vLLM without it takes half a minute. Settings of
        # a store are not for these ones.
        environ = {
            name: value
            for name, value in os.environ.items()
            if name != "PYTHONDONTWRITEBYTECODE" and not name.startswith("KVSTORE_")
        }
        self._log = (workdir / "runner.log").open("wb")
        self._process = subprocess.Popen(
            [str(python), "-m", "tests.engines.vllm_runs", str(workdir)],
            cwd=ROOT,
            env={**environ, **_SETTINGS, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )

    def run(self, scenario: str, timeout_s: float = 280) -> dict[str, Any]:
        """What the scenario saw. Raises RuntimeError, with the end of its log, where it died or took too long."""
        if scenario == "smollm2":
            self._take_smollm2()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        try:
            self._process.stdin.write(f"{scenario}\n".encode())
            self._process.stdin.flush()
            answer = b""
            while answer.strip() != f"done {scenario}".encode():  # vLLM prints lines of its own
                ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
                if not ready:
                    raise RuntimeError(f"{scenario} took more than {timeout_s:g} s\n{self._said(scenario)}")
                answer = self._process.stdout.readline()
                if not answer:
                    raise RuntimeError(f"the runner ended\n{self._said('runner')}")
        except BrokenPipeError:
            raise RuntimeError(f"the runner ended\n{self._said('runner')}") from None
        found = self._workdir / f"{scenario}.json"
        if not found.exists():
            raise RuntimeError(f"{scenario} died\n{self._said(scenario)}")
        facts: dict[str, Any] = json.loads(found.read_text())
        return facts

    def _take_smollm2(self) -> None:
        from bench.models import smollm2

        link = self._workdir / "smollm2"
        if not link.exists():
            link.symlink_to(smollm2().directory)

    def _said(self, name: str) -> str:
        log = self._workdir / f"{name}.log"
        return log.read_text(errors="replace")[-4000:] if log.exists() else ""

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with whatever scenarios that died left behind
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
