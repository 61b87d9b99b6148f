# SPDX-License-Identifier: Apache-2.0
"""Values are encoded where and while that is measured to be faster than raw, and nowhere else."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import redis

from kvstore.block import ModelId, Root, RootId
from kvstore.codecs import CODECS
from kvstore.errors import ConfigError
from kvstore.layout import layout_of
from kvstore.stats import Stats
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_codec import CodecChoice
from kvstore.tiers.valkey import EmbeddedServer
from kvstore.wire import frame
from tests.redis.conftest import MakeTier
from tests.redis.content import Content

Fill = Callable[[int, int], memoryview]
RAW, LZ4 = (CODECS.load(name).wire_id for name in ("raw", "lz4"))
MIB = 1 << 20


@functools.cache
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
PIECE_BYTES = 16 << 10
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
    choice.encode(root, part, 2, encoded=choice.encodes([root])[root])
    return choice.encode(root, part, 2, encoded=choice.encodes([root])[root])[0]


class Sidecar:
    """Writes and loads of one namespace over a link on which encoded calls take so many times what raw ones do."""

    def __init__(self, choice: CodecChoice, clock: Ticks, seed: int = 0) -> None:
        self.encoded: list[bool] = []
        """Of each write."""
        self.num_changes = 0
        """How often the codec came in, or went, be it to be compared again."""
        self._in_use = 0.0
        self._stats = Stats()
        self._choice, self._clock = choice, clock
        self._rng = np.random.default_rng(seed)

    def work(
        self,
        num_writes: int,
        ratio: float,
        loads: float | None = None,
        *,
        noise: float = 0.05,
        stalls: float = 0.0,
        loads_every: int = 1,
        back: int = 1,
    ) -> None:
        """`loads`: the ratio of loads, where it is another. One follows so many writes, of one of the last `back`."""
        for number in range(num_writes):
            encoded = self._choice.encodes([ROOT])[ROOT]
            self._choice.encode(ROOT, smooth(PIECE_BYTES), 2, encoded=encoded)
            self.encoded.append(encoded)

            def took_s(encoded: bool, ratio: float) -> float:
                usual_s = 0.01 * (ratio if encoded else 1.0) * float(self._rng.lognormal(0, noise))
                return 1.0 if self._rng.random() < stalls else usual_s

            self._choice.wrote({ROOT: encoded}, {ROOT: MIB}, took_s(encoded, ratio))
            if loads_every and number % loads_every == 0:
                encoded = self.encoded[-int(self._rng.integers(1, 1 + min(back, len(self.encoded))))]
                self._choice.loaded(ROOT, MIB, took_s(encoded, ratio if loads is None else loads), float(encoded))
            self._clock.skip(1.0)
            self._choice.report("redis", self._stats)
            in_use = self._stats.get("redis.encoded_namespaces")
            self.num_changes += in_use != self._in_use
            self._in_use = in_use


@pytest.fixture
def sidecar(choice: CodecChoice, clock: Ticks) -> Sidecar:
    return Sidecar(choice, clock)


def test_a_slow_link_brings_the_codec_in_and_a_fast_one_never(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar
) -> None:
    sidecar.work(100, 0.5)
    assert not any(sidecar.encoded)  # no rates were measured yet
    carry(choice, worth(0.2))
    sidecar.work(100, 0.5)
    assert not any(sidecar.encoded)
    carry(choice, worth(3.0))
    sidecar.work(100, 0.5)
    assert sum(sidecar.encoded[-60:]) > 45
    carry(choice, worth(0.2))
    sidecar.work(100, 1.5)
    assert not any(sidecar.encoded[-90:])


def test_where_the_machine_is_busy_and_not_the_link_the_sum_brings_in_nothing(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar
) -> None:
    carry(choice, worth(4.6))
    sidecar.work(1000, 1.2, noise=0.3)
    assert sum(sidecar.encoded) < 100


@pytest.mark.parametrize(("there", "back"), [(0.0, 1.2), (1.0, 1.6)])
@pytest.mark.parametrize("stalls", [0.0, 0.1])
def test_where_the_sum_is_not_sure_quicker_calls_bring_the_codec_in_for_good(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar, there: float, back: float, stalls: float
) -> None:
    for _ in range(9):
        choice.link.sent(MIB, (worth(there) + 1e-15) * MIB)
        choice.link.received(MIB, worth(back) * MIB)
    sidecar.work(400, 0.87, stalls=stalls)
    assert any(sidecar.encoded[:40])
    assert sum(sidecar.encoded[60:]) > 0.85 * 340  # all but controls
    assert sidecar.num_changes <= 2


@pytest.mark.parametrize("ratio", [1.05, 1.5])
def test_calls_that_are_slower_with_the_codec_are_few(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar, ratio: float
) -> None:
    carry(choice, worth(1.3))
    sidecar.work(3000, ratio)
    assert sum(sidecar.encoded) < 0.03 * 3000
    assert written(choice, clock) == RAW


def test_where_the_codec_makes_no_difference_nothing_goes_to_and_fro(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar
) -> None:
    carry(choice, worth(1.3))
    sidecar.work(3000, 1.0, noise=0.2)
    assert sidecar.num_changes <= 6


@pytest.mark.parametrize(
    "noise", [pytest.param(0.1, marks=pytest.mark.slow), 0.2, pytest.param(0.3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("loads_every", [0, 1, 3])
@pytest.mark.parametrize(
    ("ratio", "least", "most"), [(0.87, 0.85, 1.0), (0.95, 0.0, 1.0), (1.0, 0.0, 0.35), (1.1, 0.0, 0.15)]
)
def test_a_codec_is_in_use_where_it_is_quicker_and_not_where_it_is_slower_and_seldom_changes(
    choice: CodecChoice,
    sidecar: Sidecar,
    ratio: float,
    least: float,
    most: float,
    loads_every: int,
    noise: float,
) -> None:
    carry(choice, worth(1.3))
    sidecar.work(1500, ratio, noise=noise, loads_every=loads_every, back=200)
    assert least <= sum(sidecar.encoded[300:]) / 1200 <= most
    assert sidecar.num_changes <= 6


@pytest.mark.parametrize("seed", range(8))
def test_one_raw_call_that_is_lucky_does_not_end_it(choice: CodecChoice, clock: Ticks, seed: int) -> None:
    sidecar = Sidecar(choice, clock, seed)
    carry(choice, worth(1.3))
    sidecar.work(500, 0.87, noise=0.2, back=200)
    assert sum(sidecar.encoded[200:]) > 0.85 * 300


def test_loads_that_are_slower_and_seldom_do_not_bring_it_in_again_and_again(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar
) -> None:
    carry(choice, worth(1.3))
    sidecar.work(3000, 0.8, loads=1.5, loads_every=8, back=200)
    assert sidecar.num_changes <= 12


def test_a_link_that_goes_fast_and_half_slow_again_is_not_compared_on_at_once(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar
) -> None:
    carry(choice, worth(1.3))
    for _ in range(40):
        sidecar.work(5, 1.0)
        carry(choice, worth(0.2))
        sidecar.work(5, 1.0)
        carry(choice, worth(1.3))
    assert sum(sidecar.encoded) < 30


def test_writes_of_several_namespaces_are_judged_for_each_that_is_compared(choice: CodecChoice, clock: Ticks) -> None:
    carry(choice, worth(1.3))
    rng = np.random.default_rng(0)
    roots, ways = [ROOT, OTHER], []
    for _ in range(300):
        encoded = choice.encodes(roots)
        for root in roots:
            choice.encode(root, smooth(PIECE_BYTES), 2, encoded=encoded[root])
        took_s = sum(0.01 * (0.8 if each else 1.0) for each in encoded.values()) * float(rng.lognormal(0, 0.05))
        choice.wrote(encoded, dict.fromkeys(roots, MIB), took_s)
        ways.append(encoded)
        clock.skip(1.0)
    for root in roots:
        assert sum(each[root] for each in ways[-200:]) > 0.85 * 200
    stats = Stats()
    choice.report("redis", stats)
    assert stats.get("redis.encoded_namespaces") == 2


def test_a_codec_that_came_in_by_comparison_goes_once_it_is_slower(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar
) -> None:
    carry(choice, worth(1.3))
    sidecar.work(60, 0.8)
    assert sum(sidecar.encoded[-20:]) > 15
    sidecar.work(200, 1.2)
    assert sum(sidecar.encoded[-60:]) < 15


def test_a_codec_that_is_doubted_is_compared_so_that_it_goes_sooner() -> None:
    """By the controls alone, one write in sixteen, 180 of 300 calls would be made with it before that is sure."""
    num_slow = 0
    for seed in range(4):
        clock = Ticks(TRIAL_S)
        choice = CodecChoice("auto", clock)
        sidecar = Sidecar(choice, clock, seed)
        carry(choice, worth(1.3))
        sidecar.work(60, 0.8)
        assert sum(sidecar.encoded[-20:]) > 15
        sidecar.work(300, 1.1, noise=0.1)
        num_slow += sum(sidecar.encoded[60:])
    assert num_slow < 4 * 160


def test_loads_that_are_slower_keep_it_out_however_quick_writes_are(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar
) -> None:
    carry(choice, worth(1.3))
    sidecar.work(1000, 0.5, loads=1.2)
    assert sum(sidecar.encoded) < 100


def test_writes_may_be_slower_by_less_than_loads_are_quicker(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar
) -> None:
    carry(choice, worth(1.3))
    sidecar.work(400, 1.1, loads=0.8)
    assert sum(sidecar.encoded[60:]) > 0.85 * 340
    sidecar.work(400, 1.3, loads=0.8)
    assert sum(sidecar.encoded[-200:]) < 40


def test_a_comparison_of_writes_that_are_too_small_ends(choice: CodecChoice, clock: Ticks) -> None:
    carry(choice, worth(1.3))
    ways = []
    for _ in range(200):
        ways.append(choice.encodes([ROOT])[ROOT])
        choice.encode(ROOT, smooth(PIECE_BYTES), 2, encoded=ways[-1])
        choice.wrote({ROOT: ways[-1]}, {ROOT: 4096}, 0.001)
    assert any(ways)
    assert not any(ways[-50:])


def test_each_namespace_has_a_choice_of_its_own(choice: CodecChoice, clock: Ticks, sidecar: Sidecar) -> None:
    carry(choice, worth(3.0))
    sidecar.work(60, 0.5)
    assert written(choice, clock, OTHER, noise(PIECE_BYTES)) == RAW
    stats = Stats()
    choice.report("redis", stats)
    assert (stats.get("redis.encoded_namespaces"), stats.get("redis.raw_namespaces")) == (1, 1)
    assert stats.get("redis.send_bytes_per_s") == pytest.approx(1 / worth(3.0))
    for _ in range(30):  # what it holds turns into noise
        choice.encode(ROOT, noise(PIECE_BYTES), 2, encoded=True)
    assert written(choice, clock, ROOT, noise(PIECE_BYTES)) == RAW


def test_loads_must_gain_even_where_writes_gain_more(choice: CodecChoice, clock: Ticks, sidecar: Sidecar) -> None:
    for _ in range(9):
        choice.link.sent(MIB, worth(20.0) * MIB)
        choice.link.received(MIB, 1e-12 * MIB)
    sidecar.work(60, 0.5)
    assert not any(sidecar.encoded)


def test_latency_and_short_calls_are_not_taken_for_a_slow_link(
    choice: CodecChoice, clock: Ticks, sidecar: Sidecar
) -> None:
    for _ in range(9):
        choice.link.sent(MIB // 2, 1.0)
        choice.link.received(MIB // 2, 1.0)
    sidecar.work(20, 0.5)
    choice.link.answered(0.2)
    for _ in range(9):
        choice.link.sent(MIB, 0.2 + worth(0.2) * MIB)
        choice.link.received(MIB, 0.2 + worth(0.2) * MIB)
    sidecar.work(20, 0.5)
    assert not any(sidecar.encoded)


def test_calls_that_stalled_decide_nothing(choice: CodecChoice, clock: Ticks, sidecar: Sidecar) -> None:
    for number in range(9):
        choice.link.sent(MIB, 1.0 if number > 4 else 1e-9)
        choice.link.received(MIB, 1.0 if number > 4 else worth(0.2) * MIB)
    sidecar.work(60, 0.5)
    assert not any(sidecar.encoded)


def test_trials_take_a_small_share_of_the_time(choice: CodecChoice, clock: Ticks) -> None:
    carry(choice, worth(0.2))
    part = smooth(PIECE_BYTES)
    clock.tick_s = 0.1  # a machine that does much else
    looks = []
    for _ in range(2000):
        before = clock.num_looks
        choice.encode(ROOT, part, 2, encoded=False)
        looks.append(clock.num_looks - before)
    trials = [number for number, count in enumerate(looks) if count > 1]
    assert 2 <= len(trials) <= 1 + 0.005 * 2000
    assert set(looks) == {1, 5}


def test_namespaces_that_nobody_writes_to_are_forgotten(choice: CodecChoice, clock: Ticks) -> None:
    carry(choice, worth(3.0))
    part = smooth(64)
    for number in range(5000):
        choice.encode(RootId(number.to_bytes(32, "big")), part, 2, encoded=False)
    stats = Stats()
    choice.report("redis", stats)
    assert stats.get("redis.encoded_namespaces") + stats.get("redis.raw_namespaces") == 1024


def test_what_is_only_read_is_no_namespace_to_choose_for(choice: CodecChoice) -> None:
    choice.encode(ROOT, smooth(64), 2, encoded=False)
    for number in range(2000):
        choice.loaded(RootId(number.to_bytes(32, "little")), MIB, 0.01, 1.0)
    stats = Stats()
    choice.report("redis", stats)
    assert stats.get("redis.encoded_namespaces") + stats.get("redis.raw_namespaces") == 1


def test_a_codec_that_is_named_is_used_whatever_is_measured(clock: Ticks) -> None:
    choice = CodecChoice("lz4", clock)
    carry(choice, 1e-12)
    assert choice.encodes([ROOT])[ROOT]
    assert choice.encode(ROOT, smooth(PIECE_BYTES), 2, encoded=True)[0] == LZ4
    with pytest.raises(ConfigError, match="use one of auto, lz4, raw"):
        CodecChoice("zip")


# ── on real servers ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def wide(model: ModelId) -> ModelId:
    """Its parts have 256 KiB."""
    return dataclasses.replace(model, head_dim=64 * model.head_dim)


class LinkClock:
    """A clock that moves on with what goes to the server and back, as over a link that takes all the time there is.

    So calls take what their bytes take, whatever the machine does besides. For calls of one value: of several, bytes
    pass while others are encoded, or handed on, and how many is chance.
    """

    def __init__(self, client: redis.Redis, bytes_per_s: float) -> None:
        self._client, self._bytes_per_s = client, bytes_per_s

    def __call__(self) -> float:
        passed = self._client.info("stats")
        return float(passed["total_net_input_bytes"] + passed["total_net_output_bytes"]) / self._bytes_per_s


@pytest.fixture
def link(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> LinkClock:
    """Of 40 MB/s, for tiers made from now on."""
    clock = LinkClock(client, 40e6)
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr("kvstore.tiers.redis.CodecChoice", lambda name: CodecChoice(name, clock))
    return clock


def long_text(root: Root, seed: int, fill: Fill) -> Content:
    """A block of two megabytes, each another."""
    content = Content(root, 1, seed=seed)
    content.parts = {key: fill(len(part), seed) for key, part in content.parts.items()}
    return content


def codec_of(client: redis.Redis, content: Content) -> int:
    return frame.unpack(client.get(content.name(-1))).codec_id


def until(tier: RedisTier, root: Root, fill: Fill, seeds: Iterator[int], true: Callable[[Content], bool]) -> None:
    """Write and read back until it is true of what was written, eight times in a row: none is a control then."""
    num_so = 0
    for _ in range(120):
        content = long_text(root, next(seeds), fill)
        content.write(tier)
        assert content.read(tier) == content.keys
        num_so = num_so + 1 if true(content) else 0
        if num_so == 8:
            return
    raise AssertionError("nothing changed")


@pytest.mark.slow
def test_a_slow_link_turns_what_compresses_to_lz4_until_it_does_so_no_more_and_leaves_noise_raw(
    server: EmbeddedServer, client: redis.Redis, link: LinkClock, make_tier: MakeTier, wide: ModelId
) -> None:
    def random_bytes(num_bytes: int, seed: int) -> memoryview:
        return memoryview(np.random.default_rng(seed).bytes(num_bytes))

    tier = make_tier(server.url)
    model = dataclasses.replace(wide, head_dim=8 * wide.head_dim)
    compressible, random = Root(model), Root(model, salt=b"random")
    tier.open(layout_of(model))
    seeds = iter(range(1000))
    until(tier, compressible, smooth, seeds, lambda content: codec_of(client, content) == LZ4)
    noisy = long_text(random, next(seeds), random_bytes)
    noisy.write(tier)
    noisy.write(tier)
    assert noisy.read(tier) == noisy.keys
    assert codec_of(client, noisy) == RAW
    assert tier.stats.get("redis.encoded_namespaces") == 1
    assert tier.stats.get("redis.raw_namespaces") == 1
    assert tier.stats.get("redis.send_bytes_per_s") == pytest.approx(40e6, rel=0.1)
    assert tier.stats.get("redis.decoded_saved_bytes") > 0
    until(tier, compressible, random_bytes, seeds, lambda content: tier.stats.get("redis.encoded_namespaces") == 0)


def test_encoded_bytes_are_held_of_two_groups_at_a_time_and_of_one_value_read(
    server: EmbeddedServer, make_tier: MakeTier, wide: ModelId
) -> None:
    tier, root = make_tier(server.url, codec="lz4"), Root(wide)
    content = Content(root, 64)  # 16 MiB, of which encoded bytes are more than half
    content.parts = {key: smooth(len(part), at) for at, (key, part) in enumerate(content.parts.items())}
    tier.open(content.layout)
    content.write(tier, 0, 1)
    into = content.buffers()
    peak_bytes = content.held_in_passing(tier, into)
    assert into == content.parts
    assert tier.stats.get("redis.decoded_blocks") == 64
    assert peak_bytes < 4 * MIB
