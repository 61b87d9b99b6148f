# SPDX-License-Identifier: Apache-2.0
"""Two sidecars, processes of their own, on one Redis: what one computes the other waits for and loads; and kills."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvstore.block import Chain, Root
from kvstore.marks import MARK_TTL_S
from kvstore.service.client import SidecarStore
from kvstore.tiers.valkey import EmbeddedServer
from tests.conftest import chain_of, content, save_all
from tests.patient import connect
from tests.service.conftest import ServerProcess
from tests.service.victims import MODEL, Victim
from tests.waiting import lasts, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.redis]

ENOUGH_S = 2.0
"""For a mark to be seen to go, beyond its TTL: replicas look every tenth of a second, busy machines
later. Less than a second TTL."""


class Replica:
    """A sidecar, and a client of it."""

    def __init__(self, directory: Path, redis_url: str) -> None:
        redis = {"url": redis_url, "capacity_bytes": "64MiB"}
        self.process = ServerProcess(directory, 256, tiers={"redis": redis}, mover={"write": "through"})
        self.address = self.process.address
        self.client: SidecarStore = connect(self.address)
        self.client.open(MODEL)

    def seen(self, chain: Chain) -> tuple[int, int]:
        """What a request that comes now finds: blocks there, and blocks that somebody computes."""
        request = f"{time.monotonic_ns()}"
        match = self.client.match(chain, request, wait_s=5)
        self.client.forget(request)
        return match.num_blocks, match.num_pending_blocks

    def loaded(self, chain: Chain) -> list[tuple[int, bytes, str]]:
        self.client.match(chain, "loads", wait_s=5)
        with self.client.load("loads") as load:
            return [(block.index, bytes(block.views[0]), block.tier) for block in load]

    def close(self) -> None:
        self.client.close()
        self.process.stop()


@pytest.fixture
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Replica]]:
    """Makes sidecars that share a Valkey."""
    with EmbeddedServer() as server, ExitStack() as made:

        def make() -> Replica:
            replica = Replica(tmp_path_factory.mktemp("s"), server.unix_url)
            made.callback(replica.close)
            return replica

        yield make


def of(chain: Chain, tier: str) -> list[tuple[int, bytes, str]]:
    return [(index, content(chain, index, 0, 4096), tier) for index in range(len(chain))]


def test_what_one_sidecar_announces_the_other_waits_for_and_loads_once_it_is_there(
    replicas: Callable[[], Replica],
) -> None:
    first, second = replicas(), replicas()
    chain = chain_of(Root(MODEL), 8, seed=7)
    mark = first.client.announce(chain, 0, 8)
    wait_until(lambda: second.seen(chain) == (0, 8))

    def is_renewed() -> bool:
        mark.renew()
        return second.seen(chain) == (0, 8)

    assert lasts(is_renewed, 1.3 * MARK_TTL_S)
    save_all(first.client, chain)
    mark.withdraw()
    wait_until(lambda: second.seen(chain) == (8, 0))
    assert second.loaded(chain) == of(chain, "redis")
    assert second.loaded(chain) == of(chain, "host")


@pytest.mark.alone
@pytest.mark.parametrize("who", ["sidecar", "engine"])
def test_a_producer_that_was_killed_is_waited_for_no_longer_than_its_mark_lives(
    who: str, replicas: Callable[[], Replica]
) -> None:
    first, second, third = replicas(), replicas(), replicas()
    chain = chain_of(Root(MODEL), 8, seed=7)
    victim = Victim(first.address, "announce", 7)
    assert victim.said() == "under way"
    wait_until(lambda: second.seen(chain) == (0, 8))
    assert second.client.match(chain, "waits", wait_s=5).num_pending_blocks == 8
    time.sleep(1.2 * MARK_TTL_S)  # renewed meanwhile, by the victim alone
    assert second.client.match(chain, "waits").num_pending_blocks == 8
    died_s = time.monotonic()
    if who == "sidecar":
        first.process.kill()
    else:
        victim.kill()
    wait_until(lambda: second.client.match(chain, "waits").num_pending_blocks == 0)
    assert time.monotonic() - died_s < MARK_TTL_S + ENOUGH_S
    second.client.forget("waits")
    if who == "sidecar":
        victim.kill()
        first.process.start()
    # Now it is the one who computes, and is waited for.
    mark = second.client.announce(chain, 0, 8)
    wait_until(lambda: third.seen(chain) == (0, 8))
    save_all(second.client, chain)
    mark.withdraw()
    wait_until(lambda: third.seen(chain) == (8, 0))
    assert third.loaded(chain) == of(chain, "redis")


@pytest.mark.alone
def test_a_sidecar_that_stands_still_is_waited_for_no_longer_than_its_mark_lives(
    replicas: Callable[[], Replica],
) -> None:
    first, second = replicas(), replicas()
    chain = chain_of(Root(MODEL), 8, seed=7)
    victim = Victim(first.address, "announce", 7)
    assert victim.said() == "under way"
    wait_until(lambda: second.seen(chain) == (0, 8))
    first.process.signal(signal.SIGSTOP)
    stood_s = time.monotonic()
    wait_until(lambda: second.seen(chain) == (0, 0))
    assert time.monotonic() - stood_s < MARK_TTL_S + ENOUGH_S
    first.process.signal(signal.SIGCONT)
    wait_until(lambda: second.seen(chain) == (0, 8))  # it goes on, and says so again
    victim.kill()
    wait_until(lambda: second.seen(chain) == (0, 0))
