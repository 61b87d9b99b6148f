# SPDX-License-Identifier: Apache-2.0
"""Who connects, shows no credential, and stays: what that takes from others ends by itself."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.block import ModelId, Root
from kvstore.errors import CapacityError
from kvstore.service.server import _REFLECTIONS, _SPARE_CONNECTIONS
from kvstore.service.streams import StallWatch
from kvstore.wire import kvstore_pb2 as pb
from kvstore.wire.kvstore_pb2_grpc import KVStoreStub
from tests.conftest import chain_of, load_all, save_all
from tests.patient import connect
from tests.service.conftest import StartServer
from tests.waiting import eventually

pytestmark = pytest.mark.slow  # as many connections and streams as a server takes

OPEN: dict[str, object] = {"listen_tcp": "127.0.0.1:0", "serve_anyone_on_the_network_without_authentication": True}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings


def is_open(connection: socket.socket) -> bool:
    """Whether the server has not hung up yet; takes what it says."""
    try:
        while data := connection.recv(1 << 16):
            assert data
    except BlockingIOError:
        return True
    except ConnectionError:
        pass
    return False


@pytest.mark.parametrize(
    "said", [b"", PREFACE[:10], PREFACE], ids=["nothing", "half a preface", "a handshake, no call"]
)
def test_a_connection_that_asks_for_nothing_is_closed(start_server: StartServer, said: bytes) -> None:
    server = start_server(service={**OPEN, "silent_connection_s": 1.0})
    host, _, port = server.addresses[1].rpartition(":")
    begun_s = time.monotonic()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(said)
        connection.setblocking(False)
        assert eventually(lambda: not is_open(connection), 20)
        assert time.monotonic() - begun_s > 0.5, "not sooner"


def test_a_client_that_asks_for_nothing_keeps_its_connection(start_server: StartServer, model: ModelId) -> None:
    server = start_server(service={**OPEN, "silent_connection_s": 0.3})
    with connect(server.addresses[1]) as client:
        client.open(model)
        chain = chain_of(Root(model), 3)
        save_all(client, chain)
        lost = client._link.up().lost
        assert not lost.wait(1.5)
        assert load_all(client, chain) == ["host"] * 3


def test_connections_of_one_place_leave_the_others_theirs_and_are_free_again_by_themselves(
    start_server: StartServer, model: ModelId
) -> None:
    server = start_server(service={**OPEN, "max_sessions": 4, "silent_connection_s": 3.0})
    host, _, port = server.addresses[1].rpartition(":")
    most = 4 + _SPARE_CONNECTIONS
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(most + 20)]
        for each in silent:
            each.setblocking(False)
        assert eventually(lambda: sum(map(is_open, silent)) == most)
        with connect(server.addresses[0]) as client:
            client.open(model)
            assert save_all(client, chain_of(Root(model), 2)) == 2
        with connect(server.addresses[1], wait_s=20.0) as client:
            client.open(model)
            assert load_all(client, chain_of(Root(model), 2)) == ["host"] * 2


def silent_streams(call: Callable[[Iterator[Any]], Iterator[Any]], number: int, stack: ExitStack) -> list[Any]:
    """Streams that send nothing until the stack is left."""
    ended = threading.Event()
    stack.callback(ended.set)

    def nothing() -> Iterator[Any]:
        ended.wait(60)
        yield from ()

    begun = [call(nothing()) for _ in range(number)]
    for each in begun:
        stack.callback(each.cancel)  # type: ignore[attr-defined]
    return begun


def code_of(stream: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        next(stream)
    code: grpc.StatusCode = raised.value.code()  # type: ignore[attr-defined]
    return code


def test_streams_that_do_not_say_whose_they_are_leave_half_of_them_to_others_and_end(
    start_server: StartServer, model: ModelId
) -> None:
    server = start_server(service={**OPEN, "max_streams": 8})
    with ExitStack() as stack, connect(server.addresses[0]) as known:
        known.open(model)
        channel = stack.enter_context(grpc.insecure_channel(server.addresses[1]))
        begun = silent_streams(KVStoreStub(channel).Session, 12, stack)
        assert eventually(lambda: sum(not each.is_active() for each in begun) == 12 - 4)
        refused = [each for each in begun if not each.is_active()]
        assert {code_of(each) for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert save_all(known, chain_of(Root(model), 2)) == 2
        watching = known._link.up().stub.Watch(pb.WatchRequest(session=known._link.up().session))
        next(watching)
        watching.cancel()
        assert {code_of(each) for each in begun if each not in refused} == {grpc.StatusCode.CANCELLED}


def test_tools_that_ask_nothing_hold_few_threads_and_end(start_server: StartServer, model: ModelId) -> None:
    server = start_server(service={**OPEN, "max_streams": 1})
    server._servicer.stalls._first_s = 1.0
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(server.addresses[1]))
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        begun = silent_streams(ask, 60, stack)  # more than the server has threads
        with connect(server.addresses[0]) as client:
            client.open(model)
            assert save_all(client, chain_of(Root(model), 2)) == 2
        assert eventually(lambda: not any(each.is_active() for each in begun), 20)
        assert len(begun) > _REFLECTIONS
        (told,) = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
        assert told.list_services_response.service


def test_a_stream_is_a_strangers_until_its_first_message() -> None:
    stalls = StallWatch(30.0, first_s=30.0, most_strangers=1)
    arrived, waiting = threading.Event(), threading.Event()

    def late() -> Iterator[bytes]:
        waiting.set()
        arrived.wait(10)
        yield b"a"
        yield b"b"

    stream = stalls.receiving(late(), lambda: None)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(next(stream)))
    thread.start()
    assert waiting.wait(5)
    with pytest.raises(CapacityError, match="1 streams have not said whose they are"):
        stalls.first(iter([b"x"]), lambda: None)
    arrived.set()
    thread.join()
    assert stalls.first(iter([b"x"]), lambda: None) == b"x"
    assert (found, list(stream)) == ([b"a"], [b"b"])
    assert stalls.first(iter(()), lambda: None) is None
    stalls.close()
