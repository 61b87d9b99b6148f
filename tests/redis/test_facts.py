# SPDX-License-Identifier: Apache-2.0
"""What servers say about themselves, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvstore.errors import TierError
from kvstore.tiers.redis_facts import ServerFacts
from kvstore.tiers.redis_nodes import Talk
from kvstore.tiers.redis_wire import Reply, ReplyError


class _TwoNodes(Talk):
    """Conversations with two nodes that answer what they are told to."""

    def __init__(self, answers: list[Reply | ReplyError]) -> None:
        self.answers = answers

    def places(self, deadline: float) -> list[int]:
        return [0, 1]

    def ask(self, commands: Sequence[bytes], deadline: float, place: int | None = None) -> list[Reply | ReplyError]:
        assert place is not None
        return [self.answers[place] for _ in commands]


def test_a_limit_heard_of_one_node_while_another_is_away_is_used_and_not_kept() -> None:
    info = b"maxmemory:1000000\r\nmem_allocator:jemalloc\r\nmaxmemory_policy:noeviction\r\n"
    away = ReplyError("UNREACHABLE it is away")
    server = ServerFacts(0)
    talk = _TwoNodes([info, away])
    assert server.facts(talk, 0.0).capacity_bytes == 800_000
    talk.answers = [info, info]
    assert server.facts(talk, 0.0).capacity_bytes == 1_600_000
    talk.answers = [away, info]
    assert server.ask(talk, 0.0).capacity_bytes == 1_600_000
    talk.answers = [away, away]
    with pytest.raises(TierError):
        server.ask(talk, 0.0)
