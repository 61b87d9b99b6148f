# SPDX-License-Identifier: Apache-2.0
"""The loops that are written in C, where they were built: strided copies, the hash chain, names of thousands of parts,
many values off a socket.

`_copy.c`, `_frame.c`, `_hash.c`, `_names.c`, `_receive.c`, `_xxh3.c` are built at installation if there is a compiler.
Without, all works: copies run at about half the rate, hashing takes three times as long, names five times, values come
one by one. Loaded with ctypes, which releases the GIL.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_AXES = 8
MEMBER_BYTES = len(64 * "0" + ":000\r\n")
"""Of a row of `_names.c`, what says which part of which block."""
Steps = ctypes.c_int64 * MAX_AXES


class _Receiving(ctypes.Structure):
    """`struct receiving` of `_receive.c`."""

    _fields_ = (
        ("fd", ctypes.c_int32),
        ("why", ctypes.c_int32),
        ("deadline_s", ctypes.c_double),
        ("armed_s", ctypes.c_double),
        ("line", ctypes.c_char_p),
        ("line_bytes", ctypes.c_size_t),
        ("head_bytes", ctypes.c_size_t),
        ("payload_bytes", ctypes.c_size_t),
        ("count", ctypes.c_size_t),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("heads", ctypes.c_void_p),
        ("sums", ctypes.POINTER(ctypes.c_uint64)),
        ("edge", ctypes.c_void_p),
        ("edge_bytes", ctypes.c_size_t),
        ("requests", ctypes.c_char_p),
        ("request_bytes", ctypes.c_size_t),
        ("num_asked", ctypes.c_size_t),
        ("num_ahead", ctypes.c_size_t),
        ("num_done", ctypes.c_size_t),
        ("num_received", ctypes.c_size_t),
    )


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
    library.kvstore_copy.argtypes = [size, pointer, pointer, ctypes.c_int, Steps, Steps, Steps, size, pointer]
    library.kvstore_copy.restype = None
    chars = ctypes.c_char_p
    library.kvstore_hash_chain.argtypes = [chars, chars, size, chars, size, size, chars]
    library.kvstore_hash_chain.restype = ctypes.c_int
    if hasattr(library, "kvstore_receive_begin"):  # in a checkout an earlier build may lie here
        library.kvstore_receive_begin.argtypes = [ctypes.POINTER(_Receiving), ctypes.c_int]
        library.kvstore_receive_begin.restype = pointer
        library.kvstore_receive_wait.argtypes = [pointer, size]
        library.kvstore_receive_wait.restype = size
        library.kvstore_receive_end.argtypes = [pointer]
        library.kvstore_receive_end.restype = None
    if hasattr(library, "kvstore_sound_frames"):
        byte = ctypes.c_uint8
        library.kvstore_sound_frames.argtypes = [
            *(pointer, size, size, pointer, byte, chars, chars, chars, size, pointer),
        ]
        library.kvstore_sound_frames.restype = None
    if hasattr(library, "kvstore_touch_rows"):
        number = ctypes.c_int64
        library.kvstore_name_rows.argtypes = [size, chars, chars, pointer, size, chars, size, pointer]
        library.kvstore_name_rows.restype = None
        library.kvstore_touch_rows.argtypes = [
            *(size, chars, chars, chars, number, number, pointer, size, pointer, pointer),
        ]
        library.kvstore_touch_rows.restype = number
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


names = _library is not None and hasattr(_library, "kvstore_touch_rows")
"""Whether names can be put together in C."""


class Named(NamedTuple):
    """Parts whose names are wanted."""

    blocks: bytes
    """Block ids, end to end."""
    parts: bytes
    """Cells, a byte each."""

    def __len__(self) -> int:
        return len(self.parts)


def name_rows(
    named: Named, roots: NDArray[np.uint32] | None, num_buckets: int, heads: bytes, rows: NDArray[np.uint8]
) -> None:
    """Fill `rows` [parts, bytes]: of `heads`, which lie by root, then by bucket, each part's, and its member as a word.

    `roots` says which root is each one's; None where all have the first.
    """
    head_bytes = rows.shape[1] - MEMBER_BYTES
    where = None if roots is None else roots.ctypes.data
    _library.kvstore_name_rows(
        len(named), named.blocks, named.parts, where, num_buckets, heads, head_bytes, rows.ctypes.data
    )


def touch_rows(
    named: Named,
    skip: bytes | None,
    micros: int,
    depth: int,
    later: NDArray[np.int64] | None,
    counts: NDArray[np.uintp],
    rows: NDArray[np.uint8],
) -> int:
    """Fill `rows` [parts but skipped ones, bytes] with score and member of each as words, by bucket.

    Args:
        skip: a byte each, 0 or 1.
        micros: the score of depth 0. That of the first part is `depth`, one more for each block that follows.
        later: by how much the scores of parts are above that of a use now.
        counts: [buckets], filled with how many rows each has.

    Returns the depth of the last.
    """
    where = None if later is None else later.ctypes.data
    return int(
        _library.kvstore_touch_rows(
            *(len(named), named.blocks, named.parts, skip, micros, depth, where),
            *(len(counts), counts.ctypes.data, rows.ctypes.data),
        )
    )


class Asked(NamedTuple):
    """The parts that values should be, all under one root: those of another are not found to be sound."""

    root: bytes
    blocks: bytes
    """Block ids, end to end."""
    parts: array[int]
    """Cells, one for each of them, as 32-bit integers (`array("I")`)."""
    raw_id: int
    """The codec id of payloads that no codec changed."""


judges = _library is not None and hasattr(_library, "kvstore_sound_frames")
"""Whether frames can be verified in C."""


def sound_frames(heads: int, head_bytes: int, payload_bytes: int, sums: int, asked: Asked) -> bytes:
    """Which values are certainly the parts asked for, a byte each: 1, or 0 where `kvstore.wire.frame` has to say.

    Args:
        heads: address of their headers, end to end, `head_bytes` each.
        payload_bytes: length of each one's payload.
        sums: address of the payloads' xxh3, 64 bits each.
    """
    count = len(asked.parts)
    if not judges or len(asked.root) != 32 or len(asked.blocks) != 32 * count:
        return bytes(count)
    out = ctypes.create_string_buffer(count)
    _library.kvstore_sound_frames(
        *(heads, head_bytes, payload_bytes, sums, asked.raw_id, asked.root, asked.blocks, asked.parts.tobytes()),
        *(count, out),
    )
    return out.raw


receives = _library is not None and hasattr(_library, "kvstore_receive_begin")
MIN_SUMMED_BYTES = 129
"""Smaller payloads are not hashed in C."""


@dataclass(frozen=True, slots=True)
class Run:
    """Values to receive, one shape, each into a buffer of its own.

    Attributes:
        line: what each begins with, a header of `head_bytes` after it.
        buffers: for what follows, all of one size, `MIN_SUMMED_BYTES` or more.
        begun: what was received of the first already, no more than its line and header.
        requests: one a buffer, all of one length: what asks for the values.
        num_asked: how many were asked for already.
        num_ahead: how many to have asked for beyond the one being received.
        beside: on a thread that needs no GIL, while the caller does something else. Otherwise by who waits for them.
    """

    line: bytes
    head_bytes: int
    buffers: Sequence[memoryview]
    begun: bytes
    requests: bytes
    num_asked: int
    num_ahead: int
    beside: bool = False


class Receiving:
    """A run being received, without the GIL, up to the first value that does not begin as it should.

    Made by `receive`; whoever has it closes it, and nobody else receives by the descriptor before.
    """

    def __init__(self, run: Run, fd: int, deadline: float, armed_s: float) -> None:
        count = len(run.buffers)
        # Each names the caller's memory and keeps it: nothing is copied.
        self._owners = [ctypes.c_char.from_buffer(buffer) for buffer in run.buffers]
        self._addresses = (ctypes.c_void_p * count)(*map(ctypes.addressof, self._owners))
        self._heads = ctypes.create_string_buffer(max(1, run.head_bytes * count))
        self._sums = (ctypes.c_uint64 * count)()
        self._edge = ctypes.create_string_buffer(run.begun, len(run.line) + run.head_bytes + 2)
        self._run = run
        self._owner = os.getpid()
        self._job = _Receiving(
            fd=fd,
            deadline_s=deadline,
            armed_s=armed_s,
            line=run.line,
            line_bytes=len(run.line),
            head_bytes=run.head_bytes,
            payload_bytes=len(run.buffers[0]),
            count=count,
            buffers=self._addresses,
            heads=ctypes.addressof(self._heads),
            sums=self._sums,
            edge=ctypes.addressof(self._edge),
            edge_bytes=len(run.begun),
            requests=run.requests,
            request_bytes=len(run.requests) // count,
            num_asked=run.num_asked,
            num_ahead=run.num_ahead,
        )
        self._running: int | None = _library.kvstore_receive_begin(ctypes.byref(self._job), run.beside)

    @property
    def began(self) -> bool:
        return self._running is not None

    def wait(self, num_values: int) -> int:
        """Wait until so many have arrived, or no more will; how many have. Bounded by the deadline."""
        return int(_library.kvstore_receive_wait(self._running, num_values))

    def value(self, number: int) -> tuple[bytes, int]:
        """Of one that arrived: its header, and xxh3 of what lies in its buffer."""
        at, size = number * self._run.head_bytes, self._run.head_bytes
        return ctypes.string_at(ctypes.addressof(self._heads) + at, size), self._sums[number]

    def sound(self, first: int, asked: Asked) -> bytes:
        """`sound_frames` of values that arrived, from number `first` on."""
        size = self._run.head_bytes
        heads = ctypes.addressof(self._heads) + first * size
        sums = ctypes.addressof(self._sums) + first * ctypes.sizeof(ctypes.c_uint64)
        return sound_frames(heads, size, self._job.payload_bytes, sums, asked)

    def close(self) -> Received:
        """End it; where it had not ended, `Received.failure` says that the connection is spoilt.

        Nothing writes to the buffers from here on.
        """
        if self._running is not None:
            running, self._running = self._running, None
            if os.getpid() == self._owner:  # a forked child has no such thread, and the connection is not its own
                _library.kvstore_receive_end(running)
            self._owners.clear()
        job = self._job
        return Received(
            self._edge.raw[: job.edge_bytes], job.num_asked, job.num_received > 0, job.armed_s, _failure(job.why)
        )


class Received(NamedTuple):
    """How a run ended."""

    rest: bytes
    """What was received beyond the values that arrived."""
    num_asked: int
    heard: bool
    """Something was received."""
    armed_s: float
    """SO_RCVTIMEO as it is set."""
    failure: Exception | None
    """TimeoutError, EOFError, ValueError (a value without its end) or OSError: what follows cannot be read."""


def receive(run: Run, fd: int, deadline: float, armed_s: float) -> Receiving | None:
    """Begin to receive a run from a blocking socket; None where it cannot be done here.

    Args:
        deadline: on `time.monotonic`.
        armed_s: SO_RCVTIMEO as it is set; afterwards as the result says.
    """
    if not receives or len(run.buffers[0]) < MIN_SUMMED_BYTES:
        return None
    receiving = Receiving(run, fd, deadline, armed_s)
    return receiving if receiving.began else None


def _failure(why: int) -> Exception | None:
    if why == -1:
        return TimeoutError("the deadline passed while receiving")
    if why < 0:
        return EOFError() if why == -2 else ValueError()
    return OSError(why, os.strerror(why)) if why else None
