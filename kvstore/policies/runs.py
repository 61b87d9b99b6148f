# SPDX-License-Identifier: Apache-2.0
"""What policies share that choose among the ends of chains: queues of runs without known children.

A *run* is a piece of one chain whose blocks were used alike: a request adds one, and it is cut where a later request
goes another way or uses only a part. All that a policy knows it knows of runs, so a use of a chain costs one look-up
a run, and one comparison of ids for all of its blocks. A subclass puts each run into one of a few queues, by a number
that says where in it; whichever queue it names next gives up the tail of its lowest end. Suffixes go before prefixes
whatever the subclass thinks of either.

Rows in numpy arrays (`kvstore.policies.leaves`) cost `returns` 23 µs a block of a real chat trace, runs 6: a request
has 25 blocks, too few for arrays to pay. It keeps 170 bytes a block where `lru` with its arrays keeps 77.

Calls that are long with a million blocks: 63 ms where the dict of ids doubles, once each time; of 75,000 others 33 ms
at most. Python's full collections of garbage walk another 80 ms over 49,000 runs, in whichever thread they befall:
packing a run's ids into one bytearray would save 35 of these.

Invariants
1. The blocks of a run follow each other in one chain; what hangs from a run hangs from its last block.
2. Heaps hold every end, and entries that are out of date; an entry counts where its number is its run's own, nothing
   hangs from the run, and it has blocks that the walk did not yield.
3. Blocks that were yielded count as gone until the next walk begins, then as there again where nobody removed them.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Iterator, Sequence

from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.policies.base import Policy

_SPARE_ENTRIES = 1024


class Run:
    """Blocks of one chain, head to tail, used alike. `key`, `queue`, `kind` and `at_s` are the policy's."""

    __slots__ = (
        "at_s", "blocks", "children", "forked", "fresh", "is_out", "key", "kind", "num_out", "number", "out_children",
        "parent", "parted", "queue",
    )  # fmt: skip

    def __init__(self, number: int, blocks: list[BlockId]) -> None:
        self.number = number
        self.blocks = blocks
        self.parent: Run | None = None
        self.children: set[Run] = set()
        self.fresh = True
        """Admitted, and in no touch since."""
        self.parted = False
        """Whether anything ever hung from its last block."""
        self.forked = False
        """Whether several blocks ever did."""
        self.num_out = 0
        """Blocks from the tail on that the walk yielded and nobody removed."""
        self.is_out = False
        """Whether the walk yielded all."""
        self.out_children = 0
        """Children that are out."""
        self.key = 0
        self.queue = 0
        self.kind = 0
        self.at_s = 0.0

    @property
    def is_end(self) -> bool:
        """Whether the walk may take from it."""
        return len(self.children) == self.out_children and self.num_out < len(self.blocks)


class RunPolicy(Policy):
    """Yields the tail of the lowest end of whichever queue `_next_queue` names, and what that uncovers, and so on."""

    num_queues = 1
    compacted_at_once = 2048
    """Entries of queues that are looked at in one call, to drop those out of date."""

    def __init__(self, options: object = None) -> None:
        super().__init__(options)
        # By number: a dict of ids to runs would be walked by every full garbage collection.
        self._number_of: dict[BlockId, int] = {}
        self._runs: dict[int, Run] = {}
        self._num_runs = 0
        self._heaps: list[list[tuple[int, int]]] = [[] for _ in range(self.num_queues)]
        self._num_entries = 0
        self._compacted_queue = 0
        self._old: list[tuple[int, int]] = []
        """Entries of that queue as they were, not looked at yet; those that counted, and new ones, are kept."""
        self._kept: dict[tuple[int, int], None] = {}
        self._num_uses = 0
        self._out: dict[int, Run] = {}
        """Runs that the last walk took from."""
        self._walks = 0
        self._changed: set[int] = set()
        """Queues that may have another lowest end since a subclass looked."""

    # -- what a subclass says ----------------------------------------------------------------------------------

    @abstractmethod
    def _enter(self, run: Run, hint: Hint) -> None:
        """Place blocks that became resident: give their run its queue and key. It may be cut by `_cut`."""

    @abstractmethod
    def _use(self, runs: list[Run], starts: Sequence[int], blocks: Sequence[BlockId], hint: Hint) -> None:
        """Place the runs of a chain that was used. They are known, and begin at `starts` of `blocks`.

        What it cuts off the last one belongs at the end of `runs`.
        """

    @abstractmethod
    def _next_queue(self) -> int:
        """Number of the queue whose lowest end goes next, which `_head` has found; -1 where none has an end."""

    def _left(self, run: Run, block: BlockId, *, evicted: bool) -> None:
        """A block is forgotten; `evicted`: the walk had yielded it."""

    def _walk_begins(self) -> None:
        """A walk over the victims begins; all that was yielded before and not removed is there again."""

    def _yielded(self, run: Run) -> None:
        """A block of a run counts as gone until the next walk begins."""

    # -- the policy --------------------------------------------------------------------------------------------

    def admit(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        if blocks:
            self._put_back()
            run = self._new_run(list(blocks))
            self._number_of.update(dict.fromkeys(run.blocks, run.number))
            self._enter(run, hint)
            self._push(run)

    def touch(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        self._put_back()
        runs, starts = self._find(blocks)
        if not runs:
            return
        self._use(runs, starts, blocks, hint)
        for at in range(len(runs) - 1, 0, -1):
            self._join(runs[at - 1], runs[at])
        for run in runs:
            run.fresh = False
            if not run.children and run.blocks:
                self._push(run)

    def remove(self, blocks: Sequence[BlockId]) -> None:
        holes: dict[int, set[BlockId]] = {}
        for block in blocks:
            number = self._number_of.pop(block, 0)
            if not number:
                continue
            run = self._runs[number]
            if run.blocks[-1] is not block and run.blocks[-1] != block:
                holes.setdefault(number, set()).add(block)
                continue
            self._shorten(run)
        for number, gone in holes.items():
            self._tear(self._runs[number], gone)

    def victims(self) -> Iterator[BlockId]:
        self._put_back()
        walk = self._walks
        self._walk_begins()
        while walk == self._walks and (queue := self._next_queue()) >= 0:
            run = self._runs[self._heaps[queue][0][1]]
            self._out[run.number] = run
            run.num_out += 1
            self._yielded(run)
            block = run.blocks[-run.num_out]
            if run.num_out == len(run.blocks):
                heapq.heappop(self._heaps[queue])
                self._num_entries -= 1
                self._changed.add(queue)
                self._uncover(run)
            yield block

    def __len__(self) -> int:
        return len(self._number_of)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._number_of

    # -- places ------------------------------------------------------------------------------------------------

    def _latest_key(self) -> int:
        """Above all that were given. Of a chain's runs the head's is the highest, so it is asked for tail first."""
        self._num_uses += 1
        return self._num_uses

    def _head(self, queue: int) -> Run | None:
        """The lowest end of a queue."""
        heap = self._heaps[queue]
        while heap:
            run = self._end_of(queue, heap[0])
            if run is not None:
                return run
            heapq.heappop(heap)
            self._num_entries -= 1
        return None

    def _end_of(self, queue: int, entry: tuple[int, int]) -> Run | None:
        """The run that an entry of a queue stands for; None where it is out of date."""
        key, number = entry
        run = self._runs.get(number)
        return run if run is not None and run.key == key and run.queue == queue and run.is_end else None

    def _push(self, run: Run) -> None:
        entry = (run.key, run.number)
        heapq.heappush(self._heaps[run.queue], entry)
        if self._old and run.queue == self._compacted_queue:
            self._kept[entry] = None
        self._num_entries += 1
        self._changed.add(run.queue)

    def _private(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Those of a chain's runs, from its tail on, that no other known chain uses."""
        shared = [at for at, run in enumerate(runs) if run.forked]
        return runs[shared[-1] + 1 :] if shared else runs

    def _put_back(self) -> None:
        """End the walk: what it yielded and nobody removed is there again."""
        self._walks += 1
        out, self._out = self._out, {}
        for run in out.values():
            run.num_out = run.out_children = 0
            if run.is_out:
                run.is_out = False
                if run.parent is not None:
                    run.parent.out_children = 0
                if not run.children:
                    self._push(run)
        if self._old or self._num_entries > 2 * len(self._runs) + _SPARE_ENTRIES:
            self._compact_some()

    def _compact_some(self) -> None:
        """Drop what is out of date, or there twice, from one queue after the other, some entries each time.

        There would be an entry a use. All queues at once took 60 ms with a million blocks, after every learning; one
        queue no less, where it had most of the runs.
        """
        if not self._old:
            self._compacted_queue = (self._compacted_queue + 1) % self.num_queues
            self._old, self._kept = list(self._heaps[self._compacted_queue]), {}
        queue = self._compacted_queue
        some = self._old[-self.compacted_at_once :]
        del self._old[-self.compacted_at_once :]
        self._kept.update(dict.fromkeys(entry for entry in some if self._end_of(queue, entry) is not None))
        if not self._old:
            kept, self._kept = list(self._kept), {}
            heapq.heapify(kept)
            self._num_entries -= len(self._heaps[queue]) - len(kept)
            self._heaps[queue] = kept
            self._changed.add(queue)

    # -- runs --------------------------------------------------------------------------------------------------

    def _new_run(self, blocks: list[BlockId]) -> Run:
        self._num_runs += 1
        run = self._runs[self._num_runs] = Run(self._num_runs, blocks)
        return run

    def _find(self, blocks: Sequence[BlockId]) -> tuple[list[Run], list[int]]:
        """Runs of a chain's known blocks, cut so that they hold no others, and where they begin."""
        runs: list[Run] = []
        starts: list[int] = []
        at, num_blocks = 0, len(blocks)
        before: Run | None = None
        while at < num_blocks:
            block = blocks[at]
            number = self._number_of.get(block, 0)
            if not number:
                at, before = at + 1, None
                continue
            run = self._runs[number]
            if run.blocks[0] != block:
                run = self._cut(run, run.blocks.index(block))
            own = run.blocks
            length = min(len(own), num_blocks - at)
            if length < len(own) or own != list(blocks[at : at + length]):
                same = 1
                while same < length and own[same] == blocks[at + same]:
                    same += 1
                self._cut(run, same)
                length = same
            if before is not None and run.parent is not before:
                self._hang(run, before)
            runs.append(run)
            starts.append(at)
            at, before = at + length, run
        return runs, starts

    def _hang(self, run: Run, parent: Run) -> None:
        if run.parent is not None:
            run.parent.children.remove(run)
        run.parent = parent
        parent.children.add(run)
        parent.forked |= parent.parted
        parent.parted = True

    def _cut(self, run: Run, at: int) -> Run:
        """Make the blocks from `at` on a run of their own, which is returned, and hangs from the rest."""
        rest = self._new_run(run.blocks[at:])
        del run.blocks[at:]
        self._number_of.update(dict.fromkeys(rest.blocks, rest.number))
        rest.key, rest.queue, rest.kind, rest.at_s = run.key, run.queue, run.kind, run.at_s
        rest.fresh, rest.parted, rest.forked = run.fresh, run.parted, run.forked
        rest.children, rest.parent = run.children, run
        for child in rest.children:
            child.parent = rest
        run.children, run.parted, run.forked = {rest}, True, False
        rest.out_children, run.out_children = run.out_children, 0
        if run.num_out:  # a walk is under way
            rest.num_out = min(run.num_out, len(rest.blocks))
            rest.is_out = rest.num_out == len(rest.blocks)
            run.num_out -= rest.num_out
            run.out_children = int(rest.is_out)
            self._out[rest.number] = rest
        if rest.is_end:
            self._push(rest)
        return rest

    def _join(self, run: Run, rest: Run) -> None:
        """Make one of two runs that are alike, where nothing else hangs from either."""
        if (
            rest.parent is run
            and len(run.children) == 1
            and not run.forked
            and not rest.children
            and run.key - rest.key == 1
            and (run.queue, run.kind, run.at_s) == (rest.queue, rest.kind, rest.at_s)
        ):
            run.blocks += rest.blocks
            self._number_of.update(dict.fromkeys(rest.blocks, run.number))
            run.children, run.parted, run.forked = set(), rest.parted, rest.forked
            rest.blocks = []
            del self._runs[rest.number]

    def _uncover(self, run: Run) -> None:
        """The walk yielded all of a run."""
        run.is_out = True
        parent = run.parent
        if parent is not None:
            parent.out_children += 1
            if parent.is_end:
                self._push(parent)

    def _drop(self, run: Run) -> None:
        """Forget a run without blocks and children."""
        del self._runs[run.number]
        self._leave_parent(run)
        run.is_out = False

    def _leave_parent(self, run: Run) -> None:
        parent, run.parent = run.parent, None
        if parent is not None:
            parent.children.remove(run)
            if run.is_out:
                parent.out_children -= 1  # it was uncovered then
            elif parent.is_end:
                self._push(parent)

    def _tear(self, run: Run, gone: set[BlockId]) -> None:
        """Take blocks out of the midst of a run; what is behind each is a chain of its own from then on."""
        while gone:
            at = len(run.blocks)
            while run.blocks[at - 1] not in gone:
                at -= 1
            if at < len(run.blocks):
                self._cut(run, at)
            gone.remove(run.blocks[-1])
            self._shorten(run)

    def _shorten(self, run: Run) -> None:
        """Forget the last block of a run. What hangs from it hangs from nothing from now on."""
        block = run.blocks.pop()
        for child in list(run.children):
            self._leave_parent(child)
        run.parted = True
        self._left(run, block, evicted=run.num_out > 0)
        if run.num_out:
            run.num_out -= 1
        else:
            self._changed.add(run.queue)
        if not run.blocks:
            self._drop(run)
