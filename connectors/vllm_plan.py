# SPDX-License-Identifier: Apache-2.0
"""What the vLLM connector decides without vLLM: settings, the save boundary, what travels to workers and back.

The save boundary: a block is stored only when no step can take its tokens back. Speculative decoding computes KV
for drafts that may be rejected, and the last sampled token has no KV at all; `storable_running` and
`storable_finished` are where that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import TYPE_CHECKING

from connectors.base import LoadRule
from kvstore.api import NO_HINT, Hint
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from connectors.vllm_adapters import AdapterFiles


IN_TIME = 0.9
"""Share of a deadline after which waiting ends: that it has is noticed between steps, and takes effect in the next."""


class PageLayout(Enum):
    """In which form pages are stored."""

    AUTO = "auto"
    """As canonical bytes, or as they are where the order that the engine packs them in is not known."""
    CANONICAL = "canonical"
    """As canonical bytes, which other engines load; the engine does not start where that cannot be."""
    OPAQUE = "opaque"
    """As they are, which engines alone load that are the same in all that decides their bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """What `kv_connector_extra_config` may say.

    Attributes:
        address: of the sidecar, e.g. `unix:/run/kvstore/kvstore.sock`; empty keeps a store in the engine's process.
        store: settings of that store, by section, as in a configuration file.
        embedded: name of that store; engines of one process that name the same share it.
        model, revision: what the weights are called, instead of what is found out; see `vllm_identity`.
        block_tokens: tokens a stored block, a power of two, whatever the engine's own block size.
        part_layers, part_heads: the part grid; 0 takes the engine's own split over ranks.
        layout: in which form pages are stored, see `PageLayout`.
        load_rule: `measured` loads where that is predicted to beat computing, `always` whatever is there.
        sync_load_ms: loads predicted to take less, all from the host tier, run before the step instead of beside it.
        call_deadline_ms: longest wait for one answer of the sidecar; then it counts as away. One that hangs costs a
            request this much twice, in the scheduler and in the worker, and the next ones nothing.
        match_deadline_ms: longest wait of a request for the answer of lower tiers.
        load_deadline_ms: after so long a load is reported as failed, from its first missing token on.
        pending_deadline_ms: longest wait for blocks that somebody else is computing, beside what computing them is
            predicted to take, which ends it sooner; 0 never waits.
        load_threads: loads under way at once.
        step_layers: on a device, layers that a forward pass waits for together where a load belongs to its step; it
            begins when the first are there. 0: it waits for the whole load. A pass that is one CUDA graph does as well.
        save_share: on a device, of the link's time, what saves take beside the steps, which they slow down; 1 for as
            much as there is. Only what no page waits for any more is put off: 256 MiB at most.
        load_with_drafts: loads also where a drafter has KV of its own, which is not stored: see `vllm.md`.
        load, save: False leaves that half out; vLLM's roles kv_producer and kv_consumer do the same.
        secret: keys block ids, so that nobody without it can guess them from prompts.
    """

    address: str = ""
    store: Mapping[str, object] = field(default_factory=dict)
    embedded: str = ""
    model: str = ""
    revision: str = ""
    block_tokens: int = 64
    part_layers: int = 0
    part_heads: int = 0
    layout: str = PageLayout.AUTO.value
    load_rule: str = "measured"
    sync_load_ms: float = 20.0
    call_deadline_ms: float = 500.0
    match_deadline_ms: float = 250.0
    load_deadline_ms: float = 5000.0
    pending_deadline_ms: float = 20000.0
    load_threads: int = 2
    step_layers: int = 4
    save_share: float = 0.5
    load_with_drafts: bool = False
    load: bool = True
    save: bool = True
    secret: str = field(default="", repr=False)

    @classmethod
    def of(cls, extra: Mapping[str, object]) -> VllmSettings:
        """Settings from `kv_connector_extra_config`. Raises ConfigError for an unknown key or a wrong value."""
        known = {item.name: item for item in fields(cls)}
        for key, value in extra.items():
            if key not in known:
                raise ConfigError(f"kv_connector_extra_config has {key!r}: known are {', '.join(sorted(known))}")
            default = getattr(_DEFAULTS, key) if _DEFAULTS is not None else None
            if not _alike(value, default):
                kind = "a section" if isinstance(default, Mapping) else f"a {type(default).__name__}"
                raise ConfigError(f"kv_connector_extra_config.{key} is {value!r}: give {kind} such as {default!r}")
        made = cls(**extra)  # type: ignore[arg-type]  # checked above
        if made.load_rule not in {rule.value for rule in LoadRule}:
            raise ConfigError(f"load_rule is {made.load_rule!r}: use one of {', '.join(r.value for r in LoadRule)}")
        if made.layout not in {layout.value for layout in PageLayout}:
            raise ConfigError(f"layout is {made.layout!r}: use one of {', '.join(each.value for each in PageLayout)}")
        if made.load_threads < 1:
            raise ConfigError(f"load_threads is {made.load_threads}: it must be at least 1")
        if made.step_layers < 0:
            raise ConfigError(f"step_layers is {made.step_layers}: it must be 0 or more")
        if not 0 < made.save_share <= 1:
            raise ConfigError(f"save_share is {made.save_share}: it must be above 0 and at most 1")
        if made.address and (made.store or made.embedded):
            raise ConfigError(
                "address and store (or embedded) are both given: the sidecar at address has its own store"
            )
        return made


_DEFAULTS: VllmSettings | None = VllmSettings()


def _alike(value: object, default: object) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, type(default))


# -- the save boundary -----------------------------------------------------------------------------------------


def storable_running(num_computed: int, num_scheduled: int, num_tokens: int, block_tokens: int) -> int:
    """Blocks that will be final when the step now scheduled has run.

    Args:
        num_computed: tokens with KV before the step; num_scheduled: tokens of the step, drafts among them; 0
            where only what earlier steps have filled is meant.
        num_tokens: tokens the request has for certain, drafts not among them.
    """
    return min(num_computed + num_scheduled, num_tokens) // block_tokens


def storable_finished(num_computed: int, num_prompt: int, num_tokens: int, block_tokens: int) -> int:
    """Blocks that are final when the request has ended.

    The token sampled last never ran through the model; with drafts, what the engine counts as computed may
    include its place. The outer minimum covers requests aborted in the middle of their prompt.
    """
    return min(num_computed, max(num_prompt, num_tokens - 1)) // block_tokens


Tables = Sequence[Sequence[int]]
"""Of a request, the engine's pages from its first token on, for each group of layers that has a table of its own."""

NO_PAGE = 0
"""What stands in a table for a page that the engine has let go of, or never gave: all requests share that one."""


def pages_of(tables: Tables, page_tokens: int, first_token: int, stop_token: int) -> tuple[int, ...]:
    """The pages that hold tokens from `first_token` up to `stop_token`."""
    entries = slice(first_token // page_tokens, -(-stop_token // page_tokens))
    return tuple(page for table in tables for page in table[entries])


def kept_from(tables: Tables, page_tokens: int, first_token: int, stop_token: int) -> int:
    """First of the tokens up to `stop_token` from which on all pages are there; `first_token` where all are."""
    for entry in range(-(-stop_token // page_tokens) - 1, first_token // page_tokens - 1, -1):
        if any(entry >= len(table) or table[entry] == NO_PAGE for table in tables):
            return (entry + 1) * page_tokens
    return first_token


def frozen(tables: Tables) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(table) for table in tables)


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A step as the engine scheduled it.

    Attributes:
        num_scheduled: tokens to compute, by request; drafts among them.
        computed: tokens with KV before the step, of each of those requests.
        tables: whole page tables, of those requests at least.
        preempted: requests that have lost their pages since the step before.
    """

    num_scheduled: Mapping[str, int]
    computed: Mapping[str, int]
    tables: Callable[[str], Tables]
    preempted: Collection[str] = ()


# -- to workers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Copy blocks `start` … `stop` of a match into the engine's pages.

    Attributes:
        first_token: nothing below it is written: other requests may be reading those pages.
        stop_token: what the load brings ends here. In the last block, where that is another chain's which begins like
            this one, and at its end otherwise.
        tables: the request's page tables from token 0.
        lease: what the worker's store makes the load of.
        in_step: must be in place before this step's forward pass; otherwise it runs beside the steps.
    """

    request: str
    first_token: int
    stop_token: int
    start: int
    stop: int
    tables: Tables
    lease: object
    in_step: bool
    timeout_s: float


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Copy blocks `start` … `stop` out of the engine's pages when the step has run.

    Attributes:
        adapter, salt: what the chain's root is made of; files: what `adapter` is the digest of, None for no adapter.
        known: tokens of the chain that the worker has already.
        tokens: the tokens that follow, u32 little-endian; media: (offset, digest) items among them.
        tables: the request's page tables from token 0.
        holds: the request has ended and its pages wait for the report of this save.
        hint: what eviction may use.
    """

    request: str
    start: int
    stop: int
    adapter: bytes
    salt: bytes
    known: int
    tokens: bytes
    media: tuple[tuple[int, bytes], ...]
    tables: Tables
    holds: bool
    hint: Hint = NO_HINT
    files: AdapterFiles | None = None

    @classmethod
    def of_nothing(cls, request: str) -> SaveOrder:
        """Only to let go of pages that a request which has ended holds."""
        return cls(request, 0, 0, adapter=b"", salt=b"", known=0, tokens=b"", media=(), tables=(), holds=True)


@dataclass(frozen=True, slots=True)
class Proof:
    """Of loaded KV when its request's first step has run, in which the engine read the adapter: are `files` the same?

    Where not, tokens `first_token` … `stop_token` were loaded for another adapter than they are gone on with.
    """

    files: AdapterFiles
    tables: Tables
    first_token: int
    stop_token: int


@dataclass(frozen=True, slots=True)
class Orders:
    """What one step asks of every worker.

    `ended`: requests that are over and whose pages nothing holds. `rewritten`: others whose pages may be written again,
    by whoever has them in this step. `idle`: the step computes nothing, so workers may wait for loads. `reset`: loads
    that were ordered before bring nothing any more; to be said in the report.
    """

    loads: tuple[LoadOrder, ...] = ()
    saves: tuple[SaveOrder, ...] = ()
    ended: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    proofs: tuple[Proof, ...] = ()
    idle: bool = False
    reset: bool = False

    def refused(self) -> Orders:
        """The same with nothing to copy: loads are to be reported as failed, and pages let go of."""
        return replace(
            self,
            loads=tuple(replace(order, lease=None) for order in self.loads),
            saves=tuple(replace(order, start=order.stop) for order in self.saves),
        )


NO_ORDERS = Orders()
"""Of most steps: a decoded token ends no block."""


# -- from workers ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LoadReport:
    """How a load ended, over `num_ranks` workers: blocks up to `stop` are in place on each of them."""

    stop: int
    num_ranks: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)

    def joined(self, other: LoadReport) -> LoadReport:
        seconds = {
            tier: max(self.seconds.get(tier, 0.0), other.seconds.get(tier, 0.0))
            for tier in {*self.seconds, *other.seconds}
        }
        num_bytes = {
            tier: self.num_bytes.get(tier, 0) + other.num_bytes.get(tier, 0)
            for tier in {*self.num_bytes, *other.num_bytes}
        }
        return LoadReport(min(self.stop, other.stop), self.num_ranks + other.num_ranks, seconds, num_bytes)


@dataclass(slots=True)
class Report:
    """What workers tell the scheduler after a step.

    Attributes:
        unsaved: request → first block that was not copied, because a load it builds on had failed.
        counts: what was done, by name, for the engine's metrics.
        resets: orders to reset that were carried out, over all workers: what was ordered before has been done.
        is_foreign: a worker's pages are not of the model that orders are for: it loads and saves nothing.
    """

    loads: dict[str, LoadReport] = field(default_factory=dict)
    unsaved: dict[str, int] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    resets: int = 0
    is_foreign: bool = False

    def joined(self, other: Report) -> Report:
        loads = dict(self.loads)
        for request, report in other.loads.items():
            loads[request] = loads[request].joined(report) if request in loads else report
        unsaved = dict(self.unsaved)
        for request, block in other.unsaved.items():
            unsaved[request] = min(block, unsaved.get(request, block))
        counts = dict(self.counts)
        for name, value in other.counts.items():
            counts[name] = counts.get(name, 0.0) + value
        return Report(loads, unsaved, counts, self.resets + other.resets, self.is_foreign or other.is_foreign)

    def taken(self) -> Report:
        """What it says; from here on it says nothing."""
        taken = replace(self)
        self.loads, self.unsaved, self.counts, self.resets, self.is_foreign = {}, {}, {}, 0, False
        return taken

    def __bool__(self) -> bool:
        return bool(self.loads or self.unsaved or self.counts or self.resets or self.is_foreign)
