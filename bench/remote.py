# SPDX-License-Identifier: Apache-2.0
"""Loads and saves of a client without a mapping, beside what bare gRPC streams in the same run."""

from __future__ import annotations

import statistics
import time

import numpy as np

import kvstore
from bench.remote_ceiling import MESSAGE_BYTES, bare_server
from bench.sidecar import prefix, sidecar
from bench.tiers import LLAMA_8B
from kvstore.api import Store
from kvstore.block import Chain

Rows = list[dict[str, object]]

_WARM_UP = 2


def measure_remote(seed: int, *, total_mib: int = 256, repeats: int = 7) -> tuple[dict[str, float], Rows]:
    """A prefix of 8 MiB blocks, from the call to verified bytes in the client's memory; arms take turns.

    Ratios are of medians over the rounds after the first two, which populate memory. The ceiling is a bare stream
    whose receiver puts the bytes where they belong, as a load has to; beside it is the one to a receiver that drops
    them. Bare streams have the sidecar's channel options (`kvstore.service.handlers.SEND_AHEAD`); gRPC's own defaults
    were as fast, within the runs' noise.

    What bounds the ratio to a receiver that drops is the processor: both sides share two cores, and keep them busy to
    74 % in a bare stream and to 79 % in a load (one quiet run). CPU of both sides for 256 MiB, mean of 11 rounds in
    turn, on a machine that was not idle:

        bare stream, dropped                    201 ms
        load without its checksum and its copy  225      0.89 of it, as if these cost nothing
        … without its copy into place           238
        … without its checksum                  269
        load                                    285      0.71

    gRPC takes and gives `bytes` only, so a load copies once more than a bare stream on each side: from slots into a
    message, and from a message into place. `kvstore.service.remote` names what was tried and gave nothing.
    """
    total_bytes = total_mib << 20
    seconds: dict[str, list[float]] = {"dropped": [], "bare": [], "load": [], "save": []}
    with (
        sidecar(total_bytes + (64 << 20)) as address,
        bare_server(total_bytes // MESSAGE_BYTES) as bare,
        kvstore.connect(address, mapped=False, call_deadline_s=10) as store,
    ):
        block_bytes = store.open(LLAMA_8B).block_bytes
        chain = prefix(LLAMA_8B, total_bytes // block_bytes)
        block = memoryview(np.random.default_rng(seed).bytes(block_bytes))
        place = memoryview(bytearray(total_bytes))
        for _ in range(_WARM_UP + repeats):
            seconds["dropped"].append(bare.receive_s())
            seconds["bare"].append(bare.receive_s(place))
            seconds["save"].append(_save_s(store, chain, block))
            seconds["load"].append(_load_s(store, chain, block))
            store.clear()
    medians = {arm: statistics.median(times[_WARM_UP:]) for arm, times in seconds.items()}
    names = {
        "dropped": "bare gRPC stream of 1 MiB messages, dropped",
        "bare": "bare gRPC stream of 1 MiB messages, put in place",
        "load": "load, client without a mapping",
        "save": "save, client without a mapping",
    }
    rows: Rows = [
        {
            "arm": f"{names[arm]}, {total_mib} MiB",
            "GB/s p50": total_bytes / median / 1e9,
            "of ceiling": medians["bare"] / median,
            "count": repeats,
        }
        for arm, median in medians.items()
    ]
    summary = {
        "remote_load_ratio": medians["bare"] / medians["load"],
        "remote_load_ratio_to_dropped": medians["dropped"] / medians["load"],
        "remote_save_ratio": medians["bare"] / medians["save"],
    }
    return summary, rows


def _save_s(store: Store, chain: Chain, block: memoryview) -> float:
    """Seconds of the upload alone: filling the views is the caller's own work."""
    with store.save(chain, 0, len(chain)) as save:
        for index in save.indices:
            for view in save.views(index):
                if view is not None:
                    view[:] = block
        began_s = time.perf_counter()
        num_blocks = save.commit()
        seconds = time.perf_counter() - began_s
    if num_blocks != len(chain):
        raise RuntimeError(f"{num_blocks} of {len(chain)} blocks were saved")
    return seconds


def _load_s(store: Store, chain: Chain, block: memoryview) -> float:
    began_s = time.perf_counter()
    store.match(chain, "bench")
    with store.load("bench") as load:
        views = [loaded.views[0] for loaded in load]
        seconds = time.perf_counter() - began_s
        if len(views) != len(chain) or not load.intact() or views[-1] != block:
            raise RuntimeError(f"{len(views)} of {len(chain)} blocks were loaded, or not what was saved")
    return seconds
