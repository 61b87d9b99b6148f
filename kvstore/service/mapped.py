# SPDX-License-Identifier: Apache-2.0
"""Bytes by a map of the server's arena: loads and saves that are copied in this process, in place.

Invariants
1. A block is handed out with the generation words its slots had when the server gave them; a copy counts only while
   they are the same.
2. Nothing of one start of a server is looked up in the arena of another: a view that comes too late is refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from kvstore.api import Register, Registration
from kvstore.errors import KVStoreError, LeaseError, LeaseExpired, MappingClosed, ProtocolError, ServiceUnavailable
from kvstore.mapping import ArenaMapping
from kvstore.service.knock import Opened, knock
from kvstore.service.lane import Lane
from kvstore.service.plane import Cells, Down
from kvstore.wire import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.service.connection import Connection
    from kvstore.service.link import Link
    from kvstore.service.replies import Replies

ABSENT = (1 << 64) - 1
_MAX_SLOTS = 65_536
"""What one reply may name."""
_KNOCK_S = 0.2
"""For another lane: its session's beats wait for it meanwhile."""


class MappedPlane:
    """The arena of one start of a server, mapped. Implements `kvstore.service.plane.DataPlane`."""

    def __init__(self, path: str | Path, timeout_s: float, lending: Lending) -> None:
        """Pass the door of the service at `path`. Raises what `knock` and `ArenaMapping` raise."""
        self._lending = lending
        self._path = path
        with knock(path, timeout_s) as opened:
            self.ticket = opened.ticket
            self.boot_id = opened.boot_id
            self.mapping = ArenaMapping(opened.memory_fd, opened.generation_fd, opened.capacity_bytes, populate=False)
            self.lane = Lane(_end_of(opened), self._pass_door)

    def _pass_door(self) -> tuple[socket.socket, bytes]:
        with knock(self._path, _KNOCK_S) as opened:
            if opened.boot_id != self.boot_id:
                raise ServiceUnavailable("the server was restarted: a lane of it comes with the next session")
            return _end_of(opened), opened.ticket

    def prefaulted(self) -> None:
        with contextlib.suppress(MappingClosed):
            self.mapping.populate()
            self._lending.lend(self.mapping)

    def load(self, link: Link, connection: Connection, request: pb.LoadRequest, cells: Cells) -> MappedLoad:
        return MappedLoad(link, connection, request, cells, self.mapping)

    def save(self, link: Link, connection: Connection, lease: int, cells: Cells, reply: pb.SaveReply) -> MappedSave:
        return MappedSave(_SaveLease(link, connection, lease), self.mapping, cells.sizes, reply)

    def close(self) -> bool:
        self.lane.close()
        self._lending.forget(self.mapping)
        return self.mapping.close()


def _end_of(opened: Opened) -> socket.socket:
    return socket.socket(fileno=os.dup(opened.lane_fd))


class Lending:
    """Which memory a device's driver is to be told of: one server's after the other's. Thread-safe.

    Memory is registered once its server has touched all of it: registering faults pages in, and they would count as
    this process's. Its mapping takes that back when it is closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._register: Register | None = None
        self._num_holders = 0
        self._mapping: ArenaMapping | None = None

    def lend(self, mapping: ArenaMapping) -> None:
        """This memory is ready, and in place of any before it. Told often."""
        with self._lock:
            if self._mapping is not mapping:
                self._mapping = mapping
                if self._register is not None:
                    mapping.register(self._register)

    def forget(self, mapping: ArenaMapping) -> None:
        with self._lock:
            if self._mapping is mapping:
                self._mapping = None

    def begin(self, register: Register) -> Registration:
        """Have memory registered until what this returns is closed. Of several who ask, the first's `register` does."""
        with self._lock:
            self._num_holders += 1
            if self._register is None:
                self._register = register
                if self._mapping is not None:
                    self._mapping.register(register)
        return _Holder(self)

    def end(self) -> None:
        """One holder less."""
        with self._lock:
            self._num_holders -= 1
            if self._num_holders:
                return
            self._register = None
            mapping = self._mapping
        if mapping is not None:
            mapping.unregister()


class _Holder:
    """Implements `kvstore.api.Registration`: one who wants memory registered."""

    def __init__(self, lending: Lending) -> None:
        self._lending: Lending | None = lending

    def close(self) -> None:
        lending, self._lending = self._lending, None
        if lending is not None:
            lending.end()


@dataclass(frozen=True, slots=True)
class MappedBlock:
    """See `kvstore.api.LoadedBlock`."""

    index: int
    tier: str
    views: Sequence[memoryview]


class _Blocks:
    """Blocks handed to this process, as they came, and whether their slots are still theirs."""

    def __init__(self, mapping: ArenaMapping, sizes: list[int]) -> None:
        self.offsets: list[npt.NDArray[np.uint64]] = []
        self.generations: list[npt.NDArray[np.uint32]] = []
        self.tiers: list[str] = []
        self._mapping = mapping
        self._sizes = sizes

    def add(self, reply: pb.LoadReply) -> int:
        """Take over the blocks of a reply; returns how many."""
        width = len(self._sizes)
        offsets = np.frombuffer(reply.offsets, "<u8")
        generations = np.frombuffer(reply.generations, "<u4")
        tiers = [run.tier for run in reply.tiers for _ in range(run.num_blocks)]
        if len(offsets) != len(generations) or len(offsets) != width * len(tiers):
            raise ProtocolError(
                f"a load reply names {len(offsets)} slots, {len(generations)} generations and {len(tiers)} blocks of "
                f"{width} parts"
            )
        self.offsets += list(offsets.reshape(-1, width))
        self.generations += list(generations.reshape(-1, width))
        self.tiers += tiers
        return len(tiers)

    def block(self, index: int, at: int) -> MappedBlock:
        """The block at position `at`, which is number `index` of its chain. Raises MappingClosed."""
        view = self._mapping.view
        views = tuple(
            view(offset, size).toreadonly() for offset, size in zip(self.offsets[at].tolist(), self._sizes, strict=True)
        )
        return MappedBlock(index, self.tiers[at], views)

    def same(self, begin: int, end: int) -> bool:
        """Whether the slots of blocks `begin` … `end` have had no other owner since they were handed out."""
        if begin >= end:
            return True
        try:
            now = self._mapping.generations(np.concatenate(self.offsets[begin:end]))
        except MappingClosed:
            return False
        return bool((now == np.concatenate(self.generations[begin:end])).all())


class MappedLoad:
    """Implements `kvstore.api.Load`. Not thread-safe."""

    def __init__(
        self, link: Link, connection: Connection, request: pb.LoadRequest, cells: Cells, mapping: ArenaMapping
    ) -> None:
        """Begin; returns with the first blocks. Raises Down, or the server's error."""
        self._link = link
        self._connection = connection
        self._lease = request.lease
        self._first = 0
        self._cells = cells
        self._blocks = _Blocks(mapping, cells.sizes)
        self._windowed = False
        self._broken = False
        self._checked = 0  # blocks before it were the same when a window moved over them
        self._closed = False
        self._replies: Replies | None = None
        reply = self._begin(request)
        self.num_blocks = reply.num_blocks
        self._first = reply.first
        self._take(reply)

    def _begin(self, request: pb.LoadRequest) -> pb.LoadReply:
        link, connection = self._link, self._connection
        if request.HasField("contents") or self._cells.num_parts * (request.num_blocks - request.start) > _MAX_SLOTS:
            self._replies = link.stream(connection, connection.stub.Load, request)
            reply = self._next()
            if reply is None:
                raise ProtocolError("a load had no reply")
            return reply
        answered: pb.LoadReply = link.call(connection, connection.stub.LoadHost, request)
        return answered

    def _next(self) -> pb.LoadReply | None:
        """The next reply; None at the end. Raises Down, or the server's error."""
        if self._replies is None:
            return None
        reply: pb.LoadReply | None = self._replies.next()
        if reply is None:
            self._replies = None
        return reply

    def _take(self, reply: pb.LoadReply) -> None:
        self._windowed = self._windowed or reply.windowed
        self._blocks.add(reply)

    def __iter__(self) -> Iterator[MappedBlock]:
        for at in range(self.num_blocks):
            if self._closed or not self._reach(at):
                return
            try:
                block = self._blocks.block(self._first + at, at)
            except MappingClosed:
                return
            yield block

    @property
    def is_whole(self) -> bool:
        return not self._windowed and len(self._blocks.tiers) >= self.num_blocks

    def comes_in_windows(self, index: int) -> bool:
        """See `kvstore.api.KnowsWindows`."""
        at = index - self._first
        while len(self._blocks.tiers) <= at and not self._windowed:
            if not self._more():
                return False
        return len(self._blocks.tiers) <= at

    def _reach(self, at: int) -> bool:
        """Wait for block `at`; False where the load ended before it."""
        told = False
        while len(self._blocks.tiers) <= at:
            if self._windowed and not told:
                told = True  # the server waits for this before it brings the next
                if not self._tell(at):
                    return False
            if not self._more():
                return False
        return True

    def _more(self) -> bool:
        """Wait for the next reply; False where the load has ended."""
        try:
            reply = self._next()
        except (Down, KVStoreError):
            self._replies = None
            return False
        if reply is None:
            return False
        self._take(reply)
        return True

    def _tell(self, at: int) -> bool:
        """Every block before position `at` has been copied; what overwrote one meanwhile is seen now or never."""
        self._broken = self._broken or not self._blocks.same(self._checked, at)
        self._checked = at
        request = pb.ReleaseRequest(session=self._connection.session, window_of=self._lease, passed=self._first + at)
        try:
            self._link.call(self._connection, self._connection.stub.Release, request)
        except (Down, KVStoreError):
            return False
        return True

    def intact(self) -> bool:
        if self._closed or self._broken:
            return False
        # What a window moved over was checked before, and may be overwritten since.
        return self._blocks.same(self._checked, len(self._blocks.tiers))

    def share(self) -> bytes:
        """What another process of this engine needs to copy from this load too: see `SidecarStore.adopt`.

        Waits for blocks of lower tiers. They are good while this load is open. Raises LeaseError for a load larger
        than the arena.
        """
        self._reach(self.num_blocks - 1)
        if self._windowed:
            raise LeaseError("a load larger than the arena cannot be shared: load fewer blocks")
        blocks = self._blocks
        reply = pb.LoadReply(
            num_blocks=self.num_blocks,
            first=self._first,
            offsets=b"".join(each.tobytes() for each in blocks.offsets),
            generations=b"".join(each.tobytes() for each in blocks.generations),
            tiers=[pb.TierRun(tier=tier, num_blocks=1) for tier in blocks.tiers],
        )
        sizes = np.array(self._cells.sizes, "<u8").tobytes()
        return pb.SharedLoad(
            boot_id=self._connection.opened.boot_id, part_bytes=sizes, blocks=reply
        ).SerializeToString()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._replies is not None:
            self._replies.cancel()
            self._replies = None
        self._connection.live_loads.discard(self._lease)
        self._link.ended(self._connection, load=self._lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AdoptedLoad:
    """A load of another process of this engine. Implements `kvstore.api.Load`; good while that one is open."""

    def __init__(self, mapping: ArenaMapping, shared: pb.SharedLoad) -> None:
        self._blocks = _Blocks(mapping, np.frombuffer(shared.part_bytes, "<u8").tolist())
        self.num_blocks = self._blocks.add(shared.blocks)
        self._first = shared.blocks.first
        self._closed = False

    def __iter__(self) -> Iterator[MappedBlock]:
        for at in range(self.num_blocks):
            try:
                block = self._blocks.block(self._first + at, at)
            except MappingClosed:
                return
            yield block

    @property
    def is_whole(self) -> bool:
        return True

    def intact(self) -> bool:
        return not self._closed and self._blocks.same(0, self.num_blocks)

    def close(self) -> None:
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _SaveLease:
    """A save's lease, as this client holds it."""

    link: Link
    connection: Connection
    number: int

    def commit(self, indices: Sequence[int]) -> int:
        connection = self.connection
        request = pb.CommitRequest(
            session=connection.session, lease=self.number, indices=np.array(indices, "<u4").tobytes()
        )
        try:
            reply = self.link.call(connection, connection.stub.Commit, request)
        except (Down, LeaseError):
            return 0  # lost with its lease: nobody will match it
        return len(reply.published) // 4

    def end(self) -> None:
        self.link.ended(self.connection, save=self.number)


@dataclass(frozen=True, slots=True)
class _Joined:
    """Another process's save, which this one writes to."""

    link: Link
    connection: Connection
    engine_key: bytes
    number: int

    def join(self, *, leave: bool = False) -> None:
        request = pb.JoinRequest(
            session=self.connection.session, engine_key=self.engine_key, lease=self.number, leave=leave
        )
        self.link.call(self.connection, self.connection.stub.Join, request, carries_ended=False)

    def commit(self, indices: Sequence[int]) -> int:
        raise LeaseError("a save is committed by the process that made it: tell it when this one is done")

    def end(self) -> None:
        try:
            self.join(leave=True)
        except (Down, KVStoreError):
            pass  # the server goes by the life of this process then


class MappedSave:
    """Implements `kvstore.api.Save`. Not thread-safe."""

    def __init__(
        self, lease: _SaveLease | _Joined, mapping: ArenaMapping, sizes: list[int], reply: pb.SaveReply
    ) -> None:
        self._lease = lease
        self._mapping = mapping
        self._sizes = sizes
        self._reply = reply
        offsets = np.frombuffer(reply.offsets, "<u8").reshape(-1, len(sizes))
        self.indices: tuple[int, ...] = tuple(np.frombuffer(reply.indices, "<u4").tolist())
        self.num_refused = reply.num_refused
        if len(offsets) != len(self.indices):
            raise ProtocolError(f"a save reply names {len(offsets)} blocks' slots for {len(self.indices)} blocks")
        self._open = dict(zip(self.indices, offsets, strict=True))

    def views(self, index: int) -> tuple[memoryview | None, ...]:
        """Raises LeaseExpired where the server's memory is gone: it was restarted."""
        offsets = self._open.get(index)
        if offsets is None:
            raise LeaseError(f"block {index} is not open in this save: open are {list(self._open)}")
        try:
            return tuple(
                None if offset == ABSENT else self._mapping.view(offset, size)
                for offset, size in zip(offsets.tolist(), self._sizes, strict=True)
            )
        except MappingClosed as error:
            raise LeaseExpired("the server that this save was for is gone: nothing of it can be committed") from error

    def commit(self, *indices: int) -> int:
        chosen = sorted(indices) if indices else list(self._open)
        unknown = [index for index in chosen if index not in self._open]
        if unknown:
            raise LeaseError(f"blocks {unknown} are not open in this save: open are {list(self._open)}")
        if not chosen:
            return 0
        num_published = self._lease.commit(chosen)
        for index in chosen:
            del self._open[index]
        return num_published

    def abort(self) -> None:
        if self._open:
            self._open = {}
            self._lease.end()

    def share(self) -> bytes:
        """What another process of this engine needs to write to this save too: see `SidecarStore.adopt_save`."""
        if isinstance(self._lease, _Joined):
            raise LeaseError("a save is shared by the process that made it")
        opened = self._lease.connection.opened
        return pb.SharedSave(
            boot_id=opened.boot_id,
            part_bytes=np.array(self._sizes, "<u8").tobytes(),
            engine_key=opened.engine_key,
            lease=self._lease.number,
            blocks=self._reply,
        ).SerializeToString()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
