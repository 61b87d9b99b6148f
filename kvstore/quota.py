# SPDX-License-Identifier: Apache-2.0
"""Bytes by root, and limits on the bytes of groups of roots: a tenant's share of a pool."""

from __future__ import annotations

from kvstore.block import RootId


class Accounts:
    """Bytes of blocks in slots, by root. No lock: the owner has one.

    Attributes:
        roots: every root that was ever seen; its position is its number.
        held_bytes: what each root's blocks take, those being filled included, by number.
        num_refused: blocks that were refused for a quota.
    """

    def __init__(self) -> None:
        self.roots: list[RootId] = []
        self.held_bytes: list[int] = []
        self.num_refused = 0
        self._numbers: dict[RootId, int] = {}
        self._groups: dict[RootId, str] = {}
        self._limits: dict[str, int] = {}

    def number_of(self, root: RootId) -> int:
        """Number of a root, given one now where it has none."""
        number = self._numbers.get(root)
        if number is None:
            number = self._numbers[root] = len(self.roots)
            self.roots.append(root)
            self.held_bytes.append(0)
        return number

    def find(self, root: RootId) -> int:
        """Number of a root, -1 for one that was never seen."""
        return self._numbers.get(root, -1)

    def set_group(self, root: RootId, group: str) -> None:
        self._groups[root] = group

    def set_limit(self, group: str, max_bytes: int | None) -> None:
        if max_bytes is None:
            self._limits.pop(group, None)
        else:
            self._limits[group] = max_bytes

    def room_bytes(self, number: int) -> int | None:
        """What a root's group may still take, negative where it has too much; None where nothing limits it."""
        if not self._limits:
            return None
        limit = self._limits.get(self._groups.get(self.roots[number], ""))
        return None if limit is None else limit - sum(self.held_bytes[each] for each in self.group_of(number))

    def limit_of(self, number: int) -> int:
        """Limit of a root's group. Only where there is one."""
        return self._limits[self._groups[self.roots[number]]]

    def group_of(self, number: int) -> list[int]:
        """Numbers of the roots that share a limit with this one."""
        group = self._groups.get(self.roots[number])
        if group is None:
            return [number]
        return [each for each, root in enumerate(self.roots) if self._groups.get(root) == group]
