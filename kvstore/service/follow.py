# SPDX-License-Identifier: Apache-2.0
"""A server's block events for as long as one listens: over its restarts, and over connections that break.

What was missed is never passed over in silence: where the server cannot go on after the last event that was told, the
next reply has `gap` set, and whoever keeps a picture of the server's blocks must begin a new one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

from kvstore.errors import CapacityError, ServiceUnavailable
from kvstore.service.admin import Admin
from kvstore.service.status import UnknownSession
from kvstore.wire import kvstore_pb2 as pb

_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 10.0
_PASSING = (ServiceUnavailable, UnknownSession, CapacityError)
"""What may be better the next time: a server that starts, stops, or has too many clients."""


def follow(
    admin: Admin,
    *,
    snapshot: bool,
    with_tokens: bool,
    say: Callable[[str], object],
    sleep: Callable[[float], object] = time.sleep,
) -> Generator[pb.WatchReply]:
    """Replies without end. With `snapshot` one comes first, and another after each gap.

    `say` gets a sentence when the server is lost, and when it is back. Raises KVStoreError for what waiting does not
    mend: a right that was taken away, a server of another version.
    """
    place = _Place()
    backoff_s = _FIRST_BACKOFF_S
    lost = False
    while True:
        try:
            if lost:
                admin.reopen()
            for reply in _replies(admin, place, snapshot=snapshot, with_tokens=with_tokens):
                if lost:
                    say(f"the server at {admin.target.address} is back")
                lost, backoff_s = False, _FIRST_BACKOFF_S
                yield reply
        except _PASSING as error:
            if not lost:
                say(f"lost the server at {admin.target.address} ({error}): trying again")
            lost = True
        if place.is_torn:
            place.forget()
            yield pb.WatchReply(gap=True)
        sleep(backoff_s * random.uniform(0.5, 1.0))
        backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)


@dataclass(slots=True)
class _Place:
    """How far one has got: after event `sequence` of what `boot_id` stands for, where one can go on from there."""

    boot_id: bytes = b""
    sequence: int = 0
    is_torn: bool = False
    """Something was told from which one cannot go on: half a snapshot."""

    def forget(self) -> None:
        self.boot_id, self.sequence, self.is_torn = b"", 0, False


def _replies(admin: Admin, place: _Place, *, snapshot: bool, with_tokens: bool) -> Iterator[pb.WatchReply]:
    """Replies until the server is lost, which is an error; `place` goes with them."""
    while True:
        watching = admin.watch(
            snapshot=snapshot, with_tokens=with_tokens, boot_id=place.boot_id, after_sequence=place.sequence
        )
        with closing(watching) as replies:
            whole = bool(place.boot_id) or not snapshot
            for reply in replies:
                if reply.gap and snapshot:  # in the middle of a stream no snapshot follows by itself
                    place.forget()
                    yield reply
                    break
                whole |= reply.snapshot_done
                place.is_torn = not whole
                if whole:
                    place.boot_id, place.sequence = reply.boot_id, reply.sequence
                yield reply
            else:
                raise ServiceUnavailable("it stopped")
