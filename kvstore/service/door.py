# SPDX-License-Identifier: Apache-2.0
"""The door: a Unix socket beside the service's own that hands out the arena, which gRPC cannot do.

A client connects and is told at once: a header, and with it the descriptors of the arena's memory, of its generation
words, and of a lane (`kvstore.service.lane`). The ticket in the header goes into `Open`, so that the service knows
which process a session belongs to, and learns from a pidfd when that process is dead.

Invariants
1. Only users who are let in get descriptors; a refusal says why. Users with limited rights get a ticket alone, by which
   `Open` knows who they are.
2. A ticket is good for one `Open`, within 10 s. Nobody can guess one.
3. Of a redeemed ticket's process, `on_exit` is called once, when the kernel says that it is dead, never for an id
   that another process may have taken over; or never, if it was forgotten first.
4. Nothing here waits for a client: what it gets fits into the socket's buffer, and what it sends is not read.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import secrets
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstore.errors import ConfigError
from kvstore.service.claim import ClaimedSocket, group_id

log = logging.getLogger("kvstore.service.door")

MAGIC = b"kvs-door"
VERSION = 1
TICKET_S = 10.0
"""How long a ticket waits to be redeemed."""

HEADER = struct.Struct("<8sHHQ16s16s")
"""Magic, version, status, arena bytes, boot id, ticket. What is not OPEN goes on with its reason in UTF-8."""
OPEN, DENIED, BUSY, UNMAPPED = 0, 1, 2, 3
"""UNMAPPED: a ticket without descriptors."""
MAX_MESSAGE = 1024
_REST_S = 0.1
_REMEDY = (
    "name it in service.allowed_uids or, where service.tokens_file names users, there; "
    "or connect with mapped=False and a token"
)
CREDENTIALS = struct.Struct("iII")
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77  # Linux 6.5


def door_path(path: str | Path) -> str:
    """Where the door of a service at the Unix socket `path` is."""
    return f"{path}.door"


@dataclass(frozen=True, slots=True)
class Peer:
    """A process that passed the door. Each passage makes another one.

    Attributes:
        number: counts passages; unique in a door's life.
        pid: as the service sees it; 0 where the process is in a PID namespace that the service does not see.
        uid: user it ran as when it connected.
    """

    number: int
    pid: int
    uid: int


@dataclass(slots=True)
class _Passage:
    peer: Peer
    pidfd: int
    ticket: bytes
    deadline_s: float
    lane: socket.socket | None
    redeemed: bool = False


class Door:
    """Hands out an arena to local processes and watches them. Thread-safe. Close it before the arena."""

    def __init__(
        self,
        path: str | Path,
        memory_fd: int,
        generation_fd: int,
        capacity_bytes: int,
        boot_id: bytes,
        *,
        on_exit: Callable[[Peer], None],
        allowed_uids: frozenset[int] | None = None,
        unmapped_uids: frozenset[int] = frozenset(),
        group: str = "",
        max_peers: int = 256,
    ) -> None:
        """Open the door of the service at the Unix socket `path`.

        Args:
            on_exit: told of each redeemed peer whose process died, one after the other, on a thread of its own.
            allowed_uids: users let in; None for this process's own and root, and with `group` its members.
            unmapped_uids: users who get a ticket alone, whatever else is said of them.
            group: name or number of the group that may use the socket (mode 0660); empty: this user alone (0600).
            max_peers: passages at once, each of which costs a file descriptor.

        Raises ConfigError where another service answers there, or the path cannot be a socket.
        """
        if len(boot_id) != 16:
            raise ConfigError(f"boot id has {len(boot_id)} bytes: it must have 16")
        self.path = door_path(path)
        self._descriptors = (memory_fd, generation_fd)
        self._capacity_bytes = capacity_bytes
        self._boot_id = boot_id
        self._on_exit = on_exit
        self._gid = group_id(group)
        self.allow(allowed_uids, unmapped_uids)
        self._max_peers = max_peers
        self._lock = threading.Lock()
        self._passages: dict[int, _Passage] = {}
        self._tickets: dict[bytes, _Passage] = {}
        self._introduced: dict[bytes, tuple[int, float]] = {}  # user, deadline
        self._number = 0
        self._closing = False
        self._resting_until_s: float | None = None
        self._claimed = ClaimedSocket(self.path, self._gid)
        self._listener = self._claimed.listener
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._exits = ThreadPoolExecutor(1, thread_name_prefix="kvstore-exits")
        self._thread = threading.Thread(target=self._run, name="kvstore-door", daemon=True)
        self._thread.start()

    # -- for the service ---------------------------------------------------------------------------------------

    def redeem(self, ticket: bytes) -> Peer | None:
        """The process a ticket was given to; None where it is unknown, used, too old, or its process is dead.

        After noting the peer, ask `alive` once: it may have died, and `on_exit` been called, in between.
        """
        with self._lock:
            passage = self._tickets.get(bytes(ticket))
            if passage is None or passage.deadline_s <= time.monotonic():
                return None
            del self._tickets[passage.ticket]
            passage.redeemed = True
            return passage.peer

    def introduced(self, ticket: bytes) -> int | None:
        """The user that a ticket without descriptors was given to, once; None where it is unknown, used, or too old."""
        with self._lock:
            uid, deadline_s = self._introduced.pop(bytes(ticket), (None, 0.0))
        return uid if deadline_s > time.monotonic() else None

    def take_lane(self, peer: Peer) -> socket.socket | None:
        """The server's end of a peer's lane, once: the caller's to close. None where it is dead, or it was taken."""
        with self._lock:
            passage = self._passages.get(peer.number)
            if passage is None:
                return None
            lane, passage.lane = passage.lane, None
            return lane

    def alive(self, peer: Peer) -> bool:
        """Whether the peer is still watched: `on_exit` was not called for it, and it was not forgotten."""
        with self._lock:
            return peer.number in self._passages

    def forget(self, peer: Peer) -> None:
        """Stop watching a peer that holds nothing any more; `on_exit` is not called for it. Idempotent."""
        with self._lock:
            self._drop(peer.number)

    def allow(self, uids: frozenset[int] | None, unmapped_uids: frozenset[int] = frozenset()) -> None:
        """From now on only these users come through, as with `allowed_uids`. Who is inside stays."""
        self._unmapped_uids = unmapped_uids
        self._uids = uids if uids is not None else frozenset({os.geteuid(), 0})
        self._let_group = uids is None and self._gid is not None

    @property
    def num_peers(self) -> int:
        """Passages that are watched, redeemed or not."""
        with self._lock:
            return len(self._passages)

    def close(self) -> None:
        """Close the door, and wait for the last call of `on_exit`. Peers that live on are forgotten. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._exits.shutdown(wait=True)
        with self._lock:
            for number in list(self._passages):
                self._drop(number)
        self._selector.close()
        os.close(self._wake)
        self._claimed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                for key, _ in self._selector.select(self._patience_s()):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.data, int):
                        self._ended(key.data)
                self._settle()
            except Exception:  # a thread's top: the door stays open for the next
                log.exception("the door failed to serve a client")

    def _patience_s(self) -> float | None:
        """Seconds until something is due without an event."""
        with self._lock:
            due_s = [passage.deadline_s for passage in self._tickets.values()]
        if self._resting_until_s is not None:
            due_s.append(self._resting_until_s)
        return max(0.0, min(due_s) - time.monotonic()) if due_s else None

    def _settle(self) -> None:
        """Let unredeemed tickets die, and listen again after a rest."""
        now_s = time.monotonic()
        if self._resting_until_s is not None and self._resting_until_s <= now_s:
            self._resting_until_s = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        with self._lock:
            for passage in [each for each in self._tickets.values() if each.deadline_s <= now_s]:
                self._drop(passage.peer.number)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR):
                self._rest(error)
            return
        with connection:
            connection.setblocking(False)
            try:
                self._admit(connection)
            except OSError as error:  # it hung up, or this process is out of descriptors
                log.info("a client did not get through the door: %s", error)

    def _rest(self, error: OSError) -> None:
        """Out of descriptors or memory: stop looking at the listener for a moment, since it would stay readable."""
        log.warning("the door cannot accept clients for the moment: %s", error)
        self._selector.unregister(self._listener)
        self._resting_until_s = time.monotonic() + _REST_S

    def _admit(self, connection: socket.socket) -> None:
        """Check who it is, note it, hand out; in this order, so that nobody holds the arena unnoted."""
        pid, uid, gid = CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        )
        if uid in self._unmapped_uids:
            self._introduce(connection, uid)
            return
        if uid not in self._uids and not (self._let_group and self._gid in _groups(connection, gid)):
            self._refuse(connection, DENIED, f"user {uid} may not map this arena: {_REMEDY}")
            return
        if len(self._passages) >= self._max_peers:
            self._refuse(connection, BUSY, f"{self._max_peers} processes have the arena already, which is the limit")
            return
        pidfd = _pidfd(connection, pid)
        if pidfd is None:
            self._refuse(
                connection,
                DENIED,
                "your process cannot be watched from here: share the PID namespace, or use Linux 6.5",
            )
            return
        try:
            ours, theirs = socket.socketpair()
        except OSError:
            os.close(pidfd)
            raise
        passage = self._note(pid, uid, pidfd, ours)
        header = HEADER.pack(MAGIC, VERSION, OPEN, self._capacity_bytes, self._boot_id, passage.ticket)
        descriptors = array.array("i", [*self._descriptors, theirs.fileno()]).tobytes()
        with theirs:
            try:
                connection.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
            except OSError:
                with self._lock:
                    self._drop(passage.peer.number)
                raise

    def _note(self, pid: int, uid: int, pidfd: int, lane: socket.socket) -> _Passage:
        with self._lock:
            self._number += 1
            peer = Peer(self._number, pid, uid)
            passage = _Passage(peer, pidfd, secrets.token_bytes(16), time.monotonic() + TICKET_S, lane)
            self._passages[peer.number] = self._tickets[passage.ticket] = passage
            self._selector.register(pidfd, selectors.EVENT_READ, peer.number)
        return passage

    def _introduce(self, connection: socket.socket, uid: int) -> None:
        """A ticket that says who it is, and nothing to map. It leaves nothing to watch, so it lapses by itself."""
        now_s = time.monotonic()
        with self._lock:
            self._introduced = {each: known for each, known in self._introduced.items() if known[1] > now_s}
            is_full = len(self._introduced) >= self._max_peers
            ticket = secrets.token_bytes(16)
            if not is_full:
                self._introduced[ticket] = (uid, now_s + TICKET_S)
        if is_full:
            self._refuse(connection, BUSY, f"{self._max_peers} tickets wait to be used, which is the limit")
            return
        reason = f"user {uid} has limited rights here and may not map this arena: connect with mapped=False"
        connection.sendmsg([HEADER.pack(MAGIC, VERSION, UNMAPPED, 0, self._boot_id, ticket) + reason.encode()])

    def _refuse(self, connection: socket.socket, status: int, reason: str) -> None:
        log.info("the door refused a client: %s", reason)
        header = HEADER.pack(MAGIC, VERSION, status, 0, self._boot_id, bytes(16))
        connection.sendmsg([header + reason.encode()])

    def _ended(self, number: int) -> None:
        with self._lock:
            passage = self._passages.get(number)
            self._drop(number)
        if passage is not None and passage.redeemed:
            self._exits.submit(self._tell, passage.peer)

    def _tell(self, peer: Peer) -> None:
        try:
            self._on_exit(peer)
        except Exception:  # a thread's top
            log.exception("ending what process %d held failed", peer.pid)

    def _drop(self, number: int) -> None:
        """Forget a passage. The lock is held."""
        passage = self._passages.pop(number, None)
        if passage is not None:
            self._tickets.pop(passage.ticket, None)
            self._selector.unregister(passage.pidfd)
            os.close(passage.pidfd)
            if passage.lane is not None:
                passage.lane.close()


# -- who is there ----------------------------------------------------------------------------------------------


def _groups(connection: socket.socket, gid: int) -> set[int]:
    """Groups the peer was in when it connected."""
    found = array.array("I")
    try:
        found.frombytes(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, MAX_MESSAGE))
    except OSError:  # an older kernel, or more groups than Python lets one ask for
        pass
    return {gid, *found}


def _pidfd(connection: socket.socket, pid: int) -> int | None:
    """A descriptor of the process that connected, or None where the kernel has no way to give one."""
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    if pid <= 0:
        return None
    fd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(connection, 0)
    if poll.poll(0):  # it hung up: the id may be another's by now
        os.close(fd)
        raise ConnectionResetError(errno.ECONNRESET, "it hung up before it was known")
    return fd
