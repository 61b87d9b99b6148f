# SPDX-License-Identifier: Apache-2.0
"""Copies under way between a device and slots: what is waited for, and what a save puts off.

    Copying     a load, or a save that crosses the link as soon as it can
    CopyingOut  a save by windows, of which those that lie in stages can be put off: nobody waits for them
    LinkShare   how much of the link's time those take that are put off

A save reads the engine's pages into stages and sends the stages to slots. The engine may write its pages again when
the last window is in a stage, so to put off a window that lies in one holds nobody up, until the stage is wanted: then
it is sent at once (`kvstore.stages`). So all of a save but its last windows, as many as there are stages, crosses at
the link's rate, since pages are read no sooner; the rest crosses at a share of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvstore.streams import Moment, Stream, Streams


class LinkShare:
    """At most `share` of the time there is a window on the link: after one that took t it rests for t / share − t.

    For windows that are put off, by one thread.

    Args:
        share: above 0, and at most 1.
        wait: returns after so many seconds, or when the event is set.
    """

    def __init__(
        self,
        share: float,
        *,
        now_s: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"the share of the link is {share}: it must be above 0 and at most 1")
        self.share = share
        self.now_s = now_s
        self._wait = wait
        self._next_s = 0.0

    def rest(self, hurried: threading.Event) -> None:
        """Wait until the next window may begin, or for `hurried`."""
        rest_s = self._next_s - self.now_s()
        if rest_s > 0:
            self._wait(hurried, rest_s)

    def took(self, began_s: float) -> None:
        """A window that began then has just crossed."""
        now_s = self.now_s()
        self._next_s = now_s + (now_s - began_s) * (1 / self.share - 1)


class Copying:
    """A copy under way. Its slots, and a load's pages, are not to be touched before it is finished.

    Attributes:
        num_bytes: what moves.
    """

    def __init__(
        self,
        num_bytes: int,
        streams: Streams,
        steps: Sequence[tuple[int, Moment]] = (),
        held: object = None,
        read: Moment | None = None,
    ) -> None:
        self.num_bytes = num_bytes
        self._streams = streams
        self._steps = steps  # (first layer, reached when the step is done), in order
        self._held = held  # what the copies read and write stays alive
        self._told: tuple[Stream, int] | None = None  # which stream of the engine's waits already, for so many steps
        self._read = read  # of a save: when the last page was read, which is before the last byte crossed the link

    @property
    def is_done(self) -> bool:
        return not self._steps or self._streams.is_reached(self._steps[-1][1])

    def finish(self) -> None:
        """Return when it is done, as soon as that can be. Idempotent."""
        if self._steps:
            self._streams.finish(self._steps[-1][1])
        self._held = None

    def finish_by(self, share: LinkShare) -> None:
        """Return when it is done, where that may take longer: what was put off takes no more than `share` of the link.

        Not on a thread that the engine waits for.
        """
        self.finish()

    def hurry(self) -> None:
        """Have `finish_by`, under way or to come, be done as soon as can be. Returns at once."""

    def order(self, layer: int | None = None) -> None:
        """Have the engine's work, as submitted by this thread from now on, wait for `layer` (of the model) or for all.

        After a load the engine then finds it in its pages; after a save it may write the pages again, though their
        bytes may still be on the link. It does not block the caller; `finish` must still be called before the slots
        are released.
        """
        if self._read is not None:
            self._streams.wait(self._streams.engine(), self._read)
            return
        count = sum(layer is None or first <= layer for first, _ in self._steps)
        if not count:
            return
        # Once is enough, and 7 µs for each layer were as much as the copies of a short load.
        engine, told = self._streams.engine(), self._told
        if told is None or told[0] != engine or told[1] < count:
            self._streams.wait(engine, self._steps[count - 1][1])
            self._told = engine, count


class Sending:
    """A window that `filled` says is in its stage, and its way from there to slots. All under the stages' lock.

    Attributes:
        done: when it has crossed; meaningless before it `is_sent`.
        error: why it did not; its slots are not to be published.
    """

    def __init__(self, streams: Streams, filled: Moment, lane: Stream, action: Callable[[], None]) -> None:
        self._streams, self._filled, self._lane, self._action = streams, filled, lane, action
        self.is_sent = False
        self.done: Moment = None
        self.error: Exception | None = None

    def send(self) -> Moment:
        """Submit it, once; when its stage is free. What that raises is for its own save, whoever wants the stage."""
        if not self.is_sent:
            self.is_sent = True
            action, self._action = self._action, _nothing  # a stage remembers this: what holds slots goes with the save
            self._streams.wait(self._lane, self._filled)
            try:
                self._streams.submit(self._lane, action)
            except Exception as error:  # noqa: BLE001  # raised again where the save is finished
                self.error = error
            finally:
                self.done = self._streams.record(self._lane)
        return self.done

    def drop(self) -> None:
        """Never send it, if it was not."""
        if not self.is_sent:
            self.is_sent, self._action, self.done = True, _nothing, self._filled


class CopyingOut(Copying):
    """A save by windows.

    Args:
        lock: of the stages.
        sendings: its windows, in order.
    """

    def __init__(
        self,
        num_bytes: int,
        streams: Streams,
        lock: threading.Lock,
        sendings: Sequence[Sending],
        held: object,
        read: Moment,
    ) -> None:
        super().__init__(num_bytes, streams, (), held, read)
        self._lock = lock
        self._sendings = sendings
        self._hurried = threading.Event()

    @property
    def is_done(self) -> bool:
        # The last first: who asks while it is under way asks once.
        return all(one.is_sent and self._streams.is_reached(one.done) for one in reversed(self._sendings))

    def finish(self) -> None:
        """As `Copying.finish`. Raises, once, what sending a window raised that was put off."""
        self.hurry()
        with self._lock:
            for one in self._sendings:
                one.send()
        for one in self._sendings:
            self._streams.finish(one.done)
        self._held = None
        errors = [one.error for one in self._sendings if one.error is not None]
        for one in self._sendings:
            one.error = None
        if errors:
            raise errors[0]

    def finish_by(self, share: LinkShare) -> None:
        for one in self._sendings:
            if not one.is_sent:
                share.rest(self._hurried)
            if self._hurried.is_set():
                break
            with self._lock:
                put_off = not one.is_sent
                began_s = share.now_s()
                one.send()
            self._streams.finish(one.done)
            if put_off:  # what was sent because its stage was wanted had no choice
                share.took(began_s)
        self.finish()

    def hurry(self) -> None:
        self._hurried.set()


def _nothing() -> None:
    pass
