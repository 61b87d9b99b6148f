# SPDX-License-Identifier: Apache-2.0
"""The settings in `deploy/` are what `doctor` asks for, and a server starts with them."""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kvstore.config import StoreConfig
from kvstore.service.doctor_redis import TierSettings, examine_redis
from kvstore.service.findings import Verdict
from kvstore.tiers.valkey import embedded_binary
from tests.ports import free_ports
from tests.redis.cluster import until
from tests.redis.conftest import SERVERS, binary_of

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(params=SERVERS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    binary = binary_of(request.param) or embedded_binary()
    with subprocess.Popen(
        [binary, DEPLOY / "valkey.conf", "--port", str(port), "--bind", "127.0.0.1", "--dir", tmp_path],
        stdout=subprocess.DEVNULL,
    ) as server:
        with redis.Redis(port=port) as client:
            until(lambda: bool(client.ping()))
        yield f"redis://127.0.0.1:{port}/0"
        server.kill()


def verdicts(url: str, capacity_bytes: int = 0) -> dict[str, Verdict]:
    """What doctor says, but for what is well."""
    found = examine_redis("redis", url, TierSettings(capacity_bytes=capacity_bytes))
    return {finding.name: finding.verdict for finding in found if finding.verdict is not Verdict.OK}


def test_a_server_with_the_settings_of_deploy_is_well_set_up_for_doctor(url: str) -> None:
    assert verdicts(url) == {}
    details = {finding.name: finding.detail for finding in examine_redis("redis", url)}
    assert list(details) == ["redis", "redis maxmemory", "redis user", "redis accounts", "redis clock"]
    assert "12.80 GiB of it for blocks" in details["redis maxmemory"]
    with redis.Redis.from_url(url) as client:
        assert client.config_get("save")["save"] == ""


def test_doctor_finds_each_setting_of_deploy_that_was_changed(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.config_set("maxmemory", "1gb")
        assert verdicts(url, 1 << 30) == {"redis maxmemory": Verdict.PROBLEM}
        client.config_set("maxmemory", "0")
        assert verdicts(url, 1 << 30) == {"redis maxmemory": Verdict.NOTE}
        assert verdicts(url) == {"redis maxmemory": Verdict.PROBLEM}


@pytest.mark.parametrize(
    ("setting", "value", "cure"),
    [("min-replicas-to-write", "1", "its replicas"), ("maxmemory", "1mb", "what fills it")],
)
def test_doctor_says_why_a_server_takes_no_writes(setting: str, value: str, cure: str, url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.config_set(setting, value)
        (found,) = (each for each in examine_redis("redis", url) if each.verdict is not Verdict.OK)
        assert (found.name, cure in found.fix) == ("redis writes", True)
        assert client.keys() == []


def test_the_settings_file_of_the_sidecar_is_accepted() -> None:
    values = tomllib.loads((DEPLOY / "kvstore.toml").read_text())
    config = StoreConfig.load(values, environ={})
    assert "redis" in config.tiers
