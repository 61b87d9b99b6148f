# SPDX-License-Identifier: Apache-2.0
"""What a request's parameters say to eviction: read whole, or left out and said."""

from __future__ import annotations

import logging

import pytest

from connectors.hints import hint_of, read_hint
from kvstore.api import NO_HINT, Hint, Retention
from kvstore.errors import ConfigError


def test_everything_that_can_be_said_arrives() -> None:
    given = {
        "conversation": "chat-17",
        "turn": 3,
        "closed": True,
        "priority": 0,
        "ttl_s": 600,
        "retention": [{"start": 0, "stop": 2048, "priority": 100, "duration_s": 3600}, {"priority": 10}],
    }
    assert hint_of({"kvstore": given, "do_remote_prefill": False}, prompt_tokens=7) == Hint(
        conversation="chat-17",
        turn=3,
        prompt_tokens=7,
        priority=0,
        ttl_s=600.0,
        closed=True,
        retention=(Retention(0, 2048, 100, 3600.0), Retention(0, None, 10)),
    )


@pytest.mark.parametrize("parameters", [None, {}, {"do_remote_prefill": True}, {"kvstore": None}])
def test_without_any_there_is_only_the_length(parameters: dict[str, object] | None) -> None:
    assert hint_of(parameters, prompt_tokens=7) == Hint(prompt_tokens=7, priority=NO_HINT.priority)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([], "give an object"),
        ({"prio": 3}, "known are conversation"),
        ({"priority": 101}, "hint.priority is 101"),
        ({"priority": "high"}, "give a whole number"),
        ({"priority": -1}, "give a whole number"),
        ({"turn": True}, "give a whole number"),
        ({"ttl_s": float("nan")}, "hint.ttl_s is nan"),
        ({"ttl_s": "soon"}, "give seconds"),
        ({"closed": 1}, "give true or false"),
        ({"conversation": "x" * 1025}, "at most 1024 characters"),
        ({"retention": [{"priority": 5}] * 65}, "at most 64 ranges"),
        ({"retention": "all"}, "at most 64 ranges"),
        ({"retention": [{"from": 1}]}, "known are start"),
        ({"retention": [{"start": 9, "stop": 3}]}, "tokens 9…3"),
        ({"retention": [{"priority": 200}]}, "retention.priority is 200"),
        ({"retention": [{"duration_s": float("inf")}]}, "retention.duration_s is inf"),
    ],
)
def test_what_cannot_be_read_is_named_and_costs_only_the_hint(
    given: object, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_hint(given)
    with caplog.at_level(logging.WARNING, logger="kvstore.connector"):
        assert hint_of({"kvstore": given}) == NO_HINT
        assert hint_of({"kvstore": given}) == NO_HINT
    assert len(caplog.records) <= 1
