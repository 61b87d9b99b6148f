# SPDX-License-Identifier: Apache-2.0
"""The data plane of a client that maps no arena: loads by Read and saves by Write, over private memory.

A thread of each load receives, verifies and puts bytes into place, so that the caller's copy of one block overlaps
the arrival of the next. What goes wrong, the connection's end included, is a shorter hit; nothing waits longer than
its limit.

Invariants
1. A block is handed out only after all of its parts came with their checksums.
2. When a load is closed nothing writes to its memory any more.
3. A load larger than the memory it gets goes in a window: a block's memory is used again once the iterator moved on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import grpc
import numpy as np

from kvstore.errors import LeaseError, ProtocolError
from kvstore.service.buffers import Buffers, Rented, cut
from kvstore.service.bulk import Misfit, Packer, Unpacker, decode, encode
from kvstore.service.handlers import BulkStub
from kvstore.service.plane import Cells, Down
from kvstore.stats import Stats
from kvstore.wire import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.service.link import Connection, Link

ABSENT = (1 << 64) - 1
DEFAULT_BUFFER_BYTES = 1 << 30
_WINDOW_BYTES = 64 << 20


class RemotePlane:
    """Bytes over Read and Write. Implements `kvstore.service.plane.DataPlane`.

    `buffers` and `stats` are the client's, and outlive a connection.
    """

    ticket = b""
    boot_id = b""

    def __init__(self, buffers: Buffers, stats: Stats) -> None:
        self._buffers = buffers
        self._stats = stats

    def load(self, link: Link, connection: Connection, request: pb.LoadRequest, cells: Cells) -> RemoteLoad:
        options = link.options
        with open_channel():
            call = BulkStub(connection.channel).Read(request)
        connection.live_loads.add(request.lease)

        def failed(error: Exception) -> Exception:
            if isinstance(error, grpc.RpcError):
                return link.failed(connection, error)
            self._stats.add("client.failures.corrupt")
            return ProtocolError(str(error))

        load = RemoteLoad(
            call,
            cells.sizes,
            self._buffers,
            start=request.start,
            limits=Limits(options.call_deadline_s, options.progress_s),
            failed=failed,
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


@contextmanager
def open_channel() -> Iterator[None]:
    """A call on a channel that the link has closed, since its server is gone, is a miss like any other."""
    try:
        yield
    except ValueError as error:  # what gRPC raises then
        raise Down from error


class MessageStream(Protocol):
    """Messages of a call under way."""

    def __next__(self) -> bytes: ...

    def cancel(self) -> object:
        """End the call; whoever waits for a message gets an error at once."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait for the first message, and for each further one, in seconds."""

    first_s: float
    progress_s: float


@dataclass(frozen=True, slots=True)
class RemoteBlock:
    """See `kvstore.api.LoadedBlock`."""

    index: int
    tier: str
    views: Sequence[memoryview]


class _Closed(Exception):
    """The caller has closed the load."""


class RemoteLoad:
    """Implements `kvstore.api.Load` over a Read under way."""

    def __init__(
        self,
        stream: MessageStream,
        sizes: Sequence[int],
        buffers: Buffers,
        *,
        start: int,
        limits: Limits,
        failed: Callable[[Exception], Exception],
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait for the first reply. `sizes`: bytes of each asked part.

        `failed` is told why a load ended early, by grpc.RpcError or Misfit, and returns what to make of it.
        """
        self._stream = stream
        self._sizes = list(sizes)
        self._block_bytes = sum(sizes)
        self._buffers = buffers
        self._start = start
        self._limits = limits
        self._failed = failed
        self._when_closed = closed
        self.refusal: Exception | None = None
        """Why there was no first reply."""
        self._moved = threading.Condition()
        self._num_blocks: int | None = None
        self._ready: dict[int, RemoteBlock] = {}
        self._consumed = start
        self._ended = False
        self._closed = False
        self._rented: Rented | None = None
        self._thread = threading.Thread(target=self._receive, name="kvstore-read", daemon=True)
        self._thread.start()
        with self._moved:
            if not self._moved.wait_for(lambda: self._num_blocks is not None or self._ended, limits.first_s):
                self._stall(f"no answer within {limits.first_s:g} s")

    @property
    def num_blocks(self) -> int:
        return self._num_blocks or 0

    # -- consumer ----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[RemoteBlock]:
        for index in range(self._start, self._start + self.num_blocks):
            block = self._wait_for(index)
            if block is None:
                return
            yield block
            del block

    def _wait_for(self, index: int) -> RemoteBlock | None:
        limit_s = self._limits.progress_s
        with self._moved:
            self._consumed = max(self._consumed, index)  # asking for it says that those before were copied
            self._moved.notify_all()
            while index not in self._ready and not self._ended:
                if not self._moved.wait(limit_s):  # each message notifies
                    self._stall(f"no byte for {limit_s:g} s")
                    return None
            return None if self._closed else self._ready.get(index)

    def _stall(self, why: str) -> None:
        self._ended = True
        self._stream.cancel()
        self._report(Stalled(why))

    def _report(self, error: Exception) -> None:
        meaning = self._failed(error)
        if self._num_blocks is None:
            self.refusal = meaning

    def intact(self) -> bool:
        """The memory is the client's own: nobody else writes to it while the load is open."""
        return not self._closed

    def close(self) -> None:
        with self._moved:
            self._closed = True
            self._moved.notify_all()
        if not self._ended:
            self._stream.cancel()
        self._thread.join()
        self._ready.clear()
        if self._rented is not None:
            self._rented.give_back()
        self._when_closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- receiver ----------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            self._begin()
            self._fill()
        except (StopIteration, _Closed):
            pass
        except Misfit as error:
            self._stream.cancel()
            self._note(error)
        except grpc.RpcError as error:
            self._note(error)
        finally:
            with self._moved:
                self._ended = True
                self._moved.notify_all()

    def _note(self, error: Exception) -> None:
        if not self._closed and not self._ended:
            self._report(error)

    def _begin(self) -> None:
        head, data = decode(pb.ReadReply, next(self._stream))
        if len(data):
            raise Misfit("the first reply has data: it says how many blocks follow")
        num_blocks = head.num_blocks if self._block_bytes else 0
        wanted = num_blocks
        rented = self._buffers.rent(num_blocks, self._block_bytes) if num_blocks else None
        if rented is not None and rented.num_blocks < num_blocks:
            # Others need memory too: a window is enough to keep receiving while blocks are copied.
            rented.give_back()
            wanted = min(num_blocks, max(2, _WINDOW_BYTES // self._block_bytes))
            rented = self._buffers.rent(wanted, self._block_bytes)
        with self._moved:
            self._rented = rented
            self._num_blocks = num_blocks if rented is not None and rented.num_blocks else 0
            self._moved.notify_all()
        if num_blocks and not self._num_blocks:
            self._stream.cancel()
            raise Misfit(f"no memory for one block of {self._block_bytes} bytes: all of the client's is in use")

    def _fill(self) -> None:
        unpacker = Unpacker(self._views_of, lambda index: index + 1)
        while True:
            head, data = decode(pb.ReadReply, next(self._stream))
            for arrived in unpacker.take(head, data):
                if not arrived.good:
                    raise Misfit(f"part {arrived.part} of block {arrived.index} does not have its checksum")
                if arrived.ends_block:
                    views = tuple(view.toreadonly() for view in self._memory(arrived.index))
                    self._deliver(RemoteBlock(arrived.index, head.tier, views))
            with self._moved:
                self._moved.notify_all()

    def _views_of(self, index: int) -> Sequence[memoryview]:
        """Memory of a block whose first byte came; waits for it in a window."""
        assert self._rented is not None
        expected = self._start + len(self._ready)
        if index != expected or index >= self._start + self.num_blocks:
            raise Misfit(f"block {index} came where block {expected} comes next")
        oldest = index - self._rented.num_blocks  # the block that this one's memory had
        with self._moved:
            self._moved.wait_for(lambda: self._closed or self._consumed > oldest)
        if self._closed:
            raise _Closed
        return self._memory(index)

    def _memory(self, index: int) -> tuple[memoryview, ...]:
        assert self._rented is not None
        place = (index - self._start) % self._rented.num_blocks
        return cut(self._rented.view(place, self._block_bytes), self._sizes)

    def _deliver(self, block: RemoteBlock) -> None:
        with self._moved:
            self._ready[block.index] = block
            self._moved.notify_all()


# ---- saves ----


@dataclass(frozen=True, slots=True)
class SaveTicket:
    """A save that the server has granted.

    Attributes:
        session, lease: what its Writes name.
        indices: chain positions that are wanted, head to tail.
        wanted: of each of them, which of the asked parts are.
        sizes: bytes of each asked part.
        num_refused: blocks that the server refused.
    """

    session: bytes
    lease: int
    indices: tuple[int, ...]
    wanted: tuple[tuple[bool, ...], ...]
    sizes: tuple[int, ...]
    num_refused: int


class RemoteSave:
    """Implements `kvstore.api.Save`: views are private memory, which `commit` sends."""

    def __init__(
        self,
        ticket: SaveTicket,
        buffers: Buffers,
        upload: Callable[[Iterator[bytes]], list[int]],
        ended: Callable[[], None],
    ) -> None:
        """`upload` sends messages and returns what was published, [] where that failed. `ended`: nothing is open.

        Blocks for which there is no memory here are refused.
        """
        self._ticket = ticket
        self._upload = upload
        self._ended = ended
        self._rented = buffers.rent(len(ticket.indices), sum(ticket.sizes)) if ticket.indices else None
        num_taken = self._rented.num_blocks if self._rented is not None else 0
        self.indices: tuple[int, ...] = ticket.indices[:num_taken]
        self.num_refused = ticket.num_refused + len(ticket.indices) - num_taken
        self._open = {index: place for place, index in enumerate(self.indices)}

    def views(self, index: int) -> tuple[memoryview | None, ...]:
        place = self._open.get(index)
        if place is None or self._rented is None:
            raise LeaseError(f"block {index} is not open in this save: open are {list(self._open)}")
        ticket = self._ticket
        memory = self._rented.view(place, sum(ticket.sizes))
        views = cut(memory, list(ticket.sizes))
        return tuple(view if wanted else None for view, wanted in zip(views, ticket.wanted[place], strict=True))

    def commit(self, *indices: int) -> int:
        chosen = sorted(indices) if indices else list(self._open)
        unknown = [index for index in chosen if index not in self._open]
        if unknown:
            raise LeaseError(f"blocks {unknown} are not open in this save: open are {list(self._open)}")
        if not chosen:
            return 0
        views = [(index, [view for view in self.views(index) if view is not None]) for index in chosen]
        published = self._upload(self._messages(views))
        for index in chosen:
            del self._open[index]
        if not self._open:
            self._give_back()
        return len(published)

    def _messages(self, blocks: Sequence[tuple[int, Sequence[memoryview]]]) -> Iterator[bytes]:
        ticket = self._ticket
        yield encode(pb.WriteRequest(session=ticket.session, lease=ticket.lease), ())
        following = dict(zip(ticket.indices, ticket.indices[1:], strict=False))
        packer = Packer(pb.WriteRequest)
        for index, views in blocks:
            for part, view in enumerate(views):
                yield from packer.add(index, part, view)
            yield from packer.end_block(following.get(index, -1), carry=True)
        yield from packer.rest()

    def abort(self) -> None:
        if self._open or len(self.indices) < len(self._ticket.indices):
            self._open.clear()
            self._ended()
        self._give_back()

    def _give_back(self) -> None:
        if self._rented is not None:
            self._rented.give_back()
            self._rented = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def upload(channel: grpc.Channel, messages: Iterator[bytes], progress_s: float) -> list[int]:
    """Send messages by Write; returns what was published.

    Raises Down, or grpc.RpcError: also, by cancelling, where the server takes nothing for `progress_s`.
    """
    sent = 0

    def counted() -> Iterator[bytes]:
        nonlocal sent
        for message in messages:
            sent += 1
            yield message

    with open_channel():
        call = BulkStub(channel).Write.future(counted())
    while True:
        before = sent
        try:
            reply = call.result(timeout=progress_s)
        except grpc.FutureTimeoutError:
            if sent == before:
                call.cancel()
                raise Stalled(f"the server took nothing for {progress_s:g} s") from None
        except grpc.FutureCancelledError:
            raise Stalled("the call was cancelled") from None
        else:
            return list(np.frombuffer(reply.published, "<u4").tolist())


class Stalled(grpc.RpcError):
    """A call that was ended here, because it did not get on. Reads like a deadline that passed."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.DEADLINE_EXCEEDED

    def details(self) -> str:
        return str(self)

    def trailing_metadata(self) -> tuple[Any, ...]:
        return ()
