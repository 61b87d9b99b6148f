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

Version 2 is sealed (`kvstore.wire.seal`): payload_bytes counts the tag that ends the payload, payload_xxh3 is 0, and
36 bytes come in before the tokens. Those follow as ciphertext, as do extra and payload; all before is authenticated:

    144        8      id of the key
    152        16     salt of the writer's own key
    168        12     nonce
    180        4n     tokens, sealed
    180+4n     e      extra, sealed
    180+4n+e   8      xxh3_64 of all header bytes before this one

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
SEALED_VERSION = 2
KEY_ID_BYTES = 8
SALT_BYTES = 16
NONCE_BYTES = 12
TAG_BYTES = 16
PIECE_BYTES = 256 << 10
"""What is hashed, sealed or opened at once: it fits into a core's cache."""
SEAL_BYTES = KEY_ID_BYTES + SALT_BYTES + NONCE_BYTES
MAX_TOKENS = 256
MAX_EXTRA_BYTES = 64 << 10

_FIXED = struct.Struct("<4sHBBIIIIQQQ32s32s32s")
_CHECKSUM = struct.Struct("<Q")
_LENGTHS = struct.Struct("<4sH10xII")
"""Of the fixed fields those that say how long a header is."""
FIXED_BYTES = _FIXED.size
MIN_HEADER_BYTES = FIXED_BYTES + _CHECKSUM.size
MAX_HEADER_BYTES = MIN_HEADER_BYTES + SEAL_BYTES + 4 * MAX_TOKENS + MAX_EXTRA_BYTES
_SEAL_END = FIXED_BYTES + SEAL_BYTES

Buffer = bytes | bytearray | memoryview


class FrameError(ValueError):
    """These bytes are not a frame, or not the frame asked for."""


class ForeignFrame(FrameError):
    """A sound frame, but of another part."""


class LockedFrame(FrameError):
    """A frame sealed with a key that is not here: nothing can be said about it."""


class Seal(NamedTuple):
    """What a sealed frame says in the clear about its sealing."""

    key_id: bytes
    salt: bytes
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a value says about itself. Of a sealed one, as read, `meta` has its tokens and extra as ciphertext."""

    key: PartKey
    meta: BlockMeta
    codec_id: int
    item_bytes: int
    raw_bytes: int
    payload_bytes: int
    payload_xxh3: int
    seal: Seal | None = None


def checksum(payload: Buffer) -> int:
    """xxh3_64 of `payload`; releases the GIL for large buffers."""
    return xxhash.xxh3_64_intdigest(payload)


class Checksum:
    """The checksum of a payload, taken in pieces."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._at = 0
        self._hash = xxhash.xxh3_64()

    def step(self) -> bool:
        """Hash a piece, some tens of microseconds of work; False where nothing was left."""
        piece = self._payload[self._at : self._at + PIECE_BYTES]
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
    return with_checksum(_fixed(header) + header.meta.tokens + header.meta.extra)


def authenticated(header: Header) -> bytes:
    """What stands in the clear in a sealed header."""
    assert header.seal is not None
    return _fixed(header) + b"".join(header.seal)


def with_checksum(body: bytes) -> bytes:
    """A header from all that comes before its checksum."""
    return body + _CHECKSUM.pack(checksum(body))


def _fixed(header: Header) -> bytes:
    key, meta = header.key, header.meta
    num_tokens, odd = divmod(len(meta.tokens), 4)
    if odd or num_tokens > MAX_TOKENS or len(meta.extra) > MAX_EXTRA_BYTES:
        raise FrameError(
            f"{len(meta.tokens)} bytes of tokens and {len(meta.extra)} of extra: "
            f"a frame holds up to {MAX_TOKENS} tokens of 4 bytes and {MAX_EXTRA_BYTES} bytes of extra"
        )
    if not len(key.root) == len(key.block) == len(meta.parent) == DIGEST_BYTES:
        raise FrameError(f"root, block and parent must have {DIGEST_BYTES} bytes")
    return _FIXED.pack(
        MAGIC,
        VERSION if header.seal is None else SEALED_VERSION,
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


def measure(buffer: Buffer) -> int:
    """Length of the header that begins in `buffer`, which must hold the first FIXED_BYTES of it.

    Raises FrameError on a wrong magic or version, and on lengths no writer gives.
    """
    if len(buffer) < FIXED_BYTES:
        raise FrameError(f"{len(buffer)} bytes are too short for a frame, which begins with {FIXED_BYTES}")
    magic, version, num_tokens, extra_bytes = _LENGTHS.unpack_from(buffer)
    if magic != MAGIC:
        raise FrameError(f"magic is {magic!r}, not {MAGIC!r}")
    if version not in (VERSION, SEALED_VERSION):
        raise FrameError(f"frame version is {version}, not {VERSION} or {SEALED_VERSION}")
    if num_tokens > MAX_TOKENS or extra_bytes > MAX_EXTRA_BYTES:
        raise FrameError(f"a header of {num_tokens} tokens and {extra_bytes} bytes of extra is not a frame's")
    return header_bytes(num_tokens, extra_bytes) + (SEAL_BYTES if version == SEALED_VERSION else 0)


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
    if fields[1] == SEALED_VERSION:
        raise LockedFrame("a sealed frame, and no key is here")
    told = _told(fields, key)
    _verify_tokens(header[FIXED_BYTES : length - _CHECKSUM.size], fields, key)
    return told


def sealed(header: bytes, key: PartKey) -> tuple[bytes, Seal, bytes, Payload]:
    """Of a sealed header, all of one: what is authenticated, its seal, what is ciphertext, and what follows it.

    Raises ForeignFrame for one of another part than `key`, FrameError for one that is unsound or not sealed. Nothing
    of it is to be trusted before it was opened.
    """
    length, fields = _fields(header)
    if fields[1] != SEALED_VERSION:
        raise FrameError("a frame that is not sealed")
    return (
        header[:_SEAL_END],
        _seal_of(header),
        header[_SEAL_END : length - _CHECKSUM.size],
        _told(fields, key),
    )


def verify_sealed(header: bytes, key: PartKey, tokens_and_extra: bytes) -> None:
    """`verify` for a sealed header whose ciphertext was opened. Raises FrameError."""
    _verify_tokens(tokens_and_extra, _FIXED.unpack_from(header), key)


def _told(fields: tuple[Any, ...], key: PartKey) -> Payload:
    _, _, codec_id, item_bytes, part, _, _, _, raw_bytes, num_bytes, xxh3, root, block, _ = fields
    if block != key.block or part != key.part or root != key.root:
        raise ForeignFrame(f"a frame of part {part} of block {block.hex()[:16]} stands in for another")
    return Payload(codec_id, item_bytes, raw_bytes, num_bytes, xxh3)


def _verify_tokens(tokens_and_extra: bytes, fields: tuple[Any, ...], key: PartKey) -> None:
    end = 4 * fields[6]
    if block_hash(fields[13], tokens_and_extra[:end], tokens_and_extra[end:]) != key.block:
        raise FrameError(f"parent, tokens and extra do not hash to block {key.block.hex()[:16]}")


def _seal_of(header: Buffer) -> Seal:
    at = FIXED_BYTES
    key_id, salt = bytes(header[at : at + KEY_ID_BYTES]), bytes(header[at + KEY_ID_BYTES : _SEAL_END - NONCE_BYTES])
    return Seal(key_id, salt, bytes(header[_SEAL_END - NONCE_BYTES : _SEAL_END]))


def unpack(buffer: Buffer) -> Header:
    """The header that begins `buffer`; more bytes may follow it.

    Raises FrameError on a wrong magic, version, length or header checksum. The payload is not looked at.
    """
    length, fields = _fields(buffer)
    _, _, codec_id, item_bytes, part, depth, num_tokens, _, raw_bytes, num_bytes, xxh3, root, block, parent = fields
    tokens_at, seal = (FIXED_BYTES, None) if fields[1] == VERSION else (_SEAL_END, _seal_of(buffer))
    extra_at, end = tokens_at + 4 * num_tokens, length - _CHECKSUM.size
    meta = BlockMeta(BlockId(parent), depth, bytes(buffer[tokens_at:extra_at]), bytes(buffer[extra_at:end]))
    key = PartKey(RootId(root), BlockId(block), part)
    return Header(key, meta, codec_id, item_bytes, raw_bytes, num_bytes, xxh3, seal)


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
