# SPDX-License-Identifier: Apache-2.0
"""Errors of kvstore as gRPC status, and back.

A status carries its code for everybody, and the error's class by name in the trailing metadata for clients of ours:
what the server raises is what its client raises, message included. `tests/service/test_status.py` holds that every
error has its row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import grpc

from kvstore import errors
from kvstore.errors import KVStoreError, TierError

ERROR_KEY = "kvstore-error"


class UnknownSession(KVStoreError):
    """The server does not know the session: it was restarted, or dropped the client. Open again."""


class UnknownChain(KVStoreError):
    """The server does not have that chain any more, or another one under its number. Send it whole."""


CODES: dict[type[KVStoreError], grpc.StatusCode] = {
    KVStoreError: grpc.StatusCode.UNKNOWN,
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.LeaseError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.LeaseExpired: grpc.StatusCode.NOT_FOUND,
    errors.UnknownLease: grpc.StatusCode.NOT_FOUND,
    errors.TierError: grpc.StatusCode.UNKNOWN,
    errors.TierUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.TierTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CorruptBlock: grpc.StatusCode.DATA_LOSS,
    errors.AccessDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.ServiceUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.MappingClosed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ProtocolError: grpc.StatusCode.FAILED_PRECONDITION,
    UnknownSession: grpc.StatusCode.UNAUTHENTICATED,
    UnknownChain: grpc.StatusCode.NOT_FOUND,
}

_BY_NAME = {kind.__name__: kind for kind in CODES}
_BY_CODE: dict[grpc.StatusCode, type[KVStoreError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.ConfigError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.CapacityError,
    grpc.StatusCode.NOT_FOUND: errors.UnknownLease,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: UnknownSession,
    grpc.StatusCode.FAILED_PRECONDITION: errors.ProtocolError,
    grpc.StatusCode.UNIMPLEMENTED: errors.ProtocolError,
    grpc.StatusCode.UNAVAILABLE: errors.ServiceUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.ServiceUnavailable,
    grpc.StatusCode.CANCELLED: errors.ServiceUnavailable,
}
"""What a status means that came without a name: from another implementation, a proxy, or gRPC itself."""


def code_of(error: KVStoreError) -> grpc.StatusCode:
    """The code of an error's class, or of the nearest class above it."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def name_of(error: KVStoreError) -> str:
    """The class that a client raises for `error`: its own, or the nearest above it that has a row."""
    return next(kind for kind in type(error).__mro__ if kind in CODES).__name__


def abort_with(context: grpc.ServicerContext, error: KVStoreError) -> NoReturn:
    """End a call with the status of `error`."""
    context.set_trailing_metadata(((ERROR_KEY, name_of(error)),))
    context.abort(code_of(error), str(error))
    raise AssertionError("abort returned")


def error_of(failure: grpc.RpcError) -> KVStoreError:
    """The error that a failed call stands for."""
    # Every RpcError that a call raises is a grpc.Call as well; the stubs of grpc do not say so.
    code, details = failure.code(), failure.details() or ""
    kind = _BY_NAME.get(_name_in(failure)) or _BY_CODE.get(code, KVStoreError)
    if issubclass(kind, TierError):
        tier, _, message = details.partition(": ")
        return kind(tier, message)
    return kind(details or code.name)


def _name_in(failure: grpc.RpcError) -> str:
    """The class that our own servers name; empty from others."""
    metadata: Iterable[tuple[str, str | bytes]] = failure.trailing_metadata() or ()  # type: ignore[assignment]
    return next((str(value) for key, value in metadata if key == ERROR_KEY), "")


def is_transport(failure: grpc.RpcError) -> bool:
    """Whether gRPC itself failed the call: no answer, or none in time."""
    lost = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    return not _name_in(failure) and failure.code() in lost
