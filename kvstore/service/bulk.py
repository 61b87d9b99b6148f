# SPDX-License-Identifier: Apache-2.0
"""Bytes of blocks in messages, by hand: one copy going out, one copy coming in, and valid protobuf in between.

Generated code would hold each megabyte once more on either side. Here a message is the generated code's bytes of
all fields but `data`, then that field's tag and length, then memory; it is read from the front up to that tag. A
message that another implementation laid out otherwise is read by the generated code, slower.

Asked parts of blocks are one stretch of bytes. `Packer` cuts it into messages, `Unpacker` puts messages back into
place; both take the checksum of a part piece by piece, while it is in the processor's cache.

Invariants
1. An unpacker writes only into the views that its caller gave for the very block and part a message names.
2. A part is told as good only if all of it came, in order, and its xxh3 is the sender's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import xxhash
from google.protobuf.message import DecodeError

from kvstore import copying
from kvstore.wire import kvstore_pb2 as pb

MESSAGE_BYTES = 1 << 20
_DATA_TAG = b"\x7a"  # field 15, length-delimited
_CARRY_BYTES = 256 << 10
_MAX_VARINT_BYTES = 10
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5

Buffer = bytes | bytearray | memoryview
Head = TypeVar("Head", pb.ReadReply, pb.WriteRequest)


class Misfit(ValueError):
    """These bytes are no message, or not what comes next."""


def checksum(data: Buffer) -> int:
    """xxh3_64 of `data`."""
    return xxhash.xxh3_64_intdigest(data)


# ---- one message ----


def encode(head: pb.ReadReply | pb.WriteRequest, pieces: Sequence[Buffer]) -> bytes:
    """The message `head` with `pieces`, one after the other, as its data. Copies them once."""
    if not pieces:
        return head.SerializeToString()
    return b"".join((head.SerializeToString(), _DATA_TAG, _varint(sum(map(len, pieces))), *pieces))


def decode(kind: type[Head], message: bytes) -> tuple[Head, memoryview]:
    """A message without its data, and the data where it lies in `message`. Raises Misfit."""
    view = memoryview(message)
    try:
        found = _find_data(message)
        if found is not None:
            at, start = found
            return kind.FromString(message[:at]), view[start:]
        head = kind.FromString(message)
    except DecodeError as error:
        raise Misfit(f"{len(message)} bytes are no {kind.__name__}: {error}") from error
    data = memoryview(head.data)
    head.ClearField("data")
    return head, data


def _find_data(message: bytes) -> tuple[int, int] | None:
    """Where the data field begins, and its bytes, if it is the last one; None if it is not, or there is none."""
    at, end = 0, len(message)
    while at < end:
        tag_at = at
        if message[at] == _DATA_TAG[0]:
            length, at = _read_varint(message, at + 1)
            return (tag_at, at) if at + length == end else None
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _read_varint(message, at)
        elif kind == _DELIMITED:
            length, at = _read_varint(message, at)
            at += length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise Misfit(f"wire type {kind} at byte {tag_at} of a message is unknown")
    return None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A varint and where it ends. Raises Misfit."""
    value = 0
    for shift, byte in enumerate(message[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise Misfit(f"a number at byte {at} of a message does not end")


# ---- sending ----


class Packer(Generic[Head]):
    """Cuts parts into messages of at most MESSAGE_BYTES. What `add` gives must be sent in that order, then `rest`.

    Bytes are copied before `add` or `end_block` returns or yields; a view may be reused after `end_block`.
    """

    def __init__(self, kind: type[Head]) -> None:
        self._kind: type[Head] = kind
        self._head: Head = kind()
        self._pieces: list[Buffer] = []
        self._num_bytes = 0
        self._checksums: list[int] = []
        self._next: tuple[int, int] | None = None
        self._tier = ""

    def add(
        self,
        index: int,
        part: int,
        view: memoryview,
        *,
        tier: str = "",
        meta: pb.Meta | None = None,
        known: int | None = None,
        taken: Callable[[int], object] | None = None,
    ) -> Iterator[bytes]:
        """Messages that became full with part `part` of block `index`. `meta` goes with a block's first part.

        `index` and `part` follow what was added before, or begin anew after a gap. `known` is the part's checksum;
        where it is not known, it is taken, and `taken` is told.
        """
        if self._pieces and (self._tier != tier or self._next != (index, part)):
            yield self._message()
        self._tier = tier
        if meta is not None and isinstance(self._head, pb.ReadReply):
            if not self._pieces:
                self._begin(index, part, 0)
            self._head.metas.append(meta)
        view = view.cast("B")
        running = xxhash.xxh3_64()
        at = 0
        while at < len(view):
            if not self._pieces:
                self._begin(index, part, at)
            piece = view[at : at + MESSAGE_BYTES - self._num_bytes]
            self._pieces.append(piece)
            self._num_bytes += len(piece)
            at += len(piece)
            if known is None:
                running.update(piece)
            if at == len(view):
                checksum = running.intdigest() if known is None else known
                self._checksums.append(checksum)
                if known is None and taken is not None:
                    taken(checksum)
            if self._num_bytes == MESSAGE_BYTES:
                yield self._message()
        self._next = (index, part + 1)

    def end_block(self, next_index: int, *, carry: bool) -> Iterator[bytes]:
        """Copy what is left of a block: into a message, or with `carry` into one to be shared with `next_index`."""
        if self._pieces and carry and self._num_bytes < _CARRY_BYTES:
            self._pieces = [b"".join(self._pieces)]
            self._next = (next_index, 0)
        else:
            yield from self.rest()

    def rest(self) -> Iterator[bytes]:
        """The last message, if anything is left for one."""
        if self._pieces:
            yield self._message()

    def _begin(self, index: int, part: int, offset: int) -> None:
        self._head.index, self._head.part, self._head.offset = index, part, offset

    def _message(self) -> bytes:
        head, self._head = self._head, self._kind()
        if isinstance(head, pb.ReadReply):
            head.tier = self._tier
        head.checksums = struct.pack(f"<{len(self._checksums)}Q", *self._checksums)
        message = encode(head, self._pieces)
        self._pieces, self._num_bytes, self._checksums = [], 0, []
        return message


# ---- receiving ----


@dataclass(frozen=True, slots=True)
class Arrived:
    """A part all of whose bytes came, with the checksum they have. `good`: they are those that were sent."""

    index: int
    part: int
    checksum: int
    good: bool
    ends_block: bool


class Unpacker:
    """Puts the data of messages where it belongs."""

    def __init__(self, views_of: Callable[[int], Sequence[memoryview]], next_index: Callable[[int], int]) -> None:
        """`views_of` gives the memory of a block's parts, and raises Misfit for a block that may not come now.

        `next_index` gives the block that follows another where data runs on. Of a block a message names, the caller
        is asked once, when its first byte comes.
        """
        self._views_of = views_of
        self._next_index = next_index
        self._last = -1
        self._views: Sequence[memoryview] = ()
        self._at: tuple[int, int, int] | None = None
        self._running = xxhash.xxh3_64()

    @property
    def in_block(self) -> bool:
        """Whether a block has begun and not ended."""
        return self._at is not None

    def take(self, head: pb.ReadReply | pb.WriteRequest, data: memoryview) -> Iterator[Arrived]:
        """Copy the data of one message; parts as they end. Raises Misfit, and is not to be used after that."""
        sums = self._sums(head.checksums)
        at = (head.index, head.part, head.offset)
        if self._at is None:
            self._enter(at)
        elif self._at != at:
            raise Misfit(f"data for (block, part, offset) {at} came where {self._at} comes next")
        used = 0
        while used < len(data):
            if self._at is None:
                self._enter((self._next_index(self._last), 0, 0))
            index, part, offset = self._at or at
            piece = data[used : used + len(self._views[part]) - offset]
            used += len(piece)
            if offset + len(piece) < len(self._views[part]):
                self._running.update(piece)
                _copy(self._views[part][offset : offset + len(piece)], piece)
                self._at = (index, part, offset + len(piece))
                break
            yield self._end_part(index, part, offset, piece, next(sums, None))
        if next(sums, None) is not None:
            raise Misfit(f"a message at block {head.index} has a checksum too many")

    def _enter(self, at: tuple[int, int, int]) -> None:
        index, part, offset = at
        if (part, offset) != (0, 0) or index <= self._last:
            raise Misfit(f"data for (block, part, offset) {at} came where a block after {self._last} begins")
        self._views = self._views_of(index)
        if not self._views or not all(map(len, self._views)):
            raise Misfit(f"data came for block {index}, of which nothing is wanted")
        self._last = index
        self._at = at

    def _end_part(self, index: int, part: int, offset: int, piece: memoryview, expected: int | None) -> Arrived:
        if expected is None:
            raise Misfit(f"part {part} of block {index} came without a checksum")
        if offset:
            self._running.update(piece)
            found = self._running.intdigest()
            self._running.reset()
        else:
            found = checksum(piece)
        _copy(self._views[part][offset:], piece)
        ends_block = part + 1 == len(self._views)
        self._at = None if ends_block else (index, part + 1, 0)
        return Arrived(index, part, found, found == expected, ends_block)

    @staticmethod
    def _sums(packed: bytes) -> Iterator[int]:
        if len(packed) % 8:
            raise Misfit(f"checksums have {len(packed)} bytes: a multiple of 8 is needed")
        return iter(struct.unpack(f"<{len(packed) // 8}Q", packed))


def _copy(into: memoryview, source: memoryview) -> None:
    """Copy without the GIL, where it is long enough to matter."""
    if len(source) < copying.MIN_BYTES:
        into[:] = source
    else:
        copying.assign(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))
