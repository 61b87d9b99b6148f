# SPDX-License-Identifier: Apache-2.0
"""Which store a vLLM engine uses, and how loads go from its scheduler to its workers.

A store inside the engine's process, or a client of a sidecar. Where scheduler and worker are in one process they share
it, and loads go as they are; else each has a client of its own, and loads go as bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import kvstore
from connectors.vllm_plan import IN_TIME, VllmSettings
from kvstore.api import Load, Store
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class EmbeddedStores:
    """Stores, or clients of one, that an engine's scheduler and worker share in one process; the last user closes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[str, tuple[Store, int]] = {}

    def take(self, name: str, make: Callable[[], Store] | None) -> Store | None:
        """The store of that name, made where it is new; None where it is new and `make` is None."""
        with self._lock:
            store, users = self._stores.get(name, (None, 0))
            if store is None:
                if make is None:
                    return None
                store = make()
            self._stores[name] = (store, users + 1)
            return store

    def give_back(self, name: str) -> None:
        with self._lock:
            store, users = self._stores.pop(name)
            if users > 1:
                self._stores[name] = (store, users - 1)
                return
        store.close()


EMBEDDED = EmbeddedStores()


@dataclass(frozen=True, slots=True)
class Link:
    """A store, how loads go from the scheduler to workers, and how to let go of it."""

    store: Store
    share: Callable[[Load], object]
    adopt: Callable[[object], Load]
    close: Callable[[], None]


def _same(load: object) -> Any:
    return load


def embedded(config: VllmConfig, settings: VllmSettings, *, is_worker: bool) -> Link:
    """A store in the engine's process. Raises ConfigError where its workers are in others."""
    name = settings.embedded or str(config.kv_transfer_config.engine_id)

    def make() -> Store:
        from kvstore.config import StoreConfig
        from kvstore.store import KVStore

        return KVStore(StoreConfig.load(settings.store))

    # Workers come first: a scheduler that finds no store has its workers in other processes.
    is_alone = config.parallel_config.world_size == 1
    store = EMBEDDED.take(name, make if is_worker else None) if is_alone else None
    if store is None:
        raise ConfigError(
            "the engine's workers run in other processes, which a store inside this one cannot serve: start "
            "`kvstore serve` and set kv_connector_extra_config.address, or set VLLM_ENABLE_V1_MULTIPROCESSING=0"
        )
    return Link(store, _same, _same, lambda: EMBEDDED.give_back(name))


def sidecar(config: VllmConfig, settings: VllmSettings, *, is_worker: bool) -> Link:
    """A client of the sidecar. Where scheduler and worker are in one process they share it, and loads as they are:
    the worker then copies what has come from lower tiers while the rest is on its way."""

    def connect() -> Store:
        # What follows a call that was waited for takes time too: a sidecar that hangs would else cost 1.04 deadlines.
        deadline_s = settings.call_deadline_ms / 1e3 * IN_TIME
        return kvstore.connect(settings.address, mapped=True, name="vllm", call_deadline_s=deadline_s)

    name = f"{settings.address} {config.kv_transfer_config.engine_id}"
    if config.parallel_config.world_size == 1:
        client: Any = EMBEDDED.take(name, connect if is_worker else None)
        if client is not None:
            adopt = lambda shared: client.adopt(shared) if isinstance(shared, bytes) else shared
            return Link(client, _same, adopt, lambda: EMBEDDED.give_back(name))
    client = connect()
    return Link(client, _share, lambda shared: client.adopt(cast(bytes, shared)), client.close)


def _share(load: Any) -> object:
    """Bytes that a worker's client adopts; None for a load that has nothing, which workers report as failed."""
    share = getattr(load, "share", None)
    return share() if share is not None else None


def _nothing(*_: object) -> Any:
    raise ConfigError("the connector was shut down")


CLOSED = Link(None, _nothing, _nothing, lambda: None)  # type: ignore[arg-type]
