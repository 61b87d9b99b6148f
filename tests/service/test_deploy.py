# SPDX-License-Identifier: Apache-2.0
"""The files in deploy/ name settings, flags and paths that exist, and fit together."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
import yaml  # type: ignore[import-untyped]

from kvstore.config import StoreConfig
from kvstore.service.admin import Target
from kvstore.service.doctor import examine
from kvstore.service.findings import Finding, Verdict
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import embedded_binary
from tests.waiting import wait_until

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
    assert redis.codec == ("raw" if commented else "auto")
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


# ── compose.yaml and valkey.conf, against what doctor checks ─────────────────────────────────────────────────────

Compose = dict[str, Any]
"""As YAML gives it."""


@pytest.fixture
def compose() -> Compose:
    parsed: Compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return parsed


def bytes_of(text: str) -> int:
    """`20g` of compose, `16gb` of valkey.conf."""
    found = re.fullmatch(r"(\d+)([mg])b?", text)
    assert found is not None, text
    return int(found[1]) << {"m": 20, "g": 30}[found[2]]


def directives() -> dict[str, str]:
    lines = (line.split(None, 1) for line in (DEPLOY / "valkey.conf").read_text().splitlines())
    return {words[0]: words[1] for words in lines if len(words) == 2 and not words[0].startswith("#")}


def marked() -> set[str]:
    """Directives whose note begins with a star: those that doctor is said to check."""
    text = (DEPLOY / "valkey.conf").read_text()
    return set(re.findall(r"^# \* .*\n(?:# .*\n)*([a-z-]+) ", text, re.MULTILINE))


@contextmanager
def server_of(compose: Compose, binary: Path, tmp_path: Path, *more: str) -> Iterator[str]:
    """The server as compose starts it, but for where it listens; gives its URL."""
    name, conf, *settings = compose["services"]["valkey"]["command"]
    assert (name, conf) == ("valkey-server", "/etc/valkey/valkey.conf")
    where = ("--port", "0", "--unixsocket", f"{tmp_path}/s", "--dir", str(tmp_path), "--logfile", f"{tmp_path}/log")
    with subprocess.Popen([binary, DEPLOY / "valkey.conf", *settings, *where, *more]) as process:
        try:
            wait_until((tmp_path / "s").exists)
            yield f"unix://{tmp_path}/s"
        finally:
            process.terminate()


def findings_about(url: str, tmp_path: Path, capacity_bytes: int = 0) -> dict[str, Finding]:
    """What doctor says of that server alone."""
    tier = {"url": url, "capacity_bytes": capacity_bytes}
    config = StoreConfig.load({"host": {"capacity_bytes": "1MiB"}, "tiers": {"redis": tier}}, environ={})
    found = examine(config, Target(address=f"unix:{tmp_path}/none.sock", deadline_s=2.0))
    return {finding.name: finding for finding in found if finding.name.startswith("redis")}


def problems(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.verdict is Verdict.PROBLEM}


@pytest.mark.redis
@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_a_server_with_these_settings_starts_and_doctor_finds_nothing_wrong(
    kind: str, compose: Compose, tmp_path: Path
) -> None:
    found = shutil.which("redis-server")
    if kind == "redis" and found is None:
        pytest.skip("NOT TESTED AGAINST REDIS: no redis-server here; apt-get install redis-server")
    binary = Path(found or "") if kind == "redis" else embedded_binary()
    with server_of(compose, binary, tmp_path) as url:
        seen = findings_about(url, tmp_path)
        assert problems(seen) == set()
        assert kind in seen["redis"].detail
        with redis.Redis.from_url(url) as client:
            assert client.config_get("maxmemory") == {"maxmemory": str(bytes_of(directives()["maxmemory"]))}
            assert client.config_get("save") == {"save": ""}
            assert client.config_get("appendonly") == {"appendonly": "no"}


@pytest.mark.redis
def test_doctor_checks_what_the_notes_mark_and_by_the_factor_they_name(compose: Compose, tmp_path: Path) -> None:
    spoilt = {"maxmemory": "0", "maxmemory-policy": "allkeys-lru"}
    assert marked() == spoilt.keys()
    assert "1.25 times" in (DEPLOY / "valkey.conf").read_text()
    maxmemory_bytes = bytes_of(directives()["maxmemory"])
    with server_of(compose, embedded_binary(), tmp_path) as url:
        fits = maxmemory_bytes * 4 // 5
        assert problems(findings_about(url, tmp_path, fits)) == set()
        assert problems(findings_about(url, tmp_path, fits + (1 << 20))) == {"redis maxmemory"}
        with redis.Redis.from_url(url) as client:
            for name, value in spoilt.items():
                client.config_set(name, value)
                assert problems(findings_about(url, tmp_path)) == {f"redis {name}"}
                client.config_set(name, directives()[name])


@pytest.mark.redis
def test_the_user_of_the_notes_is_the_one_that_doctor_asks_for(compose: Compose, tmp_path: Path) -> None:
    rule = re.search(r"^# (user kvstore on >PASSWORD .*)$", (DEPLOY / "valkey.conf").read_text(), re.MULTILINE)
    assert rule is not None
    with server_of(compose, embedded_binary(), tmp_path, *f"--{rule[1]}".split()) as url:
        seen = findings_about(f"{url}?username=kvstore&password=PASSWORD", tmp_path)
        assert problems(seen) == set()
        assert seen["redis user"].detail.endswith(rule[1].partition(">PASSWORD ")[2])
        assert problems(findings_about(f"{url}?username=kvstore&password=wrong", tmp_path)) == {"redis"}


def test_compose_names_images_files_and_paths_that_fit_together(compose: Compose) -> None:
    server, sidecar = compose["services"]["valkey"], compose["services"]["kvstore"]
    assert re.fullmatch(r"docker\.io/valkey/valkey:9", server["image"])
    build = sidecar["build"]
    assert ((DEPLOY / build["context"]).resolve() / build["dockerfile"]).samefile(DEPLOY / "Containerfile")
    mounts = [mount.split(":") for mount in server["volumes"]]
    assert [(DEPLOY / source).samefile(DEPLOY / "valkey.conf") for source, _, _ in mounts] == [True]
    assert [where for _, where, _ in mounts] == [server["command"][1]]
    named = dict(mount.split(":") for mount in sidecar["volumes"])
    assert named.keys() == compose["volumes"].keys()
    listen = re.search(r"KVSTORE_SERVICE__LISTEN=unix:(\S+)", (DEPLOY / "Containerfile").read_text())
    assert listen is not None
    assert str(Path(listen[1]).parent) in named.values()
    for name, wanted in sidecar["depends_on"].items():
        assert wanted == {"condition": "service_healthy"}
        assert compose["services"][name]["healthcheck"]["test"]
    assert "entrypoint" not in sidecar
    assert "command" not in sidecar  # the container serves by itself


def test_compose_sets_the_sidecar_as_doctor_wants_it(compose: Compose) -> None:
    server, sidecar = compose["services"]["valkey"], compose["services"]["kvstore"]
    assert all(name.startswith("KVSTORE_") for name in sidecar["environment"])
    config = StoreConfig.load(environ=sidecar["environment"])  # an unknown key would be an error
    set_here = {key for key, source in config.sources.items() if "KVSTORE_" in source}
    assert set_here == {"host.capacity_bytes", "tiers.redis.url"}
    tier = config.tiers["redis"]
    assert isinstance(tier, RedisTier.Options)
    assert urlsplit(tier.url).hostname in compose["services"]
    assert urlsplit(tier.url).port == int(directives().get("port", "6379"))
    # Memory that is locked for pinning has a limit of its own; that of /dev/shm does not matter for a memfd.
    assert sidecar["ulimits"] == {"memlock": -1}
    assert sidecar["pid"] == "host"
    assert not {"shm_size", "ipc"} & sidecar.keys()
    assert bytes_of(sidecar["mem_limit"]) * 4 >= config.host.capacity_bytes * 5
    # The budget for blocks is four fifths of maxmemory, unless it is given: then maxmemory follows from it.
    maxmemory_bytes = bytes_of(directives()["maxmemory"])
    assert maxmemory_bytes * 4 >= (tier.capacity_bytes or maxmemory_bytes * 4 // 5) * 5
    assert bytes_of(server["mem_limit"]) * 4 >= maxmemory_bytes * 5


def test_the_notes_name_settings_of_ours_that_exist(compose: Compose) -> None:
    text = "".join((DEPLOY / name).read_text() for name in ("valkey.conf", "compose.yaml", "Containerfile"))
    options = RedisTier.Options.__dataclass_fields__.keys()
    assert set(re.findall(r"tiers\.redis\.(\w+)", text)) <= options
    assert set(re.findall(r"\b(num_buckets)\b", text)) <= options
    prefixes = {name.rpartition("__")[2].lower() for name in re.findall(r"KVSTORE_TIERS__REDIS__\w+", text)}
    assert prefixes <= options
