# SPDX-License-Identifier: Apache-2.0
"""Chains as the server knows them: ids that a client sent, and what a few of them were hashed of.

Ids are claims. What lies under a claimed id is only ever found where the store itself has it under that root and
parent, and nothing becomes resident whose contents were not hashed again here.

Invariants
1. A chain handed out never changes but by growing: where a client diverges it gets another one, since holds and
   queues of the store keep the list.
2. A call is about exactly the blocks that it named, though more of the chain may be known.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.block import DIGEST_BYTES, BlockId, BlockMeta, Chain, Root, hash_blocks
from kvstore.errors import ConfigError
from kvstore.service.status import UnknownChain
from kvstore.wire import kvstore_pb2 as pb

MAX_CHAIN_TOKENS = 1 << 20
_MAX_CHAINS = 16_384
_MAX_SESSION_IDS = 1 << 19
"""About 40 MB a session. What is dropped is sent again."""
_MAX_EXTRA_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Contents:
    """What blocks `start` … `stop` of a chain were hashed of; verified."""

    start: int
    stop: int
    tokens: bytes
    extras: dict[int, bytes]


class ServedChain(Chain):
    """A client's chain. `meta` knows of blocks whose contents are described at the moment."""

    def __init__(self, root: Root, ids: list[BlockId]) -> None:
        super().__init__(root)
        self.ids = ids
        self._described: tuple[Contents, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.ids) * self.block_tokens

    def first(self, num_blocks: int) -> ServedChain:
        """The chain of its first blocks: itself where that is all of it."""
        return self if num_blocks == len(self.ids) else ServedChain(self.root, self.ids[:num_blocks])

    def verify(self, message: pb.Contents) -> Contents:
        """Check contents against the ids. Raises ConfigError naming the first block that differs."""
        block_bytes = 4 * self.block_tokens
        start, tokens = message.start, message.tokens
        num_blocks, rest = divmod(len(tokens), block_bytes)
        if rest:
            raise ConfigError(
                f"contents.tokens has {len(tokens)} bytes: give a multiple of {block_bytes}, whole blocks"
            )
        stop = start + num_blocks
        if stop > len(self.ids):
            raise ConfigError(f"contents cover blocks {start}…{stop}: the chain has {len(self.ids)}")
        extras = {item.index: item.extra for item in message.extras}
        for index, extra in extras.items():
            if not start <= index < stop or len(extra) > _MAX_EXTRA_BYTES:
                raise ConfigError(
                    f"contents.extras has {len(extra)} bytes for block {index}: give at most {_MAX_EXTRA_BYTES}, for "
                    f"blocks {start}…{stop}"
                )
        found = Contents(start, stop, tokens, extras)
        self._compare(found)
        return found

    def _compare(self, contents: Contents) -> None:
        start, stop = contents.start, contents.stop
        if contents.extras:
            ids = [_meta(self, contents, index).block_id() for index in range(start, stop)]
        elif stop > start:
            ids = hash_blocks(self.parent_id(start), contents.tokens, self.block_tokens)
        else:
            return
        if ids != self.ids[start:stop]:
            differs = next(index for index, block in enumerate(ids, start) if block != self.ids[index])
            raise ConfigError(
                f"contents of block {differs} hash to {ids[differs - start].hex()}, its id is {self.ids[differs].hex()}"
            )

    def describe(self, contents: Contents) -> None:
        """Let `meta` know of these blocks until `undescribe`."""
        self._described = (*self._described, contents)

    def undescribe(self, contents: Contents) -> None:
        self._described = tuple(each for each in self._described if each is not contents)

    def meta(self, index: int) -> BlockMeta:
        for contents in self._described:
            if contents.start <= index < contents.stop:
                return _meta(self, contents, index)
        raise ConfigError(f"contents of block {index} were not sent")

    def metas(self, start: int, stop: int) -> Sequence[BlockMeta]:
        return [self.meta(index) for index in range(start, stop)]


def _meta(chain: ServedChain, contents: Contents, index: int) -> BlockMeta:
    block_bytes = 4 * chain.block_tokens
    at = (index - contents.start) * block_bytes
    tokens = contents.tokens[at : at + block_bytes]
    return BlockMeta(chain.parent_id(index), index, tokens, contents.extras.get(index, b""))


def split_ids(packed: bytes, name: str) -> list[BlockId]:
    """Packed hashes as a list. Raises ConfigError."""
    if len(packed) % DIGEST_BYTES:
        raise ConfigError(
            f"{name} has {len(packed)} bytes: give a multiple of {DIGEST_BYTES}, one hash after the other"
        )
    ids: list[BlockId] = np.frombuffer(packed, f"V{DIGEST_BYTES}").tolist()
    return ids


class ChainCache:
    """The chains of one session, by the client's numbers; least recently used go first. Thread-safe."""

    def __init__(self, root_of: Callable[[pb.Root], Root]) -> None:
        """`root_of` checks a root, rights included, and may raise."""
        self._root_of = root_of
        self._lock = threading.Lock()
        self._chains: OrderedDict[int, ServedChain] = OrderedDict()
        self._counted: dict[int, int] = {}
        self._num_ids = 0

    def __len__(self) -> int:
        return len(self._chains)

    def resolve(self, delta: pb.ChainDelta) -> ServedChain:
        """The chain that a call is about.

        Raises UnknownChain where the client has to send it whole, ConfigError where the message is malformed, and
        what `root_of` raises.
        """
        fresh = split_ids(delta.ids, "chain.ids") if delta.ids else []
        whole = delta.num_known == 0
        root = self._root_of(delta.root) if whole else None
        with self._lock:
            known = self._chains.get(delta.chain)
            if root is not None:
                if known is None or known.root.id != root.id:
                    known = ServedChain(root, [])
            elif known is None or known.ids[delta.num_known - 1 : delta.num_known] != [delta.known_tail]:
                raise UnknownChain("chain")
            num_blocks = delta.num_known + len(fresh)
            if num_blocks * known.block_tokens > MAX_CHAIN_TOKENS:
                raise ConfigError(
                    f"chain has {num_blocks} blocks of {known.block_tokens} tokens: at most {MAX_CHAIN_TOKENS} tokens"
                )
            if fresh or known is not self._chains.get(delta.chain):
                known = _grown(known, delta.num_known, fresh)
                self._keep(delta.chain, known)
            else:
                self._chains.move_to_end(delta.chain)
        return known.first(num_blocks)

    def drop_all(self) -> None:
        """Forget every chain: clients send them again."""
        with self._lock:
            self._chains.clear()
            self._counted.clear()
            self._num_ids = 0

    def _keep(self, number: int, chain: ServedChain) -> None:
        self._num_ids += len(chain.ids) - self._counted.get(number, 0)
        self._counted[number] = len(chain.ids)
        self._chains[number] = chain
        self._chains.move_to_end(number)
        while (self._num_ids > _MAX_SESSION_IDS or len(self._chains) > _MAX_CHAINS) and len(self._chains) > 1:
            dropped, _ = self._chains.popitem(last=False)
            self._num_ids -= self._counted.pop(dropped)


def _grown(chain: ServedChain, num_known: int, fresh: list[BlockId]) -> ServedChain:
    """`chain` with `fresh` after its first `num_known` blocks: itself, longer, where that agrees with what it has."""
    there = chain.ids[num_known : num_known + len(fresh)]
    if there == fresh[: len(there)]:
        chain.ids += fresh[len(there) :]
        return chain
    return ServedChain(chain.root, chain.ids[:num_known] + fresh)
