# SPDX-License-Identifier: Apache-2.0
"""Many threads on one small store over a real Valkey: every byte right, nothing held, nothing broken at the end."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from kvstore.block import ModelId, Root
from kvstore.config import StoreConfig
from kvstore.store import KVStore
from kvstore.tiers.redis import RedisTier
from tests.conftest import chain_of, load_all, save_all
from tests.fakes import DictTier
from tests.patient import REDIS, REQUEST

THREADS = 6
ROUNDS = 120


@pytest.fixture(params=["dict", "redis"])
def busy_store(request: pytest.FixtureRequest, model: ModelId) -> Iterator[KVStore]:
    tier = DictTier() if request.param == "dict" else RedisTier(RedisTier.Options(capacity_bytes=120 * 4500, **REDIS))
    values = {
        "host": {"capacity_bytes": 40 * 4096, "prefault": False},
        "mover": {"write": "through"},
        "request": REQUEST,
    }
    store = KVStore(StoreConfig.load(values, environ={}), tiers=[tier])
    store.open(model)
    yield store
    assert store.flush(20)
    if isinstance(tier, RedisTier):
        assert tier.settle(20)
        tier.sweep()
    faults, stats = store.check(), store.stats()
    store.close()
    assert faults == []
    assert stats["lease.live"] == stats["host.pinned_blocks"] == 0


@pytest.mark.redis
def test_threads_that_save_load_abandon_and_drop_leave_every_byte_right(busy_store: KVStore, root: Root) -> None:
    errors: list[BaseException] = []
    loaded: list[str] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        try:
            for at in range(ROUNDS):
                chain = chain_of(root, rng.randint(1, 12), seed=rng.randrange(10))
                action = rng.random()
                if action < 0.45:
                    loaded.extend(load_all(busy_store, chain, request=f"{number}", wait_s=2))
                elif action < 0.85:
                    save_all(busy_store, chain)
                elif action < 0.92:
                    with busy_store.save(chain, 0, len(chain)) as save:
                        save.abort()
                elif action < 0.96:
                    busy_store.match(chain, f"{number}-{at}")
                    busy_store.forget(f"{number}-{at}")
                else:
                    busy_store.drop_host()
        except BaseException as error:  # noqa: BLE001  # shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    assert {"host"} < set(loaded), "lower tiers must have served something"
