# SPDX-License-Identifier: Apache-2.0
"""How the service writes its log: one line a state change, on standard error, as text or as JSON.

Lines are written by a thread of their own. Whoever reads them may stand still (a container's runtime, a pipe), or the
disk be full: that must not hold up the service, so lines that find no room are left out and counted.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from typing import TextIO

_MAX_WAITING = 1_000
_FLUSH_S = 1.0


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return _utc(record)


def _utc(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


class _Aside(logging.Handler):
    """Writes to a stream from a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._waiting: queue.Queue[tuple[str, int]] = queue.Queue(_MAX_WAITING)
        """Each with how many lines are lost with it."""
        self._counting = threading.Lock()
        self._num_lost = 0
        threading.Thread(target=self._run, name="kvstore-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - whoever logs must not fail of it, nor of what an argument's own __str__ raises
            line = self.format(_made("a line of %s could not be written", record.name))
        self._put(line, 1)
        if self._num_lost and self._waiting.qsize() < _MAX_WAITING // 2:
            self._tell_lost()

    def _put(self, line: str, worth: int) -> None:
        try:
            self._waiting.put_nowait((line, worth))
        except queue.Full:
            self._lose(worth)

    def _lose(self, num_lines: int) -> None:
        with self._counting:
            self._num_lost += num_lines

    def _tell_lost(self) -> None:
        with self._counting:
            num_lost, self._num_lost = self._num_lost, 0
        if num_lost:
            text = "%d lines of this log are missing: they could not be written in time"
            self._put(self.format(_made(text, num_lost)), num_lost)

    def _run(self) -> None:
        while True:
            line, worth = self._waiting.get()
            try:
                self._stream.write(f"{line}\n")
                self._stream.flush()
            except (OSError, ValueError):  # a full disk, or nobody reads any more
                self._lose(worth)
            finally:
                self._waiting.task_done()

    def flush(self) -> None:
        """Wait a moment for what is still to be written, and for how much could not be."""
        end_s = time.monotonic() + _FLUSH_S
        self._wait(end_s)
        self._tell_lost()
        self._wait(end_s)

    def _wait(self, end_s: float) -> None:
        while self._waiting.unfinished_tasks and time.monotonic() < end_s:
            time.sleep(0.005)


def _made(text: str, argument: object) -> logging.LogRecord:
    return logging.LogRecord("kvstore.service", logging.WARNING, __file__, 0, text, (argument,), None)


def set_up_logging(log_format: str, level: str, stream: TextIO | None = None) -> None:
    """Send the log of this process to `stream` (standard error). `log_format` is text or json; times are UTC."""
    handler = _Aside(stream or sys.stderr)
    handler.setFormatter(_JsonLines() if log_format == "json" else _TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
