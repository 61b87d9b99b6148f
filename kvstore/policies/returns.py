# SPDX-License-Identifier: Apache-2.0
"""Return probability: blocks of conversations that are least likely to come back soon go first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from kvstore.api import Hint
from kvstore.block import BlockId
from kvstore.errors import ConfigError
from kvstore.policies.odds import LAST_BLOCK, NUM_LEVELS, Odds, cell_of
from kvstore.policies.runs import Run, RunPolicy
from kvstore.policies.shadow import Shadow

_NO_RECORD = -1
_FIT_EVERY = 256
_FEW_RETURNS = 30
_SHARED_LEVEL = 10  # 0.45: chosen on the first halves of two traces, where 10 to 15 do as well
_WHOLE = 0.5
_PLACED_AT_ONCE = 2048  # runs
_NOTHING = (inf, 0, -1)


@dataclass(slots=True)
class _Record:
    """A request, as the next one of its conversation will find it."""

    number: int
    turn: int
    start: int
    """Blocks before the first that it added."""
    length: int
    floor: int
    """Blocks before the first that its conversation added: they are others' as well."""
    marks: tuple[BlockId, ...] = ()
    followed: bool = False


class ReturnsPolicy(RunPolicy):
    """Return probability: expected hits per second of residence, learned from the requests themselves.

    Which request follows which is seen in the chains: one that uses the end of what an earlier one left is its
    conversation's next turn. What requests are like (turn, blocks they add, length) says how likely they are followed,
    and one distribution for all says after how long (`kvstore.policies.odds`); `Hint.turn` overrides the count. A
    block is as its last request is, in one of sixteen LRU queues by likelihood; of the queues' lowest ends the one
    whose further residence promises least goes first. `history` requests are remembered, evicted ones included.

    Two kinds of block differ from their request. Its last one, often not full, has another hash once the conversation
    went on: how often those that return use it is learned too. And what several requests went on from any of them may
    come back to: it counts as likely.

    It goes by last use alone until a sample of its own has shown that it has more hits than LRU, and again once the
    real hits say otherwise (`kvstore.policies.shadow`). Priorities, durations and closed conversations come before all
    that is learned, which orders blocks of equal priority (`kvstore.policies.bands`).
    Nothing is saved over a restart: it relearns, by LRU meanwhile.

    The idea is that of "KVCache Cache in the Wild" (Wang et al., USENIX ATC 2025), which ranks blocks by the
    probability of their reuse; the share that never returns makes it a cure model (Berkson and Gage, 1952).
    """

    name = "returns"
    num_queues = NUM_LEVELS

    @dataclass(frozen=True, slots=True)
    class Options:
        """Settings.

        Attributes:
            history: requests remembered.
        """

        history: int = 8192

        def __post_init__(self) -> None:
            if not 64 <= self.history <= 1 << 20:
                raise ConfigError(f"history is {self.history}: give 64 to 1048576 requests, such as 8192")

    def __init__(self, options: object = None) -> None:
        self._settings = options if isinstance(options, ReturnsPolicy.Options) else ReturnsPolicy.Options()
        super().__init__(options)
        self._odds = Odds(self._settings.history)
        self._records: list[_Record | None] = [None] * self._settings.history
        self._marks: dict[BlockId, int] = {}
        self._next = 0
        self._now_s = 0.0
        self._num_noted = 0
        self._next_fit = _FIT_EVERY // 16
        self._heads = [_NOTHING] * self.num_queues
        """What the queues' lowest ends are worth, each until the time in `_ends_s`, where nothing is `_changed`."""
        self._ends_s = [inf] * self.num_queues
        self._shadow = Shadow(NUM_LEVELS)
        self._next_best = -1
        self._by_odds = False
        self._unplaced: list[int] = []
        """Runs whose level is as it was before something was learned."""

    def expect(self, num_blocks: int) -> None:
        self._shadow.resize(num_blocks)

    def _enter(self, run: Run, hint: Hint) -> None:
        self._now_s = max(self._now_s, hint.time_s)
        run.kind = cell_of(1, run.length, run.length)
        run.queue = self._odds.level(run.kind)
        run.at_s = self._now_s
        run.key = self._latest_key()

    def _use(self, runs: list[Run], starts: Sequence[int], blocks: Sequence[BlockId], hint: Hint) -> None:
        self._now_s = max(self._now_s, hint.time_s)
        if self._unplaced:
            self._place_some()
        fresh_from = next((start for run, start in zip(runs, starts, strict=True) if run.fresh), len(blocks))
        cell = self._recognise(fresh_from, blocks, hint)
        if cell is not None:
            for run in runs:
                run.kind = cell
                run.queue = self._level_of(run)
            if fresh_from < len(blocks) and self._odds.whole_share < _WHOLE:
                last = runs[-1] if runs[-1].length == 1 else self._cut(runs[-1], runs[-1].length - 1)
                last.kind = cell + LAST_BLOCK
                last.queue = self._level_of(last)
                if last is not runs[-1]:
                    runs.append(last)
        asked_from = 0 if hint.asked else fresh_from
        pieces = self._pieces(runs, starts, len(blocks))
        self._shadow.use(blocks, asked_from, fresh_from, pieces, self._now_s, self._odds.worth)
        for run in reversed(runs):
            run.at_s, run.key = self._now_s, self._latest_key()

    def _pieces(self, runs: Sequence[Run], starts: Sequence[int], num_blocks: int) -> list[tuple[int, int]]:
        """Levels of a chain's runs and where they begin, the last one first; none outlives what it hangs from."""
        begins = list(starts)
        if len(begins) < len(runs):  # the last one was cut off just now
            begins.append(num_blocks - runs[-1].length)
        pieces, level = [], 0
        for run, begin in zip(reversed(runs), reversed(begins), strict=True):
            level = max(level, run.queue)
            pieces.append((begin, level))
        return pieces

    def _recognise(self, fresh_from: int, blocks: Sequence[BlockId], hint: Hint) -> int | None:
        """Find the request that this one follows, or is; returns what it is like now, None if that is not known."""
        at, found = self._deepest_mark(blocks)
        record = self._records[found] if found != _NO_RECORD else None
        if record is not None and at + 1 < (record.start + record.length) // 2:
            record = None  # it shares a beginning with that one, and goes another way
        adds = fresh_from < len(blocks)
        if not adds and (record is None or at < record.length - 2):
            return None  # a part of what was there; what it goes on to add will tell
        if record is None:
            record = self._new_record(1, fresh_from, fresh_from)
        elif hint.asked or at >= fresh_from:
            if not record.followed:
                record.followed = True
                self._odds.returned(record.number, self._now_s, whole=at >= record.length - 1)
            record = self._new_record(record.turn + 1, at + 1, record.floor)
        record.turn = hint.turn or record.turn
        record.length = len(blocks)
        cell = cell_of(record.turn, record.length - record.start, record.length)
        self._mark(record, blocks)
        self._odds.note(record.number, cell, self._now_s)
        return cell

    def _deepest_mark(self, blocks: Sequence[BlockId]) -> tuple[int, int]:
        marks = self._marks
        if marks.keys().isdisjoint(blocks):
            return -1, _NO_RECORD
        for at in range(len(blocks) - 1, -1, -1):
            number = marks.get(blocks[at], _NO_RECORD)
            if number != _NO_RECORD:
                return at, number
        return -1, _NO_RECORD

    def _new_record(self, turn: int, start: int, floor: int) -> _Record:
        number = self._next
        self._next = (number + 1) % self._settings.history
        old = self._records[number]
        if old is not None:
            self._unmark(old)
        self._num_noted += 1
        if self._num_noted == self._next_fit:
            self._next_fit += min(max(_FIT_EVERY // 16, self._num_noted // 8), _FIT_EVERY)
            self._learn()
        record = self._records[number] = _Record(number, turn, start, start, floor)
        return record

    def _learn(self) -> None:
        self._odds.fit(self._now_s)
        self._shadow.relearned()
        self._changed.update(range(self.num_queues))
        self._unplaced = list(self._runs)
        self._place_some()

    def _place_some(self) -> None:
        """Give runs their level as learned last, the latest first; all at once took 200 ms for a million blocks."""
        some = self._unplaced[-_PLACED_AT_ONCE:]
        del self._unplaced[-_PLACED_AT_ONCE:]
        for number in some:
            run = self._runs.get(number)
            if run is not None and (level := self._level_of(run)) != run.queue:
                self._changed.add(run.queue)
                run.queue = level
                if run.is_end:
                    self._push(run)

    def _level_of(self, run: Run) -> int:
        """How likely it is used again: where several requests went on from it, any of them may come back."""
        level = self._odds.level(run.kind)
        return max(level, _SHARED_LEVEL) if run.forked else level

    def _unmark(self, record: _Record) -> None:
        for mark in record.marks:
            if self._marks.get(mark) == record.number:
                del self._marks[mark]

    def _mark(self, record: _Record, blocks: Sequence[BlockId]) -> None:
        self._unmark(record)
        start, last = record.start, len(blocks) - 1
        places = {max(at, record.floor) for at in (start, (start + last + 1) // 2, last - 1, last)}
        record.marks = tuple(blocks[at] for at in places if at <= last)
        self._marks.update(dict.fromkeys(record.marks, record.number))

    def return_odds(self, blocks: Sequence[BlockId]) -> list[float]:
        """As learned, whether or not the order goes by it; 1 until some have returned, and of what several share.

        0 of what is over: a closed conversation's, and what outlived its time.
        """
        runs = [self._runs.get(self._number_of(block)) for block in blocks]
        learned = self._odds.num_returned >= _FEW_RETURNS
        return [self._odds_of(run, learned) if run is not None else 1.0 for run in runs]

    def _odds_of(self, run: Run, learned: bool) -> float:
        if self._bands.is_over(run.bank):
            return 0.0
        return self._odds.share(run.kind) if learned and not run.forked else 1.0

    # -- order -------------------------------------------------------------------------------------------------

    def _walk_begins(self) -> None:
        self._shadow.resize(len(self))
        by_odds = self._odds.num_returned >= _FEW_RETURNS and self._shadow.wins
        if by_odds != self._by_odds:
            self._by_odds = by_odds
            self._changed.update(range(self.num_queues))
        elif by_odds and min(self._ends_s) <= self._now_s:
            self._changed.update(queue for queue, end_s in enumerate(self._ends_s) if end_s <= self._now_s)

    def _next_queue(self) -> int:
        if not self._changed:
            return self._next_best
        for queue in self._changed:
            head, worth, end_s = self._head(queue), 0.0, inf
            if head is not None and self._by_odds:
                worth, end_s = self._odds.worth(queue, self._now_s - head.at_s)
            self._heads[queue] = _NOTHING if head is None else (worth, head.key, queue)
            self._ends_s[queue] = inf if head is None else head.at_s + end_s
        self._changed.clear()
        self._next_best = min(self._heads)[2]
        return self._next_best
