# SPDX-License-Identifier: Apache-2.0
"""A user who may do what doctor names, and no more: tests make their tiers as this one where they can."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from kvstore.tiers.redis_rights import least_rights

USER, PASSWORD = "kvstore", "pass/word"


def add_user(client: Any, *, cluster: bool = False) -> None:
    """A user with the least rights there are to a tier."""
    client.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", *least_rights(cluster=cluster).split())


def as_user(url: str) -> str:
    """The URL of a Unix socket, for that user."""
    return f"{url}?username={USER}&password={quote(PASSWORD, safe='')}"
