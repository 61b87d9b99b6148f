# SPDX-License-Identifier: Apache-2.0
"""Phases of `bench gpu` about what else runs: a decode step beside copies, a first request beside pinning."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.gpu_board import Board, median
from bench.gpu_copies import CopyRig, both_at_once, ceiling_tensors, copy_rig
from connectors.vllm_plan import VllmSettings
from kvstore.arena import Arena
from kvstore.device_copy import SAVE_STAGES, STAGE_BYTES
from kvstore.pinning import Pinning
from kvstore.transfer import LinkShare

_SHARES = (1.0, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class _Beside:
    """What one arm does beside the steps: actions, each on a thread of its own, and the bytes that each moves."""

    name: str
    actions: tuple[tuple[Callable[[], object], int], ...]


def decode_beside(board: Board) -> None:
    """decode_slowdown_pct: steps that stream weights as decoding does, alone and with copies meanwhile.

    It is the one of loads at the full rate and saves at the share of the link that vLLM's connector gives them.
    """
    with copy_rig(board) as rig:
        # Many steps a launch: a thread that launches often waits for the GIL, and not for the device.
        at_once = 20 if board.on_cuda else 1
        step = _decode_step(board, at_once)
        steps = 100 if board.on_cuda else 3

        def run() -> None:
            for _ in range(steps // at_once):
                step()

        streams = _streams_of_their_own(2)
        default = VllmSettings().save_share
        for arm in (*_large_copies(board), *_copies(rig, dict.fromkeys((1.0, default, *_SHARES)))):
            if board.left_s <= 0:
                board.row("decode", arm=arm.name, skipped="no time left")
                continue
            alone: list[float] = []
            beside: list[float] = []
            by_clock: list[float] = []
            rates: list[list[float]] = [[] for _ in arm.actions]
            for turn in range(1 + board.sizes.repeats):
                board.sync()
                quiet_s, _ = _on_engine(board, run)
                with ExitStack() as stack:
                    copying = [
                        stack.enter_context(_Meanwhile(action, stream))
                        for (action, _), stream in zip(arm.actions, streams, strict=False)
                    ]
                    busy_s, clock_s = _on_engine(board, run)
                if turn:
                    alone.append(quiet_s / steps)
                    beside.append(busy_s / steps)
                    by_clock.append(clock_s / steps)
                    for into, copies, (_, num_bytes) in zip(rates, copying, arm.actions, strict=True):
                        into.append(copies.num_done * num_bytes / max(copies.took_s, 1e-9))
            if board.on_cuda and not all(map(max, rates)):
                raise RuntimeError(f"nothing was copied beside the steps ({arm.name})")
            slowdown = 100 * (median(beside) / median(alone) - 1)
            board.row(
                "decode",
                arm=arm.name,
                alone_s=alone,
                beside_s=beside,
                beside_by_clock_s=by_clock,
                slowdown_pct=slowdown,
                bytes_per_s=rates,
            )
            board.figure(f"decode_slowdown_pct_{arm.name}", slowdown)
            board.figure(f"decode_beside_gb_per_s_{arm.name}", sum(map(median, rates)) / 1e9)
            board.write()
        board.figure("save_share", default)
        board.figure("decode_slowdown_pct", board.summary.get(f"decode_slowdown_pct_both_{100 * default:.0f}"))


def _large_copies(board: Board) -> list[_Beside]:
    """The link by itself: what large pinned copies cost is nobody's to save."""
    large, pinned = ceiling_tensors(board)
    return [
        _Beside("link", ((both_at_once(board, large, pinned), 2 * large.nbytes),)),
        _Beside("link_save", ((lambda: pinned.copy_(large), large.nbytes),)),
        _Beside("link_load", ((lambda: large.copy_(pinned), large.nbytes),)),
    ]


def _copies(rig: CopyRig, shares: Iterable[float]) -> list[_Beside]:
    """Loads alone, and saves at each share of the link alone and with them.

    Saves are as large as their stages: while more than that is on its way, an engine waits for it.
    """
    copier, block_bytes = rig.copier(), rig.layout.block_bytes
    half = len(rig.blocks) // 2
    num_blocks = max(1, min(half, SAVE_STAGES * STAGE_BYTES // block_bytes))
    load = (lambda: copier.scatter(rig.page_ids, rig.blocks[half:])), (len(rig.blocks) - half) * block_bytes
    made = [_Beside("load", (load,))]
    for share in shares:
        given = LinkShare(share)

        def save(given: LinkShare = given) -> None:
            begun = copier.start_gather(rig.page_ids, rig.blocks[:num_blocks], put_off=given.share < 1)
            begun.finish_by(given)

        saving = save, num_blocks * block_bytes
        percent = f"{100 * share:.0f}"
        made += [_Beside(f"save_{percent}", (saving,)), _Beside(f"both_{percent}", (saving, load))]
    return made


def _on_engine(board: Board, run: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `run` takes on the engine's own stream, whatever the others still do: the device's, the clock's.

    By the clock it ends when this thread has the GIL again, for which it waits longer the more threads copy.
    """
    began_s = time.perf_counter()
    if not board.on_cuda:
        run()
        return (took_s := time.perf_counter() - began_s), took_s
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    run()
    last.record()
    last.synchronize()
    took_s = time.perf_counter() - began_s
    return first.elapsed_time(last) / 1e3, took_s


class _Meanwhile:
    """Repeats `action` on a thread until left, with `stream` as the thread's own."""

    def __init__(self, action: Callable[[], object], stream: AbstractContextManager[object]) -> None:
        self._action, self._stream = action, stream
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None
        self.num_done = 0
        self.took_s = 0.0

    def _run(self) -> None:
        try:
            began_s = time.perf_counter()
            with self._stream:
                while not self._stop.is_set():
                    self._action()
                    self.num_done += 1
                    self.took_s = time.perf_counter() - began_s
        except Exception as error:  # noqa: BLE001  # the top of a thread; raised again where it is left
            self._error = error

    def __enter__(self) -> _Meanwhile:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


def _streams_of_their_own(number: int) -> list[AbstractContextManager[object]]:
    """On a thread's default stream a copy would wait for all the steps that were submitted there before it.

    Made once: torch has 32 of them and hands them out in turns. One for each time was now and then the very stream on
    which the other direction's copies run.
    """
    if not torch.cuda.is_available():
        return [nullcontext()] * number
    streams: list[Any] = [torch.cuda.Stream() for _ in range(number)]  # type: ignore[no-untyped-call]
    return [torch.cuda.stream(stream) for stream in streams]


def _decode_step(board: Board, at_once: int = 1) -> Callable[[], object]:
    """The matrices of some layers at the width of an 8B model, for eight sequences; a CUDA graph on a device.

    Args:
        at_once: steps of one call.
    """
    width, layers = board.sizes.decode_width, board.sizes.decode_layers
    inner = 7 * width // 2

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=torch.bfloat16, device=board.device) / 64

    weights = [(matrix(width, width), matrix(width, inner), matrix(inner, width)) for _ in range(layers)]
    hidden = torch.randn(8, width, dtype=torch.bfloat16, device=board.device)

    def step() -> None:
        for _ in range(at_once):
            out = hidden
            for first, up, down in weights:
                out = torch.tanh(out @ first)
                out = torch.tanh(torch.tanh(out @ up) @ down)
            hidden.copy_(out)

    if not board.on_cuda:
        return step
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()  # the weights are made on another stream
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    held = [hidden, *(matrix for layer in weights for matrix in layer)]

    def replay() -> None:
        # A graph knows addresses and keeps nothing alive: freed, they would be other tensors', which it overwrites.
        assert all(tensor.is_cuda for tensor in held)
        graph.replay()

    return replay


# -- pinning -----------------------------------------------------------------------------------------------------


def pin_delay(board: Board) -> None:
    """pin_delay_s: how much longer the slowest request takes while the arena is being registered."""
    if not board.on_cuda:
        board.row("pin", skipped="there is nothing to pin memory for on the CPU")
        return
    free = board.env.get("memory_bytes")
    size = min(board.sizes.pin_bytes, int(free) // 2 if isinstance(free, int) else board.sizes.pin_bytes)
    arena = Arena(size, prefault=False)
    step = _decode_step(board)

    def request() -> float:
        began_s = time.perf_counter()
        fresh = torch.empty(1 << 28, dtype=torch.uint8, device=board.device)
        for _ in range(8):
            step()
        fresh[:8].zero_()
        torch.cuda.current_stream().synchronize()
        fresh[:8].cpu()
        return time.perf_counter() - began_s

    before = [request() for _ in range(20)]
    began_s = time.perf_counter()
    pinning = Pinning(arena.view(0, arena.capacity_bytes))
    during: list[float] = []
    while not pinning.wait(0.0) and not pinning.failure and board.left_s > 0:
        during.append(request())
    took_s = time.perf_counter() - began_s
    wanted_bytes, pinned_bytes = arena.capacity_bytes, pinning.num_bytes
    pinning.close()
    arena.close()
    board.row(
        "pin", bytes=pinned_bytes, wanted_bytes=wanted_bytes, during_s=during, before_s=before, failure=pinning.failure
    )
    board.figure("pin_bytes", pinned_bytes)
    if pinned_bytes != wanted_bytes or not during:
        raise RuntimeError(
            f"{pinned_bytes} of {wanted_bytes} bytes were pinned beside {len(during)} requests: {pinning.failure}"
        )
    board.figure("pin_delay_s", max(0.0, during[0] - median(before)))
    board.figure("pin_worst_delay_s", max(0.0, float(np.max(during)) - median(before)))
    board.figure("pin_total_s", took_s)
