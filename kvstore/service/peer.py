# SPDX-License-Identifier: Apache-2.0
"""Another sidecar, as one that reads from it sees it: blocks by hash alone, with deadlines, behind one link.

The link says at once when the peer is away, comes back by itself, and keeps the session that rights belong to.

Invariants
1. What the peer sends is put into place only where it was asked for, and told of only if what it says the block was
   hashed of gives the block's id, and the bytes have their checksum.
2. After a fetch ended, in whatever way, nothing writes to the memory given to it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import grpc

from kvstore.api import Load, Save
from kvstore.block import DIGEST_BYTES, BlockId, BlockMeta, RootId
from kvstore.errors import ConfigError, KVStoreError, TierTimeout, TierUnavailable
from kvstore.service.bulk import Misfit, Unpacker, decode
from kvstore.service.connection import Connection, LinkOptions
from kvstore.service.handlers import BulkStub
from kvstore.service.link import Link
from kvstore.service.plane import Cells, Down
from kvstore.stats import Stats
from kvstore.wire import kvstore_pb2 as pb

MAX_IDS = 65_536
"""Hashes in one call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """How a peer is reached: unix:PATH or host:port, and files in PEM. `token_file` holds the access token."""

    address: str
    token_file: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    call_deadline_s: float = 0.5

    def link_options(self) -> LinkOptions:
        """Raises ConfigError where a file cannot be read."""
        return LinkOptions(
            address=self.address,
            mapped=False,
            name=f"sidecar {os.uname().nodename}",
            call_deadline_s=self.call_deadline_s,
            token=_read_token(self.token_file),
            tls_ca=_read(self.tls_ca, "tls_ca"),
            tls_cert=_read(self.tls_cert, "tls_cert"),
            tls_key=_read(self.tls_key, "tls_key"),
        )


@dataclass(slots=True)
class Counts:
    """What came of a fetch, part by part."""

    read_blocks: int = 0
    read_bytes: int = 0
    foreign_blocks: int = 0
    corrupt_blocks: int = 0


class Peer:
    """Reads from another sidecar. Thread-safe. Every call raises TierUnavailable or TierTimeout, named `tier`."""

    def __init__(self, tier: str, options: PeerOptions) -> None:
        """Connect, or go on trying in the background. Raises ConfigError for settings that make no sense."""
        self._tier = tier
        self._link = Link(options.link_options(), lambda _: _NoPlane(), Stats())
        try:
            self._link.start(0.0)
        except KVStoreError:
            self._link.begin()

    @property
    def is_up(self) -> bool:
        """Whether the peer answers, as far as is known."""
        return self._link.is_up

    def present(
        self, root: RootId, ids: Sequence[BlockId], parts: Sequence[int], deadline_s: float, *, used: bool = False
    ) -> bytes:
        """A byte for each part of each block, 1 where it lies in the peer's host. `used` keeps a chain warm there."""
        connection = self._up()
        request = _asked(connection, root, ids, parts)
        request.used = used
        try:
            reply: pb.PeekReply = self._link.call(
                connection, connection.stub.Peek, request, timeout_s=deadline_s, carries_ended=False
            )
        except (Down, KVStoreError) as error:
            self._refuse(error)
        if len(reply.present) != len(ids) * len(parts):
            raise TierUnavailable(
                self._tier, f"the peer answers {len(ids) * len(parts)} questions with {len(reply.present)} bytes"
            )
        return reply.present

    def fetch(
        self,
        root: RootId,
        blocks: Mapping[BlockId, Sequence[memoryview]],
        parts: Sequence[int],
        deadline_s: float,
        counts: Counts,
    ) -> Iterator[tuple[BlockId, int]]:
        """Fill the memory given for `parts` of blocks; block and part as each is verified, in the order given.

        Blocks that the peer does not have, and parts that are not what they should be, are left out.
        """
        connection = self._up()
        ids = list(blocks)
        try:
            call = BulkStub(connection.channel).Fetch(_asked(connection, root, ids, parts), timeout=deadline_s)
        except ValueError:  # the link has closed the channel since
            self._refuse(Down())
        heard = False
        incoming = _Incoming(ids, blocks)
        unpacker = Unpacker(incoming.views_of, lambda number: number + 1)
        try:
            for message in call:
                heard = True
                head, data = decode(pb.ReadReply, message)
                incoming.metas = iter(head.metas)
                if not len(data):
                    continue
                for arrived in unpacker.take(head, data):
                    if not arrived.good:
                        counts.corrupt_blocks += 1
                    elif not incoming.is_block[arrived.index]:
                        counts.foreign_blocks += 1
                    else:
                        block = ids[arrived.index]
                        counts.read_blocks += 1
                        counts.read_bytes += len(blocks[block][arrived.part])
                        yield block, parts[arrived.part]
        except Misfit as error:
            counts.corrupt_blocks += 1
            raise TierUnavailable(self._tier, f"the peer sends what was not asked for: {error}") from error
        except grpc.RpcError as failure:
            if heard and failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TierTimeout(self._tier, f"the peer was still sending after {deadline_s:g} s") from None
            self._refuse(self._link.failed(connection, failure), failure)
        finally:
            call.cancel()

    def _up(self) -> Connection:
        try:
            return self._link.up()
        except (Down, KVStoreError) as error:
            self._refuse(error)

    def _refuse(self, error: Exception, failure: grpc.RpcError | None = None) -> NoReturn:
        if failure is not None and failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TierTimeout(self._tier, "the peer did not answer in time") from None
        what = "away, or did not answer in time" if isinstance(error, Down) else str(error)
        raise TierUnavailable(self._tier, f"the peer at {self._link.options.address}: {what}") from None

    def close(self) -> None:
        """Leave. Idempotent."""
        self._link.close()


@dataclass(slots=True)
class _Incoming:
    """Where fetched blocks go, and which of them are what they should be."""

    ids: list[BlockId]
    blocks: Mapping[BlockId, Sequence[memoryview]]
    metas: Iterator[pb.Meta] = field(default_factory=lambda: iter(()))
    is_block: dict[int, bool] = field(default_factory=dict)

    def views_of(self, number: int) -> Sequence[memoryview]:
        meta = next(self.metas, None)
        if number >= len(self.ids) or meta is None:
            raise Misfit(f"block {number} of {len(self.ids)} came, or came without what it was hashed of")
        fits = len(meta.parent) == DIGEST_BYTES and not len(meta.tokens) % 4
        what = BlockMeta(BlockId(meta.parent), meta.depth, meta.tokens, meta.extra)
        self.is_block[number] = fits and what.block_id() == self.ids[number]
        return self.blocks[self.ids[number]]


def _asked(connection: Connection, root: RootId, ids: Sequence[BlockId], parts: Sequence[int]) -> pb.PeekRequest:
    return pb.PeekRequest(session=connection.session, root=root, ids=b"".join(ids), parts=bytes(parts))


class _NoPlane:
    """A peer moves no bytes of loads and saves. Implements `kvstore.service.plane.DataPlane`."""

    ticket = b""
    boot_id = b""
    lane = None

    def prefaulted(self) -> None:
        pass

    def load(self, link: Link, connection: Connection, request: pb.LoadRequest, cells: Cells) -> Load:
        raise ConfigError("a peer is read by hash: it has no loads")

    def save(self, link: Link, connection: Connection, lease: int, cells: Cells, reply: pb.SaveReply) -> Save:
        raise ConfigError("a peer is read by hash: it has no saves")

    def close(self) -> bool:
        return True


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes() if path else b""
    except OSError as error:
        raise ConfigError(f"tiers.remote.{name} is {path}: it cannot be read: {error.strerror}") from error


def _read_token(path: str) -> str:
    """The token in a file that nobody but its owner may read."""
    token = _read(path, "token_file").decode(errors="replace").strip()
    if path and stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        raise ConfigError(f"tiers.remote.token_file {path} is open to others: run chmod 600 {path}")
    if path and not token:
        raise ConfigError(f"tiers.remote.token_file {path} is empty: put the access token into it")
    return token
