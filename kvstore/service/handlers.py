# SPDX-License-Identifier: Apache-2.0
"""A servicer's methods on a server, and calls on a channel, with messages of bulk bytes left as they are.

Generated code would parse and build every message. Read, Fetch and Write carry megabytes: on the side where they do,
their methods deal in bytes (`kvstore.service.bulk`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from kvstore.errors import ConfigError
from kvstore.service.status import abort_with
from kvstore.wire import kvstore_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["KVStore"]
_BULK = frozenset({"kvstore.v1.ReadReply", "kvstore.v1.WriteRequest"})

SEND_AHEAD = (("grpc.http2.max_frame_size", 16_777_215), ("grpc.http2.lookahead_bytes", 4 << 20))
"""Channel and server options with which a stream of 1 MiB messages is fastest: few frames, few window updates."""


def add_to_server(servicer: object, server: grpc.Server) -> None:
    """Serve all methods of the service. Replaces the generated `add_KVStoreServicer_to_server`."""
    handlers = {method.name: _handler(method, getattr(servicer, method.name)) for method in _SERVICE.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))


def _handler(method: MethodDescriptor, behavior: Callable[..., Any]) -> grpc.RpcMethodHandler[Any, Any]:
    kind = f"{_arity(method.client_streaming)}_{_arity(method.server_streaming)}"
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    readable = (_each_readable if method.client_streaming else _readable)(behavior)
    handler: grpc.RpcMethodHandler[Any, Any] = make(readable, _parse(method.input_type), _build(method.output_type))
    return handler


def _readable(behavior: Callable[..., Any]) -> Callable[..., Any]:
    """`behavior` of one request, refused where its bytes are no message."""

    def call(request: Any, context: grpc.ServicerContext) -> Any:
        if isinstance(request, ConfigError):
            abort_with(context, request)
        return behavior(request, context)

    return call


def _each_readable(behavior: Callable[..., Any]) -> Callable[..., Any]:
    """`behavior` of many requests, to which one whose bytes are no message is an error."""

    def whole(requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            if isinstance(request, ConfigError):
                raise request
            yield request

    return lambda requests, context: behavior(whole(requests), context)


def messages_of(name: str) -> tuple[type[Message], type[Message]]:
    """Request and reply of a method."""
    method = _SERVICE.methods_by_name[name]
    return GetMessageClass(method.input_type), GetMessageClass(method.output_type)


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def read(kind: type[Message], message: bytes) -> Any:
    """A message from its bytes. Raises ConfigError where they are none."""
    try:
        return kind.FromString(message)
    except DecodeError:
        raise ConfigError(f"{len(message)} bytes are no {kind.DESCRIPTOR.name} message") from None


def _parse(kind: Any) -> Callable[[bytes], Any] | None:
    """Reads a message, or returns the error that it is none.

    Raising it would make gRPC answer INTERNAL and log a trace, and a stream it would answer twice, after which the
    server never stops.
    """
    if kind.full_name in _BULK:
        return None
    message_class = GetMessageClass(kind)

    def parse(message: bytes) -> Any:
        try:
            return read(message_class, message)
        except ConfigError as error:
            return error

    return parse


def _build(kind: Any) -> Callable[[Any], bytes] | None:
    return None if kind.full_name in _BULK else GetMessageClass(kind).SerializeToString


class BulkStub:
    """The calls that carry bytes, on a channel. Read and Fetch give bytes, Write takes them."""

    def __init__(self, channel: grpc.Channel) -> None:
        path = f"/{_SERVICE.full_name}"
        self.Read: Any = channel.unary_stream(f"{path}/Read", pb.LoadRequest.SerializeToString, None)
        self.Fetch: Any = channel.unary_stream(f"{path}/Fetch", pb.PeekRequest.SerializeToString, None)
        self.Write: Any = channel.stream_unary(f"{path}/Write", None, pb.WriteReply.FromString)
