# SPDX-License-Identifier: Apache-2.0
"""Clients for tests to kill, each a process of its own, which go on until they are.

They are forked by a server that has imported what they need and has no channel: to start an interpreter for each would
take a second of a processor.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

from kvstore.block import ModelId, Root
from tests.conftest import chain_of, content
from tests.patient import connect

MODEL = ModelId(
    model="tiny", revision="1", kv_dtype="bfloat16", num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16
)


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["pytest", "tests.service.victims"])


class Victim:
    """A client that does `what` on the blocks of a chain by `seed`, and then waits, or goes on."""

    def __init__(self, address: str, what: str, seed: int) -> None:
        self._said, theirs = _forks.Pipe(duplex=False)
        self._process = _forks.Process(target=_work, args=(address, what, seed, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def said(self) -> str:
        """The next thing that it says: "under way" at last, where somebody has to kill it."""
        said: str = self._said.recv()
        return said

    def signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._process.kill()
        self._process.join(60)
        assert self._process.exitcode == -signal.SIGKILL
        self._process.close()
        self._said.close()


def _work(address: str, what: str, seed: int, out: Connection) -> None:
    with connect(address) as store:
        store.open(MODEL)
        chain = chain_of(Root(MODEL), 8, seed=seed)
        match what:
            case "save":
                save = store.save(chain, 0, 8)
                for index in save.indices[:-1]:
                    view = save.views(index)[0]
                    assert view is not None
                    view[:2048] = content(chain, index, 0, 4096)[:2048]
            case "commit":
                save = store.save(chain, 0, 8)
                for index in save.indices:
                    view = save.views(index)[0]
                    assert view is not None
                    view[:] = content(chain, index, 0, 4096)
                    out.send("about to commit")
                    save.commit(index)
            case "scribble":
                save = store.save(chain, 0, 8)
                views = [save.views(index)[0] for index in save.indices]
                out.send("under way")
                while True:
                    for view in views:
                        assert view is not None
                        view[:] = b"\xff" * len(view)
                    time.sleep(0.001)
            case "load":
                store.match(chain_of(Root(MODEL), 8, seed=0), "r")
                blocks = iter(store.load("r"))
                next(blocks)
            case "match":
                store.match(chain_of(Root(MODEL), 8, seed=0), "r")
                store.announce(chain, 0, 8)
            case "announce":
                mark = store.announce(chain, 0, 8)
                out.send("under way")
                while True:
                    time.sleep(0.1)
                    mark.renew()
        out.send("under way")
        time.sleep(600)
