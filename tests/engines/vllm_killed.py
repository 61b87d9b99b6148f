# SPDX-License-Identifier: Apache-2.0
"""A scenario of `vllm_runs`: engines that are killed in the middle of a save and of a load, through one sidecar."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.engines.vllm_shared import Cut, Sidecar
from tests.engines.vllm_support import NEW, Engine, Facts, Reference, in_fork, poison, tokens_of, worst_error
from tests.patient import connect

_HELD = ("lease.live", "save.quarantined_slots", "host.pinned_blocks", "marks.live")
_SEED = 1


class HalfSaved:
    """Pages of which save number `at` copies the first block out, then does `act`."""

    def __init__(self, pages: Any, at: int, act: Callable[[], None]) -> None:
        self._pages, self._left, self._act = pages, at, act
        self.parts, self.page_tokens = pages.parts, pages.page_tokens

    def gather(self, pages: Sequence[int], blocks: Sequence[tuple[int, Any]]) -> None:
        if self._left:
            self._left -= 1
            self._pages.gather(pages, blocks)
            return
        self._pages.gather(pages, blocks[:1])
        self._act()

    def scatter(self, *given: Any, **options: Any) -> None:
        self._pages.scatter(*given, **options)


class Victim:
    """An engine in a process of its own that serves a prompt until it is in the middle of something, and waits there
    to be killed."""

    def __init__(self, workdir: Path, address: str, prepare: Callable[[Engine, Callable[[], None]], None]) -> None:
        said, says = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:

                def arrived() -> None:
                    os.write(says, b"there")
                    time.sleep(600)

                reference = Reference(workdir)
                engine = Engine(reference.directory, None, extra={"address": address}, max_num_batched_tokens=64)
                prepare(engine, arrived)
                engine.generate([tokens_of(_SEED)])
            except BaseException:  # noqa: BLE001  # a fork must not go on in its parent's place
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(says)
        self.is_there = os.read(said, 5) == b"there"
        os.close(said)

    def kill(self) -> int:
        """kill -9; the signal that it died of."""
        os.kill(self._pid, signal.SIGKILL)
        return -os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def in_a_save(engine: Engine, arrived: Callable[[], None]) -> None:
    engine.worker._saves._host = HalfSaved(engine.worker._saves._host, 2, arrived)


def in_a_load(engine: Engine, arrived: Callable[[], None]) -> None:
    adopt = engine.worker._loads._adopt
    engine.worker._loads._adopt = lambda shared: Cut(adopt(shared), 4, arrived)


def killed(workdir: Path) -> Facts:
    """What a sidecar holds of an engine before and after its death, and what the next engine makes of it."""
    Reference(workdir)
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        sidecar = Sidecar(Path(name))
        try:
            with sidecar.connect() as client:

                def death(prepare: Callable[[Engine, Callable[[], None]], None], num_blocks: int) -> Facts:
                    facts: Facts = {}
                    victim = Victim(workdir, sidecar.address, prepare)
                    alive = client.stats()
                    facts["there"] = victim.is_there
                    facts["signal"] = victim.kill()
                    began_s = time.monotonic()
                    while held(stats := client.stats()) or stats["host.blocks"] != num_blocks:
                        if time.monotonic() - began_s > 20:
                            break
                        time.sleep(0.02)
                    facts |= {"held_before": held(alive), "held": held(stats), "check": client.check()}
                    facts["free_after_s"] = time.monotonic() - began_s
                    facts["blocks"] = [alive["host.blocks"], stats["host.blocks"]]
                    facts["used_bytes"] = [alive["host.used_bytes"], stats["host.used_bytes"]]
                    return facts

                def held(stats: Any) -> dict[str, float]:
                    others = stats["service.sessions"] - 1  # this one
                    found = {name: stats[name] for name in _HELD if stats[name]}
                    return {**found, **({"sessions": others} if others else {})}

                save = death(in_a_save, 4)
                after_save = in_fork(lambda: survivor(workdir, sidecar.address))
                load = death(in_a_load, 11)
                after_load = in_fork(lambda: survivor(workdir, sidecar.address, control=True))
            return {"save": save, "after save": after_save, "load": load, "after load": after_load}
        finally:
            sidecar.stop()


def survivor(workdir: Path, address: str, *, control: bool = False) -> Facts:
    """The next engine: its answer to the same prompt, and whether all of that is stored then, and right."""

    reference, prompt = Reference(workdir), tokens_of(_SEED)
    engine = Engine(reference.directory, None, extra={"address": address})
    want = reference.generate(prompt, NEW)
    outs, hits = engine.generate([prompt])
    facts: Facts = {"equal": outs[0] == want, "hits": hits[0]}
    with connect(address, mapped=True) as client:
        facts["error"], facts["num_blocks"] = worst_error(client, engine.model_id, reference, [*prompt, *want])
        if control:
            poison(client, engine.model_id, prompt)
            engine.forget()
            facts["control_differs"] = engine.generate([prompt])[0][0] != want
    return {**facts, "held": engine.close()}
