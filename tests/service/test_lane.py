# SPDX-License-Identifier: Apache-2.0
"""The lane: frames over a socket pair, calls that are given up, clients that do not keep to it."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np
import pytest

from kvstore.block import Chain, ModelId, Root
from kvstore.errors import AccessDenied, KVStoreError, UnknownLease
from kvstore.service.client import SidecarStore
from kvstore.service.handshake import MAX_MESSAGE_BYTES
from kvstore.service.knock import knock
from kvstore.service.lane import METHODS, Lane, LaneCall, LaneError, Lanes
from kvstore.service.server import Server
from kvstore.service.status import error_of, is_transport
from kvstore.wire import kvstore_pb2 as pb
from tests.fakes import FakeClock
from tests.patient import CALL_DEADLINE_S, connect
from tests.service.conftest import StartServer
from tests.waiting import wait_until

MATCH = b"Match".ljust(16, b"\0")
SAVE = b"Save".ljust(16, b"\0")


class Echo:
    """A lane to methods that answer with what they got; `gate` holds those of `Save` back."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.saving = threading.Event()
        self.calls: list[LaneCall] = []
        self.lanes = Lanes({"Match": self.match, "Save": self.save, "Load": self.refuse})
        self.lane, self.raw = self.open(1)

    def open(self, peer: int) -> tuple[Lane, socket.socket]:
        ours, theirs = socket.socketpair()
        self.lanes.begin(peer, ours)
        return Lane(theirs), theirs

    def match(self, message: bytes, call: LaneCall) -> bytes:
        self.calls.append(call)
        return message

    def save(self, message: bytes, call: LaneCall) -> bytes:
        self.saving.set()
        assert self.gate.wait(10)
        return message

    def refuse(self, message: bytes, call: LaneCall) -> bytes:
        raise UnknownLease("no lease: match first")

    def ask(self, message: bytes, method: str = "Match", timeout_s: float = 5.0) -> bytes:
        assert self.lane.take()
        return self.lane.call(method.encode().ljust(16, b"\0"), message, timeout_s)

    def close(self) -> None:
        self.gate.set()
        self.lane.close()
        self.lanes.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.close()


@pytest.mark.parametrize("num_bytes", [0, 1, 1 << 16, (1 << 16) + 1, MAX_MESSAGE_BYTES])
def test_a_message_of_any_size_comes_back_whole(echo: Echo, num_bytes: int) -> None:
    message = random.Random(num_bytes).randbytes(num_bytes)
    assert echo.ask(message) == message
    assert echo.ask(b"next") == b"next"


def test_a_method_learns_its_deadline_and_whose_lane_it_came_by(echo: Echo) -> None:
    echo.ask(b"", timeout_s=12.25)
    assert [(call.time_remaining(), call.peer) for call in echo.calls] == [(12.25, 1)]


def test_an_error_comes_back_as_what_it_was(echo: Echo) -> None:
    with pytest.raises(LaneError) as failed:
        echo.ask(b"", "Load")
    error = error_of(failed.value)
    assert type(error) is UnknownLease
    assert str(error) == "no lease: match first"
    assert not is_transport(failed.value)
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_method_that_takes_no_lane_is_refused_and_the_lane_lives_on(echo: Echo) -> None:
    with pytest.raises(LaneError, match="no method b'Drop"):
        echo.ask(b"", "Drop")
    assert echo.ask(b"x") == b"x"


def test_a_frame_that_comes_in_pieces_is_put_together(echo: Echo) -> None:
    stray, raw = echo.open(2)
    message = random.Random(1).randbytes(200_000)
    frames = struct.pack("<III16s", 28 + len(message), 7, 0, MATCH) + message
    frames += struct.pack("<III16s", 28 + 5, 8, 0, MATCH) + b"small"
    sent = 0
    for at in [*range(1, 40), 70_000, 200_020, len(frames)]:
        raw.sendall(frames[sent:at])
        sent = at
    got = b""
    while len(got) < 12 + len(message) + 12 + 5:
        got += raw.recv(1 << 20)
    assert got == struct.pack("<III", 12 + len(message), 7, 0) + message + struct.pack("<III", 17, 8, 0) + b"small"
    stray.close()


@pytest.mark.alone
def test_a_call_that_is_given_up_does_not_leave_its_reply_to_the_next(echo: Echo) -> None:
    began_s = time.monotonic()
    with pytest.raises(LaneError) as failed:
        echo.ask(b"late", "Save", timeout_s=0.1)
    assert time.monotonic() - began_s < 2
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert is_transport(failed.value)
    assert not echo.lane.take(), "the late reply is still to come"
    echo.gate.set()
    wait_until(echo.lane.take)
    assert echo.lane.call(MATCH, b"mine", 5.0) == b"mine"


def test_an_interrupt_within_a_call_ends_the_lane(echo: Echo) -> None:
    def interrupted(rest: bytes) -> int:
        raise KeyboardInterrupt

    class Interrupted(socket.socket):
        send = staticmethod(interrupted)  # type: ignore[assignment]

    ours, theirs = socket.socketpair()
    lane = Lane(Interrupted(fileno=theirs.detach()))
    assert lane.take()
    with pytest.raises(KeyboardInterrupt):
        lane.call(MATCH, b"x", 5.0)
    assert not lane.take()
    lane.close()
    ours.close()


@pytest.mark.alone
@pytest.mark.parametrize("size", [10, 4 << 20])
def test_a_server_that_reads_or_answers_in_drops_does_not_stretch_the_deadline(size: int) -> None:
    ours, theirs = socket.socketpair()
    lane = Lane(theirs)
    done = threading.Event()

    def drip() -> None:
        while not done.wait(0.05):
            with contextlib.suppress(BlockingIOError):
                ours.recv(4096, socket.MSG_DONTWAIT)
            ours.send(b"\x00\x10\x00\x00")  # of a frame that never ends

    thread = threading.Thread(target=drip)
    thread.start()
    began_s = time.monotonic()
    assert lane.take()
    with pytest.raises(LaneError) as failed:
        lane.call(MATCH, bytes(size), 0.4)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.3 < time.monotonic() - began_s < 3
    done.set()
    thread.join()
    lane.close()
    ours.close()


def test_a_lane_with_half_a_request_on_it_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    lane = Lane(theirs)
    assert lane.take()
    with pytest.raises(LaneError) as failed:  # nobody reads
        lane.call(MATCH, bytes(MAX_MESSAGE_BYTES), 0.1)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not lane.take()
    lane.close()
    ours.close()


def test_one_call_at_a_time_has_the_lane(echo: Echo) -> None:
    assert echo.lane.take()
    assert not echo.lane.take(), "the other goes by gRPC"
    echo.lane.call(MATCH, b"", 5.0)
    assert echo.ask(b"free") == b"free"


def test_calls_of_many_threads_get_their_own_replies(echo: Echo) -> None:
    wrong: list[bytes] = []

    def run(number: int) -> None:
        num_answered = turn = 0
        while num_answered < 100:  # the lane is not had each time
            turn += 1
            message = b"%d/%d" % (number, turn)
            if echo.lane.take():
                if echo.lane.call(MATCH, message, 5.0) != message:
                    wrong.append(message)
                num_answered += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_server_that_hangs_up_is_noticed_at_once_and_for_good(echo: Echo) -> None:
    echo.lanes.finish(1)
    wait_until(lambda: len(echo.lanes) == 0)
    with pytest.raises(LaneError) as failed:
        echo.ask(b"")
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not echo.lane.take()


def test_closing_a_lane_frees_whoever_waits_on_it(echo: Echo) -> None:
    failures: list[grpc.StatusCode] = []

    def wait() -> None:
        try:
            echo.ask(b"", "Save", timeout_s=30)
        except LaneError as error:
            failures.append(error.code())

    thread = threading.Thread(target=wait)
    thread.start()
    assert echo.saving.wait(10)
    echo.lane.close()
    thread.join(5)
    assert failures == [grpc.StatusCode.UNAVAILABLE]


def test_a_client_that_leaves_ends_its_thread(echo: Echo) -> None:
    echo.lane.close()
    wait_until(lambda: len(echo.lanes) == 0)


def test_a_lane_that_began_after_the_end_is_closed() -> None:
    lanes = Lanes({})
    lanes.close()
    ours, theirs = socket.socketpair()
    lanes.begin(1, ours)
    assert theirs.recv(1) == b""
    theirs.close()


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack("<I", 0) + bytes(40),
        struct.pack("<I", 11) + bytes(40),
        struct.pack("<I", MAX_MESSAGE_BYTES * 2) + bytes(40),
        struct.pack("<III", 12, 1, 0),
        b"GET / HTTP/1.1\r\n\r\n" + bytes(40),
    ],
)
def test_who_does_not_keep_to_the_frames_is_hung_up_on(echo: Echo, sent: bytes) -> None:
    stray, raw = echo.open(2)
    raw.sendall(sent)
    assert raw.recv(1) == b""
    stray.close()
    assert echo.ask(b"others") == b"others"


def test_random_bytes_harm_nobody(echo: Echo) -> None:
    chosen = random.Random(5)
    for number in range(300):
        stray, raw = echo.open(100 + number)
        head = struct.pack("<III16s", chosen.choice([28, 40, 60, chosen.getrandbits(32)]), 1, 0, MATCH)
        raw.sendall(head[: chosen.randrange(29)] + chosen.randbytes(chosen.randrange(64)))
        stray.close()
    wait_until(lambda: len(echo.lanes) == 1)
    assert echo.ask(b"others") == b"others"


# -- on a real server --------------------------------------------------------------------------------------------


@pytest.fixture
def server(start_server: StartServer) -> Server:
    return start_server()


def opened(server: Server) -> SidecarStore:
    return connect(server.address)


def test_calls_of_a_requests_life_go_by_the_lane(server: Server, model: ModelId) -> None:
    with opened(server) as store:
        store.open(model)
        connection = store._link.up()
        taken: list[bytes] = []
        lane = connection.plane.lane
        assert lane is not None
        call: Callable[[bytes, bytes, float], bytes] = lane.call

        def noted(method: bytes, message: bytes, timeout_s: float) -> bytes:
            taken.append(method.rstrip(b"\0"))
            return call(method, message, timeout_s)

        lane.call = noted  # type: ignore[method-assign]
        chain = Chain(Root(model), range(4 * model.block_tokens))
        with store.save(chain, 0, 4) as save:
            save.commit()
        assert store.match(chain, "r").num_blocks == 4
        store.touch(chain, 4)
        mark = store.announce(chain, 0, 4)
        with store.load("r") as load:
            assert len(list(load)) == 4
            # Nothing has ended yet: the link's own thread had nothing to say, for which it takes the lane as well.
            assert taken == [b"Save", b"Commit", b"Match", b"Touch", b"Announce", b"LoadHost"]
        mark.withdraw()
        assert set(taken) < {name.encode() for name in METHODS}
    assert server.check() == []


def test_what_a_miss_shares_with_another_block_comes_with_the_match(server: Server, model: ModelId) -> None:
    with opened(server) as store:
        store.open(model)
        tokens = list(range(2 * model.block_tokens))
        with store.save(made := Chain(Root(model), tokens), 0, 2) as save:
            save.commit()
        stub = store._link.up().stub
        asked: list[str] = []
        partial = stub.MatchPartial
        stub.MatchPartial = lambda *call, **more: (asked.append("MatchPartial"), partial(*call, **more))[1]
        for request, num_tokens in (("nothing alike", 0), ("five alike", 5)):
            other = Chain(Root(model), [*tokens[:num_tokens], *range(60_000, 60_000 + model.block_tokens)])
            assert store.match(other, request).num_blocks == 0
            assert store.match_partial(request) == num_tokens
            assert asked == []
        half = Chain(Root(model), [*tokens[: model.block_tokens + 3], *range(60_000, 60_000 + model.block_tokens)])
        assert store.match(half, "a block and three").num_blocks == 1
        assert (store.match_partial("a block and three"), asked) == (3, ["MatchPartial"])
        assert len(made) == 2


def test_a_withdrawal_goes_with_the_next_call_or_soon_by_itself(
    start_server: StartServer, clock: FakeClock, model: ModelId
) -> None:
    server = start_server(clock=clock)  # which stands still: no mark lapses
    with opened(server) as store, opened(server) as other:
        store.open(model)
        other.open(model)
        chain = Chain(Root(model), range(4 * model.block_tokens))

        def goes_along() -> bool:
            mark = store.announce(chain, 0, 4)
            assert store.match(chain, "before").num_pending_blocks == 4
            mark.withdraw()
            return store.match(chain, "after").num_pending_blocks == 0

        assert any(goes_along() for _ in range(8))  # after a pause of this thread the link's own has taken it already
        mark = store.announce(chain, 0, 4)
        assert other.match(chain, "r").num_pending_blocks == 4
        mark.withdraw()
        wait_until(lambda: not other.match(chain, "r").num_pending_blocks)
    assert server.check() == []


def test_without_its_lane_a_client_goes_on_by_grpc(server: Server, model: ModelId) -> None:
    with opened(server) as store:
        store.open(model)
        lane = store._link.up().plane.lane
        assert lane is not None
        lane.close()
        assert store.match(Chain(Root(model), range(64)), "r").settled
        assert store.is_up


def relayed(client: socket.socket, server: socket.socket, method: str, heard: bool) -> None:
    """Pass frames on, until one of `method`: half of it, or of the reply to it, is the last that passes."""
    with client, server:
        while True:
            request = client.recv(1 << 20)
            last = struct.unpack_from("<III16s", request)[3].rstrip(b"\0") == method.encode()
            if last and not heard:
                server.sendall(request[: len(request) // 2])
                return
            server.sendall(request)
            reply = server.recv(1 << 20)
            client.sendall(reply[: len(reply) // 2] if last else reply)
            if last:
                return


@pytest.mark.parametrize("method", ["Match", "LoadHost", "Save", "Commit"])
@pytest.mark.parametrize("heard", [False, True], ids=["in_the_request", "in_the_reply"])
def test_a_lane_that_breaks_within_a_frame_costs_no_answer_and_is_replaced(
    server: Server, model: ModelId, method: str, heard: bool
) -> None:
    with opened(server) as store:
        store.open(model)
        connection = store._link.up()
        lane = connection.plane.lane
        assert lane is not None
        ours, theirs = socket.socketpair()
        relay = threading.Thread(target=relayed, args=(theirs, lane._end, method, heard))
        lane._take_up(ours)
        relay.start()
        chain = Chain(Root(model), range(4 * model.block_tokens))
        with store.save(chain, 0, 4) as save:
            assert save.indices == (0, 1, 2, 3)
            assert save.commit() == 4
        assert store.match(chain, "r").num_blocks == 4
        with store.load("r") as load:
            assert len(list(load)) == 4
            assert load.intact()
        relay.join(10)
        assert store._link.up() is connection, "nothing else of the connection is given up"
        wait_until(lambda: not lane._broken)
        request = pb.ReleaseRequest(session=connection.session).SerializeToString()
        wait_until(lane.take)
        assert lane.call(b"Release".ljust(16, b"\0"), request, 5.0) == b""
        assert server._door is not None
        assert server._door.num_peers == 1, "the passage that brought it is forgotten"
        wait_until(lambda: len(server._servicer.lanes) == 1)
    assert server.check() == []


@pytest.mark.parametrize("call", ["Save", "LoadHost"])
def test_a_call_that_comes_again_while_the_first_is_at_work_gets_its_answer(
    server: Server, model: ModelId, call: str
) -> None:
    with opened(server) as store:
        store.open(model)
        session = server.sessions.all()[0]
        connection, chain = store._link.up(), Chain(Root(model), range(2 * model.block_tokens))
        request: pb.SaveRequest | pb.LoadRequest
        if call == "Save":
            delta, _ = connection.delta(chain, whole=False)
            contents = pb.Contents(tokens=np.arange(2 * model.block_tokens, dtype="<u4").tobytes())
            request = pb.SaveRequest(session=connection.session, chain=delta, stop=2, contents=contents, lease=9)
            busy = session.account.saving
        else:
            with store.save(chain, 0, 2) as save:
                assert save.commit() == 2
            assert store.match(chain, "r").num_blocks == 2
            request = pb.LoadRequest(session=connection.session, request="r", lease=9)
            busy = session.loading
        with futures.ThreadPoolExecutor(2) as both:
            with busy:
                sent = [both.submit(getattr(connection.stub, call), request, timeout=CALL_DEADLINE_S) for _ in range(2)]
                wait_until(lambda: _num_waiting(call) == 2)
            one, two = (each.result() for each in sent)
        assert one == two
        assert len(one.offsets) == 2 * 8
        connection.done.add(load=9, save=9)
    assert server.check() == []


def _num_waiting(call: str) -> int:
    """Threads of this process that are within a method of the server's rooms."""
    name = {"Save": "save", "LoadHost": "load_host"}[call]
    return sum(
        any(
            frame.name == name and frame.filename.endswith("service/requests.py")
            for frame in traceback.extract_stack(top)
        )
        for top in sys._current_frames().values()
    )


def test_a_process_that_breaks_lane_after_lane_has_two_at_most(echo: Echo) -> None:
    def ask() -> None:
        with pytest.raises(LaneError, match="hung up"):
            echo.ask(b"", "Save", 20.0)

    asked = threading.Thread(target=ask)
    asked.start()
    assert echo.saving.wait(10)
    second, _ = echo.open(1)
    ours, theirs = socket.socketpair()
    assert not echo.lanes.begin(1, ours), "the first is still at its last call"
    assert theirs.recv(1) == b""
    theirs.close()
    assert second.take()
    assert second.call(MATCH, b"x", 5.0) == b"x"
    echo.gate.set()
    wait_until(lambda: len(echo.lanes) == 1)
    asked.join(10)
    assert not echo.lane.take(), "it was hung up on"
    second.close()


def test_another_process_ticket_begins_no_lane_for_a_session(server: Server) -> None:
    path = server.address.removeprefix("unix:")
    code = f"""
import sys
from kvstore.service.knock import knock
with knock({path!r}, 5.0) as passed:
    sys.stdout.write(passed.ticket.hex() + "\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""
    with opened(server) as store:
        connection = store._link.up()
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            ticket = bytes.fromhex(other.stdout.readline())
            notice = next(connection.stub.Session(iter([connection.beat(0.0, ticket)])))
            other.communicate()
        assert not notice.lane_begun
        with knock(path, 5.0) as passed:
            notice = next(connection.stub.Session(iter([connection.beat(0.0, passed.ticket)])))
        assert notice.lane_begun
    assert server.check() == []


def test_a_request_too_large_for_a_message_is_refused_and_the_client_stays(server: Server, model: ModelId) -> None:
    with opened(server) as store:
        store.open(model)
        chain = Chain(Root(model), range(270_000))
        chain.ids = [chain.ids[0]] * 270_000
        with pytest.raises(KVStoreError):
            store.match(chain, "r")
        assert store.is_up


def test_another_process_session_is_refused_on_ones_own_lane(server: Server) -> None:
    with opened(server) as one, opened(server) as two:
        mine, theirs = one._link.up(), two._link.up()
        assert mine.plane.lane is not None
        assert mine.plane.lane.take()
        request = pb.ReleaseRequest(session=theirs.session)
        with pytest.raises(LaneError) as failed:
            mine.plane.lane.call(b"Release".ljust(16, b"\0"), request.SerializeToString(), 5.0)
        assert isinstance(error_of(failed.value), AccessDenied)


def test_what_is_no_message_is_refused_and_not_logged_as_a_fault(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = random.Random(7)
    with opened(server) as store:
        lane = store._link.up().plane.lane
        assert lane is not None
        for number in range(2000):
            method = chosen.choice(METHODS).encode().ljust(16, b"\0")
            assert lane.take()
            with pytest.raises(LaneError) as failed:
                lane.call(method, chosen.randbytes(1 + number % 80), 5.0)
            assert "Internal" not in str(failed.value.trailing_metadata())
            assert failed.value.code() in (
                grpc.StatusCode.INVALID_ARGUMENT,  # no message
                grpc.StatusCode.UNAUTHENTICATED,  # a message by chance, of no session
            )
    assert [record for record in caplog.records if record.exc_info] == []
    assert server.check() == []


def test_a_passage_that_opens_no_session_gets_no_thread(server: Server) -> None:
    with knock(server.address.removeprefix("unix:"), 5.0):
        assert len(server._servicer.lanes) == 0
