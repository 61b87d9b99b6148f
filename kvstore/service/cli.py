# SPDX-License-Identifier: Apache-2.0
"""The command `kvstore`: where it starts, and where every error becomes one line and an exit code.

0 done, 1 a check found a problem, 2 something is wrong with what was asked or with the server.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import NoReturn

from kvstore.errors import KVStoreError


def main() -> None:
    try:
        from kvstore.service.cli_commands import app
    except ModuleNotFoundError as error:
        sys.exit(f"kvstore: the package {error.name} is missing: install kvstore with its extra [service]")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of another alphabet shows ? for a bar of a chart
    # Else what a command meets, and says in its own words, is a bare line beside its output; `serve` logs as it is set.
    logging.getLogger("kvstore").addHandler(logging.NullHandler())
    try:
        app()
    except KVStoreError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # a reader such as head went away
        _drop_output()
        sys.exit(141)
    except OSError as error:  # the disk is full that the output goes to, say
        _drop_output()
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    sys.stderr.write(f"kvstore: {error}\n")  # whole: what a thread logs may not come between it and its end
    sys.exit(2)


def _drop_output() -> None:
    """What is still to be printed goes nowhere: it would fail again when this process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
