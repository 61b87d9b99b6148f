# SPDX-License-Identifier: Apache-2.0
"""Values of one shape are received many at a time: what comes of each is what came of it one by one."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from itertools import chain

import pytest

from kvstore import native
from kvstore.block import BlockId, BlockMeta, PartKey, RootId
from kvstore.codecs import CODECS
from kvstore.native import Received, Receiving, Run
from kvstore.tiers.redis_names import Names
from kvstore.tiers.redis_read import Counts, Reader
from kvstore.tiers.redis_sealed import Locked
from kvstore.tiers.redis_stream import PlainStream
from kvstore.tiers.redis_wire import ProtocolBroken, Wire
from kvstore.wire import frame
from kvstore.wire.frame import Header
from tests.redis.test_wire import drip, soon
from tests.waiting import wait_until

ROOT = RootId(bytes(32))
NUM_BYTES = 5000
NUM_PARTS = 40
FIRST_AND_TWO = 3
FLIPPED = 2


class OneByOne(PlainStream):
    """As where the C loops were not built."""

    def begin_run(self, run: Run, deadline: float) -> Receiving | None:
        return None


class Many(PlainStream):
    """Counts values that came with others."""

    num_values = 0

    def end_run(self, receiving: Receiving) -> Received:
        self.num_values += receiving.wait(NUM_PARTS)
        return super().end_run(receiving)


def value_of(
    number: int, *, num_extra: int = 0, num_bytes: int = NUM_BYTES, raw_bytes: int = NUM_BYTES
) -> tuple[PartKey, bytes, bytes]:
    """Key, whole value and payload of a part."""
    draw = random.Random(number)
    meta = BlockMeta(BlockId(bytes(32)), 0, draw.randbytes(256), b"x" * num_extra)
    payload = draw.randbytes(num_bytes)
    key = PartKey(ROOT, meta.block_id(), 0)
    raw = CODECS.load("raw").wire_id
    head = frame.pack(Header(key, meta, raw, 2, raw_bytes, len(payload), frame.checksum(payload)))
    return key, head + payload, payload


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def flipped(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def forged(value: bytes, at: int) -> bytes:
    """The value with another byte in its header, of which the header's checksum knows."""
    size = frame.measure(value)
    return frame.with_checksum(flipped(value[: size - 8], at)) + value[size:]


HARM: dict[str, Callable[[bytes], bytes]] = {
    "nil": lambda value: b"$-1\r\n",
    "another type": lambda value: b"-WRONGTYPE it is a list\r\n",
    "a flipped bit": lambda value: bulk(flipped(value, len(value) - 7)),
    "a flipped header": lambda value: bulk(flipped(value, 150)),
    "no magic": lambda value: bulk(flipped(value, 0)),
    "forged tokens": lambda value: bulk(forged(value, 200)),
    "another parent": lambda value: bulk(forged(value, 112)),
    "another cell": lambda value: bulk(forged(value, 8)),
    "another root": lambda value: bulk(forged(value, 79)),
    "another block": lambda value: bulk(forged(value, 80)),
    "another checksum": lambda value: bulk(forged(value, 47)),
    "another length": lambda value: bulk(forged(value, 32)),
    "another codec": lambda value: bulk(forged(value, 6)),
    "another version": lambda value: bulk(forged(value, 5)),
    "another part": lambda value: bulk(value_of(999)[1]),
    "shorter": lambda value: bulk(value[:-1]),
    "empty": lambda value: b"$0\r\n\r\n",
    "longer": lambda value: bulk(value + b"\r\n$-1\r\n"),
    "a longer header": lambda value: bulk(value_of(998, num_extra=40, num_bytes=NUM_BYTES - 40)[1]),
    "no frame": lambda value: bulk(b"\r\n$-1\r\n"),
}


def replies_with(harm: Sequence[str | None]) -> tuple[bytes, dict[PartKey, bytes | None]]:
    """A reply for each entry, and what should arrive of it: None for a value that was harmed."""
    replies, expected = b"", {}
    for number, kind in enumerate(harm):
        key, value, payload = value_of(number)
        replies += bulk(value) if kind is None else HARM[kind](value)
        expected[key] = payload if kind is None else None
    return replies, expected


def delivered(
    wire: Wire,
    into: dict[PartKey, memoryview],
    deadline: float,
    damaged: list[PartKey] | None = None,
    counts: Counts | None = None,
    names: Names | None = None,
    *,
    beside: bool = False,
) -> Iterator[PartKey]:
    """Keys in the order in which a reader delivers them; with `beside` most are received by a thread of C's."""
    return chain.from_iterable(
        reading(wire, into, deadline, [] if damaged is None else damaged, counts or Counts(), names, beside=beside)
    )


def reading(
    wire: Wire,
    into: dict[PartKey, memoryview],
    deadline: float,
    damaged: list[PartKey],
    counts: Counts,
    names: Names | None = None,
    *,
    beside: bool,
) -> Generator[list[PartKey], None, None]:
    reader = Reader(names or Names(16), Locked(), None)
    if not beside:
        yield from reader.read(wire, into, deadline, damaged, counts)
        return
    parts = list(into.items())
    early = max(2, 4 * len(parts) // 5)
    yield from reader.read(wire, dict(parts[:1]), deadline, damaged, counts)  # by which it knows how one begins
    more = lambda: dict(parts[early:])
    with closing(reader.read(wire, dict(parts[1:early]), deadline, damaged, counts, more=more)) as rest:
        yield from rest


def read_onto(
    arrived: list[PartKey], wire: Wire, into: dict[PartKey, memoryview], deadline: float, *, beside: bool
) -> None:
    for key in delivered(wire, into, deadline, beside=beside):
        arrived.append(key)  # not list(): an error leaves those before it


both_ways = pytest.mark.parametrize("beside", [False, True])


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("kind", HARM)
@pytest.mark.parametrize("stream_type", [Many, OneByOne])
@both_ways
def test_a_harmed_value_among_others_is_a_miss_and_the_others_arrive(
    ends: tuple[socket.socket, socket.socket], stream_type: type[PlainStream], kind: str, seed: int | None, beside: bool
) -> None:
    ours, theirs = ends
    draw = random.Random(kind)
    harm = [None, *(kind if draw.random() < 0.2 else None for _ in range(NUM_PARTS - 2)), kind]
    replies, expected = replies_with(harm)
    stream = stream_type(ours)
    wire, damaged, counts = Wire(stream), [], Counts()
    into = {key: memoryview(bytearray(NUM_BYTES)) for key in expected}
    thread = threading.Thread(target=theirs.sendall, args=(replies,))
    if seed is None:
        thread.start()
    else:
        thread = drip(theirs, replies, random.Random(seed))
    arrived = list(delivered(wire, into, soon(20), damaged, counts, beside=beside))
    thread.join()
    assert arrived == [key for key, payload in expected.items() if payload is not None]
    assert all(into[key] == expected[key] for key in arrived)
    assert len(damaged) == (0 if kind == "nil" else len(harm) - len(arrived))
    assert counts.read_blocks + counts.missing_blocks + counts.corrupt_blocks + counts.foreign_blocks == NUM_PARTS
    assert wire.in_step()
    if isinstance(stream, Many) and native.receives:
        assert stream.num_values > NUM_PARTS // 4


def test_headers_too_long_to_be_verified_in_c_are_verified_each_by_its_own(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    values = [value_of(number, num_extra=5000) for number in range(300)]  # several groups of them
    replies = b"".join(
        bulk(value if number != FLIPPED else flipped(value, 300)) for number, (_, value, _) in enumerate(values)
    )
    into = {key: memoryview(bytearray(NUM_BYTES)) for key, _, _ in values}
    thread = threading.Thread(target=theirs.sendall, args=(replies,))
    thread.start()
    damaged: list[PartKey] = []
    arrived = list(delivered(Wire(PlainStream(ours)), into, soon(20), damaged))
    thread.join()
    assert damaged == [values[FLIPPED][0]]
    assert arrived == [key for key in into if key not in damaged]
    assert all(into[key] == payload for key, _, payload in values if key not in damaged)


@pytest.mark.parametrize("cut", [3, 150, 400, 2000])
@both_ways
def test_a_stream_that_ends_among_many_values_gives_those_before_and_an_error(
    ends: tuple[socket.socket, socket.socket], cut: int, beside: bool
) -> None:
    ours, theirs = ends
    replies, expected = replies_with([None] * NUM_PARTS)
    per_value = len(replies) // NUM_PARTS
    into = {key: memoryview(bytearray(NUM_BYTES)) for key in expected}

    def send() -> None:
        theirs.sendall(replies[: 17 * per_value + cut])
        theirs.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    arrived: list[PartKey] = []
    with pytest.raises(ProtocolBroken):
        read_onto(arrived, Wire(PlainStream(ours)), into, soon(), beside=beside)
    thread.join()
    assert arrived == list(expected)[:17]
    assert all(into[key] == expected[key] for key in arrived)


@pytest.mark.alone
@both_ways
def test_a_peer_that_falls_silent_among_many_values_costs_the_deadline_and_no_more(
    ends: tuple[socket.socket, socket.socket], beside: bool
) -> None:
    ours, theirs = ends
    replies, expected = replies_with([None] * NUM_PARTS)
    into = {key: memoryview(bytearray(NUM_BYTES)) for key in expected}
    wire = Wire(PlainStream(ours))
    thread = threading.Thread(target=theirs.sendall, args=(replies[:60_000],))
    thread.start()
    began = time.monotonic()
    arrived: list[PartKey] = []
    with pytest.raises(TimeoutError):
        read_onto(arrived, wire, into, began + 1.0, beside=beside)
    assert 0.99 < time.monotonic() - began < 1.9
    assert arrived == list(expected)[: 60_000 // (len(replies) // NUM_PARTS)]
    assert wire.heard
    thread.join()


@both_ways
def test_who_waits_for_many_values_goes_on_when_the_wire_is_aborted(
    ends: tuple[socket.socket, socket.socket], beside: bool
) -> None:
    ours, theirs = ends
    replies, expected = replies_with([None] * NUM_PARTS)
    into = {key: memoryview(bytearray(NUM_BYTES)) for key in expected}
    wire = Wire(PlainStream(ours))
    theirs.sendall(replies[:20_000])
    timer = threading.Timer(0.1, wire.abort)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ProtocolBroken):
        list(delivered(wire, into, soon(10), beside=beside))
    assert time.monotonic() - began < 5
    timer.join()


@both_ways
def test_an_end_that_is_none_breaks_the_stream(ends: tuple[socket.socket, socket.socket], beside: bool) -> None:
    ours, theirs = ends
    replies, expected = replies_with([None] * 6)
    per_value = len(replies) // 6
    theirs.sendall(replies[: 4 * per_value - 2] + b"xx" + replies[4 * per_value :])
    into = {key: memoryview(bytearray(NUM_BYTES)) for key in expected}
    arrived: list[PartKey] = []
    with pytest.raises(ProtocolBroken):
        read_onto(arrived, Wire(PlainStream(ours)), into, soon(), beside=beside)
    assert arrived == list(expected)[:FIRST_AND_TWO]


SIZES = (129, 143, 144, 240, 241, 255, 256, 1023, 1024, 1025, 1087, 1088, 1089, 2048, 2049, 70_001, 300_000, 1_048_576)


@pytest.mark.parametrize("num_bytes", SIZES)
def test_a_checksum_taken_while_receiving_is_that_of_the_whole_payload(
    ends: tuple[socket.socket, socket.socket], num_bytes: int
) -> None:
    ours, theirs = ends
    replies, payloads = b"", {}
    for number in range(4):
        key, value, payload = value_of(number, num_bytes=num_bytes, raw_bytes=num_bytes)
        replies += bulk(value if number != FLIPPED else flipped(value, len(value) - 1 - num_bytes // 3))
        payloads[key] = payload
    into = {key: memoryview(bytearray(num_bytes)) for key in payloads}
    stream = Many(ours)
    thread = drip(theirs, replies, random.Random(num_bytes))
    arrived = list(delivered(Wire(stream), into, soon(20)))
    thread.join()
    assert arrived == [key for number, key in enumerate(payloads) if number != FLIPPED]
    assert all(into[key] == payloads[key] for key in arrived)
    assert stream.num_values == 3 * native.receives


@both_ways
def test_who_stops_among_many_values_leaves_no_thread_that_writes_to_the_buffers(
    ends: tuple[socket.socket, socket.socket], beside: bool
) -> None:
    ours, theirs = ends
    num_parts, num_bytes, num_sent = 24, 300_000, 7  # the first by itself, and a group
    values = [value_of(number, num_bytes=num_bytes, raw_bytes=num_bytes) for number in range(num_parts)]
    into = {key: memoryview(bytearray(num_bytes)) for key, _, _ in values}
    wire = Wire(PlainStream(ours))
    replies = [bulk(value) for _, value, _ in values]
    thread = threading.Thread(target=theirs.sendall, args=(b"".join(replies[:num_sent]),))
    thread.start()
    some = reading(wire, into, soon(20), [], Counts(), beside=beside)
    assert [*next(some), *next(some)] == list(into)[: num_sent if native.receives else 2]
    thread.join()
    began = time.monotonic()
    some.close()
    assert time.monotonic() - began < 5
    assert not wire.in_step()
    for buffer in into.values():
        buffer[:] = bytes(num_bytes)
    theirs.settimeout(0.2)
    with suppress(BrokenPipeError, TimeoutError):  # the connection was cut, or nobody receives
        theirs.sendall(replies[num_sent])
    wire.close()
    assert not any(map(any, into.values()))


def test_what_follows_finds_its_room_and_is_asked_for_while_the_first_are_received(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    replies, expected = replies_with([None] * NUM_PARTS)
    per_value = len(replies) // NUM_PARTS
    into = {key: memoryview(bytearray(NUM_BYTES)) for key in expected}
    seen: list[bytes] = []

    def serve() -> None:
        with theirs.makefile("rb") as requests:
            next_name = lambda: [requests.readline() for _ in range(5)][-1]  # *2, $3, GET, its length, the name
            seen.append(next_name())
            theirs.sendall(replies[:per_value])
            seen.extend(next_name() for _ in range(4 * NUM_PARTS // 5))  # one of them follows the early ones
            theirs.sendall(replies[per_value:])

    thread = threading.Thread(target=serve)
    thread.start()
    arrived = list(delivered(Wire(PlainStream(ours)), into, soon(20), beside=True))
    thread.join()
    assert arrived == list(expected)
    assert len(set(seen)) == 1 + 4 * NUM_PARTS // 5
    assert all(into[key] == expected[key] for key in arrived)


def test_the_first_are_received_while_what_follows_finds_its_room(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    num_bytes = 4 << 20  # more than a socket holds
    values = [value_of(number, num_bytes=num_bytes, raw_bytes=num_bytes) for number in range(4)]
    into = {key: memoryview(bytearray(num_bytes)) for key, _, _ in values}
    reader, wire = Reader(Names(16), Locked(), None), Wire(PlainStream(ours))
    thread = threading.Thread(target=lambda: [theirs.sendall(bulk(value)) for _, value, _ in values[:3]])
    thread.start()
    parts = list(into.items())
    assert list(reader.read(wire, dict(parts[:1]), soon(20), [], Counts())) == [[parts[0][0]]]
    came: list[bool] = []

    def more() -> dict[PartKey, memoryview]:
        thread.join(5)
        came.append(not thread.is_alive())
        theirs.sendall(bulk(values[3][1])[:100])
        return dict(parts[3:])

    rest = chain.from_iterable(reader.read(wire, dict(parts[1:3]), soon(20), [], Counts(), more=more))
    assert [next(rest), next(rest)] == [key for key, _ in parts[1:3]]
    assert came == [native.receives]
    thread = threading.Thread(target=theirs.sendall, args=(bulk(values[3][1])[100:],))
    thread.start()
    assert list(rest) == [parts[3][0]]
    thread.join()
    assert all(into[key] == payload for key, _, payload in values)


def test_where_nothing_can_follow_no_thread_goes_on_receiving(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    replies, expected = replies_with([None] * NUM_PARTS)
    cut = 5 * len(replies) // NUM_PARTS + 1000
    parts = [(key, memoryview(bytearray(NUM_BYTES))) for key in expected]
    reader, wire = Reader(Names(16), Locked(), None), Wire(PlainStream(ours))
    theirs.sendall(replies[:cut])
    assert list(reader.read(wire, dict(parts[:1]), soon(20), [], Counts())) == [[parts[0][0]]]

    def more() -> dict[PartKey, memoryview]:
        wait_until(lambda: not native.receives or any(parts[5][1]))  # in the middle of the sixth
        raise MemoryError

    with pytest.raises(MemoryError):
        list(reader.read(wire, dict(parts[1:]), soon(20), [], Counts(), more=more))
    for _, buffer in parts:
        buffer[:] = bytes(NUM_BYTES)
    with suppress(BrokenPipeError):
        theirs.sendall(replies[cut:])
    time.sleep(0.05)
    assert not any(any(buffer) for _, buffer in parts)
    assert wire.in_step() != native.receives
    wire.close()


def test_of_large_values_that_follow_small_ones_few_are_asked_for_ahead(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    large = 1 << 20
    sizes = [NUM_BYTES] * 6 + [large] * 12
    values = [value_of(number, num_bytes=size, raw_bytes=size) for number, size in enumerate(sizes)]
    parts = [(key, memoryview(bytearray(size))) for (key, _, _), size in zip(values, sizes, strict=True)]
    most_ahead: list[int] = []

    def serve() -> None:
        with theirs.makefile("rb") as requests:
            asked = 0
            while asked < len(values):
                while asked == len(most_ahead) or (asked < len(values) and select.select([theirs], [], [], 0.05)[0]):
                    for _ in range(5):  # *2, $3, GET, its length, the name
                        requests.readline()
                    asked += 1
                num_sent = len(most_ahead)
                most_ahead.append(asked - num_sent)
                theirs.sendall(bulk(values[num_sent][1]))
            for _, value, _ in values[len(most_ahead) :]:
                theirs.sendall(bulk(value))

    thread = threading.Thread(target=serve)
    thread.start()
    reader, wire = Reader(Names(16), Locked(), None), Wire(PlainStream(ours))
    assert list(reader.read(wire, dict(parts[:1]), soon(20), [], Counts()))
    rest = reader.read(wire, dict(parts[1:5]), soon(20), [], Counts(), more=lambda: dict(parts[5:]))
    assert list(chain.from_iterable(rest)) == [key for key, _ in parts[1:]]
    thread.join()
    assert max(most_ahead) <= 4 + 1 + 5  # early ones, a small one, and 4 MiB


def test_values_are_asked_for_a_bounded_number_ahead(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    num_parts, num_bytes = 12, 1 << 20
    values = [value_of(number, num_bytes=num_bytes, raw_bytes=num_bytes) for number in range(num_parts)]
    into = {key: memoryview(bytearray(num_bytes)) for key, _, _ in values}
    most_ahead = [0]

    def serve() -> None:
        asked = num_sent = 0
        with theirs.makefile("rb") as requests:
            while num_sent < num_parts:
                while asked == num_sent or select.select([theirs], [], [], 0.02)[0]:
                    for _ in range(5):  # *2, $3, GET, its length, the name
                        requests.readline()
                    asked += 1
                    if asked == num_parts:
                        break
                most_ahead[0] = max(most_ahead[0], asked - num_sent)
                theirs.sendall(bulk(values[num_sent][1]))
                num_sent += 1

    thread = threading.Thread(target=serve)
    thread.start()
    arrived = list(delivered(Wire(PlainStream(ours)), into, soon(20)))
    thread.join()
    assert arrived == list(into)
    assert 2 <= most_ahead[0] <= 6


class CountedNames(Names):
    """Counts the keys of which requests were made."""

    num_keys = 0

    def pipeline(self, command: str, keys: Sequence[PartKey]) -> bytes:
        self.num_keys += len(keys)
        return super().pipeline(command, keys)


@pytest.mark.parametrize("stream", [PlainStream, OneByOne])
def test_values_of_which_no_two_are_alike_cost_no_more_each_the_more_there_are(
    ends: tuple[socket.socket, socket.socket], stream: type[PlainStream]
) -> None:
    ours, theirs = ends
    num_values, replies, payloads = 600, b"", {}
    for number in range(num_values):
        key, value, payload = value_of(number, num_extra=number % 7, num_bytes=200, raw_bytes=200)
        replies += bulk(value)
        payloads[key] = payload
    into = {key: memoryview(bytearray(200)) for key in payloads}
    names = CountedNames(16)
    thread = threading.Thread(target=theirs.sendall, args=(replies,))
    thread.start()
    arrived = list(delivered(Wire(stream(ours)), into, soon(20), names=names))
    thread.join()
    assert arrived == list(payloads)
    assert all(into[key] == payloads[key] for key in arrived)
    assert names.num_keys < 20 * num_values
