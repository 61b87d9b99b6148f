# SPDX-License-Identifier: Apache-2.0
"""Request traces for policies: one JSON object a line, as published with Mooncake (FAST 2025).

`timestamp` in milliseconds, `input_length` in tokens, `hash_ids`: one id for each block of the prompt, the unfinished
last one included, equal where the block and all before it are. Only these are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvstore.block import Chain, ModelId, Root
from kvstore.errors import ConfigError

# What a block holds does not matter here, only which one it is: a trace's id is all of its tokens.
MODEL = ModelId(
    model="trace", revision="1", kv_dtype="bfloat16", num_layers=1, num_kv_heads=1, head_dim=16, block_tokens=2
)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. `blocks` are numbers, equal where the block and all before it are."""

    time_s: float
    prompt_tokens: int
    chain: Chain
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of time; what happens from `split_s` on is counted."""

    name: str
    requests: Sequence[Request]
    num_unique: int
    split_s: float

    def counted(self, request: Request) -> bool:
        return request.time_s >= self.split_s

    @property
    def num_counted_blocks(self) -> int:
        return sum(len(request.blocks) for request in self.requests if self.counted(request))


def read_trace(path: Path, counted_share: float = 0.5) -> Trace:
    """The trace in a file, its last `counted_share` of time counts. Raises ConfigError for a bad line or none."""
    lines: list[tuple[float, int, list[int]]] = []
    if not path.is_file():
        raise ConfigError(f"there is no trace {path}: give a file as Mooncake publishes them, or generated:all")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                ids = [int(each) for each in item["hash_ids"]]
                lines.append((float(item["timestamp"]) / 1e3, int(item["input_length"]), ids))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path.name}:{number}: {error!r}: each line needs timestamp, input_length and hash_ids"
                ) from None
    return make_trace(path.stem, lines, counted_share)


def make_trace(name: str, lines: Sequence[tuple[float, int, Sequence[int]]], counted_share: float = 0.5) -> Trace:
    """A trace of (seconds, prompt tokens, block ids)."""
    lines = sorted((line for line in lines if line[2]), key=lambda line: line[0])
    if not lines:
        raise ConfigError(f"trace {name!r} has no request with blocks")
    root = Root(MODEL)
    numbers: dict[bytes, int] = {}
    requests: list[Request] = []
    for time_s, prompt_tokens, ids in lines:
        words = np.asarray(ids, np.uint64)
        chain = Chain(root, np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], axis=1).ravel())
        blocks = tuple(numbers.setdefault(block, len(numbers)) for block in chain.ids)
        requests.append(Request(time_s, prompt_tokens, chain, blocks))
    first_s, last_s = requests[0].time_s, requests[-1].time_s
    return Trace(name, requests, len(numbers), last_s - (last_s - first_s) * counted_share)
