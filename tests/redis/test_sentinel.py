# SPDX-License-Identifier: Apache-2.0
"""A primary that dies or is demoted, and Sentinels that know the new one: the tier follows them."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress

import pytest

from kvstore.block import Root
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, TierError
from kvstore.service.doctor_redis import TierSettings, examine_redis
from kvstore.service.findings import Verdict
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_sentinel import Sentinels
from tests.redis.cluster import until
from tests.redis.conftest import MakeTier
from tests.redis.content import Content
from tests.redis.pair import BACK_WITHIN_S, Pair, works
from tests.waiting import timed

# ── by Sentinels ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_hits_come_back_by_themselves_after_the_primary_was_killed(pair: Pair, make_tier: MakeTier, root: Root) -> None:
    url = pair.watch()
    tier = make_tier(url, breaker_open_s=0.1)
    content = Content(root, 20)
    assert content.write(tier) == set(content.keys)
    pair.replicated()
    pair.primary.kill()
    with pytest.raises(TierError):
        content.read(tier)
    until(lambda: pair.replica.client.role()[0] == b"master", BACK_WITHIN_S)

    def hits() -> bool:  # of what was written before the kill
        with suppress(TierError):
            return content.read(tier) == content.keys
        return False

    until(hits, BACK_WITHIN_S)
    assert tier.stats.get("redis.available") == 1
    works(tier, Content(root, 30))
    (pair.sentinels[0]).kill()  # one Sentinel less is none too few, and the first of the URL at that
    works(make_tier(url, breaker_open_s=0.1), Content(root, 5, seed=1))


@pytest.mark.slow
def test_a_switch_on_request_costs_a_refusal_and_no_wrong_byte(pair: Pair, make_tier: MakeTier, root: Root) -> None:
    tier = make_tier(pair.watch(), breaker_open_s=0.05)
    content = Content(root, 20)
    content.write(tier)
    pair.replicated()
    stop = threading.Event()
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                for call in (content.write, content.read):
                    with suppress(TierError):
                        call(tier)  # reading holds each block against what was written
        except BaseException as error:
            wrong.append(error)
            raise

    thread = threading.Thread(target=work)
    thread.start()
    try:
        pair.sentinels[0].client.execute_command("SENTINEL", "FAILOVER", "cache")
        until(lambda: pair.primary.client.role()[0] == b"slave", BACK_WITHIN_S)
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    works(tier, content)
    assert pair.replica.client.dbsize() > 20
    assert tier.sweep()["damaged"] == 0


@pytest.mark.alone
@pytest.mark.slow
def test_hung_sentinels_cost_the_deadline_and_no_more(pair: Pair, make_tier: MakeTier, root: Root) -> None:
    url = pair.watch()
    for sentinel in pair.sentinels:
        os.kill(sentinel.process.pid, signal.SIGSTOP)
    limits = {"connect_timeout_s": 1.0, "call_timeout_s": 5.0}
    tier = make_tier(url, healthy=False, breaker_open_s=30.0, **limits)
    with timed() as took, pytest.raises(TierError):
        tier.contains(Content(root, 2).keys, 1.0)
    assert took.awake_s < 1.9
    for sentinel in pair.sentinels[1:]:
        os.kill(sentinel.process.pid, signal.SIGCONT)
    assert not any(make_tier(url, **limits).contains(Content(root, 2).keys, 2.0))  # the first still hangs
    assert next(examine_redis("redis", url, TierSettings(capacity_bytes=1 << 20))).verdict is Verdict.OK


# ── URLs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_url_names_sentinels_service_database_and_both_passwords() -> None:
    found = Sentinels.of(
        "rediss+sentinel://me:pw@a:26379,b:26380/cache/2?ssl_ca_certs=/ca.pem&sentinel_username=s&sentinel_password=p@q"
    )
    assert found is not None
    assert found.service == "cache"
    assert found.server_url == "rediss://me:pw@a:26379/2?ssl_ca_certs=%2Fca.pem"
    assert found._urls == [f"rediss://s:p%40q@{at}?ssl_ca_certs=%2Fca.pem" for at in ("a:26379", "b:26380")]
    assert Sentinels.of("redis://a:1/0") is None


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://a:26379",
        "redis+sentinel://a:26379/",
        "redis+sentinel://a/cache",
        "redis+sentinel://:1/cache",
        "redis+sentinel://a:1/cache/x",
    ],
)
def test_a_url_without_service_or_ports_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        RedisTier(RedisTier.Options(url=url))


def test_passwords_of_sentinels_are_not_shown() -> None:
    url = "redis+sentinel://me:s3cret@a:1/cache?sentinel_password=s3cret&db=1"
    config = StoreConfig.load({"tiers": {"redis": {"url": url}}}, environ={})
    assert "a:1/cache" in str(config.explain())
    assert "s3cret" not in str(config.explain())
