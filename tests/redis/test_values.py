# SPDX-License-Identifier: Apache-2.0
"""A value that is not exactly the part asked for is a miss, is removed, and is counted; its neighbours are read."""

from __future__ import annotations

import dataclasses
from itertools import chain

import numpy as np
import pytest
import redis

from kvstore.block import PartKey, Root
from kvstore.codecs import CODECS
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer
from kvstore.wire import frame
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.test_frame import FIELDS
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("lanes")

HURT = 2


@pytest.fixture
def content(tier: RedisTier, root: Root) -> Content:
    content = Content(root, 5)
    assert content.write(tier) == set(content.keys)
    return content


def test_values_are_asked_for_before_those_after_them_have_their_buffers(
    tier: RedisTier, content: Content, client: redis.Redis
) -> None:
    buffers = content.buffers()
    first, rest = content.keys[:2], content.keys[2:]

    def num_gets() -> int:
        return int(client.info("commandstats").get("cmdstat_get", {}).get("calls", 0))

    assert tier.settle(DEADLINE_S)  # upkeep begins with a look at the server, which reads something
    before = num_gets()

    def more() -> dict[PartKey, memoryview]:
        wait_until(lambda: num_gets() == before + len(first))
        return {key: buffers[key] for key in rest}

    assert (
        list(chain.from_iterable(tier.read_on({key: buffers[key] for key in first}, more, DEADLINE_S))) == content.keys
    )
    assert buffers == content.parts


def test_a_read_that_brought_everything_keeps_its_connection(
    tier: RedisTier, content: Content, client: redis.Redis
) -> None:
    """In one of ten it was cut, where the receiving thread had not yet said that it was done."""
    assert content.read(tier) == content.keys
    assert tier.settle(DEADLINE_S)  # upkeep has its connection then
    num_connections = lambda: int(client.info("stats")["total_connections_received"])
    before = num_connections()
    for _ in range(200):
        assert sum(map(len, tier.read_on(content.buffers(), dict, DEADLINE_S))) == len(content.keys)
    assert num_connections() == before


def test_a_caller_that_cannot_go_on_leaves_no_reply_for_the_next(tier: RedisTier, content: Content) -> None:
    def more() -> dict[PartKey, memoryview]:
        raise MemoryError

    with pytest.raises(MemoryError):
        list(tier.read_on(content.buffers(), more, DEADLINE_S))
    assert content.read(tier) == content.keys


def expect_one_loss(tier: RedisTier, content: Content, client: redis.Redis, counter: str) -> None:
    """Block HURT is a miss, is removed and counted; the rest is delivered."""
    key = content.keys[HURT]
    assert content.read(tier) == [other for other in content.keys if other != key]
    assert tier.stats.get(f"redis.{counter}") == 1
    assert tier.settle(DEADLINE_S)
    assert client.exists(content.name(HURT)) == 0
    assert tier.contains([key], DEADLINE_S) == [False]
    tier.remove(content.keys[HURT + 1 :])  # what hangs on the lost block, so that the tier ends healthy


@pytest.mark.parametrize("field", [*(name for name in FIELDS if name != "extra"), "payload", "last byte"])
def test_flipped_byte_makes_the_block_a_miss(
    field: str, tier: RedisTier, content: Content, client: redis.Redis
) -> None:
    name = content.name(HURT)
    header_bytes = frame.header_bytes(16, 0)
    spots = {name: at for name, (at, _) in FIELDS.items()}
    spots |= {"payload": header_bytes + 100, "last byte": header_bytes + 4095, "header checksum": header_bytes - 8}
    at = spots[field]
    value = client.getrange(name, at, at)
    client.setrange(name, at, bytes([value[0] ^ 0x10]))
    expect_one_loss(tier, content, client, "corrupt_blocks")


@pytest.mark.parametrize("keep", [0, 1, 100, 143, 151, 200, 216, 4000])
def test_truncated_value_is_a_miss(keep: int, tier: RedisTier, content: Content, client: redis.Redis) -> None:
    name = content.name(HURT)
    client.set(name, client.get(name)[:keep])
    expect_one_loss(tier, content, client, "corrupt_blocks")


@pytest.mark.parametrize("more", [1, 4096, 1 << 20])
def test_longer_value_is_a_miss(more: int, tier: RedisTier, content: Content, client: redis.Redis) -> None:
    client.append(content.name(HURT), b"x" * more)
    expect_one_loss(tier, content, client, "corrupt_blocks")


def test_value_of_another_type_is_a_miss(tier: RedisTier, content: Content, client: redis.Redis) -> None:
    client.delete(content.name(HURT))
    client.rpush(content.name(HURT), "a", "b")
    expect_one_loss(tier, content, client, "corrupt_blocks")


def test_foreign_bytes_are_a_miss(tier: RedisTier, content: Content, client: redis.Redis) -> None:
    client.set(content.name(HURT), b"\r\n$5\r\nhello\r\n" * 400)
    expect_one_loss(tier, content, client, "corrupt_blocks")


def test_value_that_is_gone_is_a_miss(tier: RedisTier, content: Content, client: redis.Redis) -> None:
    client.delete(content.name(HURT))
    assert content.read(tier) == [key for key in content.keys if key != content.keys[HURT]]
    assert tier.stats.get("redis.missing_blocks") == 1
    tier.sweep()


def test_swapped_values_are_both_misses(tier: RedisTier, content: Content, client: redis.Redis) -> None:
    one, two = content.name(1), content.name(2)
    first, second = client.get(one), client.get(two)
    client.set(one, second)
    client.set(two, first)
    assert content.read(tier) == [content.keys[0], *content.keys[3:]]
    assert tier.stats.get("redis.foreign_blocks") == 2
    assert tier.settle(DEADLINE_S)
    assert client.exists(one, two) == 0
    tier.sweep()


def test_frame_forged_for_other_tokens_is_a_miss(tier: RedisTier, content: Content, client: redis.Redis) -> None:
    name = content.name(HURT)
    value = client.get(name)
    header = frame.unpack(value)
    forged = dataclasses.replace(header, meta=header.meta._replace(tokens=header.meta.tokens[::-1]))
    client.set(name, frame.pack(forged) + value[frame.measure(value) :])
    expect_one_loss(tier, content, client, "corrupt_blocks")


def test_unknown_codec_is_a_miss(tier: RedisTier, content: Content, client: redis.Redis) -> None:
    name = content.name(HURT)
    value = client.get(name)
    header = frame.unpack(value)
    payload = value[frame.measure(value) :]
    client.set(name, frame.pack(dataclasses.replace(header, codec_id=250)) + payload)
    expect_one_loss(tier, content, client, "corrupt_blocks")


def test_damaged_bytes_under_a_right_checksum_are_a_miss(
    tier: RedisTier, content: Content, client: redis.Redis
) -> None:
    name = content.name(HURT)
    header = frame.unpack(client.get(name))
    payload = b"\xff" * 100
    lz4_id = CODECS.load("lz4").wire_id
    forged = dataclasses.replace(
        header, codec_id=lz4_id, payload_bytes=len(payload), payload_xxh3=frame.checksum(payload)
    )
    client.set(name, frame.pack(forged) + payload)
    expect_one_loss(tier, content, client, "corrupt_blocks")


def test_server_flushed_between_presence_and_read_gives_misses(
    tier: RedisTier, content: Content, client: redis.Redis
) -> None:
    assert all(tier.contains(content.keys, DEADLINE_S))
    client.flushall()
    assert content.read(tier) == []
    assert content.write(tier) == set(content.keys)
    assert content.read(tier) == content.keys


def test_readers_decode_whatever_codec_wrote(server: EmbeddedServer, make_tier: MakeTier, root: Root) -> None:
    packing, plain = make_tier(server.url, codec="lz4"), make_tier(server.url)
    content = Content(root, 4)
    for number, key in enumerate(content.parts):
        values = np.random.default_rng(number).uniform(1, 1.99, len(content.parts[key]) // 2).astype("<f4")
        content.parts[key] = memoryview((values.view("<u4") >> 16).astype("<u2").tobytes())
    content.write(packing)
    assert plain.accounted_bytes() < 0.8 * sum(len(part) for part in content.parts.values())
    assert content.read(plain) == content.read(packing) == content.keys


def test_buffer_of_another_size_is_never_filled(tier: RedisTier, content: Content) -> None:
    key: PartKey = content.keys[0]
    for num_bytes in (4095, 4097):
        into = {key: memoryview(bytearray(num_bytes))}
        assert list(tier.read(into, DEADLINE_S)) == []
    assert tier.settle(DEADLINE_S)
    tier.clear(None)


def test_values_of_many_sizes_come_back(server: EmbeddedServer, make_tier: MakeTier, root: Root) -> None:
    for head_dim in (1, 3, 2048, 65_536):
        model = dataclasses.replace(root.model, head_dim=head_dim)
        content = Content(Root(model), 3, seed=head_dim)
        tier = make_tier(server.url)
        tier.open(content.layout)
        assert content.write(tier) == set(content.keys)
        assert content.read(tier) == content.keys


def test_small_values_come_after_large_ones_of_another_model(tier: RedisTier, root: Root) -> None:
    """What was received last says how the next value may begin, and not that there is one like it."""
    contents = [Content(Root(dataclasses.replace(root.model, head_dim=head_dim)), 3) for head_dim in (8192, 32)]
    for content in contents:
        tier.open(content.layout)
        assert content.write(tier) == set(content.keys)
    for content in (*contents, *contents):
        assert content.read(tier) == content.keys
    tier.clear(None)


def test_values_go_from_memory_to_socket_and_back_with_no_copy_between(tier: RedisTier, root: Root) -> None:
    content = Content(Root(dataclasses.replace(root.model, head_dim=8192)), 16)  # 2 MiB each
    tier.open(content.layout)
    into = content.buffers()
    content.write(tier, 0, 1)
    peak_bytes = content.held_in_passing(tier, into)
    assert into == content.parts
    assert peak_bytes < 1 << 20  # half a value
