# SPDX-License-Identifier: Apache-2.0
"""Files that hold secrets, and directories for sockets: their owner's alone, or refused."""

from __future__ import annotations

import contextlib
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


def own_directory(path: str | Path) -> None:
    """Make a directory that nobody but this user may enter, or find it made by this user; raises ConfigError.

    For places like /tmp, where anyone could have come first: what lies in there nobody else has put there, or holds.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise ConfigError(
                f"{path} is user {found.st_uid}'s, or no directory: have it removed, or choose another service.listen"
            )
    except OSError as error:
        raise ConfigError(f"directory {path} cannot be made: {error.strerror}") from error


def open_directory(path: str | Path, gid: int | None) -> None:
    """Let members of a group pass through a directory of this user's, or nobody but the user; raises ConfigError."""
    try:
        if gid is not None:
            os.chown(path, -1, gid)
        os.chmod(path, 0o700 if gid is None else 0o710)
    except OSError as error:
        raise ConfigError(f"directory {path} cannot be opened to group {gid}: {error.strerror}") from error
