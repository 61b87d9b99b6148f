# SPDX-License-Identifier: Apache-2.0
"""A listening Unix socket at a path that one process at a time holds.

Invariants
1. A lock beside the socket is held for its life; what lies at the path of somebody who has the lock is stale.
2. A socket that somebody answers is never replaced, nor is anything that is no socket.
3. Nobody can connect before owner and mode are set.
"""

from __future__ import annotations

import fcntl
import grp
import os
import socket
import stat

from kvstore.errors import ConfigError

_BACKLOG = 128
_MAX_PATH = 107


class ClaimedSocket:
    """The socket (SOCK_SEQPACKET, non-blocking) of mode 0600; 0660 with a group.

    Attributes:
        listener: listens already.
    """

    def __init__(self, path: str, gid: int | None = None) -> None:
        """Claim `path`. Raises ConfigError where another process has it, or it cannot be a socket."""
        self._path = path
        self._claim = _claim(path)
        try:
            self.listener, self._inode = _listen(path, gid)
        except BaseException:
            os.close(self._claim)
            raise

    def close(self) -> None:
        """Stop listening, and remove the socket. Call it once."""
        self.listener.close()
        _remove(self._path, self._inode)
        os.close(self._claim)


def group_id(group: str) -> int | None:
    """Number of a group by its name or number; None for "". Raises ConfigError where there is none."""
    if not group or group.isdigit():
        return int(group) if group else None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"service.group is {group!r}: there is no such group on this host") from None


def _claim(path: str) -> int:
    """Lock the path for one door. The lock's file stays: to remove it would let two hold it."""
    if len(os.fsencode(path)) > _MAX_PATH:
        raise ConfigError(f"socket path {path!r} has {len(os.fsencode(path))} bytes: {_MAX_PATH} are possible")
    try:
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        parent = os.path.dirname(path) or "."
        raise ConfigError(
            f"cannot make a socket in {parent!r} ({error.strerror}): it must be a directory that user {os.geteuid()} "
            "may write; create it, or choose another with service.listen"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        place = path.removesuffix(".door")  # as its user knows it
        raise ConfigError(f"another service runs at {place}: stop it, or choose another service.listen") from error
    return fd


def _listen(path: str, gid: int | None) -> tuple[socket.socket, int]:
    """A listening socket at `path`, and its inode. Nobody can connect before its mode is set."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        clear_stale(path)
        try:
            listener.bind(path)
            os.chmod(path, 0o600)
            if gid is not None:
                os.chown(path, -1, gid)
                os.chmod(path, 0o660)
            inode = os.lstat(path).st_ino
            listener.listen(_BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen at {path}: {error.strerror}") from error
    except BaseException:
        listener.close()
        raise
    return listener, inode


def clear_stale(path: str) -> None:
    """Remove the socket, of any kind, that a dead service left.

    Raises ConfigError where it is no socket, or somebody answers.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} exists and is no socket: remove it, or choose another service.listen")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:  # full, of another kind, or not ours: somebody's
            pass
    raise ConfigError(f"somebody answers at {path}: stop that service, or choose another service.listen")


def _remove(path: str, inode: int) -> None:
    """Remove our socket, and nothing that took its place."""
    try:
        if os.lstat(path).st_ino == inode:
            os.unlink(path)
    except FileNotFoundError:
        pass
