# SPDX-License-Identifier: Apache-2.0
"""The wire reads replies however they are cut, and refuses what is none."""

from __future__ import annotations

import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain

import pytest

from kvstore.block import BlockId, BlockMeta, PartKey, RootId
from kvstore.codecs import CODECS
from kvstore.tiers.redis_names import Names
from kvstore.tiers.redis_read import Counts, Reader
from kvstore.tiers.redis_sealed import Locked
from kvstore.tiers.redis_stream import stream_over
from kvstore.tiers.redis_wire import ProtocolBroken, ReplyError, Wire, command, integer, real
from kvstore.wire import frame
from kvstore.wire.frame import Header


@pytest.fixture
def pair() -> Iterator[tuple[Wire, socket.socket]]:
    ours, theirs = socket.socketpair()
    wire = Wire(stream_over(ours))
    yield wire, theirs
    wire.close()
    theirs.close()


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def drip(sock: socket.socket, data: bytes, sizes: random.Random) -> threading.Thread:
    """Send `data` in random small pieces from another thread."""

    def run() -> None:
        at = 0
        with suppress(OSError):  # the reader may have had enough
            while at < len(data):
                size = sizes.choice((1, 2, 3, 7, 100, 5000))
                sock.sendall(data[at : at + size])
                at += size

    thread = threading.Thread(target=run)
    thread.start()
    return thread


REPLIES = (
    b"+OK\r\n:42\r\n$-1\r\n$0\r\n\r\n$5\r\na\r\nbc\r\n-ERR no\r\n"
    + b"*3\r\n:1\r\n$1\r\nx\r\n*0\r\n*-1\r\n*2\r\n+OK\r\n-OOM full\r\n"
)


@pytest.mark.parametrize("seed", range(5))
def test_replies_are_read_however_they_are_cut(pair: tuple[Wire, socket.socket], seed: int) -> None:
    wire, theirs = pair
    thread = drip(theirs, REPLIES, random.Random(seed))
    got = [wire.reply(soon()) for _ in range(9)]
    thread.join()
    assert got[:5] == [b"OK", 42, None, b"", b"a\r\nbc"]
    assert isinstance(got[5], ReplyError)
    assert got[5].code == "ERR"
    assert got[6:8] == [[1, b"x", []], None]
    assert isinstance(got[8], ReplyError)
    assert got[8].code == "OOM"
    assert wire.in_step()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("peek_bytes", [1, 10, 1000])
def test_bulk_values_land_in_their_buffer_however_they_are_cut(
    pair: tuple[Wire, socket.socket], seed: int, peek_bytes: int
) -> None:
    wire, theirs = pair
    values = [random.Random(index).randbytes(size) for index, size in enumerate((10, 3000, 100_000))]
    data = b"".join(b"$%d\r\n%b\r\n" % (len(value), value) for value in values)
    thread = drip(theirs, data, random.Random(seed))
    for value in values:
        assert wire.begin_bulk(soon(), peek_bytes) == len(value)
        head = wire.peek(4, soon())
        body = bytearray(len(value) - 10)
        wire.read_into(memoryview(body), soon())
        wire.finish_bulk(soon(), peek_bytes)
        assert head + body == value[:-6]
    thread.join()
    assert wire.in_step()


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_arrays_of_nothing_are_read_in_one_go_or_one_by_one(pair: tuple[Wire, socket.socket], seed: int | None) -> None:
    wire, theirs = pair
    data = b"*3\r\n" + b"$-1\r\n" * 3 + b"*3\r\n$-1\r\n$1\r\nx\r\n$-1\r\n" + b"*2\r\n$-1\r\n$-1\r\n:7\r\n"
    thread = drip(theirs, data, random.Random(seed)) if seed is not None else None
    if thread is None:
        theirs.sendall(data)
    assert [wire.reply(soon()) for _ in range(4)] == [[None] * 3, [None, b"x", None], [None] * 2, 7]
    if thread is not None:
        thread.join()
    assert wire.in_step()


def test_the_length_of_an_array_is_not_believed_before_it_has_come(pair: tuple[Wire, socket.socket]) -> None:
    wire, theirs = pair
    theirs.sendall(b"*1000000000000000\r\n$-1\r\n")
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolBroken):
        wire.reply(soon())


def test_flags_are_read_in_one_go_or_one_by_one(pair: tuple[Wire, socket.socket]) -> None:
    wire, theirs = pair
    expected = [index % 3 == 0 for index in range(4096)]
    thread = drip(theirs, b"".join(b":%d\r\n" % flag for flag in expected), random.Random(1))
    assert wire.flags(len(expected), soon()) == expected
    thread.join()
    theirs.sendall(b":1\r\n:10\r\n:0\r\n")
    assert wire.flags(3, soon()) == [True, False, False]
    theirs.sendall(b":1\r\n-ERR no\r\n:1\r\n")
    with pytest.raises(ReplyError):
        wire.flags(3, soon())


def test_everything_is_sent_in_order_whatever_its_size(pair: tuple[Wire, socket.socket]) -> None:
    wire, theirs = pair
    buffers = [random.Random(index).randbytes(index * 37 % 5000) for index in range(1500)]
    received = bytearray()

    def receive() -> None:
        while len(received) < sum(map(len, buffers)):
            received.extend(theirs.recv(70_000))

    thread = threading.Thread(target=receive)
    thread.start()
    wire.send([memoryview(buffer) for buffer in buffers], soon())
    thread.join()
    assert received == b"".join(buffers)


@pytest.mark.alone
def test_silent_peer_costs_the_deadline_and_no_more(pair: tuple[Wire, socket.socket]) -> None:
    wire, _theirs = pair
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        wire.reply(soon(0.7))
    with pytest.raises(TimeoutError):
        wire.send([bytes(64 << 20)], soon(0.7))
    assert 1.4 <= time.monotonic() - started < 2


@pytest.fixture
def interrupted() -> Iterator[None]:
    """This thread gets a signal every 20 ms, for three seconds at most, as a profiler sends them."""
    me, over = threading.get_ident(), threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: None)

    def run() -> None:
        until_s = soon(3.0)
        while time.monotonic() < until_s and not over.wait(0.02):
            signal.pthread_kill(me, signal.SIGUSR1)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    over.set()
    thread.join()
    signal.signal(signal.SIGUSR1, before)


def test_signals_put_off_no_deadline(pair: tuple[Wire, socket.socket], interrupted: None) -> None:
    wire, theirs = pair
    theirs.send(b"$10\r\nabc")
    began_s = time.monotonic()
    with pytest.raises(TimeoutError):
        wire.reply(soon(0.3))
    with pytest.raises(TimeoutError):
        wire.send([bytes(16 << 20)], soon(0.3))
    assert time.monotonic() - began_s < 2.0


@pytest.mark.alone
def test_deadline_is_kept_closer_than_the_kernel_keeps_it(pair: tuple[Wire, socket.socket]) -> None:
    """Its timers fire late by up to an eighth of what they were set to."""
    wire, _theirs = pair
    for _ in range(10):  # a busy machine may hold up some
        deadline = soon(0.3)
        with pytest.raises(TimeoutError):
            wire.reply(deadline)
        late_s = time.monotonic() - deadline
        assert late_s >= 0
        if late_s < 0.012:
            return
    pytest.fail(f"late by {late_s:.3f} s, and never by less than 0.012")


@pytest.mark.alone
def test_peer_that_trickles_costs_the_deadline_and_no_more(pair: tuple[Wire, socket.socket]) -> None:
    wire, theirs = pair
    stop = threading.Event()

    def trickle() -> None:
        theirs.sendall(b"$1000000\r\n")
        while not stop.wait(0.01):
            theirs.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    started = time.monotonic()
    try:
        wire.begin_bulk(soon(1.0), 100)
        with pytest.raises(TimeoutError):
            wire.read_into(memoryview(bytearray(1_000_000)), started + 1.0)
    finally:
        stop.set()
        thread.join()
    assert time.monotonic() - started < 1.9


NO_END = (b"$%d\r\n" % (1 << 45), b"$%d\r\n" % (1 << 90), b"*1\r\n" * 2000, b"*2\r\n-ERR\r\n" * 2000)


@pytest.mark.parametrize("garbage", [b"hello\r\n", b"$abc\r\n", b"*x\r\n", b"\r\n", b":\r\n", *NO_END])
def test_what_is_no_reply_is_refused(pair: tuple[Wire, socket.socket], garbage: bytes) -> None:
    wire, theirs = pair
    theirs.sendall(garbage)
    with pytest.raises(ProtocolBroken):
        wire.reply(soon())


def test_end_of_stream_and_a_line_without_end_are_refused(pair: tuple[Wire, socket.socket]) -> None:
    wire, theirs = pair
    thread = drip(theirs, b"+" + b"x" * 300_000, random.Random(1))
    with pytest.raises(ProtocolBroken):
        wire.reply(soon())
    wire.close()
    thread.join()


def test_wire_with_unread_bytes_or_a_closed_peer_is_not_reused(pair: tuple[Wire, socket.socket]) -> None:
    wire, theirs = pair
    assert wire.alive()
    theirs.sendall(b"+surprise\r\n")
    assert not wire.alive()
    wire.reply(soon())
    assert wire.alive()
    theirs.close()
    assert not wire.alive()


def test_commands_measure_bytes_and_not_letters() -> None:
    assert command("SET", "ä", b"\x00\x01", 7, 0.5) == (
        b"*5\r\n$3\r\nSET\r\n$2\r\n\xc3\xa4\r\n$2\r\n\x00\x01\r\n$1\r\n7\r\n$3\r\n0.5\r\n"
    )


@pytest.mark.parametrize("extras", [(0, 40, 0, 8, 40), (40, 0, 40, 8, 0)])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_values_of_one_length_with_headers_of_another_are_read_whole(
    pair: tuple[Wire, socket.socket], seed: int | None, extras: tuple[int, ...]
) -> None:
    """The reader expects a value to begin like the one before."""
    wire, theirs = pair
    root = RootId(bytes(32))
    values: dict[PartKey, bytes] = {}
    replies = b""
    for number, num_extra in enumerate(extras):
        meta = BlockMeta(BlockId(bytes(32)), 0, random.Random(number).randbytes(256), b"x" * num_extra)
        payload = random.Random(number).randbytes(5000 - num_extra)
        key = PartKey(root, meta.block_id(), 0)
        raw = CODECS.load("raw").wire_id
        head = frame.pack(Header(key, meta, raw, 2, len(payload), len(payload), frame.checksum(payload)))
        values[key] = payload
        replies += b"$%d\r\n%b%b\r\n" % (len(head) + len(payload), head, payload)
    thread = threading.Thread(target=theirs.sendall, args=(replies,))
    if seed is None:
        thread.start()
    else:
        thread = drip(theirs, replies, random.Random(seed))
    into = {key: memoryview(bytearray(len(payload))) for key, payload in values.items()}
    damaged: list[PartKey] = []
    reading = Reader(Names(16), Locked(), None).read(wire, into, soon(), damaged, Counts())
    assert list(chain.from_iterable(reading)) == list(values)
    assert into == values
    assert damaged == []
    thread.join()
    assert wire.in_step()


@pytest.mark.parametrize("text", [b"5970846p.768315", b"5\xb9708461.94988", b"", b"nan"])
def test_damaged_number_is_a_broken_protocol_and_not_a_foreign_error(text: bytes) -> None:
    with pytest.raises(ProtocolBroken):
        real(text)
    with pytest.raises(ProtocolBroken):
        integer(text)
    assert (real(b"1.5e-3"), integer(b"-7")) == (0.0015, -7)


def test_many_commands_are_those_that_would_be_put_together_one_by_one() -> None:
    names = Names(16)
    keys = [
        PartKey(RootId(bytes([number % 2] * 32)), BlockId(bytes([number] * 32)), number % 3) for number in range(40)
    ]
    assert names.commands("EXISTS", keys) == [command("EXISTS", names.value(key)) for key in keys]
    orders = [(names.bucket(key).order, names.member(key.block, key.part)) for key in keys]
    assert names.scores(keys) == [command("ZSCORE", *pair) for pair in orders]
    assert names.commands("EXISTS", []) == names.scores([]) == []
