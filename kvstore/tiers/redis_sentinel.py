# SPDX-License-Identifier: Apache-2.0
"""Who is the primary, asked of Sentinels: `redis+sentinel://host:port,host:port/service`.

Credentials and TLS files in the URL are the server's; Sentinels with a password of their own take `sentinel_username`
and `sentinel_password` in the query, and TLS where the scheme is `rediss+sentinel`. redis-py asks one Sentinel after
the other and believes the first that knows a primary in working order; here it gets a share of the time for each, so
that one which hangs does not take all of it.
"""

from __future__ import annotations

import contextlib
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import redis
import redis.backoff
import redis.retry
import redis.sentinel

from kvstore.errors import ConfigError

_SENTINEL = "+sentinel"
_USER, _PASSWORD = "sentinel_username", "sentinel_password"
_LEAST_S = 0.02


class Sentinels:
    """The Sentinels of one service. Thread-safe."""

    def __init__(self, urls: list[str], service: str, server_url: str) -> None:
        self.service = service
        self.server_url = server_url
        """As redis-py reads them; its host and port are to be replaced by `primary`."""
        self._urls = urls

    @classmethod
    def of(cls, url: str) -> Sentinels | None:
        """None for a URL that names none. Raises ConfigError."""
        parts = urlsplit(url)
        if not parts.scheme.endswith(_SENTINEL):
            return None
        scheme = parts.scheme.removesuffix(_SENTINEL)
        login, at, hosts = parts.netloc.rpartition("@")
        service, _, database = parts.path.strip("/").partition("/")
        addresses = hosts.split(",")
        sound = all(host.rpartition(":")[0] and host.rpartition(":")[2].isdigit() for host in addresses)
        if not service or not sound or (database and not database.isdigit()):
            raise ConfigError(
                "the redis URL does not name Sentinels: use redis+sentinel://host:port,host:port/service, "
                "and /service/2 for database 2"
            )
        query = dict(parse_qsl(parts.query))
        user, password = query.pop(_USER, ""), query.pop(_PASSWORD, "")
        own = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""
        server_url = urlunsplit((scheme, f"{login}{at}{addresses[0]}", f"/{database or 0}", urlencode(query), ""))
        query.pop("db", None)
        urls = [urlunsplit((scheme, own + address, "", urlencode(query), "")) for address in addresses]
        return cls(urls, service, server_url)

    def primary(self, limit_s: float) -> tuple[str, int]:
        """Host and port of the primary. Raises errors of redis-py, within `limit_s` or little more."""
        share_s = max(_LEAST_S, limit_s / len(self._urls))
        limits = {"socket_timeout": share_s, "socket_connect_timeout": share_s}
        once = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        with contextlib.ExitStack() as open_ones:
            asked = redis.sentinel.Sentinel([])  # type: ignore[no-untyped-call]
            asked.sentinels = [
                open_ones.enter_context(redis.Redis.from_url(url, retry=once, **limits)) for url in self._urls
            ]
            host, port = asked.discover_master(self.service)  # type: ignore[no-untyped-call]
        return str(host), int(port)
