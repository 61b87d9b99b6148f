# SPDX-License-Identifier: Apache-2.0
"""What every codec in the registry promises, and what each adds."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from kvstore.codecs import CODECS, Codec
from kvstore.codecs.lz4 import Lz4Codec

SIZES = (0, 1, 2, 3, 5, 64, 4096, 4097, 65_536, 300_001)


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> Codec:
    name: str = request.param
    return CODECS.load(name)(CODECS.options(name, {}))


def smooth(num_bytes: int) -> bytes:
    """Bytes with structure in every plane."""
    return (np.arange(num_bytes // 4 + 1, dtype="<f4") // 64).tobytes()[:num_bytes]


def test_codecs_have_ids_and_names_of_their_own() -> None:
    loaded = {name: CODECS.load(name) for name in CODECS}
    assert all(name == codec.name for name, codec in loaded.items())
    assert len({codec.wire_id for codec in loaded.values()}) == len(loaded)


@pytest.mark.parametrize("item_bytes", [1, 2, 4])
@pytest.mark.parametrize("num_bytes", SIZES)
def test_what_is_encoded_decodes_to_the_same_bytes(codec: Codec, item_bytes: int, num_bytes: int) -> None:
    for part in (smooth(num_bytes), bytes(num_bytes), random.Random(num_bytes).randbytes(num_bytes)):
        encoded = codec.encode(memoryview(part), item_bytes)
        if encoded is not None:
            back = bytearray(b"\xee" * num_bytes)
            codec.decode(encoded, item_bytes, memoryview(back))
            assert back == part


def test_every_truncation_and_extension_is_refused(codec: Codec) -> None:
    part = smooth(4096)
    encoded = codec.encode(memoryview(part), 2)
    assert encoded is not None
    target = memoryview(bytearray(len(part)))
    for length in range(len(encoded)):
        with pytest.raises(ValueError, match=r"byte|block"):
            codec.decode(encoded[:length], 2, target)
    with pytest.raises(ValueError, match=r"byte|block"):
        codec.decode(memoryview(bytes(encoded) + b"\x00"), 2, target)


def test_decoding_into_another_size_is_refused(codec: Codec) -> None:
    encoded = codec.encode(memoryview(smooth(4096)), 2)
    assert encoded is not None
    for num_bytes in (0, 1, 2, 4094, 4095, 4097, 4098, 8192):
        with pytest.raises(ValueError, match=r"byte|block"):
            codec.decode(encoded, 2, memoryview(bytearray(num_bytes)))


def test_damaged_bytes_raise_value_error_or_decode_within_bounds(codec: Codec) -> None:
    part = smooth(4096)
    encoded = codec.encode(memoryview(part), 2)
    assert encoded is not None
    rng = random.Random(1)
    for _ in range(2000):
        damaged = bytearray(encoded)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(min(len(damaged), 64) if rng.random() < 0.5 else len(damaged))] = rng.randrange(256)
        try:
            codec.decode(memoryview(damaged), 2, memoryview(bytearray(len(part))))
        except ValueError:
            continue


def test_raw_encodes_without_a_copy() -> None:
    part = memoryview(bytearray(64))
    assert CODECS.load("raw")().encode(part, 2) is part


def test_lz4_halves_values_that_share_their_exponent() -> None:
    values = np.random.default_rng(1).uniform(1.0, 1.99, 1 << 18).astype("<f4")
    part = memoryview((values.view("<u4") >> 16).astype("<u2").tobytes())  # bfloat16, low byte noise
    encoded = Lz4Codec().encode(part, 2)
    assert encoded is not None
    assert len(encoded) < 0.65 * len(part)


@pytest.mark.alone
def test_lz4_refuses_noise_at_a_fraction_of_the_cost_of_encoding() -> None:
    noise = memoryview(np.random.default_rng(1).bytes(8 << 20))
    eager = Lz4Codec(Lz4Codec.Options(min_gain=0.0))
    codec = Lz4Codec()
    assert codec.encode(noise, 2) is None
    assert eager.encode(noise, 2) is None
    started = time.thread_time()
    for _ in range(10):
        codec.encode(noise, 2)
    assert (time.thread_time() - started) / 10 < 0.002
