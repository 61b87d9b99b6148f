# SPDX-License-Identifier: Apache-2.0
"""What Prometheus sees: the store's counters and gauges, and how long calls took.

Nothing is done on a request's way but two additions in `Latencies.observe`. A scrape asks for a snapshot, on the
endpoint's own thread, and names its values: `host.hit_blocks` becomes `kvstore_host_hits_total`. What the tables
below do not know is shown as untyped rather than left out, so that a new counter is seen at once.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UntypedMetricFamily,
)
from prometheus_client.registry import Collector

from kvstore.errors import ConfigError
from kvstore.service.spans import recorder
from kvstore.service_options import host_and_port
from kvstore.stats import BOUNDS_S, Durations

Snapshot = Callable[[], Mapping[str, float]]
Timings = Callable[[], Mapping[str, Durations]]
_MAX_SCRAPES = 16
_PATIENCE_S = 5.0
"""With a scraper that is silent, or does not read."""
_ENDS_WITHIN_S = 0.1
_LONGEST = 6
"""Times that, of one scrape: who says or reads a byte now and then is never silent."""


# ---- latencies ----


class Latencies:
    """How long calls took, by name, in buckets. Thread-safe, about a microsecond a call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: defaultdict[str, Durations] = defaultdict(Durations)
        self._failures: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._record = recorder()

    def observe(self, rpc: str, seconds: float, failure: str = "") -> None:
        """Count a call; `failure` names its status code where it failed."""
        with self._lock:
            self._calls[rpc].add(seconds)
            if failure:
                self._failures[rpc, failure] += 1
        if self._record is not None:
            self._record(rpc, seconds, failure)

    def measure(self, rpc: str) -> Measured:
        """A context manager that observes what runs inside it; an exception counts under its class's name."""
        return Measured(self, rpc)

    def rows(self) -> list[tuple[str, Durations]]:
        """By name, sorted."""
        with self._lock:
            return [(rpc, calls.copy()) for rpc, calls in sorted(self._calls.items())]

    def failures(self) -> list[tuple[str, str, int]]:
        """(name, status code, number), sorted."""
        with self._lock:
            return sorted((rpc, code, number) for (rpc, code), number in self._failures.items())


class Measured:
    """One call being measured."""

    __slots__ = ("_began_s", "_latencies", "_rpc")

    def __init__(self, latencies: Latencies, rpc: str) -> None:
        self._latencies = latencies
        self._rpc = rpc

    def __enter__(self) -> Self:
        self._began_s = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = "" if kind is None else kind.__name__
        self._latencies.observe(self._rpc, time.perf_counter() - self._began_s, failure)


# ---- names ----


@dataclass(frozen=True, slots=True)
class _Name:
    """What one of the store's values is called outside, with its labels in order."""

    name: str
    help: str
    counter: bool = True
    labels: tuple[tuple[str, str], ...] = ()


def _failure(reason: str) -> _Name:
    return _Name(
        "failures", "What went wrong in this tier, by reason; each is a shorter hit.", labels=(("reason", reason),)
    )


def _swept(found: str) -> _Name:
    return _Name("swept_blocks", "What a sweep put right, by what it found.", labels=(("found", found),))


_OF_A_TIER = {
    "hit_blocks": _Name("hits", "Blocks asked for and found in this tier."),
    "missed_blocks": _Name("misses", "Blocks asked for and not found in this tier."),
    "partial_hit_tokens": _Name("partial_hit_tokens", "Tokens of blocks that only began as what was asked for."),
    "read_blocks": _Name("read_blocks", "Parts of blocks read."),
    "read_bytes": _Name("read_bytes", "Bytes of blocks read."),
    "read_s": _Name("read_seconds", "Time spent reading, summed over reads."),
    "written_blocks": _Name("written_blocks", "Parts of blocks written."),
    "written_bytes": _Name("written_bytes", "Bytes of blocks written."),
    "evicted_blocks": _Name("evictions", "Blocks dropped for want of space."),
    "evicted_bytes": _Name("evicted_bytes", "Bytes dropped for want of space."),
    "lost_blocks": _Name("lost_blocks", "Blocks evicted that no lower tier was believed to hold."),
    "quota_refused_blocks": _Name("quota_refused_blocks", "Blocks refused because their tenant's quota is used up."),
    "decoded_blocks": _Name("decoded_blocks", "Parts of blocks read that a codec had made smaller."),
    "decoded_saved_bytes": _Name("decoded_saved_bytes", "Bytes that codecs spared reads."),
    "decode_s": _Name("decode_seconds", "Time spent decoding, in reads."),
    "encoded_namespaces": _Name(
        "encoded_namespaces", "Namespaces written with a codec now, because that is measured to be faster.", False
    ),
    "raw_namespaces": _Name("raw_namespaces", "Namespaces written raw now.", counter=False),
    "send_bytes_per_s": _Name("send_bytes_per_second", "What writes to the server carry, lately.", counter=False),
    "receive_bytes_per_s": _Name("receive_bytes_per_second", "What reads carry, lately.", counter=False),
    "lanes": _Name("lanes", "Connections that a large load takes, as was measured to be fastest.", counter=False),
    "touched_blocks": _Name("touched_blocks", "Blocks whose time of last use was renewed."),
    "retired_blocks": _Name("retired_blocks", "Parts of blocks that go first now: closed, or in a host alone."),
    "dropped_touches": _Name("dropped_touches", "Chains used whose time of last use was not renewed: too many waited."),
    "dropped_marks": _Name("dropped_marks", "Notes of where chains part that were not left: too many waited."),
    "refreshed_ttls": _Name("refreshed_ttls", "Values whose TTL began anew."),
    "aged_blocks": _Name("aged_blocks", "Parts of blocks dropped because nobody used them for long."),
    "aged_bytes": _Name("aged_bytes", "Bytes dropped because nobody used them for long."),
    "swept_empty": _swept("empty"),
    "swept_orphans": _swept("orphans"),
    "swept_damaged": _swept("damaged"),
    "swept_lowered": _swept("lowered"),
    "blocks": _Name("blocks", "Blocks there now.", counter=False),
    "pinned_blocks": _Name("pinned_blocks", "Blocks that may not be evicted now.", counter=False),
    "used_bytes": _Name("used_bytes", "Bytes in use now.", counter=False),
    "capacity_bytes": _Name("capacity_bytes", "Bytes there is room for; 0 where nothing limits it.", counter=False),
    "available": _Name(
        "breaker_closed", "1 while the tier is asked, 0 while its breaker refuses calls.", counter=False
    ),
    "may_write": _Name(
        "may_write", "0 while the server's user lacks rights that writes need; loads go on.", counter=False
    ),
    "lookup_failures": _failure("lookup"),
    "read_failures": _failure("read"),
    "write_failures": _failure("write"),
    "clear_failures": _failure("clear"),
    "upkeep_failures": _failure("upkeep"),
    "corrupt_blocks": _failure("corrupt"),
    "foreign_blocks": _failure("foreign"),
    "missing_blocks": _failure("missing"),
    "orphans_refused": _failure("orphan"),
    "foreign_books": _failure("foreign_books"),
    "out_of_memory": _failure("out_of_memory"),
}
_OTHERS = {
    "match.requests": _Name("matches", "Requests that asked what is there."),
    "match.asked_blocks": _Name("match_asked_blocks", "Blocks that matches asked for."),
    "load.requests": _Name("loads", "Loads begun."),
    "load.errors": _Name("load_errors", "Loads that ended by a bug."),
    "save.requests": _Name("saves", "Saves begun."),
    "save.blocks": _Name("saved_blocks", "Blocks that became matchable."),
    "save.bytes": _Name("saved_bytes", "Bytes of blocks that became matchable."),
    "save.refused_blocks": _Name("save_refused_blocks", "Blocks that found no room, or whose parent is not there."),
    "save.quarantined_slots": _Name("quarantined_slots", "Slots whose writer may still be writing.", counter=False),
    "lease.live": _Name("leases", "Holds and leases now.", counter=False),
    "lease.expired": _Name("leases_expired", "Holds and leases that ran out of time."),
    "marks.live": _Name("announcements", "Ranges being computed by somebody now.", counter=False),
    "mover.queued_bytes": _Name("mover_queued_bytes", "Bytes waiting to go to lower tiers.", counter=False),
    "mover.demoted_blocks": _Name("mover_demoted_blocks", "Blocks written to lower tiers."),
    "mover.declined_blocks": _Name(
        "mover_declined_blocks", "Blocks that stay in the host by mover.min_priority or min_return_probability."
    ),
    "mover.dropped_blocks": _Name("mover_dropped_blocks", "Blocks not written because the queue was full."),
    "mover.dropped_touches": _Name(
        "mover_dropped_touches", "Chains used whose lower tiers were not told, because too many waited already."
    ),
    "mover.dropped_risen": _Name(
        "mover_dropped_risen",
        "Chains brought up that stay below as they were, because too many waited already; exclusive tiers only.",
    ),
    "mover.failed_blocks": _Name("mover_failed_blocks", "Blocks given up after a second failure."),
    "mover.restored_blocks": _Name("mover_restored_blocks", "Blocks written again because a tier had lost them."),
    "mover.errors": _Name("mover_errors", "Demotions ended by a bug."),
    "service.sessions": _Name("clients", "Clients with a session now.", counter=False),
    "service.over_share": _Name(
        "over_share", "Matches and saves answered with less, because their client kept its share of the memory already."
    ),
    "service.streams": _Name("streams", "Streaming calls open now.", counter=False),
    "ttft.saved_s": _Name("ttft_saved_seconds", "Time to first token that connectors report as saved."),
}


def name_of(key: str) -> _Name | None:
    """What the value `key` is called, without the prefix kvstore_; None where it has no name yet."""
    if key in _OTHERS:
        return _OTHERS[key]
    tier, _, what = key.partition(".")
    known = _OF_A_TIER.get(what)
    if known is None:
        return None
    return _Name(f"{tier}_{known.name}", f"{tier}: {known.help}", known.counter, known.labels)


# ---- the endpoint ----


class StoreCollector(Collector):
    """Yields one snapshot a scrape."""

    def __init__(self, snapshot: Snapshot, latencies: Latencies, timings: Timings) -> None:
        self._snapshot = snapshot
        self._latencies = latencies
        self._timings = timings

    def collect(self) -> Iterable[Metric]:
        yield from self._values()
        yield from self._calls()
        yield self._tiers()

    def _values(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily | UntypedMetricFamily] = {}
        for key, value in self._snapshot().items():
            named = name_of(key)
            if named is None:
                name = "kvstore_" + "".join(letter if letter.isalnum() else "_" for letter in key)
                families[name] = UntypedMetricFamily(name, f"{key} of the store.", value=value)
                continue
            name = f"kvstore_{named.name}"
            labels = [label for label, _ in named.labels]
            kind = CounterMetricFamily if named.counter else GaugeMetricFamily
            family = families.setdefault(name, kind(name, named.help, labels=labels))
            family.add_metric([text for _, text in named.labels], value)
        yield from families.values()

    def _calls(self) -> Iterator[Metric]:
        durations = HistogramMetricFamily(
            "kvstore_rpc_seconds", "Duration of calls, streams to their end.", labels=["rpc"]
        )
        for rpc, calls in self._latencies.rows():
            durations.add_metric([rpc], _buckets(calls), sum_value=calls.total_s)
        yield durations
        failures = CounterMetricFamily("kvstore_rpc_failures", "Calls that failed.", labels=["rpc", "code"])
        for rpc, code, number in self._latencies.failures():
            failures.add_metric([rpc, code], number)
        yield failures

    def _tiers(self) -> Metric:
        durations = HistogramMetricFamily(
            "kvstore_tier_seconds",
            "Duration of a tier's lookups, reads and writes, each a batch of blocks.",
            labels=["tier", "operation"],
        )
        for name, found in self._timings().items():
            tier, _, operation = name.partition(".")
            durations.add_metric([tier, operation], _buckets(found), sum_value=found.total_s)
        return durations


def _buckets(found: Durations) -> list[tuple[str, float]]:
    """As Prometheus has them: each with all that is shorter."""
    running, buckets = 0, []
    for bound, count in zip([*map(str, BOUNDS_S), "+Inf"], found.counts, strict=True):
        running += count
        buckets.append((bound, float(running)))
    return buckets


class _Handler(WSGIRequestHandler):
    """Says nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class _Listener(ThreadingMixIn, WSGIServer):
    """A few scrapes at once: others must not take the descriptors and threads of the service."""

    daemon_threads = True
    request_queue_size = 128  # of 5 others fill it at once, and a scrape tries again after a second, three, seven

    def __init__(self, host: str, port: int, patience_s: float) -> None:
        self._begun: dict[socket.socket, float] = {}
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._free = threading.BoundedSemaphore(_MAX_SCRAPES)
        self._patience_s = patience_s
        super().__init__((host, port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.settimeout(self._patience_s)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._begun[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started, so none gives it back
            self._end(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._end(request)

    def _end(self, request: socket.socket) -> None:
        del self._begun[request]
        self._free.release()

    def service_actions(self) -> None:
        """Called twice a second: hang up on scrapes that take too long, whose threads then end."""
        late_s = time.monotonic() - _LONGEST * self._patience_s
        for request, began_s in list(self._begun.items()):
            if began_s < late_s:
                with contextlib.suppress(OSError):  # it ends just now
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """It hung up, or was silent for too long."""


class MetricsEndpoint:
    """Serves `/metrics` on threads of its own. A context manager."""

    def __init__(
        self,
        listen: str,
        snapshot: Snapshot,
        latencies: Latencies,
        timings: Timings = dict,
        *,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """Listen on `host:port`; port 0 takes a free one. Raises ConfigError where that is not possible.

        Who is silent, or does not read, for `patience_s` is given up; whoever takes six times as long in all, too.
        """
        host, port = host_and_port(listen, "service.metrics_listen")
        registry = CollectorRegistry()
        registry.register(StoreCollector(snapshot, latencies, timings))
        try:
            self._server = _Listener(host, port, patience_s)
        except OSError as error:
            raise ConfigError(f"service.metrics_listen is {listen}: cannot listen there: {error.strerror}") from error
        self._server.set_app(make_wsgi_app(registry))
        # It looks so often whether it shall end; with the half second of the default a server took as long to stop.
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_ENDS_WITHIN_S,), name="kvstore-metrics", daemon=True
        )
        self._thread.start()
        self.address = f"{f'[{host}]' if ':' in host else host}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
