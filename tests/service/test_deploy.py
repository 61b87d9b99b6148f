# SPDX-License-Identifier: Apache-2.0
"""The files in deploy/ name settings, flags and paths that exist, and fit together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from kvstore.config import StoreConfig
from kvstore.tiers.redis import RedisTier

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


def everything_of(path: Path) -> str:
    """The example with what is commented out put in: it must be right as well."""
    return re.sub(r"^# (?=\w+ = )", "", path.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("commented", [False, True])
def test_the_example_settings_are_accepted(tmp_path: Path, commented: bool) -> None:
    text = (DEPLOY / "kvstore.toml").read_text()
    path = tmp_path / "kvstore.toml"
    path.write_text(everything_of(DEPLOY / "kvstore.toml") if commented else text)
    config = StoreConfig.load(path=path, environ={})
    assert config.host.capacity_bytes == 32 << 30
    redis = config.tiers["redis"]
    assert isinstance(redis, RedisTier.Options)
    assert redis.codec == ("lz4" if commented else "raw")
    assert bool(config.service.tcp_addresses) is commented


def test_the_unit_starts_the_server_where_its_settings_say() -> None:
    unit = (DEPLOY / "kvstore.service").read_text()
    settings = tomllib.loads((DEPLOY / "kvstore.toml").read_text())
    assert "Type=notify" in unit
    assert re.search(r"^ExecStart=\S+/kvstore serve --config /etc/kvstore/kvstore\.toml$", unit, re.MULTILINE)
    assert re.search(r"^RuntimeDirectory=kvstore$", unit, re.MULTILINE)
    assert settings["service"]["listen"].startswith("unix:/run/kvstore/")
    stop_s = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop_s is not None
    config = StoreConfig.load(settings, environ={})
    assert float(stop_s[1]) > config.service.drain_s + config.mover.flush_s


def test_the_container_sets_what_exists() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    named = dict(re.findall(r"\b(KVSTORE_\w+)=(\S+)", text))
    assert "KVSTORE_ADDRESS" in named
    config = StoreConfig.load(environ=named)
    assert config.service.listen == named["KVSTORE_ADDRESS"]
    assert config.host.capacity_bytes == 32 << 30
