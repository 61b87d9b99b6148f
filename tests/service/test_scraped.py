# SPDX-License-Identifier: Apache-2.0
"""A server over a real Valkey, as its operator sees it: every metric moves with what happens, every command tells."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest

from kvstore.block import Chain, ModelId, Root
from kvstore.service.client import SidecarStore
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import chain_of, load_all, save_all
from tests.patient import connect
from tests.service.test_cli import Serving, serve
from tests.service.test_metrics import scrape
from tests.waiting import wait_until

__all__ = ["serve"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.redis]  # a process a command


@pytest.fixture
def valkey() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


class Watched:
    """`kvstore serve` with room for sixteen blocks over a tier, its metrics, and a client of it."""

    def __init__(self, serving: Serving, store: SidecarStore) -> None:
        self.serving = serving
        self.store = store
        found = re.search(r"metrics at http://(\S+?)/metrics", serving.log.read_text())
        assert found is not None
        self._address = found[1]
        self._before = self.now()

    def now(self) -> dict[str, float]:
        return scrape(self._address)

    def value(self, name: str) -> float:
        return self.now().get(name, 0)

    def log(self) -> list[str]:
        return self.serving.log.read_text().splitlines()

    def moved(self) -> dict[str, float]:
        """What is not as it was at the last call."""
        now, before = self.now(), self._before
        self._before = now
        return {name: value - before.get(name, 0) for name, value in now.items() if value != before.get(name, 0)}

    def asked(self, *words: str) -> object:
        done = self.serving.ask(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def watched(serve: Callable[..., Serving], valkey: EmbeddedServer, model: ModelId) -> Iterator[Watched]:
    serving = serve(
        *("--redis-url", valkey.url, "--host-capacity", "64KiB"),
        *("--set", "mover.write=through", "--set", "service.metrics_listen=127.0.0.1:0"),
        *("--set", "request.lookup_deadline_s=20", "--set", "service.max_session_share=1"),
    )
    with connect(serving.address) as store:
        store.open(model)
        yield Watched(serving, store)


def prompt_of(chain: Chain) -> str:
    tokens = [token for index in range(len(chain)) for token in memoryview(chain.meta(index).tokens).cast("I")]
    return json.dumps(tokens)


def test_what_happens_is_what_the_metrics_say(watched: Watched, valkey: EmbeddedServer, model: ModelId) -> None:
    store, block_bytes = watched.store, 4096
    first, second = chain_of(Root(model), 12, seed=1), chain_of(Root(model), 12, seed=2)
    wait_until(lambda: any("maxmemory" in line for line in watched.log()))  # said once the tier has asked
    logged = watched.log()

    assert save_all(store, first) == 12
    wait_until(lambda: watched.value("kvstore_redis_written_blocks_total") == 12)
    wait_until(lambda: watched.value("kvstore_mover_queued_bytes") == 0)  # it has taken the time of the write as well
    moved = watched.moved()
    assert moved["kvstore_host_blocks"] == moved["kvstore_saved_blocks_total"] == 12
    assert moved["kvstore_host_used_bytes"] == moved["kvstore_saved_bytes_total"] == 12 * block_bytes
    assert moved["kvstore_redis_written_bytes_total"] == 12 * block_bytes
    assert moved["kvstore_tier_seconds_count{operation=write,tier=redis}"] >= 1
    assert moved["kvstore_tier_seconds_sum{operation=write,tier=redis}"] > 0
    assert moved["kvstore_rpc_seconds_count{rpc=Save}"] == 1

    assert load_all(store, first) == ["host"] * 12
    moved = watched.moved()
    assert moved["kvstore_host_hits_total"] == 12
    assert moved["kvstore_host_read_bytes_total"] == 12 * block_bytes
    assert moved["kvstore_tier_seconds_count{operation=lookup,tier=host}"] == 1
    assert "kvstore_host_misses_total" not in moved

    assert save_all(store, second) == 12
    wait_until(lambda: watched.value("kvstore_redis_written_blocks_total") == 24)
    moved = watched.moved()
    assert moved["kvstore_host_evictions_total"] == 8, "24 blocks where there is room for 16"

    tiers = load_all(store, first)
    assert tiers == ["host"] * 4 + ["redis"] * 8
    moved = watched.moved()
    assert moved["kvstore_host_hits_total"] == 4
    assert moved["kvstore_host_misses_total"] == moved["kvstore_redis_hits_total"] == 8
    assert moved["kvstore_redis_read_bytes_total"] == 8 * block_bytes
    assert moved["kvstore_tier_seconds_count{operation=lookup,tier=redis}"] == 1
    assert moved["kvstore_tier_seconds_count{operation=read,tier=redis}"] >= 1
    assert store.match(chain_of(Root(model), 3, seed=3), "absent", wait_s=5).num_blocks == 0
    assert watched.moved()["kvstore_redis_misses_total"] == 3
    store.forget("absent")
    wait_until(lambda: watched.value("kvstore_leases") == 0)
    watched.moved()

    store.match(first, "held")
    with store.load("held"):
        assert watched.moved()["kvstore_leases"] == 1
    wait_until(lambda: watched.value("kvstore_leases") == 0)
    store.note_saved(1.5)
    wait_until(lambda: watched.value("kvstore_ttft_saved_seconds_total") == 1.5)
    watched.moved()
    assert watched.log() == logged, "nothing is logged of what goes well, and least of all a line a block"

    valkey.close()
    wait_until(lambda: store.match(chain_of(Root(model), 3, seed=4), "down", wait_s=5).settled)
    wait_until(lambda: watched.value("kvstore_redis_breaker_closed") == 0)
    moved = watched.moved()
    assert moved["kvstore_redis_failures_total{reason=lookup}"] >= 1
    assert moved["kvstore_redis_breaker_closed"] == -1
    said = watched.log()[len(logged) :]
    assert len(said) == 1, "one line for what changed"
    assert "redis" in said[0]


def test_warm_brings_up_what_inspect_finds_below_and_watch_tells_of_it(watched: Watched, model: ModelId) -> None:
    store = watched.store
    first, second = chain_of(Root(model), 12, seed=1), chain_of(Root(model), 16, seed=2)
    for chain in (first, second):
        assert save_all(store, chain) == len(chain)
        wait_until(lambda: watched.value("kvstore_mover_queued_bytes") == 0)
    prompt = prompt_of(first)
    blocks = watched.asked("inspect", prompt)
    assert isinstance(blocks, list)
    assert [block["id"] for block in blocks] == [block.hex() for block in first.ids]
    assert [(block["resident"], block["tiers"]) for block in blocks] == [(False, ["redis"])] * 12
    assert watched.asked("warm", prompt) == {"blocks": 12, "host_blocks": 12, "promoted": 12}
    assert watched.asked("warm", prompt) == {"blocks": 12, "host_blocks": 12, "promoted": 0}
    blocks = watched.asked("inspect", prompt)
    assert isinstance(blocks, list)
    assert all(block["resident"] and "redis" in block["tiers"] for block in blocks)
    assert watched.asked("inspect", first.ids[3].hex())
    assert load_all(store, first) == ["host"] * 12
    printed = watched_events(watched.serving)
    hosted = {line["id"] for line in printed if line["kind"] == "stored" and line["tier"] == "host"}
    assert {block.hex() for block in first.ids} <= hosted
    assert printed[-1]["kind"] == "snapshot_done"


def watched_events(serving: Serving) -> list[dict[str, str]]:
    """Lines of `kvstore watch --snapshot --json` up to the snapshot's end."""
    lines: list[dict[str, str]] = []
    with serving.running("watch", "--snapshot", "--json") as output:
        for line in output:
            lines.append(json.loads(line))
            if lines[-1]["kind"] == "snapshot_done":
                return lines
    raise AssertionError(f"the snapshot did not end: {lines[-3:]}")
