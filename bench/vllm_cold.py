# SPDX-License-Identifier: Apache-2.0
"""What the vLLM connector costs where nothing is ever reused: a real engine with it and one without take turns.

Two comparisons, both of requests that take turns within a round, in an order drawn anew for each:

- *between engines*, as asked: an engine with the connector against two that were started without. Engines that are
  alike differ by more than the connector costs, differently at each start, by where their pages and threads come to
  lie. So a start is one observation, however many rounds it has: the median of its rounds. Many starts with few rounds
  say more than few with many.
- *within an engine*: for some requests the connector is taken off the running engine (`bench.vllm_arms`). Pages,
  threads and caches are the same, so a round is one observation. This says best what the connector does. What it would
  not see is an engine that is slower for having been configured with one: that is compared between engines too.

A request is quicker where its engine served the one before it than where others ran meanwhile: caches hold its weights
and code. The engine with the connector serves three arms of a round and the others one each, so its requests would more
often follow one of its own. Hence every timed request follows an untimed one of the same arm, with another prompt: each
is measured as if its engine did nothing else. All pages are used before the first round, in each engine alike.

Two things made engines that are alike differ, and are kept from all of them:

- *the others' threads*. An engine that waits still has 13 threads of Gloo's, each of which wakes 100 times a second.
  With three others waiting, the two threads that compute stood in the queue for some 84 ms a request of one second,
  both together; in another run, with the others stopped, for 31. So an engine is stopped while another serves.
- *the top of the heap*. glibc hands it back to the kernel when a step's tensors are freed, and the next step faults it
  in again: 0 to 42000 pages a request, at 0.8 to 1.5 us each by two regressions, depending on where something small
  lies. From start to start an engine's mean was 8000 to 18000 with our connector, 11000 to 23000 with one that does
  nothing, and 9000 to 14000 with none, of four to six starts each: too few to say whether a connector makes it more,
  which kept heaps would hide. `--trim` leaves them as they are; either way the result says how many faults a request of
  each arm had.

Both came after ten starts without them had given 2.2 %, and 2.2 % with the connector taken off.

`--idle` adds an engine with a connector that does nothing (`bench.vllm_idle`): what vLLM takes for any.

Each has a null beside it, of two arms that do not differ: two engines without, two requests of a round with it taken
off. It says what the measurement itself is good for.

All estimates are Hodges and Lehmann's with the interval of the signed rank test (`bench.paired`), which asks nothing of
how observations are spread: single requests stall. With six starts it spans all of them, at 97 %. This was chosen
before it was run. What the sidecar's process takes of the processors is measured by the kernel, without a comparison.
"""

from __future__ import annotations

import argparse
import math
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

from bench.asked import print_figures
from bench.env import stamp
from bench.paired import estimate
from bench.report import write_json
from bench.vllm_engines import VOCABULARY, Engine, Sidecar, add_flags, model_options, transfer_to
from kvstore.tiers.valkey import EmbeddedServer

HELP = "what the connector costs a vLLM engine where nothing is reused: engines started again and again"
OURS, OFF, OFF_AGAIN, PLAIN, AGAIN = "connector", "taken off", "taken off again", "none", "none again"
IDLE = "idle connector"


@dataclass(frozen=True, slots=True)
class Compared:
    """By how much requests of `arms` take longer than those of `bases`, the geometric mean of each in a round."""

    name: str
    arms: tuple[str, ...]
    bases: tuple[str, ...]
    by_start: bool


_KEEP_HEAP = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""Setting one of the two ends that glibc learns the other, so both are set; 32 MiB is its most."""

_FIRST = 4
"""Untimed requests with which each engine begins: as many as its pages have room for, by `bench.vllm_arms`."""

_COMPARED = (
    Compared("zero_reuse", (OURS,), (PLAIN, AGAIN), by_start=True),
    Compared("no_difference", (AGAIN,), (PLAIN,), by_start=True),
    Compared("configured", (OFF, OFF_AGAIN), (PLAIN, AGAIN), by_start=True),
    Compared("any_connector", (IDLE,), (PLAIN, AGAIN), by_start=True),
    Compared("same_engine", (OURS,), (OFF, OFF_AGAIN), by_start=False),
    Compared("same_engine_no_difference", (OFF_AGAIN,), (OFF,), by_start=False),
)
_MEASURED = (("ttft_s", "overhead_pct"), ("seconds", "throughput_pct"))


class ColdRow(TypedDict):
    """One request; `sidecar_s` is CPU that the sidecar's process had meanwhile, for its upkeep too.

    `faults` are pages that the engine's process had to be given.
    """

    arm: str
    start: int
    pair: int
    ttft_s: float
    seconds: float
    sidecar_s: float
    faults: int


class Serves(Protocol):
    """An engine, as `bench.vllm_engines.Engine`."""

    def serve(
        self, prompt: Sequence[int], *, new: int = 1, forget: bool = True, connected: bool = True
    ) -> dict[str, Any]: ...

    def rest(self) -> None: ...

    def wake(self) -> None: ...


class UsesCpu(Protocol):
    """A process, as `bench.vllm_engines.Sidecar`."""

    def cpu_s(self) -> float: ...


@dataclass(frozen=True)
class Start:
    """The engines of one start: which serves an arm, and what they are asked."""

    number: int
    engines: Mapping[str, Serves]
    sidecar: UsesCpu
    prompt_tokens: int
    new: int
    rng: random.Random

    def measure(self, pairs: int) -> list[ColdRow]:
        """Prompts that nobody has seen, one engine at a time; the others are stopped, and all are afterwards."""
        for engine in self.engines.values():
            engine.rest()
        for arm in [arm for arm in (OURS, IDLE, PLAIN, AGAIN) if arm in self.engines] * _FIRST:  # an engine each
            with self._awake(arm):
                self._serve(arm, self._prompt())
        rows: list[ColdRow] = []
        for pair in range(pairs):
            for arm in self.rng.sample(list(self.engines), k=len(self.engines)):
                with self._awake(arm):
                    rows.append(self._timed(arm, pair))
        return rows

    def _timed(self, arm: str, pair: int) -> ColdRow:
        self._serve(arm, self._prompt())
        before_s = self.sidecar.cpu_s()
        row = self._serve(arm, self._prompt())
        sidecar_s = self.sidecar.cpu_s() - before_s
        # By chance a prompt begins as one of the last did, for a token or two, and these are reused.
        assert row["hit_tokens"] < 8
        return ColdRow(
            arm=arm,
            start=self.number,
            pair=pair,
            ttft_s=row["ttft_s"],
            seconds=row["seconds"],
            sidecar_s=sidecar_s,
            faults=row["faults"],
        )

    def check(self) -> None:
        """That one arm has a connector and the other has none: what each served, and whether it can be had again."""
        for arm, saved in ((OURS, True), (OFF, False)):
            prompt = self._prompt()
            with self._awake(arm):  # one engine
                self._serve(arm, prompt)
                again = self.engines[OURS].serve(prompt, forget=True)
            assert (again["hit_tokens"] > self.prompt_tokens // 2) == saved, (arm, again["hit_tokens"])

    @contextmanager
    def _awake(self, arm: str) -> Iterator[None]:
        self.engines[arm].wake()
        try:
            yield
        finally:
            self.engines[arm].rest()

    def _serve(self, arm: str, prompt: list[int]) -> dict[str, Any]:
        return self.engines[arm].serve(prompt, new=self.new, forget=False, connected=arm not in (OFF, OFF_AGAIN))

    def _prompt(self) -> list[int]:
        return [self.rng.randrange(1, VOCABULARY) for _ in range(self.prompt_tokens)]


def log_ratios(rows: Sequence[ColdRow], compared: Compared, what: str) -> dict[int, list[float]]:
    """By start, one a round: what `arms` took over what `bases` did, as a logarithm."""
    logs: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        logs.setdefault((row["start"], row["pair"]), {})[row["arm"]] = math.log(row[what])  # type: ignore[literal-required]
    found: dict[int, list[float]] = {}
    for (start, _), took in logs.items():
        above, below = (statistics.fmean(took[arm] for arm in arms) for arms in (compared.arms, compared.bases))
        found.setdefault(start, []).append(above - below)
    return found


def summarise(rows: Sequence[ColdRow]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    there = {row["arm"] for row in rows}
    for compared in _COMPARED:
        for what, figure in _MEASURED if {*compared.arms, *compared.bases} <= there else ():
            starts = log_ratios(rows, compared, what)
            medians = [statistics.median(start) for start in starts.values()]
            key = f"{compared.name}_{figure}"
            summary[key], summary[f"{key}_low"], summary[f"{key}_high"] = estimate(
                medians if compared.by_start else [value for start in starts.values() for value in start]
            )
            summary[f"{key}_by_start"] = ", ".join(f"{100 * math.expm1(value):.2f}" for value in medians)
    busy, idle = ([row for row in rows if (row["arm"] == OURS) == ours] for ours in (True, False))
    num_pairs = len(busy)
    for arm in sorted(there):
        faults = statistics.fmean(row["faults"] for row in rows if row["arm"] == arm)
        summary[f"faults_{arm.replace(' ', '_')}"] = faults
    return {
        **summary,
        "sidecar_cpu_ms_a_request": 1e3 * statistics.fmean(row["sidecar_s"] for row in busy),
        "sidecar_cpu_ms_idle": 1e3 * statistics.fmean(row["sidecar_s"] for row in idle),
        "num_starts": len({row["start"] for row in rows}),
        "num_pairs": num_pairs,
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench vllm_cold", description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--starts", type=int, default=6, help="times that the engines are started (default 6)")
    add("--pairs", type=int, default=8, help="rounds of requests a start (default 8)")
    add("--prompt", type=int, default=1024, help="tokens of a prompt (default 1024)")
    add("--new", type=int, default=16, help="tokens of an answer (default 16)")
    add("--one-engine", action="store_true", help="only compare within an engine")
    add("--idle", action="store_true", help="also an engine with a connector that does nothing")
    add("--trim", action="store_true", help="let glibc hand freed memory back after each step, as it does by itself")
    add_flags(made)
    return made


def main(argv: list[str]) -> int:
    asked = parser().parse_args(argv)
    if not asked.python.exists():
        parser().error(f"{asked.python} is not there: `make venv-vllm` installs vLLM")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines and servers end with it
    rng, rows = random.Random(1), []
    options = {**model_options(asked.model, asked.dtype), "max_tokens": 2 * asked.prompt}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv", dir="/tmp")))
        redis = stack.enter_context(EmbeddedServer())
        sidecar = stack.enter_context(Sidecar(directory, redis.url))
        sidecar.start()
        ours = transfer_to("KVStoreConnector", "connectors.vllm", {"address": sidecar.address})
        kinds = {OURS: ours} if asked.one_engine else {OURS: ours, PLAIN: None, AGAIN: None}
        if asked.idle:
            kinds[IDLE] = transfer_to("IdleConnector", "bench.vllm_idle", {})
        also = {} if asked.trim else _KEEP_HEAP
        for number in range(asked.starts):
            with ExitStack() as engines:
                made = {}
                for arm in rng.sample(list(kinds), k=len(kinds)):
                    made[arm] = engines.enter_context(
                        Engine(asked.python, {**options, "transfer": kinds[arm]}, also=also)
                    )
                for engine in made.values():
                    engine.wait()
                arms = {**made, OFF: made[OURS], OFF_AGAIN: made[OURS]}
                start = Start(number, arms, sidecar, asked.prompt, asked.new, rng)
                rows += start.measure(asked.pairs)
                start.check()
            print(f"start {number}: {summarise(rows)}", file=sys.stderr, flush=True)
    summary = summarise(rows)
    print_figures("vllm-cold-cpu", summary)
    if asked.json:
        settings = {"model": asked.model, "dtype": asked.dtype, "prompt_tokens": asked.prompt, "new": asked.new}
        settings["heap"] = "trimmed" if asked.trim else "kept"
        write_json(asked.json, "vllm_cold", stamp(), rows, {**summary, **settings})
    return 0
