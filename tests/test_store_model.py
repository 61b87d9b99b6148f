# SPDX-License-Identifier: Apache-2.0
"""Random operations against a model of what the store may and must answer.

The model knows every block ever committed with its content. The store may forget (eviction), but never: serve
bytes that differ, serve a block that was never committed, serve a tail without its head, lose what a hold keeps,
or end unhealthy.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import BlockId, Chain, ModelId, Root
from kvstore.config import StoreConfig
from kvstore.errors import TierUnavailable
from kvstore.store import KVStore
from tests.conftest import content
from tests.fakes import DictTier, FakeClock

MODEL = ModelId(
    model="tiny",
    revision="1",
    kv_dtype="bfloat16",
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    block_tokens=4,
    part_heads=1,
)
PART_BYTES = 2 * 2 * 4 * 8 * 2
ALL_PARTS = (0, 1)


class StoreMachine(RuleBasedStateMachine):
    """Chains grow and fork; saves stay open across steps; holds and loads overlap with eviction and demotion."""

    @initialize(num_pages=st.integers(6, 40), write=st.sampled_from(["through", "on_reuse", "on_evict", "exclusive"]))
    def start(self, num_pages: int, write: str) -> None:
        self.clock = FakeClock()
        self.tier = DictTier()
        mover = {"tiering": write} if write == "exclusive" else {"write": write}
        values = {"host": {"capacity_bytes": num_pages * 4096, "prefault": False}, "mover": mover}
        self.store = KVStore(StoreConfig.load(values, environ={}), clock=self.clock, tiers=[self.tier])
        self.store.open(MODEL)
        self.chains = [Chain(Root(MODEL))]
        self.committed: set[tuple[BlockId, int]] = set()
        self.saves: list[tuple[Chain, tuple[int, ...], object]] = []
        self.holds: dict[str, tuple[Chain, int]] = {}
        self.steps = 0

    chains_at = st.integers(0, 7)

    def pick(self, at: int) -> Chain:
        return self.chains[at % len(self.chains)]

    @rule(at=chains_at, tokens=st.lists(st.integers(0, 3), min_size=1, max_size=24))
    def extend_chain(self, at: int, tokens: list[int]) -> None:
        self.pick(at).extend(tokens)

    @rule(at=chains_at, keep=st.integers(0, 40))
    def fork_chain(self, at: int, keep: int) -> None:
        source = self.pick(at)
        tokens = b"".join(source.meta(index).tokens for index in range(len(source)))
        self.chains.append(Chain(source.root, np.frombuffer(tokens, "<u4")[:keep]))
        self.chains = self.chains[-8:]

    @rule(at=chains_at, start=st.integers(0, 6), parts=st.sampled_from([ALL_PARTS, (0,), (1,)]))
    def begin_save(self, at: int, start: int, parts: tuple[int, ...]) -> None:
        chain = self.pick(at)
        save = self.store.save(chain, min(start, len(chain)), len(chain), parts=parts)
        for index in save.indices:
            for part, view in zip(parts, save.views(index), strict=True):
                if view is not None:
                    view[:] = content(chain, index, part, PART_BYTES)
        self.saves.append((chain, parts, save))

    @precondition(lambda self: self.saves)
    @rule(which=st.integers(0, 5), ending=st.sampled_from(["commit", "commit head", "abort"]))
    def end_save(self, which: int, ending: str) -> None:
        chain, parts, save = self.saves.pop(which % len(self.saves))
        assert hasattr(save, "commit")
        chosen = save.indices[:1] if ending == "commit head" else save.indices
        # Whether a commit counts is up to the store (a parent may be gone): matching tells. What must never be
        # matched is what no commit named.
        if ending != "abort" and chosen:
            self.committed |= {(chain.ids[index], part) for index in chosen for part in parts}
            save.commit(*chosen)
        save.abort()

    @rule(at=chains_at, request=st.sampled_from("abc"), wait=st.booleans())
    def match(self, at: int, request: str, wait: bool) -> None:
        chain = self.pick(at)
        match = self.store.match(chain, request, wait_s=2.0 if wait else 0.0)
        for index in range(match.num_blocks):
            for part in ALL_PARTS:
                assert (chain.ids[index], part) in self.committed
        assert match.num_host_blocks <= match.num_blocks <= len(chain)
        self.holds[request] = (chain, match.num_host_blocks)

    @precondition(lambda self: self.holds)
    @rule(request=st.sampled_from("abc"), limit=st.integers(0, 12))
    def load(self, request: str, limit: int) -> None:
        if request not in self.holds:
            return
        chain, num_held = self.holds.pop(request)
        with self.store.load(request, limit) as load:
            indices = []
            for block in load:
                for part, view in enumerate(block.views):
                    assert bytes(view) == content(chain, block.index, part, PART_BYTES)
                indices.append(block.index)
            assert load.intact()
        assert indices == list(range(len(indices)))
        assert len(indices) >= min(num_held, limit)

    @rule(request=st.sampled_from("abc"))
    def forget(self, request: str) -> None:
        self.store.forget(request)
        self.holds.pop(request, None)

    @rule()
    def clear_everything(self) -> None:
        with pytest.raises(TierUnavailable) if self.tier.down else nullcontext():
            self.store.clear()

    @rule()
    def drop_host(self) -> None:
        self.store.drop_host()

    @rule()
    def flush_and_drop_host(self) -> None:
        self.store.flush(2)
        self.store.drop_host()

    @precondition(lambda self: self.tier.values)
    @rule(which=st.integers(0, 99))
    def lose_a_value_below(self, which: int) -> None:
        with self.tier.lock:
            keys = list(self.tier.values)
            doomed = keys[which % len(keys)]
            # With all that hangs from it, as a tier that keeps its contract would.
            gone = {doomed.block}
            for key in keys:
                if self.tier.meta[key.block].parent in gone:
                    gone.add(key.block)
            for key in keys:
                if key.block in gone and (key.part == doomed.part):
                    del self.tier.values[key]

    @rule(down=st.booleans())
    def turn_tier(self, down: bool) -> None:
        self.tier.down = down

    @invariant()
    def is_healthy(self) -> None:
        if hasattr(self, "store"):
            assert self.store._host.pool.check() == []

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for _, _, save in self.saves:
            assert hasattr(save, "abort")
            save.abort()
        for request in self.holds:
            self.store.forget(request)
        self.tier.down = False
        self.store.flush(5)
        faults = self.store.check()
        stats = self.store.stats()
        self.store.close()
        assert faults == []
        assert stats["host.pinned_blocks"] == 0
        assert stats["lease.live"] == 0


TestStoreModel = StoreMachine.TestCase
TestStoreModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
