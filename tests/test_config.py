# SPDX-License-Identifier: Apache-2.0
"""Settings: what wins, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.config import StoreConfig, parse_bytes
from kvstore.errors import ConfigError
from kvstore.registry import Registry
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier


def test_the_environment_wins_over_arguments_and_they_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "kvstore.toml"
    path.write_text('[host]\ncapacity_bytes = "1GiB"\n[mover]\nwrite = "through"\nflush_s = 1\n')
    config = StoreConfig.load(
        {"mover": {"write": "on_evict"}}, path=path, environ={"KVSTORE_HOST__CAPACITY_BYTES": "2 GiB", "HOME": "x"}
    )
    assert config.host.capacity_bytes == 2 << 30
    assert config.mover.write == "on_evict"
    assert config.mover.flush_s == 1.0
    sources = {key: source for key, _, source in config.explain()}
    assert sources["host.capacity_bytes"] == "environment KVSTORE_HOST__CAPACITY_BYTES"
    assert sources["mover.write"] == "argument"
    assert sources["mover.flush_s"] == f"file {path}"
    assert sources["request.hold_s"] == "default"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret-1@cache:6379",
        "redis://:1/secret-1@cache:6379",
        "redis://user:secret-1@secret-2@cache:6379",
        "redis+cluster://u:secret-1@a:1,u:secret-2@b:2",
        "redis://cache:6379?password=secret-1",
    ],
)
def test_explained_settings_hold_no_password(url: str) -> None:
    config = StoreConfig.load({"tiers": {"redis": {"url": url}}}, environ={})
    assert "secret-" not in str(config.explain())


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret/1@cache:6379",
        "redis://user:secret?1@cache:6379",
        "rediss+cluster://u:secret#1@a:1,b:2",
        "unix://u:secret/1@/run/redis.sock",
    ],
)
def test_a_password_that_breaks_its_url_is_named_without_being_told(url: str) -> None:
    with pytest.raises(ConfigError, match="write them as %2F") as raised:
        StoreConfig.load({"tiers": {"redis": {"url": url}}}, environ={})
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://[::1]:6379/0?client_name=a@b",
        "redis://[::1]?client_name=a@b",
        "unix:///run/a@b:c.sock",
        "redis://h?x=@",
    ],
)
def test_an_at_sign_elsewhere_in_a_url_is_no_password(url: str) -> None:
    StoreConfig.load({"tiers": {"redis": {"url": url}}}, environ={})


def test_what_kubernetes_says_of_a_service_called_kvstore_is_no_setting() -> None:
    said = {
        "KVSTORE_SERVICE_HOST": "10.0.0.1",
        "KVSTORE_SERVICE_PORT": "9400",
        "KVSTORE_SERVICE_PORT_GRPC": "9400",
        "KVSTORE_PORT": "tcp://10.0.0.1:9400",
        "KVSTORE_PORT_9400_TCP": "tcp://10.0.0.1:9400",
        "KVSTORE_PORT_9400_TCP_PROTO": "tcp",
    }
    assert StoreConfig.load(environ=said) == StoreConfig()
    with pytest.raises(ConfigError, match="unknown key service.host"):
        StoreConfig.load(environ={"KVSTORE_SERVICE__HOST": "10.0.0.1"})


def test_a_tier_section_becomes_the_tiers_own_options() -> None:
    config = StoreConfig.load({}, environ={"KVSTORE_TIERS__REDIS__URL": "redis://cache:6379"})
    options = config.tiers["redis"]
    assert isinstance(options, RedisTier.Options)
    assert options.url == "redis://cache:6379"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hots": {}}, r"unknown section 'hots' .*known are host, mover, request, service, tiers"),
        (
            {"host": {"capacity": 5}},
            r"unknown key host.capacity \(from argument\): known are capacity_bytes, huge_pages,",
        ),
        ({"host": {"capacity_bytes": "much"}}, "host.capacity_bytes is 'much': give a number of bytes, or a size"),
        ({"host": {"prefault": "perhaps"}}, "host.prefault is 'perhaps': use true or false"),
        ({"host": 5}, "host is 5: it is a section"),
        ({"mover": {"write": "often"}}, "mover.write is 'often': use one of through, on_reuse, on_evict"),
        ({"request": {"hold_s": "soon"}}, "request.hold_s is 'soon': give a number"),
        ({"tiers": {"rediss": {}}}, "unknown tier 'rediss': use one of redis, remote, or 'package.module:Class'"),
        ({"tiers": {"redis": {"uri": "x"}}}, "unknown key tiers.redis.uri"),
        ({"tiers": {"redis": {"num_buckets": 0}}}, "num_buckets is 0"),
        (
            {"tiers": {"redis": {"policy": "priority"}}, "mover": {"tiering": "exclusive"}},
            "tiers.redis.policy priority needs mover.write through or on_reuse, and inclusive tiers",
        ),
        ({"tiers": {"redis": {"policy": "priority"}}, "mover": {"write": "on_evict"}}, "tiers.redis.policy priority"),
    ],
)
def test_a_wrong_setting_is_one_clear_sentence(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StoreConfig.load(values, environ={})


def test_an_unknown_policy_is_named_at_start_with_the_known_ones() -> None:
    config = StoreConfig.load({"host": {"capacity_bytes": 4096, "policy": "magic"}}, environ={})
    with pytest.raises(ConfigError, match="unknown policy 'magic': use one of arc, lru, "):
        KVStore(config)


def test_a_redis_that_does_not_answer_is_named_at_start(caplog: pytest.LogCaptureFixture) -> None:
    values: dict[str, dict[str, object]] = {
        "host": {"capacity_bytes": 1 << 20, "prefault": False},
        "tiers": {"redis": {"url": "redis://127.0.0.1:1"}},
    }
    with KVStore(StoreConfig.load(values, environ={})):
        assert "lower tier does not answer, starting without it" in caplog.text
        assert "127.0.0.1:1" in caplog.text
    values["request"] = {"require_tiers": True}
    with pytest.raises(ConfigError, match=r"lower tier does not answer.*127\.0\.0\.1:1"):
        KVStore(StoreConfig.load(values, environ={}))


def test_a_broken_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read: No such file"):
        StoreConfig.load(path=tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("[host\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML"):
        StoreConfig.load(path=tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1", 1), (7, 7), ("1kB", 1000), ("1KiB", 1024), ("1.5 MiB", 3 << 19), ("2GB", 2 * 10**9), ("1tib", 1 << 40)],
)
def test_sizes_take_suffixes(text: object, num_bytes: int) -> None:
    assert parse_bytes(text, "size") == num_bytes


def test_a_registry_takes_names_from_outside_the_tree() -> None:
    registry: Registry[object] = Registry("thing", {"here": "kvstore.policies.lru:LruPolicy"})
    assert registry.load("tests.fakes:FakeClock").__name__ == "FakeClock"
    with pytest.raises(ConfigError, match="unknown thing 'there': use one of here, or 'package"):
        registry.load("there")
    with pytest.raises(ConfigError, match="module tests.fakes has no class Nothing"):
        registry.load("tests.fakes:Nothing")
    with pytest.raises(ConfigError, match="needs a package that is not installed"):
        registry.load("no_such_package:Thing")
    with pytest.raises(ConfigError, match="unknown option 'x' for thing 'here': known options are none"):
        registry.options("here", {"x": 1})


@pytest.mark.parametrize(
    "setting",
    [
        "tiers.redis.call_timeout_s",
        "tiers.redis.connect_timeout_s",
        "tiers.redis.sweep_every_s",
        "tiers.redis.breaker_open_s",
        "tiers.redis.ping_every_s",
        "tiers.remote.call_timeout_s",
        "mover.write_deadline_s",
        "request.lease_s",
        "service.drain_s",
    ],
)
@pytest.mark.parametrize("seconds", [1e14, -1.0])
def test_a_time_that_nothing_below_could_wait_for_is_refused_in_a_sentence(setting: str, seconds: float) -> None:
    *sections, name = setting.split(".")
    tree: dict[str, object] = {name: seconds}
    for section in reversed(sections):
        tree = {section: {"address": "h:1", **tree} if section == "remote" else tree}
    with pytest.raises(ConfigError, match=rf"{name} is .*: give (seconds|a number)"):
        StoreConfig.load(tree, environ={})


def test_a_tier_made_without_a_file_is_held_to_the_same_times() -> None:
    for seconds in (float("nan"), float("inf"), 0.0):
        with pytest.raises(ConfigError, match="call_timeout_s is .*: give seconds above 0, up to 86400"):
            RedisTier.Options(call_timeout_s=seconds)
    with pytest.raises(ConfigError, match="give at most 315360000 .*ten years"):
        RedisTier.Options(ttl_s=1 << 40)


def test_a_url_of_no_known_kind_names_every_kind_there_is() -> None:
    with pytest.raises(ConfigError) as raised:
        RedisTier(RedisTier.Options(url="http://cache:6379"))
    for kind in ("redis://", "rediss://", "unix://", "redis+cluster://", "redis+sentinel://", "'embedded'"):
        assert kind in str(raised.value)
