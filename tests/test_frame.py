# SPDX-License-Identifier: Apache-2.0
"""The frame refuses whatever is not exactly what was packed."""

from __future__ import annotations

import dataclasses
import itertools
import struct

import pytest

from kvstore.block import BlockId, BlockMeta, Chain, ModelId, PartKey, Root, RootId
from kvstore.wire import frame
from kvstore.wire.frame import FrameError, Header

MODEL = ModelId(
    model="tiny", revision="1", kv_dtype="bfloat16", num_layers=2, num_kv_heads=1, head_dim=4, block_tokens=4
)
PAYLOAD = bytes(range(64))


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
