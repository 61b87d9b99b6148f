# SPDX-License-Identifier: Apache-2.0
"""Block sizes: what is reused, stored and waited for, with and without the beginning of a block that only begins alike.

The multi-turn chats of `bench ttft` (shared system prompt and documents; real text in SmolLM2's tokens) are served at
every block size by a connector over an empty host tier of its own. Two ways: whole blocks alone, and with partial reuse
(copy on partial): where the match ends, the first tokens of a block that another chat made are loaded, if they are the
same, and the rest is computed. Hit tokens and bytes are counts and the same in every run; TTFT is a median over all
turns. The model is a seeded Llama of 5 M parameters with SmolLM2's vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from bench.asked import print_figures
from bench.env import stamp
from bench.models import random_llama, smollm2
from bench.options import whole
from bench.report import print_table, write_json
from bench.reuse_plots import plot_blocks
from bench.workload import Workload, multi_turn
from connectors.base import LoadRule
from connectors.transformers import TransformersConnector
from kvstore.config import StoreConfig
from kvstore.store import KVStore

HELP = "hit tokens, bytes stored and TTFT by block size, with and without partial reuse of a block"

SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
WHOLE, PARTIAL = "whole blocks", "with partial reuse"
_NEW_TOKENS = 2

Row = dict[str, object]


class WholeOnly(KVStore):
    """The store as it would be without partial reuse."""

    def match_partial(self, request: str) -> int:
        return 0


def serve(model: PreTrainedModel, work: Workload, block_tokens: int, way: str) -> tuple[list[Row], list[list[int]]]:
    """Every turn once, from an empty store; rows, and what was generated."""
    kind = KVStore if way == PARTIAL else WholeOnly
    rows: list[Row] = []
    outputs: list[list[int]] = []
    with kind(StoreConfig.load({"host": {"capacity_bytes": 1 << 30}})) as store:
        store.wait_ready()
        connector = TransformersConnector(
            model,
            store,
            revision="seed 0",
            block_tokens=block_tokens,
            resident_conversations=0,  # what the store finds is what is counted
            load_rule=LoadRule.ALWAYS,
        )
        for turn in work.turns:
            prompt = torch.from_numpy(turn.token_ids.astype(np.int64))[None]
            done = connector.generate(prompt, max_new_tokens=_NEW_TOKENS, conversation=turn.conversation)
            outputs.append(done.sequences[0, prompt.shape[1] :].tolist())
            rows.append(
                {
                    "block_tokens": block_tokens,
                    "way": way,
                    "user": turn.user,
                    "turn": turn.turn,
                    "prompt_tokens": prompt.shape[1],
                    "reusable_tokens": turn.num_reusable_tokens,
                    "hit_tokens": sum(done.hit_tokens.values()),
                    "ttft_s": done.ttft_s,
                    "load_s": done.load_s,
                    "saved_blocks": done.saved_blocks,
                    "saved_bytes": done.saved_blocks * connector.layout.block_bytes,
                }
            )
        if faults := store.check():
            raise RuntimeError(f"the store ended unhealthy: {faults}")
    return rows, outputs


def measure(users: int, turns: int, rounds: int, seed: int) -> tuple[list[Row], list[Row], dict[str, float | bool]]:
    chat = smollm2(torch.float32)
    work = multi_turn(chat.encode, users=users, turns=turns, num_documents=2, doc_tokens=600, new_tokens=100, seed=seed)
    model = random_llama(0, num_layers=4, num_heads=4, num_kv_heads=4, vocab_size=49_152, max_tokens=8192)
    rows: list[Row] = []
    wanted: list[list[int]] | None = None
    equal = True
    cases = [(size, way) for size in SIZES for way in (WHOLE, PARTIAL)]
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task("cases", total=rounds * len(cases))
        serve(model, work, 64, WHOLE)  # warm-up
        for number in range(rounds):
            for size, way in cases[number % 2 :: 1] + cases[: number % 2]:
                made, outputs = serve(model, work, size, way)
                wanted = wanted or outputs
                equal = equal and outputs == wanted
                rows += [{"round": number, **row} for row in made]
                progress.update(task, advance=1, refresh=True)
    table = [_line(rows, size, way) for size, way in cases]
    line = {(str(each["way"]), int(str(each["block"]))): each for each in table}

    def figure(way: str, size: int, key: str) -> float:
        return float(str(line[way, size][key]))

    summary: dict[str, float | bool] = {
        "outputs_equal": equal,
        "hit_pct_64": figure(WHOLE, 64, "hit_pct"),
        "hit_pct_64_partial": figure(PARTIAL, 64, "hit_pct"),
        "hit_pct_256": figure(WHOLE, 256, "hit_pct"),
        "hit_pct_256_partial": figure(PARTIAL, 256, "hit_pct"),
        "ttft_64_partial_ratio": figure(PARTIAL, 64, "ttft_s") / figure(WHOLE, 64, "ttft_s"),
        "ttft_256_partial_ratio": figure(PARTIAL, 256, "ttft_s") / figure(WHOLE, 256, "ttft_s"),
    }
    return rows, table, summary


def _line(rows: list[Row], size: int, way: str) -> Row:
    mine = [row for row in rows if (row["block_tokens"], row["way"]) == (size, way)]
    rounds = 1 + max(int(str(row["round"])) for row in mine)

    def total(key: str) -> float:
        return sum(float(str(row[key])) for row in mine) / rounds

    later = [float(str(row["ttft_s"])) for row in mine if int(str(row["reusable_tokens"])) > 0]
    return {
        "block": size,
        "way": way,
        "hit_tokens": total("hit_tokens"),
        "hit_pct": 100 * total("hit_tokens") / total("reusable_tokens"),
        "saved_bytes": total("saved_bytes"),
        "ttft_s": statistics.median(later),
        "load_s": statistics.median(float(str(row["load_s"])) for row in mine),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench ttft --scenario blocks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=["transformers"], default="transformers")
    parser.add_argument("--users", type=whole(1, 64), default=6, help="chats (default: %(default)s)")
    parser.add_argument("--turns", type=whole(1, 64), default=4, help="requests a chat (default: %(default)s)")
    parser.add_argument("--rounds", type=whole(1, 20), default=3, help="times that all is served (default: 3)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write {name, env, rows, summary}, and a plot beside it"
    )
    options = parser.parse_args(argv)
    rows, table, summary = measure(options.users, options.turns, options.rounds, options.seed)
    print_table("Block sizes", table, list(table[0]))
    print_figures("blocks-cpu", summary)
    if options.json:
        write_json(options.json, "blocks", stamp(), [*table, *rows], {**summary, "seed": options.seed})
        plot_blocks(table, options.json.with_suffix(".png"))
        print(f"written: {options.json}")
    return 0
