# SPDX-License-Identifier: Apache-2.0
"""Values out of Redis: received straight into the caller's buffers, verified before anybody sees them.

A value is received in one go, then hashed. Hashing in steps between receives, or beside them in a second thread, was
slower on two cores: each step lets the socket run dry, and a thread fetches all bytes from memory once more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from kvstore.block import PartKey
from kvstore.codecs import CODECS, Codec
from kvstore.tiers.redis_names import Names
from kvstore.tiers.redis_nodes import Redirection, redirection
from kvstore.tiers.redis_sealed import Locked
from kvstore.tiers.redis_wire import ReplyError, Wire
from kvstore.wire import frame
from kvstore.wire.frame import PIECE_BYTES, TAG_BYTES, ForeignFrame, FrameError, LockedFrame, Payload

if TYPE_CHECKING:
    from kvstore.wire.seal import Opening, Sealer  # a library that only encryption needs

_AHEAD_BYTES = 4 << 20
"""Values asked for beyond the one being received: enough to hide a round trip, little for the server to hold."""
_MAX_AHEAD = 64
_RUN_BYTES = _AHEAD_BYTES // 2
"""Small values are received so many bytes at a time, and looked at then; as much again was asked for meanwhile."""
_RAW_ID = CODECS.load("raw").wire_id


class _Shape(NamedTuple):
    """How a value begins."""

    line: bytes
    """Its length, as a line."""
    length: int
    head_bytes: int

    @property
    def peek_bytes(self) -> int:
        return len(self.line) + self.head_bytes


_UNKNOWN = _Shape(b"none", 0, 512)


@dataclass(slots=True)
class Counts:
    """What came of a read, part by part."""

    read_blocks: int = 0
    read_bytes: int = 0
    missing_blocks: int = 0
    foreign_blocks: int = 0
    corrupt_blocks: int = 0
    locked_blocks: int = 0
    """Sealed with keys that are not here; they stay where they are."""
    decoded_blocks: int = 0
    decoded_saved_bytes: int = 0
    """Bytes that codecs spared the way from the server."""
    decode_s: float = 0.0

    def add(self, other: Counts) -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


class _Missing(Exception):
    """There is no value."""


class _ReadAhead:
    """Asks for values before they are read: one at least, many small ones in one call."""

    def __init__(self, names: Names, wire: Wire, into: Mapping[PartKey, memoryview]) -> None:
        self._names = names
        self._wire = wire
        self._into = into
        self._keys = list(into)
        self._asked = 0
        self._ahead_bytes = 0

    def keep_up(self, position: int, deadline: float) -> None:
        """Called before value `position` is read."""
        first = self._asked
        if self._asked - position < 2 or self._ahead_bytes <= _AHEAD_BYTES - _RUN_BYTES:
            while self._wants_more(position):
                self._ahead_bytes += len(self._into[self._keys[self._asked]])
                self._asked += 1
        if self._asked > first:
            self._wire.send([self._names.pipeline("GET", self._keys[first : self._asked])], deadline)
        self._ahead_bytes -= len(self._into[self._keys[position]])

    def run(self, position: int, num_bytes: int) -> list[tuple[PartKey, memoryview]]:
        """Parts from `position` on that were asked for and have this size, up to `_RUN_BYTES`."""
        found: list[tuple[PartKey, memoryview]] = []
        for key in self._keys[position : min(self._asked, position + _RUN_BYTES // num_bytes)]:
            buffer = self._into[key].cast("B")
            if len(buffer) != num_bytes:
                break
            found.append((key, buffer))
        return found

    def _wants_more(self, position: int) -> bool:
        num_ahead = self._asked - position
        return self._asked < len(self._keys) and (
            num_ahead < 2 or (self._ahead_bytes < _AHEAD_BYTES and num_ahead < _MAX_AHEAD)
        )


class Reader:
    """Receives values into buffers, and says why one is not what was asked for."""

    def __init__(self, names: Names, locked: Locked, sealer: Sealer | None) -> None:
        self._names = names
        self._locked = locked
        self._sealer = sealer
        loaded = (CODECS.load(name) for name in CODECS)
        self._codecs: dict[int, Codec] = {codec.wire_id: codec() for codec in loaded}
        self._shape = _UNKNOWN  # of the value received last; a hint, whichever thread wrote it

    def read(
        self,
        wire: Wire,
        into: Mapping[PartKey, memoryview],
        deadline: float,
        damaged: list[PartKey],
        counts: Counts,
        moved: Callable[[PartKey, Redirection], None] | None = None,
    ) -> Iterator[PartKey]:
        """As `Tier.read`, over a lent wire. Keys to remove go to `damaged`, numbers to `counts`.

        `moved` is told of keys that lie on another node of a Cluster; they are not there for this read.
        """
        ahead = _ReadAhead(self._names, wire, into)
        expected: deque[bool] = deque()  # of values received before their turn: whether they are the parts asked for
        for position, (key, buffer) in enumerate(into.items()):
            ahead.keep_up(position, deadline)
            if not expected:
                failure = self._receive_run(wire, ahead, position, deadline, expected, damaged, counts)
                if failure is not None and not expected:
                    raise failure
            try:
                if expected:
                    arrived = expected.popleft()
                else:
                    arrived = self._receive(wire, key, buffer.cast("B"), deadline, damaged, counts)
            except ReplyError as exc:
                to = redirection(exc)
                if moved is None or to is None:
                    raise
                moved(key, to)
                continue
            if arrived:
                counts.read_blocks += 1
                counts.read_bytes += len(buffer)
                yield key
            if failure is not None and not expected:
                raise failure

    def _receive_run(
        self,
        wire: Wire,
        ahead: _ReadAhead,
        position: int,
        deadline: float,
        expected: deque[bool],
        damaged: list[PartKey],
        counts: Counts,
    ) -> Exception | None:
        """Read values that look like the one before in one go, and say of each whether it is the part asked for.

        None come where they are large, or do not look like it. Returns what to raise after those that came.
        """
        shape = self._shape
        payload_bytes = shape.length - shape.head_bytes
        run = ahead.run(position, payload_bytes) if payload_bytes > 0 else []
        if len(run) < 2 or self._sealer is not None:  # what is sealed is opened piece by piece, as it comes
            return None
        buffers = [buffer for _, buffer in run]
        heads, failure = wire.values_like(shape.line, shape.head_bytes, buffers, deadline)
        for (key, buffer), head in zip(run, heads, strict=False):
            try:
                self._verify(head, key, buffer, counts)
                expected.append(True)
            except FrameError as exc:
                self._note(exc, key, damaged, counts)
                expected.append(False)
        return failure

    def _verify(self, head: bytes, key: PartKey, buffer: memoryview, counts: Counts) -> None:
        """Raises FrameError unless a value, of which `buffer` holds all but `head`, is the part; then it holds that."""
        payload = buffer
        if (length := frame.measure(head)) != len(head):  # the header is longer or shorter than those before
            value = head + bytes(buffer)
            head, payload = value[:length], memoryview(value)[length:]
        told = frame.payload_of(head, key)
        codec = self._fitting_codec(told, len(payload), len(buffer))
        if frame.checksum(payload) != told.xxh3:
            raise FrameError("the payload's checksum does not fit")
        if codec is not None:
            _decode(codec, payload, told.item_bytes, buffer, counts)

    def _receive(
        self,
        wire: Wire,
        key: PartKey,
        into: memoryview,
        deadline: float,
        damaged: list[PartKey],
        counts: Counts,
    ) -> bool:
        """Read one GET's reply to its end, whatever it is; whether it was the part asked for."""
        arrived = False
        try:
            self._receive_value(wire, key, into, deadline, counts)
            arrived = True
        except _Missing:
            counts.missing_blocks += 1
            return False
        except ReplyError as exc:
            if exc.code != "WRONGTYPE":
                raise
            counts.corrupt_blocks += 1
            damaged.append(key)
            return False
        except FrameError as exc:
            self._note(exc, key, damaged, counts)
        wire.finish_bulk(deadline, self._shape.peek_bytes)
        return arrived

    def _note(self, error: FrameError, key: PartKey, damaged: list[PartKey], counts: Counts) -> None:
        """A value is not the part asked for: to be counted, and removed unless others may be able to read it."""
        if isinstance(error, LockedFrame):
            counts.locked_blocks += 1
            self._locked.add(key)
            return
        if isinstance(error, ForeignFrame):
            counts.foreign_blocks += 1
        else:
            counts.corrupt_blocks += 1
        damaged.append(key)

    def _receive_value(self, wire: Wire, key: PartKey, into: memoryview, deadline: float, counts: Counts) -> None:
        """Read a value as far as it is what it should be."""
        # Most values look like the one before, and most of the time this much of them has come already.
        head = wire.begin_like(*self._shape)
        head = self._begin(wire, deadline) if head is None else _whole_header(wire, head, deadline)
        if self._sealer is not None:
            self._receive_sealed(wire, self._sealer.open(head, key), into, deadline, counts)
            return
        told = frame.payload_of(head, key)
        codec = self._fitting_codec(told, wire.left, len(into))
        payload = into if codec is None else memoryview(bytearray(wire.left))
        wire.read_into(payload, deadline)
        if frame.checksum(payload) != told.xxh3:
            raise FrameError("the payload's checksum does not fit")
        if codec is not None:
            _decode(codec, payload, told.item_bytes, into, counts)

    def _receive_sealed(self, wire: Wire, opening: Opening, into: memoryview, deadline: float, counts: Counts) -> None:
        """Receive a payload piece by piece, each opened while it is in the core's cache."""
        told = opening.told
        num_bytes = wire.left - TAG_BYTES
        codec = self._fitting_codec(told, num_bytes, len(into))
        payload = into if codec is None else memoryview(bytearray(num_bytes))
        scratch = memoryview(bytearray(min(PIECE_BYTES, num_bytes)))
        for at in range(0, num_bytes, PIECE_BYTES):
            piece = scratch[: num_bytes - at]
            wire.read_into(piece, deadline)
            opening.update(piece, payload[at : at + len(piece)])
        opening.finish(wire.peek(TAG_BYTES, deadline))
        if codec is not None:
            _decode(codec, payload, told.item_bytes, into, counts)

    def _begin(self, wire: Wire, deadline: float) -> bytes:
        """The header of the next value, whatever it looks like."""
        length = wire.begin_bulk(deadline, self._shape.peek_bytes)
        if length is None:
            raise _Missing
        if length < frame.MIN_HEADER_BYTES:
            raise FrameError(f"{length} bytes are too short for a frame")
        head = _whole_header(wire, wire.peek(frame.FIXED_BYTES, deadline), deadline)
        # Just the next value's length line and header, to the byte: its payload then lands on an aligned address,
        # where the kernel copies twice as fast.
        self._shape = _Shape(b"$%d\r\n" % length, length, len(head))
        return head

    def _fitting_codec(self, told: Payload, num_bytes: int, raw_bytes: int) -> Codec | None:
        """The codec to decode with, None for raw. Raises FrameError where the header's lengths do not fit."""
        if told.num_bytes != num_bytes or told.raw_bytes != raw_bytes:
            raise FrameError(f"{num_bytes} bytes for {raw_bytes} are not what the header says")
        if told.codec_id == _RAW_ID:
            if num_bytes != raw_bytes:
                raise FrameError(f"a raw payload of {num_bytes} bytes is not {raw_bytes}")
            return None
        codec = self._codecs.get(told.codec_id)
        # No codec stores more than the part itself: what claims to is not allocated.
        if codec is None or num_bytes >= raw_bytes or not told.item_bytes:
            raise FrameError(f"codec {told.codec_id} is not known here, or saves nothing")
        return codec


def _whole_header(wire: Wire, head: bytes, deadline: float) -> bytes:
    """The header that begins with `head`, no byte more and none less."""
    missing = frame.measure(head) - len(head)
    if missing > wire.left:
        raise FrameError("a value ends within its header")
    if missing < 0:  # the one before was longer
        wire.put_back(-missing)
    return head + wire.peek(missing, deadline) if missing > 0 else head[: len(head) + missing]


def _decode(codec: Codec, payload: memoryview, item_bytes: int, into: memoryview, counts: Counts) -> None:
    began_s = time.perf_counter()
    try:
        codec.decode(payload, item_bytes, into)
    except ValueError as exc:
        raise FrameError(str(exc)) from exc
    counts.decode_s += time.perf_counter() - began_s
    counts.decoded_blocks += 1
    counts.decoded_saved_bytes += len(into) - len(payload)
