# SPDX-License-Identifier: Apache-2.0
"""`kvstore doctor`: each fault is one line with its fix, on real sockets and real Redis servers."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from kvstore.block import ModelId, Root
from kvstore.config import StoreConfig
from kvstore.service.admin import Target
from kvstore.service.doctor import examine
from kvstore.service.doctor_redis import Running, about_clock, examine_tiers
from kvstore.service.findings import Finding, Verdict
from kvstore.service.server import Server
from kvstore.service.top import tiers_away
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_look import Look
from kvstore.tiers.redis_look import Server as RedisServer
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import chain_of
from tests.patient import connect
from tests.redis.rights import USER, add_user, as_user
from tests.waiting import wait_until


def findings_of(tmp_path: Path, values: dict[str, object] | None = None) -> dict[str, Finding]:
    """What doctor finds where no server runs."""
    config = StoreConfig.load({"host": {"capacity_bytes": "1MiB"}, **(values or {})}, environ={})
    found = list(examine(config, Target(address=f"unix:{tmp_path}/k.sock", deadline_s=2.0)))
    assert len({finding.name for finding in found}) == len(found)
    assert all(finding.fix for finding in found if finding.verdict is Verdict.PROBLEM)
    return {finding.name: finding for finding in found}


def problems(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.verdict is Verdict.PROBLEM}


@pytest.fixture
def valkey() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


def test_without_a_server_the_rest_is_checked_all_the_same(tmp_path: Path) -> None:
    found = findings_of(tmp_path)
    assert problems(found) == {"socket", "server"}
    assert "does not exist" in found["socket"].detail
    assert "no server answers at" in found["server"].detail
    assert found["hashing"].verdict is not Verdict.PROBLEM
    assert {"memory", "cgroup memory limit"} <= found.keys()
    assert found["redis"].verdict is Verdict.NOTE


def test_before_the_first_start_a_missing_server_is_no_problem(tmp_path: Path) -> None:
    config = StoreConfig.load({"host": {"capacity_bytes": "1MiB"}}, environ={})
    target = Target(address=f"unix:{tmp_path}/k.sock", deadline_s=2.0)
    found = {finding.name: finding for finding in examine(config, target, expected=False)}
    assert problems(found) == set()
    assert "none yet" in found["server"].detail
    (tmp_path / "k.sock").write_text("")
    found = {finding.name: finding for finding in examine(config, target, expected=False)}
    assert problems(found) == {"socket", "server"}, "something is there, and does not answer"


def test_of_another_host_nothing_is_said_that_is_not_known(tmp_path: Path) -> None:
    config = StoreConfig.load({"host": {"capacity_bytes": "1MiB"}}, environ={})
    found = {each.name: each for each in examine(config, Target(address="127.0.0.1:1", deadline_s=2.0))}
    assert "rights" not in found
    assert found["redis"].detail.startswith("not checked")


def test_what_tiers_a_dead_server_had_is_not_guessed(tmp_path: Path) -> None:
    found = findings_of(tmp_path)["redis"]
    assert found.verdict is Verdict.NOTE
    assert found.detail.startswith("not checked")
    assert found.fix == "give the server's --config or --redis-url"


def test_a_socket_left_by_a_killed_server_is_told_from_a_missing_one(tmp_path: Path) -> None:
    for name, kind in (("k.sock", socket.SOCK_STREAM), ("k.sock.door", socket.SOCK_SEQPACKET)):
        with socket.socket(socket.AF_UNIX, kind) as dead:
            dead.bind(f"{tmp_path}/{name}")
        (tmp_path / name).chmod(0o600)
    found = findings_of(tmp_path)["socket"]
    assert found.verdict is Verdict.PROBLEM
    assert "Connection refused" in found.detail
    assert "a server that was killed left the socket behind" in found.fix


def test_a_socket_that_every_user_may_open_is_a_problem(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"{tmp_path}/k.sock")
        listener.listen()
        (tmp_path / "k.sock").chmod(0o666)
        assert "open to every user" in findings_of(tmp_path)["socket"].detail


def test_a_file_in_the_place_of_the_socket_is_named(tmp_path: Path) -> None:
    (tmp_path / "k.sock").write_text("")
    assert "is no socket" in findings_of(tmp_path)["socket"].detail


def test_a_server_that_does_not_answer_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"{tmp_path}/k.sock")
        listener.listen()
        found = findings_of(tmp_path)["server"]
    assert found.verdict is Verdict.PROBLEM
    assert "did not answer within 2 s" in found.detail


@pytest.mark.redis
def test_a_redis_that_is_set_up_well_is_ok_and_one_without_a_limit_is_not(
    tmp_path: Path, valkey: EmbeddedServer
) -> None:
    values: dict[str, object] = {"tiers": {"redis": {"url": valkey.url}}}
    found = findings_of(tmp_path, values)
    assert "valkey" in found["redis"].detail
    assert found["redis"].verdict is Verdict.OK
    assert "has no limit" in found["redis maxmemory"].detail
    with redis.Redis.from_url(valkey.url) as client:
        client.config_set("maxmemory", "64mb")
    assert problems(findings_of(tmp_path, values)) == {"socket", "server"}
    values["tiers"] = {"redis": {"url": valkey.url, "capacity_bytes": "60MiB"}}
    found = findings_of(tmp_path, values)
    assert "less than 1.25 times" in found["redis maxmemory"].detail
    fix = re.search(r"maxmemory (\d+)mb", found["redis maxmemory"].fix)
    assert fix is not None
    with redis.Redis.from_url(valkey.url) as client:
        client.config_set("maxmemory", fix[0].split()[1])
    assert findings_of(tmp_path, values)["redis maxmemory"].verdict is Verdict.OK
    with redis.Redis.from_url(valkey.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    found = findings_of(tmp_path, values)
    assert "allkeys-lru: the server itself tears holes into chains" in found["redis maxmemory-policy"].detail
    assert "CONFIG SET maxmemory-policy noeviction" in found["redis maxmemory-policy"].fix


@pytest.mark.redis
def test_a_redis_without_a_limit_is_enough_where_the_tier_has_one(tmp_path: Path, valkey: EmbeddedServer) -> None:
    values: dict[str, object] = {"tiers": {"redis": {"url": valkey.url, "capacity_bytes": "64MiB"}}}
    assert problems(findings_of(tmp_path, values)) == {"socket", "server"}


@pytest.mark.redis
def test_keys_of_another_program_in_the_accounts_have_a_line_of_their_own(
    tmp_path: Path, valkey: EmbeddedServer
) -> None:
    values: dict[str, object] = {"tiers": {"redis": {"url": valkey.url, "capacity_bytes": "64MiB"}}}
    assert findings_of(tmp_path, values)["redis accounts"].verdict is Verdict.OK
    with redis.Redis.from_url(valkey.url) as client:
        for stripe in (0, 3, 5, 7):
            client.rpush(f"kvs2:{{{stripe:03d}}}:r", "somebody else's")
        client.set("kvs2:{001}:0123456789abcdef:b", "hello")
        found = findings_of(tmp_path, values)["redis accounts"]
        assert client.dbsize() == 5  # looked at, not mended
    assert found.verdict is Verdict.PROBLEM
    assert "kvs2:{000}:r holds a list" in found.detail
    assert "and 2 more" in found.detail
    assert "another database" in found.fix


@pytest.mark.redis
def test_a_running_server_tells_how_many_foreign_keys_it_has_taken_away(
    tmp_path: Path, valkey: EmbeddedServer, start_server: Callable[..., Server], model: ModelId
) -> None:
    tier = RedisTier(RedisTier.Options(url=valkey.url, capacity_bytes=64 << 20))
    server = start_server(tiers=[tier], mover={"write": "through"})
    with redis.Redis.from_url(valkey.url) as client, connect(server.address) as store:
        for stripe in range(16):
            client.set(f"kvs2:{{{stripe:03d}}}:r", "hello")
        store.open(model)
        chain = chain_of(Root(model), 8)
        with store.save(chain, 0, 8) as save:
            save.commit()
        wait_until(lambda: server.stats().get("redis.foreign_books") == 16)
    config = StoreConfig.load({"tiers": {"redis": {"url": valkey.url}}}, environ={})
    found = {each.name: each for each in examine(config, Target(address=server.address))}
    assert "16 were taken away" in found["redis accounts"].detail


@pytest.mark.parametrize(
    ("ahead_s", "ttl_s", "verdict"),
    [
        (0.0, 1000, Verdict.OK),
        (-59.0, 1000, Verdict.OK),
        (-61.0, 1000, Verdict.NOTE),
        (90_000.0, 1000, Verdict.NOTE),
        (-499.0, 1000, Verdict.NOTE),
        (-500.0, 1000, Verdict.PROBLEM),
        (-90_000.0, 0, Verdict.NOTE),
    ],
)
def test_a_clock_whose_correction_would_end_all_values_is_a_problem(
    ahead_s: float, ttl_s: int, verdict: Verdict
) -> None:
    servers = tuple(RedisServer("valkey", "9.0", 0, "noeviction", 0, each) for each in (0.1, ahead_s, -0.2))
    found = about_clock("redis clock", Look(servers, True, 0.001), ttl_s)
    assert found.verdict is verdict
    assert bool(found.fix) is (verdict is not Verdict.OK)


@pytest.mark.redis
def test_doctor_says_whether_values_are_sealed_and_with_which_key(tmp_path: Path, valkey: EmbeddedServer) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{'ab' * 32}\n{'cd' * 32}\n")
    keys.chmod(0o600)
    values: dict[str, object] = {"tiers": {"redis": {"url": valkey.url, "encryption_key_file": str(keys)}}}
    detail = findings_of(tmp_path, values)["redis encryption"].detail
    assert re.search(r"on: key [0-9a-f]{16} seals, 1 more", detail)
    assert "abab" not in detail
    keys.chmod(0o640)
    found = findings_of(tmp_path, values)["redis encryption"]
    assert found.verdict is Verdict.PROBLEM
    assert "chmod 600" in found.detail
    clear: dict[str, object] = {"tiers": {"redis": {"url": valkey.url}}}
    assert "in the clear" in findings_of(tmp_path, clear)["redis encryption"].detail


def test_a_redis_that_is_not_there_is_a_problem_and_no_password_is_shown(tmp_path: Path) -> None:
    found = findings_of(tmp_path, {"tiers": {"redis": {"url": "redis://me:s3cret@127.0.0.1:1"}}})
    assert "redis" in problems(found)
    assert "does not answer" in found["redis"].detail
    assert not any("s3cret" in finding.detail + finding.fix for finding in found.values())


def test_unsafe_rights_are_a_problem_before_the_server_is_started(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("")
    tokens.chmod(0o644)
    assert "chmod 600" in findings_of(tmp_path, {"service": {"tokens_file": str(tokens)}})["rights"].detail
    tokens.chmod(0o600)
    found = findings_of(tmp_path, {"service": {"tokens_file": str(tokens)}})["rights"]
    assert found.detail == f"Unix socket only; clients of {tokens}"
    naked = {"service": {"listen": "0.0.0.0:1"}}
    assert "without TLS" in findings_of(tmp_path, naked)["rights"].detail
    naked["service"]["serve_anyone_on_the_network_without_authentication"] = "true"
    assert "serves anyone" in findings_of(tmp_path, naked)["rights"].detail


@pytest.mark.skipif(os.geteuid() == 0, reason="root may lock as much memory as it likes")
def test_a_limit_on_locked_memory_is_a_problem_only_where_memory_is_to_be_locked(tmp_path: Path) -> None:
    values: dict[str, object] = {"host": {"capacity_bytes": "1TiB"}, "service": {"pin_memory": True}}
    assert "locked memory limit" in problems(findings_of(tmp_path, values))


def test_a_host_with_too_little_memory_is_a_problem_before_the_server_is_started(tmp_path: Path) -> None:
    found = findings_of(tmp_path, {"host": {"capacity_bytes": "900TiB"}})
    assert "memory" in problems(found)
    assert "lower host.capacity_bytes" in found["memory"].fix


def test_a_redis_that_we_reach_and_the_running_server_does_not_is_a_problem(valkey: EmbeddedServer) -> None:
    config = StoreConfig.load({}, environ={})

    def seen(url: str, available: float) -> dict[str, Finding]:
        running = Running(settings={"tiers.redis.url": url}, values={"redis.available": available})
        return {finding.name: finding for finding in examine_tiers(config, running)}

    assert "redis of the server" not in seen(valkey.url, 1.0)
    told = seen(valkey.url, 0.0)["redis of the server"]
    assert told.verdict is Verdict.PROBLEM
    assert "the running server gets no answer from it" in told.detail
    assert problems(seen("redis://127.0.0.1:1", 0.0)) == {"redis"}  # one cause, one line
    hidden = seen("redis://:***@127.0.0.1:1", 0.0)  # then what the server says is all there is
    assert problems(hidden) == {"redis of the server"}


@pytest.mark.redis
@pytest.mark.parametrize(
    ("rules", "away"), [(("-@all", "+@read", "+ping", "+info"), []), (("-@all", "+ping", "+info"), ["redis"])]
)
def test_doctor_at_a_running_server_says_what_its_user_lacks(
    rules: tuple[str, ...], away: list[str], valkey: EmbeddedServer, start_server: Callable[..., Server]
) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        add_user(client)
        client.execute_command("ACL", "SETUSER", USER, *rules)
    server = start_server(
        tiers=[RedisTier(RedisTier.Options(url=as_user(valkey.url), ping_every_s=0.05, breaker_open_s=0.05))]
    )
    wait_until(lambda: not all(server.stats().get(f"redis.{each}") for each in ("available", "may_write")))
    assert tiers_away(server.stats()) == away
    found: dict[str, Finding] = {}
    config = StoreConfig.load({"tiers": {"redis": {"url": "redis://:***@elsewhere"}}}, environ={})
    for each in examine(config, Target(address=server.address)):
        found[each.name] = each
    told = found["redis of the server"]
    assert told.verdict is Verdict.PROBLEM
    assert "NOPERM" in told.detail
    assert "ACL SETUSER kvstore on" in told.fix
    assert "+eval" in told.fix
    with redis.Redis.from_url(valkey.url) as client:
        add_user(client)
    wait_until(lambda: server.stats()["redis.available"] == 1 and server.check() == [], 15)
