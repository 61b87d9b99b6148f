# SPDX-License-Identifier: Apache-2.0
"""Frames sealed with AES-256-GCM: what lies in a shared tier, or on a disk, is nothing without the key.

Sealed are the payload and, in the header, the token ids and what tokens do not say: the prompt. In the clear stay the
lengths, codec, part and depth, the key's id, and the hashes of root, block and parent, which names in the tier hold,
too. A hash does not give its tokens away, but confirms a guess of them, unless block ids are keyed with a secret
(`service.secret_file`). All that is in the clear is authenticated: a value under another name, of another part, or
with any bit changed does not open.

Key file: one key a line, 64 hex digits (`openssl rand -hex 32`); `#` begins a comment. The first key seals, every one
opens. To change keys: add the new one at the end on all hosts, then put it first on all hosts, then take the old one
away once its values have aged out.

No two values are sealed with one key and nonce: each process derives a key of its own from the file's and a random
salt of 128 bits (HKDF-Expand, SHA-256), and counts; its nonce is the count (5 bytes) and 7 random bytes, so that not
even a process that was copied while it ran, virtual machine and all, repeats one. The random nonces of one key alone
would have run into GCM's limit of 2^32 values in a fleet's year. A fresh salt is taken after 2^32 values, and in a
forked child. Readers derive the key again from the salt in the frame.

Cost: AES in hardware runs beside the interpreter, 10 GB/s a core, about as fast as xxh3, which sealed values need not
have: their tag says it. What is left is a second memory and the calls. Over loopback on two cores, where nothing else
limits (Valkey 9, GB/s, median of 5, sealed and plain in turn): parts of 8 MiB save 1.64 of 2.16, load 1.77 of 1.96;
of 128 KiB save 1.53 of 2.11, load 1.59 of 3.41. A link of 10 Gbit/s is slower than any of these.
"""

from __future__ import annotations

import hmac
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from kvstore.block import PartKey
from kvstore.errors import ConfigError
from kvstore.private import read_private
from kvstore.wire import frame
from kvstore.wire.frame import PIECE_BYTES, TAG_BYTES, Buffer, FrameError, Header, LockedFrame, Payload, Seal

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext, AEADEncryptionContext, Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import GCM
except ImportError as exc:
    raise ConfigError("encryption needs the package cryptography: pip install 'kvstore[encryption]'") from exc

KEY_BYTES = 32
_COUNT_BYTES = 5
_MAX_COUNT = 1 << 32
_DERIVED = b"kvstore sealed frame"
_NAMED = b"kvstore key id"


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys by id. The first seals."""

    by_id: dict[bytes, bytes]

    @classmethod
    def read(cls, path: str) -> Keys:
        """Keys of a file, which only its owner may read. Raises ConfigError."""
        text = read_private(path, "encryption key file").decode(errors="replace")
        keys: list[bytes] = []
        for number, line in enumerate(text.splitlines(), 1):
            digits = line.partition("#")[0].strip()
            if not digits:
                continue
            try:
                keys.append(bytes.fromhex(digits))
            except ValueError:
                keys.append(b"")
            if len(keys[-1]) != KEY_BYTES:
                raise ConfigError(
                    f"encryption key file {path}, line {number}: a key is {2 * KEY_BYTES} hex digits, "
                    "such as the output of: openssl rand -hex 32"
                )
        if not keys:
            raise ConfigError(f"encryption key file {path} holds no key: openssl rand -hex 32 >> {path}")
        return cls.of(*keys)

    @classmethod
    def of(cls, *keys: bytes) -> Keys:
        return cls({key_id(key): key for key in keys})


def key_id(key: bytes) -> bytes:
    """What a frame names a key by: 8 bytes that say nothing about it."""
    return hmac.digest(key, _NAMED, "sha256")[: frame.KEY_ID_BYTES]


@lru_cache(maxsize=1024)
def _derived(key: bytes, salt: bytes) -> bytes:
    """HKDF-Expand (RFC 5869) to 32 bytes."""
    return hmac.digest(key, _DERIVED + salt + b"\x01", "sha256")


class Sealing:
    """One payload being sealed, piece by piece, into memory that has room for its tag. Not thread-safe."""

    def __init__(self, header: Header, payload: memoryview, into: memoryview, key: bytes) -> None:
        """`header` has its seal, and the payload's length with the tag."""
        assert header.seal is not None
        self._fixed = frame.authenticated(header)
        self._context: AEADEncryptionContext = Cipher(AES(key), GCM(header.seal.nonce)).encryptor()
        self._context.authenticate_additional_data(self._fixed)
        self._secret = self._context.update(header.meta.tokens + header.meta.extra)
        self._payload = payload
        self._into = into
        self._at = 0

    def step(self) -> bool:
        """Seal a piece, some tens of microseconds of work; False where nothing was left."""
        piece = self._payload[self._at : self._at + PIECE_BYTES]
        if piece:
            self._context.update_into(piece, self._into[self._at : self._at + len(piece)])
            self._at += len(piece)
        return len(piece) > 0

    def header(self) -> bytes:
        """Seal what is left; the header's bytes. What `into` holds then follows them."""
        while self.step():
            pass
        self._context.finalize()
        self._into[self._at :] = self._context.tag
        return frame.with_checksum(self._fixed + self._secret)


class Opening:
    """One payload being opened. What it gave is worth nothing before `finish` has agreed. Not thread-safe."""

    def __init__(self, context: AEADDecryptionContext, told: Payload) -> None:
        self._context = context
        self.told = told
        """About the payload without its tag."""

    def update(self, piece: Buffer, into: memoryview) -> None:
        """Open the next bytes, which are not those of `into`."""
        self._context.update_into(piece, into)

    def finish(self, tag: bytes) -> None:
        """Raises FrameError unless all that was opened is what was sealed."""
        try:
            self._context.finalize_with_tag(tag)
        except InvalidTag:
            raise FrameError("the seal is broken") from None


class Sealer:
    """Seals and opens frames. Thread-safe."""

    def __init__(self, keys: Keys, random: Callable[[int], bytes] = os.urandom) -> None:
        self._keys = keys
        self._random = random
        self._id, self._key = next(iter(keys.by_id.items()))
        self._lock = threading.Lock()
        self._owner = 0
        self._salt = b""
        self._count = 0

    def seal(self, header: Header, payload: memoryview, into: memoryview) -> Sealing:
        """Begin to seal `payload`, which `header` describes, into `into`: TAG_BYTES longer."""
        seal = self._next()
        sealed = Header(
            header.key, header.meta, header.codec_id, header.item_bytes, header.raw_bytes, len(into), 0, seal
        )
        return Sealing(sealed, payload, into, _derived(self._key, seal.salt))

    def _next(self) -> Seal:
        with self._lock:
            if self._owner != os.getpid() or self._count == _MAX_COUNT:
                self._owner, self._count = os.getpid(), 0
                self._salt = self._random(frame.SALT_BYTES)
            count, salt = self._count, self._salt
            self._count += 1
        rest = self._random(frame.NONCE_BYTES - _COUNT_BYTES)
        return Seal(self._id, salt, count.to_bytes(_COUNT_BYTES, "little") + rest)

    def open(self, header: bytes, key: PartKey) -> Opening:
        """Begin to open the frame that `header`, all of one, begins.

        Raises LockedFrame where it is sealed with a key that is not here, ForeignFrame for one of another part, and
        FrameError for one that is not sealed or not sound.
        """
        fixed, seal, secret, fields = frame.sealed(header, key)
        master = self._keys.by_id.get(seal.key_id)
        if master is None:
            raise LockedFrame(f"a frame sealed with key {seal.key_id.hex()}, which is not here")
        if fields.num_bytes < TAG_BYTES:
            raise FrameError("a sealed payload is shorter than its tag")
        context: AEADDecryptionContext = Cipher(AES(_derived(master, seal.salt)), GCM(seal.nonce)).decryptor()
        context.authenticate_additional_data(fixed)
        frame.verify_sealed(header, key, context.update(secret))
        return Opening(context, fields._replace(num_bytes=fields.num_bytes - TAG_BYTES))
