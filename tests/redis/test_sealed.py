# SPDX-License-Identifier: Apache-2.0
"""Values sealed at rest: no prompt and no KV in Redis, a wrong key is a miss, keys change without one."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis

from kvstore.block import Root
from kvstore.errors import ConfigError
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_sealed import Scratch
from kvstore.tiers.valkey import EmbeddedServer
from kvstore.wire import frame
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    return keys_in(tmp_path / "keys", 1)


def keys_in(path: Path, *seeds: int) -> str:
    path.write_text("".join(f"{bytes([seed] * 32).hex()}\n" for seed in seeds))
    path.chmod(0o600)
    return str(path)


def everything_in(client: redis.Redis) -> bytes:
    return b"".join(client.get(name) for name in client.scan_iter("*:v:*"))


@pytest.mark.parametrize("head_dim", [3, 16, 4096])
@pytest.mark.parametrize("codec", ["raw", "lz4"])
def test_sealed_values_come_back_and_neither_tokens_nor_bytes_lie_in_redis(
    server: EmbeddedServer,
    client: redis.Redis,
    make_tier: MakeTier,
    root: Root,
    key_file: str,
    head_dim: int,
    codec: str,
) -> None:
    content = Content(Root(replace(root.model, head_dim=head_dim)), 9)
    for number, key in enumerate(content.parts):
        values = np.random.default_rng(number).uniform(1, 1.99, len(content.parts[key]) // 2).astype("<f4")
        content.parts[key] = memoryview((values.view("<u4") >> 16).astype("<u2").tobytes())
    tiers = [make_tier(server.url, encryption_key_file=key_file, codec=codec) for _ in range(2)]
    for tier in tiers:
        tier.open(content.layout)
    assert content.write(tiers[0]) == set(content.keys)
    assert content.read(tiers[1]) == content.read(tiers[0]) == content.keys
    stored = everything_in(client)
    for key, part in content.parts.items():
        assert content.meta[key.block].tokens[:12] not in stored
        assert bytes(part[:12]) not in stored
        assert bytes(part[:12:2]) not in stored  # as a plane of a codec


def test_accounts_of_sealed_values_are_exact(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, key_file: str
) -> None:
    tier = make_tier(server.url, encryption_key_file=key_file)
    content = Content(root, 4)
    content.write(tier)
    stored = 4096 + frame.header_bytes(16, 0) + frame.SEAL_BYTES + frame.TAG_BYTES
    assert client.strlen(content.name(0)) == stored
    assert tier.sweep()["damaged"] == 0


def test_a_wrong_key_is_a_miss_that_leaves_the_value_to_others(
    server: EmbeddedServer, make_tier: MakeTier, root: Root, key_file: str, tmp_path: Path
) -> None:
    content = Content(root, 5)
    owner = make_tier(server.url, encryption_key_file=key_file)
    content.write(owner)
    for stranger in (
        make_tier(server.url, encryption_key_file=keys_in(tmp_path / "other", 2)),
        make_tier(server.url),
    ):
        assert all(stranger.contains(content.keys, DEADLINE_S))
        assert content.read(stranger) == []
        assert stranger.stats.get("redis.locked_blocks") == len(content.keys)
        assert stranger.stats.get("redis.corrupt_blocks") == 0
        # It is not promised again, nor fetched for nothing.
        assert not any(stranger.contains(content.keys, DEADLINE_S))
        assert stranger.settle(DEADLINE_S)
        stranger.sweep()
    assert content.read(owner) == content.keys


def test_a_value_whose_key_nobody_has_any_more_is_written_over(
    server: EmbeddedServer, make_tier: MakeTier, root: Root, key_file: str, tmp_path: Path
) -> None:
    content = Content(root, 5)
    content.write(make_tier(server.url, encryption_key_file=key_file))
    heir = make_tier(server.url, encryption_key_file=keys_in(tmp_path / "other", 2))
    assert content.read(heir) == []
    assert content.write(heir) == set(content.keys)
    assert content.read(heir) == content.keys
    assert all(heir.contains(content.keys, DEADLINE_S))


def test_keys_change_without_a_miss(
    server: EmbeddedServer, make_tier: MakeTier, root: Root, key_file: str, tmp_path: Path
) -> None:
    steps = [(1,), (1, 2), (2, 1), (2,)]
    tiers = [
        make_tier(server.url, encryption_key_file=keys_in(tmp_path / f"step{number}", *keys))
        for number, keys in enumerate(steps)
    ]
    for number in range(3):  # hosts are a step apart while the change goes on
        for writer, reader in ((number, number + 1), (number + 1, number)):
            content = Content(root, 4, seed=10 * writer + reader)
            assert content.write(tiers[writer]) == set(content.keys)
            assert content.read(tiers[reader]) == content.keys


def test_a_value_that_is_not_sealed_is_a_miss_and_is_removed(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, key_file: str
) -> None:
    content = Content(root, 5)
    content.write(make_tier(server.url))
    tier = make_tier(server.url, encryption_key_file=key_file)
    assert content.read(tier) == []
    assert tier.settle(DEADLINE_S)
    assert everything_in(client) == b""
    assert content.write(tier) == set(content.keys)
    assert content.read(tier) == content.keys


def test_values_moved_under_each_others_names_are_misses(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, key_file: str
) -> None:
    content = Content(root, 4)
    tier = make_tier(server.url, encryption_key_file=key_file)
    content.write(tier)
    one, two = client.get(content.name(2)), client.get(content.name(3))
    client.set(content.name(2), two)
    # Not only moved: made to say that it is the block it stands in for, as somebody without the key could.
    header = frame.unpack(two)
    forged = frame.authenticated(replace(frame.unpack(two), key=frame.unpack(one).key, meta=frame.unpack(one).meta))
    forged = frame.with_checksum(forged + header.meta.tokens + header.meta.extra)
    client.set(content.name(3), one)
    assert content.read(tier) == content.keys[:2]
    assert tier.stats.get("redis.foreign_blocks") == 2
    assert tier.settle(DEADLINE_S)
    content.write(tier)
    client.set(content.name(2), forged + two[frame.measure(two) :])
    assert content.read(tier) == [*content.keys[:2], content.keys[3]]
    assert tier.stats.get("redis.corrupt_blocks") == 1
    assert tier.settle(DEADLINE_S)
    tier.remove(content.keys[3:])


@pytest.mark.parametrize("at", [4, 60, 150, 170, 185, 300, -1])
def test_a_flipped_byte_is_a_miss_and_is_removed(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, key_file: str, at: int
) -> None:
    content = Content(root, 3)
    tier = make_tier(server.url, encryption_key_file=key_file)
    content.write(tier)
    value = bytearray(client.get(content.name(2)))
    value[at] ^= 0x10
    client.set(content.name(2), bytes(value))
    assert content.read(tier) == content.keys[:2]
    assert tier.settle(DEADLINE_S)
    assert client.exists(content.name(2)) == 0


def test_many_writers_with_one_key_never_repeat_a_nonce(
    server: EmbeddedServer, client: redis.Redis, make_tier: MakeTier, root: Root, key_file: str
) -> None:
    tiers = [make_tier(server.url, encryption_key_file=key_file) for _ in range(3)]
    contents = [Content(root, 20, seed=seed) for seed in range(9)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: contents[number].write(tiers[number % 3]), range(9)))
    seals = [frame.unpack(client.get(name)).seal for name in client.scan_iter("*:v:*")]
    assert len(seals) == len(set(seals)) == 180


def test_memory_to_seal_into_is_used_again_by_every_second_group() -> None:
    scratch = Scratch()
    taken = []
    for _ in range(6):
        scratch.turn()
        taken.append([scratch.take(600_000), scratch.take(600_000)])
        assert all(len(piece) == 600_000 for piece in taken[-1])
        for number, piece in enumerate(taken[-1]):
            piece[:] = bytes([number]) * len(piece)
        assert [piece[0] for piece in taken[-1]] == [0, 1]
    assert taken[3][1].obj is taken[5][1].obj
    assert taken[4][1].obj is not taken[5][1].obj


def test_a_key_file_that_cannot_be_used_is_refused_before_anything_is_connected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        RedisTier(RedisTier.Options(url="redis://127.0.0.1:1", encryption_key_file=f"{tmp_path}/none"))


def test_without_the_library_the_setting_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['cryptography'] = sys.modules['cryptography.exceptions'] = None\n"
        "from kvstore.errors import ConfigError\n"
        "from kvstore.tiers.redis import RedisTier\n"
        "RedisTier(RedisTier.Options(url='redis://127.0.0.1:1')).close()\n"
        "try:\n"
        f"    RedisTier(RedisTier.Options(url='redis://127.0.0.1:1', encryption_key_file={os.devnull!r}))\n"
        "except ConfigError as error:\n"
        "    assert 'kvstore[encryption]' in str(error)\n"
        "else:\n"
        "    raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
