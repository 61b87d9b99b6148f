# SPDX-License-Identifier: Apache-2.0
"""The tiers below a store's host, as a whole: made and greeted at its start, told of chains, cleared, checked.

What fails in one of them is said, and keeps nothing from the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from kvstore.block import BlockId, PartKey, Root, RootId
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, TierError
from kvstore.stats import Stats
from kvstore.tiers import TIERS
from kvstore.tiers.base import Tier

log = logging.getLogger("kvstore.store")

NOT_CHECKED = "not checked"
"""Begins the line of `check` for a lower tier that does not answer."""


def make_tiers(config: StoreConfig) -> list[Tier]:
    """The configured ones, in the order in which they are asked; says of each that does not answer that it does not.

    Raises ConfigError for one that cannot be made, or that does not answer and has to. Then none is left open.
    """
    made: list[Tier] = []
    try:
        for name, options in config.tiers.items():
            made.append(TIERS.load(name)(options))
            _greet(made[-1], config)
    except BaseException:
        for tier in made:
            tier.close()
        raise
    return made


def _greet(tier: Tier, config: StoreConfig) -> None:
    nothing = PartKey(RootId(bytes(32)), BlockId(bytes(32)), 0)
    try:
        tier.contains([nothing], config.request.read_deadline_s)
    except TierError as error:
        if config.request.require_tiers:
            raise ConfigError(
                f"lower tier does not answer: {error}: start it, or set request.require_tiers = false to do without"
            ) from error
        log.warning("lower tier does not answer, starting without it until it does: %s", error)


def meet(tiers: Sequence[Tier], root: Root) -> None:
    """Tell them whose a chain is: under its root they may be written to from now on."""
    for tier in tiers:
        tier.meet(root)


def clear_tiers(
    tiers: Sequence[Tier], root: RootId | None, stats: Stats, cleared: Callable[[str], object]
) -> TierError | None:
    """Remove what lies under `root`, or all, from each; the first failure. `cleared`: told the names of the others.

    Of one that is only read from here nothing is said: it keeps what it has.
    """
    failure: TierError | None = None
    for tier in tiers:
        try:
            tier.clear(root)
        except TierError as error:
            stats.add(f"{tier.name}.clear_failures")
            failure = failure or error
        else:
            if not tier.read_only:
                cleared(tier.name)
    return failure


def check_tiers(tiers: Sequence[Tier]) -> list[str]:
    """Broken invariants of each; a line that begins with NOT_CHECKED for one that does not answer."""
    faults: list[str] = []
    for tier in tiers:
        try:
            faults += tier.check()
        except TierError as error:
            faults.append(f"{NOT_CHECKED}: {error}")
    return faults
