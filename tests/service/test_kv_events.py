# SPDX-License-Identifier: Apache-2.0
"""Block events in vLLM's format; that vLLM itself reads them is seen in `tests/engines`."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from kvstore.errors import ConfigError
from kvstore.service import kv_events
from kvstore.wire import kvstore_pb2 as pb

ROOT, PARENT = b"r" * 32, b"p" * 32
HASHES = [b"a" * 32, b"b" * 32]


def stored(*, depth: int = 1, tier: str = "host") -> pb.BlockEvent:
    return pb.BlockEvent(
        kind=pb.BlockEvent.STORED,
        tier=tier,
        root=ROOT,
        ids=b"".join(HASHES),
        parent=PARENT if depth else ROOT,
        depth=depth,
        tokens=np.arange(32, dtype="<u4").tobytes(),
    )


def told(*starts: list[pb.WatchReply]) -> list[list[dict[str, Any]]]:
    """What is told where each watch begins anew with the next of `starts`."""
    left = list(starts)
    return list(kv_events.told(lambda: iter_closable(left.pop(0))))


def iter_closable(replies: list[pb.WatchReply]) -> Generator[pb.WatchReply]:
    yield from replies


def test_stored_blocks_have_vllms_fields() -> None:
    assert told([pb.WatchReply(events=[stored()]), pb.WatchReply(snapshot_done=True)]) == [
        [
            {
                "type": "BlockStored",
                "block_hashes": HASHES,
                "parent_block_hash": PARENT,
                "token_ids": list(range(32)),
                "block_size": 16,
                "lora_id": None,
                "lora_name": None,
                "medium": "CPU",
                "locality": "LOCAL",
                "ownership": "host",
            }
        ]
    ]


def test_a_first_block_has_no_parent_and_a_lower_tier_is_storage() -> None:
    ((event,),) = told([pb.WatchReply(events=[stored(depth=0, tier="redis")])])
    assert event["parent_block_hash"] is None
    assert (event["medium"], event["locality"], event["ownership"]) == ("STORAGE", "REMOTE", "redis")


def test_removed_blocks_are_named() -> None:
    event = pb.BlockEvent(kind=pb.BlockEvent.REMOVED, tier="host", root=ROOT, ids=HASHES[1])
    ((removed,),) = told([pb.WatchReply(events=[event])])
    assert (removed["type"], removed["block_hashes"], removed["medium"]) == ("BlockRemoved", [HASHES[1]], "CPU")


@pytest.mark.parametrize(
    "lost",
    [
        pb.WatchReply(gap=True),
        pb.WatchReply(events=[stored(), pb.BlockEvent(kind=pb.BlockEvent.CLEARED, tier="host", root=ROOT)]),
    ],
    ids=["gap", "cleared"],
)
def test_what_vllm_cannot_say_is_told_as_all_cleared_and_what_is_there_anew(lost: pb.WatchReply) -> None:
    after = pb.WatchReply(events=[stored()])
    batches = told([lost, pb.WatchReply(events=[stored(depth=5)])], [after])
    assert [[event["type"] for event in batch] for batch in batches] == [["AllBlocksCleared"], ["BlockStored"]]
    assert batches[1][0]["parent_block_hash"] == PARENT


def test_without_the_packages_it_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "msgspec", None)
    with pytest.raises(ConfigError, match=r"with its extra \[events\]"):
        kv_events.publish("tcp://127.0.0.1:1", "t", lambda: iter_closable([]))
