# SPDX-License-Identifier: Apache-2.0
"""A servicer's methods on a server, and calls on a channel, with messages of bulk bytes left as they are.

Generated code would parse and build every message. Read, Fetch and Write carry megabytes: on the side where they do,
their methods deal in bytes (`kvstore.service.bulk`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

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
    handler: grpc.RpcMethodHandler[Any, Any] = make(behavior, _parse(method.input_type), _build(method.output_type))
    return handler


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _parse(kind: Any) -> Callable[[bytes], Any] | None:
    return None if kind.full_name in _BULK else GetMessageClass(kind).FromString


def _build(kind: Any) -> Callable[[Any], bytes] | None:
    return None if kind.full_name in _BULK else GetMessageClass(kind).SerializeToString


class BulkStub:
    """The calls that carry bytes, on a channel. Read and Fetch give bytes, Write takes them."""

    def __init__(self, channel: grpc.Channel) -> None:
        path = f"/{_SERVICE.full_name}"
        self.Read: Any = channel.unary_stream(f"{path}/Read", pb.LoadRequest.SerializeToString, None)
        self.Fetch: Any = channel.unary_stream(f"{path}/Fetch", pb.PeekRequest.SerializeToString, None)
        self.Write: Any = channel.stream_unary(f"{path}/Write", None, pb.WriteReply.FromString)
