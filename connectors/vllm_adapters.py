# SPDX-License-Identifier: Apache-2.0
"""Which LoRA adapter a vLLM request is computed with: by the content of its files, never by name or path.

vLLM reads an adapter's files in the first step that needs it, again whenever its cache of adapters has dropped it, and
again where a request says `load_inplace`; it says nothing of when. So a digest of files says what a step computes with
only if the files have been the same ones from before they were digested until after that step. Workers look again when
a step has run, for by then vLLM has read what it needed: what differs is not saved, and what was loaded for it is
computed again.

vLLM knows weights by the adapter's number alone. Once a number has stood for two paths, which of them a step computes
with is not known, and its requests run without reuse from then on.

Not seen: an adapter that vLLM was told to load ahead (`--lora-modules`, `/v1/load_lora_adapter`) and whose files were
then rewritten before its first request came; and one that `load_inplace` took from another path while requests of the
old one were under way, until the first request of the new one comes: the connector is told of requests, not of loads.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from connectors.vllm_identity import WEIGHTS, LoraRequest, directory_digest, stamp_of
from kvstore.errors import ConfigError

log = logging.getLogger("kvstore.connector.vllm")

_SETTINGS = "adapter_config.json"
_TICK_S = 0.02
"""Two changes within a tick of the kernel's clock (10 ms at most) have one stamp: files are read when it has passed."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files of an adapter, by name and stamp; none where they cannot be seen."""

    directory: str
    stamps: tuple[tuple[str, int, int, int, int], ...] = ()

    @classmethod
    def at(cls, directory: str) -> AdapterFiles:
        try:
            names = sorted(n for n in os.listdir(directory) if n == _SETTINGS or n.endswith(WEIGHTS))
            return cls(directory, tuple((n, *stamp_of(os.stat(os.path.join(directory, n)))) for n in names))
        except OSError:
            return cls(directory)

    @property
    def are_unchanged(self) -> bool:
        """Whether they are there, and are these."""
        return bool(self.stamps) and AdapterFiles.at(self.directory) == self


@dataclass(frozen=True, slots=True)
class Adapter:
    """What stands in a chain's root for an adapter, empty for none, and the files that this is the digest of."""

    digest: bytes = b""
    files: AdapterFiles | None = None


class _Changed(Future[Adapter]):
    """Of an adapter whose files changed: it stays so though they change back."""


def _failed(why: str) -> _Changed:
    failed = _Changed()
    failed.set_exception(ConfigError(why))
    return failed


class AdapterDigests:
    """Adapters of requests, their files digested on a thread of their own.

    Once files have changed without `load_inplace`, which weights vLLM computes with is not known, so such an adapter's
    requests run without reuse until it is loaded in place.
    """

    def __init__(self, digest: Callable[[Path], bytes] | None = None) -> None:
        self._digest = digest or adapter_digest
        self._known: dict[tuple[int, str], tuple[AdapterFiles, Future[Adapter]]] = {}
        self._first: dict[str, AdapterFiles] = {}
        self._rewritten: set[str] = set()
        self._paths: dict[int, str] = {}
        self._mixed: set[int] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvstore-lora")

    def of(self, lora: LoraRequest | None) -> Future[Adapter]:
        """The adapter of a new request; the future may take its time, or fail."""
        if lora is None:
            none: Future[Adapter] = Future()
            none.set_result(Adapter())
            return none
        if lora.lora_path != self._paths.setdefault(lora.lora_int_id, lora.lora_path) and not self.is_mixed(lora):
            self._mixed.add(lora.lora_int_id)
            log.warning("adapter %r came from another path before: it runs without reuse from now on", lora.lora_name)
        if self.is_mixed(lora):
            return _failed(f"adapter {lora.lora_name!r} has come from several paths under one number")
        key = (lora.lora_int_id, lora.lora_path)
        files = AdapterFiles.at(lora.lora_path)
        if files != self._first.setdefault(lora.lora_path, files):
            self._rewritten.add(lora.lora_path)
        if key not in self._known or (lora.load_inplace and not self._is_known(key, files)):
            self._known[key] = files, self._pool.submit(self._read, files)
        known, future = self._known[key]
        if files != known and not isinstance(future, _Changed):
            log.warning("%s has changed, and not by load_inplace: its requests run without reuse", lora.lora_path)
            future = _failed(f"{lora.lora_path} has changed since the engine was given it")
            self._known[key] = known, future
        return future

    def _is_known(self, key: tuple[int, str], files: AdapterFiles) -> bool:
        """Whether these files were digested, or are being: vLLM says `load_inplace` with each request ever after."""
        known, future = self._known[key]
        return files == known and bool(files.stamps) and not (future.done() and future.exception() is not None)

    def is_mixed(self, lora: LoraRequest | None) -> bool:
        """Whether it has come from several paths: requests of the first one too may be computed with the other's."""
        return lora is not None and lora.lora_int_id in self._mixed

    def was_rewritten(self, lora: LoraRequest | None) -> bool:
        """Whether its path has led to other files before: vLLM's own prefix cache goes by name and path, and may have
        KV of those."""
        return lora is not None and lora.lora_path in self._rewritten

    def _read(self, files: AdapterFiles) -> Adapter:
        age_s = time.time() - max((stamp[3] for stamp in files.stamps), default=0) / 1e9
        if 0 <= age_s < _TICK_S:
            time.sleep(_TICK_S - age_s)
        digest = self._digest(Path(files.directory))
        if not files.are_unchanged:
            raise ConfigError(f"{files.directory} changed while it was read")
        return Adapter(digest, files)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def adapter_digest(directory: Path) -> bytes:
    """SHA-256 over an adapter's weights and its configuration (rank and scale are in there)."""
    settings = directory / _SETTINGS
    digest = hashlib.sha256(directory_digest(directory).encode())
    digest.update(settings.read_bytes() if settings.is_file() else b"")
    return digest.hexdigest().encode()
