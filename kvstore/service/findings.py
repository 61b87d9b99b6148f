# SPDX-License-Identifier: Apache-2.0
"""What `kvstore doctor` finds: a line each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    OK = "ok"
    PROBLEM = "problem"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was seen, and for a problem what to do."""

    name: str
    verdict: Verdict
    detail: str
    fix: str = ""


def ok(name: str, detail: str) -> Finding:
    return Finding(name, Verdict.OK, detail)


def problem(name: str, detail: str, fix: str) -> Finding:
    return Finding(name, Verdict.PROBLEM, detail, fix)


def note(name: str, detail: str, fix: str = "") -> Finding:
    return Finding(name, Verdict.NOTE, detail, fix)
