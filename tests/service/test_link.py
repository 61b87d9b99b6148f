# SPDX-License-Identifier: Apache-2.0
"""A client's link to a server that stops answering, goes and comes back at moments that no real one can be made to hit:
a stand-in does as it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest

from kvstore.block import ModelId
from kvstore.errors import ConfigError, ProtocolError
from kvstore.layout import BlockLayout, layout_of
from kvstore.service.connection import Connection, LinkOptions
from kvstore.service.handshake import model_of
from kvstore.service.link import Link
from kvstore.service.mapped import MappedLoad
from kvstore.service.plane import Cells, DataPlane, Down
from kvstore.stats import Stats
from kvstore.wire import kvstore_pb2 as pb
from kvstore.wire.kvstore_pb2_grpc import KVStoreServicer, add_KVStoreServicer_to_server
from tests.waiting import wait_until

LIMIT_S = 20.0


class StandIn(KVStoreServicer):  # type: ignore[misc]
    """A server that answers what it is asked, with nothing; `opens` and `answers` hold its answers back while clear."""

    def __init__(self) -> None:
        self.opens = threading.Event()
        self.answers = threading.Event()
        self.opens.set()
        self.answers.set()
        self.num_opened = 0
        self.num_asked_to_open = 0
        self.num_sessions = 0
        self.num_byes = 0
        self.heard: list[pb.Ended] = []
        self.first_reply = pb.LoadReply()
        self._ending = threading.Event()
        self._lock = threading.Lock()
        # The waits for an answer that is held back hold a thread each.
        self._server = grpc.server(ThreadPoolExecutor(32))
        add_KVStoreServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:  # noqa: N802
        self.num_asked_to_open += 1
        assert self.opens.wait(LIMIT_S)
        self.num_opened += 1
        return pb.OpenReply(session=b"s%d" % self.num_opened, lease_s=4)

    def OpenModel(self, request: pb.OpenModelRequest, context: grpc.ServicerContext) -> pb.OpenModelReply:  # noqa: N802
        assert self.answers.wait(LIMIT_S)
        sizes = [part.num_bytes for part in layout_of(model_of(request.model)).parts]
        return pb.OpenModelReply(model=1, part_bytes=np.array(sizes, "<u8").tobytes())

    def Session(self, beats: Iterator[pb.Beat], context: grpc.ServicerContext) -> Iterator[pb.Notice]:  # noqa: N802
        with self._lock:
            self.num_sessions += 1
        try:
            for beat in beats:
                if beat.bye:
                    self.num_byes += 1
                    return
                yield pb.Notice()
        except grpc.RpcError:  # it hung up
            pass
        finally:
            with self._lock:
                self.num_sessions -= 1

    def Load(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> Iterator[pb.LoadReply]:  # noqa: N802
        yield self.first_reply
        self._ending.wait()

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.Empty:  # noqa: N802
        assert self.answers.wait(LIMIT_S)
        self.heard.append(request.ended)
        return pb.Empty()

    def stop(self) -> None:
        for event in (self.opens, self.answers, self._ending):
            event.set()
        self._server.stop(0).wait()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    yield server
    server.stop()


@dataclass
class FakePlane:
    """Implements `kvstore.service.plane.DataPlane`. `closes`: what `close` says, one after the other, then True."""

    when_lane_is_asked_for: Callable[[], None] = lambda: None
    closes: list[bool] = field(default_factory=list)
    ticket = b""
    boot_id = b""

    @property
    def lane(self) -> None:
        self.when_lane_is_asked_for()

    def prefaulted(self) -> None: ...

    def close(self) -> bool:
        return self.closes.pop(0) if self.closes else True


def link_to(
    address: str, plane: FakePlane | None = None, *, deadline_s: float = LIMIT_S, progress_s: float = 0.2
) -> Link:
    options = LinkOptions(address=address, mapped=False, name="test", call_deadline_s=deadline_s, progress_s=progress_s)
    return Link(options, lambda _: cast(DataPlane, plane or FakePlane()), Stats())


@pytest.fixture
def link(stand_in: StandIn) -> Iterator[Link]:
    link = link_to(stand_in.address)
    link.start(LIMIT_S)
    yield link
    link.close()


def in_time(call: Callable[[], Any]) -> threading.Thread:
    """Runs on a thread of its own, so that a call that never returns fails its test and no more."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_replies_of_a_server_that_stops_answering_end_in_time_whichever_call_noticed_first(stand_in: StandIn) -> None:
    link = link_to(stand_in.address, deadline_s=4.0)  # which the first reply has as well
    link.start(LIMIT_S)
    connection = link.up()
    replies = link.stream(connection, connection.stub.Load, pb.LoadRequest())
    assert replies.next() is not None
    stand_in.answers.clear()
    with pytest.raises(Down):
        link.call(connection, connection.stub.Release, pb.ReleaseRequest(), timeout_s=0.1)
    assert not link.is_up
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            replies.next()
        except Down as error:
            ended.append(error)

    waiting = in_time(wait)
    waiting.join(LIMIT_S)
    assert len(ended) == 1
    stand_in.answers.set()
    link.close()


def test_a_client_closed_while_it_comes_back_leaves_no_session_behind(stand_in: StandIn) -> None:
    link = link_to(stand_in.address)
    link.start(LIMIT_S)
    stand_in.opens.clear()
    link._lose(link.up(), "a test")
    wait_until(lambda: stand_in.num_asked_to_open == 2)
    closing = in_time(link.close)
    wait_until(lambda: link._closing)
    stand_in.opens.set()
    closing.join(LIMIT_S)
    wait_until(lambda: stand_in.num_sessions == 0)
    assert stand_in.num_opened == 2
    assert not link.is_up
    with pytest.raises(ConfigError, match="was closed"):
        link.up()


def test_a_connection_is_in_place_before_anything_can_say_that_it_has_ended(stand_in: StandIn) -> None:
    """One that ended before it was in place would stay there, dead, and its end would not be noticed again."""
    seen: list[bool] = []
    plane = FakePlane(lambda: seen.append(link.is_up))
    link = link_to(stand_in.address, plane)
    link.start(LIMIT_S)
    assert seen[-1], "its stream of beats begins, which asks for the lane"
    link.close()


def test_a_connection_that_fails_once_it_is_in_place_is_not_said_to_be_left(stand_in: StandIn) -> None:
    """Somebody may be writing by it: the server would give the slots to others."""

    def fails() -> None:
        if link.is_up:
            raise MemoryError

    link = link_to(stand_in.address, FakePlane(fails))
    with pytest.raises(MemoryError):
        link.start(LIMIT_S)
    assert not link.is_up
    assert (stand_in.num_opened, stand_in.num_byes) == (1, 0)


def test_a_connection_that_ended_as_it_answered_again_is_not_taken_up(stand_in: StandIn) -> None:
    """Nothing would notice its end a second time: everything would be a miss for good."""
    link = link_to(stand_in.address)
    link.start(LIMIT_S)
    first = link.up()

    def ends_as_it_answers(request: pb.ReleaseRequest, timeout: float) -> pb.Empty:
        link._lose(first, "a test")
        return pb.Empty()

    first.stub = cast(Any, SimpleNamespace(Release=ends_as_it_answers))
    link._rest(first, "a test")
    wait_until(lambda: link.is_up)
    assert link.up() is not first
    assert stand_in.num_opened == 2
    link.close()


def test_a_model_that_is_opened_while_the_link_comes_back_is_open_there_too(
    stand_in: StandIn, link: Link, model: ModelId
) -> None:
    link.open_model(model)
    late, reopen = replace(model, model="late"), link._reopen

    def meanwhile(connection: Connection, each: ModelId) -> None:
        reopen(connection, each)
        if each == model:
            link.open_model(late)  # no connection is there to be asked

    link._reopen = meanwhile  # type: ignore[method-assign]
    link._lose(link.up(), "a test")
    wait_until(lambda: link.is_up and set(link.up().models) == {model, late})


def test_a_model_that_is_opened_while_the_server_does_not_answer_is_open_once_it_does(
    stand_in: StandIn, model: ModelId
) -> None:
    """The connection is the one before: nothing else would open it there."""
    link = link_to(stand_in.address, deadline_s=0.5)
    link.start(LIMIT_S)
    stand_in.answers.clear()
    link.open_model(model)
    link.open_model(replace(model, model="late"))
    assert not link.is_up
    stand_in.answers.set()

    def is_open() -> bool:
        connection = link._connection
        return connection is not None and len(connection.models) == 2

    wait_until(is_open)
    link.close()


def test_memory_of_each_server_that_is_gone_is_waited_for_anew() -> None:
    link = link_to("127.0.0.1:1")
    plane = FakePlane(closes=[False, True, False, False])

    def connection() -> Connection:
        channel = grpc.insecure_channel("127.0.0.1:1")
        return Connection(channel, cast(Any, None), cast(DataPlane, plane), pb.OpenReply())

    assert [link._dismantle(connection()) for _ in range(2)] == [False, True]
    assert link._unmap_from_s == 0, "the next one has all of its time"
    assert not link._dismantle(connection())
    link._unmap_from_s -= 60
    assert link._dismantle(connection()), "not for ever"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError()])
def test_what_was_on_board_of_a_call_that_came_to_nothing_is_said_again(
    stand_in: StandIn, link: Link, error: BaseException
) -> None:
    connection = link.up()
    wait_until(lambda: link._drowsy)  # or its thread would say it
    connection.done.add(save=7)

    def interrupted(request: pb.ReleaseRequest, timeout: float) -> pb.Empty:
        assert request.HasField("ended")
        raise error

    with pytest.raises(Down if isinstance(error, ValueError) else type(error)):
        link.call(connection, interrupted, pb.ReleaseRequest())
    link.ended(connection, save=8)
    wait_until(lambda: b"".join(ended.saves for ended in stand_in.heard).count(b"\7") == 1)


def test_what_was_on_board_of_a_stream_that_nobody_waited_for_is_said_again(stand_in: StandIn, link: Link) -> None:
    connection = link.up()
    wait_until(lambda: link._drowsy)
    connection.done.add(save=7)
    link.stream(connection, connection.stub.Load, pb.LoadRequest()).cancel()
    wait_until(lambda: b"".join(ended.saves for ended in stand_in.heard).count(b"\7") == 1)


def test_a_load_whose_first_reply_is_no_good_is_watched_no_longer(
    stand_in: StandIn, link: Link, layout: BlockLayout
) -> None:
    stand_in.first_reply = pb.LoadReply(num_blocks=2, offsets=bytes(8))
    request = pb.LoadRequest(num_blocks=2, contents=pb.Contents())
    with pytest.raises(ProtocolError, match="1 slots, 0 generations and 0 blocks"):
        MappedLoad(link, link.up(), request, Cells(layout, (0,)), cast(Any, None))
    assert link._streams == {}
