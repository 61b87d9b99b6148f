# SPDX-License-Identifier: Apache-2.0
"""Settings of the sidecar in the one schema: where they come from, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstore.config import StoreConfig
from kvstore.errors import ConfigError
from kvstore.service_options import ServiceOptions, default_address, socket_path


def test_flags_win_over_the_environment_and_it_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "kvstore.toml"
    path.write_text('[service]\nlisten = "unix:/run/a.sock"\nmax_streams = 3\nallowed_uids = [1000, 1001]\n')
    environ = {"KVSTORE_SERVICE__LISTEN": "unix:/run/b.sock", "KVSTORE_SERVICE__MAX_STREAMS": "4"}
    flags = {"service": {"listen": "unix:/run/c.sock"}}
    config = StoreConfig.load(path=path, environ=environ, flags=flags)
    assert config.service.listen == "unix:/run/c.sock"
    assert config.service.max_streams == 4
    assert config.service.allowed_uids == (1000, 1001)
    assert config.sources["service.listen"] == "command line"
    assert config.sources["service.max_streams"] == "environment KVSTORE_SERVICE__MAX_STREAMS"
    assert config.sources["service.allowed_uids"] == f"file {path}"


def test_a_list_takes_values_with_commas_between() -> None:
    config = StoreConfig.load(environ={"KVSTORE_SERVICE__ALLOWED_UIDS": "1000, 1001"})
    assert config.service.allowed_uids == (1000, 1001)
    assert StoreConfig.load(environ={"KVSTORE_SERVICE__ALLOWED_UIDS": ""}).service.allowed_uids == ()


def test_what_the_environment_tells_clients_is_no_setting() -> None:
    environ = {"KVSTORE_ADDRESS": "unix:/x", "KVSTORE_TOKEN": "secret", "KVSTORE_TLS_CA": "/ca"}
    assert StoreConfig.load(environ=environ).sources == {}
    with pytest.raises(ConfigError, match="unknown section 'adress'"):
        StoreConfig.load(environ={"KVSTORE_ADRESS": "unix:/x"})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lisen": "x"}, "unknown key service.lisen .*known are allowed_uids, client_ca, drain_s"),
        ({"listen": "unix:relative"}, "'unix:relative': give unix:PATH with an absolute path"),
        ({"listen": "unix:/" + "x" * 102}, "of at most 102 bytes"),
        ({"listen": "somewhere"}, "is 'somewhere': give unix:PATH or host:port"),
        ({"listen_tcp": "host:99999"}, "service.listen_tcp is 'host:99999'"),
        ({"metrics_listen": "9400"}, "service.metrics_listen is '9400'"),
        ({"allowed_uids": "root"}, "service.allowed_uids is 'root': give a whole number"),
        ({"allowed_uids": 5}, "service.allowed_uids is 5: give a list"),
        ({"tls_cert": "/c.pem"}, "service.tls_key is empty: TLS needs both"),
        ({"client_ca": "/c.pem"}, "service.client_ca is set without TLS"),
        ({"log_format": "xml"}, "service.log_format is 'xml': use one of text, json"),
        ({"max_streams": 0}, "service.max_streams is 0: it must be at least 1"),
    ],
)
def test_a_wrong_setting_is_one_clear_sentence(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StoreConfig.load({"service": values}, environ={})


def test_the_default_socket_is_this_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_address() == f"unix:{tmp_path}/kvstore.sock"
    for useless in ("", "relative", str(tmp_path / "gone")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", useless)
        assert default_address() == f"unix:/tmp/kvstore-{os.getuid()}/kvstore.sock"


def test_addresses_are_told_apart() -> None:
    assert socket_path("unix:/run/k.sock") == Path("/run/k.sock")
    assert socket_path("[::1]:9400") is None
    for unclear in ("::1:9400", "[localhost]:9400", "[]:9400"):
        with pytest.raises(ConfigError, match="give unix:PATH or host:port"):
            socket_path(unclear)
    options = ServiceOptions(listen="unix:/run/k.sock", listen_tcp="0.0.0.0:9400")
    assert options.tcp_addresses == ("0.0.0.0:9400",)
    assert ServiceOptions(listen="h:1", listen_tcp="h:2").tcp_addresses == ("h:1", "h:2")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:s3cret@cache:6379/0", "redis://me:***@cache:6379/0"),
        ("rediss://:s3cr:et@cache", "rediss://:***@cache"),
        ("unix:///run/r.sock?password=s3cret&db=1", "unix:///run/r.sock?password=***&db=1"),
        ("redis://cache:6379", "redis://cache:6379"),
    ],
)
def test_no_explanation_of_the_settings_shows_a_password(url: str, shown: str) -> None:
    config = StoreConfig.load({"tiers": {"redis": {"url": url}}}, environ={})
    assert {key: value for key, value, _ in config.explain()}["tiers.redis.url"] == shown
