# SPDX-License-Identifier: Apache-2.0
"""The client of people and scripts sends what the protocol asks for, and says in a sentence what went wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from kvstore.block import Chain, Root
from kvstore.errors import KVStoreError, ProtocolError
from kvstore.service import admin as admin_module
from kvstore.service.admin import Admin, Target
from kvstore.service.handshake import hash_vector
from kvstore.wire import kvstore_pb2 as pb
from kvstore.wire.kvstore_pb2_grpc import KVStoreServicer, add_KVStoreServicer_to_server
from tests.conftest import chain_of
from tests.patient import CALL_DEADLINE_S

BLOCKS_A_REPLY = 3


class Recorder(KVStoreServicer):
    """A server that notes what it is asked, keeps one session at a time, and has small replies."""

    def __init__(self) -> None:
        self.sessions = 0
        self.asked: list[object] = []
        self.beats = threading.Semaphore(0)
        self.left = threading.Event()

    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:  # noqa: N802
        assert request.hash_vector == hash_vector()
        self.sessions += 1
        return pb.OpenReply(session=bytes([self.sessions]) * 16, boot_id=bytes(16), server_version="0")

    def _known(self, session: bytes, context: grpc.ServicerContext) -> None:
        if session != bytes([self.sessions]) * 16:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such session")

    def OpenModel(self, request: pb.OpenModelRequest, context: grpc.ServicerContext) -> pb.OpenModelReply:  # noqa: N802
        self._known(request.session, context)
        return pb.OpenModelReply(model=7)

    def Inspect(self, request: pb.InspectRequest, context: grpc.ServicerContext) -> pb.InspectReply:  # noqa: N802
        self._known(request.session, context)
        self.asked.append(request)
        ids = request.ids or request.chain.ids
        blocks = [pb.BlockInfo(id=ids[at : at + 32]) for at in range(0, len(ids), 32)]
        return pb.InspectReply(blocks=blocks[:BLOCKS_A_REPLY], num_left_out=max(0, len(blocks) - BLOCKS_A_REPLY))

    def Warm(self, request: pb.WarmRequest, context: grpc.ServicerContext) -> pb.WarmReply:  # noqa: N802
        self.asked.append(request)
        return pb.WarmReply(num_host_blocks=2, num_promoted=1)

    def Session(self, beats: Iterator[pb.Beat], context: grpc.ServicerContext) -> Iterator[pb.Notice]:  # noqa: N802
        for beat in beats:
            if beat.bye:
                self.left.set()
                return
            self.beats.release()
            yield pb.Notice()

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchReply]:  # noqa: N802
        assert self.beats.acquire(timeout=10), "the session of a watch is kept alive"
        yield pb.WatchReply(sequence=1, snapshot_done=request.snapshot)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    recorder = Recorder()
    server = grpc.server(ThreadPoolExecutor(8))
    add_KVStoreServicer_to_server(recorder, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{tmp_path}/k.sock")
    server.start()
    yield recorder
    server.stop(0).wait()


@pytest.fixture
def admin(recorder: Recorder, tmp_path: Path) -> Iterator[Admin]:
    with Admin(Target(address=f"unix:{tmp_path}/k.sock")) as admin:
        yield admin


def test_a_chain_goes_whole_with_its_root_and_what_did_not_fit_is_asked_again(
    admin: Admin, recorder: Recorder, root: Root
) -> None:
    chain = chain_of(root, 8)
    assert [info.id for info in admin.inspect_chain(chain)] == chain.ids
    first, *rest = recorder.asked
    assert isinstance(first, pb.InspectRequest)
    assert first.chain.ids == b"".join(chain.ids)
    assert (first.chain.num_known, first.chain.root.model, first.chain.root.id) == (0, 7, root.id)
    assert [len(request.ids) // 32 for request in rest if isinstance(request, pb.InspectRequest)] == [5, 2]


def test_a_warm_prompt_goes_with_the_tokens_of_its_full_blocks(admin: Admin, recorder: Recorder, root: Root) -> None:
    chain = Chain(root, range(40))
    assert admin.warm(chain, 5.0).num_promoted == 1
    (request,) = recorder.asked
    assert isinstance(request, pb.WarmRequest)
    assert request.contents.tokens == b"".join(number.to_bytes(4, "little") for number in range(32))
    assert request.chain.root.salt == root.salt


def test_a_session_that_the_server_forgot_is_opened_again_once(admin: Admin, recorder: Recorder, root: Root) -> None:
    recorder.sessions += 1
    chain = chain_of(root, 2)
    assert len(admin.inspect_chain(chain)) == 2
    assert len(admin.inspect(chain.ids[0])) == 1


def test_a_watch_keeps_its_session_alive_while_it_waits(admin: Admin) -> None:
    (reply,) = admin.watch(snapshot=True, with_tokens=False)
    assert reply.snapshot_done


def test_a_session_that_is_kept_beats_while_nothing_is_asked(admin: Admin, recorder: Recorder) -> None:
    with admin.kept():
        assert recorder.beats.acquire(timeout=10)
        assert recorder.beats.acquire(timeout=10), "again, though nothing was asked"
    assert not recorder.left.is_set()


def test_leaving_is_said_so_that_status_shows_no_ghosts(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_module, "_LEAVE_S", CALL_DEADLINE_S)  # who leaves does not wait long for a slow machine
    with Admin(Target(address=f"unix:{tmp_path}/k.sock")):
        assert not recorder.left.is_set()
    assert recorder.left.wait(5)


def test_a_call_that_the_server_does_not_know_is_told_from_one_that_failed(admin: Admin) -> None:
    with pytest.raises(ProtocolError, match="does not serve this call: it is older than this client"):
        admin.stats()


def test_a_server_that_fails_is_named(admin: Admin, recorder: Recorder, root: Root) -> None:
    recorder.asked = None  # type: ignore[assignment]
    with pytest.raises(KVStoreError, match="AttributeError|Exception"):
        admin.inspect(chain_of(root, 1).ids[0])
