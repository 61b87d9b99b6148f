# SPDX-License-Identifier: Apache-2.0
"""Multi-turn chat: time to first token by turn, with the prefix recomputed or reused from each tier.

Several users chat about shared documents after one system prompt; turns arrive interleaved, so that a small
device cache overflows. Every arm serves the same requests, one right after the other in rotating order, and
every arm's output is compared with that of the uncached run. Requests that share nothing are a second workload:
what the store costs where it is of no use.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bench.asked import Asked, figures_of, print_figures
from bench.engines import ENGINES, Arm, Memory
from bench.env import stamp
from bench.models import ChatModel, smollm2
from bench.options import size, whole
from bench.paired import Estimate, estimate
from bench.report import TtftRow, html_page, plot_hits_by_tier, plot_ttft_by_turn, print_table, write_json
from bench.workload import Turn, Workload, multi_turn, zero_reuse

HELP = "time to first token in multi-turn chats, by where the prefix comes from"

# Arms that are compared to within a few percent stand side by side: the machine's speed drifts by more than that.
REUSE_ARMS = ("device", "device+host", "redis", "host", "device, unlimited", "recompute", "store down")
ZERO_ARMS = ("store, write-through", "store", "recompute", "store down")
BASE = "recompute"
_ZERO = "zero reuse: "
"""What arms are called in rows of the workload that shares nothing."""
_SHOWN = ("recompute", "store down", "redis", "host", "device+host", "device", "device, unlimited")
"""In this order tables show what was reused from where: what is furthest away first."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run. The defaults are those of the published figures."""

    engine: str = "transformers"
    users: int = 4
    turns: int = 4
    documents: int = 2
    doc_tokens: int = 1600
    new_tokens: int = 100
    zero_requests: int = 28
    max_new_tokens: int = 8
    min_reused: int = 1500
    device_bytes: int = 128 << 20
    host_bytes: int = 2 << 30
    redis_bytes: int = 4 << 30
    seed: int = 0
    dtype: str = "float32"


def run(settings: Settings, chat: ChatModel | None = None) -> tuple[list[TtftRow], dict[str, object]]:
    """Run every arm over both workloads; rows, and the figures drawn from them. SmolLM2 unless given a model."""
    chat = chat or smollm2(getattr(torch, settings.dtype))
    memory = Memory(settings.device_bytes, settings.host_bytes, settings.redis_bytes)
    engine = ENGINES.load(settings.engine)(chat, memory)
    reuse = multi_turn(
        chat.encode,
        users=settings.users,
        turns=settings.turns,
        num_documents=settings.documents,
        doc_tokens=settings.doc_tokens,
        new_tokens=settings.new_tokens,
        seed=settings.seed,
    )
    zero = zero_reuse(chat.encode, reuse, settings.seed, settings.zero_requests)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawn between requests only: a refreshing thread would take a core from what is timed.
    with Progress(*columns, auto_refresh=False) as progress:
        first = progress.add_task("reuse", total=len(reuse.turns) * len(REUSE_ARMS))
        second = progress.add_task("zero reuse", total=len(zero.turns) * len(ZERO_ARMS))
        rows = _replay(progress, first, reuse.turns, _start(engine.arms, REUSE_ARMS), settings)
        zero_rows = _replay(progress, second, zero.turns, _start(engine.arms, ZERO_ARMS), settings)
    for row in zero_rows:
        row["arm"] = _ZERO + row["arm"]
    summary = summarise(rows, zero_rows, reuse, settings.min_reused)
    return rows + zero_rows, summary


def _start(known: Mapping[str, Callable[[], Arm]], names: Sequence[str]) -> dict[str, Arm]:
    return {name: known[name]() for name in names}


def _replay(
    progress: Progress, task: TaskID, turns: Sequence[Turn], arms: dict[str, Arm], settings: Settings
) -> list[TtftRow]:
    """Serve each turn in every arm, in an order that rotates, so that no arm always follows the same one."""
    rows: list[TtftRow] = []
    names = list(arms)
    try:
        _warm_up(arms, turns[0], settings)
        for number, turn in enumerate(turns):
            outputs: dict[str, tuple[int, ...]] = {}
            order = names[number % len(names) :] + names[: number % len(names)]
            for name in order if number % 2 else order[::-1]:
                arms[name].prepare()
                served = arms[name].serve(turn.token_ids, turn.conversation, turn.turn, settings.max_new_tokens)
                arms[name].prepare()  # what it still writes down would be billed to the arm that follows
                outputs[name] = served.output
                rows.append(
                    TtftRow(
                        arm=name,
                        turn=turn.turn,
                        user=turn.user,
                        ttft_s=served.ttft_s,
                        prompt_tokens=len(turn.token_ids),
                        hit_tokens=dict(served.hit_tokens),
                        bytes_moved=served.bytes_moved,
                        equal=False,
                    )
                )
                progress.update(task, advance=1, refresh=True)
            for row in rows[-len(names) :]:
                row["equal"] = outputs[row["arm"]] == outputs[BASE]
            if not progress.console.is_terminal:  # a bar in a file is seen when all is over
                title, left = progress.tasks[task].description, _left(progress)
                print(f"{title}: {number + 1} of {len(turns)} requests, in {len(names)} arms each{left}", flush=True)
    finally:
        for arm in arms.values():
            arm.close()
    return rows


def _left(progress: Progress) -> str:
    """How long it still takes, as requests of all arms went so far."""
    num_done = sum(task.completed for task in progress.tasks)
    num_left = sum(task.total or 0 for task in progress.tasks) - num_done
    if not num_left:
        return ""
    left_s = (progress.tasks[0].elapsed or 0) / num_done * num_left
    return f"; about {left_s / 60:.0f} min left" if left_s >= 90 else f"; about {left_s:.0f} s left"


def _warm_up(arms: dict[str, Arm], turn: Turn, settings: Settings) -> None:
    """One short request an arm, a prompt backwards: kernels, allocators, connections, page faults."""
    for name, arm in arms.items():
        arm.serve(turn.token_ids[300:0:-1], f"warm-up {name}", 1, settings.max_new_tokens)


def summarise(
    rows: Sequence[TtftRow], zero_rows: Sequence[TtftRow], workload: Workload, min_reused: int
) -> dict[str, object]:
    """The named figures. Ratios are medians over the same requests, compared one by one; overheads have intervals."""
    reusable = {(turn.user, turn.turn): turn.num_reusable_tokens for turn in workload.turns}
    chosen = [key for key, tokens in reusable.items() if key[1] >= 2 and tokens >= min_reused]
    by_arm: dict[str, dict[tuple[int, int], TtftRow]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["user"], row["turn"]] = row

    def ratio(over: str, under: str, keys: Sequence[tuple[int, int]]) -> float:
        return statistics.median(by_arm[over][key]["ttft_s"] / by_arm[under][key]["ttft_s"] for key in keys)

    summary: dict[str, object] = {
        "outputs_equal": all(row["equal"] for row in [*rows, *zero_rows]),
        "speedup_host": ratio("recompute", "host", chosen),
        "speedup_redis": ratio("recompute", "redis", chosen),
        "speedup_device": ratio("recompute", "device, unlimited", chosen),
        "host_vs_device": ratio("host", "device, unlimited", chosen),
        "redis_vs_device": ratio("redis", "device, unlimited", chosen),
        **_overhead("zero_reuse", zero_rows, "store"),
        "zero_reuse_write_through_overhead_pct": compared(zero_rows, "store, write-through").pct,
        **_overhead("store_down", [*rows, *zero_rows], "store down"),
        "requests_compared": len(chosen),
        "workload_digest": workload.digest,
    }
    for arm, found in by_arm.items():
        key = arm.replace(", ", "_").replace("+", "_").replace(" ", "_")
        summary[f"ttft_turn2_p50_{key}_s"] = statistics.median(found[key]["ttft_s"] for key in chosen)
    return summary


def _overhead(name: str, rows: Sequence[TtftRow], arm: str) -> dict[str, float]:
    found = compared(rows, arm)
    return {
        f"{name}_overhead_pct": found.pct,
        f"{name}_overhead_pct_low": found.low_pct,
        f"{name}_overhead_pct_high": found.high_pct,
    }


def compared(rows: Sequence[TtftRow], arm: str) -> Estimate:
    """By how much `arm` takes longer than computing, over the requests of both workloads that are among `rows`."""
    requests: dict[tuple[bool, int, int], dict[str, float]] = {}
    for row in rows:
        alone, name = row["arm"].startswith(_ZERO), row["arm"].removeprefix(_ZERO)
        requests.setdefault((alone, row["user"], row["turn"]), {})[name] = row["ttft_s"]
    return estimate([math.log(one[arm] / one[BASE]) for one in requests.values()])


def by_turn(rows: Sequence[TtftRow]) -> list[dict[str, object]]:
    """Median TTFT and hits of each arm, turn by turn."""
    groups: dict[tuple[str, int], list[TtftRow]] = {}
    for row in sorted(rows, key=lambda row: (row["turn"], _SHOWN.index(row["arm"]) if row["arm"] in _SHOWN else 0)):
        groups.setdefault((row["arm"], row["turn"]), []).append(row)
    table: list[dict[str, object]] = []
    for (arm, turn), members in groups.items():
        tiers = {tier for row in members for tier in row["hit_tokens"]}
        hits = {tier: statistics.mean(row["hit_tokens"].get(tier, 0) for row in members) for tier in sorted(tiers)}
        table.append(
            {
                "arm": arm,
                "turn": turn,
                "requests": len(members),
                "prompt": round(statistics.mean(row["prompt_tokens"] for row in members)),
                "from": ", ".join(f"{tier} {tokens:.0f}" for tier, tokens in hits.items()) or "computed",
                "TTFT p50": f"{statistics.median(row['ttft_s'] for row in members):.3f} s",
                "max": f"{max(row['ttft_s'] for row in members):.3f} s",
                "equal": all(row["equal"] for row in members),
            }
        )
    return table


def present(rows: list[TtftRow], summary: dict[str, object], json: str | None, html: str | None) -> None:
    """Print the table and the figures beside their targets; write the JSON and the page."""
    table = by_turn(reused(rows)) + _zero_table(rows)
    print_table("Time to first token", table, list(table[0]))
    print_figures("ttft-cpu", summary)
    findings = [(key, summary[key], figure.bound, figure.met(summary[key])) for key, figure in asked().items()]
    write("ttft", rows, summary, findings, json, html)


def reused(rows: Sequence[TtftRow]) -> list[TtftRow]:
    """Those of the chats."""
    return [row for row in rows if not row["arm"].startswith(_ZERO)]


def alone(rows: Sequence[TtftRow]) -> list[TtftRow]:
    """Those of requests that share nothing."""
    return [row for row in rows if row["arm"].startswith(_ZERO)]


def asked() -> dict[str, Asked]:
    """Figures that have targets."""
    return {key: figure for key, figure in figures_of("ttft-cpu").items() if figure.asked}


def write(
    name: str,
    rows: list[TtftRow],
    summary: dict[str, object],
    findings: list[tuple[str, object, str, bool | None]],
    json: str | None,
    html: str | None,
) -> None:
    """The JSON and the page, with figures beside their targets."""
    env = stamp()
    if json:
        write_json(json, name, env, [dict(row) for row in rows], summary)  # type: ignore[arg-type]
        print(f"result: {json}")
    if html:
        html_page(
            html,
            "kvstore: time to first token in multi-turn chats",
            "Users ask several turns about shared documents. Each request was served once in every arm, with the "
            "same text, and its output compared with that of the run without any cache. Arms differ in where the "
            "KV of the prompt's prefix came from.",
            findings,  # type: ignore[arg-type]
            [
                ("Time to first token by turn; each dot is a request.", plot_ttft_by_turn(reused(rows))),
                ("Where the prompt's tokens came from.", plot_hits_by_tier(reused(rows))),
            ],
            [dict(row) for row in rows],
            ["arm", "user", "turn", "prompt_tokens", "hit_tokens", "ttft_s", "bytes_moved", "equal"],
            env,
        )
        print(f"report: {html}")


def _zero_table(rows: Sequence[TtftRow]) -> list[dict[str, object]]:
    """All turns of an arm together: where nothing is reused they are alike."""
    zero = [TtftRow(**{**row, "turn": 0}) for row in alone(rows)]
    return [{**line, "turn": "all"} for line in by_turn(zero)]


def parser() -> argparse.ArgumentParser:
    """Options of `python -m bench ttft`; defaults are those of the published figures."""
    defaults = Settings()
    made = argparse.ArgumentParser(
        prog="python -m bench ttft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--scenario", choices=SCENARIOS, default=SCENARIOS[0], help="others have options of their own: add --help")
    add(
        "--engine",
        choices=[*ENGINES, "vllm"],
        default=defaults.engine,
        help="vllm has options of its own: see `python -m bench vllm --help`",
    )
    add("--users", type=whole(1, 64), default=defaults.users, help="chats (default: %(default)s)")
    add("--turns", type=whole(2, 64), default=defaults.turns, help="requests a chat (default: %(default)s)")
    add("--documents", type=whole(1, 64), default=defaults.documents, help="shared documents (default: %(default)s)")
    add(
        "--doc-tokens",
        type=whole(64, 100_000),
        default=defaults.doc_tokens,
        help="tokens a document (default: %(default)s)",
    )
    add(
        "--new-tokens",
        type=whole(8, 10_000),
        default=defaults.new_tokens,
        help="new tokens a turn (default: %(default)s)",
    )
    add(
        "--zero-requests",
        type=whole(1, 1_000),
        default=defaults.zero_requests,
        help="requests without reuse (%(default)s)",
    )
    add(
        "--max-new-tokens",
        type=whole(1, 1_000),
        default=defaults.max_new_tokens,
        help="tokens to generate (%(default)s)",
    )
    add(
        "--min-reused",
        type=whole(1, 1_000_000),
        default=defaults.min_reused,
        help="reused tokens that count in ratios (%(default)s)",
    )
    add("--device-bytes", type=size(), default=defaults.device_bytes, metavar="SIZE", help="device budget (128MiB)")
    add("--host-bytes", type=size(64 << 20), default=defaults.host_bytes, metavar="SIZE", help="host tier (2GiB)")
    add("--redis-bytes", type=size(64 << 20), default=defaults.redis_bytes, metavar="SIZE", help="shared tier (4GiB)")
    add("--dtype", choices=["float32", "bfloat16"], default=defaults.dtype)
    add("--seed", type=whole(0, 2**32 - 1), default=defaults.seed)
    add("--json", metavar="FILE", help="write {name, env, rows, summary}")
    add("--html", metavar="FILE", help="write a self-contained page with plots")
    return made


SCENARIOS = ("chats", "burst", "breakeven", "blocks")
"""Each but the first is a module of this package, with options of its own."""


def leading_options() -> argparse.ArgumentParser:
    """`--scenario` and `--engine` alone: what else may be said depends on them."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    made.add_argument("--scenario", choices=SCENARIOS, default=SCENARIOS[0])
    made.add_argument("--engine")
    return made


def main(argv: list[str]) -> int:
    known, rest = leading_options().parse_known_args(argv)
    if known.scenario != SCENARIOS[0]:
        engine = [] if known.engine is None else ["--engine", known.engine]
        return int(import_module(f"bench.{known.scenario}").main([*engine, *rest]))
    if known.engine == "vllm":  # an engine of its own, in a Python of its own, with other arms
        from bench import vllm

        return vllm.main(rest)
    options = vars(parser().parse_args(argv))
    del options["scenario"]
    json, html = options.pop("json"), options.pop("html")
    if html is None and json is not None:
        html = str(Path(json).with_suffix(".html"))
    rows, summary = run(Settings(**options))
    present(rows, summary, json, html)
    return 0
