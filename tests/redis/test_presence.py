# SPDX-License-Identifier: Apache-2.0
"""Presence by long commands says the same of each key as a command a key would."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from kvstore.block import BlockId, PartKey, Root, RootId
from kvstore.config import StoreConfig
from kvstore.errors import TierError
from kvstore.store import KVStore
from kvstore.tiers.redis_names import TOUCH_STEPS, Names, Use
from kvstore.tiers.redis_presence import present
from kvstore.tiers.redis_stream import Buffer, PlainStream
from kvstore.tiers.redis_wire import Wire
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import chain_of, load_all, save_all
from tests.patient import REDIS, REQUEST
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S

NUM_KEYS = 2048


def keys_of(seed: int, count: int = NUM_KEYS) -> list[PartKey]:
    rng = random.Random(seed)
    root = RootId(rng.randbytes(32))
    blocks = [BlockId(rng.randbytes(32)) for _ in range(count // 2)]
    return [PartKey(root, block, part) for block in blocks for part in range(2)]


def patterns() -> Iterator[tuple[str, list[bool]]]:
    rng = random.Random(7)
    for length in (0, 1, 255, 256, 257, 1000, 2047, 2048):
        yield f"prefix of {length}", [at < length for at in range(NUM_KEYS)]
    yield "one hole", [at != 700 for at in range(NUM_KEYS)]
    yield "one alone", [at == 1500 for at in range(NUM_KEYS)]
    yield "random", [rng.random() < 0.5 for _ in range(NUM_KEYS)]


@pytest.mark.parametrize("pattern", list(patterns()), ids=lambda pattern: pattern[0])
def test_presence_is_right_for_every_key_wherever_holes_lie(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, pattern: tuple[str, list[bool]]
) -> None:
    tier = make_tier(server.url, healthy=False)
    keys, expected = keys_of(1), pattern[1]
    names = Names(tier.options.num_buckets)
    there = {names.value(key): b"x" for key, flag in zip(keys, expected, strict=True) if flag}
    if there:
        client.mset(there)
    assert tier.contains(keys, DEADLINE_S) == expected
    assert tier.contains(keys[::-1], DEADLINE_S) == expected[::-1]


class Turns(PlainStream):
    """Counts how often somebody waited for an answer to what was sent since the last one."""

    num_turns = 0
    _asked = False

    def send(self, buffers: list[Buffer], deadline: float, meanwhile: Callable[[], bool] | None = None) -> int:
        self._asked = True
        return super().send(buffers, deadline, meanwhile)

    def recv(self, view: memoryview, deadline: float, *, fill: bool) -> int:
        self.num_turns += self._asked
        self._asked = False
        return super().recv(view, deadline, fill=fill)


@pytest.mark.parametrize("by_stripe", [False, True])
@pytest.mark.parametrize(("num_there", "num_turns"), [(NUM_KEYS, 1), (0, 1), (1000, 2)])
def test_a_whole_prefix_costs_one_round_trip_and_one_that_ends_in_it_two(
    server: EmbeddedServer, client: redis.Redis, num_there: int, num_turns: int, by_stripe: bool
) -> None:
    keys, names = keys_of(1), Names(16)
    client.mset({names.value(key): b"x" for key in keys[:num_there]} or {"other": b"x"})
    with socket.socket(socket.AF_UNIX) as ours:
        ours.connect(server.unix_url.removeprefix("unix://"))
        stream = Turns(ours)
        found = present(Wire(stream), names, keys, time.monotonic() + DEADLINE_S, by_stripe=by_stripe)
        assert sum(found) == num_there
        assert stream.num_turns == num_turns


def test_redis_is_asked_about_nothing_that_the_host_has(
    server: EmbeddedServer, client: redis.Redis, root: Root
) -> None:
    names, chain = Names(16), chain_of(root, 24)

    def store(write: str) -> KVStore:
        values = {
            "host": {"capacity_bytes": 64 * 4096, "prefault": False},
            "mover": {"write": write},
            "request": REQUEST,
        }
        made = KVStore(StoreConfig.load(values | {"tiers": {"redis": {"url": server.url, **REDIS}}}, environ={}))
        made.open(root.model)
        return made

    # One that writes what was used again would ask, in the background, whether it is there already.
    with store("through") as writer, store("on_evict") as reader:
        assert save_all(writer, chain) == 24
        assert writer.flush(5)
        assert load_all(reader, chain_of(root, 10)) == ["redis"] * 10
        with client.monitor() as seen:
            match = reader.match(chain, "r", wait_s=5)
            assert (match.num_host_blocks, match.num_blocks) == (10, 24)
            client.echo("that was all")
            asked: list[str] = []
            while (command := seen.next_command()["command"]) != "ECHO that was all":
                asked += command.split()[1:] if command.startswith("EXISTS") else []
        reader.forget("r")
        values = [names.value(key) for key in chain.part_keys(0, 24, (0,))]
        assert asked == values[10:]


def test_keys_named_twice_and_keys_of_two_namespaces_are_told_apart(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier
) -> None:
    tier = make_tier(server.url, healthy=False)
    mine, theirs = keys_of(2, 100), keys_of(3, 100)
    names = Names(tier.options.num_buckets)
    client.mset({names.value(key): b"x" for key in [*mine[:50], *theirs[50:]]})
    mixed = [key for pair in zip(mine, theirs, strict=True) for key in pair] + mine[:2]
    flags = [flag for at in range(100) for flag in (at < 50, at >= 50)] + [True, True]
    assert tier.contains(mixed, DEADLINE_S) == flags


def test_connection_is_whole_after_the_server_refused_some_of_the_commands(
    own_server: EmbeddedServer, make_tier: MakeTier
) -> None:
    tier = make_tier(own_server.url, healthy=False)
    keys = keys_of(4)
    with redis.Redis.from_url(own_server.url) as client:
        client.execute_command("ACL", "SETUSER", "default", "-exists")
        with pytest.raises(TierError, match="NOPERM|refuses|permissions"):
            tier.contains(keys, DEADLINE_S)
        client.execute_command("ACL", "SETUSER", "default", "+exists")
    assert tier.contains(keys, DEADLINE_S) == [False] * NUM_KEYS


def test_uses_of_one_chain_at_once_name_all_parts_that_any_of_them_names_and_each_once() -> None:
    names = Names(4)
    keys = keys_of(5, 12)
    some, both = [key for key in keys if key.part == 0], list(keys)
    sent = b"".join(touch.words for step in names.touches([Use(some, {}), Use(both, {})], 1000.0) for touch in step)
    assert [sent.count(names.member(key.block, key.part).encode()) for key in keys] == [1] * len(keys)


def test_touch_in_steps_puts_every_parent_above_its_child() -> None:
    """Longer than all steps, and over places where scores get one digit more, or their last digits begin anew."""
    names = Names(4)
    keys = keys_of(5, 2 * sum(TOUCH_STEPS))
    for now_s in (6e7, 1.0, 1000.000001, 6e7 + 1e-3, 59_999_999.000_3):
        scores: dict[str, float] = {}
        for touches in names.touches([Use(keys, {})], now_s):
            for command in (touch.words for touch in touches):
                words = command.split(b"\r\n")[2::2]
                assert len(words) == int(command[1 : command.index(b"\r")])
                lengths = [int(word[1:]) for word in command.split(b"\r\n")[1::2] if word]
                assert lengths == [len(word) for word in words]
                for score, member in zip(words[5::2], words[6::2], strict=True):
                    scores[member.decode()] = float(score)
        in_order = [scores[names.member(key.block, key.part)] for key in keys]
        assert in_order[0] == now_s
        assert all(in_order[at] == in_order[at + 1] > in_order[at + 2] for at in range(0, len(keys) - 2, 2))
