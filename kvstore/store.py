# SPDX-License-Identifier: Apache-2.0
"""The store: one host tier as gateway, lower tiers behind it, and the life of a request over both.

Invariants
1. `match` takes pins and nothing else; a miss allocates nothing.
2. Lower tiers are asked, read and written on other threads than a scheduler's, each call under a deadline.
3. No lock is held across a copy, a tier's call or a codec. Lock order: holds → leases → pool.
4. A failure of a lower tier is a shorter hit.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvstore.api import HOST_TIER, NO_HINT, Hint, Match, Register, Registration
from kvstore.arena import Arena
from kvstore.block import BlockId, Chain, ModelId, RootId
from kvstore.clock import Clock, MonotonicClock
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, TierError, TierTimeout, UnknownLease
from kvstore.events import EventLog
from kvstore.fleet import FleetMarks
from kvstore.holds import Hold, Holds
from kvstore.index import Rows
from kvstore.inspection import BlockInfo, inspect
from kvstore.layout import BlockLayout, layout_of
from kvstore.lease import LeaseBook
from kvstore.load import BlockLoad
from kvstore.loading import Loading
from kvstore.loan import Loan
from kvstore.lookup import Lookups
from kvstore.lower_tiers import check_tiers, clear_tiers, make_tiers, meet
from kvstore.marks import Mark, Marks
from kvstore.mover import Mover
from kvstore.pool import part_mask
from kvstore.save import BlockSave, SavePlan
from kvstore.stats import Durations, Stats, saved_seconds
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier

log = logging.getLogger("kvstore.store")

_SWEEP_S = 0.25
_LOOKS = 10  # at pins that seem to be nobody's
_BETWEEN_LOOKS_S = 0.02


class KVStore:
    """The in-process store. Implements `kvstore.api.Store`."""

    def __init__(
        self,
        config: StoreConfig | None = None,
        *,
        clock: Clock | None = None,
        tiers: Sequence[Tier] | None = None,
        shared_memory: bool = False,
    ) -> None:
        """Start the store. `tiers` replaces the configured lower tiers; the store closes them either way.

        `shared_memory` puts the arena into memory that other processes can map, for the sidecar.
        """
        self.config = config or StoreConfig()
        self._clock = clock or MonotonicClock()
        self._stats = Stats()
        self._host = HostTier(self.config.host, shared=shared_memory)
        self.events = EventLog(self._host.pool)
        """What became matchable in the host, and what stopped."""
        try:
            self._tiers = list(tiers) if tiers is not None else make_tiers(self.config)
        except BaseException:
            self._host.close()
            raise
        for tier in self._tiers:
            tier.bind(self._stats)
        self._mover = Mover(self._host, self._tiers, self.config.mover, self._clock, self._stats)
        self._leases = LeaseBook(self._host.pool)
        self._marks = Marks(self._clock)
        self._fleet = FleetMarks(self._tiers, self._mover.on_its_way, self._clock.now_s)
        self._mover.lost = self._fleet.lost
        self._mover.demotion.demoted = self.events.demoted
        self._warm_numbers = itertools.count()
        self._layouts: dict[ModelId, BlockLayout] = {}
        self._holds = Holds(self._host.pool, self._leases)
        self._closing = threading.Event()
        self._lookups = Lookups(self._tiers, self._mover, self.config.request, self._clock, self._stats)
        self._loading = Loading(
            self._host, self._tiers, self._leases, self._mover, self.config.request, self._clock, self._stats
        )
        self._sweeper = threading.Thread(target=self._sweep, name="kvstore-sweep", daemon=True)
        self._sweeper.start()

    @property
    def arena(self) -> Arena:
        """The host tier's memory: what a door hands out."""
        return self._host.arena

    def register_memory(self, register: Register) -> Registration:
        """See `kvstore.api.LendsMemory`; one arena for as long as this store lives."""
        return register(self._host.arena.view(0, self._host.arena.capacity_bytes))

    # -- models ------------------------------------------------------------------------------------------------

    def open(self, model: ModelId) -> BlockLayout:
        """See `kvstore.api.Store.open`."""
        layout = layout_of(model)
        self._host.open(layout)
        for tier in self._tiers:
            tier.open(layout)
        self._layouts[model] = layout
        return layout

    @property
    def models(self) -> list[ModelId]:
        """Those that were opened."""
        return list(self._layouts)

    def _layout(self, chain: Chain) -> BlockLayout:
        layout = self._layouts.get(chain.root.model)
        if layout is None:
            raise ConfigError(f"model {chain.root.model.model!r} is not open: call store.open(model) first")
        return layout

    # -- finding -----------------------------------------------------------------------------------------------

    def match(
        self,
        chain: Chain,
        request: str,
        *,
        hint: Hint = NO_HINT,
        parts: Sequence[int] | None = None,
        wait_s: float | None = 0.0,
        soon: bool = False,
    ) -> Match:
        """See `kvstore.api.Store.match`."""
        return self._match(chain, request, hint, parts, wait_s, soon=soon, counted=True)

    def _match(
        self,
        chain: Chain,
        request: str,
        hint: Hint,
        parts: Sequence[int] | None,
        wait_s: float | None,
        *,
        soon: bool = False,
        counted: bool,
    ) -> Match:
        """As `match`; `counted`: it is a request's, which hits and misses in the host are the share of."""
        layout = self._layout(chain)
        cells = _cells(layout, parts)
        now_s = self._clock.now_s()
        rows = self._host.pool.pin_leading(chain.ids, part_mask(layout, cells), chain.root.id)
        self._stats.observe(f"{HOST_TIER}.lookup", self._clock.now_s() - now_s)
        num_host = len(rows)
        hint = _filled_in(hint, chain, now_s, asked=True)
        hold = Hold(chain, layout, cells, self._leases.add(rows, now_s + self.config.request.hold_s), hint, num_host)
        first_time = self._holds.put(request, hold)
        if hold.lookup is None and wait_s is not None and self._tiers and num_host < len(chain):
            if wait_s or soon or not num_host or not first_time:
                hold.lookup = self._lookups.begin(chain, num_host, cells, hold.hint)
            else:  # it may go on with what the host has: then nobody would look at the answer
                hold.put_off = not self._lookups.refuse
        if hold.lookup is not None:
            self._lookups.look_again(hold.lookup, now_s)
            if wait_s:
                hold.lookup.wait(wait_s)
        if first_time:
            self._note_match(hold, rows, counted=counted)
        return hold.match(self._marks)

    def _note_match(self, hold: Hold, rows: Rows, *, counted: bool) -> None:
        """Keep the chain warm everywhere, and count."""
        num_host = len(rows)
        self._host.pool.touch(hold.chain.ids, num_host, hold.hint)
        self._mover.touched(hold.chain, num_host, hold.parts, hold.hint)
        self._mover.reused(hold.chain, rows, hold.layout.block_bytes, hold.hint)
        if not counted:
            return
        self._stats.add_all(
            {
                "match.requests": 1,
                "match.asked_blocks": len(hold.chain),
                "host.hit_blocks": num_host,
                "host.missed_blocks": len(hold.chain) - num_host,
            }
        )

    def match_partial(self, request: str) -> int:
        """See `kvstore.api.Store.match_partial`."""
        hold = self._holds.find(request)
        return 0 if hold is None else self.hold_similar(request, hold.num_host, hold.chain.tokens_after(hold.num_host))

    def hold_similar(self, request: str, index: int, tokens: npt.NDArray[np.uint32]) -> int:
        """`match_partial` for a chain whose tokens are not known here: `tokens` follow its first `index` blocks."""
        return self._holds.hold_similar(request, index, tokens)

    def forget(self, request: str) -> None:
        """See `kvstore.api.Store.forget`."""
        self._holds.forget(request)

    def touch(self, chain: Chain, num_blocks: int, hint: Hint = NO_HINT) -> None:
        """See `kvstore.api.Store.touch`."""
        hint = _filled_in(hint, chain, self._clock.now_s(), asked=True)
        # Ids are claims: only what lies under this root moves. Lower tiers go by root themselves.
        num_host = self._host.pool.leading(chain.ids[:num_blocks], 0, chain.root.id)
        self._host.pool.touch(chain.ids, num_host, hint)
        self._mover.touched(chain, min(num_blocks, len(chain)), self._layout(chain).all_parts, hint)

    # -- loading -----------------------------------------------------------------------------------------------

    def load(
        self, request: str, num_blocks: int | None = None, *, start: int = 0, partial_tokens: int = 0
    ) -> BlockLoad:
        """See `kvstore.api.Store.load`."""
        if start < 0:
            raise ConfigError(f"start is {start}: it is a chain index, 0 for the first block")
        hold = self._holds.take(request)
        if hold is None:
            raise UnknownLease(f"request {request!r} has no hold: call match first")
        return self._loading.begin(hold, num_blocks, start=start, partial_tokens=partial_tokens)

    # -- for other stores --------------------------------------------------------------------------------------

    def peek(self, root: RootId, blocks: Sequence[BlockId], *, used: bool = False) -> npt.NDArray[np.uint64]:
        """Mask of the parts of each block that lie in the host; lower tiers are not asked.

        `used`: the blocks are a chain from its first block on, and were used: keep what is there of it warm.
        """
        masks = self._host.pool.survey.ready_masks(root, blocks)
        if used:
            num_blocks = self._host.pool.leading(blocks, 0, root)
            self._host.pool.touch(blocks, num_blocks, replace(NO_HINT, time_s=self._clock.now_s()))
        return masks

    def lend(self, root: RootId, blocks: Sequence[BlockId], parts: Sequence[int], *, limit_bytes: int) -> Loan:
        """Those of some blocks that lie in the host with all of `parts`, until the loan is closed or lapses.

        The first of them that take `limit_bytes` together: what is lent is kept from eviction.
        """
        lease_s = self.config.request.lease_s
        return Loan(self._host, self._leases, root, blocks, parts, lambda: self._clock.now_s() + lease_s, limit_bytes)

    # -- saving ------------------------------------------------------------------------------------------------

    def announce(self, chain: Chain, start: int, stop: int) -> Mark:
        """See `kvstore.api.Store.announce`."""
        mark = self._marks.add(chain.root.id, chain.ids[start:stop])
        if self._mover.writes_through:  # otherwise others would wait for what never comes down
            self._fleet.add(mark)
        return mark

    def save(
        self,
        chain: Chain,
        start: int,
        stop: int,
        *,
        parts: Sequence[int] | None = None,
        hint: Hint = NO_HINT,
    ) -> BlockSave:
        """See `kvstore.api.Store.save`."""
        layout = self._layout(chain)
        meet(self._tiers, chain.root)
        cells = _cells(layout, parts)
        if not 0 <= start <= stop <= len(chain):
            raise ConfigError(f"blocks {start}…{stop} are outside the chain, which has {len(chain)} full blocks")
        plan = SavePlan(chain, layout, cells, start, _filled_in(hint, chain, self._clock.now_s(), asked=False))
        reserved = self._host.pool.filling.reserve(
            chain.root.id, layout, chain.ids[start:stop], chain.metas, cells, start
        )
        self._stats.add_all({"save.requests": 1, "save.refused_blocks": reserved[1]})

        def committed(indices: Sequence[int]) -> None:
            self._marks.fulfil(chain.root.id, [chain.ids[index] for index in indices])
            self._mover.committed(chain, indices, layout.block_bytes, plan.hint)
            self._stats.add_all(
                {
                    "save.blocks": len(indices),
                    "save.bytes": sum(layout.parts[p].num_bytes for p in cells) * len(indices),
                }
            )

        return BlockSave(plan, self._host.arena, self._host.pool, reserved, committed)

    def release_detached(self, slots: Sequence[int]) -> None:
        """Give back slots of a save that was detached: nobody writes to them any more."""
        self._host.pool.filling.release_loose(slots)

    # -- looking in --------------------------------------------------------------------------------------------

    def inspect(self, ids: Sequence[BlockId], may_see: Callable[[RootId], bool] = lambda root: True) -> list[BlockInfo]:
        """What is known of each block; one of a root that `may_see` denies looks like one that is not there."""
        return inspect(self._host.pool.survey, [tier.name for tier in self._tiers], ids, may_see)

    def locate(self, chain: Chain) -> dict[str, list[bool]]:
        """Which blocks of `chain` each lower tier holds whole, as it says now; none for one that does not answer.

        For people: nothing is counted, and nothing kept warm by it.
        """
        return self._lookups.locate(chain, self._layout(chain).all_parts)

    def warm(self, chain: Chain, deadline_s: float) -> tuple[int, int]:
        """Bring the prefix of `chain` that lower tiers hold into the host.

        Begins no read after `deadline_s` seconds. Returns how many leading blocks lie in the host now, and how many
        of them this call brought there. A prefix larger than the host is brought as far as it fits.
        """
        pool, root = self._host.pool, chain.root.id
        need = part_mask(self._layout(chain), None)
        request = f"kvstore.warm.{next(self._warm_numbers)}"
        give_up_s = self._clock.now_s() + deadline_s
        # Not a request's match: what it does not find in the host yet would be called missed.
        found = self._match(chain, request, NO_HINT, None, deadline_s, counted=False)
        num_promoted = 0
        with self.load(request, start=found.num_host_blocks) as load:
            for block in load:
                if not pool.leading([chain.ids[block.index]], need, root):
                    break  # it went to a slot of no block's: the host is full of pinned ones, or of this prefix
                num_promoted += 1
                if self._clock.now_s() >= give_up_s:
                    break
            num_host = pool.leading(chain.ids, need, root)
        return num_host, min(num_promoted, max(0, num_host - found.num_host_blocks))

    # -- care --------------------------------------------------------------------------------------------------

    def clear(self, root: RootId | None = None) -> int:
        """See `kvstore.api.Store.clear`."""
        removed = self._host.pool.clear(root)
        # What waits to go down is gone with it. Not so what is being written: a tier cleared before it would keep it.
        failure: TierError | None = None
        if not self._mover.end_round(self.config.mover.flush_s):
            failure = TierTimeout("mover", "a write has not ended: what it brings down may come after the clear")
        below = clear_tiers(self._tiers, root, self._stats, lambda name: self.events.cleared_below(name, root))
        # Loads that began between brought up what was found below before. One that begins now finds nothing there.
        removed += self._host.pool.clear(root)
        if (failure := failure or below) is not None:
            raise failure
        return removed

    def limit(self, root: RootId, group: str, max_bytes: int | None) -> None:
        """Let the blocks of all roots of `group`, `root` being one from now on, take `max_bytes` of the host.

        Beyond, a save makes room among the group's own coldest, or is refused. None lifts the limit. An empty group
        is none, and has no limit. A root under which nothing lies is out of its group once some thousand others came:
        name it again before it is saved to.
        """
        self._host.pool.set_group(root, group)
        if group:
            self._host.pool.set_quota(group, max_bytes)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until queued demotions and touches went down; False on time-out."""
        return self._mover.flush(timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """As `flush`; where tiers are exclusive, what the host alone holds goes down too. False where some did not."""
        return self._mover.drain(timeout_s)

    def drop_host(self) -> int:
        """Empty the host tier alone, as another replica would see it. Returns the number of blocks."""
        return self._host.pool.clear()

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Wait until the arena is populated; True when it is."""
        return self._host.arena.wait_prefaulted(timeout_s)

    def _sweep(self) -> None:
        while not self._closing.wait(_SWEEP_S):
            now_s = self._clock.now_s()
            try:
                expired = self._leases.expire(now_s)
                if expired:
                    self._stats.add("lease.expired", expired)
                self._marks.sweep()
                self._holds.sweep(now_s)
                self._host.pool.settle()
            except Exception:  # a thread's top: a policy that fails once must not keep pins for ever
                log.exception("sweeping failed, and goes on")

    def note_saved(self, seconds: float) -> None:
        """See `kvstore.api.Store.note_saved`."""
        self._stats.add("ttft.saved_s", saved_seconds(seconds))

    def stats(self) -> Mapping[str, float]:
        """See `kvstore.api.Store.stats`."""
        gauges = {
            **self._host.gauges(),
            **self._mover.gauges(),
            **{name: value for tier in self._tiers for name, value in tier.gauges().items()},
            "lease.live": len(self._leases),
            "marks.live": len(self._marks),
        }
        return dict(sorted({**self._stats.snapshot(), **gauges}.items()))

    def durations(self) -> Mapping[str, Durations]:
        """How long operations of tiers took, by `tier.operation`."""
        return self._stats.durations()

    def check(self) -> list[str]:
        """See `kvstore.api.Store.check`."""
        faults = self._host.pool.check()
        if num_rows := self._rows_pinned_by_nobody():
            faults.append(f"store: {num_rows} rows are pinned by nobody")
        return faults + check_tiers(self._tiers)

    def _rows_pinned_by_nobody(self) -> int:
        # Looked at again before it is believed: rows are pinned just before their lease is entered, and unpinned
        # just after it is struck out, by threads that go on meanwhile. What was forgotten stays.
        num_rows = 0
        for _ in range(_LOOKS):
            num_rows = self._host.pool.survey.pinned_rows()
            if not num_rows or len(self._leases) or not self._mover.end_round(0):
                return 0
            self._closing.wait(_BETWEEN_LOOKS_S)
        return num_rows

    def close(self) -> None:
        """See `kvstore.api.Store.close`."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._loading.stop()
        self._sweeper.join()
        self._mover.close()
        self._fleet.close()
        self._lookups.close()
        self._loading.close()
        for tier in self._tiers:
            tier.close()
        self._host.close()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _filled_in(hint: Hint, chain: Chain, now_s: float, *, asked: bool) -> Hint:
    return replace(hint, time_s=now_s, asked=asked, block_tokens=chain.block_tokens)


def _cells(layout: BlockLayout, parts: Sequence[int] | None) -> tuple[int, ...]:
    """The asked parts, all of them for None. One named twice would be reserved twice, and lost once."""
    if parts is None:
        return layout.all_parts
    cells = tuple(parts)
    if len(set(cells)) != len(cells) or not all(0 <= cell < len(layout.parts) for cell in cells) or not cells:
        raise ConfigError(f"parts are {list(cells)}: name distinct ones from 0 to {len(layout.parts) - 1}, or None")
    return cells
