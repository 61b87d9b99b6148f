# SPDX-License-Identifier: Apache-2.0
"""Which codec a namespace's values are written with: fixed, or by what is measured (`codec = "auto"`).

A codec pays where the bytes that it saves would have taken longer on their way, there and back, than encoding and
decoding them:

    saved × (1/sent per second + 1/received per second)  >  encoding + decoding        all per byte of the part

All of it is measured here: of the two rates what writes and loads of this process saw, of the codec what it did to
parts of this namespace, or, while values go raw, to a piece of one now and then, so seldom that it costs at most
`_TRIAL_SHARE` of the time. Raw is what a namespace begins with and what it goes back to.

That sum only says where it is worth a look. Encoding a value hides behind the sending of the one before, wholly on a
slow link and hardly on a fast one, so the sum can be too low; on a machine whose cores are all busy calls take long
without any link, and it is too high. So whole writes then go out encoded or raw, by lot, and what they took decides
(`redis_compared`), and loads likewise, of values that were written so or so. In a Cluster only writes do: a load's
values come from several nodes at once, while its caller works. The rule:

- The codec comes in once writes, loads, or both together are quicker with it for sure, both together also in seconds,
  and loads do not look slower: requests wait for them and nobody for a write.
- A comparison ends without it once encoded calls are slower for sure, or look less and less like quicker ones
  (`leads_nowhere`). Another follows once what it cost is `_TRIAL_SHARE` of what calls have taken since, twice as late
  each time, or at once where the sum is better than it has been since the last one began.
- With the codec in use one write in `_CONTROL_EVERY` goes raw. It goes where calls are slower with it for sure; where
  they only look so, it is compared again.

A write of several namespaces counts for each: what has no choice of its own only dilutes what is seen.

By simulation, thousands of calls that scatter by 30 %: where they take 13 % less, all writes but the controls are
encoded; 10 % less, 70 to 84 % of them, since one run in four is told late or not at all; as long, up to a half in a
run, 0 to 23 % by mean; 10 % more, 2 to 3 %. It changes at most twice in a thousand writes.
What lost: going by the sum with a margin (raw stayed where lz4 took 13 % less, at 0.2 GB/s, and lz4 came in where it
took 20 % more, on a Unix socket with busy cores); comparisons of 24 calls (13 % at a scatter of 30 %: 2 % of writes
encoded); going raw at once where calls look slower by 1.5 standard deviations, of which one lucky control made 1.7;
and holding the sum against what it was when the codec went: it had just sunk, so the wait never held.

Values say how they are encoded, so what was written before a change stays good.

Rates are of whole calls with at least a megabyte, less one round trip: of shorter ones the latency, which no codec
shortens, would be taken for the link's rate. The median of the last few: one stalled call decides nothing.
"""

from __future__ import annotations

import enum
import logging
import random
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.codecs import CODECS, Codec
from kvstore.errors import ConfigError
from kvstore.tiers.redis_compared import LEAST_WRITES, SURE, Compared, leads_nowhere

if TYPE_CHECKING:
    from kvstore.block import RootId
    from kvstore.stats import Stats

log = logging.getLogger("kvstore.tiers.redis")

AUTO = "auto"
_CANDIDATE = "lz4"
_HOPELESS = 0.25
"""How many times the whole cost must be saved for a look: below, no overlap makes up for it."""
_CONTROL_EVERY = 16
_MOST_SMALL = 96
"""Writes that are too small to say anything, until a comparison ends."""
_MOST_IN_VAIN = 6
_MUCH_BETTER = 1.5
_DOUBTED = 1.5
"""Standard deviations by which encoded calls may look slower before they are compared with as many raw ones again."""
_LEAST_BYTES = 1 << 20
_NUM_CALLS = 9
_MIN_CALLS = 3
_TRIAL_BYTES = 256 << 10
_TRIAL_SHARE = 0.005
_TRIAL_EVERY_S = 1.0
"""At the most often, however little a trial costs."""
_WEIGHT = 0.2
"""Of the newest trial in the average."""
_MAX_ROOTS = 1024
_RAW_ID = CODECS.load("raw").wire_id

Encoded = tuple[int, memoryview]
"""A codec's id and what it left of a part."""


class Link:
    """What the way to the server and back carries, from the last few calls. Thread-safe."""

    def __init__(self) -> None:
        self._sends: deque[float] = deque(maxlen=_NUM_CALLS)
        self._receives: deque[float] = deque(maxlen=_NUM_CALLS)
        self._round_trips: deque[float] = deque(maxlen=_NUM_CALLS)

    def sent(self, num_bytes: int, took_s: float) -> None:
        """So many bytes went out and were acknowledged; encoding them is not in `took_s`."""
        self._note(self._sends, num_bytes, took_s)

    def received(self, num_bytes: int, took_s: float) -> None:
        """So many bytes of values came in; neither the caller's time nor decoding is in `took_s`."""
        self._note(self._receives, num_bytes, took_s)

    def answered(self, took_s: float) -> None:
        """A short question took so long."""
        self._round_trips.append(took_s)

    def _note(self, calls: deque[float], num_bytes: int, took_s: float) -> None:
        if num_bytes >= _LEAST_BYTES:
            calls.append(self.byte_s(num_bytes, took_s))

    def byte_s(self, num_bytes: int, took_s: float) -> float:
        """Seconds a byte of a call, without one round trip: else long calls would look quicker than short ones."""
        return max(0.0, took_s - min(list(self._round_trips), default=0.0)) / num_bytes

    @property
    def send_s(self) -> float | None:
        """Seconds a byte on the way there; None while too little was sent."""
        calls = list(self._sends)
        return statistics.median(calls) if len(calls) >= _MIN_CALLS else None

    @property
    def receive_s(self) -> float | None:
        """Seconds a byte on the way back; as on the way there while too little was received."""
        calls = list(self._receives)
        return statistics.median(calls) if len(calls) >= _MIN_CALLS else self.send_s


class _State(enum.Enum):
    RAW = enum.auto()
    COMPARING = enum.auto()
    ENCODED = enum.auto()


_WORDS = {_State.RAW: "raw", _State.COMPARING: "raw or with {}, by lot,", _State.ENCODED: "with {}"}


class _Average:
    """Of what was seen, the newest counting most; the first is all there is. 0 before."""

    __slots__ = ("_seen", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._seen = False

    def add(self, value: float) -> None:
        self.value += (value - self.value) * (_WEIGHT if self._seen else 1.0)
        self._seen = True


@dataclass(slots=True)
class _Namespace:
    """What the codec does to the parts of one, per byte of a part, and whether it is in use."""

    state: _State = _State.RAW
    writes: Compared = field(default_factory=Compared)
    loads: Compared = field(default_factory=Compared)
    spent_s: float = 0.0
    """On encoding while calls were compared, the last time."""
    load_extra_s: float = 0.0
    """What a byte of encoded loads took more when the codec came in: few raw ones come to compare with since."""
    busy_s: float = 0.0
    """Of calls since then."""
    num_in_vain: int = 0
    """Comparisons in a row that did not bring it in."""
    best_worth: float = 0.0
    """The most times its cost that it saved, by the sum, from the last comparison until values went raw."""
    num_left: int = 0
    """Writes that are too small to say anything, or fail, until a comparison ends."""
    left: _Average = field(default_factory=_Average)
    encode_s: _Average = field(default_factory=_Average)
    decode_s: _Average = field(default_factory=_Average)
    try_at_s: float = float("-inf")

    def may_compare(self, worth: float) -> bool:
        pause_s = (1 << self.num_in_vain) * self.spent_s / _TRIAL_SHARE
        return self.busy_s >= pause_s or worth > _MUCH_BETTER * self.best_worth

    def compare(self) -> None:
        self.state, self.spent_s, self.num_left = _State.COMPARING, 0.0, _MOST_SMALL
        self.best_worth = self.load_extra_s = 0.0
        self.writes.clear()
        self.loads.clear()

    def go_raw(self) -> None:
        if self.state is not _State.RAW:  # it was tried
            self.busy_s = 0.0
            self.num_in_vain = min(_MOST_IN_VAIN, self.num_in_vain + 1)
        self.state = _State.RAW

    def go_in(self) -> None:
        self.state, self.num_in_vain, self.load_extra_s = _State.ENCODED, 0, self.loads.extra_s


class CodecChoice:
    """Encodes parts. Thread-safe; remembers the last `_MAX_ROOTS` namespaces written to.

    Args:
        name: of a codec that is used always, or `auto`.
        now_s: a clock of high resolution.
    """

    def __init__(self, name: str, now_s: Callable[[], float] = time.perf_counter) -> None:
        self.link = Link()
        if name not in CODECS and ":" not in name and name != AUTO:
            raise ConfigError(
                f"unknown codec {name!r}: use one of {', '.join(sorted((AUTO, *CODECS)))}, or 'package.module:Class'"
            )
        self._fixed: Codec | None = None if name == AUTO else CODECS.load(name)()
        self._codec = self._fixed or CODECS.load(_CANDIDATE)()
        self._now_s = now_s
        self._lot = random.Random(0)
        self._lock = threading.Lock()
        self._namespaces: OrderedDict[RootId, _Namespace] = OrderedDict()

    def encodes(self, roots: Iterable[RootId]) -> dict[RootId, bool]:
        """Of which namespaces parts are to be encoded in the write that begins now.

        One lot for all that are compared, and one for all that are controlled: what a write took is not told apart.
        """
        if self._fixed is not None:
            return dict.fromkeys(roots, True)
        ways = {
            _State.RAW: False,
            _State.COMPARING: self._lot.random() < 0.5,
            _State.ENCODED: self._lot.randrange(_CONTROL_EVERY) > 0,
        }
        found = {}
        for root in roots:
            namespace = self._namespace(root)
            with self._lock:
                if namespace.state is _State.COMPARING:
                    namespace.num_left -= 1
                    if namespace.num_left < 0:
                        namespace.go_raw()
                found[root] = ways[namespace.state]
        return found

    def wrote(self, encoded: Mapping[RootId, bool], num_bytes: Mapping[RootId, int], took_s: float) -> None:
        """A write took so long, with encoding; `encoded` as `encodes` said, `num_bytes` of each one's parts."""
        if self._fixed is not None:
            return
        in_all = sum(num_bytes.values())
        for root, is_encoded in encoded.items():
            namespace = self._namespace(root)
            with self._lock:
                namespace.busy_s += took_s * num_bytes[root] / in_all if in_all else 0.0
                if in_all >= _LEAST_BYTES and namespace.state is not _State.RAW:
                    namespace.num_left += 1
                    namespace.writes.add(float(is_encoded), self.link.byte_s(in_all, took_s))
            if namespace.state is _State.COMPARING or (namespace.state is _State.ENCODED and not is_encoded):
                self._decide(root, namespace)

    def loaded(self, root: RootId, num_bytes: int, took_s: float, encoded_share: float) -> None:
        """A load of parts of one namespace took so long, with decoding those that were encoded."""
        with self._lock:
            namespace = self._namespaces.get(root)  # what is only read has nothing to choose
            if namespace is not None:
                namespace.busy_s += took_s
                if num_bytes >= _LEAST_BYTES and namespace.state is not _State.RAW:
                    namespace.loads.add(encoded_share, self.link.byte_s(num_bytes, took_s))

    def encode(self, root: RootId, part: memoryview, item_bytes: int, *, encoded: bool) -> Encoded:
        """`part`, or what the codec makes of it where that is less; `encoded` as `encodes` said of this write."""
        if self._fixed is not None:
            return self._encoded(self._fixed.encode(part, item_bytes), part)
        now_s = self._now_s()
        namespace = self._namespace(root)
        if encoded:
            found = self._encoded(self._codec.encode(part, item_bytes), part)
            took_s = self._now_s() - now_s
            if namespace.state is _State.COMPARING:
                namespace.spent_s += took_s
            self._learn(namespace, len(part), found[1], took_s)
        else:
            found = _RAW_ID, part
        if now_s >= namespace.try_at_s:
            self._try(root, namespace, part, item_bytes)
        return found

    def report(self, name: str, stats: Stats) -> None:
        """Set gauges, under names that begin with the tier's."""
        if self._fixed is not None:
            return
        with self._lock:
            in_use = sum(each.state is _State.ENCODED for each in self._namespaces.values())
            stats.set(f"{name}.encoded_namespaces", in_use)
            stats.set(f"{name}.raw_namespaces", len(self._namespaces) - in_use)
        for direction, seconds in (("send", self.link.send_s), ("receive", self.link.receive_s)):
            if seconds:
                stats.set(f"{name}.{direction}_bytes_per_s", 1 / seconds)

    def _encoded(self, encoded: memoryview | None, part: memoryview) -> Encoded:
        if encoded is None or len(encoded) >= len(part):
            return _RAW_ID, part
        return self._codec.wire_id, encoded

    def _namespace(self, root: RootId) -> _Namespace:
        with self._lock:
            namespace = self._namespaces.get(root)
            if namespace is None:
                namespace = self._namespaces[root] = _Namespace()
                if len(self._namespaces) > _MAX_ROOTS:
                    self._namespaces.popitem(last=False)
            self._namespaces.move_to_end(root)
            return namespace

    # ── measuring ──────────────────────────────────────────────────────────────────────────────────────────

    def _try(self, root: RootId, namespace: _Namespace, part: memoryview, item_bytes: int) -> None:
        """Encode and decode a piece of a part, and decide anew; not before there are rates to go by."""
        if self.link.send_s is None:
            return
        piece = part[: max(item_bytes, _TRIAL_BYTES // item_bytes * item_bytes)]
        began_s = self._now_s()
        encoded = self._codec.encode(piece, item_bytes)
        encoded_s = self._now_s()
        if encoded is not None and len(piece):
            self._codec.decode(encoded, item_bytes, memoryview(bytearray(len(piece))))
            namespace.decode_s.add((self._now_s() - encoded_s) / len(piece))
        if namespace.state is not _State.ENCODED:  # else what is really written says it
            self._learn(namespace, len(piece), piece if encoded is None else encoded, encoded_s - began_s)
        ended_s = self._now_s()
        namespace.try_at_s = ended_s + max(_TRIAL_EVERY_S, (ended_s - began_s) / _TRIAL_SHARE)
        self._decide(root, namespace)

    def _learn(self, namespace: _Namespace, raw_bytes: int, encoded: memoryview, took_s: float) -> None:
        if raw_bytes:
            namespace.left.add(len(encoded) / raw_bytes)
            namespace.encode_s.add(took_s / raw_bytes)

    def _decide(self, root: RootId, namespace: _Namespace) -> None:
        send_s, receive_s = self.link.send_s, self.link.receive_s
        if send_s is None or receive_s is None:
            return
        saved, decode_s = 1 - namespace.left.value, namespace.decode_s.value
        cost_s = namespace.encode_s.value + decode_s
        worth = _over(saved * (send_s + receive_s), cost_s), _over(saved * receive_s, decode_s)
        with self._lock:
            before = namespace.state
            self._change(namespace, *worth)
            after = namespace.state
        if (before is _State.ENCODED) != (after is _State.ENCODED):
            log.info(
                "redis: values of namespace %s are written %s from now on: %s saves %.0f %% of the bytes, worth "
                "%.2f ms a MiB at the rates seen, for %.2f ms that partly overlap",
                root[:8].hex(),
                _WORDS[after].format(self._codec.name),
                self._codec.name,
                100 * saved,
                1e3 * 2**20 * saved * (send_s + receive_s),
                1e3 * 2**20 * cost_s,
            )

    def _change(self, namespace: _Namespace, worth: float, loads_worth: float) -> None:
        """What is to be done from now on, by how many times its cost the codec saves, in all and of loads alone."""
        if namespace.state is not _State.RAW:
            namespace.best_worth = max(namespace.best_worth, worth)
        writes, loads, both = _evidence(namespace)
        extra_s = namespace.writes.extra_s + (namespace.loads.extra_s or namespace.load_extra_s)
        worse = max(writes, both) if extra_s > 0 else 0.0
        num_writes = len(namespace.writes)
        if worth < _HOPELESS:
            namespace.go_raw()
        elif namespace.state is _State.RAW:
            if loads_worth >= 1 and namespace.may_compare(worth):
                namespace.compare()
        elif max(loads, worse) > SURE:
            namespace.go_raw()
        elif namespace.state is _State.ENCODED:
            if worse > _DOUBTED:
                namespace.compare()
        elif min(writes, loads, both) < -SURE and loads < _DOUBTED and extra_s < 0:
            if loads or num_writes >= LEAST_WRITES:
                namespace.go_in()
        elif leads_nowhere(num_writes, min(loads, both)):
            namespace.go_raw()


def _evidence(namespace: _Namespace) -> tuple[float, float, float]:
    """By how many standard deviations encoded writes, loads, and both together are slower than raw ones."""
    writes, loads = namespace.writes.slower, namespace.loads.slower
    return writes, loads, (writes + loads) / max(1, (writes != 0) + (loads != 0)) ** 0.5


def _over(gain: float, cost: float) -> float:
    """How many times `cost` the gain is; for none, as often as one likes."""
    return gain / cost if cost > 0 else float("inf") if gain > 0 else 0.0
