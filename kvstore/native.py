# SPDX-License-Identifier: Apache-2.0
"""The loops that are written in C, where they were built: strided copies, the hash chain, many values off a socket.

`_copy.c`, `_hash.c` and `_receive.c` are built at installation if there is a C compiler. Without them everything works:
copies run at about half the rate, hashing takes three times as long, small values come one by one. Loaded with ctypes,
which releases the GIL.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    if hasattr(library, "kvstore_receive"):  # in a checkout an earlier build may lie here
        count = ctypes.POINTER(size)
        seconds = ctypes.POINTER(ctypes.c_double)
        library.kvstore_receive.argtypes = [ctypes.c_int, chars, size, size, size, size, ctypes.POINTER(pointer)]
        library.kvstore_receive.argtypes += [pointer, pointer, count, ctypes.c_double, seconds, count]
        library.kvstore_receive.restype = ctypes.c_int
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


class Received(NamedTuple):
    """What `receive` brought, and how it ended."""

    heads: list[bytes]
    """A header for each value that arrived whole."""
    rest: bytes
    """What was received beyond those."""
    armed_s: float
    failure: Exception | None
    """TimeoutError, EOFError, ValueError (a value without its end) or OSError: what follows cannot be read."""


receives = _library is not None and hasattr(_library, "kvstore_receive")


def receive(
    fd: int,
    line: bytes,
    head_bytes: int,
    buffers: Sequence[memoryview],
    begun: bytes,
    deadline: float,
    armed_s: float,
) -> Received:
    """Receive values that begin with `line` and a header into buffers of one size, up to the first that does not.

    Args:
        begun: what was received of the first already, no more than its line and header.
        deadline: on `time.monotonic`.
        armed_s: SO_RCVTIMEO as it is set; afterwards as the result says.
    """
    count = len(buffers)
    # Each names the caller's memory and keeps it: nothing is copied.
    owners = [ctypes.c_char.from_buffer(buffer) for buffer in buffers]
    addresses = (ctypes.c_void_p * count)(*map(ctypes.addressof, owners))
    heads = ctypes.create_string_buffer(max(1, head_bytes * count))
    edge = ctypes.create_string_buffer(begun, len(line) + head_bytes + 2)
    edge_bytes, num_done = ctypes.c_size_t(len(begun)), ctypes.c_size_t()
    armed = ctypes.c_double(armed_s)
    why = _library.kvstore_receive(
        fd, line, len(line), head_bytes, len(buffers[0]), count, addresses, heads, edge, edge_bytes, deadline,
        armed, num_done,
    )  # fmt: skip
    del owners
    data = heads.raw[: head_bytes * num_done.value]
    found = [data[at : at + head_bytes] for at in range(0, len(data), head_bytes)]
    return Received(found, edge.raw[: edge_bytes.value], armed.value, _failure(why))


def _failure(why: int) -> Exception | None:
    if why == -1:
        return TimeoutError("the deadline passed while receiving")
    if why < 0:
        return EOFError() if why == -2 else ValueError()
    return OSError(why, os.strerror(why)) if why else None
