# SPDX-License-Identifier: Apache-2.0
"""The sidecar's server: one store, served to the processes of a host and to clients elsewhere.

A life: preflight → store with a shared arena → door → listening → serving → draining → stopped. Calls run on a pool
of threads of which streams may hold some and never all (`kvstore.service.calls`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

import kvstore
from kvstore.clock import Clock, MonotonicClock
from kvstore.config import StoreConfig
from kvstore.errors import CapacityError, ConfigError, MappingClosed
from kvstore.private import open_directory, own_directory
from kvstore.service.calls import Calls
from kvstore.service.care import Care
from kvstore.service.claim import clear_stale, group_id
from kvstore.service.door import Door, Peer
from kvstore.service.handlers import SEND_AHEAD, add_to_server
from kvstore.service.handshake import MAX_MESSAGE_BYTES
from kvstore.service.metrics import Latencies
from kvstore.service.namespaces import Namespaces
from kvstore.service.requests import Requests
from kvstore.service.rights import Gate, read_secret
from kvstore.service.saves import Quarantine
from kvstore.service.servicer import Identity, Servicer
from kvstore.service.sessions import SessionBook
from kvstore.service.status import abort_with
from kvstore.service.streams import StallWatch
from kvstore.service_options import ServiceOptions, default_directory
from kvstore.stats import Durations
from kvstore.store import KVStore
from kvstore.tiers.base import Tier
from kvstore.wire import kvstore_pb2 as pb

log = logging.getLogger("kvstore.service")

_UNARY_THREADS = 32
_SWITCH_S = 0.0005
"""How long one thread may keep the interpreter from another: the default of 5 ms is a match's time ten times over."""
_STOP_S = 2.0
_POLL_S = 0.02
_REFLECTIONS = 8
_SPARE_CONNECTIONS = 64
"""At each place, beyond one a session: of people, and of those who are not known yet."""
_HANDSHAKE_S = 10.0
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    *SEND_AHEAD,
)


class Reflection(reflection.ReflectionServicer):
    """Which calls there are, told to anyone: so few streams at once, and none that stands still."""

    def __init__(self, names: Sequence[str], stalls: StallWatch) -> None:
        super().__init__(names)
        self._stalls = stalls
        self._free = threading.BoundedSemaphore(_REFLECTIONS)

    def ServerReflectionInfo(  # noqa: N802 as the protocol has it
        self, requests: Iterable[ServerReflectionRequest], context: Any
    ) -> Iterator[ServerReflectionResponse]:
        if not self._free.acquire(blocking=False):
            abort_with(context, CapacityError(f"{_REFLECTIONS} tools ask just now, which is the limit"))
        try:
            arriving = iter(requests)
            while (request := self._stalls.soon(arriving, context.cancel)) is not None:
                replies = super().ServerReflectionInfo(iter([request]), context)
                yield from self._stalls.sending(replies, context.cancel)
        except grpc.RpcError:  # it was given up
            context.cancel()
        finally:
            self._free.release()


class Server:
    """Serves one store. `start`, then `drain` and `stop`.

    Attributes:
        boot_id: 16 random bytes, new with each server.
        latencies: how long calls took.
    """

    def __init__(
        self, config: StoreConfig, *, gate: Gate, clock: Clock | None = None, tiers: Sequence[Tier] | None = None
    ) -> None:
        """A server that is not started yet. `tiers` replaces the configured lower tiers; it closes them either way."""
        self.boot_id = secrets.token_bytes(16)
        self.latencies = Latencies()
        self._config = config
        self._gate = gate
        self._clock = clock or MonotonicClock()
        self._tiers = tiers
        self._addresses: list[str] = []
        self._stopped = threading.Event()
        self._started = False
        self._stop_lock = threading.Lock()

    @property
    def address(self) -> str:
        """Where clients of this host connect, or of others if it is not on a Unix socket."""
        return self._addresses[0]

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every address that is listened on; ports chosen by the host are filled in."""
        return tuple(self._addresses)

    # -- starting ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and serve. Raises ConfigError, with nothing left behind, where that is not possible."""
        sys.setswitchinterval(_SWITCH_S)
        options = self._config.service
        secret = read_secret(options)
        with contextlib.ExitStack() as undo:
            self._store = KVStore(
                self._config, clock=self._clock, tiers=self._tiers, shared_memory=options.unix_path is not None
            )
            undo.callback(self._store.close)
            self._sessions = SessionBook(
                clock=self._clock,
                lease_s=self._config.request.lease_s,
                max_sessions=options.max_sessions,
                max_streams=options.max_streams,
                forget=self._store.forget,
                forget_peer=self._forget_peer,
                quarantine=Quarantine(self._store.release_detached),
            )
            undo.callback(self._sessions.close)
            self._open_door(options)
            undo.callback(self._close_door)
            self._serve(options, secret, undo)
            undo.pop_all()
        self._started = True
        if options.pin_memory:
            threading.Thread(target=self._pin, name="kvstore-pin", daemon=True).start()

    def _pin(self) -> None:
        """Lock the arena once it is populated. The preflight has seen that the limit allows it."""
        self._store.wait_ready(None)
        try:
            self._store.arena.pin()
        except CapacityError as error:
            log.error("%s", error)
        except MappingClosed:  # the server stopped before
            pass
        else:
            log.info("the arena is locked in memory")

    def _open_door(self, options: ServiceOptions) -> None:
        self._door: Door | None = None
        if options.unix_path is None:
            return
        is_default = str(options.unix_path.parent) == default_directory()
        if is_default:
            own_directory(default_directory())
        arena = self._store.arena
        self._door = Door(
            options.unix_path,
            arena.memory_fd,
            arena.generation_fd,
            arena.capacity_bytes,
            self.boot_id,
            on_exit=self._process_died,
            allowed_uids=self._gate.mapping_uids(),
            unmapped_uids=self._gate.unmapped_uids(),
            group=options.group,
            max_peers=options.max_sessions,
        )
        if is_default:  # only now is no other server there, whose clients need it as it was
            open_directory(default_directory(), group_id(options.group))

    def _serve(self, options: ServiceOptions, secret: bytes, undo: contextlib.ExitStack) -> None:
        self._executor = ThreadPoolExecutor(_UNARY_THREADS + options.max_streams, thread_name_prefix="kvstore-call")
        self._grpc = grpc.server(self._executor, options=(*_OPTIONS, *_limits(options)))
        calls = Calls(self.latencies, options.max_streams)
        namespaces = Namespaces(self._store, secret)
        requests = Requests(self._store, self._sessions, namespaces, self._clock)
        self._care = Care(self._store, self._sessions, namespaces, self._config, self._clock)
        request = self._config.request
        self._servicer = Servicer(
            self._store,
            self._sessions,
            namespaces,
            requests,
            self._care,
            calls,
            identity=Identity(self.boot_id, kvstore.__version__, request.lease_s, request.hold_s),
            gate=self._gate,
            door=self._door,
        )
        undo.callback(self._servicer.close)
        add_to_server(self._servicer, self._grpc)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        name = pb.DESCRIPTOR.services_by_name["KVStore"].full_name
        self._service_names = ("", name)
        told = Reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), self._servicer.stalls)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(told, self._grpc)  # type: ignore[no-untyped-call]
        undo.callback(self._stop_listening, options)
        self._listen(options)
        self._grpc.start()
        self._set_health(serving=True)
        log.info("serving at %s", ", ".join(self._addresses))

    def _listen(self, options: ServiceOptions) -> None:
        path = options.unix_path
        if path is not None:
            # The door's lock says that no other kvstore serves here. gRPC replaces any socket that it finds.
            clear_stale(str(path))
            before = os.umask(0o177)  # nobody may connect before owner and mode are right
            try:
                self._bind(f"unix:{path}", None)
                os.chmod(path, 0o600)
                gid = group_id(options.group)
                if gid is not None:
                    os.chown(path, -1, gid)
                    os.chmod(path, 0o660)
            finally:
                os.umask(before)
            self._addresses.append(f"unix:{path}")
        for address in options.tcp_addresses:
            port = self._bind(address, _credentials(options))
            self._addresses.append(f"{address.rpartition(':')[0]}:{port}")

    def _stop_listening(self, options: ServiceOptions) -> None:
        """Leave the places that were bound: another was not to be had."""
        self._grpc.stop(None)
        del self._grpc  # it lets go of its ports only as it goes itself
        self._executor.shutdown()
        if options.unix_path is not None and self._addresses:
            options.unix_path.unlink(missing_ok=True)
        self._addresses.clear()

    def _bind(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        try:
            if credentials is None:
                return self._grpc.add_insecure_port(address)
            return self._grpc.add_secure_port(address, credentials)
        except RuntimeError as error:
            why = str(error).partition("; set GRPC_VERBOSITY")[0]
            raise ConfigError(
                f"cannot listen at {address}: {why}: another program does, or the address is not this host's"
            ) from error

    def _set_health(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._service_names:
            self._health.set(name, status)

    # -- serving -----------------------------------------------------------------------------------------------

    def _process_died(self, peer: Peer) -> None:
        self._servicer.process_died(peer)

    def _forget_peer(self, peer: Peer) -> None:
        if self._door is not None:
            self._door.forget(peer)
            self._servicer.lanes.finish(peer)

    def stats(self) -> dict[str, float]:
        """Counters and gauges, as an admin sees them."""
        return self._care.values()

    def durations(self) -> Mapping[str, Durations]:
        """How long lookups, reads and writes of each tier took."""
        return self._store.durations()

    def check(self) -> list[str]:
        """Broken invariants of the store; empty when healthy."""
        return self._store.check()

    def flush(self, timeout_s: float) -> bool:
        """Wait until queued writes went to lower tiers; False on time-out."""
        return self._store.flush(timeout_s)

    def drop_host(self) -> int:
        """Empty the host tier alone. Returns the number of blocks."""
        return self._store.drop_host()

    def reload_rights(self) -> None:
        """Read the tokens file again. Clients that have other rights by it lose their sessions."""
        if self._gate.reload():
            self._servicer.judge_again()

    @property
    def draining(self) -> bool:
        return self._servicer.draining.is_set()

    @property
    def sessions(self) -> SessionBook:
        """Who is connected."""
        return self._sessions

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Wait until the arena's memory is populated; True when it is."""
        return self._store.wait_ready(timeout_s)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the server has stopped; True when it has."""
        return self._stopped.wait(timeout_s)

    # -- stopping ----------------------------------------------------------------------------------------------

    def drain(self, limit_s: float) -> bool:
        """Take no new requests, let clients finish theirs and writes go down; False where the limit cut that short."""
        deadline_s = time.monotonic() + limit_s
        self._servicer.draining.set()
        self._set_health(serving=False)
        while any(session.loads or session.saves for session in self._sessions.all()):
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        return self._store.drain(max(0.0, deadline_s - time.monotonic()))

    def stop(self) -> None:
        """End all calls and sessions, close the store, remove the sockets. Idempotent."""
        with self._stop_lock:
            if not self._started or self._stopped.is_set():
                return
            self._servicer.draining.set()
            self._servicer.end_streams()
            self._health.enter_graceful_shutdown()
            self._grpc.stop(_STOP_S).wait()
            self._close_door()
            self._sessions.close()
            self._executor.shutdown(wait=True)
            self._servicer.close()
            self._store.close()
            self._stopped.set()

    def _close_door(self) -> None:
        if self._door is not None:
            self._door.close()


def _limits(options: ServiceOptions) -> Sequence[tuple[str, int]]:
    """Each connection takes a descriptor, also one that never shows a credential."""
    silent_ms = round(1000 * options.silent_connection_s)
    return (
        ("grpc.max_allowed_incoming_connections", options.max_sessions + _SPARE_CONNECTIONS),  # at each place
        ("grpc.server_handshake_timeout_ms", min(silent_ms, round(1000 * _HANDSHAKE_S))),  # up to its HTTP/2 settings
        ("grpc.max_connection_idle_ms", silent_ms),  # without a call; a session's stream is one
    )


def _credentials(options: ServiceOptions) -> grpc.ServerCredentials | None:
    """TLS of the TCP sockets; None without."""
    if not options.tls_cert:
        return None
    try:
        pair = (Path(options.tls_key).read_bytes(), Path(options.tls_cert).read_bytes())
        clients = Path(options.client_ca).read_bytes() if options.client_ca else None
    except OSError as error:
        raise ConfigError(f"TLS file {error.filename} cannot be read: {error.strerror}") from error
    return grpc.ssl_server_credentials([pair], clients, require_client_auth=clients is not None)
