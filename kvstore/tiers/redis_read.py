# SPDX-License-Identifier: Apache-2.0
"""Values out of Redis: received straight into the caller's buffers, verified before anybody sees them.

Values that look alike are received and hashed in C (`kvstore/_receive.c`), which also asks for the next ones; here
their headers are verified, some at a time (`kvstore/_frame.c`), and the caller makes use of them, while more come in
as far as the socket has room. By a thread of its own, which never stops receiving, a load of small blocks took 55 to 63
ms where this takes 47 to 51, of large ones as long: of two cores the server has one, and three threads fought for the
other. Only what was asked for early is received beside, while the caller finds room for what follows.

Others go one by one: odd ones, sealed ones, those that come by TLS, and all where the C loops were not built. Then a
value is received in one go and hashed afterwards: in steps between receives it was slower, since each step lets the
socket run dry.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from kvstore.block import DIGEST_BYTES, PartKey
from kvstore.codecs import CODECS, Codec
from kvstore.native import Asked, Receiving
from kvstore.tiers.base import More
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
"""Small values are asked for so many bytes at a time."""
_LEAST_GROUP_BYTES = 2 << 20
_MOST_GROUP_BYTES = 32 << 20
"""Values of a run are looked at, and handed on, so many bytes at a time; first and last ones in small groups. Each
group wakes the caller's consumer, and meanwhile the socket alone takes in more: with 8 MiB, and 16 in
`kvstore.promotion`, a load of 512 MiB took 9 % longer over TCP (one comparison), of small blocks 7 and 26 % (two; all
of these when a thread of its own received)."""
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
        self.parts: list[tuple[PartKey, memoryview]] = []
        self.num_asked = 0
        self._num_in_turn = 0
        self._fruitless = 0
        self._more: More | None = None
        self._extend(into)

    def _extend(self, into: Mapping[PartKey, memoryview]) -> None:
        self.parts += [(key, buffer if buffer.itemsize == 1 else buffer.cast("B")) for key, buffer in into.items()]

    def begin_early(self, more: More, deadline: float) -> None:
        """Ask for all that is known. `more` is to come: see `go_on`."""
        self._more = more
        self._ask_to(len(self.parts), deadline)

    @property
    def is_early(self) -> bool:
        """What follows is not known yet."""
        return self._more is not None

    def go_on(self, deadline: float) -> None:
        """Find out what follows, and ask for the first of it; nothing where that is known."""
        if self._more is None:
            return
        more, self._more = self._more, None
        self._extend(more())
        self.keep_up(self.num_asked, deadline)

    def _ask_to(self, position: int, deadline: float) -> None:
        first, self.num_asked = self.num_asked, position
        self._wire.send([self._requests(self.parts[first:position])], deadline)

    def keep_up(self, position: int, deadline: float) -> None:
        """Called before value `position` is read."""
        first = until = self.num_asked
        if first - position > _MAX_AHEAD:  # asked for early, all at once
            return
        ahead_bytes = sum(len(buffer) for _, buffer in self.parts[position:first])
        few = first - position <= _MAX_AHEAD // 2  # of tiny ones many are asked for at once, not each as one has come
        if first - position < 2 or (few and ahead_bytes <= _AHEAD_BYTES - _RUN_BYTES):
            while until < len(self.parts) and (
                until - position < 2 or (ahead_bytes < _AHEAD_BYTES and until - position < _MAX_AHEAD)
            ):
                ahead_bytes += len(self.parts[until][1])
                until += 1
        if until > first:
            self._ask_to(until, deadline)

    def is_in_turn(self) -> bool:
        """Whether the next value is to be read by itself, since runs have brought nothing lately.

        Preparing one takes time for each value that is left: where no two are alike, as those that a codec made
        smaller, or where the stream cannot, all that for each value.
        """
        self._num_in_turn -= 1
        return self._num_in_turn >= 0

    def ran(self, num_values: int, of: int) -> None:
        """A run brought so many of its values."""
        self._fruitless = 0 if num_values > 1 or num_values == of else min(_MAX_AHEAD, 2 * self._fruitless + 1)
        self._num_in_turn = self._fruitless

    def run(self, position: int, num_bytes: int) -> list[tuple[PartKey, memoryview]]:
        """Parts from `position` on that have this size."""
        return list(takewhile(lambda part: len(part[1]) == num_bytes, self.parts[position:]))

    def asking(self, position: int, run: Sequence[tuple[PartKey, memoryview]]) -> tuple[bytes, int, int]:
        """How those of a run that begins at `position` are asked for, how many were, and how many to keep ahead."""
        num_ahead = max(1, min(_MAX_AHEAD, _AHEAD_BYTES // len(run[0][1])))
        return self._requests(run), min(len(run), self.num_asked - position), num_ahead

    def _requests(self, parts: Sequence[tuple[PartKey, memoryview]]) -> bytes:
        return self._names.pipeline("GET", [key for key, _ in parts])


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
        more: More | None = None,
    ) -> Generator[list[PartKey], None, None]:
        """As `Tier.read`, or `Tier.read_on`, over a lent wire. Keys to remove go to `damaged`, numbers to `counts`.

        `moved` is told of keys that lie on another node of a Cluster; they are not there for this read.
        """
        ahead = _ReadAhead(self._names, wire, into)
        if more is not None:
            ahead.begin_early(more, deadline)
        position = 0
        while position < len(ahead.parts):
            ahead.keep_up(position, deadline)
            first = position
            with closing(self._receive_run(wire, ahead, first, deadline, damaged, counts)) as run:
                for num_values, keys in run:
                    if keys:
                        counts.read_blocks += len(keys)
                        counts.read_bytes += len(keys) * len(ahead.parts[position][1])
                        yield keys
                    position += num_values
            ahead.go_on(deadline)
            if position > first:
                continue
            key, buffer = ahead.parts[position]
            position += 1
            try:
                arrived = self._receive(wire, key, buffer, deadline, damaged, counts)
            except ReplyError as exc:
                to = redirection(exc)
                if moved is None or to is None:
                    raise
                moved(key, to)
                continue
            if arrived:
                counts.read_blocks += 1
                counts.read_bytes += len(buffer)
                yield [key]

    def _receive_run(
        self,
        wire: Wire,
        ahead: _ReadAhead,
        position: int,
        deadline: float,
        damaged: list[PartKey],
        counts: Counts,
    ) -> Generator[tuple[int, list[PartKey]], None, None]:
        """Of values that look like the one before, up to one that does not: how many came, and which are sound parts.

        None come where they cannot be received like this.
        """
        shape = self._shape
        # What is sealed is opened piece by piece, as it comes.
        if shape is _UNKNOWN or self._sealer is not None or not wire.may_be_like(shape.line, shape.head_bytes):
            return
        if ahead.is_in_turn():
            return
        run = ahead.run(position, shape.length - shape.head_bytes)
        if not run or (len(run) < 2 and shape.length < _RUN_BYTES):
            return
        asking = ahead.asking(position, run)
        asked, buffers = _asked(run), [buffer for _, buffer in run]
        seen, step = 0, max(1, _LEAST_GROUP_BYTES // shape.length)
        receiving = wire.begin_run((shape.line, shape.head_bytes), buffers, asking, deadline, beside=ahead.is_early)
        if receiving is None:
            ahead.ran(0, len(run))
            return
        try:
            ahead.go_on(deadline)
            while (until := receiving.wait(min(len(run), seen + step))) > seen:
                some = Asked(
                    asked.root,
                    asked.blocks[seen * DIGEST_BYTES : until * DIGEST_BYTES],
                    asked.parts[seen:until],
                    _RAW_ID,
                )
                yield until - seen, self._sound(receiving, seen, some, run[seen:until], damaged, counts)
                seen, step = until, _next_step(step, len(run) - until, shape.length)
        finally:
            num_asked, failure = wire.end_run(receiving)
            ahead.num_asked = max(ahead.num_asked, position + num_asked)
            ahead.ran(seen, len(run))
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback has this frame, and with it the buffers

    def _sound(
        self,
        receiving: Receiving,
        first: int,
        asked: Asked,
        parts: Sequence[tuple[PartKey, memoryview]],
        damaged: list[PartKey],
        counts: Counts,
    ) -> list[PartKey]:
        """Which of the values that arrived, from number `first` on, are the parts asked for."""
        sound = receiving.sound(first, asked)
        if sound.count(1) == len(parts):
            return [key for key, _ in parts]
        return [
            key
            for number, (is_sound, (key, buffer)) in enumerate(zip(sound, parts, strict=True), first)
            if is_sound or self._is_asked_for(*receiving.value(number), key, buffer, damaged, counts)
        ]

    def _is_asked_for(
        self, head: bytes, xxh3: int, key: PartKey, buffer: memoryview, damaged: list[PartKey], counts: Counts
    ) -> bool:
        try:
            self._verify(head, xxh3, key, buffer, counts)
        except FrameError as exc:
            self._note(exc, key, damaged, counts)
            return False
        return True

    def _verify(self, head: bytes, xxh3: int, key: PartKey, buffer: memoryview, counts: Counts) -> None:
        """Raises FrameError unless a value, of which `buffer` holds all but `head`, is the part; then it holds that.

        `xxh3` is of what `buffer` holds.
        """
        payload = buffer
        if (length := frame.measure(head)) != len(head):  # the header is longer or shorter than those before
            value = head + bytes(buffer)
            head, payload = value[:length], memoryview(value)[length:]
            xxh3 = frame.checksum(payload)
        told = frame.payload_of(head, key)
        codec = self._fitting_codec(told, len(payload), len(buffer))
        if xxh3 != told.xxh3:
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


def _asked(parts: Sequence[tuple[PartKey, memoryview]]) -> Asked:
    roots, blocks, cells = zip(*[key for key, _ in parts], strict=True)
    return Asked(roots[0], b"".join(blocks), array("I", cells), _RAW_ID)


def _next_step(step: int, num_left: int, num_bytes: int) -> int:
    """How many values of `num_bytes` to wait for after a group of `step`, of `num_left` in all."""
    most, least = _MOST_GROUP_BYTES // num_bytes, _LEAST_GROUP_BYTES // num_bytes
    return max(1, min(most, 2 * step, max(least, num_left // 2)))


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
