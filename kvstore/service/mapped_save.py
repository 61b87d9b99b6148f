# SPDX-License-Identifier: Apache-2.0
"""Saves by a map of the server's arena: filled in this process, in place, and perhaps by others of its engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from kvstore.api import OpenRun
from kvstore.errors import KVStoreError, LeaseError, LeaseExpired, MappingClosed, ProtocolError
from kvstore.mapping import ArenaMapping
from kvstore.open_blocks import OpenBlocks
from kvstore.service.handshake import ABSENT
from kvstore.service.plane import Down
from kvstore.wire import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.service.connection import Connection
    from kvstore.service.link import Link


_GONE = "the server that this save was for is gone: nothing of it can be committed"


@dataclass(frozen=True, slots=True)
class SaveLease:
    """A save's lease, as this client holds it."""

    link: Link
    connection: Connection
    number: int

    def commit(self, indices: Sequence[int]) -> int | None:
        """How many were published; None where the server did not say, and may not have heard."""
        connection = self.connection
        request = pb.CommitRequest(
            session=connection.session, lease=self.number, indices=np.array(indices, "<u4").tobytes()
        )
        try:
            reply = self.link.call(connection, connection.stub.Commit, request)
        except Down:
            return None
        except LeaseError:
            return 0  # lost with its lease: nobody will match it
        return len(reply.published) // 4

    def end(self) -> None:
        self.link.ended(self.connection, save=self.number)


@dataclass(frozen=True, slots=True)
class JoinedSave:
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
        self, lease: SaveLease | JoinedSave, mapping: ArenaMapping, sizes: list[int], reply: pb.SaveReply
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
        self._open = OpenBlocks(zip(self.indices, offsets, strict=True))
        self._unheard = False

    def views(self, index: int) -> tuple[memoryview | None, ...]:
        """Raises LeaseExpired where the server's memory is gone: it was restarted."""
        offsets = self._open.place(index)
        try:
            return tuple(
                None if offset == ABSENT else self._mapping.view(offset, size)
                for offset, size in zip(offsets.tolist(), self._sizes, strict=True)
            )
        except MappingClosed as error:
            raise LeaseExpired(_GONE) from error

    def open_run(self) -> OpenRun:
        """See `kvstore.api.GivesOpenRun`. Raises LeaseExpired as `views` does, ProtocolError for slots elsewhere."""
        mapping = self._mapping
        offsets = np.array([*self._open.values()], np.uint64).reshape(-1, len(self._sizes))
        outside = offsets > mapping.num_bytes - np.array(self._sizes, np.uint64)
        if (outside & (offsets != ABSENT)).any():
            raise ProtocolError(f"a save reply names slots outside the arena, which has {mapping.num_bytes} bytes")
        try:
            memory = mapping.view(0, mapping.num_bytes)
        except MappingClosed as error:
            raise LeaseExpired(_GONE) from error
        # The one number that is no offset becomes `kvstore.api.ABSENT` in a signed word.
        return OpenRun(np.array([*self._open], np.int64), memory, offsets.astype(np.int64))

    def commit(self, *indices: int) -> int:
        chosen = self._open.chosen(indices or self._open)
        if not chosen:
            return 0
        num_published = self._lease.commit(chosen)
        for index in chosen:
            del self._open[index]
        if num_published is None:
            self._unheard = True
        if self._unheard and not self._open:
            self._end()  # or what the server takes to be open is nobody else's to save as long as this client lives
        return num_published or 0

    def abort(self) -> None:
        if self._open:
            self._open.clear()
            self._end()

    def _end(self) -> None:
        self._unheard = False
        self._lease.end()

    def share(self) -> bytes:
        """What another process of this engine needs to write to this save too: see `SidecarStore.adopt_save`."""
        if isinstance(self._lease, JoinedSave):
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
