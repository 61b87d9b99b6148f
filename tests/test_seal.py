# SPDX-License-Identifier: Apache-2.0
"""A sealed frame gives its bytes to whoever has the key and asks for the part that it is, and to nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.block import BlockId, BlockMeta, PartKey, RootId
from kvstore.errors import ConfigError
from kvstore.wire import frame
from kvstore.wire.frame import ForeignFrame, FrameError, Header, LockedFrame
from kvstore.wire.seal import Keys, Sealer

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
TOKENS = b"".join(number.to_bytes(4, "little") for number in (1, 2, 3, 70_000))
META = BlockMeta(BlockId(b"\x11" * 32), 7, TOKENS, b"ex")
KEY = PartKey(RootId(b"\x22" * 32), META.block_id(), 5)
PAYLOAD = bytes(range(64))


def sealed(sealer: Sealer, payload: bytes = PAYLOAD) -> bytes:
    into = memoryview(bytearray(len(payload) + frame.TAG_BYTES))
    sealing = sealer.seal(Header(KEY, META, 0, 2, len(payload), len(payload), 0), memoryview(payload), into)
    return sealing.header() + bytes(into)


def opened(sealer: Sealer, value: bytes, key: PartKey = KEY) -> bytes:
    start = frame.measure(value)
    opening = sealer.open(value[:start], key)
    if opening.told.num_bytes != len(value) - start - frame.TAG_BYTES:
        raise FrameError("the length is another")
    into = memoryview(bytearray(opening.told.num_bytes))
    opening.update(value[start : -frame.TAG_BYTES], into)
    opening.finish(value[-frame.TAG_BYTES :])
    return bytes(into)


def counting(num_bytes: int) -> bytes:
    return bytes(range(num_bytes))


@pytest.fixture
def sealer() -> Sealer:
    return Sealer(Keys.of(OLD))


@pytest.mark.parametrize("num_bytes", [0, 1, 63, 64, 4096, frame.PIECE_BYTES - 1, 3 * frame.PIECE_BYTES + 17])
def test_what_is_sealed_opens_to_the_same_bytes(sealer: Sealer, num_bytes: int) -> None:
    payload = os.urandom(num_bytes)
    value = sealed(sealer, payload)
    assert opened(sealer, value) == payload
    assert opened(Sealer(Keys.of(NEW, OLD)), value) == payload


def test_bytes_of_a_known_sealed_value_never_change() -> None:
    golden = (
        "4b565346 0200 00 02 05000000 07000000 04000000 02000000 4000000000000000 5000000000000000"
        "0000000000000000"
        + "22" * 32
        + "0a85a5e2ee31f3f22b440e81f0fde02901b89f02b10716975ae6736c8d06f871"
        + "11" * 32
        + GOLDEN_REST
    )
    value = sealed(Sealer(Keys.of(OLD), counting))
    assert value.hex() == golden.replace(" ", "")
    assert opened(Sealer(Keys.of(OLD)), value) == PAYLOAD


GOLDEN_REST = (
    "36e09740a0ce0b03 "
    "000102030405060708090a0b0c0d0e0f "
    "000000000000010203040506 "
    "839d0dcb502cb1f4b7204b9ba062aa96 "
    "7f8e "
    "346c4412ac710956 "
    "29aba171ff64f414cd5761c5aa27f274766d4af8464afc4067defcd43474c3e6"
    "f2ec8fc921b6a5314cce90b535a3b3d9539172164fa2d7bb89a06dbc20920d5f "
    "b8b8381d368599dbd3dbc5d65f0ce1ce "
)
"""Key id, salt, nonce, tokens, extra, checksum, payload, tag."""


def test_neither_tokens_nor_payload_nor_extra_can_be_read_and_the_rest_can(sealer: Sealer) -> None:
    value = sealed(sealer)
    header = frame.unpack(value)
    assert (header.key, header.meta.parent, header.meta.depth) == (KEY, META.parent, META.depth)
    assert header.meta.tokens != TOKENS
    assert header.meta.extra != META.extra
    assert TOKENS[:8] not in value
    assert PAYLOAD[:8] not in value
    again = sealed(sealer)
    at = frame.FIXED_BYTES + frame.SEAL_BYTES
    assert value[at : at + 16] != again[at : at + 16]


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_no_value_with_a_bit_changed_opens(sealer: Sealer, bit: int) -> None:
    value = sealed(sealer)
    length = frame.measure(value)
    for at in range(len(value)):
        damaged = bytearray(value)
        damaged[at] ^= bit
        if at < length - 8:  # an attacker makes the checksum fit
            damaged[length - 8 : length] = frame.checksum(bytes(damaged[: length - 8])).to_bytes(8, "little")
        with pytest.raises(FrameError):
            opened(sealer, bytes(damaged))


def test_no_truncation_opens(sealer: Sealer) -> None:
    value = sealed(sealer)
    for length in range(frame.MIN_HEADER_BYTES, len(value)):
        with pytest.raises(FrameError):
            opened(sealer, value[:length])


def test_a_value_under_another_name_is_foreign_even_if_its_header_is_rewritten(sealer: Sealer) -> None:
    value = sealed(sealer)
    other = KEY._replace(part=6)
    with pytest.raises(ForeignFrame):
        opened(sealer, value, other)
    header = frame.unpack(value)
    moved = frame.authenticated(replace(header, key=other)) + header.meta.tokens + header.meta.extra
    with pytest.raises(FrameError, match="seal is broken"):
        opened(sealer, frame.with_checksum(moved) + value[frame.measure(value) :], other)


def test_without_its_key_a_value_is_locked_and_not_damaged(sealer: Sealer) -> None:
    value = sealed(sealer)
    with pytest.raises(LockedFrame):
        opened(Sealer(Keys.of(NEW)), value)
    with pytest.raises(LockedFrame):
        frame.payload_of(value[: frame.measure(value)], KEY)


def test_a_value_that_is_not_sealed_is_refused(sealer: Sealer) -> None:
    plain = frame.pack(Header(KEY, META, 0, 2, 64, 64, frame.checksum(PAYLOAD)))
    with pytest.raises(FrameError, match="not sealed"):
        sealer.open(plain, KEY)


def test_keys_are_changed_without_a_miss() -> None:
    before, both, turned, after = (Sealer(Keys.of(*keys)) for keys in ((OLD,), (OLD, NEW), (NEW, OLD), (NEW,)))
    assert opened(both, sealed(before)) == opened(turned, sealed(both)) == opened(both, sealed(turned)) == PAYLOAD
    assert opened(after, sealed(turned)) == PAYLOAD


# ── nonces ──────────────────────────────────────────────────────────────────────────────────────────────────────


def seals_of(values: list[bytes]) -> set[tuple[bytes, bytes]]:
    seals = [frame.unpack(value).seal for value in values]
    return {(seal.salt, seal.nonce) for seal in seals if seal is not None}


def test_no_two_values_share_key_and_nonce_however_many_threads_and_processes_write() -> None:
    sealers = [Sealer(Keys.of(OLD)) for _ in range(3)]
    with ThreadPoolExecutor(4) as threads:
        values = list(threads.map(lambda number: sealed(sealers[number % 3]), range(600)))
    assert len(seals_of(values)) == 600
    assert len({salt for salt, _ in seals_of(values)}) == 3


def test_counts_alone_keep_nonces_apart_where_randomness_repeats() -> None:
    sealer = Sealer(Keys.of(OLD), counting)
    assert len(seals_of([sealed(sealer) for _ in range(300)])) == 300


def test_a_copy_of_a_running_process_does_not_repeat_nonces() -> None:
    sealer = Sealer(Keys.of(OLD))
    sealed(sealer)
    state = (sealer._salt, sealer._count)
    first = sealed(sealer)
    sealer._salt, sealer._count = state  # as a snapshot of the machine would
    assert len(seals_of([first, sealed(sealer)])) == 2


def test_a_forked_child_takes_a_salt_of_its_own() -> None:
    script = (
        "import os\n"
        "from tests.test_seal import *\n"
        "sealer = Sealer(Keys.of(OLD))\n"
        "mine = frame.unpack(sealed(sealer)).seal.salt\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.write(write, frame.unpack(sealed(sealer)).seal.salt)\n"
        "    os._exit(0)\n"
        "assert os.read(read, 16) != mine\n"
        "assert frame.unpack(sealed(sealer)).seal.salt == mine\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


def test_a_fresh_salt_is_taken_before_counts_run_out() -> None:
    sealer = Sealer(Keys.of(OLD))
    first = sealed(sealer)
    sealer._count = 1 << 32
    assert len({salt for salt, _ in seals_of([first, sealed(sealer)])}) == 2


# ── key files ───────────────────────────────────────────────────────────────────────────────────────────────────


def key_file(directory: Path, text: str, mode: int = 0o600) -> str:
    path = directory / "keys"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_key_file_holds_a_key_a_line_and_the_first_seals(tmp_path: Path) -> None:
    keys = Keys.read(key_file(tmp_path, f"# since May\n{NEW.hex()}  # writes\n\n{OLD.hex().upper()}\n"))
    assert list(keys.by_id.values()) == [NEW, OLD]
    assert opened(Sealer(Keys.of(NEW)), sealed(Sealer(keys))) == PAYLOAD


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("", 0o600, "holds no key"),
        ("# none yet\n", 0o600, "holds no key"),
        (f"{OLD.hex()}\n{OLD.hex()[:-2]}\n", 0o600, "line 2"),
        ("not hex\n", 0o600, "line 1"),
        (OLD.hex(), 0o644, "chmod 600"),
    ],
)
def test_a_key_file_that_is_not_one_is_refused_with_its_fix(tmp_path: Path, text: str, mode: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        Keys.read(key_file(tmp_path, text, mode))
    assert OLD.hex()[:16] not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.read(f"{tmp_path}/missing")
