# SPDX-License-Identifier: Apache-2.0
"""Whose store an engine's scheduler and workers use, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from connectors.vllm_link import EMBEDDED, embedded
from connectors.vllm_plan import VllmSettings
from kvstore.errors import ConfigError


def config(world_size: int = 1) -> Any:
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(engine_id="engine"),
        parallel_config=SimpleNamespace(world_size=world_size),
    )


SETTINGS = VllmSettings.of({"store": {"host": {"capacity_bytes": 1 << 20, "prefault": False}}})


def test_scheduler_and_worker_share_one_store_and_the_last_of_them_closes_it() -> None:
    worker = embedded(config(), SETTINGS, is_worker=True)
    scheduler = embedded(config(), SETTINGS, is_worker=False)
    assert scheduler.store is worker.store
    closing = cast(Any, worker.store)._closing
    worker.close()
    assert not closing.is_set()
    scheduler.close()
    assert closing.is_set()
    assert EMBEDDED._stores == {}


@pytest.mark.parametrize(("world_size", "is_worker"), [(1, False), (2, False), (2, True)])
def test_where_workers_are_in_other_processes_no_store_is_made(world_size: int, is_worker: bool) -> None:
    with pytest.raises(ConfigError, match="run in other processes"):
        embedded(config(world_size), SETTINGS, is_worker=is_worker)
    assert EMBEDDED._stores == {}
