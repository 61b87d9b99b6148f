# SPDX-License-Identifier: Apache-2.0
"""Why nobody answers at an address, in a sentence that says what to do.

gRPC gives one code for all of it, so a plain socket tries once more: only where a call has failed, for a person who
waits.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from kvstore.errors import ServiceUnavailable
from kvstore.service_options import host_and_port, perhaps_tls, socket_path

_TRY_S = 1.0


class MayNotConnect(ServiceUnavailable):
    """The socket is there, and this user may not open it now: nor may one of its group while a server starts."""


def unreachable(address: str, *, encrypted: bool) -> ServiceUnavailable:
    """What to raise where a call could not be made to `address`."""
    path = socket_path(address)
    return _no_socket(address, path) if path is not None else _no_port(address, encrypted=encrypted)


def _no_socket(address: str, path: Path) -> ServiceUnavailable:
    try:
        is_other = path.exists() and not path.is_socket()
        with socket.socket(socket.AF_UNIX) as tried:
            tried.settimeout(_TRY_S)
            tried.connect(os.fspath(path))
    except PermissionError:
        return MayNotConnect(
            f"this user (uid {os.geteuid()}) may not connect to {address}: run as the server's user, or set "
            "service.group there and join that group"
        )
    except OSError:
        pass
    else:
        return ServiceUnavailable(
            f"no server answers at {address}, though something listens there: try again where one starts or stops just "
            "now, else name another with --address"
        )
    if is_other:
        return ServiceUnavailable(f"{path} is no socket: name the server's with --address")
    return ServiceUnavailable(
        f"no server answers at {address}: start one with `kvstore serve`, or name another with --address"
    )


def _no_port(address: str, *, encrypted: bool) -> ServiceUnavailable:
    host, port = host_and_port(address, "address")
    try:
        socket.create_connection((host, port), _TRY_S).close()
    except socket.gaierror as error:
        return ServiceUnavailable(
            f"no server answers at {address}: the host {host} is not known here ({error.strerror}): check --address"
        )
    except TimeoutError:
        return ServiceUnavailable(
            f"no server answers at {address} within {_TRY_S:g} s: see whether the host is up and firewalls let it pass"
        )
    except OSError as error:
        return ServiceUnavailable(
            f"no server answers at {address} ({error.strerror}): start one with `kvstore serve`, or name another with "
            "--address"
        )
    hint = "see whether KVSTORE_TLS_CA is who signed its certificate" if encrypted else "name another with --address"
    return ServiceUnavailable(
        f"no server answers at {address}: something listens there that does not speak as kvstore does: {hint}"
        f"{perhaps_tls(address, encrypted=encrypted)}"
    )
