# SPDX-License-Identifier: Apache-2.0
"""The frame: what stands before a part's bytes on a wire or disk, so that a value can say what it is.

A value is a header and then a payload (the part's bytes as its codec left them). Little-endian:

    offset     bytes  field
    0          4      magic, b"KVSF"
    4          2      version, 1
    6          1      codec id
    7          1      item_bytes, bytes of one element
    8          4      part, the cell of the grid
    12         4      depth, 0 for the first block of a chain
    16         4      num_tokens (n)
    20         4      extra_bytes (e)
    24         8      raw_bytes, length of the part before the codec
    32         8      payload_bytes, length of what follows the header
    40         8      payload_xxh3, xxh3_64 of the payload
    48         32     root
    80         32     block
    112        32     parent
    144        4n     tokens, u32 each
    144+4n     e      extra
    144+4n+e   8      xxh3_64 of all header bytes before this one

Checksums find accidents; that a value is the block asked for is shown by SHA-256: `verify` hashes parent,
tokens and extra again. Lengths read from a wire are held against limits before anything is done with them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from kvstore.block import DIGEST_BYTES, BlockId, BlockMeta, PartKey, RootId, block_hash

MAGIC = b"KVSF"
VERSION = 1
MAX_TOKENS = 256
MAX_EXTRA_BYTES = 64 << 10

_FIXED = struct.Struct("<4sHBBIIIIQQQ32s32s32s")
_CHECKSUM = struct.Struct("<Q")
_LENGTHS = struct.Struct("<4sH10xII")
"""Of the fixed fields those that say how long a header is."""
FIXED_BYTES = _FIXED.size
MIN_HEADER_BYTES = FIXED_BYTES + _CHECKSUM.size
MAX_HEADER_BYTES = MIN_HEADER_BYTES + 4 * MAX_TOKENS + MAX_EXTRA_BYTES

Buffer = bytes | bytearray | memoryview


class FrameError(ValueError):
    """These bytes are not a frame, or not the frame asked for."""


class ForeignFrame(FrameError):
    """A sound frame, but of another part."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a value says about itself."""

    key: PartKey
    meta: BlockMeta
    codec_id: int
    item_bytes: int
    raw_bytes: int
    payload_bytes: int
    payload_xxh3: int


def checksum(payload: Buffer) -> int:
    """xxh3_64 of `payload`; releases the GIL for large buffers."""
    return xxhash.xxh3_64_intdigest(payload)


class Checksum:
    """The checksum of a payload, taken in pieces."""

    _PIECE_BYTES = 256 << 10

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._at = 0
        self._hash = xxhash.xxh3_64()

    def step(self) -> bool:
        """Hash a piece, some tens of microseconds of work; False where nothing was left."""
        piece = self._payload[self._at : self._at + self._PIECE_BYTES]
        self._hash.update(piece)
        self._at += len(piece)
        return len(piece) > 0

    def value(self) -> int:
        """`checksum` of the whole payload: hashes what is left."""
        if not self._at:
            return checksum(self._payload)
        self._hash.update(self._payload[self._at :])
        self._at = len(self._payload)
        return self._hash.intdigest()


def header_bytes(num_tokens: int, extra_bytes: int) -> int:
    """Length of a header with so many tokens and so much extra."""
    return MIN_HEADER_BYTES + 4 * num_tokens + extra_bytes


def pack(header: Header) -> bytes:
    """The header's bytes; the payload follows them. Raises FrameError for what no reader would accept."""
    key, meta = header.key, header.meta
    num_tokens, odd = divmod(len(meta.tokens), 4)
    if odd or num_tokens > MAX_TOKENS or len(meta.extra) > MAX_EXTRA_BYTES:
        raise FrameError(
            f"{len(meta.tokens)} bytes of tokens and {len(meta.extra)} of extra: "
            f"a frame holds up to {MAX_TOKENS} tokens of 4 bytes and {MAX_EXTRA_BYTES} bytes of extra"
        )
    if not len(key.root) == len(key.block) == len(meta.parent) == DIGEST_BYTES:
        raise FrameError(f"root, block and parent must have {DIGEST_BYTES} bytes")
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        header.codec_id,
        header.item_bytes,
        key.part,
        meta.depth,
        num_tokens,
        len(meta.extra),
        header.raw_bytes,
        header.payload_bytes,
        header.payload_xxh3,
        key.root,
        key.block,
        meta.parent,
    )
    body = fixed + meta.tokens + meta.extra
    return body + _CHECKSUM.pack(checksum(body))


def measure(buffer: Buffer) -> int:
    """Length of the header that begins in `buffer`, which must hold the first FIXED_BYTES of it.

    Raises FrameError on a wrong magic or version, and on lengths no writer gives.
    """
    if len(buffer) < FIXED_BYTES:
        raise FrameError(f"{len(buffer)} bytes are too short for a frame, which begins with {FIXED_BYTES}")
    magic, version, num_tokens, extra_bytes = _LENGTHS.unpack_from(buffer)
    if magic != MAGIC:
        raise FrameError(f"magic is {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame version is {version}, not {VERSION}")
    if num_tokens > MAX_TOKENS or extra_bytes > MAX_EXTRA_BYTES:
        raise FrameError(f"a header of {num_tokens} tokens and {extra_bytes} bytes of extra is not a frame's")
    return header_bytes(num_tokens, extra_bytes)


class Payload(NamedTuple):
    """What the header of the part asked for says about the bytes that follow it."""

    codec_id: int
    item_bytes: int
    raw_bytes: int
    num_bytes: int
    xxh3: int


def payload_of(header: bytes, key: PartKey) -> Payload:
    """What follows `header`, which must be all of one and of nobody but `key`: `unpack` and `verify` in half the time.

    Raises ForeignFrame for a sound header of another part, FrameError for what `unpack` or `verify` refuses.
    """
    length, fields = _fields(header)
    _, _, codec_id, item_bytes, part, _, num_tokens, _, raw_bytes, num_bytes, xxh3, root, block, parent = fields
    if block != key.block or part != key.part or root != key.root:
        raise ForeignFrame(f"a frame of part {part} of block {block.hex()[:16]} stands in for another")
    extra_at = FIXED_BYTES + 4 * num_tokens
    if block_hash(parent, header[FIXED_BYTES:extra_at], header[extra_at : length - _CHECKSUM.size]) != block:
        raise FrameError(f"parent, tokens and extra do not hash to block {block.hex()[:16]}")
    return Payload(codec_id, item_bytes, raw_bytes, num_bytes, xxh3)


def unpack(buffer: Buffer) -> Header:
    """The header that begins `buffer`; more bytes may follow it.

    Raises FrameError on a wrong magic, version, length or header checksum. The payload is not looked at.
    """
    length, fields = _fields(buffer)
    _, _, codec_id, item_bytes, part, depth, num_tokens, _, raw_bytes, num_bytes, xxh3, root, block, parent = fields
    extra_at, end = FIXED_BYTES + 4 * num_tokens, length - _CHECKSUM.size
    meta = BlockMeta(BlockId(parent), depth, bytes(buffer[FIXED_BYTES:extra_at]), bytes(buffer[extra_at:end]))
    key = PartKey(RootId(root), BlockId(block), part)
    return Header(key, meta, codec_id, item_bytes, raw_bytes, num_bytes, xxh3)


def _fields(buffer: Buffer) -> tuple[int, tuple[Any, ...]]:
    """Length of the sound header that begins `buffer`, and its fixed fields in order."""
    length = measure(buffer)
    if len(buffer) < length:
        raise FrameError(f"{len(buffer)} bytes are too short for a header of {length}")
    end = length - _CHECKSUM.size
    if _CHECKSUM.unpack_from(buffer, end)[0] != checksum(memoryview(buffer)[:end]):
        raise FrameError("the header's checksum does not fit")
    return length, _FIXED.unpack_from(buffer)


def verify(header: Header, key: PartKey) -> None:
    """Raises FrameError unless the header is for `key` and its tokens hash to `key.block`."""
    if header.key != key:
        raise FrameError(
            f"a frame of part {header.key.part} of block {header.key.block.hex()[:16]} stands in for another"
        )
    if header.meta.block_id() != key.block:
        raise FrameError(f"parent, tokens and extra do not hash to block {key.block.hex()[:16]}")
