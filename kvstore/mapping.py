# SPDX-License-Identifier: Apache-2.0
"""A client's side of a shared arena: slots to copy from and into, generation words to check a copy by.

The descriptors come from the service's door. Both maps stay out of forks: a forked child finds every call refused
and private zeros where the parent's memory is, so that it can neither write late nor fault.

Invariants
1. Nothing is mapped that the service could shrink under a reader: descriptors that are not sealed are refused.
2. A view stays good until it is dropped, `close` or not; memory goes with the last view of it.
   What a device's driver was told of it is taken back in between: no copy runs without a view, and nothing is
   unmapped that is registered.
3. Generation words can be read and never written, here and in any other client.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
import weakref

import numpy as np
import numpy.typing as npt

from kvstore.api import Register, Registration
from kvstore.errors import MappingClosed, ProtocolError
from kvstore.memory import PAGE_BYTES, Stretch

_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; not in the fcntl module
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_WORD_BYTES = 4


class ArenaMapping:
    """The arena of a service, mapped into this process. Thread-safe.

    Attributes:
        num_bytes: size of the arena.
    """

    def __init__(
        self,
        memory_fd: int,
        generation_fd: int,
        capacity_bytes: int,
        *,
        writable: bool = True,
        populate: bool = True,
    ) -> None:
        """Map both descriptors; the caller keeps and closes them, at once if it likes.

        `writable=False` is for clients that only load. `populate` faults all pages in from a thread: untouched, a
        page costs a fault at its first copy. Raises ProtocolError where a descriptor is not what it should be, and
        OSError where the host refuses the mapping.
        """
        num_words = capacity_bytes // PAGE_BYTES
        words_bytes = -(-num_words * _WORD_BYTES // PAGE_BYTES) * PAGE_BYTES
        _expect(memory_fd, "memory", capacity_bytes, _SIZE_SEALS)
        _expect(generation_fd, "generation", words_bytes, _SIZE_SEALS | _F_SEAL_FUTURE_WRITE)
        self.num_bytes = capacity_bytes
        self._pid = os.getpid()
        self._memory = Stretch(capacity_bytes, fd=memory_fd, writable=writable, out_of_forks=True)
        self._address = self._memory.address
        self._words = Stretch(words_bytes, fd=generation_fd, writable=False, out_of_forks=True)
        self._lent = _Lent(self._memory)
        self._closing = threading.Event()
        self._populated = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        if populate:
            self.populate()

    def populate(self) -> None:
        """Begin to fault pages in; see `wait_populated`. Idempotent.

        Best once the service has populated the arena itself: then this costs next to nothing, and the memory counts
        as the service's, not as this process's.
        """
        self._check()
        with self._lock:
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._populate, name="kvstore-populate", daemon=True)
                self._thread.start()

    def _populate(self) -> None:
        """Generation words first: they are few, and every load reads some."""
        if self._words.populate(self._closing) and self._memory.populate(self._closing):
            self._populated.set()

    @property
    def address(self) -> int:
        """Where the memory begins in this process, for registration with a device. Raises MappingClosed."""
        self._check()
        return self._address

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """Bytes of a slot; read-only in a mapping that is. Raises MappingClosed, ProtocolError outside the arena."""
        self._check()
        if not 0 <= offset <= offset + num_bytes <= self.num_bytes:
            raise ProtocolError(
                f"slot of {num_bytes} bytes at offset {offset} is outside the arena, which has {self.num_bytes}"
            )
        return self._lent.view()[offset : offset + num_bytes]

    def register(self, register: Register) -> bool:
        """Have a device's driver told of all the memory; `close` takes that back. Once is enough.

        False where nothing is registered: closed already, or mapped for reading only, which drivers refuse.

        `register` gets a writable view, which it keeps until its registration is closed.
        """
        with self._lock:
            return not self.closed and self._lent.register(register)

    def unregister(self) -> None:
        """Take `register` back, now. No copy may be under way. Idempotent."""
        self._lent.unregister()

    def generations(self, offsets: npt.NDArray[np.integer]) -> npt.NDArray[np.uint32]:
        """Generation words, as they are now, of the slots at byte `offsets`; a copy of the same length.

        Read after a copy and equal to those handed out before it, they say that no slot had another owner
        meanwhile. Raises MappingClosed, ProtocolError for an offset outside the arena.
        """
        self._check()
        words = np.frombuffer(self._words.view(), np.uint32)
        pages = np.asarray(offsets, np.uint64) // np.uint64(PAGE_BYTES)
        if len(pages) and int(pages.max()) >= self.num_bytes // PAGE_BYTES:
            raise ProtocolError(f"offset {int(np.max(offsets))} is outside the arena, which has {self.num_bytes} bytes")
        return words[pages.astype(np.intp)]

    def wait_populated(self, timeout_s: float | None = None) -> bool:
        """Wait until the memory is populated. True when it is; False on time-out, or where it never will be."""
        self._check()
        with self._lock:  # under which it is started
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return self._populated.is_set()

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a forked child: no view is to be had any more."""
        return self._closing.is_set() or os.getpid() != self._pid

    def close(self) -> bool:
        """Hand out no more views, and unmap. False while views are alive; ask again, the memory goes with the last.

        Idempotent. In a forked child, where there is nothing to unmap, it does nothing and returns True.
        """
        if os.getpid() != self._pid:
            return True
        self._stop()
        unmapped = self._words.close()
        let_go = self._lent.close()
        return self._memory.close() and let_go and unmapped

    def abandon(self) -> None:
        """Close, and let the memory go at once, though views of it are alive: they show zeros from now on.

        For the memory of a service that is gone, where somebody keeps a view for too long. A copy under way has zeros
        in it, and `generations` refuses to vouch for it. The caller answers for devices: none may be copying.
        """
        if os.getpid() == self._pid:
            self._stop()
            self._words.close()
            self._lent.unregister()
            self._memory.abandon()

    def _stop(self) -> None:
        with self._lock:
            self._closing.set()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise MappingClosed(
                f"the arena was mapped by process {self._pid} and stays out of its forked child {os.getpid()}: "
                "connect to the service in the child"
            )
        if self._closing.is_set():
            raise MappingClosed("the mapping of the arena was closed: connect to the service again")


class _Lent:
    """The views that users of a mapping have, told apart from the one that a registration keeps. Thread-safe."""

    def __init__(self, memory: Stretch) -> None:
        self._memory = memory
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._registration: Registration | None = None
        view = memory.view()
        whole = (ctypes.c_ubyte * memory.num_bytes).from_address(memory.address)
        whole.held = view  # type: ignore[attr-defined]  # users' views hold `whole`, and that holds the memory
        self._whole = weakref.ref(whole)
        lent = memoryview(whole).cast("B")
        self._view: memoryview | None = lent.toreadonly() if view.readonly else lent
        # A thread of its own: unregistering takes seconds, and the last view goes wherever it goes.
        weakref.finalize(whole, self._gone).atexit = False

    def view(self) -> memoryview:
        view = self._view
        if view is None:
            raise MappingClosed("the mapping of the arena was closed: connect to the service again")
        return view

    def register(self, register: Register) -> bool:
        memory = self._memory.view()
        if memory.readonly:
            return False
        with self._lock:
            if self._registration is None:
                self._registration = register(memory)
        return True

    def unregister(self) -> None:
        """Done when this returns, also where another thread had begun it: the memory may be abandoned next."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            registration, self._registration = self._registration, None
            if registration is not None:
                registration.close()

    def close(self) -> bool:
        """Hand out no more. False while users have views, or a registration could not be taken back yet."""
        self._view = None
        if self._whole() is not None:
            return False
        self.unregister()
        return True

    def _gone(self) -> None:
        if self._registration is None or os.getpid() != self._pid:
            return
        try:
            threading.Thread(target=self.unregister, name="kvstore-unpin", daemon=True).start()
        except RuntimeError:
            pass  # the process is ending


def _expect(fd: int, name: str, num_bytes: int, seals: int) -> None:
    """Refuse a descriptor that is no memfd of that size, or whose size could change under a reader."""
    size = os.fstat(fd).st_size
    if size != num_bytes:
        raise ProtocolError(f"the {name} descriptor has {size} bytes, the service announced {num_bytes}")
    try:
        there = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"the {name} descriptor is no sealed shared memory: {error}") from error
    if there & seals != seals:
        raise ProtocolError(f"the {name} descriptor has seals {there:#x}, and needs {seals:#x} to be mapped safely")
