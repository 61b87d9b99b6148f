# SPDX-License-Identifier: Apache-2.0
"""Which codec a namespace's values are written with: fixed, or by what is measured (`codec = "auto"`).

A codec pays where the bytes that it saves would have taken longer on their way, there and back, than encoding and
decoding them:

    saved × (1/sent per second + 1/received per second)  >  encoding + decoding        all per byte of the part

All of it is measured here: of the two rates what writes and loads of this process saw, of the codec what it did to
parts of this namespace, or, while values go raw, to a piece of one now and then, so seldom that it costs at most
`_TRIAL_SHARE` of the time. Raw is what a namespace begins with and what it goes back to. The codec needs a margin to
come in, and loads alone must gain by it, since requests wait for loads and nobody for a write. Values say how they
are encoded, so what was written before a change stays good.

Rates are of whole calls with at least a megabyte, less one round trip: of shorter ones the latency, which no codec
shortens, would be taken for the link's rate. The median of the last few: one stalled call decides nothing.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.codecs import CODECS, Codec
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.block import RootId
    from kvstore.stats import Stats

log = logging.getLogger("kvstore.tiers.redis")

AUTO = "auto"
_CANDIDATE = "lz4"
_MARGIN_IN = 1.5
"""By how much what is saved must exceed what it costs for the codec to come in; to stay, `_MARGIN_OUT`."""
_MARGIN_OUT = 1.1
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
            round_trip_s = min(list(self._round_trips), default=0.0)
            calls.append(max(0.0, took_s - round_trip_s) / num_bytes)

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

    in_use: bool = False
    left: _Average = field(default_factory=_Average)
    encode_s: _Average = field(default_factory=_Average)
    decode_s: _Average = field(default_factory=_Average)
    try_at_s: float = float("-inf")


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
        self._lock = threading.Lock()
        self._namespaces: OrderedDict[RootId, _Namespace] = OrderedDict()

    def encode(self, root: RootId, part: memoryview, item_bytes: int) -> Encoded:
        """`part`, or what the codec makes of it where that is less and pays."""
        if self._fixed is not None:
            return self._encoded(self._fixed.encode(part, item_bytes), part)
        now_s = self._now_s()
        namespace = self._namespace(root)
        if namespace.in_use:
            encoded = self._encoded(self._codec.encode(part, item_bytes), part)
            self._learn(namespace, len(part), encoded[1], self._now_s() - now_s)
        else:
            encoded = _RAW_ID, part
        if now_s >= namespace.try_at_s:
            self._try(root, namespace, part, item_bytes)
        return encoded

    def report(self, name: str, stats: Stats) -> None:
        """Set gauges, under names that begin with the tier's."""
        if self._fixed is not None:
            return
        with self._lock:
            in_use = sum(namespace.in_use for namespace in self._namespaces.values())
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
        if not namespace.in_use:  # else what is really written says it
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
        margin = _MARGIN_OUT if namespace.in_use else _MARGIN_IN
        pays = saved * (send_s + receive_s) > margin * cost_s and saved * receive_s > margin * decode_s
        if pays != namespace.in_use:
            namespace.in_use = pays
            log.info(
                "redis: values of namespace %s are written %s from now on: %s would save %.0f %% of the bytes, worth "
                "%.2f ms a MiB at the rates seen, for %.2f ms",
                root[:8].hex(),
                f"with {self._codec.name}" if pays else "raw",
                self._codec.name,
                100 * saved,
                1e3 * 2**20 * saved * (send_s + receive_s),
                1e3 * 2**20 * cost_s,
            )
