# SPDX-License-Identifier: Apache-2.0
"""Block ids to rows, in arrays: 60 bytes an id, none of them an object that a garbage collection would visit.

A dict of a million ids costs 150 bytes each, and a look-up four cache misses one after the other. Here look-ups of
a batch go through numpy, so that their misses overlap: ids are SHA-256, hence their own hash.

    bucket = eight ways of (tag, row + 1); an id lies in its bucket, or, where that is full, in a small dict

Invariants
1. A row is stable from `add` to `free`. Rows of one batch follow each other as far as free rows allow.
2. `find` compares all 32 bytes: a tag only says where to look.
3. No lock: the owner has one. Columns of the owner's are as long as `capacity`, which only grows.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore.block import DIGEST_BYTES, BlockId

NO_ROW = -1
Rows = npt.NDArray[np.int64]

_WAYS = 8
_ROWS_A_BUCKET = 3  # on average, of eight: one id in 600 overflows
_FIRST_ROWS = 256
_FEW = 12  # below this, plain Python is quicker than numpy
_SHORT_RUN = 256  # comparing a run costs as much as looking up a hundred ids
_ALL_FOUR = 0x01010101  # four comparisons that came out equal, as one word
_HIDDEN, _OVERFLOW = -1, -2
_LOW_32 = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MASK_64 = (1 << 64) - 1
# A word of eight bytes 0 or 1, its lowest 1 isolated, times this: the top byte is that byte's number.
_BYTE_NUMBER = np.uint64(0x0001020304050607)
_TOP_BYTE = np.uint64(56)

_Keys = npt.NDArray[np.uint64]


class IdMap:
    """Gives each known id a row."""

    def __init__(self) -> None:
        self.capacity = 0
        self._keys: _Keys = np.zeros((0, 4), np.uint64)
        self._home: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self._used: npt.NDArray[np.bool_] = np.zeros(0, bool)
        self._free = array("i")
        self._top = 0  # rows from here on were never used
        self._num_found = 0
        self._overflow: dict[bytes, int] = {}
        # Keyed, so that nobody can choose ids that all fall into one bucket.
        self._factor = secrets.randbits(64) | 1
        self._resize(_FIRST_ROWS)

    def __len__(self) -> int:
        """Number of ids that can be found."""
        return self._num_found

    # -- looking up --------------------------------------------------------------------------------------------

    def get(self, block: BlockId) -> int:
        """Row of one id, NO_ROW where it is not known."""
        at = self._bucket_of(block) * _WAYS
        tag = int.from_bytes(block[8:12], "little") | 1
        tags = self._tags_view[at : at + _WAYS].tolist()
        if tag in tags:
            for way, other in enumerate(tags):
                if other == tag:
                    row: int = self._ways_view[at + way] - 1
                    if self._bytes[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES].tobytes() == block:
                        return row
        return self._overflow.get(block, NO_ROW) if self._overflow else NO_ROW

    def find(self, blocks: Sequence[BlockId]) -> Rows:
        """Row of each id, NO_ROW where it is not known."""
        if len(blocks) < _FEW:
            return np.array([self.get(block) for block in blocks], np.int64)
        keys = _pack(blocks)
        runs, at = self._follow_runs(blocks, keys)
        if at < len(blocks):
            runs.append(self._look_up(blocks[at:], keys[at:]))
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    def find_evenly(self, blocks: Sequence[BlockId]) -> Rows:
        """As `find`, in a time that does not tell which ids are known."""
        return self._look_up(blocks, _pack(blocks), even=True) if blocks else np.empty(0, np.int64)

    def find_leading(
        self, blocks: Sequence[BlockId], owners: npt.NDArray[np.int32] | None = None, owner: int = 0
    ) -> Rows:
        """Rows of the ids before the first one that is not known, or is not `owner`'s by the column `owners`.

        How long it takes does not tell one from the other.
        """
        if not blocks or not self._is_owned(self.get(blocks[0]), owners, owner):
            return np.empty(0, np.int64)
        keys = _pack(blocks)
        runs, at = self._follow_runs(blocks, keys, owners, owner)
        if at < len(blocks) and self._is_owned(self.get(blocks[at]), owners, owner):
            rest = self._look_up(blocks[at:], keys[at:])
            if owners is not None:
                rest[owners[rest] != owner] = NO_ROW
            runs.append(rest if rest.min() != NO_ROW else rest[: int((rest == NO_ROW).argmax())])
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    @staticmethod
    def _is_owned(row: int, owners: npt.NDArray[np.int32] | None, owner: int) -> bool:
        return row != NO_ROW and (owners is None or int(owners[row]) == owner)

    def _follow_runs(
        self,
        blocks: Sequence[BlockId],
        keys: _Keys,
        owners: npt.NDArray[np.int32] | None = None,
        owner: int = 0,
    ) -> tuple[list[Rows], int]:
        """Rows of leading ids while they follow each other, as those of a chain do that was added at once.

        Memory read in order costs the same whatever lies around it. Ends at an id that is not known, or not
        `owner`'s, or where runs are short; returns how far it came.
        """
        runs: list[Rows] = []
        at = 0
        while at < len(blocks) and self._is_owned(row := self.get(blocks[at]), owners, owner):
            stop = min(row + len(blocks) - at, self._top)
            same = (self._keys[row:stop] == keys[at : at + stop - row]).view(np.uint32)[:, 0] == _ALL_FOUR
            same &= self._used[row:stop]
            same &= self._home[row:stop] != _HIDDEN
            if owners is not None:
                same &= owners[row:stop] == owner
            length = len(same) if same.all() else int(same.argmin())
            runs.append(np.arange(row, row + length))
            at += length
            if length < _SHORT_RUN:
                break
        return runs, at

    def _look_up(self, blocks: Sequence[BlockId], keys: _Keys, *, even: bool = False) -> Rows:
        """Row of each id, by its bucket; `even`: with the same work for those that are known and those that are not."""
        buckets, tags = self._places(keys)
        hits = (self._tags.reshape(-1, _WAYS).take(buckets, axis=0) == tags[:, None]).view(np.uint64)[:, 0]
        rows = self._ways.take(buckets * _WAYS + _first_byte(hits)).astype(np.int64) - 1
        # An empty way gives row -1, the last one's key: which may be the one asked for, lying in the overflow.
        right = ((self._keys[rows] == keys).view(np.uint32)[:, 0] == _ALL_FOUR) & (rows != NO_ROW)
        if even or not right.all():
            wrong = ~right
            rows[wrong] = NO_ROW
            self._find_elsewhere(blocks, rows, np.flatnonzero(wrong & (hits != 0)))
            if self._overflow:
                for at in range(len(blocks)) if even else np.flatnonzero(wrong).tolist():
                    row = self._overflow.get(blocks[at], NO_ROW)
                    if row != NO_ROW:
                        rows[at] = row
        return rows

    def _find_elsewhere(self, blocks: Sequence[BlockId], rows: Rows, doubtful: Rows) -> None:
        """A tag fitted and its id did not: another way of the bucket may have the same tag."""
        for at in doubtful.tolist():
            rows[at] = self.get(blocks[at])

    def id_of(self, row: int) -> BlockId:
        """The id of a row in use."""
        return BlockId(self._bytes[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES].tobytes())

    def packed(self, rows: Rows) -> bytes:
        """The ids of rows in use, end to end."""
        return self._keys[rows].tobytes()

    def ids_of(self, rows: Rows) -> list[BlockId]:
        """The ids of rows in use."""
        return unpack_ids(self.packed(rows))

    def is_used(self, row: int) -> bool:
        """Whether a row is in use, hidden or not."""
        return bool(self._used[row])

    def findable(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Whether each row is in use, and not hidden."""
        findable: npt.NDArray[np.bool_] = self._used[rows] & (self._home[rows] != _HIDDEN)
        return findable

    def live_rows(self) -> Rows:
        """Every row in use, ascending, hidden ones included."""
        return np.flatnonzero(self._used[: self._top])

    def found_rows(self) -> Rows:
        """Every row that `find` can give, ascending."""
        return np.flatnonzero(self._used[: self._top] & (self._home[: self._top] != _HIDDEN))

    # -- changing ----------------------------------------------------------------------------------------------

    def expect(self, num_rows: int) -> None:
        """Set room for so many rows aside. Untouched, it takes address space only."""
        if num_rows > self.capacity:
            self._resize(num_rows)

    def add(self, blocks: Sequence[BlockId]) -> Rows:
        """Rows for distinct ids, none of which is known."""
        if len(blocks) < _FEW:
            return np.array([self._add_one(block) for block in blocks], np.int64)
        rows = self._take(len(blocks))
        keys = _pack(blocks)
        self._keys[rows] = keys
        self._used[rows] = True
        self._settle(rows, keys)
        self._num_found += len(rows)
        return rows

    def _add_one(self, block: BlockId) -> int:
        if self._free:
            row = self._free.pop()
        else:
            row = self._top
            if row == self.capacity:
                self._resize(row * 3 // 2)
            self._top += 1
        self._bytes[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES] = block
        self._used[row] = True
        at = self._bucket_of(block) * _WAYS
        ways = self._ways_view[at : at + _WAYS].tolist()
        if 0 in ways:
            at += ways.index(0)
            self._ways_view[at] = row + 1
            self._tags_view[at] = int.from_bytes(block[8:12], "little") | 1
            self._home[row] = at
        else:
            self._overflow[block] = row
            self._home[row] = _OVERFLOW
        self._num_found += 1
        return row

    def hide(self, rows: Rows) -> None:
        """Let `find` pass over these rows from now on. Rows hidden before may be among them."""
        if len(rows) < _FEW:
            for row in rows.tolist():
                self._hide_one(row)
            return
        home = self._home[rows]
        shown = home != _HIDDEN
        self._num_found -= int(np.count_nonzero(shown))
        placed = home[home >= 0]
        self._ways[placed] = 0
        self._tags[placed] = 0
        if self._overflow:
            for row in rows[home == _OVERFLOW].tolist():
                del self._overflow[self.id_of(row)]
        self._home[rows] = _HIDDEN

    def _hide_one(self, row: int) -> None:
        home = int(self._home[row])
        if home == _HIDDEN:
            return
        if home == _OVERFLOW:
            del self._overflow[self.id_of(row)]
        else:
            self._ways_view[home] = self._tags_view[home] = 0
        self._home[row] = _HIDDEN
        self._num_found -= 1

    def free(self, rows: Rows) -> None:
        """Take rows back, hidden or not."""
        self.hide(rows)
        self._used[rows] = False
        # Popped from the end: a chain freed from its tail is taken up again head first, in ascending rows.
        self._free.frombytes(rows.astype(np.int32).tobytes())

    def _take(self, num_rows: int) -> Rows:
        num_old = min(num_rows, len(self._free))
        old = np.array(self._free[len(self._free) - num_old :], np.int64)[::-1]
        del self._free[len(self._free) - num_old :]
        top = self._top + num_rows - num_old
        if top > self.capacity:
            self._resize(max(top, self.capacity * 3 // 2))
        new = np.arange(self._top, top)
        self._top = top
        return np.concatenate([old, new]) if num_old else new

    # -- buckets -----------------------------------------------------------------------------------------------

    def _bucket_of(self, block: bytes) -> int:
        mixed = int.from_bytes(block[:8], "little") * self._factor & _MASK_64
        return (mixed >> 32) * self._num_buckets >> 32

    def _places(self, keys: _Keys) -> tuple[Rows, npt.NDArray[np.uint32]]:
        """Bucket and tag of each key; `_bucket_of` for many."""
        mixed = keys[:, 0] * np.uint64(self._factor) >> _HALF
        buckets = (mixed * np.uint64(self._num_buckets) >> _HALF).astype(np.int64)
        return buckets, ((keys[:, 1] & _LOW_32) | np.uint64(1)).astype(np.uint32)

    def _settle(self, rows: Rows, keys: _Keys) -> None:
        """Put rows into their buckets. Two that choose one way: the loser chooses again."""
        buckets, tags = self._places(keys)
        while len(rows):
            room = (self._ways.reshape(-1, _WAYS)[buckets] == 0).view(np.uint64)[:, 0]
            if not room.all():
                for row in rows[room == 0].tolist():
                    self._overflow[self.id_of(row)] = row
                    self._home[row] = _OVERFLOW
                left = room != 0
                rows, buckets, tags, room = rows[left], buckets[left], tags[left], room[left]
            at = buckets * _WAYS + _first_byte(room)
            self._ways[at] = rows + 1
            won = self._ways[at] == rows + 1
            self._tags[at[won]] = tags[won]
            self._home[rows[won]] = at[won]
            lost = ~won
            rows, buckets, tags = rows[lost], buckets[lost], tags[lost]

    def _resize(self, capacity: int) -> None:
        shown = self.found_rows()
        self._keys = longer(self._keys, capacity)
        self._used = longer(self._used, capacity)
        self._home = longer(self._home, capacity)
        self.capacity = capacity
        self._num_buckets = capacity // _ROWS_A_BUCKET + 1
        self._tags: npt.NDArray[np.uint32] = np.zeros(self._num_buckets * _WAYS, np.uint32)
        self._ways: npt.NDArray[np.int32] = np.zeros(self._num_buckets * _WAYS, np.int32)
        self._tags_view, self._ways_view = self._tags.data, self._ways.data
        self._bytes = self._keys.reshape(-1).data.cast("B")
        self._overflow.clear()
        self._settle(shown, self._keys[shown])


_Item = TypeVar("_Item", bound=np.generic)


def longer(column: npt.NDArray[_Item], num_rows: int) -> npt.NDArray[_Item]:
    """A copy of `column` with `num_rows` rows, the new ones zero. They take memory when they are written."""
    wider = np.zeros((num_rows, *column.shape[1:]), column.dtype)
    wider[: len(column)] = column
    return wider


def unpack_ids(packed: bytes) -> list[BlockId]:
    """Ids that lie end to end."""
    return [BlockId(packed[at : at + DIGEST_BYTES]) for at in range(0, len(packed), DIGEST_BYTES)]


def _pack(blocks: Sequence[BlockId]) -> _Keys:
    packed = b"".join(blocks)
    if len(packed) != DIGEST_BYTES * len(blocks):
        raise ValueError(f"{len(blocks)} block ids are {len(packed)} bytes: each must be {DIGEST_BYTES}")
    return np.frombuffer(packed, np.uint64).reshape(-1, 4)


def _first_byte(words: npt.NDArray[np.uint64]) -> Rows:
    """Number of the lowest byte that is 1 in words of bytes 0 and 1; 0 where there is none."""
    return ((words & (~words + np.uint64(1))) * _BYTE_NUMBER >> _TOP_BYTE).astype(np.int64)
