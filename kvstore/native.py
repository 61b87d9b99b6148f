# SPDX-License-Identifier: Apache-2.0
"""The two loops that are written in C, where they were built: strided copies and the hash chain.

`_copy.c` and `_hash.c` are built at installation if there is a C compiler. Without them everything works: copies
run at about half the rate, hashing takes three times as long. Loaded with ctypes, which releases the GIL.
"""

from __future__ import annotations

import ctypes
import importlib.util
from typing import Any

MAX_AXES = 8
Steps = ctypes.c_int64 * MAX_AXES


def _load() -> Any:
    spec = importlib.util.find_spec("kvstore._native")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:  # built for another machine
        return None
    size = ctypes.c_size_t
    pointer = ctypes.c_void_p
    library.kvstore_copy.argtypes = [size, pointer, pointer, ctypes.c_int, Steps, Steps, Steps, size]
    library.kvstore_copy.restype = None
    chars = ctypes.c_char_p
    library.kvstore_hash_chain.argtypes = [chars, chars, size, chars, size, size, chars]
    library.kvstore_hash_chain.restype = ctypes.c_int
    return library


_library = _load()
copy_strided = None if _library is None else _library.kvstore_copy


def is_built() -> bool:
    """Whether the C loops are there."""
    return _library is not None


def hash_chain(parent: bytes, head: bytes, tokens: bytes, block_bytes: int) -> list[bytes] | None:
    """SHA-256(parent ‖ head ‖ tokens of a block) for each block, each being the next one's parent.

    None where it was not built, or the processor lacks the instructions: then hashlib must do.
    """
    if _library is None:
        return None
    num_blocks = len(tokens) // block_bytes
    out = ctypes.create_string_buffer(32 * num_blocks)
    if not _library.kvstore_hash_chain(parent, head, len(head), tokens, block_bytes, num_blocks, out):
        return None
    digests = out.raw
    return [digests[at : at + 32] for at in range(0, len(digests), 32)]
