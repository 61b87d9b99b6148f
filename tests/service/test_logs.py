# SPDX-License-Identifier: Apache-2.0
"""The service's log: what it says, and that nobody waits for whoever reads it."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from contextlib import suppress

import pytest

from kvstore.service.logs import set_up_logging
from tests.waiting import eventually

log = logging.getLogger("kvstore.service")


def flushed() -> None:
    for handler in logging.getLogger().handlers:
        handler.flush()


def test_a_line_is_text_or_json_with_the_time_in_utc() -> None:
    text, lines = io.StringIO(), io.StringIO()
    set_up_logging("text", "info", text)
    log.info("serving at %s", "unix:/k")
    log.debug("not this")
    flushed()
    assert text.getvalue().endswith("Z INFO    kvstore.service: serving at unix:/k\n")
    set_up_logging("json", "warning", lines)
    log.warning("one\nline")
    flushed()
    assert json.loads(lines.getvalue()) | {"time": ""} == {
        "time": "",
        "level": "warning",
        "logger": "kvstore.service",
        "message": "one\nline",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_that_cannot_be_written_says_so_and_nobody_fails_of_it(log_format: str) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    lines = io.StringIO()
    set_up_logging(log_format, "info", lines)
    log.info("%d blocks", "many")
    log.info("%s", Broken())
    flushed()
    assert lines.getvalue().count("a line of kvstore.service could not be written") == 2


def test_a_reader_that_stands_still_holds_nobody_up_and_is_told_what_it_missed() -> None:
    reading, writing = os.pipe()
    with open(reading) as reader, open(writing, "w") as writer:
        set_up_logging("text", "info", writer)
        shouting = threading.Thread(target=lambda: [log.info("x" * 100) for _ in range(5_000)])
        shouting.start()
        shouting.join(30)
        assert not shouting.is_alive()
        read, asked = list[str](), list[None]()
        listening = threading.Thread(target=lambda: read.extend(iter(reader.readline, "")), daemon=True)
        listening.start()

        def says_what_is_missing() -> bool:
            log.info("another")
            asked.append(None)
            return any("are missing" in line for line in read)

        assert eventually(says_what_is_missing)
        flushed()
        writer.close()
        listening.join(10)
    (missed,) = [line for line in read if "are missing" in line]
    assert int(missed.split()[3]) + len(read) - 1 == 5_000 + len(asked)


def test_a_full_disk_holds_nobody_up() -> None:
    with suppress(OSError), open("/dev/full", "w") as full:
        set_up_logging("text", "info", full)
        for _ in range(5_000):
            log.warning("nobody reads this")
        flushed()


class Disk(io.StringIO):
    """Full for a while."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError("no space left")
        return super().write(text)


def test_lines_that_were_lost_last_are_told_of_when_the_log_is_flushed() -> None:
    disk = Disk()
    set_up_logging("text", "info", disk)
    for _ in range(3):
        log.info("lost")
    flushed()
    disk.full = False
    flushed()
    assert "3 lines of this log are missing" in disk.getvalue()
