# SPDX-License-Identifier: Apache-2.0
"""Saves of a client that maps no arena: views of private memory, which a commit sends by Write.

What fails on the way publishes nothing: the blocks are lost with their lease, and nobody will match them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from kvstore.open_blocks import OpenBlocks
from kvstore.service.buffers import Buffers, cut
from kvstore.service.bulk import Packer, encode
from kvstore.service.handlers import BulkStub
from kvstore.service.plane import Down
from kvstore.wire import kvstore_pb2 as pb


@contextmanager
def open_channel() -> Iterator[None]:
    """A call on a channel that the link has closed, since its server is gone, is a miss like any other."""
    try:
        yield
    except ValueError as error:  # what gRPC raises then
        raise Down from error


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
        self._open = OpenBlocks({index: place for place, index in enumerate(self.indices)})
        self._is_lost = False
        """Whether the server may have blocks open that it was to publish."""

    def views(self, index: int) -> tuple[memoryview | None, ...]:
        place, ticket, rented = self._open.place(index), self._ticket, self._rented
        assert rented is not None, "given back once nothing is open"
        memory = rented.view(place, sum(ticket.sizes))
        views = cut(memory, list(ticket.sizes))
        return tuple(view if wanted else None for view, wanted in zip(views, ticket.wanted[place], strict=True))

    def commit(self, *indices: int) -> int:
        chosen = self._open.chosen(indices or self._open)
        if not chosen:
            return 0
        views = [(index, [view for view in self.views(index) if view is not None]) for index in chosen]
        published = self._upload(self._messages(views))
        for index in chosen:
            del self._open[index]
        self._is_lost = self._is_lost or len(published) < len(chosen)
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
        # What the server takes to be open is nobody else's to save as long as this client lives.
        if self._open or self._is_lost or len(self.indices) < len(self._ticket.indices):
            self._open.clear()
            self._is_lost = False
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

    Raises Down, or grpc.RpcError: also, by cancelling, where the server takes nothing for `progress_s`. Nothing is sent
    any more once it has ended, in whatever way.
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
        except BaseException:
            call.cancel()  # it would go on to send what lies in the save's memory by then, whosever that is
            raise
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
