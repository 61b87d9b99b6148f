# SPDX-License-Identifier: Apache-2.0
"""What a client says that it is computing: by calls, renewed for as long as it does.

A mark is the server's, under the number that it has here: withdrawn by that number, and gone with the session.
"""

from __future__ import annotations

import itertools

from kvstore.block import Chain
from kvstore.service.connection import Connection
from kvstore.service.link import Link
from kvstore.service.plane import Down
from kvstore.wire import kvstore_pb2 as pb

_numbers = itertools.count(1)


class SentAnnouncement:
    """Implements `kvstore.api.Announcement` by calls."""

    def __init__(self, link: Link, chain: Chain, start: int, stop: int) -> None:
        self._link = link
        self._chain = chain
        self._start = start
        self._stop = stop
        self._number = next(_numbers)
        self._sent: tuple[Connection, pb.Announced] | None = None

    def renew(self) -> None:
        try:
            connection = self._link.up()
            self._link.about(connection, self._chain, lambda delta, _: self._announce(connection, delta))
        except Down:
            pass

    def _announce(self, connection: Connection, delta: pb.ChainDelta) -> None:
        start, stop, number = self._start, self._stop, self._number
        self._sent = connection, pb.Announced(chain=delta.chain, start=start, stop=stop, number=number)
        session = connection.session
        request = pb.AnnounceRequest(session=session, chain=delta, start=start, stop=stop, number=number)
        self._link.call(connection, connection.stub.Announce, request)

    def withdraw(self) -> None:
        """Goes with the next call, or soon by itself; what a session announced ends with it."""
        sent, self._sent = self._sent, None
        if sent is not None:
            self._link.ended(sent[0], announced=sent[1])
