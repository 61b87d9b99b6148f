# SPDX-License-Identifier: Apache-2.0
"""Settings of the sidecar: the `[service]` section of `kvstore.config`.

It stands beside `config`, below the service that reads it, so that the schema of all settings needs no grpc.
Nothing here opens, reads or checks a file: `kvstore.service.rights` does, when the server starts.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.clock import check_seconds
from kvstore.errors import ConfigError

UNIX = "unix:"
SEND_IN_THE_CLEAR = "KVSTORE_SEND_MY_TOKEN_OVER_THE_NETWORK_IN_THE_CLEAR"
CLIENT_VARIABLES = (
    "KVSTORE_ADDRESS",
    "KVSTORE_TOKEN",
    "KVSTORE_TLS_CA",
    "KVSTORE_TLS_CERT",
    "KVSTORE_TLS_KEY",
    SEND_IN_THE_CLEAR,
)
"""What the environment tells clients; no settings of a store."""

_LOG_FORMATS = ("text", "json")
_MAX_SOCKET_PATH = 107 - len(".door")  # sun_path holds 107 bytes, and the door's name is longer


_DEFAULT_DIRECTORY = "/tmp/kvstore-"


def default_directory() -> str:
    """Where sockets lie for want of XDG_RUNTIME_DIR: a directory that a server makes, this user's alone.

    In /tmp itself anybody could hold the lock beside a socket, or make either before their user does.
    """
    return f"{_DEFAULT_DIRECTORY}{os.getuid()}"


def user_of(directory: str) -> int | None:
    """Whose `default_directory` this is, by its name: anybody could have made it. None of others."""
    user = directory.removeprefix(_DEFAULT_DIRECTORY)
    return int(user) if user != directory and user.isdecimal() else None


def default_address() -> str:
    """Where a server listens, and a client looks for one, when told nothing: a Unix socket of this user."""
    directory = os.environ.get("XDG_RUNTIME_DIR", "")
    path = f"{directory}/kvstore.sock"
    if os.path.isabs(directory) and os.path.isdir(directory) and len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        return f"{UNIX}{path}"
    return f"{UNIX}{default_directory()}/kvstore.sock"


def socket_path(address: str) -> Path | None:
    """Path of a `unix:PATH` address; None for `host:port`. Raises ConfigError for what is neither."""
    if address.startswith(UNIX):
        path = Path(address.removeprefix(UNIX))
        if not path.is_absolute() or len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            raise ConfigError(
                f"address {address!r}: give unix:PATH with an absolute path of at most {_MAX_SOCKET_PATH} bytes"
            )
        return path
    host_and_port(address, "address")
    return None


def host_and_port(address: str, name: str) -> tuple[str, int]:
    """`127.0.0.1:9400` or `[::1]:9400` as host and port. Raises ConfigError for anything else."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    right_host = bool(host) and bracketed == (":" in host)
    if not colon or not right_host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{name} is {address!r}: give unix:PATH or host:port, such as 127.0.0.1:9400")
    return host, int(port)


def check_token_is_hidden(address: str, token: str, *, encrypted: bool) -> None:
    """Raise ConfigError where an access token would cross a network that anyone may listen to."""
    if not token or encrypted or socket_path(address) is not None or os.environ.get(SEND_IN_THE_CLEAR) == "yes":
        return
    host, _ = host_and_port(address, "address")
    try:
        on_this_host = ipaddress.ip_address(host).is_loopback
    except ValueError:
        on_this_host = host == "localhost"
    if not on_this_host:
        raise ConfigError(
            f"an access token would go to {address} in the clear: set KVSTORE_TLS_CA (tls_ca) to the PEM file of who "
            f"signed the server's certificate, or take the token away ({SEND_IN_THE_CLEAR}=yes sends it all the same)"
        )


def perhaps_tls(address: str, *, encrypted: bool) -> str:
    """What else may be wrong where nobody answers: a server that speaks TLS hangs up on who does not."""
    return "" if encrypted or socket_path(address) is not None else "; if it speaks TLS, set KVSTORE_TLS_CA (tls_ca)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """Settings of the sidecar.

    Attributes:
        listen: `unix:PATH`, or `host:port`. Clients on this host map memory only through a Unix socket. The default is
            `kvstore.sock` in XDG_RUNTIME_DIR, or in /tmp/kvstore-UID, which the server makes for its user alone.
        listen_tcp: a second address, `host:port`, for clients and sidecars on other hosts; empty for none.
        group: name or number of the group that may use the Unix socket (mode 0660); empty: this user alone (0600).
        allowed_uids: users who may map the arena. Empty: the server's own, and with `group` the group's members. Not
            looked at where the tokens file names a user.
        tls_cert, tls_key: PEM files of the server, for TCP.
        client_ca: PEM file; clients must then show a certificate that it signed.
        tokens_file: who may do what, as TOML (`kvstore.service.rights`). Must be readable by its owner only.
        serve_anyone_on_the_network_without_authentication: lets TCP start without TLS, tokens and certificates.
        secret_file: cluster secret that keys all block ids, the same on all hosts. Readable by its owner only.
        metrics_listen: `host:port` of the Prometheus endpoint `/metrics`, which asks for no token; empty for none.
        max_sessions: clients at once; those of one tenant take half of it at most.
        max_session_share: of the host's memory, that the holds, loads and saves of one client may keep from eviction;
            of all clients of a tenant together.
        max_streams: open Load, Read, Write, Fetch, Session and Watch calls at once; each has a thread. Those of one
            tenant take half of it at most.
        silent_connection_s: a connection without a call is closed after so long, one that has not shaken hands after
            10 s at most. There are `max_sessions` and 64 more at each address.
        drain_s: how long a stopping server lets clients finish and writes go down.
        pin_memory: lock the arena in memory (mlock), so that it cannot be swapped out.
        log_format: text or json, on standard error. log_level: debug, info, warning or error.
    """

    listen: str = field(default_factory=default_address)
    listen_tcp: str = ""
    group: str = ""
    allowed_uids: tuple[int, ...] = ()
    tls_cert: str = ""
    tls_key: str = ""
    client_ca: str = ""
    tokens_file: str = ""
    serve_anyone_on_the_network_without_authentication: bool = False
    secret_file: str = ""
    metrics_listen: str = ""
    max_sessions: int = 1024
    max_session_share: float = 0.9
    max_streams: int = 256
    silent_connection_s: float = 60.0
    drain_s: float = 10.0
    pin_memory: bool = False
    log_format: str = "text"
    log_level: str = "info"

    def __post_init__(self) -> None:
        socket_path(self.listen)
        if self.listen_tcp:
            host_and_port(self.listen_tcp, "service.listen_tcp")
        if self.metrics_listen:
            host_and_port(self.metrics_listen, "service.metrics_listen")
        if bool(self.tls_cert) != bool(self.tls_key):
            missing = "tls_key" if self.tls_cert else "tls_cert"
            raise ConfigError(f"service.{missing} is empty: TLS needs both service.tls_cert and service.tls_key")
        if self.client_ca and not self.tls_cert:
            raise ConfigError("service.client_ca is set without TLS: set service.tls_cert and service.tls_key too")
        if self.log_format not in _LOG_FORMATS:
            raise ConfigError(f"service.log_format is {self.log_format!r}: use one of {', '.join(_LOG_FORMATS)}")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"service.log_level is {self.log_level!r}: use one of debug, info, warning, error")
        for name, least in (("max_sessions", 1), ("max_streams", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"service.{name} is {getattr(self, name)}: it must be at least {least}")
        check_seconds("service.drain_s", self.drain_s, least=0)
        check_seconds("service.silent_connection_s", self.silent_connection_s, least=0.1)
        if not 0 < self.max_session_share <= 1:
            raise ConfigError(f"service.max_session_share is {self.max_session_share}: give more than 0, and at most 1")

    @property
    def unix_path(self) -> Path | None:
        """Path of the Unix socket, if `listen` is one."""
        return socket_path(self.listen)

    @property
    def tcp_addresses(self) -> tuple[str, ...]:
        """Every `host:port` to listen on."""
        first = () if self.unix_path is not None else (self.listen,)
        return (*first, self.listen_tcp) if self.listen_tcp else first
