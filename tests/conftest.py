# SPDX-License-Identifier: Apache-2.0
"""What tests share: small models, chains over them, a healthy store, and a process that stays as it was."""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence

# Of this process and of those that tests start, and before torch is loaded, which looks once. Two threads on tensors of
# this size spend their time waiting for each other: twice the CPU time of one, and more where others want a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from kvstore.api import Store
from kvstore.block import Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.layout import BlockLayout, layout_of
from kvstore.store import KVStore
from kvstore.tiers.base import Tier
from tests.fakes import FakeClock
from tests.patient import CALL_DEADLINE_S, REQUEST

MakeStore = Callable[..., KVStore]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A run without Redis must not read like one with it. Here, where a run of several workers looks for it."""
    skipped = terminalreporter.stats.get("skipped", [])
    if num := sum("NOT TESTED AGAINST REDIS" in str(report.longrepr) for report in skipped):
        terminalreporter.section("NOT TESTED AGAINST REDIS 7", red=True, bold=True)
        terminalreporter.line(f"{num} tests had no redis-server to run on; on Valkey they ran. It is not on PyPI:")
        terminalreporter.line("apt-get install redis-server, or put one of version 7 or later in the PATH.")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """No test leaves the process other than it found it: a later one would fail by its place in the order."""
    root = logging.getLogger()
    handlers, level, switch_s, before = list(root.handlers), root.level, sys.getswitchinterval(), _state()
    yield
    sys.setswitchinterval(switch_s)  # a server sets it for all of its process
    root.handlers[:] = handlers
    root.setLevel(level)  # not `root.level = …`: loggers remember what they let through
    after = _state()
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after.keys() - before.keys() if name.startswith("KVSTORE_")]


def _state() -> dict[str, object]:
    """What all tests of a process share. Libraries add variables of their own when they are loaded."""
    torch = sys.modules.get("torch")
    ours = {name: each for name, each in logging.root.manager.loggerDict.items() if name.startswith("kvstore")}
    return {
        "levels": {name: each.level for name, each in ours.items() if isinstance(each, logging.Logger) and each.level},
        "working directory": os.getcwd(),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        **({} if torch is None else {"threads of torch": torch.get_num_threads()}),
        **{name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
    }


@pytest.fixture
def model() -> ModelId:
    """One part of 4 KiB a block of 16 tokens: exactly one page."""
    return ModelId(
        model="tiny", revision="1", kv_dtype="bfloat16", num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16
    )


@pytest.fixture
def layout(model: ModelId) -> BlockLayout:
    return layout_of(model)


@pytest.fixture
def root(model: ModelId) -> Root:
    return Root(model)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make_store(model: ModelId, clock: FakeClock) -> Iterator[MakeStore]:
    """Makes stores of a number of one-page blocks; each must end healthy, with nothing held."""
    made: list[KVStore] = []

    def make(num_blocks: int = 64, *, tiers: Sequence[Tier] = (), **sections: dict[str, object]) -> KVStore:
        host = {"capacity_bytes": num_blocks * 4096, "prefault": False}
        values = {"host": host, "request": REQUEST, **sections}
        store = KVStore(StoreConfig.load(values, environ={}), clock=clock, tiers=tiers)
        store.open(model)
        made.append(store)
        return store

    yield make
    for store in made:
        store.flush(5)
        faults = store.check()
        held = {name: value for name, value in store.stats().items() if name in ("host.pinned_blocks", "lease.live")}
        store.close()
        assert faults == []
        assert set(held.values()) <= {0}, held


@pytest.fixture
def store(make_store: MakeStore) -> KVStore:
    return make_store()


def chain_of(root: Root, num_blocks: int, *, seed: int = 0, extra_tokens: int = 0) -> Chain:
    """A chain of random tokens; equal seeds share their prefix."""
    tokens = np.random.default_rng(seed).integers(0, 50_000, num_blocks * root.model.block_tokens + extra_tokens)
    return Chain(root, tokens)


def content(chain: Chain, index: int, part: int, num_bytes: int) -> bytes:
    """Bytes that belong to this block and part alone."""
    return (chain.ids[index] + bytes([part])) * (num_bytes // 33) + bytes(num_bytes % 33)


def save_all(store: Store, chain: Chain, start: int = 0, stop: int | None = None) -> int:
    """Fill and commit blocks; returns how many became matchable."""
    with store.save(chain, start, len(chain) if stop is None else stop) as save:
        for index in save.indices:
            for part, view in enumerate(save.views(index)):
                assert view is not None
                view[:] = content(chain, index, part, len(view))
        return save.commit()


def load_all(
    store: Store, chain: Chain, *, request: str = "load", wait_s: float = CALL_DEADLINE_S, start: int = 0
) -> list[str]:
    """Load what matches, comparing every byte; returns the tier each block came from."""
    store.match(chain, request, wait_s=wait_s)
    tiers: list[str] = []
    with store.load(request, start=start) as load:
        for block in load:
            for part, view in enumerate(block.views):
                assert bytes(view) == content(chain, block.index, part, len(view)), f"block {block.index}"
            tiers.append(block.tier)
        assert load.intact()
    return tiers
