# SPDX-License-Identifier: Apache-2.0
"""Roots by their digest, as clients have shown them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable

from kvstore.block import Root, RootId
from kvstore.service.rights import Rights

_MAX_ROOTS = 16_384
"""Of a tenant, and of all clients without one together."""


class RootBook:
    """What lies behind a digest, for rights to be checked against. Thread-safe.

    A digest says nothing about tenant and model: only a root that some client has named in full can be checked
    against the rights of a peer, and one that nobody has named holds nothing here.

    Whoever may use one salt can make any number of roots by naming adapters. So each tenant has room of its own, and
    what it shows pushes out what it used longest ago itself, and nobody else's: half of it at a time, since whoever
    watches has to begin anew then.

    Attributes:
        num_folds: how often roots were forgotten, under which there may be blocks that nobody can be told of any more.
    """

    def __init__(self, max_roots: int = _MAX_ROOTS) -> None:
        self._max_roots = max_roots
        self._lock = threading.Lock()
        self._roots: dict[RootId, Root] = {}
        self._shown: dict[str, OrderedDict[RootId, None]] = {}  # by tenant, in the order of use
        self.num_folds = 0
        self._num_tenants: dict[RootId, int] = {}

    def __len__(self) -> int:
        return len(self._roots)

    def learn(self, root: Root, tenant: str = "") -> None:
        """A client of `tenant` has shown this root, and has a right to it."""
        with self._lock:
            shown = self._shown.setdefault(tenant, OrderedDict())
            if root.id not in shown:
                self._roots[root.id] = root
                self._num_tenants[root.id] = self._num_tenants.get(root.id, 0) + 1
                shown[root.id] = None
                if len(shown) > self._max_roots:
                    self._forget([shown.popitem(last=False)[0] for _ in range(len(shown) // 2)])
            shown.move_to_end(root.id)

    def keep(self, tenants: Collection[str]) -> None:
        """Forget what other tenants have shown: they are none any more. Who has no tenant is none of them."""
        with self._lock:
            for tenant in [each for each in self._shown if each and each not in tenants]:
                self._forget(self._shown.pop(tenant))

    def _forget(self, roots: Iterable[RootId]) -> None:
        """One tenant less knows them."""
        for root in roots:
            self._num_tenants[root] -= 1
            if not self._num_tenants[root]:
                del self._num_tenants[root], self._roots[root]
        self.num_folds += 1

    def allows(self, rights: Rights, digest: bytes) -> bool:
        """Whether these rights reach what lies under a root; False for one that is not known."""
        with self._lock:
            root = self._roots.get(RootId(digest))
        return root is not None and rights.allows(root)
