# SPDX-License-Identifier: Apache-2.0
"""A user of least rights: what doctor names is what the code says, is enough, and what lacks is named.

That it is enough all other tests here prove: `make_tier` makes tiers as that user.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import redis

import kvstore.tiers
from kvstore.block import Root
from kvstore.errors import TierUnavailable
from kvstore.service.doctor_redis import examine_redis
from kvstore.service.findings import Finding, Verdict
from kvstore.tiers.redis_rights import COMMANDS, COMMANDS_OF_CLUSTERS
from kvstore.tiers.valkey import EmbeddedServer
from tests.redis.conftest import MakeTier
from tests.redis.content import DEADLINE_S, Content
from tests.redis.rights import USER, add_user, as_user

FREE = {"HELLO"}
"""Needs no right."""


def said_in_the_source() -> set[str]:
    """Verbs of commands that the tier makes, by itself and in its scripts; where one has a subcommand, both."""
    said: set[str] = set()
    for path in Path(kvstore.tiers.__path__[0]).glob("redis*.py"):
        text = path.read_text()
        said |= set(re.findall(r"redis\.p?call\(\'([A-Z]+)\'", text))
        said |= set(re.findall(r'(?:pipeline|commands)\("([A-Z]+)"', text))
        said |= set(re.findall(r"\$\d+\\r\\n([A-Z]{3,})\\r", text))
        said |= {"|".join(filter(None, words)) for words in re.findall(r'command\("([A-Z]+)"(?:, "(SLOTS)")?', text)}
    return {verb for verb in said if verb not in FREE}


def test_the_rights_named_are_those_of_the_commands_that_are_made() -> None:
    assert {*COMMANDS, *COMMANDS_OF_CLUSTERS} == {verb.lower() for verb in said_in_the_source()}


def about_user(url: str) -> Finding:
    return next(finding for finding in examine_redis("redis", url) if finding.name == "redis user")


@pytest.mark.parametrize("lacks", ["-zadd", "-exec", "-multi", "-eval", "-info", "-scan", "resetkeys"])
def test_doctor_names_what_a_user_lacks_and_its_rule_is_the_cure(
    lacks: str, own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    url = as_user(own_server.url)
    with redis.Redis.from_url(own_server.url) as client:
        add_user(client)
        assert about_user(url).verdict is Verdict.OK
        client.execute_command("ACL", "SETUSER", USER, lacks)
        found = about_user(url)
        assert found.verdict is Verdict.PROBLEM
        assert found.detail.partition(": ")[2] == lacks[1:] if lacks[0] == "-" else "hsetnx" in found.detail
        assert client.dbsize() == 0  # nothing that was asked about was done
        rules = found.fix.partition("ACL SETUSER kvstore ")[2].partition(", on every node")[0]
        client.execute_command("ACL", "SETUSER", USER, *rules.replace("'>PASSWORD' ", "").split())
    assert about_user(url).verdict is Verdict.OK
    content = Content(root, 5)
    assert content.write(make_tier(url)) == set(content.keys)


def test_the_user_reaches_no_key_of_others(own_server: EmbeddedServer, make_tier: MakeTier, root: Root) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        add_user(client)
        client.set("theirs", "1")
        tier = make_tier(as_user(own_server.url))
        content = Content(root, 5)
        content.write(tier)
        with redis.Redis.from_url(as_user(own_server.url)) as ours:
            for words in (("GET", "theirs"), ("DEL", "theirs"), ("FLUSHALL",), ("KEYS", "*"), ("CONFIG", "GET", "*")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    ours.execute_command(*words)
        tier.clear(None)
        assert client.get("theirs") == b"1"


def test_a_right_that_was_taken_away_costs_its_calls_and_comes_back(
    own_server: EmbeddedServer, make_tier: MakeTier, root: Root
) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        add_user(client)
        tier, content = make_tier(as_user(own_server.url)), Content(root, 5)
        content.write(tier)
        client.execute_command("ACL", "SETUSER", USER, "-get")
        with pytest.raises(TierUnavailable, match="NOPERM"):
            content.read(tier)
        client.execute_command("ACL", "SETUSER", USER, "+get")
        assert content.read(tier) == content.keys
        assert all(tier.contains(content.keys, DEADLINE_S))
