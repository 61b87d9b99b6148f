# SPDX-License-Identifier: Apache-2.0
"""Block events for clients: one thread notices that something happened and wakes the watchers, a few at a time.

Watchers are not woken by each event: they wait for a pulse, which comes at most every 250 ms and reaches them spread
over that time, so that many watchers cost a match little.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

import grpc

from kvstore.block import RootId
from kvstore.errors import ConfigError
from kvstore.events import Batch, BlockEvent, EventKind, EventLog, Subscription
from kvstore.service.rights import Rights
from kvstore.service.roots import RootBook
from kvstore.service.session import Session
from kvstore.service.status import UnknownSession
from kvstore.wire import kvstore_pb2 as pb

_PULSE_S = 0.25
_NUM_GROUPS = 16
_MAX_BLOCKS = 2_048
"""Of one reply: with 256 tokens each they take 2.2 MB."""
_IDLE_S = 1.0
_KINDS = {
    EventKind.STORED: pb.BlockEvent.STORED,
    EventKind.REMOVED: pb.BlockEvent.REMOVED,
    EventKind.CLEARED: pb.BlockEvent.CLEARED,
}


class Watch:
    """Serves Watch calls over one log of events. Thread-safe."""

    def __init__(self, events: EventLog, roots: RootBook, boot_id: bytes) -> None:
        self._events = events
        self._roots = roots
        self._boot_id = boot_id
        self._lock = threading.Lock()
        self._groups = [threading.Condition(self._lock) for _ in range(_NUM_GROUPS)]
        self._pulses = [0] * _NUM_GROUPS
        self._num_begun = 0
        self._num_watching = 0
        self._somebody = threading.Condition(self._lock)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-watch", daemon=True)
        self._thread.start()

    def watch(
        self, session: Session, request: pb.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchReply]:
        """Replies until the client ends the call, or the server stops."""
        if request.boot_id and len(request.boot_id) != len(self._boot_id):
            raise ConfigError(f"boot_id has {len(request.boot_id)} bytes: give {len(self._boot_id)}, or none")
        rights = session.rights
        before, snapshot = request.boot_id, request.snapshot

        def may_see(root: RootId) -> bool:
            return rights.sees_all or self._roots.allows(rights, root)

        while True:
            start = self._start_of(rights)
            if before and before != start:
                # What happened since lies beyond a restart, or was counted among other roots.
                yield pb.WatchReply(gap=True, boot_id=start)
            after = request.after_sequence if before == start else None
            with self._events.subscribe(snapshot, may_see, after=after) as subscription:
                begin = subscription.sequence if after is None else after
                yield pb.WatchReply(sequence=begin, boot_id=start)  # says at once that it begins, and where
                for batch in self._batches(session, start, subscription, context):
                    yield _reply(batch, start, with_tokens=not request.without_tokens)
            if self._start_of(rights) == start:
                return
            before, snapshot = start, False

    def _start_of(self, rights: Rights) -> bytes:
        """What numbers of events hold for: this start of the server, and what may be seen, since only that is counted.

        That changes where roots are forgotten as well: their blocks stay, and nobody can tell whose they are. As long
        as a boot id, and the boot id itself where everything may be seen.
        """
        if rights.sees_all:
            return self._boot_id
        seen = [None if names is None else sorted(names) for names in (rights.salts, rights.models)]
        return hashlib.sha256(self._boot_id + repr((seen, self._roots.num_folds)).encode()).digest()[
            : len(self._boot_id)
        ]

    def _batches(
        self, session: Session, start: bytes, subscription: Subscription, context: grpc.ServicerContext
    ) -> Iterator[Batch]:
        """Until the call ends, or numbers hold for something else than `start`."""
        with self._lock:
            number = self._num_begun % _NUM_GROUPS
            self._num_begun += 1
            self._num_watching += 1
            seen = self._pulses[number]
            self._somebody.notify()
        try:
            while context.is_active() and not self._closing.is_set():
                if session.ended:
                    raise UnknownSession("the session has ended: open again")
                if self._start_of(session.rights) != start:
                    return
                batch = subscription.poll(max_blocks=_MAX_BLOCKS)
                if batch.events or batch.gap or batch.snapshot_done:
                    yield batch
                    continue
                seen = self._wait_for_pulse(number, seen)
        finally:
            with self._lock:
                self._num_watching -= 1

    def _wait_for_pulse(self, number: int, seen: int) -> int:
        with self._lock:
            self._groups[number].wait_for(lambda: self._pulses[number] != seen or self._closing.is_set(), _IDLE_S)
            return self._pulses[number]

    def _run(self) -> None:
        """Notice events, and wake the watchers, one group after the other."""
        while not self._closing.is_set():
            with self._lock:
                self._somebody.wait_for(lambda: self._num_watching or self._closing.is_set())
            with self._events.subscribe(snapshot=False) as any_event:
                while self._num_watching and not self._closing.is_set():
                    batch = any_event.poll(_IDLE_S, max_blocks=_MAX_BLOCKS)
                    if batch.events or batch.gap:
                        self._pulse()

    def _pulse(self) -> None:
        for number, group in enumerate(self._groups):
            with self._lock:
                self._pulses[number] += 1
                group.notify_all()
            if self._closing.wait(_PULSE_S / _NUM_GROUPS):
                return

    def close(self) -> None:
        """End all calls of Watch."""
        self._closing.set()
        with self._lock:
            self._somebody.notify_all()
            for group in self._groups:
                group.notify_all()
        self._thread.join()


def _reply(batch: Batch, start: bytes, *, with_tokens: bool) -> pb.WatchReply:
    return pb.WatchReply(
        sequence=batch.sequence,
        events=[_message(event, with_tokens=with_tokens) for event in batch.events],
        gap=batch.gap,
        snapshot_done=batch.snapshot_done,
        boot_id=start,
    )


def _message(event: BlockEvent, *, with_tokens: bool) -> pb.BlockEvent:
    return pb.BlockEvent(
        kind=_KINDS[event.kind],
        tier=event.tier,
        root=event.root,
        ids=event.ids,
        parent=event.parent,
        depth=event.depth,
        tokens=event.tokens if with_tokens else b"",
    )
