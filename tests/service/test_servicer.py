# SPDX-License-Identifier: Apache-2.0
"""The calls themselves: what a client of another make may send, and what it learns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.block import FORMAT_VERSION, Chain, ModelId, Root
from kvstore.service.handshake import hash_vector, model_message
from kvstore.service.knock import knock
from kvstore.service.saves import ServedSave
from kvstore.service.server import Server
from kvstore.service.session import Session
from kvstore.wire import kvstore_pb2 as pb
from kvstore.wire.kvstore_pb2_grpc import KVStoreStub
from tests.conftest import chain_of
from tests.fakes import DictTier, FakeClock
from tests.service.conftest import StartServer
from tests.waiting import eventually, wait_until


@dataclass
class Peer:
    """A client that says what a test tells it to."""

    stub: KVStoreStub
    session: bytes
    model: int
    opened: pb.OpenReply

    def whole(self, chain: Chain, number: int = 1, *, root: Root | None = None) -> pb.ChainDelta:
        of = root or chain.root
        message = pb.Root(model=self.model, adapter=of.adapter, salt=of.salt, id=of.id)
        return pb.ChainDelta(chain=number, ids=b"".join(chain.ids), root=message)

    def match(self, delta: pb.ChainDelta, request: str = "r", **fields: Any) -> pb.MatchReply:
        return self.stub.Match(pb.MatchRequest(session=self.session, request=request, chain=delta, **fields))

    def save(self, blocks: Chain, lease: int = 1, **fields: Any) -> pb.SaveReply:
        whole = {"start": 0, "stop": len(blocks), "contents": contents_of(blocks), "chain": self.whole(blocks)}
        values = {**whole, **fields}
        return self.stub.Save(pb.SaveRequest(session=self.session, lease=lease, **values))

    def commit(self, lease: int, *indices: int) -> list[int]:
        packed = np.array(indices, "<u4").tobytes()
        reply = self.stub.Commit(pb.CommitRequest(session=self.session, lease=lease, indices=packed))
        return np.frombuffer(reply.published, "<u4").tolist()

    def end(self, **ended: Any) -> None:
        packed = {name: np.array(value, "<u8").tobytes() for name, value in ended.items() if name != "requests"}
        message = pb.Ended(**packed, requests=ended.get("requests", ()))
        self.stub.Release(pb.ReleaseRequest(session=self.session, ended=message))


def contents_of(chain: Chain) -> pb.Contents:
    return pb.Contents(start=0, tokens=chain.contents(0, len(chain))[0])


def hello(**fields: Any) -> pb.OpenRequest:
    values = {"protocol_versions": [1], "format_version": FORMAT_VERSION, "hash_vector": hash_vector(), **fields}
    return pb.OpenRequest(**values)


@pytest.fixture
def make_peer(model: ModelId) -> Iterator[Callable[..., Peer]]:
    """Makes clients of a server; `mapped` ones pass the door."""
    channels: list[grpc.Channel] = []

    def make(server: Server, *, mapped: bool = True, token: str = "") -> Peer:
        channel = grpc.insecure_channel(server.address, options=(("grpc.use_local_subchannel_pool", 1),))
        channels.append(channel)
        stub = KVStoreStub(channel)
        ticket = b""
        if mapped:
            with knock(server.address.removeprefix("unix:"), 5.0) as passed:
                ticket = passed.ticket
        opened = stub.Open(hello(ticket=ticket, token=token))
        request = pb.OpenModelRequest(session=opened.session, model=model_message(model), digest=model.digest())
        number = stub.OpenModel(request).model
        return Peer(stub, opened.session, number, opened)

    yield make
    for channel in channels:
        channel.close()


@pytest.fixture
def peer(start_server: StartServer, make_peer: Callable[..., Peer]) -> Peer:
    return make_peer(start_server())


def _all_of(result: object) -> None:
    if isinstance(result, Iterator):
        for _ in result:
            pass


def refused(code: grpc.StatusCode, call: Callable[[], object]) -> str:
    """The details of the status that a call must fail with."""
    with pytest.raises(grpc.RpcError) as caught:
        _all_of(call())
    assert caught.value.code() is code, caught.value.details()
    return str(caught.value.details())


# -- sessions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "details"),
    [
        ({"protocol_versions": [7, 8]}, "FAILED_PRECONDITION", "speaks protocol versions [1], the client [7, 8]"),
        ({"format_version": 9}, "FAILED_PRECONDITION", "keeps blocks in format 1, the client in 9"),
        ({"hash_vector": b"other"}, "FAILED_PRECONDITION", "hashes blocks to other ids"),
        ({"ticket": b"x" * 16}, "PERMISSION_DENIED", "the ticket is unknown, used or too old"),
        ({"token": "unknown"}, "PERMISSION_DENIED", "access token is not known"),
        ({"client_name": "x" * 300}, "INVALID_ARGUMENT", "client_name has 300"),
    ],
)
def test_a_handshake_that_does_not_fit_says_why(peer: Peer, fields: dict[str, Any], code: str, details: str) -> None:
    assert details in refused(grpc.StatusCode[code], lambda: peer.stub.Open(hello(**fields)))


def test_a_ticket_is_good_for_one_session(start_server: StartServer, peer: Peer, directory: Path) -> None:
    with knock(directory / "kvstore.sock", 5.0) as passed:
        peer.stub.Open(hello(ticket=passed.ticket))
        refused(grpc.StatusCode.PERMISSION_DENIED, lambda: peer.stub.Open(hello(ticket=passed.ticket)))


def test_every_call_of_an_unknown_session_is_unauthenticated(peer: Peer, root: Root) -> None:
    stranger = replace(peer, session=b"0" * 16)
    session = {"session": stranger.session}
    calls: list[Callable[[], object]] = [
        lambda: stranger.match(peer.whole(chain_of(root, 2))),
        lambda: stranger.save(chain_of(root, 2)),
        lambda: stranger.commit(1, 0),
        lambda: stranger.end(loads=[1]),
        lambda: peer.stub.OpenModel(pb.OpenModelRequest(**session)),
        lambda: peer.stub.MatchPartial(pb.MatchPartialRequest(**session)),
        lambda: peer.stub.Announce(pb.AnnounceRequest(**session)),
        lambda: peer.stub.Touch(pb.TouchRequest(**session)),
        lambda: peer.stub.Join(pb.JoinRequest(**session)),
        lambda: peer.stub.LoadHost(pb.LoadRequest(**session)),
        lambda: peer.stub.Load(pb.LoadRequest(**session)),
        lambda: peer.stub.Read(pb.LoadRequest(**session)),
        lambda: peer.stub.Peek(pb.PeekRequest(**session)),
        lambda: peer.stub.Fetch(pb.PeekRequest(**session)),
        lambda: peer.stub.Watch(pb.WatchRequest(**session)),
        lambda: peer.stub.Stats(pb.StatsRequest(**session)),
        lambda: peer.stub.Inspect(pb.InspectRequest(**session)),
        lambda: peer.stub.Clear(pb.ClearRequest(**session)),
        lambda: peer.stub.Warm(pb.WarmRequest(**session)),
        lambda: peer.stub.Check(pb.CheckRequest(**session)),
        lambda: peer.stub.Session(iter([pb.Beat(**session)])),
        lambda: peer.stub.Write(iter([pb.WriteRequest(**session, lease=1)])),
    ]
    for call in calls:
        assert "open again" in refused(grpc.StatusCode.UNAUTHENTICATED, call)
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["KVStore"].methods}
    assert len(calls) == len(methods - {"Open"})


@pytest.mark.slow
def test_a_client_without_a_mapping_loses_everything_soon_after_its_stream(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root, clock: FakeClock
) -> None:
    server = start_server(clock=clock)
    peer = make_peer(server, mapped=False)
    gone = threading.Event()

    def beats() -> Iterator[pb.Beat]:
        yield pb.Beat(session=peer.session)
        gone.wait(20)

    stream = peer.stub.Session(beats())
    next(stream)
    peer.save(chain_of(root, 3))
    pass_s(clock, 10)
    assert len(server.sessions) == 1
    gone.set()
    list(stream)
    pass_s(clock, 2)
    assert len(server.sessions) == 1
    pass_s(clock, 10)
    wait_until(lambda: len(server.sessions) == 0 and server.stats()["host.used_bytes"] == 0)


def pass_s(clock: FakeClock, seconds: int) -> None:
    """In small steps: a large one would look like a pause of the server's own, which does not count."""
    for _ in range(4 * seconds):
        clock.time_s += 0.25
        threading.Event().wait(0.08)


def test_bye_ends_everything_at_once(start_server: StartServer, make_peer: Callable[..., Peer], root: Root) -> None:
    server = start_server()
    peer = make_peer(server)
    peer.save(chain_of(root, 3))
    list(peer.stub.Session(iter([pb.Beat(session=peer.session, bye=True)])))
    assert len(server.sessions) == 0
    assert server.stats()["host.used_bytes"] == 0
    assert server.stats()["save.quarantined_slots"] == 0


def test_a_session_that_takes_over_ends_the_one_before(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    server = start_server()
    peer = make_peer(server)
    peer.save(chain_of(root, 3))
    peer.stub.Open(hello(previous_session=peer.session))
    assert server.stats()["host.used_bytes"] == 0
    refused(grpc.StatusCode.UNAUTHENTICATED, lambda: peer.end())


def test_sessions_are_limited(start_server: StartServer, make_peer: Callable[..., Peer]) -> None:
    server = start_server(service={"max_sessions": 2})
    first = make_peer(server)
    make_peer(server)
    refused(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: first.stub.Open(hello()))


def test_streams_are_limited_and_other_calls_go_on(start_server: StartServer, make_peer: Callable[..., Peer]) -> None:
    server = start_server(service={"max_streams": 3})
    peer = make_peer(server)
    watching = [peer.stub.Watch(pb.WatchRequest(session=peer.session)) for _ in range(3)]
    for stream in watching:
        next(stream)
    details = refused(
        grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: peer.stub.Watch(pb.WatchRequest(session=peer.session))
    )
    assert "3 streams are open, which is service.max_streams" in details
    for _ in range(50):
        peer.end()
    for stream in watching:
        stream.cancel()


def test_health_says_serving_and_then_not(start_server: StartServer) -> None:
    server = start_server()
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        assert health.Check(health_pb2.HealthCheckRequest(service="kvstore.v1.KVStore")).status == serving
        server.drain(1)
        assert health.Check(health_pb2.HealthCheckRequest()).status == not_serving


def test_reflection_tells_a_tool_every_call_and_message(start_server: StartServer) -> None:
    """So that grpcurl works without the .proto file."""
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvstore.v1.KVStore"),
    ]
    with grpc.insecure_channel(start_server().address) as channel:
        listed, file = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(asked))
    names = {service.name for service in listed.list_services_response.service}
    assert {"kvstore.v1.KVStore", "grpc.health.v1.Health"} <= names
    told = FileDescriptorProto.FromString(file.file_descriptor_response.file_descriptor_proto[0])
    assert [service.name for service in told.service] == ["KVStore"]
    assert len(told.service[0].method) == len(pb.DESCRIPTOR.services_by_name["KVStore"].methods)


# -- chains ----------------------------------------------------------------------------------------------------


def test_a_delta_to_a_chain_that_is_another_by_now_is_not_found(peer: Peer, root: Root) -> None:
    mine, other = chain_of(root, 6), chain_of(root, 6, seed=1)
    peer.match(peer.whole(other))
    delta = pb.ChainDelta(chain=1, num_known=4, ids=b"".join(mine.ids[4:]), known_tail=mine.ids[3])
    assert refused(grpc.StatusCode.NOT_FOUND, lambda: peer.match(delta)) == "chain"
    unknown = pb.ChainDelta(chain=77, num_known=1, known_tail=mine.ids[0])
    assert refused(grpc.StatusCode.NOT_FOUND, lambda: peer.match(unknown)) == "chain"
    longer = pb.ChainDelta(chain=1, num_known=9, known_tail=other.ids[5])
    assert refused(grpc.StatusCode.NOT_FOUND, lambda: peer.match(longer)) == "chain"
    peer.end(requests=["r"])


def test_a_call_is_about_the_blocks_it_names_though_more_are_known(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    server = start_server()
    peer = make_peer(server)
    chain = chain_of(root, 6)
    peer.save(chain)
    assert peer.commit(1, *range(6)) == list(range(6))
    assert peer.match(peer.whole(chain)).num_blocks == 6
    shorter = pb.ChainDelta(chain=1, num_known=2, ids=chain.ids[2], known_tail=chain.ids[1])
    assert peer.match(shorter).num_blocks == 3
    assert peer.match(pb.ChainDelta(chain=1, num_known=6, known_tail=chain.ids[5])).num_blocks == 6
    peer.end(requests=["r"])


def test_a_chain_that_diverges_leaves_what_was_held_of_the_other_alone(peer: Peer, root: Root) -> None:
    tokens = np.arange(96)
    one, two = Chain(root, tokens), Chain(root, np.concatenate([tokens[:48], tokens[:48]]))
    peer.save(one)
    peer.commit(1, *range(6))
    assert peer.match(peer.whole(one), "one").num_blocks == 6
    delta = pb.ChainDelta(chain=1, num_known=3, ids=b"".join(two.ids[3:]), known_tail=one.ids[2])
    assert peer.match(delta, "two").num_blocks == 3
    load = peer.stub.LoadHost(pb.LoadRequest(session=peer.session, request="one", lease=1))
    assert load.num_blocks == 6
    peer.end(loads=[1], requests=["two"])


@pytest.mark.parametrize(
    ("change", "details"),
    [
        (lambda r: r.chain.MergeFrom(pb.ChainDelta(ids=b"123")), "chain.ids has"),
        (lambda r: setattr(r.chain.root, "model", 9), "root.model is 9: this session has opened models 1…1"),
        (lambda r: setattr(r.chain.root, "adapter", b"x" * 1000), "root.adapter has 1000 bytes"),
        (lambda r: setattr(r, "request", "x" * 300), "request has 300 bytes"),
        (lambda r: setattr(r, "request", ""), "request has 0 bytes"),
        (lambda r: setattr(r, "parts", b"\x05"), "parts are [5]"),
        (lambda r: setattr(r, "parts", b"\x00\x00"), "parts are [0, 0]"),
        (lambda r: setattr(r.hint, "priority", 101), "hint.priority is 101"),
        (lambda r: setattr(r.hint, "ttl_s", float("nan")), "hint.ttl_s is nan"),
        (lambda r: setattr(r.hint, "conversation", "x" * 2000), "hint.conversation has 2000"),
        (lambda r: r.hint.retention.add(start=9, stop=3), "retention is of tokens 9…3"),
        (lambda r: r.hint.retention.add(priority=101), "retention.priority is 101"),
        (lambda r: r.hint.retention.extend([pb.Retention()] * 65), "hint.retention has 65 ranges"),
        (lambda r: setattr(r, "ended", pb.Ended(loads=b"123")), "ended.loads has 3 bytes"),
    ],
)
def test_a_malformed_field_is_named(peer: Peer, root: Root, change: Callable[[Any], None], details: str) -> None:
    request = pb.MatchRequest(session=peer.session, request="r", chain=peer.whole(chain_of(root, 2)))
    if "ended" in details:
        request.ended.loads = b"123"
    else:
        change(request)
    assert details in refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: peer.stub.Match(request))


def test_a_root_whose_digest_is_not_the_servers_is_refused(peer: Peer, root: Root) -> None:
    delta = peer.whole(chain_of(root, 1))
    delta.root.id = b"x" * 32
    assert "same cluster secret" in refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: peer.match(delta))


# -- saves -----------------------------------------------------------------------------------------------------


def test_contents_that_do_not_hash_to_the_ids_are_refused_naming_the_block(peer: Peer, root: Root) -> None:
    chain = chain_of(root, 4)
    forged = contents_of(chain)
    forged.tokens = forged.tokens[:128] + b"\x00" * 64 + forged.tokens[192:]
    assert "contents of block 2 hash to" in refused(
        grpc.StatusCode.INVALID_ARGUMENT, lambda: peer.save(chain, contents=forged)
    )
    short = pb.Contents(start=0, tokens=contents_of(chain).tokens[:64])
    assert "a save of 0…4 needs all of its own" in refused(
        grpc.StatusCode.INVALID_ARGUMENT, lambda: peer.save(chain, contents=short)
    )
    assert peer.match(peer.whole(chain)).num_blocks == 0
    peer.end(requests=["r"])


def test_a_repeated_save_repeats_its_reply_and_a_repeated_commit_its_own(peer: Peer, root: Root) -> None:
    chain = chain_of(root, 4)
    first = peer.save(chain)
    assert len(first.indices) == 16
    assert peer.save(chain) == first
    assert peer.commit(1, 0, 1) == [0, 1]
    assert peer.commit(1, 0, 1) == [0, 1]
    assert peer.commit(1, 0, 1, 2, 3) == [0, 1, 2, 3]
    assert peer.commit(1, 3) == [3], "it is remembered after its last block"


def test_a_lease_that_was_ended_before_it_began_does_not_begin(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    """The save was given up at its deadline, and reaches the server after the word that it was."""
    server = start_server()
    peer = make_peer(server)
    chain = chain_of(root, 4)
    peer.end(saves=[1], loads=[2])
    assert "ended before it began" in refused(grpc.StatusCode.NOT_FOUND, lambda: peer.save(chain, 1))
    assert server.stats()["host.used_bytes"] == 0
    peer.save(chain, 3)
    peer.commit(3, 0, 1, 2, 3)
    peer.match(peer.whole(chain))
    refused(
        grpc.StatusCode.NOT_FOUND,
        lambda: peer.stub.LoadHost(pb.LoadRequest(session=peer.session, request="r", lease=2)),
    )
    assert server.stats()["lease.live"] == 0


def test_leases_and_requests_of_another_session_are_not_found(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    server = start_server()
    peer, stranger = make_peer(server), make_peer(server)
    chain = chain_of(root, 4)
    peer.save(chain)
    refused(grpc.StatusCode.NOT_FOUND, lambda: stranger.commit(1, 0))
    stranger.end(saves=[1], loads=[1], requests=["r"])
    assert peer.commit(1, 0, 1, 2, 3) == [0, 1, 2, 3]
    peer.match(peer.whole(chain))
    load = pb.LoadRequest(session=stranger.session, request="r", lease=5)
    refused(grpc.StatusCode.NOT_FOUND, lambda: stranger.stub.LoadHost(load))
    refused(grpc.StatusCode.NOT_FOUND, lambda: stranger.stub.Load(load))
    refused(
        grpc.StatusCode.NOT_FOUND,
        lambda: stranger.stub.Join(pb.JoinRequest(session=stranger.session, engine_key=b"x" * 16, lease=1)),
    )
    stranger.end(requests=["r"])
    assert peer.stub.LoadHost(pb.LoadRequest(session=peer.session, request="r", lease=2)).num_blocks == 4
    peer.end(loads=[2])


def test_a_beat_ends_loads_that_the_client_does_not_know_of(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    """Replies to their calls were lost."""
    server = start_server()
    peer = make_peer(server)
    chain = chain_of(root, 2)
    peer.save(chain, 1)
    peer.commit(1, 0, 1)
    for lease in (2, 3, 4):
        peer.match(peer.whole(chain))
        peer.stub.LoadHost(pb.LoadRequest(session=peer.session, request="r", lease=lease))
    assert server.stats()["lease.live"] == 3
    live = np.array([3], "<u8").tobytes()
    list(peer.stub.Session(iter([pb.Beat(session=peer.session, live_leases=live, highest_lease=3)])))
    assert server.stats()["lease.live"] == 2, "4 was asked for after the beat was made"
    peer.end(loads=[3, 4])


# -- rights ----------------------------------------------------------------------------------------------------

TOKENS = """
[[client]]
token = "alice-alice-alice"
tenant = "alice"
salts = ["alice"]
quota = "16KiB"
[[client]]
token = "bob-bob-bob-bob-bob"
tenant = "bob"
salts = ["bob"]
models = ["tiny"]
[[client]]
token = "admin-admin-admin"
admin = true
"""


@pytest.fixture
def tenants(start_server: StartServer, make_peer: Callable[..., Peer], directory: Path) -> dict[str, Any]:
    """A server that tells tenants apart, and a client of each."""
    tokens = directory / "tokens.toml"
    tokens.write_text(TOKENS)
    tokens.chmod(0o600)
    server = start_server(service={"tokens_file": str(tokens)})
    names = {"alice": "alice-alice-alice", "bob": "bob-bob-bob-bob-bob", "admin": "admin-admin-admin"}
    return {"server": server, **{name: make_peer(server, token=token) for name, token in names.items()}}


def test_a_client_opens_no_model_that_it_has_no_right_to(tenants: dict[str, Any], model: ModelId) -> None:
    bob = tenants["bob"]
    other = replace(model, model="another", part_layers=1)  # it would widen the server's table for good
    asked = pb.OpenModelRequest(session=bob.session, model=model_message(other), digest=other.digest())
    refused(grpc.StatusCode.PERMISSION_DENIED, lambda: bob.stub.OpenModel(asked))
    told = tenants["admin"].stub.Stats(pb.StatsRequest(session=tenants["admin"].session))
    assert [each.model for each in told.models] == [model.model]
    asked.session = tenants["alice"].session
    bob.stub.OpenModel(asked)


def test_a_client_finds_nothing_of_a_namespace_that_is_not_its_own(tenants: dict[str, Any], model: ModelId) -> None:
    alice, bob = tenants["alice"], tenants["bob"]
    hers, his = chain_of(Root(model, salt=b"alice"), 3), Root(model, salt=b"bob")
    alice.save(hers)
    alice.commit(1, 0, 1, 2)
    alice.stub.Announce(pb.AnnounceRequest(session=alice.session, chain=alice.whole(hers), start=0, stop=3))
    refused(grpc.StatusCode.PERMISSION_DENIED, lambda: bob.match(bob.whole(hers)))
    claimed = bob.match(bob.whole(hers, root=his))  # her hashes under his root
    assert (claimed.num_blocks, claimed.num_pending_blocks) == (0, 0)
    under_his = bob.whole(hers, root=his)
    refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: bob.save(hers, chain=under_his))
    tail = pb.Contents(start=1, tokens=hers.contents(1, 3)[0])
    hung = bob.save(hers, chain=under_his, start=1, contents=tail)
    assert (hung.indices, hung.num_refused) == (b"", 2), "nothing hangs from another's block"
    bob.stub.Touch(pb.TouchRequest(session=bob.session, chain=under_his, num_blocks=3, hint=pb.Hint(closed=True)))
    bob.end(requests=["r"])
    blocks = bob.stub.Inspect(pb.InspectRequest(session=bob.session, ids=b"".join(hers.ids))).blocks
    assert [block.resident for block in blocks] == [False] * 3
    peeked = bob.stub.Peek(pb.PeekRequest(session=bob.session, root=hers.root.id, ids=hers.ids[0], parts=b"\x00"))
    assert peeked.present == b"\x00"
    assert bob.stub.Clear(pb.ClearRequest(session=bob.session, root=hers.root.id)).num_blocks == 0
    assert alice.match(alice.whole(hers)).num_blocks == 3
    alice.end(requests=["r"])


def test_counters_settings_and_clients_are_for_admins(tenants: dict[str, Any]) -> None:
    alice, admin = tenants["alice"], tenants["admin"]
    mine = alice.stub.Stats(pb.StatsRequest(session=alice.session))
    assert set(mine.values) == {"session.holds", "session.loads", "session.saves"}
    assert (len(mine.settings), len(mine.clients)) == (0, 0)
    whole = admin.stub.Stats(pb.StatsRequest(session=admin.session))
    assert len(whole.clients) == 3
    assert "host.capacity_bytes" in {setting.key for setting in whole.settings}
    refused(grpc.StatusCode.PERMISSION_DENIED, lambda: alice.stub.Check(pb.CheckRequest(session=alice.session)))
    refused(grpc.StatusCode.PERMISSION_DENIED, lambda: alice.stub.Clear(pb.ClearRequest(session=alice.session)))
    assert admin.stub.Check(pb.CheckRequest(session=admin.session)).faults == []


def test_models_are_told_to_those_who_opened_them_and_to_admins(
    tenants: dict[str, Any], make_peer: Callable[..., Peer], model: ModelId
) -> None:
    admin, fresh = tenants["admin"], tenants["server"]
    other = replace(model, model="other")
    admin.stub.OpenModel(pb.OpenModelRequest(session=admin.session, model=model_message(other), digest=other.digest()))
    told = [peer.stub.Stats(pb.StatsRequest(session=peer.session)).models for peer in (tenants["alice"], admin)]
    assert [[each.model for each in models] for models in told] == [["tiny"], ["tiny", "other"]]
    assert fresh.check() == []


def test_time_that_clients_saved_is_summed_and_nonsense_refused(tenants: dict[str, Any]) -> None:
    alice, server = tenants["alice"], tenants["server"]
    beats = [pb.Beat(session=alice.session, ttft_saved_s=saved_s) for saved_s in (1.5, 0.0, 0.25)]
    list(alice.stub.Session(iter(beats)))
    assert server.stats()["ttft.saved_s"] == 1.75
    for wrong in (-1.0, float("nan"), float("inf"), 1e9):
        beat = pb.Beat(session=alice.session, ttft_saved_s=wrong)
        refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: alice.stub.Session(iter([beat])))  # noqa: B023
    assert server.stats()["ttft.saved_s"] == 1.75


def test_a_tenant_keeps_within_its_quota_and_others_have_theirs(tenants: dict[str, Any], model: ModelId) -> None:
    alice, bob = tenants["alice"], tenants["bob"]
    assert len(alice.save(chain_of(Root(model, salt=b"alice"), 6)).indices) == 4 * 4, "16 KiB are four blocks"
    assert len(bob.save(chain_of(Root(model, salt=b"bob"), 6)).indices) == 6 * 4
    alice.end(saves=[1])
    bob.end(saves=[1])


def test_what_is_fetched_counts_as_pinned_and_ends_with_the_session(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    server = start_server(16, service={"max_session_share": 0.25})
    peer, chain, other = make_peer(server), chain_of(root, 8), chain_of(root, 2, seed=1)
    for start in (0, 4):
        contents = pb.Contents(start=start, tokens=chain.contents(start, start + 4)[0])
        peer.save(chain, start=start, stop=start + 4, lease=start + 1, contents=contents)
        peer.commit(start + 1, *range(start, start + 4))
    peer.save(other, lease=9)
    peer.commit(9, 0, 1)
    (session,) = server.sessions.all()
    lend = server._servicer._requests.lend
    before = server.stats()["service.over_share"]
    with lend(session, root.id, chain.ids, [0]) as loan:
        assert loan.num_blocks == 4, "a quarter of the memory"
        assert server.stats()["service.over_share"] == before + 1
        assert peer.match(peer.whole(other)).num_blocks == 0
        with lend(session, root.id, chain.ids, [0]) as second:
            assert second.num_blocks == 0
    assert peer.match(peer.whole(other)).num_blocks == 2
    with lend(session, root.id, chain.ids, [0]) as loan:
        assert loan.num_blocks == 2
        server.sessions.leave(session)
        assert not loan.intact()
        assert server.stats()["host.pinned_blocks"] == 0


def test_a_tenant_leaves_others_half_of_the_streams_and_sessions(
    start_server: StartServer, make_peer: Callable[..., Peer], directory: Path
) -> None:
    tokens = directory / "tokens.toml"
    tokens.write_text(TOKENS)
    tokens.chmod(0o600)
    server = start_server(service={"tokens_file": str(tokens), "max_streams": 6, "max_sessions": 6})
    alice, *others = [make_peer(server, token="alice-alice-alice") for _ in range(3)]
    bob = make_peer(server, token="bob-bob-bob-bob-bob")

    def watch(peer: Peer) -> Any:
        stream = peer.stub.Watch(pb.WatchRequest(session=peer.session))
        next(stream)
        return stream

    watching = [watch(peer) for peer in (alice, *others)]
    refused(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: watch(alice))
    refused(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: make_peer(server, token="alice-alice-alice"))
    watching += [watch(bob) for _ in range(3)]
    for stream in watching:
        stream.cancel()

    def watches_again() -> bool:
        try:
            watch(alice).cancel()
        except grpc.RpcError:
            return False
        return True

    assert eventually(watches_again)


def test_only_what_a_client_may_see_is_told_to_its_watch(tenants: dict[str, Any], model: ModelId) -> None:
    alice, bob = tenants["alice"], tenants["bob"]
    hers, his = chain_of(Root(model, salt=b"alice"), 2), chain_of(Root(model, salt=b"bob"), 3)
    bob.save(his)
    bob.commit(1, 0)
    stream = bob.stub.Watch(pb.WatchRequest(session=bob.session, snapshot=True))
    told = Told(stream)
    told.until_snapshot()
    assert told.ids() == set(his.ids[:1])
    alice.save(hers)
    alice.commit(1, 0, 1)
    bob.commit(1, 1, 2)
    told.until(lambda: told.ids() == set(his.ids))
    assert told.roots() == {his.root.id}
    assert told.last.sequence - told.first_sequence == len(told.events) - 1, "numbers are of what it may see"
    stream.cancel()


class Told:
    """What a Watch call has said."""

    def __init__(self, stream: Iterator[pb.WatchReply]) -> None:
        self.events: list[pb.BlockEvent] = []
        self.last = next(stream)
        self.first_sequence = 0
        self._stream = stream

    def _more(self) -> pb.WatchReply:
        self.last = next(self._stream)
        self.events += self.last.events
        return self.last

    def until_snapshot(self) -> None:
        while not self._more().snapshot_done:
            pass
        self.first_sequence = self.last.sequence

    def until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._more()

    def ids(self) -> set[bytes]:
        return {event.ids[at : at + 32] for event in self.events for at in range(0, len(event.ids), 32)}

    def roots(self) -> set[bytes]:
        return {event.root for event in self.events}


# -- shares ----------------------------------------------------------------------------------------------------


def test_a_client_keeps_no_more_from_eviction_than_its_share(
    start_server: StartServer, make_peer: Callable[..., Peer], model: ModelId
) -> None:
    server = start_server(64, service={"max_session_share": 0.5})
    greedy, other = make_peer(server), make_peer(server)
    chains = [chain_of(Root(model), 8, seed=seed) for seed in range(8)]
    for lease, chain in enumerate(chains, start=1):
        greedy.save(chain, lease)
        greedy.commit(lease, *range(8))
    found = [greedy.match(greedy.whole(chain, at + 1), f"r{at}").num_blocks for at, chain in enumerate(chains)]
    assert found == [8, 8, 8, 8, 0, 0, 0, 0], "what it may not hold is not there"
    for lease in (101, 102):
        greedy.stub.LoadHost(pb.LoadRequest(session=greedy.session, request=f"r{lease - 101}", lease=lease))
    assert greedy.match(greedy.whole(chains[5], 6), "r5").num_blocks == 0, "a load counts as its hold did"
    again = greedy.match(greedy.whole(chains[3], 4), "again")
    assert again.num_blocks == 8, "what two of its holds share counts once"
    assert server.stats()["host.pinned_blocks"] == 32
    assert len(other.save(chain_of(Root(model), 16, seed=50)).indices) == 16 * 4, "the rest is for others"
    refused = greedy.save(chain_of(Root(model), 8, seed=51), 200)
    assert (refused.indices, refused.num_refused) == (b"", 8)
    greedy.end(requests=["r2"], loads=[101])
    part = greedy.save(chain_of(Root(model), 18, seed=51), 201)
    assert (len(part.indices), part.num_refused) == (16 * 4, 2), "two chains of eight have gone"
    assert server.stats()["service.over_share"] == 7
    greedy.end(requests=["r3", "again"], loads=[102], saves=[201])
    other.end(saves=[1])


def test_the_sessions_of_a_tenant_have_one_share_between_them(
    start_server: StartServer, make_peer: Callable[..., Peer], model: ModelId, directory: Path
) -> None:
    tokens = directory / "tokens.toml"
    tokens.write_text(TOKENS)
    tokens.chmod(0o600)
    server = start_server(64, service={"max_session_share": 0.5, "tokens_file": str(tokens)})
    one, two = (make_peer(server, token="bob-bob-bob-bob-bob") for _ in range(2))
    other = make_peer(server, token="admin-admin-admin")
    chains = [chain_of(Root(model, salt=b"bob"), 8, seed=seed) for seed in range(6)]
    for lease, chain in enumerate(chains, start=1):
        one.save(chain, lease)
        one.commit(lease, *range(8))
    assert [one.match(one.whole(chains[at], at + 1), f"r{at}").num_blocks for at in range(2)] == [8, 8]
    assert [two.match(two.whole(chains[at], at + 1), f"r{at}").num_blocks for at in range(1, 4)] == [8, 8, 8]
    assert server.stats()["host.pinned_blocks"] == 32, "one of the chains is held by both, and counts once"
    for peer in (one, two):
        assert peer.match(peer.whole(chains[4], 5), "more").num_blocks == 0
        refused = peer.save(chain_of(Root(model, salt=b"bob"), 4, seed=50), 200)
        assert (refused.indices, refused.num_refused) == (b"", 4)
    assert len(other.save(chain_of(Root(model), 8, seed=51)).indices) == 8 * 4, "another tenant has a share of its own"
    one.stub.Session(iter([pb.Beat(session=one.session, bye=True)])).code()
    wait_until(lambda: server.stats()["host.pinned_blocks"] == 24)
    assert two.match(two.whole(chains[4], 5), "more").num_blocks == 8, "what a session leaves is for the others"
    two.end(requests=["r1", "r2", "r3", "more"])
    other.end(saves=[1])


def test_holds_that_lapsed_do_not_count_against_a_share(
    start_server: StartServer, make_peer: Callable[..., Peer], model: ModelId
) -> None:
    clock = FakeClock()
    server = start_server(64, clock=clock, service={"max_session_share": 0.25})
    peer = make_peer(server)
    chain = chain_of(Root(model), 8, seed=1)
    peer.save(chain)
    peer.commit(1, *range(8))
    for turn in range(6):
        other = chain_of(Root(model), 8, seed=2 + turn)
        assert len(peer.save(other, 2 + turn).indices) == 8 * 4, "nothing is held any more"
        peer.commit(2 + turn, *range(8))
        assert peer.match(peer.whole(other, 2 + turn), f"forgotten {turn}").num_blocks == 8
        clock.time_s += 3600
    peer.end(requests=[f"forgotten {turn}" for turn in range(6)])


# -- sessions that came to nothing -----------------------------------------------------------------------------


def test_an_open_that_is_refused_leaves_no_passage(start_server: StartServer, make_peer: Callable[..., Peer]) -> None:
    server = start_server(service={"max_sessions": 1})
    make_peer(server, mapped=False)  # has a session, and no passage
    assert server._door is not None
    for _ in range(3):
        with pytest.raises(grpc.RpcError):
            make_peer(server)
        assert server._door.num_peers == 0


def test_a_session_whose_client_never_learnt_of_it_ends(
    start_server: StartServer, make_peer: Callable[..., Peer]
) -> None:
    clock = FakeClock()
    server = start_server(clock=clock, request={"lease_s": 2.0})
    make_peer(server)
    assert len(server.sessions) == 1
    clock.time_s += 1
    assert len(server.sessions) == 1
    for _ in range(20):  # in steps that do not look like a server that stood still
        clock.time_s += 1
        threading.Event().wait(0.6 if len(server.sessions) else 0)
    assert len(server.sessions) == 0
    door = server._door
    assert door is not None
    wait_until(lambda: door.num_peers == 0)


class AskedOnce(dict[Any, Any]):
    """Empty. Whoever asks whether it is hears so only after something else was tried, unless that has to wait."""

    def __init__(self, tried: Callable[[], object]) -> None:
        super().__init__()
        self._tried = tried

    def __len__(self) -> int:
        num, tried = super().__len__(), threading.Thread(target=self._tried)
        self._tried = lambda: None
        tried.start()
        tried.join(1.0)
        return num


def test_a_save_that_begins_as_its_silent_session_ends_is_refused(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    """Its slots would be another's at once, and its client would go on to write to them."""
    clock, granted = FakeClock(), list[bytes]()
    server = start_server(clock=clock, request={"lease_s": 2.0})
    peer = make_peer(server)
    (session,) = server.sessions.all()

    def save() -> None:
        try:
            granted.append(peer.save(chain_of(root, 3)).indices)
        except grpc.RpcError:
            pass

    session.saves = AskedOnce(save)
    for _ in range(20):
        clock.time_s += 1
        threading.Event().wait(0 if session.ended else 0.6)
    wait_until(lambda: len(server.sessions) == 0)
    assert granted == []


def test_slots_of_a_silent_session_that_never_had_a_stream_stay_fenced_while_its_process_lives(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    clock, looks = FakeClock(), list[None]()
    server = start_server(clock=clock, request={"lease_s": 2.0})
    make_peer(server).save(chain_of(root, 3))
    (session,) = there = server.sessions.all()
    server.sessions.all = lambda: (looks.append(None), there)[1]  # type: ignore[method-assign]
    for _ in range(4):
        clock.time_s += 1
        before = len(looks)
        wait_until(lambda before=before: len(looks) >= before + 2)
    assert server.stats()["save.quarantined_slots"] == 3
    before = len(looks)
    wait_until(lambda: len(looks) >= before + 3)
    assert server.stats()["save.quarantined_slots"] == 3
    server.sessions.leave(session)


def test_slots_fenced_from_a_process_that_died_meanwhile_come_back(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    server = start_server()
    peer = make_peer(server)
    peer.save(chain_of(root, 3))
    (session,) = server.sessions.all()
    give_up = server.sessions.quarantine.give_up

    def dies(save: ServedSave) -> None:
        server.sessions.quarantine.give_up = give_up  # type: ignore[method-assign]
        assert session.peer is not None
        server.sessions.process_died(session.peer)
        give_up(save)

    server.sessions.quarantine.give_up = dies  # type: ignore[method-assign]
    server.sessions._fence(session)
    assert server.stats()["save.quarantined_slots"] == 0
    assert server.stats()["host.used_bytes"] == 0


def test_slots_of_a_save_that_a_dead_process_was_joining_come_back(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    owner, worker = make_peer(server), make_peer(server)
    owner.save(chain_of(root, 3))
    owns, joins = server.sessions.all()
    join = ServedSave.join

    def dies(save: ServedSave, session: Session) -> None:
        join(save, session)
        server.sessions.leave(joins)
        server.sessions.end_saves(owns, [1])

    monkeypatch.setattr(ServedSave, "join", dies)
    request = pb.JoinRequest(session=worker.session, engine_key=owner.opened.engine_key, lease=1)
    refused(grpc.StatusCode.UNAUTHENTICATED, lambda: worker.stub.Join(request))
    assert server.stats()["save.quarantined_slots"] == 0


# -- watching, looking in --------------------------------------------------------------------------------------


def test_a_watch_tells_what_is_there_then_what_comes_and_goes(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    server = start_server()
    peer = make_peer(server)
    chain = chain_of(root, 4)
    peer.save(chain)
    peer.commit(1, 0, 1)
    stream = peer.stub.Watch(pb.WatchRequest(session=peer.session, snapshot=True))
    told = Told(stream)
    told.until_snapshot()
    assert told.ids() == set(chain.ids[:2])
    (event,) = told.events
    assert (event.root, event.parent, event.depth) == (root.id, root.id, 0)
    assert event.tokens == chain.contents(0, 2)[0]
    peer.commit(1, 2, 3)
    told.until(lambda: told.ids() == set(chain.ids))
    peer.stub.Clear(pb.ClearRequest(session=peer.session, root=root.id))
    told.until(lambda: any(event.kind == pb.BlockEvent.CLEARED for event in told.events))
    assert told.last.boot_id == server.boot_id
    resumed = Told(peer.stub.Watch(pb.WatchRequest(session=peer.session, boot_id=b"x" * 16, after_sequence=1)))
    assert resumed.last.gap, "another start of the server"
    stream.cancel()


def test_a_watch_without_tokens_has_none(peer: Peer, root: Root) -> None:
    chain = chain_of(root, 2)
    peer.save(chain)
    peer.commit(1, 0, 1)
    stream = peer.stub.Watch(pb.WatchRequest(session=peer.session, snapshot=True, without_tokens=True))
    told = Told(stream)
    told.until_snapshot()
    assert [event.tokens for event in told.events] == [b""]
    stream.cancel()


def test_blocks_are_inspected_by_hash_and_along_a_chain(peer: Peer, root: Root) -> None:
    chain = chain_of(root, 3)
    peer.save(chain)
    peer.commit(1, 0, 1)
    by_hash = peer.stub.Inspect(pb.InspectRequest(session=peer.session, ids=b"".join(chain.ids))).blocks
    along = peer.stub.Inspect(pb.InspectRequest(session=peer.session, chain=peer.whole(chain))).blocks
    assert list(by_hash)[:2] == list(along)[:2]
    assert [block.depth for block in along] == [0, 1, 2], "its place is known though nothing is there"
    assert [block.resident for block in along] == [True, True, False]
    assert along[1].parent == chain.ids[0]
    peer.end(saves=[1])


def test_blocks_along_a_chain_are_looked_for_in_lower_tiers_as_well(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    tier = DictTier()
    server = start_server(tiers=[tier], mover={"write": "through"})
    peer, chain = make_peer(server), chain_of(root, 4)
    peer.save(chain, stop=3)
    peer.commit(1, 0, 1, 2)
    assert server.flush(5)
    server.drop_host()
    along = peer.stub.Inspect(pb.InspectRequest(session=peer.session, chain=peer.whole(chain))).blocks
    assert [(block.depth, block.resident, list(block.tiers)) for block in along] == [
        (0, False, [tier.name]),
        (1, False, [tier.name]),
        (2, False, [tier.name]),
        (3, False, []),
    ]
    assert "match.requests" not in server.stats(), "looking is no use"


def test_offsets_are_not_told_to_a_client_without_a_mapping(
    start_server: StartServer, make_peer: Callable[..., Peer], root: Root
) -> None:
    peer = make_peer(start_server(), mapped=False)
    reply = peer.save(chain_of(root, 3))
    assert np.frombuffer(reply.offsets, "<u8").tolist() == [0, 0, 0]
    peer.end(saves=[1])
