# SPDX-License-Identifier: Apache-2.0
"""Scores keep their order when the server's clock jumps: on real servers whose clock really does."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from kvstore.api import NO_HINT
from kvstore.block import PartKey, Root
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_clock import SharedClock
from kvstore.tiers.redis_names import CLOCK, EPOCH_S
from kvstore.tiers.redis_nodes import Talk
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions, embedded_binary
from tests.redis.cluster import until
from tests.redis.conftest import SERVERS, MakeTier, binary_of
from tests.redis.content import DEADLINE_S, Content

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S

# Set before a server: its clock goes wrong by as many microseconds as the file says, from now on and from when it says.
_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static volatile long long *wrong_by;
__attribute__((constructor)) static void begin(void) {
    wrong_by = mmap(0, 8, PROT_READ, MAP_SHARED, open(getenv("WRONG_BY"), O_RDONLY), 0);
}
int clock_gettime(clockid_t id, struct timespec *ts) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int rc = real(id, ts);
    if (rc == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) ts->tv_sec += *wrong_by / 1000000;
    return rc;
}
int gettimeofday(struct timeval *restrict tv, void *restrict tz) {
    struct timespec ts;
    int rc = clock_gettime(CLOCK_REALTIME, &ts);
    tv->tv_sec = ts.tv_sec;
    tv->tv_usec = ts.tv_nsec / 1000;
    return rc;
}
time_t time(time_t *out) {
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    if (out) *out = ts.tv_sec;
    return ts.tv_sec;
}
"""


@dataclass(frozen=True)
class Jumping:
    """A server, and what its clock is wrong by."""

    server: EmbeddedServer
    wrong_by: Path

    def jump_to(self, seconds: float) -> None:
        before = self.says_s()
        with self.wrong_by.open("r+b") as file:
            file.write(struct.pack("@q", int(seconds * 1e6)))
        # A server may answer with the time at which it last woke.
        until(lambda: seconds == 0 or abs(self.says_s() - before) > 60, 5.0)

    def says_s(self) -> float:
        with redis.Redis.from_url(self.server.url) as client:
            return float(client.time()[0])


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("NOT TESTED WITH A SERVER WHOSE CLOCK JUMPS: no C compiler here (cc)")
    directory = tmp_path_factory.mktemp("shim")
    (directory / "shim.c").write_text(_SHIM)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", directory / "shim.so", directory / "shim.c", "-ldl"], check=True
    )
    return directory / "shim.so"


@pytest.fixture(params=SERVERS)
def jumping(request: pytest.FixtureRequest, shim: Path, tmp_path: Path) -> Iterator[Jumping]:
    wrong_by, launcher = tmp_path / "wrong_by", tmp_path / "server"
    wrong_by.write_bytes(bytes(8))
    binary = binary_of(request.param) or embedded_binary()
    launcher.write_text(f'#!/bin/sh\nWRONG_BY={wrong_by} LD_PRELOAD={shim} exec {binary} "$@"\n')
    launcher.chmod(0o755)
    with EmbeddedServer(ServerOptions(binary=launcher)) as server:
        yield Jumping(server, wrong_by)


def resident(tier: RedisTier, content: Content) -> list[PartKey]:
    there = tier.contains(content.keys, DEADLINE_S)
    return [key for key, present in zip(content.keys, there, strict=True) if present]


def use(tier: RedisTier, content: Content) -> None:
    tier.touch(content.keys, NO_HINT)
    assert tier.settle(DEADLINE_S)


def room_for(num_parts: int) -> dict[str, int]:
    return {"capacity_bytes": num_parts * 5120, "num_buckets": 4, "ttl_s": 0}  # 4 KiB and a header in jemalloc's class


@pytest.mark.parametrize("seconds", [-3 * HOUR_S, 3 * HOUR_S, 300 * DAY_S])
def test_after_a_jump_what_was_used_last_still_stays_longest(
    seconds: float, jumping: Jumping, make_tier: MakeTier, root: Root
) -> None:
    contents = [Content(root, 10, seed=seed) for seed in range(6)]
    before = make_tier(jumping.server.url, **room_for(32))
    for content in contents[:3]:
        content.write(before)
    jumping.jump_to(seconds)
    during = make_tier(jumping.server.url, **room_for(32))  # a store that knows nothing of the time before
    contents[3].write(during)
    assert [len(resident(during, each)) for each in contents[1:4]] == [10, 10, 10]
    use(during, contents[1])
    jumping.jump_to(0)
    after = make_tier(jumping.server.url, **room_for(32))
    for content in contents[4:]:
        content.write(after)
    assert [resident(after, each) for each in (contents[1], *contents[4:])] == [
        each.keys for each in (contents[1], *contents[4:])
    ]
    assert resident(after, contents[2]) == []  # and so is nothing immortal that was used before or during it
    assert len(resident(after, contents[3])) < 10


def test_a_jump_forward_ages_nothing_that_is_in_use(jumping: Jumping, make_tier: MakeTier, root: Root) -> None:
    content = Content(root, 6)
    make_tier(jumping.server.url).write(content.parts, content.meta, DEADLINE_S)
    jumping.jump_to(1.5 * DAY_S)  # more than half the TTL of two days, at which stores age; less than all of it
    later = make_tier(jumping.server.url)
    deadline = time.monotonic() + DEADLINE_S
    with later._nodes.talk(deadline) as talk:
        later._upkeep._age(talk, deadline)
    assert resident(later, content) == content.keys


def test_a_jump_beyond_the_time_to_live_is_a_cold_cache_and_no_more(
    jumping: Jumping, make_tier: MakeTier, root: Root
) -> None:
    limits = {**room_for(32), "ttl_s": int(2 * DAY_S)}
    before, other = (make_tier(jumping.server.url, **limits) for _ in range(2))
    old = [Content(root, 10, seed=seed) for seed in range(3)]
    for content in old:
        content.write(before)
    jumping.jump_to(3 * DAY_S)
    assert [content.read(before) for content in old] == [[], [], []]
    # Accounts still name what has ended. That costs no room: they are the coldest, and go first.
    fresh = [Content(root, 10, seed=seed) for seed in range(3, 6)]
    for content in fresh:
        assert content.write(other) == set(content.keys)
        assert before.accounted_bytes() <= limits["capacity_bytes"]
    assert [content.read(before) for content in fresh] == [content.keys for content in fresh]
    assert old[0].write(before) == set(old[0].keys)  # heads that have ended are no parents
    before.sweep()
    assert before.check() == []
    jumping.jump_to(0)  # back again: everything lives longer, nothing goes
    assert old[0].read(other) == old[0].keys


# ── the shared clock by itself ──────────────────────────────────────────────────────────────────────────────────


class Times:
    """The server's clock and a host's, moved by hand."""

    def __init__(self) -> None:
        self.server_s = EPOCH_S + 1e7
        self.here_s = 0.0

    def pass_by(self, seconds: float) -> None:
        self.server_s += seconds
        self.here_s += seconds

    def clock(self) -> SharedClock:
        return SharedClock(lambda talk, deadline: self.server_s, lambda: self.here_s)


@pytest.fixture
def talk(server: EmbeddedServer, make_tier: MakeTier) -> Iterator[Talk]:
    with make_tier(server.url)._nodes.talk(time.monotonic() + 30) as talk:
        yield talk


def test_stores_that_look_at_different_times_agree_through_every_jump(talk: Talk) -> None:
    times, deadline = Times(), time.monotonic() + 30
    early, late = times.clock(), times.clock()
    began_s = early.now_s(talk, deadline)
    assert began_s == pytest.approx(1e7)
    times.pass_by(30)
    late.now_s(talk, deadline)
    passed_s = 30.0
    for jump_s in (-7200.0, 86_400.0, -1e8, 3e8, 45.0, 0.0, -45.0):
        times.server_s += jump_s
        for _ in range(4):
            times.pass_by(40)
            passed_s += 40
            # A jump counts for what stores may have missed at most, once.
            seen = [clock.now_s(talk, deadline) - began_s for clock in (early, late)]
            assert max(seen) - min(seen) <= 2 * 120.001  # two jumps since one of them looked
            assert all(passed_s - 0.001 <= each <= passed_s + 14 * 120.001 for each in seen)
        times.server_s -= 500
        fresh_s = times.clock().now_s(talk, deadline) - began_s
        assert fresh_s >= max(seen)


def test_the_time_never_goes_back_whatever_becomes_of_its_key(
    talk: Talk, client: redis.Redis, make_tier: MakeTier, server: EmbeddedServer, root: Root
) -> None:
    times, deadline = Times(), time.monotonic() + 30
    clock = times.clock()
    last_s = clock.now_s(talk, deadline)
    for spoil in (
        lambda: client.delete(CLOCK),
        lambda: client.set(CLOCK, "12:30") and client.delete("none"),
        lambda: client.delete(CLOCK) and client.rpush(CLOCK, "a"),
        lambda: client.delete(CLOCK) and client.hset(CLOCK, mapping={"at": "nan", "now": "inf"}),
        lambda: client.hset(CLOCK, "now", "soon"),
    ):
        spoil()
        times.here_s += 61
        times.server_s -= 1000
        now_s = clock.now_s(talk, deadline)
        assert last_s + 60 < now_s < last_s + 62
        last_s = now_s
    times.here_s += 5000  # and the server's clock stands still
    assert clock.now_s(talk, deadline) == pytest.approx(last_s + 5000)
    assert times.clock().now_s(talk, deadline) == pytest.approx(last_s + 5000)


@pytest.mark.parametrize("spoilt", ["soon", "nan", "inf", "1e300", ""])
def test_what_another_program_noted_as_gone_turns_no_store_off_and_is_forgotten(
    spoilt: str, server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    content = Content(root, 2)
    content.write(make_tier(server.url))
    client.hset(CLOCK, "cold", spoilt)
    tier = make_tier(server.url, breaker_open_s=60.0)
    assert content.write(tier) == set(content.keys)
    assert tier.span_s == make_tier(server.url).span_s > 0
    assert client.hget(CLOCK, "cold") is None


def test_a_clock_that_was_lost_begins_above_what_was_used_last(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root
) -> None:
    tier = make_tier(server.url, num_buckets=1)
    content = Content(root, 2)
    content.write(tier)
    name = tier._names.bucket(content.keys[0]).order
    for key in content.keys:
        client.zincrby(name, 5 * HOUR_S, tier._names.member(key.block, key.part))
    highest = client.zrevrange(name, 0, 0, withscores=True)[0][1]
    client.delete(CLOCK)
    deadline = time.monotonic() + DEADLINE_S
    with tier._nodes.talk(deadline) as talk:
        assert SharedClock().now_s(talk, deadline) >= highest


def test_a_server_without_memory_still_tells_the_time(make_tier: MakeTier, root: Root) -> None:
    with EmbeddedServer(ServerOptions(maxmemory_bytes=1 << 20)) as server:
        tier = make_tier(server.url, healthy=False)
        deadline = time.monotonic() + DEADLINE_S
        with tier._nodes.talk(deadline) as talk, redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory", "1kb")
            assert SharedClock().now_s(talk, deadline) == pytest.approx(client.time()[0] - EPOCH_S, abs=5)
        tier.close()
