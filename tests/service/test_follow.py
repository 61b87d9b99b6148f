# SPDX-License-Identifier: Apache-2.0
"""Following a server's blocks over what happens to servers: none is missed without a word."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest

from kvstore.block import ModelId, Root
from kvstore.errors import AccessDenied, ServiceUnavailable
from kvstore.events import EventLog
from kvstore.service import kv_events
from kvstore.service.admin import Admin, Target
from kvstore.service.follow import follow
from kvstore.service.rights import FULL, Shown
from kvstore.service.roots import RootBook
from kvstore.service.server import Server
from kvstore.service.session import Session
from kvstore.service.watch import Watch
from kvstore.wire import kvstore_pb2 as pb
from tests.conftest import chain_of, save_all
from tests.patient import connect
from tests.service.conftest import ServerProcess, StartServer
from tests.waiting import wait_until

FOLLOWER = "follower-follower"


def soon(seconds: float) -> None:
    time.sleep(min(seconds, 0.05))


def save(address: str, root: Root, num_blocks: int, seed: int = 0, token: str = "") -> None:
    with connect(address, token=token) as store:
        store.open(root.model)
        assert save_all(store, chain_of(root, num_blocks, seed=seed)) == num_blocks


def telling(replies: Iterator[pb.WatchReply]) -> Iterator[str]:
    """What replies with anything to tell say, and of how many blocks."""
    for reply in replies:
        if reply.gap:
            yield "gap"
        if reply.events:
            yield f"{sum(len(event.ids) // 32 for event in reply.events)} blocks"
        if reply.snapshot_done:
            yield "whole"


def kinds(told: Iterator[str], count: int) -> list[str]:
    return list(islice(told, count))


@pytest.mark.parametrize("snapshot", [True, False])
def test_a_server_that_was_killed_and_started_again_is_followed_on_after_a_gap(
    start_process: Callable[..., ServerProcess], root: Root, snapshot: bool
) -> None:
    process, said = start_process(), list[str]()
    with Admin(Target(address=process.address)) as admin:
        replies = follow(admin, snapshot=snapshot, with_tokens=False, say=said.append, sleep=soon)
        with closing(replies):
            next(replies)
            told = telling(replies)
            assert not snapshot or kinds(told, 1) == ["whole"]
            save(process.address, root, 2)
            assert kinds(told, 1) == ["2 blocks"]
            process.kill()
            process.start()
            save(process.address, root, 3)
            if snapshot:
                assert kinds(told, 3) == ["gap", "3 blocks", "whole"]
            else:
                assert kinds(told, 1) == ["gap"]
                save(process.address, root, 1, seed=1)
                assert kinds(told, 1)[0].endswith("blocks")
    lost, back = said
    assert lost.startswith(f"lost the server at {process.address} (")
    assert back == f"the server at {process.address} is back"


def test_a_session_that_ended_is_opened_again_and_nothing_is_missed_or_told_twice(
    start_server: StartServer, root: Root
) -> None:
    server, said = start_server(), list[str]()
    target = Target(address=server.address)
    with (
        Admin(target, name="keeper") as keeper,
        Admin(target, name="follower") as admin,
        closing(keeper.watch(snapshot=False, with_tokens=False)) as kept,
        closing(follow(admin, snapshot=True, with_tokens=False, say=said.append, sleep=soon)) as replies,
    ):
        next(kept)
        told = telling(replies)
        assert kinds(told, 1) == ["whole"]
        for number in range(1, 4):
            end_session(server, "follower")
            save(server.address, root, number, seed=number)
            assert kinds(told, 1) == [f"{number} blocks"]
    assert len(said) == 6


TOKENS = """
[[client]]
token = "keeper-keeper-keeper"
admin = true
[[client]]
token = "follower-follower"
salts = ["alice"]
"""


@pytest.mark.parametrize(("before", "after"), [('["alice"]', '["alice", "bob"]'), ('["alice", "bob"]', '["alice"]')])
def test_a_place_under_other_rights_is_none_and_what_may_be_seen_now_comes_after_a_gap(
    start_server: StartServer, directory: Path, model: ModelId, before: str, after: str
) -> None:
    tokens = directory / "tokens.toml"
    tokens.write_text(TOKENS.replace('["alice"]', before))
    tokens.chmod(0o600)
    server = start_server(service={"tokens_file": str(tokens)})
    keeper, follower = (Target(address=server.address, token=name) for name in ("keeper-keeper-keeper", FOLLOWER))
    with (
        Admin(keeper) as keeping,
        Admin(follower) as admin,
        closing(keeping.watch(snapshot=False, with_tokens=False)) as kept,
        closing(follow(admin, snapshot=True, with_tokens=False, say=lambda _: None, sleep=soon)) as replies,
    ):
        next(kept)
        told = telling(replies)
        assert kinds(told, 1) == ["whole"]
        save(server.address, Root(model, salt=b"bob"), 3)
        save(server.address, Root(model, salt=b"alice"), 1)
        assert kinds(told, 1)[0].endswith("blocks")
        tokens.write_text(TOKENS.replace('["alice"]', after))
        server.reload_rights()
        while kinds(told, 1) != ["gap"]:
            assert "bob" in before, "only what was under way may come before it"
        assert kinds(told, 2) == ["4 blocks" if "bob" in after else "1 blocks", "whole"]


def test_where_the_server_forgets_whose_blocks_some_are_a_gap_is_told(
    start_server: StartServer, directory: Path, model: ModelId
) -> None:
    tokens, root = directory / "tokens.toml", Root(model, salt=b"alice")
    tokens.write_text(TOKENS + '[[client]]\ntoken = "carol-carol-carol"\ntenant = "carol"\nsalts = ["alice"]\n')
    tokens.chmod(0o600)
    server = start_server(service={"tokens_file": str(tokens)})
    with (
        Admin(Target(address=server.address, token=FOLLOWER)) as admin,
        closing(follow(admin, snapshot=True, with_tokens=False, say=lambda _: None, sleep=soon)) as replies,
    ):
        told = telling(replies)
        assert kinds(told, 1) == ["whole"]
        save(server.address, root, 2, token="carol-carol-carol")
        assert kinds(told, 1) == ["2 blocks"]
        tokens.write_text(TOKENS)
        server.reload_rights()
        save(server.address, root, 3, seed=1)
        assert kinds(told, 1) == ["gap"]


def end_session(server: Server, name: str) -> None:
    for session in server.sessions.all():
        if session.name == name:
            server.sessions.leave(session)


class Breaks(Admin):
    """Its first watch breaks when a part of the snapshot was told: a real one is sent ahead of who reads it."""

    def watch(self, **options: Any) -> Iterator[pb.WatchReply]:
        whole = super().watch(**options)
        if self.num_watches:
            return whole
        self.num_watches = 1
        return self._half(whole)

    num_watches = 0

    def _half(self, whole: Iterator[pb.WatchReply]) -> Iterator[pb.WatchReply]:
        for reply in whole:
            yield reply
            if reply.events:
                raise ServiceUnavailable("it broke")


def test_half_a_snapshot_is_given_up_with_a_gap(start_server: StartServer, root: Root) -> None:
    server = start_server(4096)
    for seed in range(4):
        save(server.address, root, 1000, seed)
    with (
        Breaks(Target(address=server.address), name="follower") as admin,
        closing(follow(admin, snapshot=True, with_tokens=False, say=lambda _: None, sleep=soon)) as replies,
    ):
        told = list(takewhile(lambda each: each != "whole", telling(replies)))
    assert told[1] == "gap"
    assert sum(int(each.split()[0]) for each in told[2:]) == 4000


def test_a_right_that_was_taken_away_ends_it(start_server: StartServer, directory: Path) -> None:
    tokens = directory / "tokens.toml"
    tokens.write_text('[[client]]\ntoken = "alice-alice-alice"\n')
    tokens.chmod(0o600)
    server = start_server(service={"tokens_file": str(tokens)})
    with Admin(Target(address=server.address, token="alice-alice-alice")) as admin:
        told = telling(follow(admin, snapshot=True, with_tokens=False, say=lambda _: None, sleep=soon))
        assert kinds(told, 1) == ["whole"]
        tokens.write_text("")
        server.reload_rights()
        with pytest.raises(AccessDenied, match="the access token is not known here"):
            kinds(told, 1)


def test_published_events_go_on_with_all_cleared_and_what_is_there_after_a_restart(
    start_process: Callable[..., ServerProcess], root: Root
) -> None:
    process = start_process()
    with Admin(Target(address=process.address)) as admin:

        def watch() -> Iterator[pb.WatchReply]:
            return follow(admin, snapshot=True, with_tokens=True, say=lambda _: None, sleep=soon)

        batches = kv_events.told(watch)  # type: ignore[arg-type]
        save(process.address, root, 2)
        assert [event["type"] for event in next(batches)] == ["BlockStored"]
        process.kill()
        process.start()
        save(process.address, root, 3)
        assert [event["type"] for event in next(batches)] == ["AllBlocksCleared"]
        (event,) = next(batches)
        assert (event["type"], len(event["block_hashes"])) == ("BlockStored", 3)


class Asking:
    """A call whose client waits."""

    def is_active(self) -> bool:
        return True


def test_watchers_are_woken_for_a_gap_as_well(start_server: StartServer, model: ModelId) -> None:
    log = EventLog(start_server()._store._host.pool, max_roots=1)
    watch = Watch(log, RootBook(), bytes(16))
    session = Session(b"", b"", 1, "", 0, None, Shown(), FULL, 0.0, 0.0)
    replies = watch.watch(session, pb.WatchRequest(), Asking())  # type: ignore[arg-type]
    next(replies)
    told: list[pb.WatchReply] = []
    asking = threading.Thread(target=lambda: told.extend(replies))
    asking.start()
    try:
        wait_until(lambda: log._num_waiting == 1)
        log.cleared(Root(model, salt=b"a").id)
        wait_until(lambda: watch._pulses[0] == 1 and log._num_waiting == 1)
        log.cleared(Root(model, salt=b"b").id)
        wait_until(lambda: watch._pulses[0] == 2)
    finally:
        watch.close()
        asking.join()
    assert [(len(reply.events), reply.gap) for reply in told][:2] == [(1, False), (0, True)]
