# SPDX-License-Identifier: Apache-2.0
"""The commands of `connectors/vllm.md`, run as they stand there: a second turn comes through the sidecar."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.runner import ROOT, there_is_vllm
from tests.ports import free_ports

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not there_is_vllm(), reason="did NOT run: no vLLM here; `make venv-vllm` installs it"),
]

LIMIT_S = 300
"""What a newcomer is promised, from the end of the installation on."""


def commands() -> list[str]:
    page = (ROOT / "connectors/vllm.md").read_text(encoding="utf-8")
    section = page.split("## Try it on a CPU")[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        yield Path(name) / "kvstore"


def test_who_follows_the_page_sees_a_second_turn_come_from_the_store_in_time(place: Path) -> None:
    blocks = commands()
    assert len(blocks) == 3
    script = "\n".join(blocks)
    (port,) = free_ports(1)
    for on_the_page, here in (("/tmp/kvstore", str(place)), ("8391", str(port))):  # others may follow it meanwhile
        assert on_the_page in script
        script = script.replace(on_the_page, here)
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # it is not on the page
    began_s = time.monotonic()
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        # Read line by line: what runs in the background keeps the pipe open after the shell has ended.
        assert shell.stdout is not None
        usages = [ast.literal_eval(line[: line.rindex("}") + 1]) for _, line in zip("12", shell.stdout, strict=False)]
        took_s = time.monotonic() - began_s
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        shell.communicate(timeout=60)
    assert len(usages) == 2, f"the engine's log: {(place / 'vllm.log').read_text()[-3000:]}"
    first, second = usages
    assert not (first["prompt_tokens_details"] or {}).get("cached_tokens")
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert first["total_tokens"] - 64 < cached < second["prompt_tokens"]
    assert took_s < LIMIT_S
