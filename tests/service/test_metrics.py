# SPDX-License-Identifier: Apache-2.0
"""What `/metrics` says is what the store counted, under names that stay."""

from __future__ import annotations

import ast
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvstore
from kvstore.block import BlockId, BlockMeta, PartKey, Root
from kvstore.errors import ConfigError
from kvstore.service.metrics import _MAX_SCRAPES, Latencies, MetricsEndpoint, name_of
from kvstore.stats import BOUNDS_S
from kvstore.store import KVStore
from kvstore.tiers.base import AS_USED, Later
from tests.conftest import MakeStore, chain_of, load_all, save_all
from tests.fakes import DictTier, FakeClock
from tests.ports import free_ports
from tests.waiting import eventually


def scrape(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_a_scrape_shows_what_the_store_counted_at_that_moment(store: KVStore, root: Root) -> None:
    chain = chain_of(root, 8)
    with MetricsEndpoint("127.0.0.1:0", store.stats, Latencies()) as endpoint:
        assert scrape(endpoint.address).get("kvstore_host_hits_total", 0) == 0
        save_all(store, chain, 0, 6)
        load_all(store, chain)
        seen = scrape(endpoint.address)
    assert seen["kvstore_host_hits_total"] == 6
    assert seen["kvstore_host_misses_total"] == 2
    assert seen["kvstore_host_blocks"] == 6
    assert seen["kvstore_host_used_bytes"] == 6 * 4096
    assert seen["kvstore_host_capacity_bytes"] == 64 * 4096
    assert seen["kvstore_saved_bytes_total"] == 6 * 4096
    assert seen["kvstore_host_read_bytes_total"] == 6 * 4096
    assert seen["kvstore_leases"] == 0


def test_every_value_of_a_store_with_a_lower_tier_has_a_name(make_store: MakeStore, root: Root) -> None:
    store = make_store(4, tiers=[DictTier()], mover={"write": "through"})
    save_all(store, chain_of(root, 4))
    assert store.flush(5)
    save_all(store, chain_of(root, 4, seed=1))
    load_all(store, chain_of(root, 4))
    assert [key for key in store.stats() if name_of(key) is None] == []


def test_failures_of_a_tier_are_one_metric_by_reason() -> None:
    values = {"redis.read_failures": 2.0, "redis.corrupt_blocks": 3.0, "redis.available": 0.0}
    with MetricsEndpoint("127.0.0.1:0", lambda: values, Latencies()) as endpoint:
        seen = scrape(endpoint.address)
    assert seen["kvstore_redis_failures_total{reason=read}"] == 2
    assert seen["kvstore_redis_failures_total{reason=corrupt}"] == 3
    assert seen["kvstore_redis_breaker_closed"] == 0


def test_each_tier_has_histograms_of_its_lookups_reads_and_writes(
    make_store: MakeStore, root: Root, clock: FakeClock
) -> None:
    class Slow(DictTier):
        """Takes 20 ms a lookup, 200 a read and 10 a write."""

        def contains(self, keys: Sequence[PartKey], deadline_s: float) -> list[bool]:
            clock.time_s += 0.02
            return super().contains(keys, deadline_s)

        def read(self, into: Mapping[PartKey, memoryview], deadline_s: float) -> Iterator[list[PartKey]]:
            clock.time_s += 0.2
            yield from super().read(into, deadline_s)

        def write(
            self,
            parts: Mapping[PartKey, memoryview],
            meta: Mapping[BlockId, BlockMeta],
            deadline_s: float,
            later: Later = AS_USED,
        ) -> set[PartKey]:
            clock.time_s += 0.01
            return super().write(parts, meta, deadline_s, later)

    store = make_store(4, tiers=[Slow()], mover={"write": "through"})
    save_all(store, chain_of(root, 4))
    assert store.flush(5)
    store.drop_host()
    with MetricsEndpoint("127.0.0.1:0", store.stats, Latencies(), store.durations) as endpoint:
        before = scrape(endpoint.address)
        assert load_all(store, chain_of(root, 4)) == ["dict"] * 4
        seen = scrape(endpoint.address)

    def bucket(le: str, operation: str, tier: str = "dict") -> float:
        return seen[f"kvstore_tier_seconds_bucket{{le={le},operation={operation},tier={tier}}}"]

    assert "kvstore_tier_seconds_count{operation=read,tier=dict}" not in before
    assert (bucket("0.01", "lookup"), bucket("0.025", "lookup")) == (0, 1)
    num_reads = bucket("+Inf", "read")
    assert (bucket("0.1", "read"), bucket("0.25", "read")) == (0, num_reads)
    assert num_reads > 0
    assert bucket("0.005", "write") == 0
    assert bucket("0.025", "write") == bucket("+Inf", "write") > 0
    assert bucket("+Inf", "lookup", "host") == 1
    assert seen["kvstore_tier_seconds_sum{operation=read,tier=dict}"] == pytest.approx(0.2 * num_reads)


def test_a_value_without_a_name_is_shown_rather_than_left_out() -> None:
    values: Mapping[str, float] = {"novel.thing-count": 7.0, "ttft.saved_s": 1.5}
    with MetricsEndpoint("127.0.0.1:0", lambda: values, Latencies()) as endpoint:
        seen = scrape(endpoint.address)
    assert seen["kvstore_novel_thing_count"] == 7
    assert seen["kvstore_ttft_saved_seconds_total"] == 1.5


def test_calls_fall_into_buckets_by_their_duration() -> None:
    latencies = Latencies()
    latencies.observe("Match", 0.0002)
    latencies.observe("Match", BOUNDS_S[2])  # a bound belongs to its bucket
    latencies.observe("Match", 99.0, "DEADLINE_EXCEEDED")
    with MetricsEndpoint("127.0.0.1:0", dict, latencies) as endpoint:
        seen = scrape(endpoint.address)
    assert seen["kvstore_rpc_seconds_bucket{le=0.0001,rpc=Match}"] == 0
    assert seen["kvstore_rpc_seconds_bucket{le=0.00025,rpc=Match}"] == 1
    assert seen["kvstore_rpc_seconds_bucket{le=0.0005,rpc=Match}"] == 2
    assert seen["kvstore_rpc_seconds_bucket{le=10.0,rpc=Match}"] == 2
    assert seen["kvstore_rpc_seconds_bucket{le=+Inf,rpc=Match}"] == 3
    assert seen["kvstore_rpc_seconds_count{rpc=Match}"] == 3
    assert seen["kvstore_rpc_seconds_sum{rpc=Match}"] == pytest.approx(99.0007)
    assert seen["kvstore_rpc_failures_total{code=DEADLINE_EXCEEDED,rpc=Match}"] == 1


def test_a_measured_call_counts_its_failure_and_lets_it_pass() -> None:
    latencies = Latencies()
    with pytest.raises(KeyError), latencies.measure("Load"):
        raise KeyError
    with latencies.measure("Load"):
        pass
    assert [(rpc, sum(calls.counts)) for rpc, calls in latencies.rows()] == [("Load", 2)]
    assert latencies.failures() == [("Load", "KeyError", 1)]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_connections_that_stay_silent_take_a_few_threads_and_are_given_up(host: str) -> None:
    with MetricsEndpoint(f"{host}:0", dict, Latencies(), patience_s=1.0) as endpoint, ExitStack() as silent:
        place = (host.strip("[]"), int(endpoint.address.rpartition(":")[2]))
        before = threading.active_count()
        held = [silent.enter_context(socket.create_connection(place)) for _ in range(100)]
        assert eventually(lambda: sum(map(is_closed, held)) >= 100 - 16)
        assert threading.active_count() <= before + 16
        assert eventually(lambda: all(map(is_closed, held)))
        with urllib.request.urlopen(f"http://{endpoint.address}/metrics", timeout=5) as reply:
            assert b"kvstore_rpc_seconds" in reply.read()


def test_a_scrape_that_finds_no_thread_takes_nothing_from_the_next_one() -> None:
    with MetricsEndpoint("127.0.0.1:0", dict, Latencies()) as endpoint:
        place = ("127.0.0.1", int(endpoint.address.rpartition(":")[2]))
        before = threading.stack_size(1 << 48)  # more than there is, so that none can be started
        try:
            for _ in range(20):
                with socket.create_connection(place, 10) as refused:
                    assert refused.recv(1) == b""
        finally:
            threading.stack_size(before)
        with urllib.request.urlopen(f"http://{endpoint.address}/metrics", timeout=5) as reply:
            assert b"kvstore_rpc_seconds" in reply.read()


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_a_taken_port_is_named_and_a_closed_endpoint_frees_its_own() -> None:
    (port,) = free_ports(1)  # which nobody else is given once it is free again
    with MetricsEndpoint(f"127.0.0.1:{port}", dict, Latencies()) as first:
        with pytest.raises(ConfigError, match=f"{first.address}: cannot listen there: Address already in use"):
            MetricsEndpoint(first.address, dict, Latencies())
        address = first.address
    with MetricsEndpoint(address, dict, Latencies()) as second:
        assert second.address == address


def test_a_scraper_that_says_a_byte_now_and_then_is_given_up_too() -> None:
    with MetricsEndpoint("127.0.0.1:0", dict, Latencies(), patience_s=0.2) as endpoint, ExitStack() as slow:
        host, _, port = endpoint.address.rpartition(":")
        began_s = said_s = time.monotonic()
        held = [slow.enter_context(socket.create_connection((host, int(port)))) for _ in range(_MAX_SCRAPES)]
        num_open, silent_s = len(held), 0.0
        while num_open and time.monotonic() - began_s < 20:
            num_open = sum(map(takes_a_byte, held))
            said_s, before_s = time.monotonic(), said_s
            silent_s = max(silent_s, said_s - before_s)
        assert num_open == 0
        assert said_s - began_s >= 6 * 0.2 or silent_s > 0.15, "not sooner, unless we were silent"
        assert scrape(endpoint.address) is not None


def takes_a_byte(connection: socket.socket) -> bool:
    """Whether the other side is still there, to be told a byte of a request that never ends."""
    try:
        connection.send(b"G")
        connection.settimeout(0.002)
        return bool(connection.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


def test_every_counter_that_the_code_names_has_a_metric() -> None:
    """Also those that only faults and floods move, which no test's store would show."""
    unnamed = set()
    root = Path(kvstore.__file__).parent
    for path in root.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                keys = [call.args[0]] if call.func.attr == "add" and call.args else []
                if call.func.attr == "add_all" and call.args and isinstance(call.args[0], ast.Dict):
                    keys = [each for each in call.args[0].keys if each is not None]
                unnamed |= {key for key in map(_key, keys) if key and name_of(key) is None}
    assert {key for key in unnamed if not key.startswith("client.")} == set()  # those are no server's


def _key(node: ast.expr) -> str:
    """The stats name that an expression says, its tier being any; empty where it says none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value if re.fullmatch(r"\w+\.\w+", node.value) else ""
    if isinstance(node, ast.JoinedStr) and isinstance(node.values[-1], ast.Constant):
        what = str(node.values[-1].value)
        return f"any{what}" if re.fullmatch(r"\.\w+", what) else ""
    return ""
