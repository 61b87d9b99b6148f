# SPDX-License-Identifier: Apache-2.0
"""How many connections a load takes at once, and reading over several.

One connection carries what one core of either side can copy, or what the network gives one flow: a cloud's 5 Gbit/s
beside an interface of 100. Several carry more, unless the cores or the network had no more to give: on two cores that
client and server share, a second one costs a fifth of the rate. So it is measured, as codecs are (`redis_codec`): loads
take as many lanes as before or, by lot, twice or half as many, and what they took decides by ranks (`redis_compared`).
The first begins when loads have taken `_FIRST_S` in all, another once what the last one cost is `_TRIAL_SHARE` of what
loads took since, each in vain twice as late.

A load says something where it could have had either number of lanes, by its size and by what is connected, and where no
other large one was under way: what one takes of a link or of cores by more connections, the other lacks, and both look
at themselves alone. One that failed took as long as it might have: else who always failed would never be known to.

The first lane is the load's own connection, from which its caller reads, also while it waits for others. Those come
from connections beside (`lanes` − 1 for all loads of a process together), each read by a thread, and only where they
lie there connected: more are connected meanwhile, for loads to come. So a load makes do with fewer where others have
taken them or where the server lets nobody in any more; nobody waits for a lane, none fails of one that it did not get,
and what the breaker hears of a load it hears once.

Its values are dealt by groups of some megabytes, each to the lane that has least: all end at about the same time, and
what is needed first comes first. The first values are asked for before the caller knows what follows, as by one lane.

By simulation, loads of 256 MiB that scatter by 30 %: where flows are limited four lanes are found within 33 loads by
median, 52 at most; also where one load in twenty stalls (35, 68) or sizes differ a thousandfold (31, 49). Where each
further lane costs 20 % of the rate, trying costs 0.6 % of the first 500 loads and 0.27 % of 2,000; 10 %, 0.10 % of
10,000. Where four lanes became the slower ones, it takes 670 loads by median until loads take one.
What lost: drawing lots for loads beside others, too (14 to 19 % of the rate where two to six at once shared cores), and
waiting up to 64 times as long after comparisons in vain (2,750 loads until four lanes that grew slower were given up).
On a link that gives each connection 0.25 GB/s, 96 MiB take 402 ms by one lane, 104 by four; 118 where groups went round
by turns, whatever the first lane had early, and 125 where it stood still while others were waited for.

Not in a Cluster: there a load has a connection to each node as it is.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from typing import cast

from kvstore.block import PartKey
from kvstore.errors import TierError
from kvstore.tiers.base import More
from kvstore.tiers.redis_beside import BesideRead, end_all
from kvstore.tiers.redis_compared import SURE, Compared, leads_nowhere
from kvstore.tiers.redis_nodes import Node
from kvstore.tiers.redis_read import Counts, Reader
from kvstore.tiers.redis_wire import Wire

log = logging.getLogger("kvstore.tiers.redis")

_FIRST_S = 5.0
_LEAST_PAUSE_S = 60.0
"""Of loads by one lane, after a comparison in vain. What one cost is only known once it has calls of both kinds, and
connecting is in no call: on two cores three in 12 s of loads cost 8 % of them, and seemed to have cost little."""
_TRIAL_SHARE = 0.005
_SEVERAL_TRIAL_SHARE = 0.02
"""Where loads take several: were one better by now, they lose more than that, and until then they gain much more."""
_MOST_CALLS = 64
"""Of a comparison: what has not shown by then is little."""
_MOST_IN_VAIN = 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what lanes bring.

    Attributes:
        group_bytes: dealt at once.
        least_bytes: of a lane, from which on it is worth its thread, and says how quick it is.
    """

    group_bytes: int = 4 << 20
    least_bytes: int = 8 << 20


class Turn:
    """One load, from when it is known to be large until it ends.

    Attributes:
        num_lanes: that it takes.
        could: that it could have taken.
        is_trial: whether it takes a number that loads may take from now on, and not the one that they do.
    """

    __slots__ = ("could", "is_alone", "is_trial", "num_bytes", "num_lanes")

    def __init__(self, num_lanes: int, num_bytes: int, could: int, *, is_trial: bool, is_alone: bool) -> None:
        self.num_lanes, self.num_bytes, self.could = num_lanes, num_bytes, could
        self.is_trial, self.is_alone = is_trial, is_alone

    def takes(self, num_lanes: int) -> None:
        """So many it takes in the end."""
        if num_lanes != self.num_lanes:
            self.num_lanes = self.could = num_lanes


class LaneChoice:
    """Thread-safe.

    Args:
        most: lanes.
        best: how many loads take to begin with.
    """

    def __init__(self, most: int, best: int = 1, sizes: Sizes = Sizes()) -> None:
        self.sizes = sizes
        self._most = most
        self._lot = random.Random(0)
        self._lock = threading.Lock()
        self._compared = Compared()
        self.best = best
        self._rival = best
        """What is compared with the best; itself where nothing is."""
        self._upwards = True
        self._lost_s = _FIRST_S * _TRIAL_SHARE
        """By loads of the last comparison, beyond what the other number of lanes would have taken."""
        self._since_s = 0.0
        self._num_in_vain = 0
        self._under_way: set[Turn] = set()

    @property
    def is_comparing(self) -> bool:
        return self._rival != self.best

    @property
    def wanted(self) -> int:
        """How many lanes loads may take now."""
        return max(self.best, self._rival)

    def begin(self, num_bytes: int, num_ready: int) -> Turn:
        """A load of so many bytes begins, for which so many lanes are ready. Each turn is ended, or left."""
        with self._lock:
            share = _TRIAL_SHARE if self.best == 1 else _SEVERAL_TRIAL_SHARE
            pause_s = self._lost_s / share
            if self.best == 1 and self._num_in_vain:
                pause_s = max(pause_s, _LEAST_PAUSE_S)
            if not self.is_comparing and self._since_s >= pause_s * (1 << self._num_in_vain):
                self._begin()
            could = max(1, min(num_ready, num_bytes // self.sizes.least_bytes))
            is_alone = not self._under_way
            says_something = self.is_comparing and is_alone and could >= self.wanted
            drawn = self._lot.choice((self.best, self._rival)) if says_something else self.best
            for other in self._under_way:
                other.is_alone = False
            turn = Turn(min(drawn, could), num_bytes, could, is_trial=drawn != self.best, is_alone=is_alone)
            self._under_way.add(turn)
            return turn

    def leave(self, turn: Turn) -> None:
        """It is over, however it ended."""
        with self._lock:
            self._under_way.discard(turn)

    def _begin(self) -> None:
        for _ in range(2):
            rival = self.best * 2 if self._upwards else self.best // 2
            if 1 <= rival <= self._most:
                self._rival, self._lost_s = rival, 0.0
                self._compared.clear()
                return
            self._upwards = not self._upwards

    def took(self, turn: Turn, num_bytes: int, seconds: float) -> None:
        """So many bytes took so long."""
        with self._lock:
            self._since_s += seconds
            counts = turn.is_alone and turn.could >= self.wanted and num_bytes >= self.wanted * self.sizes.least_bytes
            if not counts or not self.is_comparing or turn.num_lanes not in (self.best, self._rival):
                return
            by_rival = turn.num_lanes == self._rival
            extra_s = self._compared.extra_s * num_bytes
            self._lost_s += abs(extra_s) if by_rival is (extra_s > 0) else 0.0
            self._compared.add(float(by_rival), seconds / num_bytes)
            self._decide()

    def _decide(self) -> None:
        slower, count = self._compared.slower, len(self._compared)
        if slower < -SURE:
            log.info("redis: a large load takes %d connections from now on, not %d", self._rival, self.best)
            self.best, self._num_in_vain = self._rival, 0
            if 1 <= (self.best * 2 if self._upwards else self.best // 2) <= self._most:
                self._lost_s = 0.0  # and perhaps further
        elif slower <= SURE and count < _MOST_CALLS and not leads_nowhere(count, slower):
            return
        else:
            self._num_in_vain = min(_MOST_IN_VAIN, self._num_in_vain + 1)
            self._upwards = not self._upwards
        self._rival, self._since_s = self.best, 0.0


class LanesRead:
    """One load: iterate once, and close the iterator.

    Attributes:
        num_lanes: that it took.
        took_s: of receiving, when it has ended: without what the caller does between two values.
        is_typical: whether it was as loads are from now on, and not a trial.
    """

    def __init__(
        self,
        reader: Reader,
        choice: LaneChoice,
        node: Node,
        into: Mapping[PartKey, memoryview],
        more: More | None,
        deadline: float,
        damaged: list[PartKey],
        counts: Counts,
    ) -> None:
        self.took_s = 0.0
        self._reader, self._choice, self._node, self._deadline = reader, choice, node, deadline
        self._into, self._more = into, more
        self._damaged, self._counts = damaged, counts
        self._turn: Turn | None = None
        self._beside: list[BesideRead] = []
        self._own: Iterable[PartKey] = ()
        self._order: list[tuple[int, int]] = []
        """Which lane brings how many of the next keys; lane 0 is the load's own connection."""

    @property
    def num_lanes(self) -> int:
        return 1 + len(self._beside)

    @property
    def is_large(self) -> bool:
        """It was for several lanes to take."""
        return self._turn is not None

    @property
    def is_typical(self) -> bool:
        return self._turn is None or not self._turn.is_trial

    def __iter__(self) -> Generator[list[PartKey], None, None]:
        try:
            with self._node.loads.lease(self._deadline) as wire:
                began_s = time.perf_counter()
                # Closed before the wire is given back: a thread may be receiving from it.
                with closing(self._read(wire)) as reading:
                    for keys in reading:
                        self.took_s += time.perf_counter() - began_s
                        yield keys
                        began_s = time.perf_counter()
                self.took_s += time.perf_counter() - began_s
        except TierError:
            if self._turn is not None:
                limit_s = self.took_s + max(0.0, self._deadline - time.monotonic())
                self._choice.took(self._turn, self._turn.num_bytes, limit_s)
            raise
        else:
            if self._turn is not None:
                self._choice.took(self._turn, self._counts.read_bytes, self.took_s)
        finally:
            if self._turn is not None:
                self._choice.leave(self._turn)

    def _read(self, wire: Wire) -> Generator[list[PartKey], None, None]:
        into, more = self._into, self._more
        if more is None:
            into, then = self._deal({}, into), None
        else:
            then = lambda: self._deal(into, more())
        reading = self._reader.read(wire, into, self._deadline, self._damaged, self._counts, more=then)
        try:
            first = next(reading, None)  # by now all is dealt
            if self._beside:
                yield from self._in_order(first, reading)
            elif first is not None:
                yield first
                yield from reading
        finally:
            reading.close()
            if self._beside:
                end_all(self._beside, self._damaged, self._counts)
                wire.heard = wire.heard or any(lane.heard for lane in self._beside)

    def _deal(
        self, early: Mapping[PartKey, memoryview], rest: Mapping[PartKey, memoryview]
    ) -> Mapping[PartKey, memoryview]:
        """Of `rest`, what the load's own connection is to bring beside the early ones. Others begin with theirs."""
        num_bytes, choice, lanes = _about(early) + _about(rest), self._choice, self._node.lanes
        if num_bytes < 2 * choice.sizes.least_bytes:
            return rest
        if (num_more := min(choice.wanted, num_bytes // choice.sizes.least_bytes) - 1) > lanes.num_idle:
            lanes.prepare(num_more)
        self._turn = turn = choice.begin(num_bytes, 1 + lanes.num_idle)
        if turn.num_lanes == 1 or not early.keys().isdisjoint(rest):  # what comes twice comes in turn
            turn.takes(1)
            return rest
        groups = list(_groups(rest, choice.sizes.group_bytes))
        spare = (lanes.spare() for _ in range(min(turn.num_lanes, bool(early) + len(groups)) - 1))
        leases = [lease for lease in spare if lease is not None]
        turn.takes(1 + len(leases))
        return self._hand_out(early, groups, leases)

    def _hand_out(
        self,
        early: Mapping[PartKey, memoryview],
        groups: Sequence[dict[PartKey, memoryview]],
        leases: Sequence[AbstractContextManager[Wire]],
    ) -> Mapping[PartKey, memoryview]:
        """Begin to read over `leases`, and give what is left to the load's own connection."""
        hands: list[dict[PartKey, memoryview]] = [{} for _ in range(1 + len(leases))]
        sizes = [_bytes(early), *(0 for _ in leases)]
        if early:
            self._order.append((0, len(early)))
        for group in groups:
            lane = sizes.index(min(sizes))
            sizes[lane] += _bytes(group)
            hands[lane] |= group
            self._order.append((lane, len(group)))
        self._own = [*early, *hands[0]]
        self._beside = [BesideRead(lease, hand) for lease, hand in zip(leases, hands[1:], strict=True)]
        for read in self._beside:
            read.start(self._reader, self._deadline)
        return hands[0]

    def _in_order(
        self, first: list[PartKey] | None, reading: Generator[list[PartKey], None, None]
    ) -> Iterator[list[PartKey]]:
        own = _Lane(self._own, lambda: next(reading, None), first or [])

        def heard(read: BesideRead) -> list[PartKey] | None:
            while not own.has_ended and read.is_silent:
                own.listen()  # it must not stand still while the others are awaited
            return cast(list[PartKey] | None, read.listen())

        lanes = [own, *(_Lane(read.into, partial(heard, read), []) for read in self._beside)]
        for lane, num_keys in self._order:
            yield from lanes[lane].take(num_keys)
        for read in self._beside:
            read.join()


class _Lane:
    """What one connection brings, handed out by as many keys as the caller's order has of it in a row.

    Args:
        keys: that it is to bring.
        hear: gives the next of them that have come, in order, or None at the end.
        come: those that have come already.
    """

    def __init__(self, keys: Iterable[PartKey], hear: Callable[[], list[PartKey] | None], come: list[PartKey]) -> None:
        self.has_ended = False
        self._numbers = {key: number for number, key in enumerate(keys)}
        self._hear = hear
        self._come = come
        self._num_passed = 0

    def listen(self) -> None:
        """Wait for more, or the end. Raises what `hear` does."""
        said = self._hear()
        if said is None:
            self.has_ended = True
        else:
            self._come = self._come + said

    def take(self, num_keys: int) -> Iterator[list[PartKey]]:
        """Those of the next `num_keys` keys that come. Raises what `hear` does."""
        self._num_passed += num_keys
        while True:
            until = bisect_left(self._come, self._num_passed, key=self._numbers.__getitem__)
            found, self._come = self._come[:until], self._come[until:]
            if found:
                yield found
            # Later ones are there: what is missing of these, is.
            if self.has_ended or self._come or (found and self._numbers[found[-1]] == self._num_passed - 1):
                return
            self.listen()


def _groups(into: Mapping[PartKey, memoryview], num_bytes: int) -> Iterator[dict[PartKey, memoryview]]:
    """In their order, so many bytes each."""
    group: dict[PartKey, memoryview] = {}
    size = 0
    for key, buffer in into.items():
        group[key] = buffer
        size += buffer.nbytes
        if size >= num_bytes:
            yield group
            group, size = {}, 0
    if group:
        yield group


def _bytes(into: Mapping[PartKey, memoryview]) -> int:
    return sum(buffer.nbytes for buffer in into.values())


def _about(into: Mapping[PartKey, memoryview]) -> int:
    """As many bytes as that is where all are as large as the first: looking at each would cost small loads."""
    return len(into) * next(iter(into.values())).nbytes if into else 0
