# SPDX-License-Identifier: Apache-2.0
"""Every error of kvstore has its status, and comes back from it as itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from kvstore import errors
from kvstore.errors import KVStoreError, TierError
from kvstore.service import status
from kvstore.service.calls import Calls
from kvstore.service.metrics import Latencies


def all_errors(kind: type[KVStoreError] = KVStoreError) -> Iterator[type[KVStoreError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from all_errors(below)


PUBLIC = [kind for kind in all_errors() if kind.__module__ in (errors.__name__, status.__name__)]


def made(kind: type[KVStoreError]) -> KVStoreError:
    return kind("redis", "what: happened") if issubclass(kind, TierError) else kind("what: happened")


@contextmanager
def serving(method: str, call: Callable[[bytes, grpc.ServicerContext], bytes]) -> Iterator[grpc.Channel]:
    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(call)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(0).wait()


@pytest.fixture(scope="module")
def failing() -> Iterator[grpc.Channel]:
    """A server whose calls fail with the error that the request names."""
    kinds = {kind.__name__: kind for kind in PUBLIC}

    def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
        name = request.decode()
        if name in kinds:
            status.abort_with(context, made(kinds[name]))
        context.abort(grpc.StatusCode[name], "from elsewhere")
        return b""

    with serving("Fail", fail) as channel:
        yield channel


@pytest.fixture
def late() -> Iterator[grpc.Channel]:
    """A server whose calls have come after their deadline."""
    answer = Calls(Latencies(), 1).unary("Late", lambda request, context: request)

    def call(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.time_remaining = lambda: 0.0  # type: ignore[method-assign]
        answered: bytes = answer(request, context)
        return answered

    with serving("Late", call) as channel:
        yield channel


def test_the_table_has_every_error() -> None:
    assert set(PUBLIC) == set(status.CODES)


@pytest.mark.parametrize("kind", PUBLIC)
def test_an_error_comes_back_as_itself(failing: grpc.Channel, kind: type[KVStoreError]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        failing.unary_unary("/test/Fail")(kind.__name__.encode())
    error = status.error_of(caught.value)
    assert type(error) is kind
    assert str(error) == str(made(kind))
    assert not status.is_transport(caught.value)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_a_status_from_elsewhere_is_one_of_ours_too(failing: grpc.Channel, code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        failing.unary_unary("/test/Fail")(code.name.encode())
    error = status.error_of(caught.value)
    assert isinstance(error, KVStoreError)
    assert str(error) == "from elsewhere"
    lost = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
    assert status.is_transport(caught.value) == (code in lost)


def test_a_call_that_comes_too_late_is_one_that_was_not_answered(late: grpc.Channel) -> None:
    """Not one of a server that drains, whose end would be waited for. A client that was starved may read the answer."""
    with pytest.raises(grpc.RpcError) as caught:
        late.unary_unary("/test/Late")(b"")
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert status.is_transport(caught.value)


def test_an_error_without_a_row_has_that_of_the_class_above_it() -> None:
    class NewLeaseError(errors.LeaseExpired):
        """Of some later day."""

    assert status.code_of(NewLeaseError("x")) is grpc.StatusCode.NOT_FOUND
