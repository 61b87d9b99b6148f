# SPDX-License-Identifier: Apache-2.0
"""What this process has open, for tests that nothing stays so."""

from __future__ import annotations

import os
from contextlib import suppress


def descriptors() -> set[tuple[str, str]]:
    """Each with what it leads to. Not how many: channels of tests before may close theirs only now."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found
