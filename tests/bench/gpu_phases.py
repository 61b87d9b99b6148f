# SPDX-License-Identifier: Apache-2.0
"""Phases that go wrong, for `bench gpu --phases NAME=tests.bench.gpu_phases:…`."""

from __future__ import annotations

import os
import signal
import threading

from bench.gpu_board import Board


def raises(board: Board) -> None:
    board.figure("before_it_raised", 1)
    raise RuntimeError("no such kernel")


def hangs(board: Board) -> None:
    board.figure("before_it_hung", 2)
    board.write()
    threading.Event().wait()


def dies(board: Board) -> None:
    board.figure("before_it_died", 3)
    board.write()
    os.kill(os.getpid(), signal.SIGKILL)


def works(board: Board) -> None:
    board.row("works")
    board.figure("it_worked", True)


def works_now(board: Board) -> None:
    board.row("raises")
    board.figure("works_now", True)


def works_too(board: Board) -> None:
    board.figure("works_too", True)
