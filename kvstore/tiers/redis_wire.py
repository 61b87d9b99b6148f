# SPDX-License-Identifier: Apache-2.0
"""RESP on a bare socket: bulk bytes go between the caller's memory and the kernel with nothing in between.

redis-py's parser would copy every value twice and cap reads at a few hundred MB/s. Every call takes an absolute
deadline on `time.monotonic`.

Invariant: `Wire` is either in step (every reply that was asked for has been read) or it is closed. Whoever stops
half-way, for whatever reason, closes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from kvstore.native import Receiving, Run
from kvstore.tiers.redis_stream import Buffer, Stream

Reply = int | bytes | list["Reply"] | None

_SCRATCH_BYTES = 128 << 10
"""The longest header and more."""
_NIL = b"$-1\r\n"
_MOST_BYTES = 64 << 20
_MOST_LEVELS = 8
"""Of replies that are no values: what claims more is none that anybody asked for, and is not made room for."""
_MAX_IOVECS = 512
"""The kernel's limit is 1,024."""


class ReplyError(Exception):
    """An error the server answered with, such as `WRONGTYPE …`. The wire stays in step."""

    @property
    def code(self) -> str:
        return str(self).partition(" ")[0]

    @property
    def is_denied(self) -> bool:
        """The server will not run this command for us: our user may not, or it has none of that name."""
        return self.code == "NOPERM" or str(self).lower().startswith("err unknown command")

    @property
    def is_of_type(self) -> bool:
        """A key holds something else than it should: the server works, and others may yet be read and written."""
        text = str(self)
        return self.code == "WRONGTYPE" or "is not an integer" in text or "attempt to" in text


class ProtocolBroken(Exception):
    """Bytes that are not the reply expected here, or the end of the stream."""


class Wire:
    """One connection, one conversation at a time. Not thread-safe; the pool lends it to one thread."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._scratch = bytearray(_SCRATCH_BYTES)
        self._view = memoryview(self._scratch)
        self._start = 0
        self._end = 0
        self.left = 0
        """Bytes of the current value not read yet."""
        self._cut = False
        self.heard = False
        """Something was received since it was set False: the server is alive, if slow."""

    def close(self) -> None:
        self._stream.close()

    def abort(self) -> None:
        """From another thread: whoever waits here goes on at once, with an error."""
        self._stream.shut_down()

    # ── sending ────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, buffers: Sequence[Buffer], deadline: float, meanwhile: Callable[[], bool] | None = None) -> None:
        """Send all of `buffers` in order, without joining them. Raises TimeoutError or OSError.

        `meanwhile` does a short piece of other work (microseconds) and says whether there was any left. It is called
        while the server has not taken what was sent before, so it costs the conversation nothing.
        """
        pending: list[Buffer] = [buffer for buffer in buffers if len(buffer)]
        while pending:
            sent = self._stream.send(pending[:_MAX_IOVECS], deadline, meanwhile)
            num_done = 0
            while num_done < len(pending) and sent >= len(pending[num_done]):
                sent -= len(pending[num_done])
                num_done += 1
            del pending[:num_done]
            if sent:
                pending[0] = memoryview(pending[0])[sent:]

    # ── receiving ──────────────────────────────────────────────────────────────────────────────────────────

    def _fill(self, limit: int, deadline: float) -> None:
        """Receive up to `limit` more bytes into the scratch buffer, at least one."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end + limit > _SCRATCH_BYTES:
            size = self._end - self._start
            self._scratch[:size] = self._scratch[self._start : self._end]
            self._start, self._end = 0, size
        room = self._view[self._end : min(_SCRATCH_BYTES, self._end + limit)]
        if not room:
            raise ProtocolBroken("a reply line longer than the buffer")
        self._end += self._recv(room, deadline, fill=False)

    def _recv(self, view: memoryview, deadline: float, *, fill: bool) -> int:
        count = self._stream.recv(view, deadline, fill=fill)
        if not count:
            raise ProtocolBroken("the server closed the connection")
        self.heard = True
        return count

    def _line(self, deadline: float, limit: int) -> bytes:
        """One reply line without its end. `limit` bounds how far past it to read."""
        searched = self._start
        while True:
            found = self._scratch.find(b"\r\n", searched, self._end)
            if found >= 0:
                line = bytes(self._view[self._start : found])
                self._start = found + 2
                return line
            pending = self._end - self._start
            self._fill(limit, deadline)
            searched = max(self._start, self._start + pending - 1)

    def reply(self, deadline: float, level: int = 0) -> Reply | ReplyError:
        """One whole reply, errors as values so that the rest of a pipeline can be read."""
        return self._parse(self._line(deadline, _SCRATCH_BYTES // 2), deadline, level)

    def _parse(self, line: bytes, deadline: float, level: int) -> Reply | ReplyError:
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return ReplyError(rest.decode(errors="replace"))
        number = integer(rest)
        if kind == b":":
            return number
        if kind == b"$":
            return None if number < 0 else self._bulk(number, deadline)
        if kind == b"*":
            if number < 0:
                return None
            if self._take_nothing(number):
                return [None] * number
            if level == _MOST_LEVELS:
                raise ProtocolBroken("a list in lists without end")
            items: list[Reply] = []
            for _ in range(number):
                item = self.reply(deadline, level + 1)
                if isinstance(item, ReplyError):
                    # Only EXEC nests errors; the first is what the whole came to, the rest must still be read.
                    return self._drain(item, number - len(items) - 1, deadline, level)
                items.append(item)
            return items
        raise ProtocolBroken(f"{line[:32]!r} is no reply")

    def _take_nothing(self, number: int) -> bool:
        """Take as many nils where they all have come: what an MGET of marks finds, as a rule."""
        size = number * len(_NIL)
        if size > self._end - self._start or not self._scratch.startswith(_NIL * number, self._start):
            return False
        self._start += size
        return True

    def _drain(self, error: ReplyError, num_replies: int, deadline: float, level: int) -> ReplyError:
        for _ in range(num_replies):
            self.reply(deadline, level + 1)
        return error

    def _bulk(self, length: int, deadline: float) -> bytes:
        if length > _MOST_BYTES:
            raise ProtocolBroken(f"a reply of {length} bytes")
        data = bytearray(length)
        self.left = length
        self.read_into(memoryview(data), deadline)
        self.finish_bulk(deadline, _SCRATCH_BYTES // 2)
        return bytes(data)

    def begin_bulk(self, deadline: float, peek_bytes: int) -> int | None:
        """Begin reading a GET's reply: its length, or None for nil. Raises ReplyError.

        Whoever got a length reads what it wants of it with `peek` and `read_into`, then calls `finish_bulk`.
        `peek_bytes` bounds how much of the value may come into the scratch buffer, and be copied once more.
        """
        line = self._line(deadline, peek_bytes)
        if line[:1] == b"-":
            raise ReplyError(line[1:].decode(errors="replace"))
        if line[:1] != b"$":
            raise ProtocolBroken(f"{line[:32]!r} is no bulk reply")
        length = integer(line[1:])
        if length < 0:
            return None
        self.left = length
        return length

    def begin_like(self, line: bytes, length: int, head_bytes: int) -> bytes | None:
        """`begin_bulk` and `peek` in one for a value with this length line; None where not all that has come."""
        body = self._start + len(line)
        end = body + head_bytes
        if end > self._end or self._scratch[self._start : body] != line:
            return None
        self._start = end
        self.left = length - head_bytes
        return bytes(self._view[body:end])

    def may_be_like(self, line: bytes, head_bytes: int) -> bool:
        """Whether what has come of the next value, if anything, begins with this length line, and ends in a header."""
        begun = bytes(self._view[self._start : self._end])
        return not self.left and len(begun) <= len(line) + head_bytes and begun[: len(line)] == line[: len(begun)]

    def begin_run(
        self,
        shape: tuple[bytes, int],
        buffers: Sequence[memoryview],
        asking: tuple[bytes, int, int],
        deadline: float,
        *,
        beside: bool,
    ) -> Receiving | None:
        """Begin to receive values to their ends, up to the first that does not begin with this length line.

        None where the stream cannot do this: read them one by one. Otherwise `end_run` is the next call, except that
        where all were asked for, more may be with `send`.

        Args:
            shape: the length line, and how many bytes follow it as a header; only where they `may_be_like` that.
            asking: as `Run.requests`, `num_asked` and `num_ahead`.
            beside: as `Run.beside`.
        """
        line, head_bytes = shape
        begun = bytes(self._view[self._start : self._end])
        return self._stream.begin_run(Run(line, head_bytes, buffers, begun, *asking, beside), deadline)

    def end_run(self, receiving: Receiving) -> tuple[int, Exception | None]:
        """End a run, cut short or not; returns how many of its values were asked for, and what it failed of."""
        got = self._stream.end_run(receiving)
        self.heard = self.heard or got.heard
        self._scratch[: len(got.rest)] = got.rest
        self._start, self._end = 0, len(got.rest)
        self._cut = got.failure is not None
        if isinstance(got.failure, EOFError):
            return got.num_asked, ProtocolBroken("the server closed the connection")
        if isinstance(got.failure, ValueError):
            return got.num_asked, ProtocolBroken("a value is not followed by its end")
        return got.num_asked, got.failure

    def put_back(self, num_bytes: int) -> None:
        """Unread the last bytes that `begin_like` gave."""
        self._start -= num_bytes
        self.left += num_bytes

    def peek(self, num_bytes: int, deadline: float) -> bytes:
        """Read `num_bytes` of the current value into new bytes."""
        self._claim(num_bytes)
        return self._take(num_bytes, deadline)

    def read_into(self, into: memoryview, deadline: float) -> None:
        """Fill `into` from the current value."""
        self._claim(len(into))
        buffered = min(len(into), self._end - self._start)
        if buffered:
            into[:buffered] = self._view[self._start : self._start + buffered]
            self._start += buffered
        while buffered < len(into):
            buffered += self._recv(into[buffered:], deadline, fill=True)

    def finish_bulk(self, deadline: float, peek_bytes: int) -> None:
        """Read on over the rest of the current value and its end; `peek_bytes` as for `begin_bulk`."""
        while self.left:
            if self._start == self._end:
                self._fill(min(self.left, _SCRATCH_BYTES), deadline)
            step = min(self.left, self._end - self._start)
            self._start += step
            self.left -= step
        while self._end - self._start < 2:
            self._fill(2 + peek_bytes, deadline)
        if self._take(2, deadline) != b"\r\n":
            raise ProtocolBroken("a value is not followed by its end")

    def _claim(self, num_bytes: int) -> None:
        if num_bytes > self.left:
            raise ProtocolBroken(f"{num_bytes} bytes wanted of a value with {self.left} left")
        self.left -= num_bytes

    def _take(self, num_bytes: int, deadline: float) -> bytes:
        while self._end - self._start < num_bytes:
            self._fill(num_bytes - (self._end - self._start), deadline)
        data = bytes(self._view[self._start : self._start + num_bytes])
        self._start += num_bytes
        return data

    def flags(self, count: int, deadline: float) -> list[bool]:
        """`count` one-digit integer replies, as EXISTS gives them: thousands in one go."""
        size = 4 * count
        if size <= _SCRATCH_BYTES // 2:
            while self._end - self._start < size and self._looks_like_flags():
                self._fill(size - (self._end - self._start), deadline)
            if self._end - self._start >= size and self._looks_like_flags():
                data = bytes(self._view[self._start : self._start + size])
                if data[0::4] == b":" * count and data[3::4] == b"\n" * count:
                    self._start += size
                    return [byte == 0x31 for byte in data[1::4]]
        replies = [self.reply(deadline) for _ in range(count)]
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise reply
        return [reply == 1 for reply in replies]

    def _looks_like_flags(self) -> bool:
        return self._start == self._end or self._scratch[self._start] == 0x3A

    def alive(self) -> bool:
        """The server has neither hung up nor said anything since the last conversation."""
        return self.in_step() and self._stream.silent()

    @property
    def has_answered(self) -> bool:
        """Something was heard, or waits to be read."""
        return self.heard or self._stream.has_come()

    def in_step(self) -> bool:
        """All that was received was also read."""
        return self._start == self._end and not self.left and not self._cut


def real(text: bytes) -> float:
    """The number that a reply holds, a score as a rule. Raises ProtocolBroken where it is none, or not a number."""
    with contextlib.suppress(ValueError):
        if (value := float(text)) == value:
            return value
    raise ProtocolBroken(f"{text[:32]!r} is no number")


def integer(digits: bytes) -> int:
    """As `real`, for whole ones."""
    try:
        return int(digits)
    except ValueError as exc:
        raise ProtocolBroken(f"{digits[:32]!r} is no number") from exc


def command(*words: bytes | str | int | float) -> bytes:
    """One command as RESP."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else (word if isinstance(word, str) else repr(word)).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)
