# SPDX-License-Identifier: Apache-2.0
"""What a caller of an engine says about a request, taken from the request's parameters.

    {"kvstore": {"conversation": "chat-17", "turn": 3, "closed": true, "priority": 80, "ttl_s": 600,
                 "retention": [{"start": 0, "stop": 2048, "priority": 100, "duration_s": 3600}]}}

All of it is optional. It is advice to eviction: what cannot be read is said once in the log, and the request goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from kvstore.api import NO_HINT, Hint, Retention
from kvstore.errors import ConfigError

log = logging.getLogger("kvstore.connector")

PARAMETER = "kvstore"
_MAX_RANGES = 64
_MAX_TEXT = 1024
_KNOWN = ("conversation", "turn", "closed", "priority", "ttl_s", "retention")
_KNOWN_OF_RANGES = ("start", "stop", "priority", "duration_s")
_said: set[str] = set()


def hint_of(parameters: Mapping[str, object] | None, *, prompt_tokens: int = 0) -> Hint:
    """The hint in an engine's request parameters; a bare one where there is none, or none that can be read."""
    given = (parameters or {}).get(PARAMETER)
    if given is not None:
        try:
            return read_hint(given, prompt_tokens=prompt_tokens)
        except ConfigError as error:
            _say_once(str(error))
    return Hint(prompt_tokens=prompt_tokens)


def read_hint(given: object, *, prompt_tokens: int = 0) -> Hint:
    """The hint that `given` states. Raises ConfigError naming what is wrong."""
    fields = _fields(given, _KNOWN, PARAMETER)
    ranges = fields.get("retention", ())
    if not isinstance(ranges, Sequence) or isinstance(ranges, str) or len(ranges) > _MAX_RANGES:
        raise ConfigError(f"{PARAMETER}.retention: give a list of at most {_MAX_RANGES} ranges")
    conversation = fields.get("conversation", "")
    if not isinstance(conversation, str) or len(conversation) > _MAX_TEXT:
        raise ConfigError(f"{PARAMETER}.conversation: give a text of at most {_MAX_TEXT} characters")
    closed = fields.get("closed", False)
    if not isinstance(closed, bool):
        raise ConfigError(f"{PARAMETER}.closed is {closed!r}: give true or false")
    return Hint(
        conversation=conversation,
        turn=_count(fields, "turn") or 0,
        prompt_tokens=prompt_tokens,
        priority=_count(fields, "priority", NO_HINT.priority) or 0,
        retention=tuple(map(_range, ranges)),
        ttl_s=_seconds(fields, "ttl_s"),
        closed=closed,
    )


def _range(given: object) -> Retention:
    fields = _fields(given, _KNOWN_OF_RANGES, f"{PARAMETER}.retention")
    priority = _count(fields, "priority", NO_HINT.priority) or 0
    return Retention(_count(fields, "start", 0) or 0, _count(fields, "stop"), priority, _seconds(fields, "duration_s"))


def _fields(given: object, known: Sequence[str], name: str) -> Mapping[str, object]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {given!r:.60}: give an object with some of {', '.join(known)}")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ConfigError(f"{name} has {unknown[0]!r:.60}: known are {', '.join(known)}")
    return given


def _count(fields: Mapping[str, object], key: str, missing: int | None = None) -> int | None:
    value = fields.get(key)
    if value is None:
        return missing
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise ConfigError(f"{PARAMETER}: {key} is {value!r:.60}: give a whole number from 0 on")
    return value


def _seconds(fields: Mapping[str, object], key: str) -> float | None:
    value = fields.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{PARAMETER}: {key} is {value!r:.60}: give seconds")
    return float(value)


def _say_once(problem: str) -> None:
    if problem not in _said and len(_said) < 32:
        _said.add(problem)
        log.warning("a hint was left out: %s", problem)
