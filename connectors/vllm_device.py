# SPDX-License-Identifier: Apache-2.0
"""Loads and saves of vLLM's worker on a device: one batched copy an order, on side streams, which nobody waits for.

    DeviceLoad   copies of one load; the engine's stream waits for them, whole or layer by layer
    DeviceSave   the copy of one save; a thread waits for it, and the engine's stream where its pages are written again

Invariants
1. A load counts only if its blocks were `intact` after the last of its copies was done.
2. Slots are released, and published, only then too.
3. After `give_up` nothing is begun any more, and what had begun comes before whatever the engine orders next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from connectors.vllm_pages import DevicePages
from connectors.vllm_plan import LoadOrder, SaveOrder
from kvstore.api import GivesOpenRun, GivesRun, KnowsWindows, Load, LoadedBlock, LoadedRun, OpenRun, Save, SaysWhole
from kvstore.transfer import Blocks, Copying, LinkShare, Moment

_BATCH_BYTES = 64 << 20
"""Blocks that come one by one are begun when there are so many: a window's worth of a device's copies."""


@dataclass(eq=False)
class DeviceLoad:
    """See the module.

    Attributes:
        after: what the engine had ordered when the load was.
        step_layers: layers that the forward pass waits for together; 0 where it waits for all of them at its beginning.
        waited: layers for which it has waited.
    """

    pages: DevicePages
    order: LoadOrder
    after: Moment
    block_bytes: int
    step_layers: int = 0
    waited: set[int] = field(default_factory=set)
    _under_way: list[Copying] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _given_up: bool = False

    def bring(self, load: Load, note: Callable[[str, int], bool]) -> int:
        """Begin to copy the load's blocks as they come; returns where those end.

        `note` is called with the tier and number of what came, and says whether there is time for it. A block that may
        be gone when the next one is asked for is waited for.
        """
        run = load.run() if isinstance(load, GivesRun) else None
        return self._bring_blocks(load, note) if run is None else self._bring_run(run, note)

    def _bring_run(self, run: LoadedRun, note: Callable[[str, int], bool]) -> int:
        """Of blocks that are all there, by arrays: what is done for each is what a first token waits for."""
        order = self.order
        at, num_blocks = order.start, min(len(run.offsets), order.stop - order.start)
        if run.start != at:
            return at
        # In a step nobody can give it up meanwhile. Layer by layer the first layers of the last block come first.
        size = num_blocks if order.in_step else max(1, _BATCH_BYTES // self.block_bytes)
        # A match is over all parts, so that a hit is one on every rank; this rank copies its own.
        offsets = run.offsets[:num_blocks, list(self.pages.parts)]
        for first in range(0, num_blocks, max(1, size)):
            some = LoadedRun(at, run.tier, run.memory, offsets[first : first + size])
            if not note(run.tier, len(some.offsets)) or not self._begin(some):
                return at
            at += len(some.offsets)
        return at

    def _bring_blocks(self, load: Load, note: Callable[[str, int], bool]) -> int:
        order = self.order
        at = order.start
        noted: list[LoadedBlock] = []
        whole = isinstance(load, SaysWhole) and load.is_whole
        for block in load:
            if block.index != at or at >= order.stop or not note(block.tier, 1):
                break
            noted.append(block)
            at += 1
            stays = whole or (at < order.stop and isinstance(load, KnowsWindows) and not load.comes_in_windows(at))
            # Layer by layer, and all there: one call for all of them, or the first layers of the last would come late.
            full = len(noted) * self.block_bytes >= _BATCH_BYTES and not (whole and self.step_layers)
            if not stays or full:
                if not self._begin(self._own(noted)):
                    return at - len(noted)
                noted = []
            if not stays:
                self.finish()
        return at if not noted or self._begin(self._own(noted)) else at - len(noted)

    def _own(self, blocks: Sequence[LoadedBlock]) -> Blocks:
        """This rank's parts of them."""
        return [(block.index, [block.views[part] for part in self.pages.parts]) for block in blocks]

    def _begin(self, blocks: Blocks | LoadedRun) -> bool:
        """False where the load was given up."""
        order = self.order
        tokens = range(order.first_token, order.stop_token)
        with self._lock:
            if self._given_up:
                return False
            begun = self.pages.start_load(order.tables, blocks, tokens, after=self.after, step_layers=self.step_layers)
            self._under_way.append(begun)
        return True

    def wait_for(self, layer: int | None = None) -> None:
        """Have what this thread, the engine's, orders from now on wait for `layer`, or for all."""
        for copying in self._under_way:
            copying.order(layer)
        if layer is not None:
            self.waited.add(layer)

    def was_waited_for(self, layers: Collection[int]) -> bool:
        """Whether the forward pass has waited for all that it read."""
        return not self.step_layers or self.waited.issuperset(layers)

    @property
    def is_done(self) -> bool:
        """Whether `finish` would return at once."""
        return all(copying.is_done for copying in self._under_way)

    def finish(self) -> None:
        """Return when what was begun is done."""
        for copying in self._under_way:
            copying.finish()

    def give_up(self) -> None:
        """On the engine's thread: begin nothing more, and have the engine wait for what was begun."""
        with self._lock:
            self._given_up = True
        self.wait_for()


@dataclass(eq=False)
class DeviceSave:
    """See the module. `begin` on the engine's thread, `publish` on another.

    `share`: of the link, what it takes beside the steps; None for as much as there is.
    `void`: it is of before a reset, and not published; what is being published when this is set may still be.
    """

    order: SaveOrder
    save: Save
    copying: Copying | None
    held: ExitStack
    """What `publish` lets go of."""
    share: LinkShare | None = None
    void: bool = False

    @classmethod
    def begin(cls, pages: DevicePages, order: SaveOrder, save: Save, share: LinkShare | None = None) -> DeviceSave:
        """Begin to copy out what `save` has reserved. Raises what the copy raises; then nothing is left of it."""
        with ExitStack() as held:
            held.enter_context(save)
            copying = None
            if save.indices:
                copying = pages.start_save(order.tables, _to_fill(save), put_off=share is not None)
            return cls(order, save, copying, held.pop_all(), share)

    def leave_pages(self) -> None:
        """On the engine's thread: what it orders from now on may write the pages, and waits until they were read."""
        if self.copying is not None:
            self.copying.order()

    def publish(self) -> tuple[int, int]:
        """(blocks published, blocks refused). Raises what the store raises."""
        with self.held:  # an error of the copy itself ends here too: its slots are not published
            if self.copying is None:
                return 0, self.save.num_refused
            if self.share is None:
                self.copying.finish()
            else:
                self.copying.finish_by(self.share)
            if self.void:
                return 0, 0
            return self.save.commit(*self.save.indices), self.save.num_refused

    def hurry(self) -> None:
        """Somebody waits for it, or the engine has nothing that it could slow down."""
        if self.copying is not None:
            self.copying.hurry()

    def let_go(self) -> None:
        """Give up what was not published, when nothing writes to it any more. Idempotent."""
        with self.held:
            if self.copying is not None:
                self.copying.finish()


def _to_fill(save: Save) -> Blocks | OpenRun:
    """Where the save's blocks go, by arrays where it can say so: views of each are 4 µs of the engine's thread."""
    if isinstance(save, GivesOpenRun):
        return save.open_run()
    return [(index, save.views(index)) for index in save.indices]


def goes_by_layers(forward_context: object) -> bool:
    """Whether the forward pass of vLLM's `forward_context` calls `wait_for_layer_load` before it reads a layer's KV.

    Not where there is none, nor where all of it is one CUDA graph (the runner that captures by itself then gives a
    context without metadata), nor in two halves of a batch that run on streams of their own.
    """
    mode = getattr(getattr(forward_context, "cudagraph_runtime_mode", None), "name", "")
    return (
        getattr(forward_context, "attn_metadata", None) is not None
        and mode in ("NONE", "PIECEWISE")
        and getattr(forward_context, "ubatch_slices", None) is None
    )
