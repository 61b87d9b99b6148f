# SPDX-License-Identifier: Apache-2.0
"""Bytes by root, and limits on the bytes of groups of roots: a tenant's share of a pool.

Roots are made as easily as salts and adapters are named, so one under which nothing lies is forgotten after a while.
A root that comes back then gets another number. No number is given to two roots: what was found out about a number
outside the owner's lock stays true.
"""

from __future__ import annotations

from collections.abc import Container

from kvstore.block import RootId

_MAX_IDLE = 4_096
"""Roots without blocks that are remembered. More than can come between a root's save and its first block."""
_NUM_NUMBERS = 1 << 31


class Accounts:
    """Bytes of blocks in slots, by root. No lock: the owner has one.

    Attributes:
        roots: roots by their number.
        held_bytes: what each root's blocks take, those being filled included, by number. Changed by `charge`.
        num_refused: blocks that were refused for a quota.
    """

    def __init__(self, in_use: Container[int]) -> None:
        """`in_use`: numbers of the roots under which something lies."""
        self.roots: dict[int, RootId] = {}
        self.held_bytes: dict[int, int] = {}
        self.num_refused = 0
        self._in_use = in_use
        self._numbers: dict[RootId, int] = {}  # in the order of use
        self._groups: dict[int, str] = {}
        self._members: dict[str, set[int]] = {}
        self._group_bytes: dict[str, int] = {}
        self._limits: dict[str, int] = {}
        self._next = 0
        self._num_new = 0  # since idle ones were forgotten

    def number_of(self, root: RootId) -> int:
        """Number of a root, given one now where it has none."""
        number = self._numbers.pop(root, None)
        if number is None:
            if self._num_new >= _MAX_IDLE:
                self._forget_idle()
            self._num_new += 1
            number = self._free_number()
            self.roots[number] = root
            self.held_bytes[number] = 0
        self._numbers[root] = number
        return number

    def _free_number(self) -> int:
        number = self._next
        while number in self.roots:  # only ever after two thousand million roots
            number = (number + 1) % _NUM_NUMBERS
        self._next = (number + 1) % _NUM_NUMBERS
        return number

    def _forget_idle(self) -> None:
        """Keep those in use, and of the others those that came last."""
        idle = [(root, number) for root, number in self._numbers.items() if number not in self._in_use]
        for root, number in idle[:-_MAX_IDLE]:
            self._leave_group(number)
            del self._numbers[root], self.roots[number], self.held_bytes[number]
        self._num_new = 0

    def find(self, root: RootId) -> int:
        """Number of a root, -1 for one that is not known."""
        return self._numbers.get(root, -1)

    def charge(self, number: int, num_bytes: int) -> None:
        """The blocks of a root take so many bytes more, or fewer."""
        self.held_bytes[number] += num_bytes
        group = self._groups.get(number)
        if group is not None:
            self._group_bytes[group] += num_bytes

    # -- groups ------------------------------------------------------------------------------------------------

    def has_group(self, root: RootId) -> bool:
        return self.find(root) in self._groups

    def set_group(self, root: RootId, group: str) -> None:
        """From now on; empty for none."""
        if not group:
            self._leave_group(self.find(root))
            return
        number = self.number_of(root)
        if self._groups.get(number) == group:
            return
        self._leave_group(number)
        self._groups[number] = group
        self._members.setdefault(group, set()).add(number)
        self._group_bytes[group] = self._group_bytes.get(group, 0) + self.held_bytes[number]

    def _leave_group(self, number: int) -> None:
        group = self._groups.pop(number, None)
        if group is None:
            return
        self._group_bytes[group] -= self.held_bytes[number]
        members = self._members[group]
        members.discard(number)
        if not members:
            del self._members[group], self._group_bytes[group]

    def set_limit(self, group: str, max_bytes: int | None) -> None:
        if max_bytes is None:
            self._limits.pop(group, None)
        else:
            self._limits[group] = max_bytes

    def room_bytes(self, number: int) -> int | None:
        """What a root's group may still take, negative where it has too much; None where nothing limits it."""
        group = self._groups.get(number)
        limit = None if group is None else self._limits.get(group)
        return None if group is None or limit is None else limit - self._group_bytes[group]

    def limit_of(self, number: int) -> int:
        """Limit of a root's group. Only where there is one."""
        return self._limits[self._groups[number]]

    def group_of(self, number: int) -> list[int]:
        """Numbers of the roots that share a limit with this one."""
        group = self._groups.get(number)
        return [number] if group is None else list(self._members[group])

    def faults(self) -> list[str]:
        """Groups whose sum is not that of their members."""
        return [
            f"pool: group {group!r} is charged {self._group_bytes[group]} bytes and takes {total}"
            for group, members in self._members.items()
            if (total := sum(self.held_bytes[number] for number in members)) != self._group_bytes[group]
        ]
