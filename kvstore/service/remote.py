# SPDX-License-Identifier: Apache-2.0
"""The data plane of a client that maps no arena: loads by Read and saves by Write, over private memory.

The caller's thread receives, verifies and puts into place: gRPC's own threads receive up to 4 MiB ahead of it, and a
message is still in its core's cache when it is verified and copied. On two quiet cores 256 MiB took 175 ms so, 182
with a thread that received messages ahead, and 185 with one that put them into place as well. The server makes each
message in the thread that sends it: a thread ahead of that one took more than it gave. Nor did any of these gain over a
bare stream in the same run (0.78 of it, 11 rounds in turn): two streams on two channels at once (0.78), messages of
2 MiB (0.75) and 512 KiB (0.59), reads from the socket of 1 to 4 MiB (0.72), gRPC's target "throughput" (0.76), send
buffers of 4 MiB on the server's Unix sockets, or gRPC's older poller in either process or both (0.69 to 0.93 in six
runs, 0.67 to 0.81 without it).

Invariants
1. A block is handed out only after all of its parts came with their checksums.
2. When a load is closed nothing writes to its memory any more.
3. A load larger than the memory it gets goes in a window: a block's memory is used again once the iterator moved on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import grpc
import numpy as np

from kvstore.errors import KVStoreError, ProtocolError
from kvstore.service.buffers import Buffers, Rented, cut
from kvstore.service.bulk import Misfit, Unpacker, decode
from kvstore.service.handlers import BulkStub
from kvstore.service.handshake import ABSENT
from kvstore.service.plane import Cells, Down
from kvstore.service.uploads import RemoteSave, SaveTicket, open_channel, upload
from kvstore.stats import Stats
from kvstore.wire import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.service.connection import Connection
    from kvstore.service.link import Link

DEFAULT_BUFFER_BYTES = 1 << 30
_WINDOW_BYTES = 64 << 20


class RemotePlane:
    """Bytes over Read and Write. Implements `kvstore.service.plane.DataPlane`.

    `buffers` and `stats` are the client's, and outlive a connection.
    """

    boot_id = b""
    lane = None

    def __init__(self, buffers: Buffers, stats: Stats, ticket: bytes = b"") -> None:
        self.ticket = ticket
        self._buffers = buffers
        self._stats = stats

    def prefaulted(self) -> None:
        pass

    def load(self, link: Link, connection: Connection, request: pb.LoadRequest, cells: Cells) -> RemoteLoad:
        with open_channel():
            replies = link.stream(connection, BulkStub(connection.channel).Read, request)

        def unfit(error: Misfit) -> Exception:
            self._stats.add(f"client.failures.{'no_memory' if isinstance(error, NoMemory) else 'corrupt'}")
            return ProtocolError(str(error))

        load = RemoteLoad(
            replies,
            cells.sizes,
            self._buffers,
            start=request.start,
            unfit=unfit,
            closed=lambda: connection.live_loads.discard(request.lease),
        )
        if load.refusal is not None:
            load.close()
            raise load.refusal
        return load

    def save(self, link: Link, connection: Connection, lease: int, cells: Cells, reply: pb.SaveReply) -> RemoteSave:
        sizes = tuple(cells.sizes)
        indices = tuple(np.frombuffer(reply.indices, "<u4").tolist())
        wanted = (np.frombuffer(reply.offsets, "<u8") != ABSENT).reshape(-1, len(sizes)).tolist()
        if len(wanted) != len(indices):
            raise ProtocolError(f"a save reply names {len(wanted)} blocks' parts for {len(indices)} blocks")
        ticket = SaveTicket(connection.session, lease, indices, tuple(map(tuple, wanted)), sizes, reply.num_refused)

        def send(messages: Iterator[bytes]) -> list[int]:
            try:
                return upload(connection.channel, messages, link.options.progress_s)
            except grpc.RpcError as failure:
                link.failed(connection, failure)
            except Down:
                pass
            return []  # lost with its lease: nobody will match it

        return RemoteSave(ticket, self._buffers, send, lambda: link.ended(connection, save=lease))

    def close(self) -> bool:
        """Memory here is the client's own: views of it stay good."""
        return True


class NoMemory(Misfit):
    """All memory for bytes that come is in use."""


class MessageStream(Protocol):
    """Messages of a call under way (`kvstore.service.replies.Replies`)."""

    def next(self) -> bytes | None:
        """The next one; None at the end. Raises Down or a KVStoreError where it does not come in time, or at all."""

    def cancel(self) -> None:
        """End the call."""


@dataclass(frozen=True, slots=True)
class RemoteBlock:
    """See `kvstore.api.LoadedBlock`."""

    index: int
    tier: str
    views: Sequence[memoryview]


class RemoteLoad:
    """Implements `kvstore.api.Load` over a Read under way. For one thread at a time."""

    def __init__(
        self,
        stream: MessageStream,
        sizes: Sequence[int],
        buffers: Buffers,
        *,
        start: int,
        unfit: Callable[[Misfit], Exception],
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait for the first reply. `sizes`: bytes of each asked part.

        `unfit` is told of replies that are not what they should be, and returns what to make of it.
        """
        self._stream = stream
        self._sizes = list(sizes)
        self._block_bytes = sum(sizes)
        self._buffers = buffers
        self._start = start
        self._unfit = unfit
        self._when_closed = closed
        self.num_blocks = 0
        self.refusal: Exception | None = None
        """Why there was no first reply."""
        self._over = False
        self._closed = False
        self._rented: Rented | None = None
        self._next = start
        self._asked = start
        """Blocks before this one have been copied by the caller."""
        self._unpacker = Unpacker(self._views_of, lambda index: index + 1)
        try:
            self._begin()
        except (Down, KVStoreError) as error:
            self._over = True
            self.refusal = error
        except Misfit as error:
            self.refusal = self._give_up(error)
        except BaseException:
            self.close()  # nobody else can: its stream would be watched over for ever
            raise

    def _begin(self) -> None:
        message = self._stream.next()
        if message is None:
            self._over = True
            raise Misfit("a load had no reply")
        head, data = decode(pb.ReadReply, message)
        if len(data):
            raise Misfit("the first reply has data: it says how many blocks follow")
        if not head.num_blocks:
            return
        rented = self._buffers.rent(head.num_blocks, self._block_bytes)
        if rented.num_blocks < head.num_blocks:
            # Others need memory too: a window is enough to go on.
            rented.give_back()
            rented = self._buffers.rent(max(2, _WINDOW_BYTES // self._block_bytes), self._block_bytes)
        self._rented = rented
        if rented.num_blocks < min(2, head.num_blocks):
            raise NoMemory(f"no memory for two blocks of {self._block_bytes} bytes: all of the client's is in use")
        self.num_blocks = head.num_blocks

    def __iter__(self) -> Iterator[RemoteBlock]:
        tiers: dict[int, str] = {}
        for index in range(self._start, self._start + self.num_blocks):
            self._asked = index
            while index not in tiers:
                if self._closed:
                    return
                try:
                    message = self._stream.next()
                    if message is None:
                        self._over = True
                        return
                    self._place(message, tiers)
                except (Down, KVStoreError):
                    self._over = True
                    return
                except Misfit as error:
                    self._give_up(error)
                    return
            yield RemoteBlock(index, tiers[index], tuple(view.toreadonly() for view in self._memory(index)))

    def comes_in_windows(self, index: int) -> bool:
        """See `kvstore.api.KnowsWindows`: known from the beginning here."""
        return self._rented is not None and self._rented.num_blocks < self.num_blocks

    def _place(self, message: bytes, tiers: dict[int, str]) -> None:
        """Put the data of a message into place, and note the blocks that are whole."""
        head, data = decode(pb.ReadReply, message)
        for arrived in self._unpacker.take(head, data):
            if not arrived.good:
                raise Misfit(f"part {arrived.part} of block {arrived.index} does not have its checksum")
            if arrived.ends_block:
                tiers[arrived.index] = head.tier

    def _views_of(self, index: int) -> Sequence[memoryview]:
        if index != self._next or index >= self._start + self.num_blocks:
            raise Misfit(f"block {index} came where block {self._next} comes next")
        if self._rented is not None and index - self._asked >= self._rented.num_blocks:
            raise Misfit(f"one message has more than the {self._rented.num_blocks} blocks there is memory for")
        self._next += 1
        return self._memory(index)

    def _memory(self, index: int) -> tuple[memoryview, ...]:
        assert self._rented is not None
        place = (index - self._start) % self._rented.num_blocks
        return cut(self._rented.view(place, self._block_bytes), self._sizes)

    def _give_up(self, error: Misfit) -> Exception:
        self._stop()
        return self._unfit(error)

    def _stop(self) -> None:
        if not self._over:
            self._over = True
            self._stream.cancel()

    def intact(self) -> bool:
        """The memory is the client's own: nobody else writes to it while the load is open."""
        return not self._closed

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._stop()
        if self._rented is not None:
            self._rented.give_back()
        self._when_closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
