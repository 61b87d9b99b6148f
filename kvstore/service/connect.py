# SPDX-License-Identifier: Apache-2.0
"""How a process comes by a client: its server's address and credentials, from arguments and the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.service.client import SidecarStore
from kvstore.service.connection import LinkOptions
from kvstore.service.remote import DEFAULT_BUFFER_BYTES
from kvstore.service_options import default_address, socket_path


def connect(
    address: str = "",
    *,
    mapped: bool | None = None,
    name: str = "",
    token: str = "",
    tls_ca: str = "",
    tls_cert: str = "",
    tls_key: str = "",
    call_deadline_s: float = 0.5,
    progress_s: float = 10.0,
    buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    wait_s: float = 5.0,
) -> SidecarStore:
    """A store whose blocks lie with the server at `address`.

    Args:
        address: `unix:PATH` or `host:port`; empty for KVSTORE_ADDRESS, or the default Unix socket of this user.
        mapped: copy from and to the server's memory (Unix sockets only). None: if the address is a Unix socket, and
            this user may have the memory; one with limited rights by its `uid` may not.
        name: for people, in `kvstore status`; empty for the program's.
        token, tls_ca, tls_cert, tls_key: credentials; empty for KVSTORE_TOKEN, KVSTORE_TLS_CA, …
        call_deadline_s: how long one call may take before it counts as a miss.
        progress_s: how long a load from lower tiers may go without a block before it ends there.
        buffer_bytes: memory that bytes of an unmapped client pass through, at most.
        wait_s: how long to wait for a server that does not answer yet.

    Raises ServiceUnavailable where nobody answers within `wait_s`, AccessDenied or ProtocolError where the server
    refuses, ConfigError for a setting that makes no sense. Once connected, a server that goes away is a miss.
    """
    env = os.environ
    address = address or env.get("KVSTORE_ADDRESS", "") or default_address()
    path = socket_path(address)
    if mapped and path is None:
        raise ConfigError(
            f"mapped=True with address {address!r}: only a server on a Unix socket of this host can be mapped"
        )
    options = LinkOptions(
        address=address,
        mapped=path is not None if mapped is None else mapped,
        may_stream=mapped is None,
        name=name or os.path.basename(sys.argv[0]) or "python",
        call_deadline_s=call_deadline_s,
        progress_s=progress_s,
        buffer_bytes=buffer_bytes,
        token=token or env.get("KVSTORE_TOKEN", ""),
        tls_ca=_pem(tls_ca or env.get("KVSTORE_TLS_CA", ""), "tls_ca"),
        tls_cert=_pem(tls_cert or env.get("KVSTORE_TLS_CERT", ""), "tls_cert"),
        tls_key=_pem(tls_key or env.get("KVSTORE_TLS_KEY", ""), "tls_key"),
    )
    return SidecarStore(options, wait_s=wait_s)


def _pem(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes() if path else b""
    except OSError as error:
        raise ConfigError(f"{name} is {path}: it cannot be read: {error.strerror}") from error
