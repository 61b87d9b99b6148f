# SPDX-License-Identifier: Apache-2.0
"""The replies of a call with many of them, each under a deadline that the link's thread keeps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import grpc

from kvstore.service.connection import Connection
from kvstore.service.plane import Down
from kvstore.wire import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.service.link import Link


class Replies:
    """The replies of a call, each under a deadline from when it is asked for. Not thread-safe."""

    def __init__(self, link: Link, connection: Connection, call: Any, ended: pb.Ended | None) -> None:
        self._link = link
        self._connection = connection
        self._call = call
        self._ended = ended
        self._begun = False
        self._stalled = False
        self._cancelled = False
        self._watched = link.watch(self._stall, link.options.call_deadline_s)

    def _stall(self) -> None:
        """The link's thread: the next reply did not come in time."""
        self._stalled = True
        self._call.cancel()

    def next(self) -> Any:
        """The next reply; None at the end. Raises Down, or the server's error."""
        options = self._link.options
        self._link.progressed(self._watched, options.progress_s if self._begun else options.call_deadline_s)
        try:
            reply = next(self._call, None)
        except grpc.RpcError as failure:
            self._link.unwatch(self._watched)
            self._connection.done.put_back(self._ended)
            self._ended = None
            if self._cancelled:
                raise Down from None
            if self._stalled:
                raise self._link.stalled(self._connection, begun=self._begun) from None
            raise self._link.failed(self._connection, failure) from None
        self._ended = None  # the server has heard
        self._begun = True
        if reply is None:
            self._link.unwatch(self._watched)
        else:
            self._link.progressed(self._watched, math.inf)  # how long the caller takes says nothing of the server
        return reply

    def cancel(self) -> None:
        """Want no more. Another thread may be waiting for a reply: it gets Down."""
        self._cancelled = True
        ended, self._ended = self._ended, None
        self._connection.done.put_back(ended)
        self._link.unwatch(self._watched)
        self._call.cancel()
