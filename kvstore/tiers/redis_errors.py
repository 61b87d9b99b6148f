# SPDX-License-Identifier: Apache-2.0
"""What a Redis, its sockets and redis-py raise, as errors of a tier: the one edge where foreign errors end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import redis.exceptions

from kvstore.errors import TierTimeout, TierUnavailable
from kvstore.tiers.redis_wire import ProtocolBroken, ReplyError

TIER = "redis"
_NO_WRITES = frozenset({"OOM", "NOREPLICAS", "MISCONF"})
"""What it answers to writes that it cannot take now, for want of memory, of replicas, of a disk that works."""
MOVING = frozenset({"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"})
"""Errors of a Cluster that is changing: not this node, or not now."""


@contextlib.contextmanager
def map_redis_errors() -> Iterator[None]:
    """Whatever redis-py, the socket or the server raised leaves here as TierTimeout or TierUnavailable."""
    try:
        yield
    except (redis.exceptions.TimeoutError, TimeoutError) as exc:
        raise TierTimeout(TIER, str(exc) or "timed out") from exc
    except (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError) as exc:
        raise TierUnavailable(TIER, f"the server refuses our user or password: {exc}") from exc
    except (
        redis.exceptions.RedisError,
        redis.exceptions.RedisClusterException,
        redis.exceptions.ChildDeadlockedError,
        ProtocolBroken,
        ReplyError,
        OSError,
    ) as exc:
        raise _kind_of(exc)(TIER, f"{type(exc).__name__}: {exc}") from exc


def _kind_of(error: Exception) -> type[TierUnavailable]:
    if not isinstance(error, ReplyError):
        return TierUnavailable
    if error.is_denied:
        return Denied
    return WrongBooks if error.is_of_type else Refused if error.code in _NO_WRITES else TierUnavailable


class Denied(TierUnavailable):
    """The server will not run that for us, now or later: our user may not, or it knows no such command."""


class Refused(TierUnavailable):
    """The server works and refuses this: as a rule it has no room to write, and what is there can be read."""


class WrongBooks(Refused):
    """A key of the accounting holds something of another program (`redis_mend`)."""
