# SPDX-License-Identifier: Apache-2.0
"""Servers that answer and refuse the work: said once, shown for as long as it is so, and loads go on where they may."""

from __future__ import annotations

import logging

import pytest
import redis

from kvstore.block import Root
from kvstore.errors import TierUnavailable
from kvstore.service.doctor_redis import examine_redis
from kvstore.service.findings import Verdict
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.valkey import EmbeddedServer, ServerOptions
from tests.ports import free_ports
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.redis.rights import USER, add_user, as_user
from tests.waiting import eventually, wait_until

pytestmark = pytest.mark.slow  # as long as a probe takes to notice that rights have changed

SOON = {"ping_every_s": 0.05, "breaker_open_s": 0.05}
PROBES_S = 0.5
"""Ten probes and pings: who is not steady has changed by then."""


def set_rights(server: EmbeddedServer, *rules: str) -> None:
    with redis.Redis.from_url(server.url) as client:
        add_user(client)
        client.execute_command("ACL", "SETUSER", USER, *rules)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def stays(tier: RedisTier, gauge: str, value: float) -> bool:
    """Whatever is called meanwhile."""
    return not eventually(lambda: tier.stats.get(f"redis.{gauge}") != value, PROBES_S)


@pytest.mark.parametrize("rules", [("-@all", "+@read", "+ping", "+info"), ("-eval", "-zmscore", "-zscore")])
def test_who_may_only_read_loads_and_is_shown_as_one_who_may_not_write_until_it_may(
    rules: tuple[str, ...],
    own_server: EmbeddedServer,
    make_tier: MakeTier,
    root: Root,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "kvstore.tiers.redis")
    content = Content(root, 3)
    content.write(make_tier(own_server.url))
    set_rights(own_server, *rules)
    caplog.clear()
    tier = make_tier(as_user(own_server.url), healthy=False, **SOON)
    wait_until(lambda: tier.stats.get("redis.may_write") == 0)  # and nobody has written
    for _ in range(3):
        with pytest.raises(TierUnavailable, match="NOPERM"):
            content.write(tier)
        assert content.read(tier) == content.keys
        assert all(tier.contains(content.keys, DEADLINE_S))
    with pytest.raises(TierUnavailable, match="NOPERM"):
        tier.check()
    assert stays(tier, "may_write", 0)
    assert tier.stats.get("redis.available") == 1
    told = [each for each in warnings_of(caplog) if "maxmemory" not in each]
    assert len(told) == 1
    assert "NOPERM" in told[0]
    set_rights(own_server)
    wait_until(lambda: tier.stats.get("redis.may_write") == 1, 15)
    assert content.write(tier) == set(content.keys)
    assert tier.check() == []


def test_a_right_to_write_that_is_taken_away_is_noticed_by_the_write(
    own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    set_rights(own_server)
    tier, content = make_tier(as_user(own_server.url), healthy=False, **SOON), Content(root, 3)
    content.write(tier)
    assert tier.settle(DEADLINE_S)
    set_rights(own_server, "-eval")
    with pytest.raises(TierUnavailable, match="NOPERM"):
        Content(root, 5).write(tier)
    assert tier.stats.get("redis.may_write") == 0
    assert stays(tier, "available", 1)
    assert content.read(tier) == content.keys


def test_who_may_not_read_finds_the_server_off_until_it_may(
    own_server: EmbeddedServer, make_tier: MakeTier, root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstore.tiers.redis")
    set_rights(own_server, "-get")
    tier = make_tier(as_user(own_server.url), healthy=False, **SOON)
    wait_until(lambda: tier.stats.get("redis.available") == 0)  # and nobody has asked
    assert stays(tier, "available", 0)
    assert len(warnings_of(caplog)) == 1
    assert "NOPERM" in warnings_of(caplog)[0]
    set_rights(own_server)
    wait_until(lambda: tier.stats.get("redis.available") == 1)
    back = next(record for record in caplog.records if "answers again (it was off for" in record.message)
    assert back.levelno == logging.INFO
    content = Content(root, 3)
    assert content.write(tier) == set(content.keys)


def test_a_right_to_read_that_is_taken_away_turns_it_off_for_good(
    own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    set_rights(own_server)
    tier, content = make_tier(as_user(own_server.url), healthy=False, **SOON), Content(root, 3)
    content.write(tier)
    assert tier.settle(DEADLINE_S)
    set_rights(own_server, "-get")
    with pytest.raises(TierUnavailable, match="NOPERM"):
        content.read(tier)
    assert stays(tier, "available", 0)
    set_rights(own_server)
    wait_until(lambda: tier.stats.get("redis.available") == 1)
    assert content.read(tier) == content.keys


def test_a_server_that_is_no_cluster_is_off_with_one_line_and_doctor_has_the_fix(
    make_tier: MakeTier, root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    (port,) = free_ports(1)
    url = f"redis+cluster://127.0.0.1:{port}"
    with EmbeddedServer(ServerOptions(port=port)):
        tier = make_tier(url, healthy=False, **SOON)
        wait_until(lambda: tier.stats.get("redis.available") == 0)
        assert stays(tier, "available", 0)
        with pytest.raises(TierUnavailable, match="cluster support disabled"):
            tier.contains(Content(root, 1).keys, DEADLINE_S)
        assert len(warnings_of(caplog)) == 1
        (found,) = examine_redis("redis", url)
    assert found.verdict is Verdict.PROBLEM
    assert found.fix == "this server is no Cluster: use redis://"


def test_a_password_that_lacks_or_is_wrong_is_what_doctor_says(own_server: EmbeddedServer, make_tier: MakeTier) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("requirepass", "right")
        (found,) = examine_redis("redis", own_server.url)
        (other,) = examine_redis("redis", f"{own_server.url}?password=wrong")
        tier = make_tier(own_server.url, healthy=False, **SOON)
        wait_until(lambda: tier.stats.get("redis.available") == 0)
        assert stays(tier, "available", 0)
        client.config_set("requirepass", "")
        wait_until(lambda: tier.stats.get("redis.available") == 1)
    assert (found.verdict, other.verdict) == (Verdict.PROBLEM, Verdict.PROBLEM)
    assert found.fix == "the server wants a password: put it into the URL"
    assert "no such user or password" in other.fix
