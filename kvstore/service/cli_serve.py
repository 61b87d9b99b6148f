# SPDX-License-Identifier: Apache-2.0
"""What `kvstore serve` does: settings, start, and an orderly end.

SIGTERM and SIGINT drain and stop, a second one stops at once; SIGHUP reads the tokens again. Signals are only noted
where they arrive, and acted on by the main thread, which does nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from kvstore.config import StoreConfig
from kvstore.errors import ConfigError
from kvstore.service.cli_tables import setting_value
from kvstore.service.logs import set_up_logging
from kvstore.service.metrics import MetricsEndpoint
from kvstore.service.preflight import Needs, lift_file_limit, preflight
from kvstore.service.rights import Gate
from kvstore.service.top import size

log = logging.getLogger("kvstore.service")

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_WAIT_S = 0.5
_STOP_NOW_S = 2.0


def read_config(path: Path | None, named: Mapping[str, str], settings: Sequence[str]) -> StoreConfig:
    """Settings of a file, the environment, flags by dotted key (empty: not given), and `KEY=VALUE` texts."""
    flags: dict[str, Any] = {}
    for key, value in named.items():
        if value:
            _put(flags, key, value)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"--set {setting}: give SECTION.KEY=VALUE, such as mover.write=through")
        _put(flags, key.strip(), value.strip())
    return StoreConfig.load(path=path, flags=flags)


def _put(tree: dict[str, Any], key: str, value: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


def print_settings(config: StoreConfig) -> None:
    """Every setting in effect, with its source."""
    rows = [
        (key, "–" if value in ("", (), {}) else setting_value(key, str(value)), source)
        for key, value, source in config.explain()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, source in rows:
        print(f"{key:{widths[0]}}  {value:{widths[1]}}  {source}")


def look_ahead(config: StoreConfig) -> None:
    """Raise ConfigError, in one line, where this host lacks what the settings need; warn where it will be slower."""
    options = config.service
    needs = Needs(
        capacity_bytes=config.host.capacity_bytes,
        pin_memory=options.pin_memory,
        huge_pages=config.host.huge_pages,
        numa_node=config.host.numa_node,
        max_sessions=options.max_sessions,
    )
    for name, tier in config.tiers.items():
        if getattr(tier, "url", "") == "embedded" and f"tiers.{name}.url" not in config.sources:
            log.warning("tiers.%s.url is not set: a private server is started for it, which no other host shares", name)
    lift_file_limit(options.max_sessions)
    for found in preflight(needs):
        if found.ok:
            continue
        text = f"{found.name}: {found.required} required, {found.available} available: {found.fix}"
        if found.needed:
            raise ConfigError(text)
        log.warning(text)


def serve(config: StoreConfig) -> int:
    """Run a server until a signal ends it; returns the exit code."""
    from kvstore.service.server import Server  # the store and all it needs: other commands start without

    options = config.service
    set_up_logging(options.log_format, options.log_level)
    with _signals() as signals:
        look_ahead(config)
        gate = Gate(options)
        server = Server(config, gate=gate)
        server.start()
        print_settings(config)  # not before: an error that prevents the start would stand below a screen of them
        with contextlib.ExitStack() as stack:
            stack.callback(server.stop)
            if options.metrics_listen:
                endpoint = MetricsEndpoint(options.metrics_listen, server.stats, server.latencies, server.durations)
                log.info("metrics at http://%s/metrics", stack.enter_context(endpoint).address)
            capacity = size(config.host.capacity_bytes)
            for handler in logging.getLogger().handlers:
                handler.flush()  # what was said before is there once it is ready
            print(f"ready: {server.address} arena {capacity} boot {server.boot_id.hex()[:8]}", flush=True)
            notify("READY=1")
            _until_told_to_stop(signals, server.reload_rights)
            notify("STOPPING=1")
            log.info("draining for at most %g s; another signal stops at once", options.drain_s)
            drained = _unless_told_again(signals, lambda: server.drain(options.drain_s))
            if drained:
                log.info("stopping")
                drained = _unless_told_again(signals, stack.close)
            if not drained:
                log.warning("stopping at once")
                _stop_now(stack.pop_all().close)
    log.info("stopped")
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[queue.SimpleQueue[int]]:
    """Signals in the order they came. A SimpleQueue may be filled from a signal's handler."""
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    before = {
        number: signal.signal(number, lambda number, _: arrived.put(number)) for number in (*_STOPPING, signal.SIGHUP)
    }
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _next(signals: queue.SimpleQueue[int], wait_s: float) -> int | None:
    try:
        return signals.get(timeout=wait_s)
    except queue.Empty:
        return None


def _until_told_to_stop(signals: queue.SimpleQueue[int], hang_up: Callable[[], object]) -> None:
    while True:
        # Handlers run on this thread, between two instructions: a wait without end would never let them.
        number = _next(signals, _WAIT_S)
        if number == signal.SIGHUP:
            hang_up()
        elif number in _STOPPING:
            return


def _unless_told_again(signals: queue.SimpleQueue[int], work: Callable[[], object]) -> bool:
    """Do `work` on another thread; False as soon as a further signal says to stop at once."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="kvstore-stopping")
    future = executor.submit(work)
    executor.shutdown(wait=False)
    while not wait([future], 0.05).done:
        if _next(signals, 0.0) in _STOPPING:
            return False
    future.result()
    return True


def _stop_now(stop: Callable[[], object]) -> None:
    """End this process, with whatever `stop` gets done in a moment: sockets removed, children ended."""
    thread = threading.Thread(target=stop, name="kvstore-stopping", daemon=True)
    thread.start()
    thread.join(_STOP_NOW_S)
    sys.stdout.flush()
    logging.shutdown()
    os._exit(1)


def notify(state: str) -> None:
    """Tell systemd (Type=notify), where it asked to be told."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), address)
    except OSError as error:
        log.warning("systemd cannot be told %s: %s", state, error)
