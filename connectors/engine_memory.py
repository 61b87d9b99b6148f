# SPDX-License-Identifier: Apache-2.0
"""What a session asks of an engine that runs in this process: to copy blocks of one sequence in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvstore.api import LoadedRun, OpenRun
from kvstore.row_copy import Rows
from kvstore.transfer import Blocks


class EngineMemory(Protocol):
    """Where an engine keeps one sequence's KV, block by block.

    On a device, copies run beside the engine's work, which waits for them where it has to: work that is ordered after
    a copy in finds its bytes, and work that is ordered after a copy out may write over them. The caller waits in
    `finish` alone. Elsewhere a copy is done when it is asked for.
    """

    def write_block(self, index: int, views: Sequence[memoryview]) -> None:
        """Copy a stored block in: one view a part, all parts of the layout; they are read until `finish`."""

    def write_run(self, run: LoadedRun) -> None:
        """`write_block` of all blocks of a run."""

    def read_blocks(self, blocks: Blocks | OpenRun) -> None:
        """Copy blocks out into slots, all of them in one call; they are written until `finish`."""

    def write_rows(self, rows: Rows) -> None:
        """Copy in blocks that lie on the device."""

    def read_rows(self, rows: Rows) -> None:
        """Copy blocks out into device memory."""

    def begin(self) -> None:
        """Begin what `write_block` may have put off until there is more of it."""

    @property
    def is_done(self) -> bool:
        """Whether `finish` would return at once."""

    def finish(self) -> None:
        """Return when the copies so far are done, whatever they run on."""
