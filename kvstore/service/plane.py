# SPDX-License-Identifier: Apache-2.0
"""The seam between a client's calls and how its bytes move: by a map of the arena, or by streams.

kvstore.service.mapped   copies in this process, from and into slots
kvstore.service.remote   bytes over Read and Write
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from kvstore.api import Load, LoadedBlock, Save
from kvstore.errors import LeaseError
from kvstore.layout import BlockLayout
from kvstore.wire import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.service.connection import Connection
    from kvstore.service.lane import Lane
    from kvstore.service.link import Link


class Down(Exception):
    """The link to the server is not up. Never leaves the client: it becomes a miss."""


@dataclass(frozen=True, slots=True)
class Cells:
    """Which parts of a model's blocks a load or save is about."""

    layout: BlockLayout
    parts: tuple[int, ...]

    @property
    def num_parts(self) -> int:
        return len(self.parts)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each part."""
        return [self.layout.parts[part].num_bytes for part in self.parts]


class DataPlane(Protocol):
    """How bytes come and go over one connection. Made before the session is opened.

    Attributes:
        ticket: for Open; empty where the door was not asked.
        boot_id: of the server that the ticket is for; empty where any will do.
        lane: the short way for small calls; None without a mapping.
    """

    ticket: bytes
    boot_id: bytes

    @property
    def lane(self) -> Lane | None: ...

    def prefaulted(self) -> None:
        """The server has touched all memory of its arena: it may be mapped whole, at little cost. Told often."""

    def load(self, link: Link, connection: Connection, request: pb.LoadRequest, cells: Cells) -> Load:
        """Begin a load. `request.lease` is set; whoever takes it ends it through `link.done`.

        Raises Down, or the error that the server meant.
        """

    def save(self, link: Link, connection: Connection, lease: int, cells: Cells, reply: pb.SaveReply) -> Save:
        """The save that `reply` to a call of Save gave."""

    def close(self) -> bool:
        """Hand out nothing any more, and let go of memory; False while views of it are out. Ask again."""


class NoLoad:
    """A load of nothing. Implements `kvstore.api.Load`."""

    num_blocks = 0

    def __iter__(self) -> Iterator[LoadedBlock]:
        return iter(())

    def intact(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class NoSave:
    """A save that found nothing wanted, or no room. Implements `kvstore.api.Save`."""

    indices: Sequence[int] = ()

    def __init__(self, num_refused: int) -> None:
        self.num_refused = num_refused

    def views(self, index: int) -> Sequence[memoryview | None]:
        raise LeaseError(f"block {index} is not open in this save: open are []")

    def commit(self, *indices: int) -> int:
        if indices:
            raise LeaseError(f"blocks {sorted(indices)} are not open in this save: open are []")
        return 0

    def abort(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
