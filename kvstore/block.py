# SPDX-License-Identifier: Apache-2.0
"""Identity: which KV a block holds. The same tokens under the same model give the same ids in every process.

    ModelId ──sha256──▶ Root (+ adapter, salt, secret) ──parent of the first block──▶ chained block hashes

A block's hash is SHA-256 over a domain tag, its parent's hash, its token count, its tokens and the digests of
what tokens do not say. The first parent is the root's digest, so a hash commits to model, adapter, tenant and
the whole prefix: `BlockId` needs nothing beside it. Nothing here uses `hash()`, a seed or pickle.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import cycle, repeat
from typing import NamedTuple, NewType, TypeVar

import numpy as np
import numpy.typing as npt

from kvstore import native
from kvstore.errors import ConfigError

BlockId = NewType("BlockId", bytes)
"""32 bytes: the chained hash of a block."""

RootId = NewType("RootId", bytes)
"""32 bytes: the digest of a Root; names a namespace."""

Tokens = Sequence[int] | npt.NDArray[np.integer]

FORMAT_VERSION = 1
DIGEST_BYTES = 32
_MODEL_TAG = b"kvstore.model.v1"
_ROOT_TAG = b"kvstore.root.v1"
_SLACK_BYTES = 32 << 10
_MAX_MEDIA_DIGEST_BYTES = 128  # so that what a block holds of them fits a frame's header
_BLOCK_TAG = b"kvblock1"


def _digest_fields(tag: bytes, *values: bytes) -> bytes:
    """SHA-256 over length-prefixed fields: no two different field lists meet."""
    parts = [tag]
    for value in values:
        parts += (struct.pack("<Q", len(value)), value)
    return hashlib.sha256(b"".join(parts)).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelId:
    """What must agree before KV bytes are interchangeable; agreed once, at `open`.

    Engine name, engine block size, TP, PP and rank are not in it: they do not change the KV of a token. The part grid
    is, so engines that split differently share blocks where they are given one grid.

    Attributes:
        model: weights by name, and `revision` by content or commit.
        kv_dtype: one of `kvstore.layout.DTYPES`, or a lossy one such as `bfloat16+fp8`; `scale_digest` tells apart
            fp8 scales.
        num_layers, num_kv_heads, head_dim: totals of the model, not of a rank.
        num_kv: 2 for keys then values; 1 for one latent vector per token (MLA, with one head).
        position: whatever changes K beyond weights and tokens, e.g. resolved RoPE parameters.
        layout: `canonical`, or `opaque:<fingerprint>` for bytes only one engine can read.
        block_tokens: tokens a block, a power of two from 2 to 256.
        part_layers, part_heads: the part grid's cell; 0 means all.
    """

    model: str
    revision: str
    kv_dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_kv: int = 2
    scale_digest: str = ""
    position: str = ""
    layout: str = "canonical"
    block_tokens: int = 64
    part_layers: int = 0
    part_heads: int = 0
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        tokens = self.block_tokens
        if not 2 <= tokens <= 256 or tokens & (tokens - 1):
            raise ConfigError(f"block_tokens is {tokens}: use a power of two from 2 to 256 (64 is a good default)")
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.num_kv not in (1, 2):
            raise ConfigError(f"num_kv is {self.num_kv}: use 2 (keys and values) or 1 (MLA latent)")
        if not 0 <= self.part_layers <= self.num_layers:
            raise ConfigError(f"part_layers is {self.part_layers}: use 0 (all) to num_layers={self.num_layers}")
        if not 0 <= self.part_heads <= self.num_kv_heads or (self.part_heads and self.num_kv_heads % self.part_heads):
            raise ConfigError(
                f"part_heads is {self.part_heads}: use 0 (all) or a divisor of num_kv_heads={self.num_kv_heads}"
            )
        if self.layout != "canonical" and not self.layout.startswith("opaque:"):
            raise ConfigError(f"layout is {self.layout!r}: use 'canonical' or 'opaque:<fingerprint>'")

    @property
    def is_opaque(self) -> bool:
        """Whether bytes are an engine's own, whose meaning and order nobody else knows: blocks are never cut then."""
        return self.layout != "canonical"

    def digest(self) -> bytes:
        """32 bytes over every field by name, so that a new field never meets an old digest."""
        values: list[bytes] = []
        for item in fields(self):
            value = getattr(self, item.name)
            values += (item.name.encode(), str(value).encode())
        return _digest_fields(_MODEL_TAG, *values)


@dataclass(frozen=True)
class Root:
    """Where the chains of one model, adapter and tenant begin.

    Args:
        model: the ModelId.
        adapter: content digest of a LoRA adapter, never its name or path; empty for none.
        salt: tenant salt; empty shares with everybody on the store.
        secret: cluster secret that keys the digest, so that ids cannot be guessed from prompts.
    """

    model: ModelId
    adapter: bytes = b""
    salt: bytes = b""
    secret: bytes = field(default=b"", repr=False)

    @cached_property
    def id(self) -> RootId:
        digest = _digest_fields(_ROOT_TAG, self.model.digest(), self.adapter, self.salt)
        if self.secret:
            digest = hmac.digest(self.secret, digest, "sha256")
        return RootId(digest)


Named = TypeVar("Named", bound=tuple[object, ...])


def named(kind: type[Named], *columns: Iterable[object]) -> Iterator[Named]:
    """`kind(*row)` for each row of `columns`, as far as the shortest goes, for a NamedTuple.

    Its own `__new__` is Python, and took two thirds of the time that thousands of them need.
    """
    return map(tuple.__new__, repeat(kind), zip(*columns, strict=False))


class PartKey(NamedTuple):
    """One cell of a block's layers × heads grid: what keyed tiers store a value under."""

    root: RootId
    block: BlockId
    part: int


class BlockMeta(NamedTuple):
    """What travels with a block's bytes, so that readers can recompute its hash."""

    parent: BlockId
    depth: int
    """0 for the first block of a chain."""
    tokens: bytes
    """Token ids as u32 little-endian."""
    extra: bytes
    """Canonical bytes of `(offset, digest)` items; empty for plain text."""

    def block_id(self) -> BlockId:
        """The hash these contents give; differs from the key for a forged or foreign block."""
        return block_hash(self.parent, self.tokens, self.extra)


def block_hash(parent: bytes, tokens: bytes, extra: bytes) -> BlockId:
    """The hash of a block with these contents; see `BlockMeta`."""
    head = struct.pack("<8sII", _BLOCK_TAG, len(tokens) // 4, len(extra))
    return BlockId(hashlib.sha256(parent + head + tokens + extra).digest())


def hash_chain(parent: bytes, head: bytes, tokens: bytes, block_bytes: int) -> list[bytes]:
    """`native.hash_chain` in Python."""
    sha256 = hashlib.sha256
    digests: list[bytes] = []
    for at in range(0, len(tokens), block_bytes):
        parent = sha256(parent + head + tokens[at : at + block_bytes]).digest()
        digests.append(parent)
    return digests


def hash_blocks(parent: bytes, tokens: bytes, block_tokens: int) -> list[BlockId]:
    """Ids of the blocks that `tokens` (u32 little-endian, full blocks) make after `parent`; none may have media."""
    head = struct.pack("<8sII", _BLOCK_TAG, block_tokens, 0)  # without media it is the same for each
    ids = native.hash_chain(parent, head, tokens, 4 * block_tokens)
    return ids if ids is not None else hash_chain(parent, head, tokens, 4 * block_tokens)  # type: ignore[return-value]


def as_u32(tokens: Tokens) -> npt.NDArray[np.uint32]:
    """Token ids as a u32 array. Raises ValueError for ids outside 0 … 2³²−1."""
    if isinstance(tokens, np.ndarray) and tokens.dtype == np.uint32 and tokens.ndim == 1:
        return tokens.astype(np.uint32, copy=False)
    given = np.asarray(tokens)
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"tokens are {given.dtype}: give token ids as whole numbers from 0 to 4294967295")
    array = given.astype(np.int64)
    if array.ndim != 1:
        raise ValueError(f"tokens must be one-dimensional, not of shape {array.shape}")
    if array.size and (int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF):
        raise ValueError("token ids must lie in 0 … 4294967295")
    return array.astype(np.uint32)


class Chain:
    """The blocks of one growing token sequence; hashed once, extended with new tokens only.

    Append-only. `ids[i]` is the id of full block i; tokens past the last full block wait for `extend`.
    Not thread-safe for extension; readers may use `ids` while another thread extends.
    """

    def __init__(self, root: Root, tokens: Tokens = (), *, media: Iterable[tuple[int, bytes]] = ()) -> None:
        self.root = root
        self.block_tokens = root.model.block_tokens
        self.ids: list[BlockId] = []
        self._tokens = bytearray()
        self._media: list[tuple[int, bytes]] = []
        self.extend(tokens, media=media)

    def __len__(self) -> int:
        """Number of full blocks."""
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """All tokens, those of the unfinished last block included."""
        return len(self._tokens) // 4

    def extend(self, tokens: Tokens, *, media: Iterable[tuple[int, bytes]] = ()) -> None:
        """Append `tokens`; `media` gives (absolute token offset, content digest) of what placeholders stand for.

        The offset must lie within the appended tokens: earlier blocks are hashed already.
        """
        first_new = self.num_tokens
        items = sorted(media)
        past = first_new + len(tokens)
        for offset, digest in items:  # before anything is appended: tokens without their digest are other content
            if not first_new <= offset < past:
                raise ValueError(f"media offset {offset} is outside the appended tokens {first_new}…{past}")
            if not 1 <= len(digest) <= _MAX_MEDIA_DIGEST_BYTES:
                raise ValueError(f"a media digest has {len(digest)} bytes: use 1 to {_MAX_MEDIA_DIGEST_BYTES}")
        fresh = as_u32(tokens).astype("<u4", copy=False).tobytes()
        if not self._tokens and len(fresh) > _SLACK_BYTES:
            # Room to grow from the start: moving half a megabyte costs the next turn more than its match.
            self._tokens = bytearray(len(fresh) + _SLACK_BYTES)
            del self._tokens[len(fresh) :]
            self._tokens[:] = fresh
        else:
            self._tokens += fresh
        self._media += items
        self._hash_full_blocks()

    def _hash_full_blocks(self) -> None:
        """The one hot loop of hashing: 0.3 µs a block of 64 tokens in C, 1 µs in Python."""
        block_bytes = 4 * self.block_tokens
        start = len(self.ids)
        stop = self.num_tokens // self.block_tokens
        if stop == start:
            return
        parent: bytes = self.ids[-1] if self.ids else self.root.id
        if self._media and self._media[-1][0] >= start * self.block_tokens:
            for index in range(start, stop):
                span = bytes(self._tokens[index * block_bytes : (index + 1) * block_bytes])
                parent = block_hash(parent, span, self._extra(index))
                self.ids.append(BlockId(parent))
            return
        fresh = bytes(memoryview(self._tokens)[start * block_bytes : stop * block_bytes])
        self.ids += hash_blocks(parent, fresh, self.block_tokens)

    def _extra(self, index: int) -> bytes:
        """Length-prefixed (offset in block, digest) of media that start in block `index`."""
        first = index * self.block_tokens
        parts = []
        for offset, digest in self._media:
            if first <= offset < first + self.block_tokens:
                parts.append(struct.pack("<II", offset - first, len(digest)) + digest)
        return b"".join(parts)

    def parent_id(self, index: int) -> BlockId:
        """Id of the block before `index`; the root's digest for the first."""
        return self.ids[index - 1] if index else BlockId(self.root.id)

    def meta(self, index: int) -> BlockMeta:
        """Parent, depth, tokens and extra of full block `index`."""
        block_bytes = 4 * self.block_tokens
        tokens = bytes(self._tokens[index * block_bytes : (index + 1) * block_bytes])
        extra = self._extra(index) if self._media else b""
        return BlockMeta(self.parent_id(index), index, tokens, extra)

    def metas(self, start: int, stop: int) -> Sequence[BlockMeta]:
        """`meta` of consecutive full blocks, in half the time."""
        if self._media or stop <= start:
            return [self.meta(index) for index in range(start, stop)]
        block_bytes = 4 * self.block_tokens
        tokens = bytes(self._tokens[start * block_bytes : stop * block_bytes])  # no view: another thread may extend
        parents = (self.parent_id(start), *self.ids[start : stop - 1])
        spans = [tokens[at : at + block_bytes] for at in range(0, len(tokens), block_bytes)]
        return list(named(BlockMeta, parents, range(start, stop), spans, repeat(b"")))

    def tokens_after(self, index: int) -> npt.NDArray[np.uint32]:
        """Tokens from block `index` on, a block's worth of them at most; none where media begin among them."""
        first = index * self.block_tokens
        if self._media and any(first <= offset < first + self.block_tokens for offset, _ in self._media):
            return np.empty(0, np.uint32)
        return np.frombuffer(bytes(self._tokens[4 * first : 4 * (first + self.block_tokens)]), "<u4")

    def contents(self, start: int, stop: int) -> tuple[bytes, list[tuple[int, bytes]]]:
        """Tokens of full blocks `start`…`stop` as u32 little-endian, and (index, extra) of those that have some."""
        block_bytes = 4 * self.block_tokens
        tokens = bytes(self._tokens[start * block_bytes : stop * block_bytes])  # no view: another thread may extend
        if not self._media:
            return tokens, []
        extras = [(index, self._extra(index)) for index in range(start, stop)]
        return tokens, [(index, extra) for index, extra in extras if extra]

    def part_keys(self, start: int, stop: int, parts: Iterable[int]) -> list[PartKey]:
        """Keys of blocks `start`…`stop`, block by block, each over `parts`."""
        cells, ids = tuple(parts), self.ids[start:stop]
        blocks = ids if len(cells) == 1 else (block for block in ids for _ in cells)
        return list(named(PartKey, repeat(self.root.id), blocks, cycle(cells))) if cells else []
