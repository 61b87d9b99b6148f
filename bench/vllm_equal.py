# SPDX-License-Identifier: Apache-2.0
"""Whether a real vLLM engine says the same with the store as transformers does without: one row a feature.

Each row is a scenario of ``tests.engines.vllm_runs`` in a process of its own: greedy tokens in fp32 compared, every
stored block compared with recomputed KV, and a control whose stored bytes are spoiled and whose tokens must differ.
The result is written after every row, so that a run that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.env import stamp
from bench.report import print_table, write_json

HELP = "does a real vLLM engine say the same with the store: one row a feature, each with a control"
ROOT = Path(__file__).parent.parent
SCENARIOS = (
    "base",
    "tp2",
    "fp8",
    "adapters",
    "preemption",
    "ngram",
    "ngram_without_clamp",
    "both_engines",
    "through_sidecar",
    "pp2",
    "tenants",
    "chunks_64",
    "chunks_256",
    "without_prefix_cache",
    "beside_the_step",
    "pages_of_128",
    "blocks_of_64",
    "fine_grid",
    "faults",
    "faults_beside_the_step",
    "aborts",
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench vllm_equal", description="Compare tokens and stored bytes.")
    parser.add_argument("scenarios", nargs="*", default=SCENARIOS, help="of tests.engines.vllm_runs (default: all)")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="a Python that has vLLM")
    parser.add_argument("--json", type=Path, help="write the result here")
    asked = parser.parse_args(argv)
    if not asked.python.exists():
        parser.error(f"{asked.python} is not there: `make venv-vllm` installs vLLM")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vllm") as workdir:
        for scenario in asked.scenarios:
            rows.append(_row(asked.python, scenario, workdir))
            print(json.dumps(rows[-1]), flush=True)
            if asked.json:
                write_json(asked.json, "vllm_equal", stamp(), rows, _summary(rows))
    print_table("equal tokens", rows, ["scenario", "equal", "error", "control_differs", "seconds"])
    return 0


def _row(python: Path, scenario: str, workdir: str) -> dict[str, Any]:
    began_s = time.monotonic()
    done = subprocess.run(
        [str(python), "-m", "tests.engines.vllm_runs", scenario, workdir],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    seconds = round(time.monotonic() - began_s, 1)
    if not lines:
        return {"scenario": scenario, "equal": None, "seconds": seconds, "failed": done.stderr[-500:]}
    facts: dict[str, Any] = json.loads(lines[-1].removeprefix("FACTS "))
    if "not_run" in facts:
        return {"scenario": scenario, **facts, "equal": None, "seconds": seconds}
    return {"scenario": scenario, **facts, "equal": _equal(facts), "seconds": seconds}


def _equal(facts: dict[str, Any]) -> bool:
    """Whether every comparison of tokens held, in every engine of a fleet."""
    found = facts.get("equal", facts.get("same"))
    if found is None:
        return all(_equal(one) for one in facts.values())
    return all(found.values() if isinstance(found, dict) else found)


def _summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "num_rows": len(rows),
        "num_equal": sum(row["equal"] is True for row in rows),
        "num_not_run": sum(row["equal"] is None for row in rows),
    }


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
