# SPDX-License-Identifier: Apache-2.0
"""Which memory of servers a device's driver is to be told of, as servers come and go."""

from __future__ import annotations

import threading

from kvstore.api import Register, Registration
from kvstore.mapping import ArenaMapping


class Lending:
    """Which memory a device's driver is to be told of: one server's after the other's. Thread-safe.

    Memory is registered once its server has touched all of it: registering faults pages in, and they would count as
    this process's. Its mapping takes that back when it is closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._register: Register | None = None
        self._num_holders = 0
        self._mapping: ArenaMapping | None = None

    def lend(self, mapping: ArenaMapping) -> None:
        """This memory is ready, and in place of any before it. Told often."""
        with self._lock:
            if self._mapping is not mapping:
                self._mapping = mapping
                if self._register is not None:
                    mapping.register(self._register)

    def forget(self, mapping: ArenaMapping) -> None:
        with self._lock:
            if self._mapping is mapping:
                self._mapping = None

    def begin(self, register: Register) -> Registration:
        """Have memory registered until what this returns is closed. Of several who ask, the first's `register` does."""
        with self._lock:
            self._num_holders += 1
            if self._register is None:
                self._register = register
                if self._mapping is not None:
                    self._mapping.register(register)
        return _Holder(self)

    def end(self) -> None:
        """One holder less."""
        with self._lock:
            self._num_holders -= 1
            if self._num_holders:
                return
            self._register = None
            mapping = self._mapping
        if mapping is not None:
            mapping.unregister()


class _Holder:
    """Implements `kvstore.api.Registration`: one who wants memory registered."""

    def __init__(self, lending: Lending) -> None:
        self._lending: Lending | None = lending

    def close(self) -> None:
        lending, self._lending = self._lending, None
        if lending is not None:
            lending.end()
