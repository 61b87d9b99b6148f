# SPDX-License-Identifier: Apache-2.0
"""What requests say of themselves, through a real engine and a sidecar to the policy that decides what goes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from kvstore.block import Chain, Root
from tests.engines.vllm_shared import Sidecar, Watched
from tests.engines.vllm_support import BLOCK, Facts, Reference, poison, tokens_of

_ROOM = 25
"""Blocks of the host: two chats of eleven and a little of a third."""
_SAID: Mapping[int, Mapping[str, object]] = {
    1: {"retention": [{"start": 0, "stop": 1024, "priority": 90}]},
    2: {"conversation": "two", "turn": 1, "closed": True},
}


def hints(workdir: Path) -> Facts:
    """Three chats where two have room: the oldest goes, unless it asks to stay and the next is over."""
    return {"silent": _chats(workdir, {}), "said": _chats(workdir, _SAID)}


def _chats(workdir: Path, said: Mapping[int, Mapping[str, object]]) -> Facts:
    block_bytes = Reference(workdir).kv(tokens_of(1, BLOCK)).nbytes
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        sidecar = Sidecar(Path(name), host__capacity_bytes=str(_ROOM * block_bytes), host__policy="priority")
        watched = Watched(workdir, sidecar.address)
        for seed in (1, 2, 3):
            watched.run(str(seed), seed, says=said.get(seed))
        kept = {}
        with sidecar.connect() as client:
            client.open(watched.engine.model_id)
            for seed in (1, 2, 3):
                chain = Chain(Root(watched.engine.model_id), watched.full(seed))
                kept[str(seed)] = client.match(chain, "look", wait_s=5).num_blocks
                client.forget("look")  # one client may not hold all of the host
            poison(client, watched.engine.model_id, tokens_of(1))
        equal = dict(watched.facts["equal"])
        watched.run("control", says=said.get(1))
        facts = {**watched.facts, "equal": equal, "control_differs": not watched.facts["equal"]["control"]}
        facts |= {"kept": kept, "held": watched.engine.close()}
        sidecar.stop()
        return facts
