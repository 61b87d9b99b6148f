# SPDX-License-Identifier: Apache-2.0
"""What a store knows of single blocks: for people, scripts and tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.block import BlockId, RootId
from kvstore.survey import Survey


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """One block. Where it is not `resident`, nothing but its id is known.

    Attributes:
        resident: some part of it lies in the host.
        parent: id of the block before it; the root's for the first of a chain.
        depth: its position in the chain.
        ready_parts: bit p set: part p can be loaded.
        num_pins: holds, leases and copies in flight.
        num_children: blocks in the host that hang from it, those being filled included.
        tiers: lower tiers that are believed to hold it.
        tokens: token ids, u32 little-endian.
    """

    id: BlockId
    resident: bool = False
    root: bytes = b""
    parent: bytes = b""
    depth: int = 0
    ready_parts: int = 0
    num_pins: int = 0
    num_children: int = 0
    tiers: tuple[str, ...] = ()
    tokens: bytes = b""


def inspect(
    survey: Survey, tier_names: Sequence[str], ids: Sequence[BlockId], may_see: Callable[[RootId], bool]
) -> list[BlockInfo]:
    """What a pool knows of each block; one of a root that `may_see` denies looks like one that is not there."""
    infos: list[BlockInfo] = []
    for block, known in zip(ids, survey.describe(ids, may_see), strict=True):
        if known is None:
            infos.append(BlockInfo(block))
            continue
        infos.append(
            BlockInfo(
                id=block,
                resident=True,
                root=known.root,
                parent=known.meta.parent,
                depth=known.meta.depth,
                ready_parts=known.ready_parts,
                num_pins=known.num_pins,
                num_children=known.num_children,
                tiers=tuple(name for number, name in enumerate(tier_names) if known.below >> number & 1),
                tokens=known.meta.tokens,
            )
        )
    return infos
