# SPDX-License-Identifier: Apache-2.0
"""Ten thousand requests that mean harm, to a server in a process of its own, beside a client that means none.

The seed is printed; KVSTORE_FUZZ_SEED sets it. Each attacker's requests follow from it; how they interleave does not.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from kvstore.block import Chain, ModelId, Root
from kvstore.service.client import SidecarStore
from tests.conftest import chain_of, content, load_all, save_all
from tests.patient import connect
from tests.service.conftest import ServerProcess
from tests.service.hostile import METHODS, Hostile
from tests.waiting import wait_until

SEED = int(os.environ.get("KVSTORE_FUZZ_SEED", "20"))
NUM_REQUESTS = 10_000
NUM_ATTACKERS = 4
CLEAR = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""What protos/kvstore/wire/kvstore.proto names, but for a server that is going away."""

TOKENS = """
[[client]]
token = "attacker-attacker"
tenant = "attacker"
salts = ["attacker", ""]
[[client]]
token = "victim-victim-victim"
salts = ["victim"]
[[client]]
token = "admin-admin-admin"
admin = true
"""


def held_of(admin: SidecarStore) -> dict[str, float]:
    names = ("lease.live", "save.quarantined_slots", "host.pinned_blocks", "service.sessions")
    stats = admin.stats()
    return {name: stats[name] for name in names}


def counts_of(pid: int) -> tuple[int, int]:
    """Open descriptors and threads of a process."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def attack(hostile: Hostile, num_requests: int, seen: Counter[tuple[str, str, str]]) -> None:
    for _ in range(num_requests):
        name, code, details = hostile.attack()
        seen[name, code.name, "" if code in CLEAR else details] += 1


def attack_together(attackers: list[Hostile], num_requests: int) -> Counter[tuple[str, str, str]]:
    """What came of so many requests: by call, status, and details of a status that is not clear."""
    seen = [Counter[tuple[str, str, str]]() for _ in attackers]
    threads = [
        threading.Thread(target=attack, args=(hostile, num_requests // len(attackers), counter))
        for hostile, counter in zip(attackers, seen, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(seen, Counter())


@pytest.mark.slow
def test_ten_thousand_hostile_requests_get_clear_answers_and_leave_nothing_behind(
    start_process: Callable[..., ServerProcess], directory: Path, model: ModelId
) -> None:
    print(f"KVSTORE_FUZZ_SEED={SEED}")
    tokens = directory / "tokens.toml"
    tokens.write_text(TOKENS)
    tokens.chmod(0o600)
    process = start_process(256, service={"tokens_file": str(tokens)}, request={"lease_s": 5.0})
    victims = chain_of(Root(model, salt=b"victim"), 12, seed=99)
    with (
        connect(process.address, token="victim-victim-victim") as victim,
        connect(process.address, token="admin-admin-admin") as admin,
    ):
        victim.open(model)
        save_all(victim, victims, 0, 8)
        attackers = [
            Hostile(
                process.address, random.Random(f"{SEED}/{number}"), model, "attacker-attacker", b"attacker", victims
            )
            for number in range(NUM_ATTACKERS)
        ]
        first = attack_together(attackers, NUM_REQUESTS // 5)
        num_fds, num_threads = counts_of(process.pid)

        victim.match(victims, "held")
        with victim.load("held") as load, victim.save(victims, 8, 12) as save:
            began_s = time.monotonic()
            seen = first + attack_together(attackers, NUM_REQUESTS - NUM_REQUESTS // 5)
            print(f"{seen.total()} requests, the last {NUM_REQUESTS * 4 // 5} in {time.monotonic() - began_s:.1f} s")
            for block in load:
                assert bytes(block.views[0]) == content(victims, block.index, 0, 4096)
            assert load.intact(), "nobody else could end its lease"
            assert fill(save, victims) == 4, "nor its save"
        for hostile in attackers:
            hostile.close()

        print_table(seen)
        unclear = {key: number for key, number in seen.items() if key[2]}
        assert unclear == {}
        assert {name for name, code, _ in seen if code == "OK"} >= set(METHODS) - {"Check"}, "each did work sometimes"
        wait_until(lambda: held_of(admin) == {**dict.fromkeys(held_of(admin), 0), "service.sessions": 2}, 30)
        assert load_all(victim, victims) == ["host"] * 12
        assert admin.check() == []
        wait_until(lambda: counts_of(process.pid)[0] <= num_fds + 8)
        wait_until(lambda: counts_of(process.pid)[1] <= num_threads + 16)
    assert process.faults() == []


def fill(save: object, chain: Chain) -> int:
    for index in save.indices:  # type: ignore[attr-defined]
        save.views(index)[0][:] = content(chain, index, 0, 4096)  # type: ignore[attr-defined]
    return int(save.commit())  # type: ignore[attr-defined]


def print_table(seen: Counter[tuple[str, str, str]]) -> None:
    codes = sorted({code for _, code, _ in seen})
    for name in METHODS:
        row = {code: sum(n for (m, c, _), n in seen.items() if (m, c) == (name, code)) for code in codes}
        print(f"{name:10}", *(f"{code.lower()} {number}" for code, number in row.items() if number))
