# SPDX-License-Identifier: Apache-2.0
"""Rights that change while the server runs: who has others from then on, loses the session it had."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from kvstore.block import ModelId, Root
from kvstore.errors import AccessDenied
from kvstore.service.admin import Admin, Target
from kvstore.service.knock import knock
from kvstore.service.rights import Gate, Rights, Shown
from kvstore.service.server import Server
from kvstore.wire import kvstore_pb2 as pb
from tests.conftest import chain_of, save_all
from tests.fakes import DictTier
from tests.patient import connect
from tests.service.conftest import StartServer
from tests.service.test_servicer import Peer, contents_of, hello, make_peer, refused
from tests.service.victims import Victim
from tests.waiting import eventually

__all__ = ["make_peer"]

ALICE = '[[client]]\ntoken = "alice-alice-alice"\ntenant = "alice"\nsalts = ["alice"]\n'
BOB = '[[client]]\ntoken = "bob-bob-bob-bob-bob"\ntenant = "bob"\nsalts = ["bob"]\n'
ADMIN = '[[client]]\ntoken = "admin-admin-admin"\nadmin = true\n'
MakePeer = Callable[..., Peer]


@pytest.fixture
def tokens(directory: Path) -> Path:
    path = directory / "tokens.toml"
    path.write_text(ALICE + BOB)
    path.chmod(0o600)
    return path


@pytest.fixture
def server(start_server: StartServer, tokens: Path) -> Server:
    return start_server(service={"tokens_file": str(tokens)})


@pytest.fixture
def hold(model: ModelId) -> Callable[[Peer, bytes], None]:
    def work(peer: Peer, salt: bytes) -> None:
        """Save three blocks, and keep them from eviction."""
        chain = chain_of(Root(model, salt=salt), 3)
        peer.save(chain)
        peer.commit(1, 0, 1, 2)
        assert peer.match(peer.whole(chain)).num_blocks == 3

    return work


def watching(peer: Peer) -> Iterator[pb.WatchReply]:
    stream: Iterator[pb.WatchReply] = peer.stub.Watch(pb.WatchRequest(session=peer.session))
    next(stream)
    return stream


def test_a_token_that_is_taken_away_ends_its_sessions_and_what_they_hold_and_watch(
    server: Server, make_peer: MakePeer, tokens: Path, hold: Callable[[Peer, bytes], None], model: ModelId
) -> None:
    alice = make_peer(server, mapped=False, token="alice-alice-alice")
    bob = make_peer(server, mapped=False, token="bob-bob-bob-bob-bob")
    blocks = chain_of(Root(model, salt=b"bob"), 3)
    mapped = make_peer(server, token="bob-bob-bob-bob-bob")
    hold(mapped, b"bob")
    assert bob.match(bob.whole(blocks)).num_blocks == 3
    bobs, alices = watching(bob), watching(alice)
    tokens.write_text(ALICE)
    server.reload_rights()
    assert server.stats()["host.pinned_blocks"] == 0
    for gone in (bob, mapped):
        refused(grpc.StatusCode.UNAUTHENTICATED, lambda gone=gone: gone.match(gone.whole(blocks)))
    refused(grpc.StatusCode.UNAUTHENTICATED, lambda: bobs)
    refused(grpc.StatusCode.PERMISSION_DENIED, lambda: bob.stub.Open(hello(token="bob-bob-bob-bob-bob")))
    assert alice.match(alice.whole(chain_of(Root(model, salt=b"alice"), 3))).num_blocks == 0
    alice.end(requests=["r"])
    alices.cancel()  # type: ignore[attr-defined]


def test_narrower_rights_end_the_session_and_are_what_the_next_one_has(
    server: Server, make_peer: MakePeer, tokens: Path
) -> None:
    make_peer(server, mapped=False, token="alice-alice-alice")
    before = server.sessions.all()
    tokens.write_text(ALICE.replace('["alice"]', '["other"]') + BOB)
    server.reload_rights()
    assert server.sessions.all() == []
    make_peer(server, mapped=False, token="alice-alice-alice")
    (after,) = server.sessions.all()
    assert (before[0].rights.salts, after.rights.salts) == (frozenset({b"alice"}), frozenset({b"other"}))


@pytest.mark.parametrize("said", [ALICE + BOB + "# nothing new\n", "no TOML"])
def test_nobody_notices_a_reload_that_changes_nothing_or_fails(
    server: Server, make_peer: MakePeer, tokens: Path, said: str, hold: Callable[[Peer, bytes], None]
) -> None:
    alice = make_peer(server, token="alice-alice-alice")
    tokens.write_text(said)
    server.reload_rights()
    hold(alice, b"alice")
    alice.end(requests=["r"])


def limited(server: Server, root: Root) -> bool:
    accounts = server._store._host.pool._residents.accounts
    return accounts.room_bytes(accounts.find(root.id)) is not None


def test_a_tenant_that_is_taken_away_limits_no_more_what_its_client_saves(
    server: Server, make_peer: MakePeer, tokens: Path, model: ModelId
) -> None:
    quota, root = ALICE + 'quota = "4KiB"\n', Root(model, salt=b"alice")
    tokens.write_text(quota)
    server.reload_rights()
    alice = make_peer(server, token="alice-alice-alice")
    assert alice.save(chain_of(root, 3)).num_refused == 2
    alice.end(saves=[1])
    looking = make_peer(server)
    looking.match(looking.whole(chain_of(root, 3)))
    looking.end(requests=["r"])
    assert limited(server, root), "who only looks changes nothing"
    tokens.write_text(ALICE.replace('tenant = "alice"\n', ""))
    server.reload_rights()
    alice = make_peer(server, token="alice-alice-alice")
    assert alice.save(chain_of(root, 3)).num_refused == 0
    alice.end(saves=[1])
    assert not limited(server, root)


def test_what_a_load_brings_up_is_charged_to_its_tenant_also_where_its_root_was_forgotten(
    start_server: StartServer, make_peer: MakePeer, tokens: Path, model: ModelId
) -> None:
    tokens.write_text(ALICE + 'quota = "64KiB"\n')
    server = start_server(service={"tokens_file": str(tokens)}, tiers=[DictTier()], mover={"write": "through"})
    alice, chain = make_peer(server, token="alice-alice-alice"), chain_of(Root(model, salt=b"alice"), 3)
    alice.save(chain)
    alice.commit(1, 0, 1, 2)
    assert server.flush(5)
    server.drop_host()
    assert alice.match(alice.whole(chain), wait_ms=5000).num_blocks == 3
    server._store.limit(chain.root.id, "", None)  # as it is once many others were in use
    load = pb.LoadRequest(session=alice.session, request="r", lease=2, contents=contents_of(chain))
    first, *_ = alice.stub.Load(load)
    assert first.num_blocks == 3
    assert limited(server, chain.root)
    alice.end(loads=[2])


@pytest.mark.parametrize("who", ["tenant", "admin"])
def test_what_a_warming_brings_up_is_charged_to_its_tenant_whoever_asks_for_it(
    who: str, start_server: StartServer, make_peer: MakePeer, tokens: Path, model: ModelId
) -> None:
    tokens.write_text(ALICE + 'quota = "64KiB"\n' + ADMIN)
    server = start_server(service={"tokens_file": str(tokens)}, tiers=[DictTier()], mover={"write": "through"})
    alice, chain = make_peer(server, token="alice-alice-alice"), chain_of(Root(model, salt=b"alice"), 3)
    alice.save(chain)
    alice.commit(1, 0, 1, 2)
    assert server.flush(5)
    server.drop_host()
    peer = alice if who == "tenant" else make_peer(server, mapped=False, token="admin-admin-admin")
    said = pb.ChainDelta(chain=1, num_known=3, known_tail=chain.ids[-1]) if who == "tenant" else peer.whole(chain)
    if who == "tenant":
        server._store.limit(chain.root.id, "", None)  # as it is once many others were in use
    asked = pb.WarmRequest(session=peer.session, chain=said, contents=contents_of(chain))
    assert peer.stub.Warm(asked).num_promoted == 3
    assert limited(server, chain.root)


def test_slots_of_a_revoked_process_come_back_only_when_it_is_dead(start_server: StartServer, tokens: Path) -> None:
    tokens.write_text("")
    server = start_server(service={"tokens_file": str(tokens)})
    victim = Victim(server.address, "save", 9)
    assert victim.said() == "under way"
    num_open = server.stats()["host.used_bytes"] // 4096
    assert num_open
    tokens.write_text(f'[[client]]\nuid = {os.getuid()}\nsalts = ["another"]\n')
    server.reload_rights()
    assert server.sessions.all() == []
    assert server.stats()["save.quarantined_slots"] == num_open, "it may be writing to them"
    victim.kill()
    assert eventually(lambda: server.stats()["save.quarantined_slots"] == 0)
    assert not server.sessions._revoked


def test_an_engine_whose_token_is_taken_away_goes_on_without_hits_and_has_them_when_it_is_back(
    server: Server, tokens: Path, model: ModelId
) -> None:
    chain = chain_of(Root(model, salt=b"alice"), 3)
    with connect(server.address, token="alice-alice-alice") as store:
        store.open(model)
        assert save_all(store, chain) == 3
        tokens.write_text(BOB)
        server.reload_rights()
        assert store.match(chain, "r").num_blocks == 0
        store.forget("r")
        tokens.write_text(ALICE + BOB)
        server.reload_rights()

        def finds() -> bool:
            found = store.match(chain, "r").num_blocks
            store.forget("r")
            return found == 3

        assert eventually(finds, 20.0)


def test_the_door_closes_for_users_who_lost_the_memory_and_opens_for_others(server: Server, directory: Path) -> None:
    door, path = server._door, directory / "kvstore.sock"
    assert door is not None
    door.allow(frozenset({os.getuid() + 1}))
    with pytest.raises(AccessDenied, match="may not map this arena"):
        knock(path, 5.0)
    door.allow(frozenset({os.getuid()}))
    knock(path, 5.0).close()


@pytest.mark.parametrize("mapped", [None, False])
def test_a_user_with_limited_rights_works_without_the_map_and_in_its_own_salts_alone(
    server: Server, tokens: Path, model: ModelId, mapped: bool | None
) -> None:
    tokens.write_text(f'[[client]]\nuid = {os.getuid()}\nsalts = ["alice"]\n' + BOB)
    server.reload_rights()
    with connect(server.address, mapped=mapped) as store:
        store.open(model)
        assert save_all(store, chain_of(Root(model, salt=b"alice"), 3)) == 3
        with pytest.raises(AccessDenied):
            store.match(chain_of(Root(model, salt=b"bob"), 3), "r")
        (session,) = server.sessions.all()
        assert (session.mapped, session.shown.uid) == (False, os.getuid())
    with pytest.raises(AccessDenied, match="limited rights here and may not map this arena: connect with mapped=False"):
        connect(server.address, mapped=True)
    with connect(server.address, mapped=mapped, token="bob-bob-bob-bob-bob") as store:
        store.open(model)
        assert save_all(store, chain_of(Root(model, salt=b"bob"), 3)) == 3


@pytest.mark.parametrize(
    ("said", "salts"), [('salts = ["alice"]', frozenset({b"alice"})), ("admin = true", None)], ids=["limited", "admin"]
)
def test_people_are_known_by_their_user_too(
    start_server: StartServer, tokens: Path, said: str, salts: frozenset[bytes] | None
) -> None:
    tokens.write_text(f"[[client]]\nuid = {os.getuid()}\n{said}\n")
    server = start_server(service={"tokens_file": str(tokens), "group": str(os.getgid())})
    with Admin(Target(address=server.address)):
        (session,) = server.sessions.all()
        assert session.rights.salts == salts


def test_the_way_changes_with_the_rights_of_a_client_that_lives_on(
    server: Server, tokens: Path, model: ModelId
) -> None:
    chain = chain_of(Root(model, salt=b"alice"), 3)
    with connect(server.address) as store:
        store.open(model)
        assert save_all(store, chain) == 3
        for said, mapped in ((f'[[client]]\nuid = {os.getuid()}\nsalts = ["alice"]\n', False), (ALICE, True)):
            tokens.write_text(said)
            server.reload_rights()

            def has(mapped: bool = mapped) -> bool:
                return [session.mapped for session in server.sessions.all() if not session.ended] == [mapped]

            assert eventually(has, 20.0)
            assert eventually(lambda: store.match(chain, "r").num_blocks == 3, 20.0)
            store.forget("r")


def silent_stream(peer: Peer, gone: threading.Event) -> Iterator[pb.Notice]:
    """A Session stream on which one beat comes, and then nothing until `gone` is set."""

    def beats() -> Iterator[pb.Beat]:
        yield pb.Beat(session=peer.session)
        gone.wait(30)

    stream: Iterator[pb.Notice] = peer.stub.Session(beats())
    next(stream)
    return stream


@pytest.mark.parametrize("mapped", [False, True])
def test_a_stream_whose_client_says_nothing_more_ends_with_its_session(
    server: Server, make_peer: MakePeer, tokens: Path, mapped: bool
) -> None:
    alice, gone = make_peer(server, mapped=mapped, token="alice-alice-alice"), threading.Event()
    stream = silent_stream(alice, gone)
    tokens.write_text(BOB)
    server.reload_rights()
    refused(grpc.StatusCode.CANCELLED, lambda: stream)
    gone.set()
    assert eventually(lambda: not server.sessions._accounts)


def test_who_says_bye_ends_its_other_streams_and_is_answered_in_order(server: Server, make_peer: MakePeer) -> None:
    alice, gone = make_peer(server, mapped=False, token="alice-alice-alice"), threading.Event()
    stream = silent_stream(alice, gone)
    assert list(alice.stub.Session(iter([pb.Beat(session=alice.session, bye=True)]))) == []
    refused(grpc.StatusCode.CANCELLED, lambda: stream)
    gone.set()


def test_streams_of_a_tenants_last_session_count_for_its_next_one(
    start_server: StartServer, make_peer: MakePeer, tokens: Path, model: ModelId
) -> None:
    server = start_server(service={"tokens_file": str(tokens), "max_streams": 4})
    alice, gone = make_peer(server, mapped=False, token="alice-alice-alice"), threading.Event()

    def nothing_more(lease: int) -> Iterator[pb.WriteRequest]:
        yield pb.WriteRequest(session=alice.session, lease=lease)
        gone.wait(30)

    for lease in (1, 2):
        alice.save(chain_of(Root(model, salt=b"alice"), 2, seed=lease), lease)
    writes = [alice.stub.Write.future(nothing_more(lease)) for lease in (1, 2)]  # type: ignore[attr-defined]
    assert eventually(lambda: server.sessions._accounts["alice"].num_streams == 2)
    (first,) = server.sessions.all()
    server.sessions.leave(first)
    again = make_peer(server, mapped=False, token="alice-alice-alice")
    details = refused(
        grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: again.stub.Watch(pb.WatchRequest(session=again.session))
    )
    assert "the tenant has 2 streams open" in details
    (second,) = server.sessions.all()
    assert first.party == second.party == "alice", "and so do its other calls"
    server.sessions.leave(second)
    gone.set()
    for write in writes:
        write.exception()
    assert eventually(lambda: not server.sessions._accounts), "nothing is kept of a tenant that has nothing here"


def test_a_session_that_ended_by_itself_is_not_revoked_any_more(server: Server, make_peer: MakePeer) -> None:
    make_peer(server, token="alice-alice-alice")
    (session,) = server.sessions.all()
    server.sessions.leave(session)
    server.sessions.revoke(session)
    assert not server.sessions._revoked, "nothing would end it there"


class Overtaken(Gate):
    """Its file is read again between the rights of the first client and its session."""

    num_changes = 1

    def still_gives(self, rights: Rights, shown: Shown) -> bool:
        self.num_changes -= 1
        return self.num_changes < 0 and super().still_gives(rights, shown)


def test_a_client_whose_rights_change_while_it_opens_may_try_again_and_leaves_nothing(
    start_server: StartServer, make_peer: MakePeer
) -> None:
    server = start_server(gate=Overtaken)
    assert "open again" in refused(grpc.StatusCode.UNAVAILABLE, lambda: make_peer(server))
    assert not server.sessions._revoked
    assert server._door is not None
    assert server._door.num_peers == 0
    make_peer(server)
    assert len(server.sessions) == 1
