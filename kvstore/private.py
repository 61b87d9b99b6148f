# SPDX-License-Identifier: Apache-2.0
"""Files that hold secrets: readable by their owner, or refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvstore.errors import ConfigError


def read_private(path: str | Path, name: str) -> bytes:
    """Contents of a file that nobody but its owner may read or write; raises ConfigError, which calls it `name`."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(f"{name} {path} has mode {mode:04o}, open to others: run chmod 600 {path}")
            return file.read()
    except OSError as error:
        raise ConfigError(f"{name} {path} cannot be read: {error.strerror}") from error
