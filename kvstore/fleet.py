# SPDX-License-Identifier: Apache-2.0
"""Announcements to other stores: each live mark is kept in the lower tiers that keep marks.

One thread, started by the first announcement. A mark goes out at once, is renewed every third of its TTL while its
owner renews it here, and is taken back when nothing is left to wait for: its owner withdrew it or let it lapse, and of
what was committed until then nothing is still on its way down. A block whose write down was dropped takes its mark
back, too: others would wait for it in vain. Where this process dies the tier forgets the mark by itself.
A mark that lapsed is looked at for a while longer: if this process stood still, its owner may go on with it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from kvstore.block import BlockId
from kvstore.errors import TierError
from kvstore.marks import MARK_TTL_S, Mark
from kvstore.tiers.base import Tier

log = logging.getLogger("kvstore.fleet")

_POLL_S = 0.05
_RENEW_S = MARK_TTL_S / 3
_KEPT_S = 2 * MARK_TTL_S
"""A mark that lapsed, in case its owner goes on with it."""
_MAX_MARKS = 256
"""At once; what is announced beyond is computed by whoever wants it."""


class _Sent:
    """What was said of one mark: blocks that name it in the tiers, the newest last."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark
        self.named: list[BlockId] = []
        self.renewed_s = float("-inf")
        self.lost = False


class FleetMarks:
    """Owns the thread. `on_its_way` says whether a block waits to be written down, or is being written."""

    def __init__(
        self, tiers: Sequence[Tier], on_its_way: Callable[[BlockId], bool], now_s: Callable[[], float]
    ) -> None:
        self._tiers = [tier for tier in tiers if tier.keeps_marks]
        self._on_its_way = on_its_way
        self._now_s = now_s
        self._changed = threading.Condition()
        self._sent: dict[int, _Sent] = {}
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, mark: Mark) -> None:
        with self._changed:
            if not self._tiers or not mark.blocks or self._closed or len(self._sent) >= _MAX_MARKS:
                return
            self._sent[id(mark)] = _Sent(mark)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvstore-fleet", daemon=True)
                self._thread.start()
            self._changed.notify()

    def lost(self, blocks: Sequence[BlockId]) -> None:
        """These blocks will not be written down."""
        gone = set(blocks)
        with self._changed:
            for sent in self._sent.values():
                sent.lost = sent.lost or not gone.isdisjoint(sent.mark.blocks)
            self._changed.notify()

    def close(self) -> None:
        """Take every mark back."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    # ── the thread ─────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while True:
            with self._changed:
                closed, known = self._closed, list(self._sent.values())
                if not closed and not known:
                    self._changed.wait()
                    continue
            for sent in known:
                try:
                    ended = closed or self._ended(sent)
                    if ended or self._lapsed(sent):
                        self._take_back(sent, known)
                    elif self._now_s() - sent.renewed_s >= _RENEW_S:
                        self._say(sent)
                except TierError:  # said by the tier's breaker; the mark lapses there by itself
                    ended = closed
                except Exception:  # a thread's top
                    log.exception("announcing failed")
                    ended = True
                if ended:
                    with self._changed:
                        self._sent.pop(id(sent.mark), None)
            if closed:
                return
            with self._changed:
                if not self._closed:
                    self._changed.wait(_POLL_S)

    def _ended(self, sent: _Sent) -> bool:
        mark = sent.mark
        if sent.lost:
            return True
        over = mark.withdrawn or not mark.num_left() or mark.deadline_s + _KEPT_S <= self._now_s()
        return over and not any(map(self._on_its_way, mark.blocks))

    def _lapsed(self, sent: _Sent) -> bool:
        mark = sent.mark
        return mark.deadline_s <= self._now_s() and not any(map(self._on_its_way, mark.blocks))

    def _say(self, sent: _Sent) -> None:
        mark = sent.mark
        sent.renewed_s = self._now_s()
        down = len(mark.blocks) - mark.num_left()
        # What is committed and not yet below is still worth waiting for there.
        start = next((at for at in range(down) if self._on_its_way(mark.blocks[at])), down)
        if start == len(mark.blocks):
            return
        stop = down if mark.withdrawn else len(mark.blocks)
        if stop <= start:
            return
        for tier in self._tiers:
            tier.mark(mark.root, mark.blocks[start:stop], MARK_TTL_S)
        if mark.blocks[start] not in sent.named:
            sent.named.append(mark.blocks[start])

    def _take_back(self, sent: _Sent, known: Sequence[_Sent]) -> None:
        names = set(sent.named)
        for other in known:
            alike = other is not sent and other.mark.root == sent.mark.root
            if alike and not names.isdisjoint(other.named):
                # One name is one mark in a tier. It stays, and tells of the other's blocks when that is said anew.
                names.difference_update(other.named)
                other.renewed_s = float("-inf")
        for tier in self._tiers if names else ():
            tier.unmark(sent.mark.root, list(names))
        sent.named = []
        sent.renewed_s = float("-inf")
