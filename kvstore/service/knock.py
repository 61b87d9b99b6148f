# SPDX-License-Identifier: Apache-2.0
"""The client's side of the door (`kvstore.service.door`): ask for the arena, and trust not everybody who gives one."""

from __future__ import annotations

import array
import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstore.errors import AccessDenied, ProtocolError, ServiceUnavailable
from kvstore.service.door import BUSY, CREDENTIALS, HEADER, MAGIC, MAX_MESSAGE, OPEN, UNMAPPED, VERSION, door_path
from kvstore.service_options import user_of

_TIMEVAL = struct.Struct("@ll")


@dataclass(frozen=True, slots=True)
class Opened:
    """What the door gave. The descriptors are the caller's to close: `close`, or leaving the context.

    Attributes:
        memory_fd, generation_fd, capacity_bytes: for `kvstore.mapping.ArenaMapping`.
        lane_fd: for `kvstore.service.lane.Lane`.
        boot_id: changes with every start of the service.
        ticket: for `Open`, once.
    """

    memory_fd: int
    generation_fd: int
    lane_fd: int
    capacity_bytes: int
    boot_id: bytes
    ticket: bytes

    def close(self) -> None:
        """Close the descriptors. Maps made of them stay. Call it once."""
        for fd in (self.memory_fd, self.generation_fd, self.lane_fd):
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Unmapped(AccessDenied):
    """The door knows this user, and gives it no map: `Open` takes the ticket for its rights."""

    def __init__(self, reason: str, ticket: bytes) -> None:
        super().__init__(reason)
        self.ticket = ticket


def knock(path: str | Path, timeout_s: float) -> Opened:
    """Ask the service at the Unix socket `path` for its arena.

    Raises ServiceUnavailable where nobody is there, answers within `timeout_s`, or has room; AccessDenied where the
    door does not let this user in (Unmapped: gives it a ticket and no memory), or is a stranger's (neither this user's,
    nor root's, nor of the user who owns the directory); ProtocolError where the other side is no door, or one of
    another version.
    """
    place, until_s = door_path(path), time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            limit(connection, socket.SO_SNDTIMEO, timeout_s)
            connection.connect(place)
            _trust(connection, place)
            limit(connection, socket.SO_RCVTIMEO, until_s - time.monotonic())
            message, ancillary, flags, _ = connection.recvmsg(
                MAX_MESSAGE, socket.CMSG_SPACE(8 * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except PermissionError as error:
            raise AccessDenied(
                f"user {os.geteuid()} may not connect to {place}: run as the service's user, or set service.group"
            ) from error
        except BlockingIOError as error:
            raise ServiceUnavailable(f"no answer at {place} within {timeout_s} s") from error
        except OSError as error:
            raise ServiceUnavailable(
                f"no service at {place} ({error.strerror}): start it with kvstore serve"
            ) from error
    fds = _received(ancillary)
    try:
        return _opened(place, message, fds, bool(flags & socket.MSG_CTRUNC))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def ticket_of(path: str | Path, timeout_s: float) -> bytes:
    """A ticket that says which user this is, for who moves no bytes. Raises as `knock` does, but for Unmapped."""
    try:
        with knock(path, timeout_s) as opened:
            return opened.ticket
    except Unmapped as known:
        return known.ticket


def limit(connection: socket.socket, option: int, seconds: float) -> None:
    """Let the kernel end a call: a non-blocking connect would fail at once where the backlog is full."""
    micros = max(1, int(seconds * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(micros, 1_000_000)))


def _trust(connection: socket.socket, place: str) -> None:
    """Refuse a service of a user who has no say over the place: anyone could have come first to a name in /tmp."""
    _, uid, _ = CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    _refuse_stranger(uid, place)


def trust_socket(place: str | Path) -> None:
    """Refuse likewise, for those who knock at no door, before they tell it a token. Raises AccessDenied."""
    try:
        owner = os.stat(place).st_uid
    except OSError:  # connecting will say what is wrong
        return
    _refuse_stranger(owner, str(place))


def _refuse_stranger(uid: int, place: str) -> None:
    directory = os.path.dirname(place) or "."
    user = user_of(directory)
    owner = os.stat(directory).st_uid if user is None else user
    if uid not in (os.geteuid(), 0, owner):
        raise AccessDenied(
            f"the service at {place} runs as user {uid}, whom this user does not trust: have it listen in a directory "
            "that the service's user owns"
        )


def _received(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) // fds.itemsize * fds.itemsize])
    return fds.tolist()


def _opened(place: str, message: bytes, fds: list[int], truncated: bool) -> Opened:
    """What a door's message says. Raises what it refuses."""
    if not message:
        raise ServiceUnavailable(f"the service at {place} hung up: it is stopping, or out of descriptors")
    if message[: len(MAGIC)] != MAGIC or len(message) < HEADER.size:
        raise ProtocolError(
            f"what answers at {place} is no door: it sent {message[:16]!r}, a door begins with {MAGIC!r}"
        )
    _, version, status, capacity_bytes, boot_id, ticket = HEADER.unpack_from(message)
    if version != VERSION:
        raise ProtocolError(
            f"the door at {place} speaks version {version}, this client {VERSION}: upgrade the older one"
        )
    reason = message[HEADER.size :].decode(errors="replace")
    if status == BUSY:
        raise ServiceUnavailable(f"the door at {place} is full: {reason}")
    if status == UNMAPPED:
        raise Unmapped(f"the door at {place}: {reason}", ticket)
    if status != OPEN:
        raise AccessDenied(f"the door at {place} refused: {reason}")
    if truncated or len(fds) != 3:
        raise ProtocolError(f"the door at {place} gave {len(fds)} descriptors for 3: is this process out of them?")
    memory_fd, generation_fd, lane_fd = fds
    return Opened(memory_fd, generation_fd, lane_fd, capacity_bytes, boot_id, ticket)
