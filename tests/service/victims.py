# SPDX-License-Identifier: Apache-2.0
"""Clients for tests to kill: `python -m tests.service.victims ADDRESS WHAT SEED`, which go on until they are."""

from __future__ import annotations

import sys
import time

from kvstore.block import ModelId, Root
from kvstore.service.client import connect
from tests.conftest import chain_of, content

MODEL = ModelId(
    model="tiny", revision="1", kv_dtype="bfloat16", num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16
)


def main(address: str, what: str, seed: str) -> None:
    with connect(address, call_deadline_s=5.0) as store:
        store.open(MODEL)
        chain = chain_of(Root(MODEL), 8, seed=int(seed))
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
                    print("about to commit", flush=True)
                    save.commit(index)
            case "scribble":
                save = store.save(chain, 0, 8)
                views = [save.views(index)[0] for index in save.indices]
                print("under way", flush=True)
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
                print("under way", flush=True)
                while True:
                    time.sleep(0.1)
                    mark.renew()
        print("under way", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
