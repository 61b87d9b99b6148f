# SPDX-License-Identifier: Apache-2.0
"""Values are encoded where and while that is measured to be faster than raw, and nowhere else."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import redis

from bench.slow_link import SlowLink
from kvstore.block import ModelId, Root, RootId
from kvstore.codecs import CODECS
from kvstore.errors import ConfigError
from kvstore.stats import Stats
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_codec import CodecChoice
from kvstore.tiers.valkey import EmbeddedServer
from kvstore.wire import frame
from tests.redis.conftest import MakeTier
from tests.redis.content import Content

RAW, LZ4 = (CODECS.load(name).wire_id for name in ("raw", "lz4"))
MIB = 1 << 20


def smooth(num_bytes: int, seed: int = 0) -> memoryview:
    """bfloat16 values of one exponent: a half of their bytes compresses away, nearly."""
    values = np.random.default_rng(seed).uniform(1.0, 1.99, num_bytes // 2).astype("<f4")
    return memoryview((values.view("<u4") >> 16).astype("<u2").tobytes())


def noise(num_bytes: int) -> memoryview:
    return memoryview(np.random.default_rng(1).bytes(num_bytes))


class Ticks:
    """A clock that moves on by `tick_s` whenever somebody looks: so every step measured takes just that."""

    def __init__(self, tick_s: float) -> None:
        self.tick_s = tick_s
        self.num_looks = 0
        self._now_s = 0.0

    def __call__(self) -> float:
        self.num_looks += 1
        self._now_s += self.tick_s
        return self._now_s

    def skip(self, seconds: float) -> None:
        self._now_s += seconds


ROOT, OTHER = RootId(bytes(32)), RootId(bytes([1]) * 32)
TRIAL_S = 0.001
PIECE_BYTES = 256 << 10
COST_S = 2 * TRIAL_S / PIECE_BYTES
"""Of encoding and decoding a byte, as the clock has it."""
SAVED = 1 - len(CODECS.load("lz4")().encode(smooth(PIECE_BYTES), 2) or b"") / PIECE_BYTES


@pytest.fixture
def clock() -> Ticks:
    return Ticks(TRIAL_S)


@pytest.fixture
def choice(clock: Ticks) -> CodecChoice:
    return CodecChoice("auto", clock)


def carry(choice: CodecChoice, seconds_a_byte: float, num_calls: int = 9) -> None:
    """Let the link have carried at this rate, both ways."""
    for _ in range(num_calls):
        choice.link.sent(MIB, seconds_a_byte * MIB)
        choice.link.received(MIB, seconds_a_byte * MIB)


def worth(times: float) -> float:
    """Seconds a byte of a link on which the codec saves so many times what it costs."""
    return times * COST_S / (2 * SAVED)


def written(choice: CodecChoice, clock: Ticks, root: RootId = ROOT, part: memoryview | None = None) -> int:
    """Id of the codec that a part is written with, once there was time to look again."""
    part = smooth(PIECE_BYTES) if part is None else part
    clock.skip(10.0)
    choice.encode(root, part, 2)
    return choice.encode(root, part, 2)[0]


def test_a_slow_link_brings_the_codec_in_and_a_fast_one_never(choice: CodecChoice, clock: Ticks) -> None:
    assert written(choice, clock) == RAW  # nothing was measured yet
    carry(choice, worth(0.5))
    assert written(choice, clock) == RAW
    carry(choice, worth(3.0))
    assert written(choice, clock) == LZ4
    carry(choice, worth(0.5))
    assert written(choice, clock) == RAW


def test_between_its_margins_the_choice_stays_as_it_is(choice: CodecChoice, clock: Ticks) -> None:
    for _ in range(3):
        carry(choice, worth(1.3))
        assert written(choice, clock) == RAW
    carry(choice, worth(3.0))
    assert written(choice, clock) == LZ4
    for _ in range(3):
        carry(choice, worth(1.3))
        assert written(choice, clock) == LZ4


def test_each_namespace_has_a_choice_of_its_own(choice: CodecChoice, clock: Ticks) -> None:
    carry(choice, worth(3.0))
    assert written(choice, clock, ROOT, smooth(PIECE_BYTES)) == LZ4
    assert written(choice, clock, OTHER, noise(PIECE_BYTES)) == RAW
    stats = Stats()
    choice.report("redis", stats)
    assert (stats.get("redis.encoded_namespaces"), stats.get("redis.raw_namespaces")) == (1, 1)
    assert stats.get("redis.send_bytes_per_s") == pytest.approx(1 / worth(3.0))
    for _ in range(30):  # what it holds turns into noise
        choice.encode(ROOT, noise(PIECE_BYTES), 2)
    assert written(choice, clock, ROOT, noise(PIECE_BYTES)) == RAW


def test_loads_must_gain_even_where_writes_gain_more(choice: CodecChoice, clock: Ticks) -> None:
    for _ in range(9):
        choice.link.sent(MIB, worth(20.0) * MIB)
        choice.link.received(MIB, 1e-12 * MIB)
    assert written(choice, clock) == RAW


def test_latency_and_short_calls_are_not_taken_for_a_slow_link(choice: CodecChoice, clock: Ticks) -> None:
    for _ in range(9):
        choice.link.sent(MIB // 2, 1.0)
        choice.link.received(MIB // 2, 1.0)
    assert written(choice, clock) == RAW
    choice.link.answered(0.2)
    for _ in range(9):
        choice.link.sent(MIB, 0.2 + worth(0.5) * MIB)
        choice.link.received(MIB, 0.2 + worth(0.5) * MIB)
    assert written(choice, clock) == RAW


def test_calls_that_stalled_decide_nothing(choice: CodecChoice, clock: Ticks) -> None:
    for number in range(9):  # loads alone would gain enough
        choice.link.sent(MIB, 1.0 if number > 4 else 1e-9)
        choice.link.received(MIB, worth(1.6) * MIB)
    assert written(choice, clock) == RAW
    carry(choice, worth(0.5))
    for _ in range(4):
        choice.link.received(MIB, 1.0)
    assert written(choice, clock) == RAW


def test_trials_take_a_small_share_of_the_time(choice: CodecChoice, clock: Ticks) -> None:
    carry(choice, worth(0.5))
    part = smooth(PIECE_BYTES)
    clock.tick_s = 0.1  # a machine that does much else
    looks = []
    for _ in range(2000):
        before = clock.num_looks
        choice.encode(ROOT, part, 2)
        looks.append(clock.num_looks - before)
    trials = [number for number, count in enumerate(looks) if count > 1]
    assert 2 <= len(trials) <= 1 + 0.005 * 2000
    assert set(looks) == {1, 5}


def test_namespaces_that_nobody_writes_to_are_forgotten(choice: CodecChoice, clock: Ticks) -> None:
    carry(choice, worth(3.0))
    part = smooth(64)
    for number in range(5000):
        choice.encode(RootId(number.to_bytes(32, "big")), part, 2)
    stats = Stats()
    choice.report("redis", stats)
    assert stats.get("redis.encoded_namespaces") + stats.get("redis.raw_namespaces") == 1024


def test_a_codec_that_is_named_is_used_whatever_is_measured(clock: Ticks) -> None:
    choice = CodecChoice("lz4", clock)
    carry(choice, 1e-12)
    assert choice.encode(ROOT, smooth(PIECE_BYTES), 2)[0] == LZ4
    with pytest.raises(ConfigError, match="use one of auto, lz4, raw"):
        CodecChoice("zip")


# ── on real servers ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def wide(model: ModelId) -> ModelId:
    """Its parts have 256 KiB."""
    return dataclasses.replace(model, head_dim=64 * model.head_dim)


@pytest.fixture
def link(server: EmbeddedServer) -> Iterator[SlowLink]:
    with SlowLink(server.unix_url.removeprefix("unix://"), both_ways=True) as link:
        yield link


def chat(root: Root, seed: int, fill: Callable[[int, int], memoryview]) -> Content:
    """Two megabytes of it, of which each part differs."""
    content = Content(root, 8, seed=seed)
    content.parts = {key: fill(len(part), 8 * seed + at) for at, (key, part) in enumerate(content.parts.items())}
    return content


def codec_of(client: redis.Redis, content: Content) -> int:
    return frame.unpack(client.get(content.name(-1))).codec_id


def until_written_with(tier: RedisTier, client: redis.Redis, root: Root, codec: int, seeds: Iterator[int]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        content = chat(root, next(seeds), smooth)
        content.write(tier)
        assert content.read(tier) == content.keys
        if codec_of(client, content) == codec:
            return
    raise AssertionError("nothing changed")


def test_a_slow_link_turns_what_compresses_to_lz4_and_leaves_noise_raw_until_it_is_fast_again(
    server: EmbeddedServer, client: redis.Redis, link: SlowLink, make_tier: MakeTier, wide: ModelId
) -> None:
    tier = make_tier(link.url)
    compressible, random = Root(wide), Root(wide, salt=b"random")
    tier.open(chat(compressible, 0, smooth).layout)
    link.bytes_per_s = 40e6
    seeds = iter(range(1000))
    until_written_with(tier, client, compressible, LZ4, seeds)
    noisy = chat(random, next(seeds), lambda num_bytes, seed: memoryview(np.random.default_rng(seed).bytes(num_bytes)))
    noisy.write(tier)
    noisy.write(tier)
    assert noisy.read(tier) == noisy.keys
    assert codec_of(client, noisy) == RAW
    assert tier.stats.get("redis.encoded_namespaces") == 1
    assert tier.stats.get("redis.raw_namespaces") == 1
    assert 10e6 < tier.stats.get("redis.send_bytes_per_s") < 80e6
    link.bytes_per_s = 0
    until_written_with(tier, client, compressible, RAW, seeds)
    assert tier.stats.get("redis.decoded_saved_bytes") > 0


def test_on_a_local_socket_values_stay_raw(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, wide: ModelId
) -> None:
    tier = make_tier(server.unix_url)
    root = Root(wide)
    tier.open(chat(root, 0, smooth).layout)
    for seed in range(12):
        content = chat(root, seed, smooth)
        content.write(tier)
        assert content.read(tier) == content.keys
        assert codec_of(client, content) == RAW
    assert tier.stats.get("redis.raw_namespaces") == 1
    assert tier.stats.get("redis.receive_bytes_per_s") > 0
