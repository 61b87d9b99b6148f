# SPDX-License-Identifier: Apache-2.0
"""What policies share that choose among the ends of chains: queues of runs without known children.

A *run* is a piece of one chain whose blocks were used alike: a request adds one, and it is cut where a later request
goes another way or uses only a part. All that a policy knows it knows of runs, so a use of a chain costs one look-up
a run, and one comparison of ids for all of its blocks. A subclass puts each run into one of a few queues, by a number
that says where in it; whichever queue it names next gives up the tail of its lowest end. Suffixes go before prefixes
whatever the subclass thinks of either.

Rows in numpy arrays (`kvstore.policies.leaves`) cost `returns` 23 µs a block of a real chat trace, runs 6: a request
has 25 blocks, too few for arrays to pay. It keeps 170 bytes a block where `lru` with its arrays keeps 77.

No call should be long with a million blocks, and none that meets a full garbage collection, which walks every list in
whichever thread it befalls: so ids lie in many small dicts (one took 63 ms where it doubled) and in tuples, which the
collector leaves alone; queues are compacted (`kvstore.policies.heaps`), and levels learned anew, some at a time.

Invariants
1. The blocks of a run follow each other in one chain; what hangs from a run hangs from its last block.
2. Every end that was touched, or was there when a walk began, has an entry in the heap where it belongs.
3. Blocks that were yielded count as gone until the next walk begins, then as there again where nobody removed them.
4. What is remembered of a queue's lowest end holds until the queue is in `_changed`: a walk looks at those alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.policies.bands import ORDINARY, Bands, Wish, wishes
from kvstore.policies.base import Policy
from kvstore.policies.heaps import NOWHERE, Heaps

_MOST_UNTOUCHED = 1024

_NO_CHILDREN: set[Run] = set()  # never added to


class Run:
    """Blocks of one chain, head to tail, used alike. `key`, `queue`, `kind` and `at_s` are a subclass's."""

    __slots__ = (
        "at_s", "bank", "children", "entry_heap", "entry_key", "forked", "fresh", "ids", "is_out", "key", "kind",
        "length", "num_out", "number", "out_children", "parent", "parted", "queue",
    )  # fmt: skip

    def __init__(self, number: int, ids: tuple[BlockId, ...]) -> None:
        self.number = number
        self.ids = ids
        """Its blocks, and behind them some that it had: a tuple, since full garbage collections walk lists."""
        self.length = len(ids)
        self.parent: Run | None = None
        self.children = _NO_CHILDREN
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
        self.bank = 0
        """Where the queues of its priority begin."""
        self.key = 0
        self.entry_heap, self.entry_key = NOWHERE, 0
        """Where the entry is that stands for it, and what it says of `key`."""
        self.queue = 0
        self.kind = 0
        self.at_s = 0.0

    @property
    def is_end(self) -> bool:
        """Whether the walk may take from it."""
        return self.num_out < self.length and len(self.children) == self.out_children

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        """Head to tail."""
        return self.ids if self.length == len(self.ids) else self.ids[: self.length]


class RunPolicy(Policy):
    """Yields the tail of the lowest end of whichever queue `_next_queue` names, and what that uncovers, and so on.

    There are `num_queues` for each priority that callers wished for (`kvstore.policies.bands`), and those of the
    lowest give first: what a subclass sees as its queues are those of the band whose turn it is.
    """

    num_queues = 1
    compacted_at_once = 2048
    """Entries of queues that are looked at in one call, to drop those out of date."""

    def __init__(self, options: object = None, *, ordinary: int = ORDINARY) -> None:
        super().__init__(options)
        self._bands = Bands(self.num_queues, ordinary)
        self._bank = 0
        """Where the queues of the band begin whose turn it is."""
        # By number: a dict of ids to runs would be walked by every full garbage collection.
        self._numbers: list[dict[BlockId, int]] = [{} for _ in range(256)]
        """Of runs, by block: by its last byte, since one dict of a million ids takes 60 ms where it grows."""
        self._num_blocks = 0
        self._runs: dict[int, Run] = {}
        self._num_runs = 0
        self._heaps = Heaps(self.num_queues, self._runs)
        self._untouched: list[int] = []
        """Runs that were admitted: without entries, until a touch or a walk."""
        self._num_uses = 0
        self._out: dict[int, Run] = {}
        """Runs that the last walk took from."""
        self._walks = 0
        self._changed: set[int] = set()
        """Queues of the band whose turn it is that may have another lowest end since a subclass looked."""

    # -- what a subclass says ----------------------------------------------------------------------------------

    @abstractmethod
    def _enter(self, run: Run, hint: Hint) -> None:
        """Place blocks that became resident: give their run its queue and key. It may be cut by `_cut`."""

    @abstractmethod
    def _use(self, runs: list[Run], starts: Sequence[int], blocks: Sequence[BlockId], hint: Hint) -> None:
        """Place the runs of a chain that was used. They are known, and begin at `starts` of `blocks`.

        What it cuts off the last one belongs at the end of `runs`. A key that was given may only rise.
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
            run = self._new_run(tuple(blocks))
            self._num_blocks += run.length
            self._enter(run, hint)
            self._untouched.append(run.number)
            if len(self._untouched) > _MOST_UNTOUCHED:
                self._push_untouched()

    def touch(self, blocks: Sequence[BlockId], hint: Hint) -> None:
        self._put_back()
        self._bands.now_s = max(self._bands.now_s, hint.time_s)
        runs, starts = self._find(blocks)
        if not runs:
            return
        self._changed.update([run.queue for run in runs])
        if not self._bands.plain or wishes(hint):
            self._heed(runs, starts, len(blocks), hint)
        self._use(runs, starts, blocks, hint)
        for at in range(len(runs) - 1, 0, -1):
            self._join(runs[at - 1], runs[at])
        for run in runs:
            run.fresh = False
            if not run.children and run.length:
                self._push(run)

    def remove(self, blocks: Sequence[BlockId]) -> None:
        holes: dict[int, set[BlockId]] = {}
        for block in blocks:
            number = self._numbers[block[-1]].pop(block, 0)
            if not number:
                continue
            self._num_blocks -= 1
            run = self._runs[number]
            last = run.ids[run.length - 1]
            if last is not block and last != block:
                holes.setdefault(number, set()).add(block)
                continue
            self._shorten(run)
        for number, gone in holes.items():
            self._tear(self._runs[number], gone)

    def victims(self) -> Iterator[BlockId]:
        self._put_back()
        walk = self._walks
        self._push_untouched()
        if not self._bands.plain:
            self._expire()
            self._turn_to(self._bands.lowest)
        self._walk_begins()
        while walk == self._walks and (queue := self._next_heap()) >= 0:
            run = self._runs[self._heaps.lists[queue][0][1]]
            self._out[run.number] = run
            run.num_out += 1
            self._yielded(run)
            block = run.ids[run.length - run.num_out]
            if run.num_out == run.length:
                self._heaps.pop(queue, run)
                self._changed.add(queue - self._bank)
                self._uncover(run)
            yield block

    def __len__(self) -> int:
        return self._num_blocks

    def __contains__(self, block: BlockId) -> bool:
        return block in self._numbers[block[-1]]

    # -- places ------------------------------------------------------------------------------------------------

    def _latest_key(self) -> int:
        """Above all that were given. Of a chain's runs the head's is the highest, so it is asked for tail first."""
        self._num_uses += 1
        return self._num_uses

    def _head(self, queue: int) -> Run | None:
        """The lowest end of a queue."""
        return self._heaps.lowest(self._bank + queue)

    def _push(self, run: Run) -> None:
        """See to it that an end has an entry where it belongs."""
        self._heaps.place(run)
        if run.bank == self._bank:
            self._changed.add(run.queue)
        elif self._bands.priority_of(run.bank) < self._bands.priority_of(self._bank):
            self._turn_to(run.bank)  # the walk uncovered it

    def _push_untouched(self) -> None:
        for number in self._untouched:
            run = self._runs.get(number)
            if run is not None and run.fresh and run.is_end:
                self._push(run)
        self._untouched.clear()

    @staticmethod
    def _num_shared(runs: Sequence[Run]) -> int:
        """How many of a chain's runs, from its head on, other known chains use too."""
        return max((at + 1 for at, run in enumerate(runs) if run.forked), default=0)

    def _put_back(self) -> None:
        """End the walk: what it yielded and nobody removed is there again."""
        self._walks += 1
        if self._out:
            out, self._out = self._out, {}
            for run in out.values():
                run.num_out = run.out_children = 0
                if run.is_out:
                    run.is_out = False
                    if run.parent is not None:
                        run.parent.out_children = 0
                        self._changed.add(run.parent.queue)  # it was an end while this one was out
                    if not run.children:
                        self._push(run)
        if self._heaps.is_crowded:
            heap = self._heaps.compact_some(self.compacted_at_once)
            if heap != NOWHERE:
                self._changed.add(heap % self.num_queues)

    # -- what callers wish for ---------------------------------------------------------------------------------

    def _heed(self, runs: list[Run], starts: list[int], num_blocks: int, hint: Hint) -> None:
        """Move the runs of a chain that was used to the bands that the hint wishes for, cut where it says."""
        self._expire()  # or a use after the end of its time would go unnoticed
        for run in runs:
            if self._bands.is_over(run.bank):
                self._move(run, Wish(0, num_blocks, 0, private=False))
        for wish in self._bands.wished(hint, num_blocks):
            self._heaps.grow(self._bands.num_heaps)
            for at in (wish.start, wish.stop):
                self._cut_at(at, runs, starts)
            first = self._num_shared(runs) if wish.private else 0
            for run, start in zip(runs[first:], starts[first:], strict=True):
                if wish.start <= start < wish.stop:
                    self._move(run, wish)

    def _cut_at(self, at: int, runs: list[Run], starts: list[int]) -> None:
        """See to it that one of a chain's runs begins at a block of it."""
        for number, (run, start) in enumerate(zip(runs, starts, strict=True)):
            if start < at < start + run.length:
                runs.insert(number + 1, self._cut(run, at - start))
                starts.insert(number + 1, at)
                return

    def _move(self, run: Run, wish: Wish) -> None:
        self._bands.hold(run.number, wish)
        if wish.bank is not None:
            run.bank = wish.bank

    def _expire(self) -> None:
        for number, bank in self._bands.expired():
            run = self._runs[number]
            run.bank = 0 if run.forked and self._bands.is_over(bank) else bank
            if run.is_end:
                self._push(run)

    def _turn_to(self, bank: int) -> None:
        self._bank = bank
        self._changed.update(range(self.num_queues))

    def _next_heap(self) -> int:
        """The heap whose lowest end goes next, from the lowest band on that has one; -1 where none has."""
        while (queue := self._next_queue()) < 0:
            bank = self._bands.next_higher(self._bank, self._heaps.lists)
            if bank < 0:
                return -1
            self._turn_to(bank)
        return self._bank + queue

    # -- runs --------------------------------------------------------------------------------------------------

    def _new_run(self, ids: tuple[BlockId, ...]) -> Run:
        self._num_runs += 1
        run = self._runs[self._num_runs] = Run(self._num_runs, ids)
        self._name(ids, run.number)
        return run

    def _name(self, ids: tuple[BlockId, ...], number: int) -> None:
        """Blocks belong to a run."""
        numbers = self._numbers
        for block in ids:
            numbers[block[-1]][block] = number

    def _number_of(self, block: BlockId) -> int:
        """Of the run that has a block; 0 where none has."""
        return self._numbers[block[-1]].get(block, 0)

    def _find(self, blocks: Sequence[BlockId]) -> tuple[list[Run], list[int]]:
        """Runs of a chain's known blocks, cut so that they hold no others, and where they begin."""
        runs: list[Run] = []
        starts: list[int] = []
        at, num_blocks = 0, len(blocks)
        before: Run | None = None
        while at < num_blocks:
            block = blocks[at]
            number = self._number_of(block)
            if not number:
                at, before = at + 1, None
                continue
            run = self._runs[number]
            if run.ids[0] != block:
                run = self._cut(run, run.ids.index(block))
            own = run.blocks
            length = min(len(own), num_blocks - at)
            if length < len(own) or own != tuple(blocks[at : at + length]):
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
        if parent.children:
            parent.children.add(run)
        else:
            parent.children = {run}
        parent.forked |= parent.parted
        parent.parted = True

    def _cut(self, run: Run, at: int) -> Run:
        """Make the blocks from `at` on a run of their own, which is returned, and hangs from the rest."""
        rest = self._new_run(run.ids[at : run.length])
        run.ids, run.length = run.ids[:at], at
        rest.key, rest.queue, rest.kind, rest.at_s = run.key, run.queue, run.kind, run.at_s
        rest.bank = run.bank
        if not self._bands.plain:
            self._bands.hold(rest.number, self._bands.held(run.number))
        rest.fresh, rest.parted, rest.forked = run.fresh, run.parted, run.forked
        rest.children, rest.parent = run.children, run
        for child in rest.children:
            child.parent = rest
        run.children, run.parted, run.forked = {rest}, True, False
        rest.out_children, run.out_children = run.out_children, 0
        if run.num_out:  # a walk is under way
            rest.num_out = min(run.num_out, rest.length)
            rest.is_out = rest.num_out == rest.length
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
            and (run.queue, run.kind, run.at_s, run.bank) == (rest.queue, rest.kind, rest.at_s, rest.bank)
            and self._bands.held(run.number) is self._bands.held(rest.number)
        ):
            self._name(rest.blocks, run.number)
            run.ids = run.blocks + rest.blocks
            run.length += rest.length
            run.children, run.parted, run.forked = _NO_CHILDREN, rest.parted, rest.forked
            rest.length = 0
            self._bands.forget(rest.number)
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
        self._bands.forget(run.number)
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
            at = run.length
            while run.ids[at - 1] not in gone:
                at -= 1
            if at < run.length:
                self._cut(run, at)
            gone.remove(run.ids[run.length - 1])
            self._shorten(run)

    def _shorten(self, run: Run) -> None:
        """Forget the last block of a run. What hangs from it hangs from nothing from now on."""
        run.length -= 1
        block = run.ids[run.length]
        if run.length < len(run.ids) // 2:
            run.ids = run.blocks
        for child in list(run.children) if run.children else ():
            self._leave_parent(child)
        run.parted = True
        self._left(run, block, evicted=run.num_out > 0)
        if run.num_out:
            run.num_out -= 1
        else:
            self._changed.add(run.queue)
        if not run.length:
            self._drop(run)
