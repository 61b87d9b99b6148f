# SPDX-License-Identifier: Apache-2.0
"""Whether a real vLLM engine says the same with the store as transformers does without: one row a feature.

Each row is a scenario of ``tests.engines.vllm_runs``: greedy tokens in fp32 compared, every stored block compared
with recomputed KV, and a control whose stored bytes are wrong and whose tokens must differ. The row without the save
boundary is a control itself: it must store KV that is not the tokens'. Where something is killed or damaged, how much
longer requests took than the same one computed in that engine. Results are written after every row, so that a run that
is cut short leaves what it had. All rows take some seven minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from bench.asked import print_figures
from bench.env import stamp
from bench.report import print_table, write_json

HELP = "does a real vLLM engine say the same with the store: one row a feature, each with a control"
WITHOUT_CLAMP = "ngram_without_clamp"
CROSS_ENGINE = "smollm2"
DAMAGED = (
    "sidecar killed",
    "sidecar gone",
    "sidecar stopped",
    "redis killed",
    "redis gone",
    "part deleted",
    "part damaged",
)
"""What scenarios damage, and time against the same request computed in the same engine."""
SCENARIOS = (
    "base",
    "chunks_64",
    "chunks_256",
    "chunks_2048",
    "in_process",
    "without_prefix_cache",
    "beside_the_step",
    "pages_of_128",
    "blocks_of_64",
    "fine_grid",
    "ngram",
    WITHOUT_CLAMP,
    "draft_model",
    "medusa",
    "eagle",
    "adapters",
    "adapters_rewritten",
    "images",
    "fp8",
    "fp8_e5m2",
    "preemption",
    "windows",
    "windows_in_one_step",
    "windows_in_pages_of_128",
    "windows_kept",
    "windows_and_sinks",
    "windows_alone",
    "windows_through_preemption",
    "windows_in_chats",
    "windows_and_drafts",
    "windows_and_faults",
    "windows_and_aborts",
    "windows_in_a_fleet",
    "chunked_attention",
    "chunked_attention_kept",
    "tenants",
    "aborts",
    "resets",
    "roles",
    "hints",
    "kept",
    "kept_through_preemption",
    "tp2",
    "pp2",
    "tp2_replicas",
    "partial",
    "burst",
    "orphans",
    "embeddings",
    "faults",
    "faults_beside_the_step",
    "killed",
    "sidecar_killed",
    "redis_tier",
    "tiering",
    "both_engines",
    CROSS_ENGINE,
)


def main(argv: list[str]) -> int:
    from tests.engines.runner import PYTHON, Runner

    parser = argparse.ArgumentParser(prog="python -m bench vllm_equal", description="Compare tokens and stored bytes.")
    parser.add_argument("scenarios", nargs="*", default=SCENARIOS, help="of tests.engines.vllm_runs (default: all)")
    parser.add_argument("--python", type=Path, default=PYTHON, help="a Python that has vLLM")
    parser.add_argument("--json", type=Path, help="write the result here")
    asked = parser.parse_args(argv)
    if not asked.python.exists():
        parser.error(f"{asked.python} is not there: `make venv-vllm` installs vLLM")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vllm") as workdir, Runner(Path(workdir), asked.python) as runner:
        for scenario in asked.scenarios:
            rows.append(_row(runner, scenario))
            print(f"{scenario}: {rows[-1]['equal']} in {rows[-1]['seconds']} s", flush=True)
            if asked.json:
                write_json(asked.json, "vllm_equal", stamp(), rows, summarise(rows))
    print_table("equal tokens", rows, ["scenario", "equal", "error", "control_differs", "added_s", "seconds"])
    print_figures("vllm-equal-cpu", summarise(rows))
    return 0


def _row(runner: Any, scenario: str) -> dict[str, Any]:
    began_s = time.monotonic()
    row: dict[str, Any] = {"scenario": scenario, "equal": None, "error": None, "control_differs": None, "added_s": None}
    row["added_ms"] = {}
    try:
        facts = runner.run(scenario)
    except RuntimeError as error:
        facts = {"died": str(error)[-500:]}
    row |= {"seconds": round(time.monotonic() - began_s, 1)} | facts
    if "died" in facts or "not_run" in facts:
        return row
    compared = list(_compared(facts))
    if not compared:
        raise ValueError(f"nothing was compared: {', '.join(facts)}")
    row["equal"] = all(compared)
    row["error"] = max(_values(facts, "error"), default=None)
    if "same_bytes" in facts:  # KV that transformers does not compute: compared with what the engine computes again
        row["error"] = 0.0 if facts["same_bytes"] else float("inf")
    controls = list(_values(facts, "control_differs"))
    row["control_differs"] = all(controls) if controls else None
    row["added_s"] = max(_values(facts, "added_s"), default=None)
    row["deadline_s"] = min(_values(facts, "deadline_s"), default=None)
    row["added_ms"] = _worst((what, 1e3 * s) for one in _values(facts, "added", dict) for what, s in one.items())
    return row


def _worst(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The greatest value of each name."""
    found: dict[str, float] = {}
    for name, value in values:
        found[name] = max(value, found.get(name, value))
    return found


def _values(facts: Mapping[str, Any], name: str, kind: type | UnionType = int | float) -> Iterator[Any]:
    """A fact of the engine, or of every engine that took part."""
    for key, value in facts.items():
        if key == name and isinstance(value, kind):
            yield value
        elif isinstance(value, dict):
            yield from _values(value, name, kind)


def _compared(facts: Mapping[str, Any]) -> Iterator[bool]:
    """Every comparison of tokens, in every engine that took part."""
    for value in [value for name in ("equal", "same") for value in _values(facts, name, bool | list | dict)]:
        yield from [value] if isinstance(value, bool) else value.values() if isinstance(value, dict) else value


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What held, by name; a figure whose row did not run is None."""
    by_name = {row["scenario"]: row for row in rows}
    clamp, cross = by_name.get(WITHOUT_CLAMP, {}), by_name.get(CROSS_ENGINE, {})
    late = [row["added_s"] / row["deadline_s"] for row in rows if row["added_s"] is not None]
    added_ms = _worst(item for row in rows for item in row["added_ms"].items())
    return {
        "num_rows": len(rows),
        "num_equal": sum(row["equal"] is True for row in rows),
        "num_different": sum(row["equal"] is False for row in rows),
        "num_not_run": sum(row["equal"] is None for row in rows),
        "not_run": ", ".join(row["scenario"] for row in rows if row["equal"] is None),
        "worst_error": max(
            (row["error"] for row in rows if row["error"] is not None and row is not clamp), default=None
        ),
        "error_without_save_boundary": clamp.get("error"),
        "controls_that_did_not_differ": ", ".join(row["scenario"] for row in rows if row["control_differs"] is False),
        "num_controls_missing": sum(row["control_differs"] is None and row is not clamp for row in rows),
        "controls_missing": ", ".join(row["scenario"] for row in rows if row["control_differs"] is None),
        "cross_engine_equal": cross.get("equal"),
        "worst_added_delay_vs_deadline": max(late, default=None),
        **{f"added_ms_{what.replace(' ', '_')}": added_ms.get(what) for what in DAMAGED},
    }
