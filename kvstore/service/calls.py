# SPDX-License-Identifier: Apache-2.0
"""What every call of the service goes through: errors become status, streams are limited, time is taken."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import grpc

from kvstore.errors import CapacityError, KVStoreError
from kvstore.service.status import abort_with, code_of

log = logging.getLogger("kvstore.service")

Request = TypeVar("Request", contravariant=True)
Reply = TypeVar("Reply", covariant=True)


class Timed(Protocol):
    """What a method may ask about its call, however it came. A `grpc.ServicerContext` is one."""

    def time_remaining(self) -> float | None:
        """Seconds until nobody waits for the answer; None where that was not said."""


class Unary(Protocol[Request, Reply]):
    def __call__(self, request: Request, context: grpc.ServicerContext) -> Reply: ...


class Streaming(Protocol[Request, Reply]):
    def __call__(self, request: Request, context: grpc.ServicerContext) -> Iterator[Reply]: ...


class Observer(Protocol):
    """Told of each call: its name, how long it took, and the name of the status it failed with."""

    def observe(self, rpc: str, seconds: float, failure: str = "") -> None: ...


class InternalError(KVStoreError):
    """A fault of the server's own; its log has the trace."""


class Calls:
    """Makes handlers of methods. Thread-safe.

    Streams hold a thread each; past `max_streams` they are refused, so that other calls never wait for one.
    """

    def __init__(self, observer: Observer, max_streams: int) -> None:
        self._observer = observer
        self._streams = threading.BoundedSemaphore(max_streams)
        self.max_streams = max_streams

    def unary(self, name: str, method: Callable[[Any, Any], Reply]) -> Unary[Any, Reply]:
        """A handler that answers once."""

        observed = self.observed(name, method)

        def call(request: Any, context: grpc.ServicerContext) -> Reply:
            _refuse_late(context)
            try:
                return observed(request, context)
            except KVStoreError as error:
                abort_with(context, error)

        return call

    def observed(self, name: str, method: Callable[[Any, Timed], Reply]) -> Callable[[Any, Timed], Reply]:
        """`method`, with its time taken; whatever it raises becomes a KVStoreError."""

        def call(request: Any, context: Timed) -> Reply:
            began_s = time.perf_counter()
            try:
                reply = method(request, context)
            except Exception as error:  # noqa: BLE001 a thread's top
                failure = _failure(name, error)
                self._observer.observe(name, time.perf_counter() - began_s, code_of(failure).name)
                raise failure from None
            self._observer.observe(name, time.perf_counter() - began_s)
            return reply

        return call

    def stream(
        self, name: str, method: Callable[[Any, grpc.ServicerContext], Iterator[Reply]]
    ) -> Streaming[Any, Reply]:
        """A handler that answers many times, or reads many times, and so holds a thread."""

        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Reply]:
            if not self._streams.acquire(blocking=False):
                abort_with(context, CapacityError(f"{self.max_streams} streams are open, which is service.max_streams"))
            began_s = time.perf_counter()
            failure = None
            try:
                yield from method(request, context)
            except grpc.RpcError:  # the other side ended the call while it was being read
                pass
            except Exception as error:  # noqa: BLE001 a thread's top
                failure = _failure(name, error)
            finally:
                self._streams.release()
                status = "" if failure is None else code_of(failure).name
                self._observer.observe(name, time.perf_counter() - began_s, status)
            if failure is not None:
                abort_with(context, failure)

        return call

    def upload(self, name: str, method: Callable[[Any, grpc.ServicerContext], Reply]) -> Unary[Any, Reply]:
        """A handler that reads many times and answers once."""
        answered = self.stream(name, lambda request, context: iter((method(request, context),)))

        def call(request: Any, context: grpc.ServicerContext) -> Reply:
            return next(iter(list(answered(request, context))))

        return call


def _failure(name: str, error: Exception) -> KVStoreError:
    if isinstance(error, KVStoreError):
        return error
    log.exception("%s failed", name)
    return InternalError(f"{name} failed in the server: its log says more")


def _refuse_late(context: grpc.ServicerContext) -> None:
    """A call that waited until nobody waits for it any more is not begun. Who reads this all the same had no answer."""
    left_s = remaining_s(context)
    if left_s is not None and left_s <= 0:
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the call began")


def remaining_s(context: Timed) -> float | None:
    """Seconds until the call's deadline; None where it has none."""
    return context.time_remaining()
