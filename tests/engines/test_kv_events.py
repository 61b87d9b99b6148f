# SPDX-License-Identifier: Apache-2.0
"""A sidecar's block events, published by `kvstore watch --zmq` and read by vLLM's own decoder."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pytest

import kvstore
from kvstore.block import Chain, ModelId, Root
from tests.engines.runner import PYTHON, ROOT, there_is_vllm
from tests.patient import connect
from tests.ports import free_ports

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not there_is_vllm(), reason="did NOT run: no vLLM here; `make venv-vllm` installs it"),
]

_SUBSCRIBER = """
import json, sys, msgspec, zmq
from vllm.distributed.kv_events import KVEventBatch
socket = zmq.Context().socket(zmq.SUB)
socket.connect(sys.argv[1])
socket.setsockopt(zmq.SUBSCRIBE, b"kv-events")
print("ready", flush=True)
while True:
    topic, number, batch = socket.recv_multipart()
    for event in msgspec.msgpack.Decoder(KVEventBatch).decode(batch).events:
        fields = {"type": type(event).__name__, "number": int.from_bytes(number, "big")}
        for name in getattr(event, "__struct_fields__", ()):
            value = getattr(event, name)
            fields[name] = [each.hex() for each in value] if name == "block_hashes" else value
            fields[name] = value.hex() if isinstance(value, bytes) else fields[name]
        print(json.dumps(fields), flush=True)
"""
MODEL = ModelId(model="m", revision="1", kv_dtype="float32", num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16)


class Printing:
    """A process and what it prints, line by line."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())

    def lines(self, limit_s: float) -> Iterator[str]:
        """Until it is silent for so long."""
        try:
            while True:
                yield self._lines.get(timeout=limit_s)
        except queue.Empty:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


def test_vllm_reads_what_a_sidecar_stores_and_clears() -> None:
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    cli = ["-m", "kvstore.service.cli"]
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as directory:
        address = f"unix:{Path(directory)}/s"
        serve = [sys.executable, *cli, "serve", "--listen", address, "--host-capacity", "64MiB"]
        with Printing(serve) as server:
            assert any(line.startswith("ready:") for line in server.lines(60))
            with (
                connect(address) as store,
                Printing([str(PYTHON), *cli, "watch", "--address", address, "--zmq", endpoint]),
                Printing([str(PYTHON), "-c", _SUBSCRIBER, endpoint]) as subscriber,
            ):
                store.open(MODEL)
                assert next(subscriber.lines(120)) == "ready"
                stored = next(event for event in told(store, subscriber) if event["type"] == "BlockStored")
                chain = Chain(Root(MODEL), np.array(stored["token_ids"], np.uint32))
                assert stored["block_hashes"] == [block.hex() for block in chain.ids]
                assert (stored["parent_block_hash"], stored["block_size"]) == (None, 16)
                assert (stored["medium"], stored["locality"], stored["ownership"]) == ("CPU", "LOCAL", "host")
                assert store.clear() > 0
                assert any(json.loads(line)["type"] == "AllBlocksCleared" for line in subscriber.lines(60))


def told(store: kvstore.Store, subscriber: Printing) -> Iterator[dict[str, object]]:
    """Events of blocks that are stored until some are told: a subscription takes a moment to begin."""
    for seed in range(60):
        chain = Chain(Root(MODEL), np.random.default_rng(seed).integers(0, 1000, 64).astype(np.uint32))
        with store.save(chain, 0, 4) as save:
            save.commit(*save.indices)
        yield from map(json.loads, subscriber.lines(1))
