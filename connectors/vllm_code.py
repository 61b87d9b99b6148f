# SPDX-License-Identifier: Apache-2.0
"""Which code an engine's attention is: what names, releases, files and settings say of who writes its pages.

A version says too little: a package may be patched where it lies, or built again with other flags. So files are read,
binaries once for as long as they do not change. What cannot be read says so, and is then told by its version alone.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from connectors.vllm_identity import contents_digest

_ATTENTION_WORDS = frozenset(
    {"aiter", "attention", "attn", "flashinfer", "flashmla", "sageattention", "triton", "vllm", "xformers"}
)
"""Of names of distributions whose kernels may write pages, split at dashes: `tritonclient` is none."""

_SETTINGS = ("ATTN", "ATTENTION", "AITER", "FLASH", "LAYOUT", "SHUFFLE")
"""What names of vLLM's own environment variables say that may choose an order."""

_PREFIXES = ("AITER_", "FLASHINFER_", "FLASH_ATTENTION_")
"""Environment of kernel packages, which name theirs as they like: all of it."""

_BINARIES = frozenset({".so", ".pyd", ".cubin", ".hsaco", ".co", ".ptx"})
_SOURCES = frozenset({".py", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".hip"})

_MOST_BYTES = 8 << 30
"""Of one package's files that are read; those after it are told by size and time of change."""

_TOLD_BY_VERSION = frozenset({"torch", *sys.stdlib_module_names})
"""Packages that are not read: what they are is another fact."""


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# -- classes ---------------------------------------------------------------------------------------------------


def _variants(backend: type) -> dict[str, Any]:
    """Backends that this one is composed of, by what it calls them."""
    found = sorted(vars(backend).items())
    return {name: kind for name, kind in found if isinstance(kind, type) and hasattr(kind, "get_impl_cls")}


def attention_name(backend: type, impl: type) -> str:
    """A backend and what it computes with, variants included: composed ones share the names of their classes."""
    inner = [f"{name} {attention_name(kind, kind.get_impl_cls())}" for name, kind in _variants(backend).items()]
    return f"{name_of(backend)}: {name_of(impl)}" + (f" ({', '.join(inner)})" if inner else "")


def attention_classes(backend: type, impl: type) -> set[type]:
    """All classes that `attention_name` names."""
    inner = [attention_classes(kind, kind.get_impl_cls()) for kind in _variants(backend).values()]
    return {backend, impl}.union(*inner)


# -- files -----------------------------------------------------------------------------------------------------


def source_digest(kinds: Iterable[type]) -> str:
    """Digest of the files that `kinds` and what they inherit from are in; says so where there are none."""
    contents = set()
    for kind in {base for each in kinds for base in each.__mro__}:
        if kind.__module__.partition(".")[0] in sys.stdlib_module_names:
            continue
        try:
            contents.add(hashlib.sha256(Path(inspect.getsourcefile(kind) or "").read_bytes()).digest())
        except (TypeError, OSError):
            continue  # it has none, or none that can be read
    return hashlib.sha256(b"".join(sorted(contents))).hexdigest() if contents else "no source"


def packages_of(kinds: Iterable[type]) -> list[str]:
    """Names of the top-level packages whose files `kinds` and what they inherit from are in."""
    names = {base.__module__.partition(".")[0] for kind in kinds for base in kind.__mro__}
    return sorted(names - _TOLD_BY_VERSION)


def package_digest(name: str) -> str:
    """Digest of a package's sources and binaries: helper modules and libraries hold kernels, too.

    Of a local build of vLLM that keeps its version, nothing else tells. All of its files are taken, because which of
    them a kernel calls is not known: a file that has nothing to do with pages costs misses, where it was changed.
    """
    module = sys.modules.get(name)
    places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
    if not any(places):
        return "no files"
    digest, left = hashlib.sha256(), _MOST_BYTES
    for place in map(Path, filter(None, places)):
        directory, files = (place.parent, [place]) if place.is_file() else (place, list(_files(place)))
        binaries = []
        for path in files:
            try:
                stat = path.stat()
                left -= stat.st_size
                if left < 0:
                    content = f"{stat.st_size} {stat.st_mtime_ns}".encode()
                elif path.suffix in _BINARIES:
                    binaries.append(path)
                    continue
                else:
                    content = hashlib.sha256(path.read_bytes()).digest()
            except OSError:
                content = b"cannot be read"
            _add(digest, str(path.relative_to(directory)).encode(), content)
        try:
            _add(digest, b"binaries", contents_digest(directory, binaries).encode() if binaries else b"")
        except OSError:
            _add(digest, b"binaries", b"cannot be read")
    return digest.hexdigest()


def _add(digest: hashlib._Hash, *fields: bytes) -> None:
    for one in fields:
        digest.update(len(one).to_bytes(8, "little") + one)


def _files(directory: Path) -> Iterator[Path]:
    for place, directories, names in os.walk(directory):
        directories[:] = sorted(each for each in directories if each != "__pycache__")
        for name in sorted(names):
            path = Path(place, name)
            if path.suffix in _BINARIES or path.suffix in _SOURCES:
                yield path


# -- releases and settings -------------------------------------------------------------------------------------


def releases(packages: Sequence[str], installed: Iterable[tuple[str, str]] | None = None) -> str:
    """Versions of what is installed that may write pages, and of the distributions `packages` are from."""
    installed = _installed() if installed is None else installed
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in packages}
    of = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in installed if name}
    named = {name for name in of if name in wanted or not _ATTENTION_WORDS.isdisjoint(name.split("-"))}
    return " ".join(f"{name}={of[name]}" for name in sorted(named))


@cache
def _installed() -> tuple[tuple[str, str], ...]:
    return tuple((each.name, each.version) for each in metadata.distributions())


def settings_in(environ: Mapping[str, str], packages: Sequence[str]) -> list[tuple[str, str]]:
    """Environment variables that may choose an order, of vLLM, of kernel packages and of `packages`."""
    theirs = (*_PREFIXES, *(f"{name.upper()}_" for name in packages if name != "vllm"))
    return sorted(
        (name, value)
        for name, value in environ.items()
        if name.startswith(theirs) or (name.startswith("VLLM_") and any(word in name for word in _SETTINGS))
    )
