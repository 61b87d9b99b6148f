# SPDX-License-Identifier: Apache-2.0
"""Bytes by a map of the server's arena: passing its door, and loads that are copied in this process, in place.

Saves are `kvstore.service.mapped_save`.

Invariants
1. A block is handed out with the generation words its slots had when the server gave them; a copy counts only while
   they are the same.
2. Nothing of one start of a server is looked up in the arena of another: a view that comes too late is refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from kvstore.api import LoadedRun
from kvstore.errors import KVStoreError, LeaseError, MappingClosed, ProtocolError, ServiceUnavailable
from kvstore.mapping import ArenaMapping
from kvstore.service.handshake import REPLY_SLOTS
from kvstore.service.knock import Opened, knock
from kvstore.service.lane import Lane
from kvstore.service.lending import Lending
from kvstore.service.mapped_save import MappedSave, SaveLease
from kvstore.service.plane import Cells, Down
from kvstore.wire import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.service.connection import Connection
    from kvstore.service.link import Link
    from kvstore.service.replies import Replies

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
        return MappedSave(SaveLease(link, connection, lease), self.mapping, cells.sizes, reply)

    def close(self) -> bool:
        self.lane.close()
        self._lending.forget(self.mapping)
        return self.mapping.close()


def _end_of(opened: Opened) -> socket.socket:
    return socket.socket(fileno=os.dup(opened.lane_fd))


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

    def run(self, first: int) -> LoadedRun | None:
        """All of them, where they are of one tier; the first is number `first` of its chain.

        Raises MappingClosed, and ProtocolError where one is outside the arena.
        """
        if len(set(self.tiers)) != 1:
            return None
        offsets = np.stack(self.offsets).astype(np.int64)
        sizes = np.array(self._sizes, np.int64)
        if (offsets < 0).any() or (offsets > self._mapping.num_bytes - sizes).any():
            raise ProtocolError(
                f"a load reply names slots outside the arena, which has {self._mapping.num_bytes} bytes"
            )
        memory = self._mapping.view(0, self._mapping.num_bytes).toreadonly()
        return LoadedRun(first, self.tiers[0], memory, offsets)

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
        try:
            reply = self._begin(request)
            self.num_blocks = reply.num_blocks
            self._first = reply.first
            self._take(reply)
        except BaseException:
            self._want_no_more()  # or the link would watch over it for ever
            raise

    def _begin(self, request: pb.LoadRequest) -> pb.LoadReply:
        link, connection = self._link, self._connection
        if request.HasField("contents") or self._cells.num_parts * (request.num_blocks - request.start) > REPLY_SLOTS:
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

    def run(self) -> LoadedRun | None:
        """See `kvstore.api.GivesRun`."""
        if self._closed or not self.is_whole:
            return None
        try:
            return self._blocks.run(self._first)
        except MappingClosed:
            return None

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

    def _want_no_more(self) -> None:
        if self._replies is not None:
            self._replies.cancel()
            self._replies = None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._want_no_more()
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

    def run(self) -> LoadedRun | None:
        """See `kvstore.api.GivesRun`."""
        try:
            return None if self._closed else self._blocks.run(self._first)
        except MappingClosed:
            return None

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
