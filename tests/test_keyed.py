# SPDX-License-Identifier: Apache-2.0
"""Values under foreign keys in a real Valkey."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from kvstore.errors import ConfigError, TierError
from kvstore.keyed import KeyedValues
from kvstore.tiers.valkey import EmbeddedServer
from tests.patient import REDIS

SIZE = 4096


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def url(server: EmbeddedServer) -> str:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    return server.url


def connect(url: str, **namespace: str) -> KeyedValues:
    return KeyedValues.connect({"redis": {"url": url, **REDIS}}, {"model": "m", **namespace}, SIZE)


def value(seed: int) -> memoryview:
    return memoryview(bytes([seed]) * SIZE)


def room() -> memoryview:
    return memoryview(bytearray(SIZE))


def test_what_one_writes_another_reads_in_any_order(url: str) -> None:
    keys = [bytes([at]) * 36 for at in range(5)]
    one, two = connect(url), connect(url)
    assert one.write({key: value(at) for at, key in enumerate(keys[:4])}, 5) == set(keys[:4])
    assert two.contains(keys, 5) == [True] * 4 + [False]
    into = {key: room() for key in reversed(keys)}
    assert two.read(into, 5) == set(keys[:4])
    assert all(into[key] == value(at) for at, key in enumerate(keys[:4]))
    one.touch(keys[:4])
    assert one.check() == []
    one.close()
    two.close()


def test_another_namespace_or_size_finds_nothing(url: str) -> None:
    one = connect(url)
    one.write({b"key": value(1)}, 5)
    others = [
        connect(url, dtype="bfloat16"),
        KeyedValues.connect({"redis": {"url": url}}, {"modelm": ""}, SIZE),  # fields never run together
        KeyedValues.connect({"redis": {"url": url}}, {"model": "m"}, 2 * SIZE),
    ]
    assert [other.contains([b"key"], 5) for other in others] == [[False]] * 3
    for made in (one, *others):
        made.close()


def test_a_damaged_value_is_left_out(url: str) -> None:
    one = connect(url)
    one.write({b"a": value(1), b"b": value(2)}, 5)
    with redis.Redis.from_url(url) as client:
        (name,) = client.scan_iter(f"*{one.key(b'a').block.hex()}*")
        damaged = bytearray(client.get(name))  # type: ignore[arg-type]
        damaged[-1] ^= 1
        client.set(name, bytes(damaged))
    into = {b"a": room(), b"b": room()}
    assert one.read(into, 5) == {b"b"}
    assert into[b"b"] == value(2)
    assert one.stats.snapshot()["redis.corrupt_blocks"] == 1
    one.close()


def test_a_server_that_is_gone_raises_and_says_nothing_is_there() -> None:
    with EmbeddedServer() as server:
        one = connect(server.url)
        one.write({b"a": value(1)}, 5)
    with pytest.raises(TierError):
        one.read({b"a": room()}, 1)
    with pytest.raises(TierError):
        one.contains([b"a"], 1)
    one.close()


@pytest.mark.parametrize(("tiers", "size"), [({}, SIZE), ({"redis": {"nonsense": 1}}, SIZE), ({"redis": {}}, 4095)])
def test_settings_that_cannot_be_meant_are_refused(tiers: dict[str, object], size: int) -> None:
    with pytest.raises(ConfigError):
        KeyedValues.connect(tiers, {}, size).close()
