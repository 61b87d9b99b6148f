# SPDX-License-Identifier: Apache-2.0
"""How many connections a load takes at once, and reading over several.

One connection carries what one core of either side can copy, or what the network gives one flow: a cloud's 5 Gbit/s
beside an interface of 100. Several carry more, unless the cores or the network had no more to give: on two cores that
client and server share, a second one costs a fifth of the rate. So it is measured, as codecs are (`redis_codec`): loads
take as many lanes as before or, by lot, twice or half as many, and what they took decides by ranks (`redis_compared`).
The first begins when loads have taken `_FIRST_S` in all, another once what the last one cost is `_TRIAL_SHARE` of what
loads took since, each in vain twice as late.

A load's values are dealt to its lanes by groups of some megabytes, in turns: all lanes end at about the same time, and
what is needed first comes first. The first values are asked for before the caller knows what follows, as by one lane.
Lanes beyond the first come from connections of their own (`lanes` − 1 for all loads of a process together), and where
others have taken those a load makes do with fewer: neither other loads nor presence checks wait for one that is large.

Not in a Cluster: there a load has a connection to each node as it is.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from itertools import chain, islice

from kvstore.block import PartKey
from kvstore.errors import TierError
from kvstore.tiers.base import More
from kvstore.tiers.redis_beside import BesideRead, Stopped, end_all
from kvstore.tiers.redis_compared import SURE, Compared, leads_nowhere
from kvstore.tiers.redis_nodes import Node
from kvstore.tiers.redis_pool import Connections
from kvstore.tiers.redis_read import Counts, Reader

log = logging.getLogger("kvstore.tiers.redis")

_GROUP_BYTES = 4 << 20
_LEAST_LANE_BYTES = 8 << 20
"""A lane is worth its thread, and says how quick it is, from so many bytes on."""
_FIRST_S = 5.0
_TRIAL_SHARE = 0.005
_MOST_CALLS = 64
"""Of a comparison: what has not shown by then is little."""
_MOST_IN_VAIN = 6


class LaneChoice:
    """Thread-safe.

    Args:
        most: lanes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lot = random.Random(0)
        self._lock = threading.Lock()
        self._compared = Compared()
        self.best = 1
        self._rival = 1
        """What is compared with the best; itself where nothing is."""
        self._upwards = True
        self._lost_s = _FIRST_S * _TRIAL_SHARE
        """By loads of the last comparison, beyond what the other number of lanes would have taken."""
        self._since_s = 0.0
        self._num_in_vain = 0

    @property
    def is_comparing(self) -> bool:
        return self._rival != self.best

    def draw(self) -> int:
        """For the load that begins now."""
        with self._lock:
            if not self.is_comparing and self._since_s >= self._lost_s / _TRIAL_SHARE * (1 << self._num_in_vain):
                self._begin()
            return self._lot.choice((self.best, self._rival))

    def _begin(self) -> None:
        for _ in range(2):
            rival = self.best * 2 if self._upwards else self.best // 2
            if 1 <= rival <= self._most:
                self._rival, self._lost_s = rival, 0.0
                self._compared.clear()
                return
            self._upwards = not self._upwards

    def took(self, num_lanes: int, num_bytes: int, seconds: float) -> bool:
        """A load that was large enough took so long; whether its number of lanes is the one that stays."""
        with self._lock:
            self._since_s += seconds
            if not self.is_comparing or num_lanes not in (self.best, self._rival):
                return num_lanes == self.best
            extra_s = self._compared.extra_s * num_bytes
            self._lost_s += abs(extra_s) if (num_lanes == self._rival) is (extra_s > 0) else 0.0
            self._compared.add(float(num_lanes == self._rival), seconds / num_bytes)
            slower = self._compared.slower
            if slower < -SURE:
                log.info("redis: a large load takes %d connections from now on, not %d", self._rival, self.best)
                self.best, self._num_in_vain, self._lost_s = self._rival, 0, 0.0  # and perhaps further
            elif (
                slower <= SURE and len(self._compared) < _MOST_CALLS and not leads_nowhere(len(self._compared), slower)
            ):
                return False
            else:
                self._num_in_vain = min(_MOST_IN_VAIN, self._num_in_vain + 1)
                self._upwards = not self._upwards
            self._rival, self._since_s = self.best, 0.0
            return False


class LanesRead:
    """One load: iterate once, and close the iterator.

    Attributes:
        num_lanes: that it took.
        took_s: of receiving, when it has ended: by one lane, without what the caller does between two values.
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
        self.num_lanes = 1
        self.took_s = 0.0
        self.is_typical = True
        self._reader, self._choice, self._node, self._deadline = reader, choice, node, deadline
        self._into, self._more = into, more
        self._damaged, self._counts = damaged, counts

    def __iter__(self) -> Generator[list[PartKey], None, None]:
        num_lanes = min(self._choice.draw(), 1 + self._node.lanes.num_free)
        yield from self._by_one() if num_lanes == 1 else self._by_several(num_lanes)
        if (num_bytes := self._counts.read_bytes) >= 2 * _LEAST_LANE_BYTES:
            self.is_typical = self._choice.took(self.num_lanes, num_bytes, self.took_s)

    def _by_one(self) -> Iterator[list[PartKey]]:
        with self._node.loads.lease(self._deadline) as wire:
            began_s = time.perf_counter()
            # Closed before the wire is given back: a thread may be receiving from it.
            reading = self._reader.read(wire, self._into, self._deadline, self._damaged, self._counts, more=self._more)
            with closing(reading):
                for keys in reading:
                    self.took_s += time.perf_counter() - began_s
                    yield keys
                    began_s = time.perf_counter()
            self.took_s += time.perf_counter() - began_s

    def _by_several(self, num_lanes: int) -> Iterator[list[PartKey]]:
        early, rest = self._into, self._more
        if rest is None:
            early, *groups = _groups(self._into)
            rest = lambda: dict(chain.from_iterable(group.items() for group in groups))
        first = _Lane(self._node.loads, early)
        lanes = [first]
        try:
            first.start(self._reader, self._deadline, first.dealt)
            yield from self._in_order(lanes, early, rest(), num_lanes)
            for lane in lanes:
                lane.join()
        finally:
            first.deal({})  # it may still wait to hear what is its
            end_all(lanes, self._damaged, self._counts)
        self.num_lanes = len(lanes)
        self.took_s = max(lane.took_s for lane in lanes)

    def _in_order(
        self,
        lanes: list[_Lane],
        early: Mapping[PartKey, memoryview],
        rest: Mapping[PartKey, memoryview],
        num_lanes: int,
    ) -> Iterator[list[PartKey]]:
        """Deals out `rest` to the first lane, which has the early ones, and to others that are added to `lanes`."""
        num_bytes = sum(buffer.nbytes for buffer in chain(early.values(), rest.values()))
        groups = list(_groups(rest))
        num_lanes = max(1, min(num_lanes, num_bytes // _LEAST_LANE_BYTES, 1 + len(groups)))
        hands: list[dict[PartKey, memoryview]] = [{} for _ in range(num_lanes)]
        for number, group in enumerate(groups, 1):
            hands[number % num_lanes].update(group)
        lanes += [_Lane(self._node.lanes, hand) for hand in hands[1:]]
        lanes[0].deal(hands[0])
        for lane in lanes[1:]:
            lane.start(self._reader, self._deadline)
        yield from lanes[0].take(len(early))
        for number, group in enumerate(groups, 1):
            yield from lanes[number % num_lanes].take(len(group))


class _Lane(BesideRead):
    """What one connection brings, handed out by as many keys as the caller's order has of it in a row."""

    def __init__(self, connections: Connections, into: Mapping[PartKey, memoryview]) -> None:
        super().__init__(connections, into)
        self._dealt = threading.Event()
        self._rest: Mapping[PartKey, memoryview] = {}
        self._numbers = {key: number for number, key in enumerate(into)}
        self._come: deque[PartKey] = deque()
        self._num_passed = 0
        self._ended = False

    def deal(self, rest: Mapping[PartKey, memoryview]) -> None:
        """What follows of the load is this; once."""
        if not self._dealt.is_set():
            self._rest = rest
            self._numbers |= {key: number for number, key in enumerate(rest, len(self._numbers))}
            self._dealt.set()

    def dealt(self) -> Mapping[PartKey, memoryview]:
        """Waits for `deal`."""
        self._dealt.wait()
        if self.stopped.is_set():
            raise Stopped
        return self._rest

    def take(self, num_keys: int) -> Iterator[list[PartKey]]:
        """Those of the next `num_keys` keys that come. Raises what the read raised."""
        self._num_passed += num_keys
        while not self._ended:
            until = 0
            while until < len(self._come) and self._numbers[self._come[until]] < self._num_passed:
                until += 1
            if until:
                found = list(islice(self._come, until))
                for _ in found:
                    self._come.popleft()
                yield found
                if self._numbers[found[-1]] == self._num_passed - 1:
                    return
            if self._come:
                return  # a later key: those before it are not there
            said = self.listen()
            if isinstance(said, TierError):
                raise said
            if said is None:
                self._ended = True
            elif isinstance(said, list):
                self._come.extend(said)


def _groups(into: Mapping[PartKey, memoryview]) -> Iterator[dict[PartKey, memoryview]]:
    """In their order, some megabytes each."""
    group: dict[PartKey, memoryview] = {}
    num_bytes = 0
    for key, buffer in into.items():
        group[key] = buffer
        num_bytes += buffer.nbytes
        if num_bytes >= _GROUP_BYTES:
            yield group
            group, num_bytes = {}, 0
    if group:
        yield group
