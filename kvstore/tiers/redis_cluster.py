# SPDX-License-Identifier: Apache-2.0
"""Batches over the nodes of a Cluster: each node's keys over a connection of its own, all nodes at once.

A node that fails makes its own keys absent, and the topology is asked for anew; only where no node answers does a
call fail. A key that is elsewhere by now (MOVED) or for this once (ASK) is asked for there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from kvstore.block import PartKey
from kvstore.errors import TierError
from kvstore.tiers.redis_beside import BesideRead, Moved, end_all
from kvstore.tiers.redis_errors import WrongBooks
from kvstore.tiers.redis_names import Names
from kvstore.tiers.redis_nodes import ASKING, ClusterTalk, Node, Nodes
from kvstore.tiers.redis_presence import present
from kvstore.tiers.redis_read import Counts, Reader
from kvstore.tiers.redis_wire import ReplyError, command
from kvstore.tiers.redis_write import Item, SendItems


class _NodeRead(BesideRead):
    """One node's share of a read."""

    says_moved = may_wait = True

    def __init__(self, node: Node, into: Mapping[PartKey, memoryview], deadline: float) -> None:
        super().__init__(node.loads.lease(deadline), into)
        self._head: deque[PartKey | Moved | None] = deque()

    def outcome(self, key: PartKey) -> PartKey | Moved | None:
        """What became of `key`, the next one of this node: itself, where it moved, or None for a miss.

        Raises what ended the node's read before that.
        """
        if not self._head:
            said = self.listen()
            self._head.extend(said if isinstance(said, list) else [said])
        event = self._head[0]
        if event == key or (isinstance(event, Moved) and event.key == key):
            return self._head.popleft()
        return None  # a later key, or the end: this one is not there


class ClusterBatches:
    """The batches of a tier over many nodes. Thread-safe."""

    def __init__(self, nodes: Nodes, names: Names, reader: Reader) -> None:
        self._nodes = nodes
        self._names = names
        self._reader = reader

    def contains(self, keys: Sequence[PartKey], deadline: float) -> list[bool]:
        found = [False] * len(keys)
        elsewhere: list[int] = []

        def ask(node: Node, positions: list[int]) -> None:
            chosen = [keys[position] for position in positions]
            with node.loads.lease(deadline) as wire:
                try:
                    flags = present(wire, self._names, chosen, deadline, by_stripe=True)
                except ReplyError:
                    elsewhere.extend(positions)
                    return
            for position, flag in zip(positions, flags, strict=True):
                found[position] = flag

        self._on_each_node([self._names.stripe(key) for key in keys], ask, deadline)
        if elsewhere:
            self._nodes.suspect()
            commands = [command("EXISTS", self._names.value(keys[position])) for position in elsewhere]
            talk = ClusterTalk(self._nodes, len(self._names.stripes))
            for position, reply in zip(elsewhere, talk.ask(commands, deadline), strict=True):
                found[position] = reply == 1
        return found

    def _on_each_node(
        self, stripes: Sequence[int], work: Callable[[Node, list[int]], None], deadline: float
    ) -> list[TierError]:
        """Run `work` for each node and its positions, at once; returns failures. Raises where all nodes failed."""
        shares = self._nodes.split(stripes, deadline)
        errors: list[TierError] = []

        def run(node: Node, positions: list[int]) -> None:
            try:
                work(node, positions)
            except TierError as error:
                self._nodes.suspect()
                errors.append(error)

        threads = [threading.Thread(target=run, args=share, daemon=True) for share in shares.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            if isinstance(error, WrongBooks):  # else it would look like a node that is away, for good
                raise error
        if errors and len(errors) == len(shares):
            raise errors[0]
        return errors

    def send(self, items: Sequence[Item], send_items: SendItems, deadline: float) -> set[PartKey]:
        """Send each node its items, in order; returns the keys that arrived."""
        landed: set[PartKey] = set()
        lock = threading.Lock()

        def send(node: Node, positions: list[int]) -> None:
            with node.stores.lease(deadline) as wire, self._nodes.sparing_loads():
                arrived = send_items(wire, [items[position] for position in positions])
            with lock:
                landed.update(arrived)

        self._on_each_node([self._names.stripe(item[0]) for item in items], send, deadline)
        if len(landed) < len(items):
            self._nodes.suspect()
        return landed

    def read(
        self, into: Mapping[PartKey, memoryview], deadline: float, damaged: list[PartKey], counts: Counts
    ) -> Generator[list[PartKey], None, None]:
        """As `Tier.read`: keys in mapping order, whichever node is ahead."""
        keys = list(into)
        shares = self._nodes.split([self._names.stripe(key) for key in keys], deadline)
        reads: list[_NodeRead] = []
        by_key: dict[PartKey, _NodeRead] = {}
        for node, positions in shares.items():
            share = _NodeRead(node, {keys[position]: into[keys[position]] for position in positions}, deadline)
            by_key |= dict.fromkeys(share.into, share)
            reads.append(share)
        try:
            for share in reads:
                share.start(self._reader, deadline)
            yield from self._in_order(keys, by_key, into, deadline, damaged, counts)
            for share in reads:
                share.join()
        finally:
            end_all(reads, damaged, counts)

    def _in_order(
        self,
        keys: Sequence[PartKey],
        by_key: Mapping[PartKey, _NodeRead],
        into: Mapping[PartKey, memoryview],
        deadline: float,
        damaged: list[PartKey],
        counts: Counts,
    ) -> Iterator[list[PartKey]]:
        for key in keys:
            try:
                outcome = by_key[key].outcome(key)
            except TierError:
                self._nodes.suspect()
                raise
            if isinstance(outcome, Moved):
                yield from self._read_elsewhere(outcome, into[key], deadline, damaged, counts)
            elif outcome is not None:
                yield [key]

    def _read_elsewhere(
        self, moved: Moved, buffer: memoryview, deadline: float, damaged: list[PartKey], counts: Counts
    ) -> Iterator[list[PartKey]]:
        if not moved.to.asking:
            self._nodes.learn(moved.to)
        with self._nodes.at(moved.to.address).loads.lease(deadline) as wire:
            if moved.to.asking:
                wire.send([ASKING], deadline)
                wire.reply(deadline)
            # Moved again meanwhile: a miss.
            yield from self._reader.read(wire, {moved.key: buffer}, deadline, damaged, counts, lambda key, to: None)
