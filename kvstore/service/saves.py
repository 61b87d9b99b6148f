# SPDX-License-Identifier: Apache-2.0
"""Saves of clients, and the slots of those that ended while somebody may still be writing.

Invariants
1. A slot is free again only when nobody can be writing to it: every process that was given it has said that it is
   done or is dead, and no call of this server is filling it.
2. Commit is idempotent: what was published is remembered as long as the save.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.errors import UnknownLease
from kvstore.save import BlockSave
from kvstore.wire import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.service.session import Session


class ServedSave:
    """A save of a client. Thread-safe.

    Attributes:
        reply: what Save answered; a repeated call gets it again.
        uploading: held by the one Write that is under way: no other may publish what it is filling.
    """

    def __init__(self, save: BlockSave, owner: Session, reply: pb.SaveReply, block_bytes: int) -> None:
        self.reply = reply
        self._save = save
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._writers: set[int] = {owner.number}
        self._published: dict[int, bool] = {}
        self._num_filling = 0
        self._ended = False
        self.uploading = threading.Lock()

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is open."""
        with self._lock:
            return self._ended or not self._save.num_open

    @property
    def open_bytes(self) -> int:
        """What its open blocks take, as if all of their asked parts were wanted."""
        return self._save.num_open * self._block_bytes

    def commit(self, indices: Sequence[int]) -> list[int]:
        """Publish; returns those of `indices` that are matchable through this save. Raises LeaseError."""
        with self._lock:
            if self._ended:
                raise UnknownLease("the save has ended")
            fresh = [index for index in indices if index not in self._published]
            if fresh:
                done = set(self._save.publish(fresh))
                self._published.update((index, index in done) for index in fresh)
            return [index for index in indices if self._published[index]]

    def published(self, indices: Sequence[int]) -> list[int]:
        """Those of `indices` that are matchable through this save already; publishes nothing."""
        with self._lock:
            return [index for index in indices if self._published.get(index)]

    @contextmanager
    def filling(self) -> Iterator[BlockSave]:
        """Fill its slots from inside this server: they are not given up meanwhile. Raises UnknownLease."""
        with self._lock:
            if self._ended:
                raise UnknownLease("the save has ended")
            self._num_filling += 1
        try:
            yield self._save
        finally:
            with self._lock:
                self._num_filling -= 1
                self._idle.notify_all()

    def join(self, session: Session) -> None:
        """One more process writes. Raises UnknownLease where it ended."""
        with self._lock:
            if self._ended:
                raise UnknownLease("the save has ended")
            self._writers.add(session.number)

    def leave(self, session: Session) -> None:
        """A process writes no more."""
        with self._lock:
            self._writers.discard(session.number)

    def end(self) -> tuple[tuple[int, ...], set[int]]:
        """Give up what is open. Returns slots that may not be reused yet, and the sessions that hold them up."""
        with self._lock:
            self._idle.wait_for(lambda: not self._num_filling)
            if self._ended:
                return (), set()
            self._ended = True
            if not self._writers:
                self._save.abort()
                return (), set()
            return self._save.detach(), set(self._writers)


@dataclass(frozen=True, slots=True)
class _Held:
    save: ServedSave
    slots: tuple[int, ...]
    writers: set[int]
    """Numbers of the sessions whose processes may be writing."""


class Quarantine:
    """Slots that belong to no block and may still be written to. Thread-safe."""

    def __init__(self, release: Callable[[Sequence[int]], None]) -> None:
        self._release = release
        self._lock = threading.Lock()
        self._held: list[_Held] = []

    @property
    def num_slots(self) -> int:
        with self._lock:
            return sum(len(held.slots) for held in self._held)

    def give_up(self, save: ServedSave) -> None:
        """End a save, keeping its slots while somebody may write to them."""
        with self._lock:  # a writer that leaves now finds its slots here
            slots, writers = save.end()
            if slots:
                self._held.append(_Held(save, slots, writers))

    def left(self, session: Session, save: ServedSave | None = None) -> None:
        """A session's process is dead, or has said that it is done: with one save, or with all."""
        with self._lock:
            for held in self._held:
                if save is None or held.save is save:
                    held.writers.discard(session.number)
            free = [held for held in self._held if not held.writers]
            self._held = [held for held in self._held if held.writers]
        for held in free:
            self._release(held.slots)

    def waits_for(self, session: Session) -> bool:
        """Whether slots wait for this session's process."""
        with self._lock:
            return any(session.number in held.writers for held in self._held)

    def clear(self) -> None:
        """Give everything back: no client is left."""
        with self._lock:
            held, self._held = self._held, []
        for each in held:
            self._release(each.slots)
