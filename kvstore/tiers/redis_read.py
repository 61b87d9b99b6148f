# SPDX-License-Identifier: Apache-2.0
"""Values out of Redis: received straight into the caller's buffers, verified before anybody sees them.

Checksums ride along: a megabyte is hashed while it is still in the cache, and the kernel's socket buffer keeps the
server busy meanwhile, so they cost next to nothing and need no thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import xxhash

from kvstore.block import PartKey
from kvstore.codecs import CODECS, Codec
from kvstore.tiers.redis_names import Names
from kvstore.tiers.redis_wire import ReplyError, Wire
from kvstore.wire import frame
from kvstore.wire.frame import FrameError, Header

_CHUNK_BYTES = 1 << 20
_AHEAD_BYTES = 4 << 20
"""Values asked for beyond the one being received: enough to hide a round trip, little for the server to hold."""
_MAX_AHEAD = 64
_RAW_ID = CODECS.load("raw").wire_id
_PEEK_BYTES = 512


class Reader:
    """Receives values into buffers, and says why one is not what was asked for."""

    def __init__(self, names: Names) -> None:
        self._names = names
        loaded = (CODECS.load(name) for name in CODECS)
        self._codecs: dict[int, Codec] = {codec.wire_id: codec() for codec in loaded}
        self._peek_bytes = _PEEK_BYTES

    def read(
        self,
        wire: Wire,
        into: Mapping[PartKey, memoryview],
        deadline: float,
        damaged: list[PartKey],
        counts: dict[str, float],
    ) -> Iterator[PartKey]:
        """As `Tier.read`, over a lent wire. Keys to remove go to `damaged`, numbers to `counts`."""
        keys = list(into)
        asked = 0
        ahead_bytes = 0
        for position, key in enumerate(keys):
            # At least one value more is always asked for; many small ones are asked for in one call.
            if asked < len(keys) and (asked - position < 2 or ahead_bytes < _AHEAD_BYTES // 2):
                first = asked
                while asked < len(keys) and (asked - position < 2 or ahead_bytes < _AHEAD_BYTES):
                    if asked - position == _MAX_AHEAD:
                        break
                    ahead_bytes += len(into[keys[asked]])
                    asked += 1
                if asked > first:
                    wire.send([self._names.pipeline("GET", keys[first:asked])], deadline)
            ahead_bytes -= len(into[key])
            outcome = self._receive(wire, key, into[key].cast("B"), deadline)
            counts[outcome] = counts.get(outcome, 0) + 1
            if outcome == "read_blocks":
                counts["read_bytes"] = counts.get("read_bytes", 0) + len(into[key])
                yield key
            elif outcome != "missing_blocks":
                damaged.append(key)

    def _receive(self, wire: Wire, key: PartKey, into: memoryview, deadline: float) -> str:
        """Read one GET's reply to its end, whatever it is; what happened, by the name it is counted under."""
        length = wire.begin_bulk(deadline, self._peek_bytes)
        if length is None:
            return "missing_blocks"
        if isinstance(length, ReplyError):
            if length.code == "WRONGTYPE":
                return "corrupt_blocks"
            raise length
        try:
            outcome = self._receive_value(wire, key, into, deadline)
        except FrameError:
            outcome = "corrupt_blocks"
        wire.finish_bulk(deadline)
        return outcome

    def _receive_value(self, wire: Wire, key: PartKey, into: memoryview, deadline: float) -> str:
        """Read a value as far as it is what it should be. Raises FrameError at the point where it is not."""
        if wire.left < frame.MIN_HEADER_BYTES:
            raise FrameError(f"{wire.left} bytes are too short for a frame")
        head = wire.peek(frame.FIXED_BYTES, deadline)
        rest = frame.measure(head) - len(head)
        if rest > wire.left:
            raise FrameError(f"{wire.left} bytes end within a header")
        head += wire.peek(rest, deadline)
        self._peek_bytes = len(head) + 24
        header = frame.unpack(head)
        if header.key != key:
            return "foreign_blocks"
        frame.verify(header, key)
        codec = self._fitting_codec(header, wire.left, len(into))
        if codec is None:
            fits = self._receive_raw(wire, header, into, deadline)
        else:
            payload = memoryview(bytearray(wire.left))
            wire.read_into(payload, deadline)
            fits = frame.checksum(payload) == header.payload_xxh3
            if fits:
                _decode(codec, payload, header.item_bytes, into)
        return "read_blocks" if fits else "corrupt_blocks"

    def _fitting_codec(self, header: Header, num_bytes: int, raw_bytes: int) -> Codec | None:
        """The codec to decode with, None for raw. Raises FrameError where the header's lengths do not fit."""
        if header.payload_bytes != num_bytes or header.raw_bytes != raw_bytes:
            raise FrameError(f"{num_bytes} bytes for {raw_bytes} are not what the header says")
        if header.codec_id == _RAW_ID:
            if num_bytes != raw_bytes:
                raise FrameError(f"a raw payload of {num_bytes} bytes is not {raw_bytes}")
            return None
        codec = self._codecs.get(header.codec_id)
        # No codec stores more than the part itself: what claims to is not allocated.
        if codec is None or num_bytes >= raw_bytes or not header.item_bytes:
            raise FrameError(f"codec {header.codec_id} is not known here, or saves nothing")
        return codec

    def _receive_raw(self, wire: Wire, header: Header, into: memoryview, deadline: float) -> bool:
        digest = xxhash.xxh3_64()
        for at in range(0, len(into), _CHUNK_BYTES):
            chunk = into[at : at + _CHUNK_BYTES]
            wire.read_into(chunk, deadline)
            digest.update(chunk)
        return digest.intdigest() == header.payload_xxh3


def _decode(codec: Codec, payload: memoryview, item_bytes: int, into: memoryview) -> None:
    try:
        codec.decode(payload, item_bytes, into)
    except ValueError as exc:
        raise FrameError(str(exc)) from exc
