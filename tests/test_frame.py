# SPDX-License-Identifier: Apache-2.0
"""The frame refuses whatever is not exactly what was packed."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import random
import struct
from array import array
from collections.abc import Sequence
from hashlib import sha256

import pytest

from kvstore import native
from kvstore.block import BlockId, BlockMeta, Chain, ModelId, PartKey, Root, RootId
from kvstore.codecs import CODECS
from kvstore.native import Asked
from kvstore.wire import frame
from kvstore.wire.frame import FrameError, Header

MODEL = ModelId(
    model="tiny", revision="1", kv_dtype="bfloat16", num_layers=2, num_kv_heads=1, head_dim=4, block_tokens=4
)
PAYLOAD = bytes(range(64))
RAW_ID = CODECS.load("raw").wire_id


def header_of(index: int = 1, *, media: tuple[tuple[int, bytes], ...] = ()) -> Header:
    chain = Chain(Root(MODEL), list(range(1, 13)), media=media)
    key = PartKey(chain.root.id, chain.ids[index], 3)
    return Header(key, chain.meta(index), 1, 2, 128, len(PAYLOAD), frame.checksum(PAYLOAD))


FIELDS = {
    "magic": (0, 4),
    "version": (4, 2),
    "codec id": (6, 1),
    "item bytes": (7, 1),
    "part": (8, 4),
    "depth": (12, 4),
    "number of tokens": (16, 4),
    "extra bytes": (20, 4),
    "raw bytes": (24, 8),
    "payload bytes": (32, 8),
    "payload checksum": (40, 8),
    "root": (48, 32),
    "block": (80, 32),
    "parent": (112, 32),
    "tokens": (144, 16),
    "extra": (160, 40),
    "header checksum": (200, 8),
}


def test_header_survives_packing() -> None:
    for header in (header_of(0), header_of(2), header_of(media=((5, b"\x07" * 32),))):
        packed = frame.pack(header)
        assert len(packed) == frame.header_bytes(4, len(header.meta.extra))
        assert frame.unpack(packed) == header
        assert frame.unpack(memoryview(packed + PAYLOAD)) == header
        frame.verify(header, header.key)


def test_bytes_of_a_known_header_never_change() -> None:
    parent, root = BlockId(b"\x11" * 32), RootId(b"\x22" * 32)
    meta = BlockMeta(parent, 7, struct.pack("<4I", 1, 2, 3, 70_000), b"ex")
    header = Header(PartKey(root, meta.block_id(), 5), meta, 1, 2, 128, 64, 0x0123456789ABCDEF)
    golden = (
        "4b565346 0100 01 02 05000000 07000000 04000000 02000000 8000000000000000 4000000000000000"
        "efcdab8967452301"
        + "22" * 32
        + "0a85a5e2ee31f3f22b440e81f0fde02901b89f02b10716975ae6736c8d06f871"
        + "11" * 32
        + "01000000 02000000 03000000 70110100"
        "6578 25c9771271f5a94d"
    )
    assert frame.pack(header) == bytes.fromhex(golden)


def test_fields_table_covers_the_whole_header() -> None:
    packed = frame.pack(header_of(media=((5, b"\x07" * 32),)))
    covered = sorted(FIELDS.values())
    assert covered[0][0] == 0
    assert all(at + size == following for (at, size), (following, _) in itertools.pairwise(covered))
    assert sum(covered[-1]) == len(packed)


@pytest.mark.parametrize("name", FIELDS)
def test_every_flipped_header_byte_is_refused(name: str) -> None:
    packed = frame.pack(header_of(media=((5, b"\x07" * 32),)))
    start, size = FIELDS[name]
    for at in range(start, start + size):
        for bit in (0x01, 0x80):
            damaged = bytearray(packed + PAYLOAD)
            damaged[at] ^= bit
            with pytest.raises(FrameError):
                frame.unpack(damaged)


def test_every_flipped_payload_byte_changes_the_checksum() -> None:
    for at in range(len(PAYLOAD)):
        damaged = bytearray(PAYLOAD)
        damaged[at] ^= 1
        assert frame.checksum(damaged) != frame.checksum(PAYLOAD)


def test_every_truncation_is_refused() -> None:
    packed = frame.pack(header_of(media=((5, b"\x07" * 32),)))
    for length in range(len(packed)):
        with pytest.raises(FrameError):
            frame.unpack(packed[:length])


def test_lengths_no_writer_gives_are_refused_before_they_are_used() -> None:
    packed = bytearray(frame.pack(header_of()))
    for at in (16, 20):
        huge = bytearray(packed)
        huge[at : at + 4] = b"\xff\xff\xff\xff"
        with pytest.raises(FrameError, match="not a frame"):
            frame.measure(huge)


def test_frame_of_another_key_is_refused() -> None:
    header = header_of()
    key = header.key
    strangers = (
        key._replace(part=0),
        key._replace(block=BlockId(b"\x01" * 32)),
        key._replace(root=RootId(b"\x01" * 32)),
    )
    for stranger in strangers:
        with pytest.raises(FrameError):
            frame.verify(header, stranger)


def test_frame_whose_tokens_do_not_hash_to_its_block_is_refused() -> None:
    header = header_of()
    forged = dataclasses.replace(header, meta=header.meta._replace(tokens=b"\x05\x00\x00\x00" * 4))
    assert frame.unpack(frame.pack(forged)) == forged
    with pytest.raises(FrameError, match="hash"):
        frame.verify(forged, header.key)


def test_what_no_reader_would_accept_is_not_packed() -> None:
    header = header_of()
    for meta in (
        header.meta._replace(tokens=b"\x00" * 4 * (frame.MAX_TOKENS + 1)),
        header.meta._replace(tokens=b"\x00" * 5),
        header.meta._replace(extra=b"\x00" * (frame.MAX_EXTRA_BYTES + 1)),
        header.meta._replace(parent=BlockId(b"short")),
    ):
        with pytest.raises(FrameError):
            frame.pack(dataclasses.replace(header, meta=meta))


# ── the same in C ───────────────────────────────────────────────────────────────────────────────────────────────────


def believed(head: bytes, xxh3: int, key: PartKey) -> bool:
    """Whether `frame` takes this for the header of `key` and a raw payload of so many bytes with that checksum."""
    try:
        told = frame.payload_of(head, key)
    except FrameError:
        return False
    fits = told.num_bytes == told.raw_bytes == len(PAYLOAD) and told.xxh3 == xxh3
    return fits and told.codec_id == RAW_ID and frame.measure(head) == len(head)


def believed_in_c(heads: Sequence[bytes], xxh3s: Sequence[int], keys: Sequence[PartKey]) -> list[bool]:
    packed = ctypes.create_string_buffer(b"".join(heads))
    sums = (ctypes.c_uint64 * len(xxh3s))(*xxh3s)
    asked = Asked(keys[0].root, b"".join(key.block for key in keys), array("I", [key.part for key in keys]), RAW_ID)
    sound = native.sound_frames(ctypes.addressof(packed), len(heads[0]), len(PAYLOAD), ctypes.addressof(sums), asked)
    return [byte == 1 for byte in sound]


def sound_header(draw: random.Random, num_tokens: int, num_extra: int) -> Header:
    meta = BlockMeta(BlockId(draw.randbytes(32)), draw.randrange(9), draw.randbytes(4 * num_tokens), bytes(num_extra))
    key = PartKey(RootId(draw.randbytes(32)), meta.block_id(), draw.randrange(300))
    return Header(key, meta, RAW_ID, 2, len(PAYLOAD), len(PAYLOAD), frame.checksum(PAYLOAD))


needs_c = pytest.mark.skipif(
    not native.judges or native.hash_chain(bytes(32), bytes(16), bytes(8), 8) is None,
    reason="the C loops were not built, or this processor has no SHA instructions: Python verifies every frame",
)


@needs_c
@pytest.mark.parametrize(
    ("num_tokens", "num_extra"), [(0, 0), (0, 16), (4, 0), (64, 0), (64, 40), (256, 0), (256, 900)]
)
def test_frames_that_are_whole_are_believed_in_c(num_tokens: int, num_extra: int) -> None:
    draw = random.Random(num_tokens + num_extra)
    root = draw.randbytes(32)
    headers = [sound_header(draw, num_tokens, num_extra) for _ in range(5)]
    headers = [dataclasses.replace(each, key=each.key._replace(root=RootId(root))) for each in headers]
    heads, keys = [frame.pack(each) for each in headers], [each.key for each in headers]
    assert believed_in_c(heads, [each.payload_xxh3 for each in headers], keys) == [True] * 5


@needs_c
def test_frame_with_more_extra_than_c_hashes_is_left_to_python() -> None:
    header = sound_header(random.Random(0), 256, 5000)
    head = frame.pack(header)
    assert believed(head, header.payload_xxh3, header.key)
    assert believed_in_c([head], [header.payload_xxh3], [header.key]) == [False]


@needs_c
@pytest.mark.parametrize("stamped", [True, False])
@pytest.mark.parametrize("field", FIELDS)
def test_each_field_that_another_writer_gave_is_judged_alike_in_c(field: str, stamped: bool) -> None:
    """Every bit of it flipped by itself, with a header checksum that fits that and without."""
    draw = random.Random(field)
    header = sound_header(draw, 4, 40)
    packed, key = frame.pack(header), header.key
    at, size = FIELDS[field]
    heads = []
    for bit in range(8 * size):
        head = bytearray(packed)
        head[at + bit // 8] ^= 1 << bit % 8
        if stamped and field != "header checksum":
            head[-8:] = frame.with_checksum(bytes(head[:-8]))[-8:]
        heads.append(bytes(head))
    told = [believed(head, header.payload_xxh3, key) for head in heads]
    assert believed_in_c(heads, [header.payload_xxh3] * len(heads), [key] * len(heads)) == told
    assert all(told) if stamped and field in ("depth", "item bytes") else not any(told)


@needs_c
def test_frames_of_other_parts_or_payloads_are_judged_alike_in_c() -> None:
    draw = random.Random(1)
    header = sound_header(draw, 4, 40)
    head, key, xxh3 = frame.pack(header), header.key, header.payload_xxh3
    others = [
        (head, xxh3 ^ 1 << 63, key),
        (head, xxh3, key._replace(part=key.part + 256)),
        (head, xxh3, key._replace(block=BlockId(draw.randbytes(32)))),
        (head, xxh3, key._replace(root=RootId(draw.randbytes(32)))),
        (head + bytes(4), xxh3, key),
        (head[:-1], xxh3, key),
        (head[:100], xxh3, key),
    ]
    # A token moved into extra, and one out of it: all bytes and their checksum as they should be, but other counts.
    for num_tokens, num_extra in ((3, 44), (5, 36)):
        moved = head[:16] + struct.pack("<II", num_tokens, num_extra) + head[24:-8]
        others.append((frame.with_checksum(moved), xxh3, key))
    # The same the other way: an id that is the hash of counts which are not those of what follows them.
    content = draw.randbytes(24)
    forged = BlockId(sha256(header.meta.parent + struct.pack("<8sII", b"kvblock1", 4, 0) + content).digest())
    moved = head[:16] + struct.pack("<II", 4, 0) + head[24:80] + forged + header.meta.parent + content
    others.append((frame.with_checksum(moved), xxh3, key._replace(block=forged)))
    for head, xxh3, key in others:
        assert not believed(head, xxh3, key)
        assert believed_in_c([head], [xxh3], [key]) == [False]


@needs_c
@pytest.mark.parametrize("missing", ["root", "block"])
def test_ids_of_another_length_are_left_to_python(missing: str) -> None:
    header = sound_header(random.Random(3), 4, 0)
    key = header.key._replace(**{missing: getattr(header.key, missing)[:-1]})
    assert believed_in_c([frame.pack(header)], [header.payload_xxh3], [key]) == [False]


@needs_c
def test_fuzzed_headers_are_judged_alike_in_c() -> None:
    draw = random.Random(2)
    num_believed = 0
    for _ in range(3000):
        header = sound_header(draw, draw.choice((0, 4, 64)), draw.choice((0, 0, 7, 40)))
        head = bytearray(frame.pack(header))
        for _ in range(draw.choice((0, 1, 1, 3))):
            head[draw.choice((draw.randrange(len(head)), draw.randrange(12, 24)))] = draw.choice(
                (0, 1, draw.randrange(256))
            )
        if draw.random() < 0.8:
            head[-8:] = frame.with_checksum(bytes(head[:-8]))[-8:]
        told = believed(bytes(head), header.payload_xxh3, header.key)
        num_believed += told
        assert believed_in_c([bytes(head)], [header.payload_xxh3], [header.key]) == [told]
    assert 500 < num_believed < 2500
