# SPDX-License-Identifier: Apache-2.0
"""What both sides of a connection must agree on, and the messages that say it."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from functools import cache

from kvstore.block import Chain, ModelId, Root
from kvstore.errors import ConfigError, ProtocolError
from kvstore.wire import kvstore_pb2 as pb

PROTOCOL_VERSIONS = (1,)
"""Versions of kvstore.v1 spoken here, newest last."""

MAX_MESSAGE_BYTES = 8 << 20
ABSENT = (1 << 64) - 1
"""In place of an offset: this part has no slot."""
MAX_SAVE_PARTS = 131_072
"""Of one Save."""
REPLY_SLOTS = 65_536
"""In one LoadReply: 12 bytes each."""
_TEXT_BYTES = 1024


@cache
def hash_vector() -> bytes:
    """32 bytes over hashes of fixed chains: two builds that give different ones must not share blocks."""
    model = ModelId(
        model="vector", revision="1", kv_dtype="bfloat16", num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16
    )
    plain = Chain(Root(model), range(64))
    salted = Chain(Root(model, adapter=b"adapter", salt=b"salt", secret=b"secret"), range(100, 140))
    media = Chain(Root(model), range(48), media=((3, b"image"), (20, b"sound")))
    ids = [block for chain in (plain, salted, media) for block in chain.ids]
    return hashlib.sha256(model.digest() + b"".join(ids)).digest()


def common_version(theirs: list[int]) -> int:
    """The newest protocol version both sides speak. Raises ProtocolError naming both sides."""
    common = set(PROTOCOL_VERSIONS) & set(theirs)
    if not common:
        raise ProtocolError(
            f"this server speaks protocol versions {list(PROTOCOL_VERSIONS)}, the client {theirs}: "
            "upgrade the older one"
        )
    return max(common)


def model_message(model: ModelId) -> pb.Model:
    return pb.Model(**{item.name: getattr(model, item.name) for item in fields(model)})


def model_of(message: pb.Model) -> ModelId:
    """The ModelId of a message. Raises ConfigError naming what is wrong with it."""
    values = {item.name: getattr(message, item.name) for item in fields(ModelId)}
    for name, value in values.items():
        if isinstance(value, str) and len(value) > _TEXT_BYTES:
            raise ConfigError(f"model.{name} has {len(value)} characters: at most {_TEXT_BYTES}")
    return ModelId(**values)
