# SPDX-License-Identifier: Apache-2.0
"""How often a client says that it is there: often enough for its session, and no more often than there is reason to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import pytest

from kvstore.block import Root
from kvstore.service.connection import Connection
from kvstore.service.plane import DataPlane
from kvstore.wire import kvstore_pb2 as pb
from kvstore.wire.kvstore_pb2_grpc import KVStoreStub
from tests.conftest import chain_of, load_all, save_all
from tests.patient import connect
from tests.service.conftest import StartServer
from tests.waiting import wait_until

TICK_S = 1.0
"""Between two looks at whether there is something to say, where a lease is 4 s or longer."""


class Hours(threading.Event):
    """Time that passes when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now_s += timeout
        assert self.now_s < 100_000, "no beat came"
        return self.is_set()


@dataclass
class FakeLane:
    """A lane that breaks at some time, once."""

    now_s: Callable[[], float]
    breaks_s: float = float("inf")
    begun: list[bool] = field(default_factory=list)

    def ask_anew(self) -> bytes:
        return b"ticket" if self.now_s() >= self.breaks_s and not self.begun else b""

    def begin_anew(self, served: bool) -> None:
        self.begun.append(served)


@dataclass
class FakePlane:
    lane: FakeLane
    ticket: bytes = b""
    boot_id: bytes = b""

    def prefaulted(self) -> None: ...


class Beating:
    """A connection whose stream of beats runs in its own hours; the server says `prefaulted` from `ready_s` on."""

    def __init__(self, lease_s: float, *, ready_s: float = 0.0, breaks_s: float = float("inf")) -> None:
        self.hours = Hours()
        self.lane = FakeLane(lambda: self.hours.now_s, breaks_s)
        self.saved: list[tuple[float, float]] = []
        """(when, how many seconds) a caller noted."""
        self._ready_s = ready_s
        self._notices: list[pb.Notice] = []
        self._beats: Iterator[pb.Beat] = iter(())
        self._connection = Connection(
            cast(Any, None),
            cast(KVStoreStub, self),
            cast(DataPlane, FakePlane(self.lane)),
            pb.OpenReply(session=b"s", lease_s=lease_s),
            lost=self.hours,
        )

    def Session(self, beats: Iterator[pb.Beat]) -> Any:  # noqa: N802  # as the stub has it
        self._beats = beats
        return self

    def add_done_callback(self, callback: Callable[[object], None]) -> None: ...

    def __next__(self) -> pb.Notice:
        return self._notices.pop(0)

    def _take_saved(self) -> float:
        due = [item for item in self.saved if item[0] <= self.hours.now_s]
        self.saved = [item for item in self.saved if item not in due]
        return sum(seconds for _, seconds in due)

    def until(self, end_s: float) -> list[tuple[float, pb.Beat]]:
        """(when, beat) of every beat up to the first after `end_s`, each answered at once."""
        said = []
        self._connection.begin_beats(self._take_saved, lambda: None)
        for beat in self._beats:
            said.append((self.hours.now_s, beat))
            if self.hours.now_s > end_s:
                break
            self._notices.append(pb.Notice(prefaulted=self.hours.now_s >= self._ready_s, lane_begun=bool(beat.ticket)))
        return said


@pytest.mark.parametrize("lease_s", [0.2, 1.0, 4.0, 8.0, 12.0, 20.0, 30.0, 300.0])
def test_beats_with_nothing_to_say_come_three_times_a_lease_at_least(lease_s: float) -> None:
    times = [at_s for at_s, _ in Beating(lease_s).until(100 * max(lease_s, TICK_S))]
    assert times[0] == 0.0
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) <= lease_s / 3


@pytest.mark.parametrize(("lease_s", "every_s"), [(8.0, 2.0), (12.0, 3.0), (20.0, 5.0), (30.0, 5.0), (300.0, 5.0)])
def test_beats_with_nothing_to_say_are_left_out_as_far_as_the_lease_allows(lease_s: float, every_s: float) -> None:
    times = [at_s for at_s, _ in Beating(lease_s).until(60.0)]
    assert {after - before for before, after in pairwise(times)} == {every_s}


def test_until_the_server_has_touched_its_memory_every_beat_is_sent() -> None:
    times = [at_s for at_s, _ in Beating(30.0, ready_s=4.0).until(12.0)]
    assert times == [0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 14.0]


def test_what_there_is_to_say_does_not_wait_for_an_idle_beat() -> None:
    beating = Beating(30.0, breaks_s=17.0)
    beating.saved = [(11.5, 2.5), (12.5, 0.5)]
    said = beating.until(25.0)
    assert [at_s for at_s, _ in said] == [0.0, 5.0, 10.0, 12.0, 13.0, 17.0, 22.0, 27.0]
    assert [beat.ttft_saved_s for _, beat in said] == [0.0, 0.0, 0.0, 2.5, 0.5, 0.0, 0.0, 0.0]
    assert [beat.ticket for _, beat in said] == [b"", b"", b"", b"", b"", b"ticket", b"", b""]
    assert beating.lane.begun == [True]


@pytest.mark.slow
def test_a_session_that_says_nothing_outlives_its_lease_and_so_do_its_loads(
    start_server: StartServer, root: Root
) -> None:
    lease_s = 8.0  # the shortest for which a beat is left out
    server = start_server(request={"lease_s": lease_s})
    with connect(server.address) as store:
        store.open(root.model)
        chain = chain_of(root, 4)
        save_all(store, chain)
        store.match(chain, "r")
        (session,) = server.sessions.all()
        heard: list[float] = []
        with store.load("r") as load:
            end_s = time.monotonic() + lease_s + 1.5
            while time.monotonic() < end_s:
                if session.last_seen_s not in heard:
                    heard.append(session.last_seen_s)
                time.sleep(0.05)
            assert load.intact()
            assert server.stats()["lease.live"] == 1
            assert [block.index for block in load] == [0, 1, 2, 3]
        assert server.sessions.all() == [session]
        # One every two seconds; calls and the server's own upkeep make none.
        assert 4 <= len(heard) <= 7, heard
        wait_until(lambda: server.stats()["lease.live"] == 0)
        assert load_all(store, chain, request="again") == ["host"] * 4
