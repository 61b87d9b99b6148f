# SPDX-License-Identifier: Apache-2.0
"""What an eviction policy is: ids and order; no bytes, no I/O, no locks, no clock (time comes in the hint)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvstore.api import Hint
from kvstore.block import BlockId


class Policy(ABC):
    """Decides which resident block goes next. The pool holds a lock around every call.

    The pool evicts only blocks without resident children, so a policy cannot strand a suffix; one that yields
    suffixes before prefixes saves it the looking.
    """

    @dataclass(frozen=True, slots=True)
    class Options:
        """Settings of this policy."""

    name: ClassVar[str]

    def __init__(self, options: object) -> None:
        self.options = options

    def expect(self, num_blocks: int) -> None:  # noqa: B027
        """At most about so many blocks will be known at a time. A policy may set memory aside."""

    @abstractmethod
    def admit(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        """Take in blocks that became resident: head-to-tail order of one chain.

        The caller guarantees that none is known here, and that their ancestors are touched right after.
        """

    @abstractmethod
    def touch(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        """A chain was used, from its root, head-to-tail. Ids that are not known here are passed over."""

    @abstractmethod
    def remove(self, blocks: Sequence[BlockId]) -> None:
        """Forget blocks that left. Ids that are not known are passed over."""

    @abstractmethod
    def victims(self) -> Iterator[BlockId]:
        """Known blocks, first to go first, suffixes before prefixes.

        The caller may `remove` what was yielded while iterating, and skips what is pinned; every block that
        stays known is yielded at most once. Nothing changes by iterating.
        """

    def return_odds(self, blocks: Sequence[BlockId]) -> list[float]:
        """How likely each is used again, 0 to 1; 1 for those of which the policy cannot say."""
        return [1.0] * len(blocks)

    @abstractmethod
    def __len__(self) -> int:
        """Number of known blocks."""

    @abstractmethod
    def __contains__(self, block: BlockId) -> bool: ...
