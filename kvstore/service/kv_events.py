# SPDX-License-Identifier: Apache-2.0
"""A server's block events as vLLM publishes its own, over ZeroMQ: for routers that follow engines already.

Each message has three frames: topic, number (8 bytes, big-endian, from 0), and a batch in MessagePack as vLLM 0.32
defines it (`vllm.distributed.kv_events.KVEventBatch`): [seconds since 1970, events]. Blocks are named by their 32-byte
hashes; `medium` is CPU for the host tier and STORAGE for those below it, whose name is in `ownership`.

A subscriber that comes later than the first batches has missed them, as with vLLM: start the publisher last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import numpy as np

from kvstore.api import HOST_TIER
from kvstore.block import DIGEST_BYTES
from kvstore.errors import ConfigError
from kvstore.wire import kvstore_pb2 as pb

Event = dict[str, Any]

_CLEARED: Event = {"type": "AllBlocksCleared"}


def told(watch: Callable[[], Generator[pb.WatchReply]]) -> Iterator[list[Event]]:
    """The fields of vLLM's events, batch by batch, as replies come. `watch` begins with a snapshot, with tokens.

    vLLM can say only that everything went. Where one root was cleared, or events were lost, that is said, and what is
    there now is told anew.
    """
    anew = True
    while anew:
        anew = False
        with closing(watch()) as replies:
            for reply in replies:
                anew = reply.gap or any(event.kind == pb.BlockEvent.CLEARED for event in reply.events)
                events = [_CLEARED] if anew else [_fields(event) for event in reply.events]
                if events:
                    yield events
                if anew:
                    break


def _fields(event: pb.BlockEvent) -> Event:
    hashes = [event.ids[at : at + DIGEST_BYTES] for at in range(0, len(event.ids), DIGEST_BYTES)]
    in_host = event.tier == HOST_TIER
    where: Event = {
        "medium": "CPU" if in_host else "STORAGE",
        "locality": "LOCAL" if in_host else "REMOTE",
        "ownership": event.tier,
    }
    if event.kind == pb.BlockEvent.REMOVED:
        return {"type": "BlockRemoved", "block_hashes": hashes, **where}
    tokens = np.frombuffer(event.tokens, "<u4").tolist()
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": event.parent if event.depth else None,  # a first block hangs from its root, no block
        "token_ids": tokens,
        "block_size": len(tokens) // len(hashes),
        "lora_id": None,
        "lora_name": None,
        **where,
    }


def publish(endpoint: str, topic: str, watch: Callable[[], Generator[pb.WatchReply]]) -> None:
    """Publish what `watch` gives, for as long as it does.

    Raises ConfigError where a package is missing or the endpoint is no good.
    """
    try:
        import msgspec
        import zmq
    except ImportError as error:
        raise ConfigError(f"--zmq needs the package {error.name}: install kvstore with its extra [events]") from error
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        socket.linger = 1000
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"--zmq {endpoint}: {error}; give an address to bind, such as tcp://*:5557") from error
        for number, events in enumerate(told(watch)):
            batch = msgspec.msgpack.encode([time.time(), events])
            socket.send_multipart([topic.encode(), number.to_bytes(8, "big"), batch])
